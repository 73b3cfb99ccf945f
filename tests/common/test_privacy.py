"""common/privacy.py: what a history costs, a budget that is never passed, and the noise that fits it.

Oracles: Google's dp-accounting (privacy loss distributions from above and below; its RDP accountant), the closed form
of the Gaussian mechanism (Balle and Wang 2018), and Rényi ε by numerical integration.
`python -m tests.common.test_privacy` prints the golden numbers.
"""

import doctest
import json
import logging
import math
import subprocess
import sys
import warnings
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import log_ndtr
from wardround.common import privacy
from wardround.common.errors import ConfigError
from wardround.common.privacy import (
    FLOAT32_SLACK,
    LARGEST_MULTIPLIER,
    SMALLEST_MULTIPLIER,
    Event,
    Filter,
    calibrate,
    epsilon_of,
    epsilon_prv,
    epsilon_rdp,
    pin_order,
)

History = list[Event]


def rounds(sigma: float, rate: float, steps: int) -> Event:
    return Event("rounds", sigma, rate, steps)


def schema(sigma: float, steps: int = 1) -> Event:
    return Event("schema", sigma, 1.0, steps)


def metrics(sigma: float, steps: int = 1) -> Event:
    return Event("metrics", sigma, 1.0, steps)


# Name: (history, δ, discretisation of the oracle from above, and from below, where it must be finer).
HISTORIES: dict[str, tuple[History, float, float, float]] = {
    "one look at everybody": ([schema(10)], 1e-5, 1e-4, 1e-4),
    "a look that costs 0.1": ([schema(31)], 1e-5, 1e-4, 2e-5),
    "looks with little noise": ([metrics(0.5, 3)], 1e-6, 1e-3, 1e-3),
    "ten looks": ([metrics(4, 10)], 1e-6, 1e-3, 1e-3),
    "the textbook's": ([rounds(1, 0.01, 1000)], 1e-5, 1e-3, 1.5e-4),
    "rare patients, many steps": ([rounds(0.7, 0.001, 5000)], 1e-6, 1e-4, 1e-5),
    "little noise": ([rounds(0.8, 0.02, 300)], 1e-6, 1e-3, 5e-4),
    "a tenth at a time": ([rounds(2, 0.1, 200)], 1e-6, 1e-3, 2e-4),
    "three tenths at a time": ([rounds(5, 0.3, 100)], 1e-6, 1e-3, 2e-4),
    "half at a time": ([rounds(20, 0.5, 500)], 1e-6, 1e-4, 5e-5),
    "nearly everybody, much noise": ([rounds(50, 0.9, 3)], 1e-6, 1e-4, 2e-5),
    "nearly everybody, little noise": ([rounds(1, 0.999, 2)], 1e-6, 1e-3, 1e-3),
    "one step": ([rounds(0.4, 0.05, 1)], 1e-6, 4e-3, 4e-3),
    "very many steps": ([rounds(1.2, 0.002, 30_000)], 1e-6, 1e-4, 2e-6),
    "rounds that cost 0.1": ([rounds(3.6, 0.01, 120)], 1e-5, 3e-5, 2e-5),
    "a tiny delta": ([rounds(1.5, 0.02, 1000)], 1e-10, 1e-3, 1e-4),
    "rounds that cost 20": ([rounds(0.8, 0.2, 70)], 1e-6, 1e-2, 2e-3),
    "everybody every time": ([rounds(8, 1.0, 20)], 1e-6, 1e-3, 1e-3),
    "a run": ([schema(4), rounds(1.1, 0.02, 60), metrics(4)], 1e-6, 1e-3, 8e-4),
    "a run cut in rounds": ([schema(6), *[rounds(1.3, 0.03, 10)] * 5, metrics(6), metrics(6)], 1e-6, 1e-3, 8e-4),
    "three runs": (
        [rounds(2, 0.02, 30), rounds(3, 0.05, 50), rounds(1, 0.01, 17), metrics(9, 3)],
        1e-6,
        1e-3,
        5e-4,
    ),
    "two runs, one of them with everybody": ([rounds(8, 1.0, 20), rounds(1.3, 0.05, 200)], 1e-6, 1e-3, 5e-4),
    "years": (
        [schema(12), rounds(1.5, 0.01, 300), metrics(12), schema(12), rounds(2.5, 0.02, 400), rounds(0.9, 0.004, 250)],
        1e-7,
        1e-3,
        1.4e-4,
    ),
    "a mixture that costs 20": ([metrics(0.6, 2), rounds(0.7, 0.1, 70)], 1e-6, 1e-2, 2e-3),
}

