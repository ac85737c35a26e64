"""Initialising the video autoencoder from one for images, such as Stable Diffusion 3's.

The 2D kernel goes into the last of the three time taps, the one for the newest frame, and the others are
zero: at first every frame is encoded as by the image model, so a still image has the same latent. Our
parameter names are those of diffusers' AutoencoderKL; only the learned upsampling is new, and it starts as
the nearest-neighbour copy that the image model has in its place.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from model.vae.autoencoder import AutoencoderConfig, CausalVideoAutoencoder


def inflate(image_state: Mapping[str, Tensor], config: AutoencoderConfig) -> dict[str, Tensor]:
    """The video autoencoder's state from an image autoencoder's; shapes that do not fit stay as they are.

    Names are not checked here: strict loading of the result does that.
    """
    start = CausalVideoAutoencoder(config).state_dict()
    state = {name: tensor for name, tensor in start.items() if ".upscale_conv." in name}
    for name, tensor in image_state.items():
        shape = start[name].shape if name in start else tensor.shape
        if tensor.ndim == 4 and len(shape) == 5:
            inflated = torch.zeros(*tensor.shape[:2], shape[2], *tensor.shape[2:], dtype=tensor.dtype)
            inflated[:, :, -1] = tensor
            tensor = inflated
        state[name] = tensor
    return state
