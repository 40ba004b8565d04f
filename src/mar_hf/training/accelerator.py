# SPDX-License-Identifier: Apache-2.0
"""The processes of a run."""

from datetime import timedelta
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs


def make_accelerator(**settings: Any) -> Accelerator:
    """One whose processes wait for each other for as long as it takes: one may sample or write while others wait.

    It has its own settings, whatever an earlier run of the same process, a notebook say, has left. The earlier run's
    accelerator is not to be used any more.

    Args:
        settings (`Any`): for `Accelerator`.

    Returns:
        `Accelerator`.
    """
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))], **settings)
