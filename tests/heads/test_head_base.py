# SPDX-License-Identifier: Apache-2.0
"""Every head in the table can stand in for every other."""

import inspect
from itertools import combinations

import pytest
import torch
from diffusers import guiders
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AdaptiveProjectedMixGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    FrequencyDecoupledGuidance,
    LTX2Guidance,
    MagnitudeAwareGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TangentialClassifierFreeGuidance,
)
from torch import nn

from common import Stored, randomise, seeded, store
from mar_hf import TOKEN_HEADS, ImageTokenizer, ImageTokenizerConfig, MARConfig, TokenDDPMScheduler, TokenHead
from mar_hf.heads.head_base import LossSettings, SamplingSettings, as_computed, guide, masked_rows


METHODS = ["check_scheduler", "init_weights", "loss", "sample"]
BEHIND = {"draw": SamplingSettings, "masked_loss": LossSettings}  # the doors, and what they pass on


def own_scheduler(name):
    """What training makes for a head."""
    kind = TOKEN_HEADS[name].scheduler_class
    return None if kind is None else kind()


def test_what_a_head_must_bring():
    assert sorted(TokenHead.__abstractmethods__) == ["check_scheduler", "draw", "init_weights", "masked_loss"]
    with pytest.raises(TypeError, match="abstract"):
        TokenHead()


@pytest.mark.parametrize("name", TOKEN_HEADS)
def test_heads_take_the_same_arguments(name):
    head = TOKEN_HEADS[name]
    assert issubclass(head, TokenHead) and not inspect.isabstract(head)
    for method in [*METHODS, "set_tokenizer"]:
        ours, base = (inspect.signature(getattr(cls, method)).parameters for cls in (head, TokenHead))
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in base.values()
        ], method
    for method in ("loss", "sample"):
        parameters = list(inspect.signature(getattr(head, method)).parameters.values())[1:]
        assert all(p.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD) for p in parameters)


@pytest.mark.parametrize("method", BEHIND)
@pytest.mark.parametrize("name", TOKEN_HEADS)
def test_heads_take_all_that_the_doors_pass_on(name, method):
    own = inspect.signature(getattr(TokenHead, method)).parameters.values()
    given = [p.name for p in own if p.name != "self" and p.kind is not inspect.Parameter.VAR_KEYWORD]
    given += BEHIND[method].__annotations__
    ours = inspect.signature(getattr(TOKEN_HEADS[name], method))
    ours.bind(None, **dict.fromkeys(given))
    # What a head has beside is optional.
    assert all(p.default is not p.empty for p in ours.parameters.values() if p.name not in {"self", "_", *given})


@pytest.mark.parametrize("name", TOKEN_HEADS)
def test_what_is_behind_the_doors_is_documented_by_them(name):
    for method in ("loss", "sample"):
        assert method not in vars(TOKEN_HEADS[name]) and getattr(TokenHead, method).__doc__


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), True, "2", None])
@pytest.mark.parametrize("name", TOKEN_HEADS)
def test_guidance_that_is_no_number(name, scale):
    head, condition = TOKEN_HEADS[name](token_dim=5, condition_dim=7), torch.zeros(1, 2, 7)
    with pytest.raises(ValueError, match="`guidance_scale` has to be a finite number, got"):
        head.sample(condition=condition, scheduler=own_scheduler(name), num_steps=2, guidance_scale=scale)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", [torch.uint8, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    "name, settings",
    [(name, {}) for name in TOKEN_HEADS] + [("categorical", {"num_layers": 0}), ("categorical", {"num_layers": 1})],
)
def test_weights_that_are_not_stored_as_they_compute(name, settings, storage, dtype):
    head = randomise(TOKEN_HEADS[name](token_dim=5, condition_dim=7, hidden_size=16, **settings)).to(dtype)
    if name == "categorical":
        head.codebook.copy_(torch.randn(head.codebook.shape, generator=seeded(3)))
    condition, negative = torch.randn(2, 1, 4, 7, generator=seeded(1)).to(dtype).unbind(0)
    call = {"condition": condition, "negative_condition": negative, "guidance_scale": 2.0, "num_steps": 3}
    call |= {"scheduler": own_scheduler(name)}
    expected = head.sample(**call, generator=seeded(2))
    assert torch.equal(store(head, storage).sample(**call, generator=seeded(2)), expected)
    target, mask = torch.randn(1, 4, 5, generator=seeded(4)), torch.ones(1, 4, dtype=torch.bool)
    loss = {"condition": condition, "target": target, "mask": mask, "scheduler": own_scheduler(name)}
    assert torch.equal(store(head, storage).loss(**loss, generator=seeded(2)), head.loss(**loss, generator=seeded(2)))


