# SPDX-License-Identifier: Apache-2.0
"""What the tests of trainings and of the example scripts share."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from accelerate import debug_launcher
from accelerate.state import AcceleratorState, GradientState


# `model_config` of a model that trains in milliseconds.
SIZES = {
    "hidden_size": 16,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "num_attention_heads": 2,
    "num_class_tokens": 2,
    "head_config": {"num_layers": 1, "hidden_size": 16},
}


def forget_accelerate() -> None:
    """A script configures accelerate for its process; the next one in the same process starts as a new program."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def in_processes(count: int, function: Callable, *arguments: Any, **settings: Any) -> None:
    """Call a function in processes that work together, as a launcher's; they are forks, which import nothing."""
    forget_accelerate()
    debug_launcher(partial(function, *arguments, **settings), num_processes=count)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """No device, no screen, nothing left of the run before."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("MPLBACKEND", "agg")
    forget_accelerate()
    yield
    forget_accelerate()
