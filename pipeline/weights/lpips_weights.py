"""LPIPS with its published weights, from a folder or downloaded once from their authors' sites."""

import tempfile

import torch
from torch import Tensor

from model import checkpoints
from model.perceptual.lpips import Lpips
from pipeline.store import storage

VGG_FILE, HEADS_FILE = "vgg16-397923af.pth", "vgg.pth"
"""The published files of LPIPS, by their published names: torchvision's VGG16 and lpips v0.1's heads."""
_HUB = {  # URL and the file's name in torch's hub cache, whose end is the start of its sha256
    VGG_FILE: ("https://download.pytorch.org/models/vgg16-397923af.pth", "vgg16-397923af.pth"),
    HEADS_FILE: (
        "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
        "lpips-vgg-a78928a0af1e5f0f.pth",
    ),
}


def check_perceptual(perceptual: str, key: str = "perceptual") -> None:
    """ValueError, naming the config's `key`, unless it is "none", "hub" or a folder that holds both files."""
    if perceptual in ("none", "hub"):
        return
    for name in (VGG_FILE, HEADS_FILE):
        if not storage.exists(storage.join(perceptual, name)):
            raise ValueError(f"{key}: {perceptual} has no {name}; put both published files of LPIPS there")


def load_perceptual(perceptual: str) -> Lpips | None:
    """The network that the config's `perceptual` names, on the CPU; None for "none"."""
    if perceptual == "none":
        return None
    read = _from_hub if perceptual == "hub" else _from_folder
    return checkpoints.build_lpips(read(perceptual, VGG_FILE), read(perceptual, HEADS_FILE), perceptual)


def _from_folder(url: str, name: str) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder, storage.local_copy(storage.join(url, name), folder) as path:
        return checkpoints.read_tensors(path)


def _from_hub(_: str, name: str) -> dict[str, Tensor]:
    url, cached_name = _HUB[name]
    return torch.hub.load_state_dict_from_url(
        url, map_location="cpu", check_hash=True, file_name=cached_name, weights_only=True
    )
