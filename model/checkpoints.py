"""Reading and writing weights, and checking them against recorded numbers.

    python -m model.checkpoints verify FILE...

runs each parity case (weights, configuration, inputs and outputs of a reference run in one file) through
the same code that loads real checkpoints, prints the largest absolute error of each output, and exits
with 1 if one is above its pass line.

Only tensors are ever read: safetensors, or `.pth` with `weights_only=True`; nothing in a file is run.
"""

import dataclasses
import json
import pickle
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy._core import multiarray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.dit.nadit import NaDiT, NaDiTConfig
from model.dit.sd3_weights import SD3Report, copy_sd3_weights
from model.dit.swin_mmdit import SwinMMDiT
from model.dit.windows import RELEASED_WINDOW
from model.perceptual.dists import Dists
from model.perceptual.lpips import VGG16_WIDTHS, Lpips
from model.quality import aesthetic, dover, fast_vqa, musiq
from model.vae import FULL_CONFIG, AutoencoderConfig, CausalVideoAutoencoder
from model.vae.inflation import inflate

if TYPE_CHECKING:
    from open_clip import CLIP

Network = TypeVar("Network", bound=nn.Module)
LISTED_KEYS = 5
# What files that also keep their evaluation's numbers hold beside tensors: these build numbers, nothing else.
_NUMPY_NAMES: list[Any] = [
    *[np.ndarray, np.dtype, *[type(np.dtype(name)) for name in ("float32", "float64", "int64")]],
    *[multiarray.scalar, multiarray._reconstruct],
    (multiarray.scalar, "numpy.core.multiarray.scalar"),  # as files from before NumPy 2 say it
    (multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
]


# -- files ----------------------------------------------------------------------------------------------


def read_tensors(path: str | Path, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a `.safetensors`, `.pth` or `.pt` file by name, mapped from disk, not copied
    (but for `.pth` files of before torch 1.6).

    A `.pth` may hold them as `state_dict` beside other things, which are left out.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint file")
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    if path.suffix not in (".pth", ".pt"):
        raise ValueError(f"{path}: checkpoints are .safetensors, .pth or .pt files")
    try:
        with torch.serialization.safe_globals(_NUMPY_NAMES):
            state = torch.load(path, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a file of plain tensors that torch can map: {reason}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a flat table of tensors (a state dict)")
    return state


def read_tensor(path: str | Path, name: str) -> Tensor:
    """One tensor: `name` of a `.safetensors` file, or the one that a `.pt` file holds (released prompts)."""
    path = Path(path)
    if path.suffix in (".pt", ".pth") and path.is_file():
        found = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(found, Tensor):
            return found
    tensors = read_tensors(path)
    if name not in tensors:
        raise ValueError(f"{path}: holds no tensor {name!r}, but {', '.join(list(tensors)[:LISTED_KEYS])}")
    return tensors[name]


def read_header(path: str | Path) -> dict[str, Any]:
    """The `json` entry of a `.safetensors` file's metadata; empty for other files or where there is none."""
    if Path(path).suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    return json.loads(metadata.get("json", "{}"))


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a `.safetensors` file with `header` as JSON in its metadata; whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, temporary, metadata={"json": json.dumps(header)})
    temporary.replace(path)


def load_strict(network: Network, state: Mapping[str, Tensor], source: str | Path) -> Network:
    """Give `network` exactly the tensors of `state`, or raise one ValueError that names what differs.

    The network may be on the meta device: it takes the tensors themselves, so also their dtype.
    """
    check_fits(network, state, source)
    network.load_state_dict(state, strict=True, assign=True)
    return network


def check_fits(network: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """One ValueError, naming the tensors, if `state` is not exactly what `network` has."""
    own = network.state_dict()
    misshapen = [
        f"{name} {tuple(state[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": misshapen,
    }
    told = [
        f"{len(names)} {what} ({', '.join(names[:LISTED_KEYS])}{', ...' if len(names) > LISTED_KEYS else ''})"
        for what, names in problems.items()
        if names
    ]
    if told:
        raise ValueError(f"{source}: does not fit {type(network).__name__}: tensors {'; '.join(told)}")


# -- autoencoder ----------------------------------------------------------------------------------------


def build_autoencoder(
    config: AutoencoderConfig, state: Mapping[str, Tensor], source: str | Path
) -> CausalVideoAutoencoder:
    """The autoencoder of `config` holding `state`, in evaluation mode."""
    with torch.device("meta"):
        autoencoder = CausalVideoAutoencoder(config)
    return load_strict(autoencoder, state, source).eval()


def load_autoencoder(
    path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> CausalVideoAutoencoder:
    """An autoencoder saved by `save_autoencoder`, or the released `ema_vae` (.pth or .safetensors).

    A file that states no configuration is taken for the released one and checked strictly. Whatever
    precision the file has, the network computes in `dtype`.
    """
    header = read_header(path)
    config = FULL_CONFIG
    if "autoencoder" in header:
        config = config_from_header(AutoencoderConfig, header["autoencoder"], path)
    return build_autoencoder(config, read_tensors(path, device), path).to(dtype)


def load_inflated_autoencoder(path: str | Path, config: AutoencoderConfig) -> CausalVideoAutoencoder:
    """An autoencoder to start training from: an image autoencoder's weights (diffusers names), inflated."""
    return build_autoencoder(config, inflate(read_tensors(path), config), path).to(torch.float32)


def save_autoencoder(
    path: str | Path, autoencoder: CausalVideoAutoencoder, header: Mapping[str, Any]
) -> None:
    """Write weights and configuration; `header` is anything more to keep beside them (step, source)."""
    config = dataclasses.asdict(autoencoder.config)
    write_tensors(path, autoencoder.state_dict(), {**header, "autoencoder": config})


def released_autoencoder_config(released: Mapping[str, Any]) -> AutoencoderConfig:
    """Our configuration from the released code's; scale and shift are constants there, not in it."""
    return AutoencoderConfig(
        widths=tuple(released["block_out_channels"]),
        latent_channels=released["latent_channels"],
        norm_groups=released["norm_num_groups"],
        encoder_layers=released["layers_per_block"],
        decoder_layers=released["layers_per_block"] + 1,
        time_halvings=released["temporal_scale_num"],
        latent_scale=FULL_CONFIG.latent_scale,
        latent_shift=FULL_CONFIG.latent_shift,
    )


# -- Swin-MMDiT from SD3 ----------------------------------------------------------------------------------


def load_sd3_transformer(model: SwinMMDiT, path: str | Path) -> SD3Report:
    """Start `model` from SD3's transformer, in place; the report's text says what was taken, left and is new.

    path: a safetensors file, a sharded checkpoint's index (.safetensors.index.json), or the folder of either
    (`transformer/` of a diffusers SD3 repository). ValueError where there is no such file, or what is in it
    does not fit.
    """
    files = _tensor_files(Path(path))

    def read(name: str) -> Tensor:
        # Mapped pages stay in memory until the file is closed: opened anew, the peak is the largest tensor.
        with safe_open(files[name], framework="pt") as file:
            return file.get_tensor(name)

    return copy_sd3_weights(model, files, read, str(path))


def _tensor_files(path: Path) -> dict[str, Path]:
    """Every tensor's name -> the file that holds it."""
    if path.is_dir():
        found = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            there = ", ".join(file.name for file in found) or "none"
            raise ValueError(f"{path}: wanted one .safetensors or index file in this folder, found {there}")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if not path.name.endswith(".index.json"):
        with safe_open(path, framework="pt") as file:
            return dict.fromkeys(file.keys(), path)
    shards = json.loads(path.read_text())["weight_map"]
    for shard in sorted(set(shards.values())):
        if not (path.parent / shard).is_file():
            raise ValueError(f"{path}: its shard {shard} is missing")
    return {name: path.parent / shard for name, shard in shards.items()}


# -- released backbones ---------------------------------------------------------------------------------


def build_backbone(config: NaDiTConfig, state: Mapping[str, Tensor], source: str | Path) -> NaDiT:
    """The released backbone of `config` holding `state`, in evaluation mode."""
    return load_strict(_empty_backbone(config), state, source).eval()


def _empty_backbone(config: NaDiTConfig) -> NaDiT:
    with torch.device("meta"):
        return NaDiT(config)


def stated_backbone(path: str | Path) -> NaDiTConfig | None:
    """The shape that a file of `save_backbone` states; the released files state none."""
    header = read_header(path)
    return config_from_header(NaDiTConfig, header["backbone"], path) if "backbone" in header else None


def load_backbone(
    path: str | Path,
    config: NaDiTConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> NaDiT:
    """A released backbone (.pth or .safetensors, also the community's fp16 files).

    config: `nadit.SEEDVR_3B` or `SEEDVR_7B` for files that do not state theirs. dtype: None keeps the file's
    own, mapped from disk and never copied; else each tensor is cast on its way to `device`.
    """
    device, state = torch.device(device), read_tensors(path)
    config = stated_backbone(path) or config
    if config is None:
        raise ValueError(f"{path}: states no configuration; say which model it is (3B or 7B)")
    check_fits(_empty_backbone(config), state, path)  # before the work of casting
    kept = device.type == "cpu" and (dtype is None or {t.dtype for t in state.values()} == {dtype})
    return build_backbone(config, state if kept else _cast(path, state, dtype, device), path)


def save_backbone(path: str | Path, backbone: NaDiT, header: Mapping[str, Any]) -> None:
    """Write weights and configuration; `header` is anything more to keep beside them (step, source)."""
    write_tensors(path, backbone.state_dict(), {**header, "backbone": dataclasses.asdict(backbone.config)})


def _cast(
    path: str | Path, mapped: dict[str, Tensor], dtype: torch.dtype | None, device: torch.device
) -> dict[str, Tensor]:
    """The file's tensors in another dtype or place, at a peak of the result plus the file's largest tensor.

    Reading a mapped tensor brings its pages into memory until the file is unmapped, so the file is opened
    anew for each group of tensors, none above the largest in bytes. Empties `mapped`.
    """
    sizes = {name: tensor.nbytes for name, tensor in mapped.items()}
    mapped.clear()
    limit, used = max(sizes.values(), default=0), 0
    groups: list[list[str]] = [[]]
    for name, size in sizes.items():
        if used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    state: dict[str, Tensor] = {}
    for group in groups:
        tensors = read_tensors(path)
        state |= {name: tensors[name].to(device, dtype, copy=True) for name in group}
        del tensors
    return state


def released_backbone_config(released: Mapping[str, Any]) -> NaDiTConfig:
    """Our configuration from the released code's (`mm_layers` and `rope_dim` are only in the 3B's)."""
    return NaDiTConfig(
        kind="3b" if "mm_layers" in released else "7b",
        rotary_dim=released.get("rope_dim", released["head_dim"] // 2),
        num_layers=released["num_layers"],
        num_heads=released["heads"],
        head_dim=released["head_dim"],
        width=released["vid_dim"],
        patch=tuple(released["patch_size"]),
        in_channels=released["vid_in_channels"],
        out_channels=released["vid_out_channels"],
        text_dim=released["txt_in_dim"],
        mlp_ratio=released["expand_ratio"],
        separate_layers=released.get("mm_layers", released["num_layers"]),
        windows=tuple(released["window"][0]) if "window" in released else RELEASED_WINDOW,
    )


def build_lpips(features: Mapping[str, Tensor], heads: Mapping[str, Tensor], source: str | Path) -> Lpips:
    """LPIPS of its two published tables: torchvision's vgg16 (its classifier is not used) and lpips v0.1's
    vgg.pth. ValueError if they are not those."""
    names = [f"lin{level}.model.1.weight" for level in range(len(VGG16_WIDTHS))]
    if any(name not in heads for name in names):
        raise ValueError(f"{source}: no table of LPIPS heads ({names[0]} to {names[-1]})")
    state = {name: tensor for name, tensor in features.items() if name.startswith("features.")}
    state |= {f"heads.{level}": heads[name].flatten() for level, name in enumerate(names)}
    with torch.device("meta"):
        network = Lpips(tuple(heads[name].numel() for name in names))
    return load_strict(network, state, source).float().eval().requires_grad_(False)


def build_dists(features: Mapping[str, Tensor], heads: Mapping[str, Tensor], source: str | Path) -> Dists:
    """DISTS of torchvision's vgg16 (its classifier is not used) and DISTS_pytorch's weights.pt. ValueError if
    they are not those."""
    if set(heads) != {"alpha", "beta"}:
        raise ValueError(f"{source}: no table of DISTS weights (alpha, beta)")
    state = {name: tensor for name, tensor in features.items() if name.startswith("features.")}
    state |= {name: tensor.flatten() for name, tensor in heads.items()}
    with torch.device("meta"):
        network = Dists()
    return load_strict(network, state, source).float().eval().requires_grad_(False)


# -- quality models -------------------------------------------------------------------------------------


def load_aesthetic_head(path: str | Path) -> nn.Module:
    """A published head of LAION-Aesthetics, linear or MLP: its tensors tell which."""
    state = read_tensors(path)
    return load_strict(aesthetic.head_for(state), state, path).eval()


def load_fast_vqa(path: str | Path, config: fast_vqa.FastVQAConfig) -> fast_vqa.FastVQA:
    """A published FAST-VQA (.pth). config: B and 3D have the same tensors, so no file tells which it is."""
    with torch.device("meta"):
        network = fast_vqa.FastVQA(config)
    return load_strict(network, read_tensors(path), path).eval()


def load_dover(path: str | Path) -> dover.Dover:
    """A published DOVER, DOVER++ or DOVER-Mobile (.pth)."""
    state = read_tensors(path)
    mobile = "technical_backbone.downsample_layers.0.0.weight" in state
    with torch.device("meta"):
        network = dover.Dover(dover.PUBLISHED_MOBILE if mobile else dover.PUBLISHED)
    return load_strict(network, state, path).eval()


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
    with torch.device("meta"):
        network = musiq.Musiq(dataclasses.replace(musiq.PUBLISHED, outputs=outputs))
    return load_strict(network, state, path).eval()


def load_clip(name: str) -> "CLIP":
    """An OpenAI CLIP as open_clip reads it: a Hugging Face id or a folder; frozen, in evaluation mode."""
    import open_clip  # takes seconds to import and only this needs it

    source = f"local-dir:{name}" if Path(name).is_dir() else f"hf-hub:{name}"
    clip = open_clip.create_model(source, require_pretrained=True, weights_only=True)
    return clip.eval().requires_grad_(False)


Config = TypeVar("Config")


def config_from_header(kind: type[Config], fields: Mapping[str, Any], source: str | Path) -> Config:
    """A configuration dataclass from its JSON form (lists become tuples)."""
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"{source}: its header does not describe a {kind.__name__}: {error}") from error


# -- command line ---------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """`verify FILE...`: 0 if every output of every case is within its pass line."""
    from model import parity  # it builds its networks with the functions above

    if len(arguments) < 2 or arguments[0] != "verify":
        print("usage: python -m model.checkpoints verify FILE...", file=sys.stderr)
        return 2
    passed = True
    for path in arguments[1:]:
        try:
            case = json.loads(Path(path).read_text()) if path.endswith(".json") else read_header(path)
            tensors = {} if path.endswith(".json") else read_tensors(path)
            for result in parity.check(case, tensors, source=path):
                print(f"{Path(path).name}  {result}", flush=True)
                passed &= result.passed
        except ValueError as error:
            print(f"{path}: {error}" if path not in str(error) else error, file=sys.stderr)
            passed = False
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
