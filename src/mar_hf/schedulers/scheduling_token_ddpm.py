# SPDX-License-Identifier: Apache-2.0
"""DDPM for tokens: cosine noise, learned-range variance, respaced sampling, temperature."""

import math
from numbers import Integral

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor

from ..utils import check_count
from .scheduling_token_base import MOST_TIMESTEPS, TokenScheduler, TokenSchedulerOutput, as_device


def cosine_betas(num_train_timesteps: int, max_beta: float = 0.999) -> torch.Tensor:
    """Betas whose cumulative product of 1 - beta follows a squared cosine (arXiv:2102.09672, eq. 17).

    Args:
        num_train_timesteps (`int`): number of betas.
        max_beta (`float`, *optional*, defaults to 0.999): largest value.

    Returns:
        `torch.Tensor` of shape `(num_train_timesteps,)`, float64.
    """

    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    n = num_train_timesteps
    betas = [min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), max_beta) for i in range(n)]
    return torch.tensor(betas, dtype=torch.float64)


def respaced_timesteps(num_train_timesteps: int, num_inference_steps: int, max_timestep: int) -> list[int]:
    """The training timesteps that sampling with fewer steps visits, ascending.

    Steps of equal length from 0 to the last timestep, rounded half to even after accumulating them, as the original
    does it; rounding `linspace` instead gives other steps for 278 of the 1000 counts. Steps beyond `max_timestep`
    become that one step (DiSA, arXiv:2505.20297).

    Args:
        num_train_timesteps (`int`): length of the training chain.
        num_inference_steps (`int`): wanted steps; 1 gives just the last one.
        max_timestep (`int`): last timestep allowed.

    Returns:
        `list[int]`: at most `num_inference_steps` different timesteps.
    """
    if num_inference_steps == 1:
        return [max_timestep]
    stride = (num_train_timesteps - 1) / (num_inference_steps - 1)
    position, timesteps = 0.0, set()
    for _ in range(num_inference_steps):
        timesteps.add(min(round(position), max_timestep))
        position += stride
    return sorted(timesteps)


