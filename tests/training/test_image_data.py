# SPDX-License-Identifier: Apache-2.0
"""Reading pictures: every layout of a folder, every kind of picture, and what the training makes of them."""

import io
import json
import shutil
import socket
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image

from common import seeded
from mar_hf.training import image_data


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
# Class -> pictures, whose colour tells them apart after everything that happens to them.
PICTURES = {
    "clear": [Image.new("RGBA", (12, 12), (0, 0, 0, 0)), Image.new("LA", (20, 9), (0, 0))],
    "grey": [Image.new("L", (9, 30), 128), Image.new("L", (8, 8), 128), Image.new("L", (33, 21), 128)],
    "palette": [Image.new("P", (17, 11)), Image.new("P", (64, 48))],
}
for palette_picture in PICTURES["palette"]:
    palette_picture.putpalette([*BLUE, *RED])
MEANS = {"clear": (255, 255, 255), "grey": (128, 128, 128), "palette": BLUE}


@pytest.fixture(autouse=True)
def no_host_is_asked(monkeypatch):
    # datasets reports what it takes for its own loaders to a server of its authors, and swallows what goes wrong then.
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host) or [])
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    yield
    assert not asked


def write(folder, names=tuple(PICTURES)):
    """Each class in a folder of its own."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for number, picture in enumerate(PICTURES[name]):
            picture.save(folder / name / f"{number}.png")
    return folder


def as_flat_folder(folder):
    write(folder)


def as_folder_with_splits(folder):
    write(folder / "train")
    write(folder / "test", ["grey"])


def as_folder_with_captions(folder):
    write(folder)
    for picture in list(folder.rglob("*.png")):
        picture.with_suffix(".txt").write_text("a picture")
        picture.with_suffix(".caption").write_text("a picture")


def as_parquet(folder):
    dataset = image_data.load_image_dataset(str(write(folder / "source")))
    folder = folder / "parquet"
    folder.mkdir()
    dataset.to_parquet(str(folder / "pictures.parquet"))
    return folder


def as_parquet_with_splits(folder):
    dataset = image_data.load_image_dataset(str(write(folder / "source")))
    folder = folder / "parquet"
    (folder / "data").mkdir(parents=True)
    dataset.select(range(3)).to_parquet(str(folder / "data" / "train-00000-of-00002.parquet"))
    dataset.select(range(3, 7)).to_parquet(str(folder / "data" / "train-00001-of-00002.parquet"))
    dataset.select([0]).to_parquet(str(folder / "data" / "test-00000-of-00001.parquet"))
    return folder


def as_saved_dataset(folder):
    dataset = image_data.load_image_dataset(str(write(folder / "source")))
    dataset.save_to_disk(str(folder / "saved"))
    return folder / "saved"


def as_saved_splits(folder):
    dataset = image_data.load_image_dataset(str(write(folder / "source")))
    DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize(
    "layout",
    [
        as_flat_folder,
        as_folder_with_splits,
        as_folder_with_captions,
        as_parquet,
        as_parquet_with_splits,
        as_saved_dataset,
        as_saved_splits,
    ],
)
def test_every_layout_gives_the_same_pictures_and_labels(tmp_path, layout):
    folder = layout(tmp_path) or tmp_path
    dataset = image_data.load_image_dataset(str(folder))
    assert isinstance(dataset.features["label"], ClassLabel)
    assert dataset.features["label"].names == sorted(PICTURES)
    assert dataset["row"][:] == list(range(7))
    rows = dataset.with_transform(image_data.ImageTransform(8))[:]
    assert rows["label"] == [0, 0, 1, 1, 1, 2, 2]
    for label, pixel_values in zip(rows["label"], rows["pixel_values"], strict=True):
        assert pixel_values.shape == (3, 8, 8) and pixel_values.dtype == torch.float32
        expected = torch.tensor(MEANS[sorted(PICTURES)[label]]) / 127.5 - 1
        assert torch.allclose(pixel_values, expected[:, None, None].expand(3, 8, 8), atol=1e-6)


def test_pictures_without_classes(tmp_path):
    PICTURES["grey"][0].save(tmp_path / "0.png")
    dataset = image_data.load_image_dataset(str(tmp_path))
    assert dataset.column_names == ["image", "row"]
    assert dataset.with_transform(image_data.ImageTransform(8))[:]["label"] == [-1]


def saved_without_images(folder):
    dataset = image_data.load_image_dataset(str(write(folder / "source")))
    dataset.select_columns("label").save_to_disk(str(folder / "saved"))
    return folder / "saved"


def only_a_test_split(folder):
    write(folder / "test")
    return folder


def saved_without_train(folder):
    dataset = image_data.load_image_dataset(str(write(folder / "source")))
    DatasetDict(test=dataset).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def text_only(folder):
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: folder / "missing", "is not a folder"),
        (lambda folder: folder, "holds no pictures to train on"),
        (text_only, "holds no pictures to train on"),
        (only_a_test_split, r"holds no pictures to train on: it has no split 'train', only \['test'\]"),
        (saved_without_train, "holds no pictures to train on: 'train'"),
        (saved_without_images, r"holds no column `image`, only \['label'\]"),
    ],
)
def test_folders_that_can_not_be_used(tmp_path, make, message):
    folder = make(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        image_data.load_image_dataset(str(folder))
    assert f"`train_data_dir` {str(folder)!r}" in str(error.value)


# Folders and labels that are not what they should be


def test_empty_class_folders_are_named_and_skipped(tmp_path):
    write(tmp_path)
    for name in ("a_first", "middle/inside", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "middle" / "notes.txt").write_text("no picture")
    with pytest.warns(UserWarning, match=r"folders without pictures, which are skipped: \['a_first', 'middle'\]"):
        dataset = image_data.load_image_dataset(str(tmp_path))
    # The names go with the numbers.
    names = dataset.features["label"].names
    assert names == sorted(PICTURES)
    paths = [Path(value["path"]) for value in dataset["image"]]
    assert [names[label] for label in dataset["label"]] == [path.parent.name for path in paths]


def test_pictures_at_several_depths_have_no_classes(tmp_path):
    write(tmp_path)
    (tmp_path / "grey" / "inside").mkdir()
    PICTURES["grey"][0].save(tmp_path / "grey" / "inside" / "0.png")
    with pytest.warns(UserWarning, match="pictures at several depths, so its folders are no classes"):
        dataset = image_data.load_image_dataset(str(tmp_path))
    assert len(dataset) == 8 and "label" not in dataset.column_names


def test_classes_may_have_the_names_of_splits(tmp_path):
    for name in ("test tube", "train", "val 2", "zebra"):
        shutil.copytree(write(tmp_path / "source" / name, ["grey"]) / "grey", tmp_path / "data" / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = image_data.load_image_dataset(str(tmp_path / "data"))
    assert dataset.features["label"].names == ["test tube", "train", "val 2", "zebra"] and len(dataset) == 12


def load_quietly(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return image_data.load_image_dataset(str(folder))


def names_of(dataset):
    return sorted(Path(value["path"]).name for value in dataset["image"])


@pytest.mark.parametrize("name", ["set[1]", "set*", "a?b", "{a,b}", "#1", "100%", "a b"])
@pytest.mark.parametrize("layout", [as_flat_folder, as_parquet, as_saved_dataset, as_parquet_with_splits])
def test_folders_may_have_any_name(tmp_path, name, layout):
    folder = tmp_path / name
    folder.mkdir()
    dataset = image_data.load_image_dataset(str(layout(folder) or folder))
    assert len(dataset) == 7 and dataset.features["label"].names == sorted(PICTURES)
    assert len(dataset.with_transform(image_data.ImageTransform(8))[:]["pixel_values"]) == 7


@pytest.mark.parametrize("stray", ["__MACOSX", ".ipynb_checkpoints", ".git", "notes"])
def test_test_pictures_are_not_trained_on_whatever_lies_beside_them(tmp_path, stray):
    write(tmp_path / "TRAIN")
    write(tmp_path / "Test", ["grey"])
    (tmp_path / stray).mkdir()
    if stray != "notes":  # a folder with a picture of its own would be a class
        PICTURES["grey"][0].save(tmp_path / stray / "._0.png")
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    assert len(load_quietly(tmp_path)) == 7
    PICTURES["grey"][0].save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"\['TRAIN', 'Test'\] look like splits, but \['files'\] beside them"):
        image_data.load_image_dataset(str(tmp_path))


def test_linked_class_folders_are_classes(tmp_path):
    write(tmp_path / "elsewhere")
    (tmp_path / "data").mkdir()
    for name in PICTURES:
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere" / name)
    dataset = load_quietly(tmp_path / "data")
    assert len(dataset) == 7 and dataset.features["label"].names == sorted(PICTURES)
    (tmp_path / "data" / "lost").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="lost' can't be read: No such file or directory"):
        image_data.load_image_dataset(str(tmp_path / "data"))


def test_files_without_an_ending_are_what_they_hold(tmp_path):
    (tmp_path / "one").write_bytes(png(PICTURES["grey"][0]))
    (tmp_path / "README").write_text("not a picture")
    PICTURES["grey"][1].save(tmp_path / "two.PNG")
    assert names_of(load_quietly(tmp_path)) == ["one", "two.PNG"]


def test_pictures_that_nothing_here_opens_are_named(tmp_path):
    write(tmp_path, ["grey"])
    (tmp_path / "grey" / "1.HEIC").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"'grey/1\.HEIC' is a picture of a kind that Pillow does not open"):
        image_data.load_image_dataset(str(tmp_path))


def test_pictures_beside_parquet_files_are_not_understood(tmp_path):
    folder = as_parquet(tmp_path)
    write(folder, ["grey"])
    with pytest.raises(ValueError, match=r"holds both pictures \('grey/0\.png', say\) and parquet files"):
        image_data.load_image_dataset(str(folder))


def test_parquet_files_of_no_split_beside_others_are_not_understood(tmp_path):
    folder = as_parquet_with_splits(tmp_path)
    shutil.copy(folder / "data" / "test-00000-of-00001.parquet", folder / "more.parquet")
    with pytest.raises(ValueError, match=r"'more\.parquet' is of no split, though other files are"):
        image_data.load_image_dataset(str(folder))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_metadata_may_be_of_other_kinds(tmp_path, kind):
    write(tmp_path, ["grey"])
    rows = {"file_name": ["grey/2.png", "grey/0.png"], "text": ["a, b", "c"], "label": ["x", "y"]}
    table = Dataset.from_dict(rows)
    getattr(table, f"to_{kind}")(str(tmp_path / f"metadata.{kind}"))
    with pytest.warns(UserWarning, match="1 pictures of .* are in no row of its metadata"):
        dataset = image_data.load_image_dataset(str(tmp_path))
    assert dataset["text"][:] == [["a, b"], ["c"]] and dataset["label"][:] == [0, 1]
    assert [Path(value["path"]).name for value in dataset["image"]] == ["2.png", "0.png"]


@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd", "grey/9.png", "metadata.jsonl", "null"])
def test_metadata_name_pictures_of_their_folder(tmp_path, name):
    write(tmp_path / "data", ["grey"])
    PICTURES["grey"][0].save(tmp_path / "outside.png")
    value = None if name == "null" else name
    (tmp_path / "data" / "metadata.jsonl").write_text(json.dumps({"file_name": value, "text": "a"}))
    with pytest.raises(ValueError, match=r"row 0 of 'metadata\.jsonl' names .*, which is no picture in this folder"):
        image_data.load_image_dataset(str(tmp_path / "data"))


def png(picture):
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()


def labelled(folder, labels, feature):
    """A folder of parquet with a grey picture for each label."""
    rows = {"image": [{"bytes": png(PICTURES["grey"][0]), "path": None}] * len(labels), "label": labels}
    folder.mkdir()
    features = Features({"image": datasets.Image(), "label": feature})
    Dataset.from_dict(rows, features=features).to_parquet(str(folder / "pictures.parquet"))
    return str(folder)


def test_numbers_and_names_become_classes(tmp_path):
    dataset = image_data.load_image_dataset(
        labelled(tmp_path / "numbers", [2, 0, 1, 10, *range(3, 10)], Value("int64"))
    )
    assert dataset.features["label"].names == [str(number) for number in range(11)]
    assert dataset["label"][:] == [2, 0, 1, 10, *range(3, 10)]
    dataset = image_data.load_image_dataset(
        labelled(tmp_path / "names", ["cat", "ant", "bee", "cat"], Value("string"))
    )
    assert dataset.features["label"].names == ["ant", "bee", "cat"]
    assert dataset["label"][:] == [2, 0, 1, 2]
    with pytest.warns(UserWarning, match=r"has 1 classes without pictures, \['0'\] say"):
        image_data.load_image_dataset(labelled(tmp_path / "from one on", [1, 2, 3, 3], Value("int64")))


@pytest.mark.parametrize(
    "labels, feature, message",
    [
        ([0, 1, 7, 1], Value("int64"), r"label 7 of row 2 is not in 0\.\.3"),
        ([0, 1, 1, -1], Value("int64"), r"label -1 of row 3 is not in 0\.\.1"),
        ([0, -1, 1], ClassLabel(num_classes=2), r"label -1 of row 1 is not in 0\.\.1"),
        ([0, None, 1], ClassLabel(num_classes=2), r"label None of row 1 is not in 0\.\.1"),
        ([None, 0, 1], Value("int64"), r"label None of row 0 is not in 0\.\.1"),
        (["cat", None], Value("string"), r"label None of row 1 is not in 0\.\.0"),
        ([0.5, 1.0], Value("float32"), r"`label` has to hold class numbers or names, not Value\('float32'\)"),
    ],
)
def test_labels_out_of_range(tmp_path, labels, feature, message):
    path = labelled(tmp_path / "data", labels, feature)
    with pytest.raises(ValueError, match=message) as error:
        image_data.load_image_dataset(path)
    assert f"`train_data_dir` {path!r}" in str(error.value)


def test_a_label_out_of_range_is_named_by_its_file(tmp_path):
    PICTURES["grey"][0].save(tmp_path / "0.png")
    PICTURES["grey"][1].save(tmp_path / "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,0\n1.png,-2\n")
    with pytest.raises(ValueError, match=r"label -2 of '.*1\.png' \(row 1\) is not in 0\.\.0"):
        image_data.load_image_dataset(str(tmp_path))


# Captions


def captioned(folder, *rows):
    """A folder of grey pictures, `0.png` and so on, with a row of metadata for each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, row in enumerate(rows):
        name = f"{row.get('label', '')}/{number}.png".removeprefix("/")
        (folder / name).parent.mkdir(exist_ok=True)
        PICTURES["grey"][0].save(folder / name)
        lines.append(json.dumps({"file_name": name, **row}, ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


UNICODE = ["crêpe", "cafe\u0301 ﬁn", "红包 🧧", "5\u20130\u2028line", 'a "quote", a comma', "İ"]


def test_captions_of_a_folder_with_classes(tmp_path):
    rows = [{"text": [text, f"{text}, twice"], "label": label} for text, label in zip(UNICODE, "bababb", strict=True)]
    rows[1]["text"] = ["one only"]
    captioned(tmp_path / "train", *rows)
    captioned(tmp_path / "test", {"text": ["not read"], "label": "a"})
    dataset = image_data.load_image_dataset(str(tmp_path))
    assert sorted(dataset.column_names) == ["image", "label", "row", "text"]
    # Folders give no labels beside metadata, so these hold them.
    assert dataset.features["label"].names == ["a", "b"] and dataset["label"][:] == [1, 0, 1, 0, 1, 1]
    assert dataset["text"][:] == [row["text"] for row in rows]
    out = dataset.with_transform(image_data.ImageTransform(8)).__getitems__([1, 0])
    assert [row["text"] for row in out] == [["one only"], rows[0]["text"]]
    assert [row["label"] for row in out] == [0, 1] and out[0]["pixel_values"].shape == (3, 8, 8)


@pytest.mark.parametrize("as_lists", [False, True])
def test_captions_are_lists_whatever_they_were(tmp_path, as_lists):
    captioned(tmp_path, *({"text": [text] if as_lists else text} for text in UNICODE))
    dataset = image_data.load_image_dataset(str(tmp_path))
    assert sorted(dataset.column_names) == ["image", "row", "text"]
    assert dataset["text"][:] == [[text] for text in UNICODE]


@pytest.mark.parametrize("as_lists", [False, True])
def test_captions_of_parquet_files(tmp_path, as_lists):
    pictures = [{"bytes": png(PICTURES["grey"][0]), "path": None}] * len(UNICODE)
    rows = {"image": pictures, "prompt": [[text] * 2 if as_lists else text for text in UNICODE]}
    Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "pictures.parquet"))
    dataset = image_data.load_image_dataset(str(tmp_path), caption_column="prompt")
    assert dataset["text"][:] == [[text] * (1 + as_lists) for text in UNICODE]
    # What nobody asked for is left out.
    assert image_data.load_image_dataset(str(tmp_path)).column_names == ["image", "row"]


