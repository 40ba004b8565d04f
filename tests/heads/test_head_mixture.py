# SPDX-License-Identifier: Apache-2.0
"""The mixture head against densities that are known, and on a law that it must be able to learn."""

import math

import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance
from torch import nn

from common import randomise, seeded
from laws import conditions as law_conditions
from laws import follows, fresh, learn, mixture
from mar_hf import MixtureHead
from mar_hf.heads.head_mixture import CausalAttention


TOKEN_DIM, CONDITION_DIM = 6, 5
GROUPS = pytest.mark.parametrize("feature_group", [None, 1, 2])
SIZES = {"num_layers": 2, "hidden_size": 16, "num_components": 3}


def tiny_head(feature_group=None, **settings):
    head = MixtureHead(TOKEN_DIM, CONDITION_DIM, feature_group=feature_group, **{**SIZES, **settings})
    return randomise(head, gain=0.7)


def known_head(logits, means, log_variances, **settings):
    """A head for which every condition means these Gaussians: (components,) and twice (components, size) numbers."""
    means, log_variances = torch.tensor(means), torch.tensor(log_variances)
    head = MixtureHead(means.shape[1], 1, 0, means.shape[0], hidden_size=4, min_log_variance=-30.0, **settings)
    with torch.no_grad():
        head.out_proj.weight.zero_()
        head.out_proj.bias.copy_(torch.cat([torch.tensor(logits), means.flatten(), log_variances.flatten()]))
    return head.eval()


def conditions(batch=2, num_tokens=5):
    return torch.randn(2, batch, num_tokens, CONDITION_DIM, generator=seeded(5)).unbind(0)


def tokens(*shape, seed=2):
    return torch.randn(*shape, TOKEN_DIM, generator=seeded(seed))


@torch.no_grad()
def sample(head, condition, **arguments):
    return head.sample(condition=condition, num_steps=1, **arguments)


# The network


def layer_norm(states):
    centred = states - states.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def silu(states):
    return states / (1 + np.exp(-states))


def by_hand(head, condition, target):
    """Log densities of one token in numpy, float64: a loop over groups, each with all that it may see."""
    weights = {name: tensor.double().numpy() for name, tensor in head.state_dict().items()}

    def linear(states, name):
        return states @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def normed(states, name):
        return layer_norm(states) * weights[f"{name}.norm.weight"] + weights[f"{name}.norm.bias"]

    size, total = head.feature_group, 0.0
    embedding = linear(condition.double().numpy(), "condition_proj")
    parts = target.double().numpy().reshape(-1, size)
    for group in range(len(parts)):
        seen = [embedding, *(linear(part, "token_proj") for part in parts[:group])]
        states = np.stack(seen) + weights["position_embedding.weight"][: group + 1]
        for number, block in enumerate(head.blocks):
            name = f"blocks.{number}"
            shift, scale, gate = np.split(linear(silu(embedding), f"{name}.modulation"), 3)
            update = normed(states, name) * (1 + scale) + shift
            if isinstance(block, CausalAttention):
                query, key, value = (
                    part.reshape(len(states), 4, -1) for part in np.split(linear(update, f"{name}.qkv"), 3, -1)
                )
                scores = np.exp(np.einsum("qhd,khd->hqk", query, key) / np.sqrt(query.shape[-1]))
                scores *= np.tril(np.ones(scores.shape[1:]))
                attended = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), value)
                update = linear(attended.reshape(states.shape), f"{name}.proj")
            else:
                update = linear(silu(linear(update, f"{name}.linear_1")), f"{name}.linear_2")
            states = states + gate * update
        shift, scale = np.split(linear(silu(embedding), "out_modulation"), 2)
        output = linear(layer_norm(states) * (1 + scale) + shift, "out_proj")[-1]
        logits, means, raw = np.split(output, [head.num_components, head.num_components * (1 + size)])
        means, floor = means.reshape(-1, size), head.min_log_variance
        variances = np.exp(floor + np.log1p(np.exp(raw.reshape(-1, size) - floor)))
        exponents = -0.5 * ((parts[group] - means) ** 2 / variances + np.log(2 * np.pi * variances)).sum(-1)
        total += np.log((np.exp(logits) / np.exp(logits).sum() * np.exp(exponents)).sum())
    return total


