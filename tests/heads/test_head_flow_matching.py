# SPDX-License-Identifier: Apache-2.0
"""The flow-matching head against its definitions, where the right answer is known, and on a law to be learnt."""

import math
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from common import randomise, relative_error, seeded
from known_heads import make_linear, published_mlp
from mar_hf import FlowMatchingHead, MARPipeline, TokenDDPMScheduler, TokenFlowScheduler
from tiny_pipelines import tiny_pipeline, tiny_transformer
from two_samples import learn, p_value, triangle, upright


TOKEN_DIM, CONDITION_DIM = 4, 6
EULER = TokenFlowScheduler(stochastic=False)


def tiny_head(**settings):
    return randomise(FlowMatchingHead(TOKEN_DIM, CONDITION_DIM, num_layers=2, hidden_size=32, **settings))


def conditions():
    return torch.randn(2, 2, 3, CONDITION_DIM, generator=seeded(5)).unbind(0)


# The network and its loss


@pytest.mark.parametrize("groups", [None, 1])
def test_the_network_is_mar_s_without_a_variance(groups):
    head, generator = tiny_head(modulation_groups=groups), seeded(1)
    x, c = torch.randn(5, TOKEN_DIM, generator=generator), torch.randn(5, CONDITION_DIM, generator=generator)
    t = torch.tensor([0.0, 0.5, 250.0, 999.75, 1000.0])
    assert relative_error(head(x, t, c), published_mlp(head, x, c, time_embedding=t)) < 1e-5


@pytest.mark.parametrize("prediction_type", ["velocity", "sample"])
def test_the_loss_is_the_squared_error_of_the_velocity(prediction_type):
    head = tiny_head(prediction_type=prediction_type, batch_multiplier=2)
    condition, target = conditions()[0], torch.randn(2, 3, TOKEN_DIM, generator=seeded(2))
    mask = torch.tensor([[True, False, True], [True, True, True]])
    timesteps, noise = 1000 * torch.rand(12, generator=seeded(3)), torch.randn(12, TOKEN_DIM, generator=seeded(4))
    timesteps[0], timesteps[2] = 0, 20
    arguments = {"scheduler": TokenFlowScheduler(), "timesteps": timesteps, "noise": noise}
    loss = head.loss(condition=condition, target=target, mask=mask, **arguments)
    x, c, counts = (value.flatten(0, 1).double() for value in (target, condition, mask[..., None]))
    x, c, counts = x.repeat(2, 1), c.repeat(2, 1), counts.repeat(2, 1)[:, 0]
    sigma = timesteps[:, None].double() / 1000
    noisy = (1 - sigma) * x + sigma * noise
    output = published_mlp(head, noisy, c, time_embedding=timesteps)
    if prediction_type == "sample":
        # The velocities of the output and of the token on the way to `noisy`.
        output, true = ((noisy - token) / sigma.clamp(min=0.05) for token in (output, x))
    else:
        true = noise - x
    expected = ((output - true).square().mean(1) * counts).sum() / counts.sum()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def drawn_times(**settings):
    head, scheduler = tiny_head(**settings), TokenFlowScheduler()
    return head.draw_times(scheduler, lambda function: function((20_000,), generator=seeded(1))) / 1000


def test_times_are_distributed_as_told():
    uniform = drawn_times(time_distribution="uniform")
    assert (uniform.histc(10, 0, 1) / 2000 - 1).abs().max() < 0.1
    logits = drawn_times(logit_mean=-0.5, logit_std=2.0).double().logit()
    assert logits.mean().item() == pytest.approx(-0.5, abs=0.05) and logits.std().item() == pytest.approx(2, rel=0.03)
    # Three quartiles and the share below them, of the logistic function of a standard normal.
    for share in (0.25, 0.5, 0.75):
        quantile = torch.special.ndtri(torch.tensor(share)).sigmoid()
        assert (drawn_times() < quantile).float().mean().item() == pytest.approx(share, abs=0.01)


