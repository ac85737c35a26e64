"""What both trainings share: Ray Train wiring, DeepSpeed engines, moving averages, logs, checkpoints.

Every rank runs the same loop function under Ray Train; DeepSpeed ZeRO shards optimiser states and
gradients. A checkpoint is complete only when every rank has reported its part, so a kill while saving
leaves the one before valid; the same output folder and name resume from the newest.
"""

import dataclasses
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from queue import Queue
from typing import Any, Literal, TypeVar

import ray.train
import torch
import torch.distributed as dist
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from pipeline import schema, stage, storage

CHECKPOINTS, WEIGHTS, HISTORY = "checkpoints", "weights", "history.json"
_STATE = "state.json"
_CHECKPOINTS_KEPT = 2
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ScaleConfig:
    """Workers and how DeepSpeed shares the model among them."""

    num_workers: int = 1
    """processes that train, one for each GPU"""
    use_gpu: bool = False
    """train on GPUs in bf16 (false: on CPUs in fp32)"""
    cpus_per_worker: int = 1
    """CPU cores reserved for each worker"""
    zero_stage: Literal[1, 2] = 2
    """DeepSpeed ZeRO: 1 shards the optimiser's states, 2 the gradients too"""
    max_failures: int = 3
    """restarts from the newest checkpoint before the job gives up"""


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
    ema_decay: float = 0.9998
    """moving average of the weights, warmed up as (1 + step) / (10 + step)"""


