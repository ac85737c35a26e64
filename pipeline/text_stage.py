"""Captions -> text/: each kept clip's embeddings of the three encoders, once.

The encoders stay apart, since training replaces each on its own by its encoding of ''. A clip without
a caption has the empty prompt's embeddings. The null embeddings are in the table's metadata.
"""

import base64
import dataclasses
import json
from typing import Any

from model.text import TextEmbedding, TextEncoderConfig, TextEncoders
from pipeline import bfloat16, schema, shards, stage, storage

TextConfig = TextEncoderConfig
_PARTS = ("clip_l", "clip_g", "t5", "pooled_l", "pooled_g")
_NULL_KEY = b"openseedvr.null_text"
_CLIPS_PER_SHARD = 1024


def text_columns(embedding: TextEmbedding) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for part in _PARTS:
        columns |= bfloat16.to_columns(part, getattr(embedding, part))
    return columns


def embedding_of(row: dict[str, Any]) -> TextEmbedding:
    """The embeddings of one row of text/."""
    return TextEmbedding(**{part: bfloat16.from_columns(row, part) for part in _PARTS})


def null_metadata(null: TextEmbedding) -> str:
    """The '' embeddings as JSON: what the table's metadata carries."""
    columns = text_columns(null)
    return json.dumps(
        {
            name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
            for name, value in columns.items()
        }
    )


def read_null(data_url: str) -> TextEmbedding:
    """The '' embeddings of a data root's text/; ValueError if there is none."""
    folder = storage.join(data_url, schema.TEXT)
    files = storage.parquet_files(folder)
    metadata = (storage.read_schema(files[0]).metadata or {}) if files else {}
    if _NULL_KEY not in metadata:
        raise ValueError(f"{folder}: no text embeddings here; run precompute first")
    values = json.loads(metadata[_NULL_KEY])
    return embedding_of(
        {name: base64.b64decode(value) if isinstance(value, str) else value for name, value in values.items()}
    )


def token_count(row: dict[str, Any]) -> int:
    """Text tokens of a row: both CLIPs share theirs (joined by channel), T5's follow."""
    return max(row["clip_l_shape"][0], row["clip_g_shape"][0]) + row["t5_shape"][0]


class EncodeText:
    """The text actor: loads the encoders once; one call makes one shard's file."""

    def __init__(self, config: TextConfig, folder: str, fingerprint: str) -> None:
        self.folder = folder
        self.encoders = TextEncoders(config)
        null = null_metadata(self.encoders.encode([""])[0])
        self.schema = schema.with_fingerprint(
            schema.TEXT_SCHEMA, fingerprint, text="encoders", **{_NULL_KEY.decode(): null}
        )

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return shards.make_shard(self.folder, row["shard"], self.schema, self._rows)

    def _rows(self, planned: list[dict[str, Any]]) -> list[dict[str, Any]]:
        embeddings = self.encoders.encode([row["caption"] or "" for row in planned])
        return [
            schema.empty_row(schema.TEXT_SCHEMA, clip_id=row["clip_id"], **text_columns(embedding))
            for row, embedding in zip(planned, embeddings, strict=True)
        ]


def embed_kept_clips(data_url: str, config: TextConfig, cpus: float, gpus: float) -> dict[str, int]:
    """Fill text/ for every kept clip; returns each clip's text tokens."""
    folder = storage.join(data_url, schema.TEXT)
    clips = storage.read_folder(storage.join(data_url, schema.CLIPS), ["clip_id", "caption"])
    selection = storage.read_folder(storage.join(data_url, schema.SELECTION), ["clip_id", "keep"])
    if clips is None or selection is None:
        raise ValueError(f"data: {data_url} has no clips/ or no selection/; run ingest and filter first")
    kept = {row["clip_id"] for row in selection.to_pylist() if row["keep"]}
    if not kept:
        raise ValueError(f"data: {data_url}/selection keeps no clip; loosen the filter's thresholds")
    rows = [row for row in clips.to_pylist() if row["clip_id"] in kept]
    fingerprint = schema.fingerprint(text=dataclasses.asdict(config))
    pending = shards.plan(folder, rows, "clip_id", fingerprint, _CLIPS_PER_SHARD)
    stage.run_shards(
        pending,
        EncodeText,
        "precompute: embed captions",
        constructor_args=(config, folder, fingerprint),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    shapes = storage.read_folder(folder, ["clip_id", "clip_l_shape", "clip_g_shape", "t5_shape"])
    assert shapes is not None
    return {row["clip_id"]: token_count(row) for row in shapes.to_pylist()}
