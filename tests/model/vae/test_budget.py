"""The memory plan: fits its budget, prefers what is faster, and the estimate covers what a stream takes."""

import pytest

from model.vae import FULL_CONFIG
from model.vae.budget import CHOICES, cache_values, plan_stream, stream_values
from tests.helpers.processes import output_of
from tests.model.vae.stream_peak import CONFIG, SIZE, SLICE_FRAMES


def needed_gib(choice: tuple[int, int | None], cache_on_host: bool = False) -> float:
    return stream_values(CONFIG, 512, 512, *choice, cache_on_host) * 4 / 2**30


def test_each_choice_needs_less_than_the_one_before():
    for on_host in (False, True):
        needs = [needed_gib(choice, on_host) for choice in CHOICES]
        assert needs == sorted(needs, reverse=True)
        assert needs[-1] < 0.3 * needs[0]
    assert needed_gib(CHOICES[-1], cache_on_host=True) < 0.6 * needed_gib(CHOICES[-1])


def test_the_plan_is_the_fastest_that_fits():
    for budget_gib in (10.0, 1.0, needed_gib(CHOICES[5]) + 1e-6):
        plan = plan_stream(CONFIG, 512, 512, budget_gib)
        assert plan.expected_gib <= budget_gib and not plan.cache_on_host
        chosen = CHOICES.index((plan.slice_frames, plan.band_pixels))
        assert all(needed_gib(faster) > budget_gib for faster in CHOICES[:chosen])


def test_memory_goes_to_the_host_only_where_nothing_else_fits():
    smallest = needed_gib(CHOICES[-1])
    assert not plan_stream(CONFIG, 512, 512, smallest + 1e-6, host=True).cache_on_host
    plan = plan_stream(CONFIG, 512, 512, smallest - 1e-6, host=True)
    assert plan.cache_on_host and plan.expected_gib < smallest
    assert 0 < plan.host_gib <= cache_values(CONFIG, 512, 512) * 4 / 2**30
    with pytest.raises(ValueError, match="at least"):
        plan_stream(CONFIG, 512, 512, smallest - 1e-6)


@pytest.mark.parametrize(
    ("height", "width", "card_gib", "on_host"),
    [(720, 1280, 24, False), (1080, 1920, 22.5, False), (2160, 3840, 22.5, True)],
)
def test_the_full_model_fits_a_24_gb_card(height, width, card_gib, on_host):
    plan = plan_stream(FULL_CONFIG, height, width, card_gib, bytes_per_value=2, host=True)
    assert plan.cache_on_host is on_host


def test_half_precision_needs_half():
    full, half = plan_stream(CONFIG, 512, 512, 10.0), plan_stream(CONFIG, 512, 512, 10.0, bytes_per_value=2)
    assert half.expected_gib == pytest.approx(full.expected_gib / 2)


def test_a_budget_below_the_smallest_choice_says_what_is_needed():
    with pytest.raises(ValueError, match=r"budget of 0.01 GiB: .*512x512.* at least 0\.\d+ GiB"):
        plan_stream(CONFIG, 512, 512, 0.01)


def measured_bytes(direction: str, band_pixels: int | None, *frames: int) -> list[int]:
    """For each number of frames."""
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    arguments = (direction, str(band_pixels or 0), *map(str, frames))
    told = output_of("tests.model.vae.stream_peak", *arguments, environment=environment)
    return [int(line) for line in told.splitlines()]


@pytest.mark.slow
def test_a_stream_takes_what_the_plan_says_and_no_more_when_longer():
    for band_pixels in (None, 4096):
        expected = stream_values(CONFIG, SIZE, SIZE, SLICE_FRAMES, band_pixels) * 4
        short, long = measured_bytes("decode", band_pixels, 9, 25)
        assert 0.5 * expected <= short <= 1.1 * expected
        assert long <= 1.15 * short


@pytest.mark.slow
def test_encoding_a_longer_video_takes_no_more():
    short, long = measured_bytes("encode", None, 9, 33)
    assert long <= 1.15 * short
