"""cluster.yaml's node types under Ray's real autoscaler: nodes come for what stages ask and go when idle.

The nodes are Ray's fake ones: processes on this machine with the resources that the file names.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from ray._private.services import get_node_ip_address
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from demo.local_ray import free_ports
from tests import settings
from tests.helpers.processes import ROOT


def with_fake_nodes(cluster: dict, gcs_address: str) -> dict:
    """cluster.yaml for Ray's fake nodes: its own node types, two of each at most, idle for 3 s."""
    return {
        **cluster,
        "max_workers": 4,
        "idle_timeout_minutes": 0.05,
        "provider": {
            # Ray's fake provider by its path: its own type reads a file that Ray's wheel does not bring.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": gcs_address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
        },
        "head_node_type": "ray.head.default",  # the fake provider's name for it
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **{
                name: {
                    "resources": {**node["resources"], "object_store_memory": 80_000_000},
                    "min_workers": node["min_workers"],
                    "max_workers": 2,
                    "node_config": {},
                }
                for name, node in cluster["available_node_types"].items()
                if name != cluster["head_node_type"]
            },
        },
        **{f"{kind}_setup_commands": [] for kind in ("head", "worker")},
        "cluster_synced_files": [],
        "file_mounts": {},
    }


def start_head(
    folder: Path, address: str, port: int, dashboard: int, environment: dict[str, str]
) -> subprocess.Popen:
    """A head without cores, whose autoscaler follows the folder's cluster.yaml; it logs to head.log there."""
    head_environment = {
        **environment,
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    command = [
        "ray", "start", "--head", "--block", f"--node-ip-address={address}", "--num-cpus=0",
        f"--port={port}", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}", f"--temp-dir={folder}", "--object-store-memory=80000000",
        f"--autoscaling-config={folder / 'cluster.yaml'}",
    ]  # fmt: skip
    with (folder / "head.log").open("w") as log:
        return subprocess.Popen(
            command, env=head_environment, stdout=log, stderr=log, start_new_session=True, cwd=folder
        )


def stop(head: subprocess.Popen, mark: str) -> None:
    """The head and everything that carries this test's mark in its environment."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(timeout=10)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("MARK_OF_TEST") == mark:
                process.kill()


@contextlib.contextmanager
def autoscaling_head(cluster: dict) -> Iterator[dict[str, str]]:
    """A head of its own that starts and stops fake nodes; yields the environment that reaches it."""
    port, dashboard = free_ports(2)
    address = get_node_ip_address()  # where fake nodes say that they are, so the head must be there too
    folder = Path(tempfile.mkdtemp(prefix="osv", dir="/tmp"))  # Ray's socket paths are limited to 107 bytes
    (folder / "cluster.yaml").write_text(json.dumps(with_fake_nodes(cluster, f"{address}:{port}")))
    environment = {
        **settings.without_ray(),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "MARK_OF_TEST": secrets.token_hex(8),
    }
    head = start_head(folder, address, port, dashboard, environment)
    try:
        yield {**environment, "RAY_ADDRESS": f"{address}:{port}"}
    finally:
        stop(head, environment["MARK_OF_TEST"])
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_nodes_come_for_what_stages_ask_and_go_when_idle():
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    training = yaml.safe_load((ROOT / "configs/paper/train_dit.yaml").read_text())["scale"]
    worker = {"CPU": training["cpus_per_worker"], "GPU": 1}
    # A data stage's cores fill one CPU node; nine workers of the training need a second node of eight GPUs.
    asked = [[{"CPU": 64}], [worker] * 9]
    with autoscaling_head(cluster) as environment:
        deadline = time.monotonic() + 120
        command = [sys.executable, "-m", "tests.deploy.scaling_job", json.dumps(asked)]
        while True:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150
            )
            if done.returncode == 0 or time.monotonic() > deadline or "AssertionError" in done.stderr:
                break
            time.sleep(1)  # the head is not up yet
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [Counter(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]
    start, data_stage, training_stage, end = seen
    assert not start and not end
    assert data_stage == {"CPU": 1}
    assert training_stage["GPU"] == 2
