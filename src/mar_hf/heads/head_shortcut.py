# SPDX-License-Identifier: Apache-2.0
"""A shortcut model of tokens: a flow-matching model that also knows how far a step goes, and takes one to a few."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import BaseGuidance, SchedulerMixin

from ..utils import check_number
from .head_base import guide
from .modulation import ModulatedHead, TimeEmbedding


# Steps are learnt of lengths 1, 1/2, ... 1/64 of the way.
SHORTEST_LEVEL = 6
# What times are multiplied by before sinusoids are taken of them.
TIME_SCALE = 10.0


def shortcut_steps(num_steps: int) -> list[float]:
    """Steps from noise to data of lengths that are learnt: powers of 1/2, of at most two neighbouring lengths.

    Args:
        num_steps (`int`): how many.

    Returns:
        `list[float]`: the length of each, the longer ones first; their sum is 1.
    """
    level = num_steps.bit_length() - 1
    halved = num_steps - 2**level
    return [2.0**-level] * (2**level - halved) + [2.0 ** -(level + 1)] * (2 * halved)


class ShortcutHead(ModulatedHead):
    """The few-step head of FAR (arXiv:2504.18391): MAR's MLP as a shortcut model (arXiv:2410.12557).

    On the straight paths x = (1 - t) token + t noise, it predicts the mean velocity u(x, t, d) of the flow on the way
    from t to t - d, so that x - d u(x, t, d) is where the flow leads. Without a d, it is trained as any flow-matching
    model; with one, to do in a step of length d what it does itself in two of d / 2. It needs no scheduler.

    Args:
        token_dim (`int`): numbers in a token.
        condition_dim (`int`): width of the backbone's output.
        bootstrap_share (`float`, *optional*, defaults to 0.5): of the rows in training that learn from two half
            steps, in [0, 0.95].
        settings (`Any`): those of [`ModulatedHead`].

    Raises:
        ValueError: if a setting is no number, or out of its range.
    """

    sampling_defaults = {"num_diffusion_steps": 4}
    most_steps = 2**SHORTEST_LEVEL
    noise_per_step = 0
    guides_velocity = True

    def __init__(self, token_dim: int, condition_dim: int, bootstrap_share: float = 0.5, **settings: Any):
        super().__init__(token_dim, condition_dim, **settings)
        check_number("bootstrap_share", bootstrap_share, 0, 0.95)
        self.bootstrap_share = bootstrap_share

    def build_inputs(self, hidden_size: int) -> None:
        super().build_inputs(hidden_size)
        self.length_embedding = TimeEmbedding(hidden_size)

    def forward(
        self, noisy_tokens: torch.Tensor, times: torch.Tensor, lengths: torch.Tensor, condition: torch.Tensor
    ) -> torch.Tensor:
        """The network: the mean velocity, noise - token, of a step.

        Args:
            noisy_tokens (`torch.Tensor` of shape `(rows, token_dim)`): x.
            times (`torch.Tensor` of shape `(rows,)`): t, from 0 for tokens to 1 for noise.
            lengths (`torch.Tensor` of shape `(rows,)`): d; 0 for the velocity at t.
            condition (`torch.Tensor` of shape `(rows, condition_dim)`): the backbone's output.

        Returns:
            `torch.Tensor` of shape `(rows, token_dim)`.
        """
        embedding = self._embed_condition(condition)
        modulations = self._modulate(self.embed_times(times, lengths), embedding)
        return self._denoise(noisy_tokens.to(embedding.dtype), modulations)

    def embed_times(self, times: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The part of the embedding that the step decides.

        Args:
            times (`torch.Tensor` of shape `(rows,)`): as of `forward`.
            lengths (`torch.Tensor` of shape `(rows,)`): as of `forward`.

        Returns:
            `torch.Tensor` of shape `(rows, hidden_size)`: float32.
        """
        return self.time_embedding(TIME_SCALE * times) + self.length_embedding(TIME_SCALE * lengths)

    def check_scheduler(self, scheduler: SchedulerMixin | None, temperature: float = 1.0, **head_kwargs: Any) -> None:
        """Refuse settings that this head does not have.

        Args:
            scheduler (`SchedulerMixin`, *optional*): not needed.
            temperature (`float`, *optional*, defaults to 1.0): any.
            head_kwargs (`Any`): none.

        Raises:
            ValueError: if there are `head_kwargs`.
        """
        if head_kwargs:
            raise ValueError(f"The shortcut head has no settings of its own, got {sorted(head_kwargs)}.")

    def draw_times(self, scheduler: SchedulerMixin | None, draw_rows: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Draw times and lengths: logit-normal times without a length, and the starts of learnt steps.

        Returns:
            `torch.Tensor` of shape `(rows, 2)`.
        """
        lengths = 0.5 ** draw_rows(partial(torch.randint, 0, SHORTEST_LEVEL + 1))
        # Of the 1 / d steps, one begins at d, one at 2 d, ...
        starts = lengths * (1 + (draw_rows(torch.rand) / lengths).floor())
        times = draw_rows(torch.randn).sigmoid()
        chosen = draw_rows(torch.rand) < self.bootstrap_share
        return torch.stack([starts.where(chosen, times), lengths.where(chosen, 0.0)], 1)

    def row_losses(
        self,
        scheduler: SchedulerMixin | None,
        condition: torch.Tensor,
        target: torch.Tensor,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """Squared error of the velocity, or of the mean velocity of two half steps. Times given to `loss` have no
        length."""
        times, lengths = timesteps.unbind(1) if timesteps.ndim == 2 else (timesteps, torch.zeros_like(timesteps))
        noisy, velocity = torch.lerp(target, noise, times[:, None]), noise - target
        steps = lengths.nonzero()[:, 0]
        halves = self._two_halves(noisy[steps], times[steps], lengths[steps], condition[steps])
        velocity = velocity.index_copy(0, steps, halves)
        return (self(noisy, times, lengths, condition).float() - velocity).square().mean(-1)

    @torch.no_grad()
    def _two_halves(
        self, noisy_tokens: torch.Tensor, times: torch.Tensor, lengths: torch.Tensor, condition: torch.Tensor
    ) -> torch.Tensor:
        """The mean velocity of two steps of half the length; those of the shortest are along the velocity itself."""
        halves = lengths / 2
        known = halves.where(lengths > 0.5**SHORTEST_LEVEL, 0.0)
        first = self(noisy_tokens, times, known, condition).float()
        middle = noisy_tokens - halves[:, None] * first
        return (first + self(middle, times - halves, known, condition).float()) / 2

    def draw(
        self,
        *,
        condition: torch.Tensor,
        negative_condition: torch.Tensor | None,
        guidance_scale: float,
        guider: BaseGuidance | None,
        num_steps: int,
        temperature: float,
        noise: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
        **_: Any,
    ) -> torch.Tensor:
        """Sample tokens in a few steps from noise, whose size the temperature multiplies.

        Guidance, by `guide`, is on each step's mean velocity. With a single step it moves samples of one noise along
        the line from the unconditional to the conditional one, which is more than guidance of many short steps does:
        scales that suit the latter are too large.

        Returns:
            `torch.Tensor` of shape `(batch, num_tokens, token_dim)`: float32.
        """
        guided, batch = guidance_scale != 1.0, len(condition)
        lengths = torch.tensor(shortcut_steps(num_steps), device=condition.device)
        times = 1 - lengths.cumsum(0) + lengths
        embedding = self._embed_condition(torch.cat([condition, negative_condition]) if guided else condition)
        steps = self._modulations(self.embed_times(times, lengths)[:, None, None], embedding)
        sample = temperature * self.start(condition, noise, generator)
        for step, (length, modulations) in enumerate(zip(shortcut_steps(num_steps), steps, strict=True)):
            rows = sample.to(embedding.dtype)
            velocity = self._denoise(torch.cat([rows] * 2) if guided else rows, modulations).float()
            if guided:
                place = (step, num_steps, times[step])
                velocity = guide(velocity[:batch], velocity[batch:], guidance_scale, guider, *place)
            sample = torch.add(sample, velocity, alpha=-length)
        return sample
