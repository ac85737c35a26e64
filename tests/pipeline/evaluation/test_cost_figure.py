"""The figure of quality against cost, from an evaluation."""

import pytest

from pipeline.evaluation import cost_figure
from pipeline.evaluation.cost_figure import FigureConfig
from pipeline.store import storage


def evaluation() -> dict:
    def row(method: str, psnr: float | None) -> dict:
        return {"method": method, "psnr_rgb": {"mean": psnr, "standard_error": None, "clips": 1}}

    costs = {
        "slow": {"seconds_per_frame": 2.0, "parameters_m": 3391.0, "peak_memory_gib": 30.0},
        "fast": {"seconds_per_frame": 0.01},
        "LQ": None,
    }
    return {"means": [row("slow", 25.0), row("fast", 24.0), row("LQ", 23.0)], "costs": costs}


def test_every_method_with_quality_and_cost_is_a_dot(tmp_path, capsys):
    url = f"file://{tmp_path}"
    storage.write_json(f"{url}/evaluation.json", evaluation())
    cost_figure.run(FigureConfig(url, url))
    lines = (tmp_path / "figure1.md").read_text().splitlines()
    assert lines[2:] == ["| fast | 24.00 | 0.0100 | – | – |", "| slow | 25.00 | 2.0000 | 3391 | 30.00 |"]
    assert (tmp_path / "figure1.png").read_bytes().startswith(b"\x89PNG")
    assert "slow" in capsys.readouterr().out


def test_what_is_missing_is_one_line(tmp_path):
    url = f"file://{tmp_path}"
    with pytest.raises(
        ValueError, match=r"evaluation: there is no evaluation\.json in .*; run jobs\.evaluate"
    ):
        cost_figure.run(FigureConfig(url, url))
    storage.write_json(f"{url}/evaluation.json", evaluation())
    with pytest.raises(ValueError, match="evaluation: no method has both niqe and its seconds a frame"):
        cost_figure.run(FigureConfig(url, url, metric="niqe"))
    with pytest.raises(ValueError, match="metric: 'beauty' is none of psnr_rgb"):
        FigureConfig(url, url, metric="beauty")
