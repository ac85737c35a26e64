"""What holds for every process that a test starts, set before any library is imported."""

import os

_THREADS = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
"""Two processes of pytest and their Rays share the cores: more threads only wait for each other."""

_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Each node looks at all its processes so often, for a dashboard that nobody looks at.
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    # For new log files twice a second, not ten times.
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    # Nobody asks for lists of tasks, nor waits for a node's agent to notice that its main thread hangs.
    "RAY_task_events_report_interval_ms": "0",
    "RAY_DASHBOARD_AGGREGATOR_AGENT_CHECK_MAIN_THREAD_LIVENESS_INTERVAL_SECONDS": "5",
    # Workers would run at 15, and starve beside the other pytest process or whatever else is at work.
    "RAY_worker_niceness": "0",
    # A node that was killed is found dead after 5 s, not 15.
    "RAY_health_check_period_ms": "1000",
    # The controller sees at once that its ranks are done or dead, not after 2 s; no cloud takes nodes away.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}


def apply() -> None:
    """For this process and all that it starts."""
    os.environ |= {**_THREADS, **_RAY}


def without_ray() -> dict[str, str]:
    """The environment for a process that knows nothing of this process's Ray."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {**kept, **_RAY}
