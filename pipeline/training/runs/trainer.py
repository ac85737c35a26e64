"""What both trainings share: Ray Train wiring, DeepSpeed engines, rates, logs.

Every rank runs the same loop function under Ray Train; DeepSpeed ZeRO shards optimiser states, gradients
and, in stage 3, weights. What a rank keeps is in train_state.py, how it is saved in checkpoint.py.
"""

import dataclasses
import math
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from queue import Queue
from typing import Any, Literal, TypeVar

import ray
import torch
import torch.distributed as dist
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor, nn

from pipeline.runtime import stage
from pipeline.store import storage
from pipeline.training.runs import train_controller
from pipeline.training.state import control
from pipeline.training.state.checkpoint import CHECKPOINTS
from pipeline.training.state.desk import Desk

WEIGHTS, HISTORY = "weights", "history.json"
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ScaleConfig:
    """Workers and how DeepSpeed shares the model among them."""

    num_workers: int | tuple[int, int] = 1
    """processes that train, one for each GPU; or the fewest and the most: the run then goes on with those
    that there is room for, and grows when there is room for more"""
    use_gpu: bool = False
    """train on GPUs in bf16 (false: on CPUs in fp32)"""
    cpus_per_worker: int = 1
    """CPU cores reserved for each worker"""
    zero_stage: Literal[1, 2, 3] = 2
    """DeepSpeed ZeRO: 1 shards the optimiser's states, 2 the gradients too, 3 the weights too"""
    offload_optimiser: bool = False
    """keep the optimiser's states and fp32 weights in the host's memory (slower, for small GPUs)"""
    max_failures: int = 3
    """restarts from the newest checkpoint before the job gives up (-1: no end)"""
    wait_for_workers_s: int = 3600
    """how long the run waits for room for its workers before it ends"""
    resize_every_s: int = 60
    """with a range of workers: how often the run looks for room for more"""

    def __post_init__(self) -> None:
        fewest, most = self.workers
        if not 1 <= fewest <= most:
            raise ValueError(
                f"scale.num_workers: {self.num_workers}; give a number from 1, or (fewest, most)"
            )

    @property
    def workers(self) -> tuple[int, int]:
        """The fewest and the most."""
        number = self.num_workers
        return (number, number) if isinstance(number, int) else number


@dataclasses.dataclass(frozen=True)
class OptimiserConfig:
    """AdamW and what surrounds a step."""

    betas: tuple[float, float] = (0.9, 0.999)
    """decay of the two moments"""
    weight_decay: float = 0.01
    """decoupled"""
    gradient_clipping: float = 1.0
    """largest global gradient norm"""
    warmup_steps: int = 0
    """steps of linear warm-up at the start of each stage"""
    schedule: Literal["constant", "cosine"] = "constant"
    """of the rate after warm-up: as it is, or down to zero at each stage's end along half a cosine"""
    ema_decay: float = 0.9998
    """moving average of the weights, warmed up as (1 + step) / (10 + step)"""


def start_trainer(
    loop: Callable[[dict[str, Any]], dict[str, Any] | None],
    config: Any,
    scale: ScaleConfig,
    storage_url: str,
    name: str,
) -> None:
    """Run a training loop, which gets {"config", "desk"}, on the workers until it ends.

    ValueError, with the reason, if it stopped or never began; SystemExit if SIGTERM ended it.
    """
    # Ray Train would print each line a second time.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # Here, as Ray Train's controller is: elsewhere it could die with a node that the run does without.
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    desk = ray.remote(num_cpus=0, scheduling_strategy=here)(Desk).remote()
    each = {"CPU": scale.cpus_per_worker, **({"GPU": 1} if scale.use_gpu else {})}
    needs = f"{scale.workers[0]} worker(s) of {each}"
    local = not storage_url.startswith("s3://")
    # Typed for users' callbacks only; at run time every callback will do.
    callbacks: Any = [train_controller.Watch(desk, needs, scale.wait_for_workers_s)]
    run_config: Any = RunConfig(
        name=name,
        storage_path=storage.path_of(storage.join(storage_url, CHECKPOINTS)),
        storage_filesystem=None if local else storage.arrow_filesystem(storage_url),
        failure_config=FailureConfig(max_failures=scale.max_failures),
        callbacks=callbacks,
    )

    def on_rank() -> dict[str, Any] | None:
        return loop({"config": config, "desk": desk})

    trainer = train_controller.Trainer(
        on_rank,  # not by `train_loop_config`: the controller would import what the config is made of
        backend_config=train_controller.ProcessGroupConfig("nccl" if scale.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=scale.num_workers,
            use_gpu=scale.use_gpu,
            resources_per_worker=each,
            elastic_resize_monitor_interval_s=scale.resize_every_s,
        ),
        run_config=run_config,
    )
    try:
        with control.sigterm_saves(desk):
            result: Any = trainer.fit()
    except ControllerError as error:
        if isinstance(error.controller_failure, train_controller.WaitedTooLongError):
            raise ValueError(str(error.controller_failure)) from None
        raise
    outcome = result.return_value
    if outcome is not None and outcome["failed"]:
        raise ValueError(outcome["reason"])
    if outcome is not None:
        print(outcome["reason"], flush=True)
        raise SystemExit(128 + signal.SIGTERM)


