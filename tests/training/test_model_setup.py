# SPDX-License-Identifier: Apache-2.0
"""Sizes, parameter groups and defaults that follow from data and settings."""

import json

import pytest
import torch
from datasets import Dataset, Features, Image, Value

from example_runs import SIZES
from mar_hf import TOKEN_HEADS, ImageTokenizer, ImageTokenizerConfig, TokenDDPMScheduler
from mar_hf.generation import DECODINGS
from mar_hf.training import TrainingArguments
from mar_hf.training.model_setup import (
    build_generation_defaults,
    build_model,
    build_noise_scheduler,
    check_model_config,
    count_classes,
    least_label,
    load_data,
    parameter_groups,
    picture_channels,
    pixel_tokenizer,
)
from tiny_pipelines import tiny_pipeline


def arguments(**settings):
    settings = {"resolution": 8, "patch_size": 2, "model_config": json.dumps(SIZES), **settings}
    return TrainingArguments("out", **settings)


def model(names=("a", "b"), **settings):
    tokenizer = ImageTokenizer(ImageTokenizerConfig(patch_size=2))
    config = json.dumps({**SIZES, **settings})
    return build_model(arguments(model_config=config), tokenizer, None if names is None else list(names))


def test_sizes_follow_from_the_data():
    config = model().config
    assert (config.grid_height, config.grid_width, config.token_dim, config.num_classes) == (4, 4, 12, 2)
    assert count_classes(None, {}) == 1 and count_classes(None, {"text_dim": 8}) == 0


def test_pixels_get_zero_mean_and_unit_deviation():
    class Pictures(torch.utils.data.Dataset):
        pictures = torch.rand(9, 3, 8, 8) * torch.tensor([0.2, 1.0, 2.0])[:, None, None]

        def __len__(self):
            return 9

        def __getitems__(self, indices):
            return [{"pixel_values": self.pictures[index]} for index in indices]

    tokens = pixel_tokenizer(Pictures(), 2).encode(Pictures.pictures).latents.transpose(0, 1).flatten(1)
    assert tokens.mean(1).abs().max() < 1e-4 and (tokens.std(1, unbiased=False) - 1).abs().max() < 1e-4
    Pictures.pictures = torch.ones(9, 3, 8, 8)
    with pytest.raises(ValueError, match="a constant one can't be scaled"):
        pixel_tokenizer(Pictures(), 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hiden_size": 3}, r"`model_config` has the unknown settings \['hiden_size'\]; known are \["),
        ({"hidden_size": "x"}, "`model_config` has a value of a wrong type: .*hidden_size"),
        ({"preset": "enormous"}, "`preset` has to be one of .* got 'enormous'"),
        ({"model_type": "bert"}, "`model_type` has to be one of"),
    ],
)
def test_what_no_model_can_be_is_refused_before_the_data(settings, message):
    with pytest.raises(ValueError, match=message):
        check_model_config(arguments(model_config=json.dumps({**SIZES, **settings})))


def test_pictures_have_the_channels_of_the_tokenizer(tmp_path):
    data = {"train_data_dir": str(tmp_path)}
    assert picture_channels(arguments(**data)) == 3 and picture_channels(arguments(**data, image_channels=1)) == 1
    ImageTokenizer(ImageTokenizerConfig(in_channels=4)).save_pretrained(tmp_path / "own")
    source = {**data, "pretrained_tokenizer": str(tmp_path / "own")}
    assert picture_channels(arguments(**source)) == picture_channels(arguments(**source, image_channels=4)) == 4
    with pytest.raises(ValueError, match="`image_channels` 1 has to be that of the image tokenizer: 4"):
        picture_channels(arguments(**source, image_channels=1))


def test_the_first_class_that_is_trained_has_pictures(tmp_path):
    picture = {"bytes": b"", "path": None}
    rows = {"image": [picture] * 4, "label": [3, 2, 3, 3]}
    Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("int64")})).to_parquet(
        str(tmp_path / "pictures.parquet")
    )
    with pytest.warns(UserWarning, match="classes without pictures"):
        dataset, names = load_data(arguments(train_data_dir=str(tmp_path)), str(tmp_path), captions=False)
    assert names == ["0", "1", "2", "3"] and least_label(dataset) == 2


def test_vectors_and_the_head_are_not_decayed():
    backbone = model()
    decayed, plain = parameter_groups(backbone, 0.02)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.02, 0.0)
    found = {id(parameter) for parameter in decayed["params"]}
    named = dict(backbone.named_parameters())
    assert len(decayed["params"]) + len(plain["params"]) == len(named)
    for name, parameter in named.items():
        assert (id(parameter) in found) == (parameter.ndim > 1 and "head." not in name), name


