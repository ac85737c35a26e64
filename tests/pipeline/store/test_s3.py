"""The data stages on a real S3 server over HTTP, also when it fails: nothing is lost, twice or torn."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem

from model.text_encoders import TINY_ENCODERS
from pipeline.data import cropping, ingest, precompute, sample_pixels, shots
from pipeline.data import filter as filter_stage
from pipeline.data.cropping import Bucket
from pipeline.data.filter import FilterConfig, Threshold
from pipeline.runtime import work_plan
from pipeline.store import delta_tables, schema, source_cache, storage
from pipeline.video import decoding
from tests import settings
from tests.helpers import object_store
from tests.helpers.clips import MEDIA
from tests.helpers.object_store import BUCKET, FaultyProxy
from tests.helpers.processes import ROOT
from tests.helpers.tiny_models import save_vae

FILES = ["cup.mp4", "fig.jpg", "box.mp4", "pan_dogs.mp4"]


@pytest.fixture(scope="module")
def store():
    with object_store.running_store() as address:
        yield address


@pytest.fixture
def proxy(store, monkeypatch):
    monkeypatch.setitem(storage._S3_OPTIONS["config_kwargs"], "read_timeout", 2)
    monkeypatch.setattr(storage, "_FIRST_PAUSE_S", 0.02)
    proxy = FaultyProxy(store, stall_s=4.0)
    with object_store.reached_through(proxy.url):
        yield proxy
    proxy.shutdown()
    proxy.server_close()


def upload(store, prefix: str) -> str:
    client = object_store.client("http://{}:{}".format(*store))
    for name in FILES:
        client.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=(MEDIA / name).read_bytes())
    client.put_object(Bucket=BUCKET, Key=f"{prefix}/cup.txt", Body=b"a cup of coffee")
    client.put_object(Bucket=BUCKET, Key=f"{prefix}/broken.mp4", Body=b"not a video")
    return f"s3://{BUCKET}/{prefix}"


def run_pending(folder: str, config, sources, id_column: str, make) -> None:
    """What run() does, in this process: plan, make each shard, commit."""
    pending = work_plan.plan(folder, sources, id_column, config.fingerprint, 2).pending
    reports = [make({"shard": shard.to_json()}, config) for shard in pending]
    work_plan.commit(folder, config.table_schema, reports)


@pytest.mark.parametrize("fault", object_store.FAULTS)
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_each_fault_of_a_request_is_survived(proxy, method, fault):
    url = f"s3://{BUCKET}/faults/{method}-{fault.replace(' ', '-')}.bin"
    data = os.urandom(300_000)
    if method == "GET":
        storage.write_bytes(url, data)
    proxy.script = [(method, "/faults/", fault)] * 2
    if method == "PUT":
        storage.write_bytes(url, data)
    assert storage.read_bytes(url) == data
    assert proxy.happened[fault] == 2 and not proxy.script


def test_a_large_write_that_fails_at_every_step_is_whole_in_the_end(proxy, tmp_path, monkeypatch):
    monkeypatch.setitem(storage._S3_OPTIONS["config_kwargs"], "read_timeout", 20)
    source = tmp_path / "large"
    source.write_bytes(os.urandom(1024) * (101 * 1024))  # so large that it is sent in parts
    proxy.script = [
        ("POST", "?uploads", "error 500"),
        ("PUT", "partNumber=2", "cut request"),
        ("PUT", "partNumber=1", "lost reply"),
        ("POST", "?uploadId", "lost reply"),
    ]
    url = f"s3://{BUCKET}/large.bin"
    with storage.whole_file(url) as path:
        os.link(source, path)
    assert not proxy.script
    assert storage.read_bytes(url) == source.read_bytes()


def test_an_outage_ends_the_job_and_never_becomes_an_error_row(proxy, store, monkeypatch):
    monkeypatch.setattr(S3FileSystem, "retries", 1)  # within each of ours
    root = upload(store, "outage")
    config = ingest.IngestConfig(input=root, output=f"s3://{BUCKET}/outage-out")
    sources = list(ingest.list_sources(config))
    proxy.rate = 1.0
    proxy.stall_s = 0.0
    with pytest.raises(storage.StorageError, match="gave up after 5 attempts"):
        ingest.ingest_source(sources[0], config, ingest._sandbox(config))


def test_refused_credentials_end_the_job_too():
    def refuse():
        raise PermissionError("The AWS Access Key Id you provided does not exist in our records.")

    with pytest.raises(storage.StorageError, match="credentials"):
        storage.reading("s3://x/y", refuse)


def test_ingest_and_filter_on_s3_in_this_process(store):
    with object_store.reached_through("http://{}:{}".format(*store)):
        root = upload(store, "raw")
        config = ingest.IngestConfig(input=root, output=f"s3://{BUCKET}/data", max_clip_frames=49)
        clips_url = storage.join(config.output, schema.CLIPS)
        run_pending(clips_url, config, ingest.list_sources(config), "source_id", ingest.ingest_shard)
        rows = delta_tables.read(clips_url).to_pylist()
        by_name = {row["uri"].rsplit("/", 1)[1]: row for row in rows}
        assert set(by_name) == {*FILES, "broken.mp4"}
        assert by_name["cup.mp4"]["caption"] == "a cup of coffee" and by_name["cup.mp4"]["source_etag"]
        assert "FFmpeg" in by_name["broken.mp4"]["error"]

        thresholds = {"exposure": Threshold(min=1)}
        scoring = FilterConfig(data=config.output, thresholds=thresholds, niqe_frames=0)
        scores_url = storage.join(config.output, schema.SCORES)
        clips = filter_stage.open_clips(config.output).read().to_pylist()
        run_pending(scores_url, scoring, clips, "clip_id", filter_stage.score_shard)
        summary = filter_stage.stage.Summary("filter")
        filter_stage.rebuild_selection(scoring, [], summary)
        assert summary.rows_in == len(rows) and summary.rows_kept == len(rows) - 1
        selected = delta_tables.read(storage.join(config.output, schema.SELECTION)).to_pylist()
        assert {row["clip_id"] for row in selected} == {row["clip_id"] for row in rows}


def test_a_node_fetches_a_source_once_for_all_its_clips_and_spans(proxy, store, monkeypatch):
    config = ingest.IngestConfig(input=upload(store, "once"), output=f"s3://{BUCKET}/once-data")
    config = dataclasses.replace(config, max_clip_frames=9)

    def fetches(name: str = "cup.mp4") -> int:
        return proxy.requests["GET", f"/{BUCKET}/once/{name}"]

    (source,) = (one for one in ingest.list_sources(config) if one["path"] == "cup.mp4")
    with source_cache.local_file(source["uri"], source["etag"], last_use=True) as path:
        clips = ingest.ingest_source(source, config, ingest._sandbox(config))
        probe = decoding.probe(path)
        about = shots.Source(probe.coded_size, probe.fps, probe.time_base)
        for begin, end in itertools.pairwise((probe.start_pts, *(clip["end_pts"] for clip in clips[:3]))):
            assert ingest.scan_span(source, about, begin, end, config) is not None
    assert len(clips) > 3 and fetches() == 2  # ingest had done with it before the spans of this test

    scoring = FilterConfig(data=config.output, thresholds={}, niqe_frames=0)
    making = {"vae": "s3://x/y", "buckets": [Bucket(5, 64, 64)], "text": TINY_ENCODERS}
    precomputing = precompute.PrecomputeConfig(data=config.output, **making)
    assert all(row["error"] is None for row in filter_stage.score_clips(clips[:2], scoring))
    for clip in clips[2:4]:
        assert filter_stage.score_clips([clip], scoring)[0]["error"] is None
        for planned in cropping.plan_samples(clip, precomputing.buckets, None, 1, 0):
            assert "hq" in sample_pixels.prepare_sample({**planned, "clip": clip}, precomputing.pixels)
    assert fetches() == 3

    def read(_: int) -> bytes:
        with source_cache.local_file(f"{config.input}/box.mp4", None) as path:
            return Path(path).read_bytes()

    with ThreadPoolExecutor(8) as pool:  # each opens the lock anew, as processes do
        assert set(pool.map(read, range(16))) == {(MEDIA / "box.mp4").read_bytes()}
    assert fetches("box.mp4") == 1

    # What was used longest ago goes when there is no room; who reads it at that moment keeps it.
    monkeypatch.setattr(source_cache, "_MAX_FILES", 2)
    with source_cache.local_file(clips[0]["uri"], clips[0]["source_etag"]) as path:
        read(0)
        with source_cache.local_file(f"{config.input}/fig.jpg", None):
            assert Path(path).read_bytes() == (MEDIA / "cup.mp4").read_bytes()
    read(0)
    assert fetches() == 3 and fetches("box.mp4") == 1
    assert filter_stage.score_clips(clips[:1], scoring)[0]["error"] is None
    assert fetches() == 4
    folder = source_cache._folder()
    assert len([path for path in folder.iterdir() if not path.name.startswith(".")]) == 2
    source_cache.clear()
    assert not folder.exists()


def test_a_listing_longer_than_a_page_is_complete(store, monkeypatch):
    monkeypatch.setattr(storage, "_KEYS_PER_PAGE", 7)
    client = object_store.client("http://{}:{}".format(*store))
    for number in range(40):
        client.put_object(Bucket=BUCKET, Key=f"many/{number % 3}/{number}.bin", Body=b"x" * number)
    with object_store.reached_through("http://{}:{}".format(*store)):
        found = list(storage.walk(f"s3://{BUCKET}/many"))
        assert list(storage.walk(f"s3://{BUCKET}/man")) == []  # a prefix is a folder
        ((url, size, _),) = storage.walk(f"s3://{BUCKET}/many/1/7.bin")
        assert (url, size) == (f"s3://{BUCKET}/many/1/7.bin", 7)
    assert {url: size for url, size, _ in found} == {
        f"s3://{BUCKET}/many/{number % 3}/{number}.bin": number for number in range(40)
    }


def all_rows(client, prefix: str) -> dict[str, list[dict]]:
    """Every table's rows, straight from the store."""
    tables: dict[str, list[dict]] = {}
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    for entry in (entry for page in pages for entry in page.get("Contents", [])):
        inner = entry["Key"].removeprefix(prefix + "/")
        if not inner.endswith(".parquet"):
            continue
        data = client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read()
        table = pq.read_table(io.BytesIO(data))  # a torn file fails here
        tables.setdefault(inner.rsplit("/", 1)[0], []).extend(table.to_pylist())
    return tables


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_stages_under_ray_through_a_failing_store_equal_those_of_a_sound_one(store, tmp_path):
    sound = "http://{}:{}".format(*store)
    client = object_store.client(sound)
    raw = upload(store, "stage-raw")
    with object_store.reached_through(sound):
        vae = save_vae(f"s3://{BUCKET}/vae")
    proxy = FaultyProxy(store, seed=4)
    stop, torn = threading.Event(), []

    def watch() -> None:
        while not stop.wait(0.5):
            with contextlib.suppress(client.exceptions.NoSuchKey):
                try:
                    all_rows(client, "failing")
                except OSError as error:
                    torn.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    roots = {prefix: f"s3://{BUCKET}/{prefix}" for prefix in ("sound", "failing")}
    reached = object_store.environment(proxy.url)
    stages = subprocess.Popen(
        [sys.executable, "-m", "tests.pipeline.store.data_stages", raw, vae, *roots.values()],
        cwd=ROOT,
        env={**settings.without_ray(), **reached, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "errors.txt").open("w"),
        text=True,
    )
    assert stages.stdin is not None and stages.stdout is not None
    try:
        assert stages.stdout.readline() == "done\n", (tmp_path / "errors.txt").read_text()[-3000:]
        proxy.rate = 0.06
        # Every kind for certain, whatever the order in which tasks ask; more by chance.
        proxy.script = [("PUT", ".parquet", fault) for fault in ("lost reply", "cut request", "error 500")]
        proxy.script += [("GET", ".parquet", fault) for fault in ("cut reply", "time-out")]
        proxy.script += [("PUT", "_delta_log", fault) for fault in ("lost reply", "cut request", "error 500")]
        told, _ = stages.communicate("go on\n\n")
        assert told == "done\n", (tmp_path / "errors.txt").read_text()[-3000:]
    finally:
        stop.set()
        watcher.join()
        proxy.shutdown()
        proxy.server_close()
    assert not torn
    made = {prefix: all_rows(client, prefix) for prefix in roots}
    assert all(proxy.happened[fault] for fault in object_store.FAULTS), proxy.happened
    assert proxy.happened["lost reply PUT"] and proxy.happened["cut request PUT"], proxy.happened
    tables = ("clips", "scores", "selection", "text", "latents", "latents/_index")
    for table in tables:
        key = "sample_id" if table.startswith("latents") else "clip_id"
        one, other = (sorted(made[name][table], key=lambda row: row[key]) for name in ("sound", "failing"))
        assert len({row[key] for row in other}) == len(other) > 0, f"{table}: a row stands twice"
        assert json.dumps(one, default=repr) == json.dumps(other, default=repr), table
