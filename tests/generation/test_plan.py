# SPDX-License-Identifier: Apache-2.0
"""Settings are checked when they are built; a plan holds every token once and draws what the contract says."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mar_hf.generation import (
    DECODINGS,
    GENERATION_DEFAULTS,
    GENERATION_ORDERS,
    GUIDANCE_SCHEDULES,
    HEAD_STEP_SCHEDULES,
    TOKEN_SCHEDULES,
    GenerationSettings,
    build_settings,
    check_orders,
    expand_decoding,
    plan_generation,
    plan_steps,
)


GRID = SimpleNamespace(grid_height=3, grid_width=4, token_dim=2)
COUNTS = ("num_inference_steps", "num_diffusion_steps", "guidance_refresh")
NUMBERS = ("guidance_scale", "temperature", "context_noise", "detail_share")
NAMES = ("token_schedule", "guidance_schedule", "head_step_schedule")
# What JSON, Python and numpy have besides the right values.
ODD = [None, True, False, "1", "x", [], {}, float("nan"), float("inf"), -float("inf"), 1e39, -1, b"1", ...]


def same(one, other):
    return one.to_dict() == other.to_dict()


# Settings


def test_the_defaults_are_the_papers():
    assert GenerationSettings().to_dict() == GENERATION_DEFAULTS
    assert same(GenerationSettings(**GENERATION_DEFAULTS), GenerationSettings())
    assert same(build_settings(), GenerationSettings())


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [*ODD, 0, 1.0, np.float64(2)], ids=repr)
def test_counts(name, value):
    with pytest.raises(ValueError, match=rf"^`{name}` has to be an integer from 1 on, got "):
        GenerationSettings(**{name: value})
    assert getattr(GenerationSettings(**{name: np.int64(2)}), name) == 2


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [*(value for value in ODD if value != -1), 1001, -1001, 1 + 2j], ids=repr)
def test_numbers(name, value):
    with pytest.raises(ValueError, match=rf"^`{name}` has to be a .*number .*got "):
        GenerationSettings(**{name: value})
    assert getattr(GenerationSettings(**{name: np.float32(0.5)}), name) == 0.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [*ODD, ""], ids=repr)
def test_names(name, value):
    with pytest.raises(ValueError, match=rf"^`{name}` has to be one of \[.*\], got "):
        GenerationSettings(**{name: value})


@pytest.mark.parametrize(
    "value", [*(value for value in ODD if value not in (None, {})), (0, 1, 2), (True, "1")], ids=repr
)
@pytest.mark.parametrize("name", ["head_kwargs", "guidance_interval"])
def test_settings_of_other_types(name, value):
    with pytest.raises(ValueError, match=f"^`{name}` has to be "):
        GenerationSettings(**{name: value})


def test_limits_are_named_where_they_are_known():
    with pytest.raises(ValueError, match=r"`num_inference_steps` has to lie in 1\.\.9 \(the tokens\), got 64"):
        GenerationSettings(limits={"num_inference_steps": 9})
    settings = GenerationSettings().override(limits={"num_inference_steps": 9}, num_inference_steps=9)
    assert settings.num_inference_steps == 9
    with pytest.raises(ValueError, match=r"`num_diffusion_steps` has to lie in 1\.\.50, got 100"):
        settings.override(limits={"num_diffusion_steps": 50})


def test_overriding_keeps_what_is_none():
    settings = GenerationSettings(guidance_scale=2.0, temperature=0.5)
    other = settings.override(guidance_scale=None, temperature=0.0)
    assert (other.guidance_scale, other.temperature, settings.temperature) == (2.0, 0.0, 0.5)
    with pytest.raises(ValueError, match="`temperature`"):
        settings.override(temperature=-1.0)


def test_later_sources_go_before_earlier_ones():
    settings = build_settings({"guidance_scale": 2.0, "temperature": 0.5}, None, {"guidance_scale": 4})
    assert same(settings, GenerationSettings(guidance_scale=4, temperature=0.5))


@pytest.mark.parametrize(
    "saved, message",
    [
        ({"temperature": "x"}, "`generation_defaults` of the pipeline: `temperature` has to be a finite number"),
        (
            {"generation_order": "hilbert"},
            "`generation_defaults` of the pipeline: `generation_order` has to be one",
        ),
        ({"generation_order": [[0]]}, "`generation_defaults` of the pipeline: `generation_order` has to be one"),
        ({"steps": 3}, r"`generation_defaults` has to be one of \['context_noise'.*got 'steps'"),
        ([3], "`generation_defaults` has to be a dict"),
        ("fast", "`generation_defaults` has to be a dict"),
    ],
)
def test_wrong_defaults_are_called_so(saved, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        build_settings(saved)


@pytest.mark.parametrize("name", DECODINGS)
def test_a_decoding_stands_for_its_parts_and_is_no_setting_itself(name):
    assert DECODINGS[name].keys() <= GENERATION_DEFAULTS.keys() and "decoding" not in GENERATION_DEFAULTS
    assert same(build_settings({"decoding": name}), GenerationSettings(**DECODINGS[name]))
    given = {"decoding": name, "token_schedule": "constant", "temperature": 0.5}
    assert expand_decoding(given) == DECODINGS[name] | {"token_schedule": "constant", "temperature": 0.5}
    assert given["decoding"] == name and DECODINGS[name]["token_schedule"] == "gtr"
    # A later source goes before the parts of an earlier one, and its parts before an earlier source.
    assert build_settings({"decoding": name}, {"token_schedule": "constant"}).token_schedule == "constant"
    assert build_settings({"token_schedule": "constant"}, {"decoding": name}).token_schedule == "gtr"
    assert expand_decoding({"decoding": None, "temperature": 0.5}) == {"temperature": 0.5}


# Orders


@pytest.mark.parametrize(
    "orders, message",
    [
        (torch.arange(4), r"tensor of shape \(1, 4\), got \(4,\)"),
        (torch.tensor([[0, 1, 2, 2]]), "0..3 once in every row, but row 0 does not"),
        ([[0, 1, 2, 3]], r"tensor of shape \(1, 4\), got \[\[0"),
        (None, r"tensor of shape \(1, 4\), got None"),
    ],
)
def test_orders_that_are_no_permutations(orders, message):
    with pytest.raises(ValueError, match=message):
        check_orders(orders, 1, 4)
    check_orders(torch.tensor([[3, 1, 0, 2]]), 1, 4)


# Plans


@given(
    num_tokens=st.integers(1, 64),
    share=st.floats(0, 1),
    token_schedule=st.sampled_from(sorted(TOKEN_SCHEDULES)),
    guidance_schedule=st.sampled_from(sorted(GUIDANCE_SCHEDULES)),
    head_step_schedule=st.sampled_from(sorted(HEAD_STEP_SCHEDULES)),
    guidance_scale=st.floats(-5, 5),
    start=st.floats(0, 0.9),
    is_guided=st.booleans(),
)
def test_steps_follow_each_other(num_tokens, share, start, is_guided, guidance_scale, **schedules):
    count = max(1, round(share * num_tokens))
    numbers = {"num_inference_steps": count, "num_diffusion_steps": 7, "guidance_scale": guidance_scale}
    steps = plan_steps(GenerationSettings(**numbers, **schedules, guidance_interval=(start, 1)), num_tokens, is_guided)
    assert len(steps) == count and all(step.count >= 1 for step in steps)
    ends = [step.start + step.count for step in steps]
    assert [step.start for step in steps] == [0, *ends[:-1]] and ends[-1] == num_tokens
    assert all(1 <= step.num_diffusion_steps <= 7 for step in steps) and steps[0].num_diffusion_steps == 7
    for number, step in enumerate(steps):
        if not is_guided or number / count < start:
            assert step.guidance_scale == 1.0
        elif schedules["guidance_schedule"] == "constant":
            assert step.guidance_scale == guidance_scale


@given(share=st.floats(0, 1), schedule=st.sampled_from(["gtr", "linear"]), count=st.integers(1, 48))
def test_details_are_a_share_of_each_step_of_the_second_half_with_fewer_head_steps(share, schedule, count):
    names = {"token_schedule": "cosine", "head_step_schedule": schedule, "detail_share": share}
    steps = plan_steps(GenerationSettings(num_inference_steps=count, num_diffusion_steps=9, **names), 48)
    for step in steps:
        late = step.start >= 24 and step.num_diffusion_steps < 9
        assert step.num_detail_tokens == (int(share * step.count) if late else 0)
        assert step.num_detail_steps == (9 if step.num_detail_tokens else 0)
    constant = GenerationSettings(num_inference_steps=count, detail_share=share, head_step_schedule="constant")
    assert all(step.num_detail_tokens == 0 for step in plan_steps(constant, 48))


@pytest.mark.parametrize("order", GENERATION_ORDERS)
@pytest.mark.parametrize("context_noise", [0.0, 0.5])
def test_each_picture_draws_its_order_then_its_noise(order, context_noise):
    settings = GenerationSettings(
        num_inference_steps=3, num_diffusion_steps=4, generation_order=order, context_noise=context_noise
    )
    steps = plan_steps(settings, 12)
    plan = plan_generation(settings, GRID, steps, [torch.Generator().manual_seed(seed) for seed in (3, 4)])
    assert plan.steps is steps and not plan.tokens.any() and plan.mask.all()
    assert plan.tokens.shape == (2, 12, 2) and plan.mask.shape == (2, 12)
    for row, seed in enumerate((3, 4)):
        source = torch.Generator().manual_seed(seed)
        assert torch.equal(plan.orders[row], GENERATION_ORDERS[order](3, 4, source))
        assert torch.equal(plan.noise[row], torch.randn(12, 5, 2, generator=source))
        if context_noise:
            assert torch.equal(plan.context_noise[row], torch.randn(12, 2, generator=source))
    assert (plan.context_noise is None) == (context_noise == 0)


def test_what_is_given_is_not_drawn():
    orders, noise = torch.randperm(12, generator=torch.Generator().manual_seed(0))[None], torch.randn(1, 12, 5, 2)
    settings = GenerationSettings(num_inference_steps=3, num_diffusion_steps=4, generation_order=orders)
    source = torch.Generator().manual_seed(0)
    before = source.get_state()
    plan = plan_generation(settings, GRID, plan_steps(settings, 12), [source], noise)
    assert torch.equal(plan.orders, orders) and torch.equal(plan.noise, noise)
    assert torch.equal(source.get_state(), before)
