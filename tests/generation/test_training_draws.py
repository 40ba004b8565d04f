# SPDX-License-Identifier: Apache-2.0
"""What training draws: counts and masks."""

import math

import pytest
import torch

from common import seeded
from mar_hf.generation import (
    sample_mask,
    sample_num_masked,
    sample_tokens_per_step,
)


@pytest.mark.parametrize("num_tokens, maximum", [(1, 4), (16, 2), (16, 5), (64, 64), (5, 100)])
def test_drawn_counts_use_every_token_once(num_tokens, maximum):
    for seed in range(20):
        counts = sample_tokens_per_step(num_tokens, maximum, seeded(seed))
        assert all(type(count) is int and 1 <= count <= maximum for count in counts)
        assert sum(counts) == num_tokens


def test_drawn_counts_are_all_as_likely():
    generator = seeded()
    firsts = torch.tensor([sample_tokens_per_step(16, 4, generator)[0] for _ in range(2000)])
    # 500 each, with a deviation of 19.4
    assert (firsts.bincount(minlength=5)[1:] - 500).abs().max() < 4 * 19.4


def test_drawn_counts_follow_their_generator():
    before = torch.get_rng_state()
    first, second, other = (sample_tokens_per_step(64, 8, seeded(seed)) for seed in (1, 1, 2))
    assert first == second != other
    assert torch.equal(torch.get_rng_state(), before)


def test_one_token_a_step_is_not_drawn():
    generator, before = seeded(), seeded().get_state()
    assert sample_tokens_per_step(4, 1, generator) == [1, 1, 1, 1]
    assert torch.equal(generator.get_state(), before)


def test_no_token_a_step_is_refused():
    with pytest.raises(ValueError, match="`maximum` has to be at least 1, got 0"):
        sample_tokens_per_step(4, 0)


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
