"""Evaluation of small real clips: known numbers, identical files, and every mismatch as one clear line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from demo import report
from model.checkpoints import load_clip
from model.quality.clip_iqa import ClipIQA
from pipeline.evaluation import comparison_tables, cost_figure, evaluate
from pipeline.evaluation.evaluate import CEILING, METRICS, EvaluateConfig
from pipeline.metrics import metric_table, psnr_ssim
from pipeline.metrics.metric_networks import LearnedMetrics
from pipeline.store import storage
from pipeline.video import decoding
from tests.helpers import tiny_models
from tests.helpers.clips import MEDIA, make_video
from tests.helpers.random_scorers import RN, tiny_clip


@pytest.fixture(scope="module")
def truth() -> list[np.ndarray]:
    """5 real frames of 100x200: two blocks of NIQE's."""
    return [
        frame[100:200, 100:300] for frame in decoding.decode_frames(str(MEDIA / "city.mp4"), max_frames=5)
    ]


@pytest.fixture(scope="module")
def result(truth, tmp_path_factory, local_ray) -> dict:
    root = tmp_path_factory.mktemp("evaluate")
    off_by_five = [np.where(frame < 128, frame + 5, frame - 5).astype(np.uint8) for frame in truth]
    make_video(root / "truth" / "a.mkv", truth)
    make_video(root / "truth" / "sub" / "b.mkv", truth[::-1])
    make_video(root / "same" / "a.mkv", truth)
    make_video(root / "same" / "sub" / "b.mkv", truth[::-1])
    make_video(root / "off" / "a.mkv", off_by_five)
    make_video(root / "off" / "sub" / "b.mkv", off_by_five[::-1])
    make_video(root / "bad" / "a.mkv", truth[:3])  # and no b
    make_video(root / "half" / "a.mkv", [frame[::2, ::2] for frame in truth])
    (root / "half" / "sub").mkdir()
    (root / "half" / "sub" / "b.mkv").write_bytes(b"not a video")
    config = EvaluateConfig(
        methods={name: f"file://{root}/{name}" for name in ("same", "off", "bad", "half")},
        output=f"file://{root}/out",
        truth=f"file://{root}/truth",
        reconstruct_with=tiny_models.save_vae(root / "vae"),
    )
    evaluate.run(config)
    for ending in ("md", "html", "tex"):
        assert "PSNR" in (root / "out" / f"evaluation.{ending}").read_text()
    text = storage.read_bytes(f"file://{root}/out/evaluation.json").decode()
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def clip(result: dict, method: str, name: str) -> dict:
    (row,) = [row for row in result["clips"] if (row["method"], row["clip"]) == (method, name)]
    return row


def mean(result: dict, method: str) -> dict:
    (row,) = [row for row in result["means"] if row["method"] == method]
    return row


def test_a_known_error_has_its_known_psnr(result, truth):
    row = clip(result, "off", "a")
    assert row["psnr_rgb"] == pytest.approx(20 * np.log10(255 / 5))
    assert row["frames"] == 5 and (row["height"], row["width"]) == (100, 200)
    frame = np.where(truth[0] < 128, truth[0] + 5, truth[0] - 5).astype(np.uint8)
    expected = psnr_ssim.full_reference_scores(frame, truth[0])
    assert row["ssim_y"] == pytest.approx(expected["ssim_y"], abs=0.01)
    assert row["niqe"] is not None and row["error"] is None


def test_equal_files_are_null_with_a_note(result):
    row = clip(result, "same", "a")
    assert row["psnr_rgb"] is None and row["ssim_rgb"] == pytest.approx(1)
    assert row["note"] == "5 of 5 frames equal the truth: infinite PSNR"
    assert mean(result, "same")["psnr_rgb"] == {"mean": None, "standard_error": None, "clips": 0}


