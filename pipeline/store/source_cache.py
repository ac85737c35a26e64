"""Local copies of sources on S3: a node fetches each source once, however many of its clips are read there.

Decoders seek, and foreign files are decoded without credentials, so decoding needs whole local files. The
tasks that read one source run in any order and on any worker, so a node's workers share a folder of copies
below the temporary folder. It takes at most half of the free disk; the least recently used copies are removed
first. The folder's name contains Ray's node and job, so nothing outlives the job that fetched it.
"""

import atexit
import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.store import hashing, storage

_PREFIX = f"openseedvr-sources-{os.getuid()}-"
_MAX_FILES = 10_000
_LOCKS = 256  # two sources that share one wait for each other's download
_LEFT_BEHIND_S = 24 * 3600.0
_CLEAR_LIMIT_S = 30.0


def _folder() -> Path:
    """Folder of this node's copies for this job; without Ray, of this process's copies."""
    if not ray.is_initialized():
        return _made_folder(f"process-{os.getpid()}", ends_with_process=True)
    context = ray.get_runtime_context()
    return _made_folder(f"{context.get_node_id()}-{context.get_job_id()}", ends_with_process=False)


@functools.cache
def _made_folder(name: str, ends_with_process: bool) -> Path:
    """Also removes what jobs left that were killed before they could."""
    above = Path(tempfile.gettempdir())
    for other in above.glob(f"{_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - other.stat().st_mtime > _LEFT_BEHIND_S:
                shutil.rmtree(other, ignore_errors=True)
    folder = above / f"{_PREFIX}{name}"
    if ends_with_process:
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextlib.contextmanager
def local_file(url: str, etag: str | None, last_use: bool = False) -> Iterator[str]:
    """A local path of a source: itself if it is one, else this node's copy.

    etag: of the version to read, if known. last_use: the copy need not stay. FileNotFoundError if there is
    no such object; an outage is a StorageError.
    """
    if not url.startswith("s3://"):
        yield storage.path_of(url)
        return
    folder, ending = _folder(), os.path.splitext(url)[1]
    folder.mkdir(mode=0o700, exist_ok=True)
    kept = folder / (hashing.stable_id(url, etag or "") + ending)
    # A private name, since another process may remove `kept` meanwhile.
    mine = folder / f".{uuid.uuid4().hex}{ending}"
    try:
        with _locked(folder / f".lock{hashing.stable_hash(kept.name) % _LOCKS}"):
            try:
                os.link(kept, mine)
                os.utime(kept)
            except FileNotFoundError:
                storage.fetch(url, str(mine))
                os.utime(mine)
                os.link(mine, kept)
                _make_room(folder)
        yield str(mine)
    finally:
        mine.unlink(missing_ok=True)
        if last_use:
            kept.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when its holder ends, however that happens
        yield


def _make_room(folder: Path) -> None:
    """Remove the least recently used copies beyond half of the disk that they and nothing else take."""
    files = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            if not entry.name.startswith("."):
                files.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
    total = sum(size for _, size, _ in files)
    room = (shutil.disk_usage(folder).free + total) / 2
    count = len(files)
    for _, size, path in sorted(files):
        if total <= room and count <= _MAX_FILES:
            return
        Path(path).unlink(missing_ok=True)
        total, count = total - size, count - 1


def clear() -> None:
    """Remove this node's copies."""
    shutil.rmtree(_folder(), ignore_errors=True)


def clear_on_every_node() -> None:
    """Clean up at the end of a job; what cannot be reached is removed by a later job."""
    task = ray.remote(num_cpus=0, max_retries=0)(clear)
    with contextlib.suppress(RayError):
        places = [
            NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            for node in ray.nodes()
            if node["Alive"]
        ]
        waiting = [task.options(scheduling_strategy=place).remote() for place in places]
        ray.wait(waiting, num_returns=len(waiting), timeout=_CLEAR_LIMIT_S)
