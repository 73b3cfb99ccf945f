"""The pooled result and the sentences about it."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from wardround.common.errors import ProtocolError
from wardround.common.statistics import Tally, summarise
from wardround.server.evaluate import (
    MODELS,
    baselines,
    evaluate,
    read_samples,
    table,
    verdict,
    without_warmup,
    write_evaluation,
)

SECTIONS = {"albumin": "Laboratory", "sex": "Patient"}


def tally(only_warmup: int, only_final: int, both: int, neither: int, majority: int = 0) -> Tally:
    """Counts of one target's questions; base is always wrong; `majority` of `neither` go to the majority option."""
    result = Tally.empty(list(SECTIONS), ["base", "warmup", "final"])
    result.patterns[0, [0b0100, 0b1000, 0b1100, 0b0000, 0b0001]] = [
        only_warmup,
        only_final,
        both,
        neither - majority,
        majority,
    ]
    result.chance[:] = result.n * 504
    return result


def summary(*counts: int) -> dict:
    return summarise(tally(*counts), SECTIONS, n_bootstrap=4000)


def test_the_result_follows_from_the_sum_of_the_sites_counts() -> None:
    tallies = [tally(3, 5, 20, 22), tally(0, 1, 9, 30), tally(2, 2, 2, 2)]
    total = np.sum([one.to_vector() for one in tallies], axis=0)  # all that a coordinator sees
    evaluation = evaluate(Tally.from_vector(total, list(SECTIONS), MODELS), 3, SECTIONS, 1000, seed=1)
    assert evaluation["n"] == 98
    assert evaluation["sites"] == 3
    assert evaluation["final"]["correct"] == 5 + 20 + 1 + 9 + 2 + 2
    assert evaluation["warmup"]["correct"] == 3 + 20 + 9 + 2 + 2


def test_evaluation_json_has_what_others_rely_on(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "evaluation.json", summary(10, 20, 50, 80))
    written = json.loads((tmp_path / "evaluation.json").read_text())
    for name in ("base", "warmup", "final", "majority"):
        assert set(written[name]) >= {"accuracy", "ci95", "n"}
        low, high = written[name]["ci95"]
        assert 0 <= low <= written[name]["accuracy"] <= high <= 1
    assert isinstance(written["chance"], float)
    assert isinstance(written["mcnemar_p"], float)
    assert set(written["by_feature"]["albumin"]["final"]) >= {"accuracy", "ci95", "n"}
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_the_verdict_says_what_the_interval_says() -> None:
    assert "raised accuracy over the warmed-up model by 12.5 points" in verdict(summary(10, 50, 100, 160))
    assert "lowered accuracy below the warmed-up model's by 12.5 points" in verdict(summary(50, 10, 100, 160))
    nothing = verdict(summary(30, 34, 100, 156))
    assert "cannot be told apart: these rounds added nothing that n = 320 can show (+1.2 points" in nothing
    assert "more than one time in five" in nothing
    assert "changed no result" in verdict(summary(0, 0, 100, 220))


def test_an_interval_without_0_is_not_enough_where_mcnemar_says_otherwise() -> None:
    few = summary(0, 4, 150, 166)  # 4 against 0
    comparison = few["paired"]["final-warmup"]
    assert comparison["ci95"][0] > 0 and comparison["mcnemar_p"] == 0.125
    assert "cannot be told apart" in verdict(few)
    assert "raised accuracy" in verdict(summary(0, 6, 150, 164))  # 6 against 0: p = 0.03
    assert "cannot be told from always" in baselines(summary(0, 0, 4, 316))


def test_without_warm_up_the_table_has_no_column_of_it() -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table(without_warmup(summary(10, 20, 50, 80))))
    assert "warmed up" not in captured.get() and "− base" in captured.get()


def test_answer_only_models_have_no_box_rate() -> None:
    assert summary(10, 20, 50, 80)["final"]["box_rate"] is None
    written = tally(10, 20, 50, 80)
    written.length[:] = 3
    assert summarise(written, SECTIONS, n_bootstrap=1000)["final"]["box_rate"] == 0.0


GOOD = {
    "target": "albumin",
    "section": "Laboratory",
    "text": "record",
    "options": ["3.1", "3.5"],
    "answer": "A",
    "models": {name: {"chosen": "–", "text": ""} for name in ("base", "final")},
}


def test_samples_are_read_with_their_known_keys_and_the_name_of_their_sender() -> None:
    (read,) = read_samples(json.dumps([{**GOOD, "site": "somebody else", "more": 1}]), "site-01", 1)
    assert read == {**GOOD, "site": "site-01"}
    assert read_samples("[]", "site-01", 0) == []


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        "null",
        "[1]",
        json.dumps([GOOD, GOOD]),
        json.dumps([{**GOOD, "text": 4}]),
        json.dumps([{key: GOOD[key] for key in GOOD if key != "answer"}]),
        json.dumps([{**GOOD, "models": {"base": GOOD["models"]["base"]}}]),
        json.dumps([{**GOOD, "options": [1]}]),
        "[" * 100_000,
    ],
)
def test_samples_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ProtocolError, match="samples of site-01: expected at most 1 "):
        read_samples(text, "site-01", 1)


def test_a_run_without_warm_up_is_compared_with_the_base() -> None:
    counts = Tally.empty(["albumin"], ["base", "final"])
    counts.patterns[0, [0b000, 0b100, 0b110]] = [100, 60, 160]
    counts.chance[:] = 320 * 504
    assert "over the base model" in verdict(summarise(counts, SECTIONS, n_bootstrap=1000))


def test_baselines_are_named_honestly() -> None:
    assert "above chance (20.0 %) and is better than always" in baselines(summary(0, 40, 120, 160))
    assert "cannot be told from chance" in baselines(summary(0, 10, 54, 256, 60))
    assert "below chance" in baselines(summary(0, 0, 10, 310, 0))
    assert "worse than always choosing the most frequent option" in baselines(summary(0, 0, 70, 250, 150))


def test_the_terminal_table_names_every_row() -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table(summary(10, 20, 50, 80)))
    text = captured.get()
    for word in ("base", "warmed up", "final", "majority option", "chance", "20.0", "p = ", "43.8", "36.2 to 51.2"):
        assert word in text


def test_examples_in_the_docstrings_hold() -> None:
    import doctest

    assert doctest.testmod(import_module("wardround.server.evaluate")).failed == 0
    assert doctest.testmod(import_module("wardround.common.statistics")).failed == 0
