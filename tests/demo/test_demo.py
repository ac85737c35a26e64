"""The demo as a user runs it: stopped in the middle, beside another Ray."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from demo.local_ray import MARK, LocalRay, free_ports

ROOT = Path(__file__).resolve().parents[2]


def marked() -> list[psutil.Process]:
    """Processes that any local Ray of ours has started."""
    found = []
    for process in psutil.process_iter():
        try:
            if MARK in process.environ():
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def folders() -> set[str]:
    return {path.name for path in Path("/tmp").glob("osv*")}


def test_free_ports_are_distinct():
    assert len(set(free_ports(9))) == 9


@pytest.mark.slow
def test_ctrl_c_in_the_middle_leaves_nothing_behind_and_stops_nothing_else(tmp_path):
    folders_before = folders()
    other = LocalRay(num_cpus=1, object_store_bytes=100 * 2**20)
    try:
        other.wait_until_ready()
        mine = {process.pid for process in other.processes()}
        command = [sys.executable, "-m", "demo.run", "--short", "--out", str(tmp_path / "demo")]
        demo = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert demo.stdout is not None
        for line in demo.stdout:
            if "jobs.ingest" in line:
                break
        time.sleep(8)  # into the job
        assert {process.pid for process in marked()} - mine, "the demo's Ray is not running"
        os.kill(demo.pid, signal.SIGINT)
        words, _ = demo.communicate(timeout=90)
        assert demo.returncode == 130, words
        assert [process for process in other.processes() if process.name() == "raylet"]
        others_children = {process.pid for process in other.processes()}
        left = [process for process in marked() if process.pid not in others_children]
        assert not left, f"left behind: {left}"
        listed = subprocess.run(["ray", "job", "list"], env=other.environment, capture_output=True)
        assert listed.returncode == 0
    finally:
        other.stop()
    assert folders() - folders_before == set()
