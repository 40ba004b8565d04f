# SPDX-License-Identifier: Apache-2.0
"""Flow matching for tokens: MAR's MLP predicts the velocity of straight paths between data and noise."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import BaseGuidance, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, SchedulerMixin

from ..schedulers import TokenFlowScheduler
from ..utils import check_number
from .head_base import guide
from .modulation import ModulatedHead


PREDICTION_TYPES = ("velocity", "sample")
TIME_DISTRIBUTIONS = ("logit_normal", "uniform")
SCHEDULERS = (TokenFlowScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)
# The share of noise below which errors of a predicted token weigh no more than at it.
LEAST_SIGMA = 0.05


class FlowMatchingHead(ModulatedHead):
    """MAR's MLP as a flow-matching model of a token (arXiv:2210.02747; as a head: NextStep-1, arXiv:2508.10711).

    Conventions are those of its scheduler: x = (1 - sigma) token + sigma noise, timesteps are sigma times
    `num_train_timesteps`, the velocity is noise - token.

    Args:
        token_dim (`int`): numbers in a token.
        condition_dim (`int`): width of the backbone's output.
        prediction_type (`str`, *optional*, defaults to `"velocity"`): what the network gives: the velocity, or
            `"sample"`: the clean token, for wide tokens that fill few of their dimensions (arXiv:2511.13720).
        time_distribution (`str`, *optional*, defaults to `"logit_normal"`): of sigma in training: its logit is normal
            (arXiv:2403.03206, section 3.1), or `"uniform"`.
        logit_mean (`float`, *optional*, defaults to 0.0): of a logit-normal sigma; above 0 there is more noise.
        logit_std (`float`, *optional*, defaults to 1.0): its deviation.
        settings (`Any`): those of [`ModulatedHead`].

    Raises:
        ValueError: if a setting is none of those named, no number, or out of its range.
    """

    sampling_defaults = {"num_diffusion_steps": 25}
    scheduler_class = TokenFlowScheduler
    guides_velocity = True

    def __init__(
        self,
        token_dim: int,
        condition_dim: int,
        prediction_type: str = "velocity",
        time_distribution: str = "logit_normal",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        **settings: Any,
    ):
        super().__init__(token_dim, condition_dim, **settings)
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"`prediction_type` has to be one of {PREDICTION_TYPES}, got {prediction_type!r}.")
        if time_distribution not in TIME_DISTRIBUTIONS:
            raise ValueError(f"`time_distribution` has to be one of {TIME_DISTRIBUTIONS}, got {time_distribution!r}.")
        check_number("logit_mean", logit_mean, -10, 10)
        check_number("logit_std", logit_std, 0, 10)
        self.prediction_type = prediction_type
        self.time_distribution = time_distribution
        self.logit_mean, self.logit_std = logit_mean, logit_std

    def forward(self, noisy_tokens: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """The network: what `prediction_type` names.

        Args:
            noisy_tokens (`torch.Tensor` of shape `(rows, token_dim)`): x.
            timesteps (`torch.Tensor` of shape `(rows,)`): sigma times the scheduler's `num_train_timesteps`.
            condition (`torch.Tensor` of shape `(rows, condition_dim)`): the backbone's output.

        Returns:
            `torch.Tensor` of shape `(rows, token_dim)`.
        """
        embedding = self._embed_condition(condition)
        modulations = self._modulate(self.time_embedding(timesteps), embedding)
        return self._denoise(noisy_tokens.to(embedding.dtype), modulations)

    def check_scheduler(self, scheduler: SchedulerMixin | None, temperature: float = 1.0, **head_kwargs: Any) -> None:
        """Refuse a scheduler that can't run this head.

        Args:
            scheduler (`SchedulerMixin`, *optional*): the candidate: [`TokenFlowScheduler`], or Euler's or Heun's
                method of diffusers.
            temperature (`float`, *optional*, defaults to 1.0): not with `stochastic_sampling` of diffusers.
            head_kwargs (`Any`): none.

        Raises:
            ValueError: if it is another, its steps depend on the size of a picture or run from data to noise, or it
                can't apply the temperature; if there are `head_kwargs`.
        """
        if head_kwargs:
            raise ValueError(f"The flow-matching head has no settings of its own, got {sorted(head_kwargs)}.")
        name = type(scheduler).__name__
        if not isinstance(scheduler, SCHEDULERS):
            fitting = ", ".join(kind.__name__ for kind in SCHEDULERS)
            raise ValueError(f"`scheduler` of the flow-matching head has to be one of {fitting}, got {name}.")
        for setting in ("use_dynamic_shifting", "invert_sigmas"):
            if scheduler.config.get(setting):
                raise ValueError(f"{name} with `{setting}` does not fit the flow-matching head.")
        if temperature != 1.0 and scheduler.config.get("stochastic_sampling"):
            raise ValueError(
                f"`temperature` has to be 1.0 with `stochastic_sampling` of {name}, got {temperature}: the noise that "
                "it injects has none. TokenFlowScheduler's has."
            )

    def check_times(self, scheduler: TokenFlowScheduler, timesteps: torch.Tensor) -> None:
        least, most = timesteps.min().item(), timesteps.max().item()
        if not (least >= 0 and most <= len(scheduler)):
            raise ValueError(f"`timesteps` has to lie in [0, {len(scheduler)}], got {least}..{most}.")

    def draw_times(self, scheduler: TokenFlowScheduler, draw_rows: Callable[..., torch.Tensor]) -> torch.Tensor:
        if self.time_distribution == "uniform":
            sigma = draw_rows(torch.rand)
        else:
            sigma = torch.sigmoid(self.logit_mean + self.logit_std * draw_rows(torch.randn))
        return sigma * len(scheduler)

    def row_losses(
        self,
        scheduler: TokenFlowScheduler,
        condition: torch.Tensor,
        target: torch.Tensor,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """Squared error of the velocity. That of a predicted token is (noisy - token) / sigma; the weight that this
        gives to small sigmas is bounded."""
        output = self(scheduler.scale_noise(target, timesteps, noise), timesteps, condition).float()
        if self.prediction_type == "velocity":
            error = output - (noise - target)
        else:
            error = (output - target) / (timesteps / len(scheduler)).clamp(min=LEAST_SIGMA)[:, None]
        return error.square().mean(-1)

    def draw(
        self,
        *,
        condition: torch.Tensor,
        negative_condition: torch.Tensor | None,
        guidance_scale: float,
        guider: BaseGuidance | None,
        scheduler: SchedulerMixin,
        num_steps: int,
        temperature: float,
        noise: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """Sample tokens along the flow, from noise to data.

        Guidance, by `guide`, is on the velocity. The temperature multiplies the noise
        that [`TokenFlowScheduler`] injects; where a sampler injects none, it multiplies the noise of the start.
        Schedulers of diffusers draw the noise that they inject themselves. A step of Heun's method, but for the last,
        takes two calls of the network.

        Returns:
            `torch.Tensor` of shape `(batch, num_tokens, token_dim)`: float32.
        """
        guided, batch = guidance_scale != 1.0, len(condition)
        scheduler.set_timesteps(num_steps)
        own = isinstance(scheduler, TokenFlowScheduler)
        sample = self.start(condition, noise, generator)
        if not (own and scheduler.config.stochastic):
            sample = temperature * sample
        # What no step changes: the condition's embedding, and each step's time embedding. (2B, K, w) and (S, 1, 1, w)
        embedding = self._embed_condition(torch.cat([condition, negative_condition]) if guided else condition)
        timesteps = scheduler.timesteps.to(condition.device, non_blocking=True)
        steps = self._modulations(self.time_embedding(timesteps)[:, None, None], embedding)
        for step, (timestep, modulations) in enumerate(zip(scheduler.timesteps, steps, strict=True)):
            rows = sample.to(embedding.dtype)
            velocity = self._denoise(torch.cat([rows] * 2) if guided else rows, modulations).float()
            if self.prediction_type == "sample":
                noisy = torch.cat([sample] * 2) if guided else sample
                velocity = (noisy - velocity) / (timestep.item() / len(scheduler))
            if guided:
                place = (step, len(scheduler.timesteps), timestep)
                velocity = guide(velocity[:batch], velocity[batch:], guidance_scale, guider, *place)
            injected = {"generator": generator}
            if own:
                given = None if noise is None else noise[:, :, step + 1].to(sample)
                injected |= {"temperature": temperature, "noise": given}
            sample = scheduler.step(velocity, timestep, sample, **injected, return_dict=False)[0]
        return sample
