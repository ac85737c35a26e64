import cv2
import numpy as np
import psutil
import pyarrow as pa
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.data import duplicates, filter_report
from pipeline.data import filter as filter_stage
from pipeline.data import selection as select
from pipeline.data.filter import FilterConfig, Threshold
from pipeline.data.scorers import technical
from pipeline.store import hashing, parquet, schema, storage
from pipeline.video import sandbox
from tests.helpers.clips import MEDIA, encode, moving_picture
from tests.helpers.data_root import make_data_root, rows_by_id

LIMIT = 80.0


def photo() -> np.ndarray:
    picture = cv2.imread(str(MEDIA / "coffee.jpg"))
    assert picture is not None
    return picture


def grey() -> np.ndarray:
    return cv2.cvtColor(photo(), cv2.COLOR_BGR2GRAY)


def test_scores_answer_to_what_they_are_named_after():
    clean = grey()
    assert technical.sharpness(cv2.GaussianBlur(clean, (0, 0), 2)) < 0.3 * technical.sharpness(clean)
    _, data = cv2.imencode(".jpg", clean, [cv2.IMWRITE_JPEG_QUALITY, 5])
    squeezed = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)
    assert squeezed is not None
    assert technical.blockiness(squeezed) > 1.5 > technical.blockiness(clean)
    barred = clean.copy()
    barred[:80] = barred[-40:] = 0
    assert technical.border_share(barred) == pytest.approx(120 / 400, abs=0.02)
    assert technical.border_share(clean) == 0
    assert technical.clipped_share(np.full((50, 50), 255, np.uint8)) == 1


def test_clips_of_a_source_that_share_a_decode_score_as_each_alone(tmp_path):
    path = encode(tmp_path / "film.mp4", "libx264", "yuv420p", {"g": "20"}, frames=moving_picture(70))
    common = {"uri": f"file://{path}", "media": "video", "time_base": "1/12800", "width": 256, "height": 144}
    spans = ((0, 20), (20, 40), (45, 60), (60, 70))  # one is left out between them, as a short shot is
    clips = [
        schema.empty_row(
            schema.CLIPS_SCHEMA, clip_id=f"c{first}", start_pts=first * 512, end_pts=last * 512, **common
        )
        | {"num_frames": last - first}
        for first, last in spans
    ]
    scoring = FilterConfig(data="/x", thresholds={})
    sandbox.shared(scoring.decode_seconds).close()
    others = psutil.Process().children()
    alone = [filter_stage.score_clips([clip], scoring)[0] for clip in clips]
    assert all(row["error"] is None and row["motion"] > 0 for row in alone)
    (child,) = set(psutil.Process().children()) - set(others)
    order = [2, 0, 3, 1]
    assert filter_stage.score_clips([clips[i] for i in order], scoring) == [alone[i] for i in order]
    # A new decoding child costs more than a short clip.
    assert set(psutil.Process().children()) - set(others) == {child}
    # One that does not decode leaves its neighbours alone.
    clips[1] = dict(clips[1], num_frames=25)
    rows = filter_stage.score_clips(clips, scoring)
    assert rows[1]["error"] == "only 20 of the clip's 25 frames decode"
    assert [row for i, row in enumerate(rows) if i != 1] == [row for i, row in enumerate(alone) if i != 1]


@pytest.fixture(scope="module")
def data(tmp_path_factory, local_ray) -> str:
    root = tmp_path_factory.mktemp("data")
    (root / "missing").mkdir()
    url = make_data_root(root, ["cup.mp4", "city.mp4", "fig.jpg", "trailer_bbb.mp4"], ["box.mp4"])
    file = storage.join(url, schema.CLIPS, "part-0.parquet")
    clips = parquet.read_table(file).to_pylist()
    broken = dict(clips[1], clip_id="broken", uri=f"file://{root}/gone.mp4")
    twin = dict(clips[0], clip_id="zz_twin", source_id="elsewhere")
    unread = schema.empty_row(schema.CLIPS_SCHEMA, clip_id="unread", source_id="x", uri="x", error="no video")
    rows = [{**row, "phash": f"{hashing.stable_hash(row['uri']):016x}"} for row in [*clips, broken, twin]]
    table = pa.Table.from_pylist([*rows, unread], schema=schema.CLIPS_SCHEMA)
    parquet.write_table(file, [table], schema.CLIPS_SCHEMA)
    return url


