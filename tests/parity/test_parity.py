# SPDX-License-Identifier: Apache-2.0
"""Every recorded number of the original code, from the converted checkpoint (`data/README.md` says what they are)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common import relative_error
from mar_hf import MARPipeline, TokenDDPMScheduler
from mar_hf.conversion import convert_checkpoint, export_mar_state_dict
from mar_hf.generation import cosine_tokens_per_step, linear_guidance


DATA = Path(__file__).parent / "data" / "mar-tiny"
TABLES, ARRAYS, GENERATION = 1e-12, 1e-5, 1e-4  # largest error allowed, relative to the largest magnitude

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def golden():
    return load_file(DATA / "tensors.safetensors")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "pipeline"
    convert_checkpoint(DATA / "checkpoint-last.pth", folder, vae=DATA / "kl.ckpt", config=DATA / "original_args.json")
    pipeline = MARPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def transformer(pipeline):
    return pipeline.transformer


@pytest.fixture(scope="module")
def training(golden, transformer):
    """The training loss with the recorded randomness, and the gradients of that model's own parameters."""
    transformer.zero_grad()
    output = transformer(
        golden["tokens"],
        golden["mask"].bool(),
        golden["labels"],
        noise_scheduler=_scheduler(10),
        timesteps=golden["train_t"],
        noise=golden["train_noise"],
    )
    output.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in transformer.named_parameters()}
    transformer.zero_grad()
    return output, gradients


def _scheduler(steps):
    scheduler = TokenDDPMScheduler()
    scheduler.set_timesteps(steps)
    return scheduler


# Tokens


def test_patches(golden, pipeline):
    assert torch.equal(pipeline.vae.patchify(golden["latents"]), golden["tokens"])
    assert torch.equal(pipeline.vae.unpatchify(golden["tokens"]), golden["unpatchified"])


@torch.no_grad()
def test_the_tokenizer_scales_the_autoencoder(pipeline):
    golden = load_file(DATA / "vae_tensors.safetensors")
    encoded = pipeline.vae.encode(golden["image"], sample_posterior=False)
    assert relative_error(encoded.latents, golden["mean"] * 0.2325) < ARRAYS
    assert relative_error(pipeline.vae.decode(golden["mean"] * 0.2325), golden["decoded"]) < ARRAYS


# Backbone


@torch.no_grad()
def test_encoder_and_decoder(golden, transformer):
    mask = golden["mask"].bool()
    assert torch.equal(mask.nonzero()[:, 1].reshape(2, -1), golden["orders"][:, : int(mask[0].sum())].sort(1).values)
    output = transformer(golden["tokens"], mask, golden["labels"])
    assert relative_error(output.encoder_last_hidden_state, golden["encoder_output"]) < ARRAYS
    assert relative_error(output.condition, golden["decoder_output"]) < ARRAYS


@torch.no_grad()
@pytest.mark.parametrize("labels", [None, torch.tensor([10, 10])], ids=["none", "last row"])
def test_null_class(labels, golden, transformer):
    output = transformer(golden["tokens"], golden["mask"].bool(), labels)
    assert relative_error(output.condition, golden["decoder_output_unconditional"]) < ARRAYS
    assert relative_error(golden["decoder_output"], golden["decoder_output_unconditional"]) > 1e-2


# Head and sampler


@torch.no_grad()
def test_denoising_network(golden, transformer):
    output = transformer.head(golden["mlp_x"], golden["mlp_t"], golden["mlp_c"])
    assert relative_error(output, golden["mlp_output"]) < ARRAYS


def test_sampler_tables(golden):
    scheduler = _scheduler(10)
    assert torch.equal(scheduler.timesteps.flip(0), golden["sampler_timesteps"])
    for name in ("betas", "alphas_cumprod", "posterior_log_variance_clipped"):
        expected = golden[f"sampler_{name}"]
        found = torch.tensor([row[name] for row in scheduler._sampling_rows], dtype=torch.float64)
        assert expected.dtype == torch.float64
        assert relative_error(found, expected) < TABLES, name