class TokenDDPMScheduler(TokenScheduler):
    """The sampler and the training loss of MAR's token head (arXiv:2406.11838, section 3.2; arXiv:2102.09672).

    Tables are float64 on the CPU, one per training step and one per respaced step; the network always sees the
    original timesteps. Other diffusers schedulers replace this one with `X.from_config(pipe.scheduler.config)`; for
    them the configuration also holds `clip_sample` and `timestep_spacing`, which this scheduler does not read.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 1000): length of the training chain.
        beta_schedule (`str`, *optional*, defaults to `"squaredcos_cap_v2"`): the only one: cosine.
        trained_betas (`list[float]`, *optional*): betas to use instead.
        max_timestep (`int`, *optional*): last timestep that sampling visits; None means the last one. The cosine
            schedule leaves a signal of 2.4e-9 at t = 999, so that any error of a young or half-precision network is
            multiplied by hundreds in the first update; 950 avoids it.
        prediction_type (`str`, *optional*, defaults to `"epsilon"`): the only one: the network predicts the noise.
        variance_type (`str`, *optional*, defaults to `"learned_range"`): the only one: the network interpolates, in
            the log domain, between beta and the posterior variance.
        clip_sample (`bool`, *optional*, defaults to `False`): for schedulers that replace this one: tokens are
            unbounded.
        timestep_spacing (`str`, *optional*, defaults to `"leading"`): for schedulers that replace this one: keeps them
            off the last timesteps.

    Raises:
        ValueError: if a setting is none of those named, or the betas are not one for each step, between 0 and 1 and
            large enough to tell.
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_schedule: str = "squaredcos_cap_v2",
        trained_betas: list[float] | None = None,
        max_timestep: int | None = None,
        prediction_type: str = "epsilon",
        variance_type: str = "learned_range",
        clip_sample: bool = False,
        timestep_spacing: str = "leading",
    ):
        fixed = {
            "beta_schedule": (beta_schedule, "squaredcos_cap_v2"),
            "prediction_type": (prediction_type, "epsilon"),
            "variance_type": (variance_type, "learned_range"),
            "clip_sample": (clip_sample, False),
        }
        for name, (value, allowed) in fixed.items():
            if type(value) is not type(allowed) or value != allowed:
                raise ValueError(f"`{name}` has to be {allowed!r} for this scheduler, got {value!r}.")
        check_count("num_train_timesteps", num_train_timesteps, 1, MOST_TIMESTEPS)
        whole = isinstance(max_timestep, Integral) and not isinstance(max_timestep, bool)
        if max_timestep is not None and not (whole and 0 < max_timestep < num_train_timesteps):
            raise ValueError(f"`max_timestep` has to lie in 1..{num_train_timesteps - 1}, got {max_timestep!r}.")
        if not isinstance(timestep_spacing, str):
            raise ValueError(f"`timestep_spacing` has to be a name, got {timestep_spacing!r}.")
        # Values left at their defaults would not reach a scheduler made with `from_config`, whose own defaults differ.
        self.register_to_config(_use_default_values=[])

        if trained_betas is None:
            self.betas = cosine_betas(num_train_timesteps)
        else:
            try:
                self.betas = torch.as_tensor(trained_betas, dtype=torch.float64)
            except (RuntimeError, TypeError, ValueError):  # words, rows of several lengths
                self.betas = torch.zeros(0)
            inside = bool(((self.betas > 0) & (self.betas < 1)).all())
            if self.betas.shape != (num_train_timesteps,) or not inside:
                raise ValueError(f"`trained_betas` has to hold {num_train_timesteps} numbers between 0 and 1.")
        self.alphas_cumprod = torch.cumprod(1 - self.betas, 0)
        self._train_tables = _tables(self.alphas_cumprod, self.betas)
        if not all(table.isfinite().all() for table in self._train_tables.values()):
            raise ValueError(
                f"`trained_betas` has to leave signal and noise at every step, got {trained_betas!r:.60}."
            )
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self._sampling_rows: list[dict[str, float]] = []

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Prepare sampling with fewer steps. Nothing is done where that has been done already.

        Args:
            num_inference_steps (`int`): steps from noise to a token. Those beyond `max_timestep` merge, so that
                `timesteps` can be shorter: 50 steps with `max_timestep` 950 are 48.
            device (`str` or `torch.device`, *optional*): where `timesteps` goes; None means the CPU.

        Raises:
            ValueError: if the number of steps is below 1 or above the training chain's length, or there is no such
                device.
        """
        length = self.config.num_train_timesteps
        whole = isinstance(num_inference_steps, Integral) and not isinstance(num_inference_steps, bool)
        if not whole or not 1 <= num_inference_steps <= length:
            raise ValueError(f"`num_inference_steps` has to lie in 1..{length}, got {num_inference_steps!r}.")
        place = torch.device("cpu") if device is None else as_device(device)
        if num_inference_steps == self.num_inference_steps and self.timesteps.device == place:
            return
        last = self.config.max_timestep if self.config.max_timestep is not None else length - 1
        visited = torch.tensor(respaced_timesteps(length, num_inference_steps, last))
        alphas_cumprod = self.alphas_cumprod[visited]
        # beta_i = 1 - abar_i / abar_(i-1)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        tables = _tables(alphas_cumprod, 1 - alphas_cumprod / previous)
        self.num_inference_steps = num_inference_steps
        # As plain numbers, a dict for each step, ascending in time: `step` then reads no tensor.
        rows = zip(*(table.tolist() for table in tables.values()), strict=True)
        self._sampling_rows = [dict(zip(tables, row, strict=True)) for row in rows]
        self._index = {int(t): i for i, t in enumerate(visited)}
        self.timesteps = visited.flip(0).to(place)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        temperature: float = 1.0,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> TokenSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step of reverse diffusion.

        Args:
            model_output (`torch.Tensor` of shape `(..., 2 * token_dim)`): epsilon, then the variance logits.
            timestep (`int` or `torch.Tensor`): one of `timesteps`.
            sample (`torch.Tensor` of shape `(..., token_dim)`): the noisy tokens.
            temperature (`float`, *optional*, defaults to 1.0): multiplies the injected noise.
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
            if not isinstance(value, torch.Tensor) or value.ndim == 0:
                raise ValueError(f"`{name}` has to be a tensor of at least one dimension, got {value!r:.60}.")
        if model_output.shape != (*sample.shape[:-1], 2 * sample.shape[-1]):
            raise ValueError(
                f"`model_output` has to hold epsilon and variance for each number of `sample` {tuple(sample.shape)}, "
                f"got {tuple(model_output.shape)}."
            )
        try:
            index = self._index.get(int(timestep))
        except (OverflowError, RuntimeError, TypeError, ValueError):  # a word, several numbers
            index = None
        if index is None:
            raise ValueError(f"`timestep` has to be one of {self.timesteps.tolist()}, got {timestep}.")
        row = self._sampling_rows[index]
        epsilon, variance = model_output.float().chunk(2, dim=-1)
        sample = sample.float()
        original = row["sqrt_recip_alphas_cumprod"] * sample
        original = torch.add(original, epsilon, alpha=-row["sqrt_recipm1_alphas_cumprod"])
        previous = row["posterior_mean_coef1"] * original
        previous = torch.add(previous, sample, alpha=row["posterior_mean_coef2"])
        if index > 0:
            if noise is None:
                noise = randn_tensor(sample.shape, generator=generator, device=sample.device)
            # Between the logarithms of the least and the largest variance, of which -1 and 1 are the ends.
            least, most = row["posterior_log_variance_clipped"], row["log_betas"]
            deviation = torch.exp((most - least) / 4 * variance + (most + least) / 4)
            previous = torch.addcmul(previous, deviation, noise, value=temperature)
        if not return_dict:
            return previous, original
        return TokenSchedulerOutput(prev_sample=previous, pred_original_sample=original)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Diffuse clean tokens: sqrt(abar_t) x + sqrt(1 - abar_t) noise.

        Args:
            original_samples (`torch.Tensor` of shape `(rows, ...)`): clean tokens.
            noise (`torch.Tensor` of the same shape): standard normal.
            timesteps (`torch.Tensor` of shape `(rows,)`): int64, in 0..num_train_timesteps - 1.

        Returns:
            `torch.Tensor` of the same shape.
        """
        signal = self._rows(self.alphas_cumprod.sqrt(), timesteps, original_samples)
        return signal * original_samples + self._rows((1 - self.alphas_cumprod).sqrt(), timesteps, noise) * noise

    def training_losses(
        self,
        model_output: torch.Tensor,
        original_samples: torch.Tensor,
        noisy_samples: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The two terms of the original's loss, whose sum is minimised.

        The first is the squared error of epsilon; the second the variational bound in bits, which trains the variance
        only, since epsilon is detached in it (arXiv:2102.09672, section 3.1). At t = 0 the bound is the likelihood of
        a discretised Gaussian with bins 2/255 wide and open ends beyond +-0.999, as for pixels.

        Args:
            model_output (`torch.Tensor` of shape `(rows, 2 * token_dim)`): epsilon, then the variance logits.
            original_samples (`torch.Tensor` of shape `(rows, token_dim)`): clean tokens.
            noisy_samples (`torch.Tensor` of shape `(rows, token_dim)`): what `add_noise` made of them.
            noise (`torch.Tensor` of shape `(rows, token_dim)`): the noise that it added.
            timesteps (`torch.Tensor` of shape `(rows,)`): int64.

        Returns:
            two `torch.Tensor` of shape `(rows,)`: mean squared error and variational bound, float32.
        """
        epsilon, variance = model_output.float().chunk(2, dim=-1)
        mean_squared_error = (noise - epsilon).square().mean(-1)

        def at(name: str) -> torch.Tensor:
            return self._rows(self._train_tables[name], timesteps, noisy_samples)

        original = at("sqrt_recip_alphas_cumprod") * noisy_samples
        original = original - at("sqrt_recipm1_alphas_cumprod") * epsilon.detach()
        mean = at("posterior_mean_coef1") * original + at("posterior_mean_coef2") * noisy_samples
        true_mean = at("posterior_mean_coef1") * original_samples + at("posterior_mean_coef2") * noisy_samples
        true_log_variance = at("posterior_log_variance_clipped")
        fraction = (variance + 1) / 2
        log_variance = fraction * at("log_betas") + (1 - fraction) * true_log_variance
        # KL(N(true_mean, true_variance) || N(mean, variance)) in nats
        divergence = 0.5 * (
            log_variance
            - true_log_variance
            - 1
            + torch.exp(true_log_variance - log_variance)
            + (true_mean - mean).square() * torch.exp(-log_variance)
        )
        likelihood = _discretised_gaussian_log_likelihood(original_samples, mean, 0.5 * log_variance)
        bound = torch.where(timesteps[:, None] == 0, -likelihood, divergence)
        return mean_squared_error, bound.mean(-1) / math.log(2)

    def _rows(self, table: torch.Tensor, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Entries of a float64 table, float32, shaped (rows, 1, ...) to multiply `like`."""
        values = table.float().to(like.device)[timesteps.to(like.device)]
        return values.reshape(-1, *(1,) * (like.ndim - 1))


def _tables(alphas_cumprod: torch.Tensor, betas: torch.Tensor) -> dict[str, torch.Tensor]:
    """Everything that the posterior q(x_(t-1) | x_t, x_0) needs, float64, ascending in time."""
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    variance = betas * (1 - previous) / (1 - alphas_cumprod)
    # The first posterior variance is 0: its logarithm is replaced by the second's (a lone step injects no noise).
    clipped = torch.cat([variance[1:2], variance[1:]]) if len(variance) > 1 else betas
    return {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "sqrt_recip_alphas_cumprod": (1 / alphas_cumprod).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alphas_cumprod - 1).sqrt(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1 - alphas_cumprod),
        "posterior_mean_coef2": (1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod),
        "posterior_log_variance_clipped": clipped.log(),
        "log_betas": betas.log(),
    }


def _discretised_gaussian_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Log-likelihood of `x` in [-1, 1] under a Gaussian cut into bins 2/255 wide, in nats, element by element."""

    def approximate_cdf(value: torch.Tensor) -> torch.Tensor:
        # The tanh approximation of the standard normal's distribution function, as the original has it.
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    inverse_scale = torch.exp(-log_scale)
    upper = approximate_cdf(inverse_scale * (x - mean + 1 / 255))
    lower = approximate_cdf(inverse_scale * (x - mean - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
