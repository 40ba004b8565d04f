# SPDX-License-Identifier: Apache-2.0
"""Causal autoregressive model: each token sees the class and the tokens before it in any order, with a cache."""

from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, StaticCache
from transformers.utils.output_capturing import capture_outputs
from typing_extensions import Unpack

from ..generation import sample_tokens_per_step
from ..generation.schedules import check_tokens_per_step
from ..utils import check_generator
from .argument_docs import fill_arguments
from .configuration_ar import ARConfig
from .layers import BackboneLayer, check_inputs, fill_labels
from .modeling_backbone import BackboneInputs, BackbonePreTrainedModel, TokenHeadMixin
from .modeling_outputs import BackboneOutput
from .text_context import TextContext


# What stands in a slot of the sequence in place of a token's rank, and where none is asked for.
CLASS, BLANK, NOTHING = -1, -2, -1


def build_slots(tokens_per_step: list[int], num_class_tokens: int) -> tuple[list[int], list[int], list[int]]:
    """The causal sequence: what each slot holds, what is predicted from it, and the step it belongs to.

    A slot holds a token of the step before (or the class) and predicts one of its own step. Where a step predicts
    more than the one before, slots without content are added; where it predicts fewer, slots remain from which
    nothing is predicted. With one token a step this is the usual sequence, shifted by one.

    Args:
        tokens_per_step (`list[int]`): tokens of each step.
        num_class_tokens (`int`): slots of the class in front. Each sees those before; the last belongs to step 0.

    Returns:
        three `list[int]`, one entry a slot: rank of the token that it holds, `CLASS` or `BLANK`; rank of the token
        that is predicted, or `NOTHING`; step, below 0 for all but the last slot of the class.
    """
    contents, targets = [CLASS] * num_class_tokens, [NOTHING] * (num_class_tokens - 1)
    steps = list(range(1 - num_class_tokens, 1))
    # The last slot of the class is what the first step has before it.
    start, before = 0, 1
    for step, count in enumerate(tokens_per_step):
        size = max(before, count)
        if step > 0:
            contents += range(start - before, start)
            steps += [step] * before
        contents += [BLANK] * (size - before)
        steps += [step] * (size - before)
        targets += [*range(start, start + count), *[NOTHING] * (size - count)]
        start, before = start + count, count
    return contents, targets, steps


class ARPreTrainedModel(BackbonePreTrainedModel):
    """What AR models share.

    Args:
        config ([`ARConfig`]): see there.
    """

    config_class = ARConfig
    config: ARConfig

    def check_tokens_per_step(self, tokens_per_step: list[int]) -> None:
        """Refuse steps that the model was not made for.

        Args:
            tokens_per_step (`list[int]`): tokens of each step.

        Raises:
            ValueError: if a step has none or more than `max_tokens_per_step`, or all together more than there are.
        """
        check_tokens_per_step(tokens_per_step, self.config.num_tokens, self.config.max_tokens_per_step)

    def _check_inputs(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
        orders: torch.Tensor | None,
    ) -> None:
        """Refuse wrong shapes. Whether orders are permutations, only the device knows."""
        check_inputs(tokens, mask, self.config.num_tokens, self.config.token_dim)
        check_generator(generator, len(tokens))
        if orders is None:
            return
        expected = tuple(tokens.shape[:2])
        if not isinstance(orders, torch.Tensor) or orders.dtype != torch.int64:
            raise ValueError(f"`orders` has to be an int64 tensor of shape {expected}, got {orders!r:.60}.")
        if orders.shape != expected:
            raise ValueError(f"`orders` has to be of shape {expected}, got {tuple(orders.shape)}.")
        if orders.device.type == "cpu" and not torch.compiler.is_compiling():
            least, most = orders.min().item(), orders.max().item()
            if least < 0 or most >= expected[1]:
                raise ValueError(f"`orders` has to lie in 0..{expected[1] - 1}, got {least}..{most}.")