def test_training_tables(golden):
    scheduler = _scheduler(10)
    for name in ("betas", "alphas_cumprod"):
        found, expected = getattr(scheduler, name), golden[f"train_{name}"]
        # Entry by entry: alphas_cumprod ends at 2.4e-9.
        assert ((found - expected) / expected).abs().max() < TABLES, name


@torch.no_grad()
def test_head_sampling(golden, transformer):
    sampled = transformer.head.sample(
        condition=golden["head_condition"][None],
        scheduler=_scheduler(10),
        num_steps=10,
        temperature=0.9,
        noise=golden["head_noise"].permute(1, 0, 2)[None],
    )
    assert relative_error(sampled[0], golden["head_sample_temperature_0.9"]) < ARRAYS


# A whole guided generation


def test_schedules_of_the_generation(golden):
    settings = json.loads((DATA / "generation.json").read_text())
    counts = cosine_tokens_per_step(golden["gen_orders"].shape[1], settings["num_iter"])
    assert [settings["bsz"] * count for count in counts] == golden["gen_tokens_per_step"].tolist()
    assert linear_guidance(settings["cfg"], counts) == golden["gen_guidance_per_step"].tolist()


def test_generation(golden, pipeline):
    settings = json.loads((DATA / "generation.json").read_text())
    # The original takes positions from the end of its permutation; its noise is in generation order.
    orders = golden["gen_orders"].flip(1)
    counts = (golden["gen_tokens_per_step"] // settings["bsz"]).tolist()
    noise = torch.empty(*orders.shape, settings["head_steps"] + 1, golden["gen_noise"].shape[-1])
    rows = iter(golden["gen_noise"].permute(1, 0, 2))
    for step_positions in orders.split(counts, dim=1):
        for image, positions in enumerate(step_positions):
            for position in positions.sort().values:
                noise[image, position] = next(rows)
    assert next(rows, None) is None

    masks = []
    images = pipeline(
        class_labels=settings["labels"],
        num_inference_steps=settings["num_iter"],
        guidance_scale=settings["cfg"],
        num_diffusion_steps=settings["head_steps"],
        guidance_schedule=settings["cfg_schedule"],
        temperature=settings["temperature"],
        generation_order=orders,
        noise=noise,
        output_type="latent",
        callback_on_step_end=lambda pipe, step, done, tensors: masks.append(tensors["mask"]),
        callback_on_step_end_tensor_inputs=["mask"],
    ).images
    assert relative_error(images, golden["gen_latents"]) < GENERATION

    # What is still masked after a step is a prefix of the original's permutation.
    left = orders.shape[1]
    for mask, count in zip(masks, counts, strict=True):
        left -= count
        expected = torch.zeros_like(mask).scatter(1, golden["gen_orders"][:, :left], True)
        assert torch.equal(mask, expected)


# Training


def test_loss(golden, training):
    assert relative_error(training[0].loss, golden["train_loss"][0]) < ARRAYS


@torch.no_grad()
def test_terms_of_the_loss(golden, transformer):
    scheduler, timesteps, noise = _scheduler(10), golden["train_t"], golden["train_noise"]
    copies = len(timesteps) // golden["mask"].numel()
    condition = transformer(golden["tokens"], golden["mask"].bool(), golden["labels"]).condition
    condition, target = (x.flatten(0, 1).repeat(copies, 1) for x in (condition, golden["tokens"]))
    noisy = scheduler.add_noise(target, noise, timesteps)
    squared, bound = scheduler.training_losses(
        transformer.head(noisy, timesteps, condition), target, noisy, noise, timesteps
    )
    assert relative_error(squared, golden["train_mse"]) < ARRAYS
    assert relative_error(bound, golden["train_vb"]) < ARRAYS


def test_gradients(golden, training):
    gradients = export_mar_state_dict(training[1])
    expected = {name.removeprefix("grad/"): value for name, value in golden.items() if name.startswith("grad/")}
    assert expected.keys() <= gradients.keys() and len(expected) == 7
    for name, value in expected.items():
        assert relative_error(gradients[name], value) < ARRAYS, name
