# SPDX-License-Identifier: Apache-2.0
"""More head steps for the tokens of a step with most detail: GtR's frequency-weighted selection (arXiv:2510.17171)."""

from collections.abc import Callable
from typing import Any

import torch

from ..generation import GenerationStep


def detail_scores(condition: torch.Tensor) -> torch.Tensor:
    """How much of high frequencies is in conditions: sum over n of |FFT(z)|_n (1 + n / (D / 2)), arXiv:2510.17171.

    Args:
        condition (`torch.Tensor` of shape `(batch, num_tokens, condition_dim)`): of the backbone; D numbers each.

    Returns:
        `torch.Tensor` of shape `(batch, num_tokens)`: float32; that of a token depends on its condition alone.
    """
    amplitudes = torch.fft.rfft(condition.float()).abs()
    frequencies = torch.arange(amplitudes.shape[-1], device=condition.device)
    return (amplitudes * (1 + frequencies / (condition.shape[-1] / 2))).sum(-1)


def sample_by_detail(
    sample: Callable[..., torch.Tensor], sampling: dict[str, Any], step: GenerationStep
) -> torch.Tensor:
    """Sample a step's tokens in two draws: in every picture those with most detail, then the others.

    Args:
        sample (`Callable`): the `forward` of a backbone with a head.
        sampling (`dict[str, Any]`): what it is given as `sampling` where all tokens are drawn at once.
        step ([`GenerationStep`]): says how many tokens have most detail, and how many head steps they take.

    Returns:
        `torch.Tensor` of shape `(batch, count, token_dim)`: float32, in the order of the conditions.
    """
    ranked = detail_scores(sampling["condition"]).argsort(dim=1, descending=True, stable=True)
    rows, sampled = torch.arange(len(ranked), device=ranked.device)[:, None], []
    by_token = [name for name in ("condition", "negative_condition", "noise") if sampling[name] is not None]
    parts = ranked.split([step.num_detail_tokens, step.count - step.num_detail_tokens], 1)
    for places, num_steps in zip(parts, (step.num_detail_steps, step.num_diffusion_steps), strict=True):
        if places.shape[1]:
            part = {name: sampling[name][rows, places] for name in by_token}
            sampled.append(sample(None, sampling=sampling | part | {"num_steps": num_steps}))
    return torch.cat(sampled, 1)[rows, ranked.argsort(1)]
