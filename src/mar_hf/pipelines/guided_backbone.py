# SPDX-License-Identifier: Apache-2.0
"""The backbone's two branches in a call of the pipeline: with the class or text, and without."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import Cache

from ..generation import GenerationPlan
from ..models import ARForImageGeneration, MARForImageGeneration, TextContext


@dataclass(eq=False)
class GuidedBackbone:
    """Predicts step after step, and keeps what later steps can use.

    Args:
        transformer ([`MARForImageGeneration`] or [`ARForImageGeneration`]): the backbone.
        plan ([`GenerationPlan`]): tokens of all steps, and their order.
        labels (`torch.Tensor` of shape `(batch,)`, *optional*): int64; None: no class.
        make_text_context (`Callable`, *optional*): gives the texts of one branch (False) or of both (True) as a
            [`TextContext`]; None for models without.
        refresh (`int`, *optional*, defaults to 1): guided steps for which one unconditional pass serves: what it
            changes in the conditions, at each position, is taken over from the first of them (the condition cache of
            LazyMAR, arXiv:2503.12450).
    """

    transformer: MARForImageGeneration | ARForImageGeneration
    plan: GenerationPlan
    labels: torch.Tensor | None
    make_text_context: Callable[[bool], TextContext] | None = None
    refresh: int = 1
    # By the number of branches, since a cache is of one or of both.
    _text_contexts: dict[bool, TextContext] = field(default_factory=dict, init=False)
    _caches: dict[bool, Cache | None] = field(default_factory=dict, init=False)
    # Unconditional minus conditional, for the tokens of the next steps: (B, K, D)
    _changes: torch.Tensor | None = field(default=None, init=False)

    def predict(self, tokens: torch.Tensor, step: int, guided: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Condition vectors of a step's tokens.

        Args:
            tokens (`torch.Tensor` of shape `(batch, num_tokens, token_dim)`): what the backbone sees.
            step (`int`): number of the step.
            guided (`bool`): whether the unconditional branch is wanted.

        Returns:
            two `torch.Tensor` of shape `(batch, count, hidden_size)`, of the step's tokens: with class or text, and
            without it; None in place of the latter where there is no guidance.
        """
        steps = self.plan.steps
        count = steps[step].count
        if not guided:
            self._changes = None
            return self._run(tokens, step, count, False), None
        if self._changes is None or self._changes.shape[1] == 0:
            upcoming = sum(later.count for later in steps[step : step + self.refresh])
            condition, negative = self._run(tokens, step, upcoming, True).chunk(2)
            self._changes = (negative - condition)[:, count:]
            return condition[:, :count], negative[:, :count]
        condition = self._run(tokens, step, count, False)
        negative, self._changes = condition + self._changes[:, :count], self._changes[:, count:]
        return condition, negative

    def forget(self) -> None:
        """Drop what was computed from the tokens: they were replaced."""
        self._caches, self._changes = {}, None

    def _run(self, tokens: torch.Tensor, step: int, count: int, both: bool) -> torch.Tensor:
        """Conditions of the next `count` tokens (B, K, D), followed by those of the other branch (2B, K, D)."""
        tokens_per_step = [step.count for step in self.plan.steps]
        if both not in self._caches:
            # Made anew, it takes in all steps before; the other one lacks this step from here on.
            self._caches = {both: self.transformer.make_cache(tokens_per_step)}
        if both not in self._text_contexts and self.make_text_context is not None:
            self._text_contexts[both] = self.make_text_context(both)
        orders, labels = self.plan.orders, self.labels
        if both:
            tokens, orders = torch.cat([tokens] * 2), torch.cat([orders] * 2)
        if both and labels is not None:
            labels = torch.cat([labels, torch.full_like(labels, self.transformer.config.num_classes)])
        # A wrapper of torch.compile passes methods on to the module inside, which would run as it is.
        predict = type(getattr(self.transformer, "_orig_mod", self.transformer)).predict
        counts = [*tokens_per_step[:step], count]
        return predict(
            self.transformer, tokens, orders, counts, labels, self._caches[both], self._text_contexts.get(both)
        )
