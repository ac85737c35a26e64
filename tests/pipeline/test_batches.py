import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import batches, schema

SIZES = [(1, 64, 64), (5, 64, 64), (9, 96, 96), (13, 128, 128)]


def index(count: int) -> list[dict]:
    return [
        {
            "sample_id": schema.stable_id(i),
            "bucket": "x".join(map(str, SIZES[i % 4])),
            "video_tokens": schema.video_tokens(*SIZES[i % 4]),
        }
        for i in range(count)
    ]


def take(stream, steps, packs_per_step=4, budget=600, position=0):
    taken = []
    for _ in range(steps):
        packs, position = batches.pack_step(stream, position, packs_per_step, budget)
        taken.append(packs)
    return taken, position


def test_every_sample_comes_once_in_each_epoch_and_nothing_is_dropped():
    rows = index(37)
    stream = batches.SampleStream(rows, seed=3)
    steps, position = take(stream, 12)
    drawn = sorted(
        ((one.epoch, one.row["sample_id"]) for packs in steps for pack in packs for one in pack),
    )
    assert len(drawn) == position
    for epoch in range(position // len(rows)):
        assert sorted(i for e, i in drawn if e == epoch) == sorted(row["sample_id"] for row in rows)
    assert len(set(drawn)) == len(drawn)


def test_epochs_and_seeds_give_other_orders():
    rows = index(50)
    stream = batches.SampleStream(rows, seed=3)
    first = [stream[i].row["sample_id"] for i in range(50)]
    second = [stream[50 + i].row["sample_id"] for i in range(50)]
    other = batches.SampleStream(rows, seed=4)
    assert first != second
    assert first != [other[i].row["sample_id"] for i in range(50)]


def test_resuming_at_a_step_gives_the_steps_that_would_have_followed():
    rows = index(41)
    undisturbed, _ = take(batches.SampleStream(rows, seed=1), 10)
    _, position = take(batches.SampleStream(rows, seed=1), 4)
    resumed, _ = take(batches.SampleStream(list(reversed(rows)), seed=1), 6, position=position)
    assert resumed == undisturbed[4:]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 6), st.integers(256, 2000), st.integers(0, 9))
def test_packs_are_never_empty_nor_above_the_budget(count, packs, budget, seed):
    steps, _ = take(batches.SampleStream(index(count), seed), 5, packs, budget)
    for step in steps:
        loads = [sum(one.tokens for one in pack) for pack in step]
        assert min(loads) > 0 and max(loads) <= budget
        assert max(loads) - min(loads) <= max(one.tokens for pack in step for one in pack)


def test_a_budget_below_the_largest_sample_is_one_clear_error():
    with pytest.raises(ValueError, match=r"stages\.big: tokens_per_pack is 100.*13x128x128.*256 tokens"):
        batches.check_budget(index(8), 100, "big")


def fake_batch(shapes, target) -> batches.Batch:
    rows = sum(t * h * w for t, h, w in shapes)
    return batches.Batch(
        video=torch.zeros(rows, 33),
        target=target,
        text=torch.zeros(2, 4),
        pooled=torch.zeros(len(shapes), 4),
        video_shapes=shapes,
        text_lengths=[1] * len(shapes),
        timestep=torch.zeros(len(shapes)),
        sample_ids=["a"] * len(shapes),
    )


def test_the_loss_of_a_step_is_the_mean_over_its_samples_however_they_are_packed():
    torch.manual_seed(0)
    shapes = [(1, 2, 2), (2, 4, 4), (1, 4, 2)]
    targets = [torch.randn(t * h * w, 16) for t, h, w in shapes]
    whole = fake_batch(shapes, torch.cat(targets)).sample_losses(torch.zeros(44, 16))
    expected = torch.stack([target.square().mean() for target in targets])
    torch.testing.assert_close(whole, expected)
    first = fake_batch(shapes[:1], targets[0]).sample_losses(torch.zeros(4, 16))
    rest = fake_batch(shapes[1:], torch.cat(targets[1:])).sample_losses(torch.zeros(40, 16))
    packs, samples = 2, 3
    scaled = [losses.sum() * packs / samples for losses in (first, rest)]
    torch.testing.assert_close(sum(scaled) / packs, expected.mean())


def test_a_samples_draws_do_not_depend_on_its_place():
    one = torch.rand(4, generator=batches.draw_generator(0, 2, "abc"))
    again = torch.rand(4, generator=batches.draw_generator(0, 2, "abc"))
    assert torch.equal(one, again)
    for other in [(1, 2, "abc"), (0, 3, "abc"), (0, 2, "abd")]:
        assert not torch.equal(one, torch.rand(4, generator=batches.draw_generator(*other)))


def test_batches_move_without_touching_the_target_dtype():
    batch = fake_batch([(1, 2, 2)], torch.randn(4, 16)).to(torch.device("cpu"), torch.bfloat16)
    assert batch.video.dtype == torch.bfloat16 and batch.target.dtype == torch.float32
    assert dataclasses.asdict(batch)["video_shapes"] == [(1, 2, 2)]
