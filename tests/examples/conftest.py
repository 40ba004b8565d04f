# SPDX-License-Identifier: Apache-2.0
"""What holds for every test of a script: it runs on the CPU, as a new program would."""

import pytest

from example_runs import forget_accelerate


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """No device, no screen, nothing left of the run before."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("MPLBACKEND", "agg")
    forget_accelerate()
    yield
    forget_accelerate()
