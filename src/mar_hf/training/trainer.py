# SPDX-License-Identifier: Apache-2.0
"""The training of models of classes and texts."""

import json
import pathlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate.utils import DistributedType, ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import HfApi
from PIL import Image
from transformers import PreTrainedModel

from ..hub import build_model_card
from ..models import load_text_encoder
from ..pipelines import MARPipeline
from ..utils import atomic_folder, import_extra
from .arguments import TrainingArguments
from .batches import Collator, PositionedDataset, example_generators
from .cards import describe_training
from .curves import write_curves, write_samples
from .model_inputs import draw_inputs, encode, text_inputs
from .model_setup import (
    add_lora,
    build_generation_defaults,
    build_model,
    build_noise_scheduler,
    check_model_config,
    check_text_lengths,
    find_text_dim,
    least_label,
    load_data,
    load_tokenizer,
    parameter_groups,
    text_encoder_source,
)
from .resuming import fingerprint_latents, fingerprint_pictures, fingerprint_tokenizer, fingerprint_weights
from .samples import sample_classes, sample_texts
from .trainer_base import BaseTrainer


# What a tracker needs to be told of a picture (1, H, W, 3).
IMAGE_FORMAT = {"tensorboard": {"dataformats": "NHWC"}}


class Trainer(BaseTrainer):
    """The training, or fine-tuning, of a model of classes or texts on a folder of pictures or on cached latents.

    The recipe is that of arXiv:2406.11838, appendix B. While it runs, `output_dir` holds

    - `pipeline/`: the averaged weights, tokenizer, scheduler and card: `MARPipeline.from_pretrained` loads it at any
      time;
    - `samples/`: a grid of pictures every `validation_steps`, a row for each class;
    - `loss.csv`, `loss.png`, and the logs of the trackers;
    - `checkpoint-<step>/`: everything to go on exactly where the run was killed, with `resume_from_checkpoint`.

    What is random about an example depends on the seed and its place in the row of all epochs only, so a run does not
    depend on the number of processes (but for dropout, which draws from every process' own state).

    Args:
        args (`TrainingArguments`): settings.

    Raises:
        ValueError: if settings, data and models do not fit each other, or `output_dir` holds another run.

    Example:
        >>> Trainer(TrainingArguments(train_data_dir="data/digits", output_dir="out", resolution=8)).train()
        >>> pipe = MARPipeline.from_pretrained("out/pipeline")
    """

    arguments_class = TrainingArguments
    args: TrainingArguments
    distils: ClassVar[bool] = False  # whether it is the one for `distill_head`

    def __init__(self, args: TrainingArguments):
        super().__init__(args)
        if args.distill_head != self.distils:
            raise ValueError(f"`distill_head` has to be {self.distils} for {type(self).__name__}.")
        check_model_config(args)
        if args.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        set_seed(args.seed)
        self.load_data()
        model = self.build_model()
        self.noise_scheduler = build_noise_scheduler(args, self.bare_model.head)
        self.prepare(model)
        # Dropout draws from the global state; processes need not drop the same.
        set_seed(args.seed, device_specific=True)

    def accelerator_settings(self) -> dict[str, Any]:
        args = self.args
        trackers = None if args.report_to == "none" else args.report_to.split(",")
        for name in {"tensorboard"}.intersection(trackers or []):
            import_extra(name, "train")
        return {
            "log_with": trackers,
            "project_config": ProjectConfiguration(project_dir=args.output_dir, logging_dir=f"{args.output_dir}/logs"),
        }

    def load_data(self) -> None:
        """Read the examples, those of the validation, and what encodes them."""
        args, accelerator = self.args, self.accelerator
        source = text_encoder_source(args)
        self.text_encoder, self.text_tokenizer = (None, None) if source is None else load_text_encoder(source)
        self.dataset, self.names = load_data(args, args.train_data_dir, captions=source is not None)
        self.validation_dataset = self.dataset
        if args.validation_data_dir is not None:
            self.validation_dataset, names = load_data(args, args.validation_data_dir, captions=source is not None)
            if names != self.names:
                raise ValueError(f"`validation_data_dir` has the classes {names}, not {self.names}.")
            if hasattr(self.validation_dataset, "with_transform") != hasattr(self.dataset, "with_transform"):
                raise ValueError("`validation_data_dir` has to hold what `train_data_dir` does: pictures or latents.")
        self.collate = Collator(args.seed, args.random_flip, args.random_shift, args.caption_templates, self.names)
        global_batch = args.train_batch_size * accelerator.num_processes
        if len(self.dataset) < global_batch:
            raise ValueError(f"{len(self.dataset)} examples are fewer than a batch of all processes: {global_batch}.")
        self.from_latents = not hasattr(self.dataset, "with_transform")
        self.tokenizer = load_tokenizer(args, self.dataset, weights=not self.from_latents)
        if not self.from_latents:
            self.tokenizer.to(accelerator.device)
        self.progress = self.start_progress(self.fingerprints())

    def fingerprints(self) -> dict[str, Any]:
        """What tells the data from other data.

        Returns:
            `dict[str, Any]`: digests, by what they are of.
        """
        found = {"image tokenizer": fingerprint_tokenizer(self.tokenizer)}
        if self.from_latents:
            found |= fingerprint_latents(self.dataset)
        else:
            found |= fingerprint_pictures(self.dataset, self.args.train_data_dir)
        return found if self.text_encoder is None else found | {"text encoder": fingerprint_weights(self.text_encoder)}

    def build_model(self) -> torch.nn.Module:
        """The model as it is trained, and what is known of it.

        Returns:
            `torch.nn.Module`: on the CPU.
        """
        args = self.args
        if self.text_encoder is not None and not self.from_latents:
            self.text_encoder.to(self.accelerator.device)
        text_dim = find_text_dim(self.text_encoder, self.dataset, self.validation_dataset)
        model = build_model(args, self.tokenizer, self.names, text_dim)
        self.model_class, self.config, self.bare_model = type(model), model.config, model
        if self.from_latents and text_dim is not None:
            for dataset in (self.dataset, self.validation_dataset):
                check_text_lengths(dataset, model.config.num_text_tokens)
        needs_weights = self.from_latents and model.head.uses_codebook
        tokenizer = load_tokenizer(args, self.dataset, weights=True) if needs_weights else self.tokenizer
        model.head.set_tokenizer(tokenizer)
        self.generation_defaults = build_generation_defaults(args, model, self.names)
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        model = add_lora(args, model)
        self.num_params = sum(p.numel() for p in model.parameters())
        return model

    def prepare(self, model: torch.nn.Module) -> None:
        """Make the model, its optimizer, its schedule and its average ready for all processes and for checkpoints.

        Args:
            model (`torch.nn.Module`): on the CPU.

        Raises:
            ValueError: if the run is to be resumed under FSDP.
        """
        args, accelerator = self.args, self.accelerator
        learning_rate = args.learning_rate
        if args.scale_lr:
            learning_rate *= args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps / 256
        optimizer = torch.optim.AdamW(
            parameter_groups(model, args.adam_weight_decay),
            lr=learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            fused=accelerator.device.type in ("cpu", "cuda"),
        )
        if accelerator.state.deepspeed_plugin is not None:
            # It asks the loader, which is not prepared, and clips by its own setting.
            settings = accelerator.state.deepspeed_plugin.deepspeed_config
            settings["train_micro_batch_size_per_gpu"] = args.train_batch_size
            settings["gradient_clipping"] = args.max_grad_norm
        if accelerator.distributed_type == DistributedType.FSDP and args.resume_from_checkpoint is not None:
            raise ValueError("`resume_from_checkpoint` does not go with FSDP: each process averages its own shards.")
        self.model, self.optimizer = accelerator.prepare(model.train(), optimizer)
        # Not prepared: accelerate's wrapper takes a step for every process.
        self.lr_scheduler = get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
        )
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.ema = EMAModel(self.trained, decay=args.ema_decay, foreach=True)
        self.schedules.append((optimizer, self.lr_scheduler))
        self.register(self.lr_scheduler, self.ema, self.progress)

    def loss(self, batch: dict[str, torch.Tensor], batch_number: int) -> torch.Tensor:
        """The training loss of a batch, drawing everything random from the examples' own generators.

        Args:
            batch (`dict[str, torch.Tensor]`): collated.
            batch_number (`int`): of the batches of the run.

        Returns:
            `torch.Tensor` of shape `()`.
        """
        device = self.accelerator.device
        generators = example_generators(self.args.seed, batch["position"], device)
        tokens, labels = encode(batch, self.tokenizer, generators, device)
        rank, progress = self.accelerator.process_index, self.progress.step / self.args.max_train_steps
        return self.model(
            tokens,
            class_labels=labels if self.names else None,
            noise_scheduler=self.noise_scheduler,
            return_loss=True,
            generator=generators,
            **self.text_inputs(batch, device),
            **draw_inputs(self.args, self.bare_model, generators, batch_number, device, rank, progress),
        ).loss

    def text_inputs(self, batch: dict[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
        """What the model is told of a batch's captions.

        Args:
            batch (`dict[str, Any]`): collated.
            device (`torch.device`): where the model is.

        Returns:
            `dict[str, torch.Tensor]`: arguments of the model.
        """
        limit = self.config.num_text_tokens
        return text_inputs(batch, self.text_encoder, self.text_tokenizer, limit, device)

    def step(self, batches: Sequence[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step from as many batches as are accumulated.

        Args:
            batches (`Sequence[dict[str, torch.Tensor]]`): collated.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the loss and the norm of its gradient.
        """
        accelerator, args = self.accelerator, self.args
        losses, norm = [], None
        for number, batch in enumerate(batches):
            with accelerator.accumulate(self.model):
                loss = self.loss(batch, self.progress.step * args.gradient_accumulation_steps + number)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.trained, args.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(loss.detach())
        if not accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
        self.ema.step(self.trained)
        self.advance(len(batches))
        loss, norm = torch.stack(losses).mean(), torch.as_tensor(norm, device=loss.device)
        return self.finite_loss(loss, norm), norm

    def averaged_model(self) -> PreTrainedModel | None:
        """A copy of the model with the averaged weights; every process calls this.

        Returns:
            `PreTrainedModel`, *optional*: on the main process.
        """
        self.ema.store(self.trained)
        self.ema.copy_to(self.trained)
        state = self.accelerator.get_state_dict(self.model)
        copy = None
        if self.accelerator.is_main_process:
            # torch.compile's wrappers, of the model or of its blocks, show in the names.
            state = {name.replace("_orig_mod.", ""): value.detach().clone() for name, value in state.items()}
            with torch.device("meta"):
                copy = add_lora(self.args, self.model_class(self.config))
            copy.load_state_dict(state, assign=True)
            if self.args.lora_rank is not None:
                with atomic_folder(pathlib.Path(self.args.output_dir, "lora"), overwrite=True) as folder:
                    copy.save_pretrained(folder)
                copy = copy.merge_and_unload()
            copy = copy.to(self.accelerator.device).eval()
        self.ema.restore(self.trained)
        return copy

    def build_pipeline(self, model: PreTrainedModel) -> MARPipeline:
        """The pipeline that is saved.

        Args:
            model (`PreTrainedModel`): its transformer.

        Returns:
            `MARPipeline`.
        """
        tokenizer = self.tokenizer
        if self.from_latents:
            tokenizer = load_tokenizer(self.args, self.dataset, weights=True).to(model.device)
        return MARPipeline(
            transformer=model,
            vae=tokenizer,
            scheduler=self.noise_scheduler,
            text_encoder=self.text_encoder,
            tokenizer=self.text_tokenizer,
            id2label=dict(enumerate(self.names)) if self.names else None,
            generation_defaults=self.generation_defaults,
        )

    @torch.no_grad()
    def validation_loss(self, model: PreTrainedModel) -> float:
        """Loss of averaged weights without dropout, always on the same (at most 256) examples with the same draws.

        Args:
            model (`PreTrainedModel`): with these weights.

        Returns:
            `float`: the mean.
        """
        args, dataset, losses = self.args, PositionedDataset(self.validation_dataset), []
        chosen = torch.linspace(0, len(dataset) - 1, min(256, len(dataset))).long().tolist()
        keys = [(index, number) for number, index in enumerate(chosen)]
        # Not `train_batch_size`: the loss should not depend on the number of processes.
        for first in range(0, len(keys), 32):
            batch = self.collate(dataset.__getitems__(keys[first : first + 32]))
            generators = example_generators(args.seed, batch["position"], model.device, stream=3)
            tokens, labels = encode(batch, self.tokenizer, generators, model.device)
            output = model(
                tokens,
                class_labels=labels if self.names else None,
                noise_scheduler=self.noise_scheduler,
                return_loss=True,
                generator=generators,
                **self.text_inputs(batch, model.device),
                **draw_inputs(args, model, generators, first, model.device),
            )
            losses += [output.loss] * len(tokens)
        return torch.stack(losses).mean().item()

    def sample(self, pipe: MARPipeline) -> Image.Image:
        """A grid of samples, of the same classes or captions and seeds every time.

        Args:
            pipe (`MARPipeline`): that is saved.

        Returns:
            `PIL.Image.Image`: the grid.
        """
        args = self.args
        if self.config.text_dim is None:
            return sample_classes(pipe, self.names, args.validation_images, args.train_batch_size, args.resolution)
        rows = min(16, len(self.validation_dataset))
        chosen = torch.linspace(0, len(self.validation_dataset) - 1, rows).long().tolist()
        keys = [(index, number) for number, index in enumerate(chosen)]
        batch = self.collate(PositionedDataset(self.validation_dataset).__getitems__(keys))
        labels = batch["label"].tolist() if self.names else None
        inputs = self.text_inputs(batch, pipe.device)
        return sample_texts(pipe, inputs, labels, batch.get("text"), args.validation_images, args.resolution)

    def validate(self) -> None:
        """Save the pipeline with its card and samples, and the curves; every process calls this.

        Raises:
            RuntimeError: if the pipeline can't be written, a full disk say; the one before is left alone.
        """
        model = self.averaged_model()
        if model is not None:
            step, folder = self.progress.step, pathlib.Path(self.args.output_dir)
            pipe = self.build_pipeline(model)
            pipe.set_progress_bar_config(disable=True)
            validation_loss = self.validation_loss(model)
            self.progress.history[-1]["validation_loss"] = validation_loss
            self.accelerator.log({"validation_loss": validation_loss}, step=step)
            grid = self.sample(pipe)
            write_samples(grid, folder, step)
            for tracker in self.accelerator.trackers:
                if hasattr(tracker, "log_images"):
                    tracker.log_images(
                        {"samples": np.asarray(grid)[None]}, step=step, **IMAGE_FORMAT.get(tracker.name, {})
                    )
            write_curves(self.progress.history, folder)
            try:
                self.save_pipeline(pipe, grid)
            except Exception as error:
                raise RuntimeError(f"{folder / 'pipeline'} could not be written ({error}).") from error
        self.accelerator.wait_for_everyone()

    def save_pipeline(self, pipe: MARPipeline, grid: Image.Image) -> None:
        """Replace the saved pipeline, with its card, samples and curve: whole or not at all.

        Args:
            pipe (`MARPipeline`): the pipeline.
            grid (`PIL.Image.Image`): of its samples.
        """
        folder = pathlib.Path(self.args.output_dir)
        with atomic_folder(folder / "pipeline", overwrite=True) as target:
            pipe.save_pretrained(target)
            grid.save(pathlib.Path(target, "samples.png"))
            shutil.copy(folder / "loss.png", target)
            name = self.args.hub_model_id or str(folder / "pipeline")
            example = {"example_class": least_label(self.dataset) if self.names else None}
            if self.text_encoder is not None and not self.from_latents:
                example["example_prompt"] = self.dataset[0]["text"][0]
            processes = self.accelerator.num_processes
            description = describe_training(self.args, self.num_params, processes, self.progress)
            card = build_model_card(name, description, class_names=self.names, **example)
            card.save(pathlib.Path(target, "README.md"))

    def flush(self, steps: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
        losses = self.accelerator.reduce(torch.stack([loss for loss, _ in steps]), "mean")
        self.check_finite("The loss or its gradient", losses)
        row = {
            "step": self.progress.step,
            "loss": losses.mean().item(),
            "learning_rate": self.lr_scheduler.get_last_lr()[0],
            "grad_norm": steps[-1][1].item(),
        }
        self.progress.history.append(row)
        self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
        return row

    def start(self) -> None:
        super().start()
        args = self.args
        if args.push_to_hub and self.accelerator.is_main_process:
            # Before the work: it shows whether this is allowed, and the card names the repository.
            name = args.hub_model_id or pathlib.Path(args.output_dir).resolve().name
            args.hub_model_id = HfApi(token=args.hub_token).create_repo(name, exist_ok=True).repo_id
        settings = {k: v for k, v in asdict(args).items() if v is not None and k != "hub_token"}
        # TensorBoard takes no lists.
        settings = {k: json.dumps(v) if isinstance(v, list) else v for k, v in settings.items()}
        self.accelerator.init_trackers("mar_hf", settings)

    def save(self) -> None:
        args, folder = self.args, pathlib.Path(self.args.output_dir, "pipeline")
        if args.push_to_hub:
            HfApi(token=args.hub_token).upload_folder(repo_id=args.hub_model_id, folder_path=folder)
        self.summary = f"loss {self.progress.history[-1]['loss']:.4f}; pipeline in {folder}"
