# SPDX-License-Identifier: Apache-2.0
"""What several test files measure with."""

import torch


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest magnitude expected; shapes have to agree."""
    assert found.shape == expected.shape
    return ((found.detach() - expected).abs().max() / expected.abs().max()).item()


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Same names, dtypes and numbers, bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
