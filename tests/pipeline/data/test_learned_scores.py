"""Scores by networks in the filter: who gets them, what is computed again, what a user may get wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch

from model.quality import dover, fast_vqa
from pipeline.data import filter as filter_stage
from pipeline.data.filter import FilterConfig, Threshold
from pipeline.data.scorers import learned, scorer_config
from pipeline.data.scorers.scorer_config import ScorersConfig
from pipeline.runtime import stage
from pipeline.store import delta_tables, hashing, parquet, schema, storage
from pipeline.video import decoding
from tests.helpers.clips import MEDIA
from tests.helpers.data_root import make_data_root, rows_by_id
from tests.helpers.random_scorers import RN, VIT, as_google, random_state, seeded_musiq, tiny_clip
from tests.helpers.shards import run_here

IMAGE = "fig.jpg"


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("clips")
    return {
        "clip_iqa": tiny_clip(root / "rn", 32, RN, seed=1),
        "other": tiny_clip(root / "other", 32, RN, seed=2),
        "aesthetic": tiny_clip(root / "vit", 768, VIT, seed=3),
    }


def rows(data: str) -> dict[str, dict[str, dict]]:
    """learned_scores/: scorer -> clip id -> row."""
    found: dict[str, dict[str, dict]] = {}
    for table in tables(data):
        for row in table.read().to_pylist():
            for maker in scorer_config.makers(table.url.rsplit("/", 1)[1]):
                assert row["clip_id"] not in found.setdefault(maker, {}), "twice"
                found[maker][row["clip_id"]] = row
    return found


def tables(data: str) -> list[delta_tables.Table]:
    root = storage.join(data, schema.LEARNED)
    opened = (delta_tables.open_table(storage.join(root, name)) for name in storage.folders_in(root))
    return [table for table in opened if table is not None]


def selection(data: str) -> dict[str, dict]:
    return rows_by_id(data, schema.SELECTION, schema.SELECTION_SCHEMA)


def file_times(data: str) -> dict[str, int]:
    files = [file for table in tables(data) for file in table.urls]
    return {file: Path(storage.path_of(file)).stat().st_mtime_ns for file in files}


@pytest.fixture
def exposures(tmp_path, local_ray) -> tuple[str, dict[str, float]]:
    """A data root of four clips with the scores that need no weights; each clip's exposure, darkest first."""
    data = make_data_root(tmp_path, ["cup.mp4", "city.mp4", IMAGE, "sintel.mp4"], [], frames=8)
    filter_stage.run(FilterConfig(data=data, thresholds={}, niqe_frames=0))
    scores = rows_by_id(data, schema.SCORES, filter_stage.SCORES_SCHEMA)
    found = {clip: row["exposure"] for clip, row in scores.items()}
    return data, dict(sorted(found.items(), key=lambda item: item[1]))


def config(data: str, least_exposure: float, networks: ScorersConfig, **more) -> FilterConfig:
    limits = {"exposure": Threshold(min=least_exposure), "clip_iqa": Threshold(min=0.0)}
    return FilterConfig(data=data, thresholds=limits, scorers=networks, niqe_frames=0, **more)


@pytest.mark.slow
def test_only_what_passes_is_scored_and_only_what_lacks_is_computed(exposures, clips):
    data, exposure = exposures
    ordered = list(exposure)
    strict, loose = exposure[ordered[2]], exposure[ordered[1]]
    one = ScorersConfig(clip_iqa=clips["clip_iqa"], frames=2)
    summary = filter_stage.run(config(data, strict, one))
    (maker,) = rows(data)
    assert maker.startswith("clip_iqa-") and set(rows(data)[maker]) == set(ordered[2:])
    first = rows(data)[maker]
    assert all(0 < row["clip_iqa"] < 1 and row["musiq"] is None for row in first.values())
    assert summary.rows_kept == 2 and summary.details["clips without learned scores yet"] == 0
    shown = storage.read_bytes(summary.details["histograms"]).decode()
    assert "<h2>clip_iqa</h2>" in shown and "<h2>musiq</h2>" not in shown

    times = file_times(data)
    summary = filter_stage.run(config(data, loose, one, rethreshold=True))
    assert summary.details["clips without learned scores yet"] == 1 and file_times(data) == times
    assert selection(data)[ordered[1]]["reject_reason"] == "learned scores not computed yet"
    assert summary.rows_kept == 2

    summary = filter_stage.run(config(data, loose, one))
    assert summary.rows_kept == 3 and set(rows(data)[maker]) == set(ordered[1:])
    assert {clip: rows(data)[maker][clip] for clip in first} == first
    assert {file: time for file, time in file_times(data).items() if file in times} == times


@pytest.mark.slow
def test_another_scorer_is_computed_alone_and_other_weights_replace_only_their_own_scores(
    exposures, clips, monkeypatch
):
    monkeypatch.setattr(stage, "run_shards", run_here)  # the actor of each run would import everything anew
    data, exposure = exposures
    ordered = list(exposure)
    loose = exposure[ordered[1]]
    filter_stage.run(config(data, loose, ScorersConfig(clip_iqa=clips["clip_iqa"], frames=2)))
    (maker,) = rows(data)
    first = rows(data)[maker]

    both = ScorersConfig(clip_iqa=clips["clip_iqa"], aesthetic=clips["aesthetic"], frames=2)
    filter_stage.run(config(data, loose, both))
    made = rows(data)
    (beauty,) = set(made) - {maker}
    assert made[maker] == first
    assert set(made[beauty]) == set(ordered[1:])  # images too
    assert all(row["aesthetic"] is not None and row["clip_iqa"] is None for row in made[beauty].values())
    changed = ScorersConfig(clip_iqa=clips["other"], aesthetic=clips["aesthetic"], frames=2)
    filter_stage.run(config(data, loose, changed))
    (anew,) = set(rows(data)) - {maker, beauty}
    assert set(rows(data)[anew]) == set(ordered[1:]) and rows(data)[beauty] == made[beauty]
    assert any(rows(data)[anew][c]["clip_iqa"] != first[c]["clip_iqa"] for c in ordered[2:])

    # A threshold that the scores of the present weights fail, and not those of the former ones.
    values = [row["clip_iqa"] for row in rows(data)[anew].values()]
    limits = {"clip_iqa": Threshold(max=float(np.median(values)))}
    last = FilterConfig(data=data, thresholds=limits, scorers=changed, niqe_frames=0, rethreshold=True)
    rejected = {
        c for c, row in selection_of(last).items() if "clip_iqa too high" in (row["reject_reason"] or "")
    }
    assert rejected == {c for c, row in rows(data)[anew].items() if row["clip_iqa"] > np.median(values)}
    assert hashing.stable_id(IMAGE) in exposure


