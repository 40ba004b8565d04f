# SPDX-License-Identifier: Apache-2.0
"""Orders: permutations of every grid, drawn by hand on small ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common import seeded
from mar_hf.generation import (
    GENERATION_ORDERS,
    gtr_order,
    halton_order,
    nearest_order,
    random_annealed_order,
    random_order,
    random_ratio,
    spiral_order,
    subsampled_order,
    zigzag_order,
)


SIZES = [(1, 1), (1, 7), (7, 1), (3, 5), (4, 4), (16, 16)]
SMALL_GRIDS = [(height, width) for height in range(1, 6) for width in range(1, 6)]
RANDOM = ["random", "nearest", "gtr"]


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
        # Rows 1/2, 1/4, 3/4, 1/8, ... of 2 and columns 1/3, 2/3, 1/9, 4/9, ... of 3
        ("halton", [[5, 3, 1], [2, 0, 4]]),
        ("halton", [[1], [0]]),
        ("halton", [[2, 0, 1]]),
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


@pytest.mark.parametrize("name", ["random", "nearest"])
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


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("columns", [1, 3, 9])
def test_halton_puts_one_of_as_many_tokens_into_every_box(rows, columns):
    order = halton_order(8, 9)
    boxes = order // 9 // (8 // rows) * columns + order % 9 // (9 // columns)
    for some in boxes.view(-1, rows * columns):
        assert torch.equal(some.sort().values, torch.arange(rows * columns))


@given(height=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 99))
def test_gtr_goes_set_by_set_and_leaves_no_two_neighbours_for_a_set(height, width, seed):
    order = gtr_order(height, width, seeded(seed))
    rows, columns = order // width, order % width
    numbers = [{0: 0, 1: 2, 2: 1, 3: 2}[total] for total in ((rows + columns) % 4).tolist()]
    assert numbers == sorted(numbers)
    for number in range(3):
        own = torch.tensor(numbers) == number
        distance = (rows[own][:, None] - rows[own]).abs() + (columns[own][:, None] - columns[own]).abs()
        assert not (distance == 1).any()


def test_gtr_is_random_within_a_set():
    generator = seeded()
    orders = torch.stack([gtr_order(2, 4, generator) for _ in range(1000)])
    # 0 and 7, then 2 and 5, then the others: each first of its set as often as another, with a deviation of 15.8, 13.7
    for start, members in ((0, [0, 7]), (2, [2, 5]), (4, [1, 3, 4, 6])):
        counts = orders[:, start].bincount(minlength=8)[members]
        assert counts.sum() == 1000 and (counts - 1000 / len(members)).abs().max() < 4 * 15.8


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
