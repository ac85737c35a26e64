"""Held-out clips restored while training goes on, and what else a person sees of a run."""

import dataclasses

import cv2
import numpy as np
import pyarrow as pa
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model.text_encoders import TINY_ENCODERS
from pipeline.data import precompute
from pipeline.data.cropping import Bucket
from pipeline.store import schema
from pipeline.training.runs import train_dit, validation
from tests.helpers.data_root import make_data_root
from tests.helpers.ranks import train
from tests.helpers.tiny_models import save_vae
from tests.helpers.trainings import dit_config, history, stage_config


def test_the_largest_samples_are_shown_each_clip_once():
    sizes = [("a", 4), ("a", 64), ("b", 64), ("b", 16), ("c", 16), ("d", 4)]
    rows = [
        schema.empty_row(schema.INDEX_SCHEMA, sample_id=str(i), clip_id=clip, video_tokens=tokens)
        for i, (clip, tokens) in enumerate(sizes)
    ]
    found = validation.chosen(pa.Table.from_pylist(rows, schema=schema.INDEX_SCHEMA), clips=3)
    assert [row["sample_id"] for row in found] == ["1", "2", "4"]


def test_scores_compare_with_the_truth_and_niqe_only_where_it_can_be_told():
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 256, (2, 32, 32, 3), np.uint8)
    low = np.clip(truth.astype(int) + 8, 0, 255).astype(np.uint8)
    found = validation.scores(low, truth.copy() ^ 1, truth)
    assert found["psnr"] == pytest.approx(48.13, abs=0.01) and 28 < found["psnr_lq"] < 32
    assert found["ssim"] > found["ssim_lq"] and "niqe" not in found


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_shows_restored_clips_and_what_its_steps_did(tmp_path, local_ray):
    data = make_data_root(tmp_path / "data", ["cup.mp4", "fig.jpg"], ["box.mp4", "cat.jpg"])
    vae = save_vae(tmp_path / "vae")
    buckets = [Bucket(1, 96, 192), Bucket(5, 64, 64)]
    precompute.run(precompute.PrecomputeConfig(data=data, vae=vae, text=TINY_ENCODERS, buckets=buckets))
    config = dit_config(
        data,
        tmp_path / "out",
        workers=2,
        stages=[
            dataclasses.replace(stage_config("mixed", 4, ["1x96x192", "5x64x64"]), tokens_per_pack=144),
            dataclasses.replace(stage_config("images", 2, ["1x96x192"]), tokens_per_pack=144),
        ],
        validation=validation.ValidationConfig(every=3, vae=vae, clips=2, steps=2),
        heldout_triples=4,
    )
    train(2, tmp_path / "ranks", (train_dit.build, config))
    steps = history(tmp_path / "out", "dit")["steps"]
    assert len(steps) == 6
    for step in steps:
        assert step["imbalance"] >= 0 and step["utilisation"] > 0 and step["gradient_norm"] > 0
    read = EventAccumulator(str(tmp_path / "out" / "tensorboard" / "dit"))
    read.Reload()
    tags = read.Tags()
    assert {"loss_by_bucket/5x64x64", "samples_seen", "tokens_per_second"} <= set(tags["scalars"])
    assert any(tag.startswith("loss_by_time/") for tag in tags["scalars"])
    assert len([tag for tag in tags["images"] if tag.startswith("validation/")]) == 2
    shown = history(tmp_path / "out", "dit")["validation"]
    assert [row["step"] for row in shown] == [3, 6]
    assert all(row["psnr"] > 0 and row["ssim_lq"] <= 1 for row in shown) and "niqe" in shown[0]
    pictures = sorted((tmp_path / "out" / "validation").glob("*/*.png"))
    assert [path.parent.name for path in pictures] == ["000003", "000003", "000006"]
    assert {cv2.imread(str(path)).shape for path in pictures} == {(96, 576, 3), (64, 192, 3)}
