# SPDX-License-Identifier: Apache-2.0
"""What a tokenizer can do to whole tokens after shift and scale, and a pipeline to the tokens that a head samples."""

import math
from collections.abc import Callable

import torch
from torch.nn import functional


def token_layer_norm(tokens: torch.Tensor) -> torch.Tensor:
    """Layer norm without weights over each token: zero mean, unit variance (NextStep-1, arXiv:2508.10711).

    Args:
        tokens (`torch.Tensor` of shape `(..., token_dim)`): any floating-point dtype.

    Returns:
        `torch.Tensor` of the same shape and dtype. A token of equal numbers becomes zero.
    """
    return functional.layer_norm(tokens, tokens.shape[-1:])


def sphere(tokens: torch.Tensor) -> torch.Tensor:
    """Project each token to the sphere of radius sqrt(token_dim): unit mean square (SphereAR, arXiv:2509.24335).

    Args:
        tokens (`torch.Tensor` of shape `(..., token_dim)`): any floating-point dtype; computed in float32.

    Returns:
        `torch.Tensor` of the same shape and dtype. A zero token has no direction and stays zero.
    """
    radius = math.sqrt(tokens.shape[-1])
    return (radius * functional.normalize(tokens.float(), dim=-1)).to(tokens.dtype)


# By the name in the configuration; None leaves tokens as shift and scale make them.
NORMALIZERS: dict[str, Callable[[torch.Tensor], torch.Tensor] | None] = {
    "affine": None,
    "token_layer_norm": token_layer_norm,
    "sphere": sphere,
}
