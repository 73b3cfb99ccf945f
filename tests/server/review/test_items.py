"""The file of items: what is read, and the one line that says why another is not."""

import json
from pathlib import Path

import pytest
from wardround.server.review.items import MAX_LINE_BYTES, ReviewError, read_study

from .study_case import MODELS, item, write_items


def test_a_study_is_read_with_its_header(tmp_path: Path) -> None:
    header = {"data": "open", "title": "Stroke", "language": "ko"}
    found = read_study(write_items(tmp_path / "items.jsonl", [item(1), item(2)], header))
    assert (found.title, found.data, found.language, found.models) == ("Stroke", "open", "ko", MODELS)
    assert [one.id for one in found.items] == ["kept-0001", "kept-0002"]
    values = [entry.value for entry in found.items[0].record]
    assert values == [61, 1.2, None] and isinstance(values[0], int)
    assert found.items[0].record[0].unit == "/min" and len(found.digest) == 64


def test_values_keep_their_kind(tmp_path: Path) -> None:
    entries = [{"section": "s", "label": "l", "value": value} for value in (True, 1, 1.0, "1", None)]
    (found,) = read_study(write_items(tmp_path / "items.jsonl", [item(1, record=entries)])).items
    assert [(type(entry.value), entry.value) for entry in found.record] == [
        (bool, True), (int, 1), (float, 1.0), (str, "1"), (type(None), None),
    ]  # fmt: skip


def test_options_of_the_command_stand_in_for_a_header(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(item(1)) + "\n\n")
    assert read_study(path, "consented", "A title").data == "consented"
    with pytest.raises(ReviewError, match="which kind of records"):
        read_study(path)
    with pytest.raises(ReviewError, match="which kind of records"):
        read_study(path, "real")
    with pytest.raises(ReviewError, match=r"--data open: the header of .* says 'synthetic'"):
        read_study(write_items(path, [item(1)]), "open")


ONE_MODEL = {"answers": {"a": {"text": "t"}}}
OTHERS = {"answers": {"a": {"text": "t"}, "b": {"text": "t"}}}


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (item(2, **ONE_MODEL), "line 3: answers: dictionary should have at least 2"),
        (
            item(2, answers=OTHERS["answers"] | {"c": {"text": "t"}}),
            "line 3: answers: dictionary should have at most 2",
        ),
        (
            item(2, **OTHERS),
            "line 3: answers: expected those of mimosa-7b and omega-13b, as in the first item, got a and b",
        ),
        (item(1), "line 3: id 'kept-0001' is that of line 2"),
        (item(2, answer=1), "line 3: answer: extra inputs"),
        (item(2, record=[]), "line 3: record:"),
        (
            item(2, options=["a"], answers={m: {"text": "t", "chosen": 1} for m in MODELS}),
            "chosen: expected an index below 1",
        ),
        (item(2, record=[{"section": "s", "label": "l", "value": float("nan")}]), "line 3: record.0.value"),
        ({"wardround_review": 1}, "line 3: a header is the first line"),
        ([1], "line 3: expected an object"),
        (item(2, question="x" * MAX_LINE_BYTES), "line 3: expected at most"),
    ],
)
def test_a_line_that_is_not_an_item_is_named(tmp_path: Path, second: object, words: str) -> None:
    path = write_items(tmp_path / "items.jsonl", [item(1), second])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ReviewError) as caught:
        read_study(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "expected items"),
        (b"{", "line 1: expected a line of JSON"),
        (b"\xff\n", "line 1: expected a line of JSON"),
        (b'{"wardround_review": 2}', "reads format 1, got 2"),
        (b'{"wardround_review": 1, "data": "private"}', "line 1: data:"),
        (b'{"wardround_review": 1, "language": "<b>"}', "line 1: language:"),
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_bytes(content)
    with pytest.raises(ReviewError) as caught:
        read_study(path, "open")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ReviewError, match="no such file"):
        read_study(tmp_path / "nothing.jsonl")


def test_models_named_in_answers_are_counted_as_words_only(tmp_path: Path) -> None:
    def answers(text: str) -> dict:
        return {"final": {"text": text}, "base": {"text": "the database, the finally"}}

    items = [item(1, answers=answers("I am FINAL.")), item(2, answers=answers("nothing"))]
    assert read_study(write_items(tmp_path / "items.jsonl", items)).named_in_answers() == 1


def test_a_title_that_names_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReviewError, match="names a model"):
        read_study(write_items(tmp_path / "items.jsonl", [item(1)]), title="Is Omega-13b better?")
