"""Tails of Student's t, chi-square and F from scipy.special, typed, and Fisher's exact test. Pure; nothing private."""

from __future__ import annotations

import math

from scipy.special import chdtrc, fdtrc, stdtr, stdtrit  # pyright: ignore[reportMissingTypeStubs]


def t_quantile(share: float, freedom: float) -> float:
    """The quantile of Student's t.

    >>> round(t_quantile(0.975, 10), 4)
    2.2281
    """
    return float(stdtrit(freedom, share))


def t_two_sided(value: float, freedom: float) -> float:
    """Two-sided p of a value of Student's t.

    >>> round(t_two_sided(2.2281, 10), 4)
    0.05
    """
    return min(1.0, 2 * float(stdtr(freedom, -abs(value))))


def chi_square_tail(value: float, freedom: float) -> float:
    """P(χ² ≥ value).

    >>> round(chi_square_tail(7.8147, 3), 4)
    0.05
    """
    return float(chdtrc(freedom, value))


def fisher_exact(right: int, of: int, other_right: int, other_of: int) -> float:
    """Two-sided p of Fisher's exact test that two shares are one: all tables no likelier than the one seen.

    >>> round(fisher_exact(10, 10, 600, 1000), 4)
    0.0077
    """
    n, marked = of + other_of, right + other_right
    low, high = max(0, marked - other_of), min(of, marked)
    constant = math.lgamma(of + 1) + math.lgamma(other_of + 1) + math.lgamma(marked + 1) + math.lgamma(n - marked + 1)
    constant -= math.lgamma(n + 1)

    def log_probability(k: int) -> float:
        parts = (k, of - k, marked - k, other_of - marked + k)
        return constant - sum(math.lgamma(part + 1) for part in parts)

    seen = log_probability(right) + 1e-7  # rounding: a table that is as likely counts
    return min(1.0, math.fsum(math.exp(p) for p in map(log_probability, range(low, high + 1)) if p <= seen))


def f_tail(value: float, above: float, below: float) -> float:
    """P(F ≥ value) with `above` and `below` degrees of freedom.

    >>> round(f_tail(4.1028, 2, 10), 4)
    0.05
    """
    return float(fdtrc(above, below, value))
