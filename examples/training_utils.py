# SPDX-License-Identifier: Apache-2.0
"""What the training scripts share: settings from a file, order and randomness of examples, checkpoints, curves."""

import argparse
import csv
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import matplotlib.pyplot as plt
import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from image_data import augment
from text_data import caption_choices
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from tqdm.auto import tqdm
from transformers import HfArgumentParser


logger = get_logger(__name__)

Settings = TypeVar("Settings")
MANIFEST = "manifest.json"


def parse_arguments(cls: type[Settings], argv: Sequence[str] | None = None) -> Settings:
    """Settings from a file and the command line, which has the last word.

    Args:
        cls (`type`): a dataclass of settings.
        argv (`Sequence[str]`, *optional*): words of the command line; None takes the program's own. `--config FILE`
            names a JSON or YAML file of settings; objects in it are handed on as JSON.

    Returns:
        An instance of `cls`.

    Raises:
        ValueError: if the file can't be read as settings or holds unknown ones.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    source = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    source.add_argument("--config", metavar="FILE", help="JSON or YAML file; the command line overrides it")
    path, words = source.parse_known_args(argv)
    parser = HfArgumentParser(cls, parents=[source], allow_abbrev=False)
    if path.config is not None:
        words = [*_words_of_file(path.config, {field.name for field in dataclasses.fields(cls)}), *words]
    return parser.parse_args_into_dataclasses(words)[0]


def _words_of_file(path: str, known: set[str]) -> list[str]:
    try:
        # Every JSON file is a YAML file, but for numbers as 1e-4, which YAML 1.1 takes for strings.
        load = json.load if path.endswith(".json") else yaml.safe_load
        with open(path, encoding="utf-8") as file:
            settings = load(file)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"`config` {path!r} can't be read: {error}") from error
    if not isinstance(settings, dict) or not settings.keys() <= known:
        wrong = sorted(settings.keys() - known) if isinstance(settings, dict) else type(settings).__name__
        raise ValueError(f"`config` {path!r} holds unknown settings {wrong}; known are {sorted(known)}.")
    words = []
    for name, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(json.dumps(v) if isinstance(v, dict | bool) else str(v) for v in values)]
    return words


class TrainingBatches(Sampler):
    """An endless stream of batches, each a list of (index, position).

    All epochs, each a permutation that depends on the seed and its number only, are put end to end; *position* is a
    place in this row. Global batches are consecutive pieces of it and every process takes its piece of each: nothing
    is repeated or left out, at the end of an epoch neither, and where to go on is one number.

    Args:
        num_examples (`int`): examples of the data set.
        batch_size (`int`): examples a batch and process.
        seed (`int`): of the permutations.
        rank (`int`, *optional*, defaults to 0): this process.
        world_size (`int`, *optional*, defaults to 1): number of processes.
        start (`int`, *optional*, defaults to 0): position of the first global batch.
    """

    def __init__(
        self, num_examples: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, start: int = 0
    ):
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start
        self._permutations: dict[int, list[int]] = {}

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in count():
            first = self.start + (batch * self.world_size + self.rank) * self.batch_size
            positions = range(first, first + self.batch_size)
            yield [(self.index_at(position), position) for position in positions]

    def index_at(self, position: int) -> int:
        """The example at a position.

        Args:
            position (`int`): from 0 on.

        Returns:
            `int`: an index into the data set.
        """
        epoch, place = divmod(position, self.num_examples)
        if epoch not in self._permutations:
            generator = example_generators(self.seed, [epoch], stream=-1)[0]
            permutation = torch.randperm(self.num_examples, generator=generator).tolist()
            # Two are kept: a batch may reach over the border.
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1} | {epoch: permutation}
        return self._permutations[epoch][place]


class PositionedDataset(Dataset):
    """Rows of a data set, asked for by (index, position), with the position beside them.

    Args:
        dataset (`torch.utils.data.Dataset` or `datasets.Dataset`): rows are dictionaries.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[dict]:
        rows = self.dataset.__getitems__([index for index, _ in keys])
        return [{**row, "position": position} for row, (_, position) in zip(rows, keys, strict=True)]


