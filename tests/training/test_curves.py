# SPDX-License-Identifier: Apache-2.0
"""Curves and grids of samples."""

import csv

from PIL import Image

from mar_hf.training.curves import write_curves, write_samples


def test_curves_are_a_table_and_a_picture(tmp_path):
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "validation_loss": 1.5}]
    write_curves(history, tmp_path)
    with open(tmp_path / "loss.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"step": "1", "loss": "2.0", "validation_loss": ""},
        {"step": "2", "loss": "1.0", "validation_loss": "1.5"},
    ]
    assert (tmp_path / "loss.png").read_bytes()[1:4] == b"PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.csv", "loss.png"]


def test_samples_are_named_after_their_step(tmp_path):
    write_samples(Image.new("RGB", (4, 4), "red"), tmp_path, 12)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step_000012.png"]
    assert Image.open(tmp_path / "samples" / "step_000012.png").getpixel((0, 0)) == (255, 0, 0)
