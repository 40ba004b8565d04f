# SPDX-License-Identifier: Apache-2.0
"""Grids of pictures that show how far a model is, from the same seeds every time."""

import torch
from diffusers.utils import make_image_grid
from PIL import Image

from ..pipelines import MARPipeline
from ..utils import draw_grid, on_white


MOST_CLASSES = 40
SMALLEST = 64  # pixels of a picture in a grid


def plain_grid(images: list[Image.Image], rows: int, columns: int, resolution: int) -> Image.Image:
    """Pictures side by side, those with clear parts on white.

    Args:
        images (`list[PIL.Image.Image]`): row after row.
        rows (`int`): of the grid.
        columns (`int`): of the grid.
        resolution (`int`): side of the pictures in pixels; small ones are enlarged.

    Returns:
        `PIL.Image.Image`: RGB.
    """
    return make_image_grid([on_white(one) for one in images], rows, columns, resize=max(SMALLEST, resolution))


def sample_classes(
    pipe: MARPipeline, names: list[str] | None, num_images: int, batch_size: int, resolution: int
) -> Image.Image:
    """A row for each of at most 40 classes, or one row where there are none.

    Args:
        pipe (`MARPipeline`): what draws.
        names (`list[str]`, *optional*): of the classes.
        num_images (`int`): of each.
        batch_size (`int`): drawn at once.
        resolution (`int`): side of the pictures in pixels.

    Returns:
        `PIL.Image.Image`: the grid.
    """
    rows = min(MOST_CLASSES, len(names)) if names else 1
    classes = torch.linspace(0, len(names or "-") - 1, rows).long().tolist()
    seeds = [(number, 1000 * number + column) for number in classes for column in range(num_images)]
    images = []
    for first in range(0, len(seeds), batch_size):
        labels, numbers = zip(*seeds[first : first + batch_size], strict=True)
        images += pipe(
            class_labels=list(labels) if names else None,
            num_images_per_prompt=1 if names else len(labels),
            generator=[torch.Generator().manual_seed(number) for number in numbers],
        ).images
    return plain_grid(images, rows, num_images, resolution)


def sample_texts(
    pipe: MARPipeline,
    inputs: dict[str, torch.Tensor],
    class_labels: list[int] | None,
    texts: list[str] | None,
    num_images: int,
    resolution: int,
) -> Image.Image:
    """A row for each text.

    Args:
        pipe (`MARPipeline`): what draws.
        inputs (`dict[str, torch.Tensor]`): `prompt_embeds` with their mask.
        class_labels (`list[int]`, *optional*): of a model that knows classes as well.
        texts (`list[str]`, *optional*): written before the rows, where they are known.
        num_images (`int`): of each.
        resolution (`int`): side of the pictures in pixels.

    Returns:
        `PIL.Image.Image`: the grid.
    """
    rows = len(inputs["prompt_embeds"])
    images = pipe(
        class_labels=class_labels,
        **inputs,
        num_images_per_prompt=num_images,
        generator=[torch.Generator().manual_seed(number) for number in range(rows * num_images)],
    ).images
    if texts is not None:
        return draw_grid(images, texts)
    return plain_grid(images, rows, num_images, resolution)
