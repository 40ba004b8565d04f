# SPDX-License-Identifier: Apache-2.0
"""What every token head offers."""

import copy
import inspect
import math
from abc import ABC, abstractmethod
from numbers import Integral, Real
from typing import Any, TypedDict

import torch
from diffusers import BaseGuidance, SchedulerMixin
from torch import nn
from typing_extensions import Unpack

from ..tokenizers import ImageTokenizer
from ..utils import check_count, check_generator, check_number


def check_tensor(
    argument: str, value: Any, shape: tuple[int | None, ...], dtype: torch.dtype | None = None, optional: bool = True
) -> None:
    """Refuse what is no tensor of a shape and a type.

    Args:
        argument (`str`): what it is called, for the message.
        value (`Any`): what the caller gave.
        shape (`tuple[int | None, ...]`): the shape; None stands for any number.
        dtype (`torch.dtype`, *optional*): the type; None means real floating-point numbers.
        optional (`bool`, *optional*, defaults to `True`): whether it may be None.

    Raises:
        ValueError: names argument, value and what is allowed.
    """
    if value is None and optional:
        return
    words = f"of shape {tuple('any' if size is None else size for size in shape)}".replace("'", "")
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"`{argument}` has to be a tensor {words}, got {type(value).__name__}.")
    fits = len(shape) == value.ndim and all(size in (None, has) for size, has in zip(shape, value.shape, strict=True))
    if not fits:
        raise ValueError(f"`{argument}` has to be {words}, got {tuple(value.shape)}.")
    if not (value.is_floating_point() if dtype is None else value.dtype == dtype):
        expected = "floating-point numbers" if dtype is None else dtype
        raise ValueError(f"`{argument}` has to hold {expected}, got {value.dtype}.")


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


