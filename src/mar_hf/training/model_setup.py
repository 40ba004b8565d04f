# SPDX-License-Identifier: Apache-2.0
"""What a model is trained from: its data, its tokenizers, and its weights, new or those of a pipeline."""

import dataclasses
import json
import pathlib
import re
import warnings
from typing import Any

import torch
from diffusers import SchedulerMixin
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from ..generation import TOKEN_SCHEDULES, expand_decoding
from ..heads import TokenHead
from ..models import BACKBONES, MARConfig, check_text_encoder
from ..pipelines import MARPipeline
from ..schedulers import TokenDDPMScheduler
from ..tokenizers import ImageTokenizer, ImageTokenizerConfig
from ..utils import import_extra, look_up
from .arguments import TrainingArguments
from .image_data import ImageTransform, load_image_dataset
from .latent_data import load_latents


# Parameters that only a model of texts has.
TEXT_PARTS = re.compile(r"\.(text_aligner|context_\w+)\.")


def load_data(args: TrainingArguments, path: str, captions: bool) -> tuple[torch.utils.data.Dataset, list[str] | None]:
    """The examples: pictures, or latents where the folder holds such.

    Args:
        args (`TrainingArguments`): settings.
        path (`str`): the data, of the training or of the validation.
        captions (`bool`): whether pictures come with their captions.

    Returns:
        `torch.utils.data.Dataset`, and the names of its classes, *optional*.

    Raises:
        ValueError: if the data does not fit the settings.
    """
    folder = pathlib.Path(path)
    kinds = ("index.json", "*.npz", "*/*.npz", "*/*/*.npz")
    if any(next(folder.glob(kind), None) for kind in kinds):
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
    names = feature.names if feature is not None and not args.ignore_classes else None
    return dataset.with_transform(ImageTransform(args.resolution, picture_channels(args))), names


def least_label(dataset: torch.utils.data.Dataset) -> int:
    """The first class that is trained: a class may have a name and no pictures.

    Args:
        dataset (`torch.utils.data.Dataset`): pictures or latents with classes.

    Returns:
        `int`: its number.
    """
    if hasattr(dataset, "with_transform"):
        return min(dataset.data.column("label").unique().to_pylist())
    return dataset.least_label()


def text_encoder_source(args: TrainingArguments) -> str | None:
    """Where the text encoder is.

    Args:
        args (`TrainingArguments`): settings.

    Returns:
        `str`, *optional*: folder or hub id; None where nobody names one.
    """
    if args.pretrained_text_encoder is not None or args.pretrained_model_name_or_path is None:
        return args.pretrained_text_encoder
    if json.loads(args.model_config).get("text_dim", "as it is") is None:
        return None
    index = MARPipeline.load_config(args.pretrained_model_name_or_path)
    return args.pretrained_model_name_or_path if (index.get("text_encoder") or [None])[0] else None


def find_text_dim(
    text_encoder: PreTrainedModel | None,
    dataset: torch.utils.data.Dataset,
    validation_dataset: torch.utils.data.Dataset,
) -> int | None:
    """Width of the states that captions have.

    Args:
        text_encoder (`PreTrainedModel`, *optional*): the text encoder.
        dataset (`torch.utils.data.Dataset`): what is trained on.
        validation_dataset (`torch.utils.data.Dataset`): what is measured on.

    Returns:
        `int`, *optional*: None where nothing is trained on captions.

    Raises:
        ValueError: if the cached texts do not fit each other or the text encoder.
    """
    if hasattr(dataset, "with_transform"):
        return None if text_encoder is None else text_encoder.config.hidden_size
    text_dim = dataset.text_dim
    if validation_dataset.text_dim != text_dim:
        raise ValueError("`validation_data_dir` has to hold what `train_data_dir` does: texts or none.")
    if text_encoder is not None and text_dim is None:
        raise ValueError("The cached latents hold no texts: cache them with `--pretrained_text_encoder` as well.")
    if text_encoder is not None:
        check_text_encoder(text_encoder, text_dim)
    return text_dim


def check_text_lengths(dataset: torch.utils.data.Dataset, limit: int) -> None:
    """Refuse cached texts that the model does not take whole: cut states are not those of the cut text.

    Args:
        dataset (`torch.utils.data.Dataset`): cached latents with texts.
        limit (`int`): tokens that the model takes.

    Raises:
        ValueError: if there are any.
    """
    if (longest := dataset.longest_text()) > limit:
        raise ValueError(
            f"The cached texts have up to {longest} tokens, and the model takes {limit}: cache them with "
            f"`--max_sequence_length {limit}`, or set `num_text_tokens` in `model_config`."
        )


