# SPDX-License-Identifier: Apache-2.0
"""What every token head offers."""

from abc import ABC, abstractmethod

import torch
from diffusers import SchedulerMixin
from torch import nn


class TokenHead(nn.Module, ABC):
    """Turns the backbone's condition vectors into samples of tokens; knows neither positions nor orders.

    A new head is one file with a subclass and one line in `TOKEN_HEADS`. Its constructor takes `token_dim`,
    `condition_dim` and its own settings; its weights are initialised by `init_weights`.
    """

    @abstractmethod
    def init_weights(self, module: nn.Module) -> None:
        """Initialise the direct parameters of one of the head's modules.

        Args:
            module (`torch.nn.Module`): the head itself or a module inside it.
        """

    @abstractmethod
    def check_scheduler(self, scheduler: SchedulerMixin, temperature: float = 1.0) -> None:
        """Refuse a scheduler that can't run this head.

        Args:
            scheduler (`SchedulerMixin`): the candidate.
            temperature (`float`, *optional*, defaults to 1.0): the temperature that it will be asked for.

        Raises:
            ValueError: if it does not fit.
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
    ) -> torch.Tensor:
        """Sample tokens.

        Args:
            condition (`torch.Tensor` of shape `(batch, num_tokens, condition_dim)`): the backbone's output at the
                positions wanted.
            negative_condition (`torch.Tensor` of the same shape, *optional*): without the class, for guidance.
            guidance_scale (`float`, *optional*, defaults to 1.0): 1.0 means no guidance.
            scheduler (`SchedulerMixin`): the sampler, for heads that have one.
            num_steps (`int`): sampler steps.
            temperature (`float`, *optional*, defaults to 1.0): of the injected noise.
            noise (`torch.Tensor` of shape `(batch, num_tokens, num_steps + 1, token_dim)`, *optional*): entry 0 is the
                start, entry 1 + s is injected at step s.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): for the noise, where none is given.

        Returns:
            `torch.Tensor` of shape `(batch, num_tokens, token_dim)`: float32.
        """
