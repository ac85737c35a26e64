"""The one-step stage: which samples it takes, and a loss on what the decoder makes of their estimate."""

import torch

from model.flow import MAX_TIME
from pipeline.training.objectives import one_step_loss
from pipeline.training.samples.batch import Batch, training_sample
from pipeline.training.samples.sample_order import ScheduledSample
from pipeline.weights import weights_folder
from tests.helpers.tiny_models import save_vae

SHAPES = [(1, 2, 2), (2, 4, 2)]
ROWS = 4 + 16


class Reader:
    """Latents and an empty prompt from memory."""

    def latents(self, row, epoch=0):
        torch.manual_seed(int(row["sample_id"]))
        return torch.randn(2, 4, 4, 16), torch.randn(2, 4, 4, 16)

    def prompt(self, clip_id, drops):
        return torch.zeros(1, 8), torch.zeros(4)


def sample(number: int, share: float) -> Batch:
    row = {"sample_id": str(number), "clip_id": "a", "bucket": "b", "video_tokens": 8}
    return training_sample(Reader(), ScheduledSample(row, 0), seed=0, one_step_share=share)


def test_a_share_of_the_samples_is_pure_noise_beside_a_clean_condition():
    taken = 0
    for number in range(200):
        usual, drawn = sample(number, 0.0), sample(number, 0.3)
        hq, lq = (latent.flatten(0, 2) for latent in Reader().latents({"sample_id": str(number)}))
        if drawn.timestep == MAX_TIME:
            taken += 1
            torch.testing.assert_close(drawn.video[:, :16] - drawn.target, hq)
            assert torch.equal(drawn.video[:, :16], drawn.noise) and torch.equal(drawn.noise, usual.noise)
            assert torch.equal(drawn.video[:, 16:32], lq) and (drawn.video[:, 32] == 1).all()
        else:
            assert torch.equal(drawn.video, usual.video)
            assert torch.equal(drawn.timestep, usual.timestep)
    assert 40 < taken < 80


def batch_at(times: list[float]) -> Batch:
    torch.manual_seed(0)
    data, noise, condition = (torch.randn(3, ROWS, 16) * 256).round() / 256  # noise - (noise - data) is data
    return Batch(
        data=data,
        noise=noise,
        condition=condition,
        text=torch.zeros(2, 4),
        pooled=torch.zeros(2, 4),
        video_shapes=SHAPES,
        text_lengths=[1, 1],
        timestep=torch.tensor(times),
        sample_ids=["a", "b"],
        buckets=["c", "c"],
    )


def test_the_pixel_loss_is_that_of_the_decoded_estimate_and_only_at_time_1000(tmp_path):
    config = one_step_loss.OneStepConfig(share=1.0, vae=save_vae(tmp_path / "vae"), pixel_weight=2.0)
    loss = one_step_loss.PixelLoss(config, torch.device("cpu"), torch.float32)
    batch = batch_at([MAX_TIME, 400.0])
    assert loss(batch, batch.target).tolist() == [0.0, 0.0]
    velocity = (batch.target + 0.5 * torch.randn_like(batch.target)).requires_grad_()
    found = loss(batch, velocity)
    vae = weights_folder.load_vae(config.vae or "")
    estimate, truth = (
        (batch.video[:4, :16] - rows[:4]).view(1, 2, 2, 16).permute(3, 0, 1, 2)[None]
        for rows in (velocity.detach(), batch.target)
    )
    with torch.no_grad():
        expected = (vae.decode(estimate, 1, 16, 16) - vae.decode(truth, 1, 16, 16)).abs().mean()
    torch.testing.assert_close(found.detach(), torch.tensor([2 * float(expected), 0.0]))
    found.sum().backward()
    assert velocity.grad is not None
    assert velocity.grad[:4].abs().sum() > 0 and velocity.grad[4:].abs().sum() == 0
