# SPDX-License-Identifier: Apache-2.0
"""The fuzz of the doors: its cases run, repeat themselves, and find what is planted."""

import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image


sys.path.insert(0, str(Path(__file__).parents[1] / "utils"))

import fuzz_doors  # noqa: E402
from fuzz_cases import DOORS, Case, World  # noqa: E402

from mar_hf.generation import plan  # noqa: E402


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "world")


def answer_of(run, monkeypatch, world, limit=5.0):
    """What the fuzz says of a door that does this."""
    monkeypatch.setitem(DOORS, "planted", lambda rng, world: Case("planted()", run, ["`x`"]))
    finding = fuzz_doors.try_case("planted", 0, 0, world, limit)
    return None if finding is None else finding.answer


def refuse(error):
    raise error


@pytest.mark.parametrize("door", DOORS)
def test_every_door_has_cases_that_repeat_themselves(door, world):
    calls = []
    for number in (0, 1, 0):
        world.start_case()
        case = DOORS[door](Random(f"0/{door}/{number}"), world)
        calls.append(case.call.split(" at 0x")[0])
        assert callable(case.run)
    assert calls[0] == calls[2] != calls[1]


def test_cases_run_until_there_are_enough(world):
    doors = ["settings", "call", "tokenizer"]
    count, findings = fuzz_doors.try_doors(doors, world, 0, seconds=60, cases=3, limit=20)
    assert count == dict.fromkeys(doors, 3)
    assert all(finding.door in doors for finding in findings)
    count, _ = fuzz_doors.try_doors(doors, world, 0, seconds=0, cases=3, limit=20)
    assert not count


@pytest.mark.parametrize(
    "run, answer",
    [
        (lambda: {"loss": torch.tensor([0.0, float("nan")])}, "numbers that are not finite, of shape (2,)"),
        (lambda: [Image.new("RGB", (4, 4))], "a black picture"),
        (lambda: [][0], "IndexError: list index out of range"),
        (lambda: None + 1, "TypeError: unsupported operand"),
        (lambda: int("x"), "names nothing that was given: ValueError: invalid literal"),
        (lambda: refuse(OSError("`x` is missing")), "OSError: `x` is missing"),
        (lambda: time.sleep(5), "Hang: still running after 0.2 s"),
    ],
)
def test_an_answer_that_is_not_clear_is_found(run, answer, monkeypatch, world):
    assert answer_of(run, monkeypatch, world, limit=0.2).startswith(answer)


@pytest.mark.parametrize(
    "run",
    [
        lambda: {"loss": torch.ones(2), "pictures": [Image.new("RGB", (4, 4), "red")]},
        lambda: refuse(ValueError("`x` has to be 1, got 2.")),
        lambda: (lambda a: a)(b=1),
    ],
)
def test_a_clear_answer_is_none(run, monkeypatch, world):
    assert answer_of(run, monkeypatch, world) is None


def test_a_fault_of_the_package_is_found_and_told_with_what_repeats_it(monkeypatch, world, capsys):
    # Without its check, a schedule that does not exist ends in a KeyError.
    monkeypatch.setattr(plan, "TABLES", {})
    count, findings = fuzz_doors.try_doors(["call"], world, 0, seconds=60, cases=100, limit=20)
    planted = [finding for finding in findings if finding.answer.startswith(("KeyError", "TypeError: unhashable"))]
    assert planted and all(finding.place.startswith("generation/plan.py") for finding in planted)
    fuzz_doors.report(count, findings, 0)
    told = capsys.readouterr().out
    assert f"--seed 0 --door call --case {planted[0].number}" in told
    assert f"100 cases: call 100. {len(findings)} findings of" in told
