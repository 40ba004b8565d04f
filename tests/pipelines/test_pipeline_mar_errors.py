# SPDX-License-Identifier: Apache-2.0
"""What the pipeline refuses, before any work: each message names the argument, the value and what is allowed."""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from mar_hf import ImageTokenizer, ImageTokenizerConfig, MARPipeline, TokenDDPMScheduler
from mar_hf.generation import GENERATION_ORDERS
from tiny_pipelines import seeds, tiny_pipeline, tiny_transformer


def refuse(pipe, fragments, **kwargs):
    """Call the pipeline with what it has to refuse; the message holds all the fragments and nothing was computed."""
    forwards, generator = [], torch.Generator().manual_seed(0)
    before = generator.get_state()
    pipe.transformer.register_forward_pre_hook(lambda *args: forwards.append(1))
    with pytest.raises(ValueError) as error:
        pipe(**{"class_labels": 1, "generator": generator, **kwargs})
    for fragment in fragments:
        assert fragment in str(error.value)
    assert forwards == []
    assert torch.equal(generator.get_state(), before)


@pytest.fixture
def refused():
    """The same with a tiny pipeline, which is the attribute `pipe`."""
    refused = partial(refuse, pipe := tiny_pipeline())
    refused.pipe = pipe
    return refused


@pytest.mark.parametrize(
    "label, got",
    [
        (3, "got 3"),
        (-1, "got -1"),
        ([0, 7], "got 7"),
        ([[0], [9]], "got 9"),
        (torch.tensor([1, 5]), "got 5"),
        (torch.tensor(1.0), "got 1.0"),
        (np.array([4]), "got 4"),
        (1.5, "got 1.5"),
        (True, "got True"),
        ([None], "got None"),
        ({0: 1}, "got {0: 1}"),
    ],
)
def test_labels_out_of_range(refused, label, got):
    refused(["`class_labels`", "0..2", "class names", got], class_labels=label)


def test_unknown_names(refused):
    refused(["`class_labels`", "'dog'", "'heart'", "'cat'", "'kitten'", "'clock'"], class_labels=["heart", "dog"])


def test_names_without_names():
    with pytest.raises(ValueError, match="`class_labels`.*'dog'.*has no class names"):
        tiny_pipeline(id2label=None)("dog")


@pytest.mark.parametrize("labels", [[], (), [[]], torch.tensor([], dtype=torch.long)], ids=repr)
def test_no_labels(refused, labels):
    refused(["`class_labels` is empty", "None"], class_labels=labels)


