# SPDX-License-Identifier: Apache-2.0
"""Every head in the table can stand in for every other."""

import inspect

import pytest
import torch
from torch import nn

from common import Stored, randomise, seeded, store
from mar_hf import TOKEN_HEADS, ImageTokenizer, ImageTokenizerConfig, MARConfig, TokenDDPMScheduler, TokenHead
from mar_hf.heads.head_base import LossSettings, SamplingSettings, as_computed, masked_rows


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
