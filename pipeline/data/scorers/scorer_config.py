"""Which networks score clips, with which weights, and what names their results. Light: imports no network.

Each scorer's results carry its fingerprint (weights, definition, sampling; never a threshold), so that adding
a scorer, changing its weights or loosening a threshold computes what is missing and nothing else.
"""

import dataclasses
from typing import Any, Literal

from pipeline.store import hashing, schema, storage
from pipeline.store.urls import Url, check_urls
from pipeline.weights import weight_hashes

# Raise a number when its score changes its meaning: the score is then computed anew.
_DEFINITIONS = {"aesthetic": 1, "clip_iqa": 1, "fast_vqa": 1, "musiq": 1, "dover": 1}


@dataclasses.dataclass(frozen=True)
class ScorersConfig:
    """Which networks score, each by its weights (null: it does not); docs/data.md says where to get them."""

    aesthetic: str | None = None
    """LAION-Aesthetics: CLIP ViT-L/14 as a Hugging Face id (timm/vit_large_patch14_clip_224.openai) or an
    absolute folder that every node has; the head is part of this package"""
    clip_iqa: str | None = None
    """CLIP-IQA: CLIP RN50 as a Hugging Face id (timm/resnet50_clip.openai) or such a folder"""
    fast_vqa: Url | None = None
    """URL of a FAST-VQA .pth"""
    fast_vqa_model: Literal["FAST-VQA", "FasterVQA", "FAST-VQA-M"] = "FAST-VQA"
    """which one that is: FAST_VQA_B_1_4.pth, FAST_VQA_3D_1_1.pth or FAST_VQA_M_1_4.pth"""
    musiq: Url | None = None
    """URL of one of Google's MUSIQ .npz files (koniq_ckpt.npz)"""
    dover: Url | None = None
    """URL of a DOVER .pth; its licence forbids commercial use"""
    frames: int = 4
    """frames of a clip that those that look at single frames get"""
    clips_per_shard: int = 64
    """clips in one file of learned_scores/: what a kill can lose"""
    actors: int = 1
    """processes that score; one for each GPU"""
    actor_cpus: float = 1.0
    """CPU cores reserved for each"""
    actor_gpus: float = 0.0
    """GPUs reserved for each"""

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
        """The scores that these give."""
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
