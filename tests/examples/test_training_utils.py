# SPDX-License-Identifier: Apache-2.0
"""Settings from files, the order of examples and whole checkpoints."""

import csv
import os
import shutil
import sys
from dataclasses import dataclass, field

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from snippets import ROOT


sys.path.insert(0, str(ROOT / "examples"))

import training_utils  # noqa: E402


@dataclass
class Settings:
    data: str = field(metadata={"help": "where"})
    rate: float = field(default=0.5, metadata={"help": "how much"})
    sizes: list[int] = field(default_factory=lambda: [1], metadata={"help": "how large"})
    flip: bool = field(default=False, metadata={"help": "whether"})
    extra: str = field(default="{}", metadata={"help": "JSON"})
    name: str | None = field(default=None, metadata={"help": "which"})


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("s.json", '{"data": "d", "rate": 1e-3, "sizes": [2, 3], "flip": true, "extra": {"a": [1]}, "name": null}'),
        ("s.yaml", "data: d\nrate: 1e-3\nsizes: [2, 3]\nflip: true\nextra: {a: [1]}\n"),
    ],
)
def test_settings_come_from_a_file_and_the_command_line_overrides_it(tmp_path, name, text):
    config = write(tmp_path / name, text)
    settings = training_utils.parse_arguments(Settings, ["--config", config, "--rate", "2"])
    assert settings == Settings("d", 2.0, [2, 3], True, '{"a": [1]}', None)
    assert training_utils.parse_arguments(Settings, ["--data", "e", "--config", config, "--flip", "false"]).data == "e"
    assert training_utils.parse_arguments(Settings, ["--data", "x"]) == Settings("x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": "d", "speed": 1}', r"unknown settings \['speed'\]; known are \['data', "),
        ('["data"]', "unknown settings list"),
        ('{"data": ', "can't be read"),
    ],
)
def test_a_wrong_file_of_settings_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        training_utils.parse_arguments(Settings, ["--config", write(tmp_path / "s.json", text)])
    with pytest.raises(ValueError, match="`config` 'nowhere.json' can't be read"):
        training_utils.parse_arguments(Settings, ["--config", "nowhere.json"])


