import json
import time
import urllib.request
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import torch
from deltalake import DeltaTable

from model.text_encoders import TINY_ENCODERS
from pipeline.data import precompute, text_embeddings
from pipeline.data.cropping import Bucket, Native
from pipeline.runtime import prometheus
from pipeline.store import bf16_columns, delta_tables, parquet, schema, storage
from pipeline.training.samples import latent_reader
from tests.helpers.data_root import make_data_root, rows_by_id
from tests.helpers.tiny_models import save_vae

ROOT = Path(__file__).resolve().parents[3]
BUCKETS = [Bucket(1, 64, 64), Bucket(5, 64, 64), Bucket(9, 96, 96)]


@pytest.fixture(scope="module")
def vae_url(tmp_path_factory) -> str:
    return save_vae(tmp_path_factory.mktemp("vae"))


def data_root(folder: Path) -> str:
    url = make_data_root(folder, ["cup.mp4", "city.mp4", "fig.jpg"], ["box.mp4", "cat.jpg"])
    broken = folder / "broken.mp4"
    broken.write_bytes((ROOT / "demo/media/pan_dogs.mp4").read_bytes()[:9000])
    clips = parquet.read_table(storage.join(url, schema.CLIPS, "part-0.parquet"))
    uris = ["file://" + str(broken) if "city" in uri else uri for uri in clips.column("uri").to_pylist()]
    clips = clips.set_column(clips.schema.get_field_index("uri"), "uri", [uris])
    parquet.write_table(storage.join(url, schema.CLIPS, "part-0.parquet"), [clips], schema.CLIPS_SCHEMA)
    return url


def config(data: str, vae: str, **changes) -> precompute.PrecomputeConfig:
    values = {"buckets": BUCKETS, "variants": 2, "samples_per_shard": 4, "samples_in_flight": 2, **changes}
    return precompute.PrecomputeConfig(data=data, vae=vae, text=TINY_ENCODERS, **values)


def latents(data: str) -> dict[str, dict]:
    return rows_by_id(data, schema.LATENTS, schema.LATENTS_SCHEMA, "sample_id")


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
        hq, lq = bf16_columns.from_columns(row, "hq_latent"), bf16_columns.from_columns(row, "lq_latent")
        assert tuple(hq.shape) == tuple(lq.shape) == size
        assert torch.isfinite(hq).all() and not torch.equal(hq, lq)
        assert json.loads(row["degradation"])["operations"]


def test_the_index_tells_where_each_good_sample_stands(made):
    index = latent_reader.read_index(made).to_pylist()
    rows = latents(made)
    assert {row["sample_id"] for row in index} == {i for i, row in rows.items() if row["error"] is None}
    assert {row["split"] for row in index} == {"train", "held_out"}
    for row in index:
        place = row["reference"]
        file = storage.path_of(storage.join(made, schema.LATENTS, place["file"]))
        group = pq.ParquetFile(file).read_row_group(place["row_group"], columns=["sample_id"])
        assert group.column("sample_id")[place["row"]].as_py() == row["sample_id"]
        assert row["video_tokens"] == schema.video_tokens(row["num_frames"], row["height"], row["width"])


def test_text_is_kept_apart_and_the_null_stands_in_the_metadata(made):
    reader = latent_reader.LatentReader(made)
    clips = delta_tables.read(storage.join(made, schema.TEXT), ["clip_id"])
    assert clips is not None and clips.num_rows == 5
    texts = text_embeddings.read_texts(made)
    assert isinstance(texts, text_embeddings.ClipTexts)
    null = texts.null
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
    DeltaTable(folder).repair()  # the table forgets what is gone
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
    from pipeline.data import cropping

    video = {"clip_id": "v", "media": "video", "num_frames": 20, "height": 273, "width": 641}
    image = {"clip_id": "i", "media": "image", "num_frames": 1, "height": 100, "width": 300}
    samples = cropping.plan_samples(video, BUCKETS, Native(21, 10**6), variants=50, seed=0)
    assert {row["bucket"] for row in samples} == {"5x64x64", "9x96x96", "native"}
    natives = [row for row in samples if row["bucket"] == "native"]
    assert {(row["num_frames"], row["height"], row["width"]) for row in natives} == {(17, 272, 640)}
    for row in samples:
        first, top, left = row["crop"]
        assert 0 <= first <= 20 - row["num_frames"]
        assert 0 <= top <= 273 - row["height"] and 0 <= left <= 641 - row["width"]
    assert len({tuple(row["crop"]) for row in samples}) > 60
    assert {row["bucket"] for row in cropping.plan_samples(image, BUCKETS, None, 1, 0)} == {"1x64x64"}
    for size in [(4, 64, 64), (5, 60, 64)]:
        with pytest.raises(ValueError, match="buckets"):
            Bucket(*size)


def test_a_dry_run_counts_measures_and_makes_nothing(made, vae_url):
    folder = Path(storage.path_of(made))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    summary = precompute.run(config(made, vae_url, dry_run=True, dry_run_samples=2, variants=5))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")} == before
    # 3 videos in two buckets and 2 images in one, five variants of each.
    assert summary.rows_in == 40
    found = {bucket["bucket"]: bucket for bucket in summary.details["buckets"]}
    assert {name: bucket["samples"] for name, bucket in found.items()} == {
        "1x64x64": 10,
        "5x64x64": 15,
        "9x96x96": 15,
    }
    assert found["1x64x64"]["bytes"] == 2 * 2 * 8 * 8 * 16  # HQ and LQ in bf16
    assert all(bucket["cpu_s"] > 0 and bucket["measured"] == 2 for bucket in found.values())
    assert summary.details["encoder hours"] >= 0 and summary.details["GPU hours"] == 0


def test_the_index_of_a_shard_whose_maker_was_killed_comes_later(made, vae_url):
    """The driver had committed the latents and not yet their index."""
    folder = Path(storage.path_of(storage.join(made, schema.LATENTS, schema.INDEX)))
    index = sorted(folder.glob("*.parquet"))
    lost = index[0].read_bytes()
    index[0].unlink()
    DeltaTable(folder).repair()
    summary = precompute.run(config(made, vae_url))
    assert index[0].read_bytes() == lost
    assert summary.bytes == 0 and summary.rows_kept == len(latent_reader.read_index(made))


def test_counts_are_served_to_prometheus(made):
    def served() -> dict[str, float]:
        """Rows written, by table, as a scrape of every node finds them."""
        found: dict[str, float] = {}
        for node in ray.nodes():
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with urllib.request.urlopen(url, timeout=20) as answer:
                lines = answer.read().decode().splitlines()
            for line in lines:
                if line.startswith(f"ray_{prometheus.ROWS}_total{{"):
                    table = line.split('table="')[1].split('"')[0]
                    found[table] = found.get(table, 0) + float(line.rsplit(" ", 1)[1])
        return found

    deadline = time.monotonic() + 90
    while served().get("latents", 0) < 16 and time.monotonic() < deadline:
        time.sleep(2)
    assert served()["latents"] >= 16 and served()["text"] >= 5
