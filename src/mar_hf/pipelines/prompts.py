# SPDX-License-Identifier: Apache-2.0
"""Texts in a pipeline: from words to what the transformer attends to."""

from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any

import torch
from diffusers.utils import logging
from torch.nn.functional import pad

from ..models import TextContext, encode_texts


logger = logging.get_logger(__name__)


class PromptMixin:
    """What a pipeline with `transformer`, and perhaps `text_encoder` and `tokenizer`, does with texts."""

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """What the transformer needs to know of texts. Without any token a text is the null text of the training.

        Args:
            prompt (`str` or `list[str]`, *optional*): the texts; an empty one is the null text.
            num_images_per_prompt (`int`, *optional*, defaults to 1): rows for each text, one after the other.
            do_classifier_free_guidance (`bool`, *optional*, defaults to `True`): also those to be guided away from.
            negative_prompt (`str` or `list[str]`, *optional*): to be guided away from, one for all or one each; None
                means the null text.
            prompt_embeds (`torch.Tensor` of shape `(texts, length, text_dim)`, *optional*): instead of `prompt`.
            prompt_attention_mask (`torch.Tensor` of shape `(texts, length)`, *optional*): of `prompt_embeds`, 1 for
                tokens; None: all are tokens.
            negative_prompt_embeds (`torch.Tensor` of shape `(texts, length, text_dim)`, *optional*): instead of
                `negative_prompt`.
            negative_prompt_attention_mask (`torch.Tensor` of shape `(texts, length)`, *optional*): likewise.
            max_sequence_length (`int`, *optional*): tokens after which a prompt is cut; None means the model's
                `num_text_tokens`, or the tokenizer's limit where that is lower or there is no model.

        Returns:
            four `torch.Tensor`: states of shape `(texts * num_images_per_prompt, length, text_dim)` and bool mask of
            the prompts, then of the negative ones (None without guidance).

        Raises:
            ValueError: if the model takes no texts, there is no text encoder for them, a type or a shape is wrong, or
                both a text and its states are given.
        """
        (width, longest), device = self._text_form(), self._execution_device
        if width is None:
            raise ValueError("`prompt` needs a model that takes texts; this one knows classes only.")
        limit = longest if max_sequence_length is None else max_sequence_length
        if isinstance(limit, bool) or not isinstance(limit, Integral) or not 1 <= limit <= longest:
            raise ValueError(f"`max_sequence_length` has to lie in 1..{longest}, got {limit!r}.")
        count = num_images_per_prompt
        if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
            raise ValueError(f"`num_images_per_prompt` has to be an integer of at least 1, got {count!r}.")
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("One of `prompt` and `prompt_embeds` has to be given, and not both.")
        embeds, mask = self._encode_texts("prompt", prompt, prompt_embeds, prompt_attention_mask, limit)
        rows = [(embeds, mask)]
        if do_classifier_free_guidance:
            if negative_prompt is not None and negative_prompt_embeds is not None:
                raise ValueError("Both `negative_prompt` and `negative_prompt_embeds` are given.")
            if negative_prompt is None and negative_prompt_embeds is None:
                negative_prompt = ""
            if isinstance(negative_prompt, str):
                negative_prompt = [negative_prompt] * len(embeds)
            given = (negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask)
            negative = self._encode_texts("negative_prompt", *given, limit)
            if len(negative[0]) != len(embeds):
                raise ValueError(f"`negative_prompt` has to be one for all or {len(embeds)}, got {len(negative[0])}.")
            rows.append(negative)
        rows = [tuple(t.to(device).repeat_interleave(count, 0) for t in pair) for pair in rows]
        return (*rows[0], *(rows[1] if do_classifier_free_guidance else (None, None)))

    def _text_form(self) -> tuple[int | None, int]:
        """Width of a text's states and its most tokens: of the model, or of the encoder where there is no model."""
        if self.transformer is not None:
            return self.transformer.config.text_dim, self.transformer.config.num_text_tokens
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("`prompt` needs `text_encoder` and `tokenizer`, one of which is None here.")
        return self.text_encoder.config.hidden_size, self.tokenizer.model_max_length

    def _encode_texts(
        self,
        name: str,
        texts: str | list[str] | None,
        embeds: torch.Tensor | None,
        mask: torch.Tensor | None,
        limit: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States (texts, length, text_dim) and bool mask of texts, or those that were given, checked."""
        if embeds is not None:
            for part, tensor in (("embeds", embeds), ("attention_mask", mask)):
                if not isinstance(tensor, torch.Tensor | None):
                    raise ValueError(f"`{name}_{part}` has to be a tensor, got {type(tensor).__name__}.")
            if self.transformer is None:
                raise ValueError(f"`{name}_embeds` needs `transformer`, which is None here.")
            return embeds, self.transformer.check_text(embeds, mask, len(embeds), name)
        if mask is not None:
            raise ValueError(f"`{name}_attention_mask` goes with `{name}_embeds`, not with `{name}`.")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts) or not texts:
            raise ValueError(f"`{name}` has to be a text or a list of texts, got {texts!r}.")
        for text in texts:
            if not text.isprintable() and any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):
                raise ValueError(f"`{name}` has to be text that Unicode can write, got {text!r}.")
        if not any(text.strip() for text in texts):
            width, _ = self._text_form()
            return torch.zeros(len(texts), 1, width), torch.zeros(len(texts), 1, dtype=torch.bool)
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                f"`{name}` needs the pipeline's `text_encoder` and `tokenizer`, of which there are none here: give "
                f"them to `from_pretrained`, or give `{name}_embeds`."
            )
        limit = min(limit, self.tokenizer.model_max_length)
        self._warn_of_cuts(name, texts, limit)
        return encode_texts(texts, self.text_encoder, self.tokenizer, limit, self._execution_device)

    def _warn_of_cuts(self, name: str, texts: list[str], limit: int) -> None:
        room = limit - self.tokenizer.num_special_tokens_to_add()
        if room < 1:
            raise ValueError(
                f"`max_sequence_length` has to leave room for more than the {limit - room} special tokens of the "
                f"tokenizer, got {limit}."
            )
        # Not by which tokens are special: those of unknown words are, too.
        whole = self.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
        for text, ids in zip(texts, whole, strict=True):
            if len(ids) > room:
                logger.warning(
                    f"`{name}` {text[:40]!r} has more than {limit} tokens; this was cut off: "
                    f"{self.tokenizer.decode(ids[room:])!r}."
                )

    def _count_prompts(self, prompt: Any, prompt_embeds: Any, **others: Any) -> int | None:
        """Number of texts; None where there are none."""
        if prompt is None and prompt_embeds is None:
            for name in (name for name, value in others.items() if value is not None):
                if name.endswith("attention_mask"):
                    raise ValueError(f"`{name}` goes with `{name.removesuffix('attention_mask')}embeds`.")
                raise ValueError("`negative_prompt` needs a `prompt`.")
            return None
        given = prompt_embeds if prompt is None else [prompt] if isinstance(prompt, str) else prompt
        countable = isinstance(given, torch.Tensor) and prompt is None and given.ndim > 0
        if not countable and not isinstance(given, (list, tuple)) or len(given) == 0:
            raise ValueError(f"`prompt` has to be a text or a list of texts, or `prompt_embeds` those, got {given!r}.")
        return len(given)

    def _read_texts(
        self,
        texts: dict[str, Any],
        batch_size: int,
        num_images_per_prompt: int | None,
        max_sequence_length: int | None,
    ) -> Callable[[bool], TextContext]:
        """What gives the texts of one branch or of both; of null texts where `num_images_per_prompt` is None."""
        if num_images_per_prompt is None:
            texts, num_images_per_prompt = {**texts, "prompt": [""] * batch_size}, 1
        # For both branches also without guidance: callbacks may turn it on.
        settings = {"num_images_per_prompt": num_images_per_prompt, "max_sequence_length": max_sequence_length}
        return partial(self._make_text_context, self.encode_prompt(**texts, **settings))

    def _make_text_context(self, texts: tuple, guided: bool) -> TextContext:
        """The texts of all rows: those of the pictures, then those to be guided away from."""
        embeds, mask, negative_embeds, negative_mask = texts
        # Causal models see few tokens a step: there one large product with the weights is quicker.
        form = {"sampling": True, "absorb": self.transformer.make_cache([1]) is None}
        if not guided:
            return TextContext(embeds, mask, **form)
        length = max(embeds.shape[1], negative_embeds.shape[1])
        rows = [(embeds, mask), (negative_embeds.to(embeds.dtype), negative_mask)]
        padded = [(pad(one, (0, 0, 0, length - one.shape[1])), pad(m, (0, length - m.shape[1]))) for one, m in rows]
        return TextContext(*(torch.cat(part) for part in zip(*padded, strict=True)), **form)
