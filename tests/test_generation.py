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
    guidance_within,
    linear_guidance,
    linear_head_steps,
    look_up,
    nearest_order,
    random_annealed_order,
    random_order,
    random_ratio,
    sample_mask,
    sample_num_masked,
    sample_tokens_per_step,
    settings_for_budget,
    spiral_order,
    subsampled_order,
    zigzag_order,
)


# Orders

SIZES = [(1, 1), (1, 7), (7, 1), (3, 5), (4, 4), (16, 16)]
SMALL_GRIDS = [(height, width) for height in range(1, 6) for width in range(1, 6)]
RANDOM = ["random", "nearest"]


def when_generated(order, height, width):
    """The rank of every position, as a grid."""
    return order.argsort().view(height, width).tolist()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", GENERATION_ORDERS)
def test_orders_are_permutations(name, size):
    for progress in (0.0, 1.0):
        order = GENERATION_ORDERS[name](*size, generator=seeded(), progress=progress)
        assert order.dtype == torch.int64 and order.device.type == "cpu"
        assert torch.equal(order.sort().values, torch.arange(size[0] * size[1]))


@pytest.mark.parametrize(
    "name, grid",
    [
        ("raster", [[0, 1, 2], [3, 4, 5]]),
        ("zigzag", [[0, 1, 2], [5, 4, 3], [6, 7, 8], [11, 10, 9]]),
        ("zigzag", [[0], [1], [2]]),
        ("spiral", [[1, 2], [0, 3]]),
        ("spiral", [[8, 1, 2], [7, 0, 3], [6, 5, 4]]),
        ("spiral", [[9, 10, 11, 12], [8, 1, 2, 13], [7, 0, 3, 14], [6, 5, 4, 15]]),
        ("spiral", [[14, 8, 1, 2, 9], [13, 7, 0, 3, 10], [12, 6, 5, 4, 11]]),
        ("spiral", [[8, 1, 2, 9], [7, 0, 3, 10], [6, 5, 4, 11]]),
        ("spiral", [[6, 4, 2, 0, 1, 3, 5]]),
        ("spiral", [[3], [1], [0], [2]]),
        ("checkerboard", [[0, 5, 1], [6, 2, 7], [3, 8, 4]]),
        ("checkerboard", [[0, 4, 1, 5], [6, 2, 7, 3]]),
        ("checkerboard", [[0, 3, 1, 4, 2]]),
        ("subsampled", [[0, 4, 1, 5], [6, 7, 8, 9], [2, 10, 3, 11], [12, 13, 14, 15]]),
        ("subsampled", [[0, 6, 2, 7, 1], [8, 9, 10, 11, 12], [3, 13, 4, 14, 5]]),
        ("subsampled", [[0, 4, 2, 5, 1, 6, 3]]),
    ],
)
def test_orders_on_small_grids(name, grid):
    height, width = len(grid), len(grid[0])
    generator, before = seeded(), seeded().get_state()
    assert when_generated(GENERATION_ORDERS[name](height, width, generator), height, width) == grid
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("height, width", SMALL_GRIDS)
def test_spirals_start_in_the_centre(height, width):
    row, column = divmod(spiral_order(height, width)[0].item(), width)
    assert abs(2 * row - (height - 1)) <= 1 and abs(2 * column - (width - 1)) <= 1


@pytest.mark.parametrize("order, sizes", [(spiral_order, [(n, n) for n in range(1, 9)]), (zigzag_order, SIZES)])
def test_paths_have_no_jumps(order, sizes):
    for height, width in sizes:
        positions = order(height, width)
        rows, columns = positions // width, positions % width
        assert (rows.diff().abs() + columns.diff().abs() == 1).all()


def test_subsampled_grids_are_twice_as_fine_each_time():
    order = subsampled_order(16, 16)
    for stride in (16, 8, 4, 2, 1):
        grid = torch.arange(256).view(16, 16)[::stride, ::stride].flatten()
        assert torch.equal(order[: len(grid)].sort().values, grid)


def test_the_random_order_is_the_permutation_of_torch():
    # Results that are saved somewhere depend on it.
    assert torch.equal(random_order(4, 16, seeded(1)), torch.randperm(64, generator=seeded(1)))


@pytest.mark.parametrize("name", RANDOM)
def test_random_orders_follow_their_generator(name):
    order, before = GENERATION_ORDERS[name], torch.get_rng_state()
    assert torch.equal(order(8, 8, seeded(1)), order(8, 8, seeded(1)))
    assert not torch.equal(order(8, 8, seeded(1)), order(8, 8, seeded(2)))
    generator = seeded(1)
    assert not torch.equal(order(8, 8, generator), order(8, 8, generator))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", RANDOM)
def test_random_orders_without_a_generator_follow_the_global_one(name):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        found = GENERATION_ORDERS[name](4, 4)
    assert torch.equal(found, GENERATION_ORDERS[name](4, 4, seeded(1)))


@pytest.mark.parametrize("name", RANDOM)
def test_random_orders_start_anywhere(name):
    generator = seeded()
    starts = torch.stack([GENERATION_ORDERS[name](2, 2, generator) for _ in range(2000)])[:, 0].bincount(minlength=4)
    # 500 each, with a deviation of 19.4
    assert (starts - 500).abs().max() < 4 * 19.4


