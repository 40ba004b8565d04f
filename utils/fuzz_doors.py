# SPDX-License-Identifier: Apache-2.0
"""Tries what users call with arguments and files that make no sense: `python utils/fuzz_doors.py --seconds 60`.

Every case has an answer that is clear, or it is a finding, which is printed with what repeats it. Clear are a result
whose numbers are finite (or a warning that they are not), and an error of a kind that the door documents whose message
names an argument or a file. A crash, a hang and an error from inside are not. What is tried is in `fuzz_cases.py`.
"""

import argparse
import dataclasses
import faulthandler
import logging
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any


# Before the libraries that read them: nothing is downloaded, and nothing of the user's own decides what is found.
if __name__ == "__main__":
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": tempfile.mkdtemp(prefix="fuzz-"),
    }
    os.environ |= {"TRANSFORMERS_VERBOSITY": "critical", "DIFFUSERS_VERBOSITY": "critical"}

import numpy as np
import torch
from fuzz_cases import DOORS, Case, World
from PIL import Image

import mar_hf


PACKAGE = str(Path(mar_hf.__file__).parent)
MEMORY = 6 * 2**30  # more than any case needs; beyond it the machine, not the case, would suffer
# Of Python itself, for arguments that do not exist, also of what a caller hands over to be called.
WRONG_NAME = re.compile(r"unexpected keyword argument|missing \d+ required|takes .* positional arguments? but")


class Hang(BaseException):
    """Raised inside of a case that takes too long; no `except Exception` may hold it back."""


@dataclasses.dataclass
class Finding:
    """A case whose answer is not clear.

    Args:
        door (`str`): which.
        number (`int`): of the case.
        call (`str`): what was done.
        answer (`str`): what came out.
        place (`str`): where in the package it came from.
    """

    door: str
    number: int
    call: str
    answer: str
    place: str = ""


