# SPDX-License-Identifier: Apache-2.0
"""Folders of results that are gone on with: whose they are, what is whole in them, what was found before."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from os import PathLike
from pathlib import Path
from typing import Any

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
    return not path.name.startswith(f".{SETTINGS_FILE}-")


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


@contextmanager
def output_to(path: str | PathLike) -> Iterator[None]:
    """For this while, what is printed and logged goes to the end of a file.

    Args:
        path (`str` or `os.PathLike`): of the file.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        handler = logging.StreamHandler(file)
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)


def write_result(path: str | PathLike, log: str | PathLike, function: Callable[..., dict], *inputs: Any) -> None:
    """Write what a part of an experiment finds, and how long it took, to a JSON file.

    Args:
        path (`str` or `os.PathLike`): of the file; where it is there already, the part was done.
        log (`str` or `os.PathLike`): gets what the part prints.
        function (`Callable`): the part; returns what it found, a `dict` for JSON.
        inputs (`Any`): what it takes.
    """
    start = time.perf_counter()
    with output_to(log):
        found = function(*inputs)
    write_json(path, found | {"seconds": time.perf_counter() - start})
