"""evaluation.json is read back as it was written; another version or another file is refused in one line."""

import json
from pathlib import Path

import pytest
from wardround.common.errors import ConfigError
from wardround.common.evaluation_file import EVALUATION_SCHEMA, evaluation, read_evaluation, write_evaluation
from wardround.common.summary import summarise_task

from .scored_case import simulated


@pytest.fixture(scope="module")
def content() -> dict:
    scored = simulated(40, {"base": 0.4, "final": 0.5}, seed=1, outcome=True, permute=True)
    task = summarise_task(scored, name="mortality", reference="base", final="final", n_bootstrap=50)
    return evaluation([task], provenance={"model": "tiny", "registries": ["made up"]})


def test_what_was_written_is_read_back(content: dict, tmp_path: Path) -> None:
    path = tmp_path / "out" / "evaluation.json"
    write_evaluation(path, content)
    assert read_evaluation(path) == content
    assert content["evaluation_schema"] == EVALUATION_SCHEMA and content["reasoning"] == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"evaluation_schema": 2}, "expected evaluation schema 1, got 2"),
        ({"evaluation_schema": None}, "expected evaluation schema 1, got None"),
        ({"tasks": [{"name": "mortality"}]}, "missing key 'tasks.0.n' (and"),
        ({"more": 1}, "unknown key 'more'"),
    ],
)
def test_another_schema_is_refused_in_one_line(content: dict, tmp_path: Path, change: dict, words: str) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({**content, **change}), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_evaluation(path)
    assert words in str(caught.value) and "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"n": 3}', "[" * 100_000])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="expected"):
        read_evaluation(path)


def test_a_file_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_evaluation(tmp_path / "none.json")


def test_a_figure_that_is_no_number_is_refused_before_it_is_written(content: dict) -> None:
    task = {**content["tasks"][0], "chance": float("nan")}
    with pytest.raises(ValueError, match="chance"):
        evaluation([task])
