"""Counts pool exactly; intervals and p-values equal those of the answers themselves."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from wardround.common import statistics
from wardround.common.errors import ProtocolError, RegistryError
from wardround.common.question import Question
from wardround.common.statistics import (
    CHANCE_UNIT,
    Tally,
    mcnemar_exact,
    mcnemar_noised,
    summarise,
    tally_size,
    wilson,
)

TARGETS = ["albumin", "sex", "death"]
SECTIONS = {"albumin": "Laboratory", "sex": "Patient", "death": "Outcome"}
MODELS = ("base", "warmup", "final")


@dataclass
class Answered:
    correct: np.ndarray
    boxed: np.ndarray
    length: np.ndarray


def asked(n: int, seed: int, accuracies: tuple[float, ...] = (0.3, 0.4, 0.5)) -> tuple[list[Question], dict]:
    """n questions over TARGETS, and answers of three models that share luck, so that they are paired."""
    rng = np.random.default_rng(seed)
    questions = []
    for target in rng.choice(TARGETS, n, p=[0.6, 0.3, 0.1]):
        n_options = 5 if target == "albumin" else 2
        answer, majority = rng.integers(n_options, size=2)
        options = tuple(str(option) for option in range(n_options))
        questions.append(Question(str(target), SECTIONS[target], "feature", "", options, int(answer), int(majority)))
    luck = rng.random(n) * 0.7
    outcomes = {
        model: Answered(luck + rng.random(n) * 0.3 < share, rng.random(n) < 0.9, rng.integers(0, 48, n))
        for model, share in zip(MODELS, accuracies, strict=True)
    }
    return questions, outcomes


def test_a_summary_says_what_the_answers_say() -> None:
    questions, outcomes = asked(320, seed=1)
    summary = summarise(Tally.of(questions, outcomes, TARGETS), SECTIONS)
    for model in MODELS:
        assert summary[model]["accuracy"] == pytest.approx(outcomes[model].correct.mean(), abs=1e-12)
        assert summary[model]["box_rate"] == pytest.approx(outcomes[model].boxed.mean(), abs=1e-12)
        assert summary[model]["mean_length"] == pytest.approx(outcomes[model].length.mean(), abs=1e-12)
        assert summary[model]["n"] == 320
    assert summary["chance"] == pytest.approx(np.mean([1 / len(q.options) for q in questions]), abs=1e-12)
    assert summary["majority"]["accuracy"] == pytest.approx(np.mean([q.answer == q.majority for q in questions]))
    for target in TARGETS:
        rows = np.array([q.target == target for q in questions])
        group = summary["by_feature"][target]
        assert group["n"] == rows.sum()
        assert group["section"] == SECTIONS[target]
        assert group["final"]["accuracy"] == pytest.approx(outcomes["final"].correct[rows].mean())
    assert summary["by_section"]["Laboratory"]["base"] == summary["by_feature"]["albumin"]["base"]
    difference = outcomes["final"].correct.mean() - outcomes["warmup"].correct.mean()
    assert summary["paired"]["final-warmup"]["difference"] == pytest.approx(difference)
    assert list(summary["paired"]) == ["warmup-base", "final-base", "final-warmup", "final-majority"]
    assert summary["mcnemar_p"] == summary["paired"]["final-base"]["mcnemar_p"]


def test_mcnemar_of_a_summary_is_the_binomial_test_of_the_discordant_answers() -> None:
    questions, outcomes = asked(320, seed=2)
    summary = summarise(Tally.of(questions, outcomes, TARGETS), SECTIONS)
    base, final = outcomes["base"].correct, outcomes["final"].correct
    only_final, only_base = int((final & ~base).sum()), int((base & ~final).sum())
    expected = binomtest(only_final, only_final + only_base, 0.5).pvalue
    assert summary["mcnemar_p"] == pytest.approx(expected, rel=1e-9)


@given(st.integers(0, 400), st.integers(0, 400))
@settings(deadline=None)
def test_exact_mcnemar_is_the_two_sided_binomial_test(b: int, c: int) -> None:
    expected = binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_exact(b, c) == mcnemar_exact(c, b)


def test_exact_mcnemar_has_its_known_values() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(7, 7) == 1.0
    assert mcnemar_exact(0, 6) == 0.03125
    assert mcnemar_exact(0, 4000) == pytest.approx(0.0, abs=1e-300)


def test_bootstrap_from_counts_is_the_bootstrap_of_the_questions() -> None:
    """The same two intervals, once from resampled patterns and once from resampled answers."""
    questions, outcomes = asked(200, seed=3)
    summary = summarise(Tally.of(questions, outcomes, TARGETS), SECTIONS, n_bootstrap=20_000, seed=5)
    rows = np.random.default_rng(6).integers(0, 200, size=(20_000, 200))
    final, base = outcomes["final"].correct.astype(float), outcomes["base"].correct.astype(float)
    for values, got in [
        (final[rows].mean(axis=1), summary["final"]["ci95"]),
        ((final - base)[rows].mean(axis=1), summary["paired"]["final-base"]["ci95"]),
    ]:
        # Resampled shares lie on a grid of 1/200; two bootstraps of 20,000 draws agree to one grid step.
        assert np.allclose(got, np.quantile(values, [0.025, 0.975]), atol=1 / 200 + 1e-9)


def test_bootstrap_intervals_cover_the_truth_about_95_times_in_100() -> None:
    hits_accuracy = hits_difference = 0
    runs, n, truth = 600, 200, np.array([0.25, 0.15, 0.1, 0.5])  # shares of wrong/wrong, only base, only final, both
    rng = np.random.default_rng(4)
    for run in range(runs):
        counts = rng.multinomial(n, truth)
        tally = Tally.empty(["sex"], ["base", "final"])
        tally.patterns[0, [0b000, 0b010, 0b100, 0b110]] = counts
        tally.chance[0] = n * 1260
        summary = summarise(tally, {"sex": "Patient"}, n_bootstrap=1000, seed=run)
        low, high = summary["final"]["ci95"]
        hits_accuracy += low <= 0.6 <= high
        low, high = summary["paired"]["final-base"]["ci95"]
        hits_difference += low <= -0.05 <= high
    # Three standard errors of a coverage of 0.95 over 600 runs: 0.027. Percentile intervals undercover by about 0.01.
    assert 0.915 <= hits_accuracy / runs <= 0.98
    assert 0.915 <= hits_difference / runs <= 0.98


def noised(counts: np.ndarray, noise: float, rng: np.random.Generator) -> Tally:
    """A private run's tally of two models, as common/noisy.py reads it."""
    patterns = np.zeros((1, 8), np.int64)
    patterns[0, [0b000, 0b010, 0b100, 0b110]] = counts
    patterns += np.rint(rng.normal(0.0, noise, 8)).astype(np.int64)
    nothing = np.zeros((1, 2), np.int64)
    chance = np.array([round(max(1, int(patterns.sum())) * CHANCE_UNIT / 2)])
    return Tally(("all",), ("base", "final"), patterns, chance, nothing, nothing, noise)


