"""What version 0.1.0 wrote (tests/data/v0.1.0) is read and gone on with: a data root, checkpoints of both
trainings, weights, a restoration that was killed. Each test has a copy of its own, at another place."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from model.dit.swin_mmdit import SwinMMDiTConfig
from model.text_encoders import TINY_ENCODERS
from model.vae.autoencoder import AutoencoderConfig
from model.vae.discriminator import DiscriminatorConfig
from pipeline.data import filter as filter_stage
from pipeline.data import ingest, precompute, upgrade
from pipeline.data.cropping import Bucket
from pipeline.data.selection import Threshold
from pipeline.restoration import restore
from pipeline.runtime import work_plan
from pipeline.store import bf16_columns, delta_tables, schema
from pipeline.training import convert
from pipeline.training.objectives.vae_loss import AdversarialConfig
from pipeline.training.runs import train_dit, train_vae, trainer
from pipeline.training.samples import latent_reader
from pipeline.video import decoding
from pipeline.weights.backbones import ModelConfig
from tests.helpers import object_store
from tests.helpers.ranks import Build, train

RECORDED = Path(__file__).resolve().parents[1] / "data" / "v0.1.0"
RECORDED_AT = "file:///srv/openseedvr"
"""The folder of footage/, run/ and restored/ when they were made."""
INDEX = f"{schema.LATENTS}/{schema.INDEX}"
TABLES = (schema.CLIPS, schema.SCORES, schema.TEXT, schema.LATENTS)
TWO_WORKERS = trainer.ScaleConfig(num_workers=2, zero_stage=2)
TOLERANCE = 1e-6


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """All that was recorded, at a new place; tables and manifests name the new one."""
    folder = tmp_path / "moved"
    shutil.copytree(RECORDED, folder)
    for file in folder.rglob("*.parquet"):
        rewrite_table(file, f"file://{folder}")
    for file in (folder / "restored").rglob("*.json"):
        file.write_text(file.read_text().replace(RECORDED_AT, f"file://{folder}"))
    return folder


def rewrite_table(file: Path, place: str) -> None:
    """Write the new place into the text columns; row groups (the shards of a plan) stay as they are."""
    with pq.ParquetFile(file) as old:
        table_schema = old.schema_arrow
        groups = [old.read_row_group(number) for number in range(old.num_row_groups)]
    with pq.ParquetWriter(file, table_schema) as new:
        for group in groups:
            columns = [
                pc.replace_substring(column, RECORDED_AT, place) if field.type == pa.string() else column
                for field, column in zip(table_schema, group.columns, strict=True)
            ]
            new.write_table(pa.Table.from_arrays(columns, schema=table_schema))


# -- the configs it was recorded with, in today's words ---------------------------------------------------


def ingest_config(folder: Path) -> ingest.IngestConfig:
    return ingest.IngestConfig(
        input=f"file://{folder}/footage",
        output=f"file://{folder}/run",
        dataset="fixture",
        max_clip_frames=13,
        sources_per_shard=3,
    )


def filter_config(folder: Path, darkest: float = 40, **changes: Any) -> filter_stage.FilterConfig:
    return filter_stage.FilterConfig(
        data=f"file://{folder}/run",
        thresholds={"exposure": Threshold(min=darkest)},
        held_out=["box.mp4", "cat.jpg"],
        clips_per_shard=4,
        **changes,
    )


def precompute_config(folder: Path) -> precompute.PrecomputeConfig:
    return precompute.PrecomputeConfig(
        data=f"file://{folder}/run",
        vae=f"file://{folder}/run/weights/vae",
        text=TINY_ENCODERS,
        buckets=[Bucket(1, 64, 64), Bucket(5, 64, 64)],
        variants=2,
        samples_per_shard=4,
    )


def train_vae_config(folder: Path) -> train_vae.TrainVaeConfig:
    return train_vae.TrainVaeConfig(
        data=f"file://{folder}/run",
        output=f"file://{folder}/run",
        model=AutoencoderConfig(
            widths=(4, 4, 4, 4),
            latent_channels=16,
            norm_groups=2,
            encoder_layers=1,
            decoder_layers=1,
            time_halvings=2,
            latent_scale=0.9152,
            latent_shift=0.0,
        ),
        perceptual="none",
        stages=[
            train_vae.VaeStageConfig(Bucket(5, 32, 32), 6, 1e-3, crops_per_worker=2),
            train_vae.VaeStageConfig(Bucket(9, 32, 32), 2, 5e-4, crops_per_worker=1),
        ],
        optimiser=trainer.OptimiserConfig(
            betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=2, ema_decay=0.9
        ),
        scale=TWO_WORKERS,
        kl_weight=1e-3,
        adversarial=AdversarialConfig(
            DiscriminatorConfig(width=4, layers=2, norm_groups=2),
            weight=0.5,
            learning_rate=1e-3,
            start_step=0,
            warmup_steps=2,
        ),
        image_share=0.4,
        crops_per_read=1,
        heldout_crops=2,
        checkpoint_every=4,
    )


def train_dit_config(folder: Path) -> train_dit.TrainDitConfig:
    return train_dit.TrainDitConfig(
        data=f"file://{folder}/run",
        output=f"file://{folder}/run",
        model=SwinMMDiTConfig(
            num_layers=2,
            num_heads=2,
            head_dim=8,
            mlp_ratio=2,
            patch=(1, 2, 2),
            in_channels=33,
            out_channels=16,
            text_dim=64,
            pooled_dim=48,
            windows=((2, 8, 8),),
            shifted=(False, True),
            rotary=True,
        ),
        stages=[
            train_dit.StageConfig("images", ["1x64x64"], 4, 1e-3, tokens_per_pack=32),
            train_dit.StageConfig("mixed", ["1x64x64", "5x64x64"], 6, 1e-3, tokens_per_pack=64),
        ],
        optimiser=trainer.OptimiserConfig(warmup_steps=1, schedule="cosine", ema_decay=0.9),
        scale=TWO_WORKERS,
        packs_per_step=2,
        checkpoint_every=3,
        heldout_triples=4,
    )


def restore_config(folder: Path, output: str) -> restore.RestoreConfig:
    return restore.RestoreConfig(
        input=f"s3://{object_store.BUCKET}/box.mp4",
        output=f"file://{folder}/{output}",
        model=ModelConfig(f"file://{folder}/run/weights/dit", vae=f"file://{folder}/run/weights/vae"),
        sampling=restore.Sampling(steps=4, chunk_frames=9, overlap_frames=4, slice_frames=4),
        encoding=restore.Encoding("ffv1"),
        memory_gib=4.0,
        size=(24, 32),
        previews=0,
    )


# -- the data root ----------------------------------------------------------------------------------------


def files_of(run: Path) -> dict[str, bytes]:
    """Tables and plans of a data root."""
    found = (file for name in TABLES for file in (run / name).rglob("*.parquet"))
    return {str(file.relative_to(run)): file.read_bytes() for file in found}


def rows_of(run: Path, name: str) -> list[dict[str, Any]]:
    table = delta_tables.read(f"file://{run}/{name}")
    assert table is not None
    return in_order(table)


def recorded_rows(run: Path, name: str) -> list[dict[str, Any]]:
    """As version 0.1.0 knew them: of all files in the folder."""
    return in_order(pa.concat_tables(pq.read_table(file) for file in (run / name).glob("part-*.parquet")))


def in_order(table: pa.Table) -> list[dict[str, Any]]:
    return sorted(table.to_pylist(), key=lambda row: row.get("sample_id") or row["clip_id"])


@pytest.fixture
def upgraded(moved: Path) -> Path:
    upgrade.run(upgrade.UpgradeConfig(str(moved / "run")))
    return moved


def test_a_data_root_without_logs_is_told_how_to_be_upgraded(moved):
    told = r"data: file://.*/run is of version 0\.1\.0; run once: python -m jobs\.upgrade --data file"
    for run in (
        lambda: ingest.run(ingest_config(moved)),
        lambda: filter_stage.run(filter_config(moved)),
        lambda: precompute.run(precompute_config(moved)),
        lambda: latent_reader.read_index(f"file://{moved}/run"),
    ):
        with pytest.raises(ValueError, match=told):
            run()


def test_an_upgrade_keeps_every_row_and_may_be_run_again(moved):
    config = upgrade.UpgradeConfig(str(moved / "run"))
    expected = {name: recorded_rows(moved / "run", name) for name in (*TABLES, schema.SELECTION, INDEX)}
    for _ in range(2):
        upgrade.run(config)
        assert {name: rows_of(moved / "run", name) for name in expected} == expected


def run_stages(folder: Path) -> list[tuple[str, Any]]:
    """(folder of the table, summary) of ingest, filter and precompute."""
    return [
        (schema.CLIPS, ingest.run(ingest_config(folder))),
        (schema.SCORES, filter_stage.run(filter_config(folder))),
        (schema.LATENTS, precompute.run(precompute_config(folder))),
    ]


def test_each_stage_finds_its_work_done_and_leaves_the_tables_as_they_are(upgraded, local_ray):
    before = files_of(upgraded / "run")
    for name, summary in run_stages(upgraded):
        recorded = json.loads((RECORDED / "run" / name / schema.SUMMARY).read_text())
        assert summary.bytes == 0 and summary.already_done == summary.rows_in == recorded["rows_in"]
        for key in ("rows_kept", "errors", "rejected"):
            assert getattr(summary, key) == recorded[key], (name, key)
    assert files_of(upgraded / "run") == before
    assert rows_of(upgraded / "run", schema.SELECTION) == recorded_rows(RECORDED / "run", schema.SELECTION)


@pytest.mark.slow
def test_files_that_a_killed_stage_had_not_made_are_made_as_planned(moved, local_ray):
    names = {file for file in files_of(moved / "run") if work_plan.PLANS not in file}
    expected = {name: recorded_rows(moved / "run", name) for name in (*TABLES, INDEX)}
    for name in (schema.CLIPS, schema.SCORES, schema.LATENTS, INDEX):
        min((moved / "run" / name).glob("part-*.parquet")).unlink()
    upgrade.run(upgrade.UpgradeConfig(str(moved / "run")))
    for name, summary in run_stages(moved):
        assert summary.bytes > 0 and 0 < summary.already_done < summary.rows_in, name
    assert {file for file in files_of(moved / "run") if work_plan.PLANS not in file} == names
    for name in expected:
        for row, again in zip(expected[name], rows_of(moved / "run", name), strict=True):
            assert_equal_row(row, again)


def assert_equal_row(row: dict[str, Any], again: dict[str, Any]) -> None:
    """Equal but for rounding: a bfloat16 may go up or down where another processor adds in another order."""
    assert row.keys() == again.keys()
    for column, value in row.items():
        if isinstance(value, bytes):
            assert row[f"{column}_shape"] == again[f"{column}_shape"]
            tensors = [bf16_columns.from_columns(one, column).float() for one in (again, row)]
            torch.testing.assert_close(*tensors, rtol=2**-7, atol=1e-4)
        elif isinstance(value, float):
            assert again[column] == pytest.approx(value, rel=TOLERANCE), column
        else:
            assert again[column] == value, column


def test_selection_is_rebuilt_from_its_scores(upgraded, local_ray):
    expected = recorded_rows(RECORDED / "run", schema.SELECTION)
    shutil.rmtree(upgraded / "run" / schema.SELECTION)
    filter_stage.run(filter_config(upgraded, rethreshold=True))
    assert rows_of(upgraded / "run", schema.SELECTION) == expected
    filter_stage.run(filter_config(upgraded, darkest=0, rethreshold=True))
    looser = rows_of(upgraded / "run", schema.SELECTION)
    changed = [row["reject_reason"] for row, now in zip(expected, looser, strict=True) if row != now]
    assert len(changed) == 1 and changed[0].startswith("exposure too low: ")


# -- trainings --------------------------------------------------------------------------------------------


def goes_on(moved: Path, name: str, build: Build, config: Any, terms: tuple[str, ...]) -> None:
    """Train on from the only checkpoint there is; the recorded run was not interrupted at it."""
    run = moved / "run"
    (checkpoint,) = (run / "checkpoints" / name).iterdir()
    done = len(json.loads((checkpoint / "state.json").read_text())["history"])
    shutil.rmtree(run / "weights" / name)
    train(2, moved / "ranks", (build, config))
    history, expected = (
        json.loads((folder / "weights" / name / "history.json").read_text())
        for folder in (run, RECORDED / "run")
    )
    assert 0 < done < len(expected["steps"]) == len(history["steps"])
    assert history["steps"][:done] == expected["steps"][:done]  # also the times, so it did not begin anew
    for row, again in zip(expected["steps"][done:], history["steps"][done:], strict=True):
        assert again["seconds"] != row["seconds"]
        for term in terms:
            assert again[term] == pytest.approx(row[term], abs=TOLERANCE), (row["step"], term)
    for row, again in zip(expected["held_out"], history["held_out"], strict=True):
        assert again["set_hash"] == row["set_hash"]
        for when in ("before", "after"):
            assert again[when] == pytest.approx(row[when], abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_transformer_trains_on_from_its_checkpoint(upgraded):
    terms = ("loss", "gradient_norm", "learning_rate")
    goes_on(upgraded, "dit", train_dit.build, train_dit_config(upgraded), terms)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_autoencoder_and_its_discriminator_train_on_from_their_checkpoint(upgraded):
    terms = ("loss", "l1", "kl", "generator", "discriminator", "latent_std")
    goes_on(upgraded, "vae", train_vae.build, train_vae_config(upgraded), terms)


def test_no_checkpoint_holds_a_pickle():
    files = [file for file in (RECORDED / "run" / "checkpoints").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".safetensors", ".json", ""}
    for file in files:
        if file.suffix == ".safetensors":
            load_file(file)
        else:
            json.loads(file.read_text())


# -- weights ----------------------------------------------------------------------------------------------


def assert_equal_tensors(file: Path, recorded: Path) -> None:
    found, expected = load_file(file), load_file(recorded)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_convert_reads_the_weights_and_the_checkpoint(upgraded):
    run = upgraded / "run"
    (checkpoint,) = (run / "checkpoints" / "dit").iterdir()
    for source, output, data, recorded in (
        (checkpoint, "average", f"file://{run}", RECORDED / "converted" / "dit"),
        (run / "weights" / "dit", "dit", None, RECORDED / "run" / "weights" / "dit"),
        (run / "weights" / "vae", "vae", None, RECORDED / "run" / "weights" / "vae"),
    ):
        convert.run(convert.ConvertConfig(f"file://{source}", f"file://{upgraded}/{output}", data=data))
        assert_equal_tensors(upgraded / output / "weights.safetensors", recorded / "weights.safetensors")
        if (recorded / "null_text.safetensors").exists():
            assert_equal_tensors(
                upgraded / output / "null_text.safetensors", recorded / "null_text.safetensors"
            )
    file = upgraded / "vae.safetensors"
    convert.run(convert.ConvertConfig(f"file://{run}/weights/vae", f"file://{file}"))
    assert_equal_tensors(file, RECORDED / "run" / "weights" / "vae" / "weights.safetensors")


@pytest.fixture(scope="module")
def bucket():
    """The object store from which the recorded clip was restored: its URL is part of what names a result."""
    with object_store.running_store() as address:
        url = "http://{}:{}".format(*address)
        clip = (RECORDED / "footage" / "box.mp4").read_bytes()
        object_store.client(url).put_object(Bucket=object_store.BUCKET, Key="box.mp4", Body=clip)
        with object_store.reached_through(url):
            yield


def frames_of(file: Path) -> np.ndarray:
    return np.stack(list(decoding.decode_frames(str(file)))).astype(int)


@pytest.mark.parametrize(("output", "begun"), [("anew", False), ("half_restored", True)])
def test_the_weights_restore_the_same_frames(moved, bucket, output, begun):
    """In one go, or going on where a restoration by version 0.1.0 was killed."""
    config = restore_config(moved, output)
    (row,) = restore.list_inputs(config)
    row |= {"preview": False, "fingerprint": restore.fingerprint(config, row)}
    made = restore.RestoreActor(config)(row)["result"]
    assert made["error"] is None and (made["resumed_from_frame"] > 0) == begun
    recorded = frames_of(RECORDED / "restored" / "box.mkv")
    assert len(recorded) == made["frames"] == 26 and recorded.std() > 10
    difference = np.abs(frames_of(moved / output / "box.mkv") - recorded)
    assert difference.max() <= 1 and difference.mean() <= 1e-3  # where a value lies between two levels


def test_what_is_restored_is_not_restored_again(moved, bucket, local_ray):
    before = (moved / "restored" / "box.mkv").read_bytes()
    summary = restore.run(restore_config(moved, "restored"))
    assert (summary.already_done, summary.rows_kept, summary.errors) == (1, 1, 0)
    assert (moved / "restored" / "box.mkv").read_bytes() == before
