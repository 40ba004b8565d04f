# SPDX-License-Identifier: Apache-2.0
"""The example scripts and the benchmark, run with the words of their users, with two steps and a tiny model.

The training commands are those of the two READMEs, with settings behind them that make them small.
"""

import csv
import io
import json
import math
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
from PIL import Image

import mar_hf_command
from example_runs import SIZES, forget_accelerate
from mar_hf import ImageTokenizer, MARPipeline
from mar_hf.evaluation.experiments import run_script
from snippets import ROOT, commands


pytestmark = pytest.mark.slow

CLASSES = ["clock", "face", "heart"]
PER_CLASS = 4
SIZE = 16
TWO_STEPS = ["--resolution", str(SIZE), "--train_batch_size", "4", "--max_train_steps", "2"]
SMALL_MODEL = [
    *("--model_config", json.dumps(SIZES), "--validation_images", "2"),
    *("--generation_defaults", '{"num_inference_steps": 2, "num_diffusion_steps": 2}'),
]
# What a command of the README writes -> what makes that command small. The last of two equal options counts.
EMOJI = ["--npz", "emoji.npz", "--size", str(SIZE), "--classes", *CLASSES]
SMALL = {
    "data/digits": [],
    # The model of the configuration itself.
    "out/digits": [*SMALL_MODEL[2:], "--train_batch_size", "4", "--max_train_steps", "2"],
    "data/emoji": EMOJI,
    "data/emoji_all": EMOJI,
    "out/tokenizer": [
        *TWO_STEPS,
        *("--block_out_channels", "8", "16", "--layers_per_block", "0", "1", "--latent_channels", "4"),
    ],
    "out/mar": [*TWO_STEPS, *SMALL_MODEL],
}
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md"]
LAUNCHERS = ("python", "accelerate")


def run(words, cwd, fails=False):
    """Run the script of a command in this process, and return its output; of one that has to fail, its error."""
    script, *words = map(str, words[2 if words[0] == "accelerate" else 1 :])
    forget_accelerate()
    output, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.chdir(cwd)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("MPLBACKEND", "agg")
        if fails:
            with pytest.raises(SystemExit, match="2"):
                run_script(script, words)
        else:
            run_script(script, words)
    return errors.getvalue() if fails else output.getvalue()


def run_readme(target, cwd):
    """Run the READMEs' command that writes a folder, made small, and return its output."""
    found = {
        tuple(words)
        for page in PAGES
        for words in commands(page)
        if words[0] in LAUNCHERS and words[words.index("--output_dir") + 1 if "--output_dir" in words else 2] == target
    }
    assert len(found) == 1, f"the READMEs should write {target} once, it does {len(found)} times"
    return run([*found.pop(), *SMALL[target]], cwd)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which the README's commands run: beside the examples, with a few emoji instead of the real ones."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "examples").symlink_to(ROOT / "examples")
    names = [*CLASSES, "vehicle"]
    count = PER_CLASS * len(names) + 1
    pictures = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    labels = [index for index in range(len(names)) for _ in range(PER_CLASS)] + [0]
    np.savez(
        folder / "emoji.npz",
        image=pictures,
        label=labels,
        classes=names,
        code=[f"1F{number:03X}" for number in range(count)],
        toned=[False] * (count - 1) + [True],
    )
    return folder


@pytest.fixture(scope="module")
def emoji(workplace):
    """The folder of pictures of `prepare_emoji.py`."""
    assert run_readme("data/emoji", workplace).startswith(f"{PER_CLASS * len(CLASSES)} pictures in ")
    return workplace / "data" / "emoji"


@pytest.fixture(scope="module")
def trained(workplace, emoji):
    """What the README's training commands wrote, and what they printed: (tokenizer, model, output)."""
    out = "".join(run_readme(target, workplace) for target in ("data/emoji_all", "out/tokenizer", "out/mar"))
    return workplace / "out" / "tokenizer", workplace / "out" / "mar", out


def is_picture(image):
    return image.mode == "RGB" and image.size == (SIZE, SIZE)


def last_line(text):
    return text.strip().splitlines()[-1]


def test_prepare_emoji_writes_a_folder_a_class(emoji):
    assert sorted(path.name for path in (emoji / "train").iterdir()) == CLASSES
    pictures = [Image.open(path) for path in sorted((emoji / "train").rglob("*.png"))]
    assert len(pictures) == PER_CLASS * len(CLASSES)
    assert all(is_picture(picture) for picture in pictures)


def test_digits_are_trained_on_as_the_readme_says(workplace):
    assert run_readme("data/digits", workplace).startswith("1797 pictures in ")
    run_readme("out/digits", workplace)
    pipe = MARPipeline.from_pretrained(workplace / "out" / "digits" / "pipeline")
    assert pipe.transformer.config.hidden_size == 128
    assert list(pipe.labels) == [str(digit) for digit in range(10)] and pipe.vae.autoencoder is None
    assert pipe(class_labels=["7"], generator=torch.Generator().manual_seed(0)).images[0].size == (8, 8)


def test_prepare_emoji_keeps_skin_tones_where_asked(workplace):
    words = ["python", "examples/prepare_emoji.py", "tones", "--npz", "emoji.npz", "--skin-tones"]
    assert run(words, workplace).startswith(f"{PER_CLASS * 4 + 1} pictures in ")


