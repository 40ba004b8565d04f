# SPDX-License-Identifier: Apache-2.0
"""Small things that several modules need."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


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
