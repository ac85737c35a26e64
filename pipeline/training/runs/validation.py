"""Restored held-out clips while a transformer trains: pictures and scores, by the moving average.

Everything comes from latents/: the truth is the decoded HQ latent, so what the autoencoder itself loses does
not count against the transformer. Scores of the decoded LQ latent stand beside the restored one's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from model import flow
from pipeline.metrics.niqe import niqe
from pipeline.metrics.psnr_ssim import full_reference_scores
from pipeline.store import hashing, schema, storage
from pipeline.store.urls import Url, check_urls
from pipeline.training.samples.latent_reader import Batch, Reader
from pipeline.training.state import ranks
from pipeline.video import encoding, pixel_range
from pipeline.weights import weights_folder
from pipeline.weights.frame_noise import frame_noise

FOLDER = "validation"
_SLICE_FRAMES = 8


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Held-out clips that are restored every now and then."""

    every: int
    """steps between two times"""
    vae: Url
    """URL of the autoencoder that made the latents"""
    clips: int = 4
    """how many clips: the largest of the stage's held-out samples, one of each clip"""
    steps: int = 20
    """Euler steps of the sampler"""

    def __post_init__(self) -> None:
        check_urls(self, "validation.")
        for key in ("every", "clips", "steps"):
            if getattr(self, key) < 1:
                raise ValueError(f"validation.{key}: {getattr(self, key)}; it must be at least 1")


def chosen(rows: pa.Table, clips: int) -> list[dict[str, Any]]:
    """The index rows that are shown: the largest first, each clip once."""
    order = [("video_tokens", "descending"), ("sample_id", "ascending")]
    ordered = rows.sort_by(order).slice(0, 64 * clips).to_pylist()
    first = {row["clip_id"]: row for row in reversed(ordered)}
    return sorted(first.values(), key=lambda row: (-row["video_tokens"], row["sample_id"]))[:clips]


class Validation:
    """The chosen clips, and the autoencoder that shows them; it waits on the CPU."""

    def __init__(
        self,
        config: ValidationConfig,
        reader: Reader,
        rows: pa.Table,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        self.config, self.reader, self.rows = config, reader, chosen(rows, config.clips)
        self.device, self.dtype, self.seed = device, dtype, seed
        self.vae = weights_folder.load_vae(config.vae).to(dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def run(
        self, velocity: Callable[[Batch], Tensor], output_url: str, step: int
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Mean scores, and pictures (LQ, restored and truth side by side) that are also written as PNG below
        `output_url`. velocity: the moving average's, of a batch. Ranks share the clips; all must call it."""
        self.vae.to(self.device)
        own: list[tuple[str, dict[str, float], np.ndarray]] = []
        for row in self.rows[ranks.rank() :: ranks.world_size()]:
            hq, lq = self.reader.latents(row, -1)
            versions = [self._pixels(latent) for latent in (lq, self._restored(velocity, row, lq), hq)]
            picture = np.concatenate([frames[len(frames) // 2] for frames in versions], axis=1)
            url = storage.join(output_url, FOLDER, f"{step:06d}", f"{row['sample_id']}.png")
            storage.write_bytes(url, encoding.png(picture))
            own.append((row["sample_id"], scores(*versions), picture))
        self.vae.to("cpu")
        everything = [entry for part in ranks.from_all(own) for entry in part]
        found = [values for _, values, _ in everything]
        keys = dict.fromkeys(key for values in found for key in values)
        means = {key: float(np.mean([v[key] for v in found if key in v])) for key in keys}
        return means, {sample_id: picture for sample_id, _, picture in everything}

    def _restored(self, velocity: Callable[[Batch], Tensor], row: dict[str, Any], lq: Tensor) -> Tensor:
        """Sampled from noise as restore does it: (T', H', W', 16)."""
        shape = (lq.shape[0], lq.shape[1], lq.shape[2])
        seed = hashing.stable_hash(self.seed, FOLDER, row["sample_id"])
        noise, condition_noise = (
            frame_noise(seed, purpose, 0, tuple(lq.shape)).flatten(0, 2).to(self.device)
            for purpose in ("initial", "condition")
        )
        level = flow.condition_time(flow.INFERENCE_CONDITION_LEVEL, shape, released_quirk=False)
        low = lq.flatten(0, 2).to(self.device)
        condition = flow.interpolate(low, condition_noise, torch.tensor(level, device=self.device))
        prompts = self.reader.texts.prompts()
        text = prompts.null if prompts.positive is None else prompts.positive
        pooled = torch.empty(0) if prompts.pooled is None else prompts.pooled

        def velocity_at(x: Tensor, time: Tensor) -> Tensor:
            batch = Batch(
                video=flow.network_input(x, condition),
                target=x,
                text=text,
                pooled=pooled[None],
                video_shapes=[shape],
                text_lengths=[len(text)],
                timestep=time[None],
                sample_ids=[row["sample_id"]],
                buckets=[row["bucket"]],
            )
            return velocity(batch.to(self.device, self.dtype))

        return flow.sample(velocity_at, noise, flow.sampling_times(self.config.steps)).unflatten(0, shape)

    def _pixels(self, latent: Tensor) -> np.ndarray:
        """(T', H', W', 16) -> uint8 (T, H, W, 3). In slices: a long clip of a native size has no room."""
        frames = (latent.shape[0] - 1) * schema.TEMPORAL_FACTOR + 1
        height, width = (side * schema.SPATIAL_FACTOR for side in latent.shape[1:3])
        whole = latent.permute(3, 0, 1, 2)[None].to(self.device, next(self.vae.parameters()).dtype)
        slices = self.vae.decode_stream([whole], frames, height, width, _SLICE_FRAMES)
        return np.concatenate([pixel_range.to_pixels(piece) for piece in slices])


def scores(low: np.ndarray, restored: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Means over the frames: psnr (RGB, dB), ssim (luma), niqe (of frames large enough); and those of the
    low-quality video as `<name>_lq`."""
    found: dict[str, float] = {}
    for ending, video in (("", restored), ("_lq", low)):
        pairs = [full_reference_scores(a, b) for a, b in zip(video, truth, strict=True)]
        found[f"psnr{ending}"] = float(np.mean([pair["psnr_rgb"] for pair in pairs]))
        found[f"ssim{ending}"] = float(np.mean([pair["ssim_y"] for pair in pairs]))
        told = [value for value in map(niqe, video) if value is not None]
        if told:
            found[f"niqe{ending}"] = float(np.mean(told))
    return found
