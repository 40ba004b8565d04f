# SPDX-License-Identifier: Apache-2.0
"""The plain reference of the benchmarks: the package's pictures and losses, from nothing but its weights."""

import sys

import pytest
import torch
from diffusers import DDIMScheduler

from common import relative_error, seeded, tiny_model
from mar_hf import TokenDDPMScheduler
from mar_hf.generation import GUIDANCE_SCHEDULES, HEAD_STEP_SCHEDULES, TOKEN_SCHEDULES
from snippets import ROOT
from tiny_pipelines import tiny_pipeline, tiny_text_pipeline, tiny_transformer


sys.path.insert(0, str(ROOT / "benchmarks"))

import plain_reference  # noqa: E402
from measuring import flop_counter  # noqa: E402


SETTINGS = {"num_inference_steps": 5, "num_diffusion_steps": 8, "guidance_scale": 2.5}


def both(pipe, labels, **settings):
    """Latents of the pipeline and tokens of the reference for the same orders and noise."""
    settings = {**pipe.generation_defaults, **SETTINGS, **settings}
    length, batch = pipe.transformer.config.num_tokens, len(labels or [None])
    steps, head_steps = settings["num_inference_steps"], settings["num_diffusion_steps"]
    orders = torch.stack([torch.randperm(length, generator=seeded(row)) for row in range(batch)])
    noise = torch.randn(batch, length, head_steps + 1, 12, generator=seeded(1))
    call = {**settings, "generation_order": orders, "noise": noise, "output_type": "latent"}
    latents = pipe(labels, **call).images
    tokens = TOKEN_SCHEDULES[settings["token_schedule"]](length, steps)
    found = plain_reference.generate(
        pipe.transformer,
        pipe.scheduler,
        None if labels is None else torch.tensor(labels),
        orders,
        noise,
        tokens,
        HEAD_STEP_SCHEDULES[settings["head_step_schedule"]](head_steps, tokens),
        GUIDANCE_SCHEDULES[settings["guidance_schedule"]](settings["guidance_scale"], tokens),
        settings["temperature"],
    )
    return pipe.vae.patchify(latents), found


@pytest.mark.parametrize(
    "labels, settings",
    [
        ([2, 0], {}),
        ([1], {"guidance_scale": 1.0}),
        (None, {}),
        ([0, 1], {"guidance_schedule": "constant", "token_schedule": "constant", "temperature": 0.7}),
        ([2], {"head_step_schedule": "linear"}),
        ([2], {"num_inference_steps": 16, "num_diffusion_steps": 50}),
    ],
    ids=["guided", "unguided", "no class", "constant", "annealed", "token by token"],
)
def test_it_makes_the_pictures_of_the_pipeline(labels, settings):
    expected, found = both(tiny_pipeline(), labels, **settings)
    assert found.dtype == torch.float32 and expected.std() > 0.1
    assert relative_error(found, expected) < 1e-4


def test_it_makes_the_pictures_of_linear_layers_by_onednn(monkeypatch):
    # Layers as small as those of the tests are left to torch otherwise.
    monkeypatch.setattr("mar_hf.onednn.winning_rows", lambda *_: range(1, sys.maxsize))
    pipe, views = tiny_pipeline(), []
    expected = both(pipe, [2, 0])[1]
    # Hooks are shared with the view of the model that runs.
    pipe.transformer.register_forward_pre_hook(lambda module, inputs: views.append(module))
    found, _ = both(pipe, [2, 0])
    assert relative_error(found, expected) < 1e-4
    model = views[0]
    for layer in (model.model.decoder_layers[0].mlp.fc1, model.head.blocks[0].linear_1):
        assert layer.packed is not None


