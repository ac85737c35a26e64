"""A stage's shards without Ray."""

from collections.abc import Callable
from typing import Any

from pipeline.runtime.work_plan import Shard


def run_here(
    pending: list[Shard],
    task: Any,
    name: str,
    commit: Callable[[list[dict[str, Any]]], None],
    concurrency: int | None = None,
    constructor_args: tuple[Any, ...] = (),
    **resources: Any,
) -> list[dict[str, Any]]:
    """In the place of `stage.run_shards`: one shard after the other, in this process."""
    worker = task(*constructor_args) if isinstance(task, type) else lambda row: task(row, *constructor_args)
    reports = [worker({"shard": shard.to_json()}) for shard in pending]
    commit([dict(report) for report in reports])
    return reports