@torch.no_grad()
@GROUPS
def test_the_density_is_that_of_the_formulas(feature_group):
    head, condition, target = tiny_head(feature_group).double(), conditions(1, 3)[0].double(), tokens(1, 3).double()
    found = head.log_prob(condition, target)
    assert found.shape == (1, 3) and found.dtype == torch.float64
    for one, *inputs in zip(found[0], condition[0], target[0], strict=True):
        assert one.item() == pytest.approx(by_hand(head, *inputs), rel=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feature_group", [1, 2])
def test_no_group_sees_itself_or_later_ones(feature_group, dtype, mode):
    head, condition = getattr(tiny_head(feature_group).to(dtype), mode)(), conditions(1, 4)[0][0].to(dtype)
    before, after = tokens(4).to(dtype), tokens(4).to(dtype)
    for group in range(head.num_groups):
        after[:, group * feature_group :] = tokens(4, seed=3).to(dtype)[:, group * feature_group :]
        changed = (head(condition, before) != head(condition, after)).any(-1)
        assert not changed[:, : group + 1].any() and changed[:, group + 1 :].all()
        after = before.clone()
    # Gradients, too: what training sees.
    with torch.enable_grad():
        before.requires_grad_()
        output = head(condition, before)
        for group in range(head.num_groups):
            (gradient,) = torch.autograd.grad(output[:, group].float().sum(), before, retain_graph=True)
            assert not gradient[:, group * feature_group :].any()
            assert gradient[:, : group * feature_group].any(-1).all() or group == 0


@torch.no_grad()
def test_densities_have_mass_one():
    grid = torch.linspace(-12, 12, 2401, dtype=torch.float64)
    line = known_head([0.3, -1.0], [[-1.0], [2.0]], [[-1.0], [0.5]]).double()
    density = line.log_prob(torch.zeros(len(grid), 1).double(), grid[:, None]).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-9)
    # And in the plane, number by number.
    head = randomise(MixtureHead(2, 1, 1, 3, 1, hidden_size=8), gain=0.5).double()
    grid = torch.linspace(-12, 12, 201, dtype=torch.float64)
    plane = torch.cartesian_prod(grid, grid)
    density = head.log_prob(torch.ones(len(plane), 1).double(), plane).exp().view(201, 201)
    assert torch.trapezoid(torch.trapezoid(density, grid), grid).item() == pytest.approx(1, abs=1e-6)


@torch.no_grad()
def test_log_variances_have_a_floor():
    head = known_head([0.0], [[0.0]], [[-100.0]])
    assert head.log_prob(torch.zeros(1), torch.zeros(1)).item() == pytest.approx(15 - 0.5 * math.log(2 * math.pi))
    head.min_log_variance = -4.0
    assert head.log_prob(torch.zeros(1), torch.zeros(1)).item() == pytest.approx(2 - 0.5 * math.log(2 * math.pi))
    # What lies above hardly feels it, and gradients pass below it.
    head.out_proj.bias.data[2] = 2.0
    expected = -0.5 * (math.log(2 * math.pi) + 2)
    assert head.log_prob(torch.zeros(1), torch.zeros(1)).item() == pytest.approx(expected, abs=2e-3)
    head.out_proj.bias.data[2] = -9.0
    with torch.enable_grad():
        head.log_prob(torch.zeros(1), torch.ones(1)).backward()
    assert head.out_proj.bias.grad[2] > 0


# The loss


