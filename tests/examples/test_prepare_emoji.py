# SPDX-License-Identifier: Apache-2.0
"""Captions of the emoji and combinations held out, from an .npz and from packages that a stand-in for npm packs."""

import io
import itertools
import json
import runpy
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from snippets import ROOT


SCRIPT = ROOT / "examples" / "prepare_emoji.py"
TONES = ["light", "medium-light", "medium", "medium-dark", "dark"]
GENDERS = {"": "person", "man ": "man", "woman ": "woman"}
NONE = {"role": "", "gender": "", "tone": ""}
# (class, name, keywords, has a skin tone)
PLAIN = [
    ("animal face", "grinning cat with smiling eyes", "cat|smile|Smiling|grin|face|eye|mouth|teeth|lol", False),
    ("plant", "piñata – no, a plant", "", False),
    ("clothing", "man\u2019s shoe", "man|brown|let\u2019s", False),
    ("hand", "waving hand: dark skin tone", "bye|hand", True),
    ("family", "kiss: woman, man, light skin tone", "xoxo", True),
]


def person(prefix, role, tone, suffix=""):
    """A toned person's name, keywords as wrong as the real ones, and what there is to find in the name."""
    name = f"{prefix}{role}: {tone} skin tone{suffix}"
    found = {"role": f"{role}{suffix}", "gender": GENDERS[prefix], "tone": tone}
    return ("working person", name, f"man|{role}|worker", True), found


ROLES = [("cook", ""), ("judge", ""), ("pilot", ""), ("walking", ""), ("walking", ", facing right")]
COMPLETE = [
    person(prefix, role, tone, suffix) for role, suffix in ROLES for prefix, tone in itertools.product(GENDERS, TONES)
]
# Some tones only, one gender only.
OTHERS = [person("man ", "ninja", tone)[0] for tone in TONES] + [person("", "elf", tone)[0] for tone in TONES[:2]]
EMOJI = [*PLAIN, *(emoji for emoji, _ in COMPLETE), *OTHERS]


@pytest.fixture
def npz(tmp_path):
    path = tmp_path / "emoji.npz"
    labels, names, tags, toned = zip(*EMOJI, strict=True)
    classes = sorted(set(labels))
    np.savez(
        path,
        image=np.random.default_rng(0).integers(0, 256, (len(EMOJI), 16, 16, 3), dtype=np.uint8),
        label=[classes.index(label) for label in labels],
        classes=classes,
        code=[f"1F{number:03X}" for number in range(len(EMOJI))],
        toned=toned,
        name=[name.replace("\u2019", "'") for name in names],
        tags=tags,
    )
    return path


def prepare(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["prepare_emoji.py", *map(str, words)])
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as stop:
        raise stop.__cause__ from None  # what it tells in a line


