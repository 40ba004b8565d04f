# SPDX-License-Identifier: Apache-2.0
"""Autoencoders that a small image tokenizer is trained from, and what is measured of them."""

import math
from collections.abc import Callable

import torch
from diffusers import AutoencoderDC, AutoencoderKL, VQModel
from diffusers.utils.torch_utils import randn_tensor

from ..tokenizers import ImageTokenizer, ImageTokenizerOutput
from .arguments import TokenizerTrainingArguments


Autoencoder = AutoencoderKL | AutoencoderDC | VQModel


def build_autoencoder(args: TokenizerTrainingArguments) -> Autoencoder:
    """The autoencoder of the settings, with random weights."""
    levels = len(args.block_out_channels)
    if args.autoencoder != "dc":
        blocks = {
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "in_channels": args.image_channels,
            "out_channels": args.image_channels,
            "block_out_channels": args.block_out_channels,
            "layers_per_block": args.layers_per_block[0],
            "latent_channels": args.latent_channels,
            "norm_num_groups": math.gcd(16, *args.block_out_channels),
            "sample_size": args.resolution,
        }
        if args.autoencoder == "kl":
            return AutoencoderKL(**blocks)
        vae = VQModel(**blocks, num_vq_embeddings=args.num_codes)
        # As published: the encoder follows the codebook a quarter as strongly as the codebook follows the encoder.
        # With diffusers' default it is the other way round.
        vae.quantize.legacy = False
        return vae
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("block_types", "ResBlock"),
            ("block_out_channels", args.block_out_channels),
            ("layers_per_block", args.layers_per_block),
            ("qkv_multiscales", ((),) * levels),
        )
    }
    return AutoencoderDC(
        in_channels=args.image_channels,
        latent_channels=args.latent_channels,
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
        **sides,
    )


class Reconstruction(torch.nn.Module):
    """Encoding, a draw from the posterior and decoding as one `forward`, so that processes share their gradients.

    Args:
        vae (`Autoencoder`): what is trained.
        latent_noise (`float`): deviation of the posterior, where the encoder predicts none.
        sample_moments (`Callable`): of the `ImageTokenizer` that this becomes, without shift and scale: what it makes
            of a draw is what the decoder sees.
    """

    def __init__(self, vae: Autoencoder, latent_noise: float, sample_moments: Callable[..., ImageTokenizerOutput]):
        super().__init__()
        self.vae = vae
        self.latent_noise = latent_noise
        self.sample_moments = sample_moments
        if isinstance(vae, VQModel):
            # How often each code was used of late: a part of what resuming needs.
            self.register_buffer("usage", torch.zeros(vae.config.num_vq_embeddings))

    def forward(
        self, pictures: torch.Tensor, generators: list[torch.Generator]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The pictures again, the term that holds the latents together; for VQ, latents (rows, c) and their codes."""
        encoded = self.vae.encode(pictures)
        if isinstance(self.vae, VQModel):
            quantised, commitment, (_, _, codes) = self.vae.quantize(encoded.latents)
            restored = self.vae.decode(quantised, force_not_quantize=True).sample
            return restored, commitment, encoded.latents.detach().permute(0, 2, 3, 1).flatten(0, 2), codes
        if isinstance(self.vae, AutoencoderKL):
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        else:
            mean, std = encoded.latent, torch.full_like(encoded.latent, self.latent_noise)
        noise = randn_tensor(mean.shape, generators, mean.device, torch.float32).to(mean)
        latents = self.sample_moments(mean + std * noise, None).latents
        restored = self.vae.decode(latents.to(mean)).sample
        mean, std = mean.float(), std.float()
        return restored, 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean(), None, None


def perplexity(counts: torch.Tensor) -> torch.Tensor:
    """How many codes, all used alike, would be as varied as these.

    Args:
        counts (`torch.Tensor` of shape `(num_codes,)`): how often each code was used.

    Returns:
        `torch.Tensor`: a scalar from 1 to `num_codes`.
    """
    shares = counts / counts.sum()
    return torch.special.entr(shares).sum().exp()


@torch.no_grad()
def latent_statistics(tokenizer: ImageTokenizer, batches: list[torch.Tensor]) -> tuple[list[float], list[float]]:
    """Mean and deviation of the latents that training sees, one number a channel.

    Args:
        tokenizer (`ImageTokenizer`): with any normaliser; its own latents are measured.
        batches (`list[torch.Tensor]`): pictures (B, channels, H, W) in [-1, 1].

    Returns:
        `tuple[list[float], list[float]]`: one number a channel each.
    """
    generator = torch.Generator(device=tokenizer.device).manual_seed(0)
    latents = [tokenizer.encode(batch.to(tokenizer.device), generator=generator).latents for batch in batches]
    latents = torch.cat([batch.transpose(0, 1).flatten(1) for batch in latents], 1)
    return latents.mean(1).tolist(), latents.std(1).tolist()