@GROUPS
def test_the_loss_is_in_nats_per_number(feature_group):
    head, condition, target = tiny_head(feature_group, batch_multiplier=3), conditions()[0], tokens(2, 5)
    mask = torch.arange(10).view(2, 5) % 3 != 0
    generator, before = seeded(4), torch.get_rng_state()
    loss = head.loss(condition=condition, target=target, mask=mask, generator=generator)
    expected = -head.log_prob(condition, target)[mask].mean() / TOKEN_DIM
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-6)
    # Nothing is drawn.
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(generator.get_state(), seeded(4).get_state())
    chunked = tiny_head(feature_group, loss_chunk_size=4)
    assert chunked.loss(condition=condition, target=target, mask=mask).item() == pytest.approx(loss.item(), rel=1e-6)


@GROUPS
def test_all_weights_of_a_fresh_head_come_to_learn(feature_group):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = MixtureHead(TOKEN_DIM, CONDITION_DIM, feature_group=feature_group, **SIZES)
    for module in head.modules():
        head.init_weights(module)
    condition, target, mask = conditions()[0], tokens(2, 5), torch.ones(2, 5, dtype=torch.bool)
    optimiser = torch.optim.SGD(head.parameters(), lr=0.01)
    for _ in range(3):
        optimiser.zero_grad()
        head.loss(condition=condition, target=target, mask=mask).backward()
        optimiser.step()
    assert all(parameter.grad.any() for parameter in head.parameters())
    # Gaussians that start as one would stay one.
    means = head(condition[0], target[0])[:, 0, 3 : 3 + 3 * head.feature_group].unflatten(-1, (3, -1))
    assert torch.pdist(means.transpose(0, 1).flatten(1)).min() > 0.1


@pytest.mark.parametrize("feature_group", [None, 1])
def test_it_learns_a_law(feature_group):
    settings = {"num_components": 4, "hidden_size": 32, "feature_group": feature_group}
    head = learn(fresh(MixtureHead, **settings), None, steps=150, learning_rate=1e-2)
    assert min(follows(head, None, 1)) > 0.02
    # The test tells what is not the law.
    assert max(follows(head, None, 1, temperature=0.0)) < 0.01
    # The loss is the entropy: of the modes, which hardly overlap, and of the Gaussian around each, in nats per number.
    classes = torch.arange(2000) % 2
    inputs = {"condition": law_conditions(classes)[None], "target": mixture(classes, seeded(4))[None]}
    modes = -sum(share * math.log(share) for share in (0.5, 0.3, 0.2, 0.5, 0.5)) / 2
    expected = modes / 2 + 0.5 * math.log(2 * math.pi * math.e * 0.15**2)
    loss = head.loss(**inputs, mask=torch.ones(1, 2000, dtype=torch.bool))
    assert loss.item() == pytest.approx(expected, abs=0.05)


# Sampling


MIXTURE = ([0.5, -0.5], [[-2.0, 0.0], [1.0, 1.0]], [[0.0, -1.0], [-2.0, 0.5]])


def moments(samples):
    return samples[0].mean(0), samples[0].T.cov()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_samples_have_the_moments_of_the_mixture(temperature):
    found = sample(known_head(*MIXTURE), torch.zeros(1, 20000, 1), generator=seeded(1), temperature=temperature)
    logits, means, log_variances = map(torch.tensor, MIXTURE)
    weights = logits.softmax(0)
    mean = weights @ means
    inside = torch.diag(weights @ log_variances.exp()) * temperature**2
    covariance = inside + (weights[:, None] * (means - mean)).T @ (means - mean)
    for ours, expected in zip(moments(found), (mean, covariance), strict=True):
        assert (ours - expected).abs().max() < 0.05
    if temperature == 0:
        assert len(found[0].unique(dim=0)) == 2