def make_accelerator(**settings: Any) -> Accelerator:
    """One whose processes wait for each other for as long as it takes: one may sample or write while others wait.

    Args:
        settings (`Any`): for `Accelerator`.

    Returns:
        `Accelerator`.
    """
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))], **settings)


def example_generators(
    seed: int, positions: Sequence[int], device: torch.device | str = "cpu", stream: int = 0
) -> list[torch.Generator]:
    """A generator for each example: what is random about one depends on the seed and its position only.

    Args:
        seed (`int`): of the run.
        positions (`Sequence[int]`): places in the row of all epochs.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): of the generators.
        stream (`int`, *optional*, defaults to 0): generators of different streams are independent.

    Returns:
        `list[torch.Generator]`: one a position.
    """
    # A CPU generator takes 32 bits of its seed. Odd multipliers spread runs and streams over them.
    base = seed * 0x9E3779B1 + stream * 0x85EBCA6B
    return [torch.Generator(device).manual_seed((base + int(position)) % 2**32) for position in positions]


class Collator:
    """Rows to a batch, augmented; picklable, so that it runs where examples are read.

    Of the captions of a row (`text`, or the states of a text encoder as `prompt_embeds`) one is drawn.

    Args:
        seed (`int`): of the run.
        random_flip (`bool`): mirror half of the pictures.
        random_shift (`int`): shift pictures by up to so many pixels.
        templates (`Sequence[str]`, *optional*, defaults to `("{}",)`): what captions are put into.
        class_names (`list[str]`, *optional*): for templates that name the class.
    """

    def __init__(
        self,
        seed: int,
        random_flip: bool,
        random_shift: int,
        templates: Sequence[str] = ("{}",),
        class_names: list[str] | None = None,
    ):
        self.seed = seed
        self.random_flip = random_flip
        self.random_shift = random_shift
        self.templates = templates
        self.class_names = class_names

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        ragged = [{name: row.pop(name) for name in ("text", "prompt_embeds") if name in row} for row in rows]
        for choices, row in zip(ragged, rows, strict=True):
            if "text" in choices:
                label = self.class_names[row["label"]] if self.class_names else ""
                choices["text"] = caption_choices(choices["text"], self.templates, label)
        batch = default_collate(rows)
        batch |= self.draw_captions(ragged, batch["position"])
        generators = example_generators(self.seed, batch["position"], stream=1)
        if "pixel_values" in batch:
            return {
                **batch,
                "pixel_values": augment(batch["pixel_values"], generators, self.random_flip, self.random_shift),
            }
        mirrored = {name: batch.pop(f"{name}_flipped", None) for name in ("mean", "std")}
        if self.random_flip:
            chosen = torch.stack([torch.rand((), generator=g) for g in generators]) < 0.5
            chosen = chosen[:, None, None, None]
            batch |= {name: torch.where(chosen, value, batch[name]) for name, value in mirrored.items()}
        return batch

    def draw_captions(self, rows: list[dict], positions: torch.Tensor) -> dict[str, Any]:
        """One caption of each row, by the row's own generator.

        Args:
            rows (`list[dict]`): lists of choices, as `text` or `prompt_embeds`; or empty ones.
            positions (`torch.Tensor` of shape `(batch,)`): of the rows.

        Returns:
            `dict`: `text`, a list; `prompt_embeds` of shape `(batch, length, text_dim)` with a `prompt_attention_mask`
            of shape `(batch, length)`; or nothing.
        """
        chosen = {}
        generators = example_generators(self.seed, positions, stream=-2)
        for name in rows[0]:
            draws = [torch.randint(len(row[name]), (), generator=g) for row, g in zip(rows, generators, strict=True)]
            chosen[name] = [row[name][number] for row, number in zip(rows, draws, strict=True)]
        if "prompt_embeds" in chosen:
            lengths = torch.tensor([len(states) for states in chosen["prompt_embeds"]])
            chosen["prompt_embeds"] = pad_sequence(chosen["prompt_embeds"], batch_first=True)
            chosen["prompt_attention_mask"] = torch.arange(int(lengths.max())) < lengths[:, None]
        return chosen


