import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from model.text import TINY_ENCODERS
from pipeline import batches, bfloat16, precompute, schema, storage, text_stage
from pipeline.sampling import Bucket, Native
from tests.pipeline.data_root import make_data_root
from tests.pipeline.processes import kill_tree
from tests.pipeline.tiny_models import save_vae

ROOT = Path(__file__).resolve().parents[2]
BUCKETS = [Bucket(1, 64, 64), Bucket(5, 64, 64), Bucket(9, 96, 96)]


@pytest.fixture(scope="module")
def vae_url(tmp_path_factory) -> str:
    return save_vae(tmp_path_factory.mktemp("vae"))


def data_root(folder: Path) -> str:
    url = make_data_root(folder, ["cup.mp4", "city.mp4", "fig.jpg"], ["box.mp4", "cat.jpg"])
    broken = folder / "broken.mp4"
    broken.write_bytes((ROOT / "demo/media/pan_dogs.mp4").read_bytes()[:9000])
    clips = storage.read_table(storage.join(url, schema.CLIPS, "part-0.parquet"))
    uris = ["file://" + str(broken) if "city" in uri else uri for uri in clips.column("uri").to_pylist()]
    clips = clips.set_column(clips.schema.get_field_index("uri"), "uri", [uris])
    storage.write_table(storage.join(url, schema.CLIPS, "part-0.parquet"), [clips], schema.CLIPS_SCHEMA)
    return url


def config(data: str, vae: str, **changes) -> precompute.PrecomputeConfig:
    values = {"buckets": BUCKETS, "variants": 2, "samples_per_shard": 4, "samples_in_flight": 2, **changes}
    return precompute.PrecomputeConfig(data=data, vae=vae, text=TINY_ENCODERS, **values)


def latents(data: str) -> dict[str, dict]:
    table = storage.read_folder(storage.join(data, schema.LATENTS))
    assert table is not None and table.schema.equals(schema.LATENTS_SCHEMA)
    rows = {row["sample_id"]: row for row in table.to_pylist()}
    assert len(rows) == table.num_rows, "a sample stands twice"
    return rows


@pytest.fixture(scope="module")
def made(tmp_path_factory, vae_url, local_ray) -> str:
    url = data_root(tmp_path_factory.mktemp("data"))
    precompute.run(config(url, vae_url))
    return url


