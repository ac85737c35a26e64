"""The guard's state in checkpoints; what it does to engines is in test_checkpoint.py."""

from types import SimpleNamespace

import torch

from pipeline.training.state.step_guard import FaultConfig, step_guards


def test_a_checkpoint_of_v0_1_0_gives_its_guard_to_the_transformer():
    optimiser = SimpleNamespace(scaled_global_norm=lambda: torch.tensor(1.0))
    engine = SimpleNamespace(global_steps=0, zero_optimization_stage=lambda: 2, optimizer=optimiser)
    kept = {"skipped": 2, "skipped_in_row": 1, "norms": [1.0, 3.0]}
    state = {"step": 3, **kept}
    guards = step_guards({"dit": engine}, FaultConfig(), state)
    assert state == {"step": 3, "guards": {"dit": kept}}
    assert guards["dit"].state is state["guards"]["dit"]
