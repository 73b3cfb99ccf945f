"""What privacy.json says, in numbers and words."""

import doctest
from importlib import import_module

import pytest
from wardround.common.config import RunConfig
from wardround.server.privacy_report import against, cost, privacy_report, statement

ON = {"enabled": True, "epsilon": 6.0, "delta": 1e-5, "max_grad_norm": 0.5, "declared_patients": 1000}


def config(**privacy: object) -> RunConfig:
    federation = {"rounds": 4, "validation_questions_per_site": 0}
    return RunConfig.model_validate({"name": "t", "privacy": privacy, "federation": federation})


def test_a_run_without_noise_says_in_one_line_that_it_promises_nothing_and_when_to_turn_it_on():
    report = privacy_report(config(enabled=False), {"site-01": 2}, 2)
    assert report.keys() == {"enabled", "statement"} and not report["enabled"]
    assert "no patient-level guarantee" in report["statement"] and "before its first round" in report["statement"]


def test_a_whole_run_costs_what_was_planned_and_a_shorter_one_less():
    whole, short = (privacy_report(config(**ON), {"site-01": rounds}, rounds) for rounds in (4, 1))
    assert whole["epsilon"]["rdp"] == pytest.approx(6.0, rel=2e-3) and whole["epsilon"]["prv"] < 6.0
    assert short["epsilon"]["rdp"] < whole["epsilon"]["rdp"]
    assert [event["kind"] for event in whole["events"]] == ["schema", *["rounds"] * 4, "metrics"]
    assert whole["sites"]["site-01"]["rounds"] == 4


@pytest.mark.parametrize(("epsilon", "found"), [(0.0, 5.0), (1.0, 13.6), (50.0, 100.0)])
def test_the_statement_bounds_the_best_test_of_membership(epsilon: float, found: float):
    assert f"finds at most {found:.1f} in a hundred" in statement(epsilon, 1e-9)


def evaluation(difference: float, half: float) -> dict:
    pair = {"difference": difference, "ci95": [difference - half, difference + half]}
    return {"n": 300, "noise": 6.0, "final": {"accuracy": 0.5, "ci95": [0.42, 0.58]}, "paired": {"final-warmup": pair}}


def test_the_cost_is_the_noise_beside_the_most_that_gradients_can_add_up_to():
    made = config(**ON, noise_multiplier=0.8)
    assert made.grpo.local_steps and made.grpo.patients_per_step
    paid = cost(made, evaluation(0.0, 0.05), updates=12, sites=3, parameters=10_000)
    steps = 12 * made.grpo.local_steps
    # 0.8 C in every coordinate of every step, independent; C from each patient drawn, all in one direction.
    longest = 0.8 * 100 * steps**0.5 / (made.grpo.patients_per_step * steps)
    assert paid["training_noise_ratio"] == pytest.approx(longest)
    assert f"{longest:.1f} times as long" in paid["sentences"][0]
    assert paid["half_interval"] == pytest.approx(0.08)
    assert paid["half_interval_without_noise"] == pytest.approx(1.96 * 0.5 / 300**0.5, rel=1e-3)
    nothing = cost(made, evaluation(0.0, 0.05), updates=0, sites=3, parameters=10_000)
    assert nothing["training_noise_ratio"] is None and len(nothing["sentences"]) == 1


def test_beside_a_run_without_privacy_the_cost_is_the_difference_of_what_the_rounds_added():
    said = against({"name": "demo", **evaluation(0.02, 0.03)}, evaluation(-0.01, 0.04))
    assert "by −1.0 points here and by +2.0 points in 'demo'" in said
    assert "a cost of +3.0 points (95 % interval −2.0 to +8.0)" in said


def test_examples_in_the_docstrings_hold():
    assert doctest.testmod(import_module("wardround.server.privacy_report")).failed == 0