def test_conditions_are_cast_to_what_a_layer_computes_in():
    layer, states = nn.Linear(7, 5, dtype=torch.bfloat16), torch.zeros(2, 7)
    assert as_computed(states, layer).dtype == torch.bfloat16
    assert as_computed(states, Stored(layer, torch.uint8)).dtype == torch.bfloat16
    # Nothing tells before it is called.
    assert as_computed(states, Stored(layer, torch.float8_e4m3fn)) is states


@pytest.mark.parametrize("name", TOKEN_HEADS)
def test_heads_are_named_in_configurations(name):
    assert MARConfig(head_type=name).head_type == name


@pytest.mark.parametrize("name", TOKEN_HEADS)
def test_heads_are_built_from_sizes_alone(name):
    with torch.device("meta"):
        head = TOKEN_HEADS[name](token_dim=5, condition_dim=7)
    assert all(parameter.is_meta for parameter in head.parameters())
    assert head.token_dim == 5


@pytest.mark.parametrize("name", TOKEN_HEADS)
def test_settings_that_a_head_does_not_have_are_refused(name):
    head, scheduler = TOKEN_HEADS[name](token_dim=5, condition_dim=7), own_scheduler(name)
    head.check_scheduler(scheduler)
    for call in (
        lambda: head.check_scheduler(scheduler, 1.0, magic=1),
        lambda: head.sample(condition=torch.zeros(1, 2, 7), scheduler=scheduler, num_steps=2, magic=1),
    ):
        with pytest.raises(ValueError, match=r"settings .*\['magic'\]"):
            call()


@pytest.mark.parametrize("name", TOKEN_HEADS)
def test_defaults_of_the_pipeline_are_arguments_of_it(name):
    assert TOKEN_HEADS[name].sampling_defaults.keys() <= {"num_diffusion_steps", "temperature"}


def test_most_heads_need_to_know_nothing_of_the_tokens():
    head = TOKEN_HEADS["diffusion"](token_dim=5, condition_dim=7)
    assert head.set_tokenizer(ImageTokenizer(ImageTokenizerConfig())) is None


def test_masked_rows_are_found_without_counting_them():
    # Three a row, as where their number is known.
    mask = torch.stack([torch.randperm(10, generator=seeded(row)) < 3 for row in range(4)])
    rows = [10 * row + column for row in range(4) for column in range(10) if mask[row, column]]
    assert masked_rows(mask).tolist() == masked_rows(mask, 3).tolist() == rows
    assert masked_rows(torch.eye(2, dtype=torch.bool)[:1]).tolist() == [0]


def ready(name):
    head = randomise(TOKEN_HEADS[name](token_dim=5, condition_dim=7, hidden_size=8))
    if name == "categorical":
        head.codebook.normal_(generator=seeded(3))
    return head


@pytest.mark.parametrize("name", TOKEN_HEADS)
@pytest.mark.parametrize(
    "argument, values",
    [
        ("condition", [-1, torch.zeros(2, 7), torch.zeros(1, 2, 6), torch.zeros(1, 2, 7, dtype=torch.complex64)]),
        ("negative_condition", ["x", torch.zeros(1, 3, 7)]),
        ("noise", [1.5, torch.zeros(1, 2, 3)]),
        ("generator", [5, [5], nn.Linear(1, 1), torch.zeros(1)]),
        ("num_steps", [2.0, True, None, "2"]),
        ("temperature", ["x", None, float("nan"), True]),
    ],
)
def test_sampling_says_what_is_wrong(name, argument, values):
    inputs = {"condition": torch.zeros(1, 2, 7), "scheduler": own_scheduler(name), "num_steps": 2}
    inputs |= {"negative_condition": torch.zeros(1, 2, 7), "guidance_scale": 2.0}
    for value in values:
        with pytest.raises(ValueError, match=f"`{argument}`"):
            ready(name).sample(**{**inputs, argument: value})


