# SPDX-License-Identifier: Apache-2.0
"""A law that every head must be able to learn, and a test of whether it has."""

from collections.abc import Callable

import torch

from common import seeded
from mar_hf import TokenHead


CENTRES = torch.tensor([[-1.5, -0.5], [0.0, 1.5], [1.5, -0.5]])


def triangle(condition: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Three clouds in the plane, (..., 2), that stand on their head where the condition's first number is negative."""
    shape = condition.shape[:-1]
    clouds = CENTRES[torch.randint(0, len(CENTRES), shape, generator=generator)]
    return condition[..., :1].sign() * (clouds + 0.3 * torch.randn(*shape, 2, generator=generator))


def upright(count: int, sign: float = 1.0) -> torch.Tensor:
    """The same condition again and again: (1, count, 2)."""
    return torch.tensor([sign, 1.0]).expand(1, count, -1)


def p_value(first: torch.Tensor, second: torch.Tensor, permutations: int = 199) -> float:
    """Of the hypothesis that two samples of the same size, (n, d) each, have one distribution.

    The share of random partitions whose energy distance, 2 E|x - y| - E|x - x'| - E|y - y'|, is at least as large.
    """
    both, count = torch.cat([first, second]).double(), len(first)
    partitions = [
        torch.arange(2 * count),
        *(torch.randperm(2 * count, generator=seeded(k)) for k in range(permutations)),
    ]
    signs = torch.ones(2 * count, dtype=torch.float64).index_fill(0, torch.arange(count), -1)
    signs = torch.stack([signs[partition] for partition in partitions])
    distances = -((signs @ torch.cdist(both, both)) * signs).sum(1)
    return (distances >= distances[0]).double().mean().item()


def learn(
    make: Callable[[], TokenHead], law: Callable = triangle, steps: int = 300, rows: int = 512, rate: float = 1e-2
) -> TokenHead:
    """Train a head on a law of conditions (rows, 2) of either sign; the rate goes down to 0 in the last two thirds."""
    generator = seeded(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = make()
        for module in head.modules():
            head.init_weights(module)
    scheduler = head.scheduler_class and head.scheduler_class()
    optimiser = torch.optim.AdamW(head.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    mask = torch.ones(1, rows, dtype=torch.bool)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * min(1.0, 1.5 * (1 - step / steps))
        signs = 2 * torch.randint(0, 2, (1, rows), generator=generator) - 1.0
        condition = torch.stack([signs, torch.ones_like(signs)], -1)
        inputs = {"condition": condition, "target": law(condition, generator), "mask": mask}
        optimiser.zero_grad()
        head.loss(**inputs, scheduler=scheduler, generator=generator).backward()
        optimiser.step()
    return head.eval()
