# SPDX-License-Identifier: Apache-2.0
"""What holds for every test of a training: it runs on the CPU, as a new program would."""

import pytest
import torch
from torch import nn

from example_runs import on_the_cpu  # noqa: F401  (for every test)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A TorchScript file of features of two levels."""

    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 6, 3)

        def forward(self, pictures):
            hidden = self.first(pictures)
            return hidden, self.second(hidden.tanh())

    path = tmp_path_factory.mktemp("features") / "features.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.jit.trace(Features(), torch.zeros(1, 3, 8, 8)).save(path)
    return str(path)
