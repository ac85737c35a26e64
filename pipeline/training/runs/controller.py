"""Our part of Ray Train's controller: it waits for room, for so long, and saves before workers change."""

import threading
import time
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    RestartingState,
    RunningState,
    SchedulingState,
)

_WAIT_LINE_S = 30
_SAVE_TIMEOUT_S = 300


class WaitedTooLongError(Exception):
    """No workers for `wait_for_workers_s`."""


class TrainingCallback(ControllerCallback):
    """Says what the run waits for, ends it after a while, and saves before the number of workers changes."""

    def __init__(self, actor: Any, needs: str, limit_s: float) -> None:
        self.actor, self.needs, self.limit_s = actor, needs, limit_s
        self._since = 0.0  # when the waiting began; 0: workers are there
        self._running = False

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        without = isinstance(current_state, InitializingState | RestartingState | ReschedulingState)
        if isinstance(current_state, RunningState) or without:
            self._running = not without
        if not without and not isinstance(current_state, SchedulingState):
            self._since = 0.0
            return
        now = time.monotonic()
        if not self._since:
            self._since = now
            threading.Thread(target=self._tell, args=(now,), daemon=True).start()
        waited = now - self._since
        if waited > self.limit_s:
            self._since = 0.0
            raise WaitedTooLongError(
                f"scale.wait_for_workers_s: after {waited:.0f} s there is still no room for {self.needs}; "
                f"{self._free()}. Started again, the job goes on from its newest checkpoint"
            )

    def _tell(self, since: float) -> None:
        """A line now and then while that wait lasts; Ray Train itself looks for room only once a minute."""
        while True:
            time.sleep(_WAIT_LINE_S)
            if self._since != since:
                return
            waited = time.monotonic() - since
            print(f"waiting for {self.needs}, {waited:.0f} s so far; {self._free()}", flush=True)

    @staticmethod
    def _free() -> str:
        free = {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
        return f"{sum(node['Alive'] for node in ray.nodes())} node(s) have {free or 'nothing'} free"

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Ray Train stops the workers next; what they did since their last save would be done again."""
        if not self._running:
            return
        ray.get(self.actor.request_save.remote(stop=False))
        deadline = time.monotonic() + _SAVE_TIMEOUT_S
        while ray.get(self.actor.requests.remote())[0] and time.monotonic() < deadline:
            time.sleep(0.2)
