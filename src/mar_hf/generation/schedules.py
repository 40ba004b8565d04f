# SPDX-License-Identifier: Apache-2.0
"""Tokens, guidance and head steps of every autoregressive step. Pure functions, and tables of them.

Every schedule returns the whole list, one entry per autoregressive step. A new one is a function and a line in its
table.
"""

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any


def cosine_tokens_per_step(num_tokens: int, num_inference_steps: int) -> list[int]:
    """Few tokens first, many last: after step k, floor(L cos(pi/2 (k+1)/K)) are left (arXiv:2202.04200).

    At least one token is generated in every step and one is left for the last, as in the original code of MAR.

    Args:
        num_tokens (`int`): L.
        num_inference_steps (`int`): K, at most L.

    Returns:
        `list[int]`: K positive counts with the sum L.
    """
    counts, left = [], num_tokens
    for step in range(num_inference_steps - 1):
        ratio = math.cos(math.pi / 2 * (step + 1) / num_inference_steps)
        remaining = max(1, min(left - 1, math.floor(num_tokens * ratio)))
        counts.append(left - remaining)
        left = remaining
    return [*counts, left]


def constant_tokens_per_step(num_tokens: int, num_inference_steps: int) -> list[int]:
    """As equal as integers allow, the larger counts last.

    Args:
        num_tokens (`int`): L.
        num_inference_steps (`int`): K, at most L.

    Returns:
        `list[int]`: K positive counts with the sum L.
    """
    ends = [num_tokens * (step + 1) // num_inference_steps for step in range(num_inference_steps)]
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def gtr_tokens_per_step(num_tokens: int, num_inference_steps: int) -> list[int]:
    """The sets of [`gtr_order`] one after the other, the later ones in ever fewer steps ("GtR", arXiv:2510.17171).

    The last set is half of the tokens, and the two before it share the other half. They take 24, 6 and 2 of 32 steps,
    the paper's for 256 tokens, and the same shares of other numbers: at least one each and no step without a token;
    with fewer than three steps the first sets come together. Within a set the steps are as equal as integers allow.
    Where half of the tokens is no even number, the second set may be one token larger or smaller than that of a grid.

    Args:
        num_tokens (`int`): L.
        num_inference_steps (`int`): K, at most L.

    Returns:
        `list[int]`: K positive counts with the sum L.
    """
    counts, left, steps_left = [], num_tokens, num_inference_steps
    for share in (2 / 32, 6 / 30):  # of the steps that are left, the last set first
        size = left // 2
        # As many as the sets before it can't take, and at most as many as leave one for them.
        least = max(1, steps_left - (left - size))
        steps = min(max(least, round(share * steps_left)), size, steps_left - 1)
        if steps:
            counts = constant_tokens_per_step(size, steps) + counts
            left, steps_left = left - size, steps_left - steps
    return constant_tokens_per_step(left, steps_left) + counts


def check_tokens_per_step(tokens_per_step: list[int], num_tokens: int, limit: int) -> None:
    """Refuse steps that a model was not made for.

    Args:
        tokens_per_step (`list[int]`): tokens of each step.
        num_tokens (`int`): tokens that there are.
        limit (`int`): most tokens of a step.

    Raises:
        ValueError: if a step has none or more than the limit, or all together more than there are.
    """
    numbers = isinstance(tokens_per_step, (list, tuple)) and all(
        isinstance(count, int) and not isinstance(count, bool) for count in tokens_per_step
    )
    if not numbers or not tokens_per_step or min(tokens_per_step) < 1 or sum(tokens_per_step) > num_tokens:
        raise ValueError(
            f"`tokens_per_step` has to hold positive numbers with a sum of at most {num_tokens}, got "
            f"{tokens_per_step}."
        )
    if max(tokens_per_step) > limit:
        raise ValueError(
            f"This model predicts at most {limit} tokens a step (`max_tokens_per_step`), not "
            f"{max(tokens_per_step)}: {num_tokens} tokens need at least {-(-num_tokens // limit)} steps, and "
            '`token_schedule="constant"` spreads them evenly.'
        )


def linear_guidance(guidance_scale: float, tokens_per_step: list[int]) -> list[float]:
    """Guidance that grows with the share of tokens that will be there after the step.

    s_k = 1 + (s - 1) (L - M_k) / L with M_k tokens left after step k, at least 1, as in the original: the last step
    therefore stays just below `guidance_scale`.

    Args:
        guidance_scale (`float`): s.
        tokens_per_step (`list[int]`): tokens generated in each step.

    Returns:
        `list[float]`: one scale a step.
    """
    total, done, scales = sum(tokens_per_step), 0, []
    for count in tokens_per_step:
        done += count
        scales.append(1 + (guidance_scale - 1) * min(done, total - 1) / total)
    return scales


def constant_guidance(guidance_scale: float, tokens_per_step: list[int]) -> list[float]:
    """The same guidance in every step.

    Args:
        guidance_scale (`float`): the scale.
        tokens_per_step (`list[int]`): tokens generated in each step.

    Returns:
        `list[float]`: one scale a step.
    """
    return [float(guidance_scale)] * len(tokens_per_step)


def decreasing_linear_guidance(guidance_scale: float, tokens_per_step: list[int]) -> list[float]:
    """Guidance that falls with the tokens that are there: the linear schedule of NextStep-1's code (arXiv:2508.10711).

    s_k = 1 + (s - 1) M_k / L with M_k tokens left before step k.

    Args:
        guidance_scale (`float`): s, the scale of the first step.
        tokens_per_step (`list[int]`): tokens generated in each step.

    Returns:
        `list[float]`: one scale a step.
    """
    left = total = sum(tokens_per_step)
    scales = []
    for count in tokens_per_step:
        scales.append(1 + (guidance_scale - 1) * left / total)
        left -= count
    return scales


def power_cosine_guidance(guidance_scale: float, tokens_per_step: list[int], power: float = 2.75) -> list[float]:
    """Guidance that begins at 1 and grows late, with the tokens that are there, as in RAR's code (arXiv:2411.00776).

    s_k = 1 + (s - 1) (1 - cos(pi (N_k / L)^power)) / 2 with N_k tokens there before step k. Large scales are usual: 16
    for RAR-B.

    Args:
        guidance_scale (`float`): s, which the last steps come close to.
        tokens_per_step (`list[int]`): tokens generated in each step.
        power (`float`, *optional*, defaults to 2.75): the higher, the later. RAR takes 2.75 for its smallest model,
            down to 1.2 for its largest. Another one is another line in `GUIDANCE_SCHEDULES`, by `functools.partial`.

    Returns:
        `list[float]`: one scale a step.
    """
    total, done, scales = sum(tokens_per_step), 0, []
    for count in tokens_per_step:
        scales.append(1 + (guidance_scale - 1) * (1 - math.cos(math.pi * (done / total) ** power)) / 2)
        done += count
    return scales


def guidance_within(scales: list[float], interval: tuple[float, float] = (0.0, 1.0)) -> list[float]:
    """No guidance outside of an interval of the steps (arXiv:2404.07724, there of a diffusion sampler's noise levels).

    Step k of K keeps its scale where start <= k / K < end. Where the scale is 1, the pipeline leaves out the
    unconditional branch.

    Args:
        scales (`list[float]`): one scale a step, of all K steps.
        interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`): start and end, as shares of the steps.

    Returns:
        `list[float]`: the scales, 1.0 outside of the interval.
    """
    start, end = interval
    return [scale if start <= step / len(scales) < end else 1.0 for step, scale in enumerate(scales)]


def constant_head_steps(num_diffusion_steps: int, tokens_per_step: list[int]) -> list[int]:
    """The same number of head steps in every autoregressive step.

    Args:
        num_diffusion_steps (`int`): head steps.
        tokens_per_step (`list[int]`): tokens generated in each step.

    Returns:
        `list[int]`: one count a step.
    """
    return [num_diffusion_steps] * len(tokens_per_step)


def linear_head_steps(num_diffusion_steps: int, tokens_per_step: list[int], last: int = 5) -> list[int]:
    """From `num_diffusion_steps` down to `last`: diffusion step annealing (DiSA, arXiv:2505.20297).

    The paper anneals from 50 to 5. Few steps need a scheduler whose `max_timestep` is about 950.

    Args:
        num_diffusion_steps (`int`): head steps in the first autoregressive step.
        tokens_per_step (`list[int]`): tokens generated in each step.
        last (`int`, *optional*, defaults to 5): head steps in the last one, or `num_diffusion_steps` if that is fewer.

    Returns:
        `list[int]`: one count a step.
    """
    last = min(last, num_diffusion_steps)
    span = len(tokens_per_step) - 1
    if span == 0:
        return [num_diffusion_steps]
    return [last + int((span - step) / span * (num_diffusion_steps - last)) for step in range(span + 1)]


def gtr_head_steps(num_diffusion_steps: int, tokens_per_step: list[int], last: float = 0.4) -> list[int]:
    """Down to a share of `num_diffusion_steps` while half of the tokens are generated ("GtR", arXiv:2510.17171).

    Linearly in the steps that start in the first half of the tokens (the paper's generation stage); the others (its
    reconstruction stage) have the lowest number. The paper goes from 50 down to 20.

    Args:
        num_diffusion_steps (`int`): head steps in the first autoregressive step.
        tokens_per_step (`list[int]`): tokens generated in each step.
        last (`float`, *optional*, defaults to 0.4): the share that is left.

    Returns:
        `list[int]`: one count a step, at least 1.
    """
    ends, lowest = list(accumulate(tokens_per_step)), max(1, round(last * num_diffusion_steps))
    early = sum(2 * start < ends[-1] for start in [0, *ends[:-1]])
    annealed = linear_head_steps(num_diffusion_steps, tokens_per_step[:early], lowest)
    return annealed + [lowest] * (len(ends) - early)


def settings_for_budget(
    points: list[dict[str, Any]], max_seconds: float, seconds_here: float | None = None, tolerance: float = 0.0
) -> dict[str, Any]:
    """The best of measured settings that a picture has the time for, from a curve of quality against time.

    `examples/measure_speed.py` measures such a curve.

    Args:
        points (`list[dict]`): one for each setting, the checkpoint's defaults first. `seconds` is its time for a
            picture, `distance` how far its pictures are from real ones; what else it holds is not looked at.
        max_seconds (`float`): the most that a picture may take.
        seconds_here (`float`, *optional*): the time for a picture with the defaults, measured on this machine: all
            others change in proportion. None: as in `points`.
        tolerance (`float`, *optional*, defaults to 0.0): differences of `distance` up to here count as none, and the
            faster setting is taken: the spread between runs, for one.

    Returns:
        `dict`: one of the points.

    Raises:
        ValueError: if there are no points, or none is fast enough.
    """
    if not points:
        raise ValueError("`points` is empty: it has to hold at least the setting of the defaults.")
    factor = 1.0 if seconds_here is None else seconds_here / points[0]["seconds"]
    fits = [point for point in points if point["seconds"] * factor <= max_seconds]
    if not fits:
        fastest = min(point["seconds"] for point in points) * factor
        raise ValueError(f"`max_seconds` has to be at least {fastest:.3g}, the fastest setting's, got {max_seconds}.")
    best = min(point["distance"] for point in fits)
    return min(
        (point for point in fits if point["distance"] <= best + tolerance),
        key=lambda point: (point["seconds"], point["distance"]),
    )


TOKEN_SCHEDULES: dict[str, Callable[[int, int], list[int]]] = {
    "cosine": cosine_tokens_per_step,
    "constant": constant_tokens_per_step,
    "gtr": gtr_tokens_per_step,
}
GUIDANCE_SCHEDULES: dict[str, Callable[[float, list[int]], list[float]]] = {
    "linear": linear_guidance,
    "constant": constant_guidance,
    "decreasing_linear": decreasing_linear_guidance,
    "power_cosine": power_cosine_guidance,
}
HEAD_STEP_SCHEDULES: dict[str, Callable[[int, list[int]], list[int]]] = {
    "constant": constant_head_steps,
    "linear": linear_head_steps,
    "gtr": gtr_head_steps,
}
