"""Small trainings of the transformer: their configs, and what every training leaves."""

import dataclasses
from pathlib import Path

from pipeline.store import storage
from pipeline.training.runs import train_dit, trainer
from tests.helpers.tiny_models import DIT

MODEL = dataclasses.replace(DIT, text_dim=64, pooled_dim=48)


def stage_config(name: str, steps: int, buckets: list[str]) -> train_dit.StageConfig:
    return train_dit.StageConfig(name, buckets, steps, learning_rate=1e-3, tokens_per_pack=64)


def dit_config(
    data: str, output: Path, workers: int | tuple[int, int] = 1, **changes
) -> train_dit.TrainDitConfig:
    values = {
        "model": MODEL,
        "stages": [
            stage_config("images", 6, ["1x64x64"]),
            stage_config("mixed", 6, ["1x64x64", "5x64x64"]),
        ],
        "scale": trainer.ScaleConfig(num_workers=workers),
        "packs_per_step": 2,
        "checkpoint_every": 3,
        "heldout_triples": 8,
        **changes,
    }
    return train_dit.TrainDitConfig(data=data, output=f"file://{output}", **values)


def history(output: Path, name: str) -> dict:
    """Of the training of this name: its steps, held-out losses and validations."""
    return storage.read_json(f"file://{output}/weights/{name}/history.json")


def losses(output: Path) -> list[float]:
    """Of every step of a transformer's training."""
    return [step["loss"] for step in history(output, "dit")["steps"]]