def test_captions_can_be_left_out(tmp_path):
    captioned(tmp_path, {"text": "some"}, {"nothing": 0})
    dataset = image_data.load_image_dataset(str(tmp_path), caption_column=None)
    assert dataset.column_names == ["image", "row"]
    assert set(dataset.with_transform(image_data.ImageTransform(8))[0]) == {"pixel_values", "label"}


@pytest.mark.parametrize(
    "rows, row, value",
    [
        ([{"text": "a"}, {"label": "x"}], 1, "None"),
        ([{"text": "a"}, {"text": None}], 1, "None"),
        ([{"text": "a"}, {"text": ""}], 1, "''"),
        ([{"text": " \n"}, {"text": "a"}], 0, r"' \\n'"),
        ([{"text": ["a"]}, {"text": []}], 1, r"\[\]"),
        ([{"text": ["a", ""]}, {"text": ["b"]}], 0, r"\['a', ''\]"),
        ([{"text": ["a"]}, {"text": ["b", None]}], 1, r"\['b', None\]"),
        ([{"text": 3}, {"text": 4}], 0, "3"),
        ([{"text": [[1]]}, {"text": [[2]]}], 0, r"\[\[1\]\]"),
        ([{"text": {"en": "a"}}, {"text": {"en": "b"}}], 0, r"\{'en': 'a'\}"),
    ],
)
def test_a_picture_without_a_caption_is_named(tmp_path, rows, row, value):
    captioned(tmp_path, *rows)
    message = (
        rf"`text` of '.*{row}\.png' \(row {row}\) has to be a caption or a list of captions, none .*, got {value}\."
    )
    with pytest.raises(ValueError, match=message) as error:
        image_data.load_image_dataset(str(tmp_path))
    assert f"`train_data_dir` {str(tmp_path)!r}" in str(error.value)


