# SPDX-License-Identifier: Apache-2.0
"""What the configurations of all backbones share."""

import copy
from dataclasses import field
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ..generation import GENERATION_ORDERS, look_up
from ..heads import TOKEN_HEADS
from ..utils import LARGEST, check_count, check_number, strict_configuration


MOST_LAYERS = 1024
# The head's sizes in the released models of arXiv:2406.11838 (table 4).
HEADS = {
    "base": {"num_layers": 6, "hidden_size": 1024},
    "large": {"num_layers": 8, "hidden_size": 1280},
    "huge": {"num_layers": 12, "hidden_size": 1536},
}


@strict_configuration
class BackboneConfig(PreTrainedConfig):
    r"""Settings that every backbone has, with those of the head on it.

    Args:
        grid_height (`int`, *optional*, defaults to 16): rows of the token grid.
        grid_width (`int`, *optional*, defaults to 16): columns of the token grid.
        token_dim (`int`, *optional*, defaults to 16): numbers in a token.
        num_classes (`int`, *optional*, defaults to 1000): classes, 0 for a model that knows none; the embedding has
            one row more, the null class.
        num_class_tokens (`int`, *optional*, defaults to 64): copies of the class embedding before the sequence.
        hidden_size (`int`, *optional*, defaults to 768): width.
        num_attention_heads (`int`, *optional*, defaults to 12): attention heads.
        mlp_ratio (`float`, *optional*, defaults to 4.0): width of the blocks' MLP over their own.
        attention_dropout (`float`, *optional*, defaults to 0.1): dropout of attention probabilities.
        hidden_dropout (`float`, *optional*, defaults to 0.1): dropout after the attention's projection and in the MLP.
        class_dropout_prob (`float`, *optional*, defaults to 0.1): share of labels replaced by the null class in
            training.
        text_dim (`int`, *optional*): width of the text encoder's states, which every block attends to; None: the model
            takes no texts.
        num_text_tokens (`int`, *optional*, defaults to 128): longest text.
        text_aligner_layers (`int`, *optional*, defaults to 6): blocks between the text encoder and the model.
        text_dropout_prob (`float`, *optional*, defaults to 0.1): share of texts replaced by the null text in training;
            half of them lose their class as well.
        layer_norm_eps (`float`, *optional*, defaults to 1e-06): of every layer norm.
        initializer_range (`float`, *optional*, defaults to 0.02): deviation of embeddings at initialisation.
        order (`str`, *optional*, defaults to `"random"`): the order of tokens that is trained, a name in
            `GENERATION_ORDERS`; pipelines generate in it where nothing else is asked for.
        context_noise (`float`, *optional*, defaults to 0.0): training mixes up to this share of noise into the tokens
            that the backbone sees (arXiv:2411.18447), so that it bears the errors of its own samples.
        head_type (`str`, *optional*, defaults to `"diffusion"`): a name in `TOKEN_HEADS`.
        head_config (`dict`, *optional*, defaults to `{"num_layers": 6, "hidden_size": 1024}`): the head's
            own settings.
        head_batch_multiplier (`int`, *optional*, defaults to 4): draws of the head's noise per token in training.

    Raises:
        ValueError: if a value is out of range, sizes contradict each other or a name is unknown.
    """

    # Sizes, of the subclass too.
    positive: ClassVar[tuple[str, ...]] = (
        "grid_height",
        "grid_width",
        "token_dim",
        "num_class_tokens",
        "hidden_size",
        "num_attention_heads",
        "head_batch_multiplier",
        "num_text_tokens",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    grid_height: int = 16
    grid_width: int = 16
    token_dim: int = 16
    num_classes: int = 1000
    num_class_tokens: int = 64
    hidden_size: int = 768
    num_attention_heads: int = 12
    mlp_ratio: float | int = 4.0
    attention_dropout: float | int = 0.1
    hidden_dropout: float | int = 0.1
    class_dropout_prob: float | int = 0.1
    text_dim: int | None = None
    num_text_tokens: int = 128
    text_aligner_layers: int = 6
    text_dropout_prob: float | int = 0.1
    layer_norm_eps: float | int = 1e-6
    initializer_range: float | int = 0.02
    order: str = "random"
    context_noise: float | int = 0.0
    head_type: str = "diffusion"
    head_config: dict = field(default_factory=lambda: dict(HEADS["base"]))
    head_batch_multiplier: int = 4

    def __post_init__(self, **kwargs):
        for name in self.positive:
            check_count(name, getattr(self, name), 1, MOST_LAYERS if name.endswith("layers") else LARGEST)
        check_count("num_classes", self.num_classes, 0, 2**24)
        check_count("text_aligner_layers", self.text_aligner_layers, 0, MOST_LAYERS)
        if self.text_dim is not None and self.text_dim < 1:
            raise ValueError(f"`text_dim` has to be at least 1 or None, got {self.text_dim}.")
        check_count("text_dim", self.text_dim or 1)
        shares = ("attention_dropout", "hidden_dropout", "class_dropout_prob", "text_dropout_prob", "context_noise")
        for name in shares:
            check_number(name, getattr(self, name), 0, 1)
        # Below, float32 would divide by zero where all of a token is the same.
        check_number("layer_norm_eps", self.layer_norm_eps, 1e-12, 1)
        check_number("initializer_range", self.initializer_range, 0, 10)
        check_number("mlp_ratio", self.mlp_ratio, 1 / self.hidden_size, LARGEST)
        self.check_heads("hidden_size", "num_attention_heads")
        look_up(GENERATION_ORDERS, self.order, "order")
        look_up(TOKEN_HEADS, self.head_type, "head_type")
        super().__post_init__(**kwargs)

    def check_heads(self, width: str, heads: str) -> None:
        """Refuse a width that attention heads can't share.

        Args:
            width (`str`): name of a width.
            heads (`str`): name of its number of attention heads.

        Raises:
            ValueError: if the width is no multiple of them.
        """
        if getattr(self, width) % getattr(self, heads):
            raise ValueError(
                f"`{width}` {getattr(self, width)} has to be a multiple of `{heads}` {getattr(self, heads)}."
            )

    @property
    def num_tokens(self) -> int:
        """Positions in the token grid."""
        return self.grid_height * self.grid_width

    @property
    def context_dim(self) -> int | None:
        """Width of what blocks attend to beside the sequence; None where the model takes no texts."""
        return None if self.text_dim is None else self.hidden_size

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "BackboneConfig":
        """The configuration of a released size.

        Args:
            name (`str`): `"base"`, `"large"` or `"huge"`.
            overrides (`Any`): fields to set otherwise.

        Returns:
            [`BackboneConfig`]: of this class, for 256 x 256 pixels with the KL-16 tokenizer.

        Raises:
            ValueError: if there is no such size.
        """
        return cls(**{**copy.deepcopy(look_up(cls.presets, name, "name")), **overrides})
