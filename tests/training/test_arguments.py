# SPDX-License-Identifier: Apache-2.0
"""Settings from files and the command line, and those that are refused."""

import math
from dataclasses import dataclass, field

import pytest

from mar_hf.training import (
    TextEncoderTrainingArguments,
    TokenizerTrainingArguments,
    TrainingArguments,
    parse_arguments,
)


KINDS = [TrainingArguments, TokenizerTrainingArguments, TextEncoderTrainingArguments]


@dataclass
class Settings:
    data: str = field(metadata={"help": "where"})
    rate: float = field(default=0.5, metadata={"help": "how much"})
    sizes: list[int] = field(default_factory=lambda: [1], metadata={"help": "how large"})
    flip: bool = field(default=False, metadata={"help": "whether"})
    extra: str = field(default="{}", metadata={"help": "JSON"})
    name: str | None = field(default=None, metadata={"help": "which"})


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("s.json", '{"data": "d", "rate": 1e-3, "sizes": [2, 3], "flip": true, "extra": {"a": [1]}, "name": null}'),
        ("s.yaml", "data: d\nrate: 1e-3\nsizes: [2, 3]\nflip: true\nextra: {a: [1]}\n"),
    ],
)
def test_settings_come_from_a_file_and_the_command_line_overrides_it(tmp_path, name, text):
    config = write(tmp_path / name, text)
    settings = parse_arguments(Settings, ["--config", config, "--rate", "2"])
    assert settings == Settings("d", 2.0, [2, 3], True, '{"a": [1]}', None)
    assert parse_arguments(Settings, ["--data", "e", "--config", config, "--flip", "false"]).data == "e"
    assert parse_arguments(Settings, ["--data", "x"]) == Settings("x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": "d", "speed": 1}', r"unknown settings \['speed'\]; known are \['data', "),
        ('["data"]', "unknown settings list"),
        ('{"data": ', "can't be read"),
    ],
)
def test_a_wrong_file_of_settings_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(Settings, ["--config", write(tmp_path / "s.json", text)])
    with pytest.raises(ValueError, match="`config` 'nowhere.json' can't be read"):
        parse_arguments(Settings, ["--config", "nowhere.json"])


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
    with pytest.raises(ValueError, match=rf"with 1, 2, 3 or 4 channels, not with {channels} \(`image_channels`\)"):
        kind("out", image_channels=channels)


def test_a_default_may_be_taken_away():
    assert TrainingArguments("out", generation_defaults='{"temperature": null}').generation_defaults
