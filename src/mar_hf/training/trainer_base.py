# SPDX-License-Identifier: Apache-2.0
"""What every training has: processes, the order of examples, the loop, exact resume, checkpoints and curves."""

import pathlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from accelerate.logging import get_logger
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .accelerator import make_accelerator
from .arguments import BaseTrainingArguments
from .batches import PositionedDataset, TrainingBatches
from .resuming import remembered_settings
from .run_checkpoints import Progress, list_checkpoints, load_checkpoint, remove_left_overs, save_checkpoint


logger = get_logger(__name__)


class BaseTrainer(ABC):
    """A run. A subclass makes its parts in `__init__` and says what a step and a result are.

    It sets `dataset`, `collate`, `progress` and, where it averages weights, `ema`; what is to go on after a resume is
    prepared with, or registered at, `accelerator`. `step` moves `progress` on with `advance`.

    Args:
        args (`BaseTrainingArguments`): settings.

    Raises:
        ValueError: if there is no data, or `output_dir` holds another run.
    """

    arguments_class: ClassVar[type[BaseTrainingArguments]]

    dataset: Dataset
    collate: Callable[[list[dict]], dict[str, Any]]
    progress: Progress
    ema: EMAModel | None = None
    summary: str = ""  # what there is to say of the result, once there is one

    def __init__(self, args: BaseTrainingArguments):
        if not isinstance(args, self.arguments_class):
            raise ValueError(f"`args` has to be {self.arguments_class.__name__}, got {type(args).__name__}.")
        self.args = args
        self.accelerator = make_accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            **self.accelerator_settings(),
        )
        self.accelerator.register_load_state_pre_hook(self.check_checkpoint)
        self.registered: list[Any] = []
        self.schedules: list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]] = []
        if args.train_data_dir is None:
            raise ValueError("`train_data_dir` has to be given.")
        self.check_output_dir()

    def accelerator_settings(self) -> dict[str, Any]:
        """What the accelerator is told besides precision and accumulation.

        Returns:
            `dict[str, Any]`: arguments of `accelerate.Accelerator`.
        """
        return {}

    def register(self, *parts: Any) -> None:
        """Make parts that are not prepared a part of checkpoints.

        Args:
            parts (`Any`): with `state_dict` and `load_state_dict`, in the order in which files are numbered.
        """
        self.registered += parts
        self.accelerator.register_for_checkpointing(*parts)

    def start_progress(self, data: dict[str, Any]) -> Progress:
        """How far the run is: nowhere yet.

        Args:
            data (`dict[str, Any]`): fingerprints of the data, by name.

        Returns:
            `Progress`: to be registered.
        """
        return Progress(len(self.dataset), self.args.seed, remembered_settings(self.args), data)

    def check_output_dir(self) -> None:
        """Refuse to start anew among the checkpoints of another run.

        Raises:
            ValueError: if there are any.
        """
        if list_checkpoints(self.args.output_dir) and self.args.resume_from_checkpoint is None:
            raise ValueError(
                f"`output_dir` {self.args.output_dir!r} holds checkpoints: go on with `--resume_from_checkpoint "
                "latest`, or take another folder."
            )

    @abstractmethod
    def step(self, batches: Sequence[dict[str, Any]]) -> Any:
        """One optimizer step, without waiting for the device.

        Args:
            batches (`Sequence[dict]`): as many as are accumulated, collated.

        Returns:
            `Any`: what `flush` takes a list of.
        """

    @abstractmethod
    def flush(self, steps: list[Any]) -> dict[str, float]:
        """Note the mean losses of the last steps, which waits for the device.

        Args:
            steps (`list`): what `step` returned.

        Returns:
            `dict[str, float]`: the row of `loss.csv`.

        Raises:
            FloatingPointError: if a loss is not finite.
        """

    def validate(self) -> None:
        """Measure and show how far the run is, every `validation_steps`; every process calls this."""

    def start(self) -> None:
        """Prepare what is only needed once the run is known to go: folders, trackers; every process calls this."""
        pathlib.Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        if self.accelerator.is_main_process:
            remove_left_overs(self.args.output_dir)
        self.accelerator.wait_for_everyone()

    def save(self) -> None:
        """Write the result and set `summary`, after the last step; the main process calls this."""

    def train(self) -> None:
        """The whole run: go on where a checkpoint is asked for, step until `max_train_steps`, save the result."""
        self.resume()
        self.start()
        self.training_loop()
        if self.accelerator.is_main_process:
            self.save()
        self.accelerator.end_training()

    def resume(self) -> None:
        """Load the checkpoint that the settings name, if any; every process calls this."""
        args, accelerator = self.args, self.accelerator
        if args.resume_from_checkpoint is not None:
            chosen = self.chosen_hyperparameters()
            loaded = load_checkpoint(accelerator, args.output_dir, args.resume_from_checkpoint)
            logger.warning(f"Going on from {loaded}." if loaded else "No checkpoint yet: starting from the beginning.")
            if loaded:
                self.set_hyperparameters(chosen)
        if self.ema is not None:
            self.ema.to(accelerator.device)

    def check_checkpoint(self, models: list[torch.nn.Module], folder: str) -> None:
        """Before anything of a checkpoint is loaded: refuse one of other data or another model; say what changes.

        Args:
            models (`list[torch.nn.Module]`): unused; accelerate gives it.
            folder (`str`): the checkpoint.

        Raises:
            ValueError: naming what is another one.
        """
        path = pathlib.Path(folder, f"custom_checkpoint_{self.registered.index(self.progress)}.pkl")
        changed = self.progress.changed_settings(torch.load(path, map_location="cpu", weights_only=True))
        if changed:
            said = ", ".join(f"`{name}` {new!r} instead of {old!r}" for name, (old, new) in changed.items())
            logger.warning(f"Settings that are others from here on: {said}.")

    def chosen_hyperparameters(self) -> list[list[dict[str, Any]]]:
        """What the settings say about each parameter group of each optimizer.

        Returns:
            `list[list[dict[str, Any]]]`: `initial_lr`, `betas` and `weight_decay`.
        """
        names = ("initial_lr", "betas", "weight_decay")
        return [[{name: group[name] for name in names} for group in one.param_groups] for one, _ in self.schedules]

    def set_hyperparameters(self, chosen: list[list[dict[str, Any]]]) -> None:
        """Put the settings in the place of what a checkpoint says; a checkpoint of the same settings stays as it is.

        Args:
            chosen (`list[list[dict[str, Any]]]`): see `chosen_hyperparameters`.
        """
        for (optimizer, scheduler), groups in zip(self.schedules, chosen, strict=True):
            scheduler.base_lrs = [group["initial_lr"] for group in groups]
            factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
            for group, new, factor in zip(optimizer.param_groups, groups, factors, strict=True):
                group.update(new, lr=new["initial_lr"] * factor)
            scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
        if self.ema is not None:
            self.ema.decay = self.args.ema_decay

    def examples(self) -> tuple[Dataset, Callable[[list[dict]], dict[str, Any]]]:
        """What is stepped through.

        Returns:
            `torch.utils.data.Dataset`, and what makes a batch of its rows.
        """
        return self.dataset, self.collate

    def make_batches(self) -> DataLoader:
        """A process' batches from the run's position on.

        Returns:
            `DataLoader`: without an end.
        """
        args, accelerator = self.args, self.accelerator
        rank, world_size = accelerator.process_index, accelerator.num_processes
        dataset, collate = self.examples()
        size, start = self.progress.num_examples, self.progress.position
        return DataLoader(
            PositionedDataset(dataset),
            batch_sampler=TrainingBatches(size, args.train_batch_size, args.seed, rank, world_size, start),
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=accelerator.device.type == "cuda",
            # Its own: an iterator over batches takes a number from the global state, which dropout draws from.
            generator=torch.Generator(),
        )

    def training_loop(self) -> None:
        """Step until `max_train_steps`, noting losses, validating and saving checkpoints when the settings say so."""
        args, accelerator, progress = self.args, self.accelerator, self.progress
        validation_steps = getattr(args, "validation_steps", args.max_train_steps)
        steps, batches = [], iter(self.make_batches())
        bar = tqdm(initial=progress.step, total=args.max_train_steps, disable=not accelerator.is_main_process)
        while progress.step < args.max_train_steps:
            steps.append(self.step([next(batches) for _ in range(args.gradient_accumulation_steps)]))
            bar.update()
            last = progress.step == args.max_train_steps
            save = args.checkpointing_steps is not None and (last or progress.step % args.checkpointing_steps == 0)
            validate = last or progress.step % validation_steps == 0
            if save or validate or progress.step % args.logging_steps == 0:
                row = self.flush(steps)
                steps.clear()
                bar.set_postfix({name: f"{value:.4g}" for name, value in row.items() if name != "step"})
            if validate:
                self.validate()
            if save:
                save_checkpoint(accelerator, args.output_dir, progress.step, args.checkpoints_total_limit)
        bar.close()

    def advance(self, num_batches: int) -> None:
        """Note that a step is done.

        Args:
            num_batches (`int`): of each process.
        """
        self.progress.step += 1
        self.progress.position += self.args.train_batch_size * self.accelerator.num_processes * num_batches

    def cosine_schedule(
        self, optimizer: torch.optim.Optimizer, start: int = 0
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """A warm-up and a cosine to the end of the run, registered for checkpoints.

        Args:
            optimizer (`torch.optim.Optimizer`): as it was made: accelerate's wrapper of a scheduler takes a step for
                every process, so neither is prepared.
            start (`int`, *optional*, defaults to 0): step from which the optimizer is used.

        Returns:
            `torch.optim.lr_scheduler.LRScheduler`.
        """
        scheduler = get_scheduler(
            "cosine",
            optimizer,
            num_warmup_steps=self.args.lr_warmup_steps,
            num_training_steps=self.args.max_train_steps - start,
        )
        self.register(scheduler)
        self.schedules.append((optimizer, scheduler))
        return scheduler

    def finite_loss(self, loss: torch.Tensor, norm: torch.Tensor | float) -> torch.Tensor:
        """The loss, or the norm of its gradient where that is not finite.

        Args:
            loss (`torch.Tensor` of shape `()`): of a batch.
            norm (`torch.Tensor` or `float`): of the gradient.

        Returns:
            `torch.Tensor` of shape `()`: such a gradient spoils the weights as surely as such a loss; a scaler of
                gradients leaves the step out.
        """
        norm = torch.as_tensor(norm, device=loss.device)
        return loss if self.accelerator.scaler is not None else torch.where(norm.isfinite(), loss, norm)

    def check_finite(self, name: str, losses: torch.Tensor) -> None:
        """Stop where a loss of the last steps is not finite.

        Args:
            name (`str`): of what is checked, for the message.
            losses (`torch.Tensor` of shape `(steps,)`): of the last steps, means of all processes.

        Raises:
            FloatingPointError: naming the step, its examples and the last checkpoint.
        """
        finite = losses.isfinite().tolist()
        if all(finite):
            return
        args, progress = self.args, self.progress
        step = progress.step - len(finite) + finite.index(False) + 1
        size = args.train_batch_size * self.accelerator.num_processes * args.gradient_accumulation_steps
        order = TrainingBatches(progress.num_examples, 1, args.seed)
        last = progress.position - (progress.step - step) * size
        examples = [order.index_at(position) for position in range(last - size, last)]
        checkpoint = next(reversed(list_checkpoints(args.output_dir)), "none")
        raise FloatingPointError(
            f"{name} is {losses[finite.index(False)].item()} at step {step}. Its examples: {examples}. Last good "
            f"checkpoint: {checkpoint}. Try a lower learning rate, or bf16 instead of fp16."
        )
