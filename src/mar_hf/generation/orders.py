# SPDX-License-Identifier: Apache-2.0
"""The orders in which tokens are generated. A new one is a function and a line in `GENERATION_ORDERS`."""

from collections.abc import Callable

import torch

from ..utils import draw


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


def _halton_cells(size: int, base: int, count: int) -> torch.Tensor:
    """The first `count` numbers of van der Corput's sequence in [0, 1), each as the cell of `size` it lies in."""
    left, reversed_digits, scale = torch.arange(1, count + 1), torch.zeros(count, dtype=torch.int64), 1
    while scale <= count:
        left, digit = left // base, left % base
        reversed_digits, scale = reversed_digits * base + digit, scale * base
    return reversed_digits * size // scale  # in integers, so that no number is rounded into another cell


def halton_order(
    grid_height: int, grid_width: int, generator: torch.Generator | None = None, progress: float = 1.0
) -> torch.Tensor:
    """The positions that the Halton sequence of the bases 2 (rows) and 3 (columns) meets, each when it is first met.

    Any first tokens are spread evenly over the picture (Halton-MaskGIT, arXiv:2503.17076). Arguments and result are
    those of [`random_order`]; nothing is drawn.
    """
    # 2^a 3^b points in a row hit each box of 2^-a by 3^-b once. With boxes of at most half a cell's sides, every cell
    # has one inside.
    count = 1
    for base, size in ((2, grid_height), (3, grid_width)):
        boxes = 1
        while boxes < 2 * size:
            boxes *= base
        count *= boxes
    positions = _halton_cells(grid_height, 2, count) * grid_width + _halton_cells(grid_width, 3, count)
    first = torch.full((grid_height * grid_width,), count)
    return first.scatter_reduce(0, positions, torch.arange(count), "amin").argsort()


def gtr_order(
    grid_height: int, grid_width: int, generator: torch.Generator | None = None, progress: float = 1.0
) -> torch.Tensor:
    """A checkerboard that is halved once more, at random within each set ("GtR", arXiv:2510.17171, with K = 3).

    First come the positions whose row + column is divisible by 4, then the other even ones, last the odd ones, all of
    whose neighbours are there by then. Arguments and result are those of [`random_order`].
    """
    shuffled = random_order(grid_height, grid_width, generator)
    sums = shuffled // grid_width + shuffled % grid_width
    return shuffled[torch.gcd(sums, torch.tensor(4)).argsort(descending=True, stable=True)]


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


GENERATION_ORDERS: dict[str, Callable[..., torch.Tensor]] = {
    "random": random_order,
    "raster": raster_order,
    "spiral": spiral_order,
    "zigzag": zigzag_order,
    "nearest": nearest_order,
    "checkerboard": checkerboard_order,
    "subsampled": subsampled_order,
    "halton": halton_order,
    "gtr": gtr_order,
    "random_annealed": random_annealed_order,
}
