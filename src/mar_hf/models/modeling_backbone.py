# SPDX-License-Identifier: Apache-2.0
"""What all backbones share: texts, first weights, the head on top."""

from typing import Any, TypedDict

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from ..generation import GENERATION_ORDERS
from ..heads import TOKEN_HEADS
from ..loading import StrictLoadingMixin
from ..utils import draw
from .configuration_backbone import BackboneConfig
from .layers import BackboneAttention, BackboneLayer, ContextStates, ZeroLinear
from .modeling_outputs import BackboneOutput
from .text_context import TextAligner, TextContext


class BackboneInputs(TypedDict, total=False):
    """What `forward` of every backbone takes in the same way. Texts are for models with a `text_dim`."""

    prompt_embeds: torch.Tensor | None
    prompt_attention_mask: torch.Tensor | None
    text_context: TextContext | None
    return_dict: bool | None
    output_hidden_states: bool | None
    output_attentions: bool | None


class BackbonePreTrainedModel(StrictLoadingMixin, PreTrainedModel):
    """What the models of all backbones share: flags, the original's initialisation, the texts.

    Args:
        config ([`BackboneConfig`]): see there.
    """

    config: BackboneConfig
    base_model_prefix = "model"
    main_input_name = "tokens"
    # The backbone alone can be loaded from a checkpoint with a head.
    _keys_to_ignore_on_load_unexpected = [r"^head\."]
    supports_gradient_checkpointing = True
    _no_split_modules = ["BackboneLayer", "TransformerLayer", *sorted(head.__name__ for head in TOKEN_HEADS.values())]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": BackboneLayer, "attentions": BackboneAttention}
    _input_embed_layer = "token_proj"

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        head = getattr(self, "head", None)
        if head is not None and any(module is part for part in head.modules()):
            head.init_weights(module)
        elif isinstance(module, ZeroLinear):
            # A class of its own: modules without parameters of their own are not always asked here.
            init.zeros_(module.weight)
            init.zeros_(module.bias)
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

    def build_inputs(self) -> None:
        """The modules for what every backbone is given: classes, tokens, texts where it takes them."""
        config, width = self.config, self.config.hidden_size
        if config.text_dim is not None:
            self.text_aligner = TextAligner(config)
        self.class_embedding = nn.Embedding(config.num_classes + 1, width)
        self.token_proj = nn.Linear(config.token_dim, width)
        self.token_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def check_tokens_per_step(self, tokens_per_step: list[int]) -> None:
        """Refuse steps that the model can't do.

        Args:
            tokens_per_step (`list[int]`): tokens of all steps.

        Raises:
            ValueError: if a step has too many.
        """

    def read_text(
        self,
        blocks: list[BackboneLayer],
        tokens: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        text_context: TextContext | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> tuple[list[ContextStates | None], torch.Tensor | None]:
        """What each block attends to, with the null text for None and, in training, for a share of the texts.

        Args:
            blocks (`list[BackboneLayer]`): all blocks that attend to texts, always the same.
            tokens (`torch.Tensor` of shape `(batch, ...)`): for the number of images and the device.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): for the text dropout of training.
            prompt_embeds (`torch.Tensor`, *optional*): as `forward` takes them.
            prompt_attention_mask (`torch.Tensor`, *optional*): likewise.
            text_context ([`TextContext`], *optional*): likewise.
            output_hidden_states (`bool`, *optional*): likewise; not read here.
            output_attentions (`bool`, *optional*): likewise; refused here where attention keeps no probabilities.

        Returns:
            a list with one entry a block, all None where the model takes no texts; and a bool `torch.Tensor` of shape
            `(batch,)`, or None: True where the class is dropped with the text.

        Raises:
            ValueError: if the model takes no texts, a shape does not fit, or attention is not eager where attentions
                are wanted.
        """
        config, batch_size, device = self.config, len(tokens), tokens.device
        if output_attentions and config._attn_implementation != "eager":
            raise ValueError(
                "`output_attentions` needs `attn_implementation` 'eager', which keeps the probabilities, got "
                f"{config._attn_implementation!r}."
            )
        if config.text_dim is None:
            if prompt_embeds is not None or text_context is not None:
                raise ValueError("`prompt_embeds` needs a model that takes texts: its `text_dim` is None.")
            return [None] * len(blocks), None
        if text_context is not None:
            if not isinstance(text_context, TextContext):
                raise ValueError(f"`text_context` has to be a TextContext, got {type(text_context).__name__}.")
            if len(text_context.mask) != batch_size:
                raise ValueError(f"`text_context` has to hold {batch_size} texts, got {len(text_context.mask)}.")
            return text_context.read_by(self.text_aligner, blocks), None
        if prompt_embeds is None:
            prompt_embeds = torch.zeros(batch_size, 1, config.text_dim, device=device)
            mask = torch.zeros(batch_size, 1, dtype=torch.bool, device=device)
            return TextContext(prompt_embeds, mask).read_by(self.text_aligner, blocks), None
        mask, dropped = self.check_text(prompt_embeds, prompt_attention_mask, batch_size), None
        if self.training and config.text_dropout_prob > 0:
            drawn = draw(torch.rand, (batch_size,), generator, device)
            mask = mask & (drawn >= config.text_dropout_prob)[:, None]
            # Guidance needs to have seen neither of the two.
            dropped = drawn < config.text_dropout_prob / 2
        return TextContext(prompt_embeds, mask).read_by(self.text_aligner, blocks), dropped

    def check_text(
        self,
        prompt_embeds: torch.Tensor,
        prompt_attention_mask: torch.Tensor | None,
        batch_size: int,
        name: str = "prompt",
    ) -> torch.Tensor:
        """Refuse texts of wrong shapes.

        Args:
            prompt_embeds (`torch.Tensor`): as `forward` takes them.
            prompt_attention_mask (`torch.Tensor`, *optional*): likewise.
            batch_size (`int`): images.
            name (`str`, *optional*, defaults to `"prompt"`): what the texts are called where they are refused.

        Returns:
            `torch.Tensor` of shape `(batch, length)`: the mask as bool; without one, every token counts.

        Raises:
            ValueError: if a shape does not fit.
        """
        limit, width = self.config.num_text_tokens, self.config.text_dim
        for ending, value in (("embeds", prompt_embeds), ("attention_mask", prompt_attention_mask)):
            if not isinstance(value, torch.Tensor) and (value is not None or ending == "embeds"):
                raise ValueError(f"`{name}_{ending}` has to be a tensor, got {type(value).__name__}.")
        if (
            prompt_embeds.ndim != 3
            or prompt_embeds.shape[::2] != (batch_size, width)
            or not 1 <= prompt_embeds.shape[1] <= limit
        ):
            raise ValueError(
                f"`{name}_embeds` has to be of shape ({batch_size}, 1..{limit}, {width}), got "
                f"{tuple(prompt_embeds.shape)}."
            )
        if prompt_attention_mask is None:
            return torch.ones(prompt_embeds.shape[:2], dtype=torch.bool, device=prompt_embeds.device)
        if prompt_attention_mask.shape != prompt_embeds.shape[:2]:
            raise ValueError(
                f"`{name}_attention_mask` has to be of shape {tuple(prompt_embeds.shape[:2])}, got "
                f"{tuple(prompt_attention_mask.shape)}."
            )
        return prompt_attention_mask.bool()


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
    """A backbone with a token head: the loss, and what the pipeline asks for. Put before the backbone's base class.

    Args:
        config ([`BackboneConfig`]): of the backbone's class.

    Raises:
        ValueError: if `head_config` holds settings that the head does not have.
    """

    backbone_class: type[BackbonePreTrainedModel]

    def __init__(self, config: BackboneConfig):
        super().__init__(config)
        self.model = self.backbone_class(config)
        try:
            self.head = TOKEN_HEADS[config.head_type](
                token_dim=config.token_dim,
                condition_dim=config.condition_dim,
                batch_multiplier=config.head_batch_multiplier,
                **config.head_config,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`head_config` {config.head_config} does not fit {config.head_type!r}: {error}"
            ) from error
        self.post_init()
        # What the backbone alone may leave in the file is needed here.
        self._keys_to_ignore_on_load_unexpected = set()

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """What a pipeline does where neither its caller nor its checkpoint says otherwise."""
        config = self.config
        defaults = {"generation_order": config.order, **self.head.sampling_defaults}
        if config.text_dim is not None:
            # What is usual with texts (Fluid, arXiv:2410.13863, and those after it).
            defaults["guidance_schedule"] = "constant"
        if config.class_dropout_prob == 0 and (config.text_dim is None or config.text_dropout_prob == 0):
            # There is nothing to guide away from: the null class was never trained.
            defaults["guidance_scale"] = 1.0
        return defaults

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
