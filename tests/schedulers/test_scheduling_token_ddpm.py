# SPDX-License-Identifier: Apache-2.0
"""Tables against closed formulas, steps against the posterior, losses against their definitions, swaps by config."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)

from common import relative_error, seeded
from mar_hf import TokenDDPMScheduler
from mar_hf.schedulers import TokenSchedulerOutput
from mar_hf.schedulers.scheduling_token_ddpm import respaced_timesteps


OWN_SETTINGS = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "trained_betas": None,
    "max_timestep": 950,
    "prediction_type": "epsilon",
    "variance_type": "learned_range",
    "clip_sample": False,
    "timestep_spacing": "leading",
}


def prepared(steps, **settings):
    scheduler = TokenDDPMScheduler(**settings)
    scheduler.set_timesteps(steps)
    return scheduler


def sampling_tables(scheduler):
    rows = scheduler._sampling_rows
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}


def settings_of(scheduler):
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def accumulated(count, length=1000):
    """The original's rule: add up the same stride, round each sum half to even."""
    stride = (length - 1) / (count - 1)
    return sorted({round(t) for t in itertools.accumulate([0.0] + [stride] * (count - 1))})


# Which timesteps


@pytest.fixture(scope="module")
def respaced():
    """The timesteps of every count but 1."""
    return {count: respaced_timesteps(1000, count, 999) for count in range(2, 1001)}


def test_respacing_is_the_original_s_for_every_count(respaced):
    for count, timesteps in respaced.items():
        assert timesteps == accumulated(count), count
        assert (timesteps[0], timesteps[-1], len(timesteps)) == (0, 999, count)
    assert respaced_timesteps(1000, 1, 999) == [999]


def test_respacing_is_not_a_rounded_linspace(respaced):
    other = [n for n, timesteps in respaced.items() if timesteps != np.linspace(0, 999, n).round().tolist()]
    assert len(other) == 278
    assert [n for n in other if n < 100] == [21, 23, 31, 35, 39, 43, 45, 59, 61, 67, 69, 77, 79, 87, 91, 93]


@pytest.mark.parametrize("count, visited", [(100, 96), (50, 48), (25, 24), *((n, n) for n in range(2, 21))])
def test_steps_beyond_the_last_timestep_merge(count, visited):
    scheduler = prepared(count, max_timestep=950)
    timesteps = scheduler.timesteps.tolist()
    assert len(timesteps) == visited and scheduler.num_inference_steps == count
    assert (timesteps[0], timesteps[-1]) == (950, 0)
    assert timesteps == sorted({min(t, 950) for t in accumulated(count)}, reverse=True)


def test_timesteps_before_and_after_setting_them():
    scheduler = TokenDDPMScheduler()
    assert len(scheduler) == 1000
    assert torch.equal(scheduler.timesteps, torch.arange(999, -1, -1))
    scheduler.set_timesteps(10, device="cpu")
    assert scheduler.timesteps.tolist() == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert scheduler.timesteps.dtype == torch.int64
    scheduler.set_timesteps(1000)
    assert torch.equal(scheduler.timesteps, torch.arange(999, -1, -1))


# Tables


