# SPDX-License-Identifier: Apache-2.0
"""All metrics at once, from Python: of a folder, of tensors, against pictures or their statistics."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from common import seeded
from mar_hf.evaluation import Judge, Pictures, read_statistics


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    for number, name in enumerate(["a", "b"]):
        (folder / name).mkdir()
        for index, picture in enumerate(torch.rand(8, 8, 8, 3, generator=seeded(number)) * 100 + 100 * number):
            Image.fromarray(picture.byte().numpy()).save(folder / name / f"{index}.png")
    return folder


def test_real_pictures_against_themselves(real, tmp_path):
    judge = Judge(real, 8, ["a", "b"], features="pixels", classifier=True)
    pictures = Pictures(real)
    found = judge.measure(pictures, folder=tmp_path)
    assert found["fd_pixels"] == pytest.approx(0, abs=1e-6) and found["classifier_accuracy"] == 1
    assert found["memorised_pixels"] == found["recall_pixels"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"grid.png", "neighbours.png"}
    # Tensors with labels are as good; without a folder nothing is drawn.
    assert judge.measure([*pictures], labels=pictures.labels) == found
    assert judge.measure([*pictures], labels=pictures.labels[::-1])["classifier_accuracy"] == 0
    assert sorted(judge.metrics) == sorted(found)


def test_classes_that_are_not_asked_for_are_left_out(real):
    judge = Judge(real, 8, ["b"], features="pixels")
    assert len(judge.pictures) == 8 and set(judge.pictures.labels) == {"b"}
    assert len(Judge(real, 8, ["b", "c"], features="pixels").pictures) == 16


def test_statistics_are_saved_and_read_again(real, tmp_path):
    judge = Judge(real, 8, features="pixels")
    judge.save_statistics(tmp_path / "real.npz")
    mean, _ = read_statistics(tmp_path / "real.npz")
    assert torch.allclose(mean, torch.stack([*Pictures(real)]).double().flatten(1).mean(0) / 255)
    other = Judge(tmp_path / "real.npz", 8, features="pixels")
    assert other.pictures is None and list(other.measure([*Pictures(real)])) == ["fd_pixels"]
    with pytest.raises(ValueError, match="`reference` has no pictures"):
        other.save_statistics(tmp_path / "again.npz")


def test_what_can_not_be_judged(real, tmp_path):
    with pytest.raises(ValueError, match="`features` has to be one of .*got 'colours'"):
        Judge(real, 8, features="colours")
    with pytest.raises(ValueError, match="`reference` '.*nowhere' does not exist"):
        Judge(tmp_path / "nowhere", 8, features="pixels")
    with pytest.raises(ValueError, match="`classifier` needs pictures of every class"):
        Judge(real, 8, ["c"], features="pixels", classifier=True)
    np.savez(tmp_path / "few.npz", np.zeros((7, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="holds 7 pictures, fewer than 8"):
        Judge(tmp_path / "few.npz", 8, features="pixels")
    with pytest.raises(ValueError, match="There are 3 samples, at least 4 are needed"):
        Judge(real, 8, features="pixels").measure([*Pictures(real)][:3])


@pytest.mark.parametrize("module", ["torchmetrics", "sklearn", "datasets"])
def test_an_absent_extra_is_named(module, real, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'`{module}` is needed here: pip install "mar_hf\[(eval|train)\]"'):
        Judge(real, 8, ["a", "b"], features="pixels", classifier=True)
