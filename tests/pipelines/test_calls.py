# SPDX-License-Identifier: Apache-2.0
"""A call keeps its state to itself: threads, calls in callbacks, training mode; parts added from outside."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from mar_hf import TOKEN_HEADS, MARForImageGeneration, MARPipeline, TokenDDPMScheduler
from mar_hf.generation import GENERATION_ORDERS, TOKEN_SCHEDULES
from mar_hf.heads import DiffusionHead
from tiny_pipelines import NAMES, seeds, tiny_pipeline, tiny_text_pipeline, tiny_transformer


SAMPLERS = [TokenDDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler]


def latents(pipe, class_labels=1, **kwargs):
    return pipe(class_labels, output_type="latent", **kwargs).images


@pytest.fixture
def warnings(caplog):
    """The pipeline's own warnings."""
    caplog.set_level(logging.WARNING, logger="mar_hf.pipelines.pipeline_mar")
    return caplog


# Threads, and calls inside calls


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("backbone", ["mar", "ar"])
def test_threads_with_different_settings_do_not_meet(backbone, sampler):
    pipe = tiny_pipeline(backbone=backbone)
    pipe.scheduler = sampler.from_config(pipe.scheduler.config)
    jobs = [
        {
            "guidance_scale": 1.0 + number % 3,
            "num_diffusion_steps": 3 + number % 4,
            "num_inference_steps": 2 + number % 5,
        }
        for number in range(8)
    ]
    expected = [latents(pipe, generator=seeds(number), **job) for number, job in enumerate(jobs)]
    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            tasks = [pool.submit(latents, pipe, generator=seeds(n), **job) for n, job in enumerate(jobs)]
            found = [task.result() for task in tasks]
        assert [number for number in range(8) if not torch.equal(found[number], expected[number])] == []


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_pipeline_may_be_called_from_its_own_callback(sampler):
    pipe = tiny_pipeline()
    pipe.scheduler = sampler.from_config(pipe.scheduler.config)
    settings = {"guidance_scale": 3.0, "guidance_schedule": "constant", "num_diffusion_steps": 4}
    inner = {"guidance_scale": 1.0, "num_diffusion_steps": 7, "num_inference_steps": 5}
    alone, expected = latents(pipe, 2, generator=seeds(1), **inner), latents(pipe, generator=seeds(0), **settings)
    inside = []

    def callback(running, step, done, tensors):
        inside.append(latents(pipe, 2, generator=seeds(1), **inner))
        assert pipe.guidance_scale == running.guidance_scale == 3.0 and pipe.num_timesteps == 3

    found = latents(pipe, generator=seeds(0), callback_on_step_end=callback, **settings)
    assert torch.equal(found, expected) and pipe.guidance_scale == 3.0
    assert len(inside) == 3 and all(torch.equal(one, alone) for one in inside)


def test_a_call_inside_may_be_interrupted_alone():
    pipe, steps = tiny_pipeline(), []

    def stop(running, step, done, tensors):
        running._interrupt = True

    def callback(running, step, done, tensors):
        latents(pipe, callback_on_step_end=stop)
        steps.append((step, pipe.interrupt))

    latents(pipe, callback_on_step_end=callback)
    assert steps == [(0, False), (1, False), (2, False)]


def test_an_error_in_a_call_leaves_no_call_behind():
    pipe = tiny_pipeline()

    def callback(running, step, done, tensors):
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        latents(pipe, callback_on_step_end=callback, guidance_scale=5.0)
    assert pipe._calls == {}
    latents(pipe, guidance_scale=2.0)
    assert pipe.guidance_scale == 2.0


def test_the_pipelines_scheduler_stays_as_it_is():
    for sampler in SAMPLERS:
        pipe = tiny_pipeline()
        pipe.scheduler = sampler.from_config(pipe.scheduler.config)
        before = {name: repr(value) for name, value in vars(pipe.scheduler).items()}
        latents(pipe)
        assert {name: repr(value) for name, value in vars(pipe.scheduler).items()} == before


# Dropout


