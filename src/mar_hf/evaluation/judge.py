# SPDX-License-Identifier: Apache-2.0
"""All metrics of a set of pictures against real ones."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..utils import look_up
from .features import FEATURES, PixelFeatures, extract
from .metrics import (
    Classifier,
    diversity,
    frechet_distance,
    inception_score,
    kernel_distance,
    read_statistics,
    statistics,
    write_statistics,
)
from .neighbours import memorised, nearest_neighbours, precision_recall
from .pictures import Pictures, save_samples
from .plots import draw_neighbours


class Judge:
    """Measures pictures against real ones, whose features it computes once.

    `metrics` are the same numbers for the real pictures, one half of them against the other: what to compare with.

    Args:
        reference (`str` or `os.PathLike`): real pictures: an image folder, or an `.npz` in ADM's layout (`arr_0`, or
            `mu` and `sigma`).
        size (`int`): side of the pictures in pixels; the real ones are made as large.
        labels (`Sequence[str]`, *optional*): classes of the pictures to come; real pictures of others are left out.
        features (`str`, *optional*, defaults to `"lite0"`): a name in `FEATURES`.
        weights (`str`, *optional*): file of the weights for the features "inception".
        classifier (`bool`, *optional*, defaults to `False`): also train an SVM on the real pixels and ask it.
        batch_size (`int`, *optional*, defaults to 32): pictures at once.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where features are computed.
        progress (`bool`, *optional*, defaults to `False`): whether to show bars.

    Raises:
        ValueError: if the reference is not there, or holds too little for what is asked.
    """

    def __init__(
        self,
        reference: str | os.PathLike,
        size: int,
        labels: Sequence[str] | None = None,
        *,
        features: str = "lite0",
        weights: str | None = None,
        classifier: bool = False,
        batch_size: int = 32,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ):
        reference = os.fspath(reference)
        if not os.path.exists(reference):
            raise ValueError(f"`reference` {reference!r} does not exist.")
        self.batch_size, self.device, self.progress, self.space = batch_size, device, progress, features
        self.extractor = look_up(FEATURES, features, "features")(weights)
        self.statistics = read_statistics(reference) if reference.endswith(".npz") else None
        self.pictures = self.features = self.classifier = None
        self.metrics: dict[str, float] = {}
        try:
            self.pictures = Pictures(reference, size)
        except ValueError:
            if self.statistics is None:
                raise
        same_classes = bool(labels and self.pictures and self.pictures.labels) and (
            set(labels) <= set(self.pictures.labels)
        )
        if same_classes:
            self.pictures.keep(labels)
        elif classifier:
            raise ValueError(f"`classifier` needs pictures of every class of the samples in {reference!r}.")
        if self.pictures is not None:
            if len(self.pictures) < 8:
                raise ValueError(f"`reference` {reference!r} holds {len(self.pictures)} pictures, fewer than 8.")
            self._look_at_the_real_pictures(same_classes, classifier)

    def _look_at_the_real_pictures(self, same_classes: bool, classifier: bool) -> None:
        self.features = self.features_of(self.pictures)
        order = torch.randperm(len(self.pictures), generator=torch.Generator().manual_seed(0))
        halves = [{name: rows[part] for name, rows in self.features.items()} for part in order.chunk(2)]
        self.metrics = self.compare(halves[0], None, halves[1])
        if same_classes:
            self.metrics["diversity" + self.extractor.suffix] = diversity(
                self.features["kernel"], self.pictures.labels
            )
        if classifier:
            self.classifier = Classifier(self.features["pixels"], self.pictures.labels)
            self.metrics["classifier_accuracy"] = self.classifier.cross_validated_accuracy

    def save_statistics(self, path: str | os.PathLike) -> None:
        """Write mean and covariance of the real pictures' features in ADM's layout.

        Args:
            path (`str` or `os.PathLike`): of the `.npz` file.

        Raises:
            ValueError: if there are no real pictures, only their statistics.
        """
        if self.features is None:
            raise ValueError("`reference` has no pictures: its statistics stand in a file already.")
        write_statistics(path, *statistics(self.features["frechet"]))

    def features_of(self, pictures: Pictures | Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Features of pictures, their pixels among them.

        Args:
            pictures (`Pictures` or `Sequence[torch.Tensor]`): of one size.

        Returns:
            `dict[str, torch.Tensor]`: `frechet`, `kernel`, `pixels`, and `logits` where the network has them.
        """
        features = extract(pictures, self.extractor, self.batch_size, self.device, self.progress)
        return features | {"pixels": extract(pictures, PixelFeatures(), self.batch_size)["kernel"]}

    def compare(
        self,
        real: dict[str, torch.Tensor] | None,
        real_statistics: tuple[torch.Tensor, torch.Tensor] | None,
        fake: dict[str, torch.Tensor],
    ) -> dict[str, float]:
        """What needs no labels.

        Args:
            real (`dict[str, torch.Tensor]`, *optional*): features of the real pictures, where there are any.
            real_statistics (`tuple`, *optional*): their mean and covariance, instead of those of `real`.
            fake (`dict[str, torch.Tensor]`): features of the others.

        Returns:
            `dict[str, float]`: by name of the metric.
        """
        suffix = self.extractor.suffix
        if real_statistics is None or (real is not None and len(real_statistics[0]) != fake["frechet"].shape[1]):
            real_statistics = statistics(real["frechet"])
        found = {f"fd{suffix}" if suffix else "fid": frechet_distance(*real_statistics, *statistics(fake["frechet"]))}
        if real is not None:
            found[f"kid{suffix}"] = kernel_distance(real["kernel"], fake["kernel"])
            found[f"precision{suffix}"], found[f"recall{suffix}"] = precision_recall(real["kernel"], fake["kernel"])
            found[f"memorised{suffix}"] = memorised(real["kernel"], fake["kernel"])
            found[f"memorised{PixelFeatures.suffix}"] = memorised(real["pixels"], fake["pixels"])
        if "logits" in fake:
            found[f"inception_score{suffix}"] = inception_score(fake["logits"])
        return found

    def measure(
        self,
        samples: Pictures | Sequence[torch.Tensor],
        labels: Sequence[str] | None = None,
        folder: str | os.PathLike | None = None,
    ) -> dict[str, float]:
        """All metrics of samples.

        Args:
            samples (`Pictures` or `Sequence[torch.Tensor]`): at least 4, uint8.
            labels (`Sequence[str]`, *optional*): class of each; None takes those that `Pictures` have.
            folder (`str` or `os.PathLike`, *optional*): of `Pictures`, gets `grid.png` and, where there are real
                pictures, `neighbours.png`: 16 samples, each beside the real pictures nearest in pixels and in
                features. They are spread evenly from the one that is nearest to its neighbour, for how far that is
                from the other real pictures, to the one that is farthest.

        Returns:
            `dict[str, float]`: by name of the metric.

        Raises:
            ValueError: if there are fewer than 4.
        """
        if len(samples) < 4:
            raise ValueError(f"There are {len(samples)} samples, at least 4 are needed.")
        labels = getattr(samples, "labels", None) if labels is None else labels
        fake = self.features_of(samples)
        found = self.compare(self.features, self.statistics, fake)
        if labels is not None:
            found["diversity" + self.extractor.suffix] = diversity(fake["kernel"], labels)
        if self.classifier is not None:
            found["classifier_accuracy"] = self.classifier.accuracy(fake["pixels"], labels)
        if folder is not None:
            save_samples(samples, Path(folder, "grid.png"))
            if self.features is not None:
                self._draw_neighbours(samples, fake, Path(folder, "neighbours.png"))
        return {name: number for name, number in found.items() if not np.isnan(number)}

    def _draw_neighbours(self, samples: Pictures, fake: dict[str, torch.Tensor], path: Path) -> None:
        spaces = {"pixels": "pixels", self.space: "kernel"}
        nearest = {title: nearest_neighbours(fake[name], self.features[name]) for title, name in spaces.items()}
        distances, indices = nearest["pixels"]
        order = (distances / nearest_neighbours(self.features["pixels"])[0][indices].clamp(min=1e-9)).argsort()
        draw_neighbours(samples, self.pictures, order.tolist(), nearest, path)
