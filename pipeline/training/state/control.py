"""What a training does when things go wrong: bad gradients, SIGTERM, nodes that are missing or come back.

The driver process holds a `Desk`: rank 0 looks there after every step for what is asked of the loop, and all
ranks follow at the same step. A killed worker or node is Ray Train's to replace (train_controller.py).
"""

import contextlib
import dataclasses
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from torch import Tensor

_NORMS_KEPT = 100  # what a spike is measured against
_NORMS_NEEDED = 20  # before that nothing counts as a spike
_LOOK_S = 10  # between looks for nodes that will be taken away


@dataclasses.dataclass(frozen=True)
class FaultConfig:
    """Steps that are skipped."""

    spike_factor: float = 0.0
    """skip a step whose gradient norm is above this times the median of the last 100 (0: skip only where a
    loss or a gradient is not finite)"""
    skips_in_row: int = 10
    """skipped steps in a row that end the run"""

    def __post_init__(self) -> None:
        if self.spike_factor and self.spike_factor <= 1:
            raise ValueError(
                f"faults.spike_factor: {self.spike_factor}; give a factor above 1, or 0 for none"
            )
        if self.skips_in_row < 1:
            raise ValueError(f"faults.skips_in_row: {self.skips_in_row}; give at least 1")


class StoppedError(Exception):
    """Ends the loop on all ranks with a reason; started again, the job goes on."""

    def __init__(self, reason: str, failed: bool) -> None:
        super().__init__(reason)
        self.failed = failed


def outcome(loop: Callable[[], None]) -> dict[str, Any] | None:
    """What a loop returns to the driver: None at its end, else why it stopped. After an exception Ray Train
    would try again, which is useless where the same comes again."""
    try:
        loop()
    except StoppedError as stopped:
        return {"reason": str(stopped), "failed": stopped.failed}
    return None


# -- bad gradients --------------------------------------------------------------------------------------


class StepGuard:
    """Makes an engine skip optimiser steps with a bad gradient: nothing moves, on all ranks alike.

    All ranks see the same norm, and what it is compared with is in the loop's state, so that a resumed run
    decides alike. DeepSpeed drops a step whose gradient norm is negative: that is how it is told.
    """

    def __init__(self, engine: Any, config: FaultConfig, state: dict[str, Any]) -> None:
        """state: the loop's, as a checkpoint keeps it."""
        self.config, self.state = config, state
        self.norm = math.nan
        self._judgement: tuple[float, bool] | None = None
        for key, value in (("skipped", 0), ("skipped_in_row", 0), ("norms", [])):
            state.setdefault(key, value)
        optimiser = engine.optimizer
        name = "_get_norm_groups" if engine.zero_optimization_stage() == 3 else "scaled_global_norm"
        measure = getattr(optimiser, name)
        setattr(optimiser, name, lambda: self._judged(measure()))

    def _judged(self, norms: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """The norm, or the norms of the parts, as they are or negative."""
        parts = [float(norm) for norm in (norms if isinstance(norms, list) else [norms])]
        finite = all(math.isfinite(part) and part >= 0 for part in parts)
        norm = math.hypot(*parts) if finite else math.inf
        bad = not finite or self._is_spike(norm)
        self._judgement = norm, bad
        if not bad:
            return norms
        if isinstance(norms, list):
            return [torch.full_like(part, -1.0) for part in norms]
        return torch.full_like(norms, -1.0)

    def _is_spike(self, norm: float) -> bool:
        last = self.state["norms"]
        enough = self.config.spike_factor > 0 and len(last) >= _NORMS_NEEDED
        return enough and norm > self.config.spike_factor * statistics.median(last)

    def took_step(self) -> bool:
        """Once after every optimiser step: whether it was taken. StoppedError after many that were not."""
        # In bf16 DeepSpeed drops a step that is not finite before it measures the norm.
        self.norm, bad = self._judgement or (math.inf, True)
        self._judgement = None
        state = self.state
        if not bad:
            state["skipped_in_row"] = 0
            state["norms"] = [*state["norms"], self.norm][-_NORMS_KEPT:]
            return True
        state["skipped"] += 1
        state["skipped_in_row"] += 1
        if state["skipped_in_row"] == self.config.skips_in_row:
            raise StoppedError(
                f"step {state['step'] + 1}: {self.config.skips_in_row} steps in a row were skipped, the last "
                f"with gradient norm {self.norm:.4g}; the checkpoints are from before: start again with a "
                "lower learning_rate, or another output and seed",
                failed=True,
            )
        return False


# -- orders from outside --------------------------------------------------------------------------------


class Orders:
    """What is asked of the loop; every rank calls the same methods at the same steps."""

    def __init__(self, desk: Any) -> None:
        self.desk = desk
        self._looked = time.monotonic()
        self._known: set[str] = set()

    def now(self, device: torch.device) -> tuple[bool, bool]:
        """(save, stop), the same on all ranks."""
        asked = torch.zeros(3, device=device)
        if dist.get_rank() == 0:
            with contextlib.suppress(ray.exceptions.RayActorError):  # the driver is gone: so are we soon
                save, stop = ray.get(self.desk.orders.remote())
                asked += torch.tensor([save, stop, time.monotonic() - self._looked > _LOOK_S], device=device)
        dist.all_reduce(asked)
        save, stop, look = (bool(value) for value in asked.tolist())
        if look:
            self._looked = time.monotonic()
            save = self._node_goes() or save
        return save, stop

    def _node_goes(self) -> bool:
        """Whether a node of ours has newly been announced to be taken away."""
        info = ray.train.get_preemption_info()
        new = set(info.preempted_node_ids) - self._known if info else set()
        self._known |= new
        if new and dist.get_rank() == 0:
            print(f"{len(new)} node(s) will be taken away: saving now", flush=True)
        return bool(new)

    def saved(self, over: bool = False) -> None:
        """After every save, and with `over` at the loop's end."""
        if dist.get_rank() == 0:
            with contextlib.suppress(ray.exceptions.RayActorError):
                ray.get(self.desk.saved.remote(over))


@contextlib.contextmanager
def sigterm_saves(desk: Any) -> Iterator[None]:
    """In the driver: SIGTERM asks the loop to save and leave; a second one ends the driver at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen = False

    def handle(*_: object) -> None:
        nonlocal seen
        if seen:
            raise SystemExit(128 + signal.SIGTERM)
        seen = True
        print("SIGTERM: saving after this step, then leaving", flush=True)
        # Not from within the handler: it interrupts Ray's own calls.
        threading.Thread(target=lambda: desk.order.remote(stop=True), daemon=True).start()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
