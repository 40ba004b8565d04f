# SPDX-License-Identifier: Apache-2.0
"""Texts: from the states of any text encoder to what the blocks of a backbone attend to."""

from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import file_exists
from torch import nn
from transformers import AutoModelForTextEncoding, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .configuration_backbone import BackboneConfig
from .layers import BackboneLayer, ContextStates, TransformerLayer


def load_text_encoder(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A frozen text encoder with its tokenizer.

    Args:
        source (`str`): folder or hub id, of a model of transformers with its tokenizer, or of what has both in
            sub-folders `text_encoder` and `tokenizer`, such as a pipeline.

    Returns:
        the model, in eval mode and without a decoder, and the tokenizer.
    """
    config = Path("text_encoder", "config.json")
    local = Path(source).is_dir()
    nested = (source / config).exists() if local else file_exists(source, config.as_posix())
    parts = ("text_encoder", "tokenizer") if nested else ("", "")
    text_encoder = AutoModelForTextEncoding.from_pretrained(source, subfolder=parts[0])
    return text_encoder.requires_grad_(False).eval(), AutoTokenizer.from_pretrained(source, subfolder=parts[1])


def check_text_encoder(text_encoder: PreTrainedModel, text_dim: int | None) -> None:
    """Refuse a text encoder that does not fit a model.

    Args:
        text_encoder (`PreTrainedModel`): of transformers.
        text_dim (`int`, *optional*): of the model; None: it takes no texts.

    Raises:
        ValueError: if it has a decoder, or its states are not as wide as the model expects.
    """
    config = text_encoder.config
    if config.is_encoder_decoder:
        raise ValueError(f"`text_encoder` has to be an encoder alone, not {type(text_encoder).__name__}.")
    if config.hidden_size != text_dim:
        raise ValueError(
            f"`text_encoder` gives states of {config.hidden_size} numbers, but `transformer` takes {text_dim}."
        )


@torch.no_grad()
def encode_texts(
    texts: Sequence[str],
    text_encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states of texts, as models take them.

    Args:
        texts (`Sequence[str]`): the texts; an empty one becomes the null text.
        text_encoder (`PreTrainedModel`): any whose output has a `last_hidden_state`.
        tokenizer (`PreTrainedTokenizerBase`): of the text encoder.
        max_length (`int`): tokens after which a text is cut; earlier where the tokenizer has a lower limit.
        device (`torch.device` or `str`, *optional*): where to compute; None means where the text encoder is.

    Returns:
        two `torch.Tensor`: the states of shape `(texts, length, text_dim)` and a bool mask of shape `(texts, length)`,
        False for padding and in the whole row of a null text.
    """
    device = text_encoder.device if device is None else device
    # CLIP and BERT know so many positions and no more.
    max_length = min(max_length, tokenizer.model_max_length)
    inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    mask = inputs.attention_mask.to(device)
    states = text_encoder(input_ids=inputs.input_ids.to(device), attention_mask=mask).last_hidden_state
    is_text = torch.tensor([bool(text.strip()) for text in texts], device=device)
    return states, mask.bool() & is_text[:, None]


class TextAligner(nn.Module):
    """States of a frozen text encoder to the context of a backbone (the aligner of Fluid, arXiv:2410.13863).

    A projection, learned positions and transformer blocks in which no token sees padding. A text without any token
    is the learned null text.

    Args:
        config ([`BackboneConfig`]): with `text_dim`.
    """

    def __init__(self, config: BackboneConfig):
        super().__init__()
        width, heads, count = config.hidden_size, config.num_attention_heads, config.text_aligner_layers
        self.null_text = nn.Parameter(torch.zeros(1, 1, config.text_dim))
        self.proj = nn.Linear(config.text_dim, width)
        self.proj_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.position_embedding = nn.Parameter(torch.zeros(1, config.num_text_tokens, width))
        self.layers = nn.ModuleList([TransformerLayer(config, width, heads) for _ in range(count)])
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, prompt_embeds: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Align.

        Args:
            prompt_embeds (`torch.Tensor` of shape `(batch, length, text_dim)`): the text encoder's states; those of
                padding are not read.
            mask (`torch.Tensor` of shape `(batch, length)`): bool, False for padding; a row of False is the null text.

        Returns:
            two `torch.Tensor`: the context of shape `(batch, length, hidden_size)`, and what is added to the scores
            of attention to it, of shape `(batch, 1, 1, length)`.
        """
        is_null = ~mask.any(1, keepdim=True)
        # The null text is one token, in the first place.
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        mask = mask | (is_null & first)
        states = torch.where(is_null[..., None], self.null_text, prompt_embeds.to(self.null_text.dtype))
        # What is not seen is still multiplied, by 0: it has to be a number.
        states = torch.where(mask[..., None], states, 0.0)
        # Places among the text's own tokens, on whichever side the padding is.
        places = (mask.cumsum(1) - 1).clamp(min=0)
        hidden_states = self.proj_norm(self.proj(states)) + self.position_embedding[0][places]
        added = torch.zeros(mask.shape, dtype=hidden_states.dtype, device=mask.device)
        added = added.masked_fill(~mask, torch.finfo(added.dtype).min)[:, None, None]
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=added)
        return self.norm(hidden_states), added


class TextContext:
    """The texts of a call: what is computed from them once is kept here for all its steps.

    Args:
        prompt_embeds (`torch.Tensor` of shape `(batch, length, text_dim)`): the text encoder's states.
        prompt_attention_mask (`torch.Tensor` of shape `(batch, length)`): True or 1 for tokens, False or 0 for
            padding; a row without tokens is the null text.
        sampling (`bool`, *optional*, defaults to `False`): for steps without dropout: null texts at the end are
            attended to once for all of them ([`ContextAttention.read`]). The same up to rounding.
        absorb (`bool`, *optional*, defaults to `False`): for many steps of long sequences, likewise: short texts
            absorb the layers of queries and output.
    """

    def __init__(
        self,
        prompt_embeds: torch.Tensor,
        prompt_attention_mask: torch.Tensor,
        sampling: bool = False,
        absorb: bool = False,
    ):
        self.prompt_embeds = prompt_embeds
        self.mask = prompt_attention_mask.bool()
        self.sampling = sampling
        self.absorb = absorb
        self._blocks: list[ContextStates] | None = None

    def read_by(self, aligner: TextAligner, blocks: list[BackboneLayer]) -> list[ContextStates]:
        """What each block attends to; computed at the first call only.

        Args:
            aligner ([`TextAligner`]): of the backbone.
            blocks (`list[BackboneLayer]`): its blocks, always the same.

        Returns:
            `list[tuple]`, one entry a block: what [`ContextAttention`] needs of the texts.
        """
        if self._blocks is None:
            states, added = aligner(self.prompt_embeds, self.mask)
            # The null texts of guidance, which come last. One row at least is left.
            single = int((self.mask[1:].sum(1) <= 1).flip(0).cumprod(0).sum()) if self.sampling else 0
            self._blocks = [block.context_attention.read(states, added, self.absorb, single) for block in blocks]
        return self._blocks