def test_training_tables_are_the_cosine():
    scheduler = TokenDDPMScheduler()
    assert scheduler.betas.dtype == scheduler.alphas_cumprod.dtype == torch.float64

    def signal(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    # Where no beta is capped, the product of 1 - beta telescopes.
    expected = torch.tensor([signal((t + 1) / 1000) / signal(0) for t in range(999)], dtype=torch.float64)
    assert ((scheduler.alphas_cumprod[:-1] - expected) / expected).abs().max() < 1e-10
    assert (scheduler.betas < 0.999)[:-1].all() and scheduler.betas[-1] == 0.999
    assert scheduler.alphas_cumprod[-1].item() == pytest.approx(2.4288e-9, rel=1e-4)


@pytest.mark.parametrize("steps, last", [(1000, None), (100, None), (23, None), (50, 950), (2, 950)])
def test_sampling_tables_are_the_posterior(steps, last):
    scheduler = prepared(steps, max_timestep=last)
    tables, visited = sampling_tables(scheduler), scheduler.timesteps.flip(0)
    signal = scheduler.alphas_cumprod[visited]
    before = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
    alphas = signal / before
    assert torch.allclose(tables["alphas_cumprod"], signal, rtol=1e-12, atol=0)
    assert torch.allclose(tables["betas"], 1 - alphas, rtol=1e-12, atol=1e-16)
    # q(x_(t-1) | x_t, x_0): the product of N(sqrt(alpha) x_(t-1), beta) over x_t and N(sqrt(before) x_0, 1 - before).
    # (At the first entry the second one is a point.)
    alphas, betas, before = (table[1:] for table in (alphas, 1 - alphas, before))
    variance = 1 / (alphas / betas + 1 / (1 - before))
    assert torch.allclose(tables["posterior_log_variance_clipped"][1:], variance.log(), rtol=1e-9, atol=1e-12)
    assert torch.allclose(tables["posterior_mean_coef2"][1:], variance * alphas.sqrt() / betas, rtol=1e-9)
    assert torch.allclose(tables["posterior_mean_coef1"][1:], variance * before.sqrt() / (1 - before), rtol=1e-9)
    assert tables["posterior_log_variance_clipped"][0] == tables["posterior_log_variance_clipped"][1]
    assert (tables["posterior_mean_coef1"][0], tables["posterior_mean_coef2"][0]) == (1, 0)


def test_all_steps_are_the_training_chain():
    scheduler = prepared(1000)
    tables = sampling_tables(scheduler)
    for name, table in scheduler._train_tables.items():
        assert torch.allclose(tables[name], table, rtol=1e-6, atol=1e-12), name


def test_given_betas():
    scheduler = TokenDDPMScheduler(num_train_timesteps=3, trained_betas=[0.1, 0.2, 0.5])
    assert torch.allclose(scheduler.alphas_cumprod, torch.tensor([0.9, 0.72, 0.36], dtype=torch.float64))
    scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    "betas",
    [
        *([0.1, 0.2], [0.1, 0.2, 1.0], [0.0, 0.2, 0.5], [[0.1, 0.2, 0.5]]),
        *(["x"] * 3, [0.1, [0.2]], 5, "abc", [math.nan] * 3),
    ],
)
def test_wrong_betas_are_refused(betas):
    with pytest.raises(ValueError, match="`trained_betas` has to hold 3 numbers between 0 and 1"):
        TokenDDPMScheduler(num_train_timesteps=3, trained_betas=betas)


def test_betas_that_leave_no_noise_are_refused():
    with pytest.raises(ValueError, match="`trained_betas` has to leave signal and noise"):
        TokenDDPMScheduler(num_train_timesteps=3, trained_betas=[1e-300] * 3)


# Noise


def test_add_noise():
    scheduler, timesteps = TokenDDPMScheduler(), torch.tensor([0, 400, 999])
    x, noise = torch.randn(2, 3, 5, 4, generator=seeded())
    noisy = scheduler.add_noise(x, noise, timesteps)
    for row, t in enumerate(timesteps):
        signal = scheduler.alphas_cumprod[t].item()
        expected = math.sqrt(signal) * x[row] + math.sqrt(1 - signal) * noise[row]
        assert torch.allclose(noisy[row], expected, atol=1e-6)
    assert noisy.dtype == torch.float32
    assert relative_error(scheduler.add_noise(x[:, 0], noise[:, 0], timesteps), noisy[:, 0]) == 0


# Steps


def step_inputs(*shape):
    sample, noise = torch.randn(2, *shape, generator=seeded(1))
    return torch.randn(*shape[:-1], 2 * shape[-1], generator=seeded(2)), sample, noise


@pytest.mark.parametrize("t, previous", [(999, 888), (555, 444), (111, 0)])
def test_a_step_samples_the_posterior(t, previous):
    scheduler = prepared(10)
    output, sample, noise = step_inputs(3, 5, 4)
    result = scheduler.step(output, t, sample, noise=noise)

    epsilon, logits = output.double().chunk(2, -1)
    signal, before = scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[previous]
    beta, original = 1 - signal / before, (sample.double() - (1 - signal).sqrt() * epsilon) / signal.sqrt()
    mean = (before.sqrt() * beta * original + (1 - before) * (1 - beta).sqrt() * sample) / (1 - signal)
    smallest = (beta * (1 - before) / (1 - signal)).log()
    variance = ((logits + 1) / 2 * beta.log() + (1 - logits) / 2 * smallest).exp()
    assert relative_error(result.pred_original_sample, original) < 1e-5
    assert relative_error(result.prev_sample, mean + variance.sqrt() * noise) < 1e-5


