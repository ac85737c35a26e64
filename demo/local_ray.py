"""A private Ray on this machine, with its own ports, folder and token; it stops only what it started.

`ray stop` would stop every Ray on the machine, so the head runs as a child in its own process group, marked
by an environment variable that all its descendants inherit, and only those are ended.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

MARK = "OPENSEEDVR_LOCAL_RAY"
_PORT_FLAGS = (
    "--port",
    "--dashboard-port",
    "--ray-client-server-port",
    "--node-manager-port",
    "--object-manager-port",
    "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port",
    "--runtime-env-agent-port",
    "--metrics-export-port",
)


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on right now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class LocalRay:
    """A running head; `environment` is what a process needs to talk to it."""

    def __init__(self, num_cpus: int, object_store_bytes: int) -> None:
        self.mark = secrets.token_hex(8)
        # Ray's socket paths are limited to 107 bytes: a short folder.
        self.folder = Path(tempfile.mkdtemp(prefix="osv", dir="/tmp"))
        ports = dict(zip(_PORT_FLAGS, free_ports(len(_PORT_FLAGS)), strict=True))
        self.dashboard = f"http://127.0.0.1:{ports['--dashboard-port']}"
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = {
            **inherited,
            MARK: self.mark,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "RAY_ADDRESS": f"127.0.0.1:{ports['--port']}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        }
        command = [
            *("ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1"),
            *("--include-dashboard=true", "--dashboard-host=127.0.0.1", "--disable-usage-stats"),
            *(f"--num-cpus={num_cpus}", f"--object-store-memory={object_store_bytes}"),
            *(f"--temp-dir={self.folder}", *(f"{flag}={port}" for flag, port in ports.items())),
        ]
        head_environment = {name: v for name, v in self.environment.items() if name != "RAY_ADDRESS"}
        self.log = open(self.folder / "head.log", "w")  # noqa: SIM115 - closed in stop()
        self.head = subprocess.Popen(
            command, env=head_environment, stdout=self.log, stderr=self.log, start_new_session=True
        )

    def wait_until_ready(self, limit_s: float = 90) -> None:
        """Until the dashboard takes jobs. RuntimeError with the head's own words if it does not.

        Only a job shows it: on a busy machine the dashboard answers before the agent that runs jobs is there.
        """
        port = int(self.dashboard.rsplit(":", 1)[1])
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and self.head.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                submit = ["ray", "job", "submit", "--no-wait", "--", "true"]
                taken = subprocess.run(submit, env=self.environment, capture_output=True, timeout=60)
                if taken.returncode == 0:
                    return
            time.sleep(0.5)
        words = (self.folder / "head.log").read_text()[-2000:]
        raise RuntimeError(f"the local Ray did not start:\n{words}")

    def processes(self) -> list[psutil.Process]:
        """Every process that carries our mark, but for this one."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def stop(self) -> None:
        """End the head and whatever is left of it, and remove its folder."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.head.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.head.wait(timeout=15)
        deadline = time.monotonic() + 10
        while (left := self.processes()) and time.monotonic() < deadline:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.terminate() if time.monotonic() < deadline - 6 else process.kill()
            psutil.wait_procs(left, timeout=2)
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def local_ray(num_cpus: int, object_store_bytes: int) -> Iterator[LocalRay]:
    """A local Ray for the length of the block, also when it ends by Ctrl-C or SIGTERM."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupted)
    ray = LocalRay(num_cpus, object_store_bytes)
    try:
        ray.wait_until_ready()
        yield ray
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not stop the cleaning up
        ray.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, previous)
