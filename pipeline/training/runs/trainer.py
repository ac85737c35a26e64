"""What all trainings need besides the loop: Ray Train's workers, DeepSpeed's engines, learning rates.

Every rank runs the same function under Ray Train; DeepSpeed ZeRO shards optimiser states, gradients and, in
stage 3, weights.
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
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import nn

from pipeline.runtime import stage
from pipeline.store import storage
from pipeline.training.runs import ray_train_controller
from pipeline.training.state import control, deepspeed_adapter
from pipeline.training.state.checkpoint import CHECKPOINTS

WEIGHTS, HISTORY = "weights", "history.json"
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ScaleConfig:
    """Workers and how DeepSpeed shares the model among them."""

    num_workers: int | tuple[int, int] = 1
    """Number of training processes, one for each GPU; or the fewest and the most, in which case the run goes
    on with as many as there is room for and grows when there is room for more."""
    use_gpu: bool = False
    """Whether training runs on GPUs in bf16; otherwise it runs on CPUs in fp32."""
    cpus_per_worker: int = 1
    """CPU cores reserved for each worker."""
    zero_stage: Literal[1, 2, 3] = 2
    """DeepSpeed ZeRO stage: 1 shards the optimiser's states over the workers, 2 also the gradients, 3 also
    the weights. Higher stages take less memory and more communication."""
    offload_optimiser: bool = False
    """Whether the optimiser's states and fp32 weights are kept in the host's memory, which is slower and
    suits small GPUs."""
    max_failures: int = 3
    """Number of restarts from the newest checkpoint before the job gives up; -1 means no limit."""
    wait_for_workers_s: int = 3600
    """Time in seconds that the run waits for room for its workers before it ends."""
    resize_every_s: int = 60
    """Time in seconds between two looks for room for more workers, where `num_workers` is a range."""

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

    @property
    def backend(self) -> Literal["nccl", "gloo"]:
        """Of torch.distributed."""
        return "nccl" if self.use_gpu else "gloo"


@dataclasses.dataclass(frozen=True)
class OptimiserConfig:
    """AdamW and the rest of an optimiser step."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's first and second moments."""
    weight_decay: float = 0.01
    """Coefficient of AdamW's decoupled weight decay."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm; longer gradients are scaled down to it."""
    warmup_steps: int = 0
    """Number of steps at the start of each stage over which the learning rate rises linearly."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant keeps it, cosine lowers it to zero at the end of each stage
    along half a cosine."""
    ema_decay: float = 0.9998
    """Decay of the moving average of the weights; the first steps use the smaller (1 + step) / (10 +
    step)."""


def start_trainer(
    on_rank: Callable[[Any], dict[str, Any] | None], scale: ScaleConfig, storage_url: str, name: str
) -> None:
    """Run `on_rank`, which gets the control actor and gives a loop's outcome, on all workers until it ends.

    ValueError, with the reason, if it stopped or never began; SystemExit if SIGTERM ended it.
    """
    deepspeed_adapter.check_version()
    # Ray Train would print each line a second time.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # On this node, like Ray Train's controller: another node may die and the run go on without it.
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, scheduling_strategy=here)(control.ControlActor).remote()
    each = {"CPU": scale.cpus_per_worker, **({"GPU": 1} if scale.use_gpu else {})}
    needs = f"{scale.workers[0]} worker(s) of {each}"
    callback = ray_train_controller.TrainingCallback(actor, needs, scale.wait_for_workers_s)
    trainer = ray_train_controller.Trainer(
        lambda: on_rank(
            actor
        ),  # not by `train_loop_config`: the controller would import what configs are made of
        backend_config=ray_train_controller.ProcessGroupConfig(scale.backend),
        scaling_config=ScalingConfig(
            num_workers=scale.num_workers,
            use_gpu=scale.use_gpu,
            resources_per_worker=each,
            elastic_resize_monitor_interval_s=scale.resize_every_s,
        ),
        run_config=_run_config(name, storage_url, scale, callback),
    )
    try:
        with control.sigterm_saves(actor):
            result: Any = trainer.fit()
    except ControllerError as error:
        if isinstance(error.controller_failure, ray_train_controller.WaitedTooLongError):
            raise ValueError(str(error.controller_failure)) from None
        raise
    outcome = result.return_value
    if outcome is not None and outcome["failed"]:
        raise ValueError(outcome["reason"])
    if outcome is not None:
        print(outcome["reason"], flush=True)
        raise SystemExit(128 + signal.SIGTERM)


def _run_config(name: str, storage_url: str, scale: ScaleConfig, callback: Any) -> Any:
    """callback: of the controller; Ray's types know only users' own, at run time every kind will do."""
    local = not storage_url.startswith("s3://")
    return RunConfig(
        name=name,
        storage_path=storage.path_of(storage.join(storage_url, CHECKPOINTS)),
        storage_filesystem=None if local else storage.arrow_filesystem(storage_url),
        failure_config=FailureConfig(max_failures=scale.max_failures),
        callbacks=[callback],
    )


def setup_worker(scale: ScaleConfig) -> torch.device:
    """Threads and accelerator of this rank; call it first on a rank."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if scale.use_gpu else "cpu")
    torch.set_num_threads(max(1, scale.cpus_per_worker))
    device = torch.device("cpu")
    if scale.use_gpu:
        from ray.train.torch import get_device

        device = get_device()
        torch.cuda.set_device(device)
    deepspeed_adapter.join_ranks(scale.backend)
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
            # Without this check a bf16 step is taken even if its gradients are not finite.
            "bf16": {"enabled": scale.use_gpu, "check_grad_overflow": True},
            "steps_per_print": 10**9,
        },
    )
    return engine


def set_learning_rate(engine: Any, rate: float) -> None:
    """Set the rate of all parameters of an engine."""
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


def prefetched(items: Iterable[T], ahead: int = 2) -> Iterator[T]:
    """Yield the same items, prepared up to `ahead` of use by a thread, whose errors are raised here."""
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
    """Fill in a training stage's summary from the history of its run."""
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
