# SPDX-License-Identifier: Apache-2.0
"""Flow matching for tokens: straight paths from noise to data, walked with or without fresh noise."""

import math

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor

from ..utils import check_count, check_number
from .scheduling_token_base import MOST_TIMESTEPS, TokenScheduler, TokenSchedulerOutput, as_device


class TokenFlowScheduler(TokenScheduler):
    """The sampler of a flow-matching head: Euler's method, or Euler-Maruyama with temperature.

    Conventions are those of diffusers: x = (1 - sigma) data + sigma noise, sigma falls from 1 to 0, timesteps are
    `num_train_timesteps` * sigma and the network predicts the velocity u = noise - data. With 1 - sigma for its time,
    noise at 0, the stochastic differential equation (SiT, arXiv:2401.08740, section 2) is

        dx = (-u + sigma score) dt + sqrt(2 sigma) dW,    sigma score = -x - (1 - sigma) u,

    which has the same marginals as the flow dx = -u dt. NextStep-1 (arXiv:2508.10711) and SphereAR (arXiv:2509.24335)
    sample tokens with it, with a last step of 0.04 that adds no noise. Tables are float64 on the CPU.

    Flow schedulers of diffusers replace this one with `X.from_config(pipe.scheduler.config)`.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 1000): the timestep of pure noise.
        shift (`float`, *optional*, defaults to 1.0): moves steps towards noise where above 1: sigma becomes
            shift sigma / (1 + (shift - 1) sigma) (arXiv:2403.03206, eq. 23). The last step still ends at the data.
        stochastic (`bool`, *optional*, defaults to `True`): False: Euler's method on the flow, in equal steps before
            the shift.
        last_step (`float`, *optional*, defaults to 0.04): of the stochastic sampler, in sigma before the shift.

    Raises:
        ValueError: if a setting is no number or out of its range.
    """

    _compatibles = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        stochastic: bool = True,
        last_step: float = 0.04,
    ):
        check_count("num_train_timesteps", num_train_timesteps, 1, MOST_TIMESTEPS)
        check_number("shift", shift, 0.01, 100)
        if not isinstance(stochastic, bool):
            raise ValueError(f"`stochastic` has to be True or False, got {stochastic!r}.")
        check_number("last_step", last_step, 1e-6, 0.2)
        # Values left at their defaults would not reach a scheduler made with `from_config`, whose own defaults differ.
        self.register_to_config(_use_default_values=[])
        self.num_inference_steps: int | None = None
        self._set_sigmas(num_train_timesteps, 1 / num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Prepare sampling. Nothing is done where that has been done already.

        Args:
            num_inference_steps (`int`): steps from noise to a token.
            device (`str` or `torch.device`, *optional*): where `timesteps` goes; None means the CPU.

        Raises:
            ValueError: if the number of steps is below 1 or above `num_train_timesteps`, or there is no such device.
        """
        check_count("num_inference_steps", num_inference_steps, 1, self.config.num_train_timesteps)
        place = as_device(device)
        if num_inference_steps != self.num_inference_steps:
            self.num_inference_steps = num_inference_steps
            last = self.config.last_step if self.config.stochastic else 1 / num_inference_steps
            self._set_sigmas(num_inference_steps, last)
        self.timesteps = self.timesteps.to(place)

    def _set_sigmas(self, num_steps: int, last: float) -> None:
        """Equal steps from 1 to the last one, shifted: `sigmas` (num_steps + 1,), float64, and what follows."""
        sigmas = torch.linspace(1, last, num_steps, dtype=torch.float64)
        sigmas = self.config.shift * sigmas / (1 + (self.config.shift - 1) * sigmas)
        self.sigmas = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
        self.timesteps = (self.config.num_train_timesteps * sigmas).float()
        # As plain numbers: `step` then reads no tensor.
        ends = self.sigmas.tolist()
        self._steps = dict(zip(self.timesteps.tolist(), zip(ends, ends[1:], strict=False), strict=True))

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        temperature: float = 1.0,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> TokenSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step towards the data.

        Args:
            model_output (`torch.Tensor` of shape `(..., token_dim)`): the velocity, noise - data.
            timestep (`float` or `torch.Tensor`): one of `timesteps`.
            sample (`torch.Tensor` of the same shape): the noisy tokens.
            temperature (`float`, *optional*, defaults to 1.0): multiplies the injected noise; no effect where none is.
            noise (`torch.Tensor`, *optional*): the noise to inject, of the sample's shape; not used in the last step.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): for the noise, where none is given.
            return_dict (`bool`, *optional*, defaults to `True`): False gives a tuple.

        Returns:
            [`TokenSchedulerOutput`]: `prev_sample` and `pred_original_sample`, float32.

        Raises:
            ValueError: if `set_timesteps` was not called, or the timestep or the output's shape does not fit.
        """
        if self.num_inference_steps is None:
            raise ValueError("Call `set_timesteps` before `step`.")
        for name, value in (("model_output", model_output), ("sample", sample)):
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"`{name}` has to be a tensor, got {value!r:.60}.")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"`model_output` has to be of the shape of `sample`, {tuple(sample.shape)}, got "
                f"{tuple(model_output.shape)}."
            )
        try:
            sigma, following = self._steps[float(timestep)]
        except (KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:  # a word, several numbers
            raise ValueError(f"`timestep` has to be one of {self.timesteps.tolist()}, got {timestep}.") from error
        velocity, sample, size = model_output.float(), sample.float(), sigma - following
        if self.config.stochastic and following > 0:
            if noise is None:
                noise = randn_tensor(sample.shape, generator=generator, device=sample.device)
            # x - size (x + (2 - sigma) u) + temperature sqrt(2 sigma size) noise
            previous = torch.add((1 - size) * sample, velocity, alpha=-size * (2 - sigma))
            previous = torch.add(previous, noise, alpha=temperature * math.sqrt(2 * sigma * size))
        else:
            previous = torch.add(sample, velocity, alpha=-size)
        original = torch.add(sample, velocity, alpha=-sigma)
        if not return_dict:
            return previous, original
        return TokenSchedulerOutput(prev_sample=previous, pred_original_sample=original)

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Points on the paths between clean tokens and noise: (1 - sigma) x + sigma noise.

        Args:
            sample (`torch.Tensor` of shape `(rows, ...)`): clean tokens.
            timestep (`torch.Tensor` of shape `(rows,)`): in 0..num_train_timesteps, fractions too.
            noise (`torch.Tensor` of the same shape as `sample`): standard normal.

        Returns:
            `torch.Tensor` of the same shape.
        """
        sigma = (timestep / self.config.num_train_timesteps).reshape(-1, *(1,) * (sample.ndim - 1))
        return torch.lerp(sample, noise, sigma.to(sample))
