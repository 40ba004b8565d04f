# SPDX-License-Identifier: Apache-2.0
"""What a folder of examples holds: which of its files are trained on, and which of its folders are classes.

A folder is read as its owner means it. Where that can't be told, the answer is an error that names what was not
understood: examples that are kept for a test must not be trained on because of a stray folder beside them.
"""

import os
import pathlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass


TRAINING = ("train", "training")
HELD_OUT = ("validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
SPLITS = {*TRAINING, *HELD_OUT}
# What systems and archivers leave in folders, in lower case; names with a dot before them are hidden, too.
LEFT_BY_SYSTEMS = {
    *("__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information", "lost+found"),
    *("__pycache__",),
}


@dataclass(frozen=True)
class Tree:
    """A folder with all that is below it, links followed, without what is hidden or left by systems.

    Args:
        root (`pathlib.Path`): the folder, absolute.
        files (`list[str]`): paths below it, `/` between their parts, sorted.
        folders (`list[str]`): those of its folders, likewise.
    """

    root: pathlib.Path
    files: list[str]
    folders: list[str]


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name is nobody's example.

    Args:
        name (`str`): without the folders above it.

    Returns:
        `bool`.
    """
    return name.startswith(".") or name.lower() in LEFT_BY_SYSTEMS


def read_tree(path: str | os.PathLike) -> Tree:
    """List a folder.

    Args:
        path (`str` or `os.PathLike`): the folder, whatever characters its name has.

    Returns:
        [`Tree`].

    Raises:
        ValueError: if a folder can't be read, a link is broken or leads back to a folder above it, or something is
            neither a file nor a folder, or has a name that is no text in UTF-8; names it.
    """
    root = pathlib.Path(path).resolve()
    files, folders = [], []
    waiting = [("", frozenset[tuple[int, int]]())]
    while waiting:
        prefix, above = waiting.pop()
        here = root / prefix
        try:
            status = here.stat()
            if (status.st_dev, status.st_ino) in above:
                raise ValueError(f"{str(here)!r} is a link that leads back to a folder above it")
            with os.scandir(here) as entries:
                found = [entry for entry in entries if not is_ignored(entry.name)]
            kinds = [_kind(entry) for entry in found]
        except OSError as error:
            raise ValueError(f"{error.filename or str(here)!r} can't be read: {error.strerror}") from error
        above |= {(status.st_dev, status.st_ino)}
        for entry, kind in zip(found, kinds, strict=True):
            name = prefix + entry.name
            if kind == "folder":
                folders.append(name)
                waiting.append((f"{name}/", above))
            else:
                files.append(name)
    return Tree(root, sorted(files), sorted(folders))


def _kind(entry: os.DirEntry) -> str:
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{entry.path!r} has a name that is no text in UTF-8") from None
    if entry.is_dir():
        return "folder"
    if entry.is_file():
        return "file"
    if entry.is_symlink():
        entry.stat()  # which says what is wrong with it
    raise ValueError(f"{entry.path!r} is neither a file nor a folder")


def training_prefix(names: Sequence[str], folders: Collection[str] = ()) -> str:
    """Where the examples to train on are: in a `train` folder beside `test` and their like, or everywhere.

    Upper and lower case are the same. A folder that holds nothing but one folder is looked through. A class may be
    called "train", when it and all other classes hold nothing but files.

    Args:
        names (`Sequence[str]`): the examples' files, as a [`Tree`] names them.
        folders (`Collection[str]`, *optional*, defaults to `()`): all folders, for messages.

    Returns:
        `str`: empty, or a folder with a `/` behind it.

    Raises:
        ValueError: if there are splits but none to train on or several, or folders and files beside them that are no
            splits, or splits inside of classes; names them.
    """
    prefix = ""
    while True:
        below = [name.removeprefix(prefix).split("/") for name in names if name.startswith(prefix)]
        parts = {name[0] for name in below if len(name) > 1}
        loose = any(len(name) == 1 for name in below)
        deep = {name[0] for name in below if len(name) > 2}
        splits = {part for part in parts if part.lower() in SPLITS}
        if splits and (splits != parts or loose):
            if not loose and not deep and len(splits) == 1 and next(iter(splits)).lower() in TRAINING:
                break
            beside = ["files"] * loose + sorted(parts - splits)
            raise ValueError(
                f"its folders {sorted(splits)} look like splits, but {beside} beside them are none: move these away, "
                "or give one of the folders alone"
            )
        if splits:
            prefix += f"{_only_training_split(prefix, splits, folders)}/"
        elif len(parts) == 1 and deep and not loose:
            prefix += f"{next(iter(parts))}/"
        else:
            break
    for name in below:
        for number, part in enumerate(name[1:-1], 1):
            if part.lower() in SPLITS:
                where = prefix + "/".join(name[: number + 1])
                raise ValueError(f"its folder {where!r} looks like a split, but lies inside of a class")
    return prefix


def _only_training_split(prefix: str, splits: set[str], folders: Collection[str]) -> str:
    training = sorted(split for split in splits if split.lower() in TRAINING)
    if len(training) == 1:
        return training[0]
    if training:
        raise ValueError(f"its folders {training} are all splits to train on: give one of them alone")
    here = (folder.removeprefix(prefix) for folder in folders if folder.startswith(prefix))
    empty = sorted(name for name in here if name.lower() in TRAINING)
    if empty:
        raise ValueError(f"its split {empty[0]!r} is empty, and only {sorted(splits)} are not")
    raise ValueError(f"it has no split 'train', only {sorted(splits)}")


def class_folders(names: Sequence[str]) -> list[str] | None:
    """The classes of examples: the folders right above them, where there are several and all are as deep.

    Args:
        names (`Sequence[str]`): the examples' files, below the folder of the classes.

    Returns:
        `list[str]`, *optional*: the class of each file; None where folders are no classes.
    """
    parts = [name.split("/") for name in names]
    if any(len(part) != 2 for part in parts) or len({part[0] for part in parts}) < 2:
        return None
    return [part[0] for part in parts]


def held_out_folder(path: str | os.PathLike) -> str | None:
    """The split of a folder that is kept from training.

    Args:
        path (`str` or `os.PathLike`): the folder.

    Returns:
        `str`, *optional*: the first of `HELD_OUT` that is there and holds files; None where there is none.
    """
    found = {child.name.lower(): child for child in sorted(pathlib.Path(path).iterdir()) if child.is_dir()}
    filled = (str(found[name]) for name in HELD_OUT if name in found and read_tree(found[name]).files)
    return next(filled, None)
