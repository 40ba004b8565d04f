# SPDX-License-Identifier: Apache-2.0
"""The energy head against its formulas, and on a law that it must be able to learn."""

import math

import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance

from common import randomise, seeded
from laws import follows, fresh, learn, mixture, same_law
from mar_hf import EnergyHead
from mar_hf.heads.head_energy import distance


TOKEN_DIM, CONDITION_DIM, NOISE_DIM = 3, 6, 7
ENTRIES = 3  # the fewest vectors of 3 numbers that hold 7


def tiny_head(**settings):
    settings = {"num_layers": 2, "hidden_size": 16, "noise_dim": NOISE_DIM, **settings}
    return randomise(EnergyHead(TOKEN_DIM, CONDITION_DIM, **settings), gain=1.0)


def conditions(batch=2, num_tokens=5):
    return torch.randn(2, batch, num_tokens, CONDITION_DIM, generator=seeded(5)).unbind(0)


@torch.no_grad()
def sample(head, condition, **arguments):
    return head.sample(condition=condition, num_steps=1, **arguments)


# The network


def layer_norm(states, eps):
    centred = states - states.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)


def silu(states):
    return states / (1 + np.exp(-states))


def by_hand(head, condition, noise, temperature=1.0):
    """The network in numpy, float64."""
    weights = {name: tensor.double().numpy() for name, tensor in head.state_dict().items()}

    def linear(states, name):
        return states @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    uniform = np.vectorize(lambda place: 0.5 * math.erf(place / math.sqrt(2)))(noise.double().numpy())
    modulation = silu(linear(uniform, "noise_proj"))
    states = linear(condition.double().numpy(), "condition_proj")
    for block in range(len(head.blocks)):
        name = f"blocks.{block}"
        shift, scale, gate = np.split(linear(modulation, f"{name}.modulation"), 3, -1)
        normed = layer_norm(states, 1e-6) * weights[f"{name}.norm.weight"] + weights[f"{name}.norm.bias"]
        update = linear(normed * (1 + scale) + temperature * shift, f"{name}.linear_1")
        states = states + gate * linear(silu(update), f"{name}.linear_2")
    shift, scale = np.split(linear(modulation, "out_modulation"), 2, -1)
    return torch.from_numpy(linear(layer_norm(states, 1e-6) * (1 + scale) + shift, "out_proj"))


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("num_layers", [0, 2])
def test_the_network_is_the_paper_s(num_layers, temperature):
    head, condition = tiny_head(num_layers=num_layers).double(), conditions()[0].double()
    noise = torch.randn(2, 5, NOISE_DIM, generator=seeded(1), dtype=torch.float64)
    found = head(condition, noise, temperature)
    assert found.shape == (2, 5, TOKEN_DIM)
    torch.testing.assert_close(found, by_hand(head, condition, noise, temperature), rtol=1e-12, atol=1e-12)


# The loss


@pytest.mark.parametrize("settings", [{}, {"exponent": 1.5}, {"repulsion": 0.9}, {"loss_chunk_size": 4}])
def test_the_loss_is_the_energy_score_of_two_samples(settings):
    head, condition = tiny_head(batch_multiplier=2, **settings), conditions()[0]
    target = torch.randn(2, 5, TOKEN_DIM, generator=seeded(2))
    mask = torch.arange(10).view(2, 5) % 3 != 0
    noise = torch.randn(20, 2 * NOISE_DIM, generator=seeded(3))
    loss = head.loss(condition=condition, target=target, mask=mask, noise=noise)
    rows = torch.cat([mask.flatten()] * 2)
    first, second = (
        by_hand(head, condition.flatten(0, 1).repeat(2, 1), part)[rows].numpy() for part in noise.chunk(2, 1)
    )
    target = target.flatten(0, 1).repeat(2, 1)[rows].numpy()
    exponent, repulsion = settings.get("exponent", 1.0), settings.get("repulsion", 1.0)
    to_target, apart = (
        np.linalg.norm(part, axis=-1) ** exponent for part in (np.stack([first, second]) - target, first - second)
    )
    expected = (to_target.sum(0) - repulsion * apart).mean()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_noise_of_the_loss_is_that_of_each_image():
    head, condition = tiny_head(batch_multiplier=2), conditions()[0]
    inputs = {"target": torch.randn(2, 5, TOKEN_DIM, generator=seeded(2)), "mask": torch.ones(2, 5, dtype=torch.bool)}
    both = head.loss(condition=condition, **inputs, generator=[seeded(0), seeded(1)])
    alone = [
        head.loss(
            condition=condition[image, None],
            **{name: value[image, None] for name, value in inputs.items()},
            generator=[seeded(image)],
        )
        for image in range(2)
    ]
    assert both.item() == pytest.approx(sum(alone).item() / 2, rel=1e-6) and alone[0] != alone[1]
    drawn = torch.randn(20, 2 * NOISE_DIM, generator=seeded(4))
    given = head.loss(condition=condition, **inputs, noise=drawn)
    assert torch.equal(given, head.loss(condition=condition, **inputs, generator=seeded(4)))


