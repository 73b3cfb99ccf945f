"""What privacy.json says, in numbers and words."""

import doctest
from importlib import import_module

import pytest
from wardround.common.config import RunConfig
from wardround.server.privacy_report import privacy_report, statement

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


def test_examples_in_the_docstrings_hold():
    assert doctest.testmod(import_module("wardround.server.privacy_report")).failed == 0
