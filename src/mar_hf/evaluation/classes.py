# SPDX-License-Identifier: Apache-2.0
"""Classes of a model: which ones are wanted, what they are called, and the folders of their pictures."""

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..pipelines import MARPipeline


FEW_CLASSES = 40
# What no file system, shell or reader of image folders takes for something else. Windows refuses these characters.
REFUSED = frozenset('<>:"/\\|?*')
# What a folder of pictures has beside them, the names of splits in one, and the devices of Windows.
RESERVED = frozenset(
    ["settings.json", "samples.npz", "metadata.csv", "metadata.jsonl", "metadata.parquet"]
    + ["train", "validation", "valid", "val", "dev", "test"]
    + ["con", "prn", "aux", "nul", *(f"{device}{number}" for device in ("com", "lpt") for number in range(10))]
)
# A file's name may have 255 bytes; the class number and the file's own ending have to fit, too.
LONGEST_NAME = 120


def choose_classes(
    pipeline: "MARPipeline", wanted: Sequence[str | int] | None, argument: str = "class_labels"
) -> list[int]:
    """Class numbers of names or numbers, each once; of none the model's classes, or eight of them if they are many.

    Args:
        pipeline ([`MARPipeline`]): it knows how many classes there are, and their names.
        wanted (`Sequence[str | int]`, *optional*): names, or numbers, also in decimal digits where no class has such a
            name.
        argument (`str`, *optional*, defaults to `"class_labels"`): what the message calls it.

    Returns:
        `list[int]`: in the order wanted.

    Raises:
        ValueError: if a name is unknown. (A number out of range is for the pipeline to refuse.)
    """
    count = pipeline.transformer.config.num_classes
    if wanted is None:
        return list(range(count)) if count <= FEW_CLASSES else list(range(0, count, -(-count // 8)))
    known = pipeline.labels
    labels = [name if isinstance(name, int) else known.get(name, _number(name)) for name in wanted]
    if None in labels:
        some = ", ".join(list(known)[:FEW_CLASSES]) or "numbers only, this model names no classes"
        raise ValueError(f"`{argument}`: {wanted[labels.index(None)]!r} is unknown; known are {some}")
    return list(dict.fromkeys(labels))


def _number(word: str) -> int | None:
    return int(word) if word.isdecimal() and len(word) < 20 else None


def class_name(pipeline: "MARPipeline", label: int) -> str:
    """The name of a class.

    Args:
        pipeline ([`MARPipeline`]): it knows the names.
        label (`int`): of the class.

    Returns:
        `str`: the name, or "class 7" where the model names none.
    """
    return class_names(pipeline).get(label, f"class {label}")


def safe_name(name: str, otherwise: str = "unnamed") -> str:
    """A name as a part of a path: one that stays where it is put, on every file system.

    Args:
        name (`str`): any text, that of a stranger's file too.
        otherwise (`str`, *optional*, defaults to `"unnamed"`): what to call it where nothing is left of the name.

    Returns:
        `str`: the name as it is where that is harmless. Else separators and unprintable characters become "-", dots,
        underscores and spaces at the ends go (files and folders that begin so are hidden, or skipped), and reserved
        and long names change. At most 120 bytes. Different names may give the same.
    """
    text = unicodedata.normalize("NFC", name)
    text = "".join("-" if letter in REFUSED or not letter.isprintable() else letter for letter in text)
    text = text.strip(" .").lstrip(" ._").encode()[:LONGEST_NAME].decode(errors="ignore").rstrip(" .")
    if text.partition(".")[0].rstrip().casefold() in RESERVED or text.casefold() in RESERVED:
        text = f"class {text}"
    return text or otherwise


def class_folders(names: Mapping[int, str]) -> dict[int, str]:
    """The folder of each class: its name where that is safe and no other class has the same, else with its number.

    Args:
        names (`Mapping[int, str]`): class number -> name, any text: a checkpoint's configuration holds them.

    Returns:
        `dict[int, str]`: class number -> a name from `safe_name`; no two are the same, also where capitals, or the two
        ways to write an accent, do not count.

    Example:
        >>> class_folders({0: "crane", 1: "either/or", 2: "Crane", 3: ".."})
        {0: 'crane 0', 1: 'either-or', 2: 'Crane 2', 3: 'class 3'}
    """
    folders = {label: safe_name(name, otherwise=f"class {label}") for label, name in names.items()}
    # The number may make a name that another class has already: then that one gets its own, too.
    while True:
        keys = {label: _as_compared(folder) for label, folder in folders.items()}
        counts = Counter(keys.values())
        shared = [label for label, key in keys.items() if counts[key] > 1]
        if not shared:
            return folders
        folders |= {label: f"{folders[label]} {label}" for label in shared}


def _as_compared(name: str) -> str:
    # As file systems do that fold case and normalise: some fold less, none more.
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def choose_folders(pipeline: "MARPipeline", wanted: Sequence[str | int] | None = None) -> dict[int, str]:
    """The folders of the classes wanted, the same whichever other classes are.

    Args:
        pipeline ([`MARPipeline`]): it knows the names.
        wanted (`Sequence[str | int]`, *optional*): names or numbers; None means all classes.

    Returns:
        `dict[int, str]`: class number -> name of the folder, see `class_folders`.

    Raises:
        ValueError: if a name is unknown or a number out of range, or the model knows texts only.
    """
    limit = pipeline.transformer.config.num_classes
    if limit == 0:
        raise ValueError(
            "This model knows no classes, only texts: see evaluate_texts.py, and `--captions` of measure_speed.py."
        )
    labels = range(limit) if wanted is None else choose_classes(pipeline, wanted)
    if beyond := [label for label in labels if not 0 <= label < limit]:
        raise ValueError(f"`class_labels` has to lie in 0..{limit - 1}, got {beyond}.")
    folders = class_folders(class_names(pipeline))
    return {label: folders[label] for label in labels}


def choose_labels(pipeline: "MARPipeline", wanted: Sequence[str | int] | None = None) -> dict[int, str]:
    """What real pictures of the classes wanted are called.

    Args:
        pipeline ([`MARPipeline`]): it knows the names.
        wanted (`Sequence[str | int]`, *optional*): names or numbers; None means all classes.

    Returns:
        `dict[int, str]`: class number -> its name, or that of its folder where classes share the name.

    Raises:
        ValueError: as `choose_folders`.
    """
    names = class_names(pipeline)
    counts = Counter(names.values())
    folders = choose_folders(pipeline, wanted)
    return {label: names[label] if counts[names[label]] == 1 else folder for label, folder in folders.items()}


def class_names(pipeline: "MARPipeline") -> dict[int, str]:
    """The names of all classes.

    Args:
        pipeline ([`MARPipeline`]): it knows them.

    Returns:
        `dict[int, str]`: class number -> name, "class 7" where the model names none.
    """
    names = {int(key): name for key, name in (pipeline.config.id2label or {}).items()}
    return {label: names.get(label, f"class {label}") for label in range(pipeline.transformer.config.num_classes)}


def is_conditional(pipeline: "MARPipeline") -> bool:
    """Whether the model knows classes: one trained without them has a single class, which has no name.

    Args:
        pipeline ([`MARPipeline`]): of any kind.

    Returns:
        `bool`.
    """
    return bool(pipeline.config.id2label) or pipeline.transformer.config.num_classes > 1
