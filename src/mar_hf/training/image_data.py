# SPDX-License-Identifier: Apache-2.0
"""Reading pictures: folders and data sets in, (B, 3, H, W) tensors in [-1, 1] out."""

import pathlib
import warnings
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from ..utils import check_generator, draw, import_extra


if TYPE_CHECKING:
    from datasets import Dataset


SPLITS = {"train", "validation", "valid", "val", "dev", "test"}


def load_image_dataset(path: str, caption_column: str | None = "text") -> "Dataset":
    """The training split of a folder of pictures.

    Nothing but the folder is read: pictures stay undecoded until [`ImageTransform`] asks for them, and no host is told
    of it. Class folders without pictures are skipped with a warning; the other classes are numbered in the order of
    their names.

    Args:
        path (`str`): a folder with one sub-folder a class (with or without a `train` level; a single class or
            folders inside class folders give no labels), one of parquet files, or what `Dataset.save_to_disk` wrote.
            A `metadata.jsonl` (or `.csv`) beside the pictures or class folders names the pictures, as `file_name`,
            and their columns; folders then give no labels.
        caption_column (`str`, *optional*, defaults to `"text"`): the column of captions, strings or lists of them.
            None leaves captions out.

    Returns:
        `Dataset`: columns `image` (undecoded), `row` (its number, for messages), `label` (a `ClassLabel`) where the
        data has classes, and `text` (a list of strings) where it has captions. A column `label` of integers gets the
        classes 0 to the largest, one of strings their sorted values.

    Raises:
        ValueError: if the folder does not exist or holds no pictures to train on, a label is out of range, or a
            picture has no caption though others have.
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
        elif any(folder.rglob("*.parquet")):
            dataset = datasets.load_dataset(str(folder.resolve()), split="train")
        else:
            dataset = _load_folders(folder)
    except (FileNotFoundError, KeyError, ValueError, generation_error) as error:
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


def _load_folders(folder: pathlib.Path) -> "Dataset":
    # `load_dataset("imagefolder")` takes classes named "test" or "val 2" for splits, and reports its use to a server.
    folders = {child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")}
    if folders and folders <= SPLITS:
        if "train" not in folders:
            raise ValueError(f"it has no split 'train', only {sorted(folders)}")
        return _load_folders(folder / "train")
    module = import_extra("datasets.packaged_modules.imagefolder.imagefolder", "train")
    builder = module.ImageFolder(base_path=str(folder.resolve()), data_files={"train": "**"})
    builder.download_and_prepare()
    dataset = builder.as_dataset("train")

    def is_empty(name: str) -> bool:
        return not any(file.suffix.lower() in builder.EXTENSIONS for file in (folder / name).rglob("*"))

    empty = sorted(filter(is_empty, folders))
    if empty:
        warnings.warn(f"{str(folder)!r} has folders without pictures, which are skipped: {empty}.", stacklevel=3)
    if len(folders) - len(empty) > 1 and "label" not in dataset.column_names:
        metadata = any((folder / name).exists() for name in builder.METADATA_FILENAMES)
        reason = "metadata without `label`" if metadata else "pictures at several depths"
        warnings.warn(f"{str(folder)!r} has {reason}, so its folders are no classes.", stacklevel=3)
    return dataset


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


def center_crop(picture: PILImage.Image, size: int) -> PILImage.Image:
    """The central square of a picture, resized as ADM does: halve with a box filter, then bicubic.

    Args:
        picture (`PIL.Image.Image`): any mode; transparent parts become white.
        size (`int`): side of the result in pixels.

    Returns:
        `PIL.Image.Image`: RGB, `size` x `size`.
    """
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = PILImage.alpha_composite(PILImage.new("RGBA", picture.size, "white"), picture)
    if picture.mode.startswith("I;16"):
        # Pillow would clip the upper 255/256 of 16 bits to white.
        picture = picture.point(lambda value: value / 257).convert("L")
    picture = picture.convert("RGB")
    while min(picture.size) >= 2 * size:
        picture = picture.resize(tuple(side // 2 for side in picture.size), PILImage.Resampling.BOX)
    scale = size / min(picture.size)
    if scale != 1:
        sides = tuple(max(size, round(side * scale)) for side in picture.size)
        picture = picture.resize(sides, PILImage.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in picture.size)
    return picture.crop((left, top, left + size, top + size))


class ImageTransform:
    """Rows of [`load_image_dataset`] to `pixel_values` (3, H, W) in [-1, 1] and `label` (-1 without classes).

    Pictures are turned as their EXIF data says, cropped to their central square and resized, the small ones up.
    Captions are handed on as `text`, a list of strings a row, where the data has them.

    Args:
        resolution (`int`): side of the pictures in pixels.
    """

    def __init__(self, resolution: int):
        self.resolution = resolution
        self.feature = import_extra("datasets", "train").Image()

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
            `torch.Tensor` of shape `(3, resolution, resolution)`: float32 in [-1, 1].

        Raises:
            ValueError: if it can't be read; names it.
        """
        try:
            picture = center_crop(self.feature.decode_example(value), self.resolution)
        # Pillow raises nearly everything on broken files.
        except Exception as error:
            raise ValueError(f"The picture {describe(value or {}, row)} can't be read: {error}") from error
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def augment(
    pixel_values: torch.Tensor,
    generator: torch.Generator | list[torch.Generator],
    flip: bool = False,
    shift: int = 0,
) -> torch.Tensor:
    """Random mirror images and shifts, drawn per picture.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): the pictures.
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
        `list[torch.Tensor]`: each of shape `(batch, 3, height, width)`, in [-1, 1].
    """
    loader = DataLoader(dataset, batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))
    return [batch["pixel_values"] for batch, _ in zip(loader, range(64), strict=False)]
