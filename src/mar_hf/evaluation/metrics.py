# SPDX-License-Identifier: Apache-2.0
"""How near a set of pictures is to another: numbers computed from their features.

Kernel distance and Inception Score are torchmetrics'; it lacks the Frechet distance between statistics, which may come
from a file. What neighbours say is in `neighbours`. See docs/evaluation.md for what each number means.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import numpy as np
import torch

from ..utils import atomic_file, import_extra
from .features import find_torch_fidelity
from .folders import read_arrays


# Else torchmetrics would wait for the other processes, which do not measure.
ALONE = {"sync_on_compute": False}


def statistics(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance.

    Args:
        features (`torch.Tensor` of shape `(pictures, width)`): at least two pictures.

    Returns:
        two `torch.Tensor` of shapes `(width,)` and `(width, width)`, float64.
    """
    features = features.double()
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1)


def read_statistics(path: str | PathLike) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Mean and covariance of a reference file in ADM's layout.

    Args:
        path (`str` or `os.PathLike`): an `.npz` with `mu` and `sigma`; `mu_s`, `sigma_s` and `arr_0` are left alone.

    Returns:
        two `torch.Tensor`, float64; or None where the file has none.

    Raises:
        ValueError: if the file can't be read, or they do not fit each other.
    """
    arrays = read_arrays(path)
    if not {"mu", "sigma"} <= arrays.keys():
        return None
    mean, covariance = arrays["mu"], arrays["sigma"]
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape or not np.isfinite([mean.sum(), covariance.sum()]).all():
        raise ValueError(
            f"`mu` and `sigma` of {str(path)!r} have to be finite, of shapes (width,) and (width, width), "
            f"not {mean.shape} and {covariance.shape}."
        )
    return torch.from_numpy(mean).double(), torch.from_numpy(covariance).double()


def write_statistics(path: str | PathLike, mean: torch.Tensor, covariance: torch.Tensor) -> None:
    """Write a reference file in ADM's layout, completely or not at all.

    Args:
        path (`str` or `os.PathLike`): of the `.npz` file.
        mean (`torch.Tensor` of shape `(width,)`): becomes `mu`.
        covariance (`torch.Tensor` of shape `(width, width)`): becomes `sigma`.
    """
    with atomic_file(path) as partial, open(partial, "wb") as file:
        np.savez(file, mu=mean.numpy(), sigma=covariance.numpy())


def frechet_distance(
    mean1: torch.Tensor, covariance1: torch.Tensor, mean2: torch.Tensor, covariance2: torch.Tensor
) -> float:
    """Squared Frechet distance of two normal distributions (Heusel et al. 2017).

    Args:
        mean1 (`torch.Tensor` of shape `(width,)`): of the first.
        covariance1 (`torch.Tensor` of shape `(width, width)`): of the first.
        mean2 (`torch.Tensor` of shape `(width,)`): of the second.
        covariance2 (`torch.Tensor` of shape `(width, width)`): of the second.

    Returns:
        `float`: at least 0, but for rounding.

    Raises:
        ValueError: if the widths differ.
    """
    if mean1.shape != mean2.shape:
        raise ValueError(f"Statistics of widths {len(mean1)} and {len(mean2)} can't be compared.")
    # C1 = root root^T, with as many columns as C1 has rank: few for few pictures, however wide their features are.
    lapack = import_extra("scipy.linalg.lapack", "eval")
    factor, pivots, rank, _ = lapack.dpstrf(covariance1.double().cpu().numpy(), lower=1)
    root = torch.empty(len(mean1), rank, dtype=torch.float64)
    root[pivots - 1] = torch.from_numpy(factor).tril()[:, :rank]
    # The eigenvalues of root^T C2 root are those of C1 C2, and the matrix is symmetric.
    cross = torch.linalg.eigvalsh(root.T @ covariance2.double().cpu() @ root).clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).double().square().sum() + covariance1.trace() + covariance2.trace() - 2 * cross
    return distance.item()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """For what draws from torch's global generator, which stays as it was, and warns of the memory it takes."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.default_generator.manual_seed(seed)
        yield


def _torchmetrics(name: str, *args: Any, **settings: Any) -> Any:
    find_torch_fidelity()  # before torchmetrics looks for it
    module, _, kind = name.rpartition(".")
    return getattr(import_extra(f"torchmetrics.image.{module}", "eval"), kind)(*args, **settings, **ALONE)


