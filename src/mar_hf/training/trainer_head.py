# SPDX-License-Identifier: Apache-2.0
"""A head of few calls for a trained model: it learns what the model's own head draws."""

import pathlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset, default_collate
from tqdm.auto import tqdm

from ..heads import TokenHead
from ..pipelines import MARPipeline
from ..utils import atomic_file
from .batches import PositionedDataset, example_generators
from .resuming import remembered_settings
from .run_checkpoints import Progress
from .trainer import Trainer


DRAWN_FILE = "drawn.safetensors"
STREAM = 5  # of the generators, see `example_generators`


@contextmanager
def noted_draws(head: TokenHead, guides_condition: bool) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Note what a head is asked for while a pipeline draws, with its answers.

    Args:
        head ([`TokenHead`]): of the pipeline.
        guides_condition (`bool`): note guided answers with the guided condition, `uncond + s * (cond - uncond)`; else
            answers without guidance, to the condition and to the one without class or text.

    Yields:
        `list`: for each step the conditions, (batch, rows, condition_dim), and the tokens, (batch, rows, token_dim).
    """
    notes, draw = [], head.draw

    def noting(condition: torch.Tensor, negative_condition: torch.Tensor | None, **settings: Any) -> torch.Tensor:
        scale = settings["guidance_scale"]
        guided = scale != 1.0
        tokens = draw(condition=condition, negative_condition=negative_condition, **settings)
        if guided and guides_condition:
            notes.append((torch.lerp(negative_condition, condition, scale), tokens))
        elif guided:
            both = torch.cat([condition, negative_condition], 1)
            settings |= {"guidance_scale": 1.0, "noise": None}
            notes.append((both, draw(condition=both, negative_condition=None, **settings)))
        else:
            notes.append((condition, tokens))
        return tokens

    head.draw = noting
    try:
        yield notes
    finally:
        del head.draw


class DrawnPictures(Dataset):
    """Conditions and tokens of pictures that a pipeline has drawn.

    Args:
        drawn (`dict[str, torch.Tensor]`): `condition`, (pictures, rows, condition_dim), and `target`, (pictures, rows,
            token_dim).
    """

    def __init__(self, drawn: dict[str, torch.Tensor]):
        self.drawn = drawn

    def __len__(self) -> int:
        return len(self.drawn["target"])

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        return [{name: values[index] for name, values in self.drawn.items()} for index in indices]


class HeadTrainer(Trainer):
    """Distils the head of a pipeline into another one, which may need one call where the former needs a hundred.

    The pipeline draws `distill_images` pictures once, with its saved defaults, of the classes and texts of the data;
    the new head, on the same backbone, learns by its own loss to answer the conditions of these pictures as the
    pipeline's head did. Heads that guide conditions learn guided answers; the others learn both branches. The
    temperature of the pipeline is learned with them.

    Results and resuming are those of [`Trainer`]; `drawn.safetensors` in `output_dir` keeps what was drawn.

    Args:
        args (`TrainingArguments`): settings, with `distill_head` and a `head_type` in `model_config`.

    Raises:
        ValueError: if settings, data and models do not fit each other, or `output_dir` holds another run.
    """

    distils = True

    def start_progress(self, data: dict[str, Any]) -> Progress:
        return Progress(self.args.distill_images, self.args.seed, remembered_settings(self.args), data)

    def build_model(self) -> torch.nn.Module:
        model = super().build_model()
        model.model.requires_grad_(False)
        return model

    def start(self) -> None:
        super().start()
        path = pathlib.Path(self.args.output_dir, DRAWN_FILE)
        if self.accelerator.is_main_process and not path.exists():
            drawn = self.draw_pictures()
            with atomic_file(path) as target:
                save_file(drawn, target)
        self.accelerator.wait_for_everyone()
        self.drawn = DrawnPictures(load_file(path))
        if len(self.drawn) != (wanted := self.args.distill_images):
            raise ValueError(f"`distill_images` has to be {len(self.drawn)}, as {path} holds, got {wanted}.")

    @torch.no_grad()
    def draw_pictures(self) -> dict[str, torch.Tensor]:
        """Let the pipeline draw.

        Returns:
            `dict[str, torch.Tensor]`: of [`DrawnPictures`], on the CPU, float32.
        """
        args, device, dataset = self.args, self.accelerator.device, PositionedDataset(self.dataset)
        pipe = MARPipeline.from_pretrained(args.pretrained_model_name_or_path, dtype=torch.float32).to(device)
        pipe.set_progress_bar_config(disable=True)
        parts, size = [], args.train_batch_size
        for first in tqdm(range(0, args.distill_images, size), desc="Drawing"):
            positions = range(first, min(first + size, args.distill_images))
            batch = self.collate(dataset.__getitems__([(number % len(dataset), number) for number in positions]))
            with noted_draws(pipe.transformer.head, self.bare_model.head.guides_condition) as notes:
                pipe(
                    # By name: the pipeline may number its classes otherwise.
                    class_labels=[self.names[label] for label in batch["label"]] if self.names else None,
                    num_images_per_prompt=1 if self.names or self.config.text_dim is not None else len(positions),
                    **self.text_inputs(batch, device),
                    generator=example_generators(args.seed, positions, stream=STREAM),
                    output_type="latent",
                )
            parts.append([torch.cat(values, 1).cpu() for values in zip(*notes, strict=True)])
        return dict(zip(("condition", "target"), map(torch.cat, zip(*parts, strict=True)), strict=True))

    def examples(self) -> tuple[Dataset, Callable[[list[dict]], dict[str, Any]]]:
        return self.drawn, default_collate

    def loss(self, batch: dict[str, torch.Tensor], batch_number: int) -> torch.Tensor:
        device = self.accelerator.device
        target = batch["target"].to(device)
        return self.model(
            target,
            torch.ones(target.shape[:2], dtype=torch.bool, device=device),
            condition=batch["condition"].to(device),
            noise_scheduler=self.noise_scheduler,
            generator=example_generators(self.args.seed, batch["position"], device),
        ).loss
