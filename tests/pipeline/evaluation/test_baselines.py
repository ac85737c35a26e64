"""The filters that a network has to beat."""

import numpy as np
import pytest

from pipeline.evaluation import baselines


def test_the_median_filter_takes_a_speck_away_and_a_blur_spreads_it():
    frame = np.full((9, 9, 3), 100, np.uint8)
    frame[4, 4] = 255
    assert (next(baselines.by_name("median")([frame])) == 100).all()
    (blurred,) = baselines.by_name("gaussian:1.0")([frame])
    assert 100 < blurred[4, 4, 0] < 255 and 100 < blurred[4, 5, 0] < blurred[4, 4, 0]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_the_mean_over_time_keeps_the_number_of_frames(count):
    frames = [np.full((2, 2, 3), 30 * index, np.uint8) for index in range(count)]
    levels = [int(frame[0, 0, 0]) for frame in baselines.by_name("mean3")(frames)]
    assert levels == {0: [], 1: [0], 2: [15, 15], 5: [15, 30, 60, 90, 105]}[count]


def test_every_filter_of_the_grid_has_a_name_and_others_are_refused():
    frames = [np.zeros((8, 8, 3), np.uint8)] * 2
    assert all(len(list(baselines.by_name(name)(frames))) == 2 for name in (*baselines.GRID, "none"))
    with pytest.raises(ValueError, match="filter: 'magic' is none of none, median, mean3, gaussian:SIGMA"):
        baselines.by_name("magic")
