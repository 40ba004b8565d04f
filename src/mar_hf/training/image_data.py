# SPDX-License-Identifier: Apache-2.0
"""Reading pictures: folders and data sets in, (B, channels, H, W) tensors in [-1, 1] out."""

import glob
import io
import os
import pathlib
import posixpath
import re
import warnings
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageFile, ImageOps
from torch.utils.data import DataLoader

from ..utils import check_generator, draw, import_extra
from .folders import SPLITS, TRAINING, Tree, class_folders, read_tree, training_prefix
from .picture_modes import center_crop, check_channels


if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset


METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}
# Pillow opens some of these files, but can't read pictures from them.
NO_PICTURES = {".h5", ".hdf", ".mpg", ".mpeg", ".grib", ".bufr"}
# Pictures that Pillow may open with a plugin only.
FOREIGN = {".heic", ".heif", ".hif", ".jxl", ".svg", ".exr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw"}


def load_image_dataset(path: str, caption_column: str | None = "text") -> "Dataset":
    """The training split of a folder of pictures.

    Nothing but the folder is read: pictures stay undecoded until [`ImageTransform`] asks for them, and no host is told
    of it. Links are followed; what is hidden or left by systems (`.git`, `__MACOSX`, `Thumbs.db`) is passed over. A
    file whose name has no ending is a picture where Pillow opens it. Class folders without pictures are skipped with a
    warning; the other classes are numbered in the order of their names.

    Args:
        path (`str`): a folder with one sub-folder a class (with or without a `train` level, in upper or lower case; a
            single class or folders inside class folders give no labels), one of parquet files, or what
            `Dataset.save_to_disk` wrote. A `metadata.jsonl` (or `.csv`, `.parquet`) beside the pictures or class
            folders names the pictures, as `file_name`, and their columns; folders then give no labels.
        caption_column (`str`, *optional*, defaults to `"text"`): the column of captions, strings or lists of them.
            None leaves captions out.

    Returns:
        `Dataset`: columns `image` (undecoded), `row` (its number, for messages), `label` (a `ClassLabel`) where the
        data has classes, and `text` (a list of strings) where it has captions. A column `label` of integers gets the
        classes 0 to the largest, one of strings their sorted values.

    Raises:
        ValueError: if the folder does not exist or holds no pictures to train on, it is not clear which of its
            folders are trained on, a link is broken, a label is out of range, or a picture has no caption though
            others have.
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise ValueError(f"`train_data_dir` {path!r} is not a folder.")
    datasets = import_extra("datasets", "train")
    generation_error = datasets.exceptions.DatasetGenerationError
    try:
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            dataset = datasets.load_from_disk(path)
            dataset = dataset["train"] if isinstance(dataset, datasets.DatasetDict) else dataset
        else:
            dataset = _load_tree(read_tree(path))
    except (OSError, KeyError, TypeError, ValueError, generation_error) as error:
        reason = error.__cause__ if isinstance(error, generation_error) else error
        raise ValueError(f"`train_data_dir` {path!r} holds no pictures to train on: {reason}") from error
    if "image" not in dataset.column_names:
        raise ValueError(f"`train_data_dir` {path!r} holds no column `image`, only {dataset.column_names}.")
    if len(dataset) == 0:
        raise ValueError(f"`train_data_dir` {path!r} holds no pictures to train on.")
    known = [name for name in ("image", "label", caption_column) if name in dataset.column_names]
    dataset = dataset.select_columns(known)
    dataset = dataset.cast_column("image", datasets.Image(decode=False)).add_column("row", np.arange(len(dataset)))
    if caption_column in known:
        dataset = _with_captions(dataset, path, caption_column)
    return _with_classes(dataset, path) if "label" in known else dataset


def _load_tree(tree: Tree) -> "Dataset":
    tables = [name for name in tree.files if _ending(name) == ".parquet" and posixpath.basename(name) not in METADATA]
    pictures = find_pictures(tree)
    if tables and pictures:
        raise ValueError(f"it holds both pictures ({pictures[0]!r}, say) and parquet files ({tables[0]!r}, say)")
    if tables:
        return _load_parquet(tree, tables)
    prefix = training_prefix(pictures, tree.folders)
    metadata = [name for name in tree.files if posixpath.basename(name) in METADATA and name.startswith(prefix)]
    pictures = [name for name in pictures if name.startswith(prefix)]
    if not pictures and not metadata:
        some = ", ".join(map(repr, tree.files[:3]))
        raise ValueError(f"there are files such as {some}" if some else "it is empty")
    _warn_of_empty(tree, prefix, pictures)
    if metadata:
        return _load_metadata(tree, metadata, pictures)
    classes = class_folders([name.removeprefix(prefix) for name in pictures])
    if classes is None:
        _warn_of_no_classes(tree, prefix, pictures, "pictures at several depths")
    datasets = import_extra("datasets", "train")
    columns = {"image": [{"bytes": None, "path": str(tree.root / name)} for name in pictures]}
    features = {"image": datasets.Image(decode=False)}
    if classes is not None:
        features["label"] = datasets.ClassLabel(names=sorted(set(classes)))
        numbers = {name: number for number, name in enumerate(features["label"].names)}
        columns["label"] = [numbers[name] for name in classes]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def find_pictures(tree: Tree) -> list[str]:
    """The pictures of a folder, by their names' endings; those without one by what they hold.

    Args:
        tree ([`Tree`]): the folder.

    Returns:
        `list[str]`: in the order of `tree.files`.

    Raises:
        ValueError: if there are pictures of a kind that Pillow does not open; names one.
    """
    PILImage.init()
    endings = {ending for ending, kind in PILImage.registered_extensions().items() if kind in PILImage.OPEN}
    if foreign := next((name for name in tree.files if _ending(name) in FOREIGN - endings), None):
        raise ValueError(f"{foreign!r} is a picture of a kind that Pillow does not open: convert it, or move it away")
    endings -= NO_PICTURES
    return [
        name
        for name in tree.files
        if _ending(name) in endings or (not _ending(name) and _holds_picture(tree.root / name))
    ]


def _holds_picture(path: pathlib.Path) -> bool:
    try:
        with PILImage.open(path) as picture:
            return not isinstance(picture, ImageFile.StubImageFile)
    except Exception:  # Pillow raises nearly everything on files that are no pictures
        return False


def _warn_of_empty(tree: Tree, prefix: str, pictures: list[str]) -> None:
    filled = {name.removeprefix(prefix).split("/")[0] for name in pictures}
    here = [name.removeprefix(prefix) for name in tree.folders if name.startswith(prefix)]
    empty = [name for name in here if "/" not in name and name not in filled]
    if empty:
        folder = str(tree.root / prefix)
        warnings.warn(f"{folder!r} has folders without pictures, which are skipped: {empty}.", stacklevel=4)


def _warn_of_no_classes(tree: Tree, prefix: str, pictures: list[str], reason: str) -> None:
    if len({name.removeprefix(prefix).split("/")[0] for name in pictures if "/" in name.removeprefix(prefix)}) > 1:
        warnings.warn(f"{str(tree.root / prefix)!r} has {reason}, so its folders are no classes.", stacklevel=4)


def _load_parquet(tree: Tree, tables: list[str]) -> "Dataset":
    """Parquet files, of which those of a split to train on say so in the names of their folders or their own."""
    splits = {}
    for name in tables:
        words = re.split(r"[^a-z]+", os.path.splitext(name.lower())[0])
        splits.setdefault(next((word for word in words if word in SPLITS), None), []).append(name)
    if len(splits) > 1 and None in splits:
        raise ValueError(f"{splits[None][0]!r} is of no split, though other files are, {tables} in all")
    training = [name for split in (*TRAINING, None) for name in splits.get(split, [])]
    if not training:
        raise ValueError(f"it has no split 'train', only {sorted(splits)}")
    # `load_dataset` reports its use to a server.
    module = import_extra("datasets.packaged_modules.parquet.parquet", "train")
    files = [glob.escape(str(tree.root / name)) for name in training]
    builder = module.Parquet(base_path=str(tree.root), data_files={"train": files})
    builder.download_and_prepare()
    return builder.as_dataset("train")


def _load_metadata(tree: Tree, metadata: list[str], pictures: list[str]) -> "Dataset":
    """The pictures that files of metadata name, with their columns, in that order."""
    arrow = import_extra("pyarrow", "train")
    datasets = import_extra("datasets", "train")
    known, tables = set(pictures), []
    for name in metadata:
        table = _read_metadata(tree.root / name)
        column = next((one for one in ("file_name", "image_file_name") if one in table.column_names), None)
        if column is None:
            raise ValueError(f"{name!r} has no column `file_name`, only {table.column_names}")
        folder, files = posixpath.dirname(name), []
        for row, file in enumerate(table[column].to_pylist()):
            file = posixpath.normpath(posixpath.join(folder, str(file)))
            if file not in known:
                raise ValueError(f"row {row} of {name!r} names {file!r}, which is no picture in this folder")
            files.append({"bytes": None, "path": str(tree.root / file)})
        image = arrow.array(files, type=arrow.struct({"bytes": arrow.binary(), "path": arrow.string()}))
        columns = [one for one in table.column_names if one not in (column, "image")]
        tables.append(table.select(columns).append_column("image", image))
    table = arrow.concat_tables(tables, promote_options="default")
    if len(table) < len(pictures):
        left_out = len(pictures) - len(table)
        warnings.warn(f"{left_out} pictures of {str(tree.root)!r} are in no row of its metadata.", stacklevel=4)
    if "label" not in table.column_names:
        prefix = f"{posixpath.dirname(metadata[0])}/".removeprefix("/")
        _warn_of_no_classes(tree, prefix, pictures, "metadata without `label`")
    return datasets.Dataset(table).cast_column("image", datasets.Image(decode=False))


def _read_metadata(path: pathlib.Path) -> "pyarrow.Table":
    if path.suffix == ".parquet":
        return import_extra("pyarrow.parquet", "train").read_table(path)
    if path.suffix == ".csv":
        frame = import_extra("pandas", "train").read_csv(path)
        return import_extra("pyarrow", "train").Table.from_pandas(frame, preserve_index=False)
    # Blocks as large as the file: none ends inside of a row, and each column has one type.
    json = import_extra("pyarrow.json", "train")
    options = json.ReadOptions(use_threads=False, block_size=max(path.stat().st_size, 1))
    return json.read_json(path, read_options=options)


def _with_captions(dataset: "Dataset", path: str, column: str) -> "Dataset":
    values = dataset.data.column(column).to_pylist()
    captions = [[value] if isinstance(value, str) else value for value in values]
    for row, texts in enumerate(captions):
        if not (isinstance(texts, list) and texts and all(isinstance(t, str) and t.strip() for t in texts)):
            where = describe(dataset[row]["image"], row)
            raise ValueError(
                f"`train_data_dir` {path!r}: `{column}` of {where} has to be a caption or a list of captions, none of "
                f"them empty, got {values[row]!r}."
            )
    return dataset.remove_columns(column).add_column("text", captions)


def _with_classes(dataset: "Dataset", path: str) -> "Dataset":
    class_label = import_extra("datasets", "train").ClassLabel
    feature, labels = dataset.features["label"], dataset.data.column("label").to_pylist()
    known = [label for label in labels if label is not None]
    if isinstance(feature, class_label):
        names = feature.names
    elif known and all(isinstance(label, int) for label in known):
        # More classes than pictures: no class numbers.
        names = [str(number) for number in range(min(max(known) + 1, len(labels)))]
    elif known and all(isinstance(label, str) for label in known):
        names = sorted(set(known))
        numbers = {name: number for number, name in enumerate(names)}
        labels = [numbers.get(label) for label in labels]
    else:
        raise ValueError(f"`train_data_dir` {path!r}: `label` has to hold class numbers or names, not {feature}.")
    for row, label in enumerate(labels):
        if label is None or not 0 <= label < len(names):
            where = describe(dataset[row]["image"], row)
            raise ValueError(f"`train_data_dir` {path!r}: label {label} of {where} is not in 0..{len(names) - 1}.")
    used = set(labels)
    unused = [name for number, name in enumerate(names) if number not in used]
    if unused:
        warnings.warn(f"{path!r} has {len(unused)} classes without pictures, {unused[:5]} say.", stacklevel=3)
    if isinstance(feature, class_label):
        return dataset
    return dataset.remove_columns("label").add_column("label", labels, feature=class_label(names=names))


def describe(value: dict, row: int) -> str:
    """What messages call a picture: its file and its row.

    Args:
        value (`dict`): undecoded, with `path` and `bytes`.
        row (`int`): its number.

    Returns:
        `str`: such as `'cats/3.png' (row 17)`.
    """
    return f"{value['path']!r} (row {row})" if value.get("path") else f"row {row}"


class ImageTransform:
    """Rows of [`load_image_dataset`] to `pixel_values` (channels, H, W) in [-1, 1] and `label` (-1 without classes).

    Pictures are turned as their EXIF data says, cropped to their central square and resized, the small ones up.
    Captions are handed on as `text`, a list of strings a row, where the data has them.

    Args:
        resolution (`int`): side of the pictures in pixels.
        channels (`int`, *optional*, defaults to 3): of the pictures: 1 (grey), 2 (grey and transparency), 3 (colours)
            or 4 (colours and transparency). Without transparency, clear parts become white.

    Raises:
        ValueError: if pictures of so many channels can't be read.
    """

    def __init__(self, resolution: int, channels: int = 3):
        check_channels(channels)
        self.resolution = resolution
        self.channels = channels

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        pixel_values = [self.read(value, row) for value, row in zip(rows["image"], rows["row"], strict=True)]
        captions = {"text": rows["text"]} if "text" in rows else {}
        return {"pixel_values": pixel_values, "label": rows.get("label", [-1] * len(pixel_values)), **captions}

    def read(self, value: dict, row: int) -> torch.Tensor:
        """One picture.

        Args:
            value (`dict`): undecoded, with `path` and `bytes`.
            row (`int`): its number, for the message.

        Returns:
            `torch.Tensor` of shape `(channels, resolution, resolution)`: float32 in [-1, 1].

        Raises:
            ValueError: if it can't be read, or its numbers are out of the range of its mode; names it.
        """
        try:
            with PILImage.open(value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"])) as picture:
                ImageOps.exif_transpose(picture, in_place=True)  # a copy would lose the tags of a TIFF file
                picture = center_crop(picture, self.resolution, self.channels)
        # Pillow raises nearly everything on broken files.
        except Exception as error:
            raise ValueError(f"The picture {describe(value or {}, row)} can't be read: {error}") from error
        pixels = torch.from_numpy(np.array(picture)).reshape(self.resolution, self.resolution, self.channels)
        return pixels.permute(2, 0, 1).float() / 127.5 - 1


def augment(
    pixel_values: torch.Tensor,
    generator: torch.Generator | list[torch.Generator],
    flip: bool = False,
    shift: int = 0,
) -> torch.Tensor:
    """Random mirror images and shifts, drawn per picture.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): the pictures.
        generator (`torch.Generator` or `list[torch.Generator]`): one, or one per picture, on the CPU; the only source
            of randomness.
        flip (`bool`, *optional*, defaults to `False`): mirror half of them left to right.
        shift (`int`, *optional*, defaults to 0): move by up to so many pixels each way, repeating the edge.

    Returns:
        `torch.Tensor` of the same shape.

    Raises:
        ValueError: if a list does not hold one generator per picture.
    """
    batch, _, height, width = pixel_values.shape
    check_generator(generator, batch)
    if flip:
        mirrored = draw(torch.rand, (batch,), generator, pixel_values.device) < 0.5
        pixel_values = torch.where(mirrored[:, None, None, None], pixel_values.flip(3), pixel_values)
    if shift:
        padded = torch.nn.functional.pad(pixel_values, (shift,) * 4, mode="replicate")
        offsets = draw(partial(torch.randint, 0, 2 * shift + 1), (batch, 2), generator, "cpu").tolist()
        crops = [picture[:, y : y + height, x : x + width] for picture, (y, x) in zip(padded, offsets, strict=True)]
        pixel_values = torch.stack(crops)
    return pixel_values


def some_pictures(dataset: torch.utils.data.Dataset, batch_size: int) -> list[torch.Tensor]:
    """At most 64 batches, always the same.

    Args:
        dataset (`torch.utils.data.Dataset`): rows with `pixel_values`.
        batch_size (`int`): pictures of each but the last.

    Returns:
        `list[torch.Tensor]`: each of shape `(batch, channels, height, width)`, in [-1, 1].
    """
    loader = DataLoader(dataset, batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))
    return [batch["pixel_values"] for batch, _ in zip(loader, range(64), strict=False)]