@torch.no_grad()
@GROUPS
def test_a_sample_is_where_its_noise_says(feature_group):
    head, condition = tiny_head(feature_group), conditions()[0]
    groups, entries = head.num_groups, head.noise_entries(1)
    assert entries == head.noise_entries(9) == {None: 2, 1: 3, 2: 2}[feature_group]
    noise = torch.randn(2, 5, entries, TOKEN_DIM, generator=seeded(1))
    found = sample(head, condition, noise=noise, temperature=0.7)
    # With the whole token at once: the cache changes nothing.
    logits, means, raw = head(condition.flatten(0, 1), found.flatten(0, 1)).split(
        [3, 3 * head.feature_group, 3 * head.feature_group], -1
    )
    places = torch.special.ndtr(noise.flatten(0, 1).flatten(1)[:, TOKEN_DIM : TOKEN_DIM + groups])
    which = (logits.softmax(-1).cumsum(-1) < places[..., None]).sum(-1)[..., None, None]
    shape = (10, groups, 3, head.feature_group)
    mean, deviation = (
        part.view(shape).gather(2, which.expand(-1, -1, -1, head.feature_group)).view(2, 5, TOKEN_DIM)
        for part in (means, (0.5 * (nn.functional.softplus(raw + 10) - 10)).exp())
    )
    torch.testing.assert_close(found, mean + 0.7 * deviation * noise[:, :, 0], rtol=1e-4, atol=1e-4)
    before = torch.get_rng_state()
    drawn = torch.randn(2, 5, entries, TOKEN_DIM, generator=seeded(3))
    assert torch.equal(sample(head, condition, generator=seeded(3)), sample(head, condition, noise=drawn))
    assert torch.equal(torch.get_rng_state(), before)


def test_guided_samples_have_the_guided_law():
    # N(c, exp(-0.5 - 0.5 c)) for conditions c of 1 and -1: a layer norm leaves +-(1, 1, -1, -1) as it is.
    head = MixtureHead(1, 1, 0, 1, hidden_size=4, min_log_variance=-30.0).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head.condition_proj.weight.copy_(torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]))
        head.out_proj.weight[1:, 0], head.out_proj.bias[2] = torch.tensor([1.0, -0.5]), -0.5
    condition = torch.ones(1, 8000, 1)
    for scale in (2.0, 3.0, 0.5):
        # p(x | 1)^s p(x | -1)^(1 - s)
        precision = scale * math.e + 1 - scale
        mean = (scale * math.e - (1 - scale)) / precision
        arguments = {"negative_condition": -condition, "guidance_scale": scale, "generator": seeded(1)}
        found = sample(head, condition, **arguments)
        assert found.mean().item() == pytest.approx(mean, abs=0.02)
        assert found.std().item() == pytest.approx(precision**-0.5, rel=0.03)
        few = sample(head, condition, **{**arguments, "generator": seeded(1)}, num_candidates=2)
        assert abs(few.mean().item() - mean) > 0.03


@GROUPS
def test_guidance_picks_among_candidates(feature_group):
    head, (condition, negative) = tiny_head(feature_group), conditions()
    arguments = {"noise": torch.randn(2, 5, head.noise_entries(1), TOKEN_DIM, generator=seeded(1))}
    plain = sample(head, condition, **arguments)
    guided = {"negative_condition": negative, "guidance_scale": 3.0, **arguments}
    # Of one candidate there is no choice; without a scale none is made.
    assert torch.equal(sample(head, condition, **guided, num_candidates=1), plain)
    assert torch.equal(sample(head, condition, negative_condition=negative, **arguments), plain)
    found = sample(head, condition, **guided)
    assert (found != plain).any(-1).float().mean() > 0.5
    torch.testing.assert_close(sample(head, condition, **guided, guider=ClassifierFreeGuidance()), found)
    with torch.no_grad():
        ratio = [head.log_prob(condition, x) - head.log_prob(negative, x) for x in (found, plain)]
    assert (ratio[0] > ratio[1]).float().mean() > 0.7