def as_computed(states: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """Cast to the type that a layer computes in.

    That is the type of its bias: quantised weights are stored in another. What is stored in 8 bits altogether
    (layerwise casting) has no such type before it is called; it takes what it is given.

    Args:
        states (`torch.Tensor`): what the layer will be given.
        layer (`torch.nn.Module`): a linear layer, or what has been put in its place.

    Returns:
        `torch.Tensor` of the same shape.
    """
    dtype = layer.bias.dtype
    return states.to(dtype) if dtype.is_floating_point and dtype.itemsize > 1 else states


def guide(
    conditional: torch.Tensor,
    unconditional: torch.Tensor,
    guidance_scale: float,
    guider: BaseGuidance | None = None,
    step: int = 0,
    num_steps: int = 1,
    timestep: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """Guidance of one head step: of noise, velocities, logits or conditions, whatever a head guides.

    Without a guider it is linear: unconditional + s (conditional - unconditional) (arXiv:2207.12598).

    Args:
        conditional (`torch.Tensor` of shape `(..., size)`): with the class or text. Each row is guided by itself.
        unconditional (`torch.Tensor` of the same shape): without it.
        guidance_scale (`float`): s; 1.0 means none. It takes the place of the guider's own, which this changes.
        guider (`BaseGuidance`, *optional*): another rule, of diffusers.
        step (`int`, *optional*, defaults to 0): of the head's sampler. What a guider keeps between steps, as a
            momentum, begins anew at step 0.
        num_steps (`int`, *optional*, defaults to 1): that the head's sampler takes.
        timestep (`float` or `torch.Tensor`, *optional*): of that step.

    Returns:
        `torch.Tensor` of the same shape.
    """
    if guider is None:
        return torch.lerp(unconditional, conditional, guidance_scale)
    # The original formulation starts at the conditional prediction: there, 0 means none.
    original = getattr(guider, "use_original_formulation", False)
    guider.guidance_scale = guidance_scale - 1 if original else guidance_scale
    guider.set_state(step, num_steps, timestep)
    rows = tuple(prediction.flatten(0, -2) for prediction in (conditional, unconditional))
    return guider(guider.prepare_inputs({"noise_pred": rows})).pred.view_as(conditional)


class HeadBlock(nn.Module):
    """What the residual blocks of heads are made of: a norm and two linear layers with SiLU between them.

    Args:
        hidden_size (`int`): width.
        layer_norm_eps (`float`): of the layer norm.
    """

    # Whose output alone goes through `activation`: a backend may compute both at once.
    activated_linear = "linear_1"

    def __init__(self, hidden_size: int, layer_norm_eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.linear_1 = nn.Linear(hidden_size, hidden_size)
        self.activation = nn.SiLU()
        self.linear_2 = nn.Linear(hidden_size, hidden_size)


class SamplingSettings(TypedDict):
    """What `draw` of every head is given beside conditions."""

    guidance_scale: float
    guider: BaseGuidance | None
    scheduler: SchedulerMixin | None
    num_steps: int
    temperature: float
    noise: torch.Tensor | None
    generator: torch.Generator | list[torch.Generator] | None


class LossSettings(TypedDict):
    """What `masked_loss` of every head is given beside conditions and tokens."""

    scheduler: SchedulerMixin | None
    timesteps: torch.Tensor | None
    noise: torch.Tensor | None
    num_masked: int | None
    generator: torch.Generator | list[torch.Generator] | None


class TokenHead(nn.Module, ABC):
    """Turns the backbone's condition vectors into samples of tokens; knows neither positions nor orders.

    A new head is one file with a subclass and one line in `TOKEN_HEADS`. Its constructor takes `token_dim`,
    `condition_dim`, `batch_multiplier` and its own settings; its weights are initialised by `init_weights`.

    `sample` and `loss` are the doors, where everything is checked; a head does the work in `draw` and `masked_loss`.
    """

    # What a pipeline takes for settings that neither its checkpoint nor the caller names.
    sampling_defaults: dict[str, object] = {}
    # Whether `set_tokenizer` reads the tokenizer's weights.
    uses_codebook: bool = False
    # What runs the steps: training makes one, and pipelines need one. None: the head needs none and reads none.
    scheduler_class: type[SchedulerMixin] | None = None
    # Whether sampling runs through steps, and the most of them where no scheduler limits them.
    has_steps: bool = True
    most_steps: int = 1000
    # Vectors of noise, of `token_dim` numbers, that a step is given; the start has one beside.
    noise_per_step: int = 1
    # Whether guidance combines conditions before the head, and not what the head predicts from each.
    guides_condition: bool = False
    # Whether guidance is of velocities: where they are 0, a sample stays as it is.
    guides_velocity: bool = False
    # Numbers in a token and in a condition; the constructor sets them.
    token_dim: int
    condition_dim: int | None = None

    def check_sizes(
        self,
        token_dim: int,
        condition_dim: int,
        num_layers: int,
        hidden_size: int,
        batch_multiplier: int,
        layer_norm_eps: float,
    ) -> None:
        """Refuse sizes that no head can have, and take over those of tokens and conditions.

        Args:
            token_dim (`int`): numbers in a token.
            condition_dim (`int`): width of the backbone's output.
            num_layers (`int`): residual blocks.
            hidden_size (`int`): width of the head.
            batch_multiplier (`int`): draws per token and training step.
            layer_norm_eps (`float`): of the layer norms.

        Raises:
            ValueError: if one is no number, or out of its range.
        """
        sizes = {"token_dim": token_dim, "condition_dim": condition_dim, "hidden_size": hidden_size}
        for name, value in (sizes | {"batch_multiplier": batch_multiplier}).items():
            check_count(name, value)
        check_count("num_layers", num_layers, 0, 1024)
        check_number("layer_norm_eps", layer_norm_eps, 1e-12, 1)
        self.token_dim, self.condition_dim = token_dim, condition_dim

    def noise_entries(self, num_steps: int) -> int:
        """How many vectors of noise a token takes.

        Args:
            num_steps (`int`): sampler steps.

        Returns:
            `int`: one for the start, then `noise_per_step` for each step; without steps, for one.
        """
        return 1 + self.noise_per_step * (num_steps if self.has_steps else 1)

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
    def check_scheduler(self, scheduler: SchedulerMixin | None, temperature: float = 1.0, **head_kwargs: Any) -> None:
        """Refuse a scheduler, or settings of `sample`, that this head can't work with.

        Args:
            scheduler (`SchedulerMixin`, *optional*): the candidate.
            temperature (`float`, *optional*, defaults to 1.0): the temperature that it will be asked for.
            head_kwargs (`Any`): settings that only this kind of head has.

        Raises:
            ValueError: if one does not fit, or the head has no such setting.
        """

    def check_guider(self, guider: BaseGuidance | None) -> None:
        """Refuse a guider that `guide` can't use.

        Args:
            guider (`BaseGuidance`, *optional*): the candidate; None, the linear rule, will do for every head.

        Raises:
            ValueError: if it is none of diffusers' guiders, needs other predictions than two or layers of the model,
                has not one scale, or starts with zeros where they are no velocities; names its class.
        """
        if guider is None:
            return
        name, cls = type(guider).__name__, type(guider)
        if not isinstance(guider, BaseGuidance):
            raise ValueError(f"`guider` has to be a guider of diffusers, got {name}.")
        if cls._input_predictions != ["pred_cond", "pred_uncond"]:
            raise ValueError(
                f"`guider` has to work with a conditional and an unconditional prediction, but {name} takes "
                f"{cls._input_predictions}."
            )
        if cls.prepare_models is not BaseGuidance.prepare_models:
            raise ValueError(f"`guider` has to leave the model as it is, but {name} changes its layers.")
        if "guidance_scale" not in inspect.signature(cls).parameters:
            raise ValueError(
                f"`guider` has to have a `guidance_scale`, which that of a call takes the place of, but {name} has none."
            )
        if getattr(guider, "zero_init_steps", 0) > 0 and not self.guides_velocity:
            raise ValueError(
                f"`guider` {name} has to have `zero_init_steps` 0 with {type(self).__name__}, got "
                f"{guider.zero_init_steps}: there, zeros are not a step that changes nothing."
            )

    def loss(
        self,
        *,
        condition: torch.Tensor,
        target: torch.Tensor,
        mask: torch.Tensor,
        scheduler: SchedulerMixin | None = None,
        timesteps: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        num_masked: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """The training loss, averaged over the masked tokens; only these go through the network.

        Args:
            condition (`torch.Tensor` of shape `(batch, num_tokens, condition_dim)`): the backbone's output.
            target (`torch.Tensor` of shape `(batch, num_tokens, token_dim)`): the true tokens.
            mask (`torch.Tensor` of shape `(batch, num_tokens)`): bool, True for tokens that count.
            scheduler (`SchedulerMixin`, *optional*): the noise schedule, for heads that have one.
            timesteps (`torch.Tensor` of shape `(batch_multiplier * batch * num_tokens,)`, *optional*): of the noise,
                as the head counts them, whole batch after whole batch; drawn where not given.
            noise (`torch.Tensor` of shape `(batch_multiplier * batch * num_tokens, token_dim)`, *optional*): likewise.
            num_masked (`int`, *optional*): masked tokens in every row, where the caller knows it: saves waiting for
                the device.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): for what is drawn, timesteps first;
                with one per image, what is drawn for an image does not depend on the others. None means torch's
                global one.

        Returns:
            `torch.Tensor`: a float32 scalar.

        Raises:
            ValueError: if a shape, the scheduler or the number of generators does not fit or nothing is masked.
        """
        check_tensor("condition", condition, (None, None, self.condition_dim), optional=False)
        check_tensor("target", target, (*condition.shape[:2], self.token_dim), optional=False)
        check_tensor("mask", mask, tuple(condition.shape[:2]), torch.bool, optional=False)
        if num_masked is not None:
            check_count("num_masked", num_masked, 0, mask.shape[1])
        check_generator(generator, len(mask))
        rows = masked_rows(mask, num_masked)
        condition, target = condition.flatten(0, 1)[rows], target.flatten(0, 1)[rows]
        settings = {"scheduler": scheduler, "timesteps": timesteps, "noise": noise, "num_masked": num_masked}
        return self.masked_loss(
            condition=condition, target=target, mask=mask, rows=rows, generator=generator, **settings
        )

    @abstractmethod
    def masked_loss(
        self,
        *,
        condition: torch.Tensor,
        target: torch.Tensor,
        mask: torch.Tensor,
        rows: torch.Tensor,
        **settings: Unpack[LossSettings],
    ) -> torch.Tensor:
        """The loss of the masked tokens: what is behind `loss`. A head names those arguments that it needs.

        Args:
            condition (`torch.Tensor` of shape `(rows, condition_dim)`): of the masked tokens.
            target (`torch.Tensor` of shape `(rows, token_dim)`): the same tokens.
            mask (`torch.Tensor` of shape `(batch, num_tokens)`): as `loss` takes it.
            rows (`torch.Tensor` of shape `(rows,)`): int64, where they stand in the flattened batch, ascending.
            scheduler, timesteps, noise, num_masked, generator (as of `loss`): all of them, checked where all heads
                have the same.

        Returns:
            `torch.Tensor`: a float32 scalar.
        """

    def sample(
        self,
        *,
        condition: torch.Tensor,
        negative_condition: torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        guider: BaseGuidance | None = None,
        scheduler: SchedulerMixin | None = None,
        num_steps: int,
        temperature: float = 1.0,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        **head_kwargs: Any,
    ) -> torch.Tensor:
        """Sample tokens.

        Args:
            condition (`torch.Tensor` of shape `(batch, num_tokens, condition_dim)`): the backbone's output at the
                positions wanted.
            negative_condition (`torch.Tensor` of the same shape, *optional*): without the class, for guidance.
            guidance_scale (`float`, *optional*, defaults to 1.0): 1.0 means no guidance.
            guider (`BaseGuidance`, *optional*): how guidance is done, in place of the linear rule: one of diffusers,
                whose own `guidance_scale` does not count.
            scheduler (`SchedulerMixin`, *optional*): the sampler, for heads that have one.
            num_steps (`int`): sampler steps.
            temperature (`float`, *optional*, defaults to 1.0): below 1.0, samples vary less.
            noise (`torch.Tensor` of shape `(batch, num_tokens, entries, token_dim)`, *optional*): standard normal.
                Entry 0 is the start, entry 1 + s is injected at step s; at least `noise_entries(num_steps)`.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): for the noise, where none is given.
            head_kwargs (`Any`): settings that only this kind of head has, see its `draw`.

        Returns:
            `torch.Tensor` of shape `(batch, num_tokens, token_dim)`: float32.

        Raises:
            ValueError: if something does not fit this head, or it has no such setting.
        """
        check_tensor("condition", condition, (None, None, self.condition_dim), optional=False)
        for name, value in (("negative_condition", negative_condition), ("noise", noise)):
            if value is not None and not isinstance(value, torch.Tensor):
                raise ValueError(f"`{name}` has to be a tensor, got {type(value).__name__}.")
        if isinstance(num_steps, bool) or not isinstance(num_steps, Integral):
            raise ValueError(f"`num_steps` has to be an integer, got {num_steps!r}.")
        check_number("temperature", temperature, -1e4, 1e4)  # each head has its own range
        self.check_scheduler(scheduler, temperature, **head_kwargs)
        self.check_guider(guider)
        most = self.most_steps
        if self.scheduler_class is not None:
            most = getattr(scheduler, "config", {}).get("num_train_timesteps", num_steps)
        if not 1 <= num_steps <= most:
            raise ValueError(
                f"`num_steps`, the scheduler's `num_inference_steps` has to lie in 1..{most}, got {num_steps}."
            )
        if (
            not isinstance(guidance_scale, Real)
            or isinstance(guidance_scale, bool)
            or not math.isfinite(guidance_scale)
        ):
            raise ValueError(f"`guidance_scale` has to be a finite number, got {guidance_scale!r}.")
        if guidance_scale != 1.0 and negative_condition is None:
            raise ValueError(f"`guidance_scale` {guidance_scale} needs `negative_condition`.")
        if guidance_scale != 1.0 and negative_condition.shape != condition.shape:
            raise ValueError(
                f"`negative_condition` has to be of shape {tuple(condition.shape)} as `condition`, got "
                f"{tuple(negative_condition.shape)}."
            )
        check_generator(generator, len(condition))
        entries = self.noise_entries(num_steps)
        expected = (*condition.shape[:2], entries, self.token_dim)
        if noise is not None:
            fits = noise.ndim == 4 and noise.shape[2] >= entries
            if not fits or (*noise.shape[:2], entries, noise.shape[3]) != expected:
                raise ValueError(f"`noise` has to be of shape {expected}, got {tuple(noise.shape)}.")
        settings = {"guidance_scale": guidance_scale, "scheduler": scheduler, "num_steps": num_steps, **head_kwargs}
        settings |= {"temperature": float(temperature), "noise": noise, "generator": generator}
        settings["guider"] = copy.copy(guider)  # it keeps the state of the sampling
        return self.draw(condition=condition, negative_condition=negative_condition, **settings)

    @abstractmethod
    def draw(
        self,
        *,
        condition: torch.Tensor,
        negative_condition: torch.Tensor | None,
        **settings: Unpack[SamplingSettings],
    ) -> torch.Tensor:
        """Sample tokens without a check: what is behind `sample`. A head names those arguments that it needs, and
        those that it alone has.

        Args:
            condition, negative_condition, guidance_scale, scheduler, num_steps, temperature, noise, generator (as of
                `sample`): all of them, checked.
            guider (`BaseGuidance`, *optional*): as of `sample`, for `guide`; this call's own, which keeps its state.

        Returns:
            `torch.Tensor` of shape `(batch, num_tokens, token_dim)`: float32.
        """
