"""Processes of their own for tests: run to their end, or started, waited for and killed."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


def output_of(module: str, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """What `python -m module` prints, by default in this process's environment; fails if the program does."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def start(module: str, *arguments: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    """`python -m module` at work; its output and its errors come through one pipe."""
    command = [sys.executable, "-m", module, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def wait_for(process: subprocess.Popen[str], *texts: str) -> str:
    """The first line with one of the texts; fails if the process ends without."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if any(text in line for text in texts):
            return line
    raise AssertionError(f"ended without {texts}: " + "".join(lines[-40:]))


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a job and everything that it started."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=20)
    process.wait()