@pytest.mark.parametrize("noise", [5.0, 20.0])
def test_intervals_of_noised_counts_cover_the_truth_and_those_that_ignore_the_noise_do_not(noise: float) -> None:
    runs, n, truth = 500, 300, np.array([0.25, 0.15, 0.1, 0.5])
    hits, blind, rng = np.zeros(2), np.zeros(2), np.random.default_rng(4)
    for run in range(runs):
        tally = noised(rng.multinomial(n, truth), noise, rng)
        summary = summarise(tally, {"all": "all"}, n_bootstrap=1000, seed=run)
        ignorant = summarise(
            Tally.from_vector(np.maximum(tally.to_vector(), 0), ["all"], ["base", "final"]), {"all": "all"}, 1000, run
        )
        for made, into in ((summary, hits), (ignorant, blind)):
            into += [
                made["final"]["ci95"][0] <= 0.6 <= made["final"]["ci95"][1],
                made["paired"]["final-base"]["ci95"][0] <= -0.05 <= made["paired"]["final-base"]["ci95"][1],
            ]
        for low, high in (summary["final"]["ci95"], summary["paired"]["final-base"]["ci95"]):
            assert -1.0 <= low <= high <= 1.0
    # Four standard errors of a coverage of 0.95 over 500 runs: 0.039; where noise makes n uncertain they are wider.
    assert np.all(hits / runs >= 0.911) and np.all(hits / runs <= 0.99)
    assert np.all(blind / runs < (0.93 if noise < 10 else 0.7))


