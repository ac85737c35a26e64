"""DeepSpeed's internals are read for tested versions alone."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest

from pipeline.training.state import deepspeed_adapter

ROOT = Path(__file__).resolve().parents[4]


def test_the_tested_versions_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"deepspeed{deepspeed_adapter.TESTED_VERSIONS}" in project["dependencies"]
    deepspeed_adapter.check_version()


@pytest.mark.parametrize("version", ["0.19.7", "0.20.0", "1.0"])
def test_another_version_is_told_in_one_line(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(
        ValueError, match=rf"^deepspeed: version {version} .*; pip install 'deepspeed>="
    ) as told:
        deepspeed_adapter.check_version()
    assert "\n" not in str(told.value)


def test_no_other_file_reads_deepspeeds_internals():
    attributes = ("_hp_mapping", "ds_tensor", "ds_shape")
    words = (*attributes, "_get_norm_groups", "scaled_global_norm", "__compatible_ops__")
    own = Path(deepspeed_adapter.__file__)
    for file in [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("tests/helpers/*.py")]:
        found = [word for word in words if word in file.read_text()]
        assert file == own or not found, (file, found)
