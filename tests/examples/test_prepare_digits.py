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


def test_a_fraction_outside_of_its_range_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"`--test_fraction` has to lie in \[0, 1\), got 1.0"):
        prepare(monkeypatch, tmp_path / "out", "--test_fraction", 1)
    assert not (tmp_path / "out").exists()