def test_it_runs_no_module_of_the_package():
    pipe = tiny_pipeline()
    expected, found = both(pipe, [1])

    def refuse(*_):
        raise AssertionError("a module was called")

    for module in pipe.transformer.modules():
        module.forward = refuse
    batch = [torch.tensor([1]), torch.arange(16)[None], torch.ones(1, 16, 5, 12), [8, 8], [4, 4], [2.0, 2.0]]
    plain_reference.generate(pipe.transformer, pipe.scheduler, *batch)
    tokens, mask = torch.zeros(1, 16, 12), torch.ones(1, 16, dtype=torch.bool)
    plain_reference.training_loss(pipe.transformer, pipe.scheduler, tokens, mask)


def test_it_does_all_that_the_original_does():
    pipe = tiny_pipeline()
    config, count, head_steps = pipe.transformer.config, 5, 4
    batch = [torch.tensor([1]), torch.arange(16)[None], torch.ones(1, 16, 5, 12), [16 - count, count]]
    with flop_counter() as counter:
        plain_reference.generate(pipe.transformer, TokenDDPMScheduler(), *batch, [head_steps] * 2, [2.0, 2.0])
    rows, width, size = 2, config.hidden_size, config.head_config["hidden_size"]
    prefix, length = config.num_class_tokens, config.num_tokens

    def block(tokens):
        return 24 * tokens * width**2 + 4 * tokens**2 * width

    backbone = sum(
        # All tokens are projected, visible ones encoded, all positions decoded.
        2 * length * 12 * width + block(prefix + visible) + 2 * (prefix + visible) * width**2 + block(prefix + length)
        for visible in (0, 16 - count)
    )
    layers = config.head_config["num_layers"]
    step = 12 * size + 256 * size + size**2 + width * size + layers * 5 * size**2 + 2 * size**2 + size * 24
    assert counter.get_total_flops() == rows * (backbone + length * head_steps * 2 * step)


@pytest.mark.parametrize("labels", [[0, 2, 1], None], ids=["classes", "no class"])
def test_it_has_the_loss_and_the_gradient_of_the_package(labels):
    model, scheduler, generator = tiny_model(head_batch_multiplier=2), TokenDDPMScheduler(), seeded()
    labels = None if labels is None else torch.tensor(labels)
    tokens = torch.randn(3, 16, 12, generator=generator)
    mask = torch.rand(3, 16, generator=generator).argsort(1) < 11
    timesteps = torch.randint(0, 1000, (96,), generator=generator)
    timesteps[::5] = 0  # where the bound is another
    noise = torch.randn(96, 12, generator=generator)
    expected = model(tokens, mask, labels, noise_scheduler=scheduler, timesteps=timesteps, noise=noise).loss
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    found = plain_reference.training_loss(model, scheduler, tokens, mask, labels, timesteps, noise)
    found.backward()
    assert relative_error(found, expected.detach()) < 1e-5
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-5 * largest, name


def test_dropout_is_that_of_the_training_mode():
    model, tokens, mask = tiny_model(), torch.zeros(2, 16, 12), torch.ones(2, 16, dtype=torch.bool)
    draws = {"timesteps": torch.arange(128), "noise": torch.ones(128, 12)}
    losses = []
    for training in (False, False, True, True):
        model.train(training)
        losses.append(plain_reference.training_loss(model, TokenDDPMScheduler(), tokens, mask, **draws).item())
    assert losses[0] == losses[1] and len(set(losses)) == 3


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: tiny_pipeline(backbone="ar"), "ARForImageGeneration with DiffusionHead"),
        (
            lambda: tiny_pipeline(transformer=tiny_transformer(head_type="categorical", head_config={"num_codes": 8})),
            "with CategoricalHead",
        ),
        (lambda: tiny_text_pipeline(), "not of texts"),
        (lambda: tiny_pipeline(scheduler=DDIMScheduler.from_config(TokenDDPMScheduler().config)), "DDIMScheduler"),
    ],
    ids=["causal", "categorical", "texts", "scheduler"],
)
def test_what_has_no_plain_form_is_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        plain_reference.check(make())
