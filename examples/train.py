# SPDX-License-Identifier: Apache-2.0
"""Train or fine-tune a model of classes or texts on a folder of pictures or on cached latents.

    accelerate launch examples/train.py --config examples/configs/emoji.json --train_data_dir data/emoji \\
        --pretrained_tokenizer out/tokenizer --output_dir out/mar

The recipe is that of arXiv:2406.11838, appendix B. While it runs, `output_dir` holds

- `pipeline/`: the averaged weights, tokenizer, scheduler and card: `MARPipeline.from_pretrained` loads it at any time;
- `samples/`: a grid of pictures every `validation_steps`, a row for each class;
- `loss.csv`, `loss.png`, and the logs of the trackers;
- `checkpoint-<step>/`: everything to go on exactly where the run was killed, with `--resume_from_checkpoint latest`.

What is random about an example depends on the seed and its place in the row of all epochs only, so a run does not
depend on the number of processes (but for dropout, which draws from every process' own state).
"""

import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, ProjectConfiguration, set_seed
from datasets import ClassLabel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from huggingface_hub import HfApi
from image_data import ImageTransform, load_image_dataset
from latent_data import load_latents
from PIL import Image
from text_data import check_templates
from training_utils import (
    Collator,
    PositionedDataset,
    Progress,
    check_finite,
    check_output_dir,
    example_generators,
    make_accelerator,
    parse_arguments,
    resume,
    training_loop,
    write_curves,
)
from transformers import PreTrainedConfig, PreTrainedModel

from mar_hf import (
    ImageTokenizer,
    ImageTokenizerConfig,
    MARConfig,
    MARPipeline,
    TokenDDPMScheduler,
    build_model_card,
)
from mar_hf.generation import TOKEN_SCHEDULES, look_up
from mar_hf.models import BACKBONES, check_text_encoder, encode_texts, load_text_encoder
from mar_hf.utils import atomic_folder, draw_grid


logger = get_logger(__name__)

# Parameters that only a model of texts has.
TEXT_PARTS = re.compile(r"\.(text_aligner|context_\w+)\.")
# What a tracker needs to be told of a picture (1, H, W, 3).
IMAGE_FORMAT = {"tensorboard": {"dataformats": "NHWC"}}


