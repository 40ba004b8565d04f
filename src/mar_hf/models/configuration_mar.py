# SPDX-License-Identifier: Apache-2.0
"""Configuration of the masked autoregressive model."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..generation import look_up
from ..heads import TOKEN_HEADS


# The released models of arXiv:2406.11838 (table 4): 208, 479 and 943 million parameters.
PRESETS: dict[str, dict[str, Any]] = {
    "base": {
        "hidden_size": 768,
        "num_encoder_layers": 12,
        "num_decoder_layers": 12,
        "num_attention_heads": 12,
        "head_config": {"num_layers": 6, "hidden_size": 1024},
    },
    "large": {
        "hidden_size": 1024,
        "num_encoder_layers": 16,
        "num_decoder_layers": 16,
        "num_attention_heads": 16,
        "head_config": {"num_layers": 8, "hidden_size": 1280},
    },
    "huge": {
        "hidden_size": 1280,
        "num_encoder_layers": 20,
        "num_decoder_layers": 20,
        "num_attention_heads": 16,
        "head_config": {"num_layers": 12, "hidden_size": 1536},
    },
}


@strict
class MARConfig(PreTrainedConfig):
    r"""Settings of a [`MARModel`] and of the head on it. The defaults are those of MAR-B at 256 x 256 pixels.

    Args:
        grid_height (`int`, *optional*, defaults to 16): rows of the token grid.
        grid_width (`int`, *optional*, defaults to 16): columns of the token grid.
        token_dim (`int`, *optional*, defaults to 16): numbers in a token.
        num_classes (`int`, *optional*, defaults to 1000): classes; the embedding has one row more, the null class.
        num_class_tokens (`int`, *optional*, defaults to 64): copies of the class embedding before the sequence.
        hidden_size (`int`, *optional*, defaults to 768): width of the encoder.
        num_encoder_layers (`int`, *optional*, defaults to 12): transformer blocks over the visible tokens.
        num_decoder_layers (`int`, *optional*, defaults to 12): transformer blocks over all tokens.
        num_attention_heads (`int`, *optional*, defaults to 12): attention heads of the encoder.
        decoder_hidden_size (`int`, *optional*): width of the decoder; None means that of the encoder.
        decoder_num_attention_heads (`int`, *optional*): None means as many as in the encoder.
        mlp_ratio (`float`, *optional*, defaults to 4.0): width of the blocks' MLP over their own.
        attention_dropout (`float`, *optional*, defaults to 0.1): dropout of attention probabilities.
        hidden_dropout (`float`, *optional*, defaults to 0.1): dropout after the attention's projection and in the MLP.
        class_dropout_prob (`float`, *optional*, defaults to 0.1): share of labels replaced by the null class in
            training.
        layer_norm_eps (`float`, *optional*, defaults to 1e-06): of every layer norm.
        initializer_range (`float`, *optional*, defaults to 0.02): deviation of embeddings at initialisation.
        mask_ratio_min (`float`, *optional*, defaults to 0.7): least share of masked tokens in training.
        mask_ratio_mean (`float`, *optional*, defaults to 1.0): mean of the masking ratio before truncation.
        mask_ratio_std (`float`, *optional*, defaults to 0.25): deviation of the masking ratio before truncation.
        head_type (`str`, *optional*, defaults to `"diffusion"`): a name in `TOKEN_HEADS`.
        head_config (`dict`, *optional*, defaults to `{"num_layers": 6, "hidden_size": 1024}`): the head's
            own settings.
        head_batch_multiplier (`int`, *optional*, defaults to 4): draws of the head's noise per token in training.

    Raises:
        ValueError: if a value is out of range, sizes contradict each other or `head_type` is unknown.
    """

    model_type = "mar_hf_mar"

    grid_height: int = 16
    grid_width: int = 16
    token_dim: int = 16
    num_classes: int = 1000
    num_class_tokens: int = 64
    hidden_size: int = 768
    num_encoder_layers: int = 12
    num_decoder_layers: int = 12
    num_attention_heads: int = 12
    decoder_hidden_size: int | None = None
    decoder_num_attention_heads: int | None = None
    mlp_ratio: float | int = 4.0
    attention_dropout: float | int = 0.1
    hidden_dropout: float | int = 0.1
    class_dropout_prob: float | int = 0.1
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    mask_ratio_min: float | int = 0.7
    mask_ratio_mean: float | int = 1.0
    mask_ratio_std: float | int = 0.25
    head_type: str = "diffusion"
    head_config: dict = field(default_factory=lambda: {"num_layers": 6, "hidden_size": 1024})
    head_batch_multiplier: int = 4

    def __post_init__(self, **kwargs):
        self.decoder_hidden_size = self.decoder_hidden_size or self.hidden_size
        self.decoder_num_attention_heads = self.decoder_num_attention_heads or self.num_attention_heads
        for name in (
            "grid_height",
            "grid_width",
            "token_dim",
            "num_classes",
            "num_class_tokens",
            "hidden_size",
            "num_encoder_layers",
            "num_decoder_layers",
            "num_attention_heads",
            "decoder_hidden_size",
            "decoder_num_attention_heads",
            "head_batch_multiplier",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` has to be at least 1, got {getattr(self, name)}.")
        for name in ("attention_dropout", "hidden_dropout", "class_dropout_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` has to lie in [0, 1], got {getattr(self, name)}.")
        for width, heads in (
            ("hidden_size", "num_attention_heads"),
            ("decoder_hidden_size", "decoder_num_attention_heads"),
        ):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f"`{width}` {getattr(self, width)} has to be a multiple of `{heads}` {getattr(self, heads)}."
                )
        if not 0 < self.mask_ratio_min <= 1:
            raise ValueError(f"`mask_ratio_min` has to lie in (0, 1], got {self.mask_ratio_min}.")
        if not self.mask_ratio_std > 0:
            raise ValueError(f"`mask_ratio_std` has to be above 0, got {self.mask_ratio_std}.")
        look_up(TOKEN_HEADS, self.head_type, "head_type")
        super().__post_init__(**kwargs)

    @property
    def num_tokens(self) -> int:
        """Positions in the token grid."""
        return self.grid_height * self.grid_width

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "MARConfig":
        """The configuration of a released size.

        Args:
            name (`str`): `"base"`, `"large"` or `"huge"`.
            overrides (`Any`): fields to set otherwise.

        Returns:
            [`MARConfig`]: for 256 x 256 pixels with the KL-16 tokenizer.

        Raises:
            ValueError: if there is no such size.
        """
        return cls(**{**look_up(PRESETS, name, "name"), **overrides})
