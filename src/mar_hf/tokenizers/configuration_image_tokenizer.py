# SPDX-License-Identifier: Apache-2.0
"""Configuration of the image tokenizer."""

import json
import math

from transformers import PreTrainedConfig

from ..utils import check_count, strict_configuration
from .normalizers import NORMALIZERS


@strict_configuration
class ImageTokenizerConfig(PreTrainedConfig):
    r"""Settings of an [`ImageTokenizer`].

    Args:
        autoencoder (`dict`, *optional*): configuration of a diffusers autoencoder, with its `_class_name`. None means
            that the pixels themselves are the latents.
        in_channels (`int`, *optional*): channels of the pictures. None takes the autoencoder's, or 3 for pixels.
        patch_size (`int`, *optional*, defaults to 1): side, in latent positions, of the square that makes one token.
        normalizer (`str`, *optional*, defaults to `"affine"`): `"affine"`: latents = (z - shift_factor) *
            scaling_factor; `"token_layer_norm"`: the same, then layer norm without weights over each token;
            `"sphere"`: the same, then each token is projected to the sphere of radius sqrt(token_dim) (SphereAR,
            arXiv:2509.24335). Decoding undoes shift and scale only: the autoencoder should be trained on what the
            other two leave. Pipelines apply them to the tokens that the head samples, too.
        shift_factor (`float` or `list[float]`, *optional*, defaults to 0.0): subtracted from the autoencoder's
            latents, for all channels or per channel.
        scaling_factor (`float` or `list[float]`, *optional*, defaults to 1.0): multiplies the shifted latents, for all
            channels or per channel, so that they have about unit standard deviation.
        quantize (`bool`, *optional*, defaults to `False`): for a `VQModel` only: latents are vectors of its codebook.
            False leaves them as the encoder makes them, and decoding quantises them.

    Raises:
        ValueError: if `patch_size` or `in_channels` is below 1, `in_channels` is not the autoencoder's, `normalizer`
            is unknown, `autoencoder` lacks its class or channels or gives pictures of other channels than it takes, a
            scale is 0, a statistic is not finite, a per-channel list is of the wrong length, or `quantize` meets
            another autoencoder.
    """

    model_type = "mar_hf_image_tokenizer"

    autoencoder: dict | None = None
    in_channels: int | None = None
    patch_size: int = 1
    normalizer: str = "affine"
    shift_factor: float | int | list[float | int] = 0.0
    scaling_factor: float | int | list[float | int] = 1.0
    quantize: bool = False

    @property
    def latent_channels(self) -> int:
        """Channels of the latent grid: the autoencoder's, or those of the pixels."""
        if self.autoencoder is None:
            return self.in_channels
        return self.autoencoder.get("vq_embed_dim") or self.autoencoder["latent_channels"]

    def __post_init__(self, **kwargs):
        check_count("patch_size", self.patch_size)
        if self.normalizer not in NORMALIZERS:
            raise ValueError(f"`normalizer` has to be one of {tuple(NORMALIZERS)}, got {self.normalizer!r}.")
        if self.autoencoder is not None and not {"_class_name", "latent_channels"} <= self.autoencoder.keys():
            raise ValueError(f"`autoencoder` has to hold `_class_name` and `latent_channels`, got {self.autoencoder}.")
        try:
            json.dumps(self.autoencoder)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`autoencoder` has to hold plain data that JSON takes: {error}") from error
        if self.quantize and (self.autoencoder or {}).get("_class_name") != "VQModel":
            raise ValueError(f"`quantize` has to be False without a `VQModel`, got `autoencoder` {self.autoencoder}.")
        self._settle_channels()
        for name in ("shift_factor", "scaling_factor"):
            value = getattr(self, name)
            numbers = value if isinstance(value, list) else [value]
            if any(isinstance(number, bool) or not math.isfinite(number) for number in numbers):
                raise ValueError(f"`{name}` has to be a finite number, or a list of them, got {value}.")
            if name == "scaling_factor" and 0 in numbers:
                raise ValueError(f"`scaling_factor` has to be different from 0, got {value}.")
            if isinstance(value, list) and len(value) != self.latent_channels:
                raise ValueError(f"`{name}` needs one value per latent channel ({self.latent_channels}), got {value}.")
        super().__post_init__(**kwargs)

    def _settle_channels(self) -> None:
        settings = self.autoencoder or {}
        channels = settings.get("in_channels", 3 if self.autoencoder or self.in_channels is None else self.in_channels)
        check_count("in_channels` of `autoencoder" if "in_channels" in settings else "in_channels", channels)
        if self.in_channels not in (None, channels):
            raise ValueError(f"`in_channels` has to be the autoencoder's {channels}, got {self.in_channels}.")
        if settings.get("out_channels", channels) != channels:
            raise ValueError(
                "`autoencoder` has to give pictures of as many channels as it takes, got `in_channels` "
                f"{channels} and `out_channels` {settings['out_channels']}."
            )
        self.in_channels = channels
        check_count("latent_channels", self.latent_channels)
