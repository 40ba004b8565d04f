# SPDX-License-Identifier: Apache-2.0
"""Sets of pictures: the same from a folder and from a file; grids."""

import numpy as np
import pytest
import torch
from PIL import Image

from common import seeded
from mar_hf.evaluation.pictures import Pictures, save_grid, save_pictures, save_samples, to_image


@pytest.fixture(scope="module")
def arrays():
    return torch.randint(0, 256, (6, 8, 8, 3), generator=seeded(), dtype=torch.uint8).numpy()


@pytest.fixture(scope="module")
def folder(arrays, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, array in enumerate(arrays):
        place = folder / "ab"[number // 3]
        place.mkdir(exist_ok=True)
        Image.fromarray(array).save(place / f"{number}.png")
    return folder


def test_a_folder_and_a_file_hold_the_same(arrays, folder, tmp_path):
    np.savez(tmp_path / "file.npz", arr_0=arrays)
    for pictures in (Pictures(folder), Pictures(tmp_path / "file.npz"), Pictures(str(folder), 8)):
        assert len(pictures) == 6 and pictures.size == 8
        assert np.array_equal(torch.stack([*pictures]).permute(0, 2, 3, 1), arrays)
        assert np.array_equal(np.asarray(pictures.image(4)), arrays[4])
    assert Pictures(tmp_path / "file.npz").labels is None
    assert Pictures(folder, 4)[0].shape == (3, 4, 4)


def test_some_classes_are_kept(folder, arrays):
    pictures = Pictures(folder)
    assert pictures.labels == ["a"] * 3 + ["b"] * 3
    pictures.keep(["b"])
    assert pictures.labels == ["b"] * 3 and np.array_equal(np.asarray(pictures.image(0)), arrays[3])


def test_files_without_pictures_are_refused(tmp_path):
    np.savez(tmp_path / "file.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match=r"file.npz' holds no pictures \(`arr_0`\), only \['mu'\]"):
        Pictures(tmp_path / "file.npz")
    with pytest.raises(ValueError, match="nowhere"):
        Pictures(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 8, 8)), np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 8, 1), np.uint8), np.zeros((0, 8, 8, 3), "u1")],
)
def test_arrays_that_are_no_pictures_are_refused(array, tmp_path):
    np.savez(tmp_path / "file.npz", array)
    with pytest.raises(ValueError, match=r"`arr_0` of '.*file.npz' has to be uint8 of shape"):
        Pictures(tmp_path / "file.npz")


def test_pictures_and_grids_are_written_whole(folder, arrays, tmp_path, monkeypatch):
    pixel_values = torch.from_numpy(arrays).permute(0, 3, 1, 2) / 127.5 - 1
    save_pictures(pixel_values[:2], [tmp_path / "new" / "0.png", tmp_path / "new" / "1.png"])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "1.png")), arrays[1])
    save_samples(Pictures(folder), tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").height == 2 * 100 + 4  # a row for each class, 8 pixels become 96
    before = (tmp_path / "grid.png").read_bytes()

    def full(image, path, *args, **settings):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_grid([to_image(torch.zeros(3, 8, 8, dtype=torch.uint8))], ["black"], tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "new"]