def tokenizer_source(args: TrainingArguments) -> tuple[str, str] | None:
    """Where the image tokenizer is.

    Args:
        args (`TrainingArguments`): settings.

    Returns:
        `tuple[str, str]`, *optional*: folder or hub id, and the folder in it; None for pixels.
    """
    if args.pretrained_tokenizer is not None:
        return args.pretrained_tokenizer, ""
    if args.pretrained_model_name_or_path is not None:
        return args.pretrained_model_name_or_path, "vae"
    folder = pathlib.Path(args.train_data_dir, "tokenizer")
    return (str(folder), "") if folder.is_dir() else None


def picture_channels(args: TrainingArguments) -> int:
    """Channels of the pictures: those of the image tokenizer.

    Args:
        args (`TrainingArguments`): settings.

    Returns:
        `int`: 3 where nobody says another number.

    Raises:
        ValueError: if settings and tokenizer do not fit each other.
    """
    source, asked = tokenizer_source(args), args.image_channels
    if source is None:
        return asked or 3
    found = ImageTokenizerConfig.from_pretrained(source[0], subfolder=source[1]).in_channels
    if asked not in (None, found):
        raise ValueError(f"`image_channels` {asked} has to be that of the image tokenizer: {found}.")
    return found


def load_tokenizer(args: TrainingArguments, dataset: torch.utils.data.Dataset, weights: bool) -> ImageTokenizer:
    """The tokenizer of the settings, or pixels of zero mean and unit deviation a channel.

    Args:
        args (`TrainingArguments`): settings.
        dataset (`torch.utils.data.Dataset`): what is trained on.
        weights (`bool`): without them it knows shapes and statistics only, and takes no memory: enough to train on
            cached latents.

    Returns:
        `ImageTokenizer`: without gradients.

    Raises:
        ValueError: if there is none, it is not that of the cached latents, or a channel of the pixels is constant.
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
    return pixel_tokenizer(dataset, args.patch_size)


def pixel_tokenizer(dataset: torch.utils.data.Dataset, patch_size: int) -> ImageTokenizer:
    """A tokenizer that has no autoencoder: pixels of zero mean and unit deviation a channel.

    Args:
        dataset (`torch.utils.data.Dataset`): pictures, of which at most 4,096 are measured.
        patch_size (`int`): pixels along a token's side.

    Returns:
        `ImageTokenizer`.

    Raises:
        ValueError: if a channel is constant.
    """
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:4096]
    moments = []  # of each picture, so that they need not be in memory together: mean and mean square, (2, channels)
    for part in chosen.split(256):
        pictures = torch.stack([row["pixel_values"] for row in dataset.__getitems__(part.tolist())]).double()
        moments.append(torch.stack([pictures.mean((2, 3)), pictures.square().mean((2, 3))], 1))
    mean, square = torch.cat(moments).mean(0)
    std = (square - mean.square()).clamp(min=0).sqrt()
    if not (std > 1e-6).all():
        raise ValueError(f"The pictures' channels have deviations {std.tolist()}: a constant one can't be scaled.")
    config = ImageTokenizerConfig(
        in_channels=len(mean),
        patch_size=patch_size,
        shift_factor=mean.tolist(),
        scaling_factor=(1 / std).tolist(),
    )
    return ImageTokenizer(config).eval()


def check_model_config(args: TrainingArguments) -> None:
    """Refuse what no model can be, before any data is read; what does not fit the data shows later.

    Args:
        args (`TrainingArguments`): settings.

    Raises:
        ValueError: if `model_config` names an unknown backbone, size or setting, or has a value of a wrong type.
    """
    settings = json.loads(args.model_config)
    if args.pretrained_model_name_or_path is not None:
        return  # read into the configuration of the pipeline at once
    config_class = look_up(BACKBONES, settings.pop("model_type", MARConfig.model_type), "model_type")[0]
    preset = settings.pop("preset", "base")
    known = {field.name for field in dataclasses.fields(config_class)}
    if unknown := sorted(settings.keys() - known):
        raise ValueError(f"`model_config` has the unknown settings {unknown}; known are {sorted(known)}.")
    look_up(config_class.presets, preset, "preset")
    try:
        config_class.preset(preset, **settings)
    except (StrictDataclassError, TypeError) as error:
        raise ValueError(f"`model_config` has a value of a wrong type: {error}") from error


def build_model(
    args: TrainingArguments, tokenizer: ImageTokenizer, names: list[str] | None, text_dim: int | None = None
) -> PreTrainedModel:
    """A backbone with its head: with random weights, or those of the pipeline that is fine-tuned.

    Args:
        args (`TrainingArguments`): settings.
        tokenizer (`ImageTokenizer`): for the sizes.
        names (`list[str]`, *optional*): of the classes.
        text_dim (`int`, *optional*): width of the states of texts.

    Returns:
        `PreTrainedModel`: on the CPU.

    Raises:
        ValueError: if the settings do not fit each other.
    """
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


def gets_another_head(args: TrainingArguments) -> bool:
    """Whether a pipeline is fine-tuned with a head of another type, of which only the backbone is kept.

    Args:
        args (`TrainingArguments`): settings.

    Returns:
        `bool`.
    """
    source, head_type = args.pretrained_model_name_or_path, json.loads(args.model_config).get("head_type")
    if source is None or head_type is None:
        return False
    return PreTrainedConfig.get_config_dict(source, subfolder="transformer")[0].get("head_type") != head_type


def fine_tuned_model(args: TrainingArguments, settings: dict, names: list[str] | None) -> PreTrainedModel:
    """The model of a pipeline, with a class table for the new classes: those of the same name and no class stay.

    If the settings ask for another head, it starts anew on the pipeline's backbone.

    Args:
        args (`TrainingArguments`): settings.
        settings (`dict`): `model_config`, read.
        names (`list[str]`, *optional*): of the classes.

    Returns:
        `PreTrainedModel`: in float32, on the CPU.
    """
    source = args.pretrained_model_name_or_path
    index = MARPipeline.load_config(source)
    classes = {model_class.__name__: model_class for _, _, model_class in BACKBONES.values()}
    model_class = look_up(classes, index["transformer"][1], "transformer")
    config = model_class.config_class.from_pretrained(source, subfolder="transformer")
    if gets_another_head(args):
        settings = {"head_config": {}, **settings}
    # Made anew, so that changed settings are checked.
    changed = type(config).from_dict({**config.to_dict(), **settings})
    if (changed.head_type, changed.head_config) == (config.head_type, config.head_config):
        model = load_weights(model_class, source, changed)
    else:
        model = model_class(changed)
        model.model = load_weights(model_class.backbone_class, source, changed)
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
    """Classes of a model. Where there is nothing to tell pictures by, they are one class without a name.

    Args:
        names (`list[str]`, *optional*): of the classes.
        settings (`dict`): of the model.

    Returns:
        `int`: 0 for a model of texts alone.
    """
    return len(names) if names else int(settings.get("text_dim") is None)


def load_weights(model_class: type[PreTrainedModel], source: str, config: PreTrainedConfig) -> PreTrainedModel:
    """A pipeline's model; what attends to texts may be new, and starts as the identity, or be left out.

    Args:
        model_class (`type`): of the model.
        source (`str`): the pipeline, folder or hub id.
        config (`PreTrainedConfig`): what the model is to be.

    Returns:
        `PreTrainedModel`: in float32, on the CPU.

    Raises:
        ValueError: if the weights do not fit the configuration.
    """
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


def add_lora(args: TrainingArguments, model: PreTrainedModel) -> torch.nn.Module:
    """The model with low-rank updates of its linear layers, which are all that is trained beside the class table.

    Args:
        args (`TrainingArguments`): for the rank.
        model (`PreTrainedModel`): the model.

    Returns:
        `torch.nn.Module`: the model itself, without a `lora_rank`.
    """
    if args.lora_rank is None:
        return model
    peft = import_extra("peft", "train")
    config = peft.LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_rank,
        target_modules="all-linear",
        modules_to_save=["class_embedding"],
    )
    return peft.get_peft_model(model, config)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """The original's groups: no decay for vectors and for the head; embeddings are decayed.

    Args:
        model (`torch.nn.Module`): what is trained.
        weight_decay (`float`): of the others.

    Returns:
        `list[dict]`: of AdamW.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = {name: p.ndim > 1 and "head." not in name for name, p in trained}
    return [
        {"params": [p for name, p in trained if decayed[name]], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if not decayed[name]], "weight_decay": 0.0},
    ]