@GROUPS
def test_each_image_follows_its_own_generator(feature_group):
    head, (condition, negative) = tiny_head(feature_group), conditions(3)

    def drawn(images, generator):
        guided = {"negative_condition": negative[images], "guidance_scale": 2.0}
        return sample(head, condition[images], **guided, generator=generator)

    together = drawn(slice(None), [seeded(image) for image in range(3)])
    for image in range(3):
        alone = drawn(slice(image, image + 1), [seeded(image)])
        torch.testing.assert_close(together[image, None], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", [-40.0, 40.0])
@GROUPS
def test_improbable_noise_draws_finite_tokens(feature_group, start):
    head, condition = tiny_head(feature_group), conditions()[0]
    noise = torch.full((2, 5, head.noise_entries(1), TOKEN_DIM), start)
    assert sample(head, condition, noise=noise).isfinite().all()
    noise[0, 1] = math.nan
    found = sample(head, condition, noise=noise)
    assert found[0, 1].isnan().all() and found.isfinite().all(-1).sum() == 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@GROUPS
def test_half_precision(feature_group, dtype):
    head, (condition, negative) = tiny_head(feature_group), conditions()
    noise = torch.randn(2, 5, head.noise_entries(1), TOKEN_DIM, generator=seeded(1))
    target, mask = tokens(2, 5), torch.ones(2, 5, dtype=torch.bool)
    loss, expected = head.loss(condition=condition, target=target, mask=mask), sample(head, condition, noise=noise)
    head.to(dtype)
    half = head.loss(condition=condition.to(dtype), target=target.to(dtype), mask=mask)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(loss.item(), rel=0.02)
    found = sample(head, condition.to(dtype), noise=noise)
    # Rounding may move a token to another Gaussian.
    close = (found - expected).abs().amax(-1) < 0.1 * expected.abs().max()
    assert found.dtype == torch.float32 and close.float().mean() >= 0.8
    guided = {"negative_condition": negative.to(dtype), "guidance_scale": 3.0, "noise": noise}
    assert sample(head, condition.to(dtype), **guided).isfinite().all()


# Errors


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_components": 0}, "`num_components` has to be at least 1, got 0"),
        ({"num_components": True}, "`num_components` .* got True, which is no integer"),
        ({"feature_group": 4}, "`feature_group` has to divide 6, got 4"),
        ({"feature_group": 0}, "`feature_group` has to be at least 1, got 0"),
        ({"feature_group": 1.0}, "`feature_group` .* got 1.0, which is no integer"),
        ({"num_attention_heads": 3}, "`num_attention_heads` has to divide 16, got 3"),
        ({"num_attention_heads": "4"}, "`num_attention_heads` .* got '4', which is no integer"),
        ({"min_log_variance": math.nan}, r"`min_log_variance` has to lie in \[-30, 0\], got nan"),
        ({"min_log_variance": False}, r"`min_log_variance` has to lie in \[-30, 0\], got False"),
    ],
)
def test_settings_that_can_t_be(settings, message):
    with pytest.raises(ValueError, match=message):
        MixtureHead(TOKEN_DIM, CONDITION_DIM, **{**SIZES, **settings})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"temperature": -0.1}, "`temperature` has to be at least 0, got -0.1"),
        ({"top_k": 3}, r"The mixture head's settings are num_candidates, got \['top_k'\]"),
        ({"num_candidates": 0}, "`num_candidates` has to be at least 1, got 0"),
        ({"num_candidates": 2.0}, "`num_candidates` .* got 2.0, which is no integer"),
        ({"noise": torch.zeros(2, 5, 1, TOKEN_DIM)}, r"`noise` has to be of shape \(2, 5, 2, 6\), got \(2, 5, 1, 6\)"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(tiny_head(), conditions()[0], **arguments)


@pytest.mark.parametrize(
    "condition, target, name",
    [
        (None, torch.zeros(2, 6), "condition"),
        (torch.tensor(1.0), torch.zeros(6), "condition"),
        (torch.zeros(2, 4), torch.zeros(2, 6), "condition"),
        (torch.zeros(2, 5), torch.zeros(3, 6), "tokens"),
        (torch.zeros(2, 5), torch.zeros(2, 6).long(), "tokens"),
        (torch.zeros(2, 5), None, "tokens"),
    ],
)
def test_densities_of_what_does_not_fit(condition, target, name):
    with pytest.raises(ValueError, match=f"`{name}` has to"):
        tiny_head().log_prob(condition, target)