def setup_worker(scale: ScaleConfig) -> torch.device:
    """Threads and accelerator of this rank; call first in a loop."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if scale.use_gpu else "cpu")
    torch.set_num_threads(max(1, scale.cpus_per_worker))
    import deepspeed  # slow to import, and only workers need it

    device = torch.device("cpu")
    if scale.use_gpu:
        from ray.train.torch import get_device

        device = get_device()
        torch.cuda.set_device(device)
    # Its shared-memory all-reduce takes 90 s of compiling at the first start; gloo will do.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if scale.use_gpu else "gloo", verbose=False)
    return device


def make_engine(
    model: nn.Module,
    scale: ScaleConfig,
    optimiser: OptimiserConfig,
    accumulation: int,
) -> Any:
    """A DeepSpeed engine with AdamW. Losses are averaged over ranks and `accumulation` micro-steps."""
    import deepspeed

    adam = torch.optim.AdamW(
        model.parameters(),
        lr=0.0,  # set_learning_rate before each step
        betas=optimiser.betas,
        weight_decay=optimiser.weight_decay,
        fused=True if scale.offload_optimiser else None,  # on the host: one pass over its memory
    )
    zero: dict[str, Any] = {"stage": scale.zero_stage}
    if scale.offload_optimiser:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": scale.use_gpu}
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=adam,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": optimiser.gradient_clipping,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            # Without the check a bf16 step is taken whatever its gradients are.
            "bf16": {"enabled": scale.use_gpu, "check_grad_overflow": True},
            "steps_per_print": 10**9,
        },
    )
    return engine


def set_learning_rate(engine: Any, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def warmed_up(rate: float, step: int, warmup_steps: int) -> float:
    """The rate at a stage's step (from 0), rising linearly over the first `warmup_steps`."""
    return rate * min(1.0, (step + 1) / (warmup_steps + 1))


def scheduled(rate: float, step: int, steps: int, optimiser: OptimiserConfig) -> float:
    """The rate at step `step` (from 0) of a stage of `steps`."""
    warm = warmed_up(rate, step, optimiser.warmup_steps)
    if optimiser.schedule == "constant" or step < optimiser.warmup_steps:
        return warm
    done = (step - optimiser.warmup_steps) / max(1, steps - optimiser.warmup_steps)
    return warm * 0.5 * (1 + math.cos(math.pi * done))


def rank() -> int:
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def all_reduced(value: Tensor) -> Tensor:
    """The sum over ranks of a small tensor."""
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def prefetched(items: Iterable[T], ahead: int = 2) -> Iterator[T]:
    """The same items, made up to `ahead` of use by a thread; its errors are raised here."""
    queue: Queue[Any] = Queue(maxsize=ahead)

    def fill() -> None:
        try:
            for item in items:
                queue.put(item)
        except BaseException as error:
            queue.put(error)

    threading.Thread(target=fill, daemon=True).start()
    while True:
        item = queue.get()
        if isinstance(item, BaseException):
            raise item
        yield item


def summarise(summary: stage.Summary, weights_url: str) -> None:
    """Fill a training stage's summary from the history that its run left."""
    history = storage.read_json(storage.join(weights_url, HISTORY))
    steps = history["steps"]
    summary.rows_in = summary.rows_kept = int(sum(step["samples"] for step in steps))
    summary.details = {
        "steps": len(steps),
        "first loss": round(steps[0]["loss"], 4),
        "last loss": round(steps[-1]["loss"], 4),
        "held_out": history["held_out"],
    }
    for key in ("imbalance", "wait_share", "utilisation"):
        found = [step[key] for step in steps if key in step]
        if found:
            summary.details[f"mean {key.replace('_', ' ')}"] = round(sum(found) / len(found), 4)
    for row in history["held_out"]:
        key = f"held-out loss, stage {row['stage']}"
        summary.details[key] = f"{row['before']:.4f} -> {row['after']:.4f}"
