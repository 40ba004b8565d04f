# SPDX-License-Identifier: Apache-2.0
"""A token head with a density: a mixture of Gaussians for whole tokens, or for one group of features after another."""

import math
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from diffusers import BaseGuidance, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.quasirandom import SobolEngine
from transformers import initialization as init

from ..utils import check_count, check_number
from .head_base import check_tensor, guide, inverse_cdf
from .modulation import ModulatedHead


class CausalAttention(nn.Module):
    """One residual block: h + gate * Attention(LN(h) * (1 + scale) + shift), of a position to itself and those before.

    It has no `forward`: as with [`ModulatedBlock`], many updates share the modulation.

    Args:
        hidden_size (`int`): width.
        num_attention_heads (`int`): divides the width.
        layer_norm_eps (`float`): of the layer norm.
    """

    def __init__(self, hidden_size: int, num_attention_heads: int, layer_norm_eps: float):
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.modulation = nn.Linear(hidden_size, 3 * hidden_size)

    def update(
        self,
        hidden_states: torch.Tensor,
        shift: torch.Tensor,
        scale: torch.Tensor,
        gate: torch.Tensor,
        past: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply the block, modulated.

        Args:
            hidden_states (`torch.Tensor` of shape `(rows, positions, hidden_size)`): all positions, or the next one.
            shift (`torch.Tensor` of shape `(rows, 1, hidden_size)`): the first third of the modulation.
            scale (`torch.Tensor` of the same shape): 1 + the second third.
            gate (`torch.Tensor` of the same shape): the last third.
            past (`torch.Tensor` of shape `(2, rows, heads, seen, head_size)`, *optional*): keys and values of the
                positions before the next one.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the new states, and keys and values of all positions up to here.
        """
        update = torch.addcmul(shift, self.norm(hidden_states), scale)
        # (rows, positions, 3 * width) to three times (rows, heads, positions, head_size)
        query, *new = self.qkv(update).unflatten(-1, (3, self.num_attention_heads, -1)).permute(2, 0, 3, 1, 4)
        is_causal = past is None  # the next position sees all that there are
        past = torch.stack(new) if past is None else torch.cat([past, torch.stack(new)], dim=-2)
        update = nn.functional.scaled_dot_product_attention(query, *past, is_causal=is_causal)
        return torch.addcmul(hidden_states, gate, self.proj(update.transpose(1, 2).flatten(2))), past


class MixtureHead(ModulatedHead):
    """A mixture of Gaussians with diagonal covariances, whose weights, means and variances follow from the condition.

    Of whole tokens, as in GIVT (arXiv:2312.02116), or of one group of features after another, each given those before
    it, by a small causal transformer over the groups, as in ARINAR (arXiv:2503.02883). Either has an exact density,
    `log_prob`; the loss is its negative in nats per number of a token, so that it is comparable among token widths.

    Args:
        token_dim (`int`): numbers in a token.
        condition_dim (`int`): width of the backbone's output.
        num_layers (`int`, *optional*, defaults to 1): residual blocks; each has an attention before it where there
            are groups.
        num_components (`int`, *optional*, defaults to 16): Gaussians in a mixture.
        feature_group (`int`, *optional*): numbers in a group; divides `token_dim`. 1 is ARINAR's; None, or all of
            them, means whole tokens.
        num_attention_heads (`int`, *optional*, defaults to 4): between groups; divides `hidden_size`.
        min_log_variance (`float`, *optional*, defaults to -10.0): below all log variances: f + softplus(x - f), with x
            from the network. Without a floor a Gaussian could shrink to one token of the training data, where the
            density has no bound.
        settings (`Any`): those of [`ModulatedHead`], `modulation_groups` for whole tokens only; `batch_multiplier` is
            without effect, since this loss draws nothing.

    Raises:
        ValueError: if a setting is no number, out of its range, or does not divide what it has to.
    """

    sampling_defaults = {"num_diffusion_steps": 1}
    has_steps = False

    def __init__(
        self,
        token_dim: int,
        condition_dim: int,
        num_layers: int = 1,
        num_components: int = 16,
        feature_group: int | None = None,
        num_attention_heads: int = 4,
        min_log_variance: float = -10.0,
        **settings: Any,
    ):
        super().__init__(token_dim, condition_dim, num_layers, **settings)
        group = token_dim if feature_group is None else feature_group
        counts = {"num_components": num_components, "feature_group": group, "num_attention_heads": num_attention_heads}
        for name, value in counts.items():
            check_count(name, value)
        check_number("min_log_variance", min_log_variance, -30, 0)
        if token_dim % group:
            raise ValueError(f"`feature_group` has to divide `token_dim` {token_dim}, got {group}.")
        hidden_size = self.condition_proj.out_features
        self.batch_multiplier, self.loss_noise_dim = 1, 0
        self.num_components, self.min_log_variance = num_components, min_log_variance
        self.feature_group, self.num_groups = group, token_dim // group
        # A number for each feature, and two for each group: which Gaussian, and which candidate.
        self.noise_per_step = math.ceil(2 * self.num_groups / token_dim)
        if self.num_groups > 1:
            self._attend_to_groups(hidden_size, num_attention_heads)
        self.position_embedding = nn.Embedding(self.num_groups, hidden_size)
        self.out_proj = nn.Linear(hidden_size, num_components * (1 + 2 * group))

    def build_inputs(self, hidden_size: int) -> None:
        self.condition_proj = nn.Linear(self.condition_dim, hidden_size)

    def _attend_to_groups(self, hidden_size: int, num_attention_heads: int) -> None:
        """Put an attention before each block, and a layer for the groups before the next."""
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"`num_attention_heads` has to divide `hidden_size` {hidden_size}, got {num_attention_heads}."
            )
        if any(block.modulation is None for block in self.blocks):
            raise ValueError("`modulation_groups` has to be left out where `feature_group` is smaller than a token.")
        pairs = [
            (CausalAttention(hidden_size, num_attention_heads, self.out_norm.eps), block) for block in self.blocks
        ]
        self.blocks = nn.ModuleList([block for pair in pairs for block in pair])
        self.token_proj = nn.Linear(self.feature_group, hidden_size)

    def init_weights(self, module: nn.Module) -> None:
        """As in [`ModulatedHead`], but for the output's layer: with zeros all Gaussians would be one for ever.

        Args:
            module (`torch.nn.Module`): the head itself or a module inside it.
        """
        if module is self.out_proj:
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.initializer_range)
        else:
            super().init_weights(module)

    def forward(self, condition: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The network: the mixture of each group, given the groups before it.

        Args:
            condition (`torch.Tensor` of shape `(rows, condition_dim)`): the backbone's output.
            tokens (`torch.Tensor` of shape `(rows, token_dim)`): the tokens; the last group is not read.

        Returns:
            `torch.Tensor` of shape `(rows, num_groups, num_components * (1 + 2 * feature_group))`: logits of the
            Gaussians, then means, then log variances before their floor.
        """
        embedding = self._embed_condition(condition)
        states = embedding[:, None]
        if self.num_groups > 1:
            earlier = self.token_proj(tokens.to(embedding.dtype).unflatten(-1, (self.num_groups, -1))[:, :-1])
            states = torch.cat([states, earlier], 1)
        return self._denoise(states + self._positions(embedding), self._modulate_groups(embedding))[0]

    def log_prob(self, condition: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The log density of tokens.

        Args:
            condition (`torch.Tensor` of shape `(..., condition_dim)`): the backbone's output.
            tokens (`torch.Tensor` of shape `(..., token_dim)`): the tokens, unit-scaled.

        Returns:
            `torch.Tensor` of shape `(...)`: in nats, of a whole token; float32, or float64 where the head is.

        Raises:
            ValueError: if the shapes do not fit.
        """
        leading = tuple(getattr(condition, "shape", ())[:-1])
        check_tensor("condition", condition, (*leading, self.condition_dim), optional=False)
        check_tensor("tokens", tokens, (*leading, self.token_dim), optional=False)
        rows = self._log_density(condition.reshape(-1, self.condition_dim), tokens.reshape(-1, self.token_dim))
        return rows.view(leading)

    def check_scheduler(self, scheduler: SchedulerMixin | None, temperature: float = 1.0, **head_kwargs: Any) -> None:
        """Refuse settings of `sample` that can't be. Any scheduler will do: none is used.

        Args:
            scheduler (`SchedulerMixin`, *optional*): any.
            temperature (`float`, *optional*, defaults to 1.0): at least 0.
            head_kwargs (`Any`): `num_candidates`, see `draw`.

        Raises:
            ValueError: if a setting is unknown or out of range.
        """
        if head_kwargs.keys() - {"num_candidates"}:
            raise ValueError(f"The mixture head's settings are num_candidates, got {sorted(head_kwargs)}.")
        check_count("num_candidates", head_kwargs.get("num_candidates", 1))
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
        """The negative log density, in nats per number. Scheduler, times and noise are without effect."""
        return -self._log_density(condition, target).float() / self.token_dim

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
        num_candidates: int = 64,
        **_: Any,
    ) -> torch.Tensor:
        """Sample tokens, group after group.

        The temperature multiplies the deviations of the Gaussians. Guidance is importance resampling (ARINAR): of
        candidates from the conditional mixture one is taken, each with a probability proportional to
        (p(x | condition) / p(x | negative_condition))^(guidance_scale - 1), where the densities are those of
        temperature 1. What is guided is thus the log density, linearly, or as a guider does.

        The first `token_dim` numbers of a token's noise are what multiplies the deviations, the places of the next in
        the normal distribution say which Gaussian, and those of the last which candidate. Further candidates are a
        shifted Sobol sequence around these places (a Cranley-Patterson rotation): each of them alone is distributed as
        the mixture, together they cover it more evenly than independent ones, and need no more noise. Scheduler and
        steps are without effect.

        Args:
            num_candidates (`int`, *optional*, defaults to 64): candidates for each group, where there is guidance.
                The more, the nearer to what guidance aims at.

        Returns:
            `torch.Tensor` of shape `(batch, num_tokens, token_dim)`: float32.
        """
        batch, num_tokens, _ = condition.shape
        guided, groups = guidance_scale != 1.0, self.num_groups
        if noise is None:
            shape = (batch, num_tokens, self.noise_entries(1), self.token_dim)
            noise = randn_tensor(shape, generator=generator, device=condition.device)
        # (rows, groups, 1, feature_group + 1) and (rows, groups, 1)
        places = torch.special.ndtr(noise.to(condition.device, torch.float64).flatten(0, 1).flatten(1))
        features, which, picks = places[:, : self.token_dim + 2 * groups].split([self.token_dim, groups, groups], 1)
        places = torch.cat([features.unflatten(1, (groups, -1)), which[..., None]], -1)[:, :, None]
        lattice = SobolEngine(places.shape[-1]).draw(num_candidates if guided else 1, dtype=torch.float64)
        places = (places + lattice.to(places.device)) % 1
        embedding = self._embed_condition(
            (torch.cat([condition, negative_condition]) if guided else condition).flatten(0, 1)
        )
        states, modulations, past = embedding[:, None], self._modulate_groups(embedding), None
        positions, found = self._positions(embedding), []
        for group in range(groups):
            output, past = self._denoise(states + positions[group], modulations, past)
            conditional, *others = (self._mixture(half) for half in output.chunk(2 if guided else 1))
            candidates = _quantiles(conditional, places[:, group], temperature)
            if guided:
                log_density = conditional.log_prob(candidates)
                target = guide(log_density, others[0].log_prob(candidates), guidance_scale, guider)
                pick = inverse_cdf((target - log_density).softmax(-1), picks[:, group, None])
                candidates = candidates.gather(1, pick[..., None].expand(-1, -1, self.feature_group))
            found.append(candidates)
            if group + 1 < groups:
                states = self.token_proj(candidates.to(embedding.dtype)).repeat(2 if guided else 1, 1, 1)
        return torch.cat(found, -1).view(batch, num_tokens, self.token_dim).float()

    def compile_sampling(self, **kwargs: Any) -> None:
        """Compile the transformer, which sampling, `forward` and the loss share.

        Args:
            kwargs (`Any`): for `torch.compile`.
        """
        vars(self).pop("_denoise", None)  # of an earlier call
        compiled = torch.compile(self._denoise, **kwargs)

        def denoise(*inputs: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
            output, kept = compiled(*inputs)
            # Copies, because the next replay of a CUDA graph writes to the same memory.
            return output.clone(), [seen.clone() for seen in kept]

        self._denoise = denoise

    def _positions(self, embedding: torch.Tensor) -> torch.Tensor:
        """What tells the groups apart, (num_groups, hidden_size). Called as a module, for hooks that move weights."""
        return self.position_embedding(torch.arange(self.num_groups, device=embedding.device)).to(embedding.dtype)

    def _modulate_groups(self, embedding: torch.Tensor) -> torch.Tensor:
        """The modulations of all blocks, the same for all groups: (parts, rows, 1, hidden_size)."""
        return torch.stack(list(self._modulate(0.0, embedding)))[:, :, None]

    def _denoise(
        self, states: torch.Tensor, modulations: torch.Tensor, past: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The transformer, modulated, on all groups or on the next: its output, and keys and values of each attention
        up to here."""
        modulations, kept = iter(modulations), []
        for block in self.blocks:
            parts = islice(modulations, 3)
            if isinstance(block, CausalAttention):
                states, seen = block.update(states, *parts, past=None if past is None else past[len(kept)])
                kept.append(seen)
            else:
                states = block.update(states, *parts)
        shift, scale = modulations
        return self.out_proj(torch.addcmul(shift, self.out_norm(states), scale)), kept

    def _mixture(self, output: torch.Tensor) -> MixtureSameFamily:
        """The mixtures that outputs (rows, groups, ...) of the network mean, with at least float32's precision."""
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        size, shape = self.num_components * self.feature_group, (self.num_components, self.feature_group)
        logits, means, log_variances = output.split([self.num_components, size, size], -1)
        floor = self.min_log_variance
        deviations = torch.exp((floor + nn.functional.softplus(log_variances - floor)) / 2).unflatten(-1, shape)
        gaussians = Independent(Normal(means.unflatten(-1, shape), deviations, validate_args=False), 1)
        return MixtureSameFamily(Categorical(logits=logits, validate_args=False), gaussians, validate_args=False)

    def _log_density(self, condition: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Of rows (rows, condition_dim) and (rows, token_dim): (rows,)."""
        mixture = self._mixture(self(condition, tokens))
        return mixture.log_prob(tokens.unflatten(-1, (self.num_groups, -1))).sum(-1)


def _quantiles(mixture: MixtureSameFamily, places: torch.Tensor, temperature: float) -> torch.Tensor:
    """Candidates (rows, candidates, size) of mixtures (rows, 1), at places (rows, candidates, size + 1) in (0, 1): the
    last says which Gaussian, the others where in it."""
    gaussians = mixture.component_distribution.base_dist
    which = inverse_cdf(mixture.mixture_distribution.probs[:, 0], places[..., -1])
    which = which[..., None].expand(-1, -1, places.shape[-1] - 1)
    mean, deviation = (part[:, 0].gather(1, which) for part in (gaussians.mean, gaussians.stddev))
    tiny = torch.finfo(places.dtype).eps  # 8.1 deviations
    normal = torch.special.ndtri(places[..., :-1].clamp(tiny, 1 - tiny))
    return mean + temperature * deviation * normal.to(mean.dtype)
