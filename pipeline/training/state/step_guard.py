"""Optimiser steps with a bad gradient are skipped; many in a row end the run."""

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any

from pipeline.training.state.control import StoppedError
from pipeline.training.state.deepspeed_adapter import screen_steps

_NORMS_KEPT = 100  # what a spike is measured against
_NORMS_NEEDED = 20  # with fewer, nothing counts as a spike


@dataclasses.dataclass(frozen=True)
class FaultConfig:
    """Steps that are skipped."""

    spike_factor: float = 0.0
    """A step is skipped if its gradient norm exceeds this many times the median of the last 100 steps; 0
    skips only steps whose loss or gradient is not finite."""
    skips_in_row: int = 10
    """Number of consecutive skipped steps that ends the run."""

    def __post_init__(self) -> None:
        if self.spike_factor and self.spike_factor <= 1:
            raise ValueError(
                f"faults.spike_factor: {self.spike_factor}; give a factor above 1, or 0 for none"
            )
        if self.skips_in_row < 1:
            raise ValueError(f"faults.skips_in_row: {self.skips_in_row}; give at least 1")


class StepGuard:
    """Makes an engine skip optimiser steps with a bad gradient, in which nothing changes, on all ranks alike.

    All ranks see the same norm, and the norms that it is compared with are part of a checkpoint's state, so
    that a resumed run decides alike.
    """

    def __init__(self, engine: Any, config: FaultConfig, state: dict[str, Any]) -> None:
        """state: the guard's own, as a checkpoint keeps it."""
        self.engine, self.config, self.state = engine, config, state
        self.norm: float | None = None
        """Norm of the newest step's gradients before clipping; None if the engine made no step."""
        self._judgement: tuple[float, bool] | None = None
        self._steps = engine.global_steps
        for key, value in (("skipped", 0), ("skipped_in_row", 0), ("norms", [])):
            state.setdefault(key, value)
        screen_steps(engine, self._accepts)

    def _accepts(self, norm: float) -> bool:
        good = math.isfinite(norm) and not self._is_spike(norm)
        self._judgement = norm, good
        return good

    def _is_spike(self, norm: float) -> bool:
        last = self.state["norms"]
        enough = self.config.spike_factor > 0 and len(last) >= _NORMS_NEEDED
        return enough and norm > self.config.spike_factor * statistics.median(last)

    def took_step(self, step: int) -> bool:
        """Whether the weights moved in the step just made (from 0); call it once after every step of the run.

        They do not move if the engine was not asked to step. Raises StoppedError after many skipped steps.
        """
        if self.engine.global_steps == self._steps:
            self.norm = None
            return False
        self._steps = self.engine.global_steps
        # In bf16 DeepSpeed drops a step that is not finite before it measures the norm.
        self.norm, good = self._judgement or (math.inf, False)
        self._judgement = None
        state = self.state
        if good:
            state["skipped_in_row"] = 0
            state["norms"] = [*state["norms"], self.norm][-_NORMS_KEPT:]
            return True
        state["skipped"] += 1
        state["skipped_in_row"] += 1
        if state["skipped_in_row"] == self.config.skips_in_row:
            raise StoppedError(
                f"step {step + 1}: {self.config.skips_in_row} steps in a row were skipped, the last "
                f"with gradient norm {self.norm:.4g}; the checkpoints are from before: start again with a "
                "lower learning_rate, or another output and seed",
                failed=True,
            )
        return False


def step_guards(
    engines: Mapping[str, Any], config: FaultConfig, state: dict[str, Any]
) -> dict[str, StepGuard]:
    """A guard for each engine, with its state in the loop's `state["guards"]` under the engine's name."""
    kept = state.setdefault("guards", {})
    if "norms" in state:  # a checkpoint of v0.1.0, which guarded the transformer alone
        first = next(iter(engines))
        kept[first] = {key: state.pop(key) for key in ("skipped", "skipped_in_row", "norms")}
    return {name: StepGuard(engine, config, kept.setdefault(name, {})) for name, engine in engines.items()}