def test_train_tokenizer_writes_a_measured_tokenizer(trained, workplace):
    folder, _, out = trained
    tokenizer = ImageTokenizer.from_pretrained(folder)
    assert type(tokenizer.autoencoder).__name__ == "AutoencoderDC"
    assert (tokenizer.stride, tokenizer.token_dim) == (2, 4)
    paths = sorted((workplace / "data" / "emoji_all" / "train").rglob("*.png"))
    pictures = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in paths])
    with torch.no_grad():
        latents = tokenizer.encode(pictures.float() / 127.5 - 1).latents.transpose(0, 1).flatten(1)
    # Its statistics are those of these pictures.
    assert latents.mean(1).abs().max() < 0.02 and (latents.std(1) - 1).abs().max() < 0.02
    assert f"over {len(paths)} training pictures" in out
    assert Image.open(folder / "grid.png").height == 2 * 96


def test_train_writes_a_pipeline_that_makes_pictures(trained):
    _, folder, _ = trained
    pipe = MARPipeline.from_pretrained(folder / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.labels == {name: number for number, name in enumerate(CLASSES)}
    assert pipe.scheduler.config.max_timestep == 950
    assert pipe.generation_defaults["num_inference_steps"] == 2
    generator = torch.Generator().manual_seed(0)
    images = pipe(class_labels=["heart", "clock"], generator=generator).images
    assert len(images) == 2 and all(is_picture(image) for image in images)
    assert np.asarray(images[0]).std() > 0


def test_train_shows_samples_and_the_loss(trained):
    _, folder, _ = trained
    assert [path.name for path in (folder / "samples").iterdir()] == ["step_000002.png"]
    grid = Image.open(folder / "samples" / "step_000002.png")
    assert grid.size == (2 * 64, len(CLASSES) * 64)
    with open(folder / "loss.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2"] and math.isfinite(float(rows[0]["loss"]))
    assert Image.open(folder / "loss.png").format == "PNG"
    card = (folder / "pipeline" / "README.md").read_text(encoding="utf-8")
    assert f"{SIZE} x {SIZE} pixels" in card and all(name in card for name in CLASSES)


def test_the_command_line_draws_what_training_wrote(trained, tmp_path, capsys):
    _, folder, _ = trained
    words = ["generate", str(folder / "pipeline"), "--num-images-per-class", "1"]
    assert mar_hf_command.main([*words, "--output-dir", str(tmp_path / "pictures")]) == 0
    assert "3 pictures in " in capsys.readouterr().out
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 3


def test_train_on_pixels_without_classes(workplace, emoji, tmp_path):
    # With every switch that changes the loop.
    words = ["python", "examples/train.py", "--train_data_dir", emoji / "train" / "face", "--output_dir", tmp_path]
    switches = ["--random_flip", "--random_shift", "1", "--gradient_accumulation_steps", "2"]
    switches += ["--gradient_checkpointing", "--mixed_precision", "bf16", "--patch_size", "2"]
    run([*words, *TWO_STEPS, *SMALL_MODEL, *switches], workplace)
    pipe = MARPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.labels == {} and pipe.vae.autoencoder is None
    pictures = np.stack([np.asarray(Image.open(path)) for path in sorted((emoji / "train" / "face").glob("*.png"))])
    pixels = pictures.reshape(-1, 3) / 127.5 - 1
    assert np.allclose(pipe.vae.config.shift_factor, pixels.mean(0), atol=1e-3)
    assert np.allclose(pipe.vae.config.scaling_factor, 1 / pixels.std(0), rtol=1e-2)
    assert is_picture(pipe(generator=torch.Generator().manual_seed(0)).images[0])


def test_train_tokenizer_with_a_variational_autoencoder(workplace, emoji, tmp_path):
    words = ["python", "examples/train_tokenizer.py", "--train_data_dir", emoji, "--output_dir", tmp_path / "kl"]
    out = run([*words, *TWO_STEPS, "--block_out_channels", "16", "16", "--latent_channels", "4"], workplace)
    tokenizer = ImageTokenizer.from_pretrained(tmp_path / "kl")
    assert type(tokenizer.autoencoder).__name__ == "AutoencoderKL"
    assert last_line(out).startswith("PSNR ")


def test_train_refuses_too_few_pictures(workplace, emoji, tmp_path):
    words = ["python", "examples/train.py", "--train_data_dir", emoji, "--output_dir", tmp_path / "out"]
    error = last_line(run([*words, "--train_batch_size", "13"], workplace, fails=True))
    assert error == "train.py: error: 12 examples are fewer than a batch of all processes: 13."
    assert not (tmp_path / "out").exists()


def test_the_benchmark_compares_a_trained_pipeline(trained, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as for a script that is started there
    _, folder, _ = trained
    words = ["python", ROOT / "benchmarks" / "generation.py", "--model", folder / "pipeline"]
    settings = ["--batch-size", "2", "--num-diffusion-steps", "3", "--repeats", "1", "--matmul-size", "64"]
    out = run([*words, *settings, "--output", tmp_path / "results.jsonl"], tmp_path)
    result = json.loads((tmp_path / "results.jsonl").read_text(encoding="utf-8"))
    for side in result["sides"].values():
        assert side["settings"]["num_inference_steps"] == 2 and side["settings"]["num_diffusion_steps"] == 3
    assert result["image_size"] == [SIZE, SIZE] and result["difference"]["equal"]
    assert last_line(out) == f"ratio {result['ratio']:.2f}"