def config(data: str, **changes) -> FilterConfig:
    values = {"thresholds": {"exposure": Threshold(min=LIMIT)}, "held_out": ["box.mp4"], **changes}
    return FilterConfig(data=data, **values)


def selection(data: str) -> dict[str, dict]:
    return rows_by_id(data, schema.SELECTION, schema.SELECTION_SCHEMA)


def test_every_clip_has_scores_and_a_decision(data):
    summary = filter_stage.run(config(data))
    rows = selection(data)
    assert len(rows) == summary.rows_in == 8
    assert rows["unread"]["reject_reason"] == "error: no video"
    assert rows["broken"]["reject_reason"].startswith("error: ") and not rows["broken"]["keep"]
    clips = {row["clip_id"]: row for row in filter_stage.open_clips(data).read().to_pylist()}
    names = {i: clips[i]["uri"].rsplit("/", 1)[-1] for i in rows}
    cups = sorted(i for i in rows if names[i] == "cup.mp4")
    assert [rows[i]["keep"] for i in cups] == [True, False]
    assert (rows[cups[1]]["reject_reason"] or "").startswith("duplicate")
    assert rows[cups[1]]["duplicate_of"] == cups[0]
    scores = rows_by_id(data, schema.SCORES, filter_stage.SCORES_SCHEMA)
    assert len(scores) == 8
    exposure = {i: row["exposure"] for i, row in scores.items() if row["error"] is None}
    dark = {i for i, value in exposure.items() if value < LIMIT}
    assert 0 < len(dark) < len(exposure) - 1
    for i in dark:
        assert rows[i]["reject_reason"] == f"exposure too low: {exposure[i]:.4g} < {LIMIT:g}"
    assert {names[i] for i, row in rows.items() if row["split"] == "held_out"} == {"box.mp4"}
    assert all(scores[cups[0]][name] is not None for name in technical.SCORES if name != "bits_per_pixel")


def test_thresholds_change_without_measuring_again(data):
    filter_stage.run(config(data))
    again = filter_stage.run(config(data, thresholds={"motion": Threshold(max=0.0)}, rethreshold=True))
    assert again.rejected["motion too high"] >= 3 and again.bytes == 0
    rows = selection(data).values()
    # An image has no motion and passes.
    assert sum(row["keep"] for row in rows) == 1
    back = filter_stage.run(config(data))
    assert back.already_done == 8 and back.bytes == 0


def test_unknown_scores_are_named(data):
    with pytest.raises(ValueError, match=r"thresholds.sharpnes: no such score"):
        config(data, thresholds={"sharpnes": Threshold(min=1)})


def test_duplicates_are_found_at_the_stated_distance_only():
    base = 0x0123456789ABCDEF
    values = [base, base ^ 0b111, base ^ (1 << 63 | 1 << 40 | 0b1100), ~base & (2**64 - 1), base]
    hashes = np.array(values, np.uint64)

    def groups(distance: int) -> list[list[int]]:
        labels = duplicates.duplicate_labels(hashes, distance)
        return [g.tolist() for g in (np.flatnonzero(labels == n) for n in np.unique(labels)) if len(g) > 1]

    assert groups(3) == [[0, 1, 4]] and groups(0) == [[0, 4]]


def test_banded_search_finds_what_comparing_all_pairs_finds():
    draw = np.random.default_rng(5)
    hashes = draw.integers(0, 2**64, 400, dtype=np.uint64)
    for _ in range(800):  # chains of hashes a few bits apart, some at 4 bits
        flips = np.uint64(sum(1 << int(bit) for bit in draw.choice(64, draw.integers(1, 5), replace=False)))
        hashes = np.append(hashes, draw.choice(hashes) ^ flips)
    near = np.bitwise_count(hashes[:, None] ^ hashes[None]) <= 3
    _, expected = connected_components(coo_array(near), directed=False)
    found = duplicates.duplicate_labels(hashes, 3)
    assert len({*zip(expected, found, strict=True)}) == len({*expected}) == len({*found})


