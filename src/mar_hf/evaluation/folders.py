# SPDX-License-Identifier: Apache-2.0
"""Folders of results that are gone on with: whose they are, what is whole in them, what was found before."""

import json
import zipfile
import zlib
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from ..utils import atomic_file


SETTINGS_FILE = "settings.json"


def is_whole(path: str | PathLike) -> bool:
    """Whether a picture is there and undamaged.

    Args:
        path (`str` or `os.PathLike`): of a PNG file.

    Returns:
        `bool`.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
    except (OSError, SyntaxError):  # Pillow's word for a broken PNG file
        return False
    return True


def claim_folder(folder: str | PathLike, settings: dict[str, Any], accelerator: Accelerator) -> None:
    """Note in a folder what its pictures are made with, or find the same noted there; every process calls this.

    Args:
        folder (`str` or `os.PathLike`): made if need be.
        settings (`dict[str, Any]`): anything that JSON can hold.
        accelerator (`Accelerator`): of the run.

    Raises:
        ValueError: if the folder holds pictures of other settings, or other files.
    """
    folder = Path(folder)
    note = folder / SETTINGS_FILE
    found = read_json(note) if note.exists() else None
    if found is None and folder.exists() and any(_is_foreign(path) for path in folder.iterdir()):
        raise ValueError(f"`output_dir` {str(folder)!r} holds files, but no {SETTINGS_FILE}: it is not ours.")
    if found is not None and found != settings:
        differ = sorted(name for name in found | settings if found.get(name) != settings.get(name))
        pairs = ", ".join(f"{name} {found.get(name)!r} (now {settings.get(name)!r})" for name in differ)
        raise ValueError(f"`output_dir` {str(folder)!r} holds pictures made with {pairs}; take another folder.")
    accelerator.wait_for_everyone()  # all have looked
    if found is None and accelerator.is_main_process:
        write_json(note, settings)


def _is_foreign(path: Path) -> bool:
    # What a run leaves that was killed while it wrote the note is none of the user's.
    return not path.name.startswith(f".{SETTINGS_FILE}")


def read_json(path: str | PathLike) -> Any:
    """What a JSON file holds.

    Args:
        path (`str` or `os.PathLike`): of the file.

    Returns:
        `Any`: its content.

    Raises:
        ValueError: if it is no JSON file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error


def read_arrays(path: str | PathLike) -> dict[str, np.ndarray]:
    """What an `.npz` file holds.

    Args:
        path (`str` or `os.PathLike`): of the file.

    Returns:
        `dict[str, numpy.ndarray]`: by name.

    Raises:
        ValueError: if it is no such file, damaged, or holds anything but plain arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    # A single array has no `files`; zip and zlib have errors of their own.
    except (OSError, ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{str(path)!r} can't be read as an .npz file of arrays: {error}") from error


def write_json(path: str | PathLike, content: Any) -> None:
    """Write a JSON file completely or not at all.

    Args:
        path (`str` or `os.PathLike`): of the file.
        content (`Any`): what JSON can hold.
    """
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: str | PathLike, text: str) -> None:
    """Write a text file completely or not at all.

    Args:
        path (`str` or `os.PathLike`): of the file.
        text (`str`): all of it.
    """
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
