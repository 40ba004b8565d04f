# SPDX-License-Identifier: Apache-2.0
"""Small things that several modules need."""

import errno
import hashlib
import importlib
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from numbers import Integral, Real
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from PIL import Image, ImageDraw, ImageFont


try:
    import fcntl
except ImportError:  # Windows: what a killed writer leaves stays there
    fcntl = None

LARGEST = 2**16  # of what is counted in a configuration: far more than any model has, far less than overflows
MAX_ROWS = 16  # of a grid; more go into blocks side by side
CELL = 96  # smaller pictures are enlarged to at least this in the grid, by whole factors

# Of the folders in which things are written: their ending, how many may stand beside one target, the file in each.
_PARTIAL, _WRITERS, _LOCK = ".mar_hf-partial", 8, "lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LONGEST_NAME = 200  # bytes; most file systems take 255


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


class ConfigurationError(StrictDataclassError, ValueError):
    """A setting of the wrong type: an error of huggingface_hub's dataclasses, and a ValueError as others are."""


def strict_configuration(config_class: type) -> type:
    """`strict` of huggingface_hub for a configuration that refuses whatever it can't be made of with a ValueError.

    Args:
        config_class (`type`): the configuration.

    Returns:
        `type`: the class itself.
    """
    config_class = strict(config_class)
    initialise = config_class.__init__

    @wraps(initialise)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            initialise(self, *args, **kwargs)
        except ValueError:
            raise
        except (ArithmeticError, AttributeError, LookupError, StrictDataclassError, TypeError) as error:
            given = f"{kwargs!r:.500}"
            raise ConfigurationError(f"{config_class.__name__} can't be made of {given}: {error}") from error

    config_class.__init__ = __init__
    return config_class


def check_count(argument: str, value: Any, least: int = 1, most: int = LARGEST) -> None:
    """Refuse what is no integer, or out of its range.

    Args:
        argument (`str`): what it is called, for the message.
        value (`Any`): what the caller gave.
        least (`int`, *optional*, defaults to 1): the least allowed.
        most (`int`, *optional*, defaults to 65536): the most allowed.

    Raises:
        ValueError: names argument, value and what is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"`{argument}` has to be at least {least}, got {value!r}, which is no integer.")
    if value < least:
        raise ValueError(f"`{argument}` has to be at least {least}, got {value!r}.")
    if value > most:
        raise ValueError(f"`{argument}` has to be at most {most}, got {value!r}.")


def check_number(argument: str, value: Any, least: float, most: float = sys.float_info.max) -> None:
    """Refuse what is no finite number, or out of its range.

    Args:
        argument (`str`): what it is called, for the message.
        value (`Any`): what the caller gave.
        least (`float`): the least allowed.
        most (`float`, *optional*, defaults to 1.7976931348623157e+308): the most allowed.

    Raises:
        ValueError: names argument, value and what is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not least <= value <= most:
        allowed = f"lie in [{least}, {most}]" if most < sys.float_info.max else f"be a finite number from {least} on"
        raise ValueError(f"`{argument}` has to {allowed}, got {value!r}.")


def check_generator(generator: torch.Generator | list[torch.Generator] | None, batch_size: int) -> None:
    """Refuse what is no generator, and a list that does not hold one per image.

    Args:
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*): what the caller gave.
        batch_size (`int`): images.

    Raises:
        ValueError: if it is something else, or a list of another length.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, list) or not all(isinstance(one, torch.Generator) for one in generator):
        raise ValueError(f"`generator` has to be a torch.Generator, a list of them or None, got {generator!r:.60}.")
    if len(generator) != batch_size:
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


def _try_lock(file: BinaryIO) -> bool | None:
    """Take a file's lock, which ends with the process: True; False if another has it, None if there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return None
    return True


