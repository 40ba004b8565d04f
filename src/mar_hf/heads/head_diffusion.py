# SPDX-License-Identifier: Apache-2.0
"""MAR's token head: a small MLP that denoises one token, conditioned on the backbone's output."""

import inspect
from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any

import torch
from diffusers import BaseGuidance, DDPMScheduler, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ..schedulers import TokenDDPMScheduler
from .head_base import guide
from .modulation import ModulatedHead


class DiffusionHead(ModulatedHead):
    """The denoising MLP of MAR, its loss and its sampling loop (arXiv:2406.11838, sections 3.2 and 4.2).

    Its settings are those of [`ModulatedHead`].
    """

    scheduler_class = TokenDDPMScheduler
    outputs_per_number = 2
    time_dtype = torch.int64

    def forward(self, noisy_tokens: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """The network: noise and variance logits of noisy tokens.

        Args:
            noisy_tokens (`torch.Tensor` of shape `(rows, token_dim)`): x_t.
            timesteps (`torch.Tensor` of shape `(rows,)`): original timesteps, 0..999.
            condition (`torch.Tensor` of shape `(rows, condition_dim)`): the backbone's output.

        Returns:
            `torch.Tensor` of shape `(rows, 2 * token_dim)`: epsilon, then the variance logits.
        """
        embedding = self._embed_condition(condition)
        modulations = self._modulate(self.time_embedding(timesteps), embedding)
        return self._denoise(noisy_tokens.to(embedding.dtype), modulations)

    def check_scheduler(self, scheduler: SchedulerMixin | None, temperature: float = 1.0, **head_kwargs: Any) -> None:
        """Refuse a scheduler that can't run this head.

        Args:
            scheduler (`SchedulerMixin`, *optional*): the candidate.
            temperature (`float`, *optional*, defaults to 1.0): only [`TokenDDPMScheduler`] has others.
            head_kwargs (`Any`): `guidance_refresh`, see `draw`.

        Raises:
            ValueError: if it does not predict epsilon, takes no generator, has another kind of noise schedule, needs
                the variance in a layout of its own, or can't apply the temperature; if `head_kwargs` holds anything
                else, or no integer from 1 on.
        """
        if head_kwargs.keys() - {"guidance_refresh"}:
            raise ValueError(f"The diffusion head's settings are guidance_refresh, got {sorted(head_kwargs)}.")
        refresh = head_kwargs.get("guidance_refresh", 1)
        if not isinstance(refresh, Integral) or refresh < 1:
            raise ValueError(f"`guidance_refresh` of the head has to be an integer from 1 on, got {refresh!r}.")
        if isinstance(scheduler, TokenDDPMScheduler):
            return
        if not isinstance(scheduler, SchedulerMixin):
            raise ValueError(f"`scheduler` has to be a scheduler of diffusers, got {type(scheduler).__name__}.")
        name, config = type(scheduler).__name__, scheduler.config
        if config.get("prediction_type") != "epsilon":
            raise ValueError(
                f"{name} has `prediction_type` {config.get('prediction_type')!r}; the head needs 'epsilon'."
            )
        if "generator" not in inspect.signature(scheduler.step).parameters:
            raise ValueError(f"{name} does not fit the diffusion head: its `step` takes no `generator`.")
        # `from_config` keeps our `prediction_type` even where a scheduler does not know it.
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(f"{name} does not fit the diffusion head: it has no `alphas_cumprod`.")
        if isinstance(scheduler, DDPMScheduler) and str(config.variance_type).startswith("learned"):
            raise ValueError(
                f"{name} with `variance_type` {config.variance_type!r} does not fit tokens; keep TokenDDPMScheduler "
                "or set variance_type='fixed_small'."
            )
        if temperature != 1.0:
            raise ValueError(f"`temperature` has to be 1.0 with {name}, got {temperature}: it has no temperature.")

    def check_times(self, scheduler: TokenDDPMScheduler, timesteps: torch.Tensor) -> None:
        least, most = timesteps.min().item(), timesteps.max().item()
        if least < 0 or most >= len(scheduler):
            raise ValueError(f"`timesteps` has to lie in 0..{len(scheduler) - 1}, got {least}..{most}.")

    def draw_times(self, scheduler: TokenDDPMScheduler, draw_rows: Callable[..., torch.Tensor]) -> torch.Tensor:
        return draw_rows(partial(torch.randint, 0, len(scheduler)))

    def row_losses(
        self,
        scheduler: TokenDDPMScheduler,
        condition: torch.Tensor,
        target: torch.Tensor,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """Squared error of epsilon + variational bound."""
        noisy = scheduler.add_noise(target, noise, timesteps)
        output = self(noisy, timesteps, condition)
        mean_squared_error, bound = scheduler.training_losses(output, target, noisy, noise, timesteps)
        return mean_squared_error + bound

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
        guidance_refresh: int = 1,
    ) -> torch.Tensor:
        """Sample tokens by reverse diffusion.

        Guidance, by `guide`, is on epsilon; the variance is the conditional one. Only the conditional state is kept,
        which equals the original's two copies. The temperature multiplies the injected noise, not the start.
        Schedulers other than [`TokenDDPMScheduler`] draw the noise that they inject themselves.

        Args:
            guidance_refresh (`int`, *optional*, defaults to 1): guided steps for which the unconditional branch is
                computed once: what it changes in epsilon is kept for the steps after it, as in the head of LazyMAR's
                code (arXiv:2503.12450).

        Returns:
            `torch.Tensor` of shape `(batch, num_tokens, token_dim)`: float32.
        """
        guided = guidance_scale != 1.0
        batch, num_tokens, _ = condition.shape
        scheduler.set_timesteps(num_steps)
        device, own = condition.device, isinstance(scheduler, TokenDDPMScheduler)
        # What no step changes: the condition's embedding, and each step's time embedding. (2B, K, w) and (S, 1, 1, w)
        embedding = self._embed_condition(torch.cat([condition, negative_condition]) if guided else condition)
        time_embeddings = self.time_embedding(scheduler.timesteps.to(device, non_blocking=True))[:, None, None]
        if noise is None:
            sample = randn_tensor((batch, num_tokens, self.token_dim), generator=generator, device=device)
        else:
            noise = noise.to(device, torch.float32)
            sample = noise[:, :, 0]
        sample = sample * scheduler.init_noise_sigma
        # As numbers where that is enough: our scheduler has them on the CPU, and the device need not be waited for.
        timesteps = scheduler.timesteps.tolist() if own else scheduler.timesteps
        # The unconditional branch takes part in every `refresh`th step.
        refresh = guidance_refresh if guided else 1
        full_steps = self._modulations(time_embeddings[::refresh], embedding)
        others = [time_embeddings[step + 1 : step + refresh] for step in range(0, len(timesteps), refresh)]
        lazy_steps = self._modulations(torch.cat(others), embedding[:batch])
        for step, timestep in enumerate(timesteps):
            # Ours needs no scaling.
            rows = (sample if own else scheduler.scale_model_input(sample, timestep)).to(embedding.dtype)
            full = step % refresh == 0
            rows = torch.cat([rows] * 2) if guided and full else rows
            output = self._denoise(rows, next(full_steps if full else lazy_steps)).float()
            if guided:
                epsilon, variance = output[:batch].chunk(2, dim=-1)
                if full:
                    unconditional = output[batch:].chunk(2, dim=-1)[0]
                    change = unconditional - epsilon if refresh > 1 else None
                else:
                    unconditional = epsilon + change  # of the last full step
                if guider is None:
                    epsilon = torch.lerp(unconditional, epsilon, guidance_scale)  # as `guide`, without its call
                else:
                    epsilon = guide(epsilon, unconditional, guidance_scale, guider, step, num_steps, timestep)
                output = torch.cat([epsilon, variance], -1)
            if own:
                injected = None if noise is None else noise[:, :, step + 1]
                stepped = scheduler.step(output, timestep, sample, temperature, injected, generator, return_dict=False)
                sample = stepped[0]
            else:
                # (B, 1, K, C): schedulers that keep `variance_type` from our configuration slice epsilon as [:, :3],
                # which leaves a single channel whole.
                epsilon = output.chunk(2, dim=-1)[0].unsqueeze(1)
                sample = scheduler.step(epsilon, timestep, sample.unsqueeze(1), generator=generator, return_dict=False)
                sample = sample[0].squeeze(1).float()
        return sample
