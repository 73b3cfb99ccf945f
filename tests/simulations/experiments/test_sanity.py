"""The sanity experiment's graph, its best answers, and its verdict."""

import doctest
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from wardround.common.config import RunConfig, load_run
from wardround.common.schema import share_given_away
from wardround.simulations.experiments import sanity


def test_the_best_accuracy_is_that_of_counting_over_a_large_sample() -> None:
    table, _ = sanity.make(400_000, seed=1)
    codes = table[list(sanity.LEVELS)].apply(lambda column: column.astype("category").cat.codes)
    for target in sanity.LEVELS:
        others = [name for name in sanity.LEVELS if name != target]
        counts = codes.groupby([*others, target]).size()
        best = counts.groupby(others).max().sum() / len(codes)
        # The largest of noisy counts is a little too large, by about one standard deviation of a cell.
        assert best == pytest.approx(sanity.best_accuracy(target), abs=0.03), target


def test_every_level_is_equally_frequent_and_nothing_is_a_shortcut() -> None:
    table, _ = sanity.make(40_000, seed=2)
    for name, levels in sanity.LEVELS.items():
        assert table[name].value_counts(normalize=True).to_numpy() == pytest.approx(1 / len(levels), abs=0.02)
    for x in sanity.LEVELS:
        for y in sanity.LEVELS:
            if x != y:
                assert share_given_away(pd.crosstab(table[x], table[y]).to_numpy()) < 0.5


def test_features_that_depend_on_nothing_have_no_better_answer_than_chance() -> None:
    for name in sanity.INDEPENDENT:
        assert sanity.best_accuracy(name) == pytest.approx(1 / len(sanity.LEVELS[name]))
    assert all(sanity.best_accuracy(name) > 1 / len(sanity.LEVELS[name]) + 0.3 for name in sanity.DEPENDENT)


def evaluation(shares: dict[str, float], n: int = 400) -> dict:
    groups = {}
    for name, levels in sanity.LEVELS.items():
        chance = 1 / len(levels)
        accuracy = chance + shares.get(name, 0.9) * (max(sanity.best_accuracy(name), chance + 0.2) - chance)
        if name in sanity.INDEPENDENT and name not in shares:
            accuracy = chance
        half = 2 * np.sqrt(accuracy * (1 - accuracy) / n)
        entry = {"accuracy": accuracy, "ci95": [accuracy - half, accuracy + half], "n": n}
        groups[name] = {"final": entry, "warmup": entry}
    return {"by_feature": groups}


def test_a_dependent_feature_that_falls_short_and_an_independent_one_above_chance_fail() -> None:
    assert sanity.compare(evaluation({}))["passed"]
    short = sanity.compare(evaluation({"reading_b": 0.7}))
    assert not short["passed"] and not short["features"]["reading_b"]["passed"]
    assert short["features"]["reading_b"]["share"] == pytest.approx(0.7)
    leaky = sanity.compare(evaluation({"noise_f": 1.0}))
    assert not leaky["passed"] and not leaky["features"]["noise_f"]["passed"]


def test_a_whole_run_on_the_tiny_model_scores_every_feature(tiny_model_path: Path, tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {
            **load_run(Path("sanity")).model_dump(exclude={"model", "warmup", "federation"}),
            "model": {"id": str(tiny_model_path), "device": "cpu", "prompt": "en_short"},
            "warmup": {"enabled": False},
            "federation": {"rounds": 1, "validation_questions_per_site": 3},
        }
    )
    grpo = config.grpo.model_copy(update={"local_steps": 1, "patients_per_step": 4.0})
    config = config.model_copy(update={"grpo": grpo})
    result = sanity.run(config, tmp_path, resume=False, n_patients=900)
    assert set(result["features"]) == set(sanity.LEVELS)
    assert not result["passed"]  # its texts are noise: it has learnt nothing in one step
    assert (tmp_path / "sanity.json").is_file() and (tmp_path / "run" / "report.html").is_file()


def test_federated_training_finds_every_relation_of_the_registry_and_nothing_else(tmp_path: Path) -> None:
    """The whole product on a small model: secure sums of adapter updates, until its answers are the best there are."""
    result = sanity.run(load_run(Path("sanity")), tmp_path, resume=False)
    assert result["passed"], {name: found["share"] for name, found in result["features"].items()}
    assert all(found["warmup"] < found["chance"] + 0.1 for found in result["features"].values())


def test_examples_in_docstrings_hold() -> None:
    assert doctest.testmod(import_module("wardround.simulations.experiments.sanity")).failed == 0
