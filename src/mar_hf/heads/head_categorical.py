# SPDX-License-Identifier: Apache-2.0
"""A token head for discrete tokenizers: softmax over the codebook, trained by cross-entropy."""

from numbers import Integral, Real
from typing import Any

import torch
from diffusers import BaseGuidance, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from transformers import initialization as init

from ..tokenizers import ImageTokenizer
from ..utils import check_count
from .head_base import HeadBlock, TokenHead, as_computed, guide


class CategoricalHeadBlock(HeadBlock):
    """One residual block: h + MLP(LN(h))."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the block.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., hidden_size)`): of a token.

        Returns:
            `torch.Tensor` of shape `(..., hidden_size)`.
        """
        return hidden_states + self.linear_2(self.activation(self.linear_1(self.norm(hidden_states))))


class CategoricalHead(TokenHead):
    """A distribution over the vectors of a codebook (the cross-entropy baseline of arXiv:2406.11838, section 5.1).

    A discrete token travels as its codebook vector, scaled as every token, so nothing but this head knows of code
    numbers. It keeps the codebook, which `set_tokenizer` copies and a checkpoint holds.

    Args:
        token_dim (`int`): numbers in a token.
        condition_dim (`int`): width of the backbone's output.
        num_codes (`int`, *optional*, defaults to 256): vectors of the codebook.
        num_layers (`int`, *optional*, defaults to 0): residual blocks before the logits; 0 makes them straight from
            the condition.
        hidden_size (`int`, *optional*, defaults to 1024): width of the blocks.
        batch_multiplier (`int`, *optional*, defaults to 1): without effect; this loss draws nothing.
        layer_norm_eps (`float`, *optional*, defaults to 1e-06): of the layer norms.

    Raises:
        ValueError: if a setting is no number, or out of its range.
    """

    sampling_defaults = {"num_diffusion_steps": 1}
    uses_codebook = True
    has_steps = False
    noise_per_step = 0

    def __init__(
        self,
        token_dim: int,
        condition_dim: int,
        num_codes: int = 256,
        num_layers: int = 0,
        hidden_size: int = 1024,
        batch_multiplier: int = 1,
        layer_norm_eps: float = 1e-6,
    ):
        super().__init__()
        self.check_sizes(token_dim, condition_dim, num_layers, hidden_size, batch_multiplier, layer_norm_eps)
        check_count("num_codes", num_codes, 1, 2**24)
        self.num_codes = num_codes
        self.register_buffer("codebook", torch.zeros(num_codes, token_dim))
        self.mlp = nn.Sequential()
        if num_layers:
            self.mlp.append(nn.Linear(condition_dim, hidden_size))
            self.mlp.extend([CategoricalHeadBlock(hidden_size, layer_norm_eps) for _ in range(num_layers)])
            self.mlp.append(nn.LayerNorm(hidden_size, eps=layer_norm_eps))
        self.out_proj = nn.Linear(hidden_size if num_layers else condition_dim, num_codes)
        self._has_codebook = False

    def init_weights(self, module: nn.Module) -> None:
        """Zeros for the logits' layer, so that all codes start equally likely; Xavier for other linear layers.

        Args:
            module (`torch.nn.Module`): the head itself or a module inside it.
        """
        if module is self:
            init.zeros_(self.codebook)
        elif isinstance(module, nn.Linear):
            (init.zeros_ if module is self.out_proj else init.xavier_uniform_)(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    @torch.no_grad()
    def set_tokenizer(self, tokenizer: ImageTokenizer) -> None:
        """Copy the tokenizer's codebook.

        Args:
            tokenizer ([`ImageTokenizer`]): with `quantize`.

        Raises:
            ValueError: if it has no codebook, or one of another size.
        """
        codebook = tokenizer.codebook
        if codebook.shape != self.codebook.shape:
            raise ValueError(
                f"`tokenizer` has a codebook of {codebook.shape[0]} vectors of {codebook.shape[1]} numbers, the head "
                f"has `num_codes` {self.num_codes} and `token_dim` {self.token_dim}."
            )
        self.codebook.copy_(codebook)

    def forward(self, condition: torch.Tensor) -> torch.Tensor:
        """The network: logits of the codes.

        Args:
            condition (`torch.Tensor` of shape `(..., condition_dim)`): the backbone's output.

        Returns:
            `torch.Tensor` of shape `(..., num_codes)`: float32.
        """
        return self.out_proj(self.mlp(as_computed(condition, self.out_proj))).float()

    def check_scheduler(self, scheduler: SchedulerMixin | None, temperature: float = 1.0, **head_kwargs: Any) -> None:
        """Refuse settings of `sample` that can't be. Any scheduler will do: none is used.

        Args:
            scheduler (`SchedulerMixin`, *optional*): any.
            temperature (`float`, *optional*, defaults to 1.0): at least 0.
            head_kwargs (`Any`): `top_k` and `top_p`, see `draw`.

        Raises:
            ValueError: if a setting is unknown or out of range.
        """
        if head_kwargs.keys() - {"top_k", "top_p"}:
            raise ValueError(f"The categorical head has the settings top_k and top_p, got {sorted(head_kwargs)}.")
        top_k, top_p = head_kwargs.get("top_k"), head_kwargs.get("top_p")
        if top_k is not None and not (isinstance(top_k, Integral) and 1 <= top_k <= self.num_codes):
            raise ValueError(f"`top_k` has to be a whole number from 1 to {self.num_codes}, got {top_k}.")
        if top_p is not None and not (isinstance(top_p, Real) and 0 < top_p <= 1):
            raise ValueError(f"`top_p` has to lie in (0, 1], got {top_p}.")
        if not temperature >= 0:
            raise ValueError(f"`temperature` has to be at least 0, got {temperature}.")

    def masked_loss(self, *, condition: torch.Tensor, target: torch.Tensor, **_: Any) -> torch.Tensor:
        """Cross-entropy of the true codes: each target stands for the nearest vector of the codebook.

        Nothing is drawn, so a scheduler, timesteps, noise and generators are without effect.

        Raises:
            ValueError: if the head has no codebook yet.
        """
        self._check_codebook()
        # Exact distances: the quick ones, by a matrix product, can miss a vector that equals its target.
        distances = torch.cdist(target.float(), self.codebook.float(), compute_mode="donot_use_mm_for_euclid_dist")
        return nn.functional.cross_entropy(self(condition), distances.argmin(-1))

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
        top_k: int | None = None,
        top_p: float | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Sample vectors of the codebook.

        Guidance, by `guide`, is on logits, which are then divided by the temperature: 0 takes the likeliest code. The
        first number of a token's noise decides: its place in the normal distribution is the place in that of the
        codes. Scheduler and steps are without effect.

        Args:
            top_k (`int`, *optional*): only the likeliest so many codes; None means all.
            top_p (`float`, *optional*): of those, only the likeliest that together reach this probability; None means
                all.

        Returns:
            `torch.Tensor` of shape `(batch, num_tokens, token_dim)`: float32.

        Raises:
            ValueError: if the head has no codebook yet.
        """
        self._check_codebook()
        guided = guidance_scale != 1.0
        logits = self(torch.cat([condition, negative_condition]) if guided else condition)
        if guided:
            logits = guide(*logits.chunk(2), guidance_scale, guider)
        if temperature == 0:
            return self.codebook[logits.argmax(-1)].float()
        if noise is None:
            shape = (*condition.shape[:2], 1, self.token_dim)
            noise = randn_tensor(shape, generator=generator, device=condition.device)
        probabilities = _likely_ones((logits.double() / temperature).softmax(-1), top_k, top_p)
        cumulative = probabilities.cumsum(-1)
        # The first code whose cumulative probability lies above the place: never one of probability 0. Below 1 there
        # is one.
        place = torch.special.ndtr(noise[:, :, 0, :1].to(cumulative)).clamp(max=1 - 1e-12)
        place = place * cumulative[..., -1:]
        codes = torch.searchsorted(cumulative, place, right=True)[..., 0]
        # What is not a number has no code, and goes on as not a number.
        return self.codebook[codes.clamp(max=self.num_codes - 1)].float() + (0 * place).float()

    def _check_codebook(self) -> None:
        if not self._has_codebook:
            # Asked until there is one, and not in every step: the answer waits for the device.
            self._has_codebook = bool(self.codebook.any())
        if not self._has_codebook:
            raise ValueError("The categorical head has no codebook yet: call `set_tokenizer` first.")


def _likely_ones(probabilities: torch.Tensor, top_k: int | None = None, top_p: float | None = None) -> torch.Tensor:
    """Zero for all but the likeliest; what is left does not sum to 1. Of equal ones the first count as likelier."""
    if top_k is None and top_p is None:
        return probabilities
    ordered, codes = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered[..., top_k:] = 0
    if top_p is not None:
        cumulative = ordered.cumsum(-1)
        ordered[cumulative - ordered >= top_p * cumulative[..., -1:]] = 0
    return torch.zeros_like(probabilities).scatter(-1, codes, ordered)
