# SPDX-License-Identifier: Apache-2.0
"""Configuration of the image tokenizer."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


NORMALIZERS = ("affine", "token_layer_norm")


@strict
class ImageTokenizerConfig(PreTrainedConfig):
    r"""Settings of an [`ImageTokenizer`].

    Args:
        autoencoder (`dict`, *optional*): configuration of a diffusers autoencoder, with its `_class_name`. None means
            that the pixels themselves are the latents.
        patch_size (`int`, *optional*, defaults to 1): side, in latent positions, of the square that makes one token.
        normalizer (`str`, *optional*, defaults to `"affine"`): `"affine"`: latents = (z - shift_factor) *
            scaling_factor; `"token_layer_norm"`: the same, then layer norm without weights over each token (not
            undone by decoding).
        shift_factor (`float` or `list[float]`, *optional*, defaults to 0.0): subtracted from the autoencoder's
            latents, for all channels or per channel.
        scaling_factor (`float` or `list[float]`, *optional*, defaults to 1.0): multiplies the shifted latents, for all
            channels or per channel, so that they have about unit standard deviation.
        quantize (`bool`, *optional*, defaults to `False`): for a `VQModel` only: latents are vectors of its codebook.
            False leaves them as the encoder makes them, and decoding quantises them.

    Raises:
        ValueError: if `patch_size` is below 1, `normalizer` is unknown, `autoencoder` lacks its class or channels, a
            scale is 0, a per-channel list is of the wrong length, or `quantize` meets another autoencoder.
    """

    model_type = "mar_hf_image_tokenizer"

    autoencoder: dict | None = None
    patch_size: int = 1
    normalizer: str = "affine"
    shift_factor: float | int | list[float | int] = 0.0
    scaling_factor: float | int | list[float | int] = 1.0
    quantize: bool = False

    @property
    def latent_channels(self) -> int:
        """Channels of the latent grid: the autoencoder's, or 3 for pixels."""
        if self.autoencoder is None:
            return 3
        return self.autoencoder.get("vq_embed_dim") or self.autoencoder["latent_channels"]

    def __post_init__(self, **kwargs):
        if self.patch_size < 1:
            raise ValueError(f"`patch_size` has to be at least 1, got {self.patch_size}.")
        if self.normalizer not in NORMALIZERS:
            raise ValueError(f"`normalizer` has to be one of {NORMALIZERS}, got {self.normalizer!r}.")
        if self.autoencoder is not None and not {"_class_name", "latent_channels"} <= self.autoencoder.keys():
            raise ValueError(f"`autoencoder` has to hold `_class_name` and `latent_channels`, got {self.autoencoder}.")
        if self.quantize and (self.autoencoder or {}).get("_class_name") != "VQModel":
            raise ValueError(f"`quantize` has to be False without a `VQModel`, got `autoencoder` {self.autoencoder}.")
        if 0 in (self.scaling_factor if isinstance(self.scaling_factor, list) else [self.scaling_factor]):
            raise ValueError(f"`scaling_factor` has to be different from 0, got {self.scaling_factor}.")
        for name in ("shift_factor", "scaling_factor"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != self.latent_channels:
                raise ValueError(f"`{name}` needs one value per latent channel ({self.latent_channels}), got {value}.")
        super().__post_init__(**kwargs)
