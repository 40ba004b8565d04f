# SPDX-License-Identifier: Apache-2.0
"""The order of examples, their randomness, and batches of them."""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler, default_collate

from .image_data import augment
from .text_data import caption_choices


class TrainingBatches(Sampler):
    """An endless stream of batches, each a list of (index, position).

    All epochs, each a permutation that depends on the seed and its number only, are put end to end; *position* is a
    place in this row. Global batches are consecutive pieces of it and every process takes its piece of each: nothing
    is repeated or left out, at the end of an epoch neither, and where to go on is one number.

    Args:
        num_examples (`int`): examples of the data set.
        batch_size (`int`): examples a batch and process.
        seed (`int`): of the permutations.
        rank (`int`, *optional*, defaults to 0): this process.
        world_size (`int`, *optional*, defaults to 1): number of processes.
        start (`int`, *optional*, defaults to 0): position of the first global batch.
    """

    def __init__(
        self, num_examples: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, start: int = 0
    ):
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start
        self._permutations: dict[int, list[int]] = {}

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in count():
            first = self.start + (batch * self.world_size + self.rank) * self.batch_size
            positions = range(first, first + self.batch_size)
            yield [(self.index_at(position), position) for position in positions]

    def index_at(self, position: int) -> int:
        """The example at a position.

        Args:
            position (`int`): from 0 on.

        Returns:
            `int`: an index into the data set.
        """
        epoch, place = divmod(position, self.num_examples)
        if epoch not in self._permutations:
            generator = example_generators(self.seed, [epoch], stream=-1)[0]
            permutation = torch.randperm(self.num_examples, generator=generator).tolist()
            # Two are kept: a batch may reach over the border.
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1} | {epoch: permutation}
        return self._permutations[epoch][place]


class PositionedDataset(Dataset):
    """Rows of a data set, asked for by (index, position), with the position beside them.

    Args:
        dataset (`torch.utils.data.Dataset` or `datasets.Dataset`): rows are dictionaries.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[dict]:
        rows = self.dataset.__getitems__([index for index, _ in keys])
        return [{**row, "position": position} for row, (_, position) in zip(rows, keys, strict=True)]


def example_generators(
    seed: int, positions: Sequence[int], device: torch.device | str = "cpu", stream: int = 0
) -> list[torch.Generator]:
    """A generator for each example: what is random about one depends on the seed and its position only.

    Args:
        seed (`int`): of the run.
        positions (`Sequence[int]`): places in the row of all epochs.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): of the generators.
        stream (`int`, *optional*, defaults to 0): generators of different streams are independent.

    Returns:
        `list[torch.Generator]`: one a position.
    """
    # A CPU generator takes 32 bits of its seed. Odd multipliers spread runs and streams over them.
    base = seed * 0x9E3779B1 + stream * 0x85EBCA6B
    return [torch.Generator(device).manual_seed((base + int(position)) % 2**32) for position in positions]


def draw_one(choices: Sequence[Any], generator: torch.Generator) -> Any:
    """One of several, all as likely.

    Args:
        choices (`Sequence`): at least one.
        generator (`torch.Generator`): on the CPU.

    Returns:
        `Any`: an entry.
    """
    return choices[int(torch.randint(len(choices), (), generator=generator))]


class Collator:
    """Rows to a batch, augmented; picklable, so that it runs where examples are read.

    Of the captions of a row (`text`, or the states of a text encoder as `prompt_embeds`) one is drawn.

    Args:
        seed (`int`): of the run.
        random_flip (`bool`): mirror half of the pictures.
        random_shift (`int`): shift pictures by up to so many pixels.
        templates (`Sequence[str]`, *optional*, defaults to `("{}",)`): what captions are put into.
        class_names (`list[str]`, *optional*): for templates that name the class.
    """

    def __init__(
        self,
        seed: int,
        random_flip: bool,
        random_shift: int,
        templates: Sequence[str] = ("{}",),
        class_names: list[str] | None = None,
    ):
        self.seed = seed
        self.random_flip = random_flip
        self.random_shift = random_shift
        self.templates = templates
        self.class_names = class_names

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        ragged = [{name: row.pop(name) for name in ("text", "prompt_embeds") if name in row} for row in rows]
        for choices, row in zip(ragged, rows, strict=True):
            if "text" in choices:
                label = self.class_names[row["label"]] if self.class_names else ""
                choices["text"] = caption_choices(choices["text"], self.templates, label)
        batch = default_collate(rows)
        batch |= self.draw_captions(ragged, batch["position"])
        generators = example_generators(self.seed, batch["position"], stream=1)
        if "pixel_values" in batch:
            return {
                **batch,
                "pixel_values": augment(batch["pixel_values"], generators, self.random_flip, self.random_shift),
            }
        mirrored = {name: batch.pop(f"{name}_flipped", None) for name in ("mean", "std")}
        if self.random_flip:
            chosen = torch.stack([torch.rand((), generator=g) for g in generators]) < 0.5
            chosen = chosen[:, None, None, None]
            batch |= {name: torch.where(chosen, value, batch[name]) for name, value in mirrored.items()}
        return batch

    def draw_captions(self, rows: list[dict], positions: torch.Tensor) -> dict[str, Any]:
        """One caption of each row, by the row's own generator.

        Args:
            rows (`list[dict]`): lists of choices, as `text` or `prompt_embeds`; or empty ones.
            positions (`torch.Tensor` of shape `(batch,)`): of the rows.

        Returns:
            `dict`: `text`, a list; `prompt_embeds` of shape `(batch, length, text_dim)` with a `prompt_attention_mask`
            of shape `(batch, length)`; or nothing.
        """
        chosen = {}
        generators = example_generators(self.seed, positions, stream=-2)
        for name in rows[0]:
            chosen[name] = [draw_one(row[name], g) for row, g in zip(rows, generators, strict=True)]
        if "prompt_embeds" in chosen:
            lengths = torch.tensor([len(states) for states in chosen["prompt_embeds"]])
            chosen["prompt_embeds"] = pad_sequence(chosen["prompt_embeds"], batch_first=True)
            chosen["prompt_attention_mask"] = torch.arange(int(lengths.max())) < lengths[:, None]
        return chosen
