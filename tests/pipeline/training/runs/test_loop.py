"""The loop runs a training that it does not know: killed, it goes on to equal losses and weights."""

import json
import signal
from pathlib import Path

import pytest

from pipeline.store import storage
from pipeline.training.runs import loop
from pipeline.training.state.control import StoppedError, outcome
from pipeline.training.state.step_guard import FaultConfig
from tests.helpers import toy_training
from tests.helpers.processes import output_of
from tests.helpers.ranks import NoRequests, process_group
from tests.helpers.toy_training import ToyConfig


def without_times(history: dict) -> dict:
    for row in history["steps"]:
        del row["seconds"], row["wait_share"]
    return history


def result(output: Path) -> tuple[dict, dict, dict]:
    url = f"file://{output}/weights/codec"
    history = without_times(storage.read_json(f"{url}/history.json"))
    return history, storage.read_json(f"{url}/codec.json"), storage.read_json(f"{url}/critic.json")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_three_networks_two_optimisers_two_averages_go_on_after_sigkill_to_the_bit(tmp_path):
    output_of("tests.helpers.toy_training", str(tmp_path))
    codes = json.loads((tmp_path / "codes.json").read_text())
    assert codes["whole"] == codes["resumed"] == [0, 0]
    for killed in (codes["killed"], codes["killed again"]):
        assert -signal.SIGKILL in killed and all(killed)
    assert "resumed at step 6" in (tmp_path / "resumed-0.log").read_text()
    whole, again = result(tmp_path / "a"), result(tmp_path / "b")
    assert again == whole
    history = whole[0]
    assert len(history["steps"]) == 12 and history["steps"][-1]["loss"] < history["steps"][0]["loss"]
    assert [row["step"] for row in history["validation"]] == [4, 8, 12]
    assert [row["stage"] for row in history["held_out"]] == ["part 0", "part 1"]
    for row in history["held_out"]:
        assert row["after"] < row["before"] and row["critic_after"] != row["critic_before"]
    # The critic steps every second time; the other times are no skipped steps.
    assert ["gradient_norm/critic" in row for row in history["steps"][:3]] == [False, True, False]
    assert history["steps"][-1]["skipped"] == 0


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped_and_then_end_the_run_once(tmp_path, capsys):
    config = ToyConfig(f"file://{tmp_path}", faults=FaultConfig(skips_in_row=3), nan_from=7)
    with process_group(f"{tmp_path}/store"):
        ended = outcome(lambda: loop.run(toy_training.build, config, NoRequests()))
        assert ended is not None and ended["failed"]
        assert "step 10: 3 steps in a row were skipped" in ended["reason"]
        told = capsys.readouterr().out
        assert "step 9/12" in told and "skipped 3" in told and "step 10/12" not in told
        again = ToyConfig(f"file://{tmp_path}")
        loop.run(toy_training.build, again, NoRequests())
    history = storage.read_json(f"file://{tmp_path}/weights/codec/history.json")
    assert len(history["steps"]) == 12 and "resumed at step" in capsys.readouterr().out


@pytest.mark.slow
def test_a_save_and_a_stop_that_are_asked_for(tmp_path):
    class StopsAtStep4(NoRequests):
        asked = saves = 0

        def requests(self, device):
            self.asked += 1
            return self.asked == 4, self.asked == 4

        def saved(self, over=False):
            self.saves += 1

    config, requests = ToyConfig(f"file://{tmp_path}"), StopsAtStep4()
    with process_group(f"{tmp_path}/store"):
        with pytest.raises(
            StoppedError, match="saved at step 4 and left; started again, it goes on"
        ) as ended:
            loop.run(toy_training.build, config, requests)
        assert not ended.value.failed and requests.saves == 2
        loop.run(toy_training.build, config, NoRequests())
    assert len(result(tmp_path)[0]["steps"]) == 12
