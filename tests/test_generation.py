# SPDX-License-Identifier: Apache-2.0
"""Orders, schedules and masks: identities for all sizes, and numbers counted from the original's rules."""

import math

import pytest
import torch

from common import seeded
from mar_hf.generation import (
    GENERATION_ORDERS,
    GUIDANCE_SCHEDULES,
    HEAD_STEP_SCHEDULES,
    TOKEN_SCHEDULES,
    constant_guidance,
    constant_head_steps,
    constant_tokens_per_step,
    cosine_tokens_per_step,
    linear_guidance,
    linear_head_steps,
    look_up,
    random_order,
    raster_order,
    sample_mask,
    sample_num_masked,
)


# Orders


@pytest.mark.parametrize("name", GENERATION_ORDERS)
@pytest.mark.parametrize("num_tokens", [1, 16, 255])
def test_orders_are_permutations(name, num_tokens):
    order = GENERATION_ORDERS[name](num_tokens, generator=seeded())
    assert order.dtype == torch.int64 and order.device.type == "cpu"
    assert torch.equal(order.sort().values, torch.arange(num_tokens))


def test_random_orders_follow_their_generator():
    assert torch.equal(random_order(64, seeded(1)), random_order(64, seeded(1)))
    assert not torch.equal(random_order(64, seeded(1)), random_order(64, seeded(2)))
    generator = seeded(1)
    assert not torch.equal(random_order(64, generator), random_order(64, generator))


def test_random_orders_start_anywhere():
    generator = seeded()
    starts = torch.stack([random_order(4, generator) for _ in range(2000)])[:, 0].bincount(minlength=4)
    # 500 each, with a deviation of 19.4
    assert (starts - 500).abs().max() < 4 * 19.4


def test_raster_order():
    assert raster_order(6).tolist() == [0, 1, 2, 3, 4, 5]


# Tokens per step


@pytest.mark.parametrize("name", TOKEN_SCHEDULES)
@pytest.mark.parametrize("num_tokens", [1, 16, 64, 256])
def test_every_schedule_generates_every_token_once(name, num_tokens):
    for steps in range(1, num_tokens + 1):
        counts = TOKEN_SCHEDULES[name](num_tokens, steps)
        assert (len(counts), sum(counts)) == (steps, num_tokens)
        assert min(counts) >= 1


def test_cosine_schedule_of_the_original():
    def counts(steps):
        return cosine_tokens_per_step(256, steps)

    assert counts(8) == [5, 15, 24, 31, 39, 45, 48, 49]
    assert counts(64)[:13] == [1] * 13 and counts(64)[13] > 1
    assert counts(64)[-1] in (6, 7) and max(counts(64)) == 7
    assert (max(counts(32)), max(counts(16))) == (13, 25)
    assert counts(256) == [1] * 256
    assert counts(1) == [256]


@pytest.mark.parametrize("num_tokens", [16, 64, 256])
def test_cosine_schedule_follows_the_cosine(num_tokens):
    # Far from both ends the tokens left are floor(L cos(pi/2 (k+1)/K)) exactly.
    left = num_tokens
    for step, count in enumerate(cosine_tokens_per_step(num_tokens, 8)[:-1]):
        left -= count
        assert left == min(math.floor(num_tokens * math.cos(math.pi / 2 * (step + 1) / 8)), num_tokens - step - 1)


def test_constant_schedule():
    assert constant_tokens_per_step(16, 4) == [4, 4, 4, 4]
    assert constant_tokens_per_step(16, 5) == [3, 3, 3, 3, 4]
    for steps in range(1, 65):
        counts = constant_tokens_per_step(64, steps)
        assert max(counts) - min(counts) <= 1


# Guidance


def test_linear_guidance_ends_just_below_its_scale():
    scales = linear_guidance(3.0, cosine_tokens_per_step(256, 64))
    assert scales[0] == 1 + 2 * 1 / 256
    assert scales[-1] == 1 + 2 * 255 / 256
    assert scales[-1] == pytest.approx(2.992, abs=5e-4)
    assert all(a < b for a, b in zip(scales, scales[1:], strict=False))


def test_linear_guidance_grows_with_the_tokens_that_are_there():
    assert linear_guidance(5.0, [2, 2, 4]) == [2.0, 3.0, 1 + 4 * 7 / 8]
    assert linear_guidance(5.0, [8]) == [1 + 4 * 7 / 8]


@pytest.mark.parametrize("name", GUIDANCE_SCHEDULES)
def test_no_guidance_stays_no_guidance(name):
    assert GUIDANCE_SCHEDULES[name](1.0, [1, 2, 5]) == [1.0] * 3


def test_constant_guidance():
    assert constant_guidance(4, [1, 2, 5]) == [4.0, 4.0, 4.0]


# Head steps