def build_noise_scheduler(args: TrainingArguments, head: TokenHead) -> SchedulerMixin | None:
    """The noise schedule of the loss, and the sampler that is saved.

    Args:
        args (`TrainingArguments`): settings.
        head ([`TokenHead`]): of the model.

    Returns:
        `SchedulerMixin`, *optional*: of the head's class, with the settings of the pipeline that is fine-tuned if that
        has such a one; None where the head needs none.

    Raises:
        ValueError: if `max_timestep` is given for another scheduler than [`TokenDDPMScheduler`].
    """
    kind, source = head.scheduler_class, args.pretrained_model_name_or_path
    if kind is not TokenDDPMScheduler and args.max_timestep is not None:
        raise ValueError(f"`max_timestep` has to be left out: {type(head).__name__} has no such sampler.")
    if kind is None:
        return None
    settings = {}
    if source is not None and MARPipeline.load_config(source)["scheduler"][1] in {kind.__name__, *kind._compatibles}:
        settings = kind.load_config(source, subfolder="scheduler")
    if kind is TokenDDPMScheduler:
        # Young models need the first steps of the sampler left out.
        settings["max_timestep"] = args.max_timestep or settings.get("max_timestep", 950)
    return kind.from_config(settings)


def can_be_guided(config: PreTrainedConfig, names: list[str] | None) -> bool:
    """Whether a model is trained both with and without something to tell pictures by, which guidance compares.

    Args:
        config (`PreTrainedConfig`): of the model.
        names (`list[str]`, *optional*): of the classes.

    Returns:
        `bool`.
    """
    by_text = config.text_dim is not None and config.text_dropout_prob > 0
    return by_text or bool(names and config.class_dropout_prob > 0)


