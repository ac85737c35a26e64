"""The papers' test sets, described in configs/sets.yaml: what they hold and where they come from."""

import dataclasses
from pathlib import Path

import yaml

SETS_FILE = Path(__file__).resolve().parents[2] / "configs" / "sets.yaml"


@dataclasses.dataclass(frozen=True)
class BenchmarkSet:
    """One set; clips and frames (of each clip) are None where they are not known."""

    clips: int | None
    frames: int | None
    truth: bool
    made_from: str
    source: str
    licence: str
    remark: str


def load(name: str) -> BenchmarkSet:
    """The description of a set; ValueError that lists the known ones."""
    sets = yaml.safe_load(SETS_FILE.read_text())
    if name not in sets:
        raise ValueError(f"benchmark: {name!r} is none of {', '.join(sets)} (configs/sets.yaml)")
    return BenchmarkSet(**sets[name])


def check(name: str, clips: int, has_truth: bool) -> None:
    """Raise ValueError if the user's folder is not the set: a different number of clips, or no truth."""
    described = load(name)
    if described.clips is not None and clips != described.clips:
        raise ValueError(
            f"benchmark: {name} has {described.clips} clips ({described.made_from}; {described.source}), "
            f"here are {clips}; one folder of images per clip"
        )
    if has_truth and not described.truth:
        raise ValueError(f"benchmark: {name} has no truth; leave `truth` out")
