"""Which networks score clips, with which weights, and how their results are named. Imports no network.

Each scorer's results carry its fingerprint (weights, definition, sampling; never a threshold), so that adding
a scorer, changing its weights or loosening a threshold computes only what is missing.
"""

import dataclasses
from typing import Any, Literal

from pipeline.store import hashing, schema, storage
from pipeline.store.urls import Url, check_urls
from pipeline.weights import weight_hashes

# Increase a scorer's number when the meaning of its score changes, so that it is computed again.
_DEFINITIONS = {"aesthetic": 1, "clip_iqa": 1, "fast_vqa": 1, "musiq": 1, "dover": 1}


@dataclasses.dataclass(frozen=True)
class ScorersConfig:
    """Which networks score, each by its weights (null: it does not); docs/data.md says where to get them."""

    aesthetic: str | None = None
    """CLIP ViT-L/14 for LAION-Aesthetics: a Hugging Face id (timm/vit_large_patch14_clip_224.openai) or an
    absolute folder that every node has; the score's head is part of this package. Null leaves the score
    out."""
    clip_iqa: str | None = None
    """CLIP RN50 for CLIP-IQA: a Hugging Face id (timm/resnet50_clip.openai) or an absolute folder that every
    node has; null leaves the score out."""
    fast_vqa: Url | None = None
    """Absolute URL of a FAST-VQA .pth file; null leaves the score out."""
    fast_vqa_model: Literal["FAST-VQA", "FasterVQA", "FAST-VQA-M"] = "FAST-VQA"
    """Which model the `fast_vqa` file holds: FAST-VQA for FAST_VQA_B_1_4.pth, FasterVQA for
    FAST_VQA_3D_1_1.pth, FAST-VQA-M for FAST_VQA_M_1_4.pth."""
    musiq: Url | None = None
    """Absolute URL of one of Google's MUSIQ .npz files (koniq_ckpt.npz); null leaves the score out."""
    dover: Url | None = None
    """Absolute URL of a DOVER .pth file, whose licence forbids commercial use; null leaves the scores out."""
    frames: int = 4
    """Frames of each clip that the scorers of single frames (aesthetic, clip_iqa, musiq) look at."""
    clips_per_shard: int = 64
    """Clips in one file of learned_scores/; work on an unfinished file is lost when a process is killed."""
    actors: int = 1
    """Number of processes that score: one for each GPU."""
    actor_cpus: float = 1.0
    """CPU cores reserved for each scoring process."""
    actor_gpus: float = 0.0
    """GPUs reserved for each scoring process; 0 scores on the CPU."""

    def __post_init__(self) -> None:
        check_urls(self, "scorers.")
        for key in ("frames", "actors", "clips_per_shard"):
            if getattr(self, key) < 1:
                raise ValueError(f"scorers.{key}: {getattr(self, key)}; it must be at least 1")

    @property
    def names(self) -> list[str]:
        """The scorers that have weights."""
        return [name for name in schema.LEARNED_SCORES if getattr(self, name) is not None]

    @property
    def columns(self) -> list[str]:
        """The columns of the scorers that have weights."""
        return [column for name in self.names for column in schema.LEARNED_SCORES[name]]


def fingerprints(config: ScorersConfig) -> dict[str, str]:
    """Each scorer's name to "name-<fingerprint>"; ValueError, naming the key, for weights that are not there.

    Reads every weights file once.
    """
    found = {}
    for name in config.names:
        parts: dict[str, Any] = {"definition": _DEFINITIONS[name], "weights": _weights_hash(name, config)}
        if name == "fast_vqa":
            parts["model"] = config.fast_vqa_model
        if name in ("aesthetic", "clip_iqa", "musiq"):
            parts["frames"] = config.frames
        found[name] = f"{name}-{hashing.fingerprint(**parts)}"
    return found


def _weights_hash(name: str, config: ScorersConfig) -> str:
    source = getattr(config, name)
    if name in ("aesthetic", "clip_iqa"):
        return weight_hashes.clip_hash(source, f"scorers.{name}")
    if not storage.exists(source):
        raise ValueError(f"scorers.{name}: there is no file {source}; docs/data.md says where to get it")
    return weight_hashes.file_hash(source)


def columns_of(made_by: str) -> tuple[str, ...]:
    """The scores of a scorer by its "name-<fingerprint>"."""
    return schema.LEARNED_SCORES[name_of(made_by)]


def name_of(made_by: str) -> str:
    """The name in "name-<fingerprint>"."""
    return made_by.rsplit("-", 1)[0]


def folder_of(made_by: list[str]) -> str:
    """The folder in learned_scores/ of rows that exactly these scorers made."""
    return ".".join(sorted(made_by))


def makers(folder: str) -> list[str]:
    """The scorers of such a folder."""
    return folder.split(".")