def test_mcnemar_under_noise_rejects_a_true_null_hypothesis_one_time_in_twenty() -> None:
    rejected, runs, rng = 0, 2000, np.random.default_rng(5)
    for _ in range(runs):
        tally = noised(rng.multinomial(300, [0.3, 0.12, 0.12, 0.46]), 6.0, rng)
        only_final = int(tally.patterns[0, [0b100, 0b101]].sum())
        only_base = int(tally.patterns[0, [0b010, 0b011]].sum())
        rejected += mcnemar_noised(only_final, only_base, 6.0 * 2) < 0.05
    assert 0.03 <= rejected / runs <= 0.07


def test_a_summary_of_noised_counts_says_so_and_of_nothing_but_noise_still_is_one() -> None:
    rng = np.random.default_rng(1)
    summary = summarise(noised(np.array([75, 45, 30, 150]), 5.0, rng), {"all": "all"})
    assert summary["noise"] == 5.0 and summary["by_feature"] == summary["by_section"] == {}
    alone = summary["paired"]["final-base"]
    assert alone["mcnemar_p"] == mcnemar_noised(alone["only_later"], alone["only_earlier"], 10.0)
    empty = summarise(noised(np.zeros(4, np.int64) - 9, 1.0, rng), {"all": "all"})
    assert empty["n"] == 1 and empty["final"]["ci95"] == [0.0, 1.0]
    assert empty["paired"]["final-base"]["ci95"] == [-1.0, 1.0] and empty["final"]["accuracy"] == 0.0
    assert summarise(Tally.of(*asked(50, seed=1), TARGETS), SECTIONS)["noise"] == 0.0


def test_the_detectable_difference_is_found_four_times_in_five() -> None:
    """Of studies whose true difference is the detectable one, about 80 % find it at the 5 % level."""
    rng = np.random.default_rng(8)
    n, lost = 400, 0.10
    tally = Tally.empty(["sex"], ["base", "final"])
    tally.patterns[0, [0b000, 0b010, 0b100, 0b110]] = [120, 40, 68, 172]  # difference 0.07
    tally.chance[0] = n * 1260
    detectable = summarise(tally, {"sex": "Patient"}, seed=0)["paired"]["final-base"]["detectable"]
    found = 0
    for _ in range(1000):
        only_base, only_final, _ = rng.multinomial(n, [lost, lost + detectable, 1 - 2 * lost - detectable])
        found += mcnemar_exact(int(only_final), int(only_base)) < 0.05
    assert 0.70 <= found / 1000 <= 0.90


def test_wilson_intervals_have_their_known_values() -> None:
    # Newcombe (1998), Statistics in Medicine 17, 857: table I, method 3.
    assert wilson(81, 263) == pytest.approx([0.2553, 0.3662], abs=5e-5)
    assert wilson(15, 148) == pytest.approx([0.0624, 0.1605], abs=5e-5)
    assert wilson(0, 20) == pytest.approx([0.0, 0.1611], abs=5e-5)
    assert wilson(1, 29) == pytest.approx([0.0061, 0.1718], abs=5e-5)


def test_sites_pool_to_the_tally_of_all_questions_and_order_does_not_matter() -> None:
    questions, outcomes = asked(300, seed=9)
    whole = Tally.of(questions, outcomes, TARGETS)
    parts = []
    for rows in (slice(0, 10), slice(10, 11), slice(11, 300)):
        part = {m: Answered(o.correct[rows], o.boxed[rows], o.length[rows]) for m, o in outcomes.items()}
        parts.append(Tally.of(questions[rows], part, TARGETS))
    forward = parts[0] + parts[1] + parts[2]
    assert np.array_equal(forward.to_vector(), whole.to_vector())
    assert np.array_equal((parts[2] + parts[0] + parts[1]).to_vector(), whole.to_vector())
    assert summarise(forward, SECTIONS) == summarise(whole, SECTIONS)


