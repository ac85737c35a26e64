"""A hang, a crash and hunger for memory are one call's error; the next call works."""

import os
import signal
import time

import numpy as np
import psutil
import pytest

from pipeline.video import decoding
from pipeline.video.sandbox import MediaError, Sandbox
from tests.helpers.clips import MEDIA

TRAILER = str(MEDIA / "trailer_bbb.mp4")


@pytest.fixture(scope="module")
def sandbox():
    sandbox = Sandbox(time_limit_s=30, memory_limit_bytes=3 * 2**30)
    yield sandbox
    sandbox.close()


def child_of(sandbox: Sandbox) -> int:
    return sandbox.call(os.getpid)


def test_arrays_and_probes_come_back_whole(sandbox):
    assert sandbox.call(decoding.probe, TRAILER) == decoding.probe(TRAILER)
    row = {"media": "video", "start_pts": 122880, "end_pts": 245760}
    frames = sandbox.call(decoding.read_frames, row, TRAILER, 3, 5)
    assert np.array_equal(frames, decoding.read_frames(row, TRAILER, 3, 5))
    streamed = list(sandbox.stream(decoding.decode_frames, TRAILER, max_frames=4, max_side=64))
    assert len(streamed) == 4 and streamed[0].shape == (36, 64, 3)


@pytest.mark.parametrize(
    ("function", "arguments", "reason"),
    [
        (time.sleep, (60,), "longer than the limit of 1 s"),
        (signal.raise_signal, (signal.SIGSEGV,), r"crashed \(SIGSEGV\)"),
        (signal.raise_signal, (signal.SIGKILL,), r"crashed \(SIGKILL\)"),
        (bytes, (10**11,), "memory limit of 3.0 GiB"),
        (os._exit, (3,), "ended with status 3"),
        (decoding.probe, ("/nowhere.mp4",), "no such file"),
        (eval, ("__import__('collections').OrderedDict()",), "not allowed"),
    ],
)
def test_what_goes_wrong_is_one_calls_error(sandbox, function, arguments, reason):
    sandbox.call(len, "ready")
    sandbox.time_limit_s = 1.0
    try:
        with pytest.raises(MediaError, match=reason):
            sandbox.call(function, *arguments)
    finally:
        sandbox.time_limit_s = 30.0
    assert sandbox.call(len, "next") == 4


def test_one_child_serves_many_calls_and_leaves_with_its_owner(sandbox):
    first = child_of(sandbox)
    assert first == child_of(sandbox) != os.getpid()
    sandbox.close()
    assert not psutil.pid_exists(first)
    assert child_of(sandbox) != first


def test_credentials_stay_with_the_owner(sandbox, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    sandbox.close()
    assert sandbox.call(os.getenv, "AWS_SECRET_ACCESS_KEY") is None
    assert sandbox.call(os.getenv, "PATH")


def test_a_stream_may_be_left_early(sandbox):
    stream = sandbox.stream(decoding.decode_frames, TRAILER, max_side=64)
    next(stream)
    stream.close()
    assert sandbox.call(len, "next") == 4
