# SPDX-License-Identifier: Apache-2.0
"""What the card of a trained model says of its training."""

import os
from dataclasses import asdict

from .arguments import TrainingArguments


# Where something lay, and whose it is, tells nobody else anything.
PRIVATE = {
    *("output_dir", "train_data_dir", "hub_model_id", "hub_token", "push_to_hub", "resume_from_checkpoint"),
}


def settings_table(args: TrainingArguments) -> str:
    """The settings that are not the default ones.

    Args:
        args (`TrainingArguments`): settings of the run.

    Returns:
        `str`: a table in Markdown. Paths on this machine are left out; hub ids are not.
    """
    defaults = type(args)(output_dir="")
    rows = [
        f"| {name} | `{value}` |\n"
        for name, value in asdict(args).items()
        if name not in PRIVATE and value != getattr(defaults, name)
        if not (isinstance(value, str) and os.path.exists(value))
    ]
    return f"| setting | value |\n|---|---|\n{''.join(rows)}"


def describe_training(
    args: TrainingArguments, num_params: int, num_examples: int, num_processes: int, row: dict[str, float]
) -> str:
    """What was trained, on how much, how far.

    Args:
        args (`TrainingArguments`): settings of the run.
        num_params (`int`): parameters of the model.
        num_examples (`int`): of the data.
        num_processes (`int`): of the run.
        row (`dict[str, float]`): the last of the curves.

    Returns:
        `str`: Markdown, for `build_model_card`.
    """
    batch = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    return (
        f"{num_params / 1e6:.1f} million parameters, trained with `mar_hf.training` on {num_examples} examples for "
        f"{row['step']} steps of {batch} pictures of {args.resolution} x {args.resolution} pixels. Loss "
        f"{row['loss']:.4f}; of the averaged weights, which these are, {row['validation_loss']:.4f}.\n\n"
        f"![samples](samples.png)\n\n![loss](loss.png)\n\n## Training\n\n{settings_table(args)}"
    )
