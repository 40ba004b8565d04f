# SPDX-License-Identifier: Apache-2.0
"""What a training does when it is killed, when the disk is full, and when its data or its loss break."""

import json
import os
import random
import resource
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from example_runs import SIZES, forget_accelerate
from mar_hf import ImageTokenizer, ImageTokenizerConfig, MARPipeline
from mar_hf.training import Trainer, TrainingArguments
from mar_hf.training.batches import TrainingBatches
from mar_hf.training.run_checkpoints import check_checkpoint, list_checkpoints


COUNT = 15
BATCH = 4
SETTINGS = {
    "resolution": 8,
    "patch_size": 2,
    "model_config": json.dumps(SIZES),
    "train_batch_size": BATCH,
    "max_train_steps": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "validation_images": 1,
    "validation_steps": 2,
    "checkpointing_steps": 2,
    "generation_defaults": '{"num_inference_steps": 2, "num_diffusion_steps": 2}',
    "report_to": "none",
}


def write_pictures(folder):
    """Three classes of five pictures."""
    generator = np.random.default_rng(0)
    for number in range(COUNT):
        path = folder / "cat dog owl".split()[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return folder


def run(data, folder, **settings):
    """Train in this process; accelerate is configured anew for every run."""
    try:
        Trainer(
            TrainingArguments(train_data_dir=str(data), output_dir=str(folder), **{**SETTINGS, **settings})
        ).train()
    finally:
        forget_accelerate()
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """A run of four steps, with checkpoints of steps 2 and 4."""
    return run(pictures, tmp_path_factory.mktemp("trained"))


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of that run, to be broken."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def contents(folder):
    """Every file's bytes, but for cards (which name their folder) and what a kill leaves hidden."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name != "README.md"]
    return {str(path): (folder / path).read_bytes() for path in files if not path.parts[0].startswith(".")}


def assert_same_contents(found, expected):
    found, expected = contents(found), contents(expected)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


# Killed


def run_and_kill(data, folder, num_kills, settings):
    """Start a run again and again, each going on where the last was killed at a moment of its own; count the kills."""
    moments, killed = random.Random(0), 0
    for _ in range(num_kills):
        before = set(folder.rglob("*"))
        new_paths = moments.randint(1, 20)
        child = os.fork()
        if child == 0:
            # Whatever happens, the child must not go on with the tests.
            try:
                run(data, folder, **settings)
            finally:
                os._exit(1)
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            # What is being listed may be renamed or removed meanwhile.
            try:
                seen = set(folder.rglob("*"))
            except FileNotFoundError:
                continue
            if len(seen - before) >= new_paths:
                os.kill(child, signal.SIGKILL)
                killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
                break
            time.sleep(0.001)
    return killed


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(pictures, tmp_path):
    settings = {"max_train_steps": 8, "checkpointing_steps": 1, "validation_steps": 4}
    (tmp_path / "killed").mkdir()
    resumed = {**settings, "resume_from_checkpoint": "latest"}
    assert run_and_kill(pictures, tmp_path / "killed", 3, resumed) > 0
    assert all(check_checkpoint(folder) is None for folder in list_checkpoints(tmp_path / "killed"))
    run(pictures, tmp_path / "killed", **resumed)
    assert_same_contents(tmp_path / "killed", run(pictures, tmp_path / "whole", **settings))


# Checkpoints that broke


def test_a_broken_newest_checkpoint_costs_the_steps_since_the_one_before(pictures, trained, copy, caplog):
    file = copy / "checkpoint-4" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    run(pictures, copy, resume_from_checkpoint="latest")
    assert "checkpoint-4 is damaged: model.safetensors" in caplog.text
    assert f"Going on from {copy / 'checkpoint-2'}" in caplog.text
    assert_same_contents(copy, trained)


def test_broken_checkpoints_only(pictures, copy):
    before = contents(copy)
    for number in (2, 4):
        (copy / f"checkpoint-{number}" / "optimizer.bin").unlink()
        del before[f"checkpoint-{number}/optimizer.bin"]
    with pytest.raises(ValueError, match=r"All checkpoints of .*run are damaged: \['checkpoint-4', 'checkpoint-2'\]"):
        run(pictures, copy, resume_from_checkpoint="latest")
    assert contents(copy) == before


# A full disk


@contextmanager
def largest_file(size):
    """No file may become larger: writing fails as on a full disk, with another error number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "name, message",
    [
        ("checkpoint-4/optimizer.bin", "checkpoint-6 could not be written .* The last whole checkpoint: .*-4"),
        ("pipeline/transformer/model.safetensors", "pipeline could not be written .*File too large"),
    ],
    ids=["checkpoint", "pipeline"],
)
def test_a_full_disk_leaves_the_last_checkpoint_and_pipeline(pictures, copy, name, message):
    before = contents(copy)
    with largest_file((copy / name).stat().st_size - 1), pytest.raises(RuntimeError, match=message):
        run(pictures, copy, resume_from_checkpoint="latest", max_train_steps=6)
    assert {path.name for path in copy.iterdir()} == {
        *("checkpoint-2", "checkpoint-4", "pipeline", "samples", "loss.csv", "loss.png")
    }
    after = contents(copy)
    kept = [path for path in before if path.startswith(("checkpoint-", name.split("/")[0]))]
    assert kept and all(after[path] == before[path] for path in kept)
    MARPipeline.from_pretrained(copy / "pipeline")
    # With room again, the run goes on from the last whole checkpoint.
    run(pictures, copy, resume_from_checkpoint="latest", max_train_steps=6)
    assert [path.name for path in list_checkpoints(copy)] == ["checkpoint-4", "checkpoint-6"]


# Data and losses that broke


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_picture_is_named(tmp_path, num_workers):
    data, tokenizer = write_pictures(tmp_path / "data"), tmp_path / "tokenizer"
    broken = data / "dog" / "4.png"
    broken.write_bytes(broken.read_bytes()[:50])
    ImageTokenizer(ImageTokenizerConfig(patch_size=2)).save_pretrained(tokenizer)
    with pytest.raises(ValueError, match=rf"The picture '{broken}' \(row 8\) can't be read"):
        run(
            *(data, tmp_path / "run"),
            pretrained_tokenizer=str(tokenizer),
            dataloader_num_workers=num_workers,
            validation_steps=100,
        )


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, logging_steps):
    data, tokenizer = tmp_path / "latents", tmp_path / "tokenizer"
    ImageTokenizer(ImageTokenizerConfig(patch_size=2)).save_pretrained(tokenizer)
    order = TrainingBatches(COUNT, BATCH, seed=0)
    examples = [order.index_at(position) for position in range(2 * BATCH, 3 * BATCH)]
    generator = np.random.default_rng(0)
    (data / "cat").mkdir(parents=True)
    for number in range(COUNT):
        moments = generator.standard_normal((6, 8, 8)).astype(np.float32)
        moments[0, 0, 0] = np.nan if number == examples[1] else 0
        np.savez(data / "cat" / f"{number:02}.npz", moments=moments)
    with pytest.raises(FloatingPointError) as error:
        run(
            *(data, tmp_path / "run"),
            pretrained_tokenizer=str(tokenizer),
            max_train_steps=6,
            logging_steps=logging_steps,
            validation_steps=100,
        )
    assert f"The loss or its gradient is nan at step 3. Its examples: {examples}." in str(error.value)
    assert f"Last good checkpoint: {tmp_path / 'run' / 'checkpoint-2'}" in str(error.value)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