def take(sampler, count):
    return [batch for batch, _ in zip(sampler, range(count), strict=False)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_example_comes_once_an_epoch_over_all_processes(world_size):
    # 3 epochs of 14 examples: no number of examples that a global batch divides.
    processes = [
        take(training_utils.TrainingBatches(14, 7, seed=3, rank=rank, world_size=world_size), 6 // world_size)
        for rank in range(world_size)
    ]
    keys = sorted((position, index) for batches in processes for batch in batches for index, position in batch)
    assert [position for position, _ in keys] == list(range(42))
    epochs = [[index for _, index in keys[first : first + 14]] for first in (0, 14, 28)]
    assert all(sorted(epoch) == list(range(14)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    # The same order whatever the number of processes, and another one with another seed.
    alone = [index for batch in take(training_utils.TrainingBatches(14, 7, seed=3), 6) for index, _ in batch]
    assert alone == sum(epochs, [])
    assert alone != [index for batch in take(training_utils.TrainingBatches(14, 7, 4), 6) for index, _ in batch]


def test_the_stream_goes_on_where_it_is_told_to():
    whole = take(training_utils.TrainingBatches(5, 2, seed=1), 9)
    assert take(training_utils.TrainingBatches(5, 2, seed=1, start=8), 5) == whole[4:]


def test_rows_carry_their_position():
    class Squares(torch.utils.data.Dataset):
        def __len__(self):
            return 5

        def __getitems__(self, indices):
            return [{"square": index**2} for index in indices]

    sampler = training_utils.TrainingBatches(5, 4, seed=0)
    loader = DataLoader(training_utils.PositionedDataset(Squares()), batch_sampler=sampler)
    batch = next(iter(loader))
    assert batch["position"].tolist() == [0, 1, 2, 3]
    assert batch["square"].tolist() == [sampler.index_at(position) ** 2 for position in range(4)]


def test_an_examples_randomness_depends_on_seed_position_and_stream():
    def draws(*args, **kwargs):
        return [torch.rand((), generator=g).item() for g in training_utils.example_generators(*args, **kwargs)]

    first = draws(0, [5, 6, 7])
    assert draws(0, [7, 5]) == [first[2], first[0]]
    numbers = first + draws(1, [5, 6, 7]) + draws(0, [5, 6, 7], stream=1)
    assert len(set(numbers)) == 9


@pytest.fixture
def run(tmp_path):
    """An accelerator with a layer and its optimizer, and a folder of three checkpoints in which weights are steps."""
    accelerator = Accelerator(cpu=True)
    layer = torch.nn.Linear(2, 1)
    layer, _ = accelerator.prepare(layer, torch.optim.AdamW(layer.parameters()))
    for step in (1, 2, 10):
        torch.nn.init.constant_(layer.weight, step)
        training_utils.save_checkpoint(accelerator, tmp_path, step, total_limit=3)
    torch.nn.init.zeros_(layer.weight)
    return accelerator, layer, tmp_path


def test_the_newest_checkpoint_is_loaded_and_old_ones_go(run):
    accelerator, layer, folder = run
    assert [path.name for path in training_utils.list_checkpoints(folder)] == [f"checkpoint-{n}" for n in (1, 2, 10)]
    assert training_utils.load_checkpoint(accelerator, folder, "latest") == folder / "checkpoint-10"
    assert (layer.weight == 10).all()
    assert training_utils.load_checkpoint(accelerator, folder, "checkpoint-2") == folder / "checkpoint-2"
    assert (layer.weight == 2).all()
    # What is newer than where the run goes on from would be taken for its newest; it is whole, so it is kept.
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-1", "checkpoint-2", "old-checkpoint-10"]
    assert training_utils.check_checkpoint(folder / "old-checkpoint-10") is None
    training_utils.save_checkpoint(accelerator, folder, 3, total_limit=2)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-3", "old-checkpoint-10"]
    # A path will do, from wherever it is given.
    chosen = os.path.relpath(folder / "checkpoint-2")
    assert training_utils.load_checkpoint(accelerator, folder, chosen) == folder / "checkpoint-2"
    assert (folder / "old-checkpoint-3").is_dir()
    (folder / "old-checkpoint-3").rename(folder / "checkpoint-3")
    # One that lies elsewhere leaves these alone.
    (folder / "old-checkpoint-10").rename(folder / "chosen")
    assert training_utils.load_checkpoint(accelerator, folder, "chosen") == folder / "chosen"
    assert [path.name for path in training_utils.list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-3"]
    assert training_utils.load_checkpoint(accelerator, folder / "empty", "latest") is None


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
        training_utils.load_checkpoint(accelerator, folder, "checkpoint-10")
    assert training_utils.load_checkpoint(accelerator, folder, "latest") == folder / "checkpoint-2"
    assert (layer.weight == 2).all()
    assert "checkpoint-10 is damaged" in caplog.text and name in caplog.text
    assert not (folder / "checkpoint-10").exists()
    for number in (1, 2):
        damage(folder / f"checkpoint-{number}" / name)
    with pytest.raises(ValueError, match="All checkpoints of .* are damaged"):
        training_utils.load_checkpoint(accelerator, folder, "latest")
    with pytest.raises(ValueError, match="checkpoint-7 can't be used"):
        training_utils.load_checkpoint(accelerator, folder, "checkpoint-7")


def test_a_damaged_checkpoint_beside_one_that_was_being_written(run):
    accelerator, layer, folder = run
    shutil.copytree(folder / "checkpoint-1", folder / "checkpoint.partial")
    truncate(folder / "checkpoint-10" / "model.safetensors")
    assert training_utils.load_checkpoint(accelerator, folder, "latest") == folder / "checkpoint-2"
    assert (layer.weight == 2).all()
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_what_was_being_written_does_not_count(run):
    accelerator, _, folder = run
    (folder / "checkpoint-10").rename(folder / "checkpoint-12.partial")
    assert training_utils.load_checkpoint(accelerator, folder, "latest") == folder / "checkpoint-2"


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
        training_utils.save_checkpoint(accelerator, folder, 20, total_limit=1)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-1", "checkpoint-10", "checkpoint-2"]


def test_curves_are_a_table_and_a_picture(tmp_path):
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "validation_loss": 1.5}]
    training_utils.write_curves(history, tmp_path)
    with open(tmp_path / "loss.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"step": "1", "loss": "2.0", "validation_loss": ""},
        {"step": "2", "loss": "1.0", "validation_loss": "1.5"},
    ]
    assert (tmp_path / "loss.png").read_bytes()[1:4] == b"PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.csv", "loss.png"]