@dataclass
class Arguments:
    """Settings of a training run. JSON objects are written as such in a file of settings."""

    output_dir: str = field(metadata={"help": "where checkpoints, the pipeline, samples and the loss curve go"})
    train_data_dir: str | None = field(
        default=None,
        metadata={"help": "image folder, parquet folder, saved dataset, or cached latents"},
    )
    validation_data_dir: str | None = field(
        default=None, metadata={"help": "examples not trained on, for the validation loss; default: of the data"}
    )
    resolution: int = field(default=32, metadata={"help": "side of the pictures in pixels"})
    random_flip: bool = field(default=False, metadata={"help": "mirror half of the pictures"})
    random_shift: int = field(default=0, metadata={"help": "shift pictures by up to so many pixels"})
    pretrained_tokenizer: str | None = field(
        default=None, metadata={"help": "image tokenizer, folder or hub id; default: that of the pipeline, or pixels"}
    )
    patch_size: int = field(default=4, metadata={"help": "pixels along a token's side, without a tokenizer"})

    pretrained_text_encoder: str | None = field(
        default=None,
        metadata={
            "help": "text encoder with its tokenizer, folder or hub id: trains on the captions of the data, and is "
            "saved with the pipeline; default: that of the pipeline. Not needed with texts that were cached"
        },
    )
    caption_column: str = field(default="text", metadata={"help": "column of captions: texts, or lists of texts"})
    caption_templates: list[str] = field(
        default_factory=lambda: ["{}"],
        metadata={"help": "one is drawn for each caption that is drawn; {} is the caption, {label} the class"},
    )
    ignore_classes: bool = field(default=False, metadata={"help": "the model shall know no classes"})

    pretrained_model_name_or_path: str | None = field(
        default=None, metadata={"help": "pipeline to fine-tune, folder or hub id; its classes may be others"}
    )
    model_config: str = field(
        default="{}",
        metadata={"help": "JSON object: settings of the model; `preset` names a size, `model_type` a backbone"},
    )
    lora_rank: int | None = field(default=None, metadata={"help": "train low-rank updates of all linear layers only"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "save memory, recompute activations"})

    train_batch_size: int = field(default=64, metadata={"help": "pictures a step and process"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "batches an optimizer step"})
    max_train_steps: int = field(default=5000, metadata={"help": "optimizer steps"})
    learning_rate: float = field(default=1e-4, metadata={"help": "after the warm-up"})
    scale_lr: bool = field(default=False, metadata={"help": "the learning rate is meant for 256 pictures a step"})
    lr_scheduler: str = field(default="constant_with_warmup", metadata={"help": "a name of diffusers' schedulers"})
    lr_warmup_steps: int = field(default=100, metadata={"help": "steps of linear warm-up"})
    adam_beta1: float = field(default=0.9, metadata={"help": "of AdamW"})
    adam_beta2: float = field(default=0.95, metadata={"help": "of AdamW"})
    adam_weight_decay: float = field(default=0.02, metadata={"help": "not for biases, norms and the head"})
    max_grad_norm: float = field(default=3.0, metadata={"help": "gradients are clipped to this norm"})
    ema_decay: float = field(default=0.9999, metadata={"help": "of the averaged weights; at most (1 + n) / (10 + n)"})
    mask_ratio_per_process: bool = field(
        default=False,
        metadata={"help": "every process draws its masking ratio, as the original; default: one a batch for all"},
    )
    mixed_precision: str | None = field(default=None, metadata={"help": "no, bf16 or fp16; default: accelerate's"})
    allow_tf32: bool = field(default=False, metadata={"help": "quicker float32 products on NVIDIA GPUs"})
    dataloader_num_workers: int = field(default=0, metadata={"help": "processes that read examples"})
    seed: int = field(default=0, metadata={"help": "of everything random"})

    logging_steps: int = field(default=20, metadata={"help": "steps between noted losses"})
    checkpointing_steps: int = field(default=500, metadata={"help": "optimizer steps between checkpoints"})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "the newest so many checkpoints stay"})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": '"latest", or a checkpoint in `output_dir`: its name or path'}
    )

    max_timestep: int | None = field(
        default=None, metadata={"help": "where the saved sampler starts; default: 950, or the pipeline's"}
    )
    validation_steps: int = field(default=500, metadata={"help": "steps between saved pipelines and samples"})
    validation_images: int = field(default=6, metadata={"help": "samples of each class"})
    generation_defaults: str | None = field(
        default=None,
        metadata={
            "help": "JSON object: arguments of the pipeline's call, for samples and saved as its defaults; default: "
            "those of the pipeline, or 32 autoregressive steps of 50 head steps with guidance 3"
        },
    )
    report_to: str = field(default="tensorboard", metadata={"help": "accelerate's trackers: tensorboard, wandb, none"})
    push_to_hub: bool = field(default=False, metadata={"help": "upload the pipeline at the end"})
    hub_model_id: str | None = field(default=None, metadata={"help": "where to; default: the name of `output_dir`"})
    hub_token: str | None = field(default=None, metadata={"help": "default: that of `hf auth login`"})

    def __post_init__(self) -> None:
        steps = ("max_train_steps", "logging_steps", "validation_steps", "checkpointing_steps")
        counts = ("train_batch_size", "gradient_accumulation_steps", "checkpoints_total_limit", "validation_images")
        for name in (*steps, *counts):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` has to be at least 1, got {getattr(self, name)}.")
        for name in ("model_config", "generation_defaults"):
            if getattr(self, name) is None:
                continue
            try:
                settings = json.loads(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"`{name}` has to be a JSON object: {error}") from error
            if not isinstance(settings, dict):
                raise ValueError(f"`{name}` has to be a JSON object, got {settings!r}.")
        check_templates(self.caption_templates)
        if self.pretrained_model_name_or_path and json.loads(self.model_config).keys() & {"preset", "model_type"}:
            raise ValueError("`model_config` can't change `preset` or `model_type` of a pretrained model.")


def load_data(args: Arguments, path: str | None, captions: bool) -> tuple[torch.utils.data.Dataset, list[str] | None]:
    """The examples, and the names of their classes: pictures, or latents where the folder holds such."""
    if path is None:
        raise ValueError("`train_data_dir` has to be given.")
    folder = pathlib.Path(path)
    if (folder / "index.json").exists() or any(next(folder.glob(kind), None) for kind in ("*.npz", "*/*.npz")):
        if args.random_shift:
            raise ValueError(f"`random_shift` {args.random_shift} does not go with cached latents.")
        dataset = load_latents(path)
        if dataset.resolution not in (None, args.resolution):
            raise ValueError(f"`resolution` {args.resolution} has to be that of the latents: {dataset.resolution}.")
        if args.random_flip and not dataset.has_flipped:
            raise ValueError("`random_flip` needs latents that were cached with `--random_flip`.")
        return dataset, None if args.ignore_classes else dataset.class_names
    dataset = load_image_dataset(path, args.caption_column if captions else None)
    if captions and "text" not in dataset.column_names:
        raise ValueError(f"`train_data_dir` {path!r} has no captions: no column {args.caption_column!r}.")
    feature = dataset.features.get("label")
    names = feature.names if isinstance(feature, ClassLabel) and not args.ignore_classes else None
    return dataset.with_transform(ImageTransform(args.resolution)), names


def text_encoder_source(args: Arguments) -> str | None:
    """Folder or hub id of the text encoder; None where nobody names one."""
    if args.pretrained_text_encoder is not None or args.pretrained_model_name_or_path is None:
        return args.pretrained_text_encoder
    if json.loads(args.model_config).get("text_dim", "as it is") is None:
        return None
    index = MARPipeline.load_config(args.pretrained_model_name_or_path)
    return args.pretrained_model_name_or_path if (index.get("text_encoder") or [None])[0] else None


def tokenizer_source(args: Arguments) -> tuple[str, str] | None:
    """(folder or hub id, subfolder) of the image tokenizer; None for pixels."""
    if args.pretrained_tokenizer is not None:
        return args.pretrained_tokenizer, ""
    if args.pretrained_model_name_or_path is not None:
        return args.pretrained_model_name_or_path, "vae"
    folder = pathlib.Path(args.train_data_dir, "tokenizer")
    return (str(folder), "") if folder.is_dir() else None


def load_tokenizer(args: Arguments, dataset: torch.utils.data.Dataset, weights: bool) -> ImageTokenizer:
    """The tokenizer of the settings, or pixels of zero mean and unit deviation a channel.

    Without `weights` it knows shapes and statistics only, and takes no memory: enough to train on cached latents.
    """
    source = tokenizer_source(args)
    if source is None and not weights:
        raise ValueError("These cached latents have no tokenizer beside them: give `pretrained_tokenizer`.")
    if source is not None and not weights:
        config = ImageTokenizerConfig.from_pretrained(source[0], subfolder=source[1])
        own = pathlib.Path(args.train_data_dir, "tokenizer")
        # One with other statistics would train as quietly, on other tokens.
        names = ("autoencoder", "patch_size", "normalizer", "shift_factor", "scaling_factor", "quantize")
        found = ImageTokenizerConfig.from_pretrained(own) if own.is_dir() else config
        if any(getattr(found, name) != getattr(config, name) for name in names):
            raise ValueError(f"`train_data_dir` {args.train_data_dir!r} holds latents of another tokenizer.")
        with torch.device("meta"):
            return ImageTokenizer(config)
    if source is not None:
        return ImageTokenizer.from_pretrained(source[0], subfolder=source[1]).requires_grad_(False)
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:4096]
    moments = []  # of each picture, so that they need not be in memory together: mean and mean square, (2, 3)
    for part in chosen.split(256):
        pictures = torch.stack([row["pixel_values"] for row in dataset.__getitems__(part.tolist())]).double()
        moments.append(torch.stack([pictures.mean((2, 3)), pictures.square().mean((2, 3))], 1))
    mean, square = torch.cat(moments).mean(0)
    std = (square - mean.square()).clamp(min=0).sqrt()
    if not (std > 1e-6).all():
        raise ValueError(f"The pictures' channels have deviations {std.tolist()}: a constant one can't be scaled.")
    config = ImageTokenizerConfig(
        patch_size=args.patch_size, shift_factor=mean.tolist(), scaling_factor=(1 / std).tolist()
    )
    return ImageTokenizer(config).eval()


def build_model(
    args: Arguments, tokenizer: ImageTokenizer, names: list[str] | None, text_dim: int | None = None
) -> PreTrainedModel:
    """A backbone with its head: with random weights, or those of the pipeline that is fine-tuned."""
    settings = json.loads(args.model_config)
    if text_dim is not None and settings.setdefault("text_dim", text_dim) != text_dim:
        raise ValueError(
            f"`model_config` has the `text_dim` {settings['text_dim']}, but the texts of the data are states of "
            f"{text_dim} numbers: leave one of them out."
        )
    num_classes = count_classes(names, settings)
    if args.pretrained_model_name_or_path is not None:
        return fine_tuned_model(args, settings, names)
    if args.resolution % tokenizer.stride:
        raise ValueError(f"`resolution` has to be a multiple of {tokenizer.stride}, got {args.resolution}.")
    config_class, _, model_class = look_up(BACKBONES, settings.pop("model_type", MARConfig.model_type), "model_type")
    preset = settings.pop("preset", "base")
    defaults, head_config = config_class.preset(preset), settings.pop("head_config", {})
    if settings.get("head_type", defaults.head_type) == defaults.head_type:
        head_config = {**defaults.head_config, **head_config}
    grid = args.resolution // tokenizer.stride
    sizes = {"grid_height": grid, "grid_width": grid, "token_dim": tokenizer.token_dim, "num_classes": num_classes}
    return model_class(config_class.preset(preset, **sizes, head_config=head_config, **settings))


def fine_tuned_model(args: Arguments, settings: dict, names: list[str] | None) -> PreTrainedModel:
    """The model of a pipeline, with a class table for the new classes: those of the same name and no class stay."""
    source = args.pretrained_model_name_or_path
    index = MARPipeline.load_config(source)
    classes = {model_class.__name__: model_class for _, _, model_class in BACKBONES.values()}
    model_class = look_up(classes, index["transformer"][1], "transformer")
    config = model_class.config_class.from_pretrained(source, subfolder="transformer")
    # Made anew, so that changed settings are checked.
    config = type(config).from_dict({**config.to_dict(), **settings})
    model = load_weights(model_class, source, config)
    old = {name: int(number) for number, name in (index.get("id2label") or {}).items()}
    num_classes = count_classes(names, config.to_dict())
    same = not names or not old or all(old.get(name) == number for number, name in enumerate(names))
    if num_classes == model.config.num_classes and same:
        return model
    table = model.get_parameter("model.class_embedding.weight").detach()
    # A new class starts as the mean of the old ones, if there are any. The last row is no class.
    mean = table[: max(model.config.num_classes, 1)].mean(0)
    rows = [table[old[name]] if name in old else mean for name in names or ["any"] * num_classes]
    embedding = torch.nn.Embedding(num_classes + 1, table.shape[1], _weight=torch.stack([*rows, table[-1]]))
    model.model.class_embedding = embedding
    model.config.num_classes = num_classes
    return model


def count_classes(names: list[str] | None, settings: dict) -> int:
    """Classes of a model. Where there is nothing to tell pictures by, they are one class without a name."""
    return len(names) if names else int(settings.get("text_dim") is None)


def load_weights(model_class: type[PreTrainedModel], source: str, config: PreTrainedConfig) -> PreTrainedModel:
    """A pipeline's model; what attends to texts may be new, and starts as the identity, or be left out."""
    settings = {"subfolder": "transformer", "dtype": torch.float32, "config": config}
    old = type(config).from_pretrained(source, subfolder="transformer")
    if (config.text_dim is None) == (old.text_dim is None):
        return model_class.from_pretrained(source, **settings)
    model, report = model_class.from_pretrained(
        source, **settings, output_loading_info=True, ignore_mismatched_sizes=True
    )
    names = {*report["missing_keys"], *report["unexpected_keys"], *(key for key, *_ in report["mismatched_keys"])}
    if wrong := sorted(name for name in names if not TEXT_PARTS.search(name)):
        raise ValueError(f"The weights of {source} do not fit its configuration: {', '.join(wrong)}.")
    return model


def add_lora(args: Arguments, model: PreTrainedModel) -> torch.nn.Module:
    """The model with low-rank updates of its linear layers, which are all that is trained beside the class table."""
    if args.lora_rank is None:
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_rank,
        target_modules="all-linear",
        modules_to_save=["class_embedding"],
    )
    return get_peft_model(model, config)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """The original's groups: no decay for vectors and for the head; embeddings are decayed."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = {name: p.ndim > 1 and "head." not in name for name, p in trained}
    return [
        {"params": [p for name, p in trained if decayed[name]], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if not decayed[name]], "weight_decay": 0.0},
    ]


def draw_inputs(
    args: Arguments,
    model: PreTrainedModel,
    generators: list[torch.Generator],
    batch_number: int,
    device: torch.device,
    rank: int = 0,
    progress: float = 1.0,
) -> dict[str, Any]:
    """What the model leaves open for a batch: masks or orders, each example's from its own generator.

    What examples have in common is the same in all processes, unless the settings say otherwise.
    """
    stream = 4 + rank if args.mask_ratio_per_process else 2
    shared = example_generators(args.seed, [batch_number], stream=stream)[0]
    drawn = model.training_inputs(len(generators), generators, shared, progress=progress)
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in drawn.items()}


@torch.no_grad()
def encode(
    batch: dict[str, torch.Tensor], tokenizer: ImageTokenizer, generators: list[torch.Generator], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch's tokens (B, L, C) in float32 and labels (B,), on the device."""
    labels = batch["label"].to(device, non_blocking=True)
    if "mean" in batch:
        mean, std = (batch[name].to(device, torch.float32, non_blocking=True) for name in ("mean", "std"))
        return tokenizer.sample_moments(mean, std, generator=generators).tokens, labels
    pictures = batch["pixel_values"].to(device, non_blocking=True)
    return tokenizer.encode(pictures, generator=generators).tokens, labels


@torch.no_grad()
def text_inputs(
    batch: dict[str, Any], text_encoder: PreTrainedModel | None, tokenizer: Any, limit: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """What the model is told of a batch's captions: nothing where there are none."""
    if "text" in batch:
        embeds, mask = encode_texts(batch["text"], text_encoder, tokenizer, limit)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}
    names = ("prompt_embeds", "prompt_attention_mask")
    return {name: batch[name].to(device, non_blocking=True) for name in names if name in batch}


class Trainer:
    """A run: what `main` needs at every step.

    Args:
        args (`Arguments`): of the run.
    """

    def __init__(self, args: Arguments):
        self.args = args
        self.accelerator = accelerator = make_accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to.split(","),
            project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=f"{args.output_dir}/logs"),
        )
        if args.push_to_hub and args.hub_token and "wandb" in args.report_to:
            raise ValueError("`hub_token` would be logged by wandb; use `hf auth login`.")
        check_output_dir(args)
        if args.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        set_seed(args.seed)
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
        text_dim = self.find_text_dim()
        model = build_model(args, self.tokenizer, self.names, text_dim)
        self.model_class, self.config, self.bare_model = type(model), model.config, model
        if self.from_latents and text_dim is not None:
            self.check_text_lengths()
        needs_weights = self.from_latents and model.head.uses_codebook
        tokenizer = load_tokenizer(args, self.dataset, weights=True) if needs_weights else self.tokenizer
        model.head.set_tokenizer(tokenizer)
        self.generation_defaults = self.build_generation_defaults()
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        model = add_lora(args, model)
        self.num_params = sum(p.numel() for p in model.parameters())
        self.noise_scheduler = self.build_noise_scheduler()
        learning_rate = args.learning_rate
        if args.scale_lr:
            learning_rate *= global_batch * args.gradient_accumulation_steps / 256
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
        self.progress = Progress(len(self.dataset), args.seed)
        accelerator.register_for_checkpointing(self.lr_scheduler, self.ema, self.progress)
        # Dropout draws from the global state; processes need not drop the same.
        set_seed(args.seed, device_specific=True)

    def find_text_dim(self) -> int | None:
        """Width of the states that captions have; None where nothing is trained on captions."""
        if not self.from_latents:
            if self.text_encoder is None:
                return None
            return self.text_encoder.to(self.accelerator.device).config.hidden_size
        text_dim = self.dataset.text_dim
        if self.validation_dataset.text_dim != text_dim:
            raise ValueError("`validation_data_dir` has to hold what `train_data_dir` does: texts or none.")
        if self.text_encoder is not None and text_dim is None:
            raise ValueError("The cached latents hold no texts: cache them with `--pretrained_text_encoder` as well.")
        if self.text_encoder is not None:
            check_text_encoder(self.text_encoder, text_dim)
        return text_dim

    def check_text_lengths(self) -> None:
        """Refuse cached texts that the model does not take whole: cut states are not those of the cut text."""
        limit = self.config.num_text_tokens
        for dataset in (self.dataset, self.validation_dataset):
            if (longest := dataset.longest_text()) > limit:
                raise ValueError(
                    f"The cached texts have up to {longest} tokens, and the model takes {limit}: cache them with "
                    f"`--max_sequence_length {limit}`, or set `num_text_tokens` in `model_config`."
                )

    def build_noise_scheduler(self) -> TokenDDPMScheduler:
        """The noise schedule of the loss, and the sampler that is saved."""
        args, settings = self.args, {}
        if args.pretrained_model_name_or_path is not None:
            settings = TokenDDPMScheduler.load_config(args.pretrained_model_name_or_path, subfolder="scheduler")
        # Young models need the first steps of the sampler left out.
        settings["max_timestep"] = args.max_timestep or settings.get("max_timestep", 950)
        return TokenDDPMScheduler.from_config(settings)

    def build_generation_defaults(self) -> dict[str, Any]:
        """What the saved pipeline does by default; wrong settings are better found now than when it is built."""
        args, model = self.args, self.bare_model
        if args.generation_defaults is not None:
            defaults = json.loads(args.generation_defaults)
        elif args.pretrained_model_name_or_path is not None:
            defaults = MARPipeline.load_config(args.pretrained_model_name_or_path)["generation_defaults"] or {}
            if "order" in json.loads(args.model_config):
                defaults.pop("generation_order", None)
        else:
            defaults = {"num_inference_steps": 32, "num_diffusion_steps": 50, "guidance_scale": 3.0}
            # What follows from the model need not be saved.
            defaults = {name: value for name, value in defaults.items() if name not in model.sampling_defaults}
        if "num_inference_steps" in defaults:
            defaults["num_inference_steps"] = min(defaults["num_inference_steps"], self.config.num_tokens)
            settings = {"token_schedule": "cosine", **model.sampling_defaults, **defaults}
            schedule = look_up(TOKEN_SCHEDULES, settings["token_schedule"], "token_schedule")
            model.check_tokens_per_step(schedule(self.config.num_tokens, settings["num_inference_steps"]))
        return defaults

    def loss(self, batch: dict[str, torch.Tensor], batch_number: int) -> torch.Tensor:
        """The training loss of a batch, drawing everything random from the examples' own generators."""
        device = self.accelerator.device
        generators = example_generators(self.args.seed, batch["position"], device)
        tokens, labels = encode(batch, self.tokenizer, generators, device)
        rank, progress = self.accelerator.process_index, self.progress.step / self.args.max_train_steps
        return self.model(
            tokens,
            class_labels=labels if self.names else None,
            noise_scheduler=self.noise_scheduler,
            generator=generators,
            **self.text_inputs(batch, device),
            **draw_inputs(self.args, self.bare_model, generators, batch_number, device, rank, progress),
        ).loss

    def text_inputs(self, batch: dict[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
        """What the model is told of a batch's captions."""
        limit = self.config.num_text_tokens
        return text_inputs(batch, self.text_encoder, self.text_tokenizer, limit, device)

    def step(self, batches: Sequence[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step from as many batches as are accumulated: (loss, norm of the gradient), no waiting."""
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
        self.progress.step += 1
        self.progress.position += args.train_batch_size * accelerator.num_processes * len(batches)
        loss, norm = torch.stack(losses).mean(), torch.as_tensor(norm, device=loss.device)
        if accelerator.scaler is None:
            # Such a gradient spoils the weights as surely as such a loss; a scaler leaves the step out.
            loss = torch.where(norm.isfinite(), loss, norm)
        return loss, norm

    def averaged_model(self) -> PreTrainedModel | None:
        """A copy of the model with the averaged weights, on the main process; every process calls this."""
        self.ema.store(self.trained)
        self.ema.copy_to(self.trained)
        state = self.accelerator.get_state_dict(self.model)
        copy = None
        if self.accelerator.is_main_process:
            # torch.compile's wrapper shows in the names.
            state = {name.removeprefix("_orig_mod."): value.detach().clone() for name, value in state.items()}
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
        """The pipeline that is saved."""
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
        """Loss of averaged weights without dropout, always on the same (at most 256) examples with the same draws."""
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
                generator=generators,
                **self.text_inputs(batch, model.device),
                **draw_inputs(args, model, generators, first, model.device),
            )
            losses += [output.loss] * len(tokens)
        return torch.stack(losses).mean().item()

    def sample_grid(self, pipe: MARPipeline) -> Image.Image:
        """A row of samples for each of at most 40 classes, or one row; the same seeds every time."""
        if self.config.text_dim is not None:
            return self.sample_texts(pipe)
        columns = self.args.validation_images
        rows = min(40, len(self.names)) if self.names else 1
        classes = torch.linspace(0, len(self.names or "-") - 1, rows).long().tolist()
        seeds = [(number, 1000 * number + column) for number in classes for column in range(columns)]
        images = []
        for first in range(0, len(seeds), self.args.train_batch_size):
            labels, numbers = zip(*seeds[first : first + self.args.train_batch_size], strict=True)
            images += pipe(
                class_labels=list(labels) if self.names else None,
                num_images_per_prompt=1 if self.names else len(labels),
                generator=[torch.Generator().manual_seed(number) for number in numbers],
            ).images
        return make_image_grid(images, rows=rows, cols=columns, resize=max(64, self.args.resolution))

    def sample_texts(self, pipe: MARPipeline) -> Image.Image:
        """A row of samples for the captions of each of at most 16 examples; the same seeds every time."""
        columns, rows = self.args.validation_images, min(16, len(self.validation_dataset))
        chosen = torch.linspace(0, len(self.validation_dataset) - 1, rows).long().tolist()
        keys = [(index, number) for number, index in enumerate(chosen)]
        batch = self.collate(PositionedDataset(self.validation_dataset).__getitems__(keys))
        images = pipe(
            class_labels=batch["label"].tolist() if self.names else None,
            **self.text_inputs(batch, pipe.device),
            num_images_per_prompt=columns,
            generator=[torch.Generator().manual_seed(number) for number in range(rows * columns)],
        ).images
        if "text" in batch:
            return draw_grid(images, batch["text"])
        return make_image_grid(images, rows=rows, cols=columns, resize=max(64, self.args.resolution))

    def validate(self) -> None:
        """Save the pipeline with its card and samples, and the curves; every process calls this."""
        model = self.averaged_model()
        if model is not None:
            step, folder = self.progress.step, pathlib.Path(self.args.output_dir)
            pipe = self.build_pipeline(model)
            pipe.set_progress_bar_config(disable=True)
            validation_loss = self.validation_loss(model)
            self.progress.history[-1]["validation_loss"] = validation_loss
            self.accelerator.log({"validation_loss": validation_loss}, step=step)
            grid = self.sample_grid(pipe)
            (folder / "samples").mkdir(exist_ok=True)
            grid.save(folder / "samples" / f"step_{step:06d}.png")
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
        """Replace the saved pipeline, with its card, samples and curve: whole or not at all."""
        folder = pathlib.Path(self.args.output_dir)
        for left_over in folder.glob(".pipeline-*"):  # by a run that was killed while it wrote
            shutil.rmtree(left_over)
        with atomic_folder(folder / "pipeline", overwrite=True) as target:
            pipe.save_pretrained(target)
            grid.save(pathlib.Path(target, "samples.png"))
            shutil.copy(folder / "loss.png", target)
            name = self.args.hub_model_id or str(folder / "pipeline")
            example = {"example_class": 0 if self.config.num_classes else None}
            if self.text_encoder is not None and not self.from_latents:
                example["example_prompt"] = self.dataset[0]["text"][0]
            card = build_model_card(name, self.description(), class_names=self.names, **example)
            card.save(pathlib.Path(target, "README.md"))

    def description(self) -> str:
        """What the card says about the training."""
        args, defaults = self.args, Arguments(output_dir="")
        batch = args.train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        # Where something lay on this machine tells nobody else anything; a hub id does.
        values = {k: v for k, v in asdict(args).items() if not (isinstance(v, str) and os.path.exists(v))}
        skipped = (
            "output_dir",
            "train_data_dir",
            "hub_model_id",
            "hub_token",
            "push_to_hub",
            "resume_from_checkpoint",
        )
        table = "".join(
            f"| {name} | `{value}` |\n"
            for name, value in values.items()
            if name not in skipped and value != getattr(defaults, name)
        )
        row = self.progress.history[-1]
        return (
            f"{self.num_params / 1e6:.1f} million parameters, trained with mar_hf's `examples/train.py` on "
            f"{len(self.dataset)} examples for {self.progress.step} steps of {batch} pictures of {args.resolution} x "
            f"{args.resolution} pixels. Loss {row['loss']:.4f}; of the averaged weights, which these are, "
            f"{row['validation_loss']:.4f}.\n\n![samples](samples.png)\n\n![loss](loss.png)\n\n## Training\n\n"
            f"| setting | value |\n|---|---|\n{table}"
        )

    def flush(self, steps: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
        """Note the mean loss of the last steps, which waits for the device.

        Args:
            steps (`list[tuple[torch.Tensor, torch.Tensor]]`): what `step` returned.

        Returns:
            `dict[str, float]`: the row of `loss.csv`.

        Raises:
            FloatingPointError: if a loss or a gradient is not finite.
        """
        losses = self.accelerator.reduce(torch.stack([loss for loss, _ in steps]), "mean")
        check_finite("The loss or its gradient", losses, self)
        row = {
            "step": self.progress.step,
            "loss": losses.mean().item(),
            "learning_rate": self.lr_scheduler.get_last_lr()[0],
            "grad_norm": steps[-1][1].item(),
        }
        self.progress.history.append(row)
        self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
        return row


def main(args: Arguments) -> None:
    """Train, saving and sampling on the way."""
    logging.basicConfig(level=logging.WARNING)
    trainer = Trainer(args)
    accelerator = trainer.accelerator
    resume(trainer)
    pathlib.Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    if args.push_to_hub and accelerator.is_main_process:
        # Before the work: it shows whether this is allowed, and the card names the repository.
        name = args.hub_model_id or pathlib.Path(args.output_dir).resolve().name
        args.hub_model_id = HfApi(token=args.hub_token).create_repo(name, exist_ok=True).repo_id
    settings = {k: v for k, v in asdict(args).items() if v is not None and k != "hub_token"}
    # TensorBoard takes no lists.
    settings = {k: json.dumps(v) if isinstance(v, list) else v for k, v in settings.items()}
    accelerator.init_trackers("mar_hf", settings)

    training_loop(trainer)
    if args.push_to_hub and accelerator.is_main_process:
        folder = pathlib.Path(args.output_dir, "pipeline")
        HfApi(token=args.hub_token).upload_folder(repo_id=args.hub_model_id, folder_path=folder)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_arguments(Arguments))
