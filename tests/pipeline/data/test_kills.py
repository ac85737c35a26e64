"""Several Ray nodes on this machine, and SIGKILL to a worker, the driver or a node while filter and
precompute work: running again gives the rows of an undisturbed run, none twice, latents bit-equal."""

import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.data.filter import SCORES_SCHEMA
from pipeline.store import delta_tables, schema, storage
from tests.helpers.data_root import make_data_root, rows_by_id
from tests.helpers.processes import ROOT
from tests.helpers.ray_cluster import driver_environment, new_node, one_node_cluster
from tests.helpers.tiny_models import save_vae

TRIALS = 10
KINDS = ("worker", "driver", "node")
SEED = 7
TABLES = {
    "filter": {
        schema.SCORES: (SCORES_SCHEMA, "clip_id"),
        schema.SELECTION: (schema.SELECTION_SCHEMA, "clip_id"),
    },
    "precompute": {
        schema.TEXT: (schema.TEXT_SCHEMA, "clip_id"),
        schema.LATENTS: (schema.LATENTS_SCHEMA, "sample_id"),
    },
}
"""What each stage writes, with the schema and the key of its rows."""


class Stages:
    """filter or precompute on a cluster of three nodes, in a driver process that goes through one data root
    after another: what it has started serves the next, as long as nobody kills it."""

    def __init__(self, folder: Path) -> None:
        self.cluster = one_node_cluster()
        self.nodes = [new_node(self.cluster) for _ in range(2)]
        self.vae = save_vae(folder / "vae")
        self.errors = folder / "errors.txt"
        self.driver: subprocess.Popen[str] | None = None

    def start(self, stage: str, data: str, shared: str = "shared") -> None:
        """A stage on this root, in a new driver if there is none."""
        if self.driver is None:
            command = [sys.executable, "-m", "tests.pipeline.data.kill_driver"]
            command += [self.vae, self.cluster.address, shared]
            with self.errors.open("w") as errors:
                self.driver = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=driver_environment(),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
            self.wait_for("ready")
        assert self.driver.stdin is not None
        print(stage, data, file=self.driver.stdin, flush=True)

    def wait_for(self, word: str) -> None:
        assert self.driver is not None and self.driver.stdout is not None
        for line in self.driver.stdout:
            if line.strip() == word:
                return
        raise AssertionError(f"ended with {self.driver.wait()}: {self.errors.read_text()[-3000:]}")

    def finish(self) -> None:
        self.wait_for("done")

    def is_at_work(self) -> bool:
        """Whether the driver has yet to say that it is done."""
        assert self.driver is not None
        return not select.select([self.driver.stdout], [], [], 0)[0]

    def end(self) -> None:
        if self.driver is not None:
            self.driver.kill()
            self.driver.communicate()
            self.driver = None

    def kill(self, kind: str, draw: np.random.Generator) -> None:
        """SIGKILL to the driver, one busy worker or one node with all that runs there."""
        if kind == "driver":
            self.end()
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


def rows(stage: str, data: str) -> dict[str, dict[str, dict]]:
    """Every table of a stage by id; fails if a row stands twice."""
    found = {}
    for name, (expected, key) in TABLES[stage].items():
        found[name] = rows_by_id(data, name, expected, key)
    if stage == "precompute":
        index = delta_tables.read(storage.join(data, schema.LATENTS, schema.INDEX), ["sample_id"])
        assert index is not None
        assert sorted(index["sample_id"].to_pylist()) == sorted(found["latents"])
    return found


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    stages = Stages(tmp_path_factory.mktemp("kills"))
    yield stages
    stages.end()
    stages.cluster.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_anywhere_and_run_again_gives_the_rows_of_an_undisturbed_run(stages, tmp_path):
    lasted_s = {}
    for kept in (False, True):  # a new driver starts its workers, one that is kept has them
        whole = fresh_root(tmp_path / f"whole{kept}")
        for stage in TABLES:
            if not kept:
                stages.end()
            stages.start(stage, whole)
            begin = time.monotonic()
            stages.finish()
            lasted_s[stage, kept] = time.monotonic() - begin
    expected = {stage: rows(stage, whole) for stage in TABLES}
    assert len(expected["precompute"]["latents"]) == 15

    draw = np.random.default_rng(SEED)
    killed_at_work = 0
    for trial in range(TRIALS):
        kind, stage = KINDS[trial % len(KINDS)], list(TABLES)[trial % len(TABLES)]
        data = fresh_root(tmp_path / f"trial{trial}")
        if stage == "precompute":
            for name in TABLES["filter"]:
                own = storage.path_of(storage.join(data, name))
                shutil.rmtree(own, ignore_errors=True)
                shutil.copytree(storage.path_of(storage.join(whole, name)), own)
        lasts_s = lasted_s[stage, stages.driver is not None]
        stages.start(stage, data)
        time.sleep(float(draw.uniform(0.1, 0.9)) * lasts_s)
        killed_at_work += stages.is_at_work()
        stages.kill(kind, draw)
        if kind == "driver":
            stages.start(stage, data)
        stages.finish()
        assert rows(stage, data) == expected[stage], f"trial {trial}"
        dead = [node for node in stages.raylets() if node.status() == psutil.STATUS_ZOMBIE]
        assert not dead, f"trial {trial} took a node along"
        shutil.rmtree(tmp_path / f"trial{trial}")
    assert killed_at_work > TRIALS / 2


@pytest.mark.slow
def test_local_paths_on_several_nodes_are_refused_unless_the_config_vouches_for_them(stages, tmp_path):
    stages.end()
    stages.start("filter", fresh_root(tmp_path), shared="local")
    with pytest.raises(AssertionError, match="ended with 1: ") as ended:
        stages.finish()
    # 3, and for some seconds one that was killed just before.
    assert re.search(r"is a local path and this cluster has [34] nodes", str(ended.value))
    assert "shared_filesystem: true" in str(ended.value)