def test_every_planned_sample_has_a_row_and_a_broken_clip_has_error_rows(made):
    rows = latents(made)
    # Two videos fit two buckets, two images one; two variants each; the third video is broken.
    good = [row for row in rows.values() if row["error"] is None]
    bad = [row for row in rows.values() if row["error"] is not None]
    assert (len(good), len(bad)) == (12, 4)
    assert all("broken.mp4" in row["error"] and row["hq_latent"] is None for row in bad)
    for row in good:
        size = ((row["num_frames"] - 1) // 4 + 1, row["height"] // 8, row["width"] // 8, 16)
        hq, lq = bfloat16.from_columns(row, "hq_latent"), bfloat16.from_columns(row, "lq_latent")
        assert tuple(hq.shape) == tuple(lq.shape) == size
        assert torch.isfinite(hq).all() and not torch.equal(hq, lq)
        assert json.loads(row["degradation"])["operations"]


def test_the_index_tells_where_each_good_sample_stands(made):
    index = batches.read_index(made)
    rows = latents(made)
    assert {row["sample_id"] for row in index} == {i for i, row in rows.items() if row["error"] is None}
    assert {row["split"] for row in index} == {"train", "held_out"}
    for row in index:
        file = storage.path_of(storage.join(made, schema.LATENTS, row["file"]))
        group = pq.ParquetFile(file).read_row_group(row["row_group"], columns=["sample_id"])
        assert group.column("sample_id")[row["row"]].as_py() == row["sample_id"]
        assert row["video_tokens"] == schema.video_tokens(row["num_frames"], row["height"], row["width"])


def test_text_is_kept_apart_and_the_null_stands_in_the_metadata(made):
    reader = batches.LatentReader(made)
    clips = storage.read_folder(storage.join(made, schema.TEXT), ["clip_id"])
    assert clips is not None and clips.num_rows == 5
    null = text_stage.read_null(made)
    one = reader.text(clips.column("clip_id")[0].as_py())
    assert one.clip_l.shape[1] == null.clip_l.shape[1] == 16
    assert len(one.t5) > len(null.t5)


def test_running_again_makes_nothing_and_a_lost_file_comes_back_bit_equal(made, vae_url):
    folder = Path(storage.path_of(storage.join(made, schema.LATENTS)))
    before = {path.name: path.read_bytes() for path in folder.glob("part-*.parquet")}
    first = latents(made)
    summary = precompute.run(config(made, vae_url))
    assert summary.already_done == summary.rows_in == 16
    assert {path.name: path.read_bytes() for path in folder.glob("part-*.parquet")} == before
    lost = sorted(before)[0]
    (folder / lost).unlink()
    precompute.run(config(made, vae_url))
    assert latents(made) == first
    assert (folder / lost).read_bytes() == before[lost]


def test_another_seed_or_autoencoder_does_not_mix_in(made, vae_url):
    with pytest.raises(ValueError, match="made with other settings or models"):
        precompute.run(config(made, vae_url, seed=1))


def test_a_new_bucket_only_adds(made, vae_url):
    before = latents(made)
    precompute.run(config(made, vae_url, buckets=[*BUCKETS, Bucket(13, 96, 128)]))
    after = latents(made)
    assert {i: after[i] for i in before} == before
    assert {row["num_frames"] for i, row in after.items() if i not in before} == {13}


def test_samples_are_crops_that_fit_and_images_go_to_one_frame_buckets():
    from pipeline import sampling

    video = {"clip_id": "v", "media": "video", "num_frames": 20, "height": 273, "width": 641}
    image = {"clip_id": "i", "media": "image", "num_frames": 1, "height": 100, "width": 300}
    samples = sampling.plan_samples(video, BUCKETS, Native(21, 10**6), variants=50, seed=0)
    assert {row["bucket"] for row in samples} == {"5x64x64", "9x96x96", "native"}
    natives = [row for row in samples if row["bucket"] == "native"]
    assert {(row["num_frames"], row["height"], row["width"]) for row in natives} == {(17, 272, 640)}
    for row in samples:
        first, top, left = row["crop"]
        assert 0 <= first <= 20 - row["num_frames"]
        assert 0 <= top <= 273 - row["height"] and 0 <= left <= 641 - row["width"]
    assert len({tuple(row["crop"]) for row in samples}) > 60
    assert {row["bucket"] for row in sampling.plan_samples(image, BUCKETS, None, 1, 0)} == {"1x64x64"}
    for size in [(4, 64, 64), (5, 60, 64)]:
        with pytest.raises(ValueError, match="buckets"):
            Bucket(*size)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_midway_and_run_again_gives_the_rows_of_an_undisturbed_run(tmp_path, vae_url):
    whole, killed = data_root(tmp_path / "whole"), data_root(tmp_path / "killed")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}

    def start(data: str) -> subprocess.Popen:
        arguments = ["--config", "configs/demo/precompute.yaml", "--data", data, "--vae", vae_url]
        small = [{"frames": frames, "height": 64, "width": 64} for frames in (1, 5)]
        size = ["--samples_per_shard=2", "--variants=4", f"--buckets={json.dumps(small)}"]
        command = [sys.executable, "-m", "jobs.precompute", *arguments, *size]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)

    assert start(whole).wait(timeout=500) == 0
    moments = np.random.default_rng(0).integers(1, 5, size=2)
    for wanted in np.cumsum(moments):
        process = start(killed)
        folder = Path(storage.path_of(storage.join(killed, schema.LATENTS)))
        deadline = time.monotonic() + 240
        while len(list(folder.glob("part-*.parquet"))) < wanted and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        kill_tree(process)
    made_before = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*.parquet")}
    assert start(killed).wait(timeout=500) == 0
    for name, modified in made_before.items():
        assert (folder / name).stat().st_mtime_ns == modified, "a finished shard was made again"

    def plain(data: str) -> dict[str, dict]:
        rows = latents(data)
        return {i: {k: v for k, v in row.items() if k != "error"} for i, row in rows.items()}

    assert plain(killed) == plain(whole)
    index = batches.read_index(killed)
    assert len(index) == len({row["sample_id"] for row in index}) == len(batches.read_index(whole))
    shutil.rmtree(tmp_path)
