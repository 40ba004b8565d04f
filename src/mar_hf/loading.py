# SPDX-License-Identifier: Apache-2.0
"""Loading that refuses broken checkpoints instead of filling gaps with random numbers."""

import pathlib
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open


class StrictLoadingMixin:
    """A `from_pretrained` that raises when a checkpoint does not hold exactly the model's tensors.

    transformers only reports missing and unexpected tensors; a picture model with a random layer, or with one layer
    less, still makes pictures, so here they are errors. Put before `PreTrainedModel` in the bases.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        *model_args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a model, as `PreTrainedModel.from_pretrained` does, and check that it is whole.

        Args:
            pretrained_model_name_or_path (`str`): a folder or a hub id.
            model_args (`Any`): passed on.
            output_loading_info (`bool`, *optional*, defaults to `False`): also return transformers' loading report.
            ignore_mismatched_sizes (`bool`, *optional*, defaults to `False`): initialise tensors that are missing or
                of another shape, and leave out those that have no place, instead of raising (fine-tuning with another
                number of classes).
            kwargs (`Any`): passed on (`dtype`, `device_map`, `subfolder`, `variant`, `revision`, ...).

        Returns:
            the model in eval mode, or the model and the report.

        Raises:
            ValueError: if a weight file is truncated, or tensors are missing, of the wrong shape or left over, or the
                configuration is wrong; names file and tensors.
            OSError: if there is no configuration or no weight file.
        """
        folder = pathlib.Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        # Without this file transformers goes on with the defaults of the configuration.
        if folder.is_dir() and "config" not in kwargs and not (folder / "config.json").exists():
            raise OSError(f"{folder / 'config.json'} is missing.")
        try:
            model, report = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kwargs,
            )
        except SafetensorError as error:
            raise ValueError(f"{_broken_file(folder)} is truncated or not a safetensors file: {error}") from error
        except (StrictDataclassError, ValueError) as error:
            raise ValueError(f"{folder} can't be loaded as {cls.__name__}: {error}") from error
        problems = []
        if not ignore_mismatched_sizes:
            problems = [f"{name} is missing" for name in sorted(report["missing_keys"])]
            problems += [f"{key} is {tuple(a)}, not {tuple(b)}" for key, a, b in sorted(report["mismatched_keys"])]
            problems += [f"{name} has no place" for name in sorted(report["unexpected_keys"])]
        if problems:
            shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
            raise ValueError(f"The weights in {folder} do not fit {cls.__name__} and its config.json: {shown}.")
        return (model, report) if output_loading_info else model


def _broken_file(folder: pathlib.Path) -> str:
    """The first safetensors file of a folder that can't be opened, else the folder."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                continue
        except SafetensorError:
            return str(path)
    return str(folder)
