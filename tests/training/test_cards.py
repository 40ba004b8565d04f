# SPDX-License-Identifier: Apache-2.0
"""What a card says of the training."""

from mar_hf.training import TrainingArguments
from mar_hf.training.cards import describe_training, settings_table
from mar_hf.training.checkpoints import Progress


def test_settings_that_are_not_the_default_ones_are_told(tmp_path):
    args = TrainingArguments(
        str(tmp_path),
        str(tmp_path),
        seed=3,
        pretrained_tokenizer=str(tmp_path),
        pretrained_text_encoder="org/text",
        hub_token="secret",
    )
    table = settings_table(args, [])
    assert table.splitlines()[2:] == ["| seed | `3` |", "| pretrained_text_encoder | `org/text` |"]


def test_settings_that_were_changed_are_told_with_their_steps():
    args = TrainingArguments("out", learning_rate=1e-5)
    changes = [[2, "learning_rate", 1e-2], [4, "learning_rate", 1e-3], [4, "ema_decay", 0.9]]
    assert settings_table(args, changes).splitlines()[2:] == [
        "| learning_rate | `0.01` until step 2, `0.001` until step 4, then `1e-05` |",
        "| ema_decay | `0.9` until step 4, then `0.9999` |",
    ]


def test_the_description_tells_how_far_it_is():
    progress = Progress(15, 0)
    progress.history = [{"step": 8, "loss": 1.25, "validation_loss": 1.5}]
    args = TrainingArguments("out", train_batch_size=3, gradient_accumulation_steps=2)
    said = describe_training(args, 1_234_567, 2, progress)
    assert said.startswith("1.2 million parameters, trained with `mar_hf.training` on 15 examples for 8 steps of 12 ")
    assert "Loss 1.2500; of the averaged weights, which these are, 1.5000." in said
