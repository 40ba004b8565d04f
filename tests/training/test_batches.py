# SPDX-License-Identifier: Apache-2.0
"""The order of examples, what is random about them, and their captions."""

import pytest
import torch
from torch.utils.data import DataLoader

from mar_hf.training.batches import Collator, PositionedDataset, TrainingBatches, draw_one, example_generators


TEMPLATES = ["{}", "{label}: {}"]


def take(sampler, count):
    return [batch for batch, _ in zip(sampler, range(count), strict=False)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_example_comes_once_an_epoch_over_all_processes(world_size):
    # 3 epochs of 14 examples: no number of examples that a global batch divides.
    processes = [
        take(TrainingBatches(14, 7, seed=3, rank=rank, world_size=world_size), 6 // world_size)
        for rank in range(world_size)
    ]
    keys = sorted((position, index) for batches in processes for batch in batches for index, position in batch)
    assert [position for position, _ in keys] == list(range(42))
    epochs = [[index for _, index in keys[first : first + 14]] for first in (0, 14, 28)]
    assert all(sorted(epoch) == list(range(14)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    # The same order whatever the number of processes, and another one with another seed.
    alone = [index for batch in take(TrainingBatches(14, 7, seed=3), 6) for index, _ in batch]
    assert alone == sum(epochs, [])
    assert alone != [index for batch in take(TrainingBatches(14, 7, 4), 6) for index, _ in batch]


def test_the_stream_goes_on_where_it_is_told_to():
    whole = take(TrainingBatches(5, 2, seed=1), 9)
    assert take(TrainingBatches(5, 2, seed=1, start=8), 5) == whole[4:]


def test_rows_carry_their_position():
    class Squares(torch.utils.data.Dataset):
        def __len__(self):
            return 5

        def __getitems__(self, indices):
            return [{"square": index**2} for index in indices]

    sampler = TrainingBatches(5, 4, seed=0)
    loader = DataLoader(PositionedDataset(Squares()), batch_sampler=sampler)
    batch = next(iter(loader))
    assert batch["position"].tolist() == [0, 1, 2, 3]
    assert batch["square"].tolist() == [sampler.index_at(position) ** 2 for position in range(4)]


def test_an_examples_randomness_depends_on_seed_position_and_stream():
    def draws(*args, **kwargs):
        return [torch.rand((), generator=g).item() for g in example_generators(*args, **kwargs)]

    first = draws(0, [5, 6, 7])
    assert draws(0, [7, 5]) == [first[2], first[0]]
    numbers = first + draws(1, [5, 6, 7]) + draws(0, [5, 6, 7], stream=1)
    assert len(set(numbers)) == 9


def test_captions_are_drawn_by_position_and_all_of_them():
    collate = Collator(0, False, False, TEMPLATES, ["c", "d"])

    def batch(positions):
        keys = [
            {"text": ["a", "b"], "label": p % 2, "position": p, "pixel_values": torch.zeros(3, 2, 2)}
            for p in positions
        ]
        return collate(keys)["text"]

    together = batch(range(40))
    assert together == [batch([position])[0] for position in range(40)]
    assert set(together[::2]) == {"a", "b", "c: a", "c: b"}
    assert set(together[1::2]) == {"a", "b", "d: a", "d: b"}


def test_every_choice_is_drawn():
    generators = example_generators(0, range(100))
    assert {draw_one("abc", generator) for generator in generators} == set("abc")
