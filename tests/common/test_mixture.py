"""Mixtures fitted to histograms (common/mixture.py)."""

import numpy as np
import pytest
from sklearn.mixture import GaussianMixture
from wardround.common.mixture import fit_mixture

WEIGHTS, MEANS, SDS = np.array([0.5, 0.3, 0.2]), np.array([20.0, 50.0, 75.0]), np.array([4.0, 6.0, 3.0])


def sample(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    component = rng.choice(3, n, p=WEIGHTS)
    return rng.normal(MEANS[component], SDS[component])


def binned(values: np.ndarray, width: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    edges = np.arange(0, 100 + width, width)
    counts = np.histogram(values, edges)[0]
    return (edges[1:] + edges[:-1]) / 2, counts, np.diff(edges)


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_is_as_likely_as_that_of_sklearn_on_the_expanded_points(seed: int):
    centers, counts, widths = binned(sample(4000, seed), 0.5)
    fit = fit_mixture(centers, counts, 3, 0.05, np.zeros_like(widths))
    points = np.repeat(centers, counts)
    other = GaussianMixture(3, n_init=5, random_state=0, tol=1e-8, max_iter=2000, reg_covar=1e-9).fit(points[:, None])
    assert fit.log_density(points).mean() >= other.score(points[:, None]) - 1e-4
    order = np.argsort(other.means_[:, 0])
    np.testing.assert_allclose(fit.weights, other.weights_[order], atol=0.005)
    np.testing.assert_allclose(fit.means, other.means_[order, 0], atol=0.1)
    np.testing.assert_allclose(fit.sds, np.sqrt(other.covariances_[order, 0, 0]), rtol=0.02)


@pytest.mark.parametrize("width", [0.25, 1.0, 5.0])
def test_a_known_mixture_is_recovered_from_bins(width: float):
    centers, counts, widths = binned(sample(200_000, 7), width)
    fit = fit_mixture(centers, counts, 3, 0.05, widths)
    np.testing.assert_allclose(fit.weights, WEIGHTS, atol=0.02)
    np.testing.assert_allclose(fit.means, MEANS, atol=0.4)
    np.testing.assert_allclose(fit.sds, SDS, rtol=0.06)


def test_the_correction_for_bin_width_brings_the_sd_closer():
    values = np.random.default_rng(0).normal(50, 3, 100_000)
    centers, counts, widths = binned(values, 5.0)
    corrected = fit_mixture(centers, counts, 1, 0.05, widths).sds[0]
    plain = fit_mixture(centers, counts, 1, 0.05, np.zeros_like(widths)).sds[0]
    assert abs(corrected - 3) < 0.05 < abs(plain - 3)


def test_quantised_data_keeps_the_floor_and_no_more_components_than_values():
    centers = np.arange(3.0, 16.0)
    counts = np.zeros(13, dtype=np.int64)
    counts[[0, 12]] = [100, 900]
    fit = fit_mixture(centers, counts, 3, 0.5, np.ones(13))
    np.testing.assert_allclose(fit.means, [3, 15])
    np.testing.assert_allclose(fit.sds, [0.5, 0.5])
    np.testing.assert_allclose(fit.weights, [0.1, 0.9])


def test_the_same_histogram_gives_the_same_fit_and_weights_sum_to_one():
    centers, counts, widths = binned(sample(500, 1), 2.0)
    fits = [fit_mixture(centers, counts, 3, 0.5, widths) for _ in range(2)]
    np.testing.assert_array_equal(fits[0].means, fits[1].means)
    assert fits[0].weights.sum() == pytest.approx(1)
    assert np.all(np.diff(fits[0].means) >= 0)
