"""Window sizes over time and quality: the configs of the runs and the table."""

import pytest

from pipeline.evaluation import window_study
from pipeline.evaluation.window_study import WindowStudyConfig, training_of, window_size
from pipeline.store import storage
from pipeline.training.runs.train_dit import StageConfig, TrainDitConfig
from tests.helpers import tiny_models

TRAINING = TrainDitConfig(
    data="file:///data",
    output="file:///unused",
    stages=[StageConfig("5x64x64", ["5x64x64"], 5, 1e-3, 256)],
    model=tiny_models.DIT,
)


def study(**changes) -> WindowStudyConfig:
    return WindowStudyConfig(
        **{"training": TRAINING, "windows": ["5x64x64"], "output": "file:///o", **changes}
    )


def test_each_window_is_a_run_of_its_own():
    config = study(windows=["1x8x8", "3xfull"])
    small, full = (training_of(config, window) for window in config.windows)
    assert (
        small.model is not None and small.model.windows == ((1, 8, 8),) and small.output == "file:///o/1x8x8"
    )
    assert full.model is not None and full.model.windows == ((3, "full", "full"),)
    assert small.stages == full.stages == TRAINING.stages


def test_the_table_has_the_papers_numbers_beside_ours(tmp_path):
    url = f"file://{tmp_path}"
    steps = [{"stage": "a", "seconds": s} for s in (9.0, 9.0, 9.0, 1.0, 2.0, 3.0)]
    history = {"steps": steps, "held_out": [{"stage": "a", "before": 1.0, "after": 0.5}]}
    storage.write_json(f"{url}/weights/dit/history.json", history)
    row = {"window": "5x64x64", **window_study.measure_training(url), "psnr_rgb": 24.0}
    assert row["seconds_per_iteration"] == 2.0 and row["held_out_loss"] == 0.5 and row["steps"] == 6
    line = window_study.markdown([row]).splitlines()[2]
    assert line == "| 5x64x64 | 2.000 | 20.29 | 6 | 0.5000 | 24.00 | 11.595 |"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"windows": []}, "windows: empty"),
        ({"windows": ["5x64"]}, "windows: '5x64' is no window; write 5x64x64 or 3xfull"),
        ({"windows": ["5xfullx3"]}, "windows: '5xfullx3' is no window"),
        ({"pairs": "file:///p"}, "pairs, vae: to restore, give both"),
    ],
)
def test_wrong_configs_name_their_key(wrong: dict, message: str):
    with pytest.raises(ValueError, match=message):
        study(**wrong)
    assert window_size("3xfull") == (3, "full", "full")
