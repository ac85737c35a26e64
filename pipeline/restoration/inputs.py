"""The files to restore, below a config's inputs, and the names of their results."""

import posixpath
from collections import Counter
from typing import Any

from pipeline.store import hashing, storage
from pipeline.video.file_endings import IMAGE_ENDINGS, MEDIA_ENDINGS, ending_of, natural_order


def find_inputs(roots: list[str], as_sequences: bool) -> tuple[list[dict[str, Any]], Counter[str]]:
    """One row per result, and how many files of which ending are left out since they are no media by name.

    A row: input URL, its bytes and etag, `name`, the result's path without its ending, and `files`: the
    pictures of an image sequence, else empty. Two inputs whose results would share a name keep their own
    ending in it (`a.mov.mp4`). A root that is a file is taken whatever its ending. as_sequences: the images
    of each folder are one video. ValueError for a root without files, and for two results of one name.
    """
    rows: dict[str, dict[str, Any]] = {}
    left_out: Counter[str] = Counter()
    for root in roots:
        files = storage.list_files(root)
        if not files:
            raise ValueError(f"input: {root} is neither a file nor a folder with files in it")
        for url, size, etag in files:
            alone = url == root
            inner = posixpath.basename(url) if alone else url.removeprefix(root).lstrip("/")
            ending = ending_of(inner)
            if ending in IMAGE_ENDINGS and as_sequences and not alone:
                _add_to_sequence(rows, root, url, size, etag)
            elif alone or ending in MEDIA_ENDINGS:
                rows[url] = {"input": url, "bytes": size, "etag": etag, "name": inner, "files": []}
            else:
                left_out[ending] += 1
    for row in rows.values():
        row["files"].sort(key=natural_order)
    _name_results(list(rows.values()))
    return list(rows.values()), left_out


def _name_results(rows: list[dict[str, Any]]) -> None:
    """Take the ending off each name that is still the only one of its kind without it."""
    stems = [row["name"] if row["files"] else posixpath.splitext(row["name"])[0] for row in rows]
    count = Counter(stems)
    for row, stem in zip(rows, stems, strict=True):
        row["name"] = stem if count[stem] == 1 else row["name"]
    name, uses = Counter(row["name"] for row in rows).most_common(1)[0] if rows else ("", 0)
    if uses > 1:
        raise ValueError(f"input: two files would be written to {name}; restore them separately")


def describe_left_out(left_out: Counter[str]) -> str:
    """The message in one line."""
    counts = (f"{count} {ending or 'without an ending'}" for ending, count in left_out.most_common())
    endings = ", ".join(counts)
    return f"left out: {left_out.total()} files that are no video and no image by their names ({endings})"


def _add_to_sequence(rows: dict[str, dict[str, Any]], root: str, url: str, size: int, etag: str) -> None:
    """Add an image to the sequence of its folder."""
    folder = posixpath.dirname(url)
    name = folder.removeprefix(root).strip("/") or posixpath.basename(root)
    row = rows.setdefault(folder, {"input": folder, "bytes": 0, "etag": "", "name": name, "files": []})
    row["files"].append(url)
    row["bytes"] += size
    row["etag"] = hashing.stable_id(row["etag"], posixpath.basename(url), size, etag)
