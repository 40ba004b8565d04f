# SPDX-License-Identifier: Apache-2.0
"""Generations that are measured in a few of their steps: which are run, and how the others follow."""

import sys

import pytest
import torch

from mar_hf.generation import HEAD_STEP_SCHEDULES, TOKEN_SCHEDULES
from snippets import ROOT
from tiny_pipelines import seeds, tiny_pipeline


sys.path.insert(0, str(ROOT / "benchmarks"))

import plans  # noqa: E402
from measuring import PARTS, Recorder  # noqa: E402


@pytest.mark.parametrize("steps, count", [(64, 5), (64, 3), (64, 1), (256, 7), (16, 15)])
def test_measured_steps_are_those_of_the_schedule(steps, count):
    tokens = TOKEN_SCHEDULES["cosine"](256, steps)
    heads = HEAD_STEP_SCHEDULES["linear"](50, tokens)
    plan = plans.make_plan(tokens, heads, count)
    assert sum(plan.tokens) == 256 and min(plan.tokens) > 0 and len(plan.tokens) == len(plan.head_steps)
    assert len(plan.measured) == count and not plan.is_whole
    for number, scheduled in plan.measured.items():
        assert sum(plan.tokens[:number]) == sum(tokens[:scheduled])
        assert (plan.tokens[number], plan.head_steps[number]) == (tokens[scheduled], heads[scheduled])
    rest = [steps for number, steps in enumerate(plan.head_steps) if number not in plan.measured]
    assert set(rest) == {plans.GAP_HEAD_STEPS}
    assert 0 not in plan.measured or plan.measured[0] == 0
    assert plan.tokens[0] == tokens[0]


@pytest.mark.parametrize("count", [None, 8, 9])
def test_all_steps_are_the_schedule(count):
    tokens = TOKEN_SCHEDULES["cosine"](64, 8)
    plan = plans.make_plan(tokens, [3] * 8, count)
    assert plan.is_whole and (plan.tokens, plan.head_steps) == (tokens, [3] * 8)


@pytest.mark.parametrize("count", [None, 3, 6])
def test_what_is_linear_is_integrated_exactly(count):
    tokens = TOKEN_SCHEDULES["cosine"](256, 32)
    heads = HEAD_STEP_SCHEDULES["linear"](50, tokens)

    def seconds(there, tokens, steps):
        return {
            "encoder": 0.1 + 0.01 * there,
            "decoder": 0.3,
            "head": steps * (0.02 + 0.001 * tokens),
            "vae": 0.0,
            "other": 0.001,
        }

    def total(tokens, heads):
        steps = [seconds(sum(tokens[:k]), *both) for k, both in enumerate(zip(tokens, heads, strict=True))]
        return steps, {part: sum(step[part] for step in steps) for part in PARTS}

    plan = plans.make_plan(tokens, heads, count)
    recorder = Recorder("cpu")
    recorder.call = {part: [0.5 if part == "vae" else 0.0, 7.0] for part in PARTS}
    recorder.steps = [
        {part: [s, 2 * s] for part, s in step.items()} for step in total(plan.tokens, plan.head_steps)[0]
    ]
    if count is not None:
        recorder.steps[0]["head"][0] += 0.25  # what is done once
    found = plans.integrate(plan, recorder)
    for part, expected in total(tokens, heads)[1].items():
        once = (part == "vae") * 0.5 + (part == "head" and count is not None) * 0.25
        assert found[part] == pytest.approx((expected + once, 2 * expected + 7.0)), part


def test_a_pipeline_runs_the_plan():
    pipe = tiny_pipeline()
    plan = plans.make_plan(TOKEN_SCHEDULES["cosine"](16, 8), [6] * 8, 2)
    done = []

    def note(pipe, step, tokens_done, kwargs):
        done.append(tokens_done)

    call = {"num_diffusion_steps": 6, "generator": seeds(0), "callback_on_step_end": note}
    with plans.scheduled(plan) as settings, Recorder("cpu", count=True) as recorder, recorder.on(pipe):
        pipe([1], **call, **settings)
    assert done == torch.tensor(plan.tokens).cumsum(0).tolist()
    assert len(recorder.steps) == len(plan.tokens) and recorder.latents.shape == (1, 3, 8, 8)
    for step in recorder.steps:
        assert all(step[part][kind] > 0 for part in ("encoder", "decoder", "head") for kind in range(2))
    assert recorder.call["vae"][0] > 0
    assert "benchmark" not in TOKEN_SCHEDULES and "benchmark" not in HEAD_STEP_SCHEDULES
    assert "sample" not in vars(pipe.transformer.head) and not pipe.transformer.model._forward_hooks
