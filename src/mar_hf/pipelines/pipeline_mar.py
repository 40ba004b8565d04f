# SPDX-License-Identifier: Apache-2.0
"""The pipeline: which tokens next, until the picture is whole."""

import copy
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from threading import get_ident
from typing import Any

import torch
from diffusers import BaseGuidance, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging, replace_example_docstring
from huggingface_hub import create_repo, file_exists
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generation import (
    GENERATION_DEFAULTS,
    GenerationPlan,
    GenerationSettings,
    build_settings,
    check_orders,
    expand_decoding,
    plan_generation,
    plan_steps,
)
from ..hub import build_model_card
from ..loading import StrictPipelineMixin, check_components
from ..models import ARForImageGeneration, MARForImageGeneration, add_context_noise, check_text_encoder
from ..onednn import by_onednn
from ..tokenizers import ImageTokenizer
from .calls import CallStateMixin, PipelineCall
from .compilation import compile_transformer
from .details import sample_by_detail
from .guided_backbone import GuidedBackbone
from .prompts import PromptMixin


logger = logging.get_logger(__name__)

# Tokens have unit variance; beyond this they are not tokens any more but a sampler that ran away. After a projection
# only numbers that are not finite show it.
EXPLODED = 20.0
MOST_PICTURES = 10_000  # of one call: more are asked for by mistake

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from mar_hf import MARPipeline, demo_checkpoint

        >>> pipe = MARPipeline.from_pretrained(demo_checkpoint())
        >>> images = pipe(class_labels=["heart", "clock"], generator=torch.Generator().manual_seed(0)).images
        ```
"""


def check_names(id2label: Any) -> dict[int, str]:
    """Refuse what are no names of classes.

    Args:
        id2label (`Any`): as [`MARPipeline`] takes it; JSON turns its numbers into strings.

    Returns:
        `dict[int, str]`: names by number.

    Raises:
        ValueError: if a key is no whole number, or a name no text.
    """
    if not isinstance(id2label, Mapping):
        raise ValueError(f"`id2label` has to be a dict of names by class number, got {id2label!r}.")
    names = {}
    for key, name in id2label.items():
        is_number = isinstance(key, Integral) and not isinstance(key, bool)
        if not is_number and not (isinstance(key, str) and key.lstrip("-").isdecimal()):
            raise ValueError(f"`id2label` has to have whole numbers as keys, got {key!r}.")
        if not isinstance(name, str):
            raise ValueError(f"`id2label` has to name class {key} by a text, got {name!r}.")
        if int(key) in names:
            raise ValueError(f"`id2label` names class {key} twice: {names[int(key)]!r} and {name!r}.")
        names[int(key)] = name
    return names


class MARPipeline(CallStateMixin, PromptMixin, StrictPipelineMixin, DiffusionPipeline):
    """Pictures of classes or texts from an autoregressive model over continuous tokens (arXiv:2406.11838).

    Args:
        transformer ([`MARForImageGeneration`] or [`ARForImageGeneration`]): the backbone with its token head.
        vae ([`ImageTokenizer`]): tokens to pictures; the slot keeps diffusers' name.
        scheduler (`SchedulerMixin`, *optional*): runs the head: one of its `scheduler_class`, or a diffusers scheduler
            made with `X.from_config(pipe.scheduler.config)`; a head without such a class needs none.
        text_encoder (`PreTrainedModel`, *optional*): for models that take texts: any encoder of transformers whose
            `last_hidden_state` is as wide as the `text_dim` of the transformer: T5, CLIP, BERT, ... Without one,
            texts are given as `prompt_embeds`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of the text encoder.
        id2label (`dict`, *optional*): names of the classes, by number; several names of one class are separated by
            ", ".
        generation_defaults (`dict`, *optional*): what `__call__` uses where an argument is None, saved with the
            pipeline; keys are those of `GENERATION_DEFAULTS`, which fill the gaps, and `decoding`.
        guider (`BaseGuidance`, *optional*): how guidance is done within the head, in place of the linear rule:
            `ClassifierFreeGuidance`, `ClassifierFreeZeroStarGuidance`, `AdaptiveProjectedGuidance`,
            `AdaptiveProjectedMixGuidance`, `TangentialClassifierFreeGuidance` or `MagnitudeAwareGuidance` of
            diffusers, or one like these. Its steps, `start` and `stop` are those of the head; its `guidance_scale` is
            the call's, step by step.

    Raises:
        ValueError: if the image tokenizer's tokens, the text encoder, the guider or the classes do not fit the
            transformer, or a default is unknown.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["scheduler", "text_encoder", "tokenizer", "guider"]
    _callback_tensor_inputs = ["latents", "mask"]

    def __init__(
        self,
        transformer: MARForImageGeneration | ARForImageGeneration,
        vae: ImageTokenizer,
        scheduler: SchedulerMixin | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        id2label: dict | None = None,
        generation_defaults: dict | None = None,
        guider: BaseGuidance | None = None,
    ):
        super().__init__()
        components = {
            **{"transformer": transformer, "vae": vae, "scheduler": scheduler},
            **{"text_encoder": text_encoder, "tokenizer": tokenizer, "guider": guider},
        }
        check_components(type(self), **components)
        self.register_modules(**components)
        id2label = None if id2label is None else check_names(id2label)
        self.register_to_config(id2label=id2label, generation_defaults=generation_defaults)
        if transformer is not None and vae is not None and transformer.config.token_dim != vae.token_dim:
            raise ValueError(
                f"`vae` makes tokens of {vae.token_dim} numbers, but `transformer` takes "
                f"{transformer.config.token_dim}."
            )
        if transformer is not None and id2label:
            limit = transformer.config.num_classes
            if beyond := sorted(number for number in id2label if not 0 <= number < limit):
                raise ValueError(f"`id2label` has to number classes 0..{limit - 1} of `transformer`, got {beyond}.")
        if transformer is not None and text_encoder is not None:
            check_text_encoder(text_encoder, transformer.config.text_dim)
        if transformer is not None:
            transformer.head.check_guider(guider)
            own = {"id2label": id2label, "generation_defaults": generation_defaults}
            before = vars(transformer).get("_of_pipeline", own)
            if lost := [name for name, value in own.items() if value is None and before[name]]:
                logger.warning(
                    f"`transformer` had {lost} in another pipeline, which this one does not get: components alone do "
                    "not hold them. `MARPipeline.from_pipe(pipe)` keeps them."
                )
            vars(transformer)["_of_pipeline"] = own
        self.image_processor = VaeImageProcessor(do_resize=False)
        self._settings: tuple[tuple, GenerationSettings] | None = None
        # The calls that run, by thread: a callback may call the pipeline again. Then the last one that has ended, and
        # what was in training mode before the first.
        self._calls: dict[int, list[PipelineCall]] = {}
        self._last_call = PipelineCall()
        self._in_training: list[torch.nn.Module] = []
        settings = self.generation_settings  # wrong defaults are found now
        if transformer is not None and scheduler is not None and settings.head_kwargs:
            try:
                transformer.head.check_scheduler(scheduler, settings.temperature, **settings.head_kwargs)
            except ValueError as error:
                raise ValueError(f"`head_kwargs` of `generation_defaults` do not fit: {error}") from error

    @property
    def labels(self) -> dict[str, int]:
        """Number of each class, by name; a class with several names appears under each and under all together.

        Where a name is that of one class and one of several of another, it means the former.
        """
        numbers, id2label = {}, self.config.id2label or {}
        for number, names in id2label.items():
            numbers.setdefault(names, int(number))
        for number, names in id2label.items():
            for name in names.split(", "):
                numbers.setdefault(name, int(number))
        return numbers

    @property
    def generation_settings(self) -> GenerationSettings:
        """What `__call__` uses where an argument is None: saved with the pipeline, or following from its model.

        Without either these are the paper's with at most one step per token. Where the head can't use the saved
        temperature with the scheduler that is set, as with most of diffusers', it is 1.0.
        """
        transformer, scheduler, saved = self.transformer, self.scheduler, self.config.generation_defaults
        train_steps = None if scheduler is None else scheduler.config.get("num_train_timesteps")
        source = (transformer, train_steps, copy.copy(saved))
        if self._settings is None or self._settings[0] != source:
            follows = {}
            if train_steps is not None:
                follows["num_diffusion_steps"] = min(GenerationSettings.num_diffusion_steps, train_steps)
            if transformer is not None:
                steps = min(GenerationSettings.num_inference_steps, transformer.config.num_tokens)
                follows |= {"num_inference_steps": steps, **transformer.sampling_defaults}
            self._settings = (source, build_settings(follows, saved))
        settings = self._settings[1]
        if transformer is not None and scheduler is not None:
            try:
                transformer.head.check_scheduler(scheduler, settings.temperature)
            except ValueError:
                settings = settings.override(temperature=1.0)
        return settings

    @property
    def generation_defaults(self) -> dict[str, Any]:
        """`generation_settings` by name."""
        return self.generation_settings.to_dict()

    def settings_for(self, **given: Any) -> GenerationSettings:
        """The settings of a call.

        Args:
            given (`Any`): arguments of the call that have a default in the checkpoint; None means that default.

        Returns:
            [`GenerationSettings`]: checked, also against the number of tokens and the scheduler.

        Raises:
            ValueError: if one does not exist or is out of its range, where it says so of a default, or the pipeline
                lacks a component.
        """
        missing = [name for name in ("transformer", "vae") if getattr(self, name) is None]
        if self.scheduler is None and (missing or self.transformer.head.scheduler_class is not None):
            missing.append("scheduler")
        if missing:
            raise ValueError(f"This pipeline has no {missing}, without which it makes no pictures.")
        config, head, defaults = self.transformer.config, self.transformer.head, self.generation_settings
        most = head.most_steps if head.scheduler_class is None else self.scheduler.config.num_train_timesteps
        limits = {"num_inference_steps": config.grid_height * config.grid_width, "num_diffusion_steps": most}
        given = {name: value for name, value in given.items() if value is not None}
        if "decoding" in given:
            given = expand_decoding(given)
        if not given.keys() <= GENERATION_DEFAULTS.keys():
            known = sorted([*GENERATION_DEFAULTS, "decoding"])
            raise ValueError(f"Settings have to be in {known}, got {sorted(given)}.")
        for name, most in limits.items():
            if name not in given and getattr(defaults, name) > most:
                raise ValueError(
                    f"`generation_defaults` of the pipeline: `{name}` has to lie in 1..{most}, got "
                    f"{getattr(defaults, name)}; give another one in the call."
                )
        return replace(defaults, limits=limits, **given)

    def check_inputs(
        self,
        settings: GenerationSettings,
        class_labels: Any = None,
        num_prompts: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = (),
        return_dict: bool = True,
    ) -> list[int | None]:
        """Check everything that a caller can get wrong and that the settings alone do not show, before any work.

        Args:
            settings ([`GenerationSettings`]): of the call, checked by themselves.
            class_labels (`Any`, *optional*): as `__call__` takes them.
            num_prompts (`int`, *optional*): number of texts; None: there are none.
            num_images_per_prompt (`int`, *optional*, defaults to 1): pictures for each label or text.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): as `__call__` takes it.
            noise (`torch.Tensor`, *optional*): as `__call__` takes it.
            output_type (`str`, *optional*, defaults to `"pil"`): pil, np, pt or latent.
            callback_on_step_end (`Callable`, *optional*): as `__call__` takes it.
            callback_on_step_end_tensor_inputs (`Sequence[str]`, *optional*, defaults to `()`): names for the callback.
            return_dict (`bool`, *optional*, defaults to `True`): as `__call__` takes it.

        Returns:
            `list[int | None]`: the class number of each picture, None where there is no class.

        Raises:
            ValueError: with the argument, its value and what is allowed.
        """
        labels = self._class_numbers(class_labels, num_prompts, num_images_per_prompt)
        config = self.transformer.config
        if settings.guidance_refresh > 1 and self.transformer.make_cache([1]) is not None:
            raise ValueError(
                f"`guidance_refresh` has to be 1 for a causal model, got {settings.guidance_refresh}: its cache needs "
                "every step."
            )
        if settings.token_schedule == "gtr" and getattr(config, "max_tokens_per_step", None) == 1:
            raise ValueError(
                "`decoding` and `token_schedule` 'gtr' need a model that predicts several tokens a step; the "
                "`max_tokens_per_step` of this causal model is 1."
            )
        self.transformer.head.check_scheduler(self.scheduler, settings.temperature, **settings.head_kwargs or {})
        if self.guider is not None:
            self.transformer.head.check_guider(self.guider)
        if not isinstance(settings.generation_order, str):
            check_orders(settings.generation_order, len(labels), config.grid_height * config.grid_width)
        sources = generator if isinstance(generator, list) else [generator] * len(labels)
        if generator is not None and not all(isinstance(source, torch.Generator) for source in sources):
            raise ValueError(f"`generator` has to be a torch.Generator or a list of them, got {generator!r}.")
        if len(sources) != len(labels):
            raise ValueError(f"`generator` has to hold one generator per picture ({len(labels)}), got {len(sources)}.")
        entries = self.transformer.head.noise_entries(settings.num_diffusion_steps)
        shape = (len(labels), config.grid_height * config.grid_width, entries, config.token_dim)
        if noise is not None and (not isinstance(noise, torch.Tensor) or noise.shape != shape):
            got = tuple(noise.shape) if isinstance(noise, torch.Tensor) else type(noise).__name__
            raise ValueError(f"`noise` has to be a tensor of shape {shape}, got {got}.")
        if noise is not None and not (noise.is_floating_point() and noise.isfinite().all()):
            raise ValueError(f"`noise` has to hold finite floating-point numbers, got {noise.dtype}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` has to be pil, np, pt or latent, got {output_type!r}.")
        if not isinstance(return_dict, bool):
            raise ValueError(f"`return_dict` has to be True or False, got {return_dict!r}.")
        if output_type == "pil" and self.vae.image_channels > 4:
            raise ValueError(
                f"`output_type` has to be np, pt or latent: PIL knows no {self.vae.image_channels} channels."
            )
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"`callback_on_step_end` has to be a function, got {callback_on_step_end!r}.")
        known, names = self._callback_tensor_inputs, callback_on_step_end_tensor_inputs
        if not isinstance(names, (list, tuple)) or not all(name in known for name in names):
            wrong = [name for name in names if name not in known] if isinstance(names, (list, tuple)) else names
            raise ValueError(f"`callback_on_step_end_tensor_inputs` has to be in {known}, got {wrong!r}.")
        if class_labels is not None and config.num_classes == 1 and not self.config.id2label:
            logger.warning(
                "`class_labels` of a model with one class that has no name: it may be trained without any classes."
            )
        knows_nothing = config.class_dropout_prob == 0 and (config.text_dim is None or config.text_dropout_prob == 0)
        if knows_nothing and settings.guidance_scale != 1 and (class_labels is not None or num_prompts):
            logger.warning(
                f"`guidance_scale` {settings.guidance_scale} leads away from pictures of no class, but this model was "
                "trained without any (`class_dropout_prob` 0): 1.0 is what it can do."
            )
        return labels

    def _class_numbers(
        self, class_labels: Any, num_prompts: int | None, num_images_per_prompt: int
    ) -> list[int | None]:
        """The class of each picture, None where it has none."""
        count, limit, names = num_images_per_prompt, self.transformer.config.num_classes, self.labels
        if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
            raise ValueError(f"`num_images_per_prompt` has to be an integer of at least 1, got {count!r}.")
        labels, rest = [], [None] * (num_prompts or 1) if class_labels is None else [class_labels]
        while rest:  # batched as [[1], [1]], as diffusers' own tests write them
            part = rest.pop(0)
            part = part.tolist() if hasattr(part, "tolist") else part  # tensors, and what numpy has
            if isinstance(part, (list, tuple, range)):
                rest = [*part, *rest]
            else:
                labels.append(part)
        if not labels:
            raise ValueError("`class_labels` is empty; None means no class.")
        if class_labels is not None and limit == 0:
            raise ValueError(f"`class_labels` has to be None for a model that knows no classes, got {labels[0]!r}.")
        for place, label in enumerate(labels if class_labels is not None else ()):
            if isinstance(label, str):
                if label not in names:
                    shown = sorted(names)[:40] or "none: this checkpoint has no class names"
                    raise ValueError(f"`class_labels` has the unknown name {label!r}; known names: {shown}.")
                labels[place] = names[label]
            elif isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < limit:
                raise ValueError(f"`class_labels` has to lie in 0..{limit - 1} or be class names, got {label!r}.")
        if len(labels) == 1 and num_prompts is not None:
            labels *= num_prompts
        if num_prompts not in (None, len(labels)):
            raise ValueError(
                f"`class_labels` has to hold one class for each of {num_prompts} texts, got {len(labels)}."
            )
        if len(labels) * count > MOST_PICTURES:
            raise ValueError(
                f"`num_images_per_prompt` {count} makes {len(labels) * count} pictures in one call; at most "
                f"{MOST_PICTURES} are possible."
            )
        return [label for label in labels for _ in range(count)]

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        class_labels: int | str | list[int | str] | torch.Tensor | None = None,
        prompt: str | list[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_diffusion_steps: int | None = None,
        guidance_schedule: str | None = None,
        token_schedule: str | None = None,
        head_step_schedule: str | None = None,
        temperature: float | None = None,
        generation_order: str | torch.Tensor | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.Tensor | None = None,
        context_noise: float | None = None,
        head_kwargs: dict[str, Any] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_refresh: int | None = None,
        decoding: str | None = None,
        detail_share: float | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["MARPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (diffusers' signature)
        max_sequence_length: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate pictures.

        Where an argument says *optional*, None means the checkpoint's default.

        Args:
            class_labels (`int`, `str`, `list` or `torch.Tensor`, *optional*): classes by number or name; None
                generates without a class.
            prompt (`str` or `list[str]`, *optional*): texts, for models that take them; an empty one is the null text,
                as None is. Together with `class_labels` (one, or one for each text) for models that know classes too.
            num_inference_steps (`int`, *optional*): autoregressive steps, at most the number of tokens; exactly so
                many for a causal model that predicts one token a step.
            guidance_scale (`float`, *optional*): classifier-free guidance; 1.0 means none. It takes the place of the
                guider's own, where the pipeline has a `guider`.
            num_diffusion_steps (`int`, *optional*): steps of the token head's sampler.
            guidance_schedule (`str`, *optional*): a name in `GUIDANCE_SCHEDULES`: linear, constant,
                decreasing_linear or power_cosine.
            token_schedule (`str`, *optional*): a name in `TOKEN_SCHEDULES`: cosine, constant or gtr.
            head_step_schedule (`str`, *optional*): a name in `HEAD_STEP_SCHEDULES`: constant, linear annealing or gtr.
            temperature (`float`, *optional*): multiplies the noise that the diffusion head's sampler injects; divides
                the logits of a categorical head.
            generation_order (`str` or `torch.Tensor` of shape `(batch, num_tokens)`, *optional*): a name in
                `GENERATION_ORDERS`, or the positions in the order in which they are generated.
            negative_prompt (`str` or `list[str]`, *optional*): what guidance leads away from; None: the null text.
            num_images_per_prompt (`int`, *optional*, defaults to 1): pictures for each label or text.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): the only source of randomness; a list
                has one per picture, which then does not depend on the others. None means a new one from the system's
                entropy.
            noise (`torch.Tensor` of shape `(batch, num_tokens, num_diffusion_steps + 1, token_dim)`, *optional*):
                entry 0 starts the head for the token at that position, entry 1 + s is injected at its step s. Heads
                without such steps take other numbers of entries: `transformer.head.noise_entries`.
            context_noise (`float`, *optional*): share of noise mixed into the tokens that the backbone sees, for
                models trained with some; 0.0 means none.
            head_kwargs (`dict`, *optional*): further arguments of the head's `sample`: `top_k` and `top_p` of a
                categorical head, `guidance_refresh` of the diffusion head.
            guidance_interval (`tuple[float, float]`, *optional*): shares of the autoregressive steps between which
                there is guidance (arXiv:2404.07724); outside of it the unconditional branch is not computed.
            guidance_refresh (`int`, *optional*): guided steps for which one pass of the backbone without the class
                serves: what the class changes in the conditions is taken over from the first of them (the condition
                cache of LazyMAR, arXiv:2503.12450). 1, in every step, is exact; causal models know no other.
            decoding (`str`, *optional*): a name in `DECODINGS`, which stands for an order, schedules and a
                `detail_share` that belong together; what the call says of one of them goes before it. "gtr" is
                generation, then reconstruction (arXiv:2510.17171); the numbers of steps are not part of it.
            detail_share (`float`, *optional*): share of a step's tokens, those with most detail in their conditions,
                that take all `num_diffusion_steps` where `head_step_schedule` gives fewer, once half of the tokens
                are there (GtR's frequency-weighted selection); 0.0 means none.
            prompt_embeds (`torch.Tensor` of shape `(texts, length, text_dim)`, *optional*): the text encoder's states,
                instead of `prompt`.
            prompt_attention_mask (`torch.Tensor` of shape `(texts, length)`, *optional*): 1 for tokens, 0 for padding
                of `prompt_embeds`; None: all are tokens.
            negative_prompt_embeds (`torch.Tensor` of shape `(texts, length, text_dim)`, *optional*): instead of
                `negative_prompt`.
            negative_prompt_attention_mask (`torch.Tensor` of shape `(texts, length)`, *optional*): likewise.
            output_type (`str`, *optional*, defaults to `"pil"`): pil, np, pt (in [0, 1]) or latent (unit-scaled grid).
            return_dict (`bool`, *optional*, defaults to `True`): False gives a tuple.
            callback_on_step_end (`Callable`, *optional*): called after each autoregressive step with the pipeline, the
                step, the number of tokens done and a dict; `latents` in the dict that it returns replace the picture,
                as they are: none of the tokenizer's normalisers is applied to them.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`): what the dict
                holds: `latents` (the grid so far, 0 where nothing is yet) and `mask`.
            max_sequence_length (`int`, *optional*): tokens after which a text is cut, with a warning; None means the
                longest that the model knows.

        Examples:

        Returns:
            [`~diffusers.ImagePipelineOutput`]: `images`; or a tuple with them.

        Raises:
            ValueError: if an argument is out of range or of the wrong shape.
        """
        # 1. What is asked for
        settings = self.settings_for(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_diffusion_steps=num_diffusion_steps,
            guidance_schedule=guidance_schedule,
            token_schedule=token_schedule,
            head_step_schedule=head_step_schedule,
            temperature=temperature,
            generation_order=generation_order,
            context_noise=context_noise,
            head_kwargs=head_kwargs,
            guidance_interval=guidance_interval,
            guidance_refresh=guidance_refresh,
            decoding=decoding,
            detail_share=detail_share,
        )
        texts = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "prompt_embeds": prompt_embeds,
            "prompt_attention_mask": prompt_attention_mask,
            "negative_prompt_embeds": negative_prompt_embeds,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
        }
        has_texts = any(value is not None for value in texts.values())
        num_prompts = self._count_prompts(**texts) if has_texts else None
        callback, names = callback_on_step_end, callback_on_step_end_tensor_inputs
        asked = (class_labels, num_prompts, num_images_per_prompt, generator, noise, output_type)
        labels = self.check_inputs(settings, *asked, callback, names, return_dict)
        config, device, batch_size = self.transformer.config, self._execution_device, len(labels)
        is_conditional = labels[0] is not None or num_prompts is not None
        num_tokens = config.grid_height * config.grid_width
        steps = plan_steps(settings, num_tokens, is_conditional, getattr(config, "max_tokens_per_step", None))

        call = PipelineCall(settings.guidance_scale, is_conditional, len(steps))
        with self._running(call):
            # 2. The plan
            make_text_context = None
            if config.text_dim is not None or has_texts:
                repeats = None if num_prompts is None else num_images_per_prompt
                make_text_context = self._read_texts(texts, batch_size, repeats, max_sequence_length)
            if generator is None:
                # Also for schedulers that draw noise of their own: they would turn to torch's global state.
                generator = torch.Generator()
                generator.seed()
            sources = generator if isinstance(generator, list) else [generator] * batch_size
            entries = self.transformer.head.noise_entries(settings.num_diffusion_steps)
            plan = plan_generation(settings, config, steps, sources, noise, device, entries)

            # 3. Autoregressive loop, 4. decode
            numbers = None if labels[0] is None else torch.tensor(labels, device=device)
            tokens = self._walk(plan, settings, call, numbers, make_text_context, generator, callback, names)
            images = self._decode(tokens, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _walk(
        self,
        plan: GenerationPlan,
        settings: GenerationSettings,
        call: PipelineCall,
        labels: torch.Tensor | None,
        make_text_context: Callable | None,
        generator: torch.Generator | list[torch.Generator],
        callback: Callable | None,
        callback_inputs: Sequence[str],
    ) -> torch.Tensor:
        """Generate the plan's tokens, step after step: (B, L, C)."""
        # The same model, sooner on many CPUs.
        transformer = by_onednn(self.transformer) if torch.backends.mkldnn.enabled else self.transformer
        sample = getattr(transformer, "_orig_mod", transformer).forward  # where hooks hang; never compiled as a whole
        backbone = GuidedBackbone(transformer, plan, labels, make_text_context, settings.guidance_refresh)
        # They keep the state of a call, and other calls may run.
        scheduler, guider = copy.deepcopy(self.scheduler), copy.copy(self.guider)
        steps, tokens, mask = plan.steps, plan.tokens, plan.mask
        with self.progress_bar(total=len(steps)) as progress_bar:
            for number in range(len(steps)):
                if call.interrupt:
                    break
                step = steps[number]
                positions = plan.orders[:, step.start : step.start + step.count]
                seen = tokens
                if plan.context_noise is not None:
                    seen = add_context_noise(tokens, plan.context_noise, settings.context_noise)
                condition, negative = backbone.predict(seen, number, step.guidance_scale != 1.0)
                given = {
                    "condition": condition,
                    "negative_condition": negative,
                    "guidance_scale": step.guidance_scale,
                    "guider": guider,
                    "scheduler": scheduler,
                    "num_steps": step.num_diffusion_steps,
                    "temperature": settings.temperature,
                    "noise": plan.noise.gather(1, positions[..., None, None].expand(-1, -1, *plan.noise.shape[2:])),
                    "generator": generator,
                    **(settings.head_kwargs or {}),
                }
                sampled = (
                    sample_by_detail(sample, given, step) if step.num_detail_tokens else sample(None, sampling=given)
                )
                if self.vae.projection is not None:
                    sampled = self.vae.projection(sampled)
                tokens = tokens.scatter(1, positions[..., None].expand_as(sampled), sampled)
                mask = mask.scatter(1, positions, False)
                if callback is not None:
                    replaced = self._call_back(
                        callback, number, step.start + step.count, tokens, mask, callback_inputs
                    )
                    if replaced is not None:
                        tokens = replaced
                        backbone.forget()
                    if call.guidance_scale != settings.guidance_scale:
                        settings = settings.override(guidance_scale=call.guidance_scale)
                        steps = plan_steps(settings, tokens.shape[1], call.is_conditional)
                progress_bar.update()
        return tokens

    def _call_back(
        self, callback: Callable, step: int, done: int, tokens: torch.Tensor, mask: torch.Tensor, names: Sequence[str]
    ) -> torch.Tensor | None:
        """Tell a callback of a step: the tokens (B, L, C) that it puts in place of these, None where it does not."""
        latents = self.vae.unpatchify(tokens, self.transformer.config.grid_height)
        available, shape = {"latents": latents.clone(), "mask": mask}, latents.shape
        returned = callback(self, step, done, {name: available[name] for name in names})
        if not isinstance(returned, dict | None):
            raise ValueError(f"`callback_on_step_end` has to return a dict or None, got {returned!r}.")
        given = (returned or {}).get("latents")
        if given is None:
            return None
        if not isinstance(given, torch.Tensor) or given.shape != shape:
            got = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
            raise ValueError(f"`latents` of `callback_on_step_end` has to be of shape {tuple(shape)}, got {got}.")
        replaced = self.vae.patchify(given).to(tokens)
        return None if torch.equal(replaced, tokens) else replaced

    def _decode(self, tokens: torch.Tensor, output_type: str) -> Any:
        """Tokens (B, L, C) to what is asked for."""
        largest = tokens.abs().max().item()
        if not largest <= EXPLODED:
            logger.warning(
                f"The head's sampler ran away: tokens reach {largest:.3g} where about 4 is usual. If the model is "
                "young or in half precision, give its scheduler `max_timestep=950`, or use more "
                "`num_diffusion_steps`; a large `guidance_scale`, or weights that are no numbers, do the same."
            )
        latents = self.vae.unpatchify(tokens, self.transformer.config.grid_height)
        if output_type == "latent":
            return latents
        images = self.vae.decode(latents.to(self.vae.dtype)).float()
        if largest <= EXPLODED and not images.isfinite().all():
            logger.warning(
                f"The image tokenizer's decoder gave numbers that are not finite, in {self.vae.dtype}: its weights "
                "are not, or it overflows in half precision, in which case `pipe.vae.to(torch.float32)` helps."
            )
        return self.image_processor.postprocess(images, output_type=output_type)

    @contextmanager
    def _running(self, call: PipelineCall) -> Iterator[None]:
        """Note a call while it runs, with its models in evaluation mode: sampling has no dropout."""
        calls = self._calls.setdefault(get_ident(), [])
        calls.append(call)
        models = [part for part in (self.transformer, self.vae, self.text_encoder) if part is not None]
        in_training = [module for model in models for module in model.modules() if module.training]
        self._in_training += in_training
        try:
            for module in in_training:
                module.training = False
            yield
        finally:
            self._last_call = calls.pop()
            if not calls:
                self._calls.pop(get_ident(), None)
            if not self._calls:
                while self._in_training:
                    self._in_training.pop().training = True

    def compile(self, **kwargs: Any) -> "MARPipeline":
        """Compile the transformer's blocks and the head's denoising step, for any number of tokens.

        The first call afterwards takes as long as compiling does. On a CPU the layers by oneDNN are about as fast
        without it; see `docs/speed.md`.

        Args:
            kwargs (`Any`): for `torch.compile`: `mode="reduce-overhead"` replays the head's step as CUDA graphs.

        Returns:
            [`MARPipeline`]: itself; unchanged, with a warning, where torch finds no compiler.
        """
        compile_transformer(self.transformer, **kwargs)
        return self

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the pipeline, components that were set later included.

        Args:
            save_directory (`str` or `os.PathLike`): the folder.
            kwargs (`Any`): as for `DiffusionPipeline.save_pretrained`: `variant`, `max_shard_size`, ...

        Raises:
            ValueError: if diffusers could not load the guider, since its library lacks a name for that.
        """
        # diffusers does not note the class of what takes the place of None, and leaves out what it has not noted.
        self.register_modules(**self.components)
        library, name = self.config["guider"]
        needed = () if name is None else (name, BaseGuidance.__name__)
        if missing := [one for one in needed if not hasattr(sys.modules[library], one)]:
            raise ValueError(f"`guider` {name} can't be saved: {library} has no {missing}, to load it by.")
        super().save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the pipeline; a repository without a card gets one whose snippet runs.

        Args:
            repo_id (`str`): where to.
            kwargs (`Any`): as for `DiffusionPipeline.push_to_hub`: `private`, `token`, `commit_message`, ...

        Returns:
            `str`: the address of the upload.
        """
        token = kwargs.get("token")
        repo_id = create_repo(repo_id, private=kwargs.get("private"), token=token, exist_ok=True).repo_id
        if not file_exists(repo_id, "README.md", token=token):
            names = self.config.id2label or {}
            names = [names.get(number, "unnamed") for number in range(max(names, default=-1) + 1)]
            knows_none = self.transformer is not None and self.transformer.config.num_classes == 0
            example = {"example_class": None if knows_none else 0}
            if self.text_encoder is not None:
                example["example_prompt"] = "..."
            build_model_card(repo_id, class_names=names, **example).push_to_hub(repo_id, token=token)
        return super().push_to_hub(repo_id, **kwargs)