@pytest.mark.parametrize("logit, end", [(1.0, "beta"), (-1.0, "posterior")])
def test_variance_logits_interpolate_between_beta_and_the_posterior(logit, end):
    scheduler = prepared(10)
    signal, before = scheduler.alphas_cumprod[555].item(), scheduler.alphas_cumprod[444].item()
    beta = 1 - signal / before
    variance = {"beta": beta, "posterior": beta * (1 - before) / (1 - signal)}[end]
    _, sample, noise = step_inputs(2, 4)
    output = torch.cat([torch.zeros(2, 4), torch.full((2, 4), logit)], -1)
    added = scheduler.step(output, 555, sample, noise=noise).prev_sample
    added = added - scheduler.step(output, 555, sample, noise=0 * noise).prev_sample
    assert torch.allclose(added, math.sqrt(variance) * noise, atol=1e-5)


def test_temperature_multiplies_the_noise_and_nothing_else():
    scheduler = prepared(10)
    output, sample, noise = step_inputs(3, 4)

    def previous(temperature):
        return scheduler.step(output, 444, sample, temperature, noise).prev_sample

    mean = previous(0.0)
    assert torch.equal(mean, scheduler.step(output, 444, sample, noise=0 * noise).prev_sample)
    assert torch.allclose(previous(0.7) - mean, 0.7 * (previous(1.0) - mean), atol=1e-6)
    assert torch.allclose(previous(0.7), scheduler.step(output, 444, sample, noise=0.7 * noise).prev_sample, atol=1e-6)


def test_the_last_step_adds_no_noise():
    scheduler = prepared(10)
    output, sample, noise = step_inputs(3, 4)
    result = scheduler.step(output, 0, sample, noise=noise)
    assert torch.equal(result.prev_sample, scheduler.step(output, 0, sample, noise=-noise).prev_sample)
    assert torch.allclose(result.prev_sample, result.pred_original_sample, atol=1e-6)


def test_a_single_step_gives_the_original_sample():
    scheduler = prepared(1, max_timestep=950)
    output, sample, noise = step_inputs(3, 4)
    result = scheduler.step(output, 950, sample, noise=noise)
    assert torch.allclose(result.prev_sample, result.pred_original_sample, atol=1e-5)
    assert torch.equal(result.prev_sample, scheduler.step(output, 950, sample, noise=-noise).prev_sample)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 5, 4)])
def test_outputs_as_tuple_and_as_object(shape):
    scheduler = prepared(10)
    output, sample, noise = step_inputs(*shape)
    result = scheduler.step(output, 444, sample, noise=noise)
    assert isinstance(result, TokenSchedulerOutput)
    assert result.prev_sample.shape == result.pred_original_sample.shape == shape
    pair = scheduler.step(output, torch.tensor(444), sample, noise=noise, return_dict=False)
    assert isinstance(pair, tuple) and len(pair) == 2
    assert torch.equal(pair[0], result.prev_sample) and torch.equal(pair[1], result.pred_original_sample)


def test_steps_compute_in_float32():
    scheduler = prepared(10)
    output, sample, noise = step_inputs(3, 4)
    result = scheduler.step(output.bfloat16(), 444, sample.bfloat16(), noise=noise)
    expected = scheduler.step(output.bfloat16().float(), 444, sample.bfloat16().float(), noise=noise)
    assert result.prev_sample.dtype == torch.float32
    assert torch.equal(result.prev_sample, expected.prev_sample)


def test_noise_comes_from_the_generator():
    scheduler, before = prepared(10), torch.get_rng_state()
    output, sample, _ = step_inputs(2, 3, 4)
    drawn = scheduler.step(output, 444, sample, generator=seeded(3)).prev_sample
    given = scheduler.step(output, 444, sample, noise=torch.randn(2, 3, 4, generator=seeded(3))).prev_sample
    assert torch.equal(drawn, given)
    rows = [scheduler.step(o[None], 444, s[None], generator=seeded(3)) for o, s in zip(output, sample, strict=True)]
    listed = scheduler.step(output, 444, sample, generator=[seeded(3), seeded(3)]).prev_sample
    assert torch.equal(listed, torch.cat([row.prev_sample for row in rows]))
    assert torch.equal(torch.get_rng_state(), before)


# Losses


def loss_inputs(timesteps, token_dim=4):
    x, noise = torch.randn(2, len(timesteps), token_dim, generator=seeded(1))
    output = torch.randn(len(timesteps), 2 * token_dim, generator=seeded(2))
    return output, x, TokenDDPMScheduler().add_noise(x, noise, timesteps), noise