# ε by PRV; by RDP; its order; by dp-accounting from above; from below. Made by this file with opacus 1.6.0,
# dp-accounting 0.6.0, scipy 1.17.1 and numpy 2.4.6.
GOLDEN: dict[str, tuple[float, float, float, float, float]] = {
    "one look at everybody": (0.34141462, 0.37558672, 39, 0.3406694, 0.34061938),
    "a look that costs 0.1": (0.099333794, 0.11059906, 110, 0.099115534, 0.099105468),
    "looks with little noise": (21.884589, 23.093751, 2.42, 21.839217, 21.837717),
    "ten looks": (3.7552838, 4.0116161, 7, 3.7472236, 3.7422204),
    "the textbook's": (1.8322756, 2.1078121, 8, 1.8289725, 1.7532819),
    "rare patients, many steps": (1.3837948, 2.3001851, 6.394, 1.3806356, 1.3556068),
    "little noise": (4.4989604, 5.2076078, 4.349, 4.4892676, 4.4141954),
    "a tenth at a time": (3.8141385, 4.1183415, 6.394, 3.8060289, 3.7859277),
    "three tenths at a time": (2.8704946, 3.0852894, 8.18, 2.8643847, 2.8543189),
    "half at a time": (2.5614019, 2.7423702, 9.687, 2.555897, 2.5433937),
    "nearly everybody, much noise": (0.11468507, 0.12501178, 133, 0.11443637, 0.11440602),
    "nearly everybody, little noise": (7.2992961, 7.7716392, 4.349, 7.2836527, 7.2826522),
    "one step": (9.8300979, 10.756642, 2.719, 9.8098573, 9.8078505),
    "very many steps": (1.5398742, 1.6563587, 14, 1.5368854, 1.5065538),
    "rounds that cost 0.1": (0.099426695, 0.11161949, 110, 0.099208528, 0.098007829),
    "a tiny delta": (3.1748929, 3.3404212, 12.563, 3.1682041, 3.1172106),
    "rounds that cost 20": (20.261412, 22.133625, 2.067, 20.220219, 20.149051),
    "everybody every time": (2.5542193, 2.7336327, 9.687, 2.5487411, 2.5387328),
    "a run": (1.8583573, 2.1572234, 8.897, 1.8543804, 1.829541),
    "a run cut in rounds": (1.6318342, 1.8334668, 10.556, 1.6283518, 1.607115),
    "three runs": (1.0768784, 1.6164132, 9, 1.0746361, 1.0495141),
    "two runs, one of them with everybody": (4.3261608, 4.6792364, 5.904, 4.3169496, 4.2618573),
    "years": (1.4205791, 2.1100103, 8.897, 1.4185864, 1.3507499),
    "a mixture that costs 20": (20.372048, 22.084196, 2.174, 20.330785, 20.257496),
}

SLOW = ["rare patients, many steps", "very many steps", "years"]  # for the oracle
QUICK = [name for name in HISTORIES if name not in SLOW]
histories = pytest.mark.parametrize("name", HISTORIES)


