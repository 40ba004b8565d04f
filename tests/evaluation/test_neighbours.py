# SPDX-License-Identifier: Apache-2.0
"""Neighbours against sorted lists, and what they have to say of copies, of quality and of variety."""

import pytest
import torch

from common import seeded
from mar_hf.evaluation import neighbours


def normal(count, width=6, seed=0, scale=1.0, shift=0.0):
    return torch.randn(count, width, generator=seeded(seed), dtype=torch.float64) * scale + shift


def test_nearest_neighbours_are_those_of_a_sorted_list(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    queries, candidates = normal(20), normal(31, seed=1)
    expected = (queries[:, None] - candidates[None]).norm(dim=2).sort(dim=1)
    for k in (1, 3):
        distances, indices = neighbours.nearest_neighbours(queries, candidates, k)
        assert torch.equal(indices, expected.indices[:, k - 1])
        assert torch.allclose(distances, expected.values[:, k - 1])
    # Among themselves, each at distance 0 from itself.
    expected = (queries[:, None] - queries[None]).norm(dim=2).sort(dim=1)
    distances, indices = neighbours.nearest_neighbours(queries, k=2)
    assert torch.equal(indices, expected.indices[:, 2]) and torch.allclose(distances, expected.values[:, 2])
    with pytest.raises(ValueError, match="19 candidates, too few for neighbour 20"):
        neighbours.nearest_neighbours(queries, k=20)


def test_precision_and_recall_tell_quality_from_variety():
    real = normal(300, width=2)
    assert neighbours.precision_recall(real, real) == (1, 1)
    assert neighbours.precision_recall(real, normal(300, width=2, shift=100)) == (0, 0)
    precision, recall = neighbours.precision_recall(real, normal(300, width=2, seed=1, scale=0.1))
    assert precision == 1 and recall < 0.1
    precision, recall = neighbours.precision_recall(real, normal(300, width=2, seed=1, scale=10))
    assert precision < 0.2 and recall > 0.7


def test_precision_and_recall_by_hand():
    # On a line: radii to the nearest are 1, 1, 8 for the real ones, 0.5, 0.25, 0.25 for the fakes.
    real, fake = torch.tensor([[0.0], [1.0], [9.0]]), torch.tensor([[-0.5], [-1.0], [-1.25]])
    precision, recall = neighbours.precision_recall(real, fake, k=1)
    assert (precision, recall) == (pytest.approx(2 / 3), pytest.approx(1 / 3))


def test_copies_are_memorised():
    real = normal(200)
    assert neighbours.memorised(real, real[:50]) == 1
    assert 0.35 < neighbours.memorised(real, normal(200, seed=1)) < 0.65
    assert neighbours.memorised(real, normal(50, seed=1, shift=20)) == 0
