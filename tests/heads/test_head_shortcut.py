# SPDX-License-Identifier: Apache-2.0
"""The shortcut head against its definitions, and on a law to be learnt in a few steps."""

import math

import pytest
import torch

from common import randomise, relative_error, seeded
from known_heads import published_mlp
from mar_hf import ShortcutHead, TokenDDPMScheduler
from mar_hf.heads.head_shortcut import shortcut_steps
from tiny_pipelines import tiny_pipeline, tiny_transformer
from two_samples import learn, p_value, triangle, upright


TOKEN_DIM, CONDITION_DIM = 4, 6


def tiny_head(**settings):
    return randomise(ShortcutHead(TOKEN_DIM, CONDITION_DIM, num_layers=2, hidden_size=32, **settings))


def conditions():
    return torch.randn(2, 2, 3, CONDITION_DIM, generator=seeded(5)).unbind(0)


# Steps


def test_steps_are_of_lengths_that_are_learnt():
    for count in range(1, 65):
        lengths = shortcut_steps(count)
        assert len(lengths) == count and sum(lengths) == 1 and len(set(lengths)) <= 2
        assert all(math.frexp(length)[0] == 0.5 and length >= 1 / 64 for length in lengths)
        starts = [1 - sum(lengths[:number]) for number in range(count)]
        # Those of the loss begin at multiples of their length.
        assert all(start % length == 0 for start, length in zip(starts, lengths, strict=True))
    assert shortcut_steps(3) == [0.5, 0.25, 0.25]


def drawn(share):
    head = tiny_head(bootstrap_share=share)
    generator = seeded(1)
    return head.draw_times(None, lambda function, *more: function((20_000, *more), generator=generator)).unbind(1)


def test_times_of_flow_matching_and_of_steps():
    times, lengths = drawn(0.25)
    chosen = lengths > 0
    assert chosen.float().mean().item() == pytest.approx(0.25, abs=0.01)
    logits = times[~chosen].logit()
    assert abs(logits.mean().item()) < 0.03 and logits.std().item() == pytest.approx(1, rel=0.03)
    times, lengths = times[chosen], lengths[chosen]
    assert ((lengths <= times) & (times <= 1) & (times % lengths == 0)).all()
    for level in range(7):
        same = lengths == 0.5**level
        assert same.float().mean().item() == pytest.approx(1 / 7, abs=0.03)
        # Every start is as likely.
        counts = (times[same] / 0.5**level).long().bincount(minlength=2**level + 1)[1:] / same.sum() * 2**level
        assert (counts - 1).abs().max() < 5 * (2**level / same.sum().item()) ** 0.5


# The network and its loss


def test_the_network_is_mar_s_with_two_times():
    head, generator = tiny_head(), seeded(1)
    x, c = torch.randn(5, TOKEN_DIM, generator=generator), torch.randn(5, CONDITION_DIM, generator=generator)
    times, lengths = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), torch.tensor([0.0, 0.25, 1 / 64, 0.0, 1.0])
    expected = published_mlp(head, x, c, time_embedding=10 * times, length_embedding=10 * lengths)
    assert relative_error(head(x, times, lengths, c), expected) < 1e-5


def test_a_step_learns_to_do_what_two_halves_do():
    head, (rows, _) = tiny_head(), conditions()
    c, target, noise = rows.flatten(0, 1), *torch.randn(2, 6, TOKEN_DIM, generator=seeded(2))
    times, lengths = torch.tensor([0.3, 1.0, 0.5, 0.25, 1.0, 0.75]), torch.tensor([0.0, 1.0, 0.5, 1 / 64, 0.5, 0.25])
    found = head.row_losses(None, c, target, torch.stack([times, lengths], 1), noise)

    noisy = (1 - times[:, None]) * target + times[:, None] * noise
    half = lengths / 2
    inner = torch.tensor([0.0, 0.5, 0.25, 0.0, 0.25, 0.125])  # half of the shortest is along the velocity
    with torch.no_grad():
        first = head(noisy, times, inner, c)
        second = head(noisy - half[:, None] * first, times - half, inner, c)
    learnt = torch.where(lengths[:, None] > 0, (first + second) / 2, noise - target)
    expected = (head(noisy, times, lengths, c) - learnt).square().mean(1)
    assert torch.allclose(found, expected, rtol=1e-4)
    # Nothing is learnt through the two halves.
    gradients = [torch.autograd.grad(losses.mean(), list(head.parameters())) for losses in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert relative_error(one, other) < 1e-4


def test_times_given_have_no_length():
    head, (condition, _) = tiny_head(), conditions()
    times, noise = torch.rand(6, generator=seeded(3)), torch.randn(6, TOKEN_DIM, generator=seeded(4))
    target = torch.randn(2, 3, TOKEN_DIM, generator=seeded(2))
    batch = {"condition": condition, "target": target, "mask": torch.ones(2, 3, dtype=torch.bool)}
    x = target.flatten(0, 1)
    velocity = head(torch.lerp(x, noise, times[:, None]), times, torch.zeros(6), condition.flatten(0, 1))
    expected = (velocity - (noise - x)).square().mean()
    assert head.loss(**batch, timesteps=times, noise=noise).item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"`timesteps` has to lie in \[0, 1\], got"):
        head.loss(**batch, timesteps=1 + times)