def oracle(history: History, delta: float, interval: float, pessimistic: bool = True) -> float:
    """ε by Google's privacy loss distributions, addition and removal both: from above or from below."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    logging.getLogger().setLevel(logging.ERROR)  # it says each time that it knows one algorithm from below
    composed = None
    for event in history:
        one = from_gaussian_mechanism(
            event.accounted_multiplier,
            pessimistic_estimate=pessimistic,
            value_discretization_interval=interval,
            sampling_prob=event.sample_rate,
        ).self_compose(event.steps)
        composed = one if composed is None else composed.compose(one)
    assert composed is not None
    return float(composed.get_epsilon_for_delta(delta))


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """ε of one look at everybody, exactly: Balle and Wang (2018), theorem 8."""

    def excess(epsilon: float) -> float:
        left, right = 0.5 / sigma - epsilon * sigma, -0.5 / sigma - epsilon * sigma
        return math.exp(log_ndtr(left)) - math.exp(epsilon + log_ndtr(right)) - delta

    return brentq(excess, 1e-9, 1e3, xtol=1e-13, rtol=1e-13)


def moment(rate: float, sigma: float, order: float) -> float:
    """Rényi ε by integration: log E[(1 - q + q e^((2x - 1) / 2σ²))^α] / (α - 1), x normal with deviation σ."""

    def log_of(x: float) -> float:
        log_ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * x - 1) / (2 * sigma**2))
        return order * log_ratio - x**2 / (2 * sigma**2)

    grid = np.linspace(-12 * sigma, order + 12 * sigma, 4001)
    top = max(log_of(x) for x in grid)
    peak = float(grid[np.argmax([log_of(x) for x in grid])])
    inside, _ = quad(
        lambda x: math.exp(log_of(x) - top), grid[0], grid[-1], points=[0, peak], limit=2000, epsabs=0, epsrel=1e-12
    )
    return (math.log(inside) + top - math.log(sigma * math.sqrt(2 * math.pi))) / (order - 1)


# --- events


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"kind": "rewards"}, "kind"),
        ({"kind": None}, "kind"),
        ({"noise_multiplier": 0}, "noise_multiplier"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"noise_multiplier": math.inf}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"noise_multiplier": "1"}, "noise_multiplier"),
        ({"noise_multiplier": True}, "noise_multiplier"),
        ({"sample_rate": 0.0}, "sample_rate"),
        ({"sample_rate": 1.0000001}, "sample_rate"),
        ({"sample_rate": -0.1}, "sample_rate"),
        ({"sample_rate": math.nan}, "sample_rate"),
        ({"steps": 0}, "steps"),
        ({"steps": -3}, "steps"),
        ({"steps": 2.0}, "steps"),
        ({"steps": True}, "steps"),
        ({"rounds": 3}, "expected kind, noise_multiplier, sample_rate, steps"),
    ],
)
def test_an_event_that_is_no_mechanism_is_refused_by_name(change: dict[str, object], word: str):
    good: dict[str, object] = {"kind": "rounds", "noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 3}
    assert Event.from_json(good) == rounds(1, 0.1, 3)
    with pytest.raises(ConfigError, match=word):
        Event.from_json({**good, **change})


@pytest.mark.parametrize("missing", ["kind", "noise_multiplier", "sample_rate", "steps"])
def test_an_event_without_one_of_its_parts_is_refused(missing: str):
    data = rounds(1, 0.1, 3).to_json()
    del data[missing]
    with pytest.raises(ConfigError, match=missing):
        Event.from_json(data)


@given(
    st.sampled_from(["schema", "rounds", "metrics"]),
    st.floats(1e-3, 1e6),
    st.floats(1e-9, 1),
    st.integers(1, 10**9),
)
def test_an_event_comes_back_from_a_ledger_line_as_it_was(kind: str, sigma: float, rate: float, steps: int):
    event = Event.from_json({"kind": kind, "noise_multiplier": sigma, "sample_rate": rate, "steps": steps})
    assert Event.from_json(json.loads(json.dumps(event.to_json()))) == event


def test_rounds_are_accounted_with_the_slack_of_float32_and_counts_are_not():
    """By every way to count, a step of the rounds costs what a step with σ / (1 + slack) and no slack would."""
    sigma = 2.0
    plain, less = metrics(sigma), metrics(sigma / (1 + FLOAT32_SLACK))
    assert rounds(sigma, 1.0, 1).accounted_multiplier == less.noise_multiplier < sigma
    assert metrics(sigma).accounted_multiplier == schema(sigma).accounted_multiplier == sigma
    budget = Filter(3.0, 1e-6, 8)
    for cost in (
        lambda event: epsilon_rdp([event], 1e-6).epsilon,
        lambda event: epsilon_prv([event], 1e-6).epsilon,
        lambda event: budget.spent([event]),
        lambda event: budget.share([event]),
    ):
        assert cost(rounds(sigma, 1.0, 1)) == pytest.approx(cost(less), rel=1e-12)
        assert cost(rounds(sigma, 1.0, 1)) > cost(plain)
    assert epsilon_of(sigma, 1e-6, 1.0, 1) > epsilon_rdp([plain], 1e-6).epsilon


# --- ε of a history


@histories
def test_the_golden_numbers_have_not_moved(name: str):
    history, delta, _, _ = HISTORIES[name]
    prv, rdp, order, above, below = GOLDEN[name]
    by_rdp = epsilon_rdp(history, delta)
    assert (by_rdp.epsilon, by_rdp.order, by_rdp.method) == (pytest.approx(rdp, rel=1e-7), order, "rdp")
    assert below <= prv <= 1.01 * above and prv <= rdp
    if name in SLOW:  # the others are computed below
        by_prv = epsilon_prv(history, delta)
        assert (by_prv.epsilon, by_prv.method) == (pytest.approx(prv, rel=5e-4), "prv")


def compare_with_the_oracle(name: str) -> None:
    history, delta, from_above, from_below = HISTORIES[name]
    above = oracle(history, delta, from_above)
    below = oracle(history, delta, from_below, pessimistic=False)
    assert 0.95 * above <= below <= above  # the oracle itself is tight enough to say something
    ours = epsilon_prv(history, delta)
    assert (ours.epsilon, ours.method) == (pytest.approx(GOLDEN[name][0], rel=5e-4), "prv")
    assert below <= ours.epsilon <= 1.01 * above
    assert epsilon_rdp(history, delta).epsilon >= below


@pytest.mark.parametrize("name", QUICK)
def test_epsilon_is_within_one_percent_of_googles_upper_bound_and_never_below_its_lower_one(name: str):
    compare_with_the_oracle(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_epsilon_of_many_steps_is_within_one_percent_of_googles_upper_bound(name: str):
    compare_with_the_oracle(name)


def test_the_histories_are_twenty_and_reach_from_a_tenth_to_twenty():
    costs = [golden[0] for golden in GOLDEN.values()]
    assert len(HISTORIES) >= 20 and GOLDEN.keys() == HISTORIES.keys()
    assert min(costs) <= 0.11 and max(costs) >= 20
    assert any(event.sample_rate == 1 for history, *_ in HISTORIES.values() for event in history)


@pytest.mark.parametrize("sigma", [0.3, 1, 3, 10, 30])
@pytest.mark.parametrize("delta", [1e-4, 1e-9])
def test_a_look_at_everybody_costs_what_the_closed_form_says(sigma: float, delta: float):
    exact = gaussian_epsilon(sigma, delta)
    found = epsilon_prv([schema(sigma)], delta).epsilon
    assert exact <= found <= exact + 0.004 * max(exact, 0.1)
    assert epsilon_rdp([schema(sigma)], delta).epsilon >= exact


def test_looks_at_everybody_are_one_look_with_less_noise():
    together = [schema(6), metrics(8), metrics(8)]
    sigma = (1 / 36 + 2 / 64) ** -0.5
    exact = gaussian_epsilon(sigma, 1e-6)
    assert epsilon_prv(together, 1e-6).epsilon == pytest.approx(epsilon_prv([schema(sigma)], 1e-6).epsilon, rel=1e-9)
    assert exact <= epsilon_prv(together, 1e-6).epsilon <= 1.004 * exact


@pytest.mark.parametrize(("rate", "sigma"), [(0.01, 1.0), (0.02, 0.6), (0.3, 3.0), (0.5, 25.0), (0.999, 2.0), (1, 2.0)])
@pytest.mark.parametrize("order", [2, 3, 8, 33, 200, 1024])
def test_renyi_epsilon_is_that_of_googles_accountant_at_the_same_order(rate: float, sigma: float, order: int):
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    google = RdpAccountant([order])
    google.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)), 70)
    event = Event("metrics", sigma, rate, 70)
    expected = google.get_epsilon(1e-6)
    if expected > 0:  # Google's says 0 where a bound by the KL divergence is better
        assert Filter(1.0, 1e-6, order).spent([event]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("rate", "sigma"), [(0.01, 1.0), (0.02, 0.6), (0.3, 3.0), (0.5, 25.0), (0.97, 2.0)])
@pytest.mark.parametrize("order", [1.11, 1.5, 2, 2.7, 5.3, 11.3, 12, 60])
def test_renyi_epsilon_is_the_integral_of_its_definition(rate: float, sigma: float, order: float):
    assert privacy._rdp_of_step(rate, sigma, order) == pytest.approx(moment(rate, sigma, order), rel=1e-6)


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("order", [1.05, 1.5, 2.5, 7.3])
def test_where_the_series_is_slow_an_upper_bound_takes_its_place(rate: float, order: float):
    """With much noise, between whole orders: the chord, above the exact value and below that of the next order."""
    sigma = 40.0
    found = privacy._rdp_of_step(rate, sigma, order)
    assert moment(rate, sigma, order) * (1 - 1e-6) <= found <= privacy._rdp_of_step(rate, sigma, math.ceil(order))


def test_the_conversion_is_that_of_opacus():
    from opacus.accountants.analysis.rdp import get_privacy_spent

    for order in (1.3, 2, 17, 400):
        for delta in (1e-3, 1e-9):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected, _ = get_privacy_spent(orders=[order], rdp=[0.7], delta=delta)
            assert 0.7 + privacy._conversion(order, delta) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("name", ["the textbook's", "a run", "three runs", "everybody every time"])
def test_epsilon_is_that_of_opacus_accountant_with_the_same_error(name: str):
    from opacus.accountants import PRVAccountant

    history, delta, _, _ = HISTORIES[name]
    mechanisms = privacy._mechanisms(history)
    accountant = PRVAccountant()
    accountant.history = [(sigma, rate, steps) for rate, sigma, steps in mechanisms]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        expected = accountant.get_epsilon(delta, eps_error=0.01)
    assert privacy._prv(mechanisms, delta, 0.01) == pytest.approx(expected, rel=1e-4)


def test_no_history_costs_nothing():
    assert epsilon_rdp([], 1e-6).epsilon == epsilon_prv([], 1e-6).epsilon == 0
    assert Filter(1.0, 1e-6, 10).spent([]) == Filter(1.0, 1e-6, 10).share([]) == 0


@pytest.mark.parametrize("delta", [0, -1e-6, 1, 2, math.nan, math.inf])
def test_a_delta_that_is_no_probability_is_refused(delta: float):
    for ask in (
        lambda: epsilon_rdp([schema(1)], delta),
        lambda: epsilon_prv([schema(1)], delta),
        lambda: epsilon_rdp([], delta),
        lambda: Filter(1.0, delta, 8),
        lambda: pin_order([schema(1)], 1.0, delta),
        lambda: calibrate(1.0, delta, 0.1, 3),
        lambda: epsilon_of(1.0, delta, 0.1, 3),
    ):
        with pytest.raises(ConfigError, match="delta"):
            ask()


def test_extremes_have_an_answer_and_no_warning():
    """Noise that hides nothing costs an infinite or enormous ε, noise that hides everything next to none."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sigma in (1e-200, 1e-3, 0.01, 0.05):
            for rate in (1e-6, 0.5, 1.0):
                spent = epsilon_rdp([Event("metrics", sigma, rate, 3)], 1e-6).epsilon
                assert spent > 50 or (rate < 1e-5 and spent > 0)
                finer = epsilon_prv([Event("metrics", sigma, rate, 3)], 1e-6).epsilon
                assert finer <= spent and (rate < 1 or finer >= 3 / 2 / sigma / sigma)  # the loss is that on average
        for sigma in (1e4, 1e9):
            for rate in (1e-6, 0.5, 1.0):
                assert epsilon_rdp([Event("metrics", sigma, rate, 3)], 1e-6).epsilon < 0.01
                assert epsilon_prv([Event("metrics", sigma, rate, 3)], 1e-6).epsilon < 0.001
        assert epsilon_rdp([rounds(1, 1e-12, 10)], 1e-6).epsilon >= 0


