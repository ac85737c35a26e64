"""Autoencoders of the diffusers library (CogVideoX, Cosmos, Stable Diffusion), to compare ours with.

The folder is what `from_pretrained` reads: `config.json` and safetensors weights, such as the `vae` folder
of a published pipeline. Video models see whole clips, image models one frame at a time.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.video import pixel_range

CONFIG_FILE = "config.json"
FRAMES_AT_ONCE = 8
"""Batch of frames that an image model gets at a time."""


def class_name(folder: Path) -> str | None:
    """The diffusers class that a local folder's configuration names; None if it names none."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    config = json.loads(path.read_text())
    return config.get("_class_name") if isinstance(config, dict) else None


class DiffusersAutoencoder:
    """One autoencoder: clips in, what its mode (not a sample) decodes to out. Computes in fp32."""

    def __init__(self, folder: Path, device: torch.device | str) -> None:
        try:
            import diffusers
        except ImportError:
            raise ValueError(f"{folder}: comparing with it needs the package `diffusers`") from None
        name = class_name(folder)
        kind = getattr(diffusers, name, None) if name and name.startswith("Autoencoder") else None
        if kind is None:
            raise ValueError(f"{folder}: {name!r} is not an autoencoder of diffusers {diffusers.__version__}")
        try:
            self.network: Any = kind.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{folder}: {str(error).splitlines()[0]}") from error
        self.network.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)
        self.is_video = any(parameter.ndim == 5 for parameter in self.network.parameters())
        config = self.network.config
        levels = len(getattr(config, "block_out_channels", None) or (0,) * 4)
        self.space_factor = int(getattr(config, "spatial_compression_ratio", None) or 2 ** (levels - 1))
        self.time_factor = (
            int(getattr(config, "temporal_compression_ratio", None) or 4) if self.is_video else 1
        )
        # CogVideoX's decoder drops the first frame's copies only where it meets an odd number of latents.
        self.frame_step = int(getattr(self.network, "num_sample_frames_batch_size", self.time_factor))
        self.latent_channels = int(config.latent_channels)

    @torch.inference_mode()
    def reconstruct(self, clip: np.ndarray) -> np.ndarray:
        """Reconstruct uint8 (T, H, W, 3) frames at the same shape.

        The edge and the last frame are repeated up to whole latent pixels and to as many frames as the model
        takes (4n+1 or 8n+1); what was added is cut off again.
        """
        frames, height, width = clip.shape[:3]
        video = pixel_range.to_network(clip)
        pad = (-width % self.space_factor, -height % self.space_factor, (1 - frames) % self.frame_step)
        video = F.pad(video, (0, pad[0], 0, pad[1], 0, pad[2]), mode="replicate")
        if self.is_video:
            decoded = self._through(video)
        else:
            batches = video[0].transpose(0, 1).split(FRAMES_AT_ONCE)
            decoded = torch.cat([self._through(batch) for batch in batches]).transpose(0, 1)[None]
        if decoded.shape != video.shape:
            raise ValueError(f"it makes {tuple(decoded.shape[2:])} (T, H, W) of {tuple(video.shape[2:])}")
        return pixel_range.to_pixels(decoded[:, :, :frames, :height, :width])

    def _through(self, pixels: Tensor) -> Tensor:
        latent = self.network.encode(pixels.to(self.device)).latent_dist.mode()
        return self.network.decode(latent).sample.float().cpu()
