# SPDX-License-Identifier: Apache-2.0
"""The image tokenizer: pictures to a grid of unit-scaled continuous tokens, and back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    VQModel,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from ..loading import StrictLoadingMixin
from .configuration_image_tokenizer import ImageTokenizerConfig
from .normalizers import NORMALIZERS


AUTOENCODERS = {
    cls.__name__: cls for cls in (AutoencoderKL, AsymmetricAutoencoderKL, AutoencoderDC, AutoencoderTiny, VQModel)
}
VARIATIONAL = ("AutoencoderKL", "AsymmetricAutoencoderKL")
# Settings of diffusers' autoencoders with one entry a level; every level but one halves, or doubles, the sides.
LEVELS = (
    "block_out_channels",
    "down_block_out_channels",
    "up_block_out_channels",
    "encoder_block_out_channels",
    "decoder_block_out_channels",
)


def _check_class(name: str | None) -> None:
    if name not in AUTOENCODERS:
        raise ValueError(f"`autoencoder` has to be one of {sorted(AUTOENCODERS)}, got {name!r}.")


def _build_autoencoder(settings: dict[str, Any]) -> nn.Module:
    name = settings.get("_class_name")
    _check_class(name)
    try:
        return AUTOENCODERS[name].from_config(settings)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"`autoencoder` {settings} can't be built as {name}: {error}") from error


def _own_statistics(settings: dict[str, Any]) -> tuple[float | list[float], float | list[float]]:
    """Scale and shift of an autoencoder's latents, as diffusers' pipelines apply them: (z - mean) * scale / std."""
    scale, shift = (settings.get(name) for name in ("scaling_factor", "shift_factor"))
    mean, std = (settings.get(name) for name in ("latents_mean", "latents_std"))
    scale = 1.0 if scale is None else scale
    if std is not None:
        if 0 in std:
            raise ValueError(f"`latents_std` of the autoencoder has to be different from 0, got {list(std)}.")
        scale = [scale / deviation for deviation in std]
    if mean is not None:
        shift = list(mean)
    return scale, 0.0 if shift is None else shift


def _downsampling(settings: dict[str, Any]) -> int:
    """Pixels along one side of a latent position."""
    levels = {name: len(settings[name]) for name in LEVELS if settings.get(name)}
    factor = settings.get("upsampling_scaling_factor", 2)
    if len(set(levels.values())) != 1 or factor != 2:
        raise ValueError(
            "`autoencoder` has to give pictures of the size that it takes, by halving and doubling their sides; its "
            f"levels are {levels}, its `upsampling_scaling_factor` {factor}."
        )
    return 2 ** (next(iter(levels.values())) - 1)


def _is_grid(value: Any, channels: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[1] == channels and value.numel() > 0


def _form(value: Any) -> str:
    """What a message says of a value that is not the tensor that it should be."""
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else repr(value)


@dataclass
class ImageTokenizerOutput(ModelOutput):
    """What [`ImageTokenizer.encode`] and [`ImageTokenizer.sample_moments`] return.

    Args:
        latents (`torch.Tensor` of shape `(batch, channels, height, width)`): the unit-scaled latent grid.
        tokens (`torch.Tensor` of shape `(batch, num_tokens, token_dim)`): the same numbers, one row per token.
    """

    latents: torch.Tensor | None = None
    tokens: torch.Tensor | None = None


class ImageTokenizer(StrictLoadingMixin, PreTrainedModel):
    """Any diffusers autoencoder (or none: pixels) with its latent statistics and its patch size.

    A token is a square of `patch_size` x `patch_size` latent positions, channel-major: its features are ordered
    (channel, row, column), as in the original code of MAR (arXiv:2406.11838).

    Args:
        config ([`ImageTokenizerConfig`]): see there.

    Attributes:
        image_channels (`int`): channels of the pictures.
        latent_channels (`int`): channels of the latent grid.
        token_dim (`int`): numbers in one token: channels times `patch_size` squared.
        stride (`int`): pixels along one side of a token.
        is_variational (`bool`): whether pictures have a posterior to sample, not one value.
        projection (`Callable`, *optional*): what the normaliser does to tokens `(..., token_dim)` after shift and
            scale: one of `NORMALIZERS`. None: nothing.
        force_upcast (`bool`): whether the autoencoder would overflow in float16 and stays in float32 there.

    Raises:
        ValueError: if the configuration names an autoencoder class that is not in `AUTOENCODERS`, or settings that it
            can't be built from, or pictures would come back in another size.
    """

    config_class = ImageTokenizerConfig
    config: ImageTokenizerConfig
    base_model_prefix = "image_tokenizer"
    main_input_name = "pixel_values"
    _no_split_modules = ["ResnetBlock2D", "Attention"]
    _parameters_without_gradient = ("marker",)

    def __init__(self, config: ImageTokenizerConfig):
        super().__init__(config)
        self.autoencoder = None
        downsampling = 1
        if config.autoencoder is not None:
            self.autoencoder = _build_autoencoder(config.autoencoder)
            downsampling = _downsampling(self.autoencoder.config)
        else:
            # Pixels need no weights, but a checkpoint does, and so do hooks that ask the first one where the model is.
            self.marker = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.image_channels = config.in_channels
        self.latent_channels = config.latent_channels
        self.token_dim = config.latent_channels * config.patch_size**2
        self.stride = downsampling * config.patch_size
        self.projection = NORMALIZERS[config.normalizer]
        self.is_variational = self.autoencoder is not None and config.autoencoder["_class_name"] in VARIATIONAL
        self.force_upcast = self.autoencoder is not None and bool(self.autoencoder.config.get("force_upcast"))
        if self.force_upcast:
            self._keep_in_fp32_modules = {"autoencoder"}  # transformers' rule for loading in float16
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # The autoencoder's layers know their own initialisation; the default of transformers would replace it.
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        elif module is self and self.autoencoder is None:
            init.zeros_(self.marker)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "ImageTokenizer":
        """`to`, `half` and their like: an autoencoder that overflows in float16 stays in float32."""

        def upcast(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device, torch.float32) if moved.dtype == torch.float16 else moved

        return super()._apply(upcast if self.force_upcast else fn, recurse)

    @classmethod
    def from_autoencoder(
        cls,
        autoencoder: nn.Module,
        patch_size: int = 1,
        scaling_factor: float | list[float] | None = None,
        shift_factor: float | list[float] | None = None,
        normalizer: str = "affine",
        quantize: bool = False,
    ) -> "ImageTokenizer":
        """Wrap a loaded diffusers autoencoder; its weights are shared, not copied.

        Args:
            autoencoder (`torch.nn.Module`): an instance of one of `AUTOENCODERS`.
            patch_size (`int`, *optional*, defaults to 1): latent positions along a token's side.
            scaling_factor (`float` or `list[float]`, *optional*): None takes the autoencoder's own, over its
                `latents_std` where it has one, or 1.0.
            shift_factor (`float` or `list[float]`, *optional*): None takes the autoencoder's `latents_mean`, or its
                own, or 0.0.
            normalizer (`str`, *optional*, defaults to `"affine"`): see [`ImageTokenizerConfig`].
            quantize (`bool`, *optional*, defaults to `False`): see [`ImageTokenizerConfig`].

        Returns:
            [`ImageTokenizer`]: in the autoencoder's dtype and training mode. One that asks for it (`force_upcast`)
            and comes in float16 is brought to float32, as diffusers' pipelines do before they decode.

        Raises:
            ValueError: if the autoencoder is none of `AUTOENCODERS`, its statistics are no numbers to divide by,
                `quantize` does not fit it, or pictures would come back with other channels or in another size.
        """
        _check_class(type(autoencoder).__name__)
        settings = {"_class_name": type(autoencoder).__name__, **autoencoder.config}
        own_scale, own_shift = _own_statistics(settings)
        config = ImageTokenizerConfig(
            autoencoder={k: v for k, v in settings.items() if k == "_class_name" or not k.startswith("_")},
            patch_size=patch_size,
            normalizer=normalizer,
            shift_factor=own_shift if shift_factor is None else shift_factor,
            scaling_factor=own_scale if scaling_factor is None else scaling_factor,
            quantize=quantize,
        )
        with torch.device("meta"):
            tokenizer = cls(config)
        if tokenizer.force_upcast and autoencoder.dtype == torch.float16:
            autoencoder = autoencoder.float()
        tokenizer.autoencoder = autoencoder
        return tokenizer.train(autoencoder.training)

    @property
    def codebook(self) -> torch.Tensor:
        """All tokens that there are, `(num_codes, token_dim)` in float32, where `quantize` is set.

        Raises:
            ValueError: if tokens are no vectors of a codebook: without `quantize`, with a patch size, or normalised.
        """
        config = self.config
        if not config.quantize or config.patch_size != 1 or config.normalizer != "affine":
            raise ValueError(
                "The tokenizer has no codebook of tokens: that takes `quantize` True, `patch_size` 1 and `normalizer` "
                f"'affine', got {config.quantize}, {config.patch_size} and {config.normalizer!r}."
            )
        vectors = self(None, "codebook")
        return self.sample_moments(vectors[:, :, None, None], None).tokens[:, 0]

    def encode(
        self,
        pixel_values: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        sample_posterior: bool = True,
    ) -> ImageTokenizerOutput:
        """Pictures to unit-scaled latents and tokens: `encode_moments`, then `sample_moments`.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, image_channels, height, width)`): in [-1, 1]; height
                and width multiples of `stride`.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): for the posterior's noise.
            sample_posterior (`bool`, *optional*, defaults to `True`): sample a variational autoencoder's posterior, as
                the original trains; False takes its mode.

        Returns:
            [`ImageTokenizerOutput`]: `latents` and `tokens`, in the dtype of `pixel_values`.

        Raises:
            ValueError: if the shape is not as described.
        """
        mean, std = self.encode_moments(pixel_values)
        output = self.sample_moments(mean, std if sample_posterior else None, generator)
        dtype = pixel_values.dtype
        return ImageTokenizerOutput(latents=output.latents.to(dtype), tokens=output.tokens.to(dtype))

    def encode_moments(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures to mean and deviation of their posterior, as the autoencoder has them: to keep, and sample often.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, image_channels, height, width)`): in [-1, 1]; height
                and width multiples of `stride`.

        Returns:
            `tuple` of two `torch.Tensor` of shape `(batch, channels, latent_height, latent_width)`: mean and deviation
            in the autoencoder's dtype, neither shifted nor scaled. The deviation is 0 unless `is_variational`. With
            `quantize` the mean holds vectors of the codebook.

        Raises:
            ValueError: if the shape is not as described.
        """
        if not _is_grid(pixel_values, self.image_channels):
            raise ValueError(
                f"`pixel_values` has to be of shape (batch, {self.image_channels}, height, width), "
                f"got {_form(pixel_values)}."
            )
        if pixel_values.shape[2] % self.stride or pixel_values.shape[3] % self.stride:
            size = tuple(pixel_values.shape[2:])
            raise ValueError(f"`pixel_values` has size {size}; both sides have to be multiples of {self.stride}.")
        return self(pixel_values, "encode")

    def sample_moments(
        self,
        mean: torch.Tensor,
        std: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> ImageTokenizerOutput:
        """Draw unit-scaled latents from what `encode_moments` returned. Needs the configuration only, no weights.

        Args:
            mean (`torch.Tensor` of shape `(batch, channels, latent_height, latent_width)`): of the posterior.
            std (`torch.Tensor` of the same shape, *optional*): its deviation. None takes the mode. No noise is drawn
                unless `is_variational`.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): for the noise, which is drawn in the
                dtype of `mean`.

        Returns:
            [`ImageTokenizerOutput`]: `latents` and `tokens` in float32.

        Raises:
            ValueError: if the shape is not as described.
        """
        fits = _is_grid(mean, self.latent_channels)
        if not fits or (std is not None and (not isinstance(std, torch.Tensor) or std.shape != mean.shape)):
            raise ValueError(
                f"`mean` and `std` have to be of shape (batch, {self.latent_channels}, height, width), "
                f"got {_form(mean)} and {_form(std)}."
            )
        sources = generator if isinstance(generator, list) else [generator]
        if not all(isinstance(source, torch.Generator | None) for source in sources):
            raise ValueError(f"`generator` has to be a torch.Generator or a list of them, got {generator!r}.")
        latents = mean
        if std is not None and self.is_variational:
            noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            latents = mean + std * noise
        shift, scale = self._statistics(latents.device)
        latents = (latents.float() - shift) * scale
        tokens = self.patchify(latents)
        if self.projection is not None:
            tokens = self.projection(tokens)
            latents = self.unpatchify(tokens, latents.shape[2] // self.config.patch_size)
        return ImageTokenizerOutput(latents=latents, tokens=tokens)

    def decode(self, latents: torch.Tensor, grid_height: int | None = None) -> torch.Tensor:
        """Unit-scaled tokens or latents to pictures.

        Args:
            latents (`torch.Tensor` of shape `(batch, channels, height, width)` or `(batch, num_tokens, token_dim)`):
                the latent grid, or tokens.
            grid_height (`int`, *optional*): rows of the grid of tokens; None means a square grid.

        Returns:
            `torch.Tensor` of shape `(batch, image_channels, height, width)`: about [-1, 1], not clamped, in the dtype
            of `latents`.

        Raises:
            ValueError: if the shape is neither.
        """
        is_tensor = isinstance(latents, torch.Tensor)
        if is_tensor and latents.ndim == 3:
            latents = self.unpatchify(latents, grid_height)
        if not is_tensor or latents.ndim != 4 or latents.shape[1] != self.latent_channels or not latents.numel():
            raise ValueError(
                f"`latents` has to be of shape (batch, {self.latent_channels}, height, width) or (batch, num_tokens, "
                f"{self.token_dim}), got {_form(latents)}."
            )
        shift, scale = self._statistics(latents.device)
        return self(latents.float() / scale + shift, "decode").to(latents.dtype)

    def forward(self, pixel_values: torch.Tensor | None, method: str = "reconstruct") -> Any:
        """Reconstruct pictures through the posterior's mode.

        Whatever needs weights comes by here: offloading, casting and sharding hang on `forward` and see nothing else.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, image_channels, height, width)`): in [-1, 1].
            method (`str`, *optional*, defaults to `"reconstruct"`): what the methods of this class ask for.

        Returns:
            `torch.Tensor` of the same shape.
        """
        autoencoder = self.autoencoder
        if method == "codebook":
            return autoencoder.quantize.embedding.weight.detach().clone()
        if method == "reconstruct":
            return self.decode(self.encode(pixel_values, sample_posterior=False).latents)
        if autoencoder is None:
            return pixel_values if method == "decode" else (pixel_values, torch.zeros_like(pixel_values))
        if method == "decode":
            return autoencoder.decode(pixel_values.to(autoencoder.dtype)).sample
        encoded = autoencoder.encode(pixel_values.to(autoencoder.dtype))
        if self.is_variational:
            return encoded.latent_dist.mean, encoded.latent_dist.std
        mean = encoded.latent if hasattr(encoded, "latent") else encoded.latents
        if self.config.quantize:
            # By number: what the quantiser itself returns, for its gradient, is that vector up to rounding.
            quantizer, (batch, channels, height, width) = autoencoder.quantize, mean.shape
            codes = quantizer(mean)[2][2].flatten()
            mean = quantizer.get_codebook_entry(codes, (batch, height, width, channels))
        return mean, torch.zeros_like(mean)

    def patchify(self, latents: torch.Tensor) -> torch.Tensor:
        """Cut a latent grid into tokens.

        Args:
            latents (`torch.Tensor` of shape `(batch, channels, height, width)`): both sides multiples of `patch_size`.

        Returns:
            `torch.Tensor` of shape `(batch, height * width / patch_size**2, channels * patch_size**2)`: row by row,
            channel-major inside a token.

        Raises:
            ValueError: if the shape is not as described.
        """
        patch = self.config.patch_size
        if not _is_grid(latents, self.latent_channels) or any(n % patch for n in latents.shape[2:]):
            raise ValueError(
                f"`latents` has to be of shape (batch, {self.latent_channels}, height, width) with sides that are "
                f"multiples of {patch}, got {_form(latents)}."
            )
        batch, channels, height, width = latents.shape
        grid = latents.reshape(batch, channels, height // patch, patch, width // patch, patch)
        # (B, c, h, p, w, q) -> (B, h, w, c, p, q)
        return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, self.token_dim)

    def unpatchify(self, tokens: torch.Tensor, grid_height: int | None = None) -> torch.Tensor:
        """Put tokens back into a latent grid: the inverse of `patchify`.

        Args:
            tokens (`torch.Tensor` of shape `(batch, num_tokens, token_dim)`): row by row.
            grid_height (`int`, *optional*): rows of the grid; None means a square grid.

        Returns:
            `torch.Tensor` of shape `(batch, channels, height, width)`.

        Raises:
            ValueError: if the tokens are of another width or do not fill such a grid.
        """
        is_tensor = isinstance(tokens, torch.Tensor)
        if not is_tensor or tokens.ndim != 3 or tokens.shape[2] != self.token_dim or not tokens.numel():
            raise ValueError(
                f"`tokens` has to be of shape (batch, num_tokens, {self.token_dim}), got {_form(tokens)}."
            )
        batch, num_tokens, _ = tokens.shape
        rows = round(num_tokens**0.5) if grid_height is None else grid_height
        if (
            not isinstance(rows, int)
            or rows < 1
            or num_tokens % rows
            or (grid_height is None and rows * rows != num_tokens)
        ):
            raise ValueError(f"{num_tokens} tokens do not fill a grid of {rows} rows; give `grid_height`.")
        patch = self.config.patch_size
        grid = tokens.reshape(batch, rows, num_tokens // rows, self.latent_channels, patch, patch)
        # (B, h, w, c, p, q) -> (B, c, h, p, w, q)
        return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, self.latent_channels, rows * patch, -1)

    def _statistics(self, device: torch.device) -> torch.Tensor:
        """Shift and scale, each of shape (1, channels or 1, 1, 1)."""
        shift, scale = self.config.shift_factor, self.config.scaling_factor
        if isinstance(shift, list) or isinstance(scale, list):
            shift, scale = (x if isinstance(x, list) else [x] * self.latent_channels for x in (shift, scale))
        # A blocking copy would wait for all that the device still has to do.
        both = torch.tensor([shift, scale], dtype=torch.float32).to(device, non_blocking=True)
        return both.reshape(2, 1, -1, 1, 1)
