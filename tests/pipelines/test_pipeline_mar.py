# SPDX-License-Identifier: Apache-2.0
"""What a call of the pipeline does: randomness as a contract, arguments, callbacks, samplers, dtypes."""

import inspect
import logging
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
)

from mar_hf import (
    ARForImageGeneration,
    ImageTokenizer,
    ImageTokenizerConfig,
    MARPipeline,
    TokenDDPMScheduler,
)
from mar_hf.conversion import convert_checkpoint
from mar_hf.generation import GENERATION_DEFAULTS, GENERATION_ORDERS
from tiny_pipelines import FEW_STEPS, seeds, tiny_kl, tiny_pipeline, tiny_text_pipeline, tiny_transformer


DATA = Path(__file__).parents[1] / "parity" / "data" / "mar-tiny"
TOKENS, TOKEN_DIM, HEAD_STEPS = 16, 12, FEW_STEPS["num_diffusion_steps"]
# 16 tokens in 3 steps: floor(16 cos(pi/6)) = 13 are left after the first, floor(16 cos(pi/3)) = 8 after the second.
COSINE = [3, 5, 8]
CATEGORICAL = {"head_type": "categorical", "head_config": {"num_codes": 8}}


@pytest.fixture(params=["pixels", "kl", "texts"])
def either(request):
    """A pipeline on pixels, one with an autoencoder, and one that is asked for texts."""
    if request.param == "texts":
        return tiny_text_pipeline()
    return tiny_pipeline(tiny_kl() if request.param == "kl" else None)


def subjects(pipe, *labels):
    """Arguments for pictures of these classes, or of texts where the pipeline takes such."""
    if pipe.text_encoder is None:
        return {"class_labels": list(labels)}
    return {"prompt": [["a red heart", "cat", "two big blue clock"][label] for label in labels]}


def latents(pipe, class_labels=1, **kwargs):
    return pipe(class_labels, output_type="latent", **kwargs).images


def rows_of_forwards(pipe):
    """A list that will hold the batch size of every forward of the transformer."""
    rows = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    return rows


def draw(generator, batch=1, steps=HEAD_STEPS, order="random", context=False):
    """Orders and noise as the contract has it: picture after picture, its order, then its noise.

    Last, where that is asked for, the noise of the context.
    """
    orders, noise, contexts = [], [], []
    for _ in range(batch):
        orders.append(GENERATION_ORDERS[order](4, 4, generator))
        noise.append(torch.randn(TOKENS, steps + 1, TOKEN_DIM, generator=generator))
        if context:
            contexts.append(torch.randn(TOKENS, TOKEN_DIM, generator=generator))
    drawn = torch.stack(orders), torch.stack(noise)
    return (*drawn, torch.stack(contexts)) if context else drawn


def conditions(pipe, tokens, mask, labels, orders, counts, texts):
    """Conditions of all positions in one forward, without a cache; tokens that are not there yet are not read."""
    if isinstance(pipe.transformer, ARForImageGeneration):
        arguments = {"orders": orders, "tokens_per_step": counts}
        return pipe.transformer(tokens, class_labels=labels, **arguments, **texts).condition
    return pipe.transformer(tokens, mask, labels, **texts).condition


@torch.no_grad()
def by_hand(
    pipe,
    labels,
    orders,
    noise,
    counts,
    scales=None,
    seen=lambda tokens: tokens,
    after=None,
    texts=None,
    negative=None,
    refreshes=None,
):
    """The generation loop once more, conditional and unconditional passes apart; guided where there are scales.

    `seen` is what the backbone sees of the tokens; `after` may replace them after a step; `texts` and `negative` are
    what it is told besides, as it takes it. `refreshes` are the steps with an unconditional pass, None: all.
    """
    tokens, mask = torch.zeros(len(orders), TOKENS, TOKEN_DIM), torch.ones(len(orders), TOKENS, dtype=torch.bool)
    rows, first = torch.arange(len(orders))[:, None], 0
    for step, count in enumerate(counts):
        positions = orders[:, first : first + count]
        everywhere = conditions(pipe, seen(tokens), mask, labels, orders, counts, texts or {})
        condition, guided = everywhere[rows, positions], {}
        if scales is not None:
            if refreshes is None or step in refreshes:
                other = conditions(pipe, seen(tokens), mask, None, orders, counts, negative or {})
                change = other - everywhere
            guided = {"negative_condition": condition + change[rows, positions], "guidance_scale": scales[step]}
        tokens[rows, positions] = pipe.transformer.head.sample(
            condition=condition,
            scheduler=pipe.scheduler,
            num_steps=noise.shape[2] - 1,
            noise=noise[rows, positions],
            **guided,
        )
        mask[rows, positions] = False
        first += count
        if after is not None:
            tokens = after(step, tokens)
    return pipe.vae.unpatchify(tokens)


# Randomness


def test_the_same_seed_gives_the_same_bytes(either):
    first, again, other = (
        either(**subjects(either, 0, 1), generator=torch.Generator().manual_seed(seed)).images for seed in (5, 5, 6)
    )
    assert [image.tobytes() for image in first] == [image.tobytes() for image in again]
    assert all(a.tobytes() != b.tobytes() for a, b in zip(first, other))