def test_metadata_that_can_not_be_read_say_why(tmp_path):
    captioned(tmp_path, {"text": "a"}, {"text": ["b"]})
    with pytest.raises(ValueError, match=r"holds no pictures to train on: .*text.* changed from string to array"):
        image_data.load_image_dataset(str(tmp_path))


def test_folders_beside_metadata_without_labels_are_no_classes(tmp_path):
    write(tmp_path)
    lines = [{"file_name": f"{name}/0.png", "text": name} for name in PICTURES]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with pytest.warns(UserWarning, match="has metadata without `label`, so its folders are no classes"):
        dataset = image_data.load_image_dataset(str(tmp_path))
    assert dataset["text"][:] == [[name] for name in PICTURES] and "label" not in dataset.column_names


# Pictures


def truncated(data):
    return data[: len(data) // 2]


@pytest.mark.parametrize("damage", [truncated, lambda data: b"", lambda data: b"not a picture"])
def test_pictures_that_can_not_be_read_are_named(tmp_path, damage):
    write(tmp_path)
    broken = tmp_path / "grey" / "1.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    broken.write_bytes(damage(png(Image.fromarray(noise))))
    dataset = image_data.load_image_dataset(str(tmp_path)).with_transform(image_data.ImageTransform(8))
    row = next(i for i, label in enumerate(dataset["label"]) if label == 1) + 1
    with pytest.raises(ValueError, match=rf"The picture '{broken}' \(row {row}\) can't be read"):
        dataset.__getitems__(list(range(len(dataset))))
    assert len(dataset.__getitems__([i for i in range(len(dataset)) if i != row])) == 6


def test_pictures_that_can_not_be_read_are_named_by_their_row(tmp_path):
    rows = [{"bytes": png(PICTURES["grey"][0]), "path": None}, {"bytes": b"not a picture", "path": None}, None]
    features = Features({"image": datasets.Image()})
    Dataset.from_dict({"image": rows}, features=features).to_parquet(str(tmp_path / "pictures.parquet"))
    dataset = image_data.load_image_dataset(str(tmp_path)).with_transform(image_data.ImageTransform(8))
    assert dataset[0]["pixel_values"].shape == (3, 8, 8)
    for row in (1, 2):
        with pytest.raises(ValueError, match=f"The picture row {row} can't be read"):
            dataset[row]


def test_pictures_are_turned_as_their_camera_says(tmp_path):
    picture = Image.new("RGB", (16, 16), RED)
    picture.paste(GREEN, (0, 0, 16, 8))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "0.png", exif=exif)
    dataset = image_data.load_image_dataset(str(tmp_path)).with_transform(image_data.ImageTransform(16))
    pixel_values = dataset[0]["pixel_values"]
    assert pixel_values[:, 0, 0].tolist() == [1, -1, -1] and pixel_values[:, -1, 0].tolist() == [-1, 1, -1]


