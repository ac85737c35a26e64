"""Plans fit their budget, prefer what shows least, and step down where memory ran out."""

import dataclasses

import pytest
import torch

from model.dit.swin_mmdit import SwinMMDiT
from model.vae.autoencoder import FULL_CONFIG, CausalVideoAutoencoder
from pipeline.restoration.memory_plan import (
    MemoryPlan,
    Models,
    plan_memory,
    plans,
    step_down,
)
from tests.helpers import tiny_models

FULL = Models(FULL_CONFIG, 2 * 250_648_227, 2 * 3_391_475_776, 6912, bytes_per_value=2, device="cuda")
"""The released 3B model in bfloat16."""


def ladder(height: int, width: int, models: Models = FULL) -> list[MemoryPlan]:
    return list(plans(models, (height, width), chunk_frames=21, overlap_frames=8, slice_frames=8))


@pytest.mark.parametrize("budget_gib", [78, 40, 24])
def test_a_plan_is_within_its_budget_and_spends_it(budget_gib):
    candidates = ladder(720, 1280)
    plan = plan_memory(candidates, budget_gib)
    assert plan.expected_gib <= budget_gib
    better = candidates[: candidates.index(plan)]
    assert all(one.expected_gib > budget_gib for one in better)


def test_more_memory_never_makes_shorter_chunks():
    candidates = ladder(1080, 1920)
    chosen = [plan_memory(candidates, gib).chunk_frames for gib in (10, 20, 30, 50, 80, 200)]
    assert chosen == sorted(chosen) and chosen[-1] == 21
    assert plan_memory(candidates, 200) == candidates[0] and not candidates[0].offload


def test_too_little_gives_the_smallest_and_every_plan_is_sound():
    candidates = ladder(1080, 1920)
    assert plan_memory(candidates, 0.1).expected_gib == min(one.expected_gib for one in candidates)
    for one in candidates:
        assert one.chunk_frames % 4 == 1 and 0 < one.overlap_frames < one.chunk_frames


def test_steps_down_help_the_part_that_ran_out():
    candidates = ladder(720, 1280)
    first = candidates[0]
    second = step_down(candidates, first, "transformer")
    assert second is not None and second.offload and second.chunk_frames == 21
    third = step_down(candidates, second, "transformer")
    assert third is not None and third.tails_on_host and third.chunk_frames == 21
    fourth = step_down(candidates, third, "transformer")
    assert fourth is not None and fourth.chunk_frames == 13
    needs = [one.expected_gib for one in (first, second, third)]
    assert needs == sorted(needs, reverse=True)
    banded = step_down(candidates, first, "decode")
    assert banded == dataclasses.replace(first, slice_frames=4, expected_gib=banded.expected_gib)
    steps, plan = 0, first
    while (following := step_down(candidates, plan, "decode")) is not None:
        moved = (following.offload, following.tails_on_host) != (plan.offload, plan.tails_on_host)
        assert following.expected_gib <= plan.expected_gib or moved
        plan, steps = following, steps + 1
    assert steps > 12 and plan.chunk_frames == 21 and plan.offload and plan.tails_on_host


def test_what_is_kept_on_the_host_is_said_and_only_where_there_is_one():
    on_host = next(one for one in ladder(1080, 1920) if one.tails_on_host)
    assert on_host.host_gib > 2 and "its memory of past frames on the host" in on_host.describe()
    assert f"{on_host.host_gib:.2f} GiB of the host's" in on_host.describe()
    on_cpu = ladder(1080, 1920, dataclasses.replace(FULL, device="cpu"))
    assert not any(one.tails_on_host or one.offload or one.host_gib for one in on_cpu)
    smallest = min(one.expected_gib for one in ladder(1080, 1920))
    assert smallest < min(one.expected_gib for one in ladder(1080, 1920) if not one.tails_on_host) - 1


def test_what_is_loaded_is_counted():
    models = Models.of(
        CausalVideoAutoencoder(tiny_models.VAE), SwinMMDiT(tiny_models.DIT), torch.device("cpu")
    )
    dit = SwinMMDiT(tiny_models.DIT)
    assert models.dit_bytes >= 4 * sum(parameter.numel() for parameter in dit.parameters())
    assert models.dit_hidden >= tiny_models.DIT.mlp_ratio * tiny_models.DIT.width
    small, large = (plan_memory(ladder(side, side, models), 100).expected_gib for side in (64, 256))
    assert large > 4 * small