def test_where_the_grid_would_be_too_large_or_the_numbers_fail_the_renyi_figure_stands_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
):
    history, delta = [rounds(1, 0.01, 1000)], 1e-5
    expected = epsilon_rdp(history, delta)
    assert epsilon_prv(history, delta).method == "prv"
    with monkeypatch.context() as patch:
        patch.setattr(privacy, "MAX_POINTS", 1000)
        assert epsilon_prv(history, delta) == expected
    with monkeypatch.context() as patch:
        patch.setattr("opacus.accountants.analysis.prv.discretize", lambda *_: 1 / 0)
        assert epsilon_prv(history, delta) == expected
    with monkeypatch.context() as patch:
        patch.setattr("opacus.accountants.analysis.prv.DiscretePRV.compute_epsilon", lambda *_: (math.nan,) * 3)
        assert epsilon_prv(history, delta) == expected
    with monkeypatch.context() as patch:
        answers = iter((1.83, 1.5, 1.5))  # the passes do not agree
        patch.setattr(privacy, "_prv", lambda *_: next(answers))
        assert epsilon_prv(history, delta) == expected
    assert epsilon_prv(history, 1e-12).method == "rdp"  # float64 cannot tell such a δ after 1000 steps


def test_a_grid_too_large_for_the_finest_error_is_tried_with_the_next(monkeypatch: pytest.MonkeyPatch):
    history, delta = [rounds(1, 0.01, 1000)], 1e-5
    fine = epsilon_prv(history, delta)
    monkeypatch.setattr(privacy, "MAX_POINTS", 200_000)
    coarser = epsilon_prv(history, delta)
    assert coarser.method == "prv" and fine.epsilon < coarser.epsilon < 1.01 * fine.epsilon