def test_annealing_counts_of_disa():
    steps = linear_head_steps(50, 64)
    assert (steps[0], steps[-1], sum(steps), len(steps)) == (50, 5, 1733, 64)
    assert all(a >= b for a, b in zip(steps, steps[1:], strict=False))
    # What the head evaluates, against 100 steps throughout
    counts = cosine_tokens_per_step(256, 64)
    assert sum(n * s for n, s in zip(counts, steps, strict=True)) == 5372
    assert sum(n * s for n, s in zip(counts, constant_head_steps(100, 64), strict=True)) == 25600


@pytest.mark.parametrize("name", HEAD_STEP_SCHEDULES)
@pytest.mark.parametrize("head_steps", [1, 3, 5, 50])
@pytest.mark.parametrize("steps", [1, 2, 17])
def test_head_steps_start_as_asked_and_never_vanish(name, head_steps, steps):
    counts = HEAD_STEP_SCHEDULES[name](head_steps, steps)
    assert len(counts) == steps and counts[0] == head_steps
    assert all(1 <= count <= head_steps for count in counts)


def test_annealing_ends_where_asked():
    assert linear_head_steps(20, 5, last=4) == [20, 16, 12, 8, 4]


# Training masks


def test_masks_have_equal_counts_and_different_places():
    mask = sample_mask(8, 256, 200, seeded())
    assert mask.dtype == torch.bool and mask.shape == (8, 256)
    assert mask.sum(1).tolist() == [200] * 8
    assert len({tuple(row.tolist()) for row in mask}) == 8


def test_masking_ratios_follow_the_truncated_normal():
    generator, draws = seeded(), 1500
    counts = torch.tensor([sample_num_masked(256, generator=generator) for _ in range(draws)])
    assert counts.min() >= math.ceil(0.7 * 256) and counts.max() == 256
    # The mean ratio is 0.867, half a token more by rounding up; its deviation over 1500 draws is 0.0021.
    assert (counts / 256).mean().item() == pytest.approx(0.867 + 0.5 / 256, abs=4 * 0.0021)
    # P(ratio > 255/256) = 1.62 %: 24 draws, with a deviation of 4.9
    assert (counts == 256).sum().item() == pytest.approx(0.0162 * draws, abs=4 * 4.9)
    # Half of the ratios lie below mean + deviation * Phi^-1((Phi(-1.2) + Phi(0)) / 2) = 0.874.
    assert (counts <= 0.874 * 256).float().mean().item() == pytest.approx(0.5, abs=4 * 0.013)


def test_every_position_is_masked_alike():
    generator = seeded()
    share = sample_mask(4000, 16, 12, generator).float().mean(0)
    # Each position is masked in 3/4 of the rows, with a deviation of 0.0068.
    assert (share - 0.75).abs().max() < 4 * 0.0068


def test_masks_follow_their_generator_and_leave_the_global_one_alone():
    before = torch.get_rng_state()
    first, second, other = (sample_mask(4, 64, 50, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_masking_ratios():
    assert sample_num_masked(16, ratio_min=1.0, generator=seeded()) == 16
    generator = seeded()
    counts = [sample_num_masked(100, 0.2, 0.5, 0.01, generator) for _ in range(50)]
    assert 45 <= min(counts) and max(counts) <= 55


def test_each_picture_s_mask_follows_its_own_generator():
    mask = sample_mask(3, 64, 50, [seeded(image) for image in range(3)])
    for image in range(3):
        assert torch.equal(mask[image : image + 1], sample_mask(1, 64, 50, seeded(image)))
    assert not torch.equal(mask[0], mask[1])


def test_all_or_nothing_masked():
    assert sample_mask(2, 4, 4).all() and not sample_mask(2, 4, 0).any()


@pytest.mark.parametrize(
    "num_masked, generator, message",
    [
        (5, None, r"`num_masked` has to be in 0\.\.4, got 5"),
        (-1, None, r"`num_masked` has to be in 0\.\.4, got -1"),
        (2, [torch.Generator()], r"`generator` has to hold one generator per image \(2\), got 1"),
    ],
)
def test_wrong_arguments_for_masks(num_masked, generator, message):
    with pytest.raises(ValueError, match=message):
        sample_mask(2, 4, num_masked, generator)


# Tables


@pytest.mark.parametrize("table", [GENERATION_ORDERS, TOKEN_SCHEDULES, GUIDANCE_SCHEDULES, HEAD_STEP_SCHEDULES])
def test_tables_name_what_they_have(table):
    for name, entry in table.items():
        assert look_up(table, name, "argument") is entry
    with pytest.raises(ValueError) as error:
        look_up(table, "spiral", "generation_order")
    assert str(error.value) == f"`generation_order` has to be one of {sorted(table)}, got 'spiral'."
