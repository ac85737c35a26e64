from pathlib import PurePath

import pytest

from pipeline.data.kept_clips import KeptClips, kept_clips
from pipeline.store import hashing
from tests.helpers.data_root import make_data_root


def test_the_kept_clips_of_a_split_come_whole_and_by_id(tmp_path):
    url = make_data_root(tmp_path, ["cup.mp4", "fig.jpg", "cat.jpg"], ["box.mp4"])
    train, held_out = kept_clips(url, "train"), kept_clips(url, "held_out")
    assert [row["clip_id"] for row in train] == sorted(
        map(hashing.stable_id, ["cup.mp4", "fig.jpg", "cat.jpg"])
    )
    assert [PurePath(row["uri"]).name for row in held_out] == ["box.mp4"]
    assert held_out[0]["media"] == "video" and held_out[0]["fps"] > 0
    both = {row["clip_id"]: split for row, split, _ in KeptClips(url).rows(url, ["clip_id"])}
    assert both == {row["clip_id"]: "train" for row in train} | {held_out[0]["clip_id"]: "held_out"}


def test_no_selection_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"^data: .* has no clips/ or no selection/; run ingest and filter"):
        kept_clips(f"file://{tmp_path}", "train")
