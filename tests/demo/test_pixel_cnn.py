"""The small network on pixels that the table compares with."""

import numpy as np
import torch
from safetensors.torch import save_file

from demo import pixel_cnn
from pipeline.evaluation import synthetic_pairs
from pipeline.video import decoding
from pipeline.weights.weights_folder import WEIGHTS_FILE


def noisy_pairs(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Smooth pictures and the same with noise."""
    draw = np.random.default_rng(0)
    made = []
    for _ in range(count):
        ramp = np.linspace(40, 200, 48)[None, :, None, None] + np.linspace(-30, 30, 40)[None, None, :, None]
        truth = np.broadcast_to(ramp + draw.normal(0, 10, 3), (4, 48, 40, 3))
        noisy = truth + draw.normal(0, 20, truth.shape)
        made.append((truth.clip(0, 255).astype(np.uint8), noisy.clip(0, 255).astype(np.uint8)))
    return made


def test_an_untrained_network_gives_back_what_it_got_at_any_size():
    frames = np.random.default_rng(0).integers(0, 256, (5, 17, 23, 3), dtype=np.uint8)
    for count in (1, 2, 5):
        restored = list(pixel_cnn.restored(pixel_cnn.PixelCNN(), frames[:count]))
        assert np.array_equal(np.stack(restored), frames[:count])


def test_each_frame_is_corrected_with_its_neighbours():
    network = pixel_cnn.PixelCNN()
    seen = []
    network.forward = lambda frames: seen.append(frames[0, :, 0, 0, 0]) or frames[:, 1]  # type: ignore[method-assign]
    frames = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (0, 51, 102)])
    list(pixel_cnn.restored(network, frames))
    assert torch.allclose(torch.stack(seen) * 5, torch.tensor([[0.0, 0, 1], [0, 1, 2], [1, 2, 2]]))


def test_training_takes_noise_away_and_its_weights_restore_a_folder(tmp_path):
    pairs_made = noisy_pairs(4)
    network, history = pixel_cnn.train(pairs_made, lambda step: step / 300, rate=1e-3, side=24, batch=2)
    assert history[0] > 1.4 * np.mean(history[-5:])
    save_file(network.state_dict(), tmp_path / WEIGHTS_FILE)

    truth, noisy = noisy_pairs(5)[-1]
    (tmp_path / "lq").mkdir()
    synthetic_pairs.write_lossless(f"file://{tmp_path}/lq/clip.mkv", noisy, 25.0, is_image=False)
    pixel_cnn.restore_folder(f"file://{tmp_path}", tmp_path / "lq", tmp_path / "out")
    restored = np.stack(list(decoding.decode_frames(str(tmp_path / "out" / "clip.mkv"))))
    error = [np.abs(frames.astype(float) - truth).mean() for frames in (noisy, restored)]
    assert error[1] < 0.8 * error[0]
