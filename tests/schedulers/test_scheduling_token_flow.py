# SPDX-License-Identifier: Apache-2.0
"""Steps against their equations and a law that is known, swaps with the flow schedulers of diffusers by config."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from common import relative_error, seeded
from mar_hf import TokenFlowScheduler
from mar_hf.schedulers import TokenSchedulerOutput


OWN_SETTINGS = {"num_train_timesteps": 1000, "shift": 3.0, "stochastic": False, "last_step": 0.02}
DIFFUSERS = [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler]


def prepared(steps, **settings):
    scheduler = TokenFlowScheduler(**settings)
    scheduler.set_timesteps(steps)
    return scheduler


def settings_of(scheduler):
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


# Which times


@pytest.mark.parametrize("shift", [1.0, 3.2])
@pytest.mark.parametrize("steps", [1, 2, 20, 50])
def test_stochastic_times_are_nextstep_s_and_end_at_the_data(steps, shift):
    scheduler = prepared(steps, shift=shift)
    # Its time runs from 0 = noise to 0.96, then comes one step of 0.04; t / (S - (S - 1) t) is its shift.
    times = torch.linspace(0, 0.96, steps, dtype=torch.float64)
    times = torch.cat([times / (shift - (shift - 1) * times), torch.ones(1, dtype=torch.float64)])
    assert torch.allclose(scheduler.sigmas, 1 - times, atol=1e-12)
    assert scheduler.sigmas[-1] == 0 and scheduler.sigmas.dtype == torch.float64
    assert torch.equal(scheduler.timesteps, (1000 * scheduler.sigmas[:-1]).float())


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_times_without_noise_are_equally_far(steps):
    sigmas = prepared(steps, stochastic=False).sigmas
    assert torch.allclose(sigmas, torch.linspace(1, 0, steps + 1, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("shift, last_step", [(0.01, 1e-6), (100, 0.2)])
def test_no_two_timesteps_are_the_same(shift, last_step):
    scheduler = prepared(100_000, num_train_timesteps=100_000, shift=shift, last_step=last_step)
    assert (scheduler.timesteps.diff() < 0).all() and scheduler.timesteps[-1] > 0


def test_timesteps_before_and_after_setting_them():
    scheduler = TokenFlowScheduler()
    assert len(scheduler) == 1000
    assert torch.allclose(scheduler.timesteps, torch.arange(1000, 0, -1.0))
    assert torch.allclose(scheduler.timesteps, FlowMatchEulerDiscreteScheduler().timesteps)
    scheduler.set_timesteps(4, device="cpu")
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 680, 360, 40])
    sigmas = scheduler.sigmas
    scheduler.set_timesteps(4)
    assert scheduler.sigmas is sigmas
    scheduler.set_timesteps(4, device="meta")
    assert scheduler.timesteps.is_meta


# Steps


def step_inputs(*shape):
    return torch.randn(3, *shape, generator=seeded(1)).unbind()


@pytest.mark.parametrize("index", [0, 4, 8])
def test_a_stochastic_step_is_euler_maruyama_s(index):
    scheduler, (velocity, sample, noise) = prepared(10, shift=2.0), step_inputs(3, 5, 4)
    result = scheduler.step(velocity, scheduler.timesteps[index], sample, noise=noise)
    sigma, size = scheduler.sigmas[index].item(), -scheduler.sigmas.diff()[index].item()
    # From noise to data: the velocity is -u, the score that of x = (1 - sigma) data + sigma noise.
    forward, sample = -velocity.double(), sample.double()
    score = -(sample - (1 - sigma) * forward) / sigma
    mean = sample + size * (forward + sigma * score)
    assert relative_error(result.prev_sample, mean + math.sqrt(2 * sigma * size) * noise) < 1e-5
    assert relative_error(result.pred_original_sample, sample + sigma * forward) < 1e-5


def test_steps_without_noise_are_those_of_diffusers():
    scheduler, (velocity, sample, noise) = prepared(10, stochastic=False, shift=2.0), step_inputs(3, 4)
    other = FlowMatchEulerDiscreteScheduler()
    other.set_timesteps(sigmas=scheduler.sigmas[:-1].tolist())
    for t, others in zip(scheduler.timesteps, other.timesteps, strict=True):
        found = scheduler.step(velocity, t, sample, noise=noise).prev_sample
        assert relative_error(found, other.step(velocity, others, sample).prev_sample) < 1e-5
        sample = found


def test_temperature_multiplies_the_noise_and_nothing_else():
    scheduler, (velocity, sample, noise) = prepared(10), step_inputs(3, 4)

    def previous(temperature, noise=noise):
        return scheduler.step(velocity, scheduler.timesteps[3], sample, temperature, noise).prev_sample

    assert torch.equal(previous(0.0), previous(1.0, 0 * noise))
    assert torch.allclose(previous(0.7), previous(1.0, 0.7 * noise), atol=1e-6)
    assert not torch.allclose(previous(0.7), previous(1.0), atol=0.1)


@pytest.mark.parametrize("settings", [{}, {"stochastic": False}], ids=["stochastic", "not"])
def test_the_last_step_lands_on_the_prediction(settings):
    scheduler, (velocity, sample, noise) = prepared(10, **settings), step_inputs(3, 4)
    result = scheduler.step(velocity, scheduler.timesteps[-1], sample, noise=noise)
    assert torch.equal(result.prev_sample, result.pred_original_sample)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 5, 4)])
def test_outputs_as_tuple_and_as_object(shape):
    scheduler, (velocity, sample, noise) = prepared(10), step_inputs(*shape)
    result = scheduler.step(velocity, scheduler.timesteps[2], sample, noise=noise)
    assert isinstance(result, TokenSchedulerOutput)
    pair = scheduler.step(velocity, scheduler.timesteps[2].item(), sample, noise=noise, return_dict=False)
    assert isinstance(pair, tuple) and len(pair) == 2
    assert torch.equal(pair[0], result.prev_sample) and torch.equal(pair[1], result.pred_original_sample)


def test_steps_compute_in_float32():
    scheduler, (velocity, sample, noise) = prepared(10), step_inputs(3, 4)
    velocity, sample, t = velocity.bfloat16(), sample.bfloat16(), scheduler.timesteps[2]
    found = scheduler.step(velocity, t, sample, noise=noise).prev_sample
    assert found.dtype == torch.float32
    assert torch.equal(found, scheduler.step(velocity.float(), t, sample.float(), noise=noise).prev_sample)


def test_noise_comes_from_the_generator():
    scheduler, before = prepared(10), torch.get_rng_state()
    velocity, sample, _ = step_inputs(2, 3, 4)
    t = scheduler.timesteps[2]
    drawn = scheduler.step(velocity, t, sample, generator=[seeded(3), seeded(4)]).prev_sample
    noise = torch.stack([torch.randn(3, 4, generator=seeded(seed)) for seed in (3, 4)])
    assert torch.equal(drawn, scheduler.step(velocity, t, sample, noise=noise).prev_sample)
    assert torch.equal(torch.get_rng_state(), before)


# A law that is known


def walk(scheduler, deviation, temperature=1.0):
    """The deviation of samples under the exact velocity for data from N(0, deviation**2), found and computed."""
    generator, variance, sigmas = seeded(1), 1.0, scheduler.sigmas.tolist()
    sample = torch.randn(20_000, generator=generator)
    for t, sigma, following in zip(scheduler.timesteps, sigmas, sigmas[1:], strict=False):
        signal = (1 - sigma) * deviation**2
        factor = (sigma - signal) / ((1 - sigma) * signal + sigma**2)  # E[noise - data | x] = factor x
        sample = scheduler.step(factor * sample, t, sample, temperature, generator=generator).prev_sample
        # All is linear, so the variance obeys a recursion.
        size, noisy = sigma - following, scheduler.config.stochastic and following > 0
        variance *= (1 - size * (1 + (2 - sigma) * factor) if noisy else 1 - size * factor) ** 2
        variance += temperature**2 * 2 * sigma * size if noisy else 0
    return sample.std().item(), math.sqrt(variance)


@pytest.mark.parametrize("settings", [{}, {"shift": 3.0}, {"last_step": 0.1}, {"stochastic": False}], ids=str)
@pytest.mark.parametrize("deviation", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("steps, temperature", [(5, 1.0), (25, 0.7), (300, 1.0)])
def test_deviations_are_those_computed(steps, temperature, deviation, settings):
    found, computed = walk(prepared(steps, **settings), deviation, temperature)
    assert found == pytest.approx(computed, rel=0.02)  # 20,000 numbers tell it to within 0.5 %
    # The last step gives the mean of what is left, so it has to be short for a narrow law.
    if steps == 300 and not settings.keys() & {"shift", "last_step"}:
        assert found == pytest.approx(deviation, rel=0.03)


# Noise


def test_noise_is_scaled_on_straight_paths():
    scheduler, (x, noise, _) = TokenFlowScheduler(), step_inputs(3, 5, 4)
    noisy = scheduler.scale_noise(x, torch.tensor([0.0, 250.5, 1000.0]), noise)
    for row, sigma in enumerate([0, 0.2505, 1]):
        assert torch.allclose(noisy[row], (1 - sigma) * x[row] + sigma * noise[row], atol=1e-6)
    assert noisy.dtype == torch.float32


# Configuration


def test_save_and_load(tmp_path):
    TokenFlowScheduler(**OWN_SETTINGS).save_pretrained(tmp_path)
    assert settings_of(TokenFlowScheduler.from_pretrained(tmp_path)) == OWN_SETTINGS


@pytest.mark.parametrize("other", DIFFUSERS)
@pytest.mark.parametrize("saved", [False, True], ids=["from_config", "from_pretrained"])
def test_our_settings_arrive_in_other_schedulers_and_come_back(other, saved, tmp_path):
    scheduler = TokenFlowScheduler(**OWN_SETTINGS)
    if saved:
        scheduler.save_pretrained(tmp_path)
        swapped = other.from_pretrained(tmp_path)
    else:
        swapped = other.from_config(scheduler.config)
    assert (swapped.config.shift, swapped.config.num_train_timesteps) == (3.0, 1000)
    assert settings_of(TokenFlowScheduler.from_config(swapped.config)) == OWN_SETTINGS


def test_settings_of_diffusers_arrive_in_ours():
    scheduler = TokenFlowScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    assert scheduler.config.shift == 3.0 and scheduler.config.stochastic is True


def test_compatible_schedulers():
    assert set(TokenFlowScheduler().compatibles) == set(DIFFUSERS)


# Errors


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"shift": 0}, r"`shift` has to lie in \[0.01, 100\], got 0"),
        ({"shift": float("nan")}, "`shift` has to lie in"),
        ({"shift": "x"}, "`shift` has to lie in"),
        ({"stochastic": 1}, "`stochastic` has to be True or False, got 1"),
        ({"last_step": 0}, r"`last_step` has to lie in \[1e-06, 0.2\], got 0"),
        ({"last_step": None}, "`last_step` has to lie in"),
        ({"num_train_timesteps": True}, "`num_train_timesteps` has to be at least 1, got True, which is no integer"),
        ({"num_train_timesteps": 2.5}, "`num_train_timesteps` has to be at least 1, got 2.5, which is no integer"),
        ({"num_train_timesteps": 10**9}, "`num_train_timesteps` has to be at most 100000, got 1000000000"),
    ],
)
def test_settings_that_it_does_not_have(settings, message):
    with pytest.raises(ValueError, match=message):
        TokenFlowScheduler(**settings)


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.0, True, None])
def test_wrong_numbers_of_steps(steps):
    with pytest.raises(ValueError, match="`num_inference_steps` has to be at"):
        TokenFlowScheduler().set_timesteps(steps)


def test_wrong_steps():
    velocity, sample, _ = step_inputs(2, 4)
    with pytest.raises(ValueError, match="Call `set_timesteps` before `step`"):
        TokenFlowScheduler().step(velocity, 1000, sample)
    for timestep in (5, "x", None, torch.zeros(0), torch.zeros(2), float("nan")):
        with pytest.raises(ValueError, match=r"`timestep` has to be one of \[1000.0, .*\], got"):
            prepared(4).step(velocity, timestep, sample)
    for name, wrong in (("model_output", "x"), ("sample", None)):
        with pytest.raises(ValueError, match=f"`{name}` has to be a tensor"):
            prepared(4).step(**{"model_output": velocity, "timestep": 1000, "sample": sample, name: wrong})
    with pytest.raises(ValueError, match=r"`model_output` has to be of the shape of `sample`, \(2, 4\), got \(2, 8\)"):
        prepared(4).step(torch.zeros(2, 8), 1000, sample)
    for device in ("nowhere", torch.nn.Linear(1, 1)):
        with pytest.raises(ValueError, match="`device` has to be a device of torch"):
            TokenFlowScheduler().set_timesteps(5, device=device)
