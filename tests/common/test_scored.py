"""Scored questions refuse what contradicts itself, and are cut and joined without loss."""

from dataclasses import replace

import numpy as np
import pytest
from wardround.common.scored import Answered, Scored, concat

from .scored_case import simulated


@pytest.fixture
def scored() -> Scored:
    return simulated(20, {"base": 0.4, "final": 0.5}, seed=1, permute=True)


def test_taking_rows_takes_them_everywhere(scored: Scored) -> None:
    rows = np.array([5, 3, 30])
    some = scored.take(rows)
    assert len(some) == 3 and some.n_patients == 3
    assert some.targets == tuple(scored.targets[row] for row in rows)
    assert some.strata["age"] == tuple(scored.strata["age"][row] for row in rows)
    assert np.array_equal(some.correct("final"), scored.correct("final")[rows])
    assert np.array_equal(some.permuted["base"].probabilities, scored.permuted["base"].probabilities[rows])


def test_joined_parts_keep_their_patients_apart_and_fill_what_is_unknown(scored: Scored) -> None:
    other = simulated(7, {"base": 0.4, "final": 0.5}, seed=2, outcome=True, permute=True)
    other = replace(other, strata={"severity": ("mild",) * len(other)})
    both = concat([scored, other, scored])
    assert len(both) == 40 + 14 + 40 and both.n_patients == 20 + 7 + 20
    assert both.strata["age"][40:54] == ("",) * 14
    assert both.strata["severity"][:40] == ("",) * 40 and both.strata["severity"][40] == "mild"
    assert both.models["base"].probabilities.shape == (94, 4)
    assert np.array_equal(both.correct("final")[54:], scored.correct("final"))


def test_parts_of_other_models_are_not_joined(scored: Scored) -> None:
    with pytest.raises(ValueError, match="other models"):
        concat([scored, simulated(5, {"base": 0.4}, seed=1, permute=True)])
    with pytest.raises(ValueError, match="none"):
        concat([])


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("patients", np.arange(39), "models|n_options"),
        ("n_options", np.ones(40, np.int64), "n_options: expected 2"),
        ("answer", np.full(40, 4), "answer: expected 0"),
        ("event", np.full(40, -2), "event: expected -1"),
        ("event", np.full(40, -1.0), "event: expected int64"),
        ("targets", ("age",), "targets: expected 40"),
        ("strata", {"site": ("a",)}, "strata 'site': expected 40"),
        ("shown_at", np.zeros(40, np.int64), "shown_at: expected int64 of shape 40×2"),
        ("shown_at", np.full((40, 2), 9), "shown_at: expected -1"),
        ("models", {}, "models: expected one or more"),
        ("n_options", np.full(40, 3), "answer|chose|past"),
        ("n_options", np.full(40, 5), "expected probabilities of 5 options"),
    ],
)
def test_contradictions_are_refused_by_name(scored: Scored, field: str, value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(scored, **{field: value})


def test_a_model_called_chance_or_majority_is_refused(scored: Scored) -> None:
    for name in ("chance", "majority"):
        with pytest.raises(ValueError, match=name):
            replace(scored, models={name: scored.models["base"]}, permuted={})


def test_permuted_answers_of_an_unknown_model_are_refused(scored: Scored) -> None:
    with pytest.raises(ValueError, match="permuted"):
        replace(scored, permuted={"other": scored.permuted["base"]})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("probabilities", np.full((2, 2), 0.4), "sum 1"),
        ("probabilities", np.array([[1.5, -0.5], [0.5, 0.5]]), "sum 1"),
        ("probabilities", np.array([[np.nan, 1.0], [0.5, 0.5]]), "sum 1"),
        ("chosen", np.array([0, 2]), "chosen: expected -1 to 1"),
        ("boxed", np.array([1, 0]), "boxed: expected bool"),
        ("length", np.array([1, -1]), "length"),
    ],
)
def test_answers_that_are_none_are_refused(field: str, value: np.ndarray, words: str) -> None:
    good = Answered(np.full((2, 2), 0.5), np.array([0, -1]), np.array([True, False]), np.array([0, 3]))
    with pytest.raises(ValueError, match=words):
        replace(good, **{field: value})
