# SPDX-License-Identifier: Apache-2.0
"""Captions: the texts that a picture's captions give, and their states."""

import pathlib
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models import encode_texts
from .image_data import load_image_dataset


def caption_choices(captions: Sequence[str], templates: Sequence[str], label: str = "") -> list[str]:
    """Every caption in every template.

    Args:
        captions (`Sequence[str]`): of a picture.
        templates (`Sequence[str]`): with `{}` for the caption and, where wanted, `{label}` for the class.
        label (`str`, *optional*, defaults to `""`): name of the class.

    Returns:
        `list[str]`: the templates of the first caption first.
    """
    return [template.format(caption, label=label) for caption in captions for template in templates]


def encode_choices(
    choices: Sequence[Sequence[str]],
    text_encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[list[torch.Tensor]]:
    """The states of every text of several pictures, without padding.

    Args:
        choices (`Sequence[Sequence[str]]`): the texts of each picture.
        text_encoder (`PreTrainedModel`): the encoder.
        tokenizer (`PreTrainedTokenizerBase`): of the encoder.
        max_length (`int`): tokens after which a text is cut.

    Returns:
        `list[list[torch.Tensor]]`: for each text of each picture its states, of shape `(length, text_dim)`.
    """
    flat = [text for texts in choices for text in texts]
    states, mask = encode_texts(flat, text_encoder, tokenizer, max_length)
    texts = iter([one[kept] for one, kept in zip(states.cpu(), mask.cpu(), strict=True)])
    return [[next(texts) for _ in range(len(own))] for own in choices]


def read_captions(path: str, column: str) -> tuple[list[list[str]], list[str]]:
    """The captions of every picture, and the name of its class.

    Args:
        path (`str`): a captioned image folder, or a text file, whose lines are one caption each.
        column (`str`): of the captions, in a folder.

    Returns:
        `list[list[str]]`, none of them empty, and `list[str]`, empty where there are no classes.

    Raises:
        ValueError: if there are none.
    """
    if not pathlib.Path(path).is_file():
        dataset = load_image_dataset(path, column)
        if "text" not in dataset.column_names:
            raise ValueError(f"`train_data_dir` {path!r} holds no captions: no column {column!r}.")
        names = dataset.features["label"].names if "label" in dataset.column_names else None
        return dataset["text"][:], [names[label] for label in dataset["label"]] if names else [""] * len(dataset)
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"`train_data_dir` {path!r} is no text file in UTF-8: {error}") from error
    captions = [[line.strip()] for line in lines if line.strip()]
    if not captions:
        raise ValueError(f"`train_data_dir` {path!r} holds no captions.")
    return captions, [""] * len(captions)
