"""Quantiles and tails of Student's t, chi-square and F, typed, from scipy.special. Pure; nothing private."""

from __future__ import annotations

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


def f_tail(value: float, above: float, below: float) -> float:
    """P(F ≥ value) with `above` and `below` degrees of freedom.

    >>> round(f_tail(4.1028, 2, 10), 4)
    0.05
    """
    return float(fdtrc(above, below, value))
