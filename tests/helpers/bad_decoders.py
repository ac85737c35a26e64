"""Decoders that fail as a hostile file makes them; they run in the sandbox's child, so little is imported."""

import signal
import time
from collections.abc import Iterator


def hang(*_: object) -> Iterator[dict]:
    time.sleep(1000)
    yield {}


def die(*_: object) -> Iterator[dict]:
    signal.raise_signal(signal.SIGSEGV)
    yield {}
