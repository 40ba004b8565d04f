# SPDX-License-Identifier: Apache-2.0
"""Many pictures as a library: folders of classes, schedulers, generators, what is refused. See also
tests/examples/test_generate.py: the same by several processes, and after stops."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from mar_hf.evaluation import generate as make
from mar_hf.evaluation import sampling
from mar_hf.evaluation.sampling import image_generator
from tiny_pipelines import tiny_pipeline, tiny_text_pipeline, tiny_transformer


FEW = {"num_images_per_class": 1, "num_inference_steps": 1, "num_diffusion_steps": 1}


@pytest.mark.parametrize(
    "names",
    [
        {0: "a", 1: "a 0", 2: "a"},
        {0: "..", 1: "", 2: "../../outside"},
        {0: "/tmp/x", 1: "nul\x00byte", 2: "n" * 300},
        {0: "cat", 1: "CAT", 2: "cat."},
        {0: "settings.json", 1: "train", 2: "\ud800"},
    ],
)
def test_every_picture_is_there_whatever_the_classes_are_called(names, tmp_path):
    pipe = tiny_pipeline(id2label=names)
    settings = {"num_images_per_class": 2, "num_inference_steps": 1, "num_diffusion_steps": 1, "npz": True}
    note = make(pipe, tmp_path / "in" / "out", **settings)
    # The folder, and nothing beside it.
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["out"]
    assert len(set(note["classes"])) == 3
    for label, folder in enumerate(note["classes"]):
        for number in range(2):
            saved = np.asarray(Image.open(tmp_path / "in" / "out" / folder / f"{number:05d}.png")).astype(int)
            generator = image_generator(0, label, number)
            steps = {"num_inference_steps": 1, "num_diffusion_steps": 1}
            expected = pipe(class_labels=label, generator=generator, **steps).images[0]
            assert np.abs(saved - np.asarray(expected)).max() <= 1
    assert len(list((tmp_path / "in" / "out").rglob("*.png"))) == 6
    with np.load(tmp_path / "in" / "out" / "samples.npz") as arrays:
        assert arrays["arr_1"].tolist() == [0, 0, 1, 1, 2, 2]
    # Again: all of it is found.
    assert make(pipe, tmp_path / "in" / "out", **settings) == note


def test_classes_by_number_and_name(tmp_path):
    note = make(tiny_pipeline(), tmp_path, class_labels=[2, "heart"], seed=3, note={"who": "me"}, **FEW)
    assert note["classes"] == ["clock", "heart"] and note["who"] == "me" and note["dtype"] == "float32"
    assert {path.name for path in tmp_path.iterdir()} == {"clock", "heart", "settings.json"}


def test_a_decoding_is_noted_by_its_parts(tmp_path):
    note = make(tiny_pipeline(), tmp_path, decoding="gtr", generation_order="halton", **FEW)
    parts = ("generation_order", "token_schedule", "head_step_schedule", "detail_share")
    assert [note[name] for name in parts] == ["halton", "gtr", "gtr", 0.1] and "decoding" not in note


def test_a_full_disk_leaves_no_part_of_a_picture(tmp_path, monkeypatch):
    def full(image, path, *args, **settings):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(OSError, match="No space left"):
            make(tiny_pipeline(), tmp_path, **FEW)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "settings.json"]
    make(tiny_pipeline(), tmp_path, **FEW)
    assert len(list(tmp_path.rglob("*.png"))) == 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_images_per_class": 0}, "`num_images_per_class` has to be at least 1, got 0"),
        ({"batch_size": -1}, "`batch_size` has to be at least 1, got -1"),
        ({"class_labels": [3]}, r"`class_labels` has to lie in 0\.\.2, got \[3\]"),
        ({"class_labels": [-1]}, r"`class_labels` has to lie in 0\.\.2, got \[-1\]"),
        ({"class_labels": ["dog"]}, "`class_labels`: 'dog' is unknown; known are heart"),
        ({"speed": 2}, r"unknown settings \['speed'\]; known are"),
        ({"temperature": -1.0}, "`temperature`"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tiny_pipeline(), tmp_path / "out", **settings)
    assert list(tmp_path.iterdir()) == []


def test_models_of_texts_have_no_folders(tmp_path):
    with pytest.raises(ValueError, match="knows no classes, only texts"):
        make(tiny_text_pipeline(config={"num_classes": 0}, id2label=None), tmp_path)


def test_schedulers_of_diffusers():
    pipe = tiny_pipeline()
    sampling.use_scheduler(pipe, "DDIMScheduler")
    assert isinstance(pipe.scheduler, DDIMScheduler)
    for name in ("DDIM", "NoSuchScheduler", "SchedulerMixin"):
        with pytest.raises(ValueError, match=f"`scheduler` has to be one of diffusers.*got '{name}'"):
            sampling.use_scheduler(pipe, name)


def test_generators_depend_on_seed_class_and_number_alone():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, "a heart", 0)]
    draws = {key: torch.rand(4, generator=image_generator(*key)) for key in keys}
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == len(keys)
    assert torch.equal(draws[0, 1, 0], torch.rand(4, generator=image_generator(0, 1, 0)))


def test_subjects_are_classes_texts_or_neither():
    assert sampling.subjects_of(tiny_pipeline(), [2, 0]) == {"class_labels": [2, 0]}
    assert sampling.subjects_of(tiny_pipeline(), ["a heart"]) == {"prompt": ["a heart"]}
    without = tiny_pipeline(transformer=tiny_transformer(num_classes=1), id2label=None)
    assert sampling.subjects_of(without, [0, 0]) == {"num_images_per_prompt": 2}


def test_a_text_encoder_is_needed_for_texts():
    pipe = tiny_text_pipeline()
    sampling.use_text_encoder(pipe, None)
    pipe.register_modules(text_encoder=None)
    with pytest.raises(ValueError, match="no text encoder: give one with `pretrained_text_encoder`"):
        sampling.use_text_encoder(pipe, None)


def test_other_weights_have_another_digest():
    other = tiny_pipeline(transformer=tiny_transformer(seed=1))
    assert sampling.weights_digest(other) != sampling.weights_digest(tiny_pipeline())
    assert sampling.weights_digest(tiny_pipeline()) == sampling.weights_digest(tiny_pipeline())


def test_a_pipeline_in_half_precision(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    pipe = sampling.load_pipeline(str(tmp_path), dtype="bfloat16")
    assert pipe.dtype == pipe.vae.dtype == torch.bfloat16 and sampling.picture_size(pipe) == 8
    with pytest.raises(ValueError, match="`dtype` has to be one of .*got 'int4'"):
        sampling.load_pipeline(str(tmp_path), dtype="int4")