class Progress:
    """How far a run is: what a checkpoint holds besides the states of models and optimizers.

    Args:
        num_examples (`int`): of the data set; a checkpoint of another number is refused.
        seed (`int`): of the run; likewise.
    """

    def __init__(self, num_examples: int, seed: int):
        self.num_examples = num_examples
        self.seed = seed
        self.step = 0
        self.position = 0
        self.history: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, str]:
        """Everything, for `torch.save`: as JSON, since pickles of equal objects can differ."""
        return {"json": json.dumps(vars(self))}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Take over what `state_dict` gave.

        Args:
            state (`dict[str, str]`): of another object.

        Raises:
            ValueError: if the data set had another number of examples, or the run another seed: the order of the
                examples would be another one.
        """
        state = json.loads(state["json"])
        if state["num_examples"] != self.num_examples:
            raise ValueError(
                f"The checkpoint was trained on {state['num_examples']} examples, the data now has "
                f"{self.num_examples}. Fine-tune its pipeline instead: `pretrained_model_name_or_path`."
            )
        if state["seed"] != self.seed:
            raise ValueError(f"The checkpoint was trained with `seed` {state['seed']}, got {self.seed}.")
        vars(self).update(state)


def digests(folder: pathlib.Path) -> dict[str, str]:
    """Digest of every file below a folder, by its relative path; the manifest itself is left out.

    Args:
        folder (`pathlib.Path`): an existing folder.

    Returns:
        `dict[str, str]`: BLAKE2b in hexadecimal.
    """
    result = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name == MANIFEST:
            continue
        digest = hashlib.blake2b()
        with open(path, "rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
        result[name] = digest.hexdigest()
    return result


def list_checkpoints(output_dir: str | os.PathLike) -> list[pathlib.Path]:
    """The `checkpoint-<step>` folders of a run.

    Args:
        output_dir (`str` or `os.PathLike`): of the run; need not exist.

    Returns:
        `list[pathlib.Path]`: the oldest first.
    """
    folders = [path for path in pathlib.Path(output_dir).glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(folders, key=lambda path: int(path.name[11:]))


def check_checkpoint(folder: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint.

    Args:
        folder (`pathlib.Path`): a `checkpoint-<step>`.

    Returns:
        `str`, *optional*: None where every file is as it was written.
    """
    try:
        written = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} can't be read ({error})"
    found = digests(folder)
    wrong = sorted(name for name in written.keys() | found.keys() if written.get(name) != found.get(name))
    return f"{', '.join(wrong)} missing, added or changed" if wrong else None


