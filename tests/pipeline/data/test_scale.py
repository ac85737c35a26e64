"""What the driver holds does not grow with the clips. benchmarks/scale.py shows it up to a million."""

import pytest

from benchmarks import scale


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_planning_three_times_the_clips_takes_no_more_memory_and_survives_a_kill():
    found = scale.run((10_000, 30_000))
    # Rows as Python objects would cost 20,000 x 3 to 6 kB: 57 MiB and more.
    assert all(growth < 30 for growth in found["memory_growth_mib"].values()), found["curve"]
    assert found["peak_gib"] < 1.5
    for phase, again in found["after_a_kill"].items():
        assert again["same_rows_none_twice"] and again["rows_before_the_kill"] > 0, phase
        assert again["rows"] > again["rows_before_the_kill"]