@pytest.mark.parametrize("height, width", SIZES)
def test_nearest_grows_from_its_start(height, width):
    for seed in range(5):
        order = nearest_order(height, width, seeded(seed))
        rows, columns = order // width, order % width
        distance = (rows[:, None] - rows).abs() + (columns[:, None] - columns).abs()
        for later in range(1, len(order)):
            assert distance[later, :later].min() == 1
        assert (distance[0].diff() >= 0).all()


def test_nearest_breaks_ties_at_random():
    generator = seeded()
    orders = torch.stack([nearest_order(2, 2, generator) for _ in range(2000)])
    # From each of the four starts to one of two neighbours: 250 each, with a deviation of 14.8
    pairs = (orders[:, 0] * 4 + orders[:, 1]).unique(return_counts=True)[1]
    assert len(pairs) == 8 and (pairs - 250).abs().max() < 4 * 14.8


def test_share_of_random_orders():
    assert [random_ratio(progress) for progress in (0.0, 0.5, 0.625, 0.75, 1.0)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert [random_ratio(progress, 0.0, 1.0) for progress in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]
    # From one to the other at once; and raster all the time
    assert [random_ratio(progress, 0.5, 0.5) for progress in (0.0, 0.49, 0.5, 1.0)] == [1.0, 1.0, 0.0, 0.0]
    assert [random_ratio(progress, 0.0, 0.0) for progress in (0.0, 1.0)] == [0.0, 0.0]


@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_annealed_orders_are_random_at_first(progress):
    for seed in range(20):
        assert torch.equal(random_annealed_order(3, 5, seeded(seed), progress), random_order(3, 5, seeded(seed)))


@pytest.mark.parametrize("settings", [{"progress": 0.75}, {"progress": 1.0}, {}])
def test_annealed_orders_are_raster_at_last(settings):
    generator, before = seeded(), seeded().get_state()
    for _ in range(20):
        assert torch.equal(random_annealed_order(3, 5, generator, **settings), torch.arange(15))
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("progress, share", [(0.5625, 0.75), (0.625, 0.5), (0.6875, 0.25)])
def test_annealed_orders_change_gradually(progress, share):
    generator, raster, draws = seeded(), torch.arange(16), 400
    orders = [random_annealed_order(4, 4, generator, progress) for _ in range(draws)]
    found = sum(not torch.equal(order, raster) for order in orders) / draws
    # A share of 400 has a deviation of at most 0.025.
    assert found == pytest.approx(share, abs=4 * 0.025)


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


def test_guidance_within_an_interval():
    scales = [float(step + 2) for step in range(10)]
    assert guidance_within(scales) == scales
    assert guidance_within(scales, (0.3, 0.7)) == [1.0] * 3 + scales[3:7] + [1.0] * 3
    assert guidance_within(scales, [0, 0.01]) == [2.0] + [1.0] * 9
    # Shares as people write them fall on the steps that they mean.
    for step in range(100):
        assert guidance_within([2.0] * 100, (step / 100, 1)).count(1.0) == step


# Settings for a budget

CURVE = [
    {"name": "default", "seconds": 4.0, "distance": 10.0},
    {"name": "half", "seconds": 2.0, "distance": 10.5},
    {"name": "other", "seconds": 2.5, "distance": 12.0},
    {"name": "quarter", "seconds": 1.0, "distance": 10.6},
    {"name": "tenth", "seconds": 0.4, "distance": 30.0},
]


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"max_seconds": 9.0}, "default"),
        ({"max_seconds": 4.0}, "default"),
        ({"max_seconds": 3.0}, "half"),
        ({"max_seconds": 1.9}, "quarter"),
        ({"max_seconds": 0.5}, "tenth"),
        ({"max_seconds": 9.0, "tolerance": 0.5}, "half"),
        ({"max_seconds": 9.0, "tolerance": 1.0}, "quarter"),
        ({"max_seconds": 0.9, "tolerance": 1.0}, "tenth"),
        # A machine that is twice as fast.
        ({"max_seconds": 2.0, "seconds_here": 2.0}, "default"),
        ({"max_seconds": 1.9, "seconds_here": 2.0}, "half"),
    ],
)
def test_a_budget_buys_the_best_setting_that_it_can_pay(settings, name):
    before = [dict(point) for point in CURVE]
    assert settings_for_budget(CURVE, **settings) is next(point for point in CURVE if point["name"] == name)
    assert CURVE == before


def test_of_equal_settings_the_faster_and_of_equally_fast_ones_the_better_is_taken():
    equal = [{"seconds": 2.0, "distance": 5.0}, {"seconds": 1.0, "distance": 5.0}, {"seconds": 1.0, "distance": 4.5}]
    assert settings_for_budget(equal[:2], 3.0) is equal[1]
    assert settings_for_budget(equal, 3.0, tolerance=1.0) is equal[2]


def test_budgets_that_buy_nothing():
    with pytest.raises(ValueError, match=r"`max_seconds` has to be at least 0\.4.*got 0\.3"):
        settings_for_budget(CURVE, 0.3)
    with pytest.raises(ValueError, match=r"`max_seconds` has to be at least 4, .*got 3"):
        settings_for_budget(CURVE, 3, seconds_here=40.0)
    with pytest.raises(ValueError, match="`points` is empty"):
        settings_for_budget([], 1.0)


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
        look_up(table, "hilbert", "generation_order")
    assert str(error.value) == f"`generation_order` has to be one of {sorted(table)}, got 'hilbert'."
