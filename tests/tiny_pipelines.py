# SPDX-License-Identifier: Apache-2.0
"""Whole pipelines that are small enough for tests: real parts, weights that matter, milliseconds a picture."""

import torch
from diffusers import AutoencoderKL

from common import MODELS, tiny_config
from mar_hf import ImageTokenizer, ImageTokenizerConfig, MARPipeline, TokenDDPMScheduler
from mar_hf.models import BackbonePreTrainedModel
from mar_hf.models.layers import ContextAttention
from tiny_texts import TEXT, tiny_text_encoder, tiny_text_tokenizer


NAMES = {0: "heart", 1: "cat, kitten", 2: "clock"}
FEW_STEPS = {"num_inference_steps": 3, "num_diffusion_steps": 4, "token_schedule": "cosine"}
# With these the causal model can do what the masked one does: any number of steps, random orders.
FREEDOM = {"mar": {}, "ar": {"order": "random", "max_tokens_per_step": 16}}


def tiny_transformer(token_dim: int = 12, seed: int = 0, backbone: str = "mar", **config) -> BackbonePreTrainedModel:
    """A grid of 4 x 4 tokens, 3 classes, 32 wide.

    The head's last layers are random instead of zero, the classes far apart: all labels of a fresh model look alike.
    So do texts, which it does not attend to yet.
    """
    config = tiny_config(backbone, token_dim=token_dim, **{**FREEDOM[backbone], **config})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        transformer = MODELS[backbone](config).eval()
        head = transformer.head
        torch.nn.init.normal_(transformer.model.class_embedding.weight)
        if config.head_type == "categorical":
            torch.nn.init.normal_(head.out_proj.weight, std=0.2)
            torch.nn.init.normal_(head.codebook)
        else:
            torch.nn.init.normal_(head.out_proj.weight[:token_dim], std=0.2)
            for block in head.blocks:
                torch.nn.init.normal_(block.modulation.weight, std=0.2)
        for module in transformer.modules():
            if isinstance(module, ContextAttention):
                torch.nn.init.normal_(module.proj.weight, std=0.3)
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


def tiny_pipeline(vae: ImageTokenizer | None = None, backbone: str = "mar", **settings) -> MARPipeline:
    """A quiet pipeline on a pixel tokenizer, or on another; `settings` go to its constructor."""
    vae = tiny_pixels() if vae is None else vae
    parts = {
        "transformer": tiny_transformer(vae.token_dim, backbone=backbone),
        "vae": vae,
        "scheduler": TokenDDPMScheduler(max_timestep=400),
        "id2label": NAMES,
        "generation_defaults": FEW_STEPS,
    }
    pipeline = MARPipeline(**{**parts, **settings})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_text_pipeline(kind: str = "t5", backbone: str = "mar", config: dict | None = None, **settings) -> MARPipeline:
    """The same of texts, with a text encoder; it knows the classes, too. `config` is more of the transformer."""
    parts = {
        "transformer": tiny_transformer(backbone=backbone, **{**TEXT, **(config or {})}),
        "text_encoder": tiny_text_encoder(kind),
        "tokenizer": tiny_text_tokenizer(kind),
    }
    return tiny_pipeline(**{**parts, **settings})


def seeds(*numbers: int) -> list[torch.Generator]:
    """One generator a picture."""
    return [torch.Generator().manual_seed(number) for number in numbers]