def test_what_does_not_match_is_one_line_that_names_the_file(result):
    missing, short, small, broken = (
        clip(result, method, name)["error"]
        for method, name in (("bad", "sub/b"), ("bad", "a"), ("half", "a"), ("half", "sub/b"))
    )
    assert "there is no sub/b below" in missing
    assert "bad/a.mkv: it has 3 frames, the truth has more" in short
    assert "half/a.mkv: frame 0 is 100x50, the truth's is 200x100" in small
    assert "half/sub/b.mkv" in broken
    assert all("\n" not in error for error in (missing, short, small, broken))
    assert mean(result, "bad")["clips"] == 0 and mean(result, "bad")["errors"] == 2


def test_the_autoencoders_reconstruction_is_a_method(result):
    ceiling = mean(result, CEILING)
    assert ceiling["clips"] == 2 and 3 < ceiling["psnr_rgb"]["mean"] < 30
    assert result["protocol"]["methods"][CEILING]["vae_sha256"][0]


def test_the_protocol_says_how(result):
    protocol = result["protocol"]
    assert protocol["border_px"] == 0 and protocol["frames"] == {"every": 1, "max_frames": None}
    assert {"psnr", "ssim", "niqe", "truth"} <= set(protocol) and protocol["weights"] == {}
    assert protocol["left out"].startswith("left out: no weights for lpips, dists, musiq, clip_iqa, dover")


def test_frames_used_and_enlarging(truth, tmp_path):
    make_video(tmp_path / "truth" / "a.mkv", truth)
    make_video(tmp_path / "small" / "a.mkv", [frame[::2, ::2] for frame in truth])
    config = EvaluateConfig(
        methods={"small": f"file://{tmp_path}/small"},
        output=f"file://{tmp_path}/out",
        truth=f"file://{tmp_path}/truth",
        enlarge=["small"],
        every=2,
        max_frames=2,
    )
    (row,) = evaluate.plan_rows(config)
    scores = evaluate.Measure(config)(row)["result"]
    assert scores["error"] is None and scores["frames"] == 2 and scores["width"] == 200
    assert 15 < scores["psnr_y"] < 45


def test_image_sequences_are_clips_and_a_damaged_frame_is_one_line(truth, tmp_path):
    for folder in ("truth", "whole", "cut", "short"):
        (tmp_path / folder / "clip").mkdir(parents=True)
        for index, frame in enumerate(truth):
            Image.fromarray(frame).save(tmp_path / folder / "clip" / f"{index}.png")
    (tmp_path / "whole" / "_preview").mkdir()
    Image.fromarray(truth[0]).save(tmp_path / "whole" / "_preview" / "x.jpg")  # bookkeeping of restore
    damaged = tmp_path / "cut" / "clip" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:500])
    (tmp_path / "short" / "clip" / "4.png").unlink()
    config = EvaluateConfig(
        methods={name: f"file://{tmp_path}/{name}" for name in ("whole", "cut", "short")},
        output=f"file://{tmp_path}/out",
        truth=f"file://{tmp_path}/truth",
        sequences=True,
    )
    measure = evaluate.Measure(config)
    rows = {row["method"]: measure(row)["result"] for row in evaluate.plan_rows(config)}
    assert rows["whole"]["frames"] == 5 and rows["whole"]["error"] is None
    assert rows["whole"]["warping_error"] >= 0 and rows["whole"]["ssim_y"] == pytest.approx(1)
    assert "cut/clip: 3.png: the image cannot be decoded" in rows["cut"]["error"]
    assert "short/clip: it has 4 frames, the truth has more" in rows["short"]["error"]


def test_without_truth_only_what_needs_none(truth, tmp_path):
    make_video(tmp_path / "real" / "a.mkv", truth)
    config = EvaluateConfig(methods={"real": f"file://{tmp_path}/real"}, output=f"file://{tmp_path}/out")
    (row,) = evaluate.plan_rows(config)
    scores = evaluate.Measure(config)(row)["result"]
    assert scores["niqe"] is not None and scores["psnr_rgb"] is None and scores["error"] is None
    assert scores["warping_error"] > 0


