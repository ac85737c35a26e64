"""Decoding foreign files in a child process with limits, so that a hang or a crash costs only that file.

    sandbox = Sandbox(time_limit_s=60, memory_limit_bytes=4 * 2**30)
    probe = sandbox.call(decoding.probe, path)
    for part in sandbox.stream(generator_function, path): ...

One child serves many calls and is restarted after it has died or been killed. Its answers are unpickled with
a list of allowed classes (arrays, fractions, Probe), so that a child taken over by a hostile file cannot run
code here.
"""

import atexit
import contextlib
import ctypes
import functools
import inspect
import io
import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

_PR_SET_PDEATHSIG = 1
_START_LIMIT_S = 120.0  # importing the decoders on a busy machine
_ALLOWED = {
    ("fractions", "Fraction"),
    ("pipeline.video.decoding", "Probe"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
}
_LENGTH = struct.Struct("<Q")


class MediaError(ValueError):
    """A file could not be read; the message explains why to a person."""


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise MediaError(f"the decoding process returned a {module}.{name}, which is not allowed")
        return super().find_class(module, name)


def _send(pipe: IO[bytes], value: Any) -> None:
    """Pickle with arrays out of band, uncopied: a count, then the length and bytes of each part."""
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts: list[Any] = [body, *[buffer.raw() for buffer in buffers]]
    pipe.write(_LENGTH.pack(len(parts)))
    for part in parts:
        pipe.write(_LENGTH.pack(len(part)))
        pipe.write(part)
    pipe.flush()


class Sandbox:
    """A child process that runs functions for its owner within limits.

    time_limit_s: for each call, and for each item of a stream. memory_limit_bytes: of address space.
    """

    def __init__(self, time_limit_s: float = 60.0, memory_limit_bytes: int = 6 * 2**30) -> None:
        self.time_limit_s = time_limit_s
        self.memory_limit_bytes = memory_limit_bytes
        self._child: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run function(*args, **kwargs) in the child. Raises MediaError if it fails, hangs or dies."""
        items = list(self._run(function, args, kwargs))
        return items[0]

    def stream(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Yield the items of a generator function, each as soon as it arrives."""
        return self._run(function, args, kwargs)

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is None:
            return
        with contextlib.suppress(OSError):
            child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _run(self, function: Callable[..., Any], args: tuple, kwargs: dict) -> Iterator[Any]:
        child = self._child or self._start()
        finished = False
        try:
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                _send(child.stdin, (function, args, kwargs))
            while True:
                kind, value = self._receive(self.time_limit_s)
                if kind == "item":
                    yield value
                elif kind == "end":
                    finished = True
                    return
                elif kind == "memory":
                    limit = self.memory_limit_bytes / 2**30
                    raise MediaError(f"reading it needs more than the memory limit of {limit:.1f} GiB")
                else:
                    finished = True
                    raise MediaError(value)
        finally:
            if not finished:  # dead, hanging, out of memory, or no longer needed
                self.close()

    def _start(self) -> subprocess.Popen[bytes]:
        # The child gets no credentials, in case a hostile file takes it over.
        secret = ("AWS_", "RAY_")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(secret)}
        environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        # Numeric libraries reserve address space for each thread, which would count against the limit.
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
        command = [
            sys.executable,
            "-m",
            "pipeline.video.sandbox",
            str(self.memory_limit_bytes),
            str(os.getpid()),
        ]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=1 << 20
        )
        kind, value = self._receive(_START_LIMIT_S)
        if kind != "ready":
            self.close()
            raise RuntimeError(f"the decoding process did not start: {value}")
        return self._child

    def _receive(self, time_limit_s: float) -> tuple[str, Any]:
        """The child's next message; raises MediaError if it does not come in time or never will."""
        deadline = time.monotonic() + time_limit_s
        (count,) = _LENGTH.unpack(self._read(_LENGTH.size, deadline, time_limit_s))
        if count > 1000:
            raise MediaError("the decoding process sent an unreadable answer")
        parts = []
        for _ in range(count):
            (length,) = _LENGTH.unpack(self._read(_LENGTH.size, deadline, time_limit_s))
            if length > self.memory_limit_bytes:
                raise MediaError("the decoding process sent an unreadable answer")
            parts.append(self._read(length, deadline, time_limit_s))
        return _SafeUnpickler(io.BytesIO(parts[0]), buffers=parts[1:]).load()

    def _read(self, length: int, deadline: float, time_limit_s: float) -> bytearray:
        child = self._child
        assert child is not None and child.stdout is not None
        descriptor = child.stdout.fileno()
        data = bytearray(length)
        view, filled = memoryview(data), 0
        while filled < length:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise MediaError(f"reading it took longer than the limit of {time_limit_s:.0f} s")
            got = os.readv(descriptor, [view[filled:]])
            if got == 0:
                raise MediaError(_death(child))
            filled += got
        return data


def _death(child: subprocess.Popen[bytes]) -> str:
    try:
        code = child.wait(5)
    except subprocess.TimeoutExpired:
        return "the decoding process closed its output"
    if code < 0:
        return f"the decoder crashed ({signal.Signals(-code).name})"
    return f"the decoding process ended with status {code}"


@functools.cache
def shared(time_limit_s: float, memory_limit_bytes: int = 6 * 2**30) -> Sandbox:
    """Get the process-wide sandbox with these limits: a worker keeps one child for all its tasks."""
    return Sandbox(time_limit_s, memory_limit_bytes)


def _limit(memory_limit_bytes: int, parent: int) -> None:
    """Set the child's own limits; it dies with its parent, even if it hangs in a decoder."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    resource.setrlimit(resource.RLIMIT_AS, (memory_limit_bytes, memory_limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides


def _receive_request(pipe: IO[bytes]) -> Any:
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        os._exit(0)  # the owner is gone
    (count,) = _LENGTH.unpack(head)
    parts = []
    for _ in range(count):
        (length,) = _LENGTH.unpack(pipe.read(_LENGTH.size))
        parts.append(pipe.read(length))
    return pickle.loads(parts[0], buffers=parts[1:])  # from our own parent


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    _send(answers, ("ready", None))
    while True:
        function, args, kwargs = _receive_request(requests)
        try:
            result = function(*args, **kwargs)
            for item in result if inspect.isgenerator(result) else [result]:
                _send(answers, ("item", item))
            _send(answers, ("end", None))
        except MemoryError:
            _send(answers, ("memory", None))
        except ValueError as error:
            _send(answers, ("error", str(error)))
        except Exception as error:
            _send(answers, ("error", f"{type(error).__name__}: {error}"))


def _main() -> None:
    _limit(int(sys.argv[1]), int(sys.argv[2]))
    answers = os.fdopen(os.dup(1), "wb", buffering=1 << 20)
    os.dup2(2, 1)  # libraries' output must not mix with the answers
    import cv2

    from pipeline.video import decoding  # noqa: F401  (ready before the first time limit runs)

    cv2.setNumThreads(1)
    _serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    _main()
