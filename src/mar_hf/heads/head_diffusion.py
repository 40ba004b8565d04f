# SPDX-License-Identifier: Apache-2.0
"""MAR's token head: a small MLP that denoises one token, conditioned on the backbone's output."""

import inspect
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from numbers import Integral
from typing import Any

import torch
from diffusers import BaseGuidance, DDPMScheduler, SchedulerMixin
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from ..schedulers import TokenDDPMScheduler
from ..utils import check_count, check_number, draw
from .head_base import HeadBlock, TokenHead, as_computed, check_tensor, guide


TIMESTEP_CHANNELS = 256
# Bytes that `sample` computes ahead: many steps at once make large matrix products of small ones, as long as what they
# give stays in the cache of a CPU.
MODULATION_BYTES = 2**24


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 whatever its weights are, but for autocast."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the layer.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., in_features)`): of any dtype.

        Returns:
            `torch.Tensor` of shape `(..., out_features)`: float32.
        """
        return nn.functional.linear(hidden_states.float(), self.weight.float(), self.bias.float())


class TimeEmbedding(nn.Module):
    """Sinusoids of a timestep and two linear layers.

    In float32, since the first steps of a cosine schedule multiply errors by hundreds.

    Args:
        hidden_size (`int`): width.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear_1 = Float32Linear(TIMESTEP_CHANNELS, hidden_size)
        self.linear_2 = Float32Linear(hidden_size, hidden_size)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Embed.

        Args:
            timesteps (`torch.Tensor` of shape `(rows,)`): original timesteps, 0..999.

        Returns:
            `torch.Tensor` of shape `(rows, hidden_size)`: float32.
        """
        # Cosines first, then sines.
        sinusoids = get_timestep_embedding(timesteps, TIMESTEP_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.linear_2(nn.functional.silu(self.linear_1(sinusoids)))


class DiffusionHeadBlock(HeadBlock):
    """One residual block: h + gate * MLP(LN(h) * (1 + scale) + shift), modulated by time and condition.

    It has no `forward`: many updates share the modulation, which does not depend on the noisy token.

    Args:
        hidden_size (`int`): width.
        layer_norm_eps (`float`): of the layer norm.
    """

    def __init__(self, hidden_size: int, layer_norm_eps: float):
        super().__init__(hidden_size, layer_norm_eps)
        self.modulation = nn.Linear(hidden_size, 3 * hidden_size)

    def update(
        self, hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        """Apply the block, modulated.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., hidden_size)`): the noisy token's state.
            shift (`torch.Tensor` of the same shape): the first third of the modulation.
            scale (`torch.Tensor` of the same shape): 1 + the second third.
            gate (`torch.Tensor` of the same shape): the last third.

        Returns:
            `torch.Tensor` of the same shape.
        """
        update = torch.addcmul(shift, self.norm(hidden_states), scale)
        update = self.linear_2(self.activation(self.linear_1(update)))
        return torch.addcmul(hidden_states, gate, update)


class DiffusionHead(TokenHead):
    """The denoising MLP of MAR, its loss and its sampling loop (arXiv:2406.11838, sections 3.2 and 4.2).

    Args:
        token_dim (`int`): numbers in a token.
        condition_dim (`int`): width of the backbone's output.
        num_layers (`int`, *optional*, defaults to 3): residual blocks.
        hidden_size (`int`, *optional*, defaults to 1024): width of the MLP.
        batch_multiplier (`int`, *optional*, defaults to 1): draws of timestep and noise per token and training step.
        layer_norm_eps (`float`, *optional*, defaults to 1e-06): of the layer norms.
        initializer_range (`float`, *optional*, defaults to 0.02): deviation of the time embedding's first weights.
        loss_chunk_size (`int`, *optional*): rows of the loss that are computed at a time, and again in the backward
            pass, so that only their activations need room; the loss is the same. None: all at once, and once.

    Raises:
        ValueError: if a setting is no number, or out of its range.
    """

    def __init__(
        self,
        token_dim: int,
        condition_dim: int,
        num_layers: int = 3,
        hidden_size: int = 1024,
        batch_multiplier: int = 1,
        layer_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        loss_chunk_size: int | None = None,
    ):
        super().__init__()
        self.check_sizes(token_dim, condition_dim, num_layers, hidden_size, batch_multiplier, layer_norm_eps)
        check_number("initializer_range", initializer_range, 0, 10)
        if loss_chunk_size is not None:
            check_count("loss_chunk_size", loss_chunk_size, 1, 2**62)
        self.token_dim = token_dim
        self.batch_multiplier = batch_multiplier
        self.initializer_range = initializer_range
        self.loss_chunk_size = loss_chunk_size
        self.time_embedding = TimeEmbedding(hidden_size)
        self.condition_proj = nn.Linear(condition_dim, hidden_size)
        self.token_proj = nn.Linear(token_dim, hidden_size)
        self.blocks = nn.ModuleList([DiffusionHeadBlock(hidden_size, layer_norm_eps) for _ in range(num_layers)])
        self.out_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps, elementwise_affine=False)
        self.out_modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.out_proj = nn.Linear(hidden_size, 2 * token_dim)

    def init_weights(self, module: nn.Module) -> None:
        """Xavier for linear layers, N(0, initializer_range) in the time embedding, zeros where the original has zeros.

        Args:
            module (`torch.nn.Module`): the head itself or a module inside it.
        """
        zeroed = [self.out_modulation, self.out_proj, *(block.modulation for block in self.blocks)]
        if any(module is layer for layer in zeroed):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif module is self.time_embedding.linear_1 or module is self.time_embedding.linear_2:
            init.normal_(module.weight, std=self.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            init.ones_(module.weight)
            init.zeros_(module.bias)

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

    def check_scheduler(self, scheduler: SchedulerMixin, temperature: float = 1.0, **head_kwargs: Any) -> None:
        """Refuse a scheduler that can't run this head.

        Args:
            scheduler (`SchedulerMixin`): the candidate.
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

    def masked_loss(
        self,
        *,
        condition: torch.Tensor,
        target: torch.Tensor,
        timesteps: torch.Tensor | None,
        noise: torch.Tensor | None,
        scheduler: TokenDDPMScheduler,
        mask: torch.Tensor,
        rows: torch.Tensor,
        num_masked: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """Squared error of epsilon + variational bound, averaged over the masked tokens and their draws.

        Raises:
            ValueError: if the scheduler is no [`TokenDDPMScheduler`], or a shape does not fit.
        """
        if not isinstance(scheduler, TokenDDPMScheduler):
            raise ValueError(
                f"Training needs a TokenDDPMScheduler, got {type(scheduler).__name__} as `noise_scheduler`."
            )
        copies = self.batch_multiplier
        length = copies * mask.numel()
        check_tensor("timesteps", timesteps, (length,), torch.int64)
        check_tensor("noise", noise, (length, self.token_dim))
        if timesteps is not None and timesteps.device.type == "cpu":
            least, most = timesteps.min().item(), timesteps.max().item()
            if least < 0 or most >= len(scheduler):
                raise ValueError(f"`timesteps` has to lie in 0..{len(scheduler) - 1}, got {least}..{most}.")
        # Row r of the repeated batch is row r modulo the batch.
        repeated = (rows + mask.numel() * torch.arange(copies, device=mask.device)[:, None]).flatten()
        condition, target = condition.repeat(copies, 1), target.repeat(copies, 1).float()
        device = target.device
        # What is drawn has the shape (copies, masked tokens, ...): an image's tokens stand together in every copy.
        shape = (copies, len(rows))
        counts = None
        if isinstance(generator, list):
            counts = mask.sum(1).tolist() if num_masked is None else [num_masked] * len(mask)
        if timesteps is None:
            uniform = partial(torch.randint, 0, len(scheduler))
            timesteps = draw(uniform, shape, generator, device, 1, counts).flatten()
        else:
            timesteps = timesteps.to(device)[repeated]
        if noise is None:
            noise = draw(torch.randn, (*shape, self.token_dim), generator, device, 1, counts).flatten(0, 1)
        else:
            noise = noise.to(device)[repeated].float()
        parts = (condition, target, timesteps, noise)
        if self.loss_chunk_size is None:
            return self._row_losses(scheduler, *parts).mean()
        chunks = zip(*(part.split(self.loss_chunk_size) for part in parts), strict=True)
        settings = {"use_reentrant": False, "preserve_rng_state": False}  # nothing is drawn inside
        return torch.cat([checkpoint(self._row_losses, scheduler, *chunk, **settings) for chunk in chunks]).mean()

    def _row_losses(
        self,
        scheduler: TokenDDPMScheduler,
        condition: torch.Tensor,
        target: torch.Tensor,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """The loss of each row, (rows,)."""
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

    def compile_sampling(self, **kwargs: Any) -> None:
        """Compile the denoising step of `sample`, which `forward` and the loss share.

        Args:
            kwargs (`Any`): for `torch.compile`.
        """
        vars(self).pop("_denoise", None)  # of an earlier call
        compiled = torch.compile(self._denoise, **kwargs)

        def denoise(noisy_tokens: torch.Tensor, modulations: Iterable[torch.Tensor]) -> torch.Tensor:
            # Plain rows in memory of their own: what is compiled then fits any number of tokens.
            output = compiled(noisy_tokens.flatten(0, -2), torch.stack(list(modulations)).flatten(1, -2))
            # A copy, because the next replay of a CUDA graph writes to the same memory.
            return output.unflatten(0, noisy_tokens.shape[:-1]).clone()

        self._denoise = denoise

    def __getstate__(self) -> dict[str, Any]:
        # As with torch's modules, copies are not compiled: they would compute with the weights of this one.
        state = super().__getstate__()
        state.pop("_denoise", None)
        return state

    def _embed_condition(self, condition: torch.Tensor) -> torch.Tensor:
        """The condition's part of the embedding, whose type is the one that the head computes in."""
        if condition.dtype != self.condition_proj.weight.dtype:
            condition = as_computed(condition, self.condition_proj)
        return self.condition_proj(condition)

    def _modulations(
        self, time_embeddings: torch.Tensor, embedding: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """The modulations of one step after the other, from the embeddings of the times (S, 1, 1, w) and of the
        conditions (B, K, w). Those of as many steps as the memory bound allows are computed at once, at least one."""
        parts = 3 * len(self.blocks) + 2
        ahead = max(1, MODULATION_BYTES // (parts * max(1, embedding.numel()) * embedding.element_size()))
        for some in time_embeddings.split(ahead):
            yield from zip(*(modulation.unbind() for modulation in self._modulate(some, embedding)), strict=True)

    def _modulate(self, time_embedding: torch.Tensor, embedding: torch.Tensor) -> Iterator[torch.Tensor]:
        """What the sum of the time's and the condition's embedding does: shift, 1 + scale and gate of each block, then
        shift and 1 + scale of the output. One after the other, so that the backward pass frees each with its block."""
        activated = nn.functional.silu(time_embedding + embedding).to(embedding.dtype)
        shape, rows = activated.shape[:-1], activated.flatten(0, -2)  # quantised layers know no more dimensions
        for block in self.blocks:
            shift, scale, gate = block.modulation(rows).unflatten(0, shape).chunk(3, dim=-1)
            yield from (shift, 1 + scale, gate)
        shift, scale = self.out_modulation(rows).unflatten(0, shape).chunk(2, dim=-1)
        yield from (shift, 1 + scale)

    def _denoise(self, noisy_tokens: torch.Tensor, modulations: Iterable[torch.Tensor]) -> torch.Tensor:
        """The MLP, modulated."""
        modulations = iter(modulations)
        hidden_states = self.token_proj(noisy_tokens)
        for block in self.blocks:
            hidden_states = block.update(hidden_states, *islice(modulations, 3))
        shift, scale = modulations
        return self.out_proj(torch.addcmul(shift, self.out_norm(hidden_states), scale))
