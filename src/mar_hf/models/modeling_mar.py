# SPDX-License-Identifier: Apache-2.0
"""Masked autoregressive model: an encoder over visible tokens, a decoder over all, a token head on top."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils.output_capturing import capture_outputs
from typing_extensions import Unpack

from ..generation import sample_mask, sample_num_masked
from ..utils import check_generator
from .argument_docs import fill_arguments
from .configuration_mar import MARConfig
from .layers import BackboneLayer, check_inputs, fill_labels
from .modeling_backbone import BackboneInputs, BackbonePreTrainedModel, TokenHeadMixin
from .modeling_outputs import BackboneOutput
from .text_context import TextContext


class MARPreTrainedModel(BackbonePreTrainedModel):
    """What MAR models share.

    Args:
        config ([`MARConfig`]): see there.
    """

    config_class = MARConfig
    config: MARConfig


@fill_arguments
class MARModel(MARPreTrainedModel):
    """The masked encoder-decoder of MAR (arXiv:2406.11838): tokens and a mask in, a condition for each out.

    The encoder sees class tokens and visible tokens; the decoder sees class tokens and all positions, with a mask
    token where nothing is known yet. The null class is the last row of the class embedding.

    Args:
        config ([`MARConfig`]): see there.
    """

    def __init__(self, config: MARConfig):
        super().__init__(config)
        width, decoder_width = config.hidden_size, config.decoder_hidden_size
        decoder_heads = config.decoder_num_attention_heads
        length = config.num_class_tokens + config.num_tokens
        self.build_inputs()
        self.encoder_position_embedding = nn.Parameter(torch.zeros(1, length, width))
        self.encoder_layers = nn.ModuleList(
            [
                BackboneLayer(config, width, config.num_attention_heads, context_dim=config.context_dim)
                for _ in range(config.num_encoder_layers)
            ]
        )
        self.encoder_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder_proj = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_position_embedding = nn.Parameter(torch.zeros(1, length, decoder_width))
        self.decoder_layers = nn.ModuleList(
            [
                BackboneLayer(config, decoder_width, decoder_heads, context_dim=config.context_dim)
                for _ in range(config.num_decoder_layers)
            ]
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=config.layer_norm_eps)
        self.condition_position_embedding = nn.Parameter(torch.zeros(1, config.num_tokens, decoder_width))
        self.post_init()

    @capture_outputs
    def forward(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        num_masked: int | None = None,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        positions: torch.Tensor | None = None,
        **inputs: Unpack[BackboneInputs],
    ) -> BackboneOutput | tuple[torch.Tensor, ...]:
        """Condition vectors, for all positions or some.

        Args:
            tokens (`torch.Tensor` of shape `(batch, num_tokens, token_dim)`): the tokens; masked ones are not read.
            mask (`torch.Tensor` of shape `(batch, num_tokens)`): bool, True = still to be generated; as many in every
                row.
            {class_labels}
            num_masked (`int`, *optional*): masked tokens in a row, where the caller knows it: saves counting them,
                which waits for the device.
            {generator}
            positions (`torch.Tensor` of shape `(batch, count)`, *optional*): int64, where a condition is wanted; the
                last block computes no others. None: everywhere.
            {prompt_embeds, prompt_attention_mask, text_context, return_dict}
            {output_hidden_states, output_attentions}

        Returns:
            [`BackboneOutput`]: `condition` and `encoder_last_hidden_state`.

        Raises:
            ValueError: if a shape, a label or the number of generators does not fit, rows have different numbers of
                masked tokens, or the model takes no texts.
        """
        config, num_prefix, num_tokens = (
            self.config,
            self.config.num_class_tokens,
            self.condition_position_embedding.shape[1],
        )
        check_inputs(tokens, mask, num_tokens, config.token_dim, positions, num_masked)
        if generator is not None:
            check_generator(generator, len(tokens))
        if num_masked is None:
            counts = mask.sum(1)
            if (counts != counts[0]).any():
                raise ValueError(f"`mask` has to mask as many tokens in every row, got {counts.tolist()}.")
            num_masked = int(counts[0])
        # Visible positions in raster order, (B, V): a stable sort puts False first.
        visible = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, : num_tokens - num_masked]

        # (B, P + L, D), then only class tokens and visible positions: (B, P + V, D)
        blocks = [*self.encoder_layers, *self.decoder_layers]
        contexts, dropped = [None] * len(blocks), None
        if inputs or config.text_dim is not None:
            contexts, dropped = self.read_text(blocks, tokens, generator, **inputs)
        dropout = config.class_dropout_prob if self.training else 0.0
        labels = fill_labels(class_labels, tokens, config.num_classes, dropout, dropped, generator)
        embedding, places = self.class_embedding(labels), self.encoder_position_embedding
        # Not the type of the projection's weights, which may be stored in another than they compute in.
        hidden_states = self.token_proj(tokens.to(places.dtype))
        hidden_states = torch.cat([embedding[:, None].expand(-1, num_prefix, -1), hidden_states], dim=1)
        hidden_states = self.token_norm(hidden_states + places)
        kept = hidden_states[:, num_prefix:].take_along_dim(visible[..., None], 1)
        hidden_states = torch.cat([hidden_states[:, :num_prefix], kept], dim=1)
        for layer, context in zip(self.encoder_layers, contexts[: len(self.encoder_layers)], strict=True):
            hidden_states = layer(hidden_states, context=context)
        encoded = self.encoder_norm(hidden_states)

        # (B, P + V, D) -> (B, P + L, D): mask tokens wherever nothing is visible
        hidden_states = self.decoder_proj(encoded)
        index = visible[..., None].expand(-1, -1, hidden_states.shape[-1])
        canvas = self.mask_token.to(hidden_states.dtype).expand(tokens.shape[0], num_tokens, -1)
        canvas = canvas.scatter(1, index, hidden_states[:, num_prefix:])
        hidden_states = torch.cat([hidden_states[:, :num_prefix], canvas], dim=1) + self.decoder_position_embedding
        *layers, last = zip(self.decoder_layers, contexts[len(self.encoder_layers) :], strict=True)
        for layer, context in layers:
            hidden_states = layer(hidden_states, context=context)
        layer, context = last
        wanted = None if positions is None else positions + num_prefix
        hidden_states = layer(hidden_states, context=context, wanted=wanted)
        if positions is None:
            condition = self.decoder_norm(hidden_states)[:, num_prefix:] + self.condition_position_embedding
        else:
            condition = self.decoder_norm(hidden_states) + self.condition_position_embedding[0][positions]
        return BackboneOutput(condition=condition, encoder_last_hidden_state=encoded)


@fill_arguments
class MARForImageGeneration(TokenHeadMixin, MARPreTrainedModel):
    """[`MARModel`] with a token head: computes the training loss, and holds what the pipeline samples with.

    Args:
        config ([`MARConfig`]): see there.
    """

    backbone_class = MARModel

    def training_inputs(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        shared_generator: torch.Generator | None = None,
        num_masked: int | None = None,
        progress: float = 1.0,
    ) -> dict[str, Any]:
        """Draw what a training step leaves open, as `forward` takes it: which tokens are masked.

        Args:
            batch_size (`int`): images.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): for the positions: one, or one per
                image; None means torch's global one.
            shared_generator (`torch.Generator`, *optional*): for the number of masked tokens, one for the batch; None
                means `generator`.
            num_masked (`int`, *optional*): masked tokens in a row, where it is not to be drawn.
            progress (`float`, *optional*, defaults to 1.0): share of the training that is done, for orders that
                change on the way.

        Returns:
            `dict`: `mask` and `num_masked`.

        Raises:
            ValueError: with a list of generators and neither `num_masked` nor a shared generator.
        """
        config = self.config
        if num_masked is None:
            if shared_generator is None and isinstance(generator, list):
                raise ValueError("`num_masked` has to be given with a list of generators: it is one for the batch.")
            ratios = (config.mask_ratio_min, config.mask_ratio_mean, config.mask_ratio_std)
            num_masked = sample_num_masked(config.num_tokens, *ratios, generator=shared_generator or generator)
        if config.order == "random":
            mask = sample_mask(batch_size, config.num_tokens, num_masked, generator)
        else:
            # The first of the order are there, the others are still to come.
            orders = self.draw_orders(batch_size, generator, progress)
            mask = torch.ones(orders.shape, dtype=torch.bool, device=orders.device)
            mask = mask.scatter(1, orders[:, : config.num_tokens - num_masked], False)
        return {"mask": mask, "num_masked": num_masked}

    def forward(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        noise_scheduler: object | None = None,
        timesteps: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        num_masked: int | None = None,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        positions: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
        return_loss: bool | None = None,
        sampling: dict[str, Any] | None = None,
        **inputs: Unpack[BackboneInputs],
    ) -> BackboneOutput | tuple[torch.Tensor, ...] | torch.Tensor:
        """Condition vectors, and the training loss where it is asked for.

        What is random and not given is drawn from `generator` in this order: number of masked tokens, their
        positions, context noise, text dropout, class dropout, timesteps, noise. With one generator per image, what is
        drawn for an image does not depend on the others.

        Args:
            tokens (`torch.Tensor` of shape `(batch, num_tokens, token_dim)`): the tokens.
            mask (`torch.Tensor` of shape `(batch, num_tokens)`, *optional*): bool, True = to be generated; drawn in
                training mode where not given.
            {class_labels, noise_scheduler, timesteps, noise}
            num_masked (`int`, *optional*): masked tokens in a row: of the mask, where the caller knows it, or of the
                one to be drawn, where it is not left to the generator.
            {generator}
            positions (`torch.Tensor` of shape `(batch, count)`, *optional*): int64, where a condition is wanted; not
                with a loss, which needs all. None: everywhere.
            {condition, return_loss, sampling}
            {prompt_embeds, prompt_attention_mask, text_context, return_dict}
            {output_hidden_states, output_attentions}

        Returns:
            [`BackboneOutput`]: `loss` (if asked for), `condition`, `encoder_last_hidden_state`.

        Raises:
            ValueError: if a shape, a label or the number of generators does not fit, in eval mode without a mask,
                with both `positions` and a loss, or with a list of generators and neither `mask` nor
                `num_masked`: the batch has one number of masked tokens.
        """
        if sampling is not None:
            return self.head.draw(**sampling)
        if condition is not None:
            return self.with_loss(
                BackboneOutput(condition=condition), tokens, mask, scheduler=noise_scheduler, generator=generator
            )
        if return_loss is None:
            return_loss = noise_scheduler is not None
        if positions is not None and return_loss:
            raise ValueError("`positions` does not go with `noise_scheduler`: the loss needs all conditions.")
        if mask is None:
            check_inputs(tokens, None, self.config.num_tokens, self.config.token_dim, positions, num_masked)
            check_generator(generator, len(tokens))
            if not self.training:
                raise ValueError("`mask` has to be given in eval mode: True for the tokens still to be generated.")
            drawn = self.training_inputs(len(tokens), generator, num_masked=num_masked)
            mask, num_masked = drawn["mask"].to(tokens.device), drawn["num_masked"]
        return_dict = inputs.pop("return_dict", self.config.return_dict)
        seen = self.draw_context(tokens, generator) if self.training else tokens
        inputs |= {"positions": positions, "generator": generator}
        output = self.model(seen, mask, class_labels, num_masked, **inputs, return_dict=True)
        if return_loss:
            draws = {"timesteps": timesteps, "noise": noise, "num_masked": num_masked, "generator": generator}
            output = self.with_loss(output, tokens, mask, scheduler=noise_scheduler, **draws)
        return output.to_tuple() if return_dict is False else output

    def make_cache(self, tokens_per_step: list[int], static: bool = False) -> None:
        """Nothing that `predict` could keep: what a token sees changes with every step.

        Args:
            tokens_per_step (`list[int]`): tokens of all steps.
            {static}
        """

    def predict(
        self,
        tokens: torch.Tensor,
        orders: torch.Tensor,
        tokens_per_step: Sequence[int],
        class_labels: torch.Tensor | None = None,
        past_key_values: None = None,
        text_context: TextContext | None = None,
    ) -> torch.Tensor:
        """One autoregressive step: conditions of the next tokens.

        Args:
            {tokens, orders, tokens_per_step, class_labels}
            past_key_values (`None`): nothing can be kept.
            {text_context}

        Returns:
            `torch.Tensor` of shape `(batch, tokens_per_step[-1], hidden_size)`: in the order of generation.
        """
        done, count = sum(tokens_per_step[:-1]), tokens_per_step[-1]
        mask = torch.ones(orders.shape, dtype=torch.bool, device=orders.device).scatter(1, orders[:, :done], False)
        inputs = {} if text_context is None else {"text_context": text_context}
        inputs |= {"num_masked": orders.shape[1] - done, "positions": orders[:, done : done + count]}
        return self(tokens, mask, class_labels, **inputs, return_dict=True).condition
