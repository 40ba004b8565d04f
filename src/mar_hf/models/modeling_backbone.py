# SPDX-License-Identifier: Apache-2.0
"""What all backbones share: attention, MLP, class embedding, first weights, the head on top."""

from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..generation import GENERATION_ORDERS
from ..heads import TOKEN_HEADS
from ..loading import StrictLoadingMixin
from ..utils import draw
from .configuration_backbone import BackboneConfig
from .modeling_outputs import BackboneOutput


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, for `attn_implementation="eager"`.

    Args:
        module (`torch.nn.Module`): the attention module, for its training mode.
        query (`torch.Tensor` of shape `(batch, heads, length, head_dim)`): queries.
        key (`torch.Tensor` of shape `(batch, heads, key_length, head_dim)`): keys.
        value (`torch.Tensor` of the keys' shape): values.
        attention_mask (`torch.Tensor`, *optional*): added to the scores.
        scaling (`float`): multiplies the scores.
        dropout (`float`, *optional*, defaults to 0.0): of the probabilities.
        kwargs (`object`): of other implementations; not needed here.

    Returns:
        two `torch.Tensor`: output of shape `(batch, length, heads, head_dim)`, probabilities `(batch, heads, length,
        key_length)`.
    """
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    dropped = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return (dropped @ value).transpose(1, 2).contiguous(), probabilities


class BackboneAttention(nn.Module):
    """Multi-head self-attention, with rotary positions and a cache where they are given.

    Args:
        config ([`BackboneConfig`]): for dropout and implementation.
        hidden_size (`int`): width.
        num_heads (`int`): attention heads.
        layer_index (`int`, *optional*, defaults to 0): place in the cache.
    """

    def __init__(self, config: BackboneConfig, hidden_size: int, num_heads: int, layer_index: int = 0):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.layer_index = layer_index
        self.scaling = (hidden_size // num_heads) ** -0.5
        self.is_causal = False
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden_size)`): input.
            attention_mask (`torch.Tensor` of shape `(1, 1, length, key_length)`, *optional*): added to the scores.
            is_causal (`bool`, *optional*, defaults to `False`): nothing sees what comes after it; without a mask.
            rotary (two `torch.Tensor`, *optional*): how to `rotate` queries and keys.
            past_key_values (`Cache`, *optional*): takes keys and values in and gives all that it holds.

        Returns:
            `torch.Tensor` of shape `(batch, length, hidden_size)`.
        """
        batch, length, width = hidden_states.shape
        # (B, N, 3D) -> 3 x (B, heads, N, head_dim)
        qkv = self.qkv(hidden_states).reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if rotary is not None:
            query, key = (rotate(states, turn) for states, turn in zip((query, key), rotary, strict=True))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_index)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        output, _ = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, is_causal=is_causal
        )
        return self.proj(output.reshape(batch, length, width))


