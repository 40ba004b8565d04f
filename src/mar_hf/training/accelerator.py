# SPDX-License-Identifier: Apache-2.0
"""The processes of a run."""

from datetime import timedelta
from typing import Any

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs


def make_accelerator(**settings: Any) -> Accelerator:
    """One whose processes wait for each other for as long as it takes: one may sample or write while others wait.

    Args:
        settings (`Any`): for `Accelerator`.

    Returns:
        `Accelerator`.
    """
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))], **settings)
