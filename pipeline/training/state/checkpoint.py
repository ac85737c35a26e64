"""Checkpoints of a training that any number of ranks and any ZeRO stage can read.

<output>/checkpoints/<name>/checkpoint_<step>-<id>/
    part-<rank>.safetensors   that rank's fragments: fp32 weights, Adam's moments, moving average
    state.json                the loop's own state: steps, position in the data, stage, history
    COMPLETE                  written last: hashes and contents of the files above; without it, no checkpoint
No generator's state is kept, since none is used: all draws come from (seed, epoch, sample).
"""

import dataclasses
import hashlib
import json
import re
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.store import hashing, storage
from pipeline.training.state.deepspeed_adapter import (
    MOMENTS,
    fragments,
    optimiser_step,
    prepare_moments,
    spread_masters,
    whole_shape,
)
from pipeline.training.state.ema import MovingAverage
from pipeline.training.state.ranks import from_all, from_rank_0

CHECKPOINTS = "checkpoints"
STATE, COMPLETE = "state.json", "COMPLETE"
MASTER, AVERAGE, BUFFER = "master", "average", "buffer"
_NAME = re.compile(r"checkpoint_(\d+)-[0-9a-f]+")
_FAILED_SAVES = 3  # in a row, after which going on is no longer worth its cost
_LARGEST_READ = 64 * 2**20
_DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of consecutive values of one tensor in a part: what it belongs to and where its bytes are."""

    key: str
    """<engine>/<kind>/<parameter>"""
    start: int
    numel: int
    byte: int


@dataclasses.dataclass(frozen=True)
class Request:
    """Bytes of a file that a rank wants to read, and the values to fill from them."""

    url: str
    byte: int
    target: Tensor


class Checkpoints:
    """Saves and restores one rank's share of a run; every rank calls the same methods at the same steps."""

    def __init__(
        self,
        output_url: str,
        name: str,
        engines: Mapping[str, Any],
        averages: Mapping[str, MovingAverage],
        keep_last: int,
        keep_every: int,
    ) -> None:
        self.url = storage.join(output_url, CHECKPOINTS, name)
        self.engines, self.averages = engines, averages
        self.keep_last, self.keep_every = keep_last, keep_every
        self._failed = 0
        self._damaged: set[str] = set()

    def save(self, state: dict[str, Any]) -> None:
        """Save at `state["step"]`.

        If that fails (a full disk), one line says so and training goes on with the checkpoint before; raises
        RuntimeError after the third failure in a row.
        """
        step = state["step"]
        folder = storage.join(self.url, f"checkpoint_{step:08d}-{from_rank_0(uuid.uuid4().hex[:8])}")
        written, errors = _agreed(lambda: self._write_own(folder, state))
        if not errors and dist.get_rank() == 0:
            complete = {
                "step": step,
                "world_size": dist.get_world_size(),
                "contract": hashing.CONTRACT_VERSION,
                "engines": {name: _described(engine) for name, engine in self.engines.items()},
                "files": {file: facts for files in written for file, facts in files.items()},
            }
        _, late = _agreed(
            lambda: (
                storage.write_bytes(storage.join(folder, COMPLETE), json.dumps(complete).encode())
                if not errors and dist.get_rank() == 0
                else None
            )
        )
        errors += late
        self._failed = self._failed + 1 if errors else 0
        if errors:
            self._give_up(folder, step, errors[0])
        elif dist.get_rank() == 0:
            self._prune(step)

    def _write_own(self, folder: str, state: dict[str, Any]) -> dict[str, Any]:
        """Write the files of one rank; returns their entry for COMPLETE."""
        name = f"part-{dist.get_rank():05d}.safetensors"
        files = {name: write_part(storage.join(folder, name), self._own_tensors())}
        if dist.get_rank() == 0:
            data = json.dumps(state).encode()
            storage.write_bytes(storage.join(folder, STATE), data)
            files[STATE] = {"sha256": hashlib.sha256(data).hexdigest(), "pieces": []}
        return files

    def _own_tensors(self) -> list[tuple[str, int, Tensor]]:
        """(key, start, values), by kind: a resume on as many ranks reads long runs."""
        found: list[tuple[str, int, Tensor]] = []
        for name, engine in self.engines.items():
            own = fragments(engine)
            found += [(f"{name}/{MASTER}/{one.name}", one.start, one.master) for one in own]
            for key in MOMENTS:
                moments = [(one, one.moment(engine, key)) for one in own]
                found += [
                    (f"{name}/{key}/{one.name}", one.start, moment)
                    for one, moment in moments
                    if moment is not None
                ]
            if dist.get_rank() == 0:
                found += [
                    (f"{name}/{BUFFER}/{inner}", 0, tensor) for inner, tensor in engine.module.named_buffers()
                ]
        for name, average in self.averages.items():
            found += [
                (f"{name}/{AVERAGE}/{one.name}", one.start, kept)
                for one, kept in zip(average.fragments, average.own, strict=True)
            ]
        return found

    def _give_up(self, folder: str, step: int, error: str) -> None:
        if dist.get_rank() == 0:
            print(f"step {step}: no checkpoint saved, the one before stays valid: {error}", flush=True)
            storage.remove_folder(folder)
        if self._failed == _FAILED_SAVES:
            raise RuntimeError(f"step {step}: {_FAILED_SAVES} checkpoints in a row were not saved: {error}")

    def _prune(self, step: int) -> None:
        """Remove what is not to be kept; a complete checkpoint loses its COMPLETE file first."""
        folders = _folders(self.url)
        complete = [url for url, whole in folders.items() if whole and url not in self._damaged]
        kept = set(complete[: self.keep_last])
        if self.keep_every:
            kept |= {url for url in complete if _step_of(url) % self.keep_every == 0}
        for url, whole in folders.items():
            if url in kept or _step_of(url) > step:
                continue
            if whole:
                storage.remove_file(storage.join(url, COMPLETE))
            storage.remove_folder(url)

    def resume(self, fresh: dict[str, Any]) -> dict[str, Any]:
        """The loop's state of the newest valid checkpoint, engines and averages filled; else `fresh`.

        ValueError if there are checkpoints but none is valid, or if they are of another network.
        """
        folders = _folders(self.url) if dist.get_rank() == 0 else {}
        candidates = from_rank_0([url for url, whole in folders.items() if whole])
        for url in candidates:
            facts = from_rank_0(_facts(url) if dist.get_rank() == 0 else None)
            wrong = _wrong_files(url, facts) if facts else [COMPLETE]
            if not wrong:
                self._fill(url, facts)
                state: dict[str, Any] = from_rank_0(
                    storage.read_json(storage.join(url, STATE)) if dist.get_rank() == 0 else None
                )
                if dist.get_rank() == 0:
                    print(f"resumed at step {state['step']} of this run", flush=True)
                return state
            self._damaged.add(url)
            if dist.get_rank() == 0:
                print(f"skipped {url}: {', '.join(wrong)} missing or damaged", flush=True)
        if candidates:
            raise ValueError(f"{self.url}: no checkpoint there is whole; remove the folder to start over")
        return fresh

    def _fill(self, url: str, facts: dict[str, Any]) -> None:
        """Read what this rank keeps into its engines and averages."""
        places = _places(url, facts)
        requests: list[Request] = []
        for name, engine in self.engines.items():
            stored = facts["engines"].get(name)
            if stored is None or stored["shapes"] != _described(engine)["shapes"]:
                raise ValueError(f"{url}: its {name} is another network; give another output for a new run")
            keys = (MASTER, *MOMENTS) if stored["optimiser_step"] else (MASTER,)
            if stored["optimiser_step"]:
                prepare_moments(engine, stored["optimiser_step"])
            for one in fragments(engine):
                for key in keys:
                    target = one.master if key == MASTER else one.moment(engine, key)
                    assert target is not None
                    requests += _overlaps(places, f"{name}/{key}/{one.name}", one.start, target)
            for inner, tensor in engine.module.named_buffers():
                requests += _overlaps(places, f"{name}/{BUFFER}/{inner}", 0, tensor.view(-1))
        for name, average in self.averages.items():
            for one, kept in zip(average.fragments, average.own, strict=True):
                requests += _overlaps(places, f"{name}/{AVERAGE}/{one.name}", one.start, kept)
        _read(requests)
        for engine in self.engines.values():
            spread_masters(engine)


