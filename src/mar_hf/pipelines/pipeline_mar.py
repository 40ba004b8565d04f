# SPDX-License-Identifier: Apache-2.0
"""The pipeline: which tokens next, until the picture is whole."""

import math
from collections.abc import Callable
from functools import partial
from numbers import Integral, Real
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging, replace_example_docstring
from huggingface_hub import create_repo, file_exists
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generation import (
    GENERATION_ORDERS,
    GUIDANCE_SCHEDULES,
    HEAD_STEP_SCHEDULES,
    TOKEN_SCHEDULES,
    guidance_within,
    look_up,
)
from ..hub import build_model_card
from ..loading import StrictPipelineMixin, check_components
from ..models import ARForImageGeneration, MARForImageGeneration, add_context_noise, check_text_encoder
from ..onednn import onednn_linears
from ..tokenizers import ImageTokenizer
from .compilation import compile_transformer
from .guided_backbone import GuidedBackbone
from .prompts import PromptMixin


logger = logging.get_logger(__name__)

# The paper's sampling (arXiv:2406.11838, appendix B), with the 64 steps of the released code's example.
GENERATION_DEFAULTS: dict[str, Any] = {
    "num_inference_steps": 64,
    "guidance_scale": 3.0,
    "num_diffusion_steps": 100,
    "guidance_schedule": "linear",
    "token_schedule": "cosine",
    "head_step_schedule": "constant",
    "temperature": 1.0,
    "generation_order": "random",
    "context_noise": 0.0,
    "head_kwargs": None,
    "guidance_interval": (0.0, 1.0),
    "guidance_refresh": 1,
}

