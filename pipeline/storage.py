"""All bytes go through here: one filesystem object for file:// and s3://, set up once.

URLs are absolute: a stage runs as a Ray job whose working directory is a copy that vanishes with it.
Credentials come from the environment (or the machine's role) and never stand in a URL.
"""

import contextlib
import io
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
import pyarrow.fs as pa_fs
import pyarrow.parquet as pq

_S3_OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,
    "default_block_size": 16 * 1024**2,
    "config_kwargs": {
        "connect_timeout": 10,
        "read_timeout": 60,
        "retries": {"max_attempts": 8, "mode": "adaptive"},
    },
}


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
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return fsspec.filesystem("s3", endpoint_url=endpoint, **_S3_OPTIONS)
    return fsspec.filesystem("file", auto_mkdir=True)


def arrow_filesystem(url: str) -> pa_fs.FileSystem:
    """The same filesystem object for those that want PyArrow's interface (Ray)."""
    return pa_fs.PyFileSystem(pa_fs.FSSpecHandler(filesystem(url)))


def path_of(url: str) -> str:
    """What the filesystem object calls the URL: a local path, or bucket/key."""
    return url.removeprefix("file://").removeprefix("s3://")


def join(url: str, *names: str) -> str:
    return "/".join([url.rstrip("/"), *names])


def exists(url: str) -> bool:
    return filesystem(url).exists(path_of(url))


def list_files(url: str) -> list[tuple[str, int, str]]:
    """Every file below a URL as (URL, bytes, etag or ''), sorted by URL. A missing folder has none."""
    fs = filesystem(url)
    try:
        found = fs.find(path_of(url), detail=True)
    except FileNotFoundError:
        return []
    scheme = "s3://" if url.startswith("s3://") else "file://"
    return sorted(
        (scheme + path, int(info["size"] or 0), str(info.get("ETag", "")).strip('"'))
        for path, info in found.items()
    )


def read_bytes(url: str) -> bytes:
    return bytes(filesystem(url).cat_file(path_of(url)))


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole object: readers see the old one or the new one, never a part."""
    fs = filesystem(url)
    if url.startswith("s3://"):
        fs.pipe_file(path_of(url), data)  # one upload; visible only when complete
        return
    path = Path(path_of(url))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_json(url: str) -> Any:
    return json.loads(read_bytes(url))


def write_json(url: str, value: Any) -> None:
    write_bytes(url, (json.dumps(value, indent=1, sort_keys=True, default=str) + "\n").encode())


@contextlib.contextmanager
def open_input(url: str) -> Iterator[IO[bytes]]:
    """A seekable, readable file object of the URL."""
    with filesystem(url).open(path_of(url), "rb") as file:
        yield file


@contextlib.contextmanager
def local_copy(url: str, folder: str) -> Iterator[str]:
    """A local path of the URL: itself for file://, else a download into `folder`, removed afterwards."""
    if url.startswith("file://"):
        yield path_of(url)
        return
    target = os.path.join(folder, f"{uuid.uuid4().hex}{os.path.splitext(url)[1]}")
    filesystem(url).get_file(path_of(url), target)
    try:
        yield target
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(target)


def write_table(url: str, tables: list[pa.Table], schema: pa.Schema) -> None:
    """Write one Parquet file whose row groups are the given tables, as one complete object."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema, compression="zstd", compression_level=1) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, table.num_rows))
    write_bytes(url, sink.getvalue())


def read_table(url: str, columns: list[str] | None = None) -> pa.Table:
    """One Parquet file as a table."""
    with open_input(url) as file:
        return pq.read_table(file, columns=columns)


def read_schema(url: str) -> pa.Schema:
    with open_input(url) as file:
        return pq.read_schema(file)


def parquet_files(url: str) -> list[str]:
    """The data files of a table's folder (names that start with '_' or '.' are not data), sorted."""
    url = url if "://" in url else f"file://{url}"
    files = []
    for file, _, _ in list_files(url):
        inner = file.removeprefix(url).lstrip("/")
        if file.endswith(".parquet") and not any(part[0] in "_." for part in inner.split("/")):
            files.append(file)
    return files


def read_folder(url: str, columns: list[str] | None = None) -> pa.Table | None:
    """All files of a table's folder as one table; None if there is none."""
    tables = [read_table(file, columns) for file in parquet_files(url)]
    if not tables:
        return None
    return pa.concat_tables([table.replace_schema_metadata() for table in tables])
