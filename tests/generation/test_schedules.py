# SPDX-License-Identifier: Apache-2.0
"""Schedules: identities for all sizes, and numbers counted from the original's rules."""

import math
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mar_hf.generation import (
    GENERATION_ORDERS,
    GUIDANCE_SCHEDULES,
    HEAD_STEP_SCHEDULES,
    TOKEN_SCHEDULES,
    constant_guidance,
    constant_head_steps,
    constant_tokens_per_step,
    cosine_tokens_per_step,
    decreasing_linear_guidance,
    gtr_head_steps,
    gtr_order,
    gtr_tokens_per_step,
    guidance_within,
    linear_guidance,
    linear_head_steps,
    look_up,
    power_cosine_guidance,
    settings_for_budget,
)
from mar_hf.generation.schedules import check_tokens_per_step


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


@pytest.mark.parametrize("counts", [[1], [2, 2, 1], [2] * 8])
def test_steps_that_a_model_can_do(counts):
    assert check_tokens_per_step(counts, 16, 2) is None


@pytest.mark.parametrize(
    "counts, message",
    [
        ([], r"sum of at most 16, got \[\]"),
        ([1, 0], r"sum of at most 16, got \[1, 0\]"),
        ([2] * 9, r"sum of at most 16, got \[2, 2"),
        ([1, 3], "at most 2 tokens a step .*, not 3: 16 tokens need at least 8 steps"),
    ],
)
def test_steps_that_a_model_cannot_do(counts, message):
    with pytest.raises(ValueError, match=message):
        check_tokens_per_step(counts, 16, 2)


def test_gtr_counts_of_the_paper():
    # 64 tokens at 2.67 a step, 64 at 10.67, 128 at 64
    counts = gtr_tokens_per_step(256, 32)
    assert [sum(counts[:24]), sum(counts[24:30]), counts[30:]] == [64, 64, [64, 64]]
    assert set(counts[:24]) == {2, 3} and set(counts[24:30]) == {10, 11}


@given(data=st.data(), height=st.integers(1, 12), width=st.integers(1, 12))
def test_gtr_steps_end_where_the_sets_of_its_order_end(data, height, width):
    num_tokens = height * width
    steps = data.draw(st.integers(1, num_tokens))
    counts, order = gtr_tokens_per_step(num_tokens, steps), gtr_order(height, width)
    assert (len(counts), sum(counts), min(counts) >= 1) == (steps, num_tokens, True)
    sums = order // width + order % width
    sizes = [int((sums % 4 == 0).sum()), int((sums % 4 == 2).sum()), int((sums % 2 == 1).sum())]
    ends = list(accumulate(counts))
    if steps > 1:
        assert num_tokens - sizes[2] in ends
    if steps > 2 and num_tokens > 2:
        first = min(ends, key=lambda end: abs(end - sizes[0]))
        assert abs(first - sizes[0]) <= (height % 2 or width % 2)
    if steps > 2 and height % 2 == width % 2 == 0:
        # Later sets are never slower than earlier ones.
        numbers = [ends.index(sizes[0]) + 1, ends.index(num_tokens // 2) + 1, steps]
        rates = [size / (end - start) for size, start, end in zip(sizes, [0, *numbers], numbers, strict=False)]
        assert rates == sorted(rates)


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


def test_decreasing_guidance():
    assert decreasing_linear_guidance(5.0, [2, 2, 4]) == [5.0, 4.0, 3.0]
    # With one token a step it is the linear one backwards, but for the step at which that stops short.
    assert decreasing_linear_guidance(5.0, [1] * 8)[1:] == linear_guidance(5.0, [1] * 8)[-2::-1]


@pytest.mark.parametrize("power", [1.2, 2.75])
def test_power_cosine_guidance(power):
    scales = power_cosine_guidance(16.0, [1] * 64, power)
    assert scales[0] == 1.0 and scales == sorted(scales) and 15.5 < scales[-1] < 16
    # Half of the way where the power of the share is 1/2.
    half = round(64 * 0.5 ** (1 / power))
    assert scales[half - 1] < 8.5 < scales[half + 1]
    # It counts tokens, not steps.
    assert power_cosine_guidance(16.0, [32, 16, 16], power) == pytest.approx([scales[0], scales[32], scales[48]])
    assert power_cosine_guidance(16.0, [1] * 64) == power_cosine_guidance(16.0, [1] * 64, 2.75)


def test_guidance_within_an_interval():
    scales = [float(step + 2) for step in range(10)]
    assert guidance_within(scales) == scales
    assert guidance_within(scales, (0.3, 0.7)) == [1.0] * 3 + scales[3:7] + [1.0] * 3
    assert guidance_within(scales, [0, 0.01]) == [2.0] + [1.0] * 9
    # Shares as people write them fall on the steps that they mean.
    for step in range(100):
        assert guidance_within([2.0] * 100, (step / 100, 1)).count(1.0) == step


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


def test_annealing_counts_of_disa():
    counts = cosine_tokens_per_step(256, 64)
    steps = linear_head_steps(50, counts)
    assert (steps[0], steps[-1], sum(steps), len(steps)) == (50, 5, 1733, 64)
    assert all(a >= b for a, b in zip(steps, steps[1:], strict=False))
    # What the head evaluates, against 100 steps throughout
    assert sum(n * s for n, s in zip(counts, steps, strict=True)) == 5372
    assert sum(n * s for n, s in zip(counts, constant_head_steps(100, counts), strict=True)) == 25600


@pytest.mark.parametrize("name", HEAD_STEP_SCHEDULES)
@pytest.mark.parametrize("head_steps", [1, 3, 5, 50])
@pytest.mark.parametrize("tokens_per_step", [[1], [64], [1, 9], [9, 1], cosine_tokens_per_step(64, 17)])
def test_head_steps_start_as_asked_and_never_rise_or_vanish(name, head_steps, tokens_per_step):
    counts = HEAD_STEP_SCHEDULES[name](head_steps, tokens_per_step)
    assert len(counts) == len(tokens_per_step) and counts[0] == head_steps
    assert counts == sorted(counts, reverse=True) and counts[-1] >= 1


def test_annealing_ends_where_asked():
    assert linear_head_steps(20, [1] * 5, last=4) == [20, 16, 12, 8, 4]


def test_gtr_head_steps_of_the_paper():
    steps = gtr_head_steps(50, gtr_tokens_per_step(256, 32))
    assert (steps[0], steps[29], steps[30:]) == (50, 20, [20, 20])
    # Half of the tokens is there after three of these steps; a step that starts before that is early.
    assert gtr_head_steps(10, [1, 2, 3, 6]) == [10, 7, 4, 4]
    assert gtr_head_steps(10, [1, 2, 4, 6]) == [10, 7, 4, 4]
    assert gtr_head_steps(10, [4, 4], last=0.5) == [10, 5]
    assert gtr_head_steps(10, [5, 2, 1, 1]) == [10, 4, 4, 4]


@pytest.mark.parametrize("table", [GENERATION_ORDERS, TOKEN_SCHEDULES, GUIDANCE_SCHEDULES, HEAD_STEP_SCHEDULES])
def test_tables_name_what_they_have(table):
    for name, entry in table.items():
        assert look_up(table, name, "argument") is entry
    with pytest.raises(ValueError) as error:
        look_up(table, "hilbert", "generation_order")
    assert str(error.value) == f"`generation_order` has to be one of {sorted(table)}, got 'hilbert'."