# --- properties

RATES = st.one_of(st.floats(1e-4, 0.2), st.just(1.0))
EVENTS = st.builds(
    Event,
    st.sampled_from(["schema", "rounds", "metrics"]),
    st.floats(0.6, 30),
    RATES,
    st.integers(1, 300),
)
DELTAS = st.sampled_from([1e-4, 1e-6, 1e-9])


@settings(max_examples=10)
@given(EVENTS, st.lists(EVENTS, max_size=2), DELTAS, st.integers(1, 500), st.floats(1.01, 3))
def test_epsilon_grows_with_steps_rate_and_less_noise(
    event: Event, rest: History, delta: float, more: int, factor: float
):
    kind, sigma, rate, steps = event.kind, event.noise_multiplier, event.sample_rate, event.steps
    base = epsilon_rdp([event, *rest], delta).epsilon
    slightly = 1 - 1e-9
    assert epsilon_rdp([Event(kind, sigma, rate, steps + more), *rest], delta).epsilon >= base * slightly
    assert epsilon_rdp([Event(kind, sigma / factor, rate, steps), *rest], delta).epsilon >= base * slightly
    assert epsilon_rdp([Event(kind, sigma, min(1.0, rate * factor), steps), *rest], delta).epsilon >= base * slightly
    assert epsilon_rdp(rest, delta).epsilon <= base
    assert epsilon_rdp([event, *rest], delta / factor).epsilon >= base * slightly
    order = pin_order([event, *rest], 2.0, 1e-4)
    budget = Filter(2.0, 1e-4, order)
    spent = budget.spent([event, *rest])
    longer = Event(kind, sigma, rate, steps + more)
    assert budget.share([longer]) == pytest.approx(budget.share([event]) * (steps + more) / steps)
    assert budget.spent([longer, *rest]) >= spent * slightly
    assert budget.spent([Event(kind, sigma / factor, rate, steps), *rest]) >= spent * slightly
    assert budget.spent([Event(kind, sigma, min(1.0, rate * factor), steps), *rest]) >= spent * slightly


