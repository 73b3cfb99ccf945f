"""Two models side by side (common/contrast.py)."""

import json
from pathlib import Path

import numpy as np
import pytest
from wardround.common.contrast import Spoken, export, flag_all, flag_counts, marked, rows, side_by_side
from wardround.common.dictionary import Dictionary
from wardround.common.errors import UserError
from wardround.common.question import LETTERS, PromptTemplate, Question, load_prompt
from wardround.common.reasoning import Flag
from wardround.common.record import record_of
from wardround.simulations.planted_reasoning import open_questions

N = 40


@pytest.fixture(scope="module")
def asked() -> tuple[list[Question], PromptTemplate, Dictionary]:
    template = load_prompt("en_short")
    questions, dictionary = open_questions("synthetic", template, N, np.random.default_rng(0))
    return questions, template, dictionary


def spoken(questions: list[Question], right: list[bool], say: str) -> Spoken:
    chosen = [q.answer if ok else (q.answer + 1) % len(q.options) for q, ok in zip(questions, right, strict=True)]
    return Spoken(chosen, [f"{say} So I choose {LETTERS[c]}. \\boxed{{{LETTERS[c]}}}" for c in chosen])


def models(questions: list[Question]) -> tuple[Spoken, Spoken]:
    """The base is right on every second question, the final model on every third."""
    base = spoken(questions, [i % 2 == 0 for i in range(len(questions))], "All of it looks like a grave illness.")
    final = spoken(questions, [i % 3 == 0 for i in range(len(questions))], "The record shows that the patient is ill.")
    return base, final


def test_questions_that_one_model_got_right_come_gained_first(asked):
    questions, template, dictionary = asked
    base, final = models(questions)
    pairs = side_by_side(questions, template, dictionary, base, final)
    n = len(questions)
    gained = [i for i in range(n) if i % 3 == 0 and i % 2]
    lost = [i for i in range(n) if i % 2 == 0 and i % 3]
    assert [(pair.change, pair.index) for pair in pairs] == [("gained", i) for i in gained] + [
        ("lost", i) for i in lost
    ]
    for pair in pairs:
        assert pair.question is questions[pair.index]
        assert pair.base.text == base.texts[pair.index]
        assert pair.final.chosen == final.chosen[pair.index]


def test_each_side_has_its_own_flags(asked):
    questions, template, dictionary = asked
    question = next(q for q in questions if q.answer and "age" in record_of(q, template, dictionary).values)
    age = record_of(question, template, dictionary).values["age"]
    other = str(90 if int(age) < 60 else 30)
    base = Spoken([0], [f"The age is {other} years, which matters here. \\boxed{{A}}"])
    final = Spoken([question.answer], [f"The age is {age} years, which matters. \\boxed{{{LETTERS[question.answer]}}}"])
    pair = side_by_side([question], template, dictionary, base, final)[0]
    assert pair.change == "gained"
    assert [flag.kind for flag in pair.base.flags] == ["contradicts_record"]
    assert pair.final.flags == ()


def test_counts_say_in_how_many_texts_a_flag_is(asked):
    questions, template, dictionary = asked
    bare = Spoken([0] * len(questions), ["\\boxed{A}"] * len(questions))
    counts = flag_counts(flag_all(questions, template, dictionary, bare))
    assert counts["no_reasoning"] == counts["any"] == len(questions)
    assert counts["contradicts_record"] == 0
    with pytest.raises(ValueError, match="shorter"):
        flag_all(questions, template, dictionary, Spoken([0], ["\\boxed{A}"]))


def test_export_writes_a_line_a_pair_with_quotes_that_are_in_the_text(asked, tmp_path: Path):
    questions, template, dictionary = asked
    base, final = models(questions)
    base = Spoken(base.chosen, ["\\boxed{A}\u2028<b>&" for _ in questions])
    pairs = side_by_side(questions, template, dictionary, base, final)
    path = tmp_path / "pairs.jsonl"
    export(path, pairs, dictionary, names={"base": "model 1", "final": "model 2"})
    assert path.stat().st_mode & 0o777 == 0o600
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert len(lines) == len(pairs)
    for line, pair in zip(lines, pairs, strict=True):
        assert line["format"] == "wardround side by side 1"
        assert line["record"] == [list(one) for one in pair.record.pairs()]
        assert line["answer"] == LETTERS[pair.question.answer]
        assert set(line["models"]) == {"model 1", "model 2"}
        for said in line["models"].values():
            assert all(said["text"][flag["start"] : flag["end"]] == flag["quote"] for flag in said["flags"])
        assert [flag["kind"] for flag in line["models"]["model 1"]["flags"]] == ["no_reasoning"]


def test_a_hospitals_own_questions_are_not_exported(asked, tmp_path: Path):
    questions, template, dictionary = asked
    closed = dictionary.model_copy(update={"public": False})
    pairs = side_by_side(questions, template, closed, *models(questions))
    with pytest.raises(UserError, match="not public"):
        export(tmp_path / "pairs.jsonl", pairs, closed)
    assert list(tmp_path.iterdir()) == []
    assert len(rows(pairs)) == len(pairs)  # for its own report


def test_rows_hold_the_whole_text_in_parts(asked):
    questions, template, dictionary = asked
    for row in rows(side_by_side(questions, template, dictionary, *models(questions))):
        for name in ("base", "final"):
            assert "".join(words for words, _ in row[name]["parts"]) == row[name]["text"]
        assert row["base"]["right"] != row["final"]["right"]


def test_flags_that_overlap_are_both_marked():
    flags = [Flag("no_reasoning", 0, 6, ""), Flag("contradicts_record", 2, 4, "")]
    both = ("contradicts_record", "no_reasoning")
    assert marked("abcdefg", flags) == [
        ("ab", ("no_reasoning",)), ("cd", both), ("ef", ("no_reasoning",)), ("g", ()),
    ]  # fmt: skip
    assert marked("", []) == []
