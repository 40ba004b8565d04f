# SPDX-License-Identifier: Apache-2.0
"""Generating into a folder: the same bytes with any number of processes and after any interruption."""

import json
import multiprocessing
import sys
import time

import numpy as np
import pytest
from PIL import Image

from example_runs import forget_accelerate, in_processes
from mar_hf.evaluation import image_generator, use_scheduler, weights_digest
from mar_hf.evaluation.experiments import run_script
from mar_hf.training import ImageTransform, load_image_dataset
from snippets import ROOT
from tiny_pipelines import tiny_pipeline, tiny_transformer


sys.path.insert(0, str(ROOT / "examples"))
import generate  # noqa: E402


CLASSES = ["cat, kitten", "clock", "heart"]
# In the order in which they are made.
FILES = [f"{name}/{number:05d}.png" for name in ("heart", "cat, kitten", "clock") for number in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


def arguments(model, folder, **settings):
    return generate.Arguments(
        model, str(folder), **{"num_images_per_class": 4, "batch_size": 3, "seed": 7, **settings}
    )


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """What one process writes."""
    folder = tmp_path_factory.mktemp("alone")
    generate.main(arguments(model, folder))
    return folder


def test_the_folder_holds_the_pictures_of_the_seed(model, alone):
    assert sorted(contents(alone)) == sorted([*FILES, "settings.json"])
    pipe = tiny_pipeline()
    for label, name in ((0, "heart"), (2, "clock")):
        image = pipe(class_labels=label, generator=image_generator(7, label, 3)).images[0]
        found = np.asarray(Image.open(alone / name / "00003.png")).astype(int)
        assert np.abs(found - np.asarray(image)).max() <= 1
    assert len({data for name, data in contents(alone).items() if name in FILES}) == len(FILES)


def test_the_folder_is_a_data_set(alone):
    dataset = load_image_dataset(str(alone))
    assert dataset.features["label"].names == CLASSES
    assert dataset["label"] == [0] * 4 + [1] * 4 + [2] * 4
    picture = dataset.with_transform(ImageTransform(8))[11]["pixel_values"]
    saved = np.asarray(Image.open(alone / "heart" / "00003.png"))
    assert np.allclose((picture.permute(1, 2, 0).numpy() + 1) * 127.5, saved, atol=1e-3)


def test_three_processes_write_the_same_bytes(model, alone, tmp_path):
    words = ["--pretrained_model_name_or_path", model, "--output_dir", str(tmp_path)]
    words += ["--num_images_per_class", "4", "--batch_size", "3", "--seed", "7"]
    in_processes(3, run_script, ROOT / "examples" / "generate.py", words)
    assert contents(tmp_path) == contents(alone)


def test_killed_and_started_again_it_ends_with_the_same_bytes(model, tmp_path):
    many = {"num_images_per_class": 20, "batch_size": 2}
    generate.main(arguments(model, tmp_path / "whole", **many))
    forget_accelerate()
    killed = arguments(model, tmp_path / "killed", **many)
    process = multiprocessing.get_context("fork").Process(target=generate.main, args=(killed,))
    process.start()
    while process.is_alive() and not len(list((tmp_path / "killed").glob("*/*.png"))) > 2:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert 2 < len(list((tmp_path / "killed").glob("*/*.png"))) < 60
    generate.main(killed)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_only_what_is_missing_is_made_again(model, alone, tmp_path):
    generate.main(arguments(model, tmp_path))
    written = {name: (tmp_path / name).stat().st_mtime_ns for name in FILES}
    (tmp_path / FILES[4]).unlink()  # of the second batch of three
    (tmp_path / FILES[9]).write_bytes((tmp_path / FILES[9]).read_bytes()[:-30])  # of the fourth
    generate.main(arguments(model, tmp_path))
    assert contents(tmp_path) == contents(alone)
    again = [name for name in FILES if (tmp_path / name).stat().st_mtime_ns != written[name]]
    assert again == [*FILES[3:6], *FILES[9:12]]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 8}, r"seed 7 \(now 8\)"),
        ({"guidance_scale": 1.5}, r"guidance_scale 3.0 \(now 1.5\)"),
        ({"class_labels": ["heart"]}, r"classes \['heart', 'cat, kitten', 'clock'\] \(now \['heart'\]\)"),
        ({"dtype": "bfloat16"}, r"dtype 'float32' \(now 'bfloat16'\), weights"),
    ],
)
def test_other_settings_are_refused(model, alone, changes, message):
    before = contents(alone)
    with pytest.raises(ValueError, match=message):
        generate.main(arguments(model, alone, **changes))
    assert contents(alone) == before


