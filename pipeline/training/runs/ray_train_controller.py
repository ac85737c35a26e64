"""Our part of Ray Train's controller: the ranks' process group, waiting for room, a save before a resize.

The controller's process imports this module to learn of it, and so must not import torch: the ranks do, and a
start of the controller is what everybody waits for.
"""

import dataclasses
import os
import threading
import time
from datetime import timedelta
from typing import Any, Literal

import ray
import ray.train
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, RayTrainCallback
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    RestartingState,
    RunningState,
    SchedulingState,
)
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

_GROUP_TIMEOUT = timedelta(hours=1)  # of a collective operation: rank 0 may be long at writing
_WAIT_LINE_S = 30
_SAVE_TIMEOUT_S = 300


class Trainer(DataParallelTrainer):
    """Ray's, without the actor that would deal out Ray datasets: the ranks read their samples themselves."""

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        return [
            callback
            for callback in super()._create_default_callbacks()
            if not isinstance(callback, DatasetsCallback)
        ]


@dataclasses.dataclass
class ProcessGroupConfig(BackendConfig):
    """torch.distributed among the ranks.

    Ray's TorchConfig does the same, and imports torch wherever it goes: into the driver and the controller,
    two seconds each.
    """

    backend: Literal["gloo", "nccl"]

    @property
    def backend_cls(self) -> type[Backend]:
        return _ProcessGroup


class _ProcessGroup(Backend):
    share_cuda_visible_devices = True  # NCCL reaches a node's other GPUs directly

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(_join_group, backend_config.backend, address, port)


def _join_group(backend: str, address: str, port: int) -> None:
    """On each rank, before the loop."""
    import torch.distributed as dist

    context = ray.train.get_context()
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
    }
    dist.init_process_group(backend, timeout=_GROUP_TIMEOUT)


class WaitedTooLongError(Exception):
    """There were no workers for `wait_for_workers_s`."""


class TrainingCallback(ControllerCallback):
    """Reports what the run waits for, ends it after a while, and saves before the workers change."""

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
                f"{self._free()}. Started again, the job resumes from its newest checkpoint"
            )

    def _tell(self, since: float) -> None:
        """Print a line now and then while waiting; Ray Train itself looks for room only once a minute."""
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
        """Ray Train is about to stop the workers, whose work since their last save would be lost."""
        if not self._running:
            return
        ray.get(self.actor.request_save.remote(stop=False))
        deadline = time.monotonic() + _SAVE_TIMEOUT_S
        while ray.get(self.actor.requests.remote())[0] and time.monotonic() < deadline:
            time.sleep(0.2)
