# SPDX-License-Identifier: Apache-2.0
"""The trainings as programs: `accelerate launch -m mar_hf.training [tokenizer | text_encoder | latents] ...`."""

import logging
import sys
from collections.abc import Sequence

from tqdm import tqdm

from mar_hf_settings import run_program, told_in_a_line

from .arguments import BaseTrainingArguments, LatentCacheArguments, split_program
from .latent_cache import cache_latents
from .trainer import Trainer
from .trainer_base import BaseTrainer
from .trainer_head import HeadTrainer
from .trainer_text_encoder import TextEncoderTrainer
from .trainer_tokenizer import TokenizerTrainer


TRAINERS = {"model": Trainer, "tokenizer": TokenizerTrainer, "text_encoder": TextEncoderTrainer}


def run_trainer(trainer_class: type[BaseTrainer], argv: Sequence[str] | None = None) -> None:
    """Train with the settings of a command line, and say what came of it.

    Args:
        trainer_class (`type[BaseTrainer]`): what is trained.
        argv (`Sequence[str]`, *optional*): words of the command line; None takes the program's own.
    """

    def train(args: BaseTrainingArguments) -> None:
        distils = trainer_class is Trainer and args.distill_head
        trainer = (HeadTrainer if distils else trainer_class)(args)
        trainer.train()
        if trainer.summary:
            tqdm.write(trainer.summary)

    logging.basicConfig(level=logging.WARNING)
    run_program(train, trainer_class.arguments_class, argv)


def run_cache(argv: Sequence[str] | None = None) -> None:
    """Cache latents with the settings of a command line, and say how many.

    Args:
        argv (`Sequence[str]`, *optional*): words of the command line; None takes the program's own.
    """

    def cache(args: LatentCacheArguments) -> None:
        if summary := cache_latents(args):
            tqdm.write(summary)

    run_program(cache, LatentCacheArguments, argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program that the first word names; without such a word, train a model.

    Args:
        argv (`Sequence[str]`, *optional*): words of the command line; None takes the program's own.
    """
    with told_in_a_line():
        name, words = split_program(sys.argv[1:] if argv is None else argv)
    if name == "latents":
        return run_cache(words)
    return run_trainer(TRAINERS[name], words)
