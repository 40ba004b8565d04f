# SPDX-License-Identifier: Apache-2.0
"""Masked autoregressive model: an encoder over visible tokens, a decoder over all, a token head on top."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..generation import sample_mask, sample_num_masked
from ..heads import TOKEN_HEADS
from ..loading import StrictLoadingMixin
from ..utils import check_generator, draw
from .configuration_mar import MARConfig
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
        key (`torch.Tensor` of the same shape): keys.
        value (`torch.Tensor` of the same shape): values.
        attention_mask (`torch.Tensor`, *optional*): added to the scores.
        scaling (`float`): multiplies the scores.
        dropout (`float`, *optional*, defaults to 0.0): of the probabilities.
        kwargs (`object`): of other implementations; not needed here.

    Returns:
        two `torch.Tensor`: output of shape `(batch, length, heads, head_dim)`, probabilities `(batch, heads, length,
        length)`.
    """
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    dropped = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return (dropped @ value).transpose(1, 2).contiguous(), probabilities


class MARAttention(nn.Module):
    """Bidirectional multi-head self-attention.

    Args:
        config ([`MARConfig`]): for dropout and implementation.
        hidden_size (`int`): width.
        num_heads (`int`): attention heads.
    """

    def __init__(self, config: MARConfig, hidden_size: int, num_heads: int):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.scaling = (hidden_size // num_heads) ** -0.5
        self.is_causal = False
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden_size)`): input.

        Returns:
            `torch.Tensor` of the same shape.
        """
        batch, length, width = hidden_states.shape
        # (B, N, 3D) -> 3 x (B, heads, N, head_dim)
        qkv = self.qkv(hidden_states).reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        output, _ = attend(self, query, key, value, attention_mask=None, scaling=self.scaling, dropout=dropout)
        return self.proj(output.reshape(batch, length, width))


class MARMLP(nn.Module):
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


class MARLayer(GradientCheckpointingLayer):
    """A pre-norm transformer block.

    Args:
        config ([`MARConfig`]): for dropout and norms.
        hidden_size (`int`): width.
        num_heads (`int`): attention heads.
    """

    def __init__(self, config: MARConfig, hidden_size: int, num_heads: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = MARAttention(config, hidden_size, num_heads)
        self.mlp_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = MARMLP(hidden_size, int(hidden_size * config.mlp_ratio), config.hidden_dropout)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the block.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden_size)`): input.

        Returns:
            `torch.Tensor` of the same shape.
        """
        hidden_states = hidden_states + self.dropout(self.attention(self.attention_norm(hidden_states)))
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class MARPreTrainedModel(StrictLoadingMixin, PreTrainedModel):
    """What MAR models share: flags and the original's initialisation.

    Args:
        config ([`MARConfig`]): see there.
    """

    config_class = MARConfig
    config: MARConfig
    base_model_prefix = "model"
    main_input_name = "tokens"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MARLayer", "DiffusionHead"]
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
        elif isinstance(module, MARModel):
            for _, parameter in module.named_parameters(recurse=False):
                init.normal_(parameter, std=std)


class MARModel(MARPreTrainedModel):
    """The masked encoder-decoder of MAR (arXiv:2406.11838): tokens and a mask in, a condition for each out.

    The encoder sees class tokens and visible tokens; the decoder sees class tokens and all positions, with a mask
    token where nothing is known yet. The null class is the last row of the class embedding.

    Args:
        config ([`MARConfig`]): see there.
    """

    # The backbone alone can be loaded from a checkpoint with a head.
    _keys_to_ignore_on_load_unexpected = [r"^head\."]

    def __init__(self, config: MARConfig):
        super().__init__(config)
        width, decoder_width = config.hidden_size, config.decoder_hidden_size
        length = config.num_class_tokens + config.num_tokens
        self.class_embedding = nn.Embedding(config.num_classes + 1, width)
        self.token_proj = nn.Linear(config.token_dim, width)
        self.token_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.encoder_position_embedding = nn.Parameter(torch.zeros(1, length, width))
        self.encoder_layers = nn.ModuleList(
            [MARLayer(config, width, config.num_attention_heads) for _ in range(config.num_encoder_layers)]
        )
        self.encoder_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder_proj = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_position_embedding = nn.Parameter(torch.zeros(1, length, decoder_width))
        self.decoder_layers = nn.ModuleList(
            [
                MARLayer(config, decoder_width, config.decoder_num_attention_heads)
                for _ in range(config.num_decoder_layers)
            ]
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=config.layer_norm_eps)
        self.condition_position_embedding = nn.Parameter(torch.zeros(1, config.num_tokens, decoder_width))
        self.post_init()

    def forward(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        num_masked: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool | None = None,
    ) -> BackboneOutput | tuple[torch.Tensor, ...]:
        """Condition vectors for all positions.

        Args:
            tokens (`torch.Tensor` of shape `(batch, num_tokens, token_dim)`): the tokens; masked ones are not read.
            mask (`torch.Tensor` of shape `(batch, num_tokens)`): bool, True = still to be generated; as many in every
                row.
            class_labels (`torch.Tensor` of shape `(batch,)`, *optional*): int64; None means the null class.
            num_masked (`int`, *optional*): masked tokens in a row, where the caller knows it: saves counting them,
                which waits for the device.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): for the class dropout of training:
                one, or one per image; None means torch's global one.
            return_dict (`bool`, *optional*): False gives a tuple.

        Returns:
            [`BackboneOutput`]: `condition` and `encoder_last_hidden_state`.

        Raises:
            ValueError: if a shape or the number of generators does not fit, or rows have different numbers of masked
                tokens.
        """
        self._check_inputs(tokens, mask, class_labels)
        check_generator(generator, len(tokens))
        num_tokens, num_prefix = self.config.num_tokens, self.config.num_class_tokens
        if num_masked is None:
            counts = mask.sum(1)
            if (counts != counts[0]).any():
                raise ValueError(f"`mask` has to mask as many tokens in every row, got {counts.tolist()}.")
            num_masked = int(counts[0])
        # Visible positions in raster order, (B, V): a stable sort puts False first.
        visible = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, : num_tokens - num_masked]

        # (B, P + L, D), then only class tokens and visible positions: (B, P + V, D)
        embedding = self._embed_class(class_labels, tokens, generator)
        hidden_states = self.token_proj(tokens.to(self.token_proj.weight.dtype))
        hidden_states = torch.cat([embedding[:, None].expand(-1, num_prefix, -1), hidden_states], dim=1)
        hidden_states = self.token_norm(hidden_states + self.encoder_position_embedding)
        kept = hidden_states[:, num_prefix:].gather(1, visible[..., None].expand(-1, -1, hidden_states.shape[-1]))
        hidden_states = torch.cat([hidden_states[:, :num_prefix], kept], dim=1)
        for layer in self.encoder_layers:
            hidden_states = layer(hidden_states)
        encoded = self.encoder_norm(hidden_states)

        # (B, P + V, D) -> (B, P + L, D): mask tokens wherever nothing is visible
        hidden_states = self.decoder_proj(encoded)
        index = visible[..., None].expand(-1, -1, hidden_states.shape[-1])
        canvas = self.mask_token.to(hidden_states.dtype).expand(tokens.shape[0], num_tokens, -1)
        canvas = canvas.scatter(1, index, hidden_states[:, num_prefix:])
        hidden_states = torch.cat([hidden_states[:, :num_prefix], canvas], dim=1) + self.decoder_position_embedding
        for layer in self.decoder_layers:
            hidden_states = layer(hidden_states)
        condition = self.decoder_norm(hidden_states)[:, num_prefix:] + self.condition_position_embedding
        output = BackboneOutput(condition=condition, encoder_last_hidden_state=encoded)
        return output.to_tuple() if return_dict is False else output

    def _embed_class(
        self,
        class_labels: torch.Tensor | None,
        tokens: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """Class embeddings (B, D), with the null class for None and, in training, for a share of the labels."""
        null_class, batch, device = self.config.num_classes, tokens.shape[0], tokens.device
        if class_labels is None:
            return self.class_embedding(torch.full((batch,), null_class, device=device))
        if self.training and self.config.class_dropout_prob > 0:
            dropped = draw(torch.rand, (batch,), generator, device) < self.config.class_dropout_prob
            class_labels = torch.where(dropped, null_class, class_labels)
        return self.class_embedding(class_labels)

    def _check_inputs(self, tokens: torch.Tensor, mask: torch.Tensor, class_labels: torch.Tensor | None) -> None:
        shape = (self.config.num_tokens, self.config.token_dim)
        if tokens.ndim != 3 or tokens.shape[1:] != shape:
            raise ValueError(
                f"`tokens` has to be of shape (batch, {shape[0]}, {shape[1]}), got {tuple(tokens.shape)}."
            )
        if mask.shape != tokens.shape[:2] or mask.dtype != torch.bool:
            raise ValueError(
                f"`mask` has to be bool of shape {tuple(tokens.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}."
            )
        if class_labels is not None and class_labels.shape != tokens.shape[:1]:
            raise ValueError(
                f"`class_labels` has to be of shape {tuple(tokens.shape[:1])}, got {tuple(class_labels.shape)}."
            )


class MARForImageGeneration(MARPreTrainedModel):
    """[`MARModel`] with a token head: computes the training loss, and holds what the pipeline samples with.

    Args:
        config ([`MARConfig`]): see there.

    Raises:
        ValueError: if `head_config` holds settings that the head does not have.
    """

    def __init__(self, config: MARConfig):
        super().__init__(config)
        self.model = MARModel(config)
        try:
            self.head = TOKEN_HEADS[config.head_type](
                token_dim=config.token_dim,
                condition_dim=config.decoder_hidden_size,
                batch_multiplier=config.head_batch_multiplier,
                **config.head_config,
            )
        except TypeError as error:
            raise ValueError(
                f"`head_config` {config.head_config} does not fit {config.head_type!r}: {error}"
            ) from error
        self.post_init()
        # What the backbone alone may leave in the file is needed here.
        self._keys_to_ignore_on_load_unexpected = set()

    def forward(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        noise_scheduler: object | None = None,
        timesteps: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        num_masked: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool | None = None,
    ) -> BackboneOutput | tuple[torch.Tensor, ...]:
        """Condition vectors, and the training loss where a noise scheduler is given.

        What is random and not given is drawn from `generator` in this order: number of masked tokens, their
        positions, class dropout, timesteps, noise. With one generator per image, what is drawn for an image does not
        depend on the others.

        Args:
            tokens (`torch.Tensor` of shape `(batch, num_tokens, token_dim)`): the tokens.
            mask (`torch.Tensor` of shape `(batch, num_tokens)`, *optional*): bool, True = to be generated; drawn in
                training mode where not given.
            class_labels (`torch.Tensor` of shape `(batch,)`, *optional*): int64; None means the null class.
            noise_scheduler ([`TokenDDPMScheduler`], *optional*): the noise schedule of the loss.
            timesteps (`torch.Tensor` of shape `(head_batch_multiplier * batch * num_tokens,)`, *optional*): of the
                loss.
            noise (`torch.Tensor` of shape `(head_batch_multiplier * batch * num_tokens, token_dim)`, *optional*): of
                the loss.
            num_masked (`int`, *optional*): masked tokens in a row: of the mask, where the caller knows it, or of the
                one to be drawn, where it is not left to the generator.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): for what is drawn: one, or one per
                image; None means torch's global one.
            return_dict (`bool`, *optional*): False gives a tuple.

        Returns:
            [`BackboneOutput`]: `loss` (with a scheduler), `condition`, `encoder_last_hidden_state`.

        Raises:
            ValueError: if a shape or the number of generators does not fit, in eval mode without a mask, or with a
                list of generators and neither `mask` nor `num_masked`: the batch has one number of masked tokens.
        """
        config = self.config
        if mask is None:
            if not self.training:
                raise ValueError("`mask` has to be given in eval mode: True for the tokens still to be generated.")
            if num_masked is None:
                if isinstance(generator, list):
                    raise ValueError(
                        "`num_masked` has to be given with a list of generators: it is one for the batch."
                    )
                ratios = (config.mask_ratio_min, config.mask_ratio_mean, config.mask_ratio_std)
                num_masked = sample_num_masked(config.num_tokens, *ratios, generator=generator)
            mask = sample_mask(len(tokens), config.num_tokens, num_masked, generator).to(tokens.device)
        output = self.model(tokens, mask, class_labels, num_masked, generator)
        if noise_scheduler is not None:
            loss = self.head.loss(
                condition=output.condition,
                target=tokens,
                mask=mask,
                scheduler=noise_scheduler,
                timesteps=timesteps,
                noise=noise,
                num_masked=num_masked,
                generator=generator,
            )
            # A new one, because a tuple has the order in which the fields were set.
            output = BackboneOutput(loss=loss, **output)
        return output.to_tuple() if return_dict is False else output
