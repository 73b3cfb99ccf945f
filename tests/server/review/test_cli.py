"""`wardround server review` as the one who runs a study calls it: output, exit codes, files."""

import csv
import io
import json
from pathlib import Path

import pytest
from wardround.common.cli import main
from wardround.server.review import raters
from wardround.server.review.database import Database
from wardround.server.review.ratings import Rating, rate
from wardround.server.review.serve import address

from .study_case import MODELS, item, study, visitor, write_items


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one `wardround server review` command."""
    try:
        main(["server", "review", *(str(arg) for arg in args)])
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line of a command that ends with exit code 2."""
    code, out, err = run(capsys, *args)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, (code, out, err)
    return err


@pytest.fixture
def rated(tmp_path: Path) -> Path:
    """A study that two people have rated whole."""
    with study(tmp_path) as database:
        for number, name in enumerate(("Kim", "Lee"), 1):
            raters.invite(database, name)
            for row in database.all("SELECT place, item FROM slots WHERE rater = ?", number):
                rate(database, number, row["place"], Rating((row["item"] + number) % 5 - 2, comment="=1+1"))
    return tmp_path / "study"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--listen", "0.0.0.0:8421"), "must not cross a network in the clear"),
        (("--listen", "[::]:8421"), "must not cross a network in the clear"),
        (("--listen", "review.example.org:8421"), "must not cross a network in the clear"),
        (("--listen", "8421"), "expected HOST:PORT"),
        (("--listen", "127.0.0.1:0"), "expected HOST:PORT"),
        (("--certificate", "a.pem"), "name both or neither"),
        (("--certificate", "a.pem", "--key", "b.pem"), "cannot be used for TLS"),
        (("--data", "real"), "Expected --data synthetic, consented or open"),
        (("--title", "omega-13b"), "names a model"),
    ],
)
def test_a_start_that_cannot_be_is_refused_before_anything_is_made(tmp_path: Path, capsys, arguments, words) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(item(1)) + "\n")
    more = () if "--data" in arguments else ("--data", "open")
    assert words in refused(capsys, "start", tmp_path / "study", "--items", path, *more, *arguments)
    assert not (tmp_path / "study").exists()


def test_a_study_keeps_its_items_and_settings(tmp_path: Path, capsys) -> None:
    study(tmp_path).close()
    other = write_items(tmp_path / "other.jsonl", [item(7)])
    assert "of other items or settings" in refused(capsys, "start", tmp_path / "study", "--items", other)
    same = ("start", tmp_path / "study", "--items", tmp_path / "items.jsonl")
    assert "of other items or settings" in refused(capsys, *same, "--twice", "0.3")
    assert "name its --items" in refused(capsys, "start", tmp_path / "study", "--data", "open")
    assert "no review is there" in refused(capsys, "start", tmp_path / "nothing")


def test_loopback_needs_no_certificate_in_any_of_its_names() -> None:
    for listen in ("127.0.0.1:1", "127.8.9.1:1", "[::1]:1", "localhost:1"):
        assert address(listen, None, None).loopback
    assert address("[::1]:81", None, None).url == "http://[::1]:81/"


def test_invite_prints_each_token_once_and_again_replaces_it(tmp_path: Path, capsys) -> None:
    study(tmp_path).close()
    code, out, _ = run(capsys, "invite", tmp_path / "study", "Dr Kim", "Dr Lee")
    tokens = dict(line.split("\t") for line in out.splitlines())
    assert code == 0 and list(tokens) == ["Dr Kim", "Dr Lee"] and all(len(token) == 46 for token in tokens.values())
    assert "invited already" in refused(capsys, "invite", tmp_path / "study", "Dr Kim")
    _, out, _ = run(capsys, "invite", tmp_path / "study", "Dr Kim", "--again")
    assert out.startswith("Dr Kim\twr-") and tokens["Dr Kim"] not in out
    assert "is not invited" in refused(capsys, "invite", tmp_path / "study", "Dr Park", "--again")


def test_export_names_models_but_not_raters_and_guards_spreadsheets(rated: Path, capsys) -> None:
    code, out, _ = run(capsys, "export", rated)
    table = list(csv.DictReader(io.StringIO(out)))
    assert code == 0 and len(table) == 44 and "Kim" not in out
    assert {row["rater"] for row in table} == {"rater-1", "rater-2"}
    assert {row["preferred"] for row in table} == {*MODELS, "equal"}
    assert {row["comment"] for row in table} == {"'=1+1"}
    assert sum(bool(row["repeats_pair"]) for row in table) == 4
    target = rated.parent / "out" / "ratings.jsonl"
    code, out, err = run(capsys, "export", rated, "--format", "jsonl", "--names", "--out", target)
    lines = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert code == 0 and out == "" and "44 ratings" in err and {line["rater"] for line in lines} == {"Kim", "Lee"}
    assert {line["comment"] for line in lines} == {"=1+1"}
    assert "exists already" in refused(capsys, "export", rated, "--out", target)