@pytest.mark.parametrize("texts", [False, True])
def test_sampling_has_no_dropout_and_leaves_training_mode_alone(texts):
    pipe = tiny_text_pipeline() if texts else tiny_pipeline()
    subject = {"prompt": "a red heart"} if texts else {"class_labels": 1}
    expected = pipe(**subject, generator=seeds(0), output_type="latent").images
    parts = [pipe.transformer, pipe.vae, *([pipe.text_encoder] if texts else [])]
    pipe.transformer.train()
    pipe.transformer.head.eval()  # as somebody has it who trains the rest
    for part in parts[1:]:
        part.train()
    before = [[module.training for module in part.modules()] for part in parts]
    assert torch.equal(pipe(**subject, generator=seeds(0), output_type="latent").images, expected)
    assert [[module.training for module in part.modules()] for part in parts] == before

    def callback(running, step, done, tensors):
        raise KeyError("stop")

    with pytest.raises(KeyError):
        pipe(**subject, callback_on_step_end=callback)
    assert [[module.training for module in part.modules()] for part in parts] == before


def test_a_model_that_was_never_trained_samples_alike_twice():
    transformer = tiny_transformer()
    fresh = MARForImageGeneration(transformer.config)
    fresh.load_state_dict(transformer.state_dict())
    assert fresh.training
    pipe = tiny_pipeline(transformer=fresh)
    assert torch.equal(latents(pipe, generator=seeds(0)), latents(pipe, generator=seeds(0)))
    assert fresh.training


# Quantised layers


@pytest.mark.parametrize("backbone", ["mar", "ar"])
def test_linear_layers_are_given_what_quantised_ones_know(backbone):
    """At most three dimensions: with more, those of bitsandbytes in 8 bits fail."""
    pipe, dimensions = tiny_text_pipeline(backbone=backbone), set()
    for part in pipe.transformer.modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_pre_hook(lambda module, inputs: dimensions.add(inputs[0].ndim))
    pipe(1, prompt="a red heart", guidance_scale=3.0)
    assert dimensions and max(dimensions) <= 3


# Names of classes


def test_an_exact_name_goes_before_an_alias():
    pipe = tiny_pipeline(id2label={0: "apple, pear", 1: "pear", 2: "plum, apple"})
    assert pipe.labels["pear"] == 1 and pipe.labels["apple, pear"] == 0 and pipe.labels["apple"] == 0
    assert torch.equal(latents(pipe, "pear", generator=seeds(0)), latents(pipe, 1, generator=seeds(0)))


@pytest.mark.parametrize(
    "id2label, message",
    [
        ({1.5: "x"}, "whole numbers as keys, got 1.5"),
        ({True: "y"}, "whole numbers as keys, got True"),
        ({"one": "y"}, "whole numbers as keys, got 'one'"),
        ({None: "y"}, "whole numbers as keys, got None"),
        ({0: None}, "name class 0 by a text, got None"),
        ({0: 7}, "name class 0 by a text, got 7"),
        ({0: ["a"]}, r"name class 0 by a text, got \['a'\]"),
        ({0: "a", "0": "b"}, "names class 0 twice: 'a' and 'b'"),
        (["a", "b"], "a dict of names by class number"),
        ("ab", "a dict of names by class number"),
    ],
)
def test_names_that_are_none(id2label, message):
    with pytest.raises(ValueError, match=f"^`id2label` .*{message}"):
        tiny_pipeline(id2label=id2label)


def test_components_alone_lose_names_and_defaults_and_say_so(warnings):
    pipe = tiny_pipeline()
    again = MARPipeline.from_pipe(pipe)
    assert again.labels == pipe.labels and again.generation_defaults == pipe.generation_defaults
    parts = {"id2label": pipe.config.id2label, "generation_defaults": pipe.config.generation_defaults}
    MARPipeline(**pipe.components, **parts)
    assert warnings.records == []
    MARPipeline(**pipe.components, id2label=NAMES)
    (record,) = warnings.records
    assert "['generation_defaults']" in record.message and "from_pipe" in record.message
    warnings.clear()
    MARPipeline(**pipe.components, **parts)
    MARPipeline(**pipe.components)
    assert "['id2label', 'generation_defaults']" in warnings.records[-1].message


# Numbers that are none, and too large ones


