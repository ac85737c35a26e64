"""All reading and writing of bytes: one filesystem object each for file:// and s3://, set up once.

URLs are absolute, since a stage runs as a Ray job whose working directory is a temporary copy. Credentials
come from the environment (or the machine's role) and are never part of a URL.

An object appears whole or not at all. Failed requests to an object store are retried with back-off; one that
still fails raises StorageError, which ends the job (a rerun resumes it) rather than becoming an error row,
since an outage says nothing about a file.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

import fsspec
import pyarrow.fs as pa_fs

T = TypeVar("T")

# Each request is retried by botocore, by s3fs (5 times, for dropped connections) and by `_insist`.
_S3_OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,
    "default_block_size": 16 * 1024**2,
    "config_kwargs": {
        "connect_timeout": 10,
        "read_timeout": 20,
        "retries": {"max_attempts": 3, "mode": "standard"},
    },
}
_ATTEMPTS = 5
_FIRST_PAUSE_S = 0.5
_KEYS_PER_PAGE = 1000  # of a listing


class StorageError(RuntimeError):
    """The object store did not answer, or not in full, in spite of all retries."""


def _failures() -> tuple[type[Exception], ...]:
    """What a failing store raises, besides what says that it is as it should be."""
    # A third of a second in every process, which those on local files do without.
    import aiohttp
    import botocore.exceptions

    return OSError, asyncio.TimeoutError, aiohttp.ClientError, botocore.exceptions.BotoCoreError


def _insist(url: str, action: Callable[[], T], final: tuple[type[Exception], ...]) -> T:
    """The action's result, retried with growing pauses while an s3:// URL's store fails.

    final: errors that no retry can change (a missing object), which are raised at once.
    """
    if not url.startswith("s3://"):
        return action()
    for attempt in range(_ATTEMPTS):
        try:
            return action()
        except final as error:
            if isinstance(error, PermissionError) and "AccessDenied" not in str(error.__cause__):
                raise StorageError(f"{url}: the credentials are refused: {error}") from error
            raise
        except _failures() as error:
            if attempt == _ATTEMPTS - 1:
                raise StorageError(f"{url}: gave up after {_ATTEMPTS} attempts: {error}") from error
        time.sleep(_FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.5))  # spread out, not in step
    raise AssertionError


def reading(url: str, action: Callable[[], T]) -> T:
    """What the action reads, tried again while the store fails; StorageError if it keeps failing."""
    return _insist(url, action, (FileNotFoundError, PermissionError))


def _writing(url: str, action: Callable[[], T]) -> T:
    """Retry a write, which is harmless because it writes a whole object with the same bytes.

    "No such upload" (FileNotFoundError) may only mean that the reply to the upload's completion was lost.
    """
    return _insist(url, action, (PermissionError,))


def check_url(url: str, key: str) -> str:
    """The URL without a trailing slash; ValueError, naming the config key, if it cannot be used.

    A plain absolute path counts as file://.
    """
    parts = urlsplit(url)
    if parts.username or parts.password or "AWSAccessKeyId" in parts.query:
        raise ValueError(f"{key}: the URL carries credentials; put them in the environment instead")
    if parts.scheme == "s3":
        if not parts.netloc:
            raise ValueError(f"{key}: {url!r} names no bucket; write s3://bucket/prefix")
        return url.rstrip("/")
    if parts.scheme not in ("", "file"):
        raise ValueError(f"{key}: {url!r} is neither file:// nor s3://")
    path = parts.path if parts.scheme == "file" else url
    if not os.path.isabs(path):
        raise ValueError(
            f"{key}: {url!r} is relative; a job runs in a copy of the working directory, so write an "
            "absolute path or URL"
        )
    return "file://" + (path.rstrip("/") or "/")


def filesystem(url: str) -> fsspec.AbstractFileSystem:
    """The fsspec filesystem of a URL, with retries and time-outs set, listings never cached."""
    if url.startswith("s3://"):
        return fsspec.filesystem("s3", endpoint_url=_endpoint(), **_S3_OPTIONS)
    return fsspec.filesystem("file", auto_mkdir=True)


def delta_options(url: str) -> dict[str, str] | None:
    """Settings of Delta Lake's own client: time-outs and endpoint as in `filesystem`, credentials too."""
    if not url.startswith("s3://"):
        return None
    settings = _S3_OPTIONS["config_kwargs"]
    options = {
        "aws_conditional_put": "etag",
        "connect_timeout": f"{settings['connect_timeout']}s",
        "timeout": f"{settings['read_timeout']}s",
    }
    endpoint = _endpoint()
    if endpoint is not None:
        options |= {"aws_endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}
    return options


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def arrow_filesystem(url: str) -> pa_fs.FileSystem:
    """The same filesystem object behind PyArrow's interface, which Ray takes."""
    return pa_fs.PyFileSystem(pa_fs.FSSpecHandler(filesystem(url)))


def path_of(url: str) -> str:
    """What the filesystem object calls the URL: a local path, or bucket/key."""
    return url.removeprefix("file://").removeprefix("s3://")


def join(url: str, *names: str) -> str:
    """The URL of what lies below another."""
    return "/".join([url.rstrip("/"), *names])


def exists(url: str) -> bool:
    """Whether there is a file or a folder at the URL."""
    return reading(url, lambda: filesystem(url).exists(path_of(url)))


def walk(url: str) -> Iterator[tuple[str, int, str]]:
    """Every file below a URL, or the file itself, as (URL, bytes, etag or ''), in a stable order.

    They come a folder or a page at a time, so that memory does not grow with their number. A missing folder
    has none.
    """
    found = False
    for entry in _walk_bucket(url) if url.startswith("s3://") else _walk_folder(path_of(url)):
        found = True
        yield entry
    if not found and (info := _file_info(url)) is not None:
        yield url, int(info["size"]), str(info.get("ETag", "")).strip('"')


def files_in(url: str) -> Iterator[tuple[str, int, str]]:
    """The files directly in a folder, as `walk` gives them."""
    if url.startswith("s3://"):
        yield from _walk_bucket(url, below=False)
        return
    for entry in os.scandir(path_of(url)) if os.path.isdir(path_of(url)) else ():
        if entry.is_file():
            yield f"file://{entry.path}", entry.stat().st_size, ""


def folders_in(url: str) -> list[str]:
    """The names of the folders directly in a folder, sorted."""
    fs = filesystem(url)
    try:
        entries = reading(url, lambda: fs.ls(path_of(url), detail=True))
    except FileNotFoundError:
        return []
    return sorted(
        entry["name"].rstrip("/").rsplit("/", 1)[1] for entry in entries if entry["type"] == "directory"
    )


def _walk_bucket(url: str, below: bool = True) -> Iterator[tuple[str, int, str]]:
    """below: also what lies in folders within the folder."""
    bucket, _, prefix = path_of(url).partition("/")
    prefix = prefix and prefix.rstrip("/") + "/"
    request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": _KEYS_PER_PAGE}
    if not below:
        request["Delimiter"] = "/"
    fs = filesystem(url)
    while True:
        page = reading(url, lambda: fs.call_s3("list_objects_v2", **request))
        for entry in page.get("Contents", []):
            if not entry["Key"].endswith("/"):
                yield f"s3://{bucket}/{entry['Key']}", int(entry["Size"]), entry.get("ETag", "").strip('"')
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _walk_folder(path: str) -> Iterator[tuple[str, int, str]]:
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            if entry.is_dir():
                if entry.is_symlink() and f"{path}/".startswith(os.path.realpath(entry.path) + "/"):
                    continue  # a loop
                yield from _walk_folder(entry.path)
            elif entry.is_file():
                yield f"file://{entry.path}", entry.stat().st_size, ""


def _file_info(url: str) -> dict[str, Any] | None:
    """The filesystem's information on a file; None if there is no such file."""
    try:
        info = reading(url, lambda: filesystem(url).info(path_of(url)))
    except FileNotFoundError:
        return None
    return info if info["type"] == "file" else None


def size_of(url: str) -> int | None:
    """Bytes of a file, None if there is none."""
    info = _file_info(url)
    return None if info is None else int(info["size"])


def list_files(url: str) -> list[tuple[str, int, str]]:
    """Every file below a URL as (URL, bytes, etag or ''), sorted by URL. A missing folder has none."""
    return sorted(walk(url))


def read_bytes(url: str) -> bytes:
    """A whole file."""
    return bytes(reading(url, lambda: filesystem(url).cat_file(path_of(url))))


def read_range(url: str, begin: int, end: int) -> bytes:
    """The bytes from `begin` up to `end` of a file."""
    return bytes(reading(url, lambda: filesystem(url).cat_file(path_of(url), start=begin, end=end)))


def sha256(url: str) -> str | None:
    """Hex digest of a file, read in pieces; None if there is none."""
    size, step = size_of(url), 64 * 2**20
    if size is None:
        return None
    digest = hashlib.sha256()
    for begin in range(0, size, step):
        digest.update(read_range(url, begin, min(size, begin + step)))
    return digest.hexdigest()


@contextlib.contextmanager
def whole_file(url: str) -> Iterator[str]:
    """A local path to write to, which becomes the URL's file when the block ends without an error.

    Readers see the old object or the new one, never a part of it.
    """
    if url.startswith("s3://"):
        with tempfile.TemporaryDirectory(prefix="openseedvr-") as folder:
            path = os.path.join(folder, "object")
            yield path
            # One upload, visible only when complete.
            _writing(url, lambda: filesystem(url).put_file(path, path_of(url)))
        return
    target = Path(path_of(url))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        yield str(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole object."""
    if url.startswith("s3://"):
        _writing(url, lambda: filesystem(url).pipe_file(path_of(url), data))
        return
    with whole_file(url) as path:
        Path(path).write_bytes(data)


def remove_file(url: str) -> None:
    """Remove a file, if there is one."""
    with contextlib.suppress(FileNotFoundError):
        reading(url, lambda: filesystem(url).rm_file(path_of(url)))


def remove_folder(url: str) -> None:
    """Remove a folder and what is in it, if there is one."""
    with contextlib.suppress(FileNotFoundError):
        reading(url, lambda: filesystem(url).rm(path_of(url), recursive=True))


def put_file(path: str, url: str) -> None:
    """Move a local file to its URL."""
    if url.startswith("s3://"):
        _writing(url, lambda: filesystem(url).put_file(path, path_of(url)))
        os.remove(path)
        return
    with whole_file(url) as partial:
        shutil.move(path, partial)


def version(url: str) -> str:
    """Changes when the file does (its size, time or etag), without reading it."""
    info = reading(url, lambda: filesystem(url).info(path_of(url)))
    return str((info["size"], info.get("mtime"), info.get("ETag")))


def read_json(url: str) -> Any:
    """A JSON file's value."""
    return json.loads(read_bytes(url))


def write_json(url: str, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_bytes(url, (json.dumps(value, indent=1, sort_keys=True, default=str) + "\n").encode())


@contextlib.contextmanager
def open_input(url: str) -> Iterator[IO[bytes]]:
    """A seekable, readable file object of the URL."""
    file = reading(url, lambda: filesystem(url).open(path_of(url), "rb"))
    with file:
        yield file


@contextlib.contextmanager
def open_ranges(url: str) -> Iterator[IO[bytes]]:
    """A seekable file object that reads nothing ahead: each read asks the store for its own bytes alone."""
    fs = filesystem(url)
    ahead = {"cache_type": "none"} if url.startswith("s3://") else {}
    with fs.open(path_of(url), "rb", **ahead) as file:
        yield file


def fetch(url: str, path: str) -> None:
    """Copy a file to a local path."""
    reading(url, lambda: filesystem(url).get_file(path_of(url), path))


@contextlib.contextmanager
def local_copy(url: str, folder: str) -> Iterator[str]:
    """A local path of the URL: itself for a local file, else a download into `folder`, removed afterwards."""
    if not url.startswith("s3://"):
        yield path_of(url)
        return
    target = os.path.join(folder, f"{uuid.uuid4().hex}{os.path.splitext(url)[1]}")
    try:
        fetch(url, target)
        yield target
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(target)


@contextlib.contextmanager
def local_folder(url: str, folder: str) -> Iterator[str]:
    """A local path of a folder's URL: itself for a local one, else a download into `folder`."""
    if not url.startswith("s3://"):
        yield path_of(url)
        return
    target = os.path.join(folder, uuid.uuid4().hex)
    reading(url, lambda: filesystem(url).get(path_of(url) + "/", target + "/", recursive=True))
    yield target