def test_the_finer_epsilon_grows_with_steps_rate_and_less_noise_and_every_kind_counts():
    base = [schema(8), rounds(1.5, 0.02, 100), metrics(8)]
    spent = epsilon_prv(base, 1e-6).epsilon
    for more in (
        [schema(8), rounds(1.5, 0.02, 120), metrics(8)],
        [schema(8), rounds(1.4, 0.02, 100), metrics(8)],
        [schema(8), rounds(1.5, 0.023, 100), metrics(8)],
        [schema(7), rounds(1.5, 0.02, 100), metrics(8)],
        [schema(8), rounds(1.5, 0.02, 100), metrics(7)],
        [*base, metrics(8)],
        [*base, schema(8)],
        [*base, rounds(1.5, 0.02, 20)],
        [*base, rounds(1.6, 0.02, 20)],
    ):
        assert epsilon_prv(more, 1e-6).epsilon > 1.005 * spent
        assert epsilon_rdp(more, 1e-6).epsilon > 1.005 * epsilon_rdp(base, 1e-6).epsilon


@given(st.lists(EVENTS, min_size=1, max_size=4), DELTAS, st.data())
@settings(max_examples=10)
def test_order_and_cuts_of_a_history_change_nothing(history: History, delta: float, data: st.DataObject):
    """Exactly: a run cut in rounds, or two runs told in the other order, cannot pass where the whole would not."""
    pieces: History = []
    for event in history:
        first = data.draw(st.integers(1, event.steps))
        for steps in (first, event.steps - first):
            if steps:
                pieces.append(Event(event.kind, event.noise_multiplier, event.sample_rate, steps))
    other = data.draw(st.permutations(pieces))
    assert epsilon_rdp(other, delta) == epsilon_rdp(history, delta)
    budget = Filter(3.0, delta, 9)
    assert budget.spent(other) == budget.spent(history)
    assert privacy._mechanisms(other) == privacy._mechanisms(history)  # all that epsilon_prv sees


# --- the filter


def test_a_budget_for_three_of_five_rounds_stops_the_fourth_and_a_restart_does_not_reset_it():
    one = rounds(1.0, 0.02, 20)
    plan = [schema(5), one, one, one]
    epsilon = epsilon_rdp(plan, 1e-6).epsilon
    budget = Filter(epsilon, 1e-6, pin_order(plan, epsilon, 1e-6))
    history: History = [schema(5)]
    verdicts: list[bool] = []
    for _ in range(5):
        budget = Filter(budget.epsilon, budget.delta, budget.order)  # as after a restart: it holds no state
        history = [Event.from_json(json.loads(json.dumps(event.to_json()))) for event in history]
        verdicts.append(budget.affords(history, one))
        if verdicts[-1]:
            history.append(one)
    assert verdicts == [True, True, True, False, False]
    assert budget.spent(history) <= budget.epsilon < budget.spent([*history, one])
    assert budget.share(history) == pytest.approx(1)


def test_the_share_of_a_budget_grows_in_proportion_to_the_steps():
    budget = Filter(2.0, 1e-6, 12)
    once = budget.share([rounds(1.5, 0.01, 100)])
    assert 0 < once < 1
    assert budget.share([rounds(1.5, 0.01, 300)]) == pytest.approx(3 * once)
    assert Filter(0.1, 1e-6, 12).share([schema(100)]) == math.inf  # the order leaves nothing of such a budget