@pytest.mark.parametrize(
    ("names", "settings", "guidance"),
    [(["a", "b"], {}, 3.0), (["a", "b"], {"class_dropout_prob": 0.0}, 1.0), (None, {}, 1.0)],
)
def test_guidance_is_a_default_only_where_it_was_trained_for(names, settings, guidance):
    backbone = model(names, **settings)
    defaults = build_generation_defaults(arguments(), backbone, names)
    assert defaults == {"num_inference_steps": 16, "num_diffusion_steps": 50, "guidance_scale": guidance}
    steps = build_generation_defaults(arguments(generation_defaults='{"num_inference_steps": 2}'), backbone, names)
    assert steps.get("guidance_scale", 3.0) == guidance  # 3 is what it is where nothing is said
    asked = arguments(generation_defaults='{"guidance_scale": 2.0}')
    if guidance == 1.0:
        with pytest.warns(UserWarning, match=r"`guidance_scale` 2.0 compares with a model without a class"):
            assert build_generation_defaults(asked, backbone, names) == {"guidance_scale": 2.0}
    else:
        assert build_generation_defaults(asked, backbone, names) == {"guidance_scale": 2.0}


def test_a_decoding_is_saved_as_its_parts_which_go_before_those_of_the_pipeline(tmp_path):
    pipe = tiny_pipeline(generation_defaults={"token_schedule": "cosine", "temperature": 0.9})
    pipe.save_pretrained(tmp_path)
    source = {"pretrained_model_name_or_path": str(tmp_path), "model_config": "{}"}
    args = arguments(**source, generation_defaults='{"decoding": "gtr", "detail_share": 0.2}')
    expected = DECODINGS["gtr"] | {"detail_share": 0.2, "temperature": 0.9}
    assert build_generation_defaults(args, pipe.transformer, ["a"]) == expected


def test_defaults_of_a_pipeline_are_replaced_one_by_one(tmp_path):
    pipe = tiny_pipeline()
    pipe.register_to_config(generation_defaults={"guidance_scale": 2.5, "temperature": 0.9, "num_inference_steps": 3})
    pipe.save_pretrained(tmp_path)
    source = {"pretrained_model_name_or_path": str(tmp_path), "model_config": "{}"}
    given = json.dumps({"num_inference_steps": 2, "temperature": None})
    args, names = arguments(**source, generation_defaults=given), ["a"]
    assert build_generation_defaults(args, pipe.transformer, names) == {
        "guidance_scale": 2.5,
        "num_inference_steps": 2,
    }
    # What the pipeline was trained for, this training without classes does not keep up.
    assert build_generation_defaults(args, pipe.transformer, None)["guidance_scale"] == 1.0
    head = pipe.transformer.head
    assert build_noise_scheduler(args, head).config.max_timestep == pipe.scheduler.config.max_timestep
    assert build_noise_scheduler(arguments(), head).config.max_timestep == 950
    assert build_noise_scheduler(arguments(max_timestep=900), head).config.max_timestep == 900


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A pipeline with a diffusion head, and the folder that it is saved in."""
    folder, pipe = tmp_path_factory.mktemp("trained"), tiny_pipeline()
    pipe.register_to_config(
        generation_defaults={"num_inference_steps": 3, "num_diffusion_steps": 4, "temperature": 0.7}
    )
    pipe.save_pretrained(folder)
    return pipe, str(folder)


@pytest.mark.parametrize("head_type", TOKEN_HEADS)
def test_another_head_keeps_the_backbone(head_type, trained):
    pipe, folder = trained
    args = arguments(pretrained_model_name_or_path=folder, model_config=json.dumps({"head_type": head_type}))
    tuned = build_model(args, pipe.vae, ["heart", "cat, kitten", "clock"])
    found = tuned.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in pipe.transformer.model.state_dict().items())
    head, same = tuned.head, head_type == "diffusion"
    assert type(head) is TOKEN_HEADS[head_type]
    assert torch.equal(head.out_proj.weight, pipe.transformer.head.out_proj.weight) if same else True
    scheduler = build_noise_scheduler(args, head)
    assert type(scheduler) is (head.scheduler_class or type(None))
    # The last timestep of the pipeline's sampler goes on; another kind of sampler starts with its own settings.
    assert not same or scheduler.config.max_timestep == pipe.scheduler.config.max_timestep
    defaults = build_generation_defaults(args, tuned, ["heart", "cat, kitten", "clock"])
    kept = (
        {"num_inference_steps": 3, "num_diffusion_steps": 4, "temperature": 0.7}
        if same
        else {"num_inference_steps": 3}
    )
    assert {name: defaults.get(name) for name in kept} == kept and (same or "temperature" not in defaults)


def test_other_sizes_of_the_same_head_start_anew(trained):
    pipe, folder = trained
    config = {"head_config": {"num_layers": 2, "hidden_size": 24}}
    args = arguments(pretrained_model_name_or_path=folder, model_config=json.dumps(config))
    tuned = build_model(args, pipe.vae, ["heart", "cat, kitten", "clock"])
    assert tuned.config.head_config == config["head_config"] and tuned.head.condition_proj.out_features == 24
    assert torch.equal(tuned.model.token_proj.weight, pipe.transformer.model.token_proj.weight)


@pytest.mark.parametrize("head_type", sorted(TOKEN_HEADS.keys() - {"diffusion"}))
def test_a_last_timestep_is_of_one_sampler(head_type, trained):
    head = build_model(
        arguments(model_config=json.dumps({**SIZES, "head_config": {}, "head_type": head_type})), trained[0].vae, ["a"]
    ).head
    assert not isinstance(build_noise_scheduler(arguments(), head), TokenDDPMScheduler)
    with pytest.raises(ValueError, match="`max_timestep` has to be left out"):
        build_noise_scheduler(arguments(max_timestep=900), head)
