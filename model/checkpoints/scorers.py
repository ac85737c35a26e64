"""Published weights of the networks that score: quality models, CLIP, and the perceptual distances."""

import dataclasses
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from model.checkpoints.files import build_network, load_strict, read_tensors
from model.perceptual.dists import Dists
from model.perceptual.lpips import VGG16_WIDTHS, Lpips
from model.quality import aesthetic, dover, fast_vqa, musiq

if TYPE_CHECKING:
    from open_clip import CLIP


def load_aesthetic_head(path: str | Path) -> nn.Module:
    """A published head of LAION-Aesthetics, linear or MLP, as its tensors show."""
    state = read_tensors(path)
    return load_strict(aesthetic.head_for(state), state, path).eval()


def load_fast_vqa(path: str | Path, config: fast_vqa.FastVQAConfig) -> fast_vqa.FastVQA:
    """A published FAST-VQA (.pth). B and 3D have the same tensors, so `config` has to say which it is."""
    return build_network(lambda: fast_vqa.FastVQA(config), read_tensors(path), path)


def load_dover(path: str | Path) -> dover.Dover:
    """A published DOVER, DOVER++ or DOVER-Mobile (.pth)."""
    state = read_tensors(path)
    mobile = "technical_backbone.downsample_layers.0.0.weight" in state
    config = dover.PUBLISHED_MOBILE if mobile else dover.PUBLISHED
    return build_network(lambda: dover.Dover(config), state, path)


def load_musiq(path: str | Path) -> musiq.Musiq:
    """MUSIQ from one of Google's `.npz` files with three scales."""
    path = Path(path)
    if not path.is_file() or path.suffix != ".npz":
        raise ValueError(f"{path}: MUSIQ's weights are one of Google's .npz files, such as koniq_ckpt.npz")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            state = musiq.from_google(arrays)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a MUSIQ checkpoint: {error}") from error
    outputs = len(state["head.bias"]) if "head.bias" in state else musiq.PUBLISHED.outputs
    config = dataclasses.replace(musiq.PUBLISHED, outputs=outputs)
    return build_network(lambda: musiq.Musiq(config), state, path)


def load_clip(name: str) -> "CLIP":
    """An OpenAI CLIP as open_clip reads it: a Hugging Face id or a folder; frozen, in evaluation mode."""
    import open_clip  # takes seconds to import and only this needs it

    source = f"local-dir:{name}" if Path(name).is_dir() else f"hf-hub:{name}"
    clip = open_clip.create_model(source, require_pretrained=True, weights_only=True)
    return clip.eval().requires_grad_(False)


def build_lpips(features: Mapping[str, Tensor], heads: Mapping[str, Tensor], source: str | Path) -> Lpips:
    """Build LPIPS from torchvision's vgg16, whose classifier is not used, and lpips v0.1's vgg.pth.

    Raises ValueError if the two tables are not those.
    """
    names = [f"lin{level}.model.1.weight" for level in range(len(VGG16_WIDTHS))]
    if any(name not in heads for name in names):
        raise ValueError(f"{source}: no table of LPIPS heads ({names[0]} to {names[-1]})")
    state = {name: tensor for name, tensor in features.items() if name.startswith("features.")}
    state |= {f"heads.{level}": heads[name].flatten() for level, name in enumerate(names)}
    widths = tuple(heads[name].numel() for name in names)
    return build_network(lambda: Lpips(widths), state, source).float().requires_grad_(False)


def build_dists(features: Mapping[str, Tensor], heads: Mapping[str, Tensor], source: str | Path) -> Dists:
    """Build DISTS from torchvision's vgg16, whose classifier is not used, and DISTS_pytorch's weights.pt.

    Raises ValueError if the two tables are not those.
    """
    if set(heads) != {"alpha", "beta"}:
        raise ValueError(f"{source}: no table of DISTS weights (alpha, beta)")
    state = {name: tensor for name, tensor in features.items() if name.startswith("features.")}
    state |= {name: tensor.flatten() for name, tensor in heads.items()}
    return build_network(Dists, state, source).float().requires_grad_(False)
