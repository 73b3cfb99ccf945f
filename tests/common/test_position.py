"""Models that like a letter are flagged, models that do not are not; the tests are scipy's and statsmodels'."""

from dataclasses import replace

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.stats import chisquare
from wardround.common.intervals import PatientBootstrap
from wardround.common.position import letter_effect, position_bias, uniform_p
from wardround.common.scored import Answered, Scored

from .scored_case import simulated


def bias_of(scored: Scored, model: str = "m", draws: int = 200) -> dict:
    return position_bias(scored, model, PatientBootstrap(scored.patients, draws, 1), 10)


def test_with_one_question_a_patient_choices_are_tested_by_scipys_chi_square() -> None:
    chosen = np.random.default_rng(1).choice(4, 200, p=[0.3, 0.3, 0.2, 0.2])
    expected = chisquare(np.bincount(chosen)).pvalue
    assert uniform_p(chosen, 4, np.arange(200)) == pytest.approx(expected)
    assert uniform_p(chosen[:19], 4, np.arange(19)) is None


def test_choices_that_a_patients_questions_share_are_not_taken_for_a_liking() -> None:
    """Each patient has one letter for all 8 questions: 50 patients, not 400 questions."""
    found = 0
    for seed in range(200):
        letters = np.random.default_rng(seed).integers(4, size=50)
        p = uniform_p(np.repeat(letters, 8), 4, np.repeat(np.arange(50), 8))
        assert p is not None
        found += p < 0.05
    assert found <= 20


def test_the_letters_effect_is_statsmodels_least_squares_with_clustered_errors() -> None:
    rng = np.random.default_rng(2)
    n, patients = 300, np.repeat(np.arange(100), 3)
    shown = rng.integers(4, size=(n, 2))
    change = rng.integers(-1, 2, size=n)
    effect, p = letter_effect(shown, change, 4, patients)
    moved = (np.eye(4)[shown[:, 1]] - np.eye(4)[shown[:, 0]])[:, :-1]
    fit = sm.OLS(change.astype(float), moved).fit()
    # Its correction has (n − 1) / (n − 3) besides.
    robust = fit.get_robustcov_results("cluster", groups=patients, use_correction=True, use_t=True)
    test = robust.f_test(np.eye(3))
    assert (effect[:-1] - effect[-1]).tolist() == pytest.approx(np.asarray(robust.params).tolist())
    assert effect.sum() == pytest.approx(0)
    from scipy.stats import f

    assert p == pytest.approx(f.sf(float(np.squeeze(test.fvalue)) * (n - 1) / (n - 3), 3, 99), rel=1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("permute", [False, True])
def test_a_model_that_likes_a_letter_is_flagged_and_one_that_does_not_is_not(seed: int, permute: bool) -> None:
    scored = simulated(400, {"m": 0.5, "fair": 0.5}, seed, letters={"m": 0.25}, permute=permute)
    assert bias_of(scored)["flagged"]
    assert not bias_of(scored, "fair")["flagged"]


def test_fair_models_are_hardly_ever_flagged() -> None:
    flags = [bias_of(simulated(150, {"m": 0.4}, seed, permute=True), draws=1)["flagged"] for seed in range(60)]
    assert sum(flags) <= 3


def test_choices_of_one_letter_raise_no_flag_where_options_are_sorted_but_two_orders_do() -> None:
    scored = simulated(1500, {"m": 0.5}, 3, letters={"m": 0.2})
    assert bias_of(scored)["flagged"]
    row = bias_of(replace(scored, ordered=True))
    assert row["by_options"][0]["fixed_order"] and not row["flagged"]
    both = simulated(1500, {"m": 0.5}, 3, letters={"m": 0.2}, permute=True)
    assert bias_of(replace(both, ordered=True).take(np.arange(len(both))))["flagged"]


def test_a_liking_is_told_by_its_letter() -> None:
    row = bias_of(simulated(1500, {"m": 0.5}, 3, letters={"m": 0.2}, permute=True))
    (choices,) = row["by_options"]
    assert choices["chosen"][0] == pytest.approx(0.25 + 0.2 * 0.75, abs=0.03)
    assert sum(choices["chosen"]) == pytest.approx(1) and not choices["fixed_order"]
    (effect,) = row["permuted"]["by_options"]
    assert effect["letter_effect"][0] - effect["letter_effect"][1] == pytest.approx(0.2, abs=0.04)
    assert row["permuted"]["same"]["value"] < 0.95
    low, high = row["permuted"]["accuracy_change"]["ci95"]
    assert low < 0 < high


def test_a_model_that_goes_by_what_options_say_keeps_its_choice_in_every_order() -> None:
    row = bias_of(simulated(200, {"m": 0.5}, 4, permute=True))
    assert row["permuted"]["same"]["value"] == 1.0
    assert row["permuted"]["accuracy_change"]["difference"] == 0.0
    assert row["permuted"]["accuracy_change"]["p"] == 1.0
    assert row["permuted"]["by_options"][0]["p"] == 1.0


def always(letter: int, event_at: np.ndarray, permute: bool) -> Scored:
    """Yes or no, No in 80 of 100, by a model that always says No, or A."""
    q = len(event_at)
    rng = np.random.default_rng(5)
    answer = np.where(rng.random(q) < 0.2, event_at, 1 - event_at)
    chosen = 1 - event_at if letter < 0 else np.full(q, letter)
    flipped = chosen if letter < 0 else 1 - chosen  # the order turned round: A is the other option
    one, two = (Answered(np.full((q, 2), 0.5), c, np.ones(q, bool), np.zeros(q, np.int64)) for c in (chosen, flipped))
    shown = np.stack([answer, 1 - answer if permute else np.full(q, -1)], axis=1)
    return Scored(
        np.arange(q),
        ("death",) * q,
        ("Outcome",) * q,
        np.full(q, 2),
        answer,
        1 - event_at,
        event_at,
        {},
        {"m": one},
        {"m": two} if permute else {},
        shown,
    )


def test_always_saying_no_is_no_position_bias_where_no_always_stands_at_one_letter() -> None:
    fixed = np.zeros(300, np.int64)
    row = bias_of(always(-1, fixed, permute=False))
    assert row["by_options"][0]["fixed_order"] and row["by_options"][0]["p"] < 1e-6 and not row["flagged"]
    # Asked in both orders, saying No and saying B can be told apart.
    assert not bias_of(always(-1, fixed, permute=True))["flagged"]
    assert bias_of(always(1, fixed, permute=True))["flagged"]
    drawn = np.random.default_rng(6).integers(2, size=300)
    assert not bias_of(always(-1, drawn, permute=False))["flagged"]
    assert bias_of(always(1, drawn, permute=False))["flagged"]


def test_too_few_patients_are_not_reported_and_no_choice_is_no_letter() -> None:
    few = simulated(8, {"m": 0.5}, 7, permute=True)
    assert bias_of(few) == {"by_options": [], "permuted": None, "flagged": False}
    scored = simulated(50, {"m": 0.5}, 7)
    none = replace(scored.models["m"], chosen=np.full(100, -1))
    assert bias_of(replace(scored, models={"m": none}))["by_options"] == []
    effect, p = letter_effect(np.zeros((40, 2), np.int64), np.zeros(40, np.int64), 2, np.arange(40))
    assert p is None and effect.tolist() == [0, 0]
