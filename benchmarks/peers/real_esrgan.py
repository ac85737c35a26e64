"""Real-ESRGAN (x4plus and its kin) on a folder: the network from spandrel, which knows the published files.

    make reference      # once: spandrel is in that environment
    python -m jobs.peer --method Real-ESRGAN --input /set/lq --output /results/real-esrgan --scale 4 \\
        --weights /weights/RealESRGAN_x4plus.pth

Frames go through the network whole, one at a time; with `--scale 1` (degraded clips at the truth's size, as
`jobs.pairs` makes them) the result is made smaller again.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from benchmarks.peers import folders


def main() -> None:
    from spandrel import ImageModelDescriptor, ModelLoader  # only in the reference environment

    options = folders.arguments(__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = ModelLoader().load_from_file(str(options.weights))
    if not isinstance(model, ImageModelDescriptor):
        raise SystemExit(f"{options.weights}: no network that makes a picture of a picture")
    model.to(device).eval()

    @torch.inference_mode()
    def frames(inputs: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for frame in inputs:
            yield folders.to_frame(model(folders.to_unit(frame, device)))

    folders.upscale_folder(options.input, options.output, options.scale, frames)


if __name__ == "__main__":
    main()
