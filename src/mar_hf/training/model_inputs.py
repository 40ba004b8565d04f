# SPDX-License-Identifier: Apache-2.0
"""What a model is given at a step: tokens, labels, texts, and what it leaves open."""

from typing import Any

import torch
from transformers import PreTrainedModel

from ..models import encode_texts
from ..tokenizers import ImageTokenizer
from .arguments import TrainingArguments
from .batches import example_generators


def draw_inputs(
    args: TrainingArguments,
    model: PreTrainedModel,
    generators: list[torch.Generator],
    batch_number: int,
    device: torch.device,
    rank: int = 0,
    progress: float = 1.0,
) -> dict[str, Any]:
    """What the model leaves open for a batch: masks or orders, each example's from its own generator.

    What examples have in common is the same in all processes, unless the settings say otherwise.

    Args:
        args (`TrainingArguments`): for the seed.
        model (`PreTrainedModel`): the bare model.
        generators (`list[torch.Generator]`): one an example.
        batch_number (`int`): of the batches of the run.
        device (`torch.device`): where the model is.
        rank (`int`, *optional*, defaults to 0): this process.
        progress (`float`, *optional*, defaults to 1.0): share of the steps that are done.

    Returns:
        `dict`: arguments of the model.
    """
    stream = 4 + rank if args.mask_ratio_per_process else 2
    shared = example_generators(args.seed, [batch_number], stream=stream)[0]
    drawn = model.training_inputs(len(generators), generators, shared, progress=progress)
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in drawn.items()}


@torch.no_grad()
def encode(
    batch: dict[str, torch.Tensor], tokenizer: ImageTokenizer, generators: list[torch.Generator], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch's tokens and labels, on the device.

    Args:
        batch (`dict[str, torch.Tensor]`): pictures, or moments of latents.
        tokenizer (`ImageTokenizer`): with weights for pictures.
        generators (`list[torch.Generator]`): one an example.
        device (`torch.device`): where they are wanted.

    Returns:
        `torch.Tensor` of shape `(batch, num_tokens, token_dim)` in float32, and one of shape `(batch,)`.
    """
    labels = batch["label"].to(device, non_blocking=True)
    if "mean" in batch:
        mean, std = (batch[name].to(device, torch.float32, non_blocking=True) for name in ("mean", "std"))
        return tokenizer.sample_moments(mean, std, generator=generators).tokens, labels
    pictures = batch["pixel_values"].to(device, non_blocking=True)
    return tokenizer.encode(pictures, generator=generators).tokens, labels


@torch.no_grad()
def text_inputs(
    batch: dict[str, Any], text_encoder: PreTrainedModel | None, tokenizer: Any, limit: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """What the model is told of a batch's captions.

    Args:
        batch (`dict`): with `text`, or with states that were cached.
        text_encoder (`PreTrainedModel`, *optional*): for texts.
        tokenizer (`Any`): of the text encoder.
        limit (`int`): tokens after which a text is cut.
        device (`torch.device`): where the model is.

    Returns:
        `dict`: arguments of the model; nothing where there are no captions.
    """
    if "text" in batch:
        embeds, mask = encode_texts(batch["text"], text_encoder, tokenizer, limit)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}
    names = ("prompt_embeds", "prompt_attention_mask")
    return {name: batch[name].to(device, non_blocking=True) for name in names if name in batch}
