"""Listing of what ingest has to read: the media files below a folder, or the rows of a manifest.

It is streamed and never held in memory, since there may be millions of files.
"""

import contextlib
import csv
import fnmatch
import io
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pyarrow.parquet as pq

from pipeline.store import hashing, storage
from pipeline.video.file_endings import MEDIA_ENDINGS, ending_of

SIDECAR_ENDINGS = (".txt", ".json")
LABELS = ("caption", "license", "dataset")
PATH_COLUMNS = ("path", "video", "video_path", "file", "file_name", "filename", "image")
CAPTION_COLUMNS = ("caption", "text", "name")
_WEBVID = ("videoid", "page_dir")  # the file is <page_dir>/<videoid>.mp4
_MANIFEST_ENDINGS = (".csv", ".tsv", ".parquet")
_LOOKUPS = 32  # sizes asked for at a time


class Listing:
    """The sources below `input`; iterate once, then read `ignored`, the number of files that were skipped."""

    def __init__(self, input: str, output: str, exclude: list[str], manifest: str | None) -> None:
        self.input, self.output, self.exclude, self.manifest = input, output, exclude, manifest
        self.ignored = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield source_id, path (below the input), uri, bytes, etag and labels of each source.

        The labels are caption, license and dataset; None means that sidecar files should be read.
        """
        found = self._from_manifest(self.manifest) if self.manifest else self._from_folder()
        for path, size, etag, labels in found:
            yield {
                "source_id": hashing.stable_id(path, size),
                "path": path,
                "uri": storage.join(self.input, path),
                "bytes": size,
                "etag": etag,
                "labels": labels,
            }

    def _from_folder(self) -> Iterator[tuple[str, int, str, None]]:
        """Every file whose name says that it is media.

        Names that begin with '.' or '_' and files below the output are not even counted as ignored.
        """
        for url, size, etag in storage.walk(self.input):
            path = url.removeprefix(self.input).lstrip("/")
            if url.startswith(self.output + "/") or any(part[0] in "._" for part in path.split("/")):
                continue
            ending = ending_of(path)
            if ending in SIDECAR_ENDINGS:
                continue
            if ending not in MEDIA_ENDINGS or self._excluded(path):
                self.ignored += 1
                continue
            yield path, size, etag, None

    def _excluded(self, path: str) -> bool:
        return any(fnmatch.fnmatch(path, pattern) for pattern in self.exclude)

    def _from_manifest(self, manifest: str) -> Iterator[tuple[str, int, str, dict[str, str]]]:
        """Yield a manifest's rows; a missing file is listed too, with 0 bytes, and becomes an error row."""
        rows = iter(read_manifest(manifest))
        with ThreadPoolExecutor(_LOOKUPS) as pool:
            while some := list(islice(rows, 1024)):
                some = [row for row in some if not self._excluded(row["path"])]
                urls = [storage.join(self.input, row["path"]) for row in some]
                sizes = pool.map(
                    lambda row, url: storage.size_of(url) if row["bytes"] is None else row["bytes"],
                    some,
                    urls,
                )
                for row, size in zip(some, sizes, strict=True):
                    yield row["path"], size or 0, row["etag"], row["labels"]


def check_manifest(url: str) -> None:
    """ValueError if the manifest's name has no known ending."""
    if not url.endswith(_MANIFEST_ENDINGS):
        raise ValueError(f"manifest: {url!r} ends in none of {', '.join(_MANIFEST_ENDINGS)}")


def read_manifest(url: str) -> Iterator[dict[str, Any]]:
    """path, bytes (None if it does not say), etag, labels of each row.

    The path column is one of PATH_COLUMNS (OpenVid: `video`), or WebVid's `videoid` and `page_dir`; the
    caption one of CAPTION_COLUMNS. ValueError if there is no path column.
    """
    with storage.open_input(url) as file:
        rows = _parquet_rows(file) if url.endswith(".parquet") else _csv_rows(file, url)
        for row in rows:
            path = _first(row, PATH_COLUMNS)
            if path is None and row.get("videoid") is not None:
                path = "/".join(str(row[key]) for key in reversed(_WEBVID) if row.get(key)) + ".mp4"
            if path is None:
                raise ValueError(
                    f"manifest: {url} has a row without a path; its columns are {', '.join(row)}, and the "
                    f"path's is one of {', '.join(PATH_COLUMNS)}, or WebVid's {' and '.join(_WEBVID)}"
                )
            labels = {key: str(row[key]) for key in LABELS if row.get(key)}
            if caption := _first(row, CAPTION_COLUMNS):
                labels["caption"] = caption
            size = row.get("bytes")
            yield {
                "path": str(path).removeprefix("./"),
                "bytes": int(size) if size not in (None, "") else None,
                "etag": str(row.get("etag") or ""),
                "labels": labels,
            }


def _first(row: dict[str, Any], names: Iterable[str]) -> str | None:
    return next((str(row[name]) for name in names if row.get(name) not in (None, "")), None)


def _csv_rows(file: Any, url: str) -> Iterator[dict[str, Any]]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="")
    yield from csv.DictReader(text, delimiter="\t" if url.endswith(".tsv") else ",")


def _parquet_rows(file: Any) -> Iterator[dict[str, Any]]:
    parquet = pq.ParquetFile(file)
    wanted = {*PATH_COLUMNS, *CAPTION_COLUMNS, *LABELS, *_WEBVID, "bytes", "etag"}
    columns = [name for name in parquet.schema_arrow.names if name in wanted]
    for batch in parquet.iter_batches(1024, columns=columns):
        yield from batch.to_pylist()


def read_sidecars(uri: str) -> dict[str, str]:
    """Caption, license and dataset from the files next to a source; JSON takes precedence over text."""
    labels: dict[str, str] = {}
    stem = uri[: -len(ending)] if (ending := os.path.splitext(uri)[1]) else uri
    with contextlib.suppress(FileNotFoundError):
        labels["caption"] = storage.read_bytes(stem + ".txt").decode("utf-8", errors="replace").strip()
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        found = json.loads(storage.read_bytes(stem + ".json").decode("utf-8", errors="replace"))
        if isinstance(found, dict):
            labels |= {key: str(found[key]) for key in LABELS if found.get(key)}
    return labels
