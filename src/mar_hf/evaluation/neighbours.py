# SPDX-License-Identifier: Apache-2.0
"""Nearest neighbours among features, and what they say: precision, recall, memorisation."""

import torch


BLOCK = 2048  # rows of a matrix of distances that are in memory at once


def nearest_neighbours(
    queries: torch.Tensor, candidates: torch.Tensor | None = None, k: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k-th nearest row of a matrix for each row of another.

    Args:
        queries (`torch.Tensor` of shape `(queries, width)`): rows to look up.
        candidates (`torch.Tensor` of shape `(candidates, width)`, *optional*): rows to find; None looks among the
            queries, each of which does not find itself.
        k (`int`, *optional*, defaults to 1): 1 is the nearest.

    Returns:
        two `torch.Tensor` of shape `(queries,)`: distances (float64) and indices of the candidates (int64).

    Raises:
        ValueError: if there are fewer than k candidates.
    """
    own = candidates is None
    candidates = (queries if own else candidates).double()
    if len(candidates) - own < k:
        raise ValueError(f"There are {len(candidates) - own} candidates, too few for neighbour {k}.")
    distances, indices = [], []
    for first in range(0, len(queries), BLOCK):
        block = torch.cdist(queries[first : first + BLOCK].double(), candidates)
        if own:
            block[:, first:].fill_diagonal_(torch.inf)
        found = block.kthvalue(k, dim=1)
        distances.append(found.values)
        indices.append(found.indices)
    return torch.cat(distances), torch.cat(indices)


def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019).

    Args:
        real (`torch.Tensor` of shape `(pictures, width)`): features of real pictures.
        fake (`torch.Tensor` of shape `(pictures, width)`): features of others.
        k (`int`, *optional*, defaults to 3): the ball around a picture reaches to its k-th neighbour of the same kind.

    Returns:
        two `float`: the share of fakes inside of a real picture's ball, and of real pictures inside of a fake's.
    """

    def covered(points: torch.Tensor, centres: torch.Tensor) -> float:
        radii = nearest_neighbours(centres, k=k)[0]
        blocks = [torch.cdist(block.double(), centres.double()) <= radii for block in points.split(BLOCK)]
        return torch.cat([block.any(1) for block in blocks]).double().mean().item()

    return covered(fake, real), covered(real, fake)


def memorised(real: torch.Tensor, fake: torch.Tensor) -> float:
    """The share of pictures that are nearer to a training picture than that is to any other training picture.

    Args:
        real (`torch.Tensor` of shape `(pictures, width)`): features of the training pictures.
        fake (`torch.Tensor` of shape `(pictures, width)`): features of others.

    Returns:
        `float`: 1 for copies; for new pictures of the same distribution one half or somewhat less.
    """
    distances, indices = nearest_neighbours(fake, real)
    return (distances < nearest_neighbours(real)[0][indices]).double().mean().item()
