"""Times, path, guidance and sampler, against the released code's own numbers where it has them."""

import json
from pathlib import Path

import pytest
import torch

from model import flow

CASE = json.loads((Path(__file__).parents[1] / "data/parity/sampler_a.json").read_text())


def close(ours, recorded) -> bool:
    ours, recorded = torch.as_tensor(ours).double().flatten(), torch.as_tensor(recorded).double().flatten()
    return bool(((ours - recorded).abs() <= 1e-5 * recorded.abs().clamp(min=1)).all())


def toy_velocity(x, t):
    return 0.5 * torch.sin(2 * x) + 0.3 * torch.cos(3 * t / 1000) - 0.1 * x


class TestReleasedNumbers:
    @pytest.mark.parametrize("run", CASE["runs"], ids=lambda run: f"{run['steps']}-{run['shift']}")
    def test_sampler(self, run):
        called = []

        def velocity(x, t):
            called.append(t.item())
            return toy_velocity(x, t)

        times = flow.sampling_times(run["steps"], run["shift"])
        out = flow.sample(velocity, torch.linspace(-2, 2, 24).reshape(6, 4), times)
        assert close(times, run["timesteps"])
        assert close(called, run["called_t"])
        assert close(out, run["out"])

    def test_steps_that_arange_gets_wrong(self):
        for steps in map(int, CASE["steps_whose_schedule_has_not_N_entries"]):
            times = flow.sampling_times(steps)
            assert len(times) == steps and times[0] == 1000 and times[-1] > 0

    def test_guidance(self):
        cfg = CASE["cfg"]
        positive, negative = (torch.tensor(cfg[name]).reshape(cfg["shape"]) for name in ("pos", "neg"))
        for case in cfg["cases"]:
            out = flow.guided_velocity(
                lambda x, t: positive, lambda x, t: negative, case["scale"], case["rescale"]
            )(positive, torch.tensor(500.0))
            assert close(out, case["out"]), (case["scale"], case["rescale"])

    def test_path(self):
        case = CASE["schedule"]
        data, noise = (torch.tensor(case[name]).reshape(case["shape"]) for name in ("x_0", "x_T"))
        time = torch.tensor(case["t"])[:, None]
        x, v = flow.interpolate(data, noise, time), flow.velocity(data, noise)
        assert close(x, case["x_t"]) and close(v, case["v_lerp_target"])
        assert close(flow.data_from_velocity(x, v, time), case["back_x_0"])
        assert close(flow.noise_from_velocity(x, v, time), case["back_x_T"])

    def test_time_shift(self):
        for shape, time, shifted in CASE["timestep_transform"]["rows"]:
            assert close(flow.shift_time(torch.tensor(time), flow.time_shift_factor(shape)), shifted), shape

    def test_condition_noise(self):
        case = CASE["condition_noise"]
        shape = case["latent_shape_T_H_W_C"]
        latent, noise = (torch.tensor(case[name]).reshape(-1, 16) for name in ("latent", "aug_noise"))
        for row in case["rows"]:
            time = flow.condition_time(1000 * row["cond_noise_scale"], shape[:3], released_quirk=True)
            assert close(time, row["t_after_transform"])
            noisy_condition = flow.interpolate(latent, noise, torch.tensor(time))
            assert close(flow.network_input(latent, noisy_condition)[:, 16:], row["cond"])
        for shape, quirk, intended in case["quirk_table"]["rows"]:
            assert close(flow.condition_time(100.0, shape[:3], released_quirk=True), quirk)
            assert close(flow.condition_time(100.0, shape[:3], released_quirk=False), intended)


class TestTraining:
    shapes = [(1, 90, 160), (6, 90, 160)]  # noqa: RUF012

    def test_times_are_logit_normal_and_shifted_by_size(self):
        small = flow.training_times([(1, 32, 32)] * 4000, torch.Generator().manual_seed(1))
        logits = torch.logit(small / 1000)  # 256 x 256 is where the shift is none
        assert abs(logits.mean()) < 0.06 and abs(logits.std() - 1) < 0.06
        large = flow.training_times([(1, 128, 128)] * 4000, torch.Generator().manual_seed(1))
        assert torch.allclose(large, flow.shift_time(small, 3.2), atol=1e-2)

    def test_condition_times_stay_in_the_early_steps(self):
        times = flow.training_condition_times([(1, 32, 32)] * 4000, torch.Generator().manual_seed(1))
        assert 0 <= times.min() < 2 and 248 < times.max() <= 250 and abs(times.mean() - 125) < 5

    def test_batch_is_on_the_path_and_keeps_the_condition(self):
        """The LQ latent is in every input, of every sample, at any time: it is never dropped."""
        generator = torch.Generator().manual_seed(3)
        shapes = [(1, 4, 4), (2, 4, 6)] * 50
        rows = [t * h * w for t, h, w in shapes]
        hq, lq = torch.randn(sum(rows), 16), torch.randn(sum(rows), 16)
        draws = flow.draw_training(lq, shapes, generator)
        time = flow.spread(draws.time, rows)
        noisy, target = flow.interpolate(hq, draws.noise, time), flow.velocity(hq, draws.noise)
        video = flow.network_input(noisy, draws.condition)
        assert video.shape == (sum(rows), 33) and draws.time.shape == (100,)
        assert torch.allclose(flow.data_from_velocity(video[:, :16], target, time), hq, atol=1e-4)
        assert (video[:, 32] == 1).all()
        for sample, truth in zip(video[:, 16:32].split(rows), lq.split(rows), strict=True):
            assert torch.corrcoef(torch.stack([sample.flatten(), truth.flatten()]))[0, 1] > 0.9
        assert (draws.condition_time > 0).all() and draws.condition_time.max() < 251

    def test_condition_noise_and_target_noise_are_independent(self):
        hq = lq = torch.zeros(4096, 16)
        draws = flow.draw_training(lq, [(1, 64, 64)], torch.Generator().manual_seed(0))
        pair = torch.stack([flow.velocity(hq, draws.noise).flatten(), draws.condition.flatten()])
        assert abs(torch.corrcoef(pair)[0, 1]) < 0.02

    def test_same_generator_same_draws(self):
        lq = torch.randn(32, 16)
        a, b, c = (
            flow.draw_training(lq, [(2, 4, 4)], torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
        )
        assert torch.equal(a.noise, b.noise) and torch.equal(a.condition, b.condition)
        assert torch.equal(a.time, b.time)
        assert not torch.equal(a.noise, c.noise) and not torch.equal(a.condition, c.condition)


def test_exact_velocity_gives_back_the_data_in_one_step_or_many():
    data, noise = torch.randn(2, 10, 16)
    for steps, shift in ((1, 1.0), (7, 1.0), (20, 3.0)):
        out = flow.sample(lambda x, t: noise - data, noise, flow.sampling_times(steps, shift))
        assert torch.allclose(out, data, atol=1e-5)


def test_no_steps_is_refused():
    with pytest.raises(ValueError, match="at least 1 step"):
        flow.sampling_times(0)
