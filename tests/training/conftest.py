# SPDX-License-Identifier: Apache-2.0
"""What holds for every test of a training: it runs on the CPU, as a new program would."""

from example_runs import on_the_cpu  # noqa: F401  (for every test)
