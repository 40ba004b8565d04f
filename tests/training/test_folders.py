# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder are trained on: splits, classes, links, and what systems leave behind."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mar_hf.training.folders import (
    HELD_OUT,
    SPLITS,
    class_folders,
    held_out_folder,
    is_ignored,
    read_tree,
    training_prefix,
)


def fill(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return root


def trained_on(names):
    prefix = training_prefix(sorted(names))
    return sorted(name for name in names if name.startswith(prefix))


LEFT_OVERS = [
    "__MACOSX/train/._1.png",
    ".git/HEAD",
    ".ipynb_checkpoints/1.png",
    ".DS_Store",
    "Thumbs.db",
    "@eaDir/1.png",
]


@pytest.mark.parametrize("left_over", LEFT_OVERS)
def test_what_systems_leave_is_nobodys_example(tmp_path, left_over):
    fill(tmp_path, "train/cat/1.png", "test/cat/2.png", left_over)
    tree = read_tree(tmp_path)
    assert tree.files == ["test/cat/2.png", "train/cat/1.png"]
    assert tree.folders == ["test", "test/cat", "train", "train/cat"]
    assert training_prefix(tree.files) == "train/"


def test_links_are_followed(tmp_path):
    fill(tmp_path / "elsewhere", "1.png")
    fill(tmp_path / "data", "cat/2.png")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "owl").symlink_to("dog")
    (tmp_path / "data" / "cat" / "3.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    assert read_tree(tmp_path / "data").files == ["cat/2.png", "cat/3.png", "dog/1.png", "owl/1.png"]
    (tmp_path / "whole").symlink_to("data")
    assert len(read_tree(tmp_path / "whole").files) == 4


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere", "can't be read: No such file"),
        ("link", "can't be read: Too many levels of symbolic links"),
        (".", "is a link that leads back to a folder above it"),
        ("../cat", "is a link that leads back to a folder above it"),
    ],
)
def test_links_that_lead_nowhere_or_back_are_named(tmp_path, target, message):
    fill(tmp_path, "cat/1.png")
    (tmp_path / "cat" / "link").symlink_to(target)
    with pytest.raises(ValueError, match=rf"cat/link' {message}"):
        read_tree(tmp_path)


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"1\.png' is neither a file nor a folder"):
        read_tree(tmp_path)


def test_names_that_are_no_text_are_named(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.png"
    try:
        Path(os.fsdecode(path)).write_text("x")
    except OSError:
        pytest.skip("this file system takes no such names")
    with pytest.raises(ValueError, match="has a name that is no text in UTF-8"):
        read_tree(tmp_path)


def test_a_folder_that_can_not_be_read_is_named():
    with tempfile.TemporaryDirectory() as root:
        fill(Path(root), "cat/1.png", "dog/1.png")
        os.chmod(root, 0o755)
        os.chmod(Path(root, "dog"), 0)
        user = os.geteuid()
        if user == 0:  # who may read everything
            os.seteuid(65534)
        try:
            with pytest.raises(ValueError, match="dog' can't be read: Permission denied"):
                read_tree(root)
        finally:
            os.seteuid(user)
            os.chmod(Path(root, "dog"), 0o755)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train/a/1", "test/a/2"], ["train/a/1"]),
        (["Train/a/1", "TEST/a/2"], ["Train/a/1"]),
        (["TRAIN/1", "Val/2"], ["TRAIN/1"]),
        (["training/a/1", "testing/a/2"], ["training/a/1"]),
        (["train/1"], ["train/1"]),
        (["train/train/a/1", "train/train/b/1"], ["train/train/a/1", "train/train/b/1"]),
        (["train/train/a/1", "train/val/a/1"], ["train/train/a/1"]),
        (["pets/train/a/1", "pets/test/a/1"], ["pets/train/a/1"]),
        (["a/1", "b/1"], ["a/1", "b/1"]),
        (["train/1", "zebra/1"], ["train/1", "zebra/1"]),  # classes of vehicles and animals
        (["1", "2"], ["1", "2"]),
        ([], []),
    ],
)
def test_what_is_trained_on(names, expected):
    assert trained_on(names) == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["test/a/1"], r"no split 'train', only \['test'\]"),
        (["train/a/1", "Train/a/1"], r"\['Train', 'train'\] are all splits to train on"),
        (["train/a/1", "test/a/2", "extra/3"], r"\['test', 'train'\] look like splits, but \['extra'\] beside them"),
        (["train/a/1", "cat/1"], r"\['train'\] look like splits, but \['cat'\] beside"),
        (["train/a/1", "2"], r"\['train'\] look like splits, but \['files'\] beside"),
        (["cat/1", "dog/1", "test/1"], r"\['test'\] look like splits, but \['cat', 'dog'\] beside"),
        (["cat/train/1", "cat/test/2", "dog/train/1"], r"'cat/test' looks like a split, but lies inside of a class"),
        (["train/cat/1", "train/dog/test/1"], r"'train/dog/test' looks like a split, but lies inside"),
    ],
)
def test_what_is_not_understood_stops(names, message):
    with pytest.raises(ValueError, match=message):
        training_prefix(sorted(names))


def test_an_empty_split_is_named():
    with pytest.raises(ValueError, match=r"its split 'Train' is empty, and only \['test'\] are not"):
        training_prefix(["test/1"], ["Train", "test"])
    assert training_prefix(["train/1"], ["train", "test"]) == "train/"


NAMES = st.sampled_from(["a", "b", "train", "Train", "test", "VAL", "dev", "cats"])
TREES = st.lists(st.lists(NAMES, max_size=3).map(lambda parts: "/".join([*parts, "1.png"])), min_size=1, unique=True)


@given(TREES)
def test_nothing_held_out_is_ever_trained_on(names):
    try:
        chosen = trained_on(names)
    except ValueError:
        return
    for name in chosen:
        assert not {part.lower() for part in name.split("/")} & set(HELD_OUT)


@given(
    st.lists(st.sampled_from(["a/1", "a/2", "b/1", "c/1"]), min_size=1, unique=True),
    st.sampled_from(["Train", "train"]),
)
def test_a_level_of_splits_changes_nothing(names, split):
    below = [f"{split}/{name}" for name in names]
    assert trained_on([*below, "test/a/9"]) == sorted(below)
    assert class_folders(names) == class_folders([name.removeprefix(f"{split}/") for name in below])


def test_classes_are_folders_of_one_level():
    assert class_folders(["a/1", "b/1", "b/2"]) == ["a", "b", "b"]
    for names in (["a/1", "a/2"], ["1", "2"], ["a/1", "2"], ["a/x/1", "b/x/1"], ["a/1", "b/x/1"]):
        assert class_folders(names) is None


def test_the_split_that_is_kept_from_training(tmp_path):
    fill(tmp_path, "train/a/1", "TEST/a/2")
    (tmp_path / "validation").mkdir()
    assert held_out_folder(tmp_path) == str(tmp_path / "TEST")
    fill(tmp_path, "Val/a/3")
    assert held_out_folder(tmp_path) == str(tmp_path / "Val")
    assert held_out_folder(tmp_path / "train") is None


def test_tables_hold_lower_case():
    assert all(name == name.lower() and not is_ignored(name) for name in SPLITS)