def selection_of(config: FilterConfig) -> dict[str, dict]:
    filter_stage.run(config)
    return selection(config.data)


def test_a_clip_that_cannot_be_read_any_more_is_an_error_row(tmp_path, local_ray, clips, monkeypatch):
    monkeypatch.setattr(stage, "run_shards", run_here)
    data = make_data_root(tmp_path, ["cup.mp4"], [], frames=4)
    networks = ScorersConfig(clip_iqa=clips["clip_iqa"], frames=2)
    filter_stage.run(FilterConfig(data=data, thresholds={}, niqe_frames=0))
    file = storage.join(data, schema.CLIPS, "part-0.parquet")
    table = parquet.read_table(file)
    gone = table.set_column(1, "uri", [[f"file://{tmp_path}/gone.mp4"]])
    parquet.write_table(file, [gone.cast(schema.CLIPS_SCHEMA)], schema.CLIPS_SCHEMA)
    filter_stage.run(FilterConfig(data=data, thresholds={}, scorers=networks, niqe_frames=0))
    (row,) = selection(data).values()
    assert not row["keep"] and row["reject_reason"].startswith("error: ")


@pytest.mark.parametrize(
    "networks, told",
    [
        ({"musiq": "file:///nowhere/koniq_ckpt.npz"}, "scorers.musiq: there is no file"),
        ({"fast_vqa": "weights/fast.pth"}, "scorers.fast_vqa: .* is relative"),
        ({"clip_iqa": "/nowhere/at/all"}, "scorers.clip_iqa: /nowhere/at/all is neither a folder nor"),
        ({"frames": 0}, "scorers.frames: 0; it must be at least 1"),
    ],
)
def test_missing_weights_stop_the_job_in_one_line_before_ray(tmp_path, networks, told):
    with pytest.raises(ValueError, match=told) as error:
        config = FilterConfig(
            data=make_data_root(tmp_path, ["fig.jpg"], []), thresholds={}, scorers=ScorersConfig(**networks)
        )
        filter_stage.run(config)
    assert "\n" not in str(error.value)


def test_a_threshold_without_its_scorer_is_named():
    with pytest.raises(ValueError, match=r"thresholds\.dover_overall: set scorers\.dover to its weights"):
        FilterConfig(data="file:///x", thresholds={"dover_overall": Threshold(min=0.5)})


def test_fingerprints_follow_weights_and_sampling_but_no_threshold(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"one")
    (tmp_path / "b.npz").write_bytes(b"one")
    url = f"file://{tmp_path}"

    def made_by(**changes) -> str:
        return scorer_config.fingerprints(ScorersConfig(**{"musiq": f"{url}/a.npz", **changes}))["musiq"]

    assert made_by() == made_by(musiq=f"{url}/b.npz") == made_by(actors=3, clips_per_shard=5)
    assert made_by() != made_by(frames=3)
    before = made_by()
    (tmp_path / "a.npz").write_bytes(b"two")
    assert made_by() != before


@pytest.mark.slow
def test_every_scorer_scores_a_real_clip_and_an_image(tmp_path, clips):
    """The published shapes with random weights, from files in the published forms."""
    torch.save({"state_dict": random_state(fast_vqa.FastVQA(fast_vqa.PUBLISHED_FASTER))}, tmp_path / "f.pth")
    torch.save(random_state(dover.Dover(dover.PUBLISHED_MOBILE)), tmp_path / "d.pth")
    np.savez(tmp_path / "m.npz", **as_google(seeded_musiq(1)))
    config = ScorersConfig(
        aesthetic=clips["aesthetic"],
        clip_iqa=clips["clip_iqa"],
        fast_vqa=f"file://{tmp_path}/f.pth",
        fast_vqa_model="FasterVQA",
        musiq=f"file://{tmp_path}/m.npz",
        dover=f"file://{tmp_path}/d.pth",
        frames=1,
    )
    assert len(scorer_config.fingerprints(config)) == 5
    loaded = {name: learned.load_scorer(name, config, torch.device("cpu")) for name in config.names}
    probe = decoding.probe(str(MEDIA / "cup.mp4"))
    clip = {"uri": f"file://{MEDIA}/cup.mp4", "media": "video", "num_frames": 40, "end_pts": None}
    scores, error = learned.score_clip({**clip, "start_pts": probe.start_pts}, loaded, 120.0)
    assert error is None and list(scores) == config.columns
    assert all(0 < scores[name] < 1 for name in config.columns if name not in ("aesthetic", "musiq"))
    image = {"uri": f"file://{MEDIA}/fig.jpg", "media": "image", "num_frames": 1}
    scores, error = learned.score_clip(image, loaded, 120.0)
    assert error is None and list(scores) == ["aesthetic", "clip_iqa", "musiq"]