def test_the_middle_is_cut_out():
    picture = Image.new("RGB", (30, 10), RED)
    picture.paste(GREEN, (10, 0, 20, 10))
    picture.paste(BLUE, (20, 0, 30, 10))
    for size in (5, 10, 20):
        for turned in (picture, picture.transpose(Image.Transpose.ROTATE_90)):
            cropped = np.asarray(image_data.center_crop(turned, size))
            assert cropped.shape == (size, size, 3)
            # Resizing blends the colours at the borders only.
            assert (cropped[size // 4 : -(size // 4), size // 4 : -(size // 4)] == GREEN).all()


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (300, 5), (8, 8), (16, 17), (15, 15), (1000, 700)])
def test_any_size_becomes_a_square(size):
    assert image_data.center_crop(Image.new("RGB", size), 8).size == (8, 8)


def palette_with_clear_colour():
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([*BLUE, *RED])
    picture.info["transparency"] = 1
    return picture


@pytest.mark.parametrize(
    "picture, colour",
    [
        (Image.new("RGBA", (8, 8), (255, 0, 0, 255)), RED),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 51)), (255, 204, 204)),
        (palette_with_clear_colour(), (255, 255, 255)),
        (Image.new("1", (8, 8), 1), (255, 255, 255)),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), RED),
        (Image.fromarray(np.full((8, 8), 257 * 100, dtype=np.uint16)), (100, 100, 100)),
    ],
    ids=["opaque", "half clear", "clear palette entry", "two colours", "ink", "16 bits"],
)
def test_colours_survive_the_conversion(picture, colour):
    cropped = np.asarray(image_data.center_crop(picture, 8))
    assert np.abs(cropped.astype(int) - np.array(colour)).max() <= 1


