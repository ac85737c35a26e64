"""The transformer's training: on gloo ranks with each stage of ZeRO, and as a job that is killed."""

import dataclasses
import math
import re
import shutil
import time
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import save_file

from model.checkpoints import load_sd3_transformer
from model.dit.swin_mmdit import TINY
from pipeline.store import delta_tables, storage
from pipeline.training.runs import train_dit, trainer
from pipeline.training.samples import latent_reader, sample_order
from pipeline.training.samples.batch import collate, training_sample
from pipeline.weights import weights_folder
from tests import settings
from tests.helpers.processes import kill_tree, start, wait_for
from tests.helpers.ranks import train
from tests.helpers.released_models import sd3_transformer
from tests.helpers.trainings import MODEL, dit_config, history, losses, stage_config


@pytest.fixture(scope="module")
def data(latents_root) -> str:
    return latents_root


def rate_of(stage: train_dit.StageConfig, number: int, optimiser: trainer.OptimiserConfig) -> float:
    warmup = optimiser.warmup_steps
    if number < warmup or optimiser.schedule == "constant":
        return stage.learning_rate * min(1.0, (number + 1) / (warmup + 1))
    return stage.learning_rate * (1 + math.cos(math.pi * (number - warmup) / (stage.steps - warmup))) / 2


def plain_losses(config: train_dit.TrainDitConfig) -> list[float]:
    """The same training written plainly: one process, torch's AdamW, no DeepSpeed."""
    reader, index = latent_reader.LatentReader(config.data), latent_reader.read_index(config.data)
    torch.manual_seed(config.seed)
    model = train_dit.SwinMMDiT(config.model)
    adam = torch.optim.AdamW(
        model.parameters(), betas=config.optimiser.betas, weight_decay=config.optimiser.weight_decay
    )
    found = []
    for stage in config.stages:
        rows = train_dit.rows_of(index, stage, "train")
        stream = sample_order.SampleStream(rows, config.seed, config.model)
        position = 0
        for number in range(stage.steps):
            packed = sample_order.pack_step(stream, position, config.packs_per_step, stage.tokens_per_pack)
            position = packed.next_position
            whole = collate(
                [
                    training_sample(reader, stream[one], config.seed)
                    for one in sum(packed.packs, [])  # noqa: RUF017
                ]
            )
            for group in adam.param_groups:
                group["lr"] = rate_of(stage, number, config.optimiser)
            adam.zero_grad()
            loss = whole.sample_losses(train_dit.forward(model, whole)).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimiser.gradient_clipping)
            adam.step()
            found.append(loss.item())
    return found


