"""A small data root of real clips, made in a moment: what ingest and filter leave. And its tables."""

from pathlib import Path

import pyarrow as pa

from pipeline.store import delta_tables, hashing, schema, storage
from pipeline.video import decoding
from tests.helpers.clips import MEDIA


def make_data_root(root: Path, train: list[str], held_out: list[str], frames: int = 24) -> str:
    """clips/ and selection/ of a clip for each bundled file, its first `frames` frames; returns the URL."""
    clips, selection = [], []
    for split, names in (("train", train), ("held_out", held_out)):
        for name in names:
            probe = decoding.probe(str(MEDIA / name))
            count = 1 if probe.media == "image" else min(frames, probe.num_frames or frames)
            clip_id = hashing.stable_id(name)
            clips.append(
                schema.empty_row(
                    schema.CLIPS_SCHEMA,
                    clip_id=clip_id,
                    uri=f"file://{MEDIA / name}",
                    source_id=hashing.stable_id("source", name),
                    media=probe.media,
                    start_pts=probe.start_pts,
                    time_base=str(probe.time_base),
                    num_frames=count,
                    fps=float(probe.fps or 25),
                    width=probe.width,
                    height=probe.height,
                    rotation=probe.rotation,
                    caption=name.split(".")[0].replace("_", " "),
                )
            )
            selection.append({"clip_id": clip_id, "keep": True, "split": split})
    url = f"file://{root}"
    for name, table_schema, rows in (
        (schema.CLIPS, schema.CLIPS_SCHEMA, clips),
        (schema.SELECTION, schema.SELECTION_SCHEMA, selection),
    ):
        data = pa.Table.from_pylist(rows, schema=table_schema)
        delta_tables.write(storage.join(url, name), "part-0.parquet", [data], table_schema)
    return url


def rows_by_id(data: str, name: str, expected: pa.Schema, key: str = "clip_id") -> dict[str, dict]:
    """A table's rows; fails if it is not there, has another schema, or a row stands twice."""
    table = delta_tables.read(storage.join(data, name))
    assert table is not None and table.schema.equals(expected), name
    rows = {row[key]: row for row in table.to_pylist()}
    assert len(rows) == table.num_rows, f"{name}: a row stands twice"
    return rows
