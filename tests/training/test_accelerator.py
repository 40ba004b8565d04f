# SPDX-License-Identifier: Apache-2.0
"""Runs after each other in one process."""

from mar_hf.training import make_accelerator


def test_the_next_run_may_have_other_settings():
    first = make_accelerator(mixed_precision="no")
    assert (first.mixed_precision, first.gradient_accumulation_steps) == ("no", 1)
    second = make_accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
    assert (second.mixed_precision, second.gradient_accumulation_steps) == ("bf16", 2)
