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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.losses import PerceptualLoss
from model.nadit import NaDiT, NaDiTConfig
from model.vae import FULL_CONFIG, AutoencoderConfig, CausalVideoAutoencoder
from model.vae.inflation import inflate
from model.windows import RELEASED_WINDOW

Network = TypeVar("Network", bound=nn.Module)
LISTED_KEYS = 5


# -- files ----------------------------------------------------------------------------------------------


def read_tensors(path: str | Path, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a `.safetensors`, `.pth` or `.pt` file by name, mapped from disk, not copied."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint file")
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    if path.suffix not in (".pth", ".pt"):
        raise ValueError(f"{path}: checkpoints are .safetensors, .pth or .pt files")
    try:
        state = torch.load(path, map_location=device, weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a file of plain tensors that torch can map: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a flat table of tensors (a state dict)")
    return state


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
    network.load_state_dict(state, strict=True, assign=True)
    return network


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


# -- released backbones ---------------------------------------------------------------------------------


def build_backbone(config: NaDiTConfig, state: Mapping[str, Tensor], source: str | Path) -> NaDiT:
    """The released backbone of `config` holding `state`, in evaluation mode."""
    with torch.device("meta"):
        backbone = NaDiT(config)
    return load_strict(backbone, state, source).eval()


def load_backbone(
    path: str | Path, config: NaDiTConfig | None = None, dtype: torch.dtype | None = None
) -> NaDiT:
    """A released backbone (.pth or .safetensors, also the community's fp16 files) on the CPU.

    config: `nadit.SEEDVR_3B` or `SEEDVR_7B` for files that do not state theirs. dtype: None keeps the file's
    own, mapped from disk and never copied.
    """
    header = read_header(path)
    if "backbone" in header:
        config = config_from_header(NaDiTConfig, header["backbone"], path)
    if config is None:
        raise ValueError(f"{path}: states no configuration; say which model it is (3B or 7B)")
    state = read_tensors(path)
    return build_backbone(config, state if dtype is None else _cast(path, state, dtype), path)


def save_backbone(path: str | Path, backbone: NaDiT, header: Mapping[str, Any]) -> None:
    """Write weights and configuration; `header` is anything more to keep beside them (step, source)."""
    write_tensors(path, backbone.state_dict(), {**header, "backbone": dataclasses.asdict(backbone.config)})


def _cast(path: str | Path, mapped: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The file's tensors in another dtype, at a peak of the result plus the largest tensor.

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
        state |= {name: tensors[name].to(dtype, copy=True) for name in group}
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


def load_perceptual(perceptual: str) -> PerceptualLoss | None:
    """What a config's `perceptual` names: a TorchScript file of LPIPS, or nothing for the word "none".

    There is no default: training without a perceptual loss is other training, and has to say so. The file
    is made once by `torch.jit.trace(lpips.LPIPS(net="vgg"), (image, image)).save(path)`.
    """
    if perceptual == "none":
        return None
    if not Path(perceptual).is_file():
        raise ValueError(f'perceptual: {perceptual} is no file; give an LPIPS TorchScript file, or "none"')
    return PerceptualLoss(torch.jit.load(perceptual, map_location="cpu"))


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
