# SPDX-License-Identifier: Apache-2.0
"""The trainings as programs: `accelerate launch -m mar_hf.training [tokenizer | text_encoder | latents] ...`."""

import logging
import sys
from collections.abc import Sequence

from tqdm import tqdm

from .arguments import parse_arguments
from .latent_cache import LatentCacheArguments, cache_latents
from .trainer import Trainer
from .trainer_base import BaseTrainer
from .trainer_text_encoder import TextEncoderTrainer
from .trainer_tokenizer import TokenizerTrainer


TRAINERS = {"model": Trainer, "tokenizer": TokenizerTrainer, "text_encoder": TextEncoderTrainer}


def run_trainer(trainer_class: type[BaseTrainer], argv: Sequence[str] | None = None) -> None:
    """Train with the settings of a command line, and say what came of it.

    Args:
        trainer_class (`type[BaseTrainer]`): what is trained.
        argv (`Sequence[str]`, *optional*): words of the command line; None takes the program's own.
    """
    logging.basicConfig(level=logging.WARNING)
    trainer = trainer_class(parse_arguments(trainer_class.arguments_class, argv))
    trainer.train()
    if trainer.summary:
        tqdm.write(trainer.summary)


def run_cache(argv: Sequence[str] | None = None) -> None:
    """Cache latents with the settings of a command line, and say how many.

    Args:
        argv (`Sequence[str]`, *optional*): words of the command line; None takes the program's own.
    """
    if summary := cache_latents(parse_arguments(LatentCacheArguments, argv)):
        tqdm.write(summary)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program that the first word names; without such a word, train a model.

    Args:
        argv (`Sequence[str]`, *optional*): words of the command line; None takes the program's own.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv.pop(0) if argv[:1] and not argv[0].startswith("-") else "model"
    if name == "latents":
        return run_cache(argv)
    if name not in TRAINERS:
        raise SystemExit(f"mar_hf.training: {name!r} is none of {', '.join([*TRAINERS, 'latents'])}")
    return run_trainer(TRAINERS[name], argv)
