"""Dropouts in every phase: down to the threshold the exact sum of the survivors, one fewer and nothing.

n = 5, t = 4 and n = 7, t = 5, by §S3's formula with c = 2. Members that are silent from an exchange on are left out of
all later ones; one that sent its masked vector is a survivor, whatever it does after it.
"""

from collections.abc import Collection
from copy import deepcopy
from functools import cache
from itertools import combinations

import pytest
from wardround.common.errors import SumError
from wardround.common.secagg.keys import smallest_threshold

from .parties import Party, Relay, as_lists, parties, plain_sum, relay

CASES = [(5, 4, 2), (7, 5, 2)]
PHASES = {1: "keys", 2: "shares", 3: "masked", 4: "consistency", 5: "unmask"}


def some(n: int, least: int, most: int) -> list[tuple[int, ...]]:
    return [gone for size in range(least, most + 1) for gone in combinations(range(n), size)]


@cache
def whole_until(n: int, t: int, c: int, exchange: int) -> tuple[list[Party], Relay]:
    """Nobody is silent up to and with this exchange: the same whoever is later. To be copied."""
    sites = parties(n, c)
    run = relay(sites, t)
    run.run(exchange)
    return sites, run


def started(n: int, t: int, c: int, gone: dict[int, Collection[int]]) -> tuple[list[Party], Relay, int]:
    """Sites, coordinator, and how many exchanges they have behind them: all before the first that somebody misses."""
    done = min(gone) - 1
    before = whole_until(n, t, c, done)
    sites, run = deepcopy(before, {id(site.identity): site.identity for site in before[0]})  # keys cannot be copied
    run.gone = {phase: [sites[i].id for i in who] for phase, who in gone.items()}
    return sites, run, done


def check_sum(n: int, t: int, c: int, gone: dict[int, Collection[int]]) -> None:
    sites, run, done = started(n, t, c, gone)
    out = {i for phase, who in gone.items() if phase <= 3 for i in who}
    total = run.run(after=done)
    assert total is not None
    assert as_lists(total) == plain_sum(site for i, site in enumerate(sites) if i not in out)
    assert run.attempt.misfits == ()


def check_nothing(n: int, t: int, c: int, gone: dict[int, Collection[int]]) -> None:
    sites, run, done = started(n, t, c, gone)
    with pytest.raises(SumError) as caught:
        run.run(after=done)
    assert caught.value.code == "threshold"
    # What is left in memory is masked: no value of the sum of those who sent theirs.
    masked = run.attempt.to_record()[1]["ring"].view("<u4").tolist() if run.attempt._keys is not None else []
    sums = {tuple(plain_sum(who)[0]) for size in range(1, n + 1) for who in combinations(sites, size)}
    assert tuple(masked) not in sums
    with pytest.raises(SumError):
        run.attempt.unmask()


@pytest.mark.parametrize(("n", "t", "c"), CASES)
def test_thresholds_are_the_smallest_of_the_formula(n: int, t: int, c: int):
    assert smallest_threshold(n, c) == t


@pytest.mark.parametrize(("n", "t", "c"), CASES)
@pytest.mark.parametrize("phase", PHASES, ids=PHASES.values())
def test_every_subset_up_to_n_minus_t_may_drop_out_in_any_phase(phase: int, n: int, t: int, c: int):
    for gone in some(n, 0, n - t):
        check_sum(n, t, c, {phase: gone})


@pytest.mark.parametrize(("n", "t", "c"), CASES)
@pytest.mark.parametrize("phase", PHASES, ids=PHASES.values())
def test_one_dropout_more_releases_nothing(phase: int, n: int, t: int, c: int):
    for gone in some(n, n - t + 1, n - t + 1):
        check_nothing(n, t, c, {phase: gone})


@pytest.mark.parametrize(("n", "t", "c"), CASES)
def test_dropouts_spread_over_phases_are_counted_together(n: int, t: int, c: int):
    """Every two phases, one member in each: t are left with n = 7, one too few with n = 5."""
    for first, second in combinations(PHASES, 2):
        for one in range(n):
            other = (one + second - first) % n
            (check_sum if n - 2 >= t else check_nothing)(n, t, c, {first: [one], second: [other]})


def test_a_member_that_is_silent_in_one_exchange_only_is_heard_in_the_next():
    """Silent when asked to sign, it may still answer at the end: its masked vector is in the sum."""
    sites = parties(5, 2)
    run = relay(sites, 4)
    run.run(3)
    run.gone = {4: [sites[0].id]}
    run.consistency()
    run.gone = {}
    with pytest.raises(SumError, match="out-of-turn"):  # it has signed nothing, so it opens nothing
        sites[0].unmask(run.said["signers"], run.said["signatures"])
    run.gone = {5: [sites[0].id]}
    assert as_lists(run.unmask()) == plain_sum(sites)


def test_after_a_failure_before_signing_fresh_keys_give_the_sum():
    sites, run, done = started(5, 4, 2, {3: [0, 1]})
    with pytest.raises(SumError, match="threshold"):
        run.run(after=done)
    second = relay(sites, 4, binding=run.binding.__class__(**{**vars(run.binding), "attempt": 2}))
    total = second.run()
    assert total is not None and as_lists(total) == plain_sum(sites)
    first, again = run.attempt.keys, second.attempt.keys
    public = {key for keys in (first, again) for one in keys.adverts for key in (one.encryption_key, one.mask_key)}
    assert len(public) == 20  # no key twice
