"""Stable Diffusion's x4 upscaler on a folder, frame by frame, by diffusers.

    python -m jobs.peer --method 'SD x4 upscaler' --input /set/lq --output /results/sd --scale 4 \\
        --weights /weights/stable-diffusion-x4-upscaler

The weights are a local folder in diffusers' layout. 75 steps, guidance 9 and noise level 20 are the
pipeline's own defaults; no prompt; every frame has the same seed, or the noise would flicker.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL import Image

from benchmarks.peers import folders


def main() -> None:
    from diffusers import StableDiffusionUpscalePipeline

    options = folders.arguments(__doc__)
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.float16) if on_gpu else ("cpu", torch.float32)
    pipeline = StableDiffusionUpscalePipeline.from_pretrained(
        options.weights, torch_dtype=dtype, local_files_only=True, use_safetensors=True
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)

    def frames(inputs: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for frame in inputs:
            generator = torch.Generator(device).manual_seed(0)
            made = pipeline(prompt="", image=Image.fromarray(frame), generator=generator).images[0]
            yield np.asarray(made.convert("RGB"))

    folders.upscale_folder(options.input, options.output, options.scale, frames)


if __name__ == "__main__":
    main()