@pytest.mark.parametrize(("channels", "expected"), [(1, [1]), (2, [-1, -1]), (3, [1, 1, 1]), (4, [-1, -1, -1, -1])])
def test_pictures_have_the_channels_of_the_tokenizer(channels, expected):
    rows = {"image": [{"bytes": png(PICTURES["clear"][0]), "path": None}], "row": [0]}
    pixel_values = image_data.ImageTransform(8, channels)(rows)["pixel_values"][0]
    assert pixel_values.shape == (channels, 8, 8) and pixel_values[:, 0, 0].tolist() == expected
    with pytest.raises(ValueError, match="with 1, 2, 3 or 4 channels, not with 5"):
        image_data.ImageTransform(8, 5)


def test_numbers_out_of_range_are_told_with_their_file(tmp_path):
    Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32)).save(tmp_path / "0.tif")
    dataset = image_data.load_image_dataset(str(tmp_path)).with_transform(image_data.ImageTransform(8))
    with pytest.raises(ValueError, match=r"The picture '.*0\.tif' \(row 0\) can't be read: mode 'F' .* got nan"):
        dataset[0]


def test_turned_deep_pictures_keep_their_range(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.full((8, 6), 32768, dtype=np.int32)).save(tmp_path / "0.tif", exif=exif)
    dataset = image_data.load_image_dataset(str(tmp_path)).with_transform(image_data.ImageTransform(4))
    assert dataset[0]["pixel_values"].abs().max() < 0.01


