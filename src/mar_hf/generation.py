# SPDX-License-Identifier: Apache-2.0
"""Which tokens appear when: orders, tokens per step, guidance, head steps, training masks. Pure functions and tables.

Every schedule returns the whole list, one entry per autoregressive step. A new one is a function and a line in its
table.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from .utils import check_generator, draw


def random_order(num_tokens: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """A uniformly random permutation (MAR, arXiv:2406.11838).

    Args:
        num_tokens (`int`): positions in the grid.
        generator (`torch.Generator`, *optional*): the source of randomness.

    Returns:
        `torch.Tensor` of shape `(num_tokens,)`: int64 positions on the CPU, the first generated first.
    """
    device = "cpu" if generator is None else generator.device
    return torch.randperm(num_tokens, generator=generator, device=device).cpu()


def raster_order(num_tokens: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Row by row from the top left.

    Args:
        num_tokens (`int`): positions in the grid.
        generator (`torch.Generator`, *optional*): not needed; here for the orders' common interface.

    Returns:
        `torch.Tensor` of shape `(num_tokens,)`: int64 positions on the CPU, the first generated first.
    """
    return torch.arange(num_tokens)


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


def constant_head_steps(num_diffusion_steps: int, num_inference_steps: int) -> list[int]:
    """The same number of head steps in every autoregressive step.

    Args:
        num_diffusion_steps (`int`): head steps.
        num_inference_steps (`int`): autoregressive steps.

    Returns:
        `list[int]`: one count a step.
    """
    return [num_diffusion_steps] * num_inference_steps


def linear_head_steps(num_diffusion_steps: int, num_inference_steps: int, last: int = 5) -> list[int]:
    """From `num_diffusion_steps` down to `last`: diffusion step annealing (DiSA, arXiv:2505.20297).

    The paper anneals from 50 to 5. Few steps need a scheduler whose `max_timestep` is about 950.

    Args:
        num_diffusion_steps (`int`): head steps in the first autoregressive step.
        num_inference_steps (`int`): autoregressive steps.
        last (`int`, *optional*, defaults to 5): head steps in the last one, or `num_diffusion_steps` if that is fewer.

    Returns:
        `list[int]`: one count a step.
    """
    last = min(last, num_diffusion_steps)
    span = num_inference_steps - 1
    if span == 0:
        return [num_diffusion_steps]
    return [last + int((span - step) / span * (num_diffusion_steps - last)) for step in range(num_inference_steps)]


def sample_num_masked(
    num_tokens: int,
    ratio_min: float = 0.7,
    ratio_mean: float = 1.0,
    ratio_std: float = 0.25,
    generator: torch.Generator | None = None,
) -> int:
    """How many tokens a training step masks in every picture (MAR, section 3.4).

    The masking ratio follows a normal distribution of mean `ratio_mean` and deviation `ratio_std`, truncated to
    [`ratio_min`, 1]; with the defaults, 0.867 of the tokens are masked on average.

    Args:
        num_tokens (`int`): L.
        ratio_min (`float`, *optional*, defaults to 0.7): lower end of the ratio.
        ratio_mean (`float`, *optional*, defaults to 1.0): mean of the normal distribution.
        ratio_std (`float`, *optional*, defaults to 0.25): deviation of the normal distribution.
        generator (`torch.Generator`, *optional*): the source of randomness; None means torch's global one.

    Returns:
        `int`: ceil(L * ratio).
    """
    device = "cpu" if generator is None else generator.device
    ends = torch.tensor([(ratio_min - ratio_mean) / ratio_std, (1 - ratio_mean) / ratio_std], dtype=torch.float64)
    low, high = torch.special.ndtr(ends).tolist()
    uniform = torch.rand((), generator=generator, device=device, dtype=torch.float64).item()
    quantile = torch.special.ndtri(torch.tensor(low + (high - low) * uniform, dtype=torch.float64)).item()
    ratio = min(max(ratio_mean + ratio_std * quantile, ratio_min), 1.0)
    return math.ceil(num_tokens * ratio)


def sample_mask(
    batch_size: int,
    num_tokens: int,
    num_masked: int,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """A training mask: as many tokens in every picture, each picture's at random.

    Args:
        batch_size (`int`): B.
        num_tokens (`int`): L.
        num_masked (`int`): tokens masked in each picture; see [`sample_num_masked`].
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*): one, or one per picture; None means
            torch's global one.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_tokens)`: bool, True = masked, on the generator's device.

    Raises:
        ValueError: if `num_masked` is not in 0..L, or a list does not hold one generator per picture.
    """
    if not 0 <= num_masked <= num_tokens:
        raise ValueError(f"`num_masked` has to be in 0..{num_tokens}, got {num_masked}.")
    check_generator(generator, batch_size)
    first = generator[0] if isinstance(generator, list) else generator
    device = "cpu" if first is None else first.device
    return draw(torch.rand, (batch_size, num_tokens), generator, device).argsort(1).argsort(1) < num_masked


GENERATION_ORDERS: dict[str, Callable[..., torch.Tensor]] = {"random": random_order, "raster": raster_order}
TOKEN_SCHEDULES: dict[str, Callable[[int, int], list[int]]] = {
    "cosine": cosine_tokens_per_step,
    "constant": constant_tokens_per_step,
}
GUIDANCE_SCHEDULES: dict[str, Callable[[float, list[int]], list[float]]] = {
    "linear": linear_guidance,
    "constant": constant_guidance,
}
HEAD_STEP_SCHEDULES: dict[str, Callable[[int, int], list[int]]] = {
    "constant": constant_head_steps,
    "linear": linear_head_steps,
}


def look_up(table: dict[str, Any], name: str, argument: str) -> Any:
    """An entry of one of the tables.

    Args:
        table (`dict[str, Any]`): the table.
        name (`str`): the entry's name.
        argument (`str`): the argument that named it, for the message.

    Returns:
        `Any`: the entry.

    Raises:
        ValueError: if the table has no such name; lists those it has.
    """
    if name not in table:
        raise ValueError(f"`{argument}` has to be one of {sorted(table)}, got {name!r}.")
    return table[name]
