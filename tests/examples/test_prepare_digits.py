# SPDX-License-Identifier: Apache-2.0
"""The digits as image folders: every picture once, in the folder of its class, with its own grey levels."""

import runpy
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from snippets import ROOT


def prepare(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["prepare_digits.py", *map(str, words)])
    runpy.run_path(str(ROOT / "examples" / "prepare_digits.py"), run_name="__main__")


@pytest.mark.parametrize("fraction, counts", [(0.0, {"train": 1797}), (0.2, {"train": 1437, "test": 360})])
def test_every_digit_is_written_once_under_its_class(tmp_path, monkeypatch, capsys, fraction, counts):
    prepare(monkeypatch, tmp_path, "--test_fraction", fraction)
    assert capsys.readouterr().out.splitlines() == [f"{n} pictures in {tmp_path / name}" for name, n in counts.items()]
    data = load_digits()
    found = {}
    for path in tmp_path.rglob("*.png"):
        found.setdefault(path.parent.parent.name, []).append(int(path.stem))
        assert path.parent.name == str(data.target[int(path.stem)])
        levels = np.asarray(Image.open(path)).astype(float) * 16 / 255
        assert np.abs(levels - data.images[int(path.stem)]).max() < 0.05
    assert {name: len(numbers) for name, numbers in found.items()} == counts
    assert sorted(sum(found.values(), [])) == list(range(1797))
    for name in counts:
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == list("0123456789")


def test_a_class_may_have_its_first_only(tmp_path, monkeypatch):
    prepare(monkeypatch, tmp_path, "--max_per_class", 5, "--test_fraction", 0.2)
    assert {name: len(list(tmp_path.glob(f"{name}/*/*.png"))) for name in ("train", "test")} == {
        "train": 40,
        "test": 10,
    }
    expected = np.flatnonzero(load_digits().target == 7)[:5]
    assert sorted(int(path.stem) for path in tmp_path.glob("*/7/*.png")) == list(expected)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--test_fraction", 1], "`--test_fraction` has to lie in [0, 1), got 1.0."),
        (["--max_per_class", 0], "`max_per_class` has to be at least 1, got 0."),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, monkeypatch, capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        prepare(monkeypatch, tmp_path / "out", *words)
    assert capsys.readouterr().err == f"prepare_digits.py: error: {message}\n"
    assert not (tmp_path / "out").exists()