def test_a_metric_with_weights_is_a_column(truth, tmp_path):
    make_video(tmp_path / "real" / "a.mkv", truth)
    clip_iqa = tiny_clip(tmp_path / "rn", 32, RN, seed=1)
    config = EvaluateConfig(
        methods={"real": f"file://{tmp_path}/real"},
        output=f"file://{tmp_path}/out",
        learned=LearnedMetrics(clip_iqa=clip_iqa),
        every=2,
    )
    assert config.metrics == (*METRICS[:5], "clip_iqa", "warping_error")
    (row,) = evaluate.plan_rows(config)
    scores = evaluate.Measure(config)(row)["result"]
    network = ClipIQA(load_clip(clip_iqa))
    expected = [network.score(torch.from_numpy(frame)) for frame in truth[::2]]
    assert scores["clip_iqa"] == pytest.approx(np.mean(expected), abs=1e-6) and scores["frames"] == 3
    about = evaluate.protocol(config)
    assert about["weights"]["clip_iqa"]["weights"] == clip_iqa and about["weights"]["clip_iqa"]["sha256"]
    assert "clip_iqa" not in about["left out"]


def test_an_entry_in_the_table_is_a_metric_everywhere(truth, tmp_path, monkeypatch):
    """One entry, and it is measured, is a column, has its title, decimals and direction."""
    darkness = metric_table.Metric(
        "darkness",
        "Darkness",
        lambda pair: 255.0 - float(pair.frame.mean()),
        lower_is_better=True,
        decimals=1,
    )
    monkeypatch.setitem(metric_table.METRICS, "darkness", darkness)
    make_video(tmp_path / "real" / "a.mkv", truth)
    config = EvaluateConfig(methods={"real": f"file://{tmp_path}/real"}, output=f"file://{tmp_path}/out")
    assert config.metrics[-1] == "darkness"
    (row,) = evaluate.plan_rows(config)
    scores = evaluate.Measure(config)(row)["result"]
    assert scores["darkness"] == pytest.approx(np.mean([255 - frame.mean() for frame in truth]))
    table = comparison_tables.means([scores, {**scores, "method": "same"}], config.metrics)
    text = comparison_tables.markdown_means(table, config.metrics, CEILING)
    assert "Darkness ↓" in text and f"**{scores['darkness']:.1f}**" in text


def test_a_metric_without_an_entry_is_an_error_and_does_not_vanish():
    table = [{"method": "a", "clips": 1, "fancy": {"mean": 1.0, "standard_error": None, "clips": 1}}]
    for shown in (
        lambda: comparison_tables.markdown_means(table, ("fancy",), CEILING),
        lambda: cost_figure.FigureConfig("file:///e", "file:///o", metric="fancy"),
        lambda: report.metric_table(table),
    ):
        with pytest.raises(ValueError, match=r"metric: 'fancy' is none of psnr_rgb, .*, warping_error"):
            shown()


def test_means_standard_errors_and_marks():
    def row(method: str, psnr: float, niqe: float) -> dict:
        values = dict.fromkeys(METRICS, None) | {"psnr_rgb": psnr, "niqe": niqe}
        return {"method": method, "clip": "c", "error": None, **values}

    rows = [row("A", 20, 5), row("A", 24, 7), row("B", 30, 9), row("C", 10, 1), row(CEILING, 50, 0.5)]
    table = comparison_tables.means(rows, METRICS)
    assert table[0]["psnr_rgb"] == {"mean": 22, "standard_error": pytest.approx(2), "clips": 2}
    assert table[1]["psnr_rgb"]["standard_error"] is None
    lines = comparison_tables.markdown_means(table, METRICS, CEILING).splitlines()
    assert "<u>22.00 ± 2.00</u>" in lines[2] and "**30.00**" in lines[3]
    assert "**1.00**" in lines[4] and "**" not in lines[5]  # the ceiling is no competitor


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"methods": {}}, "methods: empty"),
        ({"methods": {"x": "relative/path"}}, r"methods\.x: .* is relative"),
        ({"enlarge": ["LQ"]}, "enlarge: 'LQ' is none of the methods"),
        ({"reconstruct_with": "file:///v"}, "reconstruct_with: .* without `truth`"),
        ({"every": 0}, "every: 0"),
    ],
)
def test_wrong_configs_name_their_key(wrong: dict, message: str):
    good = {"methods": {"a": "file:///a"}, "output": "file:///out"}
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(**{**good, **wrong})
