"""Every URL of every config is whole, whichever way it was given."""

import dataclasses
import importlib
import inspect
import pkgutil
import typing
from pathlib import Path

import pytest
from docstring_parser import parse_from_object

import pipeline
from pipeline.evaluation import evaluate, evaluate_vae
from pipeline.metrics.metric_networks import LearnedMetrics
from pipeline.restoration import restore
from pipeline.runtime import job_config, stage
from pipeline.store.urls import Url, check_urls
from pipeline.training.runs import train_dit, train_vae
from pipeline.weights.backbones import ModelConfig

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "demo"
TRAINING = ["--data", "/d/", "--output", "/out"]
PLAIN_PATHS = {
    restore.RestoreConfig: (
        ["--input", '["/in/a", "/in/b/"]', "--output", "/out", "--model", '{"weights": "/w", "vae": "/v"}'],
        {"input": ["file:///in/a", "file:///in/b"]},
    ),
    evaluate.EvaluateConfig: (
        ["--methods", '{"ours": "/r/"}', "--truth", "/t", "--output", "/out"],
        {"methods": {"ours": "file:///r"}, "truth": "file:///t"},
    ),
    evaluate_vae.EvaluateVaeConfig: (
        ["--autoencoders", '{"ours": "/v"}', "--clips", "/c", "--output", "/out"],
        {"autoencoders": {"ours": "file:///v"}, "clips": "file:///c", "lpips": "none"},
    ),
    train_vae.TrainVaeConfig: (["--config", str(CONFIGS / "train_vae.yaml"), *TRAINING], {"data": "file:///d"}),
    train_dit.TrainDitConfig: (
        ["--config", str(CONFIGS / "train_dit.yaml"), *TRAINING, "--initial", '{"weights": "/w"}'],
        {"data": "file:///d"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("config_class", PLAIN_PATHS, ids=lambda found: found.__name__)
def test_plain_paths_become_whole_urls(config_class):
    arguments, expected = PLAIN_PATHS[config_class]
    config = job_config.parse(config_class, "", arguments)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.output == "file:///out"


def test_plain_paths_in_code_become_whole_urls():
    config = restore.RestoreConfig(input="/in/", output="/out", model=ModelConfig("/w/dit", vae="/w/vae/"))
    assert (config.input, config.output) == ("file:///in", "file:///out")
    assert (config.model.weights, config.model.vae) == ("file:///w/dit", "file:///w/vae")


def test_a_plain_output_does_not_slip_past_the_check_for_several_nodes(monkeypatch):
    monkeypatch.setattr(stage, "nodes", lambda: 2)
    config = evaluate.EvaluateConfig(methods={"ours": "/r"}, output="/out")
    with pytest.raises(ValueError, match="2 nodes"):
        stage.check_shared(config.output, config.shared_filesystem, "output")


@dataclasses.dataclass(frozen=True)
class Weights:
    weights: Url | typing.Literal["hub"] | None


def test_words_stay_words_and_what_is_neither_is_named():
    for given, whole in ((None, None), ("hub", "hub"), ("/w/", "file:///w"), ("s3://b/w/", "s3://b/w")):
        config = Weights(given)
        check_urls(config)
        assert config.weights == whole
    with pytest.raises(ValueError, match=r"learned\.lpips \(or hub\): 'squeeze' is relative"):
        LearnedMetrics(lpips="squeeze")


def dataclasses_of_the_pipeline():
    for module in pkgutil.walk_packages(pipeline.__path__, "pipeline."):
        for _, found in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if dataclasses.is_dataclass(found) and found.__module__ == module.name:
                yield found


def url_fields(config_class):
    hints = typing.get_type_hints(config_class, include_extras=True)
    return {field.name for field in dataclasses.fields(config_class) if str(Url) in str(hints[field.name])}


def test_no_config_forgets_a_url():
    """A field whose help says that it is a URL has the type, and the class checks what has the type."""
    for config_class in dataclasses_of_the_pipeline():
        fields = {field.name: field.type for field in dataclasses.fields(config_class)}
        helps = {part.arg_name: part.description or "" for part in parse_from_object(config_class).params}
        told = {name for name, text in helps.items() if "URL" in text and fields.get(name, bool) is not bool}
        urls = url_fields(config_class)
        if config_class.__name__.endswith(("Config", "Metrics")):
            assert told <= urls, config_class
        if urls:
            own = [vars(base).get("__post_init__") for base in config_class.__mro__]
            assert any(check and "check_urls" in check.__code__.co_names for check in own), config_class