def test_a_tally_survives_its_vector_and_a_masked_sum_of_vectors() -> None:
    tally = Tally.of(*asked(50, seed=10), TARGETS)
    vector = tally.to_vector()
    assert vector.dtype == np.int64
    assert vector.shape == (tally_size(TARGETS, MODELS),)
    masks = np.random.default_rng(0).integers(0, 2**32, vector.shape, dtype=np.uint32)
    masked = vector.astype(np.uint32) + masks, vector.astype(np.uint32) - masks
    pooled = (masked[0] + masked[1]).astype(np.int64)
    assert np.array_equal(Tally.from_vector(pooled, TARGETS, MODELS).to_vector(), (tally + tally).to_vector())


def test_chance_is_exact_for_every_number_of_options() -> None:
    assert all(statistics.CHANCE_UNIT % n_options == 0 for n_options in range(1, 11))


def test_a_tally_is_of_one_set_of_targets_and_models() -> None:
    tally = Tally.of(*asked(50, seed=11), TARGETS)
    with pytest.raises(ProtocolError, match="same targets and models"):
        _ = tally + Tally.empty(TARGETS, ["base", "final"])


def test_counts_that_no_questions_could_give_are_refused() -> None:
    good = Tally.of(*asked(50, seed=12), TARGETS).to_vector()
    with pytest.raises(ProtocolError, match="int64"):
        Tally.from_vector(good[:-1], TARGETS, MODELS)
    with pytest.raises(ProtocolError, match="int64"):
        Tally.from_vector(good.astype(np.float64), TARGETS, MODELS)
    for index, value, message in [
        (0, -1, "range"),
        (0, 2**60, "range"),
        (16 * 3, 0, "contradict"),
        (51, 999, "contra"),
    ]:
        bad = good.copy()
        bad[index] = value
        with pytest.raises(ProtocolError, match=message):
            Tally.from_vector(bad, TARGETS, MODELS)


def test_questions_of_unknown_targets_and_missing_answers_are_refused() -> None:
    questions, outcomes = asked(20, seed=13)
    with pytest.raises(ValueError, match="albumin"):
        Tally.of(questions, outcomes, ["sex", "death"])
    with pytest.raises(ValueError, match="expected 19 answers, got 20"):
        Tally.of(questions[:-1], outcomes, TARGETS)
    with pytest.raises(ValueError, match="majority"):
        Tally.empty(TARGETS, ["majority"])


def test_no_questions_at_all_is_one_clear_line() -> None:
    with pytest.raises(RegistryError, match="no held-out question"):
        summarise(Tally.empty(TARGETS, MODELS), SECTIONS)


def test_features_with_few_questions_are_reported_together_only() -> None:
    questions, outcomes = asked(30, seed=14)
    n_death = sum(q.target == "death" for q in questions)
    assert 0 < n_death < 5
    summary = summarise(Tally.of(questions, outcomes, TARGETS), SECTIONS, min_cell=5)
    assert "death" not in summary["by_feature"] and "Outcome" not in summary["by_section"]
    assert summary["small_features"]["features"] == ["death"]
    assert summary["small_features"]["n"] == n_death
    assert "final" not in summary["small_features"]
    assert "death" in summarise(Tally.of(questions, outcomes, TARGETS), SECTIONS, min_cell=1)["by_feature"]


def test_the_summary_of_one_model_compares_it_with_the_majority_option() -> None:
    questions, outcomes = asked(40, seed=15)
    summary = summarise(Tally.of(questions, {"model": outcomes["final"]}, TARGETS), SECTIONS)
    assert list(summary["paired"]) == ["model-majority"]
    assert "mcnemar_p" not in summary


def test_the_seed_decides_the_intervals() -> None:
    tally = Tally.of(*asked(100, seed=16), TARGETS)
    assert summarise(tally, SECTIONS, seed=1) == summarise(tally, SECTIONS, seed=1)
