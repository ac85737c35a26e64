"""Rotary embedding inside windows."""

import torch

from model.dit import rotary
from model.dit.packing import LayerWindows, packing_plan
from model.dit.windows import fixed_windows


def layout_of(grid, window, text_length=4):
    layers = (LayerWindows(fixed_windows, window, False),)
    return packing_plan(layers, [grid], [text_length], torch.device("cpu")).layouts[0]


def test_scores_depend_on_relative_position_only():
    layout = layout_of((3, 5, 6), ("full", "full", "full"))
    rotation = rotary.window_rotation(layout, 64)
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 64).expand(2, 90, 64)
    q, k = (rotary.rotate(x[:, None], rotation)[:, 0] for x in (q, k))
    scores = (q @ k.T).reshape(3, 5, 6, 3, 5, 6)
    for dt, dh, dw in ((1, 0, 0), (0, 2, 0), (0, 0, 3), (1, 2, 3)):
        here = scores[: 3 - dt, : 5 - dh, : 6 - dw, : 3 - dt, : 5 - dh, : 6 - dw]
        moved = scores[dt:, dh:, dw:, dt:, dh:, dw:]
        assert torch.allclose(here, moved, atol=1e-4)
    for axis in range(3):  # and on every axis's position
        moved_key = scores[0, 0, 0].moveaxis(axis, 0).flatten(1)[:, 0]
        assert moved_key.std() > 0.1


def test_positions_start_again_in_each_window():
    layout = layout_of((2, 4, 4), (2, 2, 2))
    rotation = rotary.window_rotation(layout, 16).reshape(4, 8, 8)
    assert all(torch.equal(rotation[0], window) for window in rotation)


def test_every_channel_turns_and_lengths_stay():
    for head_dim in (8, 16, 20, 64):
        assert sum(rotary.split_head_channels(head_dim)) == head_dim
        rotation = rotary.window_rotation(layout_of((3, 4, 5), (3, 4, 5)), head_dim)
        assert ((rotation[-1] - 1).abs() > 0).all()
        x = torch.randn(60, 2, head_dim)
        assert torch.allclose(rotary.rotate(x, rotation).norm(dim=-1), x.norm(dim=-1), atol=1e-4)
    assert rotary.split_head_channels(64) == (16, 24, 24)


def test_turn_is_by_adjacent_pairs_in_the_order_t_h_w():
    layout = layout_of((2, 1, 1), (2, 1, 1))
    x = torch.zeros(2, 1, 64)
    x[:, :, 0] = 1.0
    turned = rotary.rotate(x, rotary.window_rotation(layout, 64))[1, 0]
    angle = torch.tensor(1.0)  # first frequency, t = 1
    assert torch.allclose(turned[:2], torch.stack([angle.cos(), angle.sin()])) and not turned[2:].any()


def test_low_precision_input_is_turned_in_fp32():
    layout = layout_of((5, 32, 32), (5, 32, 32))
    rotation = rotary.window_rotation(layout, 64)
    x = torch.randn(5 * 32 * 32, 1, 64)
    exact = rotary.rotate(x.bfloat16().float(), rotation)
    low = rotary.rotate(x.bfloat16(), rotation)
    assert low.dtype == torch.bfloat16 and torch.equal(low, exact.bfloat16())