@fill_arguments
class ARModel(ARPreTrainedModel):
    """The causal transformer of arXiv:2406.11838, section 3.3, for any order: a condition for each token out.

    The sequence is the class, then the tokens in their order. From each slot the next token is predicted, so each
    slot is told two positions: its own and the one that it predicts (arXiv:2411.00776, section 3.2). The null class
    is the last row of the class embedding.

    Args:
        config ([`ARConfig`]): see there.
    """

    def __init__(self, config: ARConfig):
        super().__init__(config)
        width, length = config.hidden_size, config.num_tokens
        self.build_inputs()
        self.class_position_embedding = nn.Parameter(torch.zeros(1, config.num_class_tokens, width))
        if config.max_tokens_per_step > 1:
            self.blank_token = nn.Parameter(torch.zeros(1, 1, width))
        if config.position_type == "learned":
            self.position_embedding = nn.Parameter(torch.zeros(1, length, width))
            self.target_position_embedding = nn.Parameter(torch.zeros(1, length, width))
        self.condition_position_embedding = nn.Parameter(torch.zeros(1, length, width))
        self.layers = nn.ModuleList(
            [
                BackboneLayer(config, width, config.num_attention_heads, index, config.context_dim)
                for index in range(config.num_layers)
            ]
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.post_init()

    @capture_outputs
    def forward(
        self,
        tokens: torch.Tensor,
        orders: torch.Tensor,
        tokens_per_step: list[int] | None = None,
        class_labels: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        **inputs: Unpack[BackboneInputs],
    ) -> BackboneOutput | tuple[torch.Tensor, ...]:
        """Condition vectors: of all positions, or of the last step's tokens.

        Args:
            tokens (`torch.Tensor` of shape `(batch, num_tokens, token_dim)`): the tokens. A condition depends on those
                of earlier steps only.
            {orders}
            tokens_per_step (`list[int]`, *optional*): tokens of each step up to the one wanted; None means one token
                a step, for all of them. What comes after the last step is not read.
            {class_labels}
            past_key_values (`Cache`, *optional*): keys and values of earlier steps with the same tokens, orders and
                steps; those of the others are added. None computes all steps.
            {generator, prompt_embeds, prompt_attention_mask, text_context, return_dict}
            {output_hidden_states, output_attentions}

        Returns:
            [`BackboneOutput`]: `condition` of shape `(batch, num_tokens, hidden_size)`, row by row, where all tokens
            are predicted; of shape `(batch, n, hidden_size)` in the order of generation for the n tokens of the steps
            that were computed, where there are fewer.

        Raises:
            ValueError: if a shape, a label, the number of generators or the tokens per step do not fit, the cache
                holds all steps already, or the model takes no texts.
        """
        config = self.config
        self._check_inputs(tokens, None, generator, orders)
        tokens_per_step = [1] * config.num_tokens if tokens_per_step is None else tokens_per_step
        self.check_tokens_per_step(tokens_per_step)
        contents, targets, steps = build_slots(tokens_per_step, config.num_class_tokens)
        # Slots that are in the cache need not be computed again.
        first = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if first >= len(contents):
            raise ValueError(f"`past_key_values` has to leave a step of {tokens_per_step} to compute, but holds all.")
        attention_mask, is_causal = self._build_mask(steps, first, tokens, past_key_values)
        contents, targets = contents[first:], targets[first:]

        blocks, dropped = list(self.layers), None
        contexts = [None] * len(blocks)
        if inputs or config.text_dim is not None:
            contexts, dropped = self.read_text(blocks, tokens, generator, **inputs)
        dropout = config.class_dropout_prob if self.training else 0.0
        labels = fill_labels(class_labels, tokens, config.num_classes, dropout, dropped, generator)
        hidden_states = self._embed_slots(tokens, orders, labels, contents)
        asked = _to_device(targets, tokens.device)
        # (B, S): the position that is predicted from each slot; any where none is
        target_positions = orders[:, asked.clamp(min=0)]
        rotary = None
        if config.position_type == "learned":
            embedding = self.target_position_embedding[0][target_positions]
            hidden_states = hidden_states + embedding * (asked != NOTHING)[:, None]
        else:
            held = _to_device(contents, tokens.device)
            rotary = self._build_rotary(orders, held, asked)
        hidden_states = self.token_norm(hidden_states)
        for layer, context in zip(blocks, contexts, strict=True):
            hidden_states = layer(
                hidden_states,
                context=context,
                attention_mask=attention_mask,
                is_causal=is_causal,
                rotary=rotary,
                past_key_values=past_key_values,
            )
        wanted = _to_device([slot for slot, rank in enumerate(targets) if rank != NOTHING], tokens.device)
        positions = target_positions[:, wanted]
        condition = self.norm(hidden_states[:, wanted]) + self.condition_position_embedding[0][positions]
        if condition.shape[1] == config.num_tokens:
            # From the order of generation to rows: position orders[i] gets the i-th.
            condition = condition.gather(1, orders.argsort(1)[..., None].expand_as(condition))
        return BackboneOutput(condition=condition)

    def _embed_slots(
        self, tokens: torch.Tensor, orders: torch.Tensor, labels: torch.Tensor, contents: list[int]
    ) -> torch.Tensor:
        """What the slots hold and where that stands in the picture: (B, S, D)."""
        num_class_slots = contents.count(CLASS)
        held = _to_device(contents[num_class_slots:], tokens.device)
        positions = orders[:, held.clamp(min=0)]
        held_tokens = tokens.take_along_dim(positions[..., None], 1)
        # Not the type of the projection's weights, which may be stored in another than they compute in.
        embedding = self.token_proj(held_tokens.to(self.condition_position_embedding.dtype))
        if self.config.position_type == "learned":
            embedding = embedding + self.position_embedding[0][positions]
        if self.config.max_tokens_per_step > 1:
            embedding = torch.where((held == BLANK)[:, None], self.blank_token, embedding)
        if num_class_slots == 0:
            return embedding
        prefix = self.class_embedding(labels)[:, None] + self.class_position_embedding
        return torch.cat([prefix, embedding], dim=1)

    def _build_mask(
        self, steps: list[int], first: int, tokens: torch.Tensor, past_key_values: Cache | None
    ) -> tuple[torch.Tensor | None, bool]:
        """What slots from `first` on see: those of their own and of earlier steps. A mask, or whether it is causal."""
        implementation = self.config._attn_implementation
        # A cache made without a configuration has no layers yet.
        has_layers = past_key_values is not None and len(past_key_values.layers) > 0
        size = past_key_values.get_max_length() if has_layers else -1
        if size < 0 and steps[first] == steps[-1]:
            return None, False
        if (
            first == 0
            and size < 0
            and len(set(steps)) == len(steps)
            and implementation not in ("eager", "flex_attention")
        ):
            return None, True
        if "flash" in implementation:
            raise ValueError(
                f"Attention {implementation!r} takes no mask, which several tokens a step and static caches need: use "
                '"sdpa".'
            )
        own = _to_device(steps, tokens.device)
        visible = own <= own[first:, None]
        if size >= 0:  # what a static cache does not hold yet
            visible = nn.functional.pad(visible, (0, size - len(steps)))
        dtype = self.condition_position_embedding.dtype
        mask = torch.zeros(visible.shape, dtype=dtype, device=tokens.device)
        return mask.masked_fill(~visible, torch.finfo(dtype).min)[None, None], False

    def _build_rotary(
        self, orders: torch.Tensor, held: torch.Tensor, asked: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How queries are turned, by the position that is predicted, and keys, by the position of what they hold.

        A slot without a token, or from which nothing is predicted, takes the other of its two positions; the class
        is not turned as a key.
        """
        queries = torch.where(asked == NOTHING, held, asked)
        keys = torch.where(held == BLANK, asked, held)
        return self._turn(orders, queries), self._turn(orders, keys)

    def _turn(self, orders: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
        """Cosines and sines (2, B, 1, S, head_dim / 2) for the positions of ranks; no turn for ranks below 0."""
        config = self.config
        positions = orders[:, ranks.clamp(min=0)]
        # One more than in the picture, so that none stands where the class does: at the origin.
        cells = torch.stack([positions // config.grid_width, positions % config.grid_width], -1) + 1
        cells = cells * (ranks >= 0)[:, None]
        quarter = config.hidden_size // config.num_attention_heads // 4
        exponents = torch.arange(quarter, device=orders.device, dtype=torch.float32) / quarter
        # (B, S, 2, quarter) -> (B, 1, S, head_dim / 2)
        angles = (cells[..., None] * config.rotary_base**-exponents).flatten(2)[:, None]
        return torch.stack([angles.cos(), angles.sin()])


@fill_arguments
class ARForImageGeneration(TokenHeadMixin, ARPreTrainedModel):
    """[`ARModel`] with a token head: computes the training loss, and holds what the pipeline samples with.

    Args:
        config ([`ARConfig`]): see there.
    """

    backbone_class = ARModel

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """What a pipeline does where neither its caller nor its checkpoint says otherwise."""
        steps = -(-self.config.num_tokens // self.config.max_tokens_per_step)
        return {**super().sampling_defaults, "num_inference_steps": steps, "token_schedule": "constant"}

    def make_cache(self, tokens_per_step: list[int], static: bool = False) -> Cache:
        """The keys and values that `predict` keeps from step to step.

        Args:
            tokens_per_step (`list[int]`): tokens of all steps.
            {static}

        Returns:
            `Cache`: empty.
        """
        if not static:
            return DynamicCache(config=self.config)
        length = len(build_slots(tokens_per_step, self.config.num_class_tokens)[0])
        return StaticCache(config=self.config, max_cache_len=length)

    def training_inputs(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        shared_generator: torch.Generator | None = None,
        progress: float = 1.0,
    ) -> dict[str, Any]:
        """Draw what a training step leaves open, as `forward` takes it: orders and tokens per step.

        Args:
            batch_size (`int`): images.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): for the orders: one, or one per
                image; None means torch's global one.
            shared_generator (`torch.Generator`, *optional*): for the tokens per step, the same in the whole batch;
                None means `generator`. Nothing is drawn where `max_tokens_per_step` is 1.
            progress (`float`, *optional*, defaults to 1.0): share of the training that is done, for orders that
                change on the way.

        Returns:
            `dict`: `orders` and `tokens_per_step`.

        Raises:
            ValueError: with several tokens a step, a list of generators and no shared generator.
        """
        limit = self.config.max_tokens_per_step
        if limit > 1 and shared_generator is None and isinstance(generator, list):
            raise ValueError("`tokens_per_step` has to be given with a list of generators: it is one for the batch.")
        shared = shared_generator or (None if isinstance(generator, list) else generator)
        tokens_per_step = sample_tokens_per_step(self.config.num_tokens, limit, shared)
        orders = self.draw_orders(batch_size, generator, progress)
        return {"orders": orders, "tokens_per_step": tokens_per_step}

    def forward(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor | None = None,  # what counts in the loss comes last in the order
        class_labels: torch.Tensor | None = None,
        noise_scheduler: object | None = None,
        timesteps: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        orders: torch.Tensor | None = None,
        tokens_per_step: list[int] | None = None,
        past_key_values: Cache | None = None,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        condition: torch.Tensor | None = None,
        return_loss: bool | None = None,
        sampling: dict[str, Any] | None = None,
        **inputs: Unpack[BackboneInputs],
    ) -> BackboneOutput | tuple[torch.Tensor, ...] | torch.Tensor:
        """Condition vectors, and the training loss where it is asked for.

        What is random and not given is drawn from `generator` in this order: tokens per step (where there may be
        several), orders, context noise, text dropout, class dropout, timesteps, noise. With one generator per image,
        what is drawn for an image does not depend on the others.

        Args:
            tokens (`torch.Tensor` of shape `(batch, num_tokens, token_dim)`): the tokens.
            mask (`torch.Tensor` of shape `(batch, num_tokens)`, *optional*): bool, True for tokens that count in the
                loss; the others come first in the order, which keeps its sequence otherwise. None means all.
            {class_labels, noise_scheduler, timesteps, noise}
            orders (`torch.Tensor` of shape `(batch, num_tokens)`, *optional*): int64, positions in the order of
                generation; None draws the configuration's.
            tokens_per_step (`list[int]`, *optional*): tokens of each step up to the one wanted; None means one each.
                In training it is drawn where neither it nor `orders` is given.
            past_key_values (`Cache`, *optional*): keys and values of earlier steps; see [`ARModel`].
            {generator, condition, return_loss, sampling}
            {prompt_embeds, prompt_attention_mask, text_context, return_dict}
            {output_hidden_states, output_attentions}

        Returns:
            [`BackboneOutput`]: `loss` (if asked for), `condition`: see [`ARModel`].

        Raises:
            ValueError: if a shape, a label, the number of generators or the tokens per step do not fit, or a loss is
                wanted of steps that leave tokens out.
        """
        if sampling is not None:
            return self.head.draw(**sampling)
        if condition is not None:
            return self.with_loss(
                BackboneOutput(condition=condition), tokens, mask, scheduler=noise_scheduler, generator=generator
            )
        if return_loss is None:
            return_loss = noise_scheduler is not None
        self._check_inputs(tokens, mask, generator, orders)
        if self.training and orders is None and tokens_per_step is None:
            drawn = self.training_inputs(len(tokens), generator)
            orders, tokens_per_step = drawn["orders"], drawn["tokens_per_step"]
        elif orders is None:
            orders = self.draw_orders(len(tokens), generator)
        orders = orders.to(tokens.device)
        if mask is not None:
            # A stable sort of False before True.
            orders = orders.gather(1, mask.gather(1, orders).to(torch.uint8).argsort(dim=1, stable=True))
        return_dict = inputs.pop("return_dict", self.config.return_dict)
        seen = self.draw_context(tokens, generator) if self.training else tokens
        inputs |= {"past_key_values": past_key_values, "generator": generator}
        output = self.model(seen, orders, tokens_per_step, class_labels, **inputs, return_dict=True)
        if return_loss:
            if output.condition.shape[1] != self.config.num_tokens:
                raise ValueError(f"`tokens_per_step` has to cover all tokens for a loss, got {tokens_per_step}.")
            draws = {"timesteps": timesteps, "noise": noise, "generator": generator}
            if mask is None:
                mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
                draws["num_masked"] = self.config.num_tokens
            output = self.with_loss(output, tokens, mask, scheduler=noise_scheduler, **draws)
        return output.to_tuple() if return_dict is False else output

    def predict(
        self,
        tokens: torch.Tensor,
        orders: torch.Tensor,
        tokens_per_step: list[int],
        class_labels: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        text_context: TextContext | None = None,
    ) -> torch.Tensor:
        """One autoregressive step: conditions of the next tokens.

        Args:
            {tokens, orders, tokens_per_step, class_labels}
            past_key_values (`Cache`, *optional*): from `make_cache`: then only what is not in it is computed.
            {text_context}

        Returns:
            `torch.Tensor` of shape `(batch, tokens_per_step[-1], hidden_size)`: in the order of generation.
        """
        inputs = {} if text_context is None else {"text_context": text_context}
        inputs |= {"orders": orders, "tokens_per_step": tokens_per_step, "past_key_values": past_key_values}
        condition = self(tokens, class_labels=class_labels, **inputs, return_dict=True).condition
        count, done = tokens_per_step[-1], sum(tokens_per_step)
        if condition.shape[1] == self.config.num_tokens:
            return condition.take_along_dim(orders[:, done - count : done, None], 1)
        return condition[:, -count:]


def _to_device(numbers: list[int], device: torch.device) -> torch.Tensor:
    """A list on the device, which is not waited for."""
    return torch.tensor(numbers, dtype=torch.long).to(device, non_blocking=True)