def test_training_starts_from_sd3(tmp_path, capsys):
    sd3 = sd3_transformer(TINY)
    save_file(sd3.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = [
            train_dit.network(dit_config("file:///data", tmp_path, model=TINY, sd3=f"file://{where}"))
            for where in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors")
        ]
    finally:
        dist.destroy_process_group()
    assert "SD3: took" in capsys.readouterr().out
    expected = train_dit.SwinMMDiT(TINY)
    load_sd3_transformer(expected, tmp_path)
    for name, tensor in expected.state_dict().items():
        assert all(torch.equal(model.state_dict()[name], tensor) for model in found), name


@pytest.mark.slow
def test_compiled_mlps_train_as_others_do(data, tmp_path):
    config = dit_config(data, tmp_path, stages=[stage_config("images", 3, ["1x64x64"])], compile_mlps=True)
    train(1, tmp_path / "ranks", (train_dit.build, config))
    torch.testing.assert_close(losses(tmp_path), plain_losses(config), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> tuple[Path, list[float]]:
    """Two ranks' trainings with ZeRO 1, 2 and 3, in folders of these names; and the losses of plain torch."""
    folder = tmp_path_factory.mktemp("zero")
    stages = [
        stage_config("images", 8, ["1x64x64"]),
        stage_config("mixed", 12, ["1x64x64", "5x64x64"]),
    ]
    optimiser = trainer.OptimiserConfig(warmup_steps=2, schedule="cosine")
    configs = [
        dit_config(
            data,
            folder / str(zero_stage),
            scale=trainer.ScaleConfig(num_workers=2, zero_stage=zero_stage),
            stages=stages,
            optimiser=optimiser,
        )
        for zero_stage in (1, 2, 3)
    ]
    train(2, folder / "ranks", *[(train_dit.build, config) for config in configs])
    return folder, plain_losses(configs[0])


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_two_workers_give_the_losses_of_plain_torch_with_every_zero_stage(trained, zero_stage):
    folder, expected = trained
    output = folder / str(zero_stage)
    assert len(losses(output)) == 20
    torch.testing.assert_close(losses(output), expected, rtol=0, atol=1e-4)
    held_out = history(output, "dit")["held_out"]
    assert [row["stage"] for row in held_out] == ["images", "mixed"]
    assert all(row["triples"] == 8 and row["after"] != row["before"] for row in held_out)
    # What restore loads: the moving average, with the empty prompt beside it.
    model, prompts = weights_folder.load_dit(f"file://{output}/weights/dit")
    assert prompts.null.shape[1] == MODEL.text_dim and prompts.pooled is not None
    assert any(parameter.abs().max() > 0 for parameter in model.parameters())
    assert list((output / "tensorboard" / "dit").glob("events.out.tfevents.*"))


def step_of(complete: Path) -> int:
    """Of a checkpoint, by its COMPLETE file."""
    return int(complete.parent.name.removeprefix("checkpoint_").split("-")[0])


def add_latents(root: Path) -> None:
    """One more file of latents/, with images for training, as a precompute of more clips adds it."""
    index = delta_tables.read(f"file://{root}/latents/_index")
    assert index is not None
    image = pc.and_(pc.equal(index["bucket"], "1x64x64"), pc.equal(index["split"], "train"))
    file = index.filter(image)["file"][0].as_py()
    for folder in ("latents", "latents/_index"):
        table = pq.read_table(root / folder / file)
        new = [f"new{name}" for name in table["sample_id"].to_pylist()]
        table = table.set_column(table.column_names.index("sample_id"), "sample_id", [new])
        if "file" in table.column_names:
            table = table.set_column(
                table.column_names.index("file"), "file", [["part-new.parquet"] * len(table)]
            )
        delta_tables.write(f"file://{root}/{folder}", "part-new.parquet", [table], table.schema)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_training_goes_on_from_its_last_checkpoint_with_equal_losses(data, tmp_path):
    """Also where precompute has added samples meanwhile: the stage keeps to those it began with."""
    root = tmp_path / "data"
    shutil.copytree(storage.path_of(data), root)
    data = f"file://{root}"
    stages = [stage_config("images", 6, ["1x64x64"]), stage_config("mixed", 24, ["1x64x64", "5x64x64"])]
    config = dit_config(data, tmp_path / "whole", stages=stages)
    train(1, tmp_path / "ranks", (train_dit.build, config))
    file = tmp_path / "train.yaml"
    written = [dataclasses.asdict(stage) for stage in stages]
    model = {k: list(map(list, v)) if k == "windows" else v for k, v in dataclasses.asdict(MODEL).items()}
    model = {k: list(v) if isinstance(v, tuple) else v for k, v in model.items()}
    others = {"packs_per_step": 2, "checkpoint_every": 1, "heldout_triples": 8}
    file.write_text(yaml.safe_dump({"stages": written, "model": model, **others}))
    output = tmp_path / "killed"
    command = ["jobs.train_dit", "--config", str(file), "--data", data, "--output", f"file://{output}"]

    process = start(*command, environment=settings.without_ray())
    wait_for(process, "step 8/30")  # the second of the last stage
    deadline = time.monotonic() + 60
    while max(map(step_of, output.glob("checkpoints/dit/*/COMPLETE")), default=0) < 7:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kill_tree(process)
    add_latents(root)
    resumed, _ = start(*command, environment=settings.without_ray()).communicate(timeout=600)
    found = re.search(r"resumed at step (\d+) ", resumed)
    assert found, resumed[-3000:]
    assert 7 <= int(found[1]) < 30
    torch.testing.assert_close(losses(output), losses(tmp_path / "whole"), rtol=0, atol=1e-6)


def test_a_pack_count_that_the_workers_do_not_divide_stops_before_ray(data, tmp_path):
    with pytest.raises(ValueError, match=r"packs_per_step: 3 is no multiple of 2, which scale.num_workers"):
        dit_config(data, tmp_path, workers=2, packs_per_step=3)
    with pytest.raises(ValueError, match=r"packs_per_step: 4 is no multiple of 3, .* \(\(2, 4\)\) allows"):
        dit_config(data, tmp_path, workers=(2, 4), packs_per_step=4)


def test_buckets_that_latents_do_not_have_are_named(data, tmp_path):
    config = dit_config(data, tmp_path, stages=[stage_config("large", 1, ["21x768x768"])])
    with pytest.raises(
        ValueError, match=r"stages.large: no train sample.*latents/ has \['1x64x64', '5x64x64'\]"
    ):
        train_dit.check_data(config)
