"""What all stages have in common: connecting to Ray, measuring peak memory, writing a summary.

Stages run as `ray job submit --working-dir . -- python -m jobs.<stage> --config ...`; each job connects to
the cluster it was submitted to. Nothing here depends on what a stage does.
"""

import contextlib
import dataclasses
import http.client
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from typing import Any

import psutil
import ray

from pipeline.runtime import work_plan
from pipeline.store import source_cache, storage
from pipeline.store.schema import SUMMARY

_SHARDS_PER_ROUND = 10_000
_FILES_A_COMMIT = 1000
_COMMIT_EVERY_S = 10.0


def connect() -> None:
    """Connect to the cluster of this job (or start a local one when run by hand)."""
    if not ray.is_initialized():
        # Submitted jobs get their cluster's address. Without one, Ray would join the cluster that started
        # last on this machine, even if it has been killed since.
        address = os.environ.get("RAY_ADDRESS", "local")
        # A Ray that ends with this job needs no dashboard; its four processes would take seconds to start.
        ray.init(address, log_to_driver=True, include_dashboard=False if address == "local" else None)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = True


def nodes() -> int:
    """Nodes of the cluster that are alive."""
    return sum(1 for node in ray.nodes() if node["Alive"])


def cores() -> float:
    """CPU cores of the cluster as it is now."""
    return ray.cluster_resources().get("CPU", 0.0)


def check_shared(url: str, shared_filesystem: bool, key: str) -> None:
    """Raise ValueError for a file:// output on several nodes, unless the config says that they share it."""
    if url.startswith("file://") and nodes() > 1 and not shared_filesystem:
        raise ValueError(
            f"{key}: {url} is a local path and this cluster has {nodes()} nodes; write to s3://, or set "
            "shared_filesystem: true if every node mounts that folder"
        )


def proportional_memory(process: psutil.Process) -> int:
    """PSS of one process in bytes: shared pages are divided among those that map them."""
    try:
        with open(f"/proc/{process.pid}/smaps_rollup") as file:
            for line in file:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
    except (OSError, psutil.Error):
        pass
    return 0


def job_processes() -> list[psutil.Process]:
    """Processes of this job on this machine.

    They are the tree of the raylet that the driver belongs to, which includes the workers, or the driver's
    own tree if it started Ray itself.
    """
    me = psutil.Process()
    root = next((parent for parent in me.parents() if parent.name() == "raylet"), me)
    return [root, *root.children(recursive=True)]


def object_store_bytes() -> int:
    """Object-store memory in use on all nodes, as each node's metrics port reports it (every 10 s or so)."""
    total = 0.0
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            urllib.request.urlopen(url, timeout=5) as answer,
        ):
            for line in answer.read().decode().splitlines():
                if line.startswith("ray_object_store_used_memory{"):
                    total += float(line.rsplit(" ", 1)[1])
    return int(total)


class PeakMemory:
    """Samples memory until closed.

    That is the sum of PSS of this job's processes on this machine, and the object store of the cluster.
    """

    def __init__(self, interval_s: float = 2.0) -> None:
        self.peak_bytes = 0
        self.peak_object_store_bytes = 0
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.peak_bytes = max(self.peak_bytes, sum(map(proportional_memory, job_processes())))
            self.peak_object_store_bytes = max(self.peak_object_store_bytes, object_store_bytes())
            self._stop.wait(self._interval_s)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@dataclasses.dataclass
class Summary:
    """Summary that a stage prints at its end and writes to `_summary.json`."""

    stage: str
    rows_in: int = 0
    rows_kept: int = 0
    rejected: dict[str, int] = dataclasses.field(default_factory=dict)
    errors: int = 0
    already_done: int = 0
    seconds: float = 0.0
    bytes: int = 0
    peak_memory_bytes: int = 0
    peak_object_store_bytes: int = 0
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def rows_per_second(self) -> float:
        return self.rows_in / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "rows_per_second": self.rows_per_second}

    def table(self) -> str:
        """A short human-readable table."""
        lines = [
            ("rows in", f"{self.rows_in}"),
            ("kept", f"{self.rows_kept}"),
            *[(f"rejected: {reason}", f"{count}") for reason, count in self.rejected.items()],
            ("error rows", f"{self.errors}"),
            ("seconds", f"{self.seconds:.1f}"),
            ("rows/s", f"{self.rows_per_second:.2f}"),
            ("MB written", f"{self.bytes / 1e6:.1f}"),
            ("peak memory GiB", f"{self.peak_memory_bytes / 2**30:.2f}"),
            ("peak object store MB", f"{self.peak_object_store_bytes / 1e6:.1f}"),
            *[(key, f"{value}") for key, value in self.details.items() if not isinstance(value, list | dict)],
        ]
        width = max(len(name) for name, _ in lines)
        return "\n".join([f"== {self.stage}", *[f"   {name:<{width}}  {value}" for name, value in lines]])


def run_stage(name: str, folder_url: str, work: Callable[[Summary], None]) -> Summary:
    """Run a stage's work, measure its time and memory, and write and print its summary."""
    connect()
    summary = Summary(name)
    start = time.monotonic()
    try:
        with PeakMemory() as memory:
            work(summary)
    finally:
        source_cache.clear_on_every_node()
    summary.seconds = time.monotonic() - start
    summary.peak_memory_bytes = memory.peak_bytes
    summary.peak_object_store_bytes = memory.peak_object_store_bytes
    storage.write_json(storage.join(folder_url, SUMMARY), summary.as_dict())
    print(summary.table(), flush=True)
    return summary


def run_shards(
    pending: list[work_plan.Shard],
    task: Callable[..., dict[str, Any]] | type,
    name: str,
    commit: Callable[[list[dict[str, Any]]], None],
    concurrency: int | None = None,
    constructor_args: tuple[Any, ...] = (),
    **resources: Any,
) -> list[dict[str, Any]]:
    """Send every pending shard through one Ray Data operator: one shard is one block, one task, one file.

    task: a function `row {"shard": JSON of a Shard} -> report row`, or a class with such a `__call__` (an
    actor that loads its models once). commit: is given the reports of shards whose files are written, some
    at a time. Many shards are sent in rounds, so that Ray holds a bounded number.
    """
    reports: list[dict[str, Any]] = []
    for first in range(0, len(pending), _SHARDS_PER_ROUND):
        rows = [{"shard": shard.to_json()} for shard in pending[first : first + _SHARDS_PER_ROUND]]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        if isinstance(task, type):
            strategy = ray.data.ActorPoolStrategy(size=concurrency or 1)
            mapped = dataset.map(task, fn_constructor_args=constructor_args, compute=strategy, **resources)
        else:
            mapped = dataset.map(task, fn_args=constructor_args, concurrency=concurrency, **resources)
        mapped.set_name(name)
        reports += _committed(mapped.iter_rows(), commit)
    return reports


def _committed(
    reports: Iterable[dict[str, Any]], commit: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """All reports, each committed at most some seconds after it came, also if an error follows."""
    found: list[dict[str, Any]] = []
    waiting: list[dict[str, Any]] = []
    last = time.monotonic()
    try:
        for report in reports:
            found.append(report)
            waiting.append(report)
            if len(waiting) >= _FILES_A_COMMIT or time.monotonic() > last + _COMMIT_EVERY_S:
                ready, waiting, last = waiting, [], time.monotonic()
                commit(ready)
    finally:
        if waiting:
            commit(waiting)
    return found
