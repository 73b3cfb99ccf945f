"""Gaussian mixtures fitted to a histogram: expectation-maximisation on binned data, numpy only, deterministic.

Runs at the coordinator on the summed histogram of one number (common/schema.py); the histogram of a single site is
never seen. Every bin is a point of its centre with the bin's count as weight, so the fit is that of
`sklearn.mixture.GaussianMixture` on the expanded points (tested); afterwards the variance that binning adds, width² /
12 (Sheppard's correction), is taken off each component, never below the floor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MAX_ITERATIONS = 500
TOLERANCE = 1e-8  # change of the mean log-likelihood (nats) at which a fit has converged
LOG_2PI = float(np.log(2 * np.pi))
_KEPT = 512


@dataclass(frozen=True)
class Mixture:
    """Components sorted by mean: weights sum to 1, sds > 0, all float64 of shape (k,)."""

    weights: Floats
    means: Floats
    sds: Floats

    def log_joint(self, x: Floats) -> Floats:
        """log(weight × density) of every component at `x`: shape (*x.shape, k)."""
        z = (x[..., None] - self.means) / self.sds
        return np.log(self.weights) - np.log(self.sds) - 0.5 * (z * z + LOG_2PI)

    def log_density(self, x: Floats) -> Floats:
        """log density at `x`, the shape of `x`."""
        return _logsumexp(self.log_joint(x))


# A simulation fits every histogram twice: where it looks for mistakes before it writes, and in its schema phase.
_fits: dict[tuple[bytes, bytes, int, float, bytes], Mixture] = {}


def fit_mixture(
    centers: Floats, counts: NDArray[np.int64], components: int, sd_floor: float, widths: Floats
) -> Mixture:
    """The most likely of three deterministic starts.

    Args:
        centers: bin centres, (bins,), increasing.
        counts: how many values fell in each bin, (bins,), at least one positive.
        components: at most this many; fewer where fewer bins are occupied, and those left without a value are dropped.
        sd_floor: no component gets narrower: in quantised data a spike would shrink to nothing.
        widths: bin widths, (bins,); zeros switch Sheppard's correction off.
    """
    key = centers.tobytes(), counts.tobytes(), components, sd_floor, widths.tobytes()
    if key not in _fits:
        if len(_fits) >= _KEPT:
            _fits.clear()
        _fits[key] = _fit(centers, counts, components, sd_floor, widths)
    return _fits[key]


def _fit(centers: Floats, counts: NDArray[np.int64], components: int, sd_floor: float, widths: Floats) -> Mixture:
    occupied = counts > 0
    x, weight, width = centers[occupied], counts[occupied].astype(np.float64), widths[occupied]
    total = float(weight.sum())
    share = weight / total
    k = min(components, len(x))
    fits = [_expectation_maximisation(x, share, start, sd_floor) for start in _starts(x, share, k, sd_floor)]
    best, _ = max(fits, key=lambda fit: fit[1])  # the first of equals: the order of the starts decides
    responsibilities = _responsibilities(best, x)
    added = (responsibilities * (share * width**2 / 12)[:, None]).sum(0) / (responsibilities * share[:, None]).sum(0)
    sds = np.sqrt(np.maximum(best.sds**2 - added, sd_floor**2))
    kept = best.weights * total >= 1.0
    kept[int(np.argmax(best.weights))] = True
    order = np.argsort(best.means[kept], kind="stable")
    weights = best.weights[kept] / best.weights[kept].sum()
    return Mixture(weights[order], best.means[kept][order], sds[kept][order])


def _starts(x: Floats, share: Floats, k: int, sd_floor: float) -> list[Mixture]:
    """Equal parts of the mass; equal parts of the middle 98 % of the range; one centre with three widths."""
    middle = np.cumsum(share) - share / 2
    by_mass = np.minimum((middle * k).astype(np.int64), k - 1)
    low, high = np.interp([0.01, 0.99], middle, x)
    position = (x - low) / max(high - low, 1e-300) * k
    by_range = np.clip(position, 0, k - 1).astype(np.int64)
    starts = [_from_groups(x, share, groups, k, sd_floor) for groups in (by_mass, by_range)]
    mean = float(share @ x)
    sd = max(float(np.sqrt(share @ (x - mean) ** 2)), sd_floor)
    widths = sd * np.geomspace(0.5, 2.0, k) if k > 1 else np.array([sd])
    starts.append(Mixture(np.full(k, 1 / k), np.full(k, mean), np.maximum(widths, sd_floor)))
    return starts


def _from_groups(x: Floats, share: Floats, groups: NDArray[np.int64], k: int, sd_floor: float) -> Mixture:
    responsibilities = np.zeros((len(x), k))
    responsibilities[np.arange(len(x)), groups] = 1.0
    return _maximise(x, share, responsibilities * 0.98 + 0.02 / k, sd_floor)  # a little of everything: no empty group


def _maximise(x: Floats, share: Floats, responsibilities: Floats, sd_floor: float) -> Mixture:
    mass = responsibilities * share[:, None]
    weights = np.maximum(mass.sum(0), 1e-300)
    means = (mass * x[:, None]).sum(0) / weights
    variances = (mass * (x[:, None] - means) ** 2).sum(0) / weights
    return Mixture(weights / weights.sum(), means, np.sqrt(np.maximum(variances, sd_floor**2)))


def _responsibilities(mixture: Mixture, x: Floats) -> Floats:
    joint = mixture.log_joint(x)
    return np.exp(joint - _logsumexp(joint)[:, None])


def _expectation_maximisation(x: Floats, share: Floats, mixture: Mixture, sd_floor: float) -> tuple[Mixture, float]:
    """The fit and its mean log-likelihood (nats a value)."""
    before = -np.inf
    for _ in range(MAX_ITERATIONS):
        joint = mixture.log_joint(x)
        log_density = _logsumexp(joint)
        likelihood = float(share @ log_density)
        if likelihood - before < TOLERANCE:
            return mixture, likelihood
        before = likelihood
        mixture = _maximise(x, share, np.exp(joint - log_density[:, None]), sd_floor)
    return mixture, before


def _logsumexp(values: Floats) -> Floats:
    top = values.max(-1)
    result: Floats = top + np.log(np.exp(values - top[..., None]).sum(-1))
    return result
