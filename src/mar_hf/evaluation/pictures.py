# SPDX-License-Identifier: Apache-2.0
"""Sets of pictures: read from folders and files, shown as grids."""

import os
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ..training import ImageTransform, center_crop, load_image_dataset
from ..utils import atomic_file, draw_grid, import_extra
from .folders import read_arrays


class Pictures:
    """A set of pictures as uint8 tensors `(3, size, size)`, of an image folder or an `.npz` with `arr_0`.

    Args:
        path (`str` or `os.PathLike`): the folder or file.
        size (`int`, *optional*): side in pixels; None takes that of the first picture.

    Raises:
        ValueError: if there are no pictures, or the file can't be read.
    """

    def __init__(self, path: str | os.PathLike, size: int | None = None):
        path = os.fspath(path)
        self.labels: list[str] | None = None
        if path.endswith(".npz"):
            arrays = read_arrays(path)
            if "arr_0" not in arrays:
                raise ValueError(f"{path!r} holds no pictures (`arr_0`), only {sorted(arrays)}.")
            self.rows = arrays["arr_0"]
            if self.rows.dtype != np.uint8 or self.rows.ndim != 4 or self.rows.shape[3] != 3 or not self.rows.size:
                found = f"{self.rows.dtype} of shape {self.rows.shape}"
                raise ValueError(
                    f"`arr_0` of {path!r} has to be uint8 of shape (pictures, height, width, 3), not {found}."
                )
            self.size = size or min(self.rows.shape[1:3])
        else:
            self.rows = load_image_dataset(path, caption_column=None)
            feature = self.rows.features.get("label")
            self.labels = None if feature is None else [feature.names[label] for label in self.rows["label"]]
            first = import_extra("datasets", "eval").Image().decode_example(self.rows[0]["image"])
            self.size = size or min(first.size)
            self.rows = self.rows.with_transform(ImageTransform(self.size))
        self.indices = list(range(len(self.rows)))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> torch.Tensor:
        row = self.rows[self.indices[number]]
        if isinstance(row, np.ndarray):
            return torch.from_numpy(np.array(center_crop(Image.fromarray(row), self.size))).permute(2, 0, 1)
        return ((row["pixel_values"] + 1) * 127.5).round().byte()

    def image(self, number: int) -> Image.Image:
        """One of them.

        Args:
            number (`int`): from 0 on.

        Returns:
            `PIL.Image.Image`.
        """
        return to_image(self[number])

    def keep(self, labels: Iterable[str]) -> None:
        """Leave out the pictures of other classes.

        Args:
            labels (`Iterable[str]`): names of classes.
        """
        wanted = set(labels)
        self.indices = [index for index, label in zip(self.indices, self.labels, strict=True) if label in wanted]
        self.labels = [label for label in self.labels if label in wanted]


def to_image(picture: torch.Tensor) -> Image.Image:
    """A picture as Pillow has it.

    Args:
        picture (`torch.Tensor` of shape `(3, height, width)`): uint8.

    Returns:
        `PIL.Image.Image`.
    """
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def save_pictures(pixel_values: torch.Tensor, paths: Sequence[str | os.PathLike]) -> None:
    """Write pictures as files that are whole or not there.

    Args:
        pixel_values (`torch.Tensor` of shape `(pictures, channels, height, width)`): in [-1, 1].
        paths (`Sequence[str | os.PathLike]`): one for each; missing folders are made.
    """
    for image, path in zip(VaeImageProcessor().postprocess(pixel_values), paths, strict=True):
        with atomic_file(path) as partial:
            image.save(partial)


def save_grid(images: Sequence[Image.Image], names: Sequence[str], path: str | os.PathLike) -> None:
    """A row of pictures for each name, as a file that is whole or not there.

    Args:
        images (`Sequence[PIL.Image.Image]`): row after row, as many for every name.
        names (`Sequence[str]`): one for each row.
        path (`str` or `os.PathLike`): of the PNG file.
    """
    with atomic_file(path) as partial:
        draw_grid(images, names).save(partial)


def save_samples(pictures: Pictures, path: str | os.PathLike) -> None:
    """A grid of pictures: up to 8 of each of up to 20 classes.

    Args:
        pictures (`Pictures`): to show.
        path (`str` or `os.PathLike`): of the PNG file.
    """
    rows: dict[str, list[int]] = {}
    for number, label in enumerate(pictures.labels or ["samples"] * len(pictures)):
        rows.setdefault(label, []).append(number)
    rows = dict(list(rows.items())[:20])
    columns = min(8, *map(len, rows.values())) if len(rows) > 1 else min(8, len(pictures))
    images = [pictures.image(number) for numbers in rows.values() for number in numbers[:columns]]
    save_grid(images, list(rows), path)