def _claim(holder: Path) -> BinaryIO | None:
    """The locked file that makes a holder this writer's own; None if another writer may live in it."""
    while True:
        try:
            holder.mkdir(mode=0o700)
            new = True
        except FileExistsError:
            new = False
        try:
            lock = open(holder / _LOCK, "ab")
        except FileNotFoundError:  # its writer has just removed it
            continue
        except PermissionError:  # somebody else's
            return None
        locked = _try_lock(lock)
        if locked is None and new:
            return lock
        with suppress(FileNotFoundError):
            # Not the one of a writer that ended between the two lines above.
            if locked and os.path.samestat(os.fstat(lock.fileno()), os.stat(holder / _LOCK)):
                return lock
        lock.close()
        if not locked:
            return None


def _empty(holder: Path, target: Path) -> None:
    """Remove what a killed writer of `target` left in its holder, but for the lock."""
    new, old = holder / "new", holder / "old"
    if new.exists() and old.exists() and not target.exists():
        new.rename(target)  # killed between the two renames of `atomic_folder`: the new folder is complete
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)


def _remove(holder: Path, target: Path, lock: BinaryIO) -> None:
    """Remove a holder, its lock last: at whatever moment this is killed, the next writer can go on with it."""
    _empty(holder, target)
    if fcntl is None:
        lock.close()  # Windows removes no open file
    with suppress(OSError):  # another writer has come into it
        (holder / _LOCK).unlink()
        holder.rmdir()
    lock.close()


@contextmanager
def _holder(target: Path) -> Iterator[Path]:
    """A folder beside `target` for what is to take its place: gone afterwards, and with it those of killed writers.

    Missing parents are made. While the writer lives it holds a lock in this folder, so that others leave it alone.
    """
    name = target.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    target.parent.mkdir(parents=True, exist_ok=True)
    mine = lock = None
    # Few fixed names: nobody has to list a folder of many files to find what was left there.
    for number in range(_WRITERS):
        holder = target.with_name(f".{name}{_PARTIAL}{number or ''}")
        if mine is not None and not holder.exists():
            continue
        claimed = _claim(holder)
        if claimed is None:
            continue
        if mine is None:
            mine, lock = holder, claimed
            _empty(holder, target)
        else:
            _remove(holder, target, claimed)
    if mine is None:
        left = target.with_name(f".{name}{_PARTIAL}*")
        raise OSError(errno.EBUSY, f"others write it too, or left behind what has to be removed by hand: {left}")
    try:
        yield mine
    except OSError as error:
        if error.errno in _FULL and error.filename is None:
            error.filename = str(target)  # whoever writes in pieces does not know where to
        raise
    finally:
        _remove(mine, target, lock)


@contextmanager
def atomic_folder(dst: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Write a folder completely or not at all.

    The body fills a new empty folder on the same file system. When it ends, that folder is renamed to `dst`; when it
    raises, everything it wrote is removed and what stood at `dst` before is untouched. What a killed process left
    half-written goes away with the next write to the same `dst`. A link is followed: what it leads to is written.

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
    # New and old folder share a holder next to `dst`: both moves are renames, and one clean-up removes either.
    with _holder(target) as holder:
        new, old = holder / "new", holder / "old"
        new.mkdir()
        yield new
        if target.exists():
            shutil.copymode(target, new)
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

    The body writes to a path beside `dst`. When it ends, that file takes the place of `dst`, with the permissions that
    the old one had; when it raises, it is removed and what stood at `dst` before is untouched. What a killed process
    left half-written goes away with the next write to the same `dst`. A link is followed: its file is written.

    Args:
        dst (`str` or `os.PathLike`): the file to write. Missing parents are made.

    Yields:
        `pathlib.Path`: the path to write to; it ends as `dst` does, since Pillow, numpy and others look at that.

    Raises:
        `ValueError`: if `dst` is a folder, or something else that is no ordinary file.
        `OSError`: if it may not be written.

    Example:
        >>> with atomic_file("grid.png") as path:
        ...     image.save(path)
    """
    target = Path(dst).resolve()
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "no ordinary file"
        raise ValueError(f"`dst` must be a file, but {str(target)!r} is {kind}")
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
    with _holder(target) as holder:
        partial = holder / "new" / target.name
        partial.parent.mkdir()
        yield partial
        if target.exists():
            shutil.copymode(target, partial)
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
    names = [name.encode(errors="replace").decode() for name in names]  # lone surrogates can't be drawn
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
