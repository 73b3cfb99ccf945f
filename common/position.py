"""Position bias: whether a model likes a letter whatever stands there.

Role: wherever questions were scored. Pure. Enters: chosen options, and where the options were shown in another order
the choices there. Leaves: shares, effects, p-values and whether they are flagged. No option's text is looked at.

Two tests, for each number of options apart:

- **Choices by letter** against an equal share each: Pearson's chi-square, divided by the design effect of patients with
  several questions (Rao and Scott 1981, first order). It needs orders drawn at random, so that no letter is true more
  often than another. Where options are sorted, or every question is of an outcome whose event always stands at one
  letter, liking a letter and liking an answer are one thing, and the test raises no flag.
- **Right answers by the letter of the truth**, over the same questions in two orders: how much likelier an answer is
  right when its truth stands at a letter. Within a question, so that neither its difficulty nor a liking for what
  options say plays a part. Least squares on the change between both orders, with variances by patient.

How often the choice stays the same when the order changes is told beside them and raises no flag: a model that is
unsure changes its mind without liking any letter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .distributions import chi_square_tail, f_tail
from .intervals import PatientBootstrap, difference_bounds, holm, share_bounds, sign_flip_p
from .scored import Scored

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

FLAG_LEVEL, FLAG_POINTS = 0.01, 0.05
FLAG_RULE = (
    "Flagged where, with p < 0.01 after Holm's correction over a model's tests, a letter is chosen 5 points more or "
    "less often than an equal share and than it was true (where orders are not fixed), or answers are right 5 points "
    "more often with the truth at one letter than at another (where questions were asked in two orders)."
)
_LEAST_EXPECTED = 5  # choices a letter below which chi-square is not to be trusted


def position_bias(scored: Scored, model: str, bootstrap: PatientBootstrap, min_cell: int) -> dict[str, Any]:
    """Both tests of one model.

    Args:
        scored: the questions; `permuted` and `shown_at` are used where filled.
        model: one of its models.
        bootstrap: of the patients of `scored`.
        min_cell: fewest patients a number of options is reported for.

    Returns:
        "by_options": a list of {"n_options", "n", "patients", "chosen" and "truth" (share of each letter), "p",
        "p_holm", "fixed_order"}, p None where choices are too few to test; "permuted": None, or {"n", "patients",
        "same": share of questions whose choice stayed, "accuracy_change": permuted minus original order,
        "by_options": a list of {"n_options", "n", "letter_effect", "p", "p_holm"}}; "flagged".
    """
    chosen = scored.models[model].chosen
    rows = [
        _choices(scored, chosen, options, patients) for options, patients in _many_enough(scored, chosen >= 0, min_cell)
    ]
    permuted = _permuted(scored, model, bootstrap, min_cell) if model in scored.permuted else None
    effects: list[dict[str, Any]] = permuted["by_options"] if permuted else []
    tested = [row for row in (*rows, *effects) if row["p"] is not None]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    return {
        "by_options": rows,
        "permuted": permuted,
        "flagged": any(map(_liked, rows)) or any(map(_helped, effects)),
    }


def _liked(row: dict[str, Any]) -> bool:
    if row["p_holm"] is None or row["p_holm"] >= FLAG_LEVEL or row["fixed_order"]:
        return False
    chosen, truth = np.array(row["chosen"]), np.array(row["truth"])
    far = (np.abs(chosen - 1 / len(chosen)) >= FLAG_POINTS) & (np.abs(chosen - truth) >= FLAG_POINTS)
    return bool(far.any())


def _helped(row: dict[str, Any]) -> bool:
    effect = row["letter_effect"]
    return row["p_holm"] is not None and row["p_holm"] < FLAG_LEVEL and max(effect) - min(effect) >= FLAG_POINTS


def _many_enough(scored: Scored, asked: Bools, min_cell: int) -> list[tuple[int, int]]:
    """Numbers of options that enough patients were asked, with the number of patients."""
    counts = [int(options) for options in np.unique(scored.n_options)]
    patients = [len(np.unique(scored.patients[asked & (scored.n_options == options)])) for options in counts]
    return [(options, n) for options, n in zip(counts, patients, strict=True) if n >= min_cell]


def _choices(scored: Scored, chosen: Ints, options: int, patients: int) -> dict[str, Any]:
    rows = np.flatnonzero((chosen >= 0) & (scored.n_options == options))
    picked, truth, event = chosen[rows], scored.answer[rows], scored.event[rows]
    shares = np.bincount(picked, minlength=options) / len(rows)
    return {
        "n_options": options,
        "n": len(rows),
        "patients": patients,
        "chosen": shares.tolist(),
        "truth": (np.bincount(truth, minlength=options) / len(rows)).tolist(),
        "p": uniform_p(picked, options, scored.patients[rows]),
        "p_holm": None,
        "fixed_order": scored.ordered or bool(event[0] >= 0 and np.all(event == event[0])),
    }


def uniform_p(chosen: Ints, options: int, patients: Ints) -> float | None:
    """p of all letters being chosen equally often; None where fewer than 5 choices a letter are expected.

    With one question a patient this is scipy.stats.chisquare. Patients whose choices are alike make it larger, by the
    mean of what they add to the variances (Rao and Scott 1981).

    Args:
        chosen: int64 (n,), 0 to options - 1.
        options: letters.
        patients: int64 (n,).
    """
    n = len(chosen)
    if n < _LEAST_EXPECTED * options:
        return None
    counts = np.bincount(chosen, minlength=options)
    statistic = float(((counts - n / options) ** 2).sum()) * options / n
    away = np.eye(options)[chosen] - counts / n
    sums = np.zeros((len(np.unique(patients)), options))
    np.add.at(sums, np.unique(patients, return_inverse=True)[1], away)
    effect = float((sums**2).sum()) / max(float((away**2).sum()), 1e-12)
    return chi_square_tail(statistic / max(1.0, effect), options - 1)


def _permuted(scored: Scored, model: str, bootstrap: PatientBootstrap, min_cell: int) -> dict[str, Any] | None:
    both = np.all(scored.shown_at >= 0, axis=1)
    patients = len(np.unique(scored.patients[both]))
    if patients < min_cell:
        return None
    first, second = scored.models[model].chosen, scored.permuted[model].chosen
    same = (first == second) & both
    change = ((second == scored.answer).astype(np.int64) - (first == scored.answer)) * both
    values = bootstrap.ratios(np.stack([same, change], axis=1), both[:, None])
    flips = bootstrap.per_patient(change[:, None])[:, 0].astype(np.int64)
    effects: list[dict[str, Any]] = []
    for options, _ in _many_enough(scored, both, min_cell):
        rows = np.flatnonzero(both & (scored.n_options == options))
        effect, p = letter_effect(scored.shown_at[rows], change[rows], options, scored.patients[rows])
        effects.append({"n_options": options, "n": len(rows), "letter_effect": effect.tolist(), "p": p, "p_holm": None})
    return {
        "n": int(both.sum()),
        "patients": patients,
        "same": {"value": float(values[0, 0]), "ci95": share_bounds(values[:, 0], patients)},
        "accuracy_change": {
            "difference": float(values[0, 1]),
            "ci95": difference_bounds(values[:, 1], patients),
            "p": sign_flip_p(flips),
        },
        "by_options": effects,
    }


def letter_effect(shown_at: Ints, change: Ints, options: int, patients: Ints) -> tuple[Floats, float | None]:
    """How much likelier an answer is right with its truth at each letter, from questions asked in two orders.

    Args:
        shown_at: int64 (n, 2), letter of the truth in the first and in the second order.
        change: int64 (n,), right in the second order minus right in the first: -1, 0 or 1.
        options: letters.
        patients: int64 (n,).

    Returns:
        float64 (options,), shares of accuracy with the mean 0; and the p of no effect, by F with variances clustered by
        patient. None where the truths did not move to all letters, or patients are too few.
    """
    eye = np.eye(options)
    moved = (eye[shown_at[:, 1]] - eye[shown_at[:, 0]])[:, :-1]  # the last letter's effect is 0, for now
    square = moved.T @ moved
    codes = np.unique(patients, return_inverse=True)[1]
    groups = int(codes.max()) + 1
    if groups <= options or np.linalg.matrix_rank(square) < options - 1:
        return np.zeros(options), None
    effect = np.linalg.solve(square, moved.T @ change)
    scores = np.zeros((groups, options - 1))
    np.add.at(scores, codes, moved * (change - moved @ effect)[:, None])
    inverse = np.linalg.inv(square)
    variance = inverse @ (scores.T @ scores) @ inverse * groups / (groups - 1)
    full = np.append(effect, 0.0)
    full -= full.mean()
    if np.linalg.matrix_rank(variance, tol=1e-12) < options - 1:  # no scatter: all changes follow the letter, or none
        return full, 1.0 if np.allclose(effect, 0) else 0.0
    wald = float(effect @ np.linalg.solve(variance, effect)) / (options - 1)
    return full, f_tail(wald, options - 1, groups - 1)
