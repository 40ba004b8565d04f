# SPDX-License-Identifier: Apache-2.0
"""Every head in the table can stand in for every other."""

import inspect

import pytest
import torch

from mar_hf import TOKEN_HEADS, MARConfig, TokenHead


METHODS = ["check_scheduler", "init_weights", "loss", "sample"]


def test_what_a_head_must_bring():
    assert sorted(TokenHead.__abstractmethods__) == METHODS
    with pytest.raises(TypeError, match="abstract"):
        TokenHead()


@pytest.mark.parametrize("name", TOKEN_HEADS)
def test_heads_take_the_same_arguments(name):
    head = TOKEN_HEADS[name]
    assert issubclass(head, TokenHead) and not inspect.isabstract(head)
    for method in METHODS:
        ours, base = (inspect.signature(getattr(cls, method)).parameters for cls in (head, TokenHead))
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in base.values()
        ], method
    for method in ("loss", "sample"):
        parameters = list(inspect.signature(getattr(head, method)).parameters.values())[1:]
        assert {p.kind for p in parameters} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("name", TOKEN_HEADS)
def test_heads_are_named_in_configurations(name):
    assert MARConfig(head_type=name).head_type == name


@pytest.mark.parametrize("name", TOKEN_HEADS)
def test_heads_are_built_from_sizes_alone(name):
    with torch.device("meta"):
        head = TOKEN_HEADS[name](token_dim=5, condition_dim=7)
    assert all(parameter.is_meta for parameter in head.parameters())
    assert head.token_dim == 5
