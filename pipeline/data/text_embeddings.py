"""Captions -> text/: each kept clip's embeddings of the three encoders, once; or one fixed prompt for all.

The encoders stay apart, since training replaces each on its own by its encoding of ''. A clip without
a caption has the empty prompt's embeddings. The null embeddings are in the table's metadata. The released
backbones know a single prompt: then text/ only says where it and its negative lie, and their sha256.
"""

import base64
import dataclasses
import functools
import json
import time
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from model import text_encoders
from model.text_encoders import TextEmbedding, TextEncoderConfig, TextEncoders
from pipeline.data.kept_clips import KeptClips
from pipeline.data.upgrade import check_upgraded
from pipeline.runtime import prometheus, stage, work_plan
from pipeline.store import bf16_columns, delta_tables, hashing, parquet, schema, storage
from pipeline.store.urls import Url, check_urls
from pipeline.weights import backbones, weights_folder

TextConfig = TextEncoderConfig
_PARTS = ("clip_l", "clip_g", "t5", "pooled_l", "pooled_g")
_NULL_KEY = b"openseedvr.null_text"
_FIXED_KEY = b"openseedvr.fixed_text"
_CLIPS_PER_SHARD = 1024


@dataclasses.dataclass(frozen=True)
class FixedTextConfig:
    """The prompt that a released backbone is trained and used with, whatever the clip shows."""

    positive: Url
    """URL of the released positive prompt, pos_emb.pt."""
    negative: Url
    """URL of the released negative prompt, neg_emb.pt; training takes it now and then in place of the
    positive one, so that guidance works."""

    def __post_init__(self) -> None:
        check_urls(self, "fixed_text.")


def text_columns(embedding: TextEmbedding) -> dict[str, Any]:
    """The columns of a row of text/ that hold an embedding."""
    columns: dict[str, Any] = {}
    for part in _PARTS:
        columns |= bf16_columns.to_columns(part, getattr(embedding, part))
    return columns


def embedding_of(row: dict[str, Any]) -> TextEmbedding:
    """The embeddings of one row of text/."""
    return TextEmbedding(**{part: bf16_columns.from_columns(row, part) for part in _PARTS})


def null_metadata(null: TextEmbedding) -> str:
    """The '' embeddings as JSON: what the table's metadata carries."""
    columns = text_columns(null)
    return json.dumps(
        {
            name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
            for name, value in columns.items()
        }
    )


@dataclasses.dataclass(frozen=True)
class ClipTexts:
    """Texts of which every clip has its own."""

    null: TextEmbedding
    """of ''"""

    def prompts(self) -> weights_folder.Prompts:
        """The prompts to use with a model trained on these texts."""
        return weights_folder.Prompts(*text_encoders.join(self.null, self.null, False, False, False))


@dataclasses.dataclass(frozen=True)
class FixedTexts:
    """One prompt shared by all clips: (L, D) each, fp32."""

    positive: Tensor
    negative: Tensor

    def prompt(self, dropped: bool) -> tuple[Tensor, Tensor]:
        """The network's text input, tokens and pooled vector; the latter is empty here."""
        return self.negative if dropped else self.positive, torch.empty(0)

    def prompts(self) -> weights_folder.Prompts:
        """The prompts to use with a model trained on these texts."""
        return weights_folder.Prompts(null=self.negative, positive=self.positive)


def read_texts(data_url: str) -> ClipTexts | FixedTexts:
    """What the metadata of a data root's text/ says; ValueError if there is none or a prompt has changed."""
    folder = storage.join(data_url, schema.TEXT)
    check_upgraded(data_url)
    there = delta_tables.open_table(folder)
    metadata = (parquet.read_schema(there.urls[0]).metadata or {}) if there and there.files else {}
    if _FIXED_KEY in metadata:
        return FixedTexts(**{
            name: _read_fixed(name, **tensor) for name, tensor in json.loads(metadata[_FIXED_KEY]).items()
        })  # fmt: skip
    if _NULL_KEY not in metadata:
        raise ValueError(f"{folder}: no text embeddings here; run precompute first")
    values = json.loads(metadata[_NULL_KEY])
    return ClipTexts(
        embedding_of(
            {
                name: base64.b64decode(value) if isinstance(value, str) else value
                for name, value in values.items()
            }
        )
    )


def _read_fixed(name: str, url: str, sha256: str) -> Tensor:
    if weights_folder.weights_hash(url) != sha256:
        raise ValueError(f"fixed_text.{name}: {url} is not the file that precompute was run with")
    return backbones.read_prompt(url).text


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
        return work_plan.make_shard(self.folder, row["shard"], self.schema, self._rows)

    def _rows(self, planned: list[dict[str, Any]]) -> list[dict[str, Any]]:
        start = time.monotonic()
        embeddings = self.encoders.encode([row["caption"] or "" for row in planned])
        prometheus.count(prometheus.MODEL_SECONDS, time.monotonic() - start, model="text")
        return [
            schema.empty_row(schema.TEXT_SCHEMA, clip_id=row["clip_id"], **text_columns(embedding))
            for row, embedding in zip(planned, embeddings, strict=True)
        ]


def write_fixed(row: dict[str, Any], folder: str, table: pa.Schema) -> dict[str, Any]:
    """One shard of text/ where all clips share one prompt: its rows only name the clips."""

    def rows(planned: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [schema.empty_row(schema.TEXT_SCHEMA, clip_id=clip["clip_id"]) for clip in planned]

    return work_plan.make_shard(folder, row["shard"], table, rows)


def embed_kept_clips(data_url: str, kept: KeptClips, config: TextConfig, cpus: float, gpus: float) -> None:
    """Fill text/ for every kept clip, and `kept` with their text tokens."""
    folder = storage.join(data_url, schema.TEXT)
    rows = (row for row, _, _ in kept.rows(data_url, ["clip_id", "caption"]))
    fingerprint = hashing.fingerprint(text=dataclasses.asdict(config))
    planned = work_plan.plan(folder, rows, "clip_id", fingerprint, _CLIPS_PER_SHARD)
    stage.run_shards(
        planned.pending,
        EncodeText,
        "precompute: embed captions",
        functools.partial(work_plan.commit, folder, schema.with_fingerprint(schema.TEXT_SCHEMA, fingerprint)),
        constructor_args=(config, folder, fingerprint),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    kept.read_text_tokens(folder)


def fix_kept_clips(data_url: str, kept: KeptClips, config: FixedTextConfig) -> None:
    """Fill text/ for every kept clip with the one prompt, and `kept` with its text tokens."""
    folder = storage.join(data_url, schema.TEXT)
    rows = (row for row, _, _ in kept.rows(data_url, ["clip_id"]))
    urls = dataclasses.asdict(config)
    hashes = {name: weights_folder.weights_hash(url) for name, url in urls.items()}
    fingerprint = hashing.fingerprint(fixed_text=hashes)
    fixed = json.dumps({name: {"url": url, "sha256": hashes[name]} for name, url in urls.items()})
    table = schema.with_fingerprint(
        schema.TEXT_SCHEMA, fingerprint, text="fixed", **{_FIXED_KEY.decode(): fixed}
    )
    planned = work_plan.plan(folder, rows, "clip_id", fingerprint, _CLIPS_PER_SHARD)
    stage.run_shards(
        planned.pending,
        write_fixed,
        "precompute: fixed prompt",
        functools.partial(work_plan.commit, folder, table),
        constructor_args=(folder, table),
    )
    kept.same_text(len(backbones.read_prompt(config.positive).text))
