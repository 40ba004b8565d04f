# SPDX-License-Identifier: Apache-2.0
"""Experiments of many parts: each is run once, side by side, and writes what it finds."""

import logging
import multiprocessing
import runpy
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from os import PathLike
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .folders import read_json, write_json


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


def once(folder: str | PathLike, name: str, function: Callable[..., dict], *inputs: Any) -> None:
    """Write what a part of an experiment finds, and how long it took, where that is not there yet.

    `results/<name>.json` is written when the part is done; `logs/<name>.log` gets what it prints.

    Args:
        folder (`str` or `os.PathLike`): of the experiment.
        name (`str`): of the part, which is told before it starts.
        function (`Callable`): the part; returns what it found, a `dict` for JSON.
        inputs (`Any`): what it takes.
    """
    file = Path(folder, "results", f"{name}.json")
    if file.exists():
        return
    tqdm.write(f"{time.strftime('%H:%M:%S')} {name}")
    start = time.perf_counter()
    with output_to(Path(folder, "logs", f"{name}.log")):
        found = function(*inputs)
    write_json(file, found | {"seconds": time.perf_counter() - start})


def read_result(folder: str | PathLike, name: str) -> dict[str, Any]:
    """What `once` wrote.

    Args:
        folder (`str` or `os.PathLike`): of the experiment.
        name (`str`): of the part.

    Returns:
        `dict[str, Any]`: what the part found, and its `seconds`.
    """
    return read_json(Path(folder, "results", f"{name}.json"))


def run_script(path: str | PathLike, words: Iterable[object]) -> str:
    """Run a program as its users do, but in this process: nothing is imported again.

    Args:
        path (`str` or `os.PathLike`): of its file.
        words (`Iterable`): of its command line.

    Returns:
        `str`: the command line.
    """
    words = list(map(str, words))
    before, sys.argv = sys.argv, [str(path), *words]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before
    return shlex.join([f"{Path(path).parent.name}/{Path(path).name}", *words])


def run_all(tasks: Sequence[Callable[[], None]], jobs: int) -> None:
    """Run tasks, several side by side in processes of their own; the first that fails ends it.

    Args:
        tasks (`Sequence[Callable]`): functions that can be pickled, without arguments.
        jobs (`int`): how many at once; 1 runs them here.

    Raises:
        Exception: what a task raises.
    """
    if jobs == 1:
        for task in tasks:
            task()
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(task) for task in tasks]):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