def test_a_decoder_that_gives_no_numbers_is_reported(warnings):
    from tiny_pipelines import tiny_kl

    pipe = tiny_pipeline(tiny_kl())
    with torch.no_grad():
        pipe.vae.autoencoder.decoder.conv_out.bias.fill_(float("nan"))
    pipe(1, generator=seeds(0))
    (record,) = warnings.records
    assert "decoder gave numbers that are not finite" in record.message and "float32" in record.message


@pytest.mark.parametrize("count", [0, -1, 2.0, "2", True, None, [1], 2**63, 10_001])
def test_numbers_of_pictures(count):
    with pytest.raises(ValueError, match="`num_images_per_prompt`"):
        tiny_pipeline()(1, num_images_per_prompt=count)


def test_guidance_against_what_was_never_trained_is_warned_of(warnings):
    pipe = tiny_pipeline(transformer=tiny_transformer(class_dropout_prob=0.0))
    pipe(1, guidance_scale=1.0)
    pipe(None, guidance_scale=3.0)  # without a class there is no guidance
    assert warnings.records == []
    pipe(1, guidance_scale=3.0)
    (record,) = warnings.records
    assert "`guidance_scale` 3.0" in record.message and "`class_dropout_prob` 0" in record.message


def test_a_class_that_may_not_have_been_trained_is_warned_of(warnings):
    pipe = tiny_pipeline(transformer=tiny_transformer(num_classes=1), id2label=None)
    pipe()
    assert warnings.records == []
    pipe(0)
    (record,) = warnings.records
    assert "`class_labels`" in record.message and "trained without any classes" in record.message


# Callbacks


@pytest.mark.parametrize("callback", [5, "print", [print]])
def test_callbacks_that_are_none(callback):
    with pytest.raises(ValueError, match="`callback_on_step_end` has to be a function, got"):
        tiny_pipeline()(1, callback_on_step_end=callback)


@pytest.mark.parametrize(
    "returned, message",
    [
        (5, "has to return a dict or None, got 5"),
        ([], r"has to return a dict or None, got \[\]"),
        ({"latents": 5}, r"`latents` of .* shape \(1, 3, 8, 8\), got int"),
        ({"latents": torch.zeros(1, 3, 8, 4)}, r"`latents` of .* shape \(1, 3, 8, 8\), got \(1, 3, 8, 4\)"),
    ],
)
def test_callbacks_that_return_something_else(returned, message):
    with pytest.raises(ValueError, match=f"`callback_on_step_end`.*{message}|{message}"):
        tiny_pipeline()(1, callback_on_step_end=lambda *inputs: returned)


@pytest.mark.parametrize("names", [5, "latents", None, [5], {"latents"}])
def test_names_for_callbacks(names):
    with pytest.raises(ValueError, match=r"`callback_on_step_end_tensor_inputs` has to be in \['latents', 'mask'\]"):
        tiny_pipeline()(1, callback_on_step_end_tensor_inputs=names)


# Defaults of the checkpoint


@pytest.mark.parametrize(
    "saved",
    [
        {"temperature": "x"},
        {"num_inference_steps": 0},
        {"guidance_scale": None},
        {"head_kwargs": 3},
        {"speed": 1},
        [],
        5,
    ],
    ids=repr,
)
def test_wrong_defaults_are_refused_when_a_pipeline_is_built(saved):
    with pytest.raises(ValueError, match="`generation_defaults`"):
        tiny_pipeline(generation_defaults=saved)


def test_wrong_defaults_are_refused_when_a_checkpoint_is_loaded(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace('"num_diffusion_steps": 4', '"num_diffusion_steps": "four"'))
    with pytest.raises(ValueError, match="`generation_defaults` of the pipeline: `num_diffusion_steps`.*got 'four'"):
        MARPipeline.from_pretrained(tmp_path)


