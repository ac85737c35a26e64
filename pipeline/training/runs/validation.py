"""Validation during a transformer's training: held-out clips restored with the moving average.

Everything comes from latents/: the truth is the decoded HQ latent, so the autoencoder's own losses do not
count against the transformer. Scores of the decoded LQ latent are reported next to those of the restored one.
"""

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from model.denoise import Network, Prompt, denoise
from pipeline.metrics.niqe import niqe
from pipeline.metrics.psnr_ssim import full_reference_scores
from pipeline.store import hashing, schema, storage
from pipeline.store.urls import Url, check_urls
from pipeline.training.samples.latent_reader import Reader
from pipeline.training.state import ranks
from pipeline.video import encoding, pixel_range
from pipeline.weights import backbones, weights_folder
from pipeline.weights.frame_noise import frame_noise

FOLDER = "validation"
_SLICE_FRAMES = 8


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Held-out clips that are restored at intervals."""

    every: int
    """Number of steps between two validations."""
    vae: Url
    """URL of the autoencoder that made the latents."""
    clips: int = 4
    """Number of clips to restore: the largest held-out samples of the stage, one of each clip."""
    steps: int = 20
    """Number of Euler steps of the sampler, to which the time of a validation is proportional."""

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
        self, network: Network, output_url: str, step: int
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Mean scores, and pictures with LQ, restored and truth side by side.

        The pictures are also written as PNG below `output_url`. network: with the moving average's weights.
        Ranks share the clips, so all of them must call it.
        """
        self.vae.to(self.device)
        shown: list[tuple[str, dict[str, float], np.ndarray]] = []
        for row in self.rows[ranks.rank() :: ranks.world_size()]:
            hq, lq = self.reader.latents(row, -1)
            versions = [self._pixels(latent) for latent in (lq, self._restored(network, row, lq), hq)]
            picture = np.concatenate([frames[len(frames) // 2] for frames in versions], axis=1)
            url = storage.join(output_url, FOLDER, f"{step:06d}", f"{row['sample_id']}.png")
            storage.write_bytes(url, encoding.png(picture))
            shown.append((row["sample_id"], scores(*versions), picture))
        self.vae.to("cpu")
        everything = [entry for part in ranks.from_all(shown) for entry in part]
        by_clip = [values for _, values, _ in everything]
        keys = dict.fromkeys(key for values in by_clip for key in values)
        means = {key: float(np.mean([v[key] for v in by_clip if key in v])) for key in keys}
        return means, {sample_id: picture for sample_id, _, picture in everything}

    def _restored(self, network: Network, row: dict[str, Any], lq: Tensor) -> Tensor:
        """Sampled from noise as restore does it: (T', H', W', 16)."""
        seed = hashing.stable_hash(self.seed, FOLDER, row["sample_id"])
        noise, condition_noise = (
            frame_noise(seed, purpose, 0, tuple(lq.shape)).to(self.device)
            for purpose in ("initial", "condition")
        )
        prompts = self.reader.texts.prompts()
        text = prompts.null if prompts.positive is None else prompts.positive
        prompt = Prompt(text, prompts.pooled).to(self.device, self.dtype)
        schedule = dataclasses.replace(backbones.OWN, steps=self.config.steps)
        return denoise(network, lq.to(self.device), noise, condition_noise, schedule, prompt)

    def _pixels(self, latent: Tensor) -> np.ndarray:
        """Decode (T', H', W', 16) to uint8 (T, H, W, 3), in slices so that a long native clip fits."""
        frames = (latent.shape[0] - 1) * schema.TEMPORAL_FACTOR + 1
        height, width = (side * schema.SPATIAL_FACTOR for side in latent.shape[1:3])
        whole = latent.permute(3, 0, 1, 2)[None].to(self.device, next(self.vae.parameters()).dtype)
        slices = self.vae.decode_stream([whole], frames, height, width, _SLICE_FRAMES)
        return np.concatenate([pixel_range.to_pixels(piece) for piece in slices])


def scores(low: np.ndarray, restored: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Means over the frames: psnr (RGB, dB), ssim (luma) and niqe (of frames that are large enough).

    Those of the low-quality video have the suffix `_lq`.
    """
    means: dict[str, float] = {}
    for ending, video in (("", restored), ("_lq", low)):
        pairs = [full_reference_scores(a, b) for a, b in zip(video, truth, strict=True)]
        means[f"psnr{ending}"] = float(np.mean([pair["psnr_rgb"] for pair in pairs]))
        means[f"ssim{ending}"] = float(np.mean([pair["ssim_y"] for pair in pairs]))
        niqes = [value for value in map(niqe, video) if value is not None]
        if niqes:
            means[f"niqe{ending}"] = float(np.mean(niqes))
    return means