# Tokens have unit variance; beyond this they are not tokens any more but a sampler that ran away.
EXPLODED = 20.0

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from mar_hf import MARPipeline, demo_checkpoint

        >>> pipe = MARPipeline.from_pretrained(demo_checkpoint())
        >>> images = pipe(class_labels=["heart", "clock"], generator=torch.Generator().manual_seed(0)).images
        ```
"""


class MARPipeline(PromptMixin, StrictPipelineMixin, DiffusionPipeline):
    """Pictures of classes or texts from an autoregressive model over continuous tokens (arXiv:2406.11838).

    Args:
        transformer ([`MARForImageGeneration`] or [`ARForImageGeneration`]): the backbone with its token head.
        vae ([`ImageTokenizer`]): tokens to pictures; the slot keeps diffusers' name.
        scheduler (`SchedulerMixin`): runs the head: [`TokenDDPMScheduler`], or a diffusers scheduler made with
            `X.from_config(pipe.scheduler.config)`.
        text_encoder (`PreTrainedModel`, *optional*): for models that take texts: any encoder of transformers whose
            `last_hidden_state` is as wide as the `text_dim` of the transformer: T5, CLIP, BERT, ... Without one,
            texts are given as `prompt_embeds`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of the text encoder.
        id2label (`dict`, *optional*): names of the classes, by number; several names of one class are separated by
            ", ".
        generation_defaults (`dict`, *optional*): what `__call__` uses where an argument is None, saved with the
            pipeline; keys are those of `GENERATION_DEFAULTS`, which fill the gaps.

    Raises:
        ValueError: if the image tokenizer's tokens, the text encoder or the classes do not fit the transformer, or a
            default is unknown.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["latents", "mask"]

    def __init__(
        self,
        transformer: MARForImageGeneration | ARForImageGeneration,
        vae: ImageTokenizer,
        scheduler: SchedulerMixin,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        id2label: dict | None = None,
        generation_defaults: dict | None = None,
    ):
        super().__init__()
        components = {
            **{"transformer": transformer, "vae": vae, "scheduler": scheduler},
            **{"text_encoder": text_encoder, "tokenizer": tokenizer},
        }
        check_components(type(self), **components)
        self.register_modules(**components)
        # JSON turns the numbers into strings.
        id2label = None if id2label is None else {int(number): name for number, name in id2label.items()}
        self.register_to_config(id2label=id2label, generation_defaults=generation_defaults)
        for name in generation_defaults or {}:
            look_up(GENERATION_DEFAULTS, name, "generation_defaults")
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
        self.image_processor = VaeImageProcessor(do_resize=False)

    @property
    def labels(self) -> dict[str, int]:
        """Number of each class, by name; a class with several names appears under each and under all together."""
        numbers = {}
        for number, names in (self.config.id2label or {}).items():
            for name in (names, *names.split(", ")):
                numbers.setdefault(name, int(number))
        return numbers

    @property
    def generation_defaults(self) -> dict[str, Any]:
        """What `__call__` uses where an argument is None: saved with the pipeline, or following from its model.

        Without either it is `GENERATION_DEFAULTS` with at most one step per token. Where the head can't use the saved
        temperature with the scheduler that is set, as with most of diffusers', the default is 1.0.
        """
        steps = min(GENERATION_DEFAULTS["num_inference_steps"], self.transformer.config.num_tokens)
        defaults = {**GENERATION_DEFAULTS, "num_inference_steps": steps, **self.transformer.sampling_defaults}
        defaults |= self.config.generation_defaults or {}
        try:
            self.transformer.head.check_scheduler(self.scheduler, defaults["temperature"])
        except ValueError:
            defaults["temperature"] = 1.0
        return defaults

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the running call; callbacks may change `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call is guided, in the steps of its interval."""
        return self._conditional and self._guidance_scale != 1.0

    @property
    def num_timesteps(self) -> int:
        """Autoregressive steps of the last call: as many as calls of the callback."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the running call was asked to stop: set `_interrupt` in a callback."""
        return self._interrupt

    def check_inputs(
        self,
        settings: dict[str, Any],
        class_labels: Any,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        noise: torch.Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
        num_prompts: int | None = None,
    ) -> list[int | None]:
        """Check everything that a caller can get wrong, before any work is done.

        Args:
            settings (`dict[str, Any]`): the arguments that have defaults in the checkpoint.
            class_labels (`Any`): as `__call__` takes them.
            num_images_per_prompt (`int`): pictures for each label.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): as `__call__` takes it.
            noise (`torch.Tensor`, *optional*): as `__call__` takes it.
            output_type (`str`): pil, np, pt or latent.
            callback_on_step_end_tensor_inputs (`list[str]`): names for the callback.
            num_prompts (`int`, *optional*): number of texts; None: there are none.

        Returns:
            `list[int | None]`: the class number of each picture, None where there is no class.

        Raises:
            ValueError: with the argument, its value and what is allowed.
        """
        config = self.transformer.config
        if num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt` has to be at least 1, got {num_images_per_prompt}.")
        labels = [None] * (num_prompts or 1) if class_labels is None else self._label_numbers(class_labels)
        if not labels:
            raise ValueError("`class_labels` is empty; None means no class.")
        if len(labels) == 1 and num_prompts is not None:
            labels *= num_prompts
        if num_prompts not in (None, len(labels)):
            raise ValueError(
                f"`class_labels` has to hold one class for each of {num_prompts} texts, got {len(labels)}."
            )
        labels = [label for label in labels for _ in range(num_images_per_prompt)]
        steps = settings["num_inference_steps"]
        if not isinstance(steps, Integral) or not 1 <= steps <= config.num_tokens:
            raise ValueError(f"`num_inference_steps` has to lie in 1..{config.num_tokens} (the tokens), got {steps}.")
        head_steps = settings["num_diffusion_steps"]
        if not isinstance(head_steps, Integral) or not 1 <= head_steps <= self.scheduler.config.num_train_timesteps:
            limit = self.scheduler.config.num_train_timesteps
            raise ValueError(f"`num_diffusion_steps` has to lie in 1..{limit}, got {head_steps}.")
        for name in ("guidance_scale", "temperature"):
            if not isinstance(settings[name], Real) or not math.isfinite(settings[name]):
                raise ValueError(f"`{name}` has to be a finite number, got {settings[name]!r}.")
        if settings["temperature"] < 0:
            raise ValueError(f"`temperature` has to be at least 0, got {settings['temperature']}.")
        schedule = look_up(TOKEN_SCHEDULES, settings["token_schedule"], "token_schedule")
        self.transformer.check_tokens_per_step(schedule(config.num_tokens, steps))
        look_up(GUIDANCE_SCHEDULES, settings["guidance_schedule"], "guidance_schedule")
        look_up(HEAD_STEP_SCHEDULES, settings["head_step_schedule"], "head_step_schedule")
        self._check_guidance(settings)
        self._check_order(settings["generation_order"], len(labels))
        level = settings["context_noise"]
        if not isinstance(level, Real) or not 0 <= level <= 1:
            raise ValueError(f"`context_noise` has to lie in [0, 1], got {level!r}.")
        head_kwargs = {} if settings["head_kwargs"] is None else settings["head_kwargs"]
        if not isinstance(head_kwargs, dict):
            raise ValueError(f"`head_kwargs` has to be a dict, got {head_kwargs!r}.")
        self.transformer.head.check_scheduler(self.scheduler, settings["temperature"], **head_kwargs)
        sources = generator if isinstance(generator, list) else [generator]
        if generator is not None and not all(isinstance(source, torch.Generator) for source in sources):
            raise ValueError(f"`generator` has to be a torch.Generator or a list of them, got {generator!r}.")
        if isinstance(generator, list) and len(generator) != len(labels):
            raise ValueError(
                f"`generator` has to hold one generator per picture ({len(labels)}), got {len(generator)}."
            )
        shape = (len(labels), config.num_tokens, head_steps + 1, config.token_dim)
        if noise is not None and (not isinstance(noise, torch.Tensor) or noise.shape != shape):
            got = tuple(noise.shape) if isinstance(noise, torch.Tensor) else type(noise).__name__
            raise ValueError(f"`noise` has to be a tensor of shape {shape}, got {got}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` has to be pil, np, pt or latent, got {output_type!r}.")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be in {self._callback_tensor_inputs}, got "
                f"{sorted(unknown)}."
            )
        return labels

    def _label_numbers(self, class_labels: Any) -> list[int]:
        if hasattr(class_labels, "tolist"):  # tensors, and what numpy has
            class_labels = class_labels.tolist()
        if not isinstance(class_labels, (list, tuple, range)):
            return [self._label_number(class_labels)]
        # Labels batched as [[1], [1]], as diffusers' own tests write them, are flattened.
        return [number for label in class_labels for number in self._label_numbers(label)]

    def _label_number(self, label: int | str) -> int:
        limit = self.transformer.config.num_classes
        if limit == 0:
            raise ValueError(f"`class_labels` has to be None for a model that knows no classes, got {label!r}.")
        if isinstance(label, str):
            if label not in self.labels:
                shown = sorted(self.labels)[:40] or "none: this checkpoint has no class names"
                raise ValueError(f"`class_labels` has the unknown name {label!r}; known names: {shown}.")
            return self.labels[label]
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < limit:
            raise ValueError(f"`class_labels` has to lie in 0..{limit - 1} or be class names, got {label!r}.")
        return label

    def _check_guidance(self, settings: dict[str, Any]) -> None:
        interval, refresh = settings["guidance_interval"], settings["guidance_refresh"]
        numbers = isinstance(interval, (list, tuple)) and all(isinstance(end, Real) for end in interval)
        if not numbers or len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError(
                f"`guidance_interval` has to be two numbers, 0 <= start < end <= 1, got {interval!r}; "
                "`guidance_scale=1.0` is no guidance."
            )
        if not isinstance(refresh, Integral) or refresh < 1:
            raise ValueError(f"`guidance_refresh` has to be an integer from 1 on, got {refresh!r}.")
        if refresh > 1 and self.transformer.make_cache([1]) is not None:
            raise ValueError(
                f"`guidance_refresh` has to be 1 for a causal model, got {refresh}: its cache needs every step."
            )

    def _check_order(self, order: str | torch.Tensor, batch_size: int) -> None:
        if isinstance(order, str):
            look_up(GENERATION_ORDERS, order, "generation_order")
            return
        num_tokens = self.transformer.config.num_tokens
        if not isinstance(order, torch.Tensor) or order.shape != (batch_size, num_tokens):
            shape = tuple(getattr(order, "shape", ())) or order
            raise ValueError(
                f"`generation_order` has to be one of {sorted(GENERATION_ORDERS)} or a tensor of shape "
                f"{(batch_size, num_tokens)}, got {shape!r}."
            )
        for number, row in enumerate(order.tolist()):
            if sorted(row) != list(range(num_tokens)):
                raise ValueError(
                    f"`generation_order` has to hold each position 0..{num_tokens - 1} once in every row, but row "
                    f"{number} does not."
                )

    def prepare_randomness(
        self,
        batch_size: int,
        generation_order: str | torch.Tensor,
        num_diffusion_steps: int,
        generator: torch.Generator | list[torch.Generator],
        noise: torch.Tensor | None,
        context_noise: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """All randomness of a call: each picture draws its order, then its noise, from its own generator.

        Args:
            batch_size (`int`): pictures.
            generation_order (`str` or `torch.Tensor`): a name in `GENERATION_ORDERS`, or the orders themselves.
            num_diffusion_steps (`int`): most head steps in any autoregressive step.
            generator (`torch.Generator` or `list[torch.Generator]`): one for all pictures, which draw from it one
                after the other, or one each.
            noise (`torch.Tensor`, *optional*): the noise itself.
            context_noise (`float`, *optional*, defaults to 0.0): level of the noise in the context; drawn last, and
                only above 0.

        Returns:
            three `torch.Tensor` on the CPU: orders of shape `(batch_size, num_tokens)`, int64, noise of shape
            `(batch_size, num_tokens, num_diffusion_steps + 1, token_dim)`, float32, and that of the context of shape
            `(batch_size, num_tokens, token_dim)`, or None.
        """
        config = self.transformer.config
        generators = generator if isinstance(generator, list) else [generator] * batch_size
        shape = (config.num_tokens, num_diffusion_steps + 1, config.token_dim)
        orders, noises, contexts = [], [], []
        for source in generators:
            if isinstance(generation_order, str):
                order = GENERATION_ORDERS[generation_order]
                orders.append(order(config.grid_height, config.grid_width, generator=source))
            if noise is None:
                noises.append(torch.randn(shape, generator=source, device=source.device).cpu())
            if context_noise > 0:
                contexts.append(torch.randn(shape[::2], generator=source, device=source.device).cpu())
        orders = torch.stack(orders) if orders else generation_order.long()
        return orders, torch.stack(noises) if noises else noise, torch.stack(contexts) if contexts else None

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
            guidance_scale (`float`, *optional*): classifier-free guidance; 1.0 means none.
            num_diffusion_steps (`int`, *optional*): steps of the token head's sampler.
            guidance_schedule (`str`, *optional*): a name in `GUIDANCE_SCHEDULES`: linear or constant.
            token_schedule (`str`, *optional*): a name in `TOKEN_SCHEDULES`: cosine or constant.
            head_step_schedule (`str`, *optional*): a name in `HEAD_STEP_SCHEDULES`: constant, or linear annealing.
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
                entry 0 starts the head for the token at that position, entry 1 + s is injected at its step s.
            context_noise (`float`, *optional*): share of noise mixed into the tokens that the backbone sees, for
                models trained with some; 0.0 means none.
            head_kwargs (`dict`, *optional*): further arguments of the head's `sample`: `top_k` and `top_p` of a
                categorical head, `guidance_refresh` of the diffusion head.
            guidance_interval (`tuple[float, float]`, *optional*): shares of the autoregressive steps between which
                there is guidance (arXiv:2404.07724); outside of it the unconditional branch is not computed.
            guidance_refresh (`int`, *optional*): guided steps for which one pass of the backbone without the class
                serves: what the class changes in the conditions is taken over from the first of them (the condition
                cache of LazyMAR, arXiv:2503.12450). 1, in every step, is exact; causal models know no other.
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
                step, the number of tokens done and a dict; `latents` in the dict that it returns replace the picture.
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
        # 1. Check inputs
        given = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "num_diffusion_steps": num_diffusion_steps,
            "guidance_schedule": guidance_schedule,
            "token_schedule": token_schedule,
            "head_step_schedule": head_step_schedule,
            "temperature": temperature,
            "generation_order": generation_order,
            "context_noise": context_noise,
            "head_kwargs": head_kwargs,
            "guidance_interval": guidance_interval,
            "guidance_refresh": guidance_refresh,
        }
        defaults = self.generation_defaults
        settings = {name: defaults[name] if value is None else value for name, value in given.items()}
        num_prompts = self._count_prompts(prompt, prompt_embeds, negative_prompt, negative_prompt_embeds)
        labels = self.check_inputs(
            settings,
            class_labels,
            num_images_per_prompt,
            generator,
            noise,
            output_type,
            callback_on_step_end_tensor_inputs,
            num_prompts,
        )
        self._guidance_scale = settings["guidance_scale"]
        self._conditional = labels[0] is not None or num_prompts is not None
        self._interrupt = False

        # 2. Schedules: one entry per autoregressive step
        config, device, batch_size = self.transformer.config, self._execution_device, len(labels)
        steps = settings["num_inference_steps"]
        tokens_per_step = TOKEN_SCHEDULES[settings["token_schedule"]](config.num_tokens, steps)
        head_steps = HEAD_STEP_SCHEDULES[settings["head_step_schedule"]](settings["num_diffusion_steps"], steps)
        guidance = GUIDANCE_SCHEDULES[settings["guidance_schedule"]]
        self._num_timesteps = steps

        # 3. Texts, labels, orders and noise
        texts = None
        if config.text_dim is not None or num_prompts is not None:
            texts = self.encode_prompt(
                [""] * batch_size if num_prompts is None else prompt,
                1 if num_prompts is None else num_images_per_prompt,
                # Also without guidance: callbacks may turn it on.
                negative_prompt=negative_prompt,
                prompt_embeds=prompt_embeds,
                prompt_attention_mask=prompt_attention_mask,
                negative_prompt_embeds=negative_prompt_embeds,
                negative_prompt_attention_mask=negative_prompt_attention_mask,
                max_sequence_length=max_sequence_length,
            )
        if generator is None:
            # Also for schedulers that draw noise of their own: they would turn to torch's global state.
            generator = torch.Generator()
            generator.seed()
        labels = None if labels[0] is None else torch.tensor(labels, device=device)
        level = settings["context_noise"]
        orders, noise, context = self.prepare_randomness(
            batch_size, settings["generation_order"], settings["num_diffusion_steps"], generator, noise, level
        )
        orders, noise = orders.to(device), noise.to(device)
        context = None if context is None else context.to(device)
        tokens = torch.zeros(batch_size, config.num_tokens, config.token_dim, device=device)
        mask = torch.ones(batch_size, config.num_tokens, dtype=torch.bool, device=device)

        # 4. Autoregressive loop
        backbone = GuidedBackbone(
            self.transformer,
            tokens_per_step,
            orders,
            labels,
            partial(self._make_text_context, texts),
            settings["guidance_refresh"],
        )
        done = 0
        with onednn_linears(self.transformer), self.progress_bar(total=steps) as progress_bar:
            for step, count in enumerate(tokens_per_step):
                if self.interrupt:
                    break
                positions = orders[:, done : done + count]
                # In every step, because callbacks may change the scale.
                scales = guidance_within(guidance(self.guidance_scale, tokens_per_step), settings["guidance_interval"])
                scale = scales[step] if self._conditional else 1.0
                seen = tokens if context is None else add_context_noise(tokens, context, level)
                condition, negative = backbone.predict(seen, step, scale != 1.0)
                sampled = self.transformer.head.sample(
                    condition=condition,
                    negative_condition=negative,
                    guidance_scale=scale,
                    scheduler=self.scheduler,
                    num_steps=head_steps[step],
                    temperature=settings["temperature"],
                    noise=noise.gather(1, positions[..., None, None].expand(-1, -1, *noise.shape[2:])),
                    generator=generator,
                    **settings["head_kwargs"] or {},
                )
                tokens = tokens.scatter(1, positions[..., None].expand_as(sampled), sampled)
                mask = mask.scatter(1, positions, False)
                done += count
                if callback_on_step_end is not None:
                    before = tokens.clone()
                    latents = self.vae.unpatchify(tokens, config.grid_height)
                    available = {"latents": latents, "mask": mask}
                    kwargs = {name: available[name] for name in callback_on_step_end_tensor_inputs}
                    returned = callback_on_step_end(self, step, done, kwargs) or {}
                    if "latents" in returned:
                        tokens = self.vae.patchify(returned["latents"]).to(tokens)
                        if not torch.equal(tokens, before):
                            backbone.forget()
                progress_bar.update()

        # 5. Decode
        largest = tokens.abs().max().item()
        if not largest <= EXPLODED:
            logger.warning(
                f"The head's sampler ran away: tokens reach {largest:.3g} where about 4 is usual. If the model is "
                "young or in half precision, give its scheduler `max_timestep=950`, or use more `num_diffusion_steps`."
            )
        latents = self.vae.unpatchify(tokens, config.grid_height)
        image = latents
        if output_type != "latent":
            image = self.vae.decode(latents.to(self.vae.dtype)).float()
            image = self.image_processor.postprocess(image, output_type=output_type)

        # 6. Offload
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=image) if return_dict else (image,)

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
