# SPDX-License-Identifier: Apache-2.0
"""Settings of the trainings, and those that are refused."""

import math

import pytest
from diffusers.optimization import TYPE_TO_SCHEDULER_FUNCTION

import mar_hf_settings
from mar_hf.evaluation import sampling
from mar_hf.tokenizers import NORMALIZERS
from mar_hf.training import (
    LatentCacheArguments,
    TextEncoderTrainingArguments,
    TokenizerTrainingArguments,
    TrainingArguments,
    arguments,
    latent_data,
    parse_arguments,
    picture_modes,
)
from mar_hf.training.programs import TRAINERS


KINDS = [TrainingArguments, TokenizerTrainingArguments, TextEncoderTrainingArguments]


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_allowed(kind):
    args = kind("out")
    assert args.output_dir == "out" and args.train_data_dir is None
    assert parse_arguments(kind, ["--output_dir", "out"]) == args


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_train_steps", 0, "has to be at least 1, got 0"),
        ("max_train_steps", 2.5, "has to be a whole number, got 2.5"),
        ("max_train_steps", True, "has to be a whole number, got True"),
        ("train_batch_size", "4", "has to be a whole number, got '4'"),
        ("learning_rate", math.nan, "has to be a finite number, got nan"),
        ("learning_rate", math.inf, "has to be a finite number, got inf"),
        ("learning_rate", -1e-3, "has to be at least 0, got -0.001"),
        ("learning_rate", True, "has to be a finite number, got True"),
        ("seed", 10**400, r"has to be below 2\*\*32, got 1000"),
        ("lr_warmup_steps", -1, "has to be at least 0, got -1"),
        ("seed", -1, "has to be at least 0, got -1"),
        ("seed", 2**32, r"has to be below 2\*\*32, got 4294967296"),
        ("output_dir", None, "has to be a text, got None"),
        ("resume_from_checkpoint", 3, "has to be a text, got 3"),
        ("mixed_precision", "bf17", "has to be one of"),
        ("checkpoints_total_limit", 0, "has to be at least 1, got 0"),
    ],
)
def test_wrong_settings_of_every_training(kind, name, value, message):
    with pytest.raises(ValueError, match=f"`{name}` {message}"):
        kind(**{"output_dir": "out", name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_grad_norm", -1.0, "has to be above 0, got -1.0"),
        ("max_grad_norm", 0.0, "has to be above 0, got 0.0"),
        ("max_grad_norm", math.nan, "has to be a finite number, got nan"),
        ("lr_scheduler", "", "has to be one of"),
        ("lr_scheduler", "piecewise_constant", "has to be one of"),
        ("adam_beta1", 1.0, r"has to lie in \[0, 1\), got 1.0"),
        ("ema_decay", -0.1, r"has to lie in \[0, 1\), got -0.1"),
        ("lora_rank", 0, "has to be at least 1, got 0"),
        ("random_shift", -1, "has to be at least 0, got -1"),
        ("generation_defaults", '{"temprature": 1}', "has to be one of .*, got 'temprature'"),
        ("generation_defaults", '{"temperature": "x"}', "of the pipeline: `temperature` has to be a finite number"),
        ("generation_defaults", '{"num_inference_steps": 0}', "of the pipeline: `num_inference_steps` has to"),
        ("random_flip", 1, "has to be true or false, got 1"),
        ("caption_templates", "{}", "has to be a list, each entry a text"),
        ("model_config", ["{}"], "has to be a text"),
    ],
)
def test_wrong_settings_of_a_model(name, value, message):
    with pytest.raises(ValueError, match=f"`{name}` {message}"):
        TrainingArguments("out", **{name: value})


def test_objects_may_be_dictionaries():
    args = TrainingArguments("out", model_config={"hidden_size": 32}, generation_defaults={"temperature": 0.9})
    assert (args.model_config, args.generation_defaults) == ('{"hidden_size": 32}', '{"temperature": 0.9}')


def test_the_token_is_not_given_to_a_tracker():
    with pytest.raises(ValueError, match="`hub_token` would be logged by wandb"):
        TrainingArguments("out", push_to_hub=True, hub_token="secret", report_to="tensorboard,wandb")


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("channels", [0, 5, -1])
def test_channels_that_no_picture_has(kind, channels):
    with pytest.raises(ValueError, match=rf"`image_channels` has to be one of \[1, 2, 3, 4\], got {channels}"):
        kind("out", image_channels=channels)


def test_a_default_may_be_taken_away():
    assert TrainingArguments("out", generation_defaults='{"temperature": null}').generation_defaults


@pytest.mark.parametrize("templates", [[], ["no place"], ["{} {name}"], ["{0} {1}"], ["{"]])
def test_wrong_templates_are_refused(templates):
    for kind in (TrainingArguments, TextEncoderTrainingArguments):
        with pytest.raises(ValueError, match="`caption_templates` has to hold texts with {} for the caption"):
            kind("out", caption_templates=templates)
    assert TrainingArguments("out", caption_templates=["{}", "{label}: {}"])


def test_names_are_those_of_what_is_imported_later():
    # The one that is left out needs more than numbers of steps.
    assert {*arguments.NORMALIZERS} == {*NORMALIZERS}
    assert {*arguments.LR_SCHEDULERS, "piecewise_constant"} == {kind.value for kind in TYPE_TO_SCHEDULER_FUNCTION}
    assert arguments.CHANNELS == tuple(picture_modes.CHANNELS)
    assert set(mar_hf_settings.DTYPES) == set(sampling.DTYPES) == set(latent_data.DTYPES)
    own = {name: trainer.arguments_class for name, trainer in TRAINERS.items()}
    assert arguments.PROGRAMS == {**own, "latents": LatentCacheArguments}