def arrays(value: Any) -> Iterator[np.ndarray | torch.Tensor]:
    """Everything numeric in a result."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        yield value
    elif isinstance(value, Image.Image):
        yield np.asarray(value)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from arrays(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from arrays(part)
    elif dataclasses.is_dataclass(value):
        yield from arrays(vars(value))


def what_is_no_number(result: Any) -> str | None:
    """What in a result is no number, or was none before it became a picture; None if nothing is."""
    for array in arrays(result):
        if isinstance(array, np.ndarray):
            if array.ndim >= 2 and array.dtype == np.uint8 and not array.any():
                return "a black picture"
            array = torch.from_numpy(array.copy()) if array.dtype.kind in "fiu" else torch.zeros(())
        if array.is_floating_point() and not array.is_meta and not array.isfinite().all():
            return f"numbers that are not finite, of shape {tuple(array.shape)}"
    return None


def place_of(error: BaseException) -> str:
    """Where in the package an error came from."""
    frames = [one for one in traceback.extract_tb(error.__traceback__) if one.filename.startswith(PACKAGE)]
    return f"{frames[-1].filename.removeprefix(PACKAGE)[1:]}:{frames[-1].lineno} {frames[-1].name}" if frames else ""


def judge_error(case: Case, error: BaseException) -> str | None:
    """What is unclear about an error; None if nothing is."""
    message = " ".join(str(error).split())
    shown = f"{type(error).__name__}: {message[:300]}"
    if isinstance(error, TypeError) and WRONG_NAME.search(message):
        return None
    if not isinstance(error, case.refusals):
        return shown
    return None if any(name in message for name in case.names) else f"names nothing that was given: {shown}"


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Stop what takes longer: by an exception, or, where Python is not asked, by the end of the process."""

    def stop(*_: Any) -> None:
        raise Hang(f"still running after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        faulthandler.dump_traceback_later(3 * seconds, exit=True, file=sys.__stderr__)
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Warned(logging.Handler):
    """Whether the package warned of something."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message of the package."""
        if record.name.startswith("mar_hf"):
            self.messages.append(record.getMessage())


def try_case(door: str, number: int, seed: int, world: World, limit: float) -> Finding | None:
    """Run one case. The same three make the same case."""
    rng = Random(f"{seed}/{door}/{number}")
    world.start_case()
    case = DOORS[door](rng, world)
    warned, answer, place = Warned(), None, ""
    logging.getLogger().addHandler(warned)
    try:
        with warnings.catch_warnings(), at_most(limit):
            warnings.simplefilter("ignore")
            result = case.run()
        if not warned.messages:
            answer = what_is_no_number(result)
    except (Exception, Hang) as error:
        answer, place = judge_error(case, error), place_of(error)
        if world.verbose:
            traceback.print_exc()
    finally:
        logging.getLogger().removeHandler(warned)
    return None if answer is None else Finding(door, number, case.call, answer, place)


def try_doors(
    doors: Sequence[str], world: World, seed: int, seconds: float, cases: int, limit: float, note: Path | None = None
) -> tuple[Counter, list[Finding]]:
    """Run cases of all doors, of the one that has had least time first, until there is no time, or no case left.

    `note` holds the case that runs, for whoever finds the process dead.
    """
    spent, count, findings = dict.fromkeys(doors, 0.0), Counter(), []
    start = time.perf_counter()
    for door in doors:
        world.start_case()
        DOORS[door](Random(0), world)  # what is built once belongs to no case
    while time.perf_counter() - start < seconds:
        left = [door for door in doors if count[door] < cases]
        if not left:
            break
        door = min(left, key=spent.get)
        if note is not None:
            note.write_text(f"{door} {count[door]}")
        before = time.perf_counter()
        finding = try_case(door, count[door], seed, world, limit)
        spent[door] += time.perf_counter() - before
        count[door] += 1
        if finding is not None:
            findings.append(finding)
    return count, findings


def report(count: Counter, findings: list[Finding], seed: int) -> None:
    """Print findings, one of a kind with what repeats it and how many there are, then the cases of each door."""
    kinds = defaultdict(list)
    for finding in findings:
        kinds[finding.door, finding.place, re.sub(r"\d+|'.*?'", "", finding.answer)[:60]].append(finding)
    for (door, place, _), same in sorted(kinds.items(), key=lambda kind: kind[0]):
        first = same[0]
        print(f"{door}: {first.answer}")
        print(f"    in {place or 'no line of the package'}, {len(same)} times")
        print(f"    {first.call}")
        print(f"    python utils/fuzz_doors.py --seed {seed} --door {door} --case {first.number}")
    tried = ", ".join(f"{door} {number}" for door, number in count.items())
    print(f"{sum(count.values())} cases: {tried}. {len(findings)} findings of {len(kinds)} kinds.")


def in_process_of_its_own(args: argparse.Namespace, folder: Path) -> int:
    """Try the doors in a process whose end, whatever ends it, is a finding too."""
    note = folder / "note"
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        if note.exists():
            door, number = note.read_text().split()
            print(f"{door}: the process ended: a crash, too much memory, or a hang that no signal reaches")
            print(f"    python utils/fuzz_doors.py --seed {args.seed} --door {door} --case {number}")
        return 1 if status else 0
    status = 2
    try:
        status = run_here(args, folder)
        note.unlink(missing_ok=True)
    except Exception:  # of the script itself
        traceback.print_exc()
    finally:  # what follows is the parent's
        sys.stdout.flush()
        os._exit(status)


def run_here(args: argparse.Namespace, folder: Path) -> int:
    """Try the doors; 1 if anything was found."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    torch.set_num_threads(1)
    world = World(folder / "world", verbose=args.case is not None)
    if args.case is None:
        limits = (args.seed, args.seconds, args.cases, args.limit)
        count, findings = try_doors(args.door, world, *limits, folder / "note")
    else:
        found = [try_case(door, args.case, args.seed, world, args.limit) for door in args.door]
        count, findings = Counter(args.door), [finding for finding in found if finding is not None]
    report(count, findings, args.seed)
    return int(bool(findings))


def main(argv: Sequence[str] | None = None) -> int:
    """Run as the arguments say; 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="for all doors together (default: %(default)s)")
    parser.add_argument("--cases", type=int, default=10**9, help="at most so many of each door")
    parser.add_argument(
        "--limit", type=float, default=20, help="seconds that one case may take (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--door", nargs="+", choices=list(DOORS), default=list(DOORS), help="(default: all)")
    parser.add_argument("--case", type=int, help="this one only, with its traceback")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        return in_process_of_its_own(args, Path(folder))


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
