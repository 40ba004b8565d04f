# SPDX-License-Identifier: Apache-2.0
"""What the card of a trained model says of its training."""

import os
from dataclasses import asdict
from typing import Any

from .arguments import TrainingArguments
from .run_checkpoints import Progress


# Where something lay, and whose it is, tells nobody else anything.
PRIVATE = {
    *("output_dir", "train_data_dir", "hub_model_id", "hub_token", "push_to_hub", "resume_from_checkpoint"),
}


def settings_table(args: TrainingArguments, changes: list[list[Any]]) -> str:
    """The settings that are not the default ones, or were not all the time.

    Args:
        args (`TrainingArguments`): settings of the run.
        changes (`list`): see `Progress`.

    Returns:
        `str`: a table in Markdown. Paths on this machine are left out; hub ids are not.
    """
    defaults = type(args)(output_dir="")
    rows = []
    for name, value in asdict(args).items():
        earlier = "".join(f"`{old}` until step {step}, " for step, changed, old in changes if changed == name)
        if name in PRIVATE or (value == getattr(defaults, name) and not earlier):
            continue
        if not (isinstance(value, str) and os.path.exists(value)):
            rows.append(f"| {name} | {earlier}{'then ' if earlier else ''}`{value}` |\n")
    return f"| setting | value |\n|---|---|\n{''.join(rows)}"


def describe_training(args: TrainingArguments, num_params: int, num_processes: int, progress: Progress) -> str:
    """What was trained, on how much, how far.

    Args:
        args (`TrainingArguments`): settings of the run.
        num_params (`int`): parameters of the model.
        num_processes (`int`): of the run.
        progress (`Progress`): how far it is, and what was changed on the way.

    Returns:
        `str`: Markdown, for `build_model_card`.
    """
    row = progress.history[-1]
    batch = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    return (
        f"{num_params / 1e6:.1f} million parameters, trained with `mar_hf.training` on {progress.num_examples} "
        f"examples for {row['step']} steps of {batch} pictures of {args.resolution} x {args.resolution} pixels. Loss "
        f"{row['loss']:.4f}; of the averaged weights, which these are, {row['validation_loss']:.4f}.\n\n"
        f"![samples](samples.png)\n\n![loss](loss.png)\n\n## Training\n\n{settings_table(args, progress.changes)}"
    )
