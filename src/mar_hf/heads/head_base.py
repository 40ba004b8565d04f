# SPDX-License-Identifier: Apache-2.0
"""What every token head offers."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import nn

from ..tokenizers import ImageTokenizer
from ..utils import check_generator


def masked_rows(mask: torch.Tensor, num_masked: int | None = None) -> torch.Tensor:
    """Where the masked tokens stand in the flattened batch.

    Args:
        mask (`torch.Tensor` of shape `(batch, num_tokens)`): bool.
        num_masked (`int`, *optional*): masked tokens in every row, where the caller knows it: saves waiting for the
            device.

    Returns:
        `torch.Tensor` of shape `(rows,)`: int64, ascending.

    Raises:
        ValueError: if nothing is masked.
    """
    if num_masked is None:
        rows = mask.flatten().nonzero()[:, 0]
    else:
        # The same positions: a stable sort puts True first. How many `nonzero` finds, only the device knows.
        rows = mask.flatten().to(torch.uint8).argsort(descending=True, stable=True)[: num_masked * len(mask)]
    if not len(rows):
        raise ValueError("`mask` has to mask at least one token: the loss is the mean over masked ones.")
    return rows


def check_sampling_inputs(
    condition: torch.Tensor,
    negative_condition: torch.Tensor | None,
    guidance_scale: float,
    noise: torch.Tensor | None,
    num_entries: int,
    token_dim: int,
    generator: torch.Generator | list[torch.Generator] | None,
) -> None:
    """Refuse what does not fit together in `TokenHead.sample`.

    Args:
        condition (`torch.Tensor` of shape `(batch, num_tokens, condition_dim)`): sets the sizes.
        negative_condition (`torch.Tensor`, *optional*): has to be of the same shape where guidance needs it.
        guidance_scale (`float`): 1.0 means no guidance.
        noise (`torch.Tensor`, *optional*): has to be of shape `(batch, num_tokens, entries, token_dim)`.
        num_entries (`int`): noise that the sampler takes for a token; `entries` may be more.
        token_dim (`int`): numbers in a token.
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*): one, or one per image.

    Raises:
        ValueError: if one of them does not fit.
    """
    if guidance_scale != 1.0 and negative_condition is None:
        raise ValueError(f"`guidance_scale` {guidance_scale} needs `negative_condition`.")
    if guidance_scale != 1.0 and negative_condition.shape != condition.shape:
        raise ValueError(
            f"`negative_condition` has to be of shape {tuple(condition.shape)} as `condition`, got "
            f"{tuple(negative_condition.shape)}."
        )
    check_generator(generator, len(condition))
    expected = (*condition.shape[:2], num_entries, token_dim)
    if noise is not None and (
        noise.ndim != 4
        or noise.shape[:2] != expected[:2]
        or noise.shape[2] < num_entries
        or noise.shape[3] != token_dim
    ):
        raise ValueError(f"`noise` has to be of shape {expected}, got {tuple(noise.shape)}.")


class TokenHead(nn.Module, ABC):
    """Turns the backbone's condition vectors into samples of tokens; knows neither positions nor orders.

    A new head is one file with a subclass and one line in `TOKEN_HEADS`. Its constructor takes `token_dim`,
    `condition_dim`, `batch_multiplier` and its own settings; its weights are initialised by `init_weights`.
    """

    # What a pipeline takes for settings that neither its checkpoint nor the caller names.
    sampling_defaults: dict[str, object] = {}
    # Whether `set_tokenizer` reads the tokenizer's weights.
    uses_codebook: bool = False

    def set_tokenizer(self, tokenizer: ImageTokenizer) -> None:
        """Take over what the head has to know of the tokens, before training. Most heads need nothing.

        Args:
            tokenizer ([`ImageTokenizer`]): makes the tokens.

        Raises:
            ValueError: if the head can't work with such tokens.
        """

    def compile_sampling(self, **kwargs: Any) -> None:
        """Compile what `sample` runs again and again. Heads without such a loop have nothing to do.

        Args:
            kwargs (`Any`): for `torch.compile`.
        """

    @abstractmethod
    def init_weights(self, module: nn.Module) -> None:
        """Initialise the direct parameters of one of the head's modules.

        Args:
            module (`torch.nn.Module`): the head itself or a module inside it.
        """

    @abstractmethod
    def check_scheduler(self, scheduler: SchedulerMixin, temperature: float = 1.0, **head_kwargs: object) -> None:
        """Refuse a scheduler, or settings of `sample`, that this head can't work with.

        Args:
            scheduler (`SchedulerMixin`): the candidate.
            temperature (`float`, *optional*, defaults to 1.0): the temperature that it will be asked for.
            head_kwargs (`object`): settings that only this kind of head has.

        Raises:
            ValueError: if one does not fit, or the head has no such setting.
        """

    @abstractmethod
    def loss(
        self,
        *,
        condition: torch.Tensor,
        target: torch.Tensor,
        mask: torch.Tensor,
        scheduler: SchedulerMixin,
        timesteps: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        num_masked: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """The training loss, averaged over the masked tokens.

        Args:
            condition (`torch.Tensor` of shape `(batch, num_tokens, condition_dim)`): the backbone's output.
            target (`torch.Tensor` of shape `(batch, num_tokens, token_dim)`): the true tokens.
            mask (`torch.Tensor` of shape `(batch, num_tokens)`): bool, True for tokens that count.
            scheduler (`SchedulerMixin`): the noise schedule, for heads that have one.
            timesteps (`torch.Tensor`, *optional*): int64; drawn where not given.
            noise (`torch.Tensor`, *optional*): drawn where not given.
            num_masked (`int`, *optional*): masked tokens in every row, where the caller knows it: saves waiting for
                the device.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): for what is drawn; with one per
                image, what is drawn for an image does not depend on the others.

        Returns:
            `torch.Tensor`: a float32 scalar.
        """

    @abstractmethod
    def sample(
        self,
        *,
        condition: torch.Tensor,
        negative_condition: torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        scheduler: SchedulerMixin,
        num_steps: int,
        temperature: float = 1.0,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        **head_kwargs: object,
    ) -> torch.Tensor:
        """Sample tokens.

        Args:
            condition (`torch.Tensor` of shape `(batch, num_tokens, condition_dim)`): the backbone's output at the
                positions wanted.
            negative_condition (`torch.Tensor` of the same shape, *optional*): without the class, for guidance.
            guidance_scale (`float`, *optional*, defaults to 1.0): 1.0 means no guidance.
            scheduler (`SchedulerMixin`): the sampler, for heads that have one.
            num_steps (`int`): sampler steps.
            temperature (`float`, *optional*, defaults to 1.0): below 1.0, samples vary less.
            noise (`torch.Tensor` of shape `(batch, num_tokens, num_steps + 1, token_dim)`, *optional*): entry 0 is the
                start, entry 1 + s is injected at step s.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): for the noise, where none is given.
            head_kwargs (`object`): settings that only this kind of head has.

        Returns:
            `torch.Tensor` of shape `(batch, num_tokens, token_dim)`: float32.

        Raises:
            ValueError: if something does not fit this head, or it has no such setting.
        """
