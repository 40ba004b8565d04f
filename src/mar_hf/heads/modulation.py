# SPDX-License-Identifier: Apache-2.0
"""What heads are made of whose blocks are modulated: by a time and the condition, or by noise."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, ClassVar

import torch
from diffusers import SchedulerMixin
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from ..utils import check_count, check_number, draw
from .head_base import HeadBlock, TokenHead, as_computed, check_tensor


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


class ModulatedBlock(HeadBlock):
    """One residual block: h + gate * MLP(LN(h) * (1 + scale) + shift), modulated by time and condition.

    It has no `forward`: many updates share the modulation, which does not depend on the noisy token.

    Args:
        hidden_size (`int`): width.
        layer_norm_eps (`float`): of the layer norm.
        has_modulation (`bool`, *optional*, defaults to `True`): False for one that shares the block's before it.
    """

    def __init__(self, hidden_size: int, layer_norm_eps: float, has_modulation: bool = True):
        super().__init__(hidden_size, layer_norm_eps)
        self.modulation = nn.Linear(hidden_size, 3 * hidden_size) if has_modulation else None

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


class ModulatedHead(TokenHead):
    """The MLP of MAR's head: residual blocks on the noisy token, modulated by time and condition (arXiv:2406.11838,
    section 4.2), with all that training and sampling share. A head on it writes `draw`, `draw_times` and `row_losses`.

    Args:
        token_dim (`int`): numbers in a token.
        condition_dim (`int`): width of the backbone's output.
        num_layers (`int`, *optional*, defaults to 3): residual blocks.
        hidden_size (`int`, *optional*, defaults to 1024): width of the MLP.
        batch_multiplier (`int`, *optional*, defaults to 1): draws of time and noise per token and training step.
        layer_norm_eps (`float`, *optional*, defaults to 1e-06): of the layer norms.
        initializer_range (`float`, *optional*, defaults to 0.02): deviation of the time embedding's first weights.
        loss_chunk_size (`int`, *optional*): rows of the loss that are computed at a time, and again in the backward
            pass, so that only their activations need room; the loss is the same. None: all at once, and once.
        modulation_groups (`int`, *optional*): projections that modulate the blocks, each shared by neighbours; they
            are half of the weights that a step reads. None: one for each block, as the original.

    Raises:
        ValueError: if a setting is no number, or out of its range.
    """

    # Numbers that the network gives for each of a token's.
    outputs_per_number: ClassVar[int] = 1
    # The layer that makes the stream through the blocks.
    stream_layer: ClassVar[str] = "token_proj"
    # Of `timesteps`; None means floating-point numbers.
    time_dtype: ClassVar[torch.dtype | None] = None

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
        modulation_groups: int | None = None,
    ):
        super().__init__()
        self.check_sizes(token_dim, condition_dim, num_layers, hidden_size, batch_multiplier, layer_norm_eps)
        check_number("initializer_range", initializer_range, 0, 10)
        if loss_chunk_size is not None:
            check_count("loss_chunk_size", loss_chunk_size, 1, 2**62)
        groups = num_layers if modulation_groups is None else modulation_groups
        check_count("modulation_groups", groups, min(1, num_layers), num_layers)
        self.batch_multiplier = batch_multiplier
        self.initializer_range = initializer_range
        self.loss_chunk_size = loss_chunk_size
        self.loss_noise_dim = token_dim
        self.build_inputs(hidden_size)
        # The first of each group has the projection.
        first = {-(-group * num_layers // groups) for group in range(groups)}
        self.blocks = nn.ModuleList(
            [ModulatedBlock(hidden_size, layer_norm_eps, number in first) for number in range(num_layers)]
        )
        self.out_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps, elementwise_affine=False)
        self.out_modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.out_proj = nn.Linear(hidden_size, self.outputs_per_number * token_dim)

    def build_inputs(self, hidden_size: int) -> None:
        """The layers before the blocks.

        Args:
            hidden_size (`int`): width of the MLP.
        """
        self.time_embedding = TimeEmbedding(hidden_size)
        self.condition_proj = nn.Linear(self.condition_dim, hidden_size)
        self.token_proj = nn.Linear(self.token_dim, hidden_size)

    def init_weights(self, module: nn.Module) -> None:
        """Xavier for linear layers, N(0, initializer_range) in the time embedding, zeros where the original has zeros.

        Args:
            module (`torch.nn.Module`): the head itself or a module inside it.
        """
        zeroed = [self.out_modulation, self.out_proj, *(block.modulation for block in self.blocks)]
        if any(module is layer for layer in zeroed):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, Float32Linear):
            init.normal_(module.weight, std=self.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            init.ones_(module.weight)
            init.zeros_(module.bias)

    @abstractmethod
    def draw_times(self, scheduler: SchedulerMixin | None, draw_rows: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Draw the times of a training step.

        Args:
            scheduler (`SchedulerMixin`, *optional*): as `loss` takes it.
            draw_rows (`Callable`): takes a function of torch as `torch.rand`, and further dimensions, if any; draws a
                value for each row, each picture from its own generator.

        Returns:
            `torch.Tensor` of shape `(rows,)`, or with the further dimensions.
        """

    @abstractmethod
    def row_losses(
        self,
        scheduler: SchedulerMixin | None,
        condition: torch.Tensor,
        target: torch.Tensor,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """The loss of each row.

        Args:
            scheduler (`SchedulerMixin`, *optional*): as `loss` takes it.
            condition (`torch.Tensor` of shape `(rows, condition_dim)`): the backbone's output.
            target (`torch.Tensor` of shape `(rows, token_dim)`): the true tokens, float32.
            timesteps (`torch.Tensor` of shape `(rows,)`): of `draw_times`, or as given to `loss`.
            noise (`torch.Tensor` of shape `(rows, loss_noise_dim)`): standard normal, float32.

        Returns:
            `torch.Tensor` of shape `(rows,)`: float32.
        """

    def check_times(self, scheduler: SchedulerMixin | None, timesteps: torch.Tensor) -> None:
        """Refuse times that are given and out of range; of the right shape and type they are.

        Args:
            scheduler (`SchedulerMixin`, *optional*): as `loss` takes it.
            timesteps (`torch.Tensor` of shape `(rows,)`): as `loss` takes them, on the CPU.

        Raises:
            ValueError: if one is.
        """
        least, most = timesteps.min().item(), timesteps.max().item()
        if not (least >= 0 and most <= 1):
            raise ValueError(f"`timesteps` has to lie in [0, 1], got {least}..{most}.")

    def masked_loss(
        self,
        *,
        condition: torch.Tensor,
        target: torch.Tensor,
        timesteps: torch.Tensor | None,
        noise: torch.Tensor | None,
        scheduler: SchedulerMixin | None,
        mask: torch.Tensor,
        rows: torch.Tensor,
        num_masked: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """`row_losses`, averaged over the masked tokens and their draws.

        Raises:
            ValueError: if the scheduler is of another class than the head's, or a shape does not fit.
        """
        if self.scheduler_class is not None and not isinstance(scheduler, self.scheduler_class):
            raise ValueError(
                f"Training needs a {self.scheduler_class.__name__}, got {type(scheduler).__name__} as "
                "`noise_scheduler`."
            )
        copies = self.batch_multiplier
        length = copies * mask.numel()
        check_tensor("timesteps", timesteps, (length,), self.time_dtype)
        check_tensor("noise", noise, (length, self.loss_noise_dim))
        if timesteps is not None and timesteps.device.type == "cpu":
            self.check_times(scheduler, timesteps)
        # Row r of the repeated batch is row r modulo the batch.
        repeated = (rows + mask.numel() * torch.arange(copies, device=mask.device)[:, None]).flatten()
        condition, target = condition.repeat(copies, 1), target.repeat(copies, 1).float()
        device = target.device
        counts = None
        if isinstance(generator, list):
            counts = mask.sum(1).tolist() if num_masked is None else [num_masked] * len(mask)

        def draw_rows(function: Callable[..., torch.Tensor], *more: int) -> torch.Tensor:
            # (copies, masked tokens, ...): an image's tokens stand together in every copy.
            return draw(function, (copies, len(rows), *more), generator, device, 1, counts).flatten(0, 1)

        given = timesteps is not None
        timesteps = timesteps.to(device)[repeated] if given else self.draw_times(scheduler, draw_rows)
        if noise is None:
            noise = draw_rows(torch.randn, self.loss_noise_dim)
        else:
            noise = noise.to(device)[repeated].float()
        parts = (condition, target, timesteps, noise)
        if self.loss_chunk_size is None:
            return self.row_losses(scheduler, *parts).mean()
        chunks = zip(*(part.split(self.loss_chunk_size) for part in parts), strict=True)
        settings = {"use_reentrant": False, "preserve_rng_state": False}  # nothing is drawn inside
        return torch.cat([checkpoint(self.row_losses, scheduler, *chunk, **settings) for chunk in chunks]).mean()

    def start(
        self,
        condition: torch.Tensor,
        noise: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """What sampling starts from.

        Args:
            condition (`torch.Tensor` of shape `(batch, num_tokens, condition_dim)`): as of `sample`.
            noise (`torch.Tensor` of shape `(batch, num_tokens, entries, token_dim)`, *optional*): as of `sample`.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): draws it where it is not given.

        Returns:
            `torch.Tensor` of shape `(batch, num_tokens, token_dim)`: float32.
        """
        if noise is not None:
            return noise[:, :, 0].to(condition.device, torch.float32)
        return randn_tensor((*condition.shape[:2], self.token_dim), generator=generator, device=condition.device)

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

    def _modulate(self, time_embedding: torch.Tensor | float, embedding: torch.Tensor) -> Iterator[torch.Tensor]:
        """What the sum of the time's and the condition's embedding does: shift, 1 + scale and gate of each block, then
        shift and 1 + scale of the output. One after the other, so that the backward pass frees each with its block."""
        activated = nn.functional.silu(time_embedding + embedding).to(embedding.dtype)
        shape, rows = activated.shape[:-1], activated.flatten(0, -2)  # quantised layers know no more dimensions
        for block in self.blocks:
            if block.modulation is not None:
                shift, scale, gate = block.modulation(rows).unflatten(0, shape).chunk(3, dim=-1)
                scale = 1 + scale
            yield from (shift, scale, gate)
        shift, scale = self.out_modulation(rows).unflatten(0, shape).chunk(2, dim=-1)
        yield from (shift, 1 + scale)

    def _denoise(self, noisy_tokens: torch.Tensor, modulations: Iterable[torch.Tensor]) -> torch.Tensor:
        """The MLP, modulated."""
        modulations = iter(modulations)
        hidden_states = getattr(self, self.stream_layer)(noisy_tokens)
        for block in self.blocks:
            hidden_states = block.update(hidden_states, *islice(modulations, 3))
        shift, scale = modulations
        return self.out_proj(torch.addcmul(shift, self.out_norm(hidden_states), scale))
