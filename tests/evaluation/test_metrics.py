# SPDX-License-Identifier: Apache-2.0
"""Metrics against closed forms, other implementations and what they have to do when pictures get worse."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from common import seeded
from mar_hf.evaluation import metrics


def normal(count, width=6, seed=0, scale=1.0, shift=0.0):
    return torch.randn(count, width, generator=seeded(seed), dtype=torch.float64) * scale + shift


def test_frechet_distance_of_independent_normals_has_a_closed_form():
    mean1, mean2 = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 1.0, 0.0])
    deviation1, deviation2 = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([4.0, 0.5, 3.0])
    found = metrics.frechet_distance(mean1, deviation1.square().diag(), mean2, deviation2.square().diag())
    assert found == pytest.approx(((mean1 - mean2) ** 2 + (deviation1 - deviation2) ** 2).sum().item(), rel=1e-6)


def test_frechet_distance_agrees_with_the_matrix_root_and_torchmetrics():
    metrics.find_torch_fidelity()  # before torchmetrics looks for it
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
    features = normal(10, width=40), normal(12, width=40, seed=1, shift=0.3)
    real, fake = map(metrics.statistics, features)
    assert metrics.frechet_distance(*real, *real) == pytest.approx(0, abs=1e-12)
    # By the features themselves: C = X^T X with few rows, so the root's trace is the sum of few singular values.
    first, second = ((rows - rows.mean(0)) / (len(rows) - 1) ** 0.5 for rows in features)
    cross = torch.linalg.svdvals(first @ second.T).sum()
    expected = (real[0] - fake[0]).square().sum() + first.square().sum() + second.square().sum() - 2 * cross
    assert metrics.frechet_distance(*real, *fake) == pytest.approx(expected.item(), rel=1e-12)
    alike = metrics.statistics(torch.ones(3, 40))
    assert metrics.frechet_distance(*alike, *alike) == 0


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


def test_noise_of_a_tenth_has_26_decibels():
    real = torch.zeros(2, 3, 8, 8)
    assert metrics.psnr(real, real + 0.1) == pytest.approx(26.02, abs=0.01)
    assert metrics.psnr(real, real) == pytest.approx(106.02, abs=0.01)


def test_broken_statistics_files_leave_the_good_one(tmp_path, monkeypatch):
    path = tmp_path / "reference.npz"
    metrics.write_statistics(path, *metrics.statistics(normal(20)))
    before = path.read_bytes()

    def full(*args, **arrays):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        metrics.write_statistics(path, *metrics.statistics(normal(30)))
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["reference.npz"]


@pytest.mark.parametrize("mean, covariance", [(3, (3, 4)), ((3, 1), (3, 3)), (2, (3, 3))])
def test_statistics_that_do_not_fit_each_other_are_refused(mean, covariance, tmp_path):
    np.savez(tmp_path / "file.npz", mu=np.zeros(mean), sigma=np.zeros(covariance))
    with pytest.raises(ValueError, match="`mu` and `sigma` of '.*file.npz' have to be finite, of shapes"):
        metrics.read_statistics(tmp_path / "file.npz")
    np.savez(tmp_path / "file.npz", mu=np.zeros(3), sigma=np.full((3, 3), np.nan))
    with pytest.raises(ValueError, match="have to be finite"):
        metrics.read_statistics(tmp_path / "file.npz")
