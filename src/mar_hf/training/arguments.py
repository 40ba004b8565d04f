# SPDX-License-Identifier: Apache-2.0
"""Settings: what is trained, on what and how; from a notebook, from the command line, and from files."""

import dataclasses
import difflib
import json
import math
import os
import pathlib
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn, TypeVar

from diffusers.optimization import TYPE_TO_SCHEDULER_FUNCTION, SchedulerType
from transformers import HfArgumentParser

from ..generation import build_settings
from ..utils import import_extra, look_up
from .picture_modes import check_channels
from .text_data import check_templates


Settings = TypeVar("Settings")

# The one that is left out needs more than numbers of steps.
LR_SCHEDULERS = {
    kind.value: kind for kind in TYPE_TO_SCHEDULER_FUNCTION if kind is not SchedulerType.PIECEWISE_CONSTANT
}
PRECISIONS = {"no": "no", "bf16": "bf16", "fp16": "fp16"}
KINDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}


@dataclass
class BaseTrainingArguments:
    """Settings that every training has. Wrong ones are refused when the object is made.

    Args:
        output_dir (`str`): where results, checkpoints and curves go.
        train_data_dir (`str`, *optional*): the data; every trainer needs it.
        train_batch_size (`int`, *optional*, defaults to 64): examples a step and process.
        gradient_accumulation_steps (`int`, *optional*, defaults to 1): batches an optimizer step.
        max_train_steps (`int`, *optional*, defaults to 2000): optimizer steps.
        learning_rate (`float`, *optional*, defaults to 1e-3): after the warm-up.
        lr_warmup_steps (`int`, *optional*, defaults to 100): steps of linear warm-up.
        mixed_precision (`str`, *optional*): `"no"`, `"bf16"` or `"fp16"`; None takes accelerate's.
        dataloader_num_workers (`int`, *optional*, defaults to 0): processes that read examples.
        seed (`int`, *optional*, defaults to 0): of everything random.
        logging_steps (`int`, *optional*, defaults to 20): steps between noted losses.
        checkpointing_steps (`int`, *optional*, defaults to 500): optimizer steps between checkpoints.
        checkpoints_total_limit (`int`, *optional*, defaults to 2): the newest so many checkpoints stay.
        resume_from_checkpoint (`str`, *optional*): `"latest"`, or a checkpoint in `output_dir`.
    """

    output_dir: str = field(metadata={"help": "where results, checkpoints and curves go"})
    train_data_dir: str | None = field(default=None, metadata={"help": "the data"})

    train_batch_size: int = field(default=64, metadata={"help": "pictures a step and process"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "batches an optimizer step"})
    max_train_steps: int = field(default=2000, metadata={"help": "optimizer steps"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak of the cosine schedule"})
    lr_warmup_steps: int = field(default=100, metadata={"help": "steps of linear warm-up"})
    mixed_precision: str | None = field(default=None, metadata={"help": "no, bf16 or fp16; default: accelerate's"})
    dataloader_num_workers: int = field(default=0, metadata={"help": "processes that read examples"})
    seed: int = field(default=0, metadata={"help": "of everything random"})

    logging_steps: int = field(default=20, metadata={"help": "steps between noted losses"})
    checkpointing_steps: int | None = field(default=500, metadata={"help": "optimizer steps between checkpoints"})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "the newest so many checkpoints stay"})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": '"latest", or a checkpoint in `output_dir`: its name or path'}
    )

    # Smallest values; what is not listed may be anything of its type.
    at_least: ClassVar[dict[str, float]] = {
        **{name: 1 for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps")},
        **{name: 1 for name in ("logging_steps", "checkpointing_steps", "checkpoints_total_limit")},
        **{name: 0 for name in ("learning_rate", "lr_warmup_steps", "dataloader_num_workers", "seed")},
    }
    above_zero: ClassVar[tuple[str, ...]] = ()
    below_one: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in self.at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` has to be at least {least}, got {value}.")
        for name in self.above_zero:
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` has to be above 0, got {getattr(self, name)}.")
        for name in self.below_one:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` has to lie in [0, 1), got {getattr(self, name)}.")
        if self.seed >= 2**32:
            raise ValueError(f"`seed` has to be below 2**32, got {self.seed}.")
        if self.mixed_precision is not None:
            look_up(PRECISIONS, self.mixed_precision, "mixed_precision")


def check_types(settings: Any) -> None:
    """Refuse a value of another type than its field's, numbers that are none, and True where a number belongs.

    Args:
        settings (`Any`): an instance of a dataclass.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    hints = typing.get_type_hints(type(settings))
    for name in (one.name for one in dataclasses.fields(settings)):
        value, kind = getattr(settings, name), hints[name]
        if isinstance(kind, types.UnionType):
            if value is None:
                continue
            kind = typing.get_args(kind)[0]
        if typing.get_origin(kind) is list:
            kind = typing.get_args(kind)[0]
            fits = isinstance(value, list) and all(_is_a(entry, kind) for entry in value)
            allowed = f"a list, each entry {KINDS[kind]}"
        else:
            fits, allowed = _is_a(value, kind), KINDS[kind]
        if not fits:
            raise ValueError(f"`{name}` has to be {allowed}, got {value!r}.")


def _is_a(value: Any, kind: type) -> bool:
    if kind in (int, float):
        wide = int if kind is int else (int, float)
        fits = isinstance(value, wide) and not isinstance(value, bool)
        return fits and (isinstance(value, int) or math.isfinite(value))
    return isinstance(value, kind)


@dataclass
class TrainingArguments(BaseTrainingArguments):
    """Settings of the training of a model.

    Every field is described by `python -m mar_hf.training --help`. The defaults are the recipe of a model of size
    `base` on pixels of 32 x 32; `model_config` makes it smaller. JSON objects may be given as dictionaries, and are
    written as objects in a file of settings.
    """

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
    image_channels: int | None = field(
        default=None,
        metadata={"help": "of the pictures: 1 grey, 3 colours, 4 with transparency; default: the tokenizer's, or 3"},
    )

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
    distill_head: bool = field(
        default=False,
        metadata={
            "help": "train the head of `model_config` on what the pipeline's own head draws; the backbone stays"
        },
    )
    distill_images: int = field(default=2048, metadata={"help": "pictures that are drawn for it, once"})
    lora_rank: int | None = field(default=None, metadata={"help": "train low-rank updates of all linear layers only"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "save memory, recompute activations"})

    max_train_steps: int = field(default=5000, metadata={"help": "optimizer steps"})
    learning_rate: float = field(default=1e-4, metadata={"help": "after the warm-up"})
    scale_lr: bool = field(default=False, metadata={"help": "the learning rate is meant for 256 pictures a step"})
    lr_scheduler: str = field(default="constant_with_warmup", metadata={"help": "a name of diffusers' schedulers"})
    adam_beta1: float = field(default=0.9, metadata={"help": "of AdamW"})
    adam_beta2: float = field(default=0.95, metadata={"help": "of AdamW"})
    adam_weight_decay: float = field(default=0.02, metadata={"help": "not for biases, norms and the head"})
    max_grad_norm: float = field(default=3.0, metadata={"help": "gradients are clipped to this norm"})
    ema_decay: float = field(default=0.9999, metadata={"help": "of the averaged weights; at most (1 + n) / (10 + n)"})
    mask_ratio_per_process: bool = field(
        default=False,
        metadata={"help": "every process draws its masking ratio, as the original; default: one a batch for all"},
    )
    allow_tf32: bool = field(default=False, metadata={"help": "quicker float32 products on NVIDIA GPUs"})

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

    at_least: ClassVar[dict[str, float]] = {
        **BaseTrainingArguments.at_least,
        **{name: 1 for name in ("validation_steps", "validation_images", "resolution", "patch_size", "lora_rank")},
        "distill_images": 1,
        **{name: 0 for name in ("random_shift", "adam_weight_decay", "max_timestep")},
    }
    above_zero: ClassVar[tuple[str, ...]] = ("max_grad_norm",)
    below_one: ClassVar[tuple[str, ...]] = ("adam_beta1", "adam_beta2", "ema_decay")

    def __post_init__(self) -> None:
        for name in ("model_config", "generation_defaults"):
            if isinstance(getattr(self, name), dict):
                setattr(self, name, json.dumps(getattr(self, name)))
        super().__post_init__()
        look_up(LR_SCHEDULERS, self.lr_scheduler, "lr_scheduler")
        if self.image_channels is not None:
            check_channels(self.image_channels)
        for name in ("model_config", "generation_defaults"):
            if getattr(self, name) is None:
                continue
            try:
                settings = json.loads(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"`{name}` has to be a JSON object: {error}") from error
            if not isinstance(settings, dict):
                raise ValueError(f"`{name}` has to be a JSON object, got {settings!r}.")
        defaults = json.loads(self.generation_defaults or "{}")
        build_settings({name: value for name, value in defaults.items() if value is not None})
        check_templates(self.caption_templates)
        if self.pretrained_model_name_or_path and json.loads(self.model_config).keys() & {"preset", "model_type"}:
            raise ValueError("`model_config` can't change `preset` or `model_type` of a pretrained model.")
        if self.distill_head:
            self.check_distillation()
        if self.push_to_hub and self.hub_token and "wandb" in self.report_to:
            raise ValueError("`hub_token` would be logged by wandb; use `hf auth login`.")

    def check_distillation(self) -> None:
        """Refuse settings that do not go with `distill_head`.

        Raises:
            ValueError: if there is no pipeline or no head, or the backbone would be changed.
        """
        if self.pretrained_model_name_or_path is None:
            raise ValueError("`distill_head` needs `pretrained_model_name_or_path`, whose head is the teacher.")
        if self.lora_rank is not None:
            raise ValueError(f"`lora_rank` has to be left out with `distill_head`, got {self.lora_rank}.")
        settings = json.loads(self.model_config)
        if "head_type" not in settings or settings.keys() - {"head_type", "head_config", "head_batch_multiplier"}:
            raise ValueError(
                "`model_config` has to name `head_type`, and may have `head_config` and `head_batch_multiplier`, with "
                f"`distill_head`, got {settings}."
            )


@dataclass
class TokenizerTrainingArguments(BaseTrainingArguments):
    """Settings of the training of an image tokenizer.

    Every field is described by `python -m mar_hf.training tokenizer --help`.
    """

    output_dir: str = field(metadata={"help": "where the image tokenizer goes"})
    train_data_dir: str | None = field(
        default=None, metadata={"help": "image folder, parquet folder or saved dataset"}
    )
    validation_data_dir: str | None = field(
        default=None,
        metadata={"help": "for the PSNR; default: `validation` or `test` in the data, else the data"},
    )
    resolution: int = field(default=32, metadata={"help": "side of the pictures in pixels"})
    random_flip: bool = field(default=False, metadata={"help": "mirror half of the pictures"})
    random_shift: int = field(default=0, metadata={"help": "shift pictures by up to so many pixels"})

    image_channels: int = field(
        default=3, metadata={"help": "of the pictures: 1 grey, 3 colours, 4 with transparency"}
    )
    autoencoder: str = field(default="kl", metadata={"help": "kl, dc or vq"})
    block_out_channels: list[int] = field(
        default_factory=lambda: [32, 64, 128], metadata={"help": "channels at each resolution, halved between them"}
    )
    layers_per_block: list[int] = field(
        default_factory=lambda: [1],
        metadata={"help": "residual blocks: one number, or (dc) one a resolution"},
    )
    latent_channels: int = field(default=8, metadata={"help": "channels of the latent grid"})
    latent_noise: float = field(default=0.3, metadata={"help": "deviation of the dc autoencoder's posterior"})

    num_codes: int = field(default=256, metadata={"help": "vectors of the vq autoencoder's codebook"})
    code_restart_steps: int = field(default=20, metadata={"help": "codes not used for so many steps start anew"})
    quantize: bool = field(
        default=False, metadata={"help": "tokens are vectors of the codebook; default: latents before quantisation"}
    )

    kl_weight: float = field(default=3e-3, metadata={"help": "weight of the posterior's divergence from N(0, 1)"})
    perceptual_weight: float = field(default=0.0, metadata={"help": "weight of the distance in features"})
    perceptual_weights: str | None = field(
        default=None, metadata={"help": "TorchScript file of features; default: EfficientNet-Lite0, if installed"}
    )
    discriminator_start: int | None = field(
        default=None, metadata={"help": "step from which a discriminator takes part; default: never"}
    )
    discriminator_weight: float = field(
        default=0.5, metadata={"help": "its gradient at the last layer, against that of all other terms"}
    )

    lr_warmup_steps: int = field(default=50, metadata={"help": "steps of linear warm-up"})
    ema_decay: float = field(default=0.999, metadata={"help": "decay of the averaged weights, which are saved"})
    validation_steps: int = field(default=500, metadata={"help": "steps between reconstructions"})

    at_least: ClassVar[dict[str, float]] = {
        **BaseTrainingArguments.at_least,
        **{name: 1 for name in ("validation_steps", "num_codes", "code_restart_steps", "resolution")},
        **{name: 1 for name in ("latent_channels",)},
        **{name: 0 for name in ("random_shift", "kl_weight", "perceptual_weight", "discriminator_weight")},
        **{name: 0 for name in ("discriminator_start",)},
    }
    below_one: ClassVar[tuple[str, ...]] = ("ema_decay",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_channels(self.image_channels)
        if self.autoencoder not in ("kl", "dc", "vq"):
            raise ValueError(f"`autoencoder` has to be kl, dc or vq, got {self.autoencoder!r}.")
        if self.autoencoder == "dc" and not self.latent_noise > 0:
            raise ValueError(f"`latent_noise` has to be above 0 for `autoencoder` dc, got {self.latent_noise}.")
        if self.quantize and self.autoencoder != "vq":
            raise ValueError(f"`quantize` goes with `autoencoder` vq only, got {self.autoencoder!r}.")
        levels, layers = len(self.block_out_channels), self.layers_per_block
        if not levels or min(self.block_out_channels) < 1:
            raise ValueError(f"`block_out_channels` has to hold numbers from 1 on, got {self.block_out_channels}.")
        if len(layers) != (levels if self.autoencoder == "dc" else 1) or min(layers) < 0:
            raise ValueError(
                f"`layers_per_block` has to be one number (kl, vq) or one a resolution (dc), got {layers}."
            )
        if self.resolution % 2 ** (levels - 1):
            raise ValueError(f"`resolution` has to be a multiple of {2 ** (levels - 1)}, got {self.resolution}.")
        if self.perceptual_weights is not None and not self.perceptual_weight:
            raise ValueError("`perceptual_weights` is used with a `perceptual_weight` above 0 only.")
        precision = self.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
        if self.discriminator_start is not None and precision == "fp16":
            # Accelerate has one loss scale, and changes it between the two optimizers' steps.
            raise ValueError("`mixed_precision` fp16 does not go with a discriminator: use bf16 or no.")


@dataclass
class TextEncoderTrainingArguments(BaseTrainingArguments):
    """Settings of the training of a text encoder.

    Every field is described by `python -m mar_hf.training text_encoder --help`.
    """

    output_dir: str = field(metadata={"help": "a new folder, for the text encoder and its tokenizer"})
    train_data_dir: str | None = field(
        default=None, metadata={"help": "captioned image folder, or a text file with one caption a line"}
    )
    caption_column: str = field(default="text", metadata={"help": "column of the captions"})
    caption_templates: list[str] = field(
        default_factory=lambda: ["{}"],
        metadata={"help": 'what captions are put into, one at random: "{}" "an emoji of {}" "{label}: {}"'},
    )
    vocab_size: int = field(default=1000, metadata={"help": "pieces at most; few captions give fewer"})

    hidden_size: int = field(default=128, metadata={"help": "width of the encoder's states"})
    num_layers: int = field(default=3, metadata={"help": "layers of the encoder"})
    num_attention_heads: int = field(default=4, metadata={"help": "attention heads"})
    dropout: float = field(default=0.1, metadata={"help": "dropout of the model"})
    token_dropout: float = field(default=0.15, metadata={"help": "share of the pieces read that are left out"})

    learning_rate: float = field(default=2e-3, metadata={"help": "peak of the cosine schedule"})
    checkpointing_steps: int | None = field(
        default=None, metadata={"help": "optimizer steps between checkpoints; default: none are written"}
    )

    at_least: ClassVar[dict[str, float]] = {
        **BaseTrainingArguments.at_least,
        **{"num_layers": 1, "hidden_size": 1, "vocab_size": 10},
    }
    below_one: ClassVar[tuple[str, ...]] = ("dropout", "token_dropout")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` {self.hidden_size} has to be a multiple of `num_attention_heads` "
                f"{self.num_attention_heads}."
            )
        check_templates(self.caption_templates)


