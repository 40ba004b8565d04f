# SPDX-License-Identifier: Apache-2.0
"""The diffusion head against its definitions, and its sampling loop where the right answer is known."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from common import randomise, relative_error, seeded
from known_heads import make_linear, published_mlp
from mar_hf import DiffusionHead, TokenDDPMScheduler


TOKEN_DIM, CONDITION_DIM = 4, 6


@pytest.fixture
def scheduler():
    # Random weights are an untrained network: t = 999 would multiply their output by thousands.
    return TokenDDPMScheduler(max_timestep=950)


def tiny_head(batch_multiplier=1, seed=0):
    return randomise(DiffusionHead(TOKEN_DIM, CONDITION_DIM, 2, 32, batch_multiplier), seed)


def conditions(batch=2, num_tokens=3, seed=5):
    return torch.randn(2, batch, num_tokens, CONDITION_DIM, generator=seeded(seed)).unbind(0)


# The network


def test_the_network_is_the_published_one():
    head, generator = tiny_head(), seeded(1)
    x, c = torch.randn(5, TOKEN_DIM, generator=generator), torch.randn(5, CONDITION_DIM, generator=generator)
    t = torch.tensor([0, 1, 250, 998, 999])
    assert relative_error(head(x, t, c), published_mlp(head, x, c, time_embedding=t)) < 1e-5


# The loss


@pytest.mark.parametrize("multiplier", [1, 3])
def test_loss_is_the_mean_over_masked_rows(multiplier, scheduler):
    head, generator = tiny_head(multiplier), seeded(1)
    condition = torch.randn(2, 5, CONDITION_DIM, generator=generator)
    target = torch.randn(2, 5, TOKEN_DIM, generator=generator)
    mask = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])
    rows = multiplier * mask.numel()
    timesteps = torch.randperm(1000, generator=generator)[:rows]
    noise = torch.randn(rows, TOKEN_DIM, generator=generator)
    loss = head.loss(
        condition=condition, target=target, mask=mask, scheduler=scheduler, timesteps=timesteps, noise=noise
    )
    # All rows through the network, whole batch after whole batch, then the mask.
    x, c, weight = (
        value.flatten(0, 1).repeat(multiplier, *[1] * (value.ndim - 2)) for value in (target, condition, mask)
    )
    noisy = scheduler.add_noise(x, noise, timesteps)
    squared, bound = scheduler.training_losses(head(noisy, timesteps, c), x, noisy, noise, timesteps)
    expected = ((squared + bound) * weight).sum() / weight.sum()
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("size", [1, 5, 100])
def test_a_loss_in_chunks_is_the_same(size, scheduler):
    whole = tiny_head(2)
    chunked = randomise(DiffusionHead(TOKEN_DIM, CONDITION_DIM, 2, 32, 2, loss_chunk_size=size))
    kept, gradients = [], []
    for head in (whole, chunked):
        condition = conditions()[0].requires_grad_()
        batch = {"target": torch.randn(2, 3, TOKEN_DIM, generator=seeded(2)), "mask": torch.ones(2, 3).bool()}
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda value, saved=saved: saved.append(value) or value, id):
            loss = head.loss(condition=condition, scheduler=scheduler, generator=seeded(1), **batch)
        kept.append(sum(value.numel() for value in saved))
        loss = head.loss(condition=condition, scheduler=scheduler, generator=seeded(1), **batch)
        loss.backward()
        gradients.append([condition.grad, *(parameter.grad for parameter in head.parameters())])
    assert kept[1] < kept[0]
    for found, expected in zip(*gradients, strict=True):
        assert relative_error(found, expected) < 1e-5


def test_chunks_hold_something():
    with pytest.raises(ValueError, match="`loss_chunk_size` has to be at least 1"):
        DiffusionHead(TOKEN_DIM, CONDITION_DIM, 2, 32, loss_chunk_size=0)


def test_copies_are_whole_batches(scheduler):
    # Copy k of every row at timestep k * 100: what one copy costs alone, averaged.
    condition, target = conditions(2, 3)[0], torch.randn(2, 3, TOKEN_DIM, generator=seeded(2))
    mask, noise = torch.ones(2, 3, dtype=torch.bool), torch.randn(6, TOKEN_DIM, generator=seeded(3))

    def loss(copies, timesteps):
        return tiny_head(copies).loss(
            condition=condition,
            target=target,
            mask=mask,
            scheduler=scheduler,
            timesteps=torch.tensor(timesteps).repeat_interleave(6),
            noise=noise.repeat(copies, 1),
        )

    alone = [loss(1, [100]).item(), loss(1, [500]).item()]
    assert alone[0] != pytest.approx(alone[1], rel=1e-2)
    assert loss(2, [100, 500]).item() == pytest.approx(sum(alone) / 2, rel=1e-5)


def test_tokens_that_are_not_masked_do_not_count(scheduler):
    head, (condition, target) = tiny_head(2), (conditions()[0], torch.randn(2, 3, TOKEN_DIM, generator=seeded(2)))
    mask = torch.tensor([[True, False, True], [False, True, True]])
    losses = []
    for filler in (0.0, float("nan")):
        for value in (condition, target):
            value[~mask] = filler
        losses.append(
            head.loss(condition=condition, target=target, mask=mask, scheduler=scheduler, generator=seeded(1))
        )
    assert torch.equal(*losses) and losses[0].isfinite()


def test_what_the_loss_draws(scheduler):
    head, before = tiny_head(2), torch.get_rng_state()
    condition, target = conditions(1, 4)[0], torch.randn(1, 4, TOKEN_DIM, generator=seeded(2))
    mask = torch.tensor([[True, False, True, True]])
    arguments = {"condition": condition, "target": target, "mask": mask, "scheduler": scheduler}
    drawn = head.loss(**arguments, generator=seeded(3))
    # First the timesteps of all masked rows, then their noise.
    generator, chosen = seeded(3), mask.repeat(2, 1).flatten()
    timesteps = torch.zeros(8, dtype=torch.int64)
    timesteps[chosen] = torch.randint(0, 1000, (6,), generator=generator)
    noise = torch.zeros(8, TOKEN_DIM)
    noise[chosen] = torch.randn(6, TOKEN_DIM, generator=generator)
    assert torch.equal(drawn, head.loss(**arguments, timesteps=timesteps, noise=noise))
    assert not torch.equal(drawn, head.loss(**arguments, generator=seeded(4)))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_image_s_loss_follows_its_own_generator(scheduler):
    head, (condition, target) = tiny_head(2), (conditions(3, 5)[0], torch.randn(3, 5, TOKEN_DIM, generator=seeded(2)))
    mask = torch.arange(15).reshape(3, 5) % 4 < torch.tensor([[1], [2], [3]])
    counts = mask.sum(1)
    assert len(set(counts.tolist())) == 3

    def loss(chosen, generator):
        return head.loss(
            condition=condition[chosen],
            target=target[chosen],
            mask=mask[chosen],
            scheduler=scheduler,
            generator=generator,
        )

    together = loss(slice(None), [seeded(image) for image in range(3)])
    alone = torch.stack([loss(slice(image, image + 1), seeded(image)) for image in range(3)])
    # Every masked token counts alike, so an image counts as much as it has masked tokens.
    assert together.item() == pytest.approx((alone * counts / counts.sum()).sum().item(), rel=1e-6)
    assert together.item() != pytest.approx(loss(slice(None), seeded(0)).item(), rel=1e-3)


def test_timesteps_are_drawn_from_the_whole_chain(scheduler):
    head, seen = tiny_head(4), []
    head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    condition, target = torch.zeros(1, 1000, CONDITION_DIM), torch.zeros(1, 1000, TOKEN_DIM)
    mask = torch.ones(1, 1000, dtype=torch.bool)
    head.loss(condition=condition, target=target, mask=mask, scheduler=scheduler, generator=seeded())
    (timesteps,) = seen
    assert len(timesteps) == 4000
    # `max_timestep` is for sampling. Each hundred timesteps get 400 of the draws, with a deviation of 19.
    assert (timesteps.bincount(minlength=1000).reshape(10, 100).sum(1) - 400).abs().max() < 4 * 19
    assert timesteps.min() < 5 and timesteps.max() > 994


def test_the_head_learns_what_it_is_shown(scheduler):
    # Tokens that equal a projection of their condition: the squared error of epsilon falls far below 1.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = DiffusionHead(TOKEN_DIM, CONDITION_DIM, 2, 64)
    for module in head.modules():
        head.init_weights(module)
    generator = seeded(1)
    projection = torch.randn(CONDITION_DIM, TOKEN_DIM, generator=generator) / CONDITION_DIM**0.5
    optimiser = torch.optim.AdamW(head.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        condition = torch.randn(1, 128, CONDITION_DIM, generator=generator)
        loss = head.loss(
            condition=condition,
            target=condition @ projection,
            mask=torch.ones(1, 128, dtype=torch.bool),
            scheduler=scheduler,
            generator=generator,
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[:5]) / 5 > 0.9
    assert sum(losses[-20:]) / 20 < 0.5
    # Sampled without noise, tokens come out near their projections.
    condition = torch.randn(1, 64, CONDITION_DIM, generator=generator)
    sampled = head.sample(condition=condition, scheduler=scheduler, num_steps=25, temperature=0.0, generator=generator)
    error, size = (sampled.detach() - condition @ projection).square().mean(), projection.square().sum(0).mean()
    assert error < 0.5 * size


# Guidance


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-4)], ids=str)
def test_guidance_equals_the_original_s_two_copies(dtype, tolerance, scheduler):
    head, (condition, negative), scale, steps = tiny_head().to(dtype), conditions(), 2.5, 8
    condition, negative = condition.to(dtype), negative.to(dtype)
    noise = torch.randn(2, 3, steps + 1, TOKEN_DIM, generator=seeded(1))
    found = head.sample(
        condition=condition,
        negative_condition=negative,
        guidance_scale=scale,
        scheduler=scheduler,
        num_steps=steps,
        temperature=0.8,
        noise=noise,
    )
    # The original keeps a guided and an unguided state, and overwrites the second with the first before each step.
    # All but the network is in float32.
    scheduler.set_timesteps(steps)
    both, rows = torch.cat([condition, negative]).flatten(0, 1), 6
    state = noise[:, :, 0].flatten(0, 1).repeat(2, 1)
    for step, t in enumerate(scheduler.timesteps):
        state = state[:rows].repeat(2, 1)
        epsilon, logits = head(state, t.repeat(2 * rows), both).float().chunk(2, -1)
        guided = epsilon[rows:] + scale * (epsilon[:rows] - epsilon[rows:])
        output = torch.cat([guided.repeat(2, 1), logits], -1)
        injected = noise[:, :, step + 1].flatten(0, 1).repeat(2, 1)
        state = scheduler.step(output, t, state, 0.8, injected).prev_sample
    assert relative_error(found.flatten(0, 1), state[:rows]) < tolerance


@torch.no_grad()
@pytest.mark.parametrize("ahead", [1, 3])
def test_it_does_not_matter_how_many_steps_are_computed_ahead(ahead, scheduler, monkeypatch):
    head, (condition, negative) = tiny_head(), conditions()
    noise = torch.randn(2, 3, 9, TOKEN_DIM, generator=seeded(2))
    call = {"negative_condition": negative, "guidance_scale": 2.0, "scheduler": scheduler, "num_steps": 8}
    expected = head.sample(condition=condition, noise=noise, **call)
    # 2 x 2 x 3 rows, 8 parts of width 32, 4 bytes a number
    monkeypatch.setattr("mar_hf.heads.modulation.MODULATION_BYTES", ahead * 12 * 8 * 32 * 4)
    assert relative_error(head.sample(condition=condition, noise=noise, **call), expected) < 1e-5


@torch.no_grad()
def test_guidance_of_one_is_none(scheduler):
    head, (condition, negative) = tiny_head(), conditions()

    def sample(**arguments):
        return head.sample(condition=condition, scheduler=scheduler, num_steps=6, generator=seeded(1), **arguments)

    plain = sample()
    assert torch.equal(sample(negative_condition=negative, guidance_scale=1.0), plain)
    assert torch.equal(sample(negative_condition=torch.full_like(negative, float("nan"))), plain)
    assert relative_error(sample(negative_condition=condition, guidance_scale=3.0), plain) < 1e-4
    assert relative_error(sample(negative_condition=negative, guidance_scale=3.0), plain) > 1e-2
    # 0 is the negative's epsilon with the condition's variance; without noise the variance does not show.
    unguided = head.sample(condition=negative, scheduler=scheduler, num_steps=6, temperature=0.0, generator=seeded(1))
    assert relative_error(sample(negative_condition=negative, guidance_scale=0.0, temperature=0.0), unguided) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("refresh", [2, 3, 8, 20])
def test_refreshed_guidance_keeps_what_the_condition_changes(refresh, scheduler, monkeypatch):
    head, (condition, negative), scale, steps = tiny_head(), conditions(), 2.5, 8
    settings = {"condition": condition, "negative_condition": negative, "guidance_scale": scale, "num_steps": steps}
    noise = torch.randn(2, 3, steps + 1, TOKEN_DIM, generator=seeded(1))
    rows, found = [], []
    head.token_proj.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    # Modulations of one step at a time, and of all: the same up to rounding.
    for bound in (1, 2**24):
        monkeypatch.setattr("mar_hf.heads.modulation.MODULATION_BYTES", bound)
        found.append(head.sample(**settings, scheduler=scheduler, noise=noise, guidance_refresh=refresh))
    assert rows == 2 * [2 if step % refresh else 4 for step in range(steps)]
    scheduler.set_timesteps(steps)
    state = noise[:, :, 0].flatten(0, 1)
    for step, t in enumerate(scheduler.timesteps):
        epsilon, logits = head(state, t.repeat(6), condition.flatten(0, 1)).chunk(2, -1)
        if step % refresh == 0:
            change = epsilon - head(state, t.repeat(6), negative.flatten(0, 1)).chunk(2, -1)[0]
        output = torch.cat([epsilon + (scale - 1) * change, logits], -1)
        state = scheduler.step(output, t, state, 1.0, noise[:, :, step + 1].flatten(0, 1)).prev_sample
    for tokens in found:
        assert relative_error(tokens.flatten(0, 1), state) < 1e-4


@torch.no_grad()
def test_refreshed_guidance_without_guidance_is_nothing(scheduler):
    head, (condition, _) = tiny_head(), conditions()
    settings = {"condition": condition, "scheduler": scheduler, "num_steps": 6}
    expected = head.sample(generator=seeded(1), **settings)
    assert torch.equal(head.sample(generator=seeded(1), guidance_refresh=4, **settings), expected)


# Randomness


@torch.no_grad()
def test_drawn_noise_is_the_start_then_one_a_step(scheduler):
    head, (condition, _), steps, before = tiny_head(), conditions(), 5, torch.get_rng_state()
    drawn = head.sample(condition=condition, scheduler=scheduler, num_steps=steps, generator=seeded(1))
    generator = seeded(1)
    noise = torch.stack([torch.randn(2, 3, TOKEN_DIM, generator=generator) for _ in range(steps)], dim=2)
    # The last step injects none, and draws none.
    noise = torch.cat([noise, torch.full((2, 3, 1, TOKEN_DIM), float("nan"))], dim=2)
    given = head.sample(condition=condition, scheduler=scheduler, num_steps=steps, noise=noise)
    assert torch.equal(drawn, given)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(drawn, head.sample(condition=condition, scheduler=scheduler, num_steps=steps, noise=-noise))


@torch.no_grad()
def test_each_image_follows_its_own_generator(scheduler):
    head, (condition, _) = tiny_head(), conditions(3)
    together = head.sample(
        condition=condition, scheduler=scheduler, num_steps=5, generator=[seeded(i) for i in range(3)]
    )
    for image in range(3):
        alone = head.sample(
            condition=condition[image : image + 1], scheduler=scheduler, num_steps=5, generator=seeded(image)
        )
        assert relative_error(together[image : image + 1], alone) < 1e-5


@torch.no_grad()
def test_noise_may_hold_more_steps_than_asked(scheduler):
    head, (condition, _) = tiny_head(), conditions()
    noise = torch.randn(2, 3, 9, TOKEN_DIM, generator=seeded(1))
    few = head.sample(condition=condition, scheduler=scheduler, num_steps=4, noise=noise)
    assert torch.equal(few, head.sample(condition=condition, scheduler=scheduler, num_steps=4, noise=noise[:, :, :5]))


@torch.no_grad()
def test_without_temperature_only_the_start_matters(scheduler):
    head, (condition, _) = tiny_head(), conditions()
    noise = torch.randn(2, 3, 6, TOKEN_DIM, generator=seeded(1))

    def sample(noise):
        return head.sample(condition=condition, scheduler=scheduler, num_steps=5, temperature=0.0, noise=noise)

    first = sample(noise)
    noise[:, :, 1:] *= -3
    assert torch.equal(sample(noise), first)
    noise[:, :, 0] *= -1
    assert not torch.equal(sample(noise), first)


# Precision


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_float32_state(dtype, scheduler):
    head, (condition, negative) = tiny_head(), conditions()
    arguments = {"guidance_scale": 1.5, "scheduler": scheduler, "num_steps": 10}
    noise = torch.randn(2, 3, 11, TOKEN_DIM, generator=seeded(1))
    expected = head.sample(condition=condition, negative_condition=negative, noise=noise, **arguments)
    head.to(dtype)
    found = head.sample(condition=condition.to(dtype), negative_condition=negative.to(dtype), noise=noise, **arguments)
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert relative_error(found, expected) < 0.1
    # More than the half type could hold.
    assert not torch.equal(found.to(dtype).float(), found)


@torch.no_grad()
def test_the_time_embedding_tells_neighbours_apart_in_bfloat16(scheduler):
    # Timesteps themselves would round to multiples of 4 near 999.
    head = tiny_head().to(torch.bfloat16)
    x, c = torch.ones(2, TOKEN_DIM), torch.ones(2, CONDITION_DIM)
    found = head(x, torch.tensor([998, 999]), c).float()
    assert not torch.equal(found[0], found[1])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_time_embedding_is_computed_in_float32(dtype):
    head, timesteps = tiny_head().to(dtype), torch.arange(1000)
    found = head.time_embedding(timesteps)
    assert found.dtype == torch.float32
    assert torch.equal(found, head.float().time_embedding(timesteps))


# A head whose answer is known


@pytest.fixture(scope="module")
def known():
    """A head that is right for tokens from N(0, 0.5**2): its epsilon is f(t) x_t, its variance logits are 0."""
    signal = TokenDDPMScheduler().alphas_cumprod
    factors = (1 - signal).sqrt() / (signal * 0.5**2 + 1 - signal)
    return make_linear(DiffusionHead(TOKEN_DIM, CONDITION_DIM, 1, 256), factors), factors.float()


def many(num_steps, scheduler, head, **arguments):
    return head.sample(
        condition=torch.zeros(1, 1000, CONDITION_DIM),
        scheduler=scheduler,
        num_steps=num_steps,
        generator=seeded(1),
        **arguments,
    )


@torch.no_grad()
def test_the_known_head_is_right(known):
    head, factors = known
    x, t = torch.randn(1000, TOKEN_DIM, generator=seeded(1)), torch.arange(1000)
    epsilon, logits = head(x, t, torch.zeros(1000, CONDITION_DIM)).chunk(2, -1)
    assert (epsilon - factors[:, None] * x).abs().max() < 0.01
    assert logits.abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("steps", [10, 50])
def test_the_sampler_s_deviation_is_the_one_computed(steps, temperature, scheduler, known):
    head, factors = known
    sampled = many(steps, scheduler, head, temperature=temperature)
    # All is linear, so the variance obeys a recursion.
    signals, variance = [*(scheduler.alphas_cumprod[t].item() for t in scheduler.timesteps), 1.0], 1.0
    for t, signal, before in zip(scheduler.timesteps, signals, signals[1:], strict=False):
        beta = 1 - signal / before
        original = (1 - math.sqrt(1 - signal) * factors[t].item()) / math.sqrt(signal)
        mean = (math.sqrt(before) * beta * original + (1 - before) * math.sqrt(1 - beta)) / (1 - signal)
        injected = beta * math.sqrt((1 - before) / (1 - signal))  # logits of 0: halfway between the logarithms
        variance = mean**2 * variance + temperature**2 * injected
    assert sampled.std().item() == pytest.approx(math.sqrt(variance), rel=0.05)
    assert sampled.mean().abs() < 0.04
    if temperature == 1:
        assert sampled.std().item() == pytest.approx(0.5, rel=0.2 if steps == 10 else 0.1)


@torch.no_grad()
@pytest.mark.parametrize("steps", [10, 25])
def test_ddim_gives_the_product_of_its_factors(steps, scheduler, known):
    head, factors = known
    ddim = DDIMScheduler.from_config(scheduler.config)
    sampled, product = many(steps, ddim, head), 1.0
    signals = [*(scheduler.alphas_cumprod[t].item() for t in ddim.timesteps), 1.0]
    for t, signal, before in zip(ddim.timesteps, signals, signals[1:], strict=False):
        original = (1 - math.sqrt(1 - signal) * factors[t].item()) / math.sqrt(signal)
        product *= math.sqrt(before) * original + math.sqrt(1 - before) * factors[t].item()
    start = torch.randn(1, 1000, TOKEN_DIM, generator=seeded(1))
    assert relative_error(sampled, product * start) < 0.02
    assert sampled.std().item() == pytest.approx(0.5, rel=0.15 if steps == 10 else 0.1)


@torch.no_grad()
@pytest.mark.parametrize("steps", [10, 25])
def test_dpm_solver_gives_the_right_deviation(steps, scheduler, known):
    solver = DPMSolverMultistepScheduler.from_config(scheduler.config)
    sampled = many(steps, solver, known[0])
    assert sampled.std().item() == pytest.approx(0.5, rel=0.05)
    # Deterministic: what comes out is the start, scaled.
    start = torch.randn(1, 1000, TOKEN_DIM, generator=seeded(1))
    assert relative_error(sampled, sampled.std() / start.std() * start) < 0.02


# Other schedulers


@torch.no_grad()
@pytest.mark.parametrize("other", [DDIMScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize("width", [3, 16], ids=["3 numbers", "16 numbers"])
def test_other_schedulers_with_guidance(other, steps, width, scheduler):
    # A swapped scheduler keeps `variance_type`, for which diffusers cuts channels at 3: no number may be lost.
    head = randomise(DiffusionHead(width, CONDITION_DIM, 2, 32), gain=0.3)
    condition, negative = conditions()

    def sample():
        return head.sample(
            condition=condition,
            negative_condition=negative,
            guidance_scale=2.0,
            scheduler=other.from_config(scheduler.config),
            num_steps=steps,
            generator=[seeded(1), seeded(2)],
        )

    first = sample()
    assert first.shape == (2, 3, width) and first.dtype == torch.float32
    assert first.isfinite().all() and (first.std(dim=(0, 1)) > 0).all()
    assert torch.equal(sample(), first)


@torch.no_grad()
def test_ddpm_with_a_fixed_variance(scheduler, known):
    fixed = DDPMScheduler.from_config(scheduler.config, variance_type="fixed_small")
    assert many(25, fixed, known[0]).std().item() == pytest.approx(0.5, rel=0.15)


def schedulers_that_do_not_fit():
    own = TokenDDPMScheduler().config
    return [
        (DDIMScheduler.from_config(own, prediction_type="sample"), 1.0, "`prediction_type` 'sample'.*needs 'epsilon'"),
        (DDIMScheduler.from_config(own, prediction_type="v_prediction"), 1.0, "`prediction_type` 'v_prediction'"),
        (FlowMatchEulerDiscreteScheduler(), 1.0, "`prediction_type` None"),
        (FlowMatchEulerDiscreteScheduler.from_config(own), 1.0, "FlowMatchEulerDiscreteScheduler does not fit"),
        (EDMEulerScheduler.from_config(own), 1.0, "EDMEulerScheduler does not fit .* no `alphas_cumprod`"),
        (UniPCMultistepScheduler.from_config(own), 1.0, "`step` takes no `generator`"),
        (DDPMScheduler.from_config(own), 1.0, "`variance_type` 'learned_range' does not fit tokens"),
        (DDIMScheduler.from_config(own), 0.9, "`temperature` has to be 1.0 with DDIMScheduler, got 0.9"),
    ]


@pytest.mark.parametrize(
    "other, temperature, message", schedulers_that_do_not_fit(), ids=lambda value: type(value).__name__
)
def test_schedulers_that_do_not_fit(other, temperature, message):
    head, (condition, _) = tiny_head(), conditions()
    with pytest.raises(ValueError, match=message):
        head.check_scheduler(other, temperature)
    with pytest.raises(ValueError, match=message):
        head.sample(condition=condition, scheduler=other, num_steps=3, temperature=temperature)


def test_schedulers_that_fit():
    own, head = TokenDDPMScheduler(), tiny_head()
    assert head.check_scheduler(own, 0.5) is None
    assert head.check_scheduler(DDIMScheduler.from_config(own.config)) is None
    assert head.check_scheduler(DPMSolverMultistepScheduler.from_config(own.config)) is None


# Errors


@pytest.mark.parametrize(
    "change, message",
    [
        ({"guidance_scale": 2.0}, "`guidance_scale` 2.0 needs `negative_condition`"),
        (
            {"guidance_scale": 2.0, "negative_condition": torch.zeros(1, 3, CONDITION_DIM)},
            r"`negative_condition` has to be of shape \(2, 3, 6\) .*got \(1, 3, 6\)",
        ),
        ({"num_steps": 0}, r"`num_inference_steps` has to lie in 1\.\.1000, got 0"),
        ({"noise": torch.zeros(2, 3, 4, TOKEN_DIM)}, r"`noise` has to be of shape \(2, 3, 5, 4\), got \(2, 3, 4, 4\)"),
        ({"noise": torch.zeros(2, 3, 5, 3)}, r"`noise` has to be of shape \(2, 3, 5, 4\), got \(2, 3, 5, 3\)"),
        ({"noise": torch.zeros(1, 3, 5, TOKEN_DIM)}, r"`noise` has to be of shape .* got \(1, 3, 5, 4\)"),
        ({"noise": torch.zeros(6, 5, TOKEN_DIM)}, r"`noise` has to be of shape .* got \(6, 5, 4\)"),
        ({"generator": [torch.Generator()] * 3}, r"`generator` has to hold one generator per image \(2\), got 3"),
    ],
)
def test_wrong_arguments_for_sampling(change, message, scheduler):
    arguments = {"condition": conditions()[0], "scheduler": scheduler, "num_steps": 4, **change}
    with pytest.raises(ValueError, match=message):
        tiny_head().sample(**arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scheduler": DDIMScheduler()}, "Training needs a TokenDDPMScheduler, got DDIMScheduler"),
        ({"timesteps": torch.zeros(6, dtype=torch.int64)}, r"`timesteps` has to be of shape \(12,\), got \(6,\)"),
        ({"noise": torch.zeros(6, TOKEN_DIM)}, r"`noise` has to be of shape \(12, 4\), got \(6, 4\)"),
        ({"mask": torch.zeros(2, 3, dtype=torch.bool)}, "`mask` has to mask at least one token"),
        ({"generator": [torch.Generator()] * 3}, r"`generator` has to hold one generator per image \(2\), got 3"),
    ],
)
def test_wrong_arguments_for_the_loss(change, message, scheduler):
    arguments = {
        "condition": conditions()[0],
        "target": torch.zeros(2, 3, TOKEN_DIM),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "scheduler": scheduler,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        tiny_head(2).loss(**arguments)
