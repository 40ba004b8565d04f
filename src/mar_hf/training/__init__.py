# SPDX-License-Identifier: Apache-2.0
"""Training: models, image tokenizers and text encoders, from a notebook or a shell.

Needs `pip install "mar_hf[train]"`. Libraries of that extra are imported when they are needed.
"""

from .accelerator import make_accelerator
from .arguments import TextEncoderTrainingArguments, TokenizerTrainingArguments, TrainingArguments, parse_arguments
from .autoencoders import latent_statistics
from .image_data import ImageTransform, center_crop, load_image_dataset, some_pictures
from .latent_cache import LatentCacheArguments, cache_latents
from .latent_data import load_latents
from .trainer import Trainer
from .trainer_base import BaseTrainer
from .trainer_head import HeadTrainer
from .trainer_text_encoder import TextEncoderTrainer
from .trainer_tokenizer import TokenizerTrainer


__all__ = [
    "BaseTrainer",
    "HeadTrainer",
    "ImageTransform",
    "LatentCacheArguments",
    "TextEncoderTrainer",
    "TextEncoderTrainingArguments",
    "TokenizerTrainer",
    "TokenizerTrainingArguments",
    "Trainer",
    "TrainingArguments",
    "cache_latents",
    "center_crop",
    "latent_statistics",
    "load_image_dataset",
    "load_latents",
    "make_accelerator",
    "parse_arguments",
    "some_pictures",
]
