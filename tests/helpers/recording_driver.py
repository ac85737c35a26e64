"""train_dit as a driver that records the samples of every step in the state: CONFIG.pickle ADDRESS.

Steps take long enough here for a kill to hit one.
"""

import pickle
import sys
import time
from collections.abc import Iterator

import ray

from pipeline.training.runs import loop, train_dit
from pipeline.training.samples.batch import Step
from pipeline.training.state import ranks


def recording_build(config: train_dit.TrainDitConfig) -> loop.Training:
    """On a rank: the training, whose steps record themselves."""
    train_step = train_dit.train_step

    def recorded(
        worker: train_dit.Worker,
        stage_config: train_dit.StageConfig,
        state: loop.State,
        steps: Iterator[Step],
        pixel_loss: object,
    ) -> loop.StepResult:
        step = next(steps)
        own = [name for batch in step.batches for name in batch.sample_ids]
        names = sorted(name for part in ranks.from_all(own) for name in part)
        # Of an elastic run, whoever is left waits for the other's node.
        alone = isinstance(config.scale.num_workers, tuple) and ranks.world_size() == 1
        time.sleep(3 if alone else 0.2)
        result = train_step(worker, stage_config, state, iter([step]), pixel_loss)
        state.setdefault("seen", []).append([ranks.world_size(), names])
        return result

    train_dit.train_step = recorded
    return train_dit.build(config)  # on a rank nothing has replaced it


if __name__ == "__main__":
    train_dit.build = recording_build
    with open(sys.argv[1], "rb") as file:
        settings = pickle.load(file)
    ray.init(address=sys.argv[2])
    train_dit.run(settings)
