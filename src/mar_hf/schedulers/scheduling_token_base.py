# SPDX-License-Identifier: Apache-2.0
"""What the schedulers of token heads share."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin
from diffusers.utils import BaseOutput

from ..loading import read_json


MOST_TIMESTEPS = 100_000


def as_device(device: str | torch.device | None) -> torch.device:
    """What a caller means by a device.

    Args:
        device (`str` or `torch.device`, *optional*): what the caller gave; None means the CPU.

    Returns:
        `torch.device`.

    Raises:
        ValueError: if there is no such device.
    """
    try:
        return torch.device("cpu" if device is None else device)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"`device` has to be a device of torch, got {device!r}: {error}") from error


@dataclass
class TokenSchedulerOutput(BaseOutput):
    """What `step` returns.

    Args:
        prev_sample (`torch.Tensor`): the sample one step less noisy, of the sample's shape.
        pred_original_sample (`torch.Tensor`): the clean sample as predicted at this step, of the same shape.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class TokenScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler whose configuration holds `num_train_timesteps`, and whose inputs need no scaling."""

    order = 1
    # Deviation of the noise that sampling starts from.
    init_noise_sigma = 1.0

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load the scheduler, as `SchedulerMixin.from_pretrained` does; a broken file is named.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`, *optional*): a folder or a hub id.
            subfolder (`str`, *optional*): of it.
            kwargs (`Any`): passed on.

        Returns:
            [`TokenScheduler`]: of this class.

        Raises:
            ValueError: if the configuration is no JSON object, or holds a setting that can't be.
            OSError: if there is none.
        """
        file = Path(str(pretrained_model_name_or_path), subfolder or "", cls.config_name)
        if file.is_file():
            read_json(file)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """The sample itself; here for schedulers' common interface.

        Args:
            sample (`torch.Tensor`): the noisy sample.
            timestep (`int` or `torch.Tensor`, *optional*): not needed.

        Returns:
            `torch.Tensor`: `sample`.
        """
        return sample
