# SPDX-License-Identifier: Apache-2.0
"""What a call of a pipeline will do, decided before it does anything: its settings, then its plan."""

from collections.abc import Mapping
from dataclasses import InitVar, asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

import torch

from ..utils import look_up
from .orders import GENERATION_ORDERS
from .schedules import GUIDANCE_SCHEDULES, HEAD_STEP_SCHEDULES, TOKEN_SCHEDULES, check_tokens_per_step, guidance_within


LIMITED_BY = {"num_inference_steps": " (the tokens)"}
# Least, most, and both in words. Far beyond 1000 float32 overflows.
REAL_SETTINGS = {
    "guidance_scale": (-1000, 1000, "a finite number of at least -1000 and at most 1000"),
    "temperature": (0, 1000, "a finite number of at least 0 and at most 1000"),
    "context_noise": (0, 1, "a number in [0, 1]"),
    "detail_share": (0, 1, "a number in [0, 1]"),
}
TABLES = {
    "generation_order": GENERATION_ORDERS,
    "token_schedule": TOKEN_SCHEDULES,
    "guidance_schedule": GUIDANCE_SCHEDULES,
    "head_step_schedule": HEAD_STEP_SCHEDULES,
}
# What `decoding` stands for. GtR: arXiv:2510.17171.
DECODINGS: dict[str, dict[str, Any]] = {
    "gtr": {"generation_order": "gtr", "token_schedule": "gtr", "head_step_schedule": "gtr", "detail_share": 0.1},
}