@pytest.mark.parametrize(
    "kwargs, fragments",
    [
        ({"num_images_per_prompt": 0}, ["at least 1", "got 0"]),
        ({"num_inference_steps": 0}, ["1..16", "got 0"]),
        ({"num_inference_steps": -2}, ["1..16", "got -2"]),
        ({"num_inference_steps": 17}, ["1..16", "tokens", "got 17"]),
        ({"num_inference_steps": 2.0}, ["1..16", "got 2.0"]),
        ({"num_diffusion_steps": 0}, ["1..1000", "got 0"]),
        ({"num_diffusion_steps": 1001}, ["1..1000", "got 1001"]),
        ({"num_diffusion_steps": 4.0}, ["1..1000", "got 4.0"]),
        ({"temperature": -0.5}, ["at least 0", "got -0.5"]),
        ({"temperature": "hot"}, ["a finite number", "got 'hot'"]),
        ({"guidance_scale": float("nan")}, ["a finite number", "got nan"]),
        (
            {"guidance_schedule": "cosine"},
            ["['constant', 'decreasing_linear', 'linear', 'power_cosine']", "got 'cosine'"],
        ),
        ({"token_schedule": "linear"}, ["['constant', 'cosine', 'gtr']", "got 'linear'"]),
        ({"head_step_schedule": "cosine"}, ["['constant', 'gtr', 'linear']", "got 'cosine'"]),
        ({"generation_order": "diagonal"}, [str(sorted(GENERATION_ORDERS)), "got 'diagonal'"]),
        ({"generation_order": torch.arange(15)[None]}, ["(1, 16)", "got (1, 15)"]),
        ({"generation_order": torch.arange(16)}, ["(1, 16)", "got (16,)"]),
        ({"generation_order": torch.arange(16).repeat(2, 1)}, ["(1, 16)", "got (2, 16)"]),
        ({"generation_order": [list(range(16))]}, ["(1, 16)", "got [[0, 1"]),
        ({"generation_order": torch.zeros(1, 16, dtype=torch.long)}, ["0..15 once", "row 0"]),
        ({"generation_order": torch.arange(1, 17)[None]}, ["0..15 once", "row 0"]),
        ({"generation_order": torch.arange(16)[None] + 0.5}, ["0..15 once", "row 0"]),
        ({"generator": seeds(0, 1)}, ["one generator per picture (1)", "got 2"]),
        ({"generator": []}, ["one generator per picture (1)", "got 0"]),
        ({"generator": 0}, ["torch.Generator or a list", "got 0"]),
        ({"generator": [None]}, ["torch.Generator or a list", "got [None]"]),
        ({"generator": tuple(seeds(0))}, ["torch.Generator or a list", "got ("]),
        ({"noise": torch.zeros(1, 16, 4, 12)}, ["(1, 16, 5, 12)", "got (1, 16, 4, 12)"]),
        ({"noise": torch.zeros(2, 16, 5, 12)}, ["(1, 16, 5, 12)", "got (2, 16, 5, 12)"]),
        ({"noise": torch.zeros(16, 5, 12)}, ["(1, 16, 5, 12)", "got (16, 5, 12)"]),
        ({"noise": [0.0]}, ["(1, 16, 5, 12)", "got list"]),
        ({"noise": torch.full((1, 16, 5, 12), float("nan"))}, ["finite floating-point numbers"]),
        ({"noise": torch.zeros(1, 16, 5, 12, dtype=torch.long)}, ["floating-point numbers", "got torch.int64"]),
        ({"context_noise": -0.1}, ["[0, 1]", "got -0.1"]),
        ({"context_noise": 1.5}, ["[0, 1]", "got 1.5"]),
        ({"context_noise": "some"}, ["[0, 1]", "got 'some'"]),
        ({"detail_share": 1.1}, ["[0, 1]", "got 1.1"]),
        ({"head_kwargs": ["top_k"]}, ["a dict", "got ['top_k']"]),
        ({"head_kwargs": {1: 2}}, ["settings by name", "got {1: 2}"]),
        ({"guidance_interval": (0.5, 0.5)}, ["0 <= start < end <= 1", "got (0.5, 0.5)", "`guidance_scale=1.0`"]),
        ({"guidance_interval": [0.2, 1.1]}, ["0 <= start < end <= 1", "got [0.2, 1.1]"]),
        ({"guidance_interval": (-0.1, 1)}, ["0 <= start < end <= 1", "got (-0.1, 1)"]),
        ({"guidance_interval": (0, float("nan"))}, ["0 <= start < end <= 1", "got (0, nan)"]),
        ({"guidance_interval": (0, 0.5, 1)}, ["two numbers", "got (0, 0.5, 1)"]),
        ({"guidance_interval": ("0", "1")}, ["two numbers", "got ('0', '1')"]),
        ({"guidance_interval": (True, 1)}, ["two numbers", "got (True, 1)"]),
        ({"guidance_interval": 0.5}, ["two numbers", "got 0.5"]),
        ({"guidance_refresh": 0}, ["an integer from 1 on", "got 0"]),
        ({"guidance_refresh": 2.0}, ["an integer from 1 on", "got 2.0"]),
        ({"output_type": "jpg"}, ["pil, np, pt or latent", "got 'jpg'"]),
        ({"output_type": None}, ["pil, np, pt or latent", "got None"]),
        ({"return_dict": torch.zeros(2)}, ["True or False", "got tensor"]),
        ({"callback_on_step_end_tensor_inputs": ["latents", "noise"]}, ["['latents', 'mask']", "got ['noise']"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments(refused, kwargs, fragments):
    refused([f"`{next(iter(kwargs))}`", *fragments], **kwargs)


def test_the_second_row_of_an_order_is_checked_too(refused):
    order = torch.stack([torch.arange(16), torch.zeros(16, dtype=torch.long)])
    refused(["`generation_order`", "row 1"], generation_order=order, class_labels=[0, 1])


def test_generators_count_pictures_not_labels(refused):
    refused(["(4)", "got 2"], class_labels=[0, 1], num_images_per_prompt=2, generator=seeds(0, 1))


def test_a_bad_default_of_the_checkpoint_is_refused_too():
    pipe = tiny_pipeline(generation_defaults={"num_inference_steps": 99})
    with pytest.raises(ValueError, match=r"`num_inference_steps`.*1\.\.16.*got 99"):
        pipe(1)


@pytest.mark.parametrize(
    "head_kwargs, message",
    [
        ({"top_k": 5}, r"`head_kwargs` of `generation_defaults` .* got \['top_k'\]"),
        ({5: 5}, "`generation_defaults` .*`head_kwargs` has to be a dict of settings by name, got {5: 5}"),
    ],
)
def test_defaults_that_the_head_does_not_have_are_refused_when_they_are_built(head_kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(generation_defaults={"head_kwargs": head_kwargs})


def test_defaults_that_nobody_saved_are_within_what_model_and_scheduler_have():
    pipe = tiny_pipeline(generation_defaults=None, scheduler=TokenDDPMScheduler(num_train_timesteps=50))
    settings = pipe.settings_for()
    assert (settings.num_inference_steps, settings.num_diffusion_steps) == (16, 50)


@pytest.mark.parametrize("part", ["transformer", "vae", "scheduler"])
def test_a_pipeline_that_lacks_a_part_draws_nothing(part):
    with pytest.raises(ValueError, match=f"This pipeline has no .*'{part}'"):
        MARPipeline(**{**tiny_pipeline().components, part: None})(class_labels=0)


@pytest.mark.parametrize(
    "scheduler, fragments",
    [
        (FlowMatchEulerDiscreteScheduler(), ["FlowMatchEulerDiscreteScheduler", "'epsilon'"]),
        (UniPCMultistepScheduler(), ["UniPCMultistepScheduler", "`generator`"]),
        (DDPMScheduler(variance_type="learned_range"), ["DDPMScheduler", "'learned_range'", "'fixed_small'"]),
        (DDIMScheduler(prediction_type="v_prediction"), ["DDIMScheduler", "'v_prediction'", "'epsilon'"]),
    ],
    ids=["flow", "no generator", "learned variance", "velocity"],
)
def test_schedulers_that_do_not_fit(refused, scheduler, fragments):
    refused.pipe.scheduler = scheduler
    refused(fragments)


def test_a_temperature_that_the_scheduler_does_not_have(refused):
    refused.pipe.scheduler = DDIMScheduler.from_config(refused.pipe.scheduler.config)
    refused(["`temperature`", "1.0 with DDIMScheduler", "got 0.9"], temperature=0.9)


# What the parts of the model do not do


@pytest.mark.parametrize(
    "limit, kwargs, fragments",
    [
        (1, {"num_inference_steps": 15}, ["at most 1 tokens a step", "not 2", "at least 16 steps"]),
        (3, {"num_inference_steps": 5}, ["at most 3 tokens a step", "not 4", "at least 6 steps"]),
        (3, {"num_inference_steps": 6, "token_schedule": "cosine"}, ["not 4", '`token_schedule="constant"`']),
    ],
)
def test_steps_of_more_tokens_than_the_causal_model_predicts(limit, kwargs, fragments):
    transformer = tiny_transformer(backbone="ar", max_tokens_per_step=limit)
    refuse(tiny_pipeline(transformer=transformer, generation_defaults=None), fragments, **kwargs)


def test_a_causal_model_has_no_refreshed_guidance():
    pipe = tiny_pipeline(backbone="ar")
    refuse(pipe, ["`guidance_refresh` has to be 1 for a causal model", "got 2"], guidance_refresh=2)


def test_saved_steps_of_more_tokens_than_the_causal_model_predicts():
    transformer = tiny_transformer(backbone="ar", max_tokens_per_step=1)
    refuse(tiny_pipeline(transformer=transformer), ["at most 1 tokens a step", "at least 16 steps"])


@pytest.mark.parametrize("backbone", ["mar", "ar"])
@pytest.mark.parametrize(
    "head_type, head_kwargs, fragments",
    [
        ("diffusion", {"top_k": 5}, ["guidance_refresh", "got ['top_k']"]),
        ("diffusion", {"guidance_refresh": 0}, ["`guidance_refresh` of the head", "from 1 on", "got 0"]),
        ("diffusion", {"guidance_refresh": 2.0}, ["`guidance_refresh` of the head", "from 1 on", "got 2.0"]),
        ("categorical", {"top_q": 5}, ["top_k and top_p", "got ['top_q']"]),
        ("categorical", {"top_k": 9}, ["`top_k`", "from 1 to 8", "got 9"]),
        ("categorical", {"top_p": 0}, ["`top_p`", "(0, 1]", "got 0"]),
    ],
)
def test_settings_that_the_head_does_not_have(backbone, head_type, head_kwargs, fragments):
    head = {"head_type": head_type} | ({"head_config": {"num_codes": 8}} if head_type == "categorical" else {})
    pipe = tiny_pipeline(transformer=tiny_transformer(backbone=backbone, **head))
    refuse(pipe, fragments, head_kwargs=head_kwargs)


# Construction


def test_a_tokenizer_that_does_not_fit():
    vae = ImageTokenizer(ImageTokenizerConfig(patch_size=4))
    with pytest.raises(ValueError, match="`vae` makes tokens of 48 numbers, but `transformer` takes 12"):
        tiny_pipeline(vae, transformer=tiny_transformer(token_dim=12))


def test_unknown_defaults():
    with pytest.raises(ValueError, match="`generation_defaults`.*'num_inference_steps'.*got 'steps'"):
        tiny_pipeline(generation_defaults={"steps": 3})


@pytest.mark.parametrize("number", [3, -1])
def test_names_of_classes_that_do_not_exist(number):
    with pytest.raises(ValueError, match=rf"`id2label`.*0\.\.2.*got \[{number}\]"):
        tiny_pipeline(id2label={0: "heart", number: "dog"})
