"""The memory plan: fits its budget, prefers what is faster, and the estimate covers what a stream takes."""

import subprocess
import sys
from pathlib import Path

import pytest

from model.vae import AutoencoderConfig
from model.vae.budget import CHOICES, plan_stream, stream_values

CONFIG = AutoencoderConfig(
    widths=(16, 32, 64, 64),
    latent_channels=16,
    norm_groups=8,
    encoder_layers=1,
    decoder_layers=1,
    time_halvings=2,
    latent_scale=0.9152,
    latent_shift=0.0,
)


def needed_gib(choice: tuple[int, int | None]) -> float:
    return stream_values(CONFIG, 512, 512, *choice) * 4 / 2**30


def test_each_choice_needs_less_than_the_one_before():
    needs = [needed_gib(choice) for choice in CHOICES]
    assert needs == sorted(needs, reverse=True)
    assert needs[-1] < 0.5 * needs[0]


def test_the_plan_is_the_fastest_that_fits():
    for budget_gib in (10.0, 1.0, needed_gib(CHOICES[4]) + 1e-6):
        plan = plan_stream(CONFIG, 512, 512, budget_gib)
        assert plan.expected_gib <= budget_gib
        chosen = CHOICES.index((plan.slice_frames, plan.band_pixels))
        assert all(needed_gib(faster) > budget_gib for faster in CHOICES[:chosen])


def test_half_precision_needs_half():
    full, half = plan_stream(CONFIG, 512, 512, 10.0), plan_stream(CONFIG, 512, 512, 10.0, bytes_per_value=2)
    assert half.expected_gib == pytest.approx(full.expected_gib / 2)


def test_a_budget_below_the_smallest_choice_says_what_is_needed():
    with pytest.raises(ValueError, match=r"budget of 0.01 GiB: .*512x512.* at least 0\.\d+ GiB"):
        plan_stream(CONFIG, 512, 512, 0.01)


MEASURE = """
import sys, threading, time
import torch
sys.path.insert(0, {root!r})
from model.vae import AutoencoderConfig, CausalVideoAutoencoder

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

torch.set_grad_enabled(False)
torch.set_num_threads(1)
vae, size, plan = CausalVideoAutoencoder({config!r}), 256, dict(slice_frames=4, band_pixels={band_pixels})
latents = lambda frames, size: (torch.randn(1, 16, 1, size // 8, size // 8) for _ in range(frames // 4 + 1))
list(vae.decode_stream(latents(5, 64), 5, 64, 64, **plan))
start, peak, done = resident(), [0], threading.Event()

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], resident())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
for _ in vae.decode_stream(latents({frames}, size), {frames}, size, size, **plan):
    pass
done.set()
watcher.join()
print(peak[0] - start)
"""


def measured_bytes(frames: int, band_pixels: int | None) -> int:
    root = str(Path(__file__).parents[2])
    script = MEASURE.format(root=root, config=CONFIG, band_pixels=band_pixels, frames=frames)
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_stream_takes_what_the_plan_says_and_no_more_when_longer():
    for band_pixels in (None, 4096):
        expected = stream_values(CONFIG, 256, 256, 4, band_pixels) * 4
        short, long = measured_bytes(9, band_pixels), measured_bytes(33, band_pixels)
        assert 0.5 * expected <= short <= 1.1 * expected
        assert long <= 1.15 * short