@pytest.mark.parametrize("name", TOKEN_HEADS)
@pytest.mark.parametrize(
    "argument, values",
    [
        ("condition", [-1, torch.zeros(1, 2, 6)]),
        ("target", [None, torch.zeros(1, 2, 4), torch.zeros(1, 2, 5).long()]),
        ("mask", [None, torch.ones(1, 2), torch.ones(2, 2).bool()]),
        ("num_masked", [True, 3, -1, 1.0, len]),
        ("generator", [5, [5]]),
    ],
)
def test_the_loss_says_what_is_wrong(name, argument, values):
    inputs = {"condition": torch.zeros(1, 2, 7), "target": torch.zeros(1, 2, 5), "scheduler": own_scheduler(name)}
    inputs |= {"mask": torch.ones(1, 2).bool()}
    for value in values:
        with pytest.raises(ValueError, match=f"`{argument}`"):
            ready(name).loss(**{**inputs, argument: value})


@pytest.mark.parametrize(
    "argument, values",
    [
        ("scheduler", [5, None, [1]]),
        ("timesteps", [torch.full((2,), 1000), torch.full((2,), -1), torch.zeros(2), torch.zeros(3).long(), 5]),
        ("noise", ["x", torch.zeros(2, 4), torch.zeros(2, 5).long()]),
    ],
)
def test_the_diffusion_loss_says_what_is_wrong(argument, values):
    inputs = {"condition": torch.zeros(1, 2, 7), "target": torch.zeros(1, 2, 5), "scheduler": TokenDDPMScheduler()}
    inputs |= {"mask": torch.ones(1, 2).bool()}
    for value in values:
        with pytest.raises(ValueError, match=argument):
            ready("diffusion").loss(**{**inputs, argument: value})


# Guidance

PREDICTIONS = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(7)).unbind(
    0
)  # (B, K, C) of both branches
GUIDERS = {
    "CFG": lambda: ClassifierFreeGuidance(guidance_rescale=0.5),
    "APG": lambda: AdaptiveProjectedGuidance(
        adaptive_projected_guidance_momentum=-0.5, adaptive_projected_guidance_rescale=1.0, eta=0.25
    ),
    "APG-mix": lambda: AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=0),
    "zero-star": lambda: ClassifierFreeZeroStarGuidance(zero_init_steps=0),
    "TCFG": TangentialClassifierFreeGuidance,
    "MAMBO-G": MagnitudeAwareGuidance,
}


def linear(scale):
    conditional, unconditional = PREDICTIONS
    return unconditional + scale * (conditional - unconditional)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.3, 1.0, 4.5])
def test_guidance_is_linear(scale):
    torch.testing.assert_close(guide(*PREDICTIONS, scale), linear(scale))
    for original in (False, True):
        # Its own scale does not count.
        guider = ClassifierFreeGuidance(guidance_scale=9.0, use_original_formulation=original)
        torch.testing.assert_close(guide(*PREDICTIONS, scale, guider), linear(scale))


@pytest.mark.parametrize("name", GUIDERS)
def test_a_scale_of_1_is_no_guidance_by_guiders(name):
    guider = GUIDERS[name]()
    for guider.use_original_formulation in (False, True):
        torch.testing.assert_close(guide(*PREDICTIONS, 1.0, guider), PREDICTIONS[0])


@pytest.mark.parametrize("name", GUIDERS)
def test_guiders_see_each_token_by_itself(name):
    together, alone = GUIDERS[name](), GUIDERS[name]()
    for step in range(2):
        found = guide(*PREDICTIONS, 3.0, together, step, 2)
    assert not torch.allclose(found, linear(3.0))
    for image, token in ((0, 0), (1, 2)):
        rows = [prediction[image, token][None, None] for prediction in PREDICTIONS]
        for step in range(2):
            row = guide(*rows, 3.0, alone, step, 2)
        torch.testing.assert_close(row[0, 0], found[image, token])


@pytest.mark.parametrize("original", [False, True])
def test_adaptive_projected_guidance(original):
    # arXiv:2410.02416: a difference with momentum, no longer than r, whose part along the prediction counts for eta.
    (conditional, unconditional), momentum, longest, eta = PREDICTIONS, -0.5, 1.0, 0.25
    guider, average = GUIDERS["APG"](), 0
    guider.use_original_formulation = original
    for step in (0, 1, 0):
        average = (conditional - unconditional) + momentum * average * (step > 0)
        change = average * (longest / average.norm(dim=-1, keepdim=True)).clamp(max=1)
        direction = conditional / conditional.norm(dim=-1, keepdim=True)
        parallel = (change * direction).sum(-1, keepdim=True) * direction
        change = change - parallel + eta * parallel
        expected = conditional + 2.0 * change if original else unconditional + 3.0 * change
        torch.testing.assert_close(guide(*PREDICTIONS, 3.0, guider, step, 2), expected)