def build_generation_defaults(
    args: TrainingArguments, model: PreTrainedModel, names: list[str] | None
) -> dict[str, Any]:
    """What the saved pipeline does by default; wrong settings are better found now than when it is built.

    Args:
        args (`TrainingArguments`): what they say of it replaces what a pipeline that is fine-tuned has, one by one;
            null takes a default away. Without training for it there is no guidance unless they ask for it.
        model (`PreTrainedModel`): the bare model.
        names (`list[str]`, *optional*): of the classes.

    Returns:
        `dict[str, Any]`: arguments of the pipeline's call.

    Raises:
        ValueError: if the model can't draw in so few steps.
    """
    defaults = {}
    if args.pretrained_model_name_or_path is not None:
        defaults = dict(MARPipeline.load_config(args.pretrained_model_name_or_path)["generation_defaults"] or {})
        of_model = {"generation_order"} if "order" in json.loads(args.model_config) else set()
        if gets_another_head(args):
            of_model |= {"num_diffusion_steps", "head_step_schedule", "temperature", "head_kwargs"}
        defaults = {name: value for name, value in defaults.items() if name not in of_model}
    elif args.generation_defaults is None:
        defaults = {"num_inference_steps": 32, "num_diffusion_steps": 50, "guidance_scale": 3.0}
        # What follows from the model need not be saved.
        defaults = {name: value for name, value in defaults.items() if name not in model.sampling_defaults}
    guided = can_be_guided(model.config, names)
    if not guided:
        defaults.pop("guidance_scale", None)  # of a pipeline that was trained for it, or that of the recipe
    defaults |= expand_decoding(json.loads(args.generation_defaults or "{}"))
    defaults = {name: value for name, value in defaults.items() if value is not None}
    if not guided and defaults.setdefault("guidance_scale", 1.0) != 1.0:
        warnings.warn(
            f"`guidance_scale` {defaults['guidance_scale']} compares with a model without a class or text, which this "
            "training does not train: `class_dropout_prob` or `text_dropout_prob` has to be above 0.",
            stacklevel=2,
        )
    if "num_inference_steps" in defaults:
        defaults["num_inference_steps"] = min(defaults["num_inference_steps"], model.config.num_tokens)
        settings = {"token_schedule": "cosine", **model.sampling_defaults, **expand_decoding(defaults)}
        schedule = look_up(TOKEN_SCHEDULES, settings["token_schedule"], "token_schedule")
        model.check_tokens_per_step(schedule(model.config.num_tokens, settings["num_inference_steps"]))
    return defaults
