"""client/ask.py: one question about one record."""

import json
from pathlib import Path

import pytest
from wardround.client.ask import ask, make_question, read_record
from wardround.common.config import QuestionsConfig, RunConfig
from wardround.common.counts import count
from wardround.common.dictionary import load_dictionary
from wardround.common.errors import ConfigError, RegistryError
from wardround.common.question import load_prompt
from wardround.common.schema import Schema, derive_schema
from wardround.simulations import registries

RECORD = {"age": 71, "sex": "Male", "crea1": 2.4, "crea": 3.1, "seps": "Yes", "hospdead": 1}
TEMPLATE = load_prompt("en_usual")
SETTINGS = QuestionsConfig()


@pytest.fixture(scope="module")
def schema() -> Schema:
    registry = registries.load("support_icu")
    return derive_schema(count(registry.values, registry.dictionary), registry.dictionary, SETTINGS)


DICTIONARY = load_dictionary(registries.dictionary_path("support_icu"))


def test_an_outcome_is_asked_over_what_is_known_before_it_and_never_over_itself(schema: Schema) -> None:
    question = make_question(RECORD, "hospdead", DICTIONARY, schema, TEMPLATE, SETTINGS)
    assert question.options == ("no", "yes")
    assert "Age 71 years" in question.text
    assert "2.4" in question.text
    assert "3.1" not in question.text  # of day 3, as the outcome
    assert "Hospital death" not in question.text
    hidden = make_question(RECORD, "sepsis_any", DICTIONARY, schema, TEMPLATE, SETTINGS)
    assert DICTIONARY.feature("seps").label not in hidden.text


def test_a_number_has_the_options_that_are_given_or_quantiles_of_the_schema(schema: Schema) -> None:
    given = make_question(RECORD, "bun", DICTIONARY, None, TEMPLATE, SETTINGS, ["10", "60"])
    assert given.options == ("10", "60")
    found = make_question(RECORD, "bun", DICTIONARY, schema, TEMPLATE, SETTINGS).options
    assert len(found) == 5
    assert [float(option) for option in found] == sorted(float(option) for option in found)
    with pytest.raises(ConfigError, match="give its options with --option"):
        make_question(RECORD, "bun", DICTIONARY, None, TEMPLATE, SETTINGS)


@pytest.mark.parametrize(
    ("record", "target", "options", "said"),
    [
        ({"pulse": 3}, "hospdead", [], "no column 'pulse'"),
        ({"age": 71}, "pulse", [], "no such feature"),
        ({"age": 700, "sex": "Male"}, "hospdead", [], "'age' has a value that the dictionary does not know"),
        ({"sex": "other"}, "hospdead", [], "'sex': row 1: a level that is not in the dictionary"),
        ({"hospdead": 1}, "hospdead", [], "no usable feature"),
        ({"crea": 3.1}, "hospdead", [], "no value that may be shown"),
        ({"sex": "Male"}, "hospdead", ["no"], "expected 2 to 10"),
        ({"age": 71}, "hospdead", ["no", "no"], "different"),
    ],
)
def test_what_cannot_be_asked_is_refused_without_a_value_in_the_message(record, target, options, said) -> None:
    with pytest.raises((ConfigError, RegistryError), match=said) as caught:
        make_question(record, target, DICTIONARY, None, TEMPLATE, SETTINGS, options)
    assert "700" not in str(caught.value)
    assert "other" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"age": [1]}'])
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(RegistryError, match=r"r\.json"):
        read_record(tmp_path / "r.json")
    with pytest.raises(RegistryError, match="cannot be read"):
        read_record(tmp_path / "none.json")


def test_the_answer_has_a_probability_of_every_option_and_its_words(tmp_path: Path, tiny_model_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(RECORD))
    question = make_question(read_record(tmp_path / "r.json"), "hospdead", DICTIONARY, None, TEMPLATE, SETTINGS)
    config = RunConfig.model_validate(
        {"name": "t", "privacy": {"enabled": False}, "model": {"id": str(tiny_model_path), "device": "cpu"}}
    )
    answer = ask(config, question, TEMPLATE, words=6)
    assert sum(answer.probabilities) == pytest.approx(1)
    assert len(answer.probabilities) == len(answer.options) == 2
    assert answer.text.startswith(TEMPLATE.cue)
    assert ask(config, question, TEMPLATE, words=0).text == ""