# Sampling


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", ["velocity", "sample"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("stochastic", [True, False])
def test_sampling_is_the_scheduler_s_steps_along_guided_velocities(prediction_type, guidance_scale, stochastic):
    head, (condition, negative), steps = tiny_head(prediction_type=prediction_type), conditions(), 5
    scheduler, noise = TokenFlowScheduler(stochastic=stochastic), torch.randn(2, 3, 6, TOKEN_DIM, generator=seeded(1))
    call = {"guidance_scale": guidance_scale, "scheduler": scheduler, "num_steps": steps, "temperature": 0.8}
    found = head.sample(condition=condition, negative_condition=negative, noise=noise, **call)

    scheduler.set_timesteps(steps)
    state = noise[:, :, 0].flatten(0, 1) * (1.0 if stochastic else 0.8)
    for step, t in enumerate(scheduler.timesteps):
        outputs = [head(state, t.repeat(6), c.flatten(0, 1)) for c in (condition, negative)]
        if prediction_type == "sample":
            outputs = [(state - output) / scheduler.sigmas[step].item() for output in outputs]
        velocity = outputs[1] + guidance_scale * (outputs[0] - outputs[1])
        state = scheduler.step(velocity, t, state, 0.8, noise[:, :, step + 1].flatten(0, 1)).prev_sample
    assert relative_error(found.flatten(0, 1), state) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize(
    "scheduler", [TokenFlowScheduler(), FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)]
)
def test_each_image_follows_its_own_generator(scheduler):
    head, (condition, _), before = tiny_head(), conditions(), torch.get_rng_state()
    call = {"scheduler": scheduler, "num_steps": 5}
    together = head.sample(condition=condition, generator=[seeded(0), seeded(1)], **call)
    for image in range(2):
        alone = head.sample(condition=condition[image : image + 1], generator=seeded(image), **call)
        assert relative_error(together[image : image + 1], alone) < 1e-5
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_drawn_noise_is_the_start_then_one_a_step():
    head, (condition, _), generator = tiny_head(), conditions(), seeded(1)
    call = {"condition": condition, "scheduler": TokenFlowScheduler(), "num_steps": 4}
    noise = torch.stack([torch.randn(2, 3, TOKEN_DIM, generator=generator) for _ in range(5)], dim=2)
    noise[:, :, 4] = float("nan")  # the last step injects none
    assert torch.equal(head.sample(**call, generator=seeded(1)), head.sample(**call, noise=noise))


@torch.no_grad()
def test_half_precision_keeps_a_float32_state():
    head, (condition, negative) = tiny_head(), conditions()
    call = {"guidance_scale": 1.5, "scheduler": TokenFlowScheduler(), "num_steps": 10}
    expected = head.sample(condition=condition, negative_condition=negative, generator=seeded(1), **call)
    head.bfloat16()
    halves = {"condition": condition.bfloat16(), "negative_condition": negative.bfloat16()}
    found = head.sample(**halves, generator=seeded(1), **call)
    assert found.dtype == torch.float32 and not torch.equal(found.bfloat16().float(), found)
    assert relative_error(found, expected) < 0.1


# A law that is known


@pytest.fixture(scope="module", params=["velocity", "sample"])
def known(request):
    """A head that is right for tokens from N(0, 0.5**2), and the factor from x to the velocity at each sigma."""

    def velocity(sigma, narrow=0.5**2):
        return (sigma - (1 - sigma) * narrow) / ((1 - sigma) ** 2 * narrow + sigma**2)

    sigmas = torch.arange(1001, dtype=torch.float64) / 1000
    factors = velocity(sigmas)
    if request.param == "sample":
        factors = 1 - sigmas * factors
    head = FlowMatchingHead(TOKEN_DIM, CONDITION_DIM, request.param, num_layers=1, hidden_size=256)
    return make_linear(head, factors), velocity