def read(folder):
    """The rows of a split's metadata, by the name of the picture; each has its file, and each file its row."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = list(map(json.loads, lines))
    assert sorted(row["file_name"] for row in rows) == sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*.png")
    )
    return {row["text"][0]: row for row in rows}


def test_captions_begin_with_the_name_and_add_what_is_new(tmp_path, monkeypatch, capsys, npz):
    prepare(monkeypatch, tmp_path / "out", "--npz", npz, "--skin-tones", "--captions", "--size", 8)
    assert capsys.readouterr().out == f"{len(EMOJI)} pictures in {tmp_path / 'out'}\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train"]
    rows = read(tmp_path / "out" / "train")
    cat = "grinning cat with smiling eyes"
    assert rows[cat] == {
        "file_name": "animal face/1F000.png",
        "text": [cat, f"{cat}, smile, grin", f"{cat}, face, eye", f"{cat}, mouth, teeth"],
        "label": "animal face",
        **NONE,
    }
    assert rows["piñata – no, a plant"]["text"] == ["piñata – no, a plant"]
    assert rows["man's shoe"]["text"] == ["man's shoe", "man's shoe, brown, let's"]
    wave = "waving hand: dark skin tone"
    assert rows[wave] == {
        "file_name": "hand/1F003.png",
        "text": [wave, "waving hand with dark skin tone", f"{wave}, bye"],
        "label": "hand",
        **NONE,
    }
    kiss = "kiss: woman, man, light skin tone"
    assert rows[kiss]["text"] == [kiss, f"{kiss}, xoxo"]


def test_people_are_taken_apart_where_all_genders_and_tones_are_there(tmp_path, monkeypatch, npz):
    prepare(monkeypatch, tmp_path / "out", "--npz", npz, "--skin-tones", "--captions", "--size", 8)
    rows = read(tmp_path / "out" / "train")
    for (label, name, _, _), found in COMPLETE:
        assert {key: rows[name][key] for key in found} == found
        # No keyword calls a woman a man.
        phrase = name.replace(": ", " with ")
        assert rows[name]["text"] == [name, phrase, f"{name}, worker"] and rows[name]["label"] == label
    for _, name, _, _ in OTHERS:
        assert {key: rows[name][key] for key in NONE} == NONE


@pytest.mark.parametrize("share, triples", [(0.05, 3), (0.2, 12), (0.5, 30)])
def test_held_out_combinations_are_in_no_other_split(tmp_path, monkeypatch, capsys, npz, share, triples):
    words = ["--npz", npz, "--skin-tones", "--captions", "--size", 8, "--hold-out", share]
    prepare(monkeypatch, tmp_path / "out", *words)
    train, test = read(tmp_path / "out" / "train"), read(tmp_path / "out" / "test")
    out = capsys.readouterr().out.splitlines()
    assert out == [
        f"{len(rows)} pictures in {tmp_path / 'out' / name}" for name, rows in (("train", train), ("test", test))
    ]
    assert len(train) + len(test) == len(EMOJI) and not train.keys() & test.keys()

    def of(rows):
        return {(row["role"].split(",")[0], row["gender"], row["tone"]) for row in rows.values() if row["role"]}

    # Both directions of a person walking are held out together.
    assert len(of(test)) == triples and not of(train) & of(test)
    for role, gender, tone in of(test):
        assert any(triple[:2] == (role, gender) for triple in of(train))
        assert any(triple[::2] == (role, tone) for triple in of(train))
    # As evenly over the roles as the number allows.
    counts = [sum(triple[0] == role for triple in of(test)) for role in ("cook", "judge", "pilot", "walking")]
    assert max(counts) - min(counts) <= 1
    prepare(monkeypatch, tmp_path / "again", *words)
    assert read(tmp_path / "again" / "test") == test


def test_without_captions_nothing_but_pictures_is_written(tmp_path, monkeypatch, npz):
    for _ in range(2):  # over those of before
        prepare(monkeypatch, tmp_path / "out", "--npz", npz, "--size", 8)
    files = [path for path in tmp_path.glob("out/**/*") if path.is_file()]
    assert len(files) == 3 and {path.suffix for path in files} == {".png"}


@pytest.mark.parametrize(
    "words, message",
    [
        (["--hold-out", 0.6, "--captions", "--skin-tones"], r"`--hold-out` has to lie in \[0, 0.5\], got 0.6"),
        (["--hold-out", 0.1, "--captions"], "`--hold-out` goes with `--captions` and `--skin-tones` only"),
        (["--hold-out", 0.1, "--skin-tones"], "`--hold-out` goes with `--captions` and `--skin-tones` only"),
        (
            ["--hold-out", 0.1, "--captions", "--skin-tones", "--classes", "hand"],
            "`--hold-out` 0.1 finds nothing to hold out among 0 people",
        ),
        (["--test-fraction", 1.0], r"`--test-fraction` has to lie in \[0, 1\), got 1.0"),
        (
            ["--test-fraction", 0.1, "--hold-out", 0.1, "--captions", "--skin-tones"],
            "`--test-fraction` and `--hold-out` both choose what is in `test`",
        ),
    ],
)
def test_options_that_do_not_go_together(tmp_path, monkeypatch, npz, words, message):
    with pytest.raises(ValueError, match=message):
        prepare(monkeypatch, tmp_path / "out", "--npz", npz, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [[], ["--max-per-class", 1], ["--skin-tones", "--captions", "--hold-out", 0.1]])
def test_pictures_of_another_choice_do_not_stay_among_them(tmp_path, monkeypatch, npz, words):
    prepare(monkeypatch, tmp_path / "out", "--npz", npz, "--skin-tones", "--captions")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"`output_dir` holds \d+ other files, such as '.*': choose another"):
        prepare(monkeypatch, tmp_path / "out", "--npz", npz, *words)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_npz_without_names_has_no_captions(tmp_path, monkeypatch, npz):
    with np.load(npz) as arrays:
        np.savez(tmp_path / "short.npz", **{name: arrays[name] for name in arrays if name not in ("name", "tags")})
    with pytest.raises(ValueError, match=r"`--npz` '.*short.npz' lacks the arrays \['name', 'tags'\]"):
        prepare(monkeypatch, tmp_path / "out", "--npz", tmp_path / "short.npz", "--captions")
    prepare(monkeypatch, tmp_path / "out", "--npz", tmp_path / "short.npz")
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3


def png(colour):
    file = io.BytesIO()
    Image.new("RGBA", (64, 64), colour).save(file, "png")
    return file.getvalue()


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A program `npm` that packs two small packages, and the list of those it was asked for."""
    wave = {
        "unified": "1F44B",
        "image": "wave.png",
        "category": "People & Body",
        "subcategory": "hand-fingers-open",
        "sort_order": 2,
        "has_img_google": True,
        "skin_variations": {"1F3FF": {"unified": "1F44B-1F3FF", "image": "wave-dark.png"}},
    }
    cloud = {"unified": "2601-FE0F", "image": "cloud.png", "category": "Travel & Places", "sort_order": 1}
    cloud |= {"subcategory": "sky & weather", "has_img_google": True}
    twin = cloud | {"unified": "26C5", "sort_order": 3}  # drawn twice
    flag = cloud | {"unified": "1F3F3", "category": "Flags", "image": "missing.png"}
    names = [
        {"hexcode": "2601", "label": "cloud\u2019s picture", "tags": ["sky"]},
        {
            "hexcode": "1F44B",
            "label": "waving hand",
            "tags": ["bye"],
            "skins": [{"hexcode": "1F44B-1F3FF", "label": "waving hand: dark skin tone"}],
        },
        {"hexcode": "26C5", "label": "twin"},
    ]
    packages = {
        "emoji-datasource-google@16.0.0": {
            "emoji.json": json.dumps([twin, wave, flag, cloud]).encode(),
            "img/google/64/wave.png": png("yellow"),
            "img/google/64/wave-dark.png": png("brown"),
            "img/google/64/cloud.png": png((0, 0, 255, 0)),
            "img/other/64/cloud.png": b"",
        },
        "emojibase-data@17.0.0": {"en/data.json": json.dumps(names).encode(), "en/other.json": b""},
    }
    store = tmp_path / "npm"
    store.mkdir()
    for package, files in packages.items():
        with tarfile.open(store / f"{package}.tgz", "w:gz") as archive:
            for path, data in files.items():
                member = tarfile.TarInfo(f"package/{path}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    program = store / "npm"
    program.write_text(
        f"#!{sys.executable}\nimport shutil, sys\n"
        f"open({str(store / 'asked')!r}, 'a').write(sys.argv[-1] + '\\n')\n"
        f"print(shutil.copy(f'{store}/{{sys.argv[-1]}}.tgz', 'packed.tgz'))\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(store), prepend=":")
    return store / "asked"


def test_names_come_from_a_second_package(tmp_path, monkeypatch, npm):
    prepare(monkeypatch, tmp_path / "out", "--skin-tones", "--captions", "--size", 8)
    assert npm.read_text().splitlines() == ["emojibase-data@17.0.0", "emoji-datasource-google@16.0.0"]
    rows = read(tmp_path / "out" / "train")
    wave, dark = "waving hand", "waving hand: dark skin tone"
    assert {name: (row["file_name"], row["text"]) for name, row in rows.items()} == {
        "cloud's picture": ("sky/2601-FE0F.png", ["cloud's picture", "cloud's picture, sky"]),
        wave: ("hand/1F44B.png", [wave, f"{wave}, bye"]),
        dark: ("hand/1F44B-1F3FF.png", [dark, "waving hand with dark skin tone", f"{dark}, bye"]),
    }
    picture = Image.open(tmp_path / "out" / "train" / rows["cloud's picture"]["file_name"])
    assert picture.size == (8, 8) and picture.getpixel((0, 0)) == (255, 255, 255)


def test_names_are_not_fetched_without_captions(tmp_path, monkeypatch, npm):
    prepare(monkeypatch, tmp_path / "out")
    assert npm.read_text().splitlines() == ["emoji-datasource-google@16.0.0"]
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.png")) == ["1F44B.png", "2601-FE0F.png"]


def test_only_the_first_of_a_class_are_kept_if_asked(tmp_path, monkeypatch, npz):
    prepare(monkeypatch, tmp_path / "all", "--npz", npz, "--skin-tones", "--size", 8)
    prepare(monkeypatch, tmp_path / "few", "--npz", npz, "--skin-tones", "--size", 8, "--max-per-class", 2)
    every, few = (
        {
            folder.name: sorted(path.name for path in folder.iterdir())
            for folder in (tmp_path / name / "train").iterdir()
        }
        for name in ("all", "few")
    )
    assert few == {label: names[:2] for label, names in every.items()}  # here, names count up in Unicode's order
    assert max(map(len, every.values())) > 2


def test_a_share_of_each_class_is_kept_for_a_test_always_the_same(tmp_path, monkeypatch, capsys, npz):
    words = ["--npz", npz, "--skin-tones", "--size", 8, "--test-fraction", 0.2]
    kept = []
    for name in ("first", "second"):
        prepare(monkeypatch, tmp_path / name, *words)
        paths = sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*.png"))
        splits = [
            {path.relative_to(split) for path in paths if path.is_relative_to(split)} for split in ("train", "test")
        ]
        kept.append(splits)
        assert capsys.readouterr().out.endswith(f"{len(splits[1])} pictures in {tmp_path / name / 'test'}\n")
    (train, test), again = kept
    assert [train, test] == again and len(train | test) == len(train) + len(test) == len(EMOJI)
    people = {path.name for path in test if path.parent.name == "working person"}
    assert len(people) == round(0.2 * sum(label == "working person" for label, *_ in EMOJI))
    assert (
        sorted(people)
        != sorted(path.name for path in train | test if path.parent.name == "working person")[: len(people)]
    )


def test_an_empty_selection_is_refused(tmp_path, monkeypatch, npz):
    for option in ("--max-per-class", "--size"):
        with pytest.raises(ValueError, match=option):
            prepare(monkeypatch, tmp_path / "out", "--npz", npz, option, 0)
    assert not (tmp_path / "out").exists()
