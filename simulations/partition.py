"""Divide one registry into simulated sites, by patient: evenly, skewed over a feature, or by a real column.

Only for simulations: real hospitals come with their own registries. Every row of a patient goes to the same site.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from ..client.registry import Registry
from ..common.errors import ConfigError

QUANTILES = 5  # a number is cut into this many parts of equal mass before it is skewed
REDRAWS = 100  # tries to leave no site without patients


def site_names(n: int) -> list[str]:
    """site-01, site-02, …"""
    return [f"site-{i + 1:02d}" for i in range(n)]


def partition(
    registry: Registry,
    sites: int,
    how: Literal["even", "dirichlet", "column"],
    *,
    feature: str | None = None,
    alpha: float = 0.5,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Row indices of every site, ascending, non-empty, disjoint.

    Args:
        registry: the whole registry.
        sites: how many.
        how: "even": shuffled patients, sizes differ by at most one. "dirichlet": each level of `feature` (numbers: each
            fifth; missing: a level of its own) is spread over the sites in proportions drawn from Dirichlet(alpha).
            "column": one site for each value of `feature` (the site column, or a category); with more values than
            `sites`, those with most patients, and patients elsewhere or without a value are left out.
        feature: a column's name; for "dirichlet" and "column".
        alpha: small is very skewed.
        rng: decides the draw.

    Raises:
        ConfigError: too few patients, unknown or unsuitable feature, a site that would be empty.
    """
    patients, first, patient_of_row = np.unique(registry.patients.astype(str), return_index=True, return_inverse=True)
    if len(patients) < sites:
        raise ConfigError(f"partition: expected at least one patient for each of {sites} sites, got {len(patients)}")
    if how == "even":
        site = np.empty(len(patients), dtype=np.int64)
        site[rng.permutation(len(patients))] = np.arange(len(patients)) % sites
    elif feature is None:
        raise ConfigError(f"partition = '{how}' needs partition_feature")
    elif how == "dirichlet":
        site = _dirichlet(_levels(registry, feature)[first], sites, alpha, rng, feature)
    else:
        site = _by_value(_values(registry, feature)[first], sites, feature)
    return [np.flatnonzero(site[patient_of_row] == s) for s in range(sites)]


def _levels(registry: Registry, feature: str) -> np.ndarray:
    """Level of every row for the skew, int64 from 0."""
    if registry.sites is not None and feature == registry.dictionary.site_column:
        return np.unique(registry.sites.astype(str), return_inverse=True)[1]
    column = _column(registry, feature)
    if registry.dictionary.feature(feature).kind == "category":
        return column.astype(np.int64) + 1
    known = ~np.isnan(column)
    cuts = np.unique(np.quantile(column[known], np.arange(1, QUANTILES) / QUANTILES)) if known.any() else np.empty(0)
    return np.where(known, np.searchsorted(cuts, column, side="right") + 1, 0)


def _values(registry: Registry, feature: str) -> np.ndarray:
    """Value of every row as text, '' for missing."""
    if registry.sites is not None and feature == registry.dictionary.site_column:
        return registry.sites.astype(str)
    column = _column(registry, feature)
    entry = registry.dictionary.feature(feature)
    if entry.kind != "category":
        raise ConfigError(
            f"partition = 'column': expected the site column or a category, got the number '{feature}'; "
            f"'dirichlet' can skew over it"
        )
    return np.array([*entry.levels, ""], dtype=str)[column]  # -1, missing, picks the last


def _column(registry: Registry, feature: str) -> np.ndarray:
    if feature not in registry.values:
        raise ConfigError(f"partition_feature: the registry has no feature or outcome '{feature}'")
    return registry.values[feature]


def _dirichlet(levels: np.ndarray, sites: int, alpha: float, rng: np.random.Generator, feature: str) -> np.ndarray:
    for _ in range(REDRAWS):
        site = np.empty(len(levels), dtype=np.int64)
        for level in np.unique(levels):
            mine = np.flatnonzero(levels == level)
            site[mine] = rng.choice(sites, size=len(mine), p=rng.dirichlet(np.full(sites, alpha)))
        if len(np.unique(site)) == sites:
            return site
    raise ConfigError(
        f"partition = 'dirichlet' over '{feature}': {sites} sites with alpha = {alpha:g} left a site without patients "
        f"in {REDRAWS} draws; use fewer sites or a larger alpha"
    )


def _by_value(values: np.ndarray, sites: int, feature: str) -> np.ndarray:
    found, counts = np.unique(values[values != ""], return_counts=True)
    if len(found) < sites:
        raise ConfigError(
            f"partition = 'column': '{feature}' has {len(found)} values, expected {sites} or more, one a site; "
            f"set sites = {len(found)}"
        )
    largest = found[np.argsort(-counts, kind="stable")[:sites]]
    site = np.full(len(values), -1, dtype=np.int64)
    for s, value in enumerate(largest):
        site[values == value] = s
    return site
