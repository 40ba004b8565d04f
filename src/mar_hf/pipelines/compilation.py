# SPDX-License-Identifier: Apache-2.0
"""Compiling what a pipeline runs again and again."""

from typing import Any

import torch
from diffusers.utils import logging

from ..models import ARForImageGeneration, MARForImageGeneration
from ..models.layers import BackboneLayer, BackboneMLP


logger = logging.get_logger(__name__)

# Modes with CUDA graphs -> the same without. A graph of each block alone would write over what the next block reads,
# which torch refuses (https://github.com/pytorch/pytorch/issues/152887).
WITHOUT_CUDA_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def compile_transformer(transformer: MARForImageGeneration | ARForImageGeneration, **kwargs: Any) -> bool:
    """Compile each block of the backbone and the denoising step of the head, for any number of tokens.

    Of a causal backbone's blocks only the MLPs: with its cache each block would be compiled on its own. The number of
    tokens changes from step to step, so it is left open in what is compiled; torch compiles again only where it is 1,
    or where it equals the batch by chance. Equal blocks share what is compiled. CUDA graphs, where the mode has them,
    are the head's only.

    Args:
        transformer ([`MARForImageGeneration`] or [`ARForImageGeneration`]): changed in place.
        kwargs (`Any`): for `torch.compile`: `mode`, `backend`, ...; `dynamic` is True unless given.

    Returns:
        `bool`: False where torch finds no compiler for the model's device: a warning says so, and nothing changes.
    """
    if kwargs.get("backend", "inductor") == "inductor" and not has_compiler(transformer.device):
        logger.warning(f"torch finds no compiler for {transformer.device.type}: the model stays as it is.")
        return False
    kwargs = {"dynamic": True, **kwargs}
    kind = BackboneMLP if isinstance(transformer, ARForImageGeneration) else BackboneLayer
    mode = kwargs.get("mode")
    for module in transformer.modules():
        if isinstance(module, kind):
            module.compile(**{**kwargs, "mode": WITHOUT_CUDA_GRAPHS.get(mode, mode)})
    transformer.head.compile_sampling(**kwargs)
    return True


def has_compiler(device: torch.device) -> bool:
    """Whether torch's inductor can compile for a device: with a C++ compiler for CPUs, else with Triton.

    Args:
        device (`torch.device`): the device.

    Returns:
        `bool`: nothing is compiled to find out.
    """
    # Imported here: they take longer than this package.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch.utils._triton import has_triton

    if device.type != "cpu":
        return has_triton()
    try:
        return bool(get_cpp_compiler())
    except RuntimeError:
        return False
