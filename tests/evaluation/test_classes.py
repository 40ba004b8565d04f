# SPDX-License-Identifier: Apache-2.0
"""Names of classes as names of folders: whatever a configuration holds, each class has one of its own, inside."""

import pathlib
import tempfile
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mar_hf.evaluation.classes import (
    choose_classes,
    choose_folders,
    choose_labels,
    class_folders,
    class_name,
    is_conditional,
    safe_name,
)
from tiny_pipelines import NAMES, tiny_pipeline, tiny_transformer


# Short ones of few letters, so that they meet; and anything at all.
NASTY = [
    *("", ".", "..", "...", " ", "a", "A", "a 0", "a 1", "a 2", "a 0 0", "a.", "a ", " a", "_a", ".a", "__a__", "a/b"),
    *("a\\b", "/", "/etc/passwd", "../x", "con", "CON.txt", "NUL", "settings.json", "SETTINGS.JSON", "train"),
    *("nul\x00", "\n", "\ud800", "\u202e", "\xe9", "e\u0301", "\u1e9e", "ss", "SS", "\u017f", "x" * 300, "x" * 301),
    *("\U0001f600" * 100, "a\xb2", "class 0", "class 1", "*", "?", "-", "~"),
]
NAMES_OF_ANY_KIND = st.dictionaries(
    st.integers(0, 50),
    st.sampled_from(NASTY) | st.text(st.sampled_from("aA. 0/"), max_size=6) | st.text(st.characters(codec=None)),
    max_size=12,
)


def as_on_other_systems(name):
    return unicodedata.normalize("NFD", unicodedata.normalize("NFKD", name).casefold())


@given(NAMES_OF_ANY_KIND)
@example({0: "a", 1: "a 0", 2: "a"})
@example({0: "a", 1: "a 0", 2: "a", 3: "a 0 0", 4: "a 0 0 0"})
@example(dict(enumerate(NASTY)))
def test_every_class_has_a_folder_of_its_own_inside(names):
    folders = class_folders(names)
    assert list(folders) == list(names)
    assert len({as_on_other_systems(folder) for folder in folders.values()}) == len(names)
    for folder in folders.values():
        assert pathlib.PurePosixPath(folder).name == pathlib.PureWindowsPath(folder).name == folder
        assert folder.isprintable() and len(folder.encode()) <= 160 and folder == folder.strip(" .")
        assert folder[0] not in "._" and not set(folder) & set('<>:"/\\|?*')
        stem = folder.split(".")[0].casefold()
        assert stem not in {"con", "prn", "aux", "nul", "com1", "lpt9", "train", "test", "settings", "samples"}


@given(NAMES_OF_ANY_KIND)
def test_all_of_them_can_be_made(names):
    with tempfile.TemporaryDirectory() as folder:
        for name in class_folders(names).values():
            pathlib.Path(folder, name).mkdir()
        assert len(list(pathlib.Path(folder).iterdir())) == len(names)


@given(st.text(st.characters(codec=None)))
def test_a_safe_name_stays_as_it_is(name):
    assert safe_name(safe_name(name)) == safe_name(name)


def test_plain_names_are_kept():
    plain = {0: "cat, kitten", 1: "red fox", 2: "5", 3: "caf\xe9", 4: "\u732b", 5: "class 7", 6: "t-shirt (m)"}
    assert class_folders(plain) == plain


def test_names_that_meet_get_their_numbers():
    assert class_folders({0: "crane", 1: "either/or", 2: "crane"}) == {0: "crane 0", 1: "either-or", 2: "crane 2"}
    assert class_folders({0: "a", 1: "a 0", 2: "a"}) == {0: "a 0 0", 1: "a 0 1", 2: "a 2"}
    assert class_folders({3: "..", 4: "A", 5: "a"}) == {3: "class 3", 4: "A 4", 5: "a 5"}
    assert class_folders({}) == {}


def test_folders_of_the_classes_wanted_do_not_depend_on_the_others():
    pipe = tiny_pipeline(id2label={0: "crane", 1: "owl", 2: "crane"})
    assert choose_folders(pipe, ["2", "owl"]) == {2: "crane 2", 1: "owl"}
    assert choose_folders(pipe) == {0: "crane 0", 1: "owl", 2: "crane 2"}
    with pytest.raises(ValueError, match=r"`class_labels` has to lie in 0\.\.2, got \[3\]"):
        choose_folders(pipe, ["3"])


def test_real_pictures_have_the_class_s_own_name():
    pipe = tiny_pipeline(id2label={0: "crane", 1: "either/or", 2: "train"})
    assert choose_folders(pipe) == {0: "crane", 1: "either-or", 2: "class train"}
    assert choose_labels(pipe, [2, 1]) == {2: "train", 1: "either/or"}
    assert choose_labels(tiny_pipeline(id2label={0: "a", 1: "a"}), [0, 2]) == {0: "a 0", 2: "class 2"}


def test_classes_by_name_and_number():
    pipe = tiny_pipeline()
    assert choose_classes(pipe, None) == list(range(3))
    assert choose_classes(pipe, ["kitten", "2", 0, "heart"]) == [1, 2, 0]
    # As the pipeline reads them: names first.
    pipe.register_to_config(id2label={0: "1", 1: "10", 2: "2"})
    assert choose_classes(pipe, ["2", "1", "7"]) == [2, 0, 7]
    for word in ("wolf", "9" * 5000):
        with pytest.raises(ValueError, match="`--class-labels`: '.*' is unknown; known are 1, 10, 2"):
            choose_classes(pipe, ["1", word], "--class-labels")


def test_names_of_classes():
    assert [class_name(tiny_pipeline(), label) for label in range(4)] == [*NAMES.values(), "class 3"]
    assert is_conditional(tiny_pipeline())
    assert not is_conditional(tiny_pipeline(transformer=tiny_transformer(num_classes=1), id2label=None))
