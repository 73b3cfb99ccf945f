"""What the ratings of a review say: preference, ability, agreement, consistency; and the table to compute it elsewhere.

Runs at the coordinator. Enters: ratings with the models put back. Leaves: numbers, and rows for a file. Private: raters
are numbers unless names are asked for; comments may hold anything.

With two models A and B (sorted by name), of all first showings of a pair:

- **score** of B: the share of ratings that prefer B, a tie counting half. Interval: bootstrap over items (an item's
  ratings are drawn together, for they are not independent), and over raters and items (each drawn by itself; Owen 2007,
  "The pigeonhole bootstrap"), which also says what other raters might have preferred, roughly when there are few.
- **among decided**: B's share of ratings that are no tie, with a Wilson interval, as if ratings were independent.
- **sign test**: over items, by the sign of the mean rating, exact: no item counts more than once.
- **Bradley-Terry**: the log-odds that B is preferred, for all and for each rater (agreement.py).
- **agreement**: Krippendorff's α of the five steps (ordinal) and of better, equal, worse (nominal).
- **self-consistency**: of pairs shown twice with sides exchanged, how often the same was said.
- **position**: how often the first answer was preferred, whosever it was; one half is no bias.

People and judges (programs) are never counted together: each kind has figures of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...common.statistics import mcnemar_exact, wilson
from .agreement import AgreementError, bradley_terry, krippendorff_alpha
from .database import Database
from .raters import Rater, raters
from .ratings import REASONS, Unblinded, progress, unblinded

VERSION = 1  # of what `statistics` returns
DRAWS = 2000
_CELLS = 1_000_000  # of a block of bootstrap draws
KINDS = {"person": "people", "judge": "judges"}
COLUMNS = (
    "rater", "kind", "pair", "item", "section", "target", "repeats_pair", "shown_first", "preferred", "strength",
    "reasons", "unacceptable", "comment", "rated_at",
)  # fmt: skip


def rows(database: Database, names: bool = False) -> list[dict[str, Any]]:
    """Every rating as a row of COLUMNS, with models' names. `names`: raters' too, in place of rater-1, rater-2, …"""
    models, who = database.facts.models, {one.number: one for one in raters(database)}
    found: list[dict[str, Any]] = []
    for one in unblinded(database):
        rater = who[one.rater]
        values = (
            rater.name if names else f"rater-{one.rater}", rater.kind, one.place + 1, one.item_id, one.section,
            one.target, None if one.repeats is None else one.repeats + 1, models[one.first_model],
            "equal" if one.value == 0 else models[int(one.value > 0)], abs(one.value), list(one.reasons),
            [model for model, bad in zip(models, one.unacceptable, strict=True) if bad], one.comment, one.rated_at,
        )  # fmt: skip
        found.append(dict(zip(COLUMNS, values, strict=True)))
    return found


def statistics(database: Database, draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """All figures.

    Returns:
        "version", "title", "data", "models" (A, B), "items", "raters" (how far each is), and for "people" and "judges"
        the figures of `summary`, or None where nobody of that kind has rated.
    """
    facts, everybody, ratings = database.facts, raters(database), unblinded(database)
    result: dict[str, Any] = {
        "version": VERSION, "title": facts.title, "data": facts.data, "models": list(facts.models),
        "items": facts.items, "planted_twice": facts.share, "raters": [_how_far(database, one) for one in everybody],
    }  # fmt: skip
    for kind, plural in KINDS.items():
        numbers = {one.number for one in everybody if one.kind == kind}
        chosen = [one for one in ratings if one.rater in numbers]
        result[plural] = summary(chosen, draws=draws, seed=seed) if chosen else None
    return result


def _how_far(database: Database, rater: Rater) -> dict[str, Any]:
    done, total = progress(database, rater.number)
    return {"rater": f"rater-{rater.number}", "kind": rater.kind, "rated": done, "of": total}


def summary(ratings: Sequence[Unblinded], draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """The figures of one kind of raters; what cannot be computed is a sentence under "not_possible".

    Args:
        ratings: at least one, all of one kind.
        draws: of each bootstrap.
        seed: of the bootstraps.
    """
    first = [one for one in ratings if one.repeats is None]
    decided = [one for one in first if one.value]
    impossible: dict[str, str] = {}
    result: dict[str, Any] = {
        "preference": (overall := preference(first, draws, seed)),
        "by_section": _by(first, lambda one: one.section, draws, seed),
        "by_rater": _by(first, lambda one: f"rater-{one.rater}", draws, seed),
        "bradley_terry": _abilities(first, overall, impossible),
        "agreement": _agreement(first, impossible),
        "self_consistency": consistency(ratings, impossible),
        "position": _share(sum(map(_first_better, decided)), len(decided)),
        "reasons": _reasons(first),
        "unacceptable": [_share(sum(one.unacceptable[model] for one in first), len(first)) for model in (0, 1)],
        "not_possible": impossible,
    }  # fmt: skip
    return result


def _first_better(one: Unblinded) -> bool:
    return (one.value > 0) == (one.first_model == 1)


def preference(ratings: Sequence[Unblinded], draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """How often each model was preferred.

    Returns:
        "n", "items", "a", "b", "equal" (ratings), "strong" (of either, much better), "score" (of B) with
        "ci95_items" and "ci95_raters_items" (None with one item, and one rater), "decided" (B's share), "sign_test".
    """
    values = np.array([one.value for one in ratings], dtype=np.int64)
    a, b, n = int((values < 0).sum()), int((values > 0).sum()), len(values)
    over_items, over_both = _bootstrap(ratings, draws, seed)
    totals = Counter[int]()
    for one in ratings:
        totals[one.item] += one.value
    for_a, for_b = sum(total < 0 for total in totals.values()), sum(total > 0 for total in totals.values())
    return {
        "n": n, "items": len(totals), "a": a, "b": b, "equal": n - a - b, "strong": int((abs(values) == 2).sum()),
        "score": (b + (n - a - b) / 2) / n if n else None,
        "ci95_items": _interval(over_items), "ci95_raters_items": _interval(over_both),
        "decided": _share(b, a + b),
        "sign_test": {"items_for_a": for_a, "items_for_b": for_b, "p": mcnemar_exact(for_a, for_b)},
    }  # fmt: skip


def _share(part: int, n: int) -> dict[str, Any]:
    return {"of": n, "count": part, "share": part / n if n else None, "ci95": wilson(part, n) if n else None}


def _by(
    ratings: Sequence[Unblinded], key: Callable[[Unblinded], str], draws: int, seed: int
) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[Unblinded]] = {}
    for one in ratings:
        groups.setdefault(key(one), []).append(one)
    return {name: preference(groups[name], draws, seed) for name in sorted(groups)}


def _bootstrap(ratings: Sequence[Unblinded], draws: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores of B, one a draw: over items; over raters and items. Empty where fewer than two could be drawn from.

    A draw in which no rating remains has no score and is left out.
    """
    items, item = np.unique([one.item for one in ratings], return_inverse=True)
    people, person = np.unique([one.rater for one in ratings], return_inverse=True)
    sums, counts = (np.zeros((len(people), len(items))) for _ in range(2))
    np.add.at(sums, (person, item), [(np.sign(one.value) + 1) / 2 for one in ratings])
    np.add.at(counts, (person, item), 1.0)
    rng, at_once = np.random.default_rng(seed), max(1, _CELLS // len(items))
    found: list[NDArray[np.float64]] = []
    for over_raters in (False, True):
        if len(items) < 2 or (over_raters and len(people) < 2):
            found.append(np.empty(0))
            continue
        scores: list[NDArray[np.float64]] = []
        for start in range(0, draws, at_once):
            size = min(at_once, draws - start)
            of_items = _drawn(rng, len(items), size)
            of_people = _drawn(rng, len(people), size) if over_raters else np.ones((size, len(people)))
            weight = ((of_people @ counts) * of_items).sum(axis=1)
            score = ((of_people @ sums) * of_items).sum(axis=1)[weight > 0] / weight[weight > 0]
            scores.append(score)
        found.append(np.concatenate(scores))
    return found[0], found[1]


def _drawn(rng: np.random.Generator, n: int, draws: int) -> NDArray[np.float64]:
    """How often each of n is drawn in n draws with replacement, shape (draws, n)."""
    return rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)


def _interval(values: NDArray[np.float64]) -> list[float] | None:
    return [float(bound) for bound in np.quantile(values, [0.025, 0.975])] if len(values) else None


def _abilities(ratings: Sequence[Unblinded], said: dict[str, Any], impossible: dict[str, str]) -> dict[str, Any] | None:
    """Log-odds that B is preferred: of all, with the intervals of `preference`; of each rater, with its error."""
    try:
        overall = _log_odds(ratings)
    except AgreementError:
        impossible["bradley_terry"] = (
            "Bradley-Terry: one model was never preferred, not even in a tie: its log-odds are infinite"
        )
        return None
    by_rater: dict[str, dict[str, float] | None] = {}
    for number in sorted({one.rater for one in ratings}):
        try:
            by_rater[f"rater-{number}"] = _log_odds([one for one in ratings if one.rater == number])
        except AgreementError:
            by_rater[f"rater-{number}"] = None
    return overall | {
        "ci95_items": _logits(said["ci95_items"]),
        "ci95_raters_items": _logits(said["ci95_raters_items"]),
        "by_rater": by_rater,
    }


def _log_odds(ratings: Sequence[Unblinded]) -> dict[str, float]:
    b = sum((np.sign(one.value) + 1) / 2 for one in ratings)
    wins = np.array([[0.0, len(ratings) - b], [b, 0.0]])
    estimate, error = bradley_terry(wins).difference(1, 0)
    return {"log_odds": estimate, "standard_error": error}


def _logits(bounds: list[float] | None) -> list[float | None] | None:
    """Of two models the log-odds are the score's: a bound of the one is a bound of the other; infinite: None."""
    return None if bounds is None else [float(np.log(p / (1 - p))) if 0 < p < 1 else None for p in bounds]


def _agreement(ratings: Sequence[Unblinded], impossible: dict[str, str]) -> dict[str, Any] | None:
    people, person = np.unique([one.rater for one in ratings], return_inverse=True)
    items, item = np.unique([one.item for one in ratings], return_inverse=True)
    if len(people) < 2:
        impossible["agreement"] = "Krippendorff's alpha: needs two raters or more, and one has rated so far"
        return None
    table = np.full((len(people), len(items)), np.nan)
    table[person, item] = [one.value for one in ratings]
    shared = int(((~np.isnan(table)).sum(axis=0) > 1).sum())
    if not shared:
        impossible["agreement"] = "Krippendorff's alpha: no item has been rated by two raters yet"
        return None
    return {
        "raters": len(people),
        "shared_items": shared,
        "ordinal": krippendorff_alpha(table, "ordinal"),
        "nominal": krippendorff_alpha(np.sign(table)),
    }


def consistency(ratings: Iterable[Unblinded], impossible: dict[str, str]) -> dict[str, Any] | None:
    """Of pairs that a rater saw twice: how often the same model was preferred (or neither), to the step, and reversed.

    Each with the sides exchanged, so a rater who always prefers the first answer is inconsistent.
    """
    ratings = list(ratings)
    known: dict[tuple[int, int | None], Unblinded] = {(one.rater, one.place): one for one in ratings}
    twice = [(known[one.rater, one.repeats], one) for one in ratings if (one.rater, one.repeats) in known]
    if not twice:
        impossible["self_consistency"] = "self-consistency: no planted pair has been rated twice yet"
        return None
    same = sum(np.sign(before.value) == np.sign(again.value) for before, again in twice)
    return {
        "same_preference": _share(int(same), len(twice)),
        "same_step": sum(before.value == again.value for before, again in twice),
        "reversed": sum(before.value * again.value < 0 for before, again in twice),
        "by_rater": {
            f"rater-{number}": _share(
                sum(bool(np.sign(x.value) == np.sign(y.value)) for x, y in twice if x.rater == number),
                sum(x.rater == number for x, _ in twice),
            )
            for number in sorted({one.rater for one, _ in twice})
        },
    }


def _reasons(ratings: Sequence[Unblinded]) -> dict[str, list[int]]:
    """How often a reason was given for preferring A, and for preferring B."""
    return {
        reason: [sum(reason in one.reasons and one.value * side > 0 for one in ratings) for side in (-1, 1)]
        for reason in REASONS
    }
