"""Fréchet video distance: how far the features of two sets of clips are apart, as Gaussians.

FVD (Unterthiner et al. 2018) is the Fréchet distance of I3D features; "rFVD" takes it between true clips and
their reconstructions. The feature network is the TorchScript file that StyleGAN-V's authors published
(`i3d_torchscript.pt`, Kinetics-400, 400 values before the softmax), which most papers' numbers come from.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

FEATURES = 400
"""Values per clip. With fewer clips the covariance is rank-deficient and the distance too large."""
MIN_FRAMES = 10
"""Shorter clips leave nothing after the network's poolings in time."""


def frechet_distance(left: NDArray, right: NDArray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the Gaussians fitted to two sets of features (N, D).

    Covariances are unbiased, so each set needs two rows. The trace of the root is the sum of the singular
    values of R1 R2^T, with C = R^T R: unlike a matrix root it holds for rank-deficient covariances too.
    """
    if min(len(left), len(right)) < 2:
        raise ValueError("a Fréchet distance needs at least two clips on either side")
    mean_left, root_left = _mean_and_root(left)
    mean_right, root_right = _mean_and_root(right)
    cross = np.linalg.svd(root_left @ root_right.T, compute_uv=False).sum()
    distance = np.sum((mean_left - mean_right) ** 2)
    distance += np.sum(root_left**2) + np.sum(root_right**2) - 2 * cross
    return float(max(distance, 0.0))


def _mean_and_root(features: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(D,) mean, and R of at most D rows with R^T R the covariance."""
    features = np.asarray(features, dtype=np.float64)
    mean = features.mean(axis=0)
    root = np.linalg.qr((features - mean) / np.sqrt(len(features) - 1), mode="r")
    return mean, np.asarray(root)


class VideoFeatures:
    """The I3D network from a TorchScript file.

    Loading TorchScript runs the program in the file: give only a file whose origin you know.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        try:
            self.network = torch.jit.load(path, map_location=self.device).eval()
        except RuntimeError as error:
            raise ValueError(f"{path}: no TorchScript file: {str(error).splitlines()[0]}") from error

    @torch.inference_mode()
    def __call__(self, clip: NDArray[np.uint8]) -> NDArray[np.float64]:
        """(400,) features of uint8 (T, H, W, 3) frames; the network itself resizes to 224 and rescales."""
        video = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float().to(self.device)
        features = self.network(video, rescale=True, resize=True, return_features=True)
        return features[0].flatten().double().cpu().numpy()
