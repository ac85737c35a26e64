"""Both trainings as real jobs: two gloo workers under Ray Train and DeepSpeed ZeRO-2."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from model.text import TINY_ENCODERS
from pipeline import batches, precompute, storage, train_dit, train_vae, training, weights
from pipeline.sampling import Bucket
from tests.pipeline.data_root import make_data_root
from tests.pipeline.processes import kill_tree
from tests.pipeline.tiny_models import DIT, VAE, save_vae

ROOT = Path(__file__).resolve().parents[2]
MODEL = dataclasses.replace(DIT, text_dim=64, pooled_dim=48)


@pytest.fixture(scope="module")
def data(tmp_path_factory, local_ray) -> str:
    """Latents of three clips in two buckets, by a random autoencoder."""
    folder = tmp_path_factory.mktemp("data")
    url = make_data_root(folder, ["cup.mp4", "fig.jpg"], ["box.mp4", "cat.jpg"])
    vae = save_vae(tmp_path_factory.mktemp("vae"))
    precompute.run(
        precompute.PrecomputeConfig(
            data=url, vae=vae, text=TINY_ENCODERS, buckets=[Bucket(1, 64, 64), Bucket(5, 64, 64)], variants=3
        )
    )
    return url


def stage_config(name: str, steps: int, buckets: list[str]) -> train_dit.StageConfig:
    return train_dit.StageConfig(name, buckets, steps, learning_rate=1e-3, tokens_per_pack=64)


def dit_config(data: str, output: Path, workers: int = 1, **changes) -> train_dit.TrainDitConfig:
    values = {
        "model": MODEL,
        "stages": [
            stage_config("images", 6, ["1x64x64"]),
            stage_config("mixed", 6, ["1x64x64", "5x64x64"]),
        ],
        "scale": training.ScaleConfig(num_workers=workers),
        "packs_per_step": 2,
        "checkpoint_every": 3,
        "heldout_triples": 8,
        **changes,
    }
    return train_dit.TrainDitConfig(data=data, output=f"file://{output}", **values)


def history(output: Path, name: str) -> dict:
    return storage.read_json(f"file://{output}/weights/{name}/history.json")


def losses(output: Path, name: str = "dit") -> list[float]:
    return [step["loss"] for step in history(output, name)["steps"]]


def plain_losses(config: train_dit.TrainDitConfig) -> list[float]:
    """The same training written plainly: one process, torch's AdamW, no DeepSpeed."""
    reader, index = batches.LatentReader(config.data), batches.read_index(config.data)
    torch.manual_seed(config.seed)
    model = train_dit.SwinMMDiT(config.model)
    adam = torch.optim.AdamW(
        model.parameters(), betas=config.optimiser.betas, weight_decay=config.optimiser.weight_decay
    )
    found = []
    for stage in config.stages:
        stream = batches.SampleStream(train_dit.rows_of(index, stage, "train"), config.seed)
        position = 0
        for number in range(stage.steps):
            packs, position = batches.pack_step(
                stream, position, config.packs_per_step, stage.tokens_per_pack
            )
            whole = batches.collate(
                [batches.training_sample(reader, drawn, config.seed) for pack in packs for drawn in pack]
            )
            for group in adam.param_groups:
                group["lr"] = training.warmed_up(stage.learning_rate, number, config.optimiser.warmup_steps)
            adam.zero_grad()
            loss = whole.sample_losses(train_dit.forward(model, whole)).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimiser.gradient_clipping)
            adam.step()
            found.append(loss.item())
    return found


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_workers_with_zero_2_give_the_losses_of_plain_torch(data, tmp_path):
    config = dit_config(data, tmp_path, workers=2)
    train_dit.run(config)
    torch.testing.assert_close(losses(tmp_path), plain_losses(config), rtol=0, atol=1e-4)
    held_out = history(tmp_path, "dit")["held_out"]
    assert [row["stage"] for row in held_out] == ["images", "mixed"]
    assert all(row["triples"] == 8 and row["after"] != row["before"] for row in held_out)
    # What restore loads: the moving average, with the empty prompt beside it.
    model, text, pooled = weights.load_dit(f"file://{tmp_path}/weights/dit")
    assert text.shape[1] == MODEL.text_dim and pooled is not None
    assert any(parameter.abs().max() > 0 for parameter in model.parameters())
    assert list((tmp_path / "tensorboard" / "dit").glob("events.out.tfevents.*"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_training_goes_on_from_its_last_checkpoint_with_equal_losses(data, tmp_path):
    config = dit_config(data, tmp_path / "whole")
    train_dit.run(config)
    file = tmp_path / "train.yaml"
    stages = [dataclasses.asdict(stage) for stage in config.stages]
    model = {k: list(map(list, v)) if k == "windows" else v for k, v in dataclasses.asdict(MODEL).items()}
    model = {k: list(v) if isinstance(v, tuple) else v for k, v in model.items()}
    settings = {"packs_per_step": 2, "checkpoint_every": 3, "heldout_triples": 8}
    file.write_text(yaml.safe_dump({"stages": stages, "model": model, **settings}))
    output = tmp_path / "killed"
    arguments = ["--config", str(file), "--data", data, "--output", f"file://{output}"]
    command = [sys.executable, "-m", "jobs.train_dit", *arguments]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    process = start()
    assert process.stdout is not None
    for line in process.stdout:
        if "step 5/12" in line:
            break
    snapshot = output / "checkpoints" / "dit" / "checkpoint_manager_snapshot.json"
    deadline = time.monotonic() + 60
    while not snapshot.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    kill_tree(process)
    resumed, _ = start().communicate(timeout=600)
    assert "resumed at step" in resumed, resumed[-3000:]
    assert "resumed at step 0 " not in resumed
    torch.testing.assert_close(losses(output), losses(tmp_path / "whole"), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_autoencoder_trains_on_videos_and_images_and_its_loss_falls(data, tmp_path):
    config = train_vae.TrainVaeConfig(
        data=data,
        output=f"file://{tmp_path}",
        model=VAE,
        stages=[
            train_vae.VaeStageConfig(Bucket(5, 32, 32), 30, 2e-3, crops_per_worker=4),
            train_vae.VaeStageConfig(Bucket(9, 32, 32), 5, 1e-3, crops_per_worker=2),
        ],
        optimiser=training.OptimiserConfig(ema_decay=0.9, weight_decay=0.0),
        scale=training.ScaleConfig(num_workers=2),
        heldout_crops=8,
        checkpoint_every=20,
    )
    train_vae.run(config)
    log = history(tmp_path, "vae")
    assert len(log["steps"]) == 35
    first, second = log["held_out"]
    assert first["after"] < 0.95 * first["before"]
    assert second["stage"] == "9x32x32"
    vae = weights.load_vae(f"file://{tmp_path}/weights/vae")
    # The latents that the transformer will see have about unit spread, whatever the training gave.
    scale = weights.describe(f"file://{tmp_path}/weights/vae")["config"]["latent_scale"]
    spread = log["steps"][-1]["latent_std"]
    assert scale == pytest.approx(1 / spread, rel=0.3)
    assert vae.config.latent_scale == scale


def test_a_pack_count_that_the_workers_do_not_divide_stops_before_ray(data, tmp_path):
    with pytest.raises(ValueError, match=r"packs_per_step: 3 is no multiple of scale.num_workers \(2\)"):
        dit_config(data, tmp_path, workers=2, packs_per_step=3)


def test_buckets_that_latents_do_not_have_are_named(data, tmp_path):
    config = dit_config(data, tmp_path, stages=[stage_config("large", 1, ["21x768x768"])])
    with pytest.raises(
        ValueError, match=r"stages.large: no train sample.*latents/ has \['1x64x64', '5x64x64'\]"
    ):
        train_dit.check_data(config)
