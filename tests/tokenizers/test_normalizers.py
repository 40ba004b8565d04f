# SPDX-License-Identifier: Apache-2.0
"""Normalisers of tokens: what each leaves, in every type, and what becomes of tokens without a direction."""

import math

import pytest
import torch

from common import seeded
from mar_hf.tokenizers import NORMALIZERS
from mar_hf.tokenizers.normalizers import sphere, token_layer_norm


@pytest.mark.parametrize("shape", [(5, 1), (2, 3, 4), (1, 2, 7, 64)])
@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_on_the_sphere_every_token_has_the_same_norm_and_its_direction(shape, dtype, error):
    tokens = torch.randn(shape, generator=seeded()).to(dtype)
    found = sphere(tokens)
    assert found.shape == tokens.shape and found.dtype == dtype
    norms = found.double().norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, math.sqrt(shape[-1])), rtol=error, atol=0)
    cosines = torch.cosine_similarity(found.double(), tokens.double(), dim=-1)
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=error, atol=0)
    torch.testing.assert_close(sphere(found), found, rtol=error, atol=0)
    torch.testing.assert_close(sphere(-3 * tokens), -found, rtol=error, atol=0)


@pytest.mark.parametrize("size", [1e-7, 6e4])
def test_half_precision_neither_overflows_nor_vanishes_on_the_sphere(size):
    tokens = size * torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    assert torch.equal(sphere(tokens.half()), tokens.sign().half())


@pytest.mark.parametrize("normalize", [sphere, token_layer_norm])
def test_a_token_of_zeros_stays_zero(normalize):
    tokens = torch.zeros(2, 4)
    tokens[1] = torch.tensor([2.0, 0.0, 0.0, 0.0])
    found = normalize(tokens)
    assert torch.equal(found[0], torch.zeros(4)) and found[1].norm().item() == pytest.approx(2, rel=1e-4)


def test_gradients_run_along_the_sphere():
    tokens = torch.randn(6, 5, generator=seeded(), dtype=torch.float32).requires_grad_()
    (sphere(tokens) * torch.randn(6, 5, generator=seeded(1))).sum().backward()
    assert tokens.grad.norm(dim=-1).min() > 0.1
    assert (tokens.grad * tokens).sum(-1).abs().max() < 1e-5


def test_layer_norm_leaves_zero_mean_and_unit_variance():
    found = token_layer_norm(3 * torch.randn(4, 9, 16, generator=seeded()) + 1)
    assert found.mean(-1).abs().max() < 1e-6
    torch.testing.assert_close(found.norm(dim=-1), torch.full((4, 9), 4.0), rtol=1e-4, atol=0)
    assert token_layer_norm(torch.full((1, 8), 5.0)).abs().max() == 0


def test_the_table_holds_all():
    assert NORMALIZERS == {"affine": None, "token_layer_norm": token_layer_norm, "sphere": sphere}
