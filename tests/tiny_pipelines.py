# SPDX-License-Identifier: Apache-2.0
"""Whole pipelines that are small enough for tests: real parts, weights that matter, milliseconds a picture."""

import torch
from diffusers import AutoencoderKL

from mar_hf import (
    ImageTokenizer,
    ImageTokenizerConfig,
    MARConfig,
    MARForImageGeneration,
    MARPipeline,
    TokenDDPMScheduler,
)


NAMES = {0: "heart", 1: "cat, kitten", 2: "clock"}
FEW_STEPS = {"num_inference_steps": 3, "num_diffusion_steps": 4}


def tiny_transformer(token_dim: int = 12, seed: int = 0, **config) -> MARForImageGeneration:
    """A grid of 4 x 4 tokens, 3 classes, 32 wide.

    The head's last layers are random instead of zero, the classes far apart: all labels of a fresh model look alike.
    """
    settings = {
        "grid_height": 4,
        "grid_width": 4,
        "token_dim": token_dim,
        "num_classes": 3,
        "num_class_tokens": 2,
        "hidden_size": 32,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "num_attention_heads": 2,
        "head_config": {"num_layers": 2, "hidden_size": 32},
        **config,
    }
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        transformer = MARForImageGeneration(MARConfig(**settings)).eval()
        torch.nn.init.normal_(transformer.model.class_embedding.weight)
        torch.nn.init.normal_(transformer.head.out_proj.weight[:token_dim], std=0.2)
        for block in transformer.head.blocks:
            torch.nn.init.normal_(block.modulation.weight, std=0.2)
    return transformer


def tiny_pixels() -> ImageTokenizer:
    """No autoencoder: a token is a 2 x 2 patch of pixels."""
    return ImageTokenizer(ImageTokenizerConfig(patch_size=2, scaling_factor=2.0)).eval()


def tiny_kl() -> ImageTokenizer:
    """An autoencoder with 4 channels that halves the sides; a token is one position of its latents."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoencoder = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=8,
        )
    return ImageTokenizer.from_autoencoder(autoencoder.eval(), scaling_factor=0.5)


def tiny_pipeline(vae: ImageTokenizer | None = None, **settings) -> MARPipeline:
    """A quiet pipeline on a pixel tokenizer, or on another; `settings` go to its constructor."""
    vae = tiny_pixels() if vae is None else vae
    parts = {
        "transformer": tiny_transformer(vae.token_dim),
        "vae": vae,
        "scheduler": TokenDDPMScheduler(max_timestep=400),
        "id2label": NAMES,
        "generation_defaults": FEW_STEPS,
    }
    pipeline = MARPipeline(**{**parts, **settings})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeds(*numbers: int) -> list[torch.Generator]:
    """One generator a picture."""
    return [torch.Generator().manual_seed(number) for number in numbers]
