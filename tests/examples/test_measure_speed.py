# SPDX-License-Identifier: Apache-2.0
"""The measurement of faster settings end to end: rounds, going on, the curve, what it refuses."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from common import seeded
from mar_hf import MARPipeline, TokenDDPMScheduler, demo_checkpoint
from mar_hf.evaluation import image_generator, texts
from mar_hf.generation import settings_for_budget
from snippets import ROOT
from tiny_pipelines import NAMES, tiny_pipeline, tiny_transformer
from tiny_texts import TEXT, tiny_text_encoder, tiny_text_tokenizer, write_people


sys.path.insert(0, str(ROOT / "examples"))
import measure_speed  # noqa: E402


SETTINGS = {
    "defaults": {},
    "steps 1": {"num_inference_steps": 1},
    "DDIM 2": {"scheduler": "DDIMScheduler", "num_diffusion_steps": 2, "guidance_interval": [0.5, 1.0]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    for number, name in enumerate(NAMES.values()):
        (folder / name).mkdir()
        for index, picture in enumerate(torch.rand(8, 8, 8, 3, generator=seeded(number)) * 255):
            Image.fromarray(picture.byte().numpy()).save(folder / name / f"{index}.png")
    return str(folder)


def write_table(folder, table):
    path = folder / "table.json"
    path.write_text(table if isinstance(table, str) else json.dumps(table), encoding="utf-8")
    return str(path)


def arguments(real, model, folder, table=SETTINGS, **settings):
    settings = {"num_images_per_class": 4, "num_rounds": 2, "batch_size": 8, "features": "pixels", **settings}
    path = write_table(folder, table)
    return measure_speed.Arguments(real, str(folder / "out"), model, table=path, **settings)


def read(folder, name="speed.json"):
    return json.loads((folder / "out" / name).read_text(encoding="utf-8"))


def test_every_setting_is_measured_in_every_round(real, model, tmp_path, capsys):
    measure_speed.main(arguments(real, model, tmp_path, seed=5, classifier=True))
    rounds, report = read(tmp_path, "rounds.json"), read(tmp_path)
    # The second round begins with another setting.
    expected = ["defaults", "steps 1", "DDIM 2", "steps 1", "DDIM 2", "defaults"]
    assert [(result["name"], result["seed"]) for result in rounds] == list(zip(expected, [5, 5, 5, 6, 6, 6]))
    assert (report["metric"], report["num_images"], report["num_rounds"]) == ("fd_pixels", 12, 2)
    assert report["reference"]["num_images"] == 24 and report["versions"]["torch"] == torch.__version__
    points = report["points"]
    assert [point["name"] for point in points] == list(SETTINGS)
    assert (points[0]["scheduler"], points[0]["arguments"], points[0]["speed_up"]) == (None, {}, 1.0)
    assert points[2]["scheduler"] == "DDIMScheduler"
    assert all(0 <= point["metrics"]["classifier_accuracy"] <= 1 for point in points)
    assert points[2]["arguments"] == {"num_diffusion_steps": 2, "guidance_interval": [0.5, 1.0]}
    found = [result["metrics"]["fd_pixels"] for result in rounds if result["name"] == "defaults"]
    assert points[0]["distance"] == pytest.approx(np.mean(found))
    assert 0 < report["spread"] == points[0]["deviation"] == pytest.approx(np.std(found, ddof=1))
    assert settings_for_budget(points, 1e9)["distance"] == min(point["distance"] for point in points)
    assert settings_for_budget(points, 1e9, tolerance=1e9)["seconds"] == min(point["seconds"] for point in points)
    table = (tmp_path / "out" / "speed.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [f"| {name}" for name in SETTINGS]
    assert Image.open(tmp_path / "out" / "speed.png").format == "PNG"
    # A row a setting, a picture a class: 8 pixels become 96.
    assert Image.open(tmp_path / "out" / "samples.png").height == 3 * 100 + 4
    # No name of a folder of this machine.
    assert str(tmp_path) not in json.dumps(report) and model not in json.dumps(report)


def test_it_goes_on_and_may_grow(real, model, tmp_path):
    measure_speed.main(arguments(real, model, tmp_path))
    before, points = read(tmp_path, "rounds.json"), read(tmp_path)["points"]
    measure_speed.main(arguments(real, model, tmp_path))
    assert read(tmp_path, "rounds.json") == before and read(tmp_path)["points"] == points
    # As if it had been stopped in the second round.
    (tmp_path / "out" / "rounds.json").write_text(json.dumps(before[:-1]))
    more = {**SETTINGS, "refresh 2": {"guidance_refresh": 2}}
    measure_speed.main(arguments(real, model, tmp_path, more, num_rounds=3))
    after = read(tmp_path, "rounds.json")
    assert after[:5] == before[:5] and len(after) == 12
    again = next(result for result in after if (result["name"], result["seed"]) == ("defaults", 1))
    assert again["metrics"] == before[-1]["metrics"]
    assert [point["name"] for point in read(tmp_path)["points"]] == list(more)
    with pytest.raises(ValueError, match=r"batch_size 8 \(now 4\)"):
        measure_speed.main(arguments(real, model, tmp_path, batch_size=4))


def test_a_changed_setting_is_measured_anew(real, model, tmp_path):
    measure_speed.main(arguments(real, model, tmp_path))
    before = read(tmp_path)["points"][1]
    changed = {**SETTINGS, "steps 1": {"num_inference_steps": 2}}
    measure_speed.main(arguments(real, model, tmp_path, changed))
    assert len(read(tmp_path, "rounds.json")) == 8
    assert read(tmp_path)["points"][1]["metrics"] != before["metrics"]


def test_a_setting_may_have_a_dtype_of_its_own(real, model, tmp_path):
    measure_speed.main(arguments(real, model, tmp_path, {"defaults": {}, "half": {"dtype": "bfloat16"}}))
    default, half = read(tmp_path)["points"]
    assert (default["dtype"], half["dtype"], half["arguments"]) == (None, "bfloat16", {})
    assert half["metrics"] != default["metrics"]


def test_a_model_without_classes(real, tmp_path):
    tiny_pipeline(transformer=tiny_transformer(num_classes=1), id2label=None).save_pretrained(tmp_path / "model")
    measure_speed.main(arguments(real, str(tmp_path / "model"), tmp_path))
    assert read(tmp_path)["num_images"] == 4


def test_a_model_of_texts(real, tmp_path):
    people, settings = write_people(tmp_path), {"num_images_per_class": 2}
    pipe = tiny_pipeline(transformer=tiny_transformer(**TEXT, num_classes=0), id2label=None)
    pipe.save_pretrained(tmp_path / "model")
    model, table = str(tmp_path / "model"), {"defaults": {}, "steps 1": {"num_inference_steps": 1}}
    with pytest.raises(ValueError, match="knows no classes, only texts"):
        measure_speed.main(arguments(real, model, tmp_path, table, **settings))
    settings["captions"] = str(people)
    with pytest.raises(ValueError, match="no text encoder"):
        measure_speed.main(arguments(real, model, tmp_path, table, **settings))
    for part in (tiny_text_encoder(), tiny_text_tokenizer()):
        part.save_pretrained(tmp_path / "encoder")
    settings["pretrained_text_encoder"] = str(tmp_path / "encoder")
    measure_speed.main(arguments(real, model, tmp_path, table, **settings))
    report, rounds = read(tmp_path), read(tmp_path, "rounds.json")
    assert (report["num_images"], [point["name"] for point in report["points"]]) == (4, list(table))
    # The same pictures, judged by the script that is made for it.
    rows = texts.read_rows(people / "test")
    candidates = texts.read_candidates([*rows, *texts.read_rows(people / "train")], 8)
    pipe.register_modules(text_encoder=tiny_text_encoder().eval(), tokenizer=tiny_text_tokenizer())
    jobs = [(row["text"][0], number) for row in rows for number in range(2)]
    generators = [image_generator(0, *job) for job in jobs]
    pictures = pipe(prompt=[caption for caption, _ in jobs], generator=generators).images
    found = measure_speed.make_pictures(pipe, {}, jobs, seed=0).permute(0, 2, 3, 1).numpy()
    assert (found == np.stack([np.asarray(picture) for picture in pictures])).all()
    asked = [row for row in rows for _ in range(2)]
    found = texts.nearest(texts.read_pixels(pictures, 8), asked, candidates)
    expected = texts.shares(found, asked)["both"]
    assert rounds[0]["metrics"]["texts_right"] == expected and 0 < expected < 1


def test_captions_are_not_for_models_of_classes(real, model, tmp_path):
    with pytest.raises(ValueError, match="`captions` '.*' are for models of texts"):
        measure_speed.main(arguments(real, model, tmp_path, captions=real))


def test_the_model_in_the_package_takes_the_tables(tmp_path):
    pipe = MARPipeline.from_pretrained(demo_checkpoint())
    table = measure_speed.read_table(str(measure_speed.TABLE), pipe)
    assert next(iter(table.values())) == {} and len(table) > 20
    precision = json.loads(measure_speed.TABLE.with_name("precision.json").read_text(encoding="utf-8"))
    assert precision.pop("int8 weights") == {"dtype": "int8"}  # torchao may not be there
    path = tmp_path / "precision.json"
    path.write_text(json.dumps(precision), encoding="utf-8")
    assert measure_speed.read_table(str(path), pipe) == precision
    assert isinstance(pipe.scheduler, TokenDDPMScheduler) and pipe.dtype == torch.float32


@pytest.mark.parametrize(
    "table, message",
    [
        ("{", "`table` .* can't be read"),
        ([], "JSON object of objects"),
        ({"defaults": 1}, "JSON object of objects"),
        ({}, "begin with the setting of the defaults"),
        ({"fast": {"num_inference_steps": 1}}, "begin with the setting of the defaults"),
        (
            {"defaults": {}, "fast": {"num_inference_steps": 99}},
            r"'fast': `num_inference_steps` has to lie in 1\.\.16",
        ),
        ({"defaults": {}, "fast": {"speed": 2}}, r"'fast': unknown settings \['speed'\]"),
        (
            {"defaults": {}, "fast": {"scheduler": "Fast"}},
            "'fast': `scheduler` has to be one of diffusers.*got 'Fast'",
        ),
        ({"defaults": {}, "fast": {"scheduler": "UniPCMultistepScheduler"}}, "'fast': UniPCMultistepScheduler"),
        ({"defaults": {}, "fast": {"dtype": "int7"}}, "'fast': `dtype` has to be one of .*'int8'.*got 'int7'"),
        ({"defaults": {}, "fast": {"dtype": ["int8"]}}, r"'fast': `dtype` has to be one of .*got \['int8'\]"),
    ],
)
def test_tables_that_can_not_be_measured(real, model, tmp_path, table, message):
    with pytest.raises(ValueError, match=message):
        measure_speed.main(arguments(real, model, tmp_path, table))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_rounds": 1}, "`num_rounds` has to be at least 2, got 1"),
        ({"batch_size": 0}, "`batch_size` has to be at least 1, got 0"),
        ({"num_images_per_class": 0}, "`num_images_per_class` has to be at least 1, got 0"),
        ({"num_images_per_class": 1}, "`num_images_per_class` 1 makes 3 pictures, fewer than 4"),
    ],
)
def test_arguments_that_can_not_be_used(real, model, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        measure_speed.main(arguments(real, model, tmp_path, **settings))
    assert not (tmp_path / "out").exists()
