"""What the pages name exists: files, folders, modules, links, jobs."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (
    ".ci",
    ".github",
    "benchmarks",
    "configs",
    "degradations",
    "demo",
    "deploy",
    "docs",
    "jobs",
    "model",
    "pipeline",
    "tests",
)
"""A word in code that begins with one of these and a slash is a path of this repository; `out/...`, `clips/`
or `weights/dit` are outputs."""
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "demo/weights/*.md", "model/quality/weights/*.md")
    for page in ROOT.glob(pattern)
)
HISTORY = (ROOT / "CHANGELOG.md", ROOT / "docs/log.md")  # paths in them are those of their day

_BEGIN = rf"(?<![\w./-])(?:{'|'.join(map(re.escape, FOLDERS))})"
_PATH = re.compile(rf"{_BEGIN}/[\w.*+/-]*(?![\w.*+/<{{$-])")  # one that goes on with <, { or $ is a template
_MODULE = re.compile(rf"(?:-m|from|import) +({_BEGIN}(?:\.\w+)+)")
_FENCED = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`[^`]+`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def code(page: Path) -> Iterator[str]:
    """Fenced blocks and spans in backticks; all of a page that is no Markdown."""
    text = page.read_text()
    if page.suffix != ".md":
        yield text
        return
    yield from _FENCED.findall(text)
    yield from _SPAN.findall(_FENCED.sub("", text))


def anchors(page: Path) -> set[str]:
    """The fragments of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", _FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*(p for p in PAGES if p not in HISTORY), ROOT / "NOTICE"], ids=name)
def test_paths_exist(page):
    paths = {found.rstrip(".") for text in code(page) for found in _PATH.findall(text)}
    assert not [path for path in sorted(paths) if not any(ROOT.glob(path.rstrip("/")))]


@pytest.mark.parametrize("page", [p for p in PAGES if p not in HISTORY], ids=name)
def test_modules_exist(page):
    modules = {found for text in code(page) for found in _MODULE.findall(text)}
    places = {module: ROOT / module.replace(".", "/") for module in modules}
    assert not [
        m for m, place in places.items() if not place.is_dir() and not place.with_suffix(".py").is_file()
    ]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in _LINK.findall(_FENCED.sub("", page.read_text())):
        if re.match(r"\w+:", link):
            continue
        path, _, fragment = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not fragment or fragment in anchors(target), link


def test_the_rule_tells_paths_from_outputs():
    text = (
        "model/flow.py out/a.json demo/run.py. jobs/<x>.py configs/{a}.yaml s3://b/model/x $PWD/demo/y docs/"
    )
    assert [found.rstrip(".") for found in _PATH.findall(text)] == ["model/flow.py", "demo/run.py", "docs/"]


def test_readme_names_every_job():
    rows = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert {file.stem for file in (ROOT / "jobs").glob("[a-z]*.py")} <= rows