@pytest.mark.parametrize("exponent", [0.1, 0.5, 1.0, 1.9])
def test_equal_samples_do_not_push_each_other(exponent):
    first = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]], requires_grad=True)
    second = torch.tensor([[1.0, 2.0], [1.0, 2.0 + 1e-6], [4.0, 6.0]])
    apart = distance(first, second, exponent)
    apart.sum().backward()
    assert apart[2].item() == pytest.approx(5**exponent, rel=1e-6) and apart[0] < 0.07
    assert first.grad.isfinite().all() and not first.grad[0].any() and first.grad[1:].any(-1).all()


@pytest.mark.parametrize("exponent", [0.1, 1.0, 1.9])
def test_a_fresh_head_gets_its_first_gradients(exponent):
    head = EnergyHead(TOKEN_DIM, CONDITION_DIM, hidden_size=16, noise_dim=NOISE_DIM, exponent=exponent)
    for module in head.modules():
        head.init_weights(module)
    condition, mask = conditions()[0], torch.ones(2, 5, dtype=torch.bool)
    assert not sample(head, condition, generator=seeded()).any()
    # Its samples are equal, and some equal their token.
    target = torch.randn(2, 5, TOKEN_DIM, generator=seeded(2)) * (torch.arange(5) > 1)[:, None]
    head.loss(condition=condition, target=target, mask=mask, generator=seeded(1)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())
    assert head.out_proj.weight.grad.any() and head.out_proj.bias.grad.any()


def test_it_learns_a_law():
    settings = {"num_layers": 2, "hidden_size": 48, "noise_dim": 4}
    head = learn(fresh(EnergyHead, **settings), None, steps=300, learning_rate=1e-2)
    assert min(follows(head, None, 1)) > 0.02
    # The test tells a Gaussian of the same mean and covariance.
    truth = mixture(torch.zeros(400, dtype=torch.int64), seeded(3))
    cloud = torch.randn(400, 2, generator=seeded(4)) @ torch.linalg.cholesky(truth.T.cov()).T + truth.mean(0)
    assert same_law(cloud, truth) < 0.01


# Sampling


def test_the_first_numbers_of_the_noise_decide():
    head, condition = tiny_head(), conditions()[0]
    assert head.noise_entries(1) == head.noise_entries(5) == ENTRIES
    assert [EnergyHead(size, 4, hidden_size=8).noise_entries(1) for size in (80, 64, 16)] == [1, 1, 4]
    noise = torch.randn(2, 5, ENTRIES + 1, TOKEN_DIM, generator=seeded(1))
    found = sample(head, condition, noise=noise)
    with torch.no_grad():
        assert torch.equal(found, head(condition, noise.flatten(2)[..., :NOISE_DIM]))
    other = noise.clone().flatten(2)
    other[..., NOISE_DIM:] = 7.0
    assert torch.equal(found, sample(head, condition, noise=other.view_as(noise)))
    other[1, 2, NOISE_DIM - 1] = 7.0
    changed = (found != sample(head, condition, noise=other.view_as(noise))).any(-1)
    assert changed.nonzero().tolist() == [[1, 2]]
    before = torch.get_rng_state()
    drawn = torch.randn(2, 5, ENTRIES, TOKEN_DIM, generator=seeded(3))
    assert torch.equal(sample(head, condition, generator=seeded(3)), sample(head, condition, noise=drawn))
    assert torch.equal(torch.get_rng_state(), before)


