# SPDX-License-Identifier: Apache-2.0
"""Small things that several modules need."""

import importlib
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont


MAX_ROWS = 16  # of a grid; more go into blocks side by side
CELL = 96  # smaller pictures are enlarged to at least this in the grid, by whole factors


def look_up(table: dict[str, Any], name: str, argument: str) -> Any:
    """An entry of one of the tables.

    Args:
        table (`dict[str, Any]`): the table.
        name (`str`): the entry's name.
        argument (`str`): the argument that named it, for the message.

    Returns:
        `Any`: the entry.

    Raises:
        ValueError: if the table has no such name; lists those it has.
    """
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"`{argument}` has to be one of {sorted(table)}, got {name!r}.")
    return table[name]


def import_extra(name: str, extra: str) -> ModuleType:
    """Import a module of a library that only an extra of the package installs, when it is needed.

    Args:
        name (`str`): the module.
        extra (`str`): the extra that installs it, such as `"train"`.

    Returns:
        `ModuleType`: the module.

    Raises:
        ImportError: if it is not installed; names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        library = name.split(".")[0]
        raise ImportError(f'`{library}` is needed here: pip install "mar_hf[{extra}]" ({error})') from error


def check_generator(generator: torch.Generator | list[torch.Generator] | None, batch_size: int) -> None:
    """Refuse a list that does not hold one generator per image.

    Args:
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*): what the caller gave.
        batch_size (`int`): images.

    Raises:
        ValueError: if it is a list of another length.
    """
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"`generator` has to hold one generator per image ({batch_size}), got {len(generator)}.")


def draw(
    sampler: Callable[..., torch.Tensor],
    shape: tuple[int, ...],
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device | str,
    dim: int = 0,
    counts: list[int] | None = None,
) -> torch.Tensor:
    """Random numbers from one generator, or each image's own from its generator.

    They are drawn where the generators live and moved once, so a CPU generator gives the same everywhere.

    Args:
        sampler (`Callable`): `torch.rand`, `torch.randn` or another that takes a shape, `generator` and `device`.
        shape (`tuple[int, ...]`): of the whole.
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*): one, or one per image; None means
            torch's global one.
        device (`torch.device` or `str`): where the numbers are wanted.
        dim (`int`, *optional*, defaults to 0): the dimension along which images follow each other.
        counts (`list[int]`, *optional*): entries of each image along `dim`; None means one each.

    Returns:
        `torch.Tensor` of shape `shape` on `device`.
    """
    if not isinstance(generator, list):
        draw_on = device if generator is None else generator.device
        return sampler(shape, generator=generator, device=draw_on).to(device)
    counts = counts or [1] * len(generator)
    shapes = [(*shape[:dim], count, *shape[dim + 1 :]) for count in counts]
    drawn = [sampler(size, generator=one, device=one.device) for size, one in zip(shapes, generator, strict=True)]
    return torch.cat(drawn, dim).to(device)


@contextmanager
def atomic_folder(dst: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Write a folder completely or not at all.

    The body fills a new empty folder on the same file system. When it ends, that folder is renamed to `dst`; when it
    raises, everything it wrote is removed and what stood at `dst` before is untouched.

    Args:
        dst (`str` or `os.PathLike`): the folder to write. Missing parents are made.
        overwrite (`bool`, *optional*, defaults to `False`): whether to replace a folder that already holds files. The
            old one is removed as a whole, and only after the new one is complete.

    Yields:
        `pathlib.Path`: the folder to write into.

    Raises:
        `ValueError`: if `dst` is a file, or holds something and `overwrite` is false.

    Example:
        >>> with atomic_folder("checkpoint") as folder:
        ...     pipeline.save_pretrained(folder)
    """
    target = Path(dst).resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"`dst` must be a folder, or not exist yet, but {str(target)!r} is a file")
    if not overwrite and target.exists() and any(target.iterdir()):
        raise ValueError(
            f"`dst` must be a new or an empty folder unless `overwrite=True`, but {str(target)!r} holds files"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # New and old folder share a holder next to `dst`: both moves are renames, and one clean-up removes either.
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as holder:
        new, old = Path(holder, "new"), Path(holder, "old")
        new.mkdir()
        yield new
        if overwrite and target.exists():
            target.rename(old)
        elif target.exists():
            target.rmdir()  # refuses what somebody else wrote there in the meantime
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise


@contextmanager
def atomic_file(dst: str | os.PathLike) -> Iterator[Path]:
    """Write a file completely or not at all.

    The body writes to a path beside `dst`. When it ends, that file takes the place of `dst`; when it raises, it is
    removed and what stood at `dst` before is untouched.

    Args:
        dst (`str` or `os.PathLike`): the file to write. Missing parents are made.

    Yields:
        `pathlib.Path`: the path to write to; it ends as `dst` does, since Pillow, numpy and others look at that.

    Raises:
        `ValueError`: if `dst` is a folder.

    Example:
        >>> with atomic_file("grid.png") as path:
        ...     image.save(path)
    """
    target = Path(dst)
    if target.is_dir():
        raise ValueError(f"`dst` must be a file, but {str(target)!r} is a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as holder:
        partial = Path(holder, target.name)
        yield partial
        os.replace(partial, target)


def on_white(picture: Image.Image) -> Image.Image:
    """A picture whose clear parts are white.

    Args:
        picture (`PIL.Image.Image`): of 8 bits a channel.

    Returns:
        `PIL.Image.Image`: RGB.
    """
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def draw_grid(images: Sequence[Image.Image], names: Sequence[str]) -> Image.Image:
    """One row of pictures for each name, with the name before it; many rows stand in blocks side by side.

    Args:
        images (`Sequence[PIL.Image.Image]`): all of one size, row after row, as many for every name.
        names (`Sequence[str]`): one for each row, on at most three lines.

    Returns:
        `PIL.Image.Image`: RGB. Small pictures are enlarged by a whole factor, without smoothing.
    """
    gap, columns = 4, len(images) // len(names)
    blocks = -(-len(names) // MAX_ROWS)
    rows = -(-len(names) // blocks)
    factor = max(1, -(-CELL // images[0].width))
    width, height = images[0].width * factor, images[0].height * factor
    font = ImageFont.load_default(size=16)
    texts = [textwrap.fill(name, 28, max_lines=3, placeholder="...") for name in names]
    left = max(round(font.getlength(line)) for text in texts for line in text.split("\n")) + 4 * gap
    block = left + columns * (width + gap)
    grid = Image.new("RGB", (blocks * block, rows * (height + gap) + gap), "white")
    draw = ImageDraw.Draw(grid)
    for index, text in enumerate(texts):
        start, top = index // rows * block + left, gap + index % rows * (height + gap)
        draw.text((start - 2 * gap, top + height // 2), text, fill="black", font=font, anchor="rm", align="right")
        for column, image in enumerate(images[index * columns : (index + 1) * columns]):
            enlarged = on_white(image).resize((width, height), Image.Resampling.NEAREST)
            grid.paste(enlarged, (start + column * (width + gap), top))
    return grid
