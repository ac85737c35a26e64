"""Scoring of clips by networks: one decode of a clip for all the scores it lacks, one file per shard.

Only the actors import this; `pipeline.data.scorers.scorer_config` has the config.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from model import checkpoints
from model.quality import aesthetic, fast_vqa
from pipeline.data.scorers.scorer_config import ScorersConfig, name_of
from pipeline.runtime import work_plan
from pipeline.store import schema, source_cache, storage
from pipeline.video import decoding
from pipeline.video.sandbox import MediaError
from pipeline.video.sandbox import shared as shared_sandbox

_FAST_VQA = {
    "FAST-VQA": fast_vqa.PUBLISHED,
    "FasterVQA": fast_vqa.PUBLISHED_FASTER,
    "FAST-VQA-M": fast_vqa.PUBLISHED_M,
}
Module = TypeVar("Module", bound=nn.Module)


class Scorer(Protocol):
    """One network scoring one clip: which frames it needs, what it keeps of each, and its scores."""

    def frame_numbers(self, total: int) -> list[int]:
        """Frames that it needs from a clip of `total`, in order; a frame may be repeated."""
        ...

    def look(self, frame: Tensor) -> Any:
        """What it needs of a uint8 (H, W, 3) RGB frame; ValueError if it cannot use it."""
        ...

    def judge(self, looks: list[Any]) -> list[float]:
        """Its columns, from the results of `look` on all its frames."""
        ...


@dataclasses.dataclass(frozen=True)
class _OfPictures:
    """A score of single frames, averaged over a clip."""

    look: Callable[[Tensor], float]
    frames: int

    def frame_numbers(self, total: int) -> list[int]:
        return [int(i) for i in np.linspace(0, total - 1, self.frames + 2)[1:-1].round()]

    def judge(self, looks: list[float]) -> list[float]:
        return [float(np.mean(looks))]


class _FastVQA:
    def __init__(self, network: fast_vqa.FastVQA) -> None:
        self.network, self.look, self.frame_numbers = network, network.look, network.frame_numbers

    def judge(self, looks: list[Tensor]) -> list[float]:
        return [self.network.score(torch.cat(looks, dim=1))]


class _Dover:
    def __init__(self, network: Any) -> None:
        self.network, self.look = network, network.look

    def frame_numbers(self, total: int) -> list[int]:
        technical, whole = self.network.frame_numbers(total)
        return technical + whole

    def judge(self, looks: list[tuple[Tensor, Tensor]]) -> list[float]:
        border = len(self.network.frame_numbers(1)[0])
        technical = torch.cat([close for close, _ in looks[:border]], dim=1)
        scores = self.network.score(technical, torch.cat([whole for _, whole in looks[border:]], dim=1))
        return [scores[part] for part in ("technical", "aesthetic", "overall")]


def load_scorer(name: str, config: ScorersConfig, device: torch.device) -> Scorer:
    """A scorer with its weights on the device, in fp32."""

    def load(url: str | None, read: Callable[[str], Module]) -> Module:
        assert url is not None
        with tempfile.TemporaryDirectory() as folder, storage.local_copy(url, folder) as path:
            return read(path).to(device=device, dtype=torch.float32).requires_grad_(False)

    if name == "fast_vqa":
        shape = _FAST_VQA[config.fast_vqa_model]
        return _FastVQA(load(config.fast_vqa, lambda path: checkpoints.load_fast_vqa(path, shape)))
    if name == "dover":
        return _Dover(load(config.dover, checkpoints.load_dover))
    if name == "musiq":
        return _OfPictures(load(config.musiq, checkpoints.load_musiq).score, config.frames)
    clip = checkpoints.load_clip(getattr(config, name)).to(device=device, dtype=torch.float32)
    if name == "clip_iqa":
        from model.quality.clip_iqa import ClipIQA  # open_clip takes seconds to import

        return _OfPictures(ClipIQA(clip).score, config.frames)
    assert name == "aesthetic"
    head = checkpoints.load_aesthetic_head(aesthetic.WEIGHTS / aesthetic.MLP_FILE).to(device)
    return _OfPictures(functools.partial(aesthetic.score, clip.visual, head), config.frames)


def score_clip(
    clip: dict[str, Any], scorers: dict[str, Scorer], decode_seconds: float
) -> tuple[dict[str, float], str | None]:
    """Scores by column, and an error or None, of a row of clips/.

    A scorer that fails leaves the others alone; scorers of videos give no score for an image.
    """
    wanted: dict[str, list[int]] = {}
    for name, scorer in scorers.items():
        if clip["media"] == "video" or isinstance(scorer, _OfPictures):
            wanted[name] = scorer.frame_numbers(clip["num_frames"])
    looks: dict[str, dict[int, Any]] = {name: {} for name in wanted}
    errors: dict[str, str] = {}
    for number, picture in _frames(
        clip, sorted({i for numbers in wanted.values() for i in numbers}), decode_seconds
    ):
        frame = torch.from_numpy(picture)
        for name, numbers in wanted.items():
            if number in numbers and name not in errors:
                try:
                    looks[name][number] = scorers[name].look(frame)
                except ValueError as error:
                    errors[name] = str(error)
    scores: dict[str, float] = {}
    for name, numbers in wanted.items():
        if name not in errors:
            values = scorers[name].judge([looks[name][i] for i in numbers])
            scores |= zip(schema.LEARNED_SCORES[name], values, strict=True)
    return scores, "; ".join(f"{name}: {text}" for name, text in errors.items()) or None


def _frames(
    clip: dict[str, Any], numbers: list[int], decode_seconds: float
) -> Iterator[tuple[int, np.ndarray]]:
    """The clip's frames of these numbers, one after the other, from the decoding child."""
    sandbox = shared_sandbox(decode_seconds)
    with source_cache.local_file(clip["uri"], clip.get("source_etag")) as path:
        yield from sandbox.stream(decoding.numbered_frames, clip, path, numbers)


class ScoreShard:
    """The scoring actor: loads its networks once; one call makes one shard's file.

    made_by: the scorers at work, as "name-<fingerprint>". fingerprint: the table's.
    """

    def __init__(
        self, config: ScorersConfig, made_by: list[str], folder: str, fingerprint: str, decode_seconds: float
    ) -> None:
        device = torch.device("cuda" if config.actor_gpus and torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(max(1, int(config.actor_cpus)))
        self.folder, self.decode_seconds = folder, decode_seconds
        self.schema = schema.with_fingerprint(schema.LEARNED_SCHEMA, fingerprint)
        self.scorers = {name: load_scorer(name, config, device) for name in map(name_of, made_by)}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return work_plan.make_shard(
            self.folder, row["shard"], self.schema, lambda planned: [self._row(clip) for clip in planned]
        )

    def _row(self, clip: dict[str, Any]) -> dict[str, Any]:
        row = schema.empty_row(schema.LEARNED_SCHEMA, clip_id=clip["clip_id"])
        try:
            scores, error = score_clip(clip, self.scorers, self.decode_seconds)
        except (MediaError, OSError) as failed:
            return {**row, "error": str(failed)}
        return {**row, **scores, "error": error}