def test_the_bound_is_the_divergence_from_the_posterior_in_bits():
    scheduler, timesteps = TokenDDPMScheduler(), torch.tensor([1, 2, 300, 700, 940])
    output, x, noisy, noise = loss_inputs(timesteps)
    squared, bound = scheduler.training_losses(output, x, noisy, noise, timesteps)
    epsilon, logits = output.double().chunk(2, -1)
    assert torch.allclose(squared.double(), (epsilon - noise).square().mean(-1), rtol=1e-5)
    for row, t in enumerate(timesteps):
        signal, before = scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[t - 1]
        beta = 1 - signal / before
        clean = (noisy[row] - (1 - signal).sqrt() * epsilon[row]) / signal.sqrt()
        smallest = beta * (1 - before) / (1 - signal)

        def mean(original, row=row, beta=beta, before=before, signal=signal):
            weighted = before.sqrt() * beta * original + (1 - before) * (1 - beta).sqrt() * noisy[row]
            return weighted / (1 - signal)

        variance = ((logits[row] + 1) / 2 * beta.log() + (1 - logits[row]) / 2 * smallest.log()).exp()
        model = torch.distributions.Normal(mean(clean), variance.sqrt())
        truth = torch.distributions.Normal(mean(x[row].double()), smallest.sqrt().expand(4))
        expected = torch.distributions.kl_divergence(truth, model).mean() / math.log(2)
        assert bound[row].item() == pytest.approx(expected.item(), rel=2e-3), int(t)


def test_the_bound_vanishes_for_the_truth():
    scheduler, timesteps = TokenDDPMScheduler(), torch.tensor([1, 300, 940])
    _, x, noisy, noise = loss_inputs(timesteps)
    output = torch.cat([noise, -torch.ones_like(noise)], -1)
    squared, bound = scheduler.training_losses(output, x, noisy, noise, timesteps)
    assert squared.max() == 0 and bound.abs().max() < 1e-4


def test_the_bound_at_zero_is_the_likelihood_of_bins():
    # All 256 values that a pixel can take, under one prediction: their probabilities sum to 1.
    scheduler, values = TokenDDPMScheduler(), torch.linspace(-1, 1, 256)[:, None]
    timesteps, noise = torch.zeros(256, dtype=torch.int64), torch.zeros(256, 1)
    for noisy, epsilon, logit in [(0.3, 0.5, 0.2), (-0.999, 0.1, 1.0), (2.0, -1.0, 5.0)]:
        output = torch.tensor([[epsilon, logit]]).expand(256, -1)
        _, bound = scheduler.training_losses(output, values, torch.full_like(values, noisy), noise, timesteps)
        assert (2**-bound).sum().item() == pytest.approx(1, abs=1e-3)
        assert values[bound.argmin()].item() == pytest.approx(max(-1, min(1, noisy)), abs=0.02)


def test_the_bound_trains_the_variance_only():
    scheduler, timesteps = TokenDDPMScheduler(), torch.tensor([0, 1, 500])
    output, x, noisy, noise = loss_inputs(timesteps)
    output.requires_grad_()
    squared, bound = scheduler.training_losses(output, x, noisy, noise, timesteps)
    (by_bound,) = torch.autograd.grad(bound.sum(), output, retain_graph=True)
    (by_error,) = torch.autograd.grad(squared.sum(), output)
    assert by_bound[:, :4].abs().max() == 0 and (by_bound[:, 4:] != 0).all()
    assert (by_error[:, :4] != 0).all() and by_error[:, 4:].abs().max() == 0


# Configuration


def test_save_and_load(tmp_path):
    scheduler = TokenDDPMScheduler(max_timestep=950)
    scheduler.save_pretrained(tmp_path)
    loaded = TokenDDPMScheduler.from_pretrained(tmp_path)
    assert settings_of(loaded) == settings_of(scheduler) == OWN_SETTINGS
    for one in (scheduler, loaded):
        one.set_timesteps(50)
    output, sample, noise = step_inputs(3, 4)
    assert torch.equal(loaded.timesteps, scheduler.timesteps)
    assert torch.equal(
        loaded.step(output, 950, sample, noise=noise).prev_sample,
        scheduler.step(output, 950, sample, noise=noise).prev_sample,
    )