def save_checkpoint(accelerator: Accelerator, output_dir: str | os.PathLike, step: int, total_limit: int) -> None:
    """Write everything that `accelerator` knows as `checkpoint-<step>`, whole or not at all; every process calls this.

    Args:
        accelerator (`Accelerator`): with all models, optimizers and registered objects.
        output_dir (`str` or `os.PathLike`): of the run.
        step (`int`): optimizer steps so far.
        total_limit (`int`): the newest so many stay.

    Raises:
        RuntimeError: if it can't be written, a full disk say; earlier checkpoints are left alone.
    """
    folder = pathlib.Path(output_dir, f"checkpoint-{step}")
    # What is not whole, not yet or not any more, has this name.
    partial = folder.with_name("checkpoint.partial")
    accelerator.wait_for_everyone()
    try:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (partial / MANIFEST).write_text(json.dumps(digests(partial), indent=2), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            for old in list_checkpoints(output_dir)[:-total_limit]:
                shutil.rmtree(old.rename(partial))
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        last = [str(path) for path in list_checkpoints(output_dir)][-1:] or "none"
        raise RuntimeError(
            f"{folder} could not be written ({error}). The last whole checkpoint: {last[0]}."
        ) from error
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, output_dir: str | os.PathLike, name: str) -> pathlib.Path | None:
    """Load the newest whole checkpoint of a run, or a given one; every process calls this.

    Newer ones would be taken for those of the run that goes on: damaged ones are removed, whole ones renamed.

    Args:
        accelerator (`Accelerator`): with the same objects as when it was saved.
        output_dir (`str` or `os.PathLike`): of the run.
        name (`str`): `"latest"`, or the name of a checkpoint in `output_dir`; its path will do too.

    Returns:
        `pathlib.Path`, *optional*: what was loaded; None where `"latest"` finds no checkpoint at all.

    Raises:
        ValueError: if the named checkpoint is not there or damaged, or all of them are damaged.
    """
    choice = [None, None]
    if accelerator.is_main_process:
        choice = list(_choose_checkpoint(output_dir, name))
    chosen, problem = broadcast_object_list(choice)
    if problem is not None:
        raise ValueError(problem)
    if chosen is None:
        return None
    accelerator.load_state(chosen)
    # Nothing is half accumulated, also where another number is accumulated now.
    accelerator.step -= accelerator.step % accelerator.gradient_accumulation_steps
    if accelerator.is_main_process:
        folders = list_checkpoints(output_dir)
        # The run leaves newer ones behind; with their names they would be taken for its newest.
        for newer in folders[folders.index(pathlib.Path(chosen)) + 1 :] if pathlib.Path(chosen) in folders else []:
            if name == "latest":  # they are damaged
                partial = newer.with_name("checkpoint.partial")
                shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while it saved
                shutil.rmtree(newer.rename(partial))
                continue
            aside = newer.with_name(f"old-{newer.name}")
            shutil.rmtree(aside, ignore_errors=True)
            logger.warning(f"{newer} is newer than where the run goes on from; it is now {newer.rename(aside)}.")
    accelerator.wait_for_everyone()
    return pathlib.Path(chosen)


def _choose_checkpoint(output_dir: str | os.PathLike, name: str) -> tuple[str | None, str | None]:
    """(folder, None), (None, what is wrong) or (None, None): nothing there yet."""
    if name != "latest":
        folder = pathlib.Path(output_dir, name)
        if pathlib.Path(name).resolve().parent == pathlib.Path(output_dir).resolve():
            folder = pathlib.Path(output_dir, pathlib.Path(name).name)
        problem = check_checkpoint(folder)
        return (None, f"Checkpoint {folder} can't be used: {problem}.") if problem else (str(folder), None)
    folders = list_checkpoints(output_dir)[::-1]
    for folder in folders:
        problem = check_checkpoint(folder)
        if problem is None:
            return str(folder), None
        logger.warning(f"Checkpoint {folder} is damaged: {problem}. Falling back to the one before.")
    return (
        None,
        f"All checkpoints of {output_dir} are damaged: {[path.name for path in folders]}." if folders else None,
    )


def check_output_dir(args: Any) -> None:
    """Refuse to start anew among the checkpoints of another run.

    Args:
        args (`Any`): settings with `output_dir` and `resume_from_checkpoint`.

    Raises:
        ValueError: if there are any.
    """
    if list_checkpoints(args.output_dir) and args.resume_from_checkpoint is None:
        raise ValueError(
            f"`output_dir` {args.output_dir!r} holds checkpoints: go on with `--resume_from_checkpoint latest`, "
            "or take another folder."
        )


