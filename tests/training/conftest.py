# SPDX-License-Identifier: Apache-2.0
"""What holds for every test of a training: it runs on the CPU, as a new program would."""

from hypothesis import settings

from example_runs import on_the_cpu  # noqa: F401  (for every test)


# The same examples every time, on machines of any speed.
settings.register_profile("training", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("training")
