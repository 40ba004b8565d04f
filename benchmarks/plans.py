# SPDX-License-Identifier: Apache-2.0
"""Whole generations from a few of their autoregressive steps: which to run, and what the others would have taken."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from measuring import PARTS, Recorder

from mar_hf.generation import HEAD_STEP_SCHEDULES, TOKEN_SCHEDULES


# Head steps of the autoregressive steps that only lead from one measured step to the next.
GAP_HEAD_STEPS = 1


@dataclass
class Plan:
    """A generation that is run, and the one that it stands for.

    Args:
        tokens (`list[int]`): tokens of each step that is run.
        head_steps (`list[int]`): head steps of each step that is run.
        schedule (`list[tuple[int, int]]`): tokens and head steps of each step of the generation that it stands for.
        measured (`dict[int, int]`): number of a step that is run -> its number in the schedule.
    """

    tokens: list[int]
    head_steps: list[int]
    schedule: list[tuple[int, int]]
    measured: dict[int, int] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether everything is run."""
        return len(self.measured) == len(self.schedule)


def make_plan(tokens_per_step: Sequence[int], head_steps: Sequence[int], count: int | None = None) -> Plan:
    """Run some steps as they are, in the middle of equal parts of the schedule, and the tokens between them quickly.

    A step that is measured therefore sees as many tokens as in the whole generation. Unless it is the first of the
    schedule, a step before it takes whatever is done only once.

    Args:
        tokens_per_step (`Sequence[int]`): the schedule.
        head_steps (`Sequence[int]`): of each of its steps.
        count (`int`, *optional*): steps that are measured; None, or as many as there are: all.

    Returns:
        [`Plan`]: with the same tokens in all.
    """
    schedule = list(zip(tokens_per_step, head_steps, strict=True))
    length = len(schedule)
    if count is None or count >= length:
        return Plan(list(tokens_per_step), list(head_steps), schedule, {number: number for number in range(length)})
    plan = Plan([], [], schedule)

    def run(tokens: int, steps: int) -> None:
        if tokens:
            plan.tokens.append(tokens)
            plan.head_steps.append(steps)

    numbers = [int((part + 0.5) * length / count) for part in range(count)]
    if numbers[0] > 0:
        run(tokens_per_step[0], GAP_HEAD_STEPS)
    for number in numbers:
        run(sum(tokens_per_step[:number]) - sum(plan.tokens), GAP_HEAD_STEPS)
        plan.measured[len(plan.tokens)] = number
        run(*schedule[number])
    run(sum(tokens_per_step) - sum(plan.tokens), GAP_HEAD_STEPS)
    return plan


@contextmanager
def scheduled(plan: Plan) -> Iterator[dict[str, object]]:
    """Arguments of a pipeline's call that make it run the plan, through the package's tables of schedules.

    Args:
        plan ([`Plan`]): what to run.
    """
    name = "benchmark"
    TOKEN_SCHEDULES[name] = lambda num_tokens, num_inference_steps: list(plan.tokens)
    HEAD_STEP_SCHEDULES[name] = lambda num_diffusion_steps, tokens_per_step: list(plan.head_steps)
    try:
        yield {"token_schedule": name, "head_step_schedule": name, "num_inference_steps": len(plan.tokens)}
    finally:
        del TOKEN_SCHEDULES[name], HEAD_STEP_SCHEDULES[name]


def integrate(plan: Plan, recorder: Recorder) -> dict[str, tuple[float, float]]:
    """Seconds and floating-point operations of the whole generation, by part.

    Between measured steps, encoder, decoder and the rest are linear in the tokens that are there; a head step is
    linear in the tokens that are sampled.

    Args:
        plan ([`Plan`]): what was run.
        recorder ([`Recorder`]): what it took.

    Returns:
        `dict[str, tuple[float, float]]`: of each part; what happens once a call is in it.
    """
    return {part: tuple(_integrate_part(plan, recorder, part, kind) for kind in range(2)) for part in PARTS}


def _integrate_part(plan: Plan, recorder: Recorder, part: str, kind: int) -> float:
    values = [step[part][kind] for step in recorder.steps]
    once = recorder.call[part][kind]
    if plan.is_whole:
        return once + sum(values)
    tokens, steps = (np.array(column) for column in zip(*plan.schedule, strict=True))
    there = np.cumsum(tokens) - tokens
    places = list(plan.measured.values())
    measured = np.array([values[number] for number in plan.measured])
    if part != "head":
        return once + float(_interpolate(there[places], measured, there).sum())
    rates = measured / steps[places]
    rates = _interpolate(tokens[places], rates, tokens)
    if 0 not in plan.measured:
        # What the first step took longer than others: it is not repeated.
        once += max(0.0, values[0] - rates[0] * plan.head_steps[0])
    return once + float((rates * steps).sum())


def _interpolate(places: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Piecewise linear, the means where a place occurs twice; beyond the ends the line goes on."""
    known = np.unique(places)
    means = np.array([values[places == place].mean() for place in known])
    result = np.interp(wanted, known, means)
    if len(known) > 1:
        for end, inner, beyond in ((0, 1, wanted < known[0]), (-1, -2, wanted > known[-1])):
            slope = (means[end] - means[inner]) / (known[end] - known[inner])
            result = np.where(beyond, means[end] + slope * (wanted - known[end]), result)
    return result
