# SPDX-License-Identifier: Apache-2.0
"""Every head in the table can stand in for every other."""

import inspect

import pytest
import torch

from common import seeded
from mar_hf import TOKEN_HEADS, ImageTokenizer, ImageTokenizerConfig, MARConfig, TokenDDPMScheduler, TokenHead
from mar_hf.heads.head_base import masked_rows


METHODS = ["check_scheduler", "init_weights", "loss", "sample"]


def test_what_a_head_must_bring():
    assert sorted(TokenHead.__abstractmethods__) == METHODS
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
    head, scheduler = TOKEN_HEADS[name](token_dim=5, condition_dim=7), TokenDDPMScheduler()
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