def test_zero_star_guidance():
    # arXiv:2503.18886: the unconditional prediction is scaled to be closest to the other; the first steps are zeros.
    conditional, unconditional = PREDICTIONS
    scaled = (
        unconditional * (conditional * unconditional).sum(-1, keepdim=True) / unconditional.square().sum(-1)[..., None]
    )
    guider = ClassifierFreeZeroStarGuidance(zero_init_steps=1)
    assert not guide(*PREDICTIONS, 3.0, guider, 0, 2).any()
    torch.testing.assert_close(guide(*PREDICTIONS, 3.0, guider, 1, 2), scaled + 3.0 * (conditional - scaled))


def guided(name, guider=None, scale=3.0, steps=4):
    condition, negative = torch.randn(2, 2, 3, 7, generator=seeded(1)).unbind(0)
    call = {"condition": condition, "negative_condition": negative, "guidance_scale": scale, "guider": guider}
    scheduler = TokenDDPMScheduler(max_timestep=400) if name == "diffusion" else own_scheduler(name)
    call |= {"scheduler": scheduler, "num_steps": steps, "generator": seeded(2)}
    return ready(name).sample(**call)


@torch.no_grad()
@pytest.mark.parametrize("name", TOKEN_HEADS)
def test_heads_guide_by_guiders(name):
    torch.testing.assert_close(guided(name, ClassifierFreeGuidance()), guided(name), rtol=1e-4, atol=1e-4)
    guider = GUIDERS["APG"]()
    before = dict(vars(guider))
    assert not torch.allclose(guided(name, guider), guided(name), atol=1e-2)
    assert vars(guider) == before  # what a call keeps is its own


@torch.no_grad()
def test_guiders_start_and_stop_by_steps_of_the_head():
    never = guided("diffusion", ClassifierFreeGuidance(start=0.0, stop=0.0))
    torch.testing.assert_close(never, guided("diffusion", scale=1.0), rtol=1e-4, atol=1e-4)
    first, last = (ClassifierFreeGuidance(start=start, stop=start + 0.5) for start in (0.0, 0.5))
    found = [guided("diffusion", guider) for guider in (first, last, None)]
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in combinations((never, *found), 2))
    # A call of one step: what starts later does nothing.
    assert torch.equal(
        guided("diffusion", ClassifierFreeGuidance(stop=0.9), steps=1), guided("diffusion", scale=1.0, steps=1)
    )


REFUSED = {
    "AutoGuidance": lambda: AutoGuidance(auto_guidance_layers=[0], dropout=0.5),
    "SkipLayerGuidance": lambda: SkipLayerGuidance(skip_layer_guidance_layers=[0]),
    "PerturbedAttentionGuidance": lambda: PerturbedAttentionGuidance(perturbed_guidance_layers=[0]),
    "SmoothedEnergyGuidance": lambda: SmoothedEnergyGuidance(seg_guidance_layers=[0]),
    "LTX2Guidance": LTX2Guidance,
    # Made without its constructor, which needs a package that is not here.
    "FrequencyDecoupledGuidance": lambda: object.__new__(FrequencyDecoupledGuidance),
}


@pytest.mark.parametrize("name", REFUSED)
def test_guiders_that_are_refused(name):
    guider = REFUSED[name]()
    for call in (ready("diffusion").check_guider, lambda guider: guided("categorical", guider)):
        with pytest.raises(ValueError, match=f"`guider` has to .*but {name}"):
            call(guider)


def test_every_guider_of_diffusers_is_known():
    made = {type(make()).__name__ for make in GUIDERS.values()}
    assert {name for name in vars(guiders) if name.endswith("Guidance")} == made | REFUSED.keys() | {"BaseGuidance"}


@pytest.mark.parametrize("guider", [3.0, "APG", ClassifierFreeGuidance, TokenDDPMScheduler()])
def test_what_is_no_guider(guider):
    with pytest.raises(ValueError, match="`guider` has to be a guider of diffusers, got (float|str|type|TokenDDPM)"):
        guided("diffusion", guider)


def test_zeros_at_the_start_are_for_velocities():
    head = ready("diffusion")
    with pytest.raises(
        ValueError, match="ClassifierFreeZeroStarGuidance has to have `zero_init_steps` 0 with Diffusion"
    ):
        head.check_guider(ClassifierFreeZeroStarGuidance())
    head.guides_velocity = True
    assert head.check_guider(ClassifierFreeZeroStarGuidance()) is None