def many(head, scheduler, num_steps, temperature=1.0):
    call = {"condition": torch.zeros(1, 1000, CONDITION_DIM), "scheduler": scheduler, "num_steps": num_steps}
    return head.sample(**call, temperature=temperature, generator=seeded(1))


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("steps", [5, 25])
def test_the_stochastic_sampler_s_deviation_is_the_one_computed(steps, temperature, known):
    (head, velocity), scheduler = known, TokenFlowScheduler(shift=1.5)
    found, variance = many(head, scheduler, steps, temperature).std().item(), 1.0
    for sigma, following in zip(scheduler.sigmas.tolist(), scheduler.sigmas[1:].tolist(), strict=False):
        size, factor = sigma - following, velocity(sigma)
        if following > 0:
            variance = (1 - size * (1 + (2 - sigma) * factor)) ** 2 * variance + temperature**2 * 2 * sigma * size
        else:
            variance = (1 - size * factor) ** 2 * variance
    assert found == pytest.approx(math.sqrt(variance), rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", [TokenFlowScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
@pytest.mark.parametrize("steps", [4, 10])
def test_without_noise_sampling_gives_the_product_of_its_factors(steps, kind, temperature, known):
    head, velocity = known
    scheduler = kind.from_config(TokenFlowScheduler(stochastic=False, shift=1.5).config)
    sampled, product = many(head, scheduler, steps, temperature), temperature
    sigmas = scheduler.sigmas.unique_consecutive().tolist()
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        size, slope = following - sigma, velocity(sigma)
        if kind is FlowMatchHeunDiscreteScheduler and following > 0:
            slope = (slope + velocity(following) * (1 + size * slope)) / 2
        product *= 1 + size * slope
    start = torch.randn(1, 1000, TOKEN_DIM, generator=seeded(1))
    assert relative_error(sampled, product * start) < 0.02
    if (steps, kind, temperature) == (10, FlowMatchHeunDiscreteScheduler, 1.0):
        assert sampled.std().item() == pytest.approx(0.5, rel=0.05)


def test_it_learns_a_mixture():
    head = learn(lambda: FlowMatchingHead(2, 2, num_layers=2, hidden_size=48), steps=200, rows=256)
    for sign in (1, -1):
        condition = upright(400, sign)
        expected = triangle(condition, seeded(2))[0]

        def found(scheduler, num_steps, condition=condition):
            return head.sample(condition=condition, scheduler=scheduler, num_steps=num_steps, generator=seeded(3))[0]

        with torch.no_grad():
            assert min(p_value(found(scheduler, 25), expected) for scheduler in (TokenFlowScheduler(), EULER)) > 0.05
            # One step ends at the mean of the law.
            assert p_value(found(EULER, 1), expected) < 0.01


# In a pipeline


@pytest.mark.parametrize("backbone", ["mar", "ar"])
def test_pipelines_come_back_with_it(backbone, tmp_path):
    head = {"head_type": "flow_matching", "head_config": {"num_layers": 1, "prediction_type": "sample"}}
    transformer = tiny_transformer(backbone=backbone, **head)
    pipe = tiny_pipeline(transformer=transformer, scheduler=TokenFlowScheduler(shift=2.0))
    pipe.save_pretrained(tmp_path)
    loaded = MARPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    call = {"class_labels": [0, 1], "guidance_scale": 2.0, "output_type": "pt"}
    images = [one(**call, generator=seeded(1)).images for one in (pipe, loaded)]
    assert torch.equal(*images) and loaded.scheduler.config.shift == 2.0
    assert not torch.equal(pipe(**call, temperature=0.5, generator=seeded(1)).images, images[0])
    # Other samplers by configuration; without noise between the steps, another picture.
    for kind in (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler):
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        assert not torch.equal(pipe(**call, generator=seeded(1)).images, images[0])


# Errors


@pytest.mark.parametrize(
    "scheduler, temperature, message",
    [
        (None, 1.0, "has to be one of TokenFlowScheduler, FlowMatchEulerDiscreteScheduler, .*, got NoneType"),
        (TokenDDPMScheduler(), 1.0, "got TokenDDPMScheduler"),
        (DDIMScheduler(), 1.0, "got DDIMScheduler"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 1.0, "Euler.* with `use_dynamic_shifting`"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), 1.0, "with `invert_sigmas` does not fit"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), 0.9, "`temperature` has to be 1.0 .* got 0.9"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_schedulers_that_do_not_fit(scheduler, temperature, message):
    head, (condition, _) = tiny_head(), conditions()
    for call in (
        partial(head.check_scheduler, scheduler, temperature),
        partial(head.sample, condition=condition, scheduler=scheduler, num_steps=3, temperature=temperature),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"prediction_type": "eps"},
            r"`prediction_type` has to be one of \('velocity', 'sample'\), got 'eps",
        ),
        ({"prediction_type": []}, r"`prediction_type` has to be one of .*, got \[\]"),
        ({"time_distribution": None}, r"`time_distribution` has to be one of \('logit_normal', 'uniform'\), got None"),
        ({"logit_mean": "0"}, r"`logit_mean` has to lie in \[-10, 10\], got '0'"),
        ({"logit_std": -1}, r"`logit_std` has to lie in \[0, 10\], got -1"),
        ({"logit_std": float("nan")}, "`logit_std`"),
        ({"hidden_size": 0}, "`hidden_size`"),
    ],
)
def test_settings_that_it_does_not_have(settings, message):
    with pytest.raises(ValueError, match=message):
        FlowMatchingHead(TOKEN_DIM, CONDITION_DIM, **settings)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scheduler": TokenDDPMScheduler()}, "Training needs a TokenFlowScheduler, got TokenDDPMScheduler"),
        ({"timesteps": torch.full((6,), 1000.5)}, r"`timesteps` has to lie in \[0, 1000\], got 1000.5"),
        ({"timesteps": torch.full((6,), float("nan"))}, r"`timesteps` has to lie in \[0, 1000\], got nan"),
        ({"timesteps": torch.zeros(6).long()}, "`timesteps` has to hold floating-point numbers"),
        ({"noise": torch.zeros(6, 3)}, r"`noise` has to be of shape \(6, 4\)"),
    ],
)
def test_wrong_arguments_for_the_loss(change, message):
    batch = {"target": torch.zeros(2, 3, TOKEN_DIM), "mask": torch.ones(2, 3, dtype=torch.bool)}
    with pytest.raises(ValueError, match=message):
        tiny_head().loss(**{**batch, "condition": conditions()[0], "scheduler": TokenFlowScheduler(), **change})
