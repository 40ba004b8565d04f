# SPDX-License-Identifier: Apache-2.0
"""Configuration of the causal autoregressive model."""

from typing import Any, ClassVar

from ..utils import check_number, strict_configuration
from .configuration_backbone import HEADS, BackboneConfig


POSITION_TYPES = ("learned", "rotary")


@strict_configuration
class ARConfig(BackboneConfig):
    r"""Settings of an [`ARModel`] and of the head on it. The defaults are a model of MAR-B's size.

    Further settings are those of [`BackboneConfig`].

    Args:
        num_layers (`int`, *optional*, defaults to 24): transformer blocks.
        order (`str`, *optional*, defaults to `"raster"`): the order of tokens that is trained, a name in
            `GENERATION_ORDERS`; pipelines generate in it where nothing else is asked for.
        position_type (`str`, *optional*, defaults to `"learned"`): `"learned"`: embeddings of the position that a
            token has and of the one to be predicted from it are added to it (arXiv:2411.00776); `"rotary"`: keys are
            turned by the one, queries by the other, half of each for rows and half for columns.
        rotary_base (`float`, *optional*, defaults to 100.0): of the rotary angles; sides are far shorter than texts.
        max_tokens_per_step (`int`, *optional*, defaults to 1): training draws how many tokens a step predicts, up to
            this number, and so many may be predicted at once.

    Raises:
        ValueError: if a value is out of range, sizes contradict each other or a name is unknown.
    """

    model_type = "mar_hf_ar"
    attribute_map = {"num_hidden_layers": "num_layers"}  # the caches of transformers ask for it
    positive: ClassVar[tuple[str, ...]] = (*BackboneConfig.positive, "num_layers", "max_tokens_per_step")
    # As wide and as deep as the masked models of these names.
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        name: {"hidden_size": width, "num_layers": layers, "num_attention_heads": heads, "head_config": HEADS[name]}
        for name, width, layers, heads in (("base", 768, 24, 12), ("large", 1024, 32, 16), ("huge", 1280, 40, 16))
    }

    num_layers: int = 24
    order: str = "raster"
    position_type: str = "learned"
    rotary_base: float | int = 100.0
    max_tokens_per_step: int = 1

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.position_type not in POSITION_TYPES:
            raise ValueError(f"`position_type` has to be one of {POSITION_TYPES}, got {self.position_type!r}.")
        if self.position_type == "rotary" and self.hidden_size // self.num_attention_heads % 4:
            raise ValueError(
                f"`hidden_size` {self.hidden_size} over `num_attention_heads` {self.num_attention_heads} has to be a "
                "multiple of 4 with rotary positions: pairs for rows and pairs for columns."
            )
        if not self.rotary_base > 1:
            raise ValueError(f"`rotary_base` has to be above 1, got {self.rotary_base}.")
        check_number("rotary_base", self.rotary_base, 1, 1e12)
        if self.max_tokens_per_step > self.num_tokens:
            raise ValueError(
                f"`max_tokens_per_step` has to lie in 1..{self.num_tokens} (the tokens), got "
                f"{self.max_tokens_per_step}."
            )

    @property
    def condition_dim(self) -> int:
        """Width of the condition that the head is given."""
        return self.hidden_size