@pytest.mark.parametrize("other", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("saved", [False, True], ids=["from_config", "from_pretrained"])
def test_our_settings_arrive_in_other_schedulers_and_come_back(other, saved, tmp_path):
    scheduler = TokenDDPMScheduler(max_timestep=950)
    if saved:
        scheduler.save_pretrained(tmp_path)
        swapped = other.from_pretrained(tmp_path)
    else:
        swapped = other.from_config(scheduler.config)
    assert swapped.config.beta_schedule == "squaredcos_cap_v2"
    assert swapped.config.timestep_spacing == "leading"
    assert swapped.config.prediction_type == "epsilon"
    assert swapped.config.get("clip_sample", False) is False
    assert relative_error(swapped.alphas_cumprod[:-1].double(), scheduler.alphas_cumprod[:-1]) < 1e-5
    # Leading spacing keeps them off the end of the schedule, where the signal is 2.4e-9.
    swapped.set_timesteps(25)
    assert swapped.timesteps.max() <= 960
    assert settings_of(TokenDDPMScheduler.from_config(swapped.config)) == OWN_SETTINGS


def test_compatible_schedulers():
    assert {"DDIMScheduler", "DPMSolverMultistepScheduler"} <= {c.__name__ for c in TokenDDPMScheduler().compatibles}


# Errors


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"beta_schedule": "linear"}, "`beta_schedule` has to be 'squaredcos_cap_v2' .* got 'linear'"),
        ({"prediction_type": "sample"}, "`prediction_type` has to be 'epsilon' .* got 'sample'"),
        ({"variance_type": "fixed_small"}, "`variance_type` has to be 'learned_range' .* got 'fixed_small'"),
        ({"clip_sample": True}, "`clip_sample` has to be False .* got True"),
        ({"max_timestep": 0}, r"`max_timestep` has to lie in 1\.\.999, got 0"),
        ({"max_timestep": 1000}, r"`max_timestep` has to lie in 1\.\.999, got 1000"),
        ({"max_timestep": True}, r"`max_timestep` has to lie in 1\.\.999, got True"),
        ({"max_timestep": 10.5}, r"`max_timestep` has to lie in 1\.\.999, got 10.5"),
        ({"num_train_timesteps": True}, "`num_train_timesteps` has to be at least 1, got True, which is no integer"),
        ({"num_train_timesteps": 2.5}, "`num_train_timesteps` has to be at least 1, got 2.5, which is no integer"),
        ({"num_train_timesteps": "x"}, "`num_train_timesteps` has to be at least 1, got 'x', which is no integer"),
        ({"num_train_timesteps": 10**9}, "`num_train_timesteps` has to be at most 100000, got 1000000000"),
    ],
)
def test_settings_that_it_does_not_have(settings, message):
    with pytest.raises(ValueError, match=message):
        TokenDDPMScheduler(**settings)


def test_steps_that_are_set_already_are_kept():
    scheduler = TokenDDPMScheduler()
    scheduler.set_timesteps(10)
    rows, timesteps = scheduler._sampling_rows, scheduler.timesteps
    scheduler.set_timesteps(10)
    scheduler.set_timesteps(10, device="cpu")
    assert scheduler._sampling_rows is rows and scheduler.timesteps is timesteps
    scheduler.set_timesteps(10, device="meta")
    assert scheduler.timesteps.is_meta
    scheduler.set_timesteps(11)
    assert len(scheduler.timesteps) == 11 and not scheduler.timesteps.is_meta


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_wrong_numbers_of_steps(steps):
    with pytest.raises(ValueError, match=rf"`num_inference_steps` has to lie in 1\.\.1000, got {steps}"):
        TokenDDPMScheduler().set_timesteps(steps)


def test_wrong_steps():
    output, sample, _ = step_inputs(2, 4)
    with pytest.raises(ValueError, match="Call `set_timesteps` before `step`"):
        TokenDDPMScheduler().step(output, 0, sample)
    with pytest.raises(ValueError, match=r"`timestep` has to be one of \[999, 888, .* 0\], got 5"):
        prepared(10).step(output, 5, sample)
    with pytest.raises(ValueError, match=r"`model_output` has to hold epsilon and variance .* \(2, 4\), got \(2, 4\)"):
        prepared(10).step(sample, 0, sample)
    for timestep in ("x", None, torch.zeros(0), torch.zeros(2)):
        with pytest.raises(ValueError, match="`timestep` has to be one of"):
            prepared(10).step(output, timestep, sample)
    for name, wrong in (("model_output", "x"), ("model_output", 5), ("sample", None), ("sample", torch.tensor(1.0))):
        with pytest.raises(ValueError, match=f"`{name}` has to be a tensor of at least one dimension"):
            prepared(10).step(**{"model_output": output, "timestep": 0, "sample": sample, name: wrong})
    for device in ("nowhere", torch.nn.Linear(1, 1)):
        with pytest.raises(ValueError, match="`device` has to be a device of torch"):
            TokenDDPMScheduler().set_timesteps(5, device=device)