@dataclass(frozen=True, eq=False)
class GenerationSettings:
    """Everything about a call that has a default in the checkpoint. It is checked when it is built.

    The defaults are the paper's sampling (arXiv:2406.11838, appendix B), with the 64 steps of the released code's
    example.

    Args:
        num_inference_steps (`int`, *optional*, defaults to 64): autoregressive steps.
        guidance_scale (`float`, *optional*, defaults to 3.0): classifier-free guidance; 1.0 means none.
        num_diffusion_steps (`int`, *optional*, defaults to 100): steps of the token head's sampler.
        guidance_schedule (`str`, *optional*, defaults to `"linear"`): a name in `GUIDANCE_SCHEDULES`.
        token_schedule (`str`, *optional*, defaults to `"cosine"`): a name in `TOKEN_SCHEDULES`.
        head_step_schedule (`str`, *optional*, defaults to `"constant"`): a name in `HEAD_STEP_SCHEDULES`.
        temperature (`float`, *optional*, defaults to 1.0): of the token head.
        generation_order (`str` or `torch.Tensor` of shape `(batch, num_tokens)`, *optional*, defaults to `"random"`):
            a name in `GENERATION_ORDERS`, or the positions in the order in which they are generated.
        context_noise (`float`, *optional*, defaults to 0.0): share of noise in what the backbone sees, in [0, 1].
        head_kwargs (`dict`, *optional*): settings that only one kind of head has; the head checks them.
        guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`): shares of the steps between
            which there is guidance.
        guidance_refresh (`int`, *optional*, defaults to 1): guided steps for one pass without the class.
        detail_share (`float`, *optional*, defaults to 0.0): the share of a step's tokens, those with most detail, that
            take all `num_diffusion_steps` where a schedule gives fewer, once half of the tokens are there.
        limits (`Mapping[str, int]`, *optional*): the most of some counts that a model and its scheduler allow.

    Raises:
        ValueError: if one of them is of the wrong type, out of its range or no name in its table.
    """

    num_inference_steps: int = 64
    guidance_scale: float = 3.0
    num_diffusion_steps: int = 100
    guidance_schedule: str = "linear"
    token_schedule: str = "cosine"
    head_step_schedule: str = "constant"
    temperature: float = 1.0
    generation_order: str | torch.Tensor = "random"
    context_noise: float = 0.0
    head_kwargs: dict[str, Any] | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_refresh: int = 1
    detail_share: float = 0.0
    limits: InitVar[Mapping[str, int] | None] = None

    def __post_init__(self, limits: Mapping[str, int] | None) -> None:
        for name in ("num_inference_steps", "num_diffusion_steps", "guidance_refresh"):
            value, most = getattr(self, name), (limits or {}).get(name)
            if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= value <= (most or value):
                limited = f"lie in 1..{most}{LIMITED_BY.get(name, '')}"
                allowed = "be an integer from 1 on" if most is None else limited
                raise ValueError(f"`{name}` has to {allowed}, got {value!r}.")
        for name, (least, most, words) in REAL_SETTINGS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not least <= value <= most:
                raise ValueError(f"`{name}` has to be {words}, got {value!r}.")
        for name, table in TABLES.items():
            value = getattr(self, name)
            if name == "generation_order" and not isinstance(value, str):
                continue  # it takes the batch to tell: `check_orders`
            if not isinstance(value, str) or value not in table:
                look_up(table, value, name)
        if not isinstance(self.head_kwargs, dict | None) or set(map(type, self.head_kwargs or ())) - {str}:
            raise ValueError(f"`head_kwargs` has to be a dict of settings by name, got {self.head_kwargs!r}.")
        interval = self.guidance_interval
        numbers = isinstance(interval, (list, tuple)) and all(isinstance(end, Real) for end in interval)
        numbers = numbers and bool not in map(type, interval)
        if not numbers or len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError(
                f"`guidance_interval` has to be two numbers, 0 <= start < end <= 1, got {interval!r}; "
                "`guidance_scale=1.0` is no guidance."
            )

    def override(self, limits: Mapping[str, int] | None = None, **given: Any) -> "GenerationSettings":
        """These settings, but for those that are given.

        Args:
            limits (`Mapping[str, int]`, *optional*): the most of some counts, as the constructor takes them.
            given (`Any`): settings by name; None leaves one as it is.

        Returns:
            [`GenerationSettings`]: a new one, checked.

        Raises:
            ValueError: if one does not exist or is out of its range.
        """
        return replace(self, limits=limits, **{name: value for name, value in given.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """All settings by name.

        Returns:
            `dict[str, Any]`: what the constructor takes.
        """
        return {field.name: getattr(self, field.name) for field in fields(self)}


GENERATION_DEFAULTS: dict[str, Any] = asdict(GenerationSettings())


def expand_decoding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with all parts of `decoding` in its place.

    Args:
        settings (`Mapping[str, Any]`): by name; those beside `decoding` go before its parts. None stands for no
            `decoding`.

    Returns:
        `dict[str, Any]`: without `decoding`.

    Raises:
        ValueError: if it is no name in `DECODINGS`.
    """
    rest = dict(settings)
    decoding = rest.pop("decoding", None)
    return rest if decoding is None else look_up(DECODINGS, decoding, "decoding") | rest


def build_settings(*sources: Mapping[str, Any] | None) -> GenerationSettings:
    """Settings from several sources, the later ones over the earlier ones.

    Args:
        sources (`Mapping[str, Any]`, *optional*): settings by name, and maybe `decoding`, as a checkpoint's
            `generation_defaults` has them.

    Returns:
        [`GenerationSettings`]: with the paper's where nothing is said.

    Raises:
        ValueError: if a name is unknown or a value out of its range; says that it is a default.
    """
    merged: dict[str, Any] = {}
    for source in sources:
        if not isinstance(source, Mapping | None):
            raise ValueError(f"`generation_defaults` has to be a dict, got {source!r}.")
        for name in source or ():
            look_up(GENERATION_DEFAULTS | {"decoding": None}, name, "generation_defaults")
    try:
        for source in sources:
            merged |= expand_decoding(source or {})
        look_up(GENERATION_ORDERS, merged.get("generation_order", "random"), "generation_order")
        return GenerationSettings(**merged)
    except ValueError as error:
        raise ValueError(f"`generation_defaults` of the pipeline: {error}") from error


def check_orders(orders: Any, batch_size: int, num_tokens: int) -> None:
    """Refuse orders that are no permutations.

    Args:
        orders (`Any`): to be a `torch.Tensor` of shape `(batch_size, num_tokens)`.
        batch_size (`int`): pictures.
        num_tokens (`int`): positions.

    Raises:
        ValueError: if the shape is another, or a row does not hold each position once.
    """
    if not isinstance(orders, torch.Tensor) or orders.shape != (batch_size, num_tokens):
        got = tuple(getattr(orders, "shape", ())) or orders
        raise ValueError(
            f"`generation_order` has to be one of {sorted(GENERATION_ORDERS)} or a tensor of shape "
            f"{(batch_size, num_tokens)}, got {got!r}."
        )
    for number, row in enumerate(orders.tolist()):
        if sorted(row) != list(range(num_tokens)):
            raise ValueError(
                f"`generation_order` has to hold each position 0..{num_tokens - 1} once in every row, but row "
                f"{number} does not."
            )


@dataclass(frozen=True)
class GenerationStep:
    """One autoregressive step.

    Args:
        start (`int`): tokens that are there before it.
        count (`int`): tokens that it generates.
        guidance_scale (`float`): 1.0 means that the unconditional branch is not needed.
        num_diffusion_steps (`int`): head steps.
        num_detail_tokens (`int`, *optional*, defaults to 0): so many of the tokens, those with most detail, take
            others.
        num_detail_steps (`int`, *optional*, defaults to 0): the head steps of these.
    """

    start: int
    count: int
    guidance_scale: float
    num_diffusion_steps: int
    num_detail_tokens: int = 0
    num_detail_steps: int = 0


@dataclass(frozen=True, eq=False)
class GenerationPlan:
    """What the pipeline's loop walks: it knows nothing else of which tokens come when.

    Args:
        steps (`list[GenerationStep]`): one after the other.
        orders (`torch.Tensor` of shape `(batch, num_tokens)`): int64, positions in the order of generation; the
            tokens of a step are `orders[:, start : start + count]`.
        tokens (`torch.Tensor` of shape `(batch, num_tokens, token_dim)`): what is known at the start, else 0.
        mask (`torch.Tensor` of shape `(batch, num_tokens)`): bool, True where a token is to be generated.
        noise (`torch.Tensor` of shape `(batch, num_tokens, noise_entries, token_dim)`): of the head.
        context_noise (`torch.Tensor` of shape `(batch, num_tokens, token_dim)`, *optional*): mixed into what the
            backbone sees.
    """

    steps: list[GenerationStep]
    orders: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    noise: torch.Tensor
    context_noise: torch.Tensor | None = None


def plan_steps(
    settings: GenerationSettings, num_tokens: int, is_guided: bool = True, max_tokens_per_step: int | None = None
) -> list[GenerationStep]:
    """The steps of a call. Nothing is drawn.

    Args:
        settings ([`GenerationSettings`]): of the call.
        num_tokens (`int`): tokens to generate, at least as many as steps.
        is_guided (`bool`, *optional*, defaults to `True`): False leaves the unconditional branch out everywhere.
        max_tokens_per_step (`int`, *optional*): the most that the model predicts at once; None: any number.

    Returns:
        `list[GenerationStep]`: `settings.num_inference_steps` steps.

    Raises:
        ValueError: if a step has more tokens than the model predicts.
    """
    count = settings.num_inference_steps
    tokens_per_step = TOKEN_SCHEDULES[settings.token_schedule](num_tokens, count)
    if max_tokens_per_step is not None:
        check_tokens_per_step(tokens_per_step, num_tokens, max_tokens_per_step)
    most = settings.num_diffusion_steps
    head_steps = HEAD_STEP_SCHEDULES[settings.head_step_schedule](most, tokens_per_step)
    scales = [1.0] * count
    if is_guided:
        scales = GUIDANCE_SCHEDULES[settings.guidance_schedule](settings.guidance_scale, tokens_per_step)
        if tuple(settings.guidance_interval) != (0.0, 1.0):
            scales = guidance_within(scales, settings.guidance_interval)
    steps, start = [], 0
    for size, scale, head in zip(tokens_per_step, scales, head_steps, strict=True):
        details = int(settings.detail_share * size) if head < most and 2 * start >= num_tokens else 0
        steps.append(GenerationStep(start, size, scale, head, details, most if details else 0))
        start += size
    return steps


def plan_generation(
    settings: GenerationSettings,
    config: Any,
    steps: list[GenerationStep],
    generators: list[torch.Generator],
    noise: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    noise_entries: int | None = None,
) -> GenerationPlan:
    """The plan of a call, with all of its randomness: each picture draws its order, then its noise.

    Args:
        settings ([`GenerationSettings`]): of the call.
        config ([`BackboneConfig`]): of the backbone, for `grid_height`, `grid_width` and `token_dim`.
        steps (`list[GenerationStep]`): from `plan_steps`.
        generators (`list[torch.Generator]`): one a picture; pictures that share one draw from it one after the other.
        noise (`torch.Tensor`, *optional*): the noise itself, of the plan's shape: none is drawn then.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where the plan is needed. What is drawn
            depends on where the generators live, not on this.
        noise_entries (`int`, *optional*): vectors of noise for each token; None: one for the start and one for each
            head step.

    Returns:
        [`GenerationPlan`]: with the noise of the context, which is drawn last, where there is to be some.
    """
    height, width, token_dim = config.grid_height, config.grid_width, config.token_dim
    num_tokens, entries = height * width, noise_entries or settings.num_diffusion_steps + 1
    given = isinstance(settings.generation_order, torch.Tensor)
    orders, noises, contexts = [], [], []
    for source in generators:
        draw = {"generator": source, "device": source.device}
        if not given:
            orders.append(GENERATION_ORDERS[settings.generation_order](height, width, generator=source))
        if noise is None:
            noises.append(torch.randn(num_tokens, entries, token_dim, **draw).cpu())
        if settings.context_noise > 0:
            contexts.append(torch.randn(num_tokens, token_dim, **draw).cpu())
    return GenerationPlan(
        steps=steps,
        orders=(settings.generation_order.long() if given else torch.stack(orders)).to(device),
        tokens=torch.zeros(len(generators), num_tokens, token_dim, device=device),
        mask=torch.ones(len(generators), num_tokens, dtype=torch.bool, device=device),
        noise=(torch.stack(noises) if noise is None else noise).to(device),
        context_noise=torch.stack(contexts).to(device) if contexts else None,
    )