@pytest.mark.parametrize(
    ("epsilon", "order"), [(0, 8), (-1, 8), (math.nan, 8), (math.inf, 8), (1, 1), (1, 0.5), (1, math.inf)]
)
def test_a_budget_or_order_that_means_nothing_is_refused(epsilon: float, order: float):
    with pytest.raises(ConfigError, match=r"epsilon|order"):
        Filter(epsilon, 1e-6, order)


def test_the_filter_keeps_its_order_even_where_another_would_afford_more():
    """The best order of the moment would follow the plans, and those the outputs: no filter at one order."""
    plan = [rounds(0.6, 0.005, 100)]
    budget = Filter(3.0, 1e-5, pin_order(plan, 3.0, 1e-5))
    other = metrics(2.5)
    assert epsilon_rdp([other], 1e-5).epsilon <= 3 < budget.spent([other])
    assert not budget.affords([], other)


def test_an_order_without_a_number_affords_nothing():
    for order in (1025, 40.5):
        assert Filter(5.0, 1e-6, order).spent([rounds(3, 0.1, 1)]) == math.inf
        assert not Filter(5.0, 1e-6, order).affords([], rounds(3, 0.1, 1))


@settings(max_examples=6)
@given(st.floats(0.3, 12), DELTAS, EVENTS, st.data())
def test_whoever_chooses_the_next_event_by_what_was_afforded_stays_within_the_budget(
    epsilon: float, delta: float, first: Event, data: st.DataObject
):
    """An adaptive sequence: events are drawn one after the other, knowing all verdicts; ε by Google from above."""
    budget = Filter(epsilon, delta, pin_order([first], epsilon, delta))
    history: History = []
    refused = 0
    while refused < 3 and len(history) < 8:
        event = data.draw(EVENTS)
        while refused and event.steps > 1 and not budget.affords(history, event):
            event = Event(event.kind, event.noise_multiplier, event.sample_rate, event.steps // 2)
        if budget.affords(history, event):
            history.append(event)
        else:
            refused += 1
        assert budget.spent(history) <= epsilon and budget.share(history) <= 1 + 1e-9
    if history:
        assert oracle(history, delta, 1e-3) <= epsilon


def test_the_pinned_order_allows_the_most_repetitions_of_the_plan():
    """Against every order of a grid of its own; and by counting."""
    for plan, epsilon, delta in (
        ([rounds(1.0, 0.01, 100)], 2.0, 1e-5),
        ([schema(5), rounds(1.1, 0.02, 60), metrics(5)], 8.0, 1e-6),
        ([metrics(20)], 1.0, 1e-6),
        ([rounds(0.5, 0.05, 10)], 15.0, 1e-6),
        ([rounds(5, 0.01, 10)], 0.1, 1e-6),
    ):
        order = pin_order(plan, epsilon, delta)
        best = 1 / Filter(epsilon, delta, order).share(plan)
        for other in (*np.geomspace(0.05, 10.5, 60) + 1, *range(12, 1024, 7)):
            assert 1 / Filter(epsilon, delta, float(other)).share(plan) <= 1.01 * best
        budget, done = Filter(epsilon, delta, order), 0
        while done < 200 and budget.affords(plan * done, plan[0]) and budget.spent(plan * (done + 1)) <= epsilon:
            done += 1
        assert done == min(200, math.floor(best))


def test_a_budget_too_small_for_any_order_or_a_plan_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="too small"):
        pin_order([schema(5)], 0.001, 1e-9)
    with pytest.raises(ConfigError, match="at least one event"):
        pin_order([], 1.0, 1e-6)
    with pytest.raises(ConfigError, match="epsilon"):
        pin_order([schema(5)], 0, 1e-6)


# --- calibration


@settings(max_examples=12)
@given(
    st.floats(0.1, 20),
    DELTAS,
    st.one_of(st.floats(1e-3, 0.3), st.just(1.0)),
    st.integers(1, 2000),
    st.lists(st.floats(0.05, 0.4), max_size=2),
    st.integers(1, 7),
)
def test_a_calibrated_plan_is_never_refused_by_the_filter_it_was_made_for_and_no_less_noise_fits(
    epsilon: float, delta: float, rate: float, steps: int, shares: list[float], cuts: int
):
    """Alone or beside fixed events; in one piece or cut in rounds, as a run releases it."""
    # What a look may cost so that something is left: shares of the budget, by the closed form's rule of thumb.
    fixed = [metrics(math.sqrt(2 * math.log(1.25 / delta)) / (share * epsilon) + 2) for share in shares]
    sigma = calibrate(epsilon, delta, rate, steps, fixed)
    plan = [*fixed, rounds(sigma, rate, steps)]
    budget = Filter(epsilon, delta, pin_order(plan, epsilon, delta))
    history: History = []
    pieces = [rounds(sigma, rate, len(part)) for part in np.array_split(range(steps), cuts) if len(part)]
    for event in (*fixed, *pieces):
        assert budget.affords(history, event)
        history.append(event)
    assert epsilon_of(sigma, delta, rate, steps, fixed) <= epsilon
    assert float(f"{sigma:.5g}") == sigma
    if sigma > SMALLEST_MULTIPLIER:
        assert epsilon_of(sigma * 0.9998, delta, rate, steps, fixed) > epsilon


