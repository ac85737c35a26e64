"""Every file in configs/ is understood by its job, with what its head leaves to the command line, and so is
every job's command in README, docs/ and jobs/."""

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.data import filter as filter_stage
from pipeline.data import ingest, precompute
from pipeline.evaluation import evaluate, evaluate_vae, synthetic_pairs
from pipeline.restoration import restore
from pipeline.runtime.job_config import parse
from pipeline.training.runs import train_dit, train_vae

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
ELSEWHERE = {"peers.yaml", "sets.yaml", "training_mix.yaml"}  # read by jobs.peer, jobs.evaluate, a benchmark
DATA = ["--data", "file:///d"]
DIT_DATA = [*DATA, "--output", "file:///o"]
JOBS = {
    "ingest": (ingest.IngestConfig, ["--input", "file:///i", "--output", "file:///o"]),
    "filter": (filter_stage.FilterConfig, DATA),
    "precompute": (precompute.PrecomputeConfig, [*DATA, "--vae", "file:///v"]),
    "precompute_more": (precompute.PrecomputeConfig, [*DATA, "--vae", "file:///v"]),
    "pairs": (synthetic_pairs.PairsConfig, [*DATA, "--output", "file:///o"]),
    "train_vae": (train_vae.TrainVaeConfig, DIT_DATA),
    "train_vae_gan": (train_vae.TrainVaeConfig, DIT_DATA),
    "train_dit": (train_dit.TrainDitConfig, DIT_DATA),
    "train_dit_one_step": (train_dit.TrainDitConfig, DIT_DATA),
    "train_dit_more": (train_dit.TrainDitConfig, DIT_DATA),
    "restore": (
        restore.RestoreConfig,
        ["--input", '["file:///i.mp4"]', "--output", "file:///o", "--model.weights", "file:///w",
         "--model.vae", "file:///v"],
    ),
    "evaluate": (evaluate.EvaluateConfig, ["--methods", '{"ours": "file:///r"}', "--output", "file:///o"]),
    "evaluate_vae": (
        evaluate_vae.EvaluateVaeConfig,
        ["--clips", "file:///c", "--autoencoders", '{"ours": "file:///v"}', "--output", "file:///o"],
    ),
}  # fmt: skip
RELEASED = {
    "precompute": ["--fixed_text.positive", "file:///pos.pt", "--fixed_text.negative", "file:///neg.pt"],
    "train_dit": ["--initial.kind", "seedvr-3b", "--initial.weights", "file:///w.pth"],
}
# from weights that the command names
GOES_ON = {"demo/train_dit.yaml", "small/train_dit_one_step.yaml", "small/train_dit_more.yaml"}
FILES = sorted(file for file in CONFIGS.rglob("*.yaml") if file.parent.name != "recipes")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_its_job_takes_it(file):
    if file.name in ELSEWHERE:
        return
    config_class, left = JOBS[file.stem]
    if file.parent.name == "released":
        left = [*left, *RELEASED[file.stem]]
    if str(file.relative_to(CONFIGS)) in GOES_ON:
        left = [*left, "--initial", '{"weights": "file:///w"}']
    parse(config_class, "", ["--config", str(file), *left])


def documented() -> Iterator[tuple[str, str, str]]:
    """(file, job, arguments) of the commands, each with its further lines."""
    begin = re.compile(r"\s*(?:\$run|(?:ray job submit --working-dir \. -- )?python -m) +jobs\.(\w+) +(.*)")
    root = CONFIGS.parent
    for file in (root / "README.md", *sorted(root.glob("docs/*.md")), *sorted(root.glob("jobs/*.py"))):
        lines = iter(
            file.read_text().replace("\\\\\n", "\\\n").splitlines()
        )  # docstrings have two backslashes
        for line in lines:
            if found := begin.match(line):
                job, arguments = found.groups()
                while arguments.endswith("\\") or arguments.count("'") % 2:
                    arguments = f"{arguments.removesuffix(chr(92))} {next(lines).strip()}"
                yield file.name, job, arguments.replace("$PWD", str(root))


@pytest.mark.parametrize(("file", "job", "arguments"), documented())
def test_a_job_takes_the_command_that_is_written_down(file, job, arguments, monkeypatch):
    module = importlib.import_module(f"jobs.{job}")
    parsed = []

    def only_parse(config_class, _, run, given=None):
        parsed.append(parse(config_class, "", given))

    monkeypatch.setattr(module, "run_job", only_parse)
    monkeypatch.setattr("sys.argv", [job, *shlex.split(arguments, comments=True)])
    monkeypatch.chdir(CONFIGS.parent)
    module.main()
    assert parsed


def test_commands_are_written_down():
    assert len({job for _, job, _ in documented()}) > 10


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("recipes/*.yaml")), ids=lambda file: file.stem)
def test_recipes_are_recipes(file):
    _, left = JOBS["precompute"]
    text = ["--text", '{"clip_l": "tiny", "clip_g": "tiny", "t5": "tiny"}']
    buckets = ["--buckets", '[{"frames": 5, "height": 64, "width": 64}]']
    parse(precompute.PrecomputeConfig, "", [*left, *text, *buckets, "--video_recipe", str(file)])


def test_every_stage_of_the_papers_training_has_its_samples_made():
    left = JOBS["precompute"][1]
    made = parse(precompute.PrecomputeConfig, "", ["--config", str(CONFIGS / "paper/precompute.yaml"), *left])
    names = {bucket.name for bucket in made.buckets} | ({"native"} if made.native else set())
    trained = parse(train_dit.TrainDitConfig, "", ["--config", str(CONFIGS / "paper/train_dit.yaml")])
    for stage in trained.stages:
        assert set(stage.buckets) <= names


def test_every_value_of_the_papers_training_has_its_source():
    """A value of the training's own settings stands on a line that says where it is from."""
    lines = (CONFIGS / "paper/train_dit.yaml").read_text().splitlines()
    sources = re.compile(r"paper|SD3|released|ours")
    for line in lines:
        setting = re.match(r"\s+(\w+): [^#{]+(#.*)?$", line) or re.match(r"(\w+): [^#{]+(#.*)$", line)
        if setting and setting[1] not in (
            "buckets",
            "steps",
            "learning_rate",
            "tokens_per_pack",
            "data",
            "output",
        ):
            assert setting[2] and sources.search(setting[2]), f"{line}: from where?"