def test_a_picture_alone_is_the_picture_in_a_batch(either):
    together = either(**subjects(either, 0, 1, 2, 1), output_type="latent", generator=seeds(0, 1, 2, 3)).images
    for place, label in enumerate([0, 1, 2, 1]):
        alone = either(**subjects(either, label), output_type="latent", generator=seeds(place)).images
        torch.testing.assert_close(alone[0], together[place], rtol=1e-4, atol=1e-4)
    assert (together[1] - together[3]).abs().max() > 0.1


def test_a_batch_cut_in_two_gives_the_same_pictures(pipe):
    whole = latents(pipe, [2, 0, 1], generator=seeds(0, 1, 2), guidance_scale=1.0)
    parts = [latents(pipe, [2], generator=seeds(0), guidance_scale=1.0)]
    parts.append(latents(pipe, [0, 1], generator=seeds(1, 2), guidance_scale=1.0))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)


def test_one_generator_serves_picture_after_picture(pipe):
    first, second = latents(pipe, [1, 1], generator=torch.Generator().manual_seed(4))
    alone = latents(pipe, 1, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(alone[0], first, rtol=1e-4, atol=1e-4)
    assert (first - second).abs().max() > 0.1


def test_order_and_noise_are_those_drawn_from_the_generator(pipe):
    orders, noise = draw(torch.Generator().manual_seed(3), batch=2)
    drawn = latents(pipe, [0, 1], generator=torch.Generator().manual_seed(3))
    given = latents(pipe, [0, 1], generation_order=orders, noise=noise)
    assert torch.equal(drawn, given)
    assert torch.equal(given, latents(pipe, [0, 1], generation_order=orders, noise=noise, generator=seeds(8, 9)))


def test_a_named_order_draws_nothing(pipe):
    orders, noise = draw(torch.Generator().manual_seed(3), order="raster")
    drawn = latents(pipe, generation_order="raster", generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, latents(pipe, generation_order=orders, noise=noise))


def test_a_given_order_leaves_the_noise_to_the_generator(pipe):
    orders, noise = draw(torch.Generator().manual_seed(3), order="raster")
    drawn = latents(pipe, generation_order=orders, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, latents(pipe, generation_order=orders, noise=noise))


def test_without_guidance_it_is_the_loop_by_hand(pipe):
    orders, noise = draw(torch.Generator().manual_seed(0), batch=2)
    expected = by_hand(pipe, torch.tensor([2, 0]), orders, noise, COSINE)
    rows = rows_of_forwards(pipe)
    found = latents(pipe, [2, 0], generation_order=orders, noise=noise, guidance_scale=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert rows == [2, 2, 2]  # one forward a step, without the unconditional half


def test_with_guidance_it_is_the_loop_by_hand(pipe):
    orders, noise = draw(torch.Generator().manual_seed(0), batch=2)
    scales = [1 + 2 * 3 / 16, 1 + 2 * 8 / 16, 1 + 2 * 15 / 16]
    for schedule, expected_scales in (("linear", scales), ("constant", [3.0] * 3)):
        expected = by_hand(pipe, torch.tensor([2, 0]), orders, noise, COSINE, expected_scales)
        settings = {"generation_order": orders, "noise": noise, "guidance_scale": 3.0, "guidance_schedule": schedule}
        torch.testing.assert_close(latents(pipe, [2, 0], **settings), expected, rtol=1e-4, atol=1e-4)
    rows = rows_of_forwards(pipe)
    latents(pipe, [2, 0], **settings)
    assert rows == [4, 4, 4]


def test_without_a_class_it_is_the_loop_by_hand_with_the_null_class(pipe):
    orders, noise = draw(torch.Generator().manual_seed(0))
    expected = by_hand(pipe, None, orders, noise, COSINE)
    rows = rows_of_forwards(pipe)
    found = latents(pipe, None, generation_order=orders, noise=noise, guidance_scale=3.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert rows == [1, 1, 1]
    assert (found - latents(pipe, 0, generation_order=orders, noise=noise)).abs().max() > 0.1


@pytest.mark.parametrize("order", GENERATION_ORDERS)
@pytest.mark.parametrize("backbone", ["mar", "ar"])
def test_every_order_is_the_loop_by_hand(backbone, order):
    """One token a step of the causal model, with its cache for both branches of guidance."""
    counts = {"mar": COSINE, "ar": [1] * TOKENS}[backbone]
    transformer = tiny_transformer(backbone=backbone, **{"mar": {}, "ar": {"max_tokens_per_step": 1}}[backbone])
    pipe = tiny_pipeline(transformer=transformer)
    steps = {"num_inference_steps": len(counts), "num_diffusion_steps": 2, "guidance_schedule": "constant"}
    for labels in ([1], [2, 0, 1]):
        orders, noise = draw(torch.Generator().manual_seed(3), len(labels), steps=2, order=order)
        expected = by_hand(pipe, torch.tensor(labels), orders, noise, counts, [3.0] * len(counts))
        drawn = {"generation_order": order, "generator": torch.Generator().manual_seed(3)}
        found = latents(pipe, labels, **drawn, **steps, guidance_scale=3.0)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_causal_model_computes_one_token_a_step():
    pipe = tiny_pipeline(transformer=tiny_transformer(backbone="ar", max_tokens_per_step=1), generation_defaults=None)
    lengths = []
    first = pipe.transformer.model.layers[0]
    first.register_forward_pre_hook(lambda module, args: lengths.append(tuple(args[0].shape[:2])))
    latents(pipe, [0, 1], num_diffusion_steps=1)
    # First the two tokens of the class; each time both branches of two pictures.
    assert lengths == [(4, 2)] + [(4, 1)] * 15


def test_noise_belongs_to_positions_and_steps(pipe):
    pipe.scheduler = TokenDDPMScheduler()  # a `max_timestep` would merge some of so few head steps
    orders, noise = draw(torch.Generator().manual_seed(0))
    last = orders[0, -1].item()
    found = pipe.vae.patchify(latents(pipe, generation_order=orders, noise=noise))
    for entry in range(HEAD_STEPS + 1):
        changed = noise.clone()
        changed[0, last, entry] += 1
        other = pipe.vae.patchify(latents(pipe, generation_order=orders, noise=changed))
        differs = [position for position in range(TOKENS) if not torch.equal(found[0, position], other[0, position])]
        # The last head step, at t = 0, injects nothing.
        assert differs == ([] if entry == HEAD_STEPS else [last])


def test_context_noise_is_mixed_into_what_the_backbone_sees(pipe):
    orders, noise, context = draw(torch.Generator().manual_seed(0), batch=2, context=True)
    scales = [2.0] * 3

    def seen(tokens):
        return 0.75 * tokens + 0.25 * context

    expected = by_hand(pipe, torch.tensor([2, 0]), orders, noise, COSINE, scales, seen=seen)
    settings = {"guidance_scale": 2.0, "guidance_schedule": "constant"}
    found = latents(pipe, [2, 0], generator=torch.Generator().manual_seed(0), context_noise=0.25, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_no_context_noise_is_exactly_off_and_draws_nothing(pipe):
    generators = [torch.Generator().manual_seed(0) for _ in range(3)]
    draw(generators[0])
    found = latents(pipe, generator=generators[1], context_noise=0.0)
    assert torch.equal(found, latents(pipe, generator=generators[2]))
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    # Where there is some it is drawn last: what comes before any token is seen is the same.
    noisy = latents(pipe, generator=seeds(0), context_noise=0.5)
    same = (noisy == found).all(1).flatten()  # a pixel each; tokens are 2 x 2 of them
    assert same.sum() == 4 * COSINE[0]


def test_temperature_zero_injects_no_noise(pipe):
    orders, noise = draw(torch.Generator().manual_seed(0))
    changed = torch.cat([noise[:, :, :1], noise[:, :, 1:] + 1], dim=2)
    cold, hot = (
        [latents(pipe, generation_order=orders, noise=n, temperature=t) for n in (noise, changed)] for t in (0.0, 1.0)
    )
    assert torch.equal(*cold)
    assert not torch.allclose(*hot, atol=0.1)


@pytest.mark.parametrize(
    "scheduler",
    [
        TokenDDPMScheduler,
        DDIMScheduler,
        EulerAncestralDiscreteScheduler,
        lambda config: DDPMScheduler.from_config(config, variance_type="fixed_small"),
        lambda config: DPMSolverMultistepScheduler.from_config(config, algorithm_type="sde-dpmsolver++"),
    ],
    ids=["token_ddpm", "ddim", "euler_ancestral", "ddpm", "sde_dpm"],
)
def test_global_random_states_stay_as_they_are(pipe, scheduler):
    make = getattr(scheduler, "from_config", scheduler)
    pipe.scheduler = make(pipe.scheduler.config)

    def states():
        numpy_state = np.random.get_state()  # noqa: NPY002 (the global state is what must not change)
        return torch.get_rng_state().tolist(), repr(numpy_state), repr(random.getstate())

    before = states()
    first, second = latents(pipe), latents(pipe)
    latents(pipe, generator=torch.Generator().manual_seed(0))
    latents(pipe, [0, 1], generator=seeds(0, 1))
    assert states() == before
    assert not torch.allclose(first, second, atol=0.1)  # no generator: other pictures every time


def test_schedulers_with_noise_of_their_own_keep_pictures_apart(pipe):
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    together = latents(pipe, [0, 1], generator=seeds(0, 1))
    torch.testing.assert_close(latents(pipe, 1, generator=seeds(1))[0], together[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["random", "raster", "tensor"])
def test_tokens_appear_in_the_order(pipe, order):
    drawn, _ = draw(torch.Generator().manual_seed(7), batch=2)
    expected = torch.arange(TOKENS).expand(2, -1) if order == "raster" else drawn
    missing = []

    def callback(pipe, step, done, tensors):
        missing.append(tensors["mask"].clone())

    latents(
        pipe,
        [0, 1],
        generation_order=drawn if order == "tensor" else order,
        generator=torch.Generator().manual_seed(7),
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["mask"],
    )
    for step, mask in enumerate(missing):
        for row, positions in zip(mask, expected):
            assert set(row.nonzero()[:, 0].tolist()) == set(positions[sum(COSINE[: step + 1]) :].tolist())


# Arguments


def test_the_signature_is_the_documented_one():
    parameters = inspect.signature(MARPipeline.__call__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
    assert defaults == {
        "class_labels": None,
        "prompt": None,
        "num_inference_steps": None,
        "guidance_scale": None,
        "num_diffusion_steps": None,
        "guidance_schedule": None,
        "token_schedule": None,
        "head_step_schedule": None,
        "temperature": None,
        "generation_order": None,
        "negative_prompt": None,
        "num_images_per_prompt": 1,
        "generator": None,
        "noise": None,
        "context_noise": None,
        "head_kwargs": None,
        "guidance_interval": None,
        "guidance_refresh": None,
        "decoding": None,
        "detail_share": None,
        "prompt_embeds": None,
        "prompt_attention_mask": None,
        "negative_prompt_embeds": None,
        "negative_prompt_attention_mask": None,
        "output_type": "pil",
        "return_dict": True,
        "callback_on_step_end": None,
        "callback_on_step_end_tensor_inputs": ["latents"],
        "max_sequence_length": None,
    }
    assert list(defaults)[:2] == ["class_labels", "prompt"]  # positional use


@pytest.mark.parametrize(
    "label",
    [
        [1],
        (1,),
        range(1, 2),
        "cat",
        "kitten",
        "cat, kitten",
        ["kitten"],
        torch.tensor(1),
        torch.tensor([[1]], dtype=torch.int32),
        [[1]],
        [torch.tensor(1)],
        np.int64(1),
        np.array([1]),
    ],
    ids=repr,
)
def test_ways_to_name_a_class(pipe, label):
    expected = latents(pipe, 1, generator=seeds(0))
    assert torch.equal(latents(pipe, label, generator=seeds(0)), expected)
    assert (latents(pipe, 0, generator=seeds(0)) - expected).abs().max() > 0.1


def test_several_classes_at_once(pipe):
    expected = latents(pipe, [0, 1, 2], generator=seeds(0, 1, 2))
    for labels in (["heart", "kitten", "clock"], [0, "cat", [2]], [[0], [1], [2]], torch.arange(3), np.arange(3)):
        assert torch.equal(latents(pipe, labels, generator=seeds(0, 1, 2)), expected)


def test_numbers_of_numpy_are_numbers(pipe):
    whole = {"num_inference_steps": 3, "num_diffusion_steps": 4, "guidance_refresh": 1}
    real = {"guidance_scale": 2.0, "temperature": 0.5, "context_noise": 0.25}
    expected = latents(pipe, 1, generator=seeds(0), guidance_interval=[0.0, 0.75], **whole, **real)
    settings = {name: np.int64(value) for name, value in whole.items()}
    settings |= {name: np.float32(value) for name, value in real.items()}
    settings["guidance_interval"] = list(np.float32([0.0, 0.75]))
    assert torch.equal(latents(pipe, 1, generator=seeds(0), **settings), expected)


def test_labels_are_numbers_by_name(pipe):
    assert pipe.labels == {"heart": 0, "cat, kitten": 1, "cat": 1, "kitten": 1, "clock": 2}
    assert tiny_pipeline(id2label=None).labels == {}


def test_no_class_gives_one_picture_and_is_a_class_of_its_own(pipe):
    found = latents(pipe, None, generator=seeds(0))
    assert found.shape == (1, 3, 8, 8)
    for label in range(3):
        assert (found - latents(pipe, label, generator=seeds(0))).abs().max() > 0.1


def test_num_images_per_prompt_repeats_each_label(pipe):
    found = latents(pipe, [0, 2], num_images_per_prompt=2, generator=seeds(0, 1, 2, 3))
    assert torch.equal(found, latents(pipe, [0, 0, 2, 2], generator=seeds(0, 1, 2, 3)))
    assert latents(pipe, None, num_images_per_prompt=3).shape[0] == 3


def test_output_types_agree(either):
    found = {
        kind: either(**subjects(either, 0, 1), generator=seeds(0, 1), output_type=kind).images
        for kind in ("pil", "np", "pt", "latent")
    }
    with torch.no_grad():
        expected = (either.vae.decode(found["latent"]) / 2 + 0.5).clamp(0, 1)
    assert found["pt"].dtype == torch.float32 and found["pt"].shape == (2, 3, 8, 8)
    torch.testing.assert_close(found["pt"], expected)
    np.testing.assert_array_equal(found["np"], found["pt"].permute(0, 2, 3, 1).numpy())
    for image, array in zip(found["pil"], found["np"]):
        assert image.size == (8, 8) and image.mode == "RGB"
        np.testing.assert_allclose(np.asarray(image) / 255, array, atol=0.502 / 255)
    assert found["np"].std() > 0.05


def test_return_dict(pipe):
    output = pipe(1, generator=seeds(0), output_type="np")
    as_tuple = pipe(1, generator=seeds(0), output_type="np", return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1
    np.testing.assert_array_equal(as_tuple[0], output.images)


def test_the_progress_bar_counts_steps(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    pipe(1, num_inference_steps=5)
    assert "5/5" in capsys.readouterr().err


OTHER_SETTINGS = {
    "num_inference_steps": 5,
    "guidance_scale": 1.5,
    "num_diffusion_steps": 6,
    "guidance_schedule": "constant",
    "token_schedule": "constant",
    "head_step_schedule": "linear",
    "temperature": 0.5,
    "generation_order": "raster",
    "context_noise": 0.5,
    "guidance_interval": [0.4, 0.8],
    "guidance_refresh": 2,
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_an_argument_that_is_none_takes_the_checkpoints_default(name):
    value, defaults = OTHER_SETTINGS[name], {"num_inference_steps": 3, "num_diffusion_steps": 8}
    plain = tiny_pipeline(generation_defaults=defaults)
    given = latents(plain, generator=seeds(0), **{name: value})
    assert not torch.allclose(given, latents(plain, generator=seeds(0)), atol=1e-3)
    saved = tiny_pipeline(generation_defaults={**defaults, name: value})
    assert torch.equal(given, latents(saved, generator=seeds(0)))
    assert torch.equal(given, latents(saved, generator=seeds(0), **{name: None}))
    assert saved.generation_defaults[name] == value


def test_a_given_argument_goes_before_the_checkpoints_default():
    plain, saved = tiny_pipeline(), tiny_pipeline(generation_defaults=OTHER_SETTINGS)
    settings = {**plain.generation_defaults, "generator": seeds(0)}
    assert torch.equal(latents(saved, **settings), latents(plain, generator=seeds(0)))


def test_without_defaults_of_its_own_a_pipeline_has_the_papers():
    large = tiny_transformer(grid_height=9, grid_width=9)
    assert tiny_pipeline(transformer=large, generation_defaults=None).generation_defaults == {
        "num_inference_steps": 64,
        "guidance_scale": 3.0,
        "num_diffusion_steps": 100,
        "guidance_schedule": "linear",
        "token_schedule": "cosine",
        "head_step_schedule": "constant",
        "temperature": 1.0,
        "generation_order": "random",
        "context_noise": 0.0,
        "head_kwargs": None,
        "guidance_interval": (0.0, 1.0),
        "guidance_refresh": 1,
        "detail_share": 0.0,
    }
    assert tiny_pipeline(generation_defaults=None).generation_defaults["num_inference_steps"] == TOKENS


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"order": "zigzag"}, {"generation_order": "zigzag"}),
        (
            {"backbone": "ar", "order": "raster", "max_tokens_per_step": 1},
            {"token_schedule": "constant", "generation_order": "raster"},
        ),
        (
            {"backbone": "ar", "order": "nearest", "max_tokens_per_step": 3},
            {"num_inference_steps": 6, "token_schedule": "constant", "generation_order": "nearest"},
        ),
        (CATEGORICAL, {"num_diffusion_steps": 1}),
        (
            {"backbone": "ar", "order": "spiral", "max_tokens_per_step": 1, **CATEGORICAL},
            {"num_diffusion_steps": 1, "token_schedule": "constant", "generation_order": "spiral"},
        ),
    ],
    ids=["mar", "ar", "ar-several", "mar-categorical", "ar-categorical"],
)
def test_defaults_follow_from_the_model(settings, expected):
    pipe = tiny_pipeline(transformer=tiny_transformer(**settings), generation_defaults=None)
    expected = {**GENERATION_DEFAULTS, "num_inference_steps": TOKENS, **expected}
    assert pipe.generation_defaults == expected
    latents(pipe, generator=seeds(0), num_diffusion_steps=1)
    assert pipe.num_timesteps == expected["num_inference_steps"]
    # What is saved goes before.
    saved = {"num_inference_steps": 16, "generation_order": "subsampled", "num_diffusion_steps": 2}
    pipe = tiny_pipeline(transformer=pipe.transformer, generation_defaults=saved)
    assert pipe.generation_defaults == {**expected, **saved}


def test_a_saved_temperature_does_not_count_with_schedulers_that_have_none():
    plain, saved = tiny_pipeline(), tiny_pipeline(generation_defaults={**FEW_STEPS, "temperature": 0.5})
    for each in (plain, saved):
        each.scheduler = DDIMScheduler.from_config(each.scheduler.config)
    assert saved.generation_defaults["temperature"] == 1.0
    settings = {**FEW_STEPS, "generator": seeds(0)}
    assert torch.equal(latents(saved, **settings), latents(plain, **{**settings, "generator": seeds(0)}))
    with pytest.raises(ValueError, match="temperature"):
        latents(saved, temperature=0.5)


# Callbacks


def test_the_callback_is_called_after_every_step(pipe):
    seen = []

    def callback(pipe, step, done, tensors):
        seen.append((step, done, sorted(tensors)))
        filled = pipe.vae.patchify(tensors["latents"]).abs().sum(-1) > 0
        assert torch.equal(filled, ~tensors["mask"])
        return tensors

    names = ["latents", "mask"]
    found = latents(pipe, generator=seeds(0), callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert seen == [(0, 3, names), (1, 8, names), (2, 16, names)]
    assert pipe.num_timesteps == 3
    # A causal model computes anew what it had kept: to the last bit that is not the same.
    torch.testing.assert_close(found, latents(pipe, generator=seeds(0)), rtol=1e-4, atol=1e-4)


def test_the_callback_gets_what_it_asks_for(pipe):
    seen = []
    latents(pipe, callback_on_step_end=lambda pipe, step, done, tensors: seen.append(list(tensors)))
    latents(
        pipe,
        callback_on_step_end=lambda pipe, step, done, tensors: seen.append(list(tensors)),
        callback_on_step_end_tensor_inputs=[],
        num_inference_steps=1,
    )
    assert seen == [["latents"]] * 3 + [[]]


def test_the_callback_replaces_the_latents(pipe):
    def blank(at):
        def callback(pipe, step, done, tensors):
            return {"latents": torch.zeros_like(tensors["latents"])} if step == at else {}

        return callback

    orders, noise = draw(torch.Generator().manual_seed(0))
    settings = {"generation_order": orders, "noise": noise}
    assert latents(pipe, callback_on_step_end=blank(2), **settings).abs().max() == 0
    plain = pipe.vae.patchify(latents(pipe, **settings))[0]
    found = pipe.vae.patchify(latents(pipe, callback_on_step_end=blank(0), **settings))[0]
    assert found[orders[0, :3]].abs().max() == 0
    # What came later was computed from the replaced tokens.
    assert (found - plain)[orders[0, 3:]].abs().max() > 0.01
    # Those of earlier steps, which a causal model keeps, are replaced too.
    settings |= {"guidance_scale": 3.0, "guidance_schedule": "constant"}
    for at in (0, 1):
        expected = by_hand(
            *(pipe, torch.tensor([1]), orders, noise, COSINE, [3.0] * 3),
            after=lambda step, tokens, at=at: tokens * (step != at),
        )
        found = latents(pipe, 1, callback_on_step_end=blank(at), **settings)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_callback_can_interrupt(pipe, capsys):
    calls = []

    def callback(pipe, step, done, tensors):
        calls.append(step)
        pipe._interrupt = True

    pipe.set_progress_bar_config(disable=False)
    orders, noise = draw(torch.Generator().manual_seed(0))
    settings = {"generation_order": orders, "noise": noise}
    found = pipe.vae.patchify(latents(pipe, callback_on_step_end=callback, **settings))[0]
    assert calls == [0] and pipe.interrupt
    shown = capsys.readouterr().err
    assert "1/3" in shown and "2/3" not in shown
    whole = pipe.vae.patchify(latents(pipe, **settings))[0]
    assert not pipe.interrupt
    torch.testing.assert_close(found[orders[0, :3]], whole[orders[0, :3]], rtol=1e-4, atol=1e-4)
    assert found[orders[0, 3:]].abs().max() == 0 < whole[orders[0, 3:]].abs().min()


def test_the_callback_can_change_guidance(pipe):
    def increase(pipe, step, done, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    latents(pipe, guidance_scale=2.0, callback_on_step_end=increase)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps

    def off(pipe, step, done, tensors):
        pipe._guidance_scale = 1.0

    rows = rows_of_forwards(pipe)
    latents(pipe, [0, 1], guidance_scale=2.0, callback_on_step_end=off)
    assert rows == [4, 2, 2] and not pipe.do_classifier_free_guidance


@pytest.mark.parametrize("before, after", [(2.0, 5.0), (2.0, 1.0), (1.0, 5.0)], ids=["up", "off", "on"])
def test_changed_guidance_counts_from_the_next_step(pipe, before, after):
    def callback(pipe, step, done, tensors):
        pipe._guidance_scale = after

    orders, noise = draw(torch.Generator().manual_seed(0))
    expected = by_hand(pipe, torch.tensor([1]), orders, noise, COSINE, [before, after, after])
    settings = {"guidance_scale": before, "guidance_schedule": "constant", "callback_on_step_end": callback}
    found = latents(pipe, 1, generation_order=orders, noise=noise, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# The categorical head


@pytest.fixture(params=["mar", "ar"])
def discrete(request):
    """Either backbone with a categorical head over 8 codes."""
    transformer = tiny_transformer(backbone=request.param, **CATEGORICAL)
    return tiny_pipeline(transformer=transformer, generation_defaults={"num_inference_steps": 4})


def test_discrete_tokens_are_vectors_of_the_codebook(discrete):
    found = discrete.vae.patchify(latents(discrete, [0, 1], generator=seeds(0, 1)))
    equal = (found[:, :, None] == discrete.transformer.head.codebook).all(-1)
    assert (equal.sum(-1) == 1).all() and equal.any((0, 1)).sum() > 2
    again = latents(discrete, [0, 1], generator=seeds(0, 1))
    assert torch.equal(discrete.vae.patchify(again), found)
    torch.testing.assert_close(latents(discrete, 1, generator=seeds(1))[0], again[1])


def test_the_likeliest_code_alone_is_temperature_zero(discrete):
    first, second = (latents(discrete, [0, 1], generator=seeds(0, 1), head_kwargs={"top_k": 1}) for _ in range(2))
    cold = latents(discrete, [0, 1], generator=seeds(0, 1), temperature=0.0)
    warm = latents(discrete, [0, 1], generator=seeds(0, 1))
    assert torch.equal(first, second) and torch.equal(first, cold) and not torch.equal(first, warm)


def test_head_kwargs_are_saved_and_given_like_other_settings(discrete):
    chosen, generator = {"top_k": 2, "top_p": 0.7}, [seeds(0) for _ in range(4)]
    expected = latents(discrete, head_kwargs=chosen, generator=generator[0])
    plain = latents(discrete, generator=generator[1])
    assert not torch.equal(expected, plain)
    parts = {"transformer": discrete.transformer, "vae": discrete.vae}
    saved = tiny_pipeline(**parts, generation_defaults={"num_inference_steps": 4, "head_kwargs": chosen})
    assert torch.equal(latents(saved, generator=generator[2]), expected)
    assert torch.equal(latents(saved, generator=generator[3], head_kwargs={}), plain)


# Projection of what the head samples


def projecting(normalizer="sphere", **settings):
    """A pipeline whose tokenizer normalises tokens of 2 x 2 pixels."""
    vae = ImageTokenizer(ImageTokenizerConfig(patch_size=2, scaling_factor=2.0, normalizer=normalizer))
    return tiny_pipeline(vae, **settings)


def norms(pipe, *args, **kwargs):
    return pipe.vae.patchify(latents(pipe, *args, **kwargs)).norm(dim=-1)


@pytest.mark.parametrize("normalizer", ["sphere", "token_layer_norm"])
@pytest.mark.parametrize("backbone", ["mar", "ar"])
def test_guided_tokens_are_projected_before_they_are_seen_and_decoded(backbone, normalizer):
    pipe = projecting(normalizer, backbone=backbone)
    orders, noise = draw(torch.Generator().manual_seed(0), batch=2)
    expected = by_hand(
        *(pipe, torch.tensor([2, 0]), orders, noise, COSINE, [3.0] * 3),
        after=lambda step, tokens: pipe.vae.projection(tokens),  # it leaves zeros and what is projected already
    )
    settings = {"guidance_scale": 3.0, "guidance_schedule": "constant", "generation_order": orders, "noise": noise}
    found = latents(pipe, [2, 0], **settings)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        pipe.vae.patchify(found).norm(dim=-1), torch.full((2, TOKENS), math.sqrt(TOKEN_DIM)), rtol=1e-4, atol=0
    )
    # Seen, not only decoded: what comes later is not what the head makes of its own tokens.
    plain = latents(projecting("affine", backbone=backbone), [2, 0], **settings)
    assert (pipe.vae.projection(pipe.vae.patchify(plain)) - pipe.vae.patchify(found)).abs().max() > 0.01


@pytest.mark.parametrize(
    "settings",
    [{"context_noise": 0.5}, {"temperature": 0.0}, {"guidance_scale": 8.0}, {"num_images_per_prompt": 2}],
    ids=lambda settings: next(iter(settings)),
)
def test_whatever_is_asked_for_tokens_are_on_the_sphere(settings):
    found = norms(projecting(), 1, generator=seeds(*range(settings.get("num_images_per_prompt", 1))), **settings)
    torch.testing.assert_close(found, torch.full_like(found, math.sqrt(TOKEN_DIM)), rtol=1e-5, atol=0)


def test_other_heads_and_types_come_to_the_sphere_too():
    discrete = projecting(transformer=tiny_transformer(**CATEGORICAL))
    half = projecting().to(torch.bfloat16)
    for pipe in (discrete, half):
        found = norms(pipe, 1, generator=seeds(0))
        torch.testing.assert_close(found, torch.full_like(found, math.sqrt(TOKEN_DIM)), rtol=1e-5, atol=0)


def test_latents_of_a_callback_are_taken_as_they_are():
    pipe, seen = projecting(), []

    def keep(pipe, step, done, tensors):
        seen.append(tensors["latents"].clone())
        return tensors

    found = latents(pipe, generator=seeds(0), callback_on_step_end=keep)
    assert torch.equal(found, latents(pipe, generator=seeds(0))) and torch.equal(found, seen[-1])
    # What is not there yet stays zero, what is there stays on the sphere.
    assert [(pipe.vae.patchify(each).norm(dim=-1) > 0).sum().item() for each in seen] == [3, 8, 16]
    twice = latents(
        pipe, generator=seeds(0), callback_on_step_end=lambda pipe, step, done, tensors: {"latents": 2 * found}
    )
    assert torch.equal(twice, 2 * found)


# Samplers


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small model that was really trained, so that what a sampler makes of it means something."""
    folder = convert_checkpoint(
        str(DATA / "checkpoint-last.pth"),
        tmp_path_factory.mktemp("trained") / "model",
        vae=str(DATA / "kl.ckpt"),
        config=str(DATA / "original_args.json"),
    )
    pipe = MARPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("steps", [10, 25])
def test_ddim_and_dpm_solver_swap_in(trained, steps):
    def sample(scheduler):
        parts = {**trained.components, "scheduler": scheduler}
        pipe = MARPipeline(**parts)
        pipe.set_progress_bar_config(disable=True)
        return latents(pipe, [0, 1], generator=seeds(0, 1), num_inference_steps=4, num_diffusion_steps=steps)

    config = trained.scheduler.config
    reference = sample(TokenDDPMScheduler.from_config(config, max_timestep=950))
    ddim, dpm = (sample(cls.from_config(config)) for cls in (DDIMScheduler, DPMSolverMultistepScheduler))
    for found in (ddim, dpm):
        assert 0.7 < found.std() / reference.std() < 1.4
        assert found.abs().max() < 8
    # Both follow the same differential equation from the same noise.
    assert (ddim - dpm).std() < 0.3 * ddim.std()


@pytest.fixture
def warnings(caplog):
    """The pipeline's own warnings."""
    caplog.set_level(logging.WARNING, logger="mar_hf.pipelines.pipeline_mar")
    return caplog


@pytest.mark.parametrize("factor", [30.0, float("nan")])
def test_exploded_tokens_are_reported(warnings, factor):
    pipe = tiny_pipeline(scheduler=TokenDDPMScheduler(max_timestep=999))
    with torch.no_grad():
        pipe.transformer.head.out_proj.weight *= factor
    latents(pipe, 1, generator=seeds(0))
    (record,) = warnings.records
    assert re.search(r"tokens reach (nan|[\d.e+]+) where about 4 is usual", record.message)
    assert "`max_timestep=950`" in record.message


def test_a_projection_does_not_hide_tokens_that_are_no_numbers(warnings):
    pipe = projecting()
    with torch.no_grad():
        pipe.transformer.head.out_proj.weight *= float("nan")
    latents(pipe, 1, generator=seeds(0))
    assert "tokens reach nan" in warnings.text


def test_sane_tokens_are_not_reported(pipe, warnings):
    latents(pipe, 1, generator=seeds(0))
    assert warnings.records == []


# Components and dtypes


def test_components_rebuild_the_pipeline(pipe):
    assert set(pipe.components) == {"transformer", "vae", "scheduler", "text_encoder", "tokenizer", "guider"}
    again = MARPipeline(**pipe.components, generation_defaults=FEW_STEPS)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(latents(again, generator=seeds(0)), latents(pipe, generator=seeds(0)))


def test_every_component_may_be_missing():
    empty = MARPipeline(transformer=None, vae=None, scheduler=None)
    parts = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer", "guider")
    assert empty.components == dict.fromkeys(parts)


def test_a_call_does_not_mutate_components(either):
    names = [name for name, part in either.components.items() if isinstance(part, torch.nn.Module)]

    def state():
        tensors = {
            f"{name}.{key}": tensor.clone()
            for name in names
            for key, tensor in getattr(either, name).state_dict().items()
        }
        rest = [
            (part.config.to_dict(), [(m.training, set(vars(m))) for m in part.modules()])
            for part in (getattr(either, name) for name in names)
        ]
        return tensors, (rest, dict(either.scheduler.config), dict(either.config), either.image_processor.config)

    (tensors, rest), _ = state(), either(**subjects(either, 1), generator=seeds(0))
    either(
        **subjects(either, 0, 1), generator=seeds(0, 1), num_inference_steps=2, num_diffusion_steps=3, temperature=0.9
    )
    tensors_after, rest_after = state()
    assert rest_after == rest
    assert tensors_after.keys() == tensors.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], tensors_after[name])] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_picture(either, dtype):
    settings = {**subjects(either, 1), "guidance_scale": 1.5, "output_type": "latent"}
    expected = either(**settings, generator=seeds(0)).images
    either.to(dtype)
    for part in either.components.values():
        if isinstance(part, torch.nn.Module):
            # Diffusers' AutoencoderKL says by default that it overflows in float16.
            upcast = getattr(part, "force_upcast", False) and dtype == torch.float16
            assert {parameter.dtype for parameter in part.parameters()} == {torch.float32 if upcast else dtype}
    found = either(**settings, generator=seeds(0)).images
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    assert not torch.equal(found, expected)
    image = either(**subjects(either, 1), output_type="pt").images
    assert image.dtype == torch.float32 and image.isfinite().all()


def test_components_may_have_different_dtypes(either):
    either.transformer.to(torch.bfloat16)
    assert either(**subjects(either, 1), output_type="pt").images.isfinite().all()


def test_a_grid_that_is_not_square():
    pipe = tiny_pipeline(transformer=tiny_transformer(grid_height=2, grid_width=6))
    found = latents(pipe, generator=seeds(0))
    assert found.shape == (1, 3, 4, 12)
    assert pipe(1).images[0].size == (12, 4)
