"""Requests to a running training from outside: to save, or to save and stop.

The driver holds a `ControlActor`. Rank 0 looks there after every step through its `WorkerControl`, and all
ranks follow at the same step. The actor's process imports this module, so it imports torch only inside
functions.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray

_LOOK_S = 10  # between checks for nodes about to be preempted


class StoppedError(Exception):
    """Ends the loop on all ranks, with a reason; the job resumes when it is started again."""

    def __init__(self, reason: str, failed: bool) -> None:
        super().__init__(reason)
        self.failed = failed


def outcome(loop: Callable[[], None]) -> dict[str, Any] | None:
    """Run a rank's loop and return why it stopped, or None if it reached its end.

    After an exception Ray Train would try again, which is useless if the same exception would come again.
    """
    try:
        loop()
    except StoppedError as stopped:
        return {"reason": str(stopped), "failed": stopped.failed}
    return None


class ControlActor:
    """Open requests, shared by the driver, Ray Train's controller and rank 0."""

    def __init__(self) -> None:
        self.stop = self.save = self.over = False

    def request_save(self, stop: bool) -> None:
        """stop: whether to stop after saving."""
        self.save, self.stop = not self.over, self.stop or stop

    def requests(self) -> tuple[bool, bool]:
        """(save, stop)."""
        return self.save, self.stop

    def saved(self, over: bool) -> None:
        """over: whether the loop has ended and follows no more requests."""
        self.save, self.over = False, over


class WorkerControl:
    """A rank's access to the actor; every rank calls the same methods at the same steps."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self._looked = time.monotonic()
        self._known: set[str] = set()

    def requests(self, device: Any) -> tuple[bool, bool]:
        """(save, stop), the same on all ranks. device: the torch.device of the ranks' process group."""
        import torch

        from pipeline.training.state import ranks

        asked = torch.zeros(3, device=device)
        if ranks.rank() == 0:
            with contextlib.suppress(ray.exceptions.RayActorError):  # the driver is gone, and so are we soon
                save, stop = ray.get(self.actor.requests.remote())
                asked += torch.tensor([save, stop, time.monotonic() - self._looked > _LOOK_S], device=device)
        save, stop, look = (bool(value) for value in ranks.all_reduced(asked).tolist())
        if look:
            self._looked = time.monotonic()
            save = self._node_goes(ranks.rank()) or save
        return save, stop

    def _node_goes(self, rank: int) -> bool:
        """Whether one of our nodes has newly been announced to be preempted."""
        import ray.train

        info = ray.train.get_preemption_info()
        new = set(info.preempted_node_ids) - self._known if info else set()
        self._known |= new
        if new and rank == 0:
            print(f"{len(new)} node(s) will be drained: saving now", flush=True)
        return bool(new)

    def saved(self, over: bool = False) -> None:
        """After every save, and with `over` at the loop's end."""
        from pipeline.training.state import ranks

        if ranks.rank() == 0:
            with contextlib.suppress(ray.exceptions.RayActorError):
                ray.get(self.actor.saved.remote(over))


@contextlib.contextmanager
def sigterm_saves(actor: Any) -> Iterator[None]:
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
        # Not in the handler itself, which interrupts Ray's own calls.
        threading.Thread(target=lambda: actor.request_save.remote(stop=True), daemon=True).start()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