def read_checkpoint(url: str, name: str, average: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The loop's state and one engine's weights in fp32 from a checkpoint, without any engine.

    average: the moving average, else the weights as they train; both with the buffers.
    """
    facts = _facts(url)
    if facts is None or name not in facts["engines"]:
        raise ValueError(f"{url}: no checkpoint of {name} here; give one folder checkpoint_... of a run")
    described, places = facts["engines"][name], _places(url, facts)
    tensors = {inner: torch.empty(shape) for inner, shape in described["shapes"].items()}
    kind = AVERAGE if average else MASTER
    requests = [
        request
        for inner, tensor in tensors.items()
        for request in _overlaps(places, f"{name}/{kind}/{inner}", 0, tensor.view(-1))
    ]
    by_name = {text: dtype for dtype, text in _DTYPES.items()}
    for inner, (shape, dtype) in described["buffers"].items():
        tensors[inner] = torch.empty(shape, dtype=by_name[dtype])
        requests += _overlaps(places, f"{name}/{BUFFER}/{inner}", 0, tensors[inner].view(-1))
    _read(requests)
    return storage.read_json(storage.join(url, STATE)), tensors


# -- one part -------------------------------------------------------------------------------------------


def write_part(url: str, tensors: Iterable[tuple[str, int, Tensor]]) -> dict[str, Any]:
    """Write (key, start, values) as a safetensors file; returns its hash and its pieces.

    The tensors pass through the host's memory one after another.
    """
    listed = list(tensors)
    header: dict[str, Any] = {}
    end = 0
    for key, start, tensor in listed:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        described = {"dtype": _DTYPES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": [begin, end]}
        header[f"{key}@{start}"] = described
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    digest = hashlib.sha256()
    with storage.whole_file(url) as path, open(path, "wb") as file:
        for data in (len(text).to_bytes(8, "little"), text):
            file.write(data)
            digest.update(data)
        for _, _, tensor in listed:
            values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            file.write(values.data)
            digest.update(values.data)
    pieces = [
        (key, start, tensor.numel(), base + header[f"{key}@{start}"]["data_offsets"][0])
        for key, start, tensor in listed
    ]
    return {"sha256": digest.hexdigest(), "pieces": pieces}


def _described(engine: Any) -> dict[str, Any]:
    """What a reader must know of an engine before it can ask for its values."""
    module = engine.module
    return {
        "optimiser_step": optimiser_step(engine),
        "shapes": {name: list(whole_shape(p)) for name, p in module.named_parameters()},
        "buffers": {name: [list(b.shape), _DTYPES[b.dtype]] for name, b in module.named_buffers()},
    }


# -- finding and reading --------------------------------------------------------------------------------


def _folders(url: str) -> dict[str, bool]:
    """The checkpoints' folders below a URL, newest first: whether each is complete."""
    found: dict[str, bool] = defaultdict(bool)
    for file, _, _ in storage.walk(url):
        folder, _, name = file.rpartition("/")
        if _NAME.fullmatch(folder.rpartition("/")[2]):
            found[folder] |= name == COMPLETE
    return {folder: found[folder] for folder in sorted(found, key=lambda folder: (-_step_of(folder), folder))}


def _step_of(folder: str) -> int:
    match = _NAME.fullmatch(folder.rpartition("/")[2])
    assert match
    return int(match[1])


def _facts(url: str) -> dict[str, Any] | None:
    """A checkpoint's COMPLETE; None if it is missing or not readable as such."""
    try:
        facts = storage.read_json(storage.join(url, COMPLETE))
    except (FileNotFoundError, ValueError):
        return None
    return facts if isinstance(facts, dict) and facts.get("contract") == hashing.CONTRACT_VERSION else None


def _wrong_files(url: str, facts: dict[str, Any]) -> list[str]:
    """Files that are missing or whose hash is not the stated one; the ranks share the reading."""
    own = sorted(facts["files"])[dist.get_rank() :: dist.get_world_size()]
    wrong = [
        file for file in own if storage.sha256(storage.join(url, file)) != facts["files"][file]["sha256"]
    ]
    return [file for files in from_all(wrong) for file in files]


def _places(url: str, facts: dict[str, Any]) -> dict[str, list[tuple[str, Piece]]]:
    """Where each key's values are: (URL of the part, piece)."""
    places: dict[str, list[tuple[str, Piece]]] = defaultdict(list)
    for file, about in facts["files"].items():
        for piece in about["pieces"]:
            places[piece[0]].append((storage.join(url, file), Piece(*piece)))
    return places


def _overlaps(
    places: Mapping[str, list[tuple[str, Piece]]], key: str, start: int, target: Tensor
) -> Iterator[Request]:
    """Requests that fill `target`, the values from `start` on of a key."""
    filled = 0
    for url, piece in places.get(key, []):
        begin, end = max(start, piece.start), min(start + target.numel(), piece.start + piece.numel)
        if begin < end:
            byte = piece.byte + (begin - piece.start) * target.element_size()
            yield Request(url, byte, target[begin - start : end - start])
            filled += end - begin
    if filled != target.numel():
        raise ValueError(f"{key}: the checkpoint holds {filled} of the {target.numel()} values wanted")


def _read(requests: list[Request]) -> None:
    """Fill the targets; neighbouring bytes are read at once."""
    runs: list[list[Request]] = []
    end = 0
    for request in sorted(requests, key=lambda request: (request.url, request.byte)):
        size = request.target.numel() * request.target.element_size()
        last = runs[-1] if runs else []
        joins = last and last[0].url == request.url and request.byte == end
        if joins and end + size - last[0].byte <= _LARGEST_READ:
            last.append(request)
        else:
            runs.append([request])
        end = request.byte + size
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(_read_run, runs))


def _read_run(run: list[Request]) -> None:
    first, last = run[0], run[-1]
    end = last.byte + last.target.numel() * last.target.element_size()
    data = np.frombuffer(bytearray(storage.read_range(first.url, first.byte, end)), np.uint8)
    for request in run:
        size = request.target.numel() * request.target.element_size()
        own = torch.from_numpy(data[request.byte - first.byte :][:size].copy())
        with torch.no_grad():
            request.target.copy_(own.view(request.target.dtype))


def _agreed(action: Any) -> tuple[list[Any], list[str]]:
    """Every rank's result of an action that writes, and what went wrong on any of them."""
    try:
        own, error = action(), None
    except (OSError, storage.StorageError) as failure:
        own, error = None, f"rank {dist.get_rank()}: {failure}"
    found = from_all((own, error))
    return [result for result, _ in found], [error for _, error in found if error]