def decisions(clips: list[dict], scores: list[dict], held_out: list[str], share: float = 0.0) -> list[dict]:
    """Rows of selection/ for rows of clips/ and scores/."""
    table = pa.Table.from_pylist(clips, schema=schema.CLIPS_SCHEMA)
    state = select.Clips({}, held_out, {})
    state.add(table)
    state.close()
    state.judge(pa.Table.from_pylist(scores, schema=schema.scores_schema([])))
    return select.rows(state, select.decide(state, 3, share), 0, table)


def test_a_held_out_shot_takes_its_twins_along():
    one = {
        **schema.empty_row(schema.CLIPS_SCHEMA, clip_id="1", source_id="s", uri="file:///x/film.mp4"),
        **{"start_s": 10.0, "end_s": 14.0, "phash": "00000000000000ff", "width": 8, "height": 8},
    }
    two = dict(one, clip_id="2", uri="file:///x/copy.mp4", source_id="t")
    other = dict(one, clip_id="3", start_s=14.0, phash="ffff000000000000")
    fine = [{"clip_id": i, "error": None} for i in "123"]

    def sides(*held_out: str) -> list[str]:
        return [row["split"] for row in decisions([one, two, other], fine, list(held_out))]

    assert sides("film.mp4@9-14") == ["held_out", "held_out", "train"]
    assert sides("copy.mp4") == ["held_out"] * 3  # twins make one unit of both sources
    assert sides("unknown.mp4") == ["train"] * 3
    with pytest.raises(ValueError, match=r"held_out: 'film\.mp4@20-12'"):
        FilterConfig(data="file:///x", thresholds={}, held_out=["film.mp4@20-12"])


def test_a_share_is_held_out_by_source_whatever_else_is_there():
    clips = [
        schema.empty_row(
            schema.CLIPS_SCHEMA, clip_id=f"c{i}", source_id=f"s{i // 3}", uri=f"file:///x/{i // 3}.mp4"
        )
        for i in range(600)
    ]
    fine = [{"clip_id": clip["clip_id"], "error": None} for clip in clips]
    sides = {row["clip_id"]: row["split"] for row in decisions(clips, fine, [], share=0.2)}
    assert 80 < sum(side == "held_out" for side in sides.values()) < 160
    assert all(len({sides[f"c{3 * i + k}"] for k in range(3)}) == 1 for i in range(200))
    fewer = {row["clip_id"]: row["split"] for row in decisions(clips[300:], fine, [], share=0.2)}
    assert all(sides[clip_id] == side for clip_id, side in fewer.items())


def test_the_page_tells_what_each_threshold_cuts():
    """Of 60,000 clips, counted exactly, drawn from a sample; a score that no clip has is left out."""
    spread = filter_report.Spread("mean luma", Threshold(min=10.0, max=55_000.0))
    for first in range(0, 60_000, 7_000):
        spread.add(np.arange(first, min(first + 7_000, 60_000), dtype=float))
    spread.add(np.array([np.nan, np.inf]))
    assert (spread.clips, spread.below, spread.above) == (60_000, 10, 4_999)
    assert len(spread.sample) <= 20_000 and np.median(spread.sample) == pytest.approx(30_000, rel=0.01)
    missing = filter_report.Spread("nothing", Threshold())
    shown = filter_report.page(
        {"exposure": spread, "musiq": missing}, {"exposure too low": 10}, 60_000, 54_991
    )
    assert "10 cuts 10 (0.0%)" in shown and "55000 cuts 4,999 (8.3%)" in shown
    assert "exposure too low" in shown and "54,991 kept" in shown
    assert shown.count("<svg") == 1 and "musiq" not in shown
    assert shown.count("stroke=") == 2  # a red line for each end
