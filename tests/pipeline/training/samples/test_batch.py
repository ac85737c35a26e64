import dataclasses

import torch

from pipeline.training.samples.batch import Batch, draw_generator


def fake_batch(shapes, target) -> Batch:
    return Batch(
        data=-target,
        noise=torch.zeros_like(target),
        condition=torch.zeros_like(target),
        text=torch.zeros(2, 4),
        pooled=torch.zeros(len(shapes), 4),
        video_shapes=shapes,
        text_lengths=[1] * len(shapes),
        timestep=torch.zeros(len(shapes)),
        sample_ids=["a"] * len(shapes),
        buckets=["b"] * len(shapes),
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
    one = torch.rand(4, generator=draw_generator(0, 2, "abc"))
    again = torch.rand(4, generator=draw_generator(0, 2, "abc"))
    assert torch.equal(one, again)
    for other in [(1, 2, "abc"), (0, 3, "abc"), (0, 2, "abd")]:
        assert not torch.equal(one, torch.rand(4, generator=draw_generator(*other)))


def test_a_batch_derives_input_and_target_from_what_it_carries():
    torch.manual_seed(0)
    shapes = [(1, 2, 2), (2, 4, 4)]
    batch = fake_batch(shapes, torch.randn(36, 16))
    batch.noise, batch.condition = torch.randn(36, 16), torch.randn(36, 16)
    batch.timestep = torch.tensor([1000.0, 250.0])
    assert torch.equal(batch.target, batch.noise - batch.data)
    assert torch.equal(batch.video[:4, :16], batch.noise[:4])
    torch.testing.assert_close(batch.video[4:, :16], 0.75 * batch.data[4:] + 0.25 * batch.noise[4:])
    assert torch.equal(batch.video[:, 16:32], batch.condition) and (batch.video[:, 32] == 1).all()


def test_batches_move_without_touching_the_target_dtype():
    batch = fake_batch([(1, 2, 2)], torch.randn(4, 16)).to(torch.device("cpu"), torch.bfloat16)
    assert batch.video.dtype == torch.bfloat16 and batch.target.dtype == torch.float32
    assert dataclasses.asdict(batch)["video_shapes"] == [(1, 2, 2)]
