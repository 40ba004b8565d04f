# SPDX-License-Identifier: Apache-2.0
"""Whole checkpoints, damaged ones, and those that could not be written."""

import os
import shutil

import pytest
import torch
from accelerate import Accelerator

from mar_hf.training.checkpoints import (
    check_checkpoint,
    list_checkpoints,
    load_checkpoint,
    remove_left_overs,
    save_checkpoint,
)


@pytest.fixture
def run(tmp_path):
    """An accelerator with a layer and its optimizer, and a folder of three checkpoints in which weights are steps."""
    accelerator = Accelerator(cpu=True)
    layer = torch.nn.Linear(2, 1)
    layer, _ = accelerator.prepare(layer, torch.optim.AdamW(layer.parameters()))
    for step in (1, 2, 10):
        torch.nn.init.constant_(layer.weight, step)
        save_checkpoint(accelerator, tmp_path, step, total_limit=3)
    torch.nn.init.zeros_(layer.weight)
    return accelerator, layer, tmp_path


def test_the_newest_checkpoint_is_loaded_and_old_ones_go(run):
    accelerator, layer, folder = run
    assert [path.name for path in list_checkpoints(folder)] == [f"checkpoint-{n}" for n in (1, 2, 10)]
    assert load_checkpoint(accelerator, folder, "latest") == folder / "checkpoint-10"
    assert (layer.weight == 10).all()
    assert load_checkpoint(accelerator, folder, "checkpoint-2") == folder / "checkpoint-2"
    assert (layer.weight == 2).all()
    # What is newer than where the run goes on from would be taken for its newest; it is whole, so it is kept.
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-1", "checkpoint-2", "old-checkpoint-10"]
    assert check_checkpoint(folder / "old-checkpoint-10") is None
    save_checkpoint(accelerator, folder, 3, total_limit=2)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-3", "old-checkpoint-10"]
    # A path will do, from wherever it is given.
    chosen = os.path.relpath(folder / "checkpoint-2")
    assert load_checkpoint(accelerator, folder, chosen) == folder / "checkpoint-2"
    assert (folder / "old-checkpoint-3").is_dir()
    (folder / "old-checkpoint-3").rename(folder / "checkpoint-3")
    # One that lies elsewhere leaves these alone.
    (folder / "old-checkpoint-10").rename(folder / "chosen")
    assert load_checkpoint(accelerator, folder, "chosen") == folder / "chosen"
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-3"]
    assert load_checkpoint(accelerator, folder / "empty", "latest") is None


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda path: path.unlink()])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(run, caplog, damage, name):
    accelerator, layer, folder = run
    damage(folder / "checkpoint-10" / name)
    with pytest.raises(ValueError, match="checkpoint-10 can't be used"):
        load_checkpoint(accelerator, folder, "checkpoint-10")
    assert load_checkpoint(accelerator, folder, "latest") == folder / "checkpoint-2"
    assert (layer.weight == 2).all()
    assert "checkpoint-10 is damaged" in caplog.text and name in caplog.text
    assert not (folder / "checkpoint-10").exists()
    for number in (1, 2):
        damage(folder / f"checkpoint-{number}" / name)
    with pytest.raises(ValueError, match="All checkpoints of .* are damaged"):
        load_checkpoint(accelerator, folder, "latest")
    with pytest.raises(ValueError, match="checkpoint-7 can't be used"):
        load_checkpoint(accelerator, folder, "checkpoint-7")


def test_a_damaged_checkpoint_beside_one_that_was_being_written(run):
    accelerator, layer, folder = run
    shutil.copytree(folder / "checkpoint-1", folder / "checkpoint.partial")
    truncate(folder / "checkpoint-10" / "model.safetensors")
    assert load_checkpoint(accelerator, folder, "latest") == folder / "checkpoint-2"
    assert (layer.weight == 2).all()
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_what_was_being_written_does_not_count(run):
    accelerator, _, folder = run
    (folder / "checkpoint-10").rename(folder / "checkpoint-12.partial")
    assert load_checkpoint(accelerator, folder, "latest") == folder / "checkpoint-2"


def test_a_checkpoint_that_can_not_be_written_leaves_the_others(run):
    accelerator, _, folder = run

    class Unwritable:
        def state_dict(self):
            raise OSError("No space left on device")

        def load_state_dict(self, state):
            pass

    accelerator.register_for_checkpointing(Unwritable())
    message = r"checkpoint-20 could not be written \(No space left on device\). The last whole"
    with pytest.raises(RuntimeError, match=message):
        save_checkpoint(accelerator, folder, 20, total_limit=1)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-1", "checkpoint-10", "checkpoint-2"]


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    kept = ["loss.csv", ".pipeline", ".hidden-x/file", "samples/step_000002.png", "checkpoint-2/model.safetensors"]
    left = [".loss.csv-ab_1/loss.csv", ".pipeline-x/new/x", "samples/.step_000002.png-q/x", "checkpoint.partial/x"]
    for name in [*kept, *left]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    remove_left_overs(tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == set(kept)
