"""Files of tensors, read and written, and filling a network with exactly what a file has.

Only tensors are ever read: safetensors, or `.pth` with `weights_only=True`; nothing in a file is run.
"""

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy._core import multiarray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)
Config = TypeVar("Config")
LISTED_KEYS = 5
# Types that files with evaluation results hold besides tensors; all they build is numbers.
_NUMPY_NAMES: list[Any] = [
    *[np.ndarray, np.dtype, *[type(np.dtype(name)) for name in ("float32", "float64", "int64")]],
    *[multiarray.scalar, multiarray._reconstruct],
    (multiarray.scalar, "numpy.core.multiarray.scalar"),  # its name in files from before NumPy 2
    (multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
]


def read_tensors(path: str | Path, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a `.safetensors`, `.pth` or `.pt` file by name, mapped from disk and not copied.

    Only `.pth` files from before torch 1.6 are copied. A `.pth` may hold its tensors as `state_dict` next to
    other entries, which are left out.
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
        content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, Tensor):
            return content
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


def config_from_header(kind: type[Config], fields: Mapping[str, Any], source: str | Path) -> Config:
    """A configuration dataclass from its JSON form (lists become tuples)."""
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"{source}: its header does not describe a {kind.__name__}: {error}") from error


def load_strict(network: Network, state: Mapping[str, Tensor], source: str | Path) -> Network:
    """Give `network` exactly the tensors of `state`, or raise one ValueError that names what differs.

    The network may be on the meta device: it takes the tensors themselves, so also their dtype.
    """
    check_fits(network, state, source)
    network.load_state_dict(state, strict=True, assign=True)
    return network


def build_network(make: Callable[[], Network], state: Mapping[str, Tensor], source: str | Path) -> Network:
    """The network that `make` gives, holding exactly `state`, in evaluation mode; nothing is copied."""
    with torch.device("meta"):
        network = make()
    return load_strict(network, state, source).eval()


def check_fits(network: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """One ValueError, naming the tensors, if `state` is not exactly what `network` has."""
    expected = network.state_dict()
    misshapen = [
        f"{name} {tuple(state[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": misshapen,
    }
    messages = [
        f"{len(names)} {what} ({', '.join(names[:LISTED_KEYS])}{', ...' if len(names) > LISTED_KEYS else ''})"
        for what, names in problems.items()
        if names
    ]
    if messages:
        raise ValueError(f"{source}: does not fit {type(network).__name__}: tensors {'; '.join(messages)}")
