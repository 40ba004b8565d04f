# SPDX-License-Identifier: Apache-2.0
"""Configuration of the masked autoregressive model."""

from typing import Any, ClassVar

from ..utils import check_number, strict_configuration
from .configuration_backbone import HEADS, BackboneConfig


@strict_configuration
class MARConfig(BackboneConfig):
    r"""Settings of a [`MARModel`] and of the head on it. The defaults are those of MAR-B at 256 x 256 pixels.

    Further settings are those of [`BackboneConfig`].

    Args:
        num_encoder_layers (`int`, *optional*, defaults to 12): transformer blocks over the visible tokens.
        num_decoder_layers (`int`, *optional*, defaults to 12): transformer blocks over all tokens.
        decoder_hidden_size (`int`, *optional*): width of the decoder; None means that of the encoder.
        decoder_num_attention_heads (`int`, *optional*): None means as many as in the encoder.
        mask_ratio_min (`float`, *optional*, defaults to 0.7): least share of masked tokens in training.
        mask_ratio_mean (`float`, *optional*, defaults to 1.0): mean of the masking ratio before truncation.
        mask_ratio_std (`float`, *optional*, defaults to 0.25): deviation of the masking ratio before truncation.

    Raises:
        ValueError: if a value is out of range, sizes contradict each other or a name is unknown.
    """

    model_type = "mar_hf_mar"
    positive: ClassVar[tuple[str, ...]] = (
        *BackboneConfig.positive,
        "num_encoder_layers",
        "num_decoder_layers",
        "decoder_hidden_size",
        "decoder_num_attention_heads",
    )
    # The released models of arXiv:2406.11838 (table 4): 208, 479 and 943 million parameters.
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        name: {
            "hidden_size": width,
            "num_encoder_layers": layers,
            "num_decoder_layers": layers,
            "num_attention_heads": heads,
            "head_config": HEADS[name],
        }
        for name, width, layers, heads in (("base", 768, 12, 12), ("large", 1024, 16, 16), ("huge", 1280, 20, 16))
    }

    num_encoder_layers: int = 12
    num_decoder_layers: int = 12
    decoder_hidden_size: int | None = None
    decoder_num_attention_heads: int | None = None
    mask_ratio_min: float | int = 0.7
    mask_ratio_mean: float | int = 1.0
    mask_ratio_std: float | int = 0.25

    def __post_init__(self, **kwargs):
        self.decoder_hidden_size = self.decoder_hidden_size or self.hidden_size
        self.decoder_num_attention_heads = self.decoder_num_attention_heads or self.num_attention_heads
        super().__post_init__(**kwargs)
        self.check_heads("decoder_hidden_size", "decoder_num_attention_heads")
        check_number("mlp_ratio", self.mlp_ratio, 1 / self.decoder_hidden_size)
        if not 0 < self.mask_ratio_min <= 1:
            raise ValueError(f"`mask_ratio_min` has to lie in (0, 1], got {self.mask_ratio_min}.")
        if not self.mask_ratio_std > 0:
            raise ValueError(f"`mask_ratio_std` has to be above 0, got {self.mask_ratio_std}.")
        check_number("mask_ratio_std", self.mask_ratio_std, 1e-6, 1e6)
        check_number("mask_ratio_mean", self.mask_ratio_mean, -10, 10)

    @property
    def num_hidden_layers(self) -> int:
        """Transformer blocks, the encoder's and the decoder's."""
        return self.num_encoder_layers + self.num_decoder_layers

    @property
    def condition_dim(self) -> int:
        """Width of the condition that the head is given."""
        return self.decoder_hidden_size
