"""What patients' privacy has cost and may still cost: mechanisms as data, ε of a history, a site's budget, calibration.

Run by a site, before it releases anything (its budget refuses what would pass it) and in its report; by whoever plans a
run, to choose the noise. Enters: public numbers only (noise multipliers, sampling rates, steps, ε, δ), never data.
Leaves: ε at δ, yes or no, a noise multiplier. Pure functions: what was released is in the site's ledger, as `Event`s.

Adjacency: one patient with all of their encounters, added or removed. An event is some steps of one mechanism: patients
drawn independently with probability `sample_rate` (Poisson; 1: everyone), a sum to which one patient adds a vector of
L2 norm at most 1, Gaussian noise of standard deviation `noise_multiplier` on it (docs/privacy.md).

Formal Guarantees: if every release about a site's patients is such a mechanism and its event was in the history before
the release, then the history is (ε, δ)-differentially private:

- with ε = `Filter.spent(history)`, when every event was chosen with knowledge of all earlier outputs, provided that the
  filter's order was fixed before the first of them. A site that releases only what `Filter.affords` stays within its
  (ε, δ), whatever a coordinator asks for;
- with ε = `epsilon_rdp` or `epsilon_prv` of the history, when all its events were fixed before the first output.

Float32 clipping may exceed the bound by `FLOAT32_SLACK`; that is in the account (`Event.accounted_multiplier`).

Not guaranteed: anything if the draws are not Poisson or the noise is not secret; that floating-point noise hides what
exact Gaussian noise hides (Mironov 2012 shows that it can differ); anything about ε over several sites that hold the
same patient (it adds up), or over choices among private runs that were not accounted. Opacus computes `epsilon_prv`
for the removal of a patient; that addition costs less is tested against Google's dp-accounting, which takes the larger
of the two, not proven. The RDP analysis bounds both (Mironov, Talwar and Zhang 2019).
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, cast, get_args

import numpy as np

from .errors import ConfigError

Kind = Literal["schema", "rounds", "metrics"]
Method = Literal["rdp", "prv"]

FLOAT32_SLACK = 1e-5  # a float32 sum of clipped gradients may differ by C · (1 + this) for one patient
SMALLEST_MULTIPLIER, LARGEST_MULTIPLIER = 0.01, 1e6  # between which `calibrate` searches
EPS_ERRORS = (0.002, 0.005)  # of `epsilon_prv`, as a share of ε, or of 0.1 where ε is smaller; one after the other
ROUNDING = 1e-15  # of δ for each step: what float64 may lose in `epsilon_prv`'s Fourier transforms
MAX_WIDTH = 300.0  # of `epsilon_prv`'s grid: float64 holds e^700
MAX_POINTS = 2**24  # of `epsilon_prv`'s grid: 128 MiB an array

# Rényi orders. Opacus sums a finite series at whole orders, up to 1024 (then its binomials overflow), and an infinite
# one between, which is needed only where the best order is small. Steps of 10 % in α - 1 cost at most 0.2 % of ε.
_LAST_ORDER = 1024
_WHOLE = (*range(2, 25), *(round(24 * 1.1**k) for k in range(1, 40)), _LAST_ORDER)
_FRACTIONAL = tuple(round(1 + 0.01 * 1.1**k, 3) for k in range(75))  # 1.01 to 12.56
_FAR = tuple(round(_LAST_ORDER * 1.1**k) for k in range(1, 73))  # without subsampling the series is a formula: to 10^6
_SLOW_MULTIPLIER = 30.0  # the infinite series takes time in proportion to σ


@dataclass(frozen=True)
class Event:
    """Some steps of one mechanism: what a ledger line about ε says.

    Attributes:
        kind: "schema" (counts behind the question schema), "rounds" (training steps) or "metrics" (test results).
        noise_multiplier: standard deviation of the noise over the L2 sensitivity, as the mechanism was told it.
        sample_rate: q, the probability with which each patient is in a step; 1 without sampling.
        steps: how many times, at least 1.
    """

    kind: Kind
    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"kind of a privacy event: expected {' or '.join(get_args(Kind))}, got {self.kind!r}")
        _check_positive("noise_multiplier", self.noise_multiplier)
        _check_positive("sample_rate", self.sample_rate)
        if self.sample_rate > 1:
            raise ConfigError(f"sample_rate: expected at most 1, got {self.sample_rate}")
        if type(self.steps) is not int or self.steps < 1:
            raise ConfigError(f"steps: expected a whole number from 1, got {self.steps!r}")

    @property
    def accounted_multiplier(self) -> float:
        """The noise over the sensitivity that float32 arithmetic really keeps to; everything below counts this one."""
        return self.noise_multiplier / (1 + FLOAT32_SLACK) if self.kind == "rounds" else self.noise_multiplier

    def to_json(self) -> dict[str, str | float | int]:
        """As a ledger line holds it.

        >>> Event("rounds", 1.1, 0.02, 60).to_json()
        {'kind': 'rounds', 'noise_multiplier': 1.1, 'sample_rate': 0.02, 'steps': 60}
        """
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Event:
        """The event that `to_json` wrote.

        Raises:
            ConfigError: other keys, types or ranges.
        """
        expected = list(cls.__dataclass_fields__)
        if sorted(data) != sorted(expected):
            raise ConfigError(f"privacy event: expected {', '.join(expected)}, got {', '.join(map(str, data))}")
        return cls(**data)


@dataclass(frozen=True)
class Spent:
    """ε of a history, and how it was computed.

    Attributes:
        epsilon: at the δ that was asked for; infinite where nothing is protected.
        method: "prv" or "rdp"; "rdp" from `epsilon_prv` says that the finer method failed or was no better.
        order: the Rényi order behind an "rdp" figure.
    """

    epsilon: float
    method: Method
    order: float | None = None


def epsilon_rdp(events: Iterable[Event], delta: float) -> Spent:
    """ε at δ by Rényi differential privacy (Opacus's analysis), at the best order for this history.

    Valid for a history that was fixed before its first output. For refusals use `Filter`.

    >>> spent = epsilon_rdp([Event("rounds", 1.0, 0.01, 1000)], 1e-5)
    >>> round(spent.epsilon, 3), spent.order
    (2.108, 8)
    """
    _check_delta(delta)
    return _least(_mechanisms(events), delta)


def epsilon_prv(events: Iterable[Event], delta: float) -> Spent:
    """ε at δ by numerical composition of privacy loss (Opacus's PRV accountant; Gopi et al. 2021).

    An upper bound, within 0.5 % of the exact ε, or 0.0005 where ε is below 0.1 (1 % at the smallest δ it takes);
    computed twice, coarsely to choose the grid. `epsilon_rdp` takes its place, and `method` says so, where it is
    smaller, the grid would have to be larger than `MAX_POINTS` or `MAX_WIDTH`, δ is below 20 · `ROUNDING` · steps, or
    the numbers fail (both passes must agree). Valid for a history that was fixed before its first output: a report of a
    pinned plan, not a refusal.

    The grid grows with √steps · (3 + ε) / max(ε, 0.1), time and memory with it, and memory with the number of different
    (rate, multiplier) pairs as well: 0.2 s for 1000 steps at ε = 2; at `MAX_POINTS` (100,000 steps at ε = 0.1) half a
    minute and 2 GB.

    >>> spent = epsilon_prv([Event("rounds", 1.0, 0.01, 1000)], 1e-5)
    >>> round(spent.epsilon, 3), spent.method
    (1.832, 'prv')
    """
    _check_delta(delta)
    mechanisms = _mechanisms(events)
    bound = _least(mechanisms, delta)
    if not mechanisms:
        return Spent(0.0, "prv")
    coarse_error = min(0.5, 0.05 * max(bound.epsilon, 0.1))
    coarse = _prv(mechanisms, delta, coarse_error)
    if coarse is None:
        return bound
    for share in EPS_ERRORS:
        error = share * max(coarse, 0.1)
        fine = _prv(mechanisms, delta, error)
        if fine is not None and -2 * error <= coarse - fine <= 2 * coarse_error + error and fine <= bound.epsilon:
            return Spent(max(0.0, fine), "prv")
    return bound


@dataclass(frozen=True)
class Filter:
    """A site's budget, and the brake that keeps to it: a Rényi filter at one order.

    Formal Guarantees: releases that were each afforded together cost a patient at most (`epsilon`, `delta`), when
    mechanisms, rates, noise and steps may be chosen with knowledge of all earlier outputs (Feldman and Zrnic 2021,
    "Individual privacy accounting via a Rényi filter"; Lécuyer 2021, "Practical privacy filters and odometers with
    Rényi differential privacy"): at a fixed order the sum of the events' Rényi ε never passes what `epsilon` leaves
    after the conversion, and the conversion is made once, for that order.

    Why one order: the conversion to (ε, δ) holds at an order that does not depend on the outputs. If every step took
    the order that is best so far, the order would follow the plans and the plans the outputs, and the sum at the order
    of the end would need an argument of its own, or a union bound (δ over the number of orders at each). An order that
    was fixed before the first release needs neither, and costs only when later plans differ much from the first.

    A refusal says nothing of a patient: it depends on ε, δ, the order and the events, all of them public numbers.

    Attributes:
        epsilon: the budget; positive.
        delta: in (0, 1).
        order: α > 1, fixed before the first release: `pin_order`. Subsampled events cost nothing finite above 1024.
    """

    epsilon: float
    delta: float
    order: float

    def __post_init__(self) -> None:
        _check_positive("epsilon", self.epsilon)
        _check_delta(self.delta)
        if not (math.isfinite(self.order) and self.order > 1):
            raise ConfigError(f"order of the privacy filter: expected more than 1, got {self.order}")

    def spent(self, events: Iterable[Event]) -> float:
        """ε at δ that the events cost by the filter's order; 0 for none.

        The first event costs the conversion to (ε, δ) as well, so ε jumps first and then grows slowly; `share` grows
        in proportion to the steps.
        """
        mechanisms = _mechanisms(events)
        if not mechanisms:
            return 0.0
        return max(0.0, _rdp(mechanisms, self.order) + _conversion(self.order, self.delta))

    def share(self, events: Iterable[Event]) -> float:
        """The part of the budget that the events use: 0 for none, 1 when nothing is left."""
        mechanisms = _mechanisms(events)
        allowed = self.epsilon - _conversion(self.order, self.delta)
        if not mechanisms:
            return 0.0
        return _rdp(mechanisms, self.order) / allowed if allowed > 0 else math.inf

    def affords(self, events: Iterable[Event], event: Event) -> bool:
        """Whether the budget still holds after `event`, when `events` have been released; all kinds count.

        >>> run, round_ = Event("rounds", 1.0, 0.01, 600), Event("rounds", 1.0, 0.01, 200)
        >>> budget = Filter(2.0, 1e-5, pin_order([run], 2.0, 1e-5))
        >>> [budget.affords([round_] * done, round_) for done in range(5)]
        [True, True, True, True, False]
        """
        return self.spent((*events, event)) <= self.epsilon


def pin_order(plan: Iterable[Event], epsilon: float, delta: float) -> float:
    """The order at which the plan, repeated until the budget is used up, spends least of it.

    Args:
        plan: the first plan, before anything of it is released: its schema, rounds and metrics.
        epsilon: the budget of the filter that will have the order.
        delta: the budget's.

    Returns:
        The order that allows the most repetitions, (ε - conversion) / Rényi ε of the plan: of public numbers alone.

    Raises:
        ConfigError: an empty plan, or a budget that no order can use.
    """
    _check_positive("epsilon", epsilon)
    _check_delta(delta)
    mechanisms = _mechanisms(plan)
    if not mechanisms:
        raise ConfigError("order of the privacy filter: expected a plan with at least one event")

    def used(order: float) -> float:
        allowed = epsilon - _conversion(order, delta)
        return _rdp(mechanisms, order) / allowed if allowed > 0 else math.inf

    order = _best_order(used)
    if math.isinf(used(order)):
        raise ConfigError(f"epsilon = {epsilon} at delta = {delta}: too small for any part of such a plan")
    return order


def calibrate(
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    fixed: Sequence[Event] = (),
    order: float | None = None,
) -> float:
    """The smallest noise multiplier with which a run's rounds fit a budget: ε → σ.

    Args:
        epsilon: the budget, of the fixed events and the rounds together.
        delta: the budget's.
        sample_rate: q of the rounds.
        steps: of all rounds together.
        fixed: what the budget pays besides: schema and metrics of the run, and a site's history.
        order: of the site's filter if it has one already; else that of a new one, `pin_order` of fixed and rounds.

    Returns:
        σ with five significant digits, so that the filter affords the plan and would not with σ · 0.9998. At least
        `SMALLEST_MULTIPLIER`.

    Raises:
        ConfigError: the fixed events cost ε or more, or leave too little for any noise.

    >>> calibrate(2.0, 1e-5, 0.01, 1000)
    1.0223
    """
    fixed = tuple(fixed)

    def rounds(sigma: float) -> Event:
        return Event("rounds", sigma, sample_rate, steps)

    def order_of(sigma: float) -> float:
        return pin_order((*fixed, rounds(sigma)), epsilon, delta) if order is None else order

    def affords(sigma: float, order: float) -> bool:
        return Filter(epsilon, delta, order).affords(fixed, rounds(sigma))

    sigma = LARGEST_MULTIPLIER
    if not affords(sigma, order_of(sigma)):
        cost = epsilon_rdp(fixed, delta).epsilon if order is None else Filter(epsilon, delta, order).spent(fixed)
        raise ConfigError(
            f"epsilon = {epsilon} at delta = {delta}: what is spent without the rounds costs {cost:.4g}, and no noise "
            f"up to {LARGEST_MULTIPLIER:g} lets the rounds fit beside it; raise epsilon, or the noise of the rest"
        )
    # The smallest σ at the order of a larger one; its own order may allow a smaller one yet. Every σ that is kept fits
    # at its own order, they fall, and at the last no order allows less.
    while True:
        at = order_of(sigma)
        smaller = _smallest(lambda sigma, at=at: affords(sigma, at), sigma)
        while smaller < sigma and not affords(smaller, order_of(smaller)):  # by a rounding error at most
            smaller = _round_up(smaller * (1 + 1e-5))
        if smaller >= sigma:
            return sigma
        sigma = smaller


def epsilon_of(
    noise_multiplier: float,
    delta: float,
    sample_rate: float,
    steps: int,
    fixed: Sequence[Event] = (),
    order: float | None = None,
) -> float:
    """The smallest budget that affords a run's rounds with this noise: σ → ε, the other way of `calibrate`.

    >>> round(epsilon_of(1.0223, 1e-5, 0.01, 1000), 3)
    2.0
    """
    _check_delta(delta)
    mechanisms = _mechanisms((*fixed, Event("rounds", noise_multiplier, sample_rate, steps)))
    at = order if order is not None else _best_order(lambda at: _rdp(mechanisms, at) + _conversion(at, delta))
    return max(0.0, _rdp(mechanisms, at) + _conversion(at, delta))


_Mechanism = tuple[float, float, int]  # sample rate, accounted multiplier, steps


def _mechanisms(events: Iterable[Event]) -> tuple[_Mechanism, ...]:
    """A history as mechanisms, alike ones together and in one order, so that how it was cut and sorted changes nothing.

    Steps without sampling are one Gaussian mechanism, exactly, whose precision is the sum of theirs (Dong, Roth and Su
    2022, corollary 3.3).
    """
    steps: dict[tuple[float, float], int] = defaultdict(int)
    for event in events:
        steps[event.sample_rate, event.accounted_multiplier] += event.steps
    sampled = sorted((rate, sigma, count) for (rate, sigma), count in steps.items() if rate < 1)
    precision = math.fsum(count / sigma / sigma for (rate, sigma), count in sorted(steps.items()) if rate == 1)
    return (*sampled, (1.0, precision**-0.5, 1)) if precision else tuple(sampled)


def _rdp(mechanisms: Iterable[_Mechanism], order: float) -> float:
    """Rényi ε of all of them at one order: it adds up."""
    return math.fsum(steps * _rdp_of_step(rate, sigma, order) for rate, sigma, steps in mechanisms)


def _conversion(order: float, delta: float) -> float:
    """What (ε, δ) costs more than Rényi ε at this order, as Opacus has it.

    Balle et al. (2020), "Hypothesis testing interpretations and Rényi differential privacy", theorem 21; Canonne,
    Kamath and Steinke (2020), proposition 12.
    """
    return math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)


@lru_cache(maxsize=2**16)
def _rdp_of_step(sample_rate: float, noise_multiplier: float, order: float) -> float:
    """Rényi ε of one step at one order by Opacus (Mironov, Talwar and Zhang 2019); infinite where it has no number.

    Between whole orders its series may be slow or fail; then the chord between the two, which lies above: (α - 1) times
    Rényi ε is the logarithm of a moment, so convex in α, and 0 at α = 1.
    """
    if noise_multiplier == 0:
        return math.inf
    if sample_rate == 1:
        return order / 2 / noise_multiplier / noise_multiplier
    order, whole = float(order), float(order).is_integer()  # Opacus asks for a float
    if order > _LAST_ORDER or (order > _FRACTIONAL[-1] and not whole):
        return math.inf
    # Loads torch, 3 s: only where it is needed.
    from opacus.accountants.analysis.rdp import compute_rdp  # pyright: ignore[reportMissingTypeStubs]

    if whole or noise_multiplier <= _SLOW_MULTIPLIER:
        try:
            found = cast(float, compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=order))
        except (ValueError, ArithmeticError):
            found = math.nan
        if whole or found >= 0:
            return math.inf if math.isnan(found) else max(0.0, found)
    below, above = math.floor(order), math.ceil(order)
    left = _rdp_of_step(sample_rate, noise_multiplier, below) * (below - 1) if below > 1 else 0.0
    right = _rdp_of_step(sample_rate, noise_multiplier, above) * (above - 1)
    return math.inf if math.isinf(right) else (left + (right - left) * (order - below)) / (order - 1)


def _least(mechanisms: Sequence[_Mechanism], delta: float) -> Spent:
    """ε at δ at the best order of all."""
    if not mechanisms:
        return Spent(0.0, "rdp")

    def cost(order: float) -> float:
        return _rdp(mechanisms, order) + _conversion(order, delta)

    order = _best_order(cost, () if mechanisms[0][0] < 1 else _FAR)
    return Spent(max(0.0, cost(order)), "rdp", order)


def _best_order(cost: Callable[[float], float], far: Sequence[float] = ()) -> float:
    """The order of the grid that costs least; between whole orders only where the best of those is small."""
    best = min((*_WHOLE, *far), key=cost)
    near = [order for order in _FRACTIONAL if best - 1 < order < best + 1]
    if near:
        middle = near.index(min(near[::4], key=cost))
        near = near[max(0, middle - 3) : middle + 4]
    return min((best, *near), key=cost)


def _prv(mechanisms: Sequence[_Mechanism], delta: float, eps_error: float) -> float | None:
    """The upper end of Opacus's PRV accountant; None where its grid is too large or its numbers fail.

    As `opacus.accountants.PRVAccountant.get_epsilon`, but δ pays for `ROUNDING`, and the grid's width is Gopi et al.'s
    remark 5.6 with `epsilon_rdp` (Opacus takes fixed orders, slow ones among them), as long as an FFT likes it.
    """
    from opacus.accountants.analysis.prv import (  # pyright: ignore[reportMissingTypeStubs]
        Domain,
        PoissonSubsampledGaussianPRV,
        TruncatedPrivacyRandomVariable,
        compose_heterogeneous,
        discretize,  # pyright: ignore[reportUnknownVariableType]
    )

    delta_error, steps = delta / 1000, [count for _, _, count in mechanisms]
    tails = [_least(mechanisms, delta_error / 4).epsilon]
    tails += [_least([(rate, sigma, 1)], delta_error / 8 / sum(steps)).epsilon for rate, sigma, _ in mechanisms]
    width = max(*tails, eps_error) + 3
    mesh = eps_error / math.sqrt(sum(steps) * math.log(12 / delta_error) / 2)
    rounding = ROUNDING * sum(steps)
    if rounding > delta / 20 or not width <= MAX_WIDTH or not 2 * width / mesh <= MAX_POINTS:
        return None
    half = math.ceil(width / mesh) + 1
    half += -half % 2 ** max(0, half.bit_length() - 4)  # 8 to 16 times a power of two, which the transforms like
    domain = Domain(-(half - 1) * mesh, half * mesh, 2 * half)
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # log(0) where q = 1
        warnings.simplefilter("error", UserWarning)  # scipy.integrate's way to say that it failed
        try:
            losses = [PoissonSubsampledGaussianPRV(rate, sigma) for rate, sigma, _ in mechanisms]
            cut = [TruncatedPrivacyRandomVariable(loss, domain.t_min, domain.t_max) for loss in losses]
            composed = compose_heterogeneous([discretize(loss, domain) for loss in cut], steps)
            found = float(composed.compute_epsilon(delta, delta_error + rounding, eps_error)[2])
        except (ValueError, ArithmeticError, RuntimeError, IndexError, UserWarning):
            return None
    return found if math.isfinite(found) else None


def _smallest(fits: Callable[[float], bool], upper: float) -> float:
    """The smallest number that fits, below one that does, rounded up to five digits."""
    lower = SMALLEST_MULTIPLIER
    if fits(lower):
        return lower
    while upper / lower > 1 + 1e-5:
        middle = math.sqrt(lower * upper)
        if fits(middle):
            upper = middle
        else:
            lower = middle
    return _round_up(upper)


def _round_up(value: float) -> float:
    """Five significant digits, never less than `value`."""
    digits = 4 - math.floor(math.log10(value))
    return math.ceil(value * 10**digits) / 10**digits


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name}: expected a positive number, got {value!r}")


def _check_delta(delta: float) -> None:
    _check_positive("delta", delta)
    if delta >= 1:
        raise ConfigError(f"delta: expected less than 1, got {delta}")
