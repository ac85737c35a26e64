"""Names that are gone stay gone: what tests/retired_names.txt lists stands nowhere but in the history."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RETIRED = ROOT / "tests" / "retired_names.txt"
HISTORY = {"CHANGELOG.md", "docs/log.md", "tests/retired_names.txt"}
TEXTS = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ""}


def retired_names() -> list[str]:
    lines = (line.split("#")[0].strip() for line in RETIRED.read_text().splitlines())
    return [line for line in lines if line]


def pattern_of(names: list[str]) -> re.Pattern[str]:
    """Whole names: `room.module` is no part of `room.module_of` nor of `my.room.module`."""
    return re.compile(r"(?<![\w./])(" + "|".join(map(re.escape, names)) + r")(?![\w/])")


def test_retired_names_stand_only_in_the_history():
    pattern = pattern_of(retired_names())
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    seen = []
    for name in listed.splitlines():
        path = ROOT / name
        if name in HISTORY or name.startswith("tests/data/"):
            continue
        if path.suffix not in TEXTS or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            seen += [f"{name}:{number}: {match[1]}" for match in pattern.finditer(line)]
    assert not seen, "\n".join(seen)


def test_a_retired_name_is_seen_where_it_stands_whole():
    pattern = pattern_of(["room.module", "OldName"])
    assert pattern.search("from room.module import join") and pattern.search("an OldName.")
    assert not pattern.search("room.module_of") and not pattern.search("OldNames")
