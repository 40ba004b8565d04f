# SPDX-License-Identifier: Apache-2.0
"""What a training step leaves to chance: how many tokens are masked, which, and how many come at once."""

import math
from functools import partial

import torch

from ..utils import check_generator, draw


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


def sample_tokens_per_step(num_tokens: int, maximum: int, generator: torch.Generator | None = None) -> list[int]:
    """How many tokens come in each step of a training sequence: any number up to `maximum`, each as likely.

    Args:
        num_tokens (`int`): L.
        maximum (`int`): the most tokens of a step. With 1 nothing is drawn.
        generator (`torch.Generator`, *optional*): the source of randomness; None means torch's global one.

    Returns:
        `list[int]`: positive counts with the sum L. The last is what is left, where the drawn one is more.

    Raises:
        ValueError: if `maximum` is below 1.
    """
    if maximum < 1:
        raise ValueError(f"`maximum` has to be at least 1, got {maximum}.")
    if maximum == 1:
        return [1] * num_tokens
    counts = draw(partial(torch.randint, 1, maximum + 1), (num_tokens,), generator, "cpu")
    counts = counts.cumsum(0).clamp(max=num_tokens).diff(prepend=torch.tensor([0]))
    return counts[counts > 0].tolist()
