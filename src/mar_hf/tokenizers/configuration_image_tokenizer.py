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
        shift_factor (`float` or `list[float]`, *optional*, defaults to 0.0): subtracted from the autoencoder's latents,
            for all channels or per channel.
        scaling_factor (`float` or `list[float]`, *optional*, defaults to 1.0): multiplies the shifted latents, for all
            channels or per channel, so that they have about unit standard deviation.

    Raises:
        ValueError: if `patch_size` is below 1, `normalizer` is unknown, or a per-channel list is of the wrong length.
    """

    model_type = "mar_hf_image_tokenizer"

    autoencoder: dict | None = None
    patch_size: int = 1
    normalizer: str = "affine"
    shift_factor: float | int | list[float | int] = 0.0
    scaling_factor: float | int | list[float | int] = 1.0

    @property
    def latent_channels(self) -> int:
        """Channels of the latent grid: the autoencoder's, or 3 for pixels."""
        return 3 if self.autoencoder is None else self.autoencoder["latent_channels"]

    def __post_init__(self, **kwargs):
        if self.patch_size < 1:
            raise ValueError(f"`patch_size` has to be at least 1, got {self.patch_size}.")
        if self.normalizer not in NORMALIZERS:
            raise ValueError(f"`normalizer` has to be one of {NORMALIZERS}, got {self.normalizer!r}.")
        for name in ("shift_factor", "scaling_factor"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != self.latent_channels:
                raise ValueError(f"`{name}` needs one value per latent channel ({self.latent_channels}), got {value}.")
        super().__post_init__(**kwargs)