def start_trainer(
    loop: Callable[[dict[str, Any]], None],
    loop_config: dict[str, Any],
    scale: ScaleConfig,
    storage_url: str,
    name: str,
) -> Any:
    """Run a training loop on `scale.num_workers` workers until it ends; returns Ray Train's result."""
    # Ray Train would print each line a second time.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    backend = TorchConfig(backend="nccl" if scale.use_gpu else "gloo", timeout_s=3600)
    local = not storage_url.startswith("s3://")
    trainer = TorchTrainer(
        loop,
        train_loop_config=loop_config,
        torch_config=backend,
        scaling_config=ScalingConfig(
            num_workers=scale.num_workers,
            use_gpu=scale.use_gpu,
            resources_per_worker={"CPU": scale.cpus_per_worker, **({"GPU": 1} if scale.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage.path_of(storage.join(storage_url, CHECKPOINTS)),
            storage_filesystem=None if local else storage.arrow_filesystem(storage_url),
            failure_config=FailureConfig(max_failures=scale.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=_CHECKPOINTS_KEPT),
        ),
    )
    return trainer.fit()


def setup_worker(scale: ScaleConfig) -> torch.device:
    """Threads and accelerator of this rank; call first in a loop."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if scale.use_gpu else "cpu")
    os.environ.setdefault("LOCAL_RANK", str(ray.train.get_context().get_local_rank()))
    torch.set_num_threads(max(1, scale.cpus_per_worker))
    import deepspeed  # slow to import, and only workers need it

    device = ray.train.torch.get_device() if scale.use_gpu else torch.device("cpu")
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
    )
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=adam,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": optimiser.gradient_clipping,
            "zero_optimization": {"stage": scale.zero_stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": scale.use_gpu},
            "steps_per_print": 10**9,
            "checkpoint": {"use_node_local_storage": True},
        },
    )
    return engine


def set_learning_rate(engine: Any, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def warmed_up(rate: float, step: int, warmup_steps: int) -> float:
    """The rate at a stage's step (from 0), rising linearly over the first `warmup_steps`."""
    return rate * min(1.0, (step + 1) / (warmup_steps + 1))


class MovingAverage:
    """fp32 moving average of a model's parameters, each parameter kept by one rank only."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.names = [name for name, _ in model.named_parameters()]
        self._owner = {name: index % world_size() for index, name in enumerate(self.names)}
        self.own = {
            name: parameter.detach().float().clone()
            for name, parameter in model.named_parameters()
            if self._owner[name] == rank()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After optimiser step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            if name in self.own:
                self.own[name].lerp_(parameter.detach().float(), 1 - decay)

    @torch.no_grad()
    def gathered(self, model: nn.Module) -> dict[str, Tensor]:
        """The whole average, on every rank, in fp32."""
        whole = {}
        for name, parameter in model.named_parameters():
            kept = self.own.get(name)
            tensor = kept.clone() if kept is not None else torch.empty_like(parameter, dtype=torch.float32)
            dist.broadcast(tensor, src=self._owner[name])
            whole[name] = tensor
        return whole

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name in self.own:
            self.own[name].copy_(tensors[name])


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


class Log:
    """One printed line a step, TensorBoard events, and the history that the report draws from."""

    def __init__(self, output_url: str, name: str, total_steps: int, history: list[dict[str, Any]]) -> None:
        self.total_steps, self.history = total_steps, history
        self._url = storage.join(output_url, "tensorboard", name)
        self._local = storage.path_of(self._url) if self._url.startswith("file://") else tempfile.mkdtemp()
        self._writer = SummaryWriter(self._local, purge_step=len(history)) if rank() == 0 else None
        self._started, self._first = time.monotonic(), len(history)

    def step(self, step: int, stage: str, values: dict[str, float]) -> None:
        """Record a step's numbers; `seconds` (of the step) must be among them."""
        self.history.append({"step": step, "stage": stage, **values})
        if self._writer is None:
            return
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        done = len(self.history) - self._first
        eta_s = (time.monotonic() - self._started) / done * (self.total_steps - step - 1)
        shown = " ".join(f"{key} {value:.4g}" for key, value in values.items())
        print(f"step {step + 1}/{self.total_steps} stage {stage} {shown} eta {eta_s:.0f} s", flush=True)

    def flush(self) -> None:
        """Bring the event files to where they belong."""
        if self._writer is None:
            return
        self._writer.flush()
        if not self._url.startswith("file://"):
            for file in Path(self._local).iterdir():
                storage.write_bytes(storage.join(self._url, file.name), file.read_bytes())


def save_checkpoint(
    engines: Mapping[str, Any], averages: Mapping[str, MovingAverage], state: dict[str, Any]
) -> None:
    """Every rank saves its part to a local folder and reports it; Ray Train joins and uploads them.

    state: the loop's own state, JSON (steps done, data position, stage, history).
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, engine in engines.items():
            engine.save_checkpoint(folder, tag=name, exclude_frozen_parameters=False)
        for name, average in averages.items():
            torch.save(average.own, os.path.join(folder, f"{name}.ema.{rank()}.pt"))
        if rank() == 0:
            state = {**state, "world_size": world_size(), "contract": schema.CONTRACT_VERSION}
            Path(folder, _STATE).write_text(json.dumps(state))
        metrics = {"step": state["step"], "loss": state.get("loss", 0.0)}
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def resumed(
    engines: Mapping[str, Any], averages: Mapping[str, MovingAverage], fresh: dict[str, Any]
) -> dict[str, Any]:
    """The loop's state of the run's newest checkpoint, its engines and averages loaded; else `fresh`."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return fresh
    with checkpoint.as_directory() as folder:
        state = json.loads(Path(folder, _STATE).read_text())
        if state["world_size"] != world_size():
            raise ValueError(
                f"scale.num_workers: this run's checkpoint was made by {state['world_size']} workers, "
                f"now there are {world_size()}; use as many"
            )
        for name, engine in engines.items():
            engine.load_checkpoint(folder, tag=name)
        for name, average in averages.items():
            whole: dict[str, Tensor] = {}
            for part in sorted(Path(folder).glob(f"{name}.ema.*.pt")):
                whole |= torch.load(part, weights_only=True)
            average.load(whole)
    if rank() == 0:
        print(f"resumed at step {state['step']} of this run", flush=True)
    return state


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
    for row in history["held_out"]:
        key = f"held-out loss, stage {row['stage']}"
        summary.details[key] = f"{row['before']:.4f} -> {row['after']:.4f}"