def test_guidance_is_on_conditions():
    head, (condition, negative) = tiny_head(), conditions()
    arguments = {"noise": torch.randn(2, 5, ENTRIES, TOKEN_DIM, generator=seeded(1))}
    guided = {"negative_condition": negative, "guidance_scale": 3.0, **arguments}
    expected = sample(head, 3 * condition - 2 * negative, **arguments)
    torch.testing.assert_close(sample(head, condition, **guided), expected)
    by_parts = sample(head, condition, **guided, guider=ClassifierFreeGuidance())
    torch.testing.assert_close(by_parts, expected)
    assert not torch.allclose(sample(head, condition, **arguments), expected, atol=0.01)


def test_each_image_follows_its_own_generator():
    head, condition = tiny_head(), conditions(3)[0]
    together = sample(head, condition, generator=[seeded(image) for image in range(3)])
    for image in range(3):
        alone = sample(head, condition[image, None], generator=[seeded(image)])
        torch.testing.assert_close(together[image, None], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    head, (condition, negative) = tiny_head(), conditions()
    arguments = {"guidance_scale": 1.5, "temperature": 0.8, "generator": None}
    noise = torch.randn(2, 5, ENTRIES, TOKEN_DIM, generator=seeded(1))
    expected = sample(head, condition, negative_condition=negative, noise=noise, **arguments)
    target, mask = torch.randn(2, 5, TOKEN_DIM, generator=seeded(2)), torch.ones(2, 5, dtype=torch.bool)
    loss = head.loss(condition=condition, target=target, mask=mask, generator=seeded(3))
    head.to(dtype)
    found = sample(head, condition.to(dtype), negative_condition=negative.to(dtype), noise=noise, **arguments)
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 0.05 * expected.abs().max()
    half = head.loss(condition=condition.to(dtype), target=target.to(dtype), mask=mask, generator=seeded(3))
    assert half.dtype == torch.float32 and half.item() == pytest.approx(loss.item(), rel=0.02)


# Errors


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"noise_dim": 0}, "`noise_dim` has to be at least 1, got 0"),
        ({"noise_dim": True}, "`noise_dim` has to be at least 1, got True, which is no integer"),
        ({"noise_dim": 64.0}, "`noise_dim` .* got 64.0, which is no integer"),
        ({"exponent": math.nan}, r"`exponent` has to lie in \[0.1, 1.9\], got nan"),
        ({"exponent": 2}, r"`exponent` has to lie in \[0.1, 1.9\], got 2"),
        ({"exponent": "1"}, "`exponent`"),
        ({"repulsion": 1.01}, r"`repulsion` has to lie in \[0, 1\], got 1.01"),
        ({"repulsion": True}, r"`repulsion` has to lie in \[0, 1\], got True"),
        ({"repulsion": None}, "`repulsion`"),
    ],
)
def test_settings_that_can_t_be(settings, message):
    with pytest.raises(ValueError, match=message):
        EnergyHead(TOKEN_DIM, CONDITION_DIM, **settings)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"temperature": -0.1}, "`temperature` has to be at least 0, got -0.1"),
        ({"top_k": 3}, r"The energy head has no settings of its own, got \['top_k'\]"),
        ({"noise": torch.zeros(2, 5, 2, TOKEN_DIM)}, r"`noise` has to be of shape \(2, 5, 3, 3\), got \(2, 5, 2, 3\)"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(tiny_head(), conditions()[0], **arguments)


def test_the_loss_takes_noise_for_pairs():
    inputs = {"condition": conditions()[0], "target": torch.zeros(2, 5, 3), "mask": torch.ones(2, 5).bool()}
    with pytest.raises(ValueError, match=r"`noise` has to be of shape \(10, 14\), got \(10, 3\)"):
        tiny_head().loss(**inputs, noise=torch.zeros(10, TOKEN_DIM))
