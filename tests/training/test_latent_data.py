# SPDX-License-Identifier: Apache-2.0
"""Caches of the original; ours are tested with what writes them."""

import numpy as np
import pytest
import torch

from mar_hf.training import load_latents


def original_cache(folder, flipped=True):
    numbers = torch.Generator().manual_seed(0)
    for name, count in {"n02": 2, "n01": 3}.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            moments = torch.randn(2, 4, 3, 3, generator=numbers) * 60
            keys = ("moments", "moments_flip")[: 1 + flipped]
            np.savez(folder / name / f"{number}.JPEG.npz", **dict(zip(keys, moments.numpy(), strict=False)))
    return folder


@pytest.mark.parametrize("flipped", [True, False])
def test_files_of_the_original(tmp_path, flipped):
    original_cache(tmp_path, flipped)
    for name in (".git", "n01b"):  # no classes: there is nothing in them
        (tmp_path / name).mkdir()
    latents = load_latents(str(tmp_path))
    assert (len(latents), latents.class_names, latents.has_flipped) == (5, ["n01", "n02"], flipped)
    assert (latents.latent_shape, latents.resolution) == ((2, 3, 3), None)
    rows = latents.__getitems__([0, 4])
    assert [row["label"] for row in rows] == [0, 1]
    file = np.load(tmp_path / "n02" / "1.JPEG.npz")
    for key, suffix in (("moments", ""), ("moments_flip", "_flipped"))[: 1 + flipped]:
        assert np.array_equal(rows[1][f"mean{suffix}"], file[key][:2])
        assert file[key][2:].min() < -30 and file[key][2:].max() > 20
        deviation = np.exp(np.clip(file[key][2:], -30, 20) / 2)
        np.testing.assert_allclose(rows[1][f"std{suffix}"], deviation, rtol=1e-5)
    assert len(rows[1]) == (5 if flipped else 3)


def test_broken_files_of_the_original(tmp_path):
    path = original_cache(tmp_path) / "n02" / "0.JPEG.npz"
    latents = load_latents(str(tmp_path))
    for content in (path.read_bytes()[:100], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="n02/0.JPEG.npz does not hold cached latents, or is truncated"):
            latents[3]
    np.savez(path, other=np.zeros(3))
    with pytest.raises(ValueError, match="n02/0.JPEG.npz does not hold cached latents"):
        latents[3]


def test_folders_without_latents(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").touch()
    for folder in (tmp_path, tmp_path / "cat", tmp_path / "missing"):
        with pytest.raises(ValueError, match="holds no cached latents"):
            load_latents(str(folder))


def test_latents_of_a_test_are_not_trained_on(tmp_path):
    original_cache(tmp_path / "Train")
    original_cache(tmp_path / "test")
    original_cache(tmp_path / "__MACOSX")
    latents = load_latents(str(tmp_path))
    assert len(latents) == 5 and latents.class_names == ["n01", "n02"] and latents.least_label() == 0
    assert {file.parent.parent.name for file in latents.files} == {"Train"}
    original_cache(tmp_path / "more")
    with pytest.raises(ValueError, match=r"\['Train', 'test'\] look like splits, but \['more'\] beside them"):
        load_latents(str(tmp_path))


def test_linked_folders_of_latents_are_classes(tmp_path):
    original_cache(tmp_path / "elsewhere")
    (tmp_path / "data").mkdir()
    for name in ("n01", "n02"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere" / name)
    assert load_latents(str(tmp_path / "data")).class_names == ["n01", "n02"]