def test_black_is_minus_one_and_white_is_one():
    pictures = [png(Image.new("RGB", (4, 4), colour)) for colour in ("black", "white")]
    rows = {"image": [{"bytes": data, "path": None} for data in pictures], "row": [0, 1], "label": [5, 3]}
    out = image_data.ImageTransform(4)(rows)
    assert [(p.min().item(), p.max().item()) for p in out["pixel_values"]] == [(-1, -1), (1, 1)]
    assert out["label"] == [5, 3]


def numbered_pictures(batch=64, size=6):
    return torch.arange(batch * 3 * size * size, dtype=torch.float32).reshape(batch, 3, size, size)


def test_without_settings_nothing_is_augmented():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    pictures = numbered_pictures()
    assert torch.equal(image_data.augment(pictures, generator), pictures)
    assert torch.equal(generator.get_state(), before)


def test_flips_mirror_about_half_of_the_pictures():
    pictures = numbered_pictures()
    flipped = image_data.augment(pictures, torch.Generator().manual_seed(0), flip=True)
    mirrored = [torch.equal(after, before.flip(2)) for after, before in zip(flipped, pictures, strict=True)]
    same = [torch.equal(after, before) for after, before in zip(flipped, pictures, strict=True)]
    assert [a != b for a, b in zip(mirrored, same, strict=True)] == [True] * 64
    assert 16 < sum(mirrored) < 48


