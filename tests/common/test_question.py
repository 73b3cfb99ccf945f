"""Prompt templates and parsing answers (common/question.py)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wardround.common.errors import ConfigError
from wardround.common.question import LETTERS, PromptTemplate, Question, chat, load_prompt, parse_answer, prefill

TEMPLATES = ["en", "en_short", "en_usual", "ko"]
QUESTION = Question("albumin", "Laboratory", "feature", "record, question, options", ("3.1", "3.5"), 1, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{B}", 1),
        (r"\boxed{ b }", 1),
        (r"\boxed{\text{B}}", 1),
        (r"\boxed{\textbf{ B }}", 1),
        (r"\boxed{\mathrm{B}}", 1),
        (r"\boxed{{B}}", 1),
        (r"\boxed{B.}", 1),
        (r"\boxed{B. 3.5}", 1),
        (r"\boxed{\text{B. 3.5 g/dL}}", 1),
        (r"\boxed{B: Yes}", 1),
        (r"\boxed{B) Yes}", 1),
        (r"\boxed{(B)}", 1),
        (r"\boxed{(B) 3.5}", 1),
        (r"\boxed{$B$}", 1),
        (r"\boxed{**B**}", 1),
        (r"\boxed {B}", 1),
        ("\\boxed{\nB\n}", 1),
        (r"\boxed{\boxed{B}}", 1),
        (r"Therefore, the answer is \boxed{B", 1),
        (r"first \boxed{A}, then \boxed{B}. Done.", 1),
        (r"\boxed{B} and an empty \boxed{}", None),
        (r"\boxed{B} but really \boxed{F}", None),
        (r"\boxed{A fever}", None),
        (r"\boxed{AB}", None),
        (r"\boxed{3.5}", None),
        (r"\boxed{}", None),
        (r"\boxed{", None),
        ("B", None),
        ("The answer is B.", None),
        (r"\box{B}", None),
        ("", None),
    ],
)
def test_the_last_box_counts_and_a_letter_that_is_no_option_is_none(text: str, expected: int | None):
    assert parse_answer(text, 5) == expected


@given(st.integers(2, 10), st.integers(0, 25), st.text(), st.text().filter(lambda text: "\\boxed" not in text))
def test_a_boxed_letter_is_its_index_exactly_when_it_is_an_option(n: int, letter: int, before: str, after: str):
    text = f"{before} \\boxed{{{chr(65 + letter)}}}{after}"
    assert parse_answer(text, n) == (letter if letter < n else None)


@given(st.text(), st.integers(2, 10))
def test_any_text_gives_an_option_or_none(text: str, n: int):
    for whole in (text, "\\boxed{" + text, "\\boxed{" + text + "}"):
        answer = parse_answer(whole, n)
        assert answer is None or 0 <= answer < n


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_shipped_template_loads_and_makes_a_chat(name: str):
    template = load_prompt(name)
    assert template.name == name
    system, user = chat(template, QUESTION)
    assert (system["role"], user["role"]) == ("system", "user")
    assert "\\boxed{}" in system["content"]
    assert user["content"] == QUESTION.text
    assert prefill(template, reasoning=True) == template.cue
    assert prefill(template, reasoning=False).endswith("\\boxed{")
    for index, letter in enumerate(LETTERS):
        assert parse_answer(template.forced + letter + "}", 10) == index


def test_a_template_without_system_message_has_only_the_user():
    template = load_prompt("en").model_copy(update={"system": ""})
    assert [message["role"] for message in chat(template, QUESTION)] == ["user"]


def test_a_template_can_be_given_by_path(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(
        'name="own"\nlanguage="en"\nsystem=""\nline="{label}={value}"\nquestion="{label}?"\noption="{letter} {value}"\n'
        "user='{record} {question} {options}'\ncue=''\nforced='\\boxed{'\n",
        encoding="utf-8",
    )
    assert load_prompt(path).name == "own"
    assert load_prompt(str(path)) == load_prompt(path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"line": "{label}: {worth}"}, "line: expected only"),
        ({"line": "{label} {value"}, "line: expected only"),
        ({"option": "{value}"}, "{letter}"),
        ({"user": "{record} {question}"}, "{options}"),
        ({"forced": "The answer is "}, "forced: expected to end in"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_wrong_template_is_refused_with_its_key(change: dict, expected: str, tmp_path):
    from wardround.common.config import parse

    data = load_prompt("en").model_dump() | change
    with pytest.raises(ConfigError) as error:
        parse(PromptTemplate, data, "own.toml")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_template_names_the_shipped_ones():
    with pytest.raises(ConfigError, match="shipped are en, en_short, en_usual, ko"):
        load_prompt("klingon")


def test_the_digest_of_a_template_covers_every_word() -> None:
    template = load_prompt("en")
    assert template.digest() == load_prompt("en").digest() != load_prompt("en_short").digest()
    for key in PromptTemplate.model_fields:
        assert template.model_copy(update={key: getattr(template, key) + " "}).digest() != template.digest()