def test_other_weights_are_refused(alone, model, tmp_path):
    note = json.loads((alone / "settings.json").read_text())
    other = tiny_pipeline(transformer=tiny_transformer(seed=1))
    assert weights_digest(other) != note["weights"] == weights_digest(tiny_pipeline())


def test_other_peoples_folders_are_refused(model, tmp_path):
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(ValueError, match="holds files, but no settings.json"):
        generate.main(arguments(model, tmp_path))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_images_per_class": 0}, "`num_images_per_class` has to be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` has to be at least 1, got 0"),
        ({"num_inference_steps": 17}, r"`num_inference_steps` has to lie in 1\.\.16"),
        ({"class_labels": ["dog"]}, "'dog' is unknown"),
        ({"guidance_interval": [0.5]}, "`guidance_interval` has to be two numbers"),
        ({"scheduler": "DPM"}, "`scheduler` has to be one of diffusers.*got 'DPM'"),
        ({"class_labels": ["3"]}, r"`class_labels` has to lie in 0\.\.2, got \[3\]"),
    ],
)
def test_bad_settings_leave_nothing_behind(model, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        generate.main(arguments(model, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_settings_reach_the_pipeline(model, tmp_path):
    settings = {"num_inference_steps": 2, "num_diffusion_steps": 3, "guidance_scale": 2.0, "temperature": 0.5}
    settings |= {"guidance_schedule": "constant", "token_schedule": "constant", "generation_order": "raster"}
    generate.main(arguments(model, tmp_path, class_labels=["clock", "0"], npz=True, **settings))
    note = json.loads((tmp_path / "settings.json").read_text())
    assert note["classes"] == ["clock", "heart"] and settings.items() <= note.items()
    expected = tiny_pipeline()(class_labels=2, generator=image_generator(7, 2, 0), **settings).images[0]
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (8, 8, 8, 3) and arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].tolist() == [2] * 4 + [0] * 4
        assert np.abs(arrays["arr_0"][0].astype(int) - np.asarray(expected)).max() <= 1
        saved = np.asarray(Image.open(tmp_path / "heart" / "00001.png"))
        assert np.array_equal(arrays["arr_0"][5], saved)


def test_guidance_in_some_steps_and_schedulers_of_diffusers(model, tmp_path):
    settings = {"guidance_interval": [0.5, 1.0], "guidance_refresh": 2, "guidance_scale": 3.0}
    for _ in range(2):  # the folder knows its own settings again
        generate.main(arguments(model, tmp_path, class_labels=["clock"], scheduler="DDIMScheduler", **settings))
    note = json.loads((tmp_path / "settings.json").read_text())
    assert note["scheduler"] == "DDIMScheduler" and settings.items() <= note.items()
    pipe = tiny_pipeline()
    use_scheduler(pipe, "DDIMScheduler")
    expected = pipe(class_labels=2, generator=image_generator(7, 2, 0), **settings).images[0]
    found = np.asarray(Image.open(tmp_path / "clock" / "00000.png")).astype(int)
    assert np.abs(found - np.asarray(expected)).max() <= 1


def test_a_model_without_classes(tmp_path):
    pipe = tiny_pipeline(transformer=tiny_transformer(num_classes=1), id2label=None)
    pipe.save_pretrained(tmp_path / "model")
    generate.main(arguments(str(tmp_path / "model"), tmp_path / "out", num_images_per_class=2))
    expected = pipe(generator=image_generator(7, 0, 1)).images[0]
    found = np.asarray(Image.open(tmp_path / "out" / "class 0" / "00001.png")).astype(int)
    assert np.abs(found - np.asarray(expected)).max() <= 1


def test_half_precision_runs(model, tmp_path):
    generate.main(arguments(model, tmp_path, num_images_per_class=1, dtype="bfloat16"))
    assert json.loads((tmp_path / "settings.json").read_text())["dtype"] == "bfloat16"
    assert len(list(tmp_path.glob("*/*.png"))) == 3
