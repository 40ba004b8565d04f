# SPDX-License-Identifier: Apache-2.0
"""A law that every head has to be able to learn, and a test of whether samples follow it."""

import torch

from common import seeded
from mar_hf import TokenHead


MODES = torch.tensor([[[1.2, 0.0], [-0.8, 1.0], [-0.6, -1.2]], [[0.0, 1.0], [0.0, -1.0], [0.0, -1.0]]])


def mixture(classes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A token of two numbers for each of some classes (rows,), which are 0 or 1: near one of the class's modes."""
    modes = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), len(classes), replacement=True, generator=generator)
    return MODES[classes, modes] + 0.15 * torch.randn(len(classes), 2, generator=generator)


def conditions(classes: torch.Tensor) -> torch.Tensor:
    """The backbone's output for classes (rows,), of width 2."""
    return torch.eye(2)[classes]


def fresh(head: type[TokenHead], **settings) -> TokenHead:
    """A head for tokens of two numbers, as training begins with it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = head(token_dim=2, condition_dim=2, **settings)
        for module in made.modules():
            made.init_weights(module)
    return made


def learn(head: TokenHead, scheduler: object, steps: int, rows: int = 256, learning_rate: float = 3e-3) -> TokenHead:
    """Train a head on both classes of the mixture."""
    generator, mask = seeded(1), torch.ones(1, rows, dtype=torch.bool)
    optimizer = torch.optim.Adam(head.parameters(), lr=learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    classes = torch.arange(rows) % 2
    for _ in range(steps):
        tokens = {"condition": conditions(classes)[None], "target": mixture(classes, generator)[None], "mask": mask}
        loss = head.loss(**tokens, scheduler=scheduler, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return head.eval()


def same_law(found: torch.Tensor, expected: torch.Tensor, permutations: int = 500) -> float:
    """The p-value of the permutation test of the energy distance between two samples of the same size (rows, size)."""
    both, rows = torch.cat([found, expected]), len(found)
    generator = seeded(0)
    orders = torch.stack(
        [torch.arange(2 * rows), *(torch.randperm(2 * rows, generator=generator) for _ in range(permutations))]
    )
    # With 1 for one sample and -1 for the other, the energy distance is -signs^T distances signs / rows^2.
    signs = torch.where(orders < rows, 1.0, -1.0)
    energies = -((signs @ torch.cdist(both, both)) * signs).sum(1)
    return (energies[1:] >= energies[0]).float().mean().item()


def follows(head: TokenHead, scheduler: object, num_steps: int, rows: int = 400, **settings) -> list[float]:
    """The p-values of a head's samples, class after class."""
    values = []
    for number in (0, 1):
        classes = torch.full((rows,), number)
        with torch.no_grad():
            call = {"condition": conditions(classes)[None], "scheduler": scheduler, "num_steps": num_steps}
            found = head.sample(**call, generator=seeded(2), **settings)[0]
        values.append(same_law(found, mixture(classes, seeded(3))))
    return values