def kernel_distance(real: torch.Tensor, fake: torch.Tensor, seed: int = 0) -> float:
    """Unbiased squared maximum mean discrepancy with a cubic kernel (KID, Binkowski et al. 2018).

    Args:
        real (`torch.Tensor` of shape `(pictures, width)`): features of real pictures.
        fake (`torch.Tensor` of shape `(pictures, width)`): features of others; another number of them is fine.
        seed (`int`, *optional*, defaults to 0): of the subsets.

    Returns:
        `float`: the mean over 20 random subsets of at most 1,000 pictures; about 0, also below, for one distribution.
    """
    size = min(len(real), len(fake), 1000)
    with _seeded(seed):
        metric = _torchmetrics("kid.KernelInceptionDistance", torch.nn.Identity(), subsets=20, subset_size=size)
        metric.update(real.double(), real=True)
        metric.update(fake.double(), real=False)
        return metric.compute()[0].item()


def inception_score(logits: torch.Tensor, splits: int = 10, seed: int = 0) -> float:
    """Inception Score (Salimans et al. 2016): 1 is the worst, the number of classes the best.

    Args:
        logits (`torch.Tensor` of shape `(pictures, classes)`): of a classifier.
        splits (`int`, *optional*, defaults to 10): the score is the mean over so many parts.
        seed (`int`, *optional*, defaults to 0): of the parts.

    Returns:
        `float`.
    """
    with _seeded(seed):
        metric = _torchmetrics("inception.InceptionScore", torch.nn.Identity(), splits=min(splits, len(logits)))
        metric.update(logits.double())
        return metric.compute()[0].item()


def diversity(features: torch.Tensor, labels: Sequence[str]) -> float:
    """The mean distance of two pictures of the same class.

    Args:
        features (`torch.Tensor` of shape `(pictures, width)`): of all pictures.
        labels (`Sequence[str]`): the class of each.

    Returns:
        `float`: the mean over the classes with more than one picture; NaN without any.
    """
    labels = np.array(labels)
    groups = [features[torch.from_numpy(labels == label)].double() for label in np.unique(labels)]
    means = [torch.pdist(group).mean() for group in groups if len(group) > 1]
    return torch.stack(means).mean().item() if means else float("nan")


def _accuracy(labels: Sequence[str], predicted: np.ndarray) -> float:
    return import_extra("sklearn.metrics", "eval").accuracy_score(labels, predicted)


class Classifier:
    """A support vector machine on pixels that says which class a picture is of.

    Args:
        features (`torch.Tensor` of shape `(pictures, width)`): pixels of the real pictures, see `PixelFeatures`.
        labels (`Sequence[str]`): the class of each; two or more classes of two or more pictures.

    Raises:
        ValueError: if there are too few classes, or pictures in one.
    """

    def __init__(self, features: torch.Tensor, labels: Sequence[str]):
        names, counts = np.unique(labels, return_counts=True)
        if len(names) < 2 or counts.min() < 2:
            raise ValueError(f"`classifier` needs 2 classes with 2 pictures each, got {dict(zip(names, counts))}.")
        selection = import_extra("sklearn.model_selection", "eval")
        folds = selection.StratifiedKFold(min(5, counts.min()), shuffle=True, random_state=0)
        self.machine = import_extra("sklearn.svm", "eval").SVC()
        predicted = selection.cross_val_predict(self.machine, features.numpy(), labels, cv=folds)
        self.cross_validated_accuracy = _accuracy(labels, predicted)
        self.machine.fit(features.numpy(), labels)

    def accuracy(self, features: torch.Tensor, labels: Sequence[str]) -> float:
        """The share of pictures that are recognised as their label.

        Args:
            features (`torch.Tensor` of shape `(pictures, width)`): of pictures of the same size.
            labels (`Sequence[str]`): the class of each.

        Returns:
            `float`.
        """
        return _accuracy(labels, self.machine.predict(features.numpy()))


def psnr(real: torch.Tensor, restored: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of reconstructions, in dB.

    Args:
        real (`torch.Tensor` of shape `(pictures, channels, height, width)`): in [-1, 1].
        restored (`torch.Tensor` of the same shape): what became of them.

    Returns:
        `float`: the mean over the pictures, at most 106: that of a picture that comes back as it is.
    """
    error = (real - restored).square().mean((1, 2, 3)).clamp(min=1e-10)
    return (10 * torch.log10(4 / error)).mean().item()  # peak-to-peak is 2