def test_the_trail_tells_who_rated_and_who_looked(rated: Path, capsys) -> None:
    run(capsys, "stats", rated)
    run(capsys, "export", rated)
    code, out, _ = run(capsys, "export", rated, "--trail", "--format", "jsonl")
    entries = [json.loads(line) for line in out.splitlines()]
    actions = [entry["action"] for entry in entries]
    assert code == 0 and actions.count("rated") == 44 and actions[-2:] == ["statistics computed", "ratings exported"]
    assert [entry["n"] for entry in entries] == list(range(1, len(entries) + 1))
    assert {entry["rater"] for entry in entries} == {None, "rater-1", "rater-2"}
    assert min(entry["place"] for entry in entries if entry["place"] is not None) == 1  # as raters count them


def test_statistics_are_printed_for_people_and_for_programs(rated: Path, capsys) -> None:
    code, out, _ = run(capsys, "stats", rated)
    assert code == 0
    for words in (
        "A study: omega-13b against mimosa-7b, 20 items, synthetic records",
        "rated: rater-1 22 of 22, rater-2 22 of 22", "95 % interval", "Bradley-Terry log-odds of omega-13b",
        "Krippendorff's alpha", "self-consistency", "Laboratory",
    ):  # fmt: skip
        assert words in out, words
    found = json.loads(run(capsys, "stats", rated, "--json")[1])
    assert found["version"] == 1 and found["people"]["preference"]["n"] == 40 and found["judges"] is None


def test_with_one_rater_the_command_says_what_is_not_possible_and_gives_the_rest(tmp_path: Path, capsys) -> None:
    with study(tmp_path) as database:
        visitor(database, "Kim").rate(1, "first-much")
    code, out, _ = run(capsys, "stats", tmp_path / "study")
    assert code == 0 and "not possible: Krippendorff's alpha: needs two raters or more" in out and "preferred 1" in out


def test_a_changed_trail_is_one_line_and_exit_2(rated: Path, capsys) -> None:
    with Database.open(rated) as database, database.transaction():
        database.write("UPDATE slots SET detail = replace(detail, '=1+1', 'better') WHERE place = 3")
    for command in ("stats", "export"):
        assert "not those that the trail tells of" in refused(capsys, command, rated)


def test_a_judges_pairs_go_out_blinded_and_come_back_rated(tmp_path: Path, capsys) -> None:
    with study(tmp_path) as database:
        raters.invite(database, "Kim")
    folder, pairs, ratings = tmp_path / "study", tmp_path / "pairs.jsonl", tmp_path / "ratings.jsonl"
    assert "has no pairs yet" in refused(capsys, "judge", folder, "program", "--ratings", ratings)
    assert run(capsys, "judge", folder, "program", "--pairs", pairs)[0] == 0
    text = pairs.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(lines) == 22 and not any(word in text for word in (*MODELS, "kept-0", "Lactate"))
    assert set(lines[0]) == {"pair", "record", "question", "options", "first", "second"}

    def answer(*changes: dict) -> None:
        said = [{"pair": line["pair"], "preference": "first-much", "reasons": ["record"]} for line in lines]
        ratings.write_text(
            "".join(json.dumps(one | change) + "\n" for one, change in zip(said, changes or said, strict=False))
        )

    wrong = (
        ({"preference": "a"}, "Choose"),
        ({"pair": 23}, "pair 23"),
        ({"m": 1}, "Extra inputs"),
        ({"pair": "x"}, "int"),
    )
    for change, words in wrong:
        answer({}, change)
        line = refused(capsys, "judge", folder, "program", "--ratings", ratings)
        assert "line 2: " in line and words in line
    found = json.loads(run(capsys, "stats", folder, "--json")[1])
    assert found["judges"] is None  # nothing of a wrong file was kept
    answer()
    assert "22 ratings kept" in run(capsys, "judge", folder, "program", "--ratings", ratings)[2]
    found = json.loads(run(capsys, "stats", folder, "--json")[1])
    assert found["people"] is None and found["judges"]["position"]["share"] == 1.0
    assert "is a person" in refused(capsys, "judge", folder, "kim", "--pairs", tmp_path / "more.jsonl")
    assert "expected --pairs FILE" in refused(capsys, "judge", folder, "program")


def test_every_command_shows_an_example(capsys) -> None:
    for command in ("start", "invite", "judge", "export", "stats"):
        code, out, _ = run(capsys, command, "--help")
        assert code == 0 and "Example" in out and f"wardround server review {command}" in " ".join(out.split())