def test_a_calibrated_run_costs_no_more_than_the_budget_by_googles_account():
    fixed = [schema(12), metrics(12)]
    for epsilon in (0.8, 3.0, 8.0):
        sigma = calibrate(epsilon, 1e-6, 0.02, 300, fixed)
        assert oracle([*fixed, rounds(sigma, 0.02, 300)], 1e-6, 1e-3) <= epsilon


def test_noise_and_epsilon_are_each_others_inverse():
    for sigma in (0.7, 1.3, 5.0):
        for fixed in ([], [schema(10), metrics(20, 3)]):
            epsilon = epsilon_of(sigma, 1e-6, 0.03, 150, fixed)
            assert calibrate(epsilon, 1e-6, 0.03, 150, fixed) == pytest.approx(sigma, rel=2e-4)


def test_a_second_run_is_calibrated_at_the_order_of_the_filter_that_the_site_has():
    first = [schema(8), rounds(1.5, 0.02, 100)]
    order = pin_order(first, 8.0, 1e-6)
    budget = Filter(8.0, 1e-6, order)
    sigma = calibrate(8.0, 1e-6, 0.05, 400, first, order)
    assert budget.affords(first, rounds(sigma, 0.05, 400))
    assert not budget.affords(first, rounds(sigma * 0.9998, 0.05, 400))
    assert sigma >= calibrate(8.0, 1e-6, 0.05, 400, first)
    assert epsilon_of(sigma, 1e-6, 0.05, 400, first, order) == budget.spent([*first, rounds(sigma, 0.05, 400)])


def test_fixed_events_that_cost_the_whole_budget_are_named_with_what_they_cost():
    fixed = [schema(2), metrics(2)]
    cost = epsilon_rdp(fixed, 1e-6).epsilon
    for epsilon in (1.0, cost * (1 - 1e-6)):
        with pytest.raises(ConfigError, match=rf"costs {cost:.4g}.*raise epsilon"):
            calibrate(epsilon, 1e-6, 0.02, 100, fixed)
    order = pin_order(fixed, 5.0, 1e-6)
    with pytest.raises(ConfigError, match="raise epsilon"):
        calibrate(1.0, 1e-6, 0.02, 100, fixed, order)
    assert calibrate(cost * 1.05, 1e-6, 0.02, 100, fixed) < LARGEST_MULTIPLIER


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps"), [(0, 0.1, 3), (math.nan, 0.1, 3), (1, 0, 3), (1, 1.1, 3), (1, 0.1, 0)]
)
def test_a_run_that_means_nothing_is_not_calibrated(epsilon: float, rate: float, steps: int):
    with pytest.raises(ConfigError, match=r"epsilon|sample_rate|steps"):
        calibrate(epsilon, 1e-6, rate, steps)


def test_a_budget_that_needs_no_noise_still_gets_the_smallest_there_is():
    assert calibrate(1e6, 1e-6, 0.001, 1) == SMALLEST_MULTIPLIER


# --- the module


def test_nothing_heavy_is_loaded_before_a_history_with_sampling_is_counted():
    code = (
        "import sys\nfrom wardround.common.privacy import Event, Filter, epsilon_rdp\n"
        "looks = [Event('schema', 5, 1, 1)]\n"
        "epsilon_rdp(looks, 1e-6), Filter(1, 1e-6, 20).affords([], looks[0])\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "opacus", "scipy", "trl", "flwr"} & set(done.stdout.split())


def test_the_examples_in_the_documentation_hold():
    assert doctest.testmod(import_module("wardround.common.privacy")).failed == 0


if __name__ == "__main__":
    for name, (history, delta, from_above, from_below) in HISTORIES.items():
        by_prv, by_rdp = epsilon_prv(history, delta), epsilon_rdp(history, delta)
        assert by_prv.method == "prv", name
        numbers = [by_prv.epsilon, by_rdp.epsilon, by_rdp.order]
        numbers += [oracle(history, delta, from_above), oracle(history, delta, from_below, pessimistic=False)]
        print(f'    "{name}": ({", ".join(f"{number:.8g}" for number in numbers)}),', flush=True)
