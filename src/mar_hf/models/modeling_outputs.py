# SPDX-License-Identifier: Apache-2.0
"""What the backbones return."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class BackboneOutput(ModelOutput):
    """What a backbone returns, with or without a head on it.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): the head's loss, float32, where a noise scheduler was given.
        condition (`torch.Tensor` of shape `(batch, num_tokens, hidden_size)`): what the head needs to sample each
            token.
        encoder_last_hidden_state (`torch.Tensor` of shape `(batch, num_class_tokens + num_visible, hidden_size)`,
            *optional*): the encoder's output, class tokens first, then visible tokens in raster order.
        hidden_states (`tuple[torch.Tensor]`, *optional*): with `output_hidden_states`: what goes into the first block
            and what comes out of each, the encoder's before the decoder's, of shape `(batch, length, width)`.
        attentions (`tuple[torch.Tensor]`, *optional*): with `output_attentions`: probabilities of the blocks'
            self-attention, of shape `(batch, heads, length, key_length)`.
    """

    loss: torch.Tensor | None = None
    condition: torch.Tensor | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
