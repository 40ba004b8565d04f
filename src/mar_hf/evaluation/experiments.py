# SPDX-License-Identifier: Apache-2.0
"""Experiments of many parts: each is run once, side by side, and writes what it finds."""

import logging
import multiprocessing
import runpy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from os import PathLike
from pathlib import Path
from typing import Any

from .folders import write_json


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
        path (`str` or `os.PathLike`): of the file; written when the part is done.
        log (`str` or `os.PathLike`): gets what the part prints.
        function (`Callable`): the part; returns what it found, a `dict` for JSON.
        inputs (`Any`): what it takes.
    """
    start = time.perf_counter()
    with output_to(log):
        found = function(*inputs)
    write_json(path, found | {"seconds": time.perf_counter() - start})


def run_script(path: str | PathLike, words: Sequence[str]) -> None:
    """Run a program as its users do, but in this process: nothing is imported again.

    Args:
        path (`str` or `os.PathLike`): of its file.
        words (`Sequence[str]`): of its command line.
    """
    before, sys.argv = sys.argv, [str(path), *words]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before


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
