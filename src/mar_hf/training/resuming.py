# SPDX-License-Identifier: Apache-2.0
"""What a run that goes on from a checkpoint does with settings and data that are others than at its start.

Weights, averages, the optimizer's moments, the place in the data and all random states are the checkpoint's. Of the
settings, each is in one of the three groups of [`RULES`].
"""

import hashlib
import json
import os
import pathlib
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel

from ..tokenizers import ImageTokenizer
from .arguments import BaseTrainingArguments


REFUSED = "refused"  # it would be another model, or another order of examples
NOTED = "noted"  # the new value holds from here on, and the card tells both
FREE = "free"  # the new value holds: it has no effect on what is learned

RULES = {
    **dict.fromkeys(
        (
            *("seed", "model_config", "lora_rank", "pretrained_model_name_or_path", "ignore_classes"),
            *("distill_head", "distill_images"),
            *("resolution", "patch_size", "image_channels", "caption_templates"),
            *("autoencoder", "block_out_channels", "layers_per_block", "latent_channels", "num_codes"),
            *("discriminator_start", "vocab_size", "hidden_size", "num_layers", "num_attention_heads"),
        ),
        REFUSED,
    ),
    **dict.fromkeys(
        (
            *("learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps", "max_train_steps"),
            *("train_batch_size", "gradient_accumulation_steps", "mixed_precision", "mask_ratio_per_process"),
            *("adam_beta1", "adam_beta2", "adam_weight_decay", "max_grad_norm", "ema_decay"),
            *("random_flip", "random_shift", "latent_noise", "code_restart_steps", "kl_weight"),
            *("perceptual_weight", "perceptual_weights", "discriminator_weight", "dropout", "token_dropout"),
        ),
        NOTED,
    ),
    **dict.fromkeys(
        (
            *("output_dir", "train_data_dir", "validation_data_dir", "caption_column"),
            *("pretrained_tokenizer", "pretrained_text_encoder", "quantize"),
            *("gradient_checkpointing", "allow_tf32", "dataloader_num_workers"),
            *("logging_steps", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"),
            *("validation_steps", "validation_images", "max_timestep", "generation_defaults"),
            *("report_to", "push_to_hub", "hub_model_id", "hub_token"),
        ),
        FREE,
    ),
}
# Schedules that do not look at the end of the run.
ENDLESS = ("constant", "constant_with_warmup")


def remembered_settings(args: BaseTrainingArguments) -> dict[str, Any]:
    """The settings that a checkpoint keeps, to compare them.

    Args:
        args (`BaseTrainingArguments`): of the run.

    Returns:
        `dict[str, Any]`: those with an effect on what is learned.
    """
    kept = {name: value for name, value in asdict(args).items() if RULES[name] != FREE}
    if kept.get("lr_scheduler") in ENDLESS:
        del kept["max_train_steps"]
    if "model_config" in kept:
        kept["model_config"] = json.loads(kept["model_config"])
    return kept


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What is another setting than before.

    Args:
        old (`dict[str, Any]`): `remembered_settings` of the checkpoint.
        new (`dict[str, Any]`): those of the run that goes on.

    Returns:
        `dict[str, tuple]`: name -> (old, new), of settings that both have.

    Raises:
        ValueError: if one of them can't be changed; names all of these.
    """
    changed = {name: (old[name], new[name]) for name in old if name in new and old[name] != new[name]}
    if refused := [name for name in changed if RULES[name] == REFUSED]:
        listed = ", ".join(f"`{name}` {changed[name][0]!r}, got {changed[name][1]!r}" for name in refused)
        raise ValueError(
            f"The checkpoint was trained with {listed}. Start a new run for that, in another `output_dir`."
        )
    return changed


def check_data(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse to go on with other data.

    Args:
        old (`dict[str, Any]`): fingerprints of the checkpoint's data, by name.
        new (`dict[str, Any]`): those of the data now.

    Raises:
        ValueError: if any differs; names them, the classes one by one.
    """
    other = [name for name in old if name in new and old[name] != new[name]]
    if other:
        said = f"{' and '.join(other)} are not those that the checkpoint was trained on"
        if "classes" in other:
            said += f": {old['classes']}, now {new['classes']}"
        raise ValueError(f"The data has changed: {said}. Fine-tune its pipeline instead.")


def fingerprint(values: Any) -> str:
    """A short digest of what JSON can hold.

    Args:
        values (`Any`): lists, dictionaries, numbers and texts.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def fingerprint_pictures(dataset: Any, root: str) -> dict[str, Any]:
    """Classes, pictures and captions of a data set of pictures, which are not read themselves.

    Args:
        dataset (`datasets.Dataset`): what `load_image_dataset` returned.
        root (`str`): the folder: moved pictures are the same.

    Returns:
        `dict[str, Any]`: `classes` as they are, and digests of `pictures` and `captions`.
    """
    table, root = dataset.data, os.path.realpath(root)
    paths = [path for chunk in table.column("image").chunks for path in chunk.field("path").to_pylist()]
    names = [os.path.relpath(path, root) if path and os.path.isabs(path) else path for path in paths]
    labels = table.column("label").to_pylist() if "label" in table.column_names else []
    found = {"pictures": fingerprint([names, labels])}
    if "text" in table.column_names:
        found["captions"] = fingerprint(table.column("text").to_pylist())
    feature = dataset.features.get("label")
    return {"classes": None if feature is None else feature.names, **found}


def fingerprint_latents(dataset: Any) -> dict[str, Any]:
    """The same of cached latents.

    Args:
        dataset (`torch.utils.data.Dataset`): what `load_latents` returned.

    Returns:
        `dict[str, Any]`: `classes` as they are, and a digest of where the latents come from.
    """
    if hasattr(dataset, "index"):
        source = dataset.index.get("source")
    else:
        source = fingerprint([pathlib.Path(file.parent.name, file.name).as_posix() for file in dataset.files])
    return {"classes": dataset.class_names, "latents": source}


def fingerprint_tokenizer(tokenizer: ImageTokenizer) -> str:
    """What tells image tokenizers apart without their weights: the statistics of their latents do.

    Args:
        tokenizer (`ImageTokenizer`): with or without weights.

    Returns:
        `str`: a digest.
    """
    names = ("autoencoder", "patch_size", "normalizer", "shift_factor", "scaling_factor", "quantize")
    return fingerprint([getattr(tokenizer.config, name) for name in names])


def fingerprint_weights(model: PreTrainedModel) -> str:
    """What tells models of the same sizes apart: the first numbers of each tensor.

    Args:
        model (`PreTrainedModel`): with weights.

    Returns:
        `str`: a digest.
    """
    state = sorted(model.state_dict().items())
    return fingerprint([[name, tensor.flatten()[:16].to("cpu", torch.float64).tolist()] for name, tensor in state])
