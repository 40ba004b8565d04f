# SPDX-License-Identifier: Apache-2.0
"""Folders of results: claimed once, refused to other settings; pictures that are whole."""

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from mar_hf.evaluation.folders import claim_folder, is_whole, read_arrays, read_json, write_json, write_text


def test_a_folder_belongs_to_its_settings(tmp_path):
    folder, settings = tmp_path / "out", {"seed": 1, "classes": ["a"]}
    for _ in range(2):
        claim_folder(folder, settings, Accelerator())
        assert read_json(folder / "settings.json") == settings
    with pytest.raises(ValueError, match=r"made with seed 1 \(now 2\), steps None \(now 3\); take another folder"):
        claim_folder(folder, {"seed": 2, "classes": ["a"], "steps": 3}, Accelerator())
    assert [path.name for path in folder.iterdir()] == ["settings.json"]


def test_a_folder_with_other_files_is_not_ours(tmp_path):
    # What a writer leaves that was killed is.
    (tmp_path / ".settings.json-a1b2").mkdir()
    claim_folder(tmp_path, {}, Accelerator())
    (tmp_path / "settings.json").unlink()
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(ValueError, match="holds files, but no settings.json: it is not ours"):
        claim_folder(tmp_path, {}, Accelerator())


def test_a_damaged_note_is_named(tmp_path):
    (tmp_path / "settings.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="settings.json' is damaged"):
        claim_folder(tmp_path, {}, Accelerator())


def test_pictures_are_whole_or_not(tmp_path):
    path = tmp_path / "a.png"
    assert not is_whole(path)
    Image.new("RGB", (64, 64), "red").save(path)
    assert is_whole(path)
    data = path.read_bytes()
    for broken in (data[:-30], b"", b"text"):
        path.write_bytes(broken)
        assert not is_whole(path)


def test_a_file_that_can_not_be_written_stays_as_it_was(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.json", "half of it \ud800")
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_damaged_files_of_arrays_are_named(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, a=np.arange(1000), b=np.zeros(2))
    assert {name: array.tolist() for name, array in read_arrays(path).items()}["b"] == [0, 0]
    data = path.read_bytes()
    np.save(tmp_path / "single.npy", np.zeros(2))
    np.savez(tmp_path / "objects.npz", np.array([{}]))
    damaged = [data[:-40], data[:200] + b"x" * 50 + data[250:], b"", b"text", (tmp_path / "single.npy").read_bytes()]
    for broken in [*damaged, (tmp_path / "objects.npz").read_bytes()]:
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="a.npz' can't be read as an .npz file of arrays"):
            read_arrays(path)
