"""The kinds of recorded cases, in one table, and running a case of any of them."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from model.checkpoints.parity import networks, process, quality
from model.checkpoints.parity.comparison import Case, Comparison
from model.checkpoints.parity.names import check_names
from model.dit.nadit import SEEDVR_3B, SEEDVR_7B, NaDiT
from model.quality import dover, fast_vqa
from model.vae import FULL_CONFIG, CausalVideoAutoencoder

KINDS: dict[str, Callable[[Case], Iterator[Comparison]]] = {
    "vae": networks.check_autoencoder,
    "dit": networks.check_backbone,
    "sampler": process.check_flow,
    "windows": process.check_windows,
    "preproc": process.check_preprocess,
    "fast_vqa": quality.check_fast_vqa,
    "dover": quality.check_dover,
    "clipiqa": quality.check_clip_iqa,
    "laion": quality.check_aesthetic,
    "quality_sampling": quality.check_sampling,
    "keys_3b": partial(check_names, make=lambda: NaDiT(SEEDVR_3B)),
    "keys_7b": partial(check_names, make=lambda: NaDiT(SEEDVR_7B)),
    "keys_vae": partial(check_names, make=lambda: CausalVideoAutoencoder(FULL_CONFIG)),
    "keys_dover": partial(check_names, make=lambda: dover.Dover(dover.PUBLISHED)),
    "keys_dover_mobile": partial(check_names, make=lambda: dover.Dover(dover.PUBLISHED_MOBILE)),
    "keys_fastvqa": partial(check_names, make=lambda: fast_vqa.FastVQA(fast_vqa.PUBLISHED)),
    "keys_fastvqa_m": partial(check_names, make=lambda: fast_vqa.FastVQA(fast_vqa.PUBLISHED_M)),
}
"""What runs a case of each kind. A file says its kind by its name: `dit_v2_b.safetensors` is a `dit`."""


def check(
    header: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str, kind: str | None = None
) -> Iterator[Comparison]:
    """Run a case: its header, its tensors, and the file they are from.

    kind: None takes what the file says (see `kind_of`). ValueError if that is no kind that we know, or if the
    case lacks what its kind needs.
    """
    kind = kind or kind_of(header, source)
    try:
        yield from KINDS[kind](Case(header, tensors, source))
    except KeyError as error:
        raise ValueError(f"{source}: not a whole case of kind {kind}: it has no {error}") from error


def kind_of(header: Mapping[str, Any], source: str) -> str:
    """The kind that a case states: by its header's `case`, else by its file's name.

    Both are the kind itself or begin with it and an underscore; of two that fit, the longer one is meant.
    """
    for label in (str(header.get("case", "")), Path(source).stem):
        for kind in sorted(KINDS, key=len, reverse=True):
            if label == kind or label.startswith(f"{kind}_"):
                return kind
    raise ValueError(
        f"{source}: not a parity case of a known kind: its name must begin with one of {', '.join(KINDS)}"
    )
