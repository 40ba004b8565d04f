# SPDX-License-Identifier: Apache-2.0
"""A token head of one call: noise goes in, a sample comes out, and the energy score trains it."""

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import BaseGuidance, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from ..utils import check_count, check_number
from .head_base import as_computed, guide
from .modulation import ModulatedHead


# Below this two samples count as equal: any power of a distance has a finite gradient from here on.
LEAST_DISTANCE = 1e-12


def distance(first: torch.Tensor, second: torch.Tensor, exponent: float = 1.0) -> torch.Tensor:
    """|x - y|^exponent, whose gradient is 0 where x equals y: there, a power below 1 has none.

    Args:
        first (`torch.Tensor` of shape `(..., size)`): x.
        second (`torch.Tensor` of the same shape): y.
        exponent (`float`, *optional*, defaults to 1.0): of the Euclidean norm.

    Returns:
        `torch.Tensor` of shape `(...)`.
    """
    return torch.linalg.vector_norm(first - second, dim=-1).clamp(min=LEAST_DISTANCE).pow(exponent)


class EnergyHead(ModulatedHead):
    """The head of EAR (arXiv:2505.07812): an MLP of the condition that noise modulates, trained by the energy score.

    The loss of a token y is |x1 - y|^a + |x2 - y|^a - repulsion |x1 - x2|^a, with two samples x1 and x2. For repulsion
    1 and a in (0, 2), its expected value is least where the samples have the distribution of the tokens, and nowhere
    else (Gneiting & Raftery, 2007). One call makes a token; the head has no time and no scheduler.

    Args:
        token_dim (`int`): numbers in a token.
        condition_dim (`int`): width of the backbone's output.
        noise_dim (`int`, *optional*, defaults to 64): numbers that a sample is made of, each uniform in [-0.5, 0.5].
        exponent (`float`, *optional*, defaults to 1.0): a, in [0.1, 1.9].
        repulsion (`float`, *optional*, defaults to 1.0): weight of the distance between samples, in [0, 1]. Below 1,
            samples vary less than the tokens; the paper ends its training with 0.99.
        settings (`Any`): those of [`ModulatedHead`]; of `batch_multiplier`, each draw is a pair of samples.

    Raises:
        ValueError: if a setting is no number, or out of its range.
    """

    sampling_defaults = {"num_diffusion_steps": 1}
    has_steps = False
    stream_layer = "condition_proj"
    guides_condition = True

    def __init__(
        self,
        token_dim: int,
        condition_dim: int,
        noise_dim: int = 64,
        exponent: float = 1.0,
        repulsion: float = 1.0,
        **settings: Any,
    ):
        super().__init__(token_dim, condition_dim, **settings)
        check_count("noise_dim", noise_dim)
        check_number("exponent", exponent, 0.1, 1.9)
        check_number("repulsion", repulsion, 0, 1)
        self.noise_dim, self.exponent, self.repulsion = noise_dim, exponent, repulsion
        self.noise_per_step = math.ceil(noise_dim / token_dim) - 1  # beside the start
        self.loss_noise_dim = 2 * noise_dim
        self.noise_proj = nn.Linear(noise_dim, self.condition_proj.out_features)

    def build_inputs(self, hidden_size: int) -> None:
        self.condition_proj = nn.Linear(self.condition_dim, hidden_size)

    def forward(self, condition: torch.Tensor, noise: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """The network: a sample of the token.

        Args:
            condition (`torch.Tensor` of shape `(..., condition_dim)`): the backbone's output.
            noise (`torch.Tensor` of shape `(..., noise_dim)`): standard normal. What modulates the blocks is each
                number's place in that distribution, less 0.5.
            temperature (`float`, *optional*, defaults to 1.0): multiplies the shifts of the blocks.

        Returns:
            `torch.Tensor` of shape `(..., token_dim)`.
        """
        places = as_computed((torch.special.ndtr(noise) - 0.5).to(condition.dtype), self.noise_proj)
        modulations = list(self._modulate(0.0, self.noise_proj(places)))
        if temperature != 1.0:
            for shift in range(0, 3 * len(self.blocks), 3):
                modulations[shift] = modulations[shift] * temperature
        return self._denoise(as_computed(condition, self.condition_proj), modulations)

    def check_scheduler(self, scheduler: SchedulerMixin | None, temperature: float = 1.0, **head_kwargs: Any) -> None:
        """Refuse settings of `sample` that can't be. Any scheduler will do: none is used.

        Args:
            scheduler (`SchedulerMixin`, *optional*): any.
            temperature (`float`, *optional*, defaults to 1.0): at least 0.
            head_kwargs (`Any`): none.

        Raises:
            ValueError: if there is a setting, or the temperature is out of range.
        """
        if head_kwargs:
            raise ValueError(f"The energy head has no settings of its own, got {sorted(head_kwargs)}.")
        if not temperature >= 0:
            raise ValueError(f"`temperature` has to be at least 0, got {temperature}.")

    def draw_times(self, scheduler: SchedulerMixin | None, draw_rows: Callable[..., torch.Tensor]) -> torch.Tensor:
        """There are no times: nothing is drawn.

        Returns:
            `torch.Tensor` of shape `(rows, 0)`.
        """
        return draw_rows(torch.rand, 0)

    def row_losses(
        self,
        scheduler: SchedulerMixin | None,
        condition: torch.Tensor,
        target: torch.Tensor,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """The energy score of two samples, negative: see the class. Scheduler and times are without effect."""
        pairs = noise.unflatten(-1, (2, self.noise_dim))
        first, second = self(condition[:, None].expand(-1, 2, -1), pairs).float().unbind(1)
        errors = distance(first, target, self.exponent) + distance(second, target, self.exponent)
        return errors - self.repulsion * distance(first, second, self.exponent)

    def draw(
        self,
        *,
        condition: torch.Tensor,
        negative_condition: torch.Tensor | None,
        guidance_scale: float,
        guider: BaseGuidance | None,
        temperature: float,
        noise: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
        **_: Any,
    ) -> torch.Tensor:
        """Sample tokens, in one call.

        Guidance is `uncond + guidance_scale * (cond - uncond)` on conditions, before the head. The temperature
        multiplies the shift that the noise is to each block, and not its scale and gate: even 0 leaves samples that
        vary. 1 is what was trained, 0.7 what the paper found best with guidance. The first `noise_dim` numbers of a
        token's noise decide; scheduler and steps are without effect.

        Returns:
            `torch.Tensor` of shape `(batch, num_tokens, token_dim)`: float32.
        """
        if guidance_scale != 1.0:
            condition = guide(condition, negative_condition, guidance_scale, guider)
        if noise is None:
            shape = (*condition.shape[:2], self.noise_entries(1), self.token_dim)
            noise = randn_tensor(shape, generator=generator, device=condition.device)
        noise = noise.to(condition.device, torch.float32).flatten(2)[..., : self.noise_dim]
        return self(condition, noise, temperature).float()