def rotate(states: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turn pairs of channels, the first half being their first members; in float32.

    Args:
        states (`torch.Tensor` of shape `(batch, heads, length, head_dim)`): queries or keys.
        turn (`torch.Tensor` of shape `(2, batch, 1, length, head_dim / 2)`): cosines and sines.

    Returns:
        `torch.Tensor` of the shape and dtype of `states`.
    """
    (first, second), (cosine, sine) = states.float().chunk(2, dim=-1), turn
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(states.dtype)


class BackboneMLP(nn.Module):
    """Two linear layers with the exact GELU between them.

    Args:
        hidden_size (`int`): width.
        intermediate_size (`int`): width between the layers.
        dropout (`float`): after the GELU.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the layers.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., hidden_size)`): input.

        Returns:
            `torch.Tensor` of the same shape.
        """
        return self.fc2(self.dropout(nn.functional.gelu(self.fc1(hidden_states))))


class BackboneLayer(GradientCheckpointingLayer):
    """A pre-norm transformer block: what the layers of all backbones are.

    Args:
        config ([`BackboneConfig`]): for dropout and norms.
        hidden_size (`int`): width.
        num_heads (`int`): attention heads.
        layer_index (`int`, *optional*, defaults to 0): place in the cache.
    """

    def __init__(self, config: BackboneConfig, hidden_size: int, num_heads: int, layer_index: int = 0):
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = BackboneAttention(config, hidden_size, num_heads, layer_index)
        self.mlp_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = BackboneMLP(hidden_size, int(hidden_size * config.mlp_ratio), config.hidden_dropout)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor, **attention_inputs: Any) -> torch.Tensor:
        """Apply the block.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden_size)`): input.
            attention_inputs (`Any`): for [`BackboneAttention`].

        Returns:
            `torch.Tensor` of the same shape.
        """
        attended = self.attention(self.attention_norm(hidden_states), **attention_inputs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class BackbonePreTrainedModel(StrictLoadingMixin, PreTrainedModel):
    """What the models of all backbones share: flags, the original's initialisation, the classes.

    Args:
        config ([`BackboneConfig`]): see there.
    """

    config: BackboneConfig
    base_model_prefix = "model"
    main_input_name = "tokens"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BackboneLayer", *sorted(head.__name__ for head in TOKEN_HEADS.values())]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        head = getattr(self, "head", None)
        if head is not None and any(module is part for part in head.modules()):
            head.init_weights(module)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        else:  # the backbone's own: positions, mask tokens
            for _, parameter in module.named_parameters(recurse=False):
                init.normal_(parameter, std=std)

    def embed_class(
        self,
        class_labels: torch.Tensor | None,
        tokens: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """Class embeddings, with the null class for None and, in training, for a share of the labels.

        Args:
            class_labels (`torch.Tensor` of shape `(batch,)`, *optional*): int64; None means the null class.
            tokens (`torch.Tensor` of shape `(batch, ...)`): for the number of images and the device.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): for the class dropout of training.

        Returns:
            `torch.Tensor` of shape `(batch, hidden_size)`.
        """
        # Not the embedding's device: weights that are loaded when they are called for wait on "meta".
        null_class, batch_size, device = self.config.num_classes, len(tokens), tokens.device
        if class_labels is None:
            return self.class_embedding(torch.full((batch_size,), null_class, device=device))
        if self.training and self.config.class_dropout_prob > 0:
            dropped = draw(torch.rand, (batch_size,), generator, device) < self.config.class_dropout_prob
            class_labels = torch.where(dropped, null_class, class_labels)
        return self.class_embedding(class_labels)

    def check_inputs(self, tokens: torch.Tensor, mask: torch.Tensor | None, class_labels: torch.Tensor | None) -> None:
        """Refuse wrong shapes.

        Args:
            tokens (`torch.Tensor`): as `forward` takes them.
            mask (`torch.Tensor`, *optional*): likewise.
            class_labels (`torch.Tensor`, *optional*): likewise.

        Raises:
            ValueError: if a shape or a dtype does not fit.
        """
        shape = (self.config.num_tokens, self.config.token_dim)
        if tokens.ndim != 3 or tokens.shape[1:] != shape:
            raise ValueError(
                f"`tokens` has to be of shape (batch, {shape[0]}, {shape[1]}), got {tuple(tokens.shape)}."
            )
        if mask is not None and (mask.shape != tokens.shape[:2] or mask.dtype != torch.bool):
            raise ValueError(
                f"`mask` has to be bool of shape {tuple(tokens.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}."
            )
        if class_labels is not None and class_labels.shape != tokens.shape[:1]:
            raise ValueError(
                f"`class_labels` has to be of shape {tuple(tokens.shape[:1])}, got {tuple(class_labels.shape)}."
            )


def add_context_noise(tokens: torch.Tensor, noise: torch.Tensor, level: torch.Tensor | float) -> torch.Tensor:
    """Mix noise into tokens that were generated: (1 - level) tokens + level noise (arXiv:2411.18447).

    Args:
        tokens (`torch.Tensor` of shape `(batch, num_tokens, token_dim)`): of about unit deviation.
        noise (`torch.Tensor` of the same shape): standard normal.
        level (`torch.Tensor` that broadcasts to it, or `float`): in [0, 1].

    Returns:
        `torch.Tensor` of the same shape.
    """
    return torch.lerp(tokens, noise, torch.as_tensor(level, dtype=tokens.dtype, device=tokens.device))


class TokenHeadMixin:
    """A backbone with a token head: the loss, and what the pipeline asks for. Put before the backbone's base class."""

    def build_head(self) -> nn.Module:
        """The head of the configuration, with random weights.

        Returns:
            [`TokenHead`]: an entry of `TOKEN_HEADS`.

        Raises:
            ValueError: if `head_config` holds settings that the head does not have.
        """
        config = self.config
        try:
            return TOKEN_HEADS[config.head_type](
                token_dim=config.token_dim,
                condition_dim=config.condition_dim,
                batch_multiplier=config.head_batch_multiplier,
                **config.head_config,
            )
        except TypeError as error:
            raise ValueError(
                f"`head_config` {config.head_config} does not fit {config.head_type!r}: {error}"
            ) from error

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """What a pipeline does where neither its caller nor its checkpoint says otherwise."""
        return {"generation_order": self.config.order, **self.head.sampling_defaults}

    def make_cache(self, tokens_per_step: list[int], static: bool = False) -> Cache | None:
        """What `predict` keeps from step to step.

        Args:
            tokens_per_step (`list[int]`): tokens of all steps.
            static (`bool`, *optional*, defaults to `False`): of a fixed size from the start.

        Returns:
            `Cache`: empty; None where the backbone can keep nothing.
        """
        return None

    def check_tokens_per_step(self, tokens_per_step: list[int]) -> None:
        """Refuse steps that the model can't do.

        Args:
            tokens_per_step (`list[int]`): tokens of all steps.

        Raises:
            ValueError: if a step has too many.
        """

    def draw_orders(
        self, batch_size: int, generator: torch.Generator | list[torch.Generator] | None, progress: float = 1.0
    ) -> torch.Tensor:
        """The configuration's order for each image.

        Args:
            batch_size (`int`): images.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): one for all, or one per image.
            progress (`float`, *optional*, defaults to 1.0): share of the training that is done.

        Returns:
            `torch.Tensor` of shape `(batch, num_tokens)`: int64, the first generated first; on the generators' device
            or the CPU.
        """
        if self.config.order == "random":
            # At once, and without waiting for the device, which a permutation for each image would.
            first = generator[0] if isinstance(generator, list) else generator
            device = "cpu" if first is None else first.device
            return draw(torch.rand, (batch_size, self.config.num_tokens), generator, device).argsort(1)
        config, order = self.config, GENERATION_ORDERS[self.config.order]
        generators = generator if isinstance(generator, list) else [generator] * batch_size
        return torch.stack([order(config.grid_height, config.grid_width, one, progress) for one in generators])

    def draw_context(
        self, tokens: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None
    ) -> torch.Tensor:
        """The tokens that the backbone sees in training: with noise at a level drawn for each image, if at all.

        Args:
            tokens (`torch.Tensor` of shape `(batch, num_tokens, token_dim)`): the true tokens.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): for levels, then noise; nothing is
                drawn where `context_noise` is 0.

        Returns:
            `torch.Tensor` of the same shape; the tokens themselves in eval mode or where `context_noise` is 0.
        """
        if not self.training or self.config.context_noise == 0:
            return tokens
        level = draw(torch.rand, (len(tokens), 1, 1), generator, tokens.device) * self.config.context_noise
        noise = draw(torch.randn, tuple(tokens.shape), generator, tokens.device)
        return add_context_noise(tokens, noise.to(tokens.dtype), level)

    def with_loss(
        self, output: BackboneOutput, tokens: torch.Tensor, mask: torch.Tensor, **inputs: Any
    ) -> BackboneOutput:
        """Add the head's loss to a backbone's output.

        Args:
            output ([`BackboneOutput`]): with conditions of all positions.
            tokens (`torch.Tensor` of shape `(batch, num_tokens, token_dim)`): the true tokens.
            mask (`torch.Tensor` of shape `(batch, num_tokens)`): bool, True for tokens that count.
            inputs (`Any`): for the head's `loss`.

        Returns:
            [`BackboneOutput`]: with `loss`.
        """
        loss = self.head.loss(condition=output.condition, target=tokens, mask=mask, **inputs)
        # A new one, because a tuple has the order in which the fields were set.
        return BackboneOutput(loss=loss, **output)
