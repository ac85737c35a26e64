"""Several Ray nodes on this machine, and SIGKILL to a worker, the driver or a node while filter and
precompute work: running again gives the rows of an undisturbed run, none twice, latents bit-equal."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline import schema, storage
from tests.pipeline.data_root import make_data_root
from tests.pipeline.ray_cluster import driver_environment, new_node, one_node_cluster
from tests.pipeline.tiny_models import save_vae

TRIALS = 10
KINDS = ("worker", "driver", "node")
SEED = 7
TABLES = {"scores": "clip_id", "selection": "clip_id", "text": "clip_id", "latents": "sample_id"}

STAGES = """
import sys, time
import ray
from model.text import TINY_ENCODERS
from pipeline import filter, precompute
from pipeline.filter import FilterConfig, Threshold
from pipeline.sampling import Bucket
data, vae, address, shared = sys.argv[1:]
ray.init(address=address, log_to_driver=False)
shared = {"shared_filesystem": shared == "shared"}
print("ready", flush=True)
thresholds = {"exposure": Threshold(min=1)}
filter.run(FilterConfig(data=data, thresholds=thresholds, niqe_frames=0, clips_per_shard=2, **shared))
sizes = {"buckets": [Bucket(1, 64, 64), Bucket(5, 64, 64)], "variants": 3, "samples_per_shard": 3}
precompute.run(precompute.PrecomputeConfig(data=data, vae=vae, text=TINY_ENCODERS, **sizes, **shared))
"""


class Stages:
    """filter and precompute as a driver process on a cluster of three nodes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cluster = one_node_cluster()
        self.nodes = [new_node(self.cluster) for _ in range(2)]
        self.vae = save_vae(folder / "vae")
        self.script = folder / "stages.py"
        self.script.write_text(STAGES)

    def start(self, data: str, shared: str = "shared") -> subprocess.Popen[str]:
        """The driver, once it has connected."""
        command = [sys.executable, str(self.script), data, self.vae, self.cluster.address, shared]
        process = subprocess.Popen(
            command,
            env=driver_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        while (line := process.stdout.readline()) != "ready\n":
            assert line, process.communicate()[1][-2000:]
        return process

    def finish(self, process: subprocess.Popen[str]) -> None:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors[-3000:]

    def kill(self, kind: str, process: subprocess.Popen[str], draw: np.random.Generator) -> None:
        """SIGKILL to the driver, one busy worker or one node with all that runs there."""
        if kind == "driver":
            process.kill()
            process.communicate()
        elif kind == "node":
            place = int(draw.integers(len(self.nodes)))
            self.cluster.remove_node(self.nodes[place], allow_graceful=False)
            self.nodes[place] = new_node(self.cluster)
        else:
            workers = [p for node in self.raylets() for p in node.children() if is_working(p)]
            if workers:
                workers[int(draw.integers(len(workers)))].kill()

    def raylets(self) -> list[psutil.Process]:
        found = []
        for node in self.cluster.list_all_nodes():
            for entry in node.all_processes.get("raylet", []):
                found.append(psutil.Process(entry.process.pid))
        return found


def is_working(process: psutil.Process) -> bool:
    """A worker with a task or an actor; a raylet's two agents are none: killing one ends the whole node,
    which for the head, that the driver stands on, is the end of the cluster."""
    try:
        name = " ".join(process.cmdline())
    except psutil.Error:
        return False
    # A title's line is padded to the length of the command that it replaces.
    return name.startswith("ray::") and "IDLE" not in name and not name.rstrip().endswith("Agent")


def fresh_root(folder: Path) -> str:
    return make_data_root(folder, ["cup.mp4", "city.mp4", "fig.jpg", "pan_dogs.mp4"], ["box.mp4"], frames=9)


def rows(data: str) -> dict[str, dict[str, dict]]:
    """Every table by id; fails if a row stands twice."""
    found = {}
    for name, key in TABLES.items():
        table = storage.read_folder(storage.join(data, name))
        assert table is not None, name
        found[name] = {row[key]: row for row in table.to_pylist()}
        assert len(found[name]) == table.num_rows, f"{name}: a row stands twice"
    index = storage.read_folder(storage.join(data, schema.LATENTS, schema.INDEX), ["sample_id"])
    assert index is not None
    assert sorted(index["sample_id"].to_pylist()) == sorted(found["latents"])
    return found


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    stages = Stages(tmp_path_factory.mktemp("kills"))
    yield stages
    stages.cluster.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_anywhere_and_run_again_gives_the_rows_of_an_undisturbed_run(stages, tmp_path):
    whole = fresh_root(tmp_path / "whole")
    process = stages.start(whole)
    begin = time.monotonic()
    stages.finish(process)
    lasted_s = time.monotonic() - begin
    expected = rows(whole)
    assert len(expected["latents"]) == 15

    draw = np.random.default_rng(SEED)
    killed_at_work = 0
    for trial in range(TRIALS):
        data = fresh_root(tmp_path / f"trial{trial}")
        process = stages.start(data)
        time.sleep(float(draw.uniform(0.1, 0.9)) * lasted_s)
        killed_at_work += process.poll() is None
        stages.kill(KINDS[trial % len(KINDS)], process, draw)
        if KINDS[trial % len(KINDS)] == "driver":
            process = stages.start(data)
        stages.finish(process)
        assert rows(data) == expected, f"trial {trial}"
        dead = [node for node in stages.raylets() if node.status() == psutil.STATUS_ZOMBIE]
        assert not dead, f"trial {trial} took a node along"
        shutil.rmtree(tmp_path / f"trial{trial}")
    assert killed_at_work > TRIALS / 2


@pytest.mark.slow
def test_local_paths_on_several_nodes_are_refused_unless_the_config_vouches_for_them(stages, tmp_path):
    process = stages.start(fresh_root(tmp_path), shared="local")
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    # 3, and for some seconds one that was killed just before.
    assert re.search(r"is a local path and this cluster has [34] nodes", errors), errors[-2000:]
    assert "shared_filesystem: true" in errors
