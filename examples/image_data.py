# SPDX-License-Identifier: Apache-2.0
"""Reading pictures for the training scripts: folders and datasets in, (B, 3, H, W) tensors in [-1, 1] out."""

import pathlib

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Image, load_dataset, load_from_disk
from PIL import Image as PILImage


def load_image_dataset(path: str) -> Dataset:
    """The training split of a folder of pictures.

    Args:
        path (`str`): a folder with one sub-folder a class (`imagefolder`, with or without a `train` level), one of
            parquet files, or what `Dataset.save_to_disk` wrote.

    Returns:
        `Dataset`: with a column `image`, and `label` (a `ClassLabel`) where the data has classes.

    Raises:
        ValueError: if the folder does not exist or holds no pictures to train on.
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise ValueError(f"`train_data_dir` {path!r} is not a folder.")
    try:
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            dataset = load_from_disk(path)
            dataset = dataset["train"] if isinstance(dataset, DatasetDict) else dataset
        else:
            kind = "parquet" if any(folder.rglob("*.parquet")) else "imagefolder"
            dataset = load_dataset(kind, data_dir=path, split="train")
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise ValueError(f"`train_data_dir` {path!r} holds no pictures to train on: {error}") from error
    if "image" not in dataset.column_names or len(dataset) == 0:
        raise ValueError(f"`train_data_dir` {path!r} holds no column `image`, only {dataset.column_names}.")
    return dataset.cast_column("image", Image(mode=None))


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
    """Rows of a `Dataset` to `pixel_values` (3, H, W) in [-1, 1] and `label`.

    Args:
        resolution (`int`): side of the pictures in pixels.
    """

    def __init__(self, resolution: int):
        self.resolution = resolution

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        pictures = [np.asarray(center_crop(picture, self.resolution)) for picture in rows["image"]]
        pixel_values = [torch.from_numpy(p.copy()).permute(2, 0, 1).float() / 127.5 - 1 for p in pictures]
        return {"pixel_values": pixel_values, "label": rows.get("label", [-1] * len(pictures))}


def augment(
    pixel_values: torch.Tensor, generator: torch.Generator, flip: bool = False, shift: int = 0
) -> torch.Tensor:
    """Random mirror images and shifts, drawn per picture.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): the pictures.
        generator (`torch.Generator`): a CPU generator; the only source of randomness.
        flip (`bool`, *optional*, defaults to `False`): mirror half of them left to right.
        shift (`int`, *optional*, defaults to 0): move by up to so many pixels each way, repeating the edge.

    Returns:
        `torch.Tensor` of the same shape.
    """
    batch, _, height, width = pixel_values.shape
    if flip:
        mirrored = torch.rand(batch, generator=generator) < 0.5
        pixel_values = torch.where(
            mirrored.to(pixel_values.device)[:, None, None, None], pixel_values.flip(3), pixel_values
        )
    if shift:
        padded = torch.nn.functional.pad(pixel_values, (shift,) * 4, mode="replicate")
        offsets = torch.randint(0, 2 * shift + 1, (batch, 2), generator=generator).tolist()
        crops = [picture[:, y : y + height, x : x + width] for picture, (y, x) in zip(padded, offsets, strict=True)]
        pixel_values = torch.stack(crops)
    return pixel_values
