# SPDX-License-Identifier: Apache-2.0
"""Which tokens appear when: orders, tokens per step, guidance, head steps, training masks. Pure functions and tables.

Every schedule returns the whole list, one entry per autoregressive step. A new one is a function and a line in its
table.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .utils import check_generator, draw


def random_order(
    grid_height: int, grid_width: int, generator: torch.Generator | None = None, progress: float = 1.0
) -> torch.Tensor:
    """A uniformly random permutation (MAR, arXiv:2406.11838).

    Every order takes these arguments and returns such a tensor.

    Args:
        grid_height (`int`): rows of the grid; position r * `grid_width` + c is row r, column c.
        grid_width (`int`): columns of the grid.
        generator (`torch.Generator`, *optional*): the source of randomness, for the orders that draw; None means
            torch's global one.
        progress (`float`, *optional*, defaults to 1.0): the share of the training that is done, for the orders that
            change with it; 1 is also what sampling uses.

    Returns:
        `torch.Tensor` of shape `(grid_height * grid_width,)`: int64 positions on the CPU, the first generated first.
    """
    device = "cpu" if generator is None else generator.device
    return torch.randperm(grid_height * grid_width, generator=generator, device=device).cpu()


def raster_order(
    grid_height: int, grid_width: int, generator: torch.Generator | None = None, progress: float = 1.0
) -> torch.Tensor:
    """Row by row from the top left. Arguments and result are those of [`random_order`]; nothing is drawn."""
    return torch.arange(grid_height * grid_width)


def spiral_order(
    grid_height: int, grid_width: int, generator: torch.Generator | None = None, progress: float = 1.0
) -> torch.Tensor:
    """From the centre outwards, clockwise, ring by ring: "spiral out" of arXiv:2012.09841 and RAR, arXiv:2411.00776.

    Theirs need a square of an even side, where this is the same. In any other grid the spiral runs on outside of the
    grid where it has to, so that the centre is still first and the rim last. Arguments and result are those of
    [`random_order`]; nothing is drawn.
    """
    row, column = grid_height // 2, (grid_width - 1) // 2
    down, right, length, order = -1, 0, 1, []
    while len(order) < grid_height * grid_width:
        for _ in range(2):  # two sides of each length
            for _ in range(length):
                if 0 <= row < grid_height and 0 <= column < grid_width:
                    order.append(row * grid_width + column)
                row, column = row + down, column + right
            down, right = right, -down
        length += 1
    return torch.tensor(order)


def zigzag_order(
    grid_height: int, grid_width: int, generator: torch.Generator | None = None, progress: float = 1.0
) -> torch.Tensor:
    """Row by row, to the right and back in turns, so that neighbours in the order are neighbours in the picture.

    "Alternate" of arXiv:2012.09841 and RAR, arXiv:2411.00776; not JPEG's zigzag along the diagonals. Arguments and
    result are those of [`random_order`]; nothing is drawn.
    """
    grid = torch.arange(grid_height * grid_width).view(grid_height, grid_width)
    grid[1::2] = grid[1::2].flip(1)
    return grid.flatten()


def nearest_order(
    grid_height: int, grid_width: int, generator: torch.Generator | None = None, progress: float = 1.0
) -> torch.Tensor:
    """Outwards from a random start, by Manhattan distance from it, ties at random (NAR, arXiv:2503.10696).

    Every position after the first therefore touches one that is there already, by a side. NAR itself starts in a
    corner. Arguments and result are those of [`random_order`].
    """
    shuffled = random_order(grid_height, grid_width, generator)  # the start is its first; the rest breaks the ties
    row, column = shuffled // grid_width, shuffled % grid_width
    distance = (row - row[0]).abs() + (column - column[0]).abs()
    return shuffled[distance.argsort(stable=True)]


def checkerboard_order(
    grid_height: int, grid_width: int, generator: torch.Generator | None = None, progress: float = 1.0
) -> torch.Tensor:
    """The colour of the top left first, then the other; row by row within a colour (arXiv:2103.15306).

    In the second half all four neighbours are known. Arguments and result are those of [`random_order`]; nothing is
    drawn.
    """
    positions = torch.arange(grid_height * grid_width)
    return ((positions // grid_width + positions % grid_width) % 2).argsort(stable=True)


def subsampled_order(
    grid_height: int, grid_width: int, generator: torch.Generator | None = None, progress: float = 1.0
) -> torch.Tensor:
    """A coarse grid first, then grids that are twice as fine each time, each row by row (arXiv:1703.03664).

    The grid of stride 2^k is where 2^k divides row and column. "Subsample" of arXiv:2012.09841 and RAR,
    arXiv:2411.00776, has the same grids, but does not go through a grid row by row. Arguments and result are those of
    [`random_order`]; nothing is drawn.
    """
    positions = torch.arange(grid_height * grid_width)
    common = torch.gcd(positions // grid_width, positions % grid_width)
    coarsest = torch.tensor(1 << max(grid_height, grid_width).bit_length())
    return torch.gcd(common, coarsest).argsort(descending=True, stable=True)


def random_ratio(progress: float, start: float = 0.5, end: float = 0.75) -> float:
    """The share of random orders at a point of the training: 1, then linearly down to 0 (RAR, arXiv:2411.00776).

    Args:
        progress (`float`): the share of the training that is done.
        start (`float`, *optional*, defaults to 0.5): where the decrease starts; 200 of 400 epochs in RAR.
        end (`float`, *optional*, defaults to 0.75): where it ends; 300 of 400 epochs in RAR.

    Returns:
        `float`: the probability of a random order.
    """
    if progress >= end:
        return 0.0
    return 1.0 if progress <= start else (end - progress) / (end - start)


def random_annealed_order(
    grid_height: int, grid_width: int, generator: torch.Generator | None = None, progress: float = 1.0
) -> torch.Tensor:
    """Random early in the training, raster late in it and in sampling (RAR, arXiv:2411.00776).

    Random with the probability [`random_ratio`], else raster. Arguments and result are those of [`random_order`].
    Where there is no choice none is drawn: the result is then bit for bit what the other order gives.
    """
    ratio = random_ratio(progress)
    is_random = ratio == 1 or (ratio > 0 and draw(torch.rand, (), generator, "cpu").item() < ratio)
    return (random_order if is_random else raster_order)(grid_height, grid_width, generator)


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


GENERATION_ORDERS: dict[str, Callable[..., torch.Tensor]] = {
    "random": random_order,
    "raster": raster_order,
    "spiral": spiral_order,
    "zigzag": zigzag_order,
    "nearest": nearest_order,
    "checkerboard": checkerboard_order,
    "subsampled": subsampled_order,
    "random_annealed": random_annealed_order,
}
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
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"`{argument}` has to be one of {sorted(table)}, got {name!r}.")
    return table[name]
