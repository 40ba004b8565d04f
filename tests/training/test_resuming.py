# SPDX-License-Identifier: Apache-2.0
"""What a run that goes on takes from the settings, what it refuses, and what the card then says."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from test_trainer import run, write_pictures

from example_runs import SIZES
from mar_hf import MARPipeline
from mar_hf.training import TextEncoderTrainingArguments, TokenizerTrainingArguments, TrainingArguments
from mar_hf.training.resuming import FREE, NOTED, REFUSED, RULES, check_data, remembered_settings


KINDS = [TrainingArguments, TokenizerTrainingArguments, TextEncoderTrainingArguments]
OTHER = {
    "seed": 1,
    "model_config": json.dumps({**SIZES, "hidden_size": 32}),
    "lora_rank": 2,
    "ignore_classes": True,
    "caption_templates": ["a {}"],
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), ["cat", "dog", "owl"], 5)


@pytest.fixture
def begun(pictures, tmp_path):
    """A run of two steps, of the four that it was to make."""
    return run(pictures, tmp_path / "run", max_train_steps=2, checkpointing_steps=2)


def test_every_setting_has_its_rule():
    settings = {field.name for kind in KINDS for field in dataclasses.fields(kind)}
    assert settings == RULES.keys()
    assert set(RULES.values()) == {FREE, NOTED, REFUSED}


def test_a_new_learning_rate_is_taken_and_told(begun, pictures, caplog):
    run(pictures, begun, resume_from_checkpoint="latest", learning_rate=1e-5, adam_beta2=0.99, logging_steps=2)
    assert "`learning_rate` 1e-05 instead of 0.01, `adam_beta2` 0.99 instead of 0.95" in caplog.text
    assert "logging_steps" not in caplog.text
    with open(begun / "loss.csv", newline="", encoding="utf-8") as file:
        rates = [float(row["learning_rate"]) for row in csv.DictReader(file)]
    assert rates == [5e-3, 1e-2, 1e-5]
    card = (begun / "pipeline" / "README.md").read_text(encoding="utf-8")
    assert "| learning_rate | `0.01` until step 2, then `1e-05` |" in card
    groups = torch.load(begun / "checkpoint-4" / "optimizer.bin", weights_only=True)["param_groups"]
    assert all(group["betas"][1] == 0.99 and group["lr"] == 1e-5 for group in groups)


@pytest.mark.parametrize("name", OTHER)
def test_what_would_be_another_run_is_refused(begun, pictures, name):
    before = sorted(path.name for path in begun.iterdir())
    with pytest.raises(ValueError, match=f"was trained with `{name}` "):
        run(pictures, begun, resume_from_checkpoint="latest", **{name: OTHER[name]})
    assert sorted(path.name for path in begun.iterdir()) == before


def test_a_class_of_another_name_is_refused(begun, pictures, tmp_path):
    data = Path(write_pictures(tmp_path / "data", ["cat", "dog", "owl"], 5))
    (data / "dog").rename(data / "wolf")
    message = r"classes and pictures are not those .*: \['cat', 'dog', 'owl'\], now \['cat', 'owl', 'wolf'\]"
    with pytest.raises(ValueError, match=message.replace("classes and pictures", ".*classes.*")):
        run(data, begun, resume_from_checkpoint="latest")
    # Moved as a whole they are the same.
    (data / "wolf").rename(data / "dog")
    run(data, begun, resume_from_checkpoint="latest", max_train_steps=3)
    assert MARPipeline.from_pretrained(begun / "pipeline").labels == {"cat": 0, "dog": 1, "owl": 2}


def test_captions_that_are_others_are_refused():
    old = {"classes": ["a"], "pictures": "1", "captions": "2"}
    check_data(old, {**old})
    with pytest.raises(ValueError, match="captions are not those that the checkpoint was trained on"):
        check_data(old, {**old, "captions": "3"})
    # A checkpoint of an earlier version knows nothing of its data.
    check_data({}, old)


def test_a_longer_run_is_the_same_run_unless_its_schedule_looks_at_the_end():
    constant, cosine = (TrainingArguments("out", lr_scheduler=name) for name in ("constant", "cosine"))
    assert "max_train_steps" not in remembered_settings(constant)
    assert remembered_settings(cosine)["max_train_steps"] == 5000
    assert remembered_settings(TrainingArguments("out", model_config='{"a":1}'))["model_config"] == json.loads(
        '{"a": 1}'
    )
