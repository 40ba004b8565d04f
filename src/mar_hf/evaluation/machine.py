# SPDX-License-Identifier: Apache-2.0
"""What a measurement ran on and with, for its record."""

import os
import pathlib
import platform
from importlib.metadata import version
from typing import Any

import torch


def describe_machine(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Processor, cores and torch's threads, and the GPU where the device is one.

    Args:
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): of the model.

    Returns:
        `dict[str, Any]`: ready for JSON.
    """
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    found = {"cpu": (names or [platform.processor()])[0], "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.device(device).type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def describe_versions(*packages: str) -> dict[str, str]:
    """Versions of Python, this package, its three libraries, and others.

    Args:
        packages (`str`): names of more, as pip knows them.

    Returns:
        `dict[str, str]`: ready for JSON.
    """
    names = ("mar_hf", "torch", "transformers", "diffusers", *packages)
    return {name: version(name) for name in names} | {"python": platform.python_version()}