@pytest.mark.parametrize("share", [0.0, 0.95])
def test_the_loss_in_chunks_is_the_same(share):
    condition, target = conditions()[0], torch.randn(2, 3, TOKEN_DIM, generator=seeded(2))
    batch = {"condition": condition, "target": target, "mask": torch.ones(2, 3, dtype=torch.bool)}
    heads = [tiny_head(bootstrap_share=share, batch_multiplier=2, loss_chunk_size=size) for size in (None, 5)]
    whole, parts = (head.loss(**batch, generator=seeded(1)) for head in heads)
    assert whole.item() == pytest.approx(parts.item(), rel=1e-5)
    losses = zip((whole, parts), heads, strict=True)
    gradients = [torch.autograd.grad(loss, list(head.parameters())) for loss, head in losses]
    for one, other in zip(*gradients, strict=True):
        assert relative_error(one, other) < 1e-4


# Sampling


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("num_steps", [1, 3, 4])
def test_sampling_follows_guided_mean_velocities(num_steps, guidance_scale):
    head, (condition, negative) = tiny_head(), conditions()
    noise = torch.randn(2, 3, 1, TOKEN_DIM, generator=seeded(1))
    call = {"condition": condition, "guidance_scale": guidance_scale, "num_steps": num_steps, "temperature": 0.8}
    found = head.sample(**call, negative_condition=negative, noise=noise)
    state, time = 0.8 * noise.flatten(0, 2), 1.0
    for length in shortcut_steps(num_steps):
        places = torch.full((6,), time), torch.full((6,), length)
        with_class, without = (head(state, *places, c.flatten(0, 1)) for c in (condition, negative))
        state = state - length * (without + guidance_scale * (with_class - without))
        time -= length
    assert relative_error(found.flatten(0, 1), state) < 1e-4
    assert torch.equal(head.sample(**call, negative_condition=negative, generator=seeded(1)), found)


@torch.no_grad()
def test_guidance_of_one_step_is_on_the_line_between_two_samples():
    head, (condition, negative) = tiny_head(), conditions()
    noise = torch.randn(2, 3, 1, TOKEN_DIM, generator=seeded(1))
    with_class, without = (head.sample(condition=c, num_steps=1, noise=noise) for c in (condition, negative))
    call = {"condition": condition, "negative_condition": negative, "num_steps": 1, "noise": noise}
    assert relative_error(head.sample(**call, guidance_scale=3.0), without + 3 * (with_class - without)) < 1e-4


def test_it_learns_a_mixture_in_one_to_four_steps():
    head = learn(lambda: ShortcutHead(2, 2, num_layers=2, hidden_size=32), steps=250, rows=256)
    for sign in (1, -1):
        call = {"condition": upright(250, sign), "generator": seeded(3)}
        expected = triangle(call["condition"], seeded(2))[0]
        with torch.no_grad():
            found = [head.sample(**call, num_steps=steps)[0] for steps in (1, 2, 4)]
        assert min(p_value(one, expected) for one in found) > 0.05


# In a pipeline


def test_a_scheduler_changes_nothing_and_too_many_steps_are_refused():
    transformer = tiny_transformer(head_type="shortcut", head_config={"hidden_size": 32})
    pipe = tiny_pipeline(transformer=transformer, scheduler=None)
    call = {"class_labels": [0, 1], "guidance_scale": 2.0, "output_type": "pt"}
    images = pipe(**call, generator=seeded(1)).images
    assert not torch.equal(pipe(**call, num_diffusion_steps=1, generator=seeded(1)).images, images)
    with pytest.raises(ValueError, match="`num_diffusion_steps` .*64"):
        pipe(**call, num_diffusion_steps=65)
    pipe.scheduler = TokenDDPMScheduler()  # another head's
    assert torch.equal(pipe(**call, generator=seeded(1)).images, images)


# Errors


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"bootstrap_share": 1}, r"`bootstrap_share` has to lie in \[0, 0.95\], got 1"),
        ({"bootstrap_share": "x"}, "`bootstrap_share`"),
        ({"bootstrap_share": float("nan")}, "`bootstrap_share`"),
        ({"hidden_size": 0}, "`hidden_size`"),
    ],
)
def test_settings_that_it_does_not_have(settings, message):
    with pytest.raises(ValueError, match=message):
        ShortcutHead(TOKEN_DIM, CONDITION_DIM, **settings)


@pytest.mark.parametrize("steps", [0, 65])
def test_steps_that_are_too_many(steps):
    with pytest.raises(ValueError, match=r"`num_steps`.* has to lie in 1\.\.64"):
        tiny_head().sample(condition=conditions()[0], num_steps=steps)