def test_shifts_stay_in_bounds_and_repeat_the_edge():
    pictures, shift = numbered_pictures(), 2
    moved = image_data.augment(pictures, torch.Generator().manual_seed(0), shift=shift)
    assert moved.shape == pictures.shape
    rows = torch.arange(6)
    found = set()
    for before, after in zip(pictures, moved, strict=True):
        offsets = [
            (y, x)
            for y in range(-shift, shift + 1)
            for x in range(-shift, shift + 1)
            if torch.equal(after, before[:, (rows + y).clamp(0, 5)][:, :, (rows + x).clamp(0, 5)])
        ]
        assert len(offsets) == 1
        found.add(offsets[0])
    assert {y for y, _ in found} == {x for _, x in found} == {-2, -1, 0, 1, 2}


def test_augmentation_depends_on_its_generator_only():
    pictures = numbered_pictures()

    def augmented(seed):
        return image_data.augment(pictures, torch.Generator().manual_seed(seed), flip=True, shift=1)

    first = augmented(0)
    torch.manual_seed(1)
    assert torch.equal(augmented(0), first)
    assert not torch.equal(augmented(1), first)


def test_each_picture_follows_its_own_generator():
    pictures = numbered_pictures(8)
    together = image_data.augment(pictures, [seeded(number) for number in range(8)], flip=True, shift=2)
    for number in range(8):
        alone = image_data.augment(pictures[number : number + 1], [seeded(number)], flip=True, shift=2)
        assert torch.equal(together[number : number + 1], alone)
    # Not all alike: they do depend on it.
    moved = [torch.equal(after, before) for after, before in zip(together, pictures, strict=True)]
    assert sum(moved) < 4
    with pytest.raises(ValueError, match=r"`generator` has to hold one generator per image \(8\), got 2"):
        image_data.augment(pictures, [seeded(0), seeded(1)], flip=True)