class Parser(HfArgumentParser):
    """A command line whose faults are errors like others."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Args:
            message (`str`): what is wrong with it.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{message} (see --help)")


def parse_arguments(cls: type[Settings], argv: Sequence[str] | None = None) -> Settings:
    """Settings from a file and the command line, which has the last word.

    Args:
        cls (`type`): a dataclass of settings.
        argv (`Sequence[str]`, *optional*): words of the command line; None takes the program's own. `--config FILE`
            names a JSON or YAML file of settings; objects in it are handed on as JSON.

    Returns:
        An instance of `cls`.

    Raises:
        ValueError: if the file can't be read as settings or holds unknown ones, or an option is missing, unknown or
            of another type.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    source = Parser([], add_help=False, allow_abbrev=False)
    source.add_argument("--config", metavar="FILE", help="JSON or YAML file; the command line overrides it")
    path, words = source.parse_known_args(argv)
    parser = Parser(cls, parents=[source], allow_abbrev=False)
    if path.config is not None:
        words = [*_words_of_file(path.config, {field.name for field in dataclasses.fields(cls)}), *words]
    settings, *_, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if unknown:
        known = [f"--{field.name}" for field in dataclasses.fields(cls)]
        close = [f"did you mean {name}?" for name in difflib.get_close_matches(unknown[0], known, 1)]
        parser.error(" ".join([f"unknown options {unknown}", *close]))
    return settings


def _words_of_file(path: str, known: set[str]) -> list[str]:
    try:
        # Every JSON file is a YAML file, but for numbers as 1e-4, which YAML 1.1 takes for strings.
        text = pathlib.Path(path).read_text(encoding="utf-8")
        settings = json.loads(text) if path.endswith(".json") else _load_yaml(text)
    except (OSError, ValueError, RecursionError) as error:
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


def _load_yaml(text: str) -> Any:
    yaml = import_extra("yaml", "train")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
