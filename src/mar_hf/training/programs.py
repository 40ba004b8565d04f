# SPDX-License-Identifier: Apache-2.0
"""The trainings as programs: `accelerate launch -m mar_hf.training [tokenizer | text_encoder | latents] ...`."""

import logging
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from .arguments import BaseTrainingArguments, Settings, parse_arguments
from .latent_cache import LatentCacheArguments, cache_latents
from .trainer import Trainer
from .trainer_base import BaseTrainer
from .trainer_head import HeadTrainer
from .trainer_text_encoder import TextEncoderTrainer
from .trainer_tokenizer import TokenizerTrainer


TRAINERS = {"model": Trainer, "tokenizer": TokenizerTrainer, "text_encoder": TextEncoderTrainer}


@contextmanager
def told_in_a_line() -> Iterator[None]:
    """End the program with one line and exit code 2 where settings or data are refused, which needs no traceback.

    In Python's development mode (`python -X dev`) there is one.

    Yields:
        None.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if sys.flags.dev_mode:
            raise
        name = pathlib.Path(sys.argv[0]).name
        name = "mar_hf.training" if name == "__main__.py" else name
        sys.stderr.write(f"{name}: error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from error


def run_program(
    function: Callable[[Settings], Any], arguments_class: type[Settings], argv: Sequence[str] | None = None
) -> None:
    """Do something with the settings of a command line; what is refused is told in a line.

    Args:
        function (`Callable`): takes the settings.
        arguments_class (`type`): a dataclass of settings, see `parse_arguments`.
        argv (`Sequence[str]`, *optional*): words of the command line; None takes the program's own.
    """
    with told_in_a_line():
        function(parse_arguments(arguments_class, argv))


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
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv.pop(0) if argv[:1] and not argv[0].startswith("-") else "model"
    if name == "latents":
        return run_cache(argv)
    if name not in TRAINERS:
        with told_in_a_line():
            raise ValueError(f"{name!r} is none of {', '.join([*TRAINERS, 'latents'])}")
    return run_trainer(TRAINERS[name], argv)
