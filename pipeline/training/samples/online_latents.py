"""Latents made during training: clips are decoded, degraded and encoded as their samples come (small data).

They come from precompute's functions, so a sample's first epoch is what precompute would have stored, to the
bit; later epochs crop and degrade it afresh. Everything depends on (seed, epoch, sample) alone, so a resumed
run sees the same samples. Every sample costs two encodings per step; precomputed latents cost them once.
"""

import threading
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from pipeline.data import cropping, precompute, text_embeddings
from pipeline.data.kept_clips import KeptClips
from pipeline.data.precompute import SampleConfig
from pipeline.data.sample_pixels import prepare_sample
from pipeline.store import bf16_columns, hashing, schema, storage
from pipeline.training.samples import latent_reader
from pipeline.weights import weights_folder


def write_texts(config: SampleConfig, data_url: str) -> None:
    """Fill text/ of the kept clips where it is missing. Needs Ray; the driver calls it before training."""
    weights_folder.weights_hash(config.vae)  # raises ValueError for a bad one
    precompute.write_texts(config, KeptClips(data_url), data_url)


def planned_samples(config: SampleConfig, data_url: str, seed: int) -> dict[str, dict[str, Any]]:
    """Precompute's planned rows by sample id; text/ must be there."""
    kept = KeptClips(data_url)
    if config.text is not None:
        kept.read_text_tokens(storage.join(data_url, schema.TEXT))
    else:
        kept.same_text(len(text_embeddings.read_texts(data_url).positive))  # type: ignore[union-attr]
    rows = precompute.plan_rows(config, kept, data_url, seed=seed)
    return {row["sample_id"]: row for row in rows}


def sample_table(planned: dict[str, dict[str, Any]]) -> pa.Table:
    """The sample table that their latents would have; every sample is a locality of its own."""
    rows = [
        schema.empty_row(
            schema.INDEX_SCHEMA,
            **{key: row[key] for key in schema.INDEX_SCHEMA.names if key in row},
            media=row["clip"]["media"],
            file="",
            row_group=number,
            row=0,
            video_tokens=schema.video_tokens(row["num_frames"], row["height"], row["width"]),
        )
        for number, row in enumerate(planned.values())
    ]
    return latent_reader.sample_table(pa.Table.from_pylist(rows, schema=schema.INDEX_SCHEMA))


class OnlineReader:
    """Makes samples' latents; reads their texts."""

    def __init__(
        self, config: SampleConfig, data_url: str, seed: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._config, self._seed = config, seed
        self.planned = planned_samples(config, data_url, seed)
        texts = latent_reader.LatentReader(data_url)
        self.texts, self.prompt = texts.texts, texts.prompt
        self._vae = weights_folder.load_vae(config.vae).to(device=device, dtype=dtype).eval()
        self._lock = threading.Lock()  # one decoding process, shared with the thread that reads ahead
        self._held_out: dict[str, tuple[Tensor, Tensor]] = {}

    def latents(self, row: dict[str, Any], epoch: int) -> tuple[Tensor, Tensor]:
        """HQ and LQ latents of a sample in an epoch, each (T', H', W', 16) fp32, rounded to bf16.

        Epochs below 0 are those of held-out samples: they are made once and kept. ValueError for a clip that
        cannot be read.
        """
        with self._lock:
            if epoch >= 0:
                return self._made(row["sample_id"], epoch)
            if row["sample_id"] not in self._held_out:
                self._held_out[row["sample_id"]] = self._made(row["sample_id"], 0)
            return self._held_out[row["sample_id"]]

    def _made(self, sample_id: str, epoch: int) -> tuple[Tensor, Tensor]:
        planned = self.planned[sample_id]
        if epoch:
            seed = hashing.stable_hash(self._seed, "online", epoch, sample_id)
            size = cropping.Bucket(planned["num_frames"], planned["height"], planned["width"])
            planned = {**planned, "seed": seed, "crop": cropping.random_crop(planned["clip"], size, seed)}
        pixels = prepare_sample(planned, self._config.pixels)
        if "error" in pixels:
            raise ValueError(f"online: {pixels['error']}; have the filter reject this clip")
        columns = precompute.encode_pair(self._vae, pixels["hq"], pixels["lq"], planned["seed"])
        return bf16_columns.from_columns(columns, "hq_latent"), bf16_columns.from_columns(
            columns, "lq_latent"
        )