def test_a_default_that_does_not_fit_the_model_is_called_a_default():
    pipe = tiny_pipeline(generation_defaults={"num_inference_steps": 99, "num_diffusion_steps": 2})
    with pytest.raises(ValueError, match=r"`generation_defaults` of .*: `num_inference_steps`.* 1\.\.16, got 99"):
        pipe(1)
    pipe(1, num_inference_steps=3)
    with pytest.raises(ValueError, match=r"^`num_inference_steps` has to lie in 1\.\.16 \(the tokens\), got 17"):
        pipe(1, num_inference_steps=17)
    with pytest.raises(ValueError, match=r"have to be in .*'temperature'.*got \['speed'\]"):
        pipe.settings_for(speed=1)


def test_defaults_that_are_registered_later_count_and_are_checked():
    pipe = tiny_pipeline()
    pipe.register_to_config(generation_defaults={"num_inference_steps": 5, "num_diffusion_steps": 2})
    latents(pipe)
    assert pipe.num_timesteps == 5
    pipe.register_to_config(generation_defaults={"temperature": -1})
    with pytest.raises(ValueError, match="`generation_defaults` of the pipeline: `temperature`"):
        latents(pipe)


# Parts from outside: one function and one line, or one class and one line


def columns_order(grid_height, grid_width, generator=None, progress=1.0):
    return torch.arange(grid_height * grid_width).view(grid_height, grid_width).T.flatten()


def halves(num_tokens, num_inference_steps):
    counts = []
    for left in range(num_inference_steps - 1, -1, -1):
        counts.append(max(1, min((num_tokens - sum(counts)) // 2, num_tokens - sum(counts) - left)) if left else 0)
    return [*counts[:-1], num_tokens - sum(counts)]


class ShrinkingHead(DiffusionHead):
    """A toy: samples of the diffusion head, half as large."""

    def draw(self, **inputs):
        return super().draw(**inputs) / 2


@pytest.fixture
def additions(monkeypatch):
    """A toy order, a toy schedule and a toy head, each a line in its table."""
    monkeypatch.setitem(GENERATION_ORDERS, "columns", columns_order)
    monkeypatch.setitem(TOKEN_SCHEDULES, "halves", halves)
    monkeypatch.setitem(TOKEN_HEADS, "shrinking", ShrinkingHead)


@pytest.mark.parametrize("backbone", ["mar", "ar"])
def test_parts_from_outside_need_one_line_each(additions, backbone, tmp_path):
    transformer = tiny_transformer(backbone=backbone, head_type="shrinking", order="columns")
    defaults = {"num_inference_steps": 4, "num_diffusion_steps": 3, "token_schedule": "halves"}
    pipe, seen = tiny_pipeline(transformer=transformer, generation_defaults=defaults), []
    assert pipe.generation_defaults["generation_order"] == "columns"

    def callback(running, step, done, tensors):
        seen.append((done, tensors["mask"][0].logical_not().nonzero()[:, 0].tolist()))

    settings = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["mask"]}
    found = latents(pipe, generator=seeds(0), **settings)
    assert [done for done, _ in seen] == [8, 12, 14, 16]
    assert all(sorted(columns_order(4, 4)[:done].tolist()) == there for done, there in seen)
    plain = tiny_transformer(backbone=backbone, order="columns")
    plain.load_state_dict(transformer.state_dict())
    other = latents(tiny_pipeline(transformer=plain, generation_defaults=defaults), generator=seeds(0))
    first = pipe.vae.patchify(found)[0, columns_order(4, 4)[:8]]
    torch.testing.assert_close(first, pipe.vae.patchify(other)[0, columns_order(4, 4)[:8]] / 2)
    # What is saved names them, and is the same again.
    pipe.save_pretrained(tmp_path)
    again = MARPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.transformer.head, ShrinkingHead)
    assert torch.equal(latents(again, generator=seeds(0)), found)
    # A training step by configuration alone.
    model = again.transformer.train()
    tokens = torch.randn(2, 16, 12, generator=torch.Generator().manual_seed(0))
    inputs = {"noise_scheduler": again.scheduler, "generator": torch.Generator().manual_seed(0)}
    model(tokens, class_labels=torch.tensor([0, 1]), **inputs).loss.backward()
    assert all(parameter.grad is not None for parameter in model.head.parameters())


def test_names_of_the_toys_are_gone_again():
    assert "columns" not in GENERATION_ORDERS and "shrinking" not in TOKEN_HEADS and NAMES[0] == "heart"