def check_finite(name: str, losses: torch.Tensor, trainer: Any) -> None:
    """Stop where a loss of the last steps is not finite.

    Args:
        name (`str`): of what is checked, for the message.
        losses (`torch.Tensor` of shape `(steps,)`): of the last steps, means of all processes.
        trainer (`Any`): see `training_loop`.

    Raises:
        FloatingPointError: naming the step, its examples and the last checkpoint.
    """
    finite = losses.isfinite().tolist()
    if all(finite):
        return
    args, progress = trainer.args, trainer.progress
    step = progress.step - len(finite) + finite.index(False) + 1
    size = args.train_batch_size * trainer.accelerator.num_processes * args.gradient_accumulation_steps
    order = TrainingBatches(progress.num_examples, 1, args.seed)
    last = progress.position - (progress.step - step) * size
    examples = [order.index_at(position) for position in range(last - size, last)]
    checkpoint = next(reversed(list_checkpoints(args.output_dir)), "none")
    raise FloatingPointError(
        f"{name} is {losses[finite.index(False)].item()} at step {step}. Its examples: {examples}. Last good "
        f"checkpoint: {checkpoint}. Try a lower learning rate, or bf16 instead of fp16."
    )


def make_batches(trainer: Any) -> DataLoader:
    """A process' batches from the run's position on.

    Args:
        trainer (`Any`): see `training_loop`.

    Returns:
        `DataLoader`: without an end.
    """
    args, accelerator = trainer.args, trainer.accelerator
    rank, world_size = accelerator.process_index, accelerator.num_processes
    size, start = len(trainer.dataset), trainer.progress.position
    return DataLoader(
        PositionedDataset(trainer.dataset),
        batch_sampler=TrainingBatches(size, args.train_batch_size, args.seed, rank, world_size, start),
        collate_fn=trainer.collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        # Its own: an iterator over batches takes a number from the global state, which dropout draws from.
        generator=torch.Generator(),
    )


def resume(trainer: Any) -> None:
    """Load the checkpoint that the settings name, if any; every process calls this.

    Args:
        trainer (`Any`): see `training_loop`.
    """
    args, accelerator = trainer.args, trainer.accelerator
    if args.resume_from_checkpoint is not None:
        loaded = load_checkpoint(accelerator, args.output_dir, args.resume_from_checkpoint)
        logger.warning(f"Going on from {loaded}." if loaded else "No checkpoint yet: starting from the beginning.")
    trainer.ema.to(accelerator.device)


def training_loop(trainer: Any) -> None:
    """Step until `max_train_steps`, noting losses, validating and saving checkpoints when the settings say so.

    Args:
        trainer (`Any`): has `args`, `accelerator`, `dataset`, `collate`, `ema` and `progress`; `step(batches)`,
            `flush(steps)`, which notes what the last steps returned and gives a row of numbers, and `validate()`.
    """
    args, accelerator, progress = trainer.args, trainer.accelerator, trainer.progress
    steps, batches = [], iter(make_batches(trainer))
    bar = tqdm(initial=progress.step, total=args.max_train_steps, disable=not accelerator.is_main_process)
    while progress.step < args.max_train_steps:
        steps.append(trainer.step([next(batches) for _ in range(args.gradient_accumulation_steps)]))
        bar.update()
        last = progress.step == args.max_train_steps
        save = last or progress.step % args.checkpointing_steps == 0
        validate = last or progress.step % args.validation_steps == 0
        if save or validate or progress.step % args.logging_steps == 0:
            row = trainer.flush(steps)
            steps.clear()
            bar.set_postfix({name: f"{value:.4g}" for name, value in row.items() if name != "step"})
        if validate:
            trainer.validate()
        if save:
            save_checkpoint(accelerator, args.output_dir, progress.step, args.checkpoints_total_limit)
    bar.close()


def write_curves(history: list[dict[str, float]], output_dir: str | os.PathLike) -> None:
    """Write `loss.csv` and `loss.png`.

    Args:
        history (`list[dict[str, float]]`): rows with `step` and numbers; those whose names end in `loss` are drawn.
        output_dir (`str` or `os.PathLike`): an existing folder.
    """
    folder = pathlib.Path(output_dir)
    names = list(dict.fromkeys(name for row in history for name in row))
    with open(folder / "loss.csv.partial", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(history)
    os.replace(folder / "loss.csv.partial", folder / "loss.csv")
    figure, axes = plt.subplots(figsize=(7, 4))
    for name in (name for name in names if name.endswith("loss")):
        rows = [row for row in history if name in row]
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120, bbox_inches="tight")
    plt.close(figure)
