"""`wardround client …` and `wardround evaluate` as a data manager runs them: output, exit codes, files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from wardround.client.registry import read_registry, split_rows
from wardround.common.cli import main
from wardround.common.dictionary import Dictionary, dump_dictionary, load_dictionary
from wardround.common.errors import UserError
from wardround.simulations import registries, synthetic_registry

DICTIONARY = """
name = "ward"
title = "A ward"
[[features]]
name = "pid"
label = "Patient"
role = "id"
[[features]]
name = "age"
label = "Age"
section = "Who"
kind = "number"
low = 18
high = 110
[[features]]
name = "sex"
label = "Sex"
section = "Who"
levels = { "1" = "male", "2" = "female" }
[[features]]
name = "crea"
label = "Creatinine"
section = "Labs"
kind = "number"
unit = "mg/dL"
low = 0.2
high = 26
decimals = 1
"""
HEADER = "pid,age,sex,crea"
GOOD = ["a,40,1,1.0", "b,50,2,1.5", "c,60,1,0.8"]


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command."""
    try:
        main([str(arg) for arg in args])
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def ward(tmp_path: Path) -> Path:
    (tmp_path / "ward.toml").write_text(DICTIONARY)
    (tmp_path / "good.csv").write_text("\n".join([HEADER, *GOOD]) + "\n")
    return tmp_path


def test_a_clean_table_passes_and_shows_its_quality(ward: Path, capsys):
    code, out, err = run(capsys, "client", "check", ward / "good.csv", ward / "ward.toml")
    assert (code, err) == (0, "")
    assert "3 rows, 3 patients" in out and "Creatinine" in out and out.rstrip().endswith("clean")


BROKEN: list[tuple[str, bytes, str]] = [
    ("ragged", b"a,40,1,1.0\nb,50,2\n", "row 2 (line 3) has 3 cells, expected 4 as in the header"),
    ("latin-1", "a,40,1,1.0\nJosé,50,2,1.5\n".encode("latin-1"), "row 2 (line 3) is not UTF-8 text"),
    ("text in a number", b"a,40,1,1.0\nb,fifty,2,1.5\nc,60,1,1\n", "column 'age': row 2: expected a number, got text"),
    (
        "unknown level",
        b"a,40,1,1.0\nb,50,3,1.5\nc,60,2,1\n",
        "column 'sex': row 2: a level that is not in the dictionary",
    ),
    ("empty id", b"a,40,1,1.0\n,50,2,1.5\n", "column 'pid': the patient id is empty in row 2"),
    ("no rows", b"", "the table has no rows"),
    ("one level", b"a,40,1,1.0\nb,50,1,1.5\n", "column 'sex' has one value in every row: a feature with one level"),
    ("all missing", b"a,,,\nb,,,\n", "no usable feature"),
    ("wrong unit", b"a,40,1,88\nb,50,2,132\nc,60,1,71\n", "as µmol/L nearly all would fit"),
    ("decimal comma", b'a,40,1,"1,0"\nb,50,2,"1,5"\n', "got one with a decimal comma; write decimals with a point"),
    ("unclosed quote", b'a,40,1,"1.0\nb,50,2,1.5\n', "row 1: a quotation mark is not closed"),
    ("unclosed quote in a word", b'a,40,1,1.0\n"b,50,2,1.5\nc,60,1,2\n', "row 2: a quotation mark is not closed"),
]


@pytest.mark.parametrize(("rows", "line"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_broken_table_is_one_line_and_exit_2(ward: Path, capsys, rows: bytes, line: str):
    (ward / "t.csv").write_bytes(HEADER.encode() + b"\n" + rows)
    code, _, err = run(capsys, "client", "check", ward / "t.csv", ward / "ward.toml")
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    assert line in err and "t.csv" in err


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("none.csv", None, "no such table"),
        ("t.xlsx", b"PK", "expected a .csv, .tsv or .parquet file, got '.xlsx'"),
        ("t.parquet", b"PAR1 not really PAR1", "not a Parquet file, or damaged"),
        ("t.csv", b"pid,pid,age,sex,crea\na,a,40,1,1.0\n", "patient id column 'pid' occurs 2 times; keep one"),
        ("t.csv", b"pid,age,sex,crea,age\na,40,1,1.0,40\n", "column 'age' occurs 2 times; keep one"),
        ("t.csv", b"pid,years,sex,crea\na,40,1,1.0\nb,50,2,1.5\n", "no column 'age'"),
        ("t.csv", b"pid,age,sex,crea,surname\na,40,1,1.0,x\nb,50,2,1.5,y\n", "column 'surname' looks like a name"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line_and_exit_2(ward: Path, capsys, name: str, content, line: str):
    if content is not None:
        (ward / name).write_bytes(content)
    code, _, err = run(capsys, "client", "check", ward / name, ward / "ward.toml")
    assert code == 2 and line in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ('levels = { "1" = "male", "2" = "female" }', 'levels = { "1" = "male" }', "needs at least 2 levels, got 1"),
        ('label = "Age"\n', "", "feature 'age': missing key 'label'"),
        ('role = "id"', 'role = "excluded"\nreason = "x"', "expected one feature with role = 'id'"),
        ("high = 110", "hihg = 110", "feature 'age': unknown key 'hihg'"),
        ('name = "age"', 'name = "pid"', "feature 'pid' is described twice"),
    ],
)
def test_a_broken_dictionary_is_one_line_and_exit_2(ward: Path, capsys, old: str, new: str, line: str):
    assert old in DICTIONARY
    (ward / "bad.toml").write_text(DICTIONARY.replace(old, new))
    code, _, err = run(capsys, "client", "check", ward / "good.csv", ward / "bad.toml")
    assert code == 2 and line in err and "bad.toml" in err and err.count("\n") == 1


def test_check_shows_the_mapping_of_site_toml(ward: Path, capsys):
    (ward / "local.csv").write_text("nr,alter,sex,krea\na,40,M,88.4\nb,50,W,132.6\n")
    (ward / "site.toml").write_text(
        'name = "east"\ntable = "local.csv"\ndictionary = "ward.toml"\n'
        '[mapping.columns]\npid = "nr"\nage = "alter"\ncrea = "krea"\n'
        '[mapping.units]\ncrea = "µmol/L"\n[mapping.levels.sex]\nM = "1"\nW = "2"\n',
        encoding="utf-8",
    )
    args = ("client", "check", ward / "local.csv", ward / "ward.toml", "--site", ward / "site.toml")
    code, out, err = run(capsys, *args)
    assert (code, err) == (0, "")
    assert "krea" in out and "µmol/L" in out and "mg/dL" in out and "'2' (female)" in out
    content = json.loads(run(capsys, *args, "--json")[1])
    assert content["clean"] is True and len(content["mapping"]) == 6
    assert {column["name"] for column in content["columns"]} == {"age", "sex", "crea"}


def test_json_of_an_unclean_table_still_exits_2(ward: Path, capsys):
    (ward / "t.csv").write_text(HEADER + "\na,40,1,1.0\nb,50,1,1.5\n")
    code, out, err = run(capsys, "client", "check", ward / "t.csv", ward / "ward.toml", "--json")
    content = json.loads(out)
    assert code == 2 and content["clean"] is False and content["findings"][0]["column"] == "sex" and err


@pytest.mark.parametrize("name", registries.NAMES)
def test_check_of_each_built_registry_is_clean(name: str, tmp_path: Path, capsys):
    try:
        table, _ = registries.write(name, tmp_path)
    except UserError as error:
        pytest.skip(str(error))
    code, out, err = run(capsys, "client", "check", table, name)
    assert (code, err) == (0, "") and out.rstrip().endswith("clean")


def test_a_dictionary_is_drafted_to_the_screen_or_a_new_file(ward: Path, capsys):
    table = ward / "long.csv"
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"pid": range(50), "age": rng.integers(20, 90, 50), "crea": rng.uniform(1, 5, 50).round(1)})
    frame.to_csv(table, index=False)
    code, out, err = run(capsys, "client", "dictionary", table)
    assert code == 0 and 'name = "age"' in out and "TODO" in out and "3 entries" in err
    assert run(capsys, "client", "dictionary", table, "--out", ward / "new" / "d.toml")[0] == 0
    assert load_dictionary(ward / "new" / "d.toml").id_column == "pid"
    code, _, err = run(capsys, "client", "check", table, ward / "new" / "d.toml")
    assert code == 2 and err == f"error: {table}: the dictionary: its title still says TODO\n"
    finished = (ward / "new" / "d.toml").read_text().replace('title = "TODO: what long is"', 'title = "A ward"')
    (ward / "finished.toml").write_text(finished)
    assert run(capsys, "client", "check", table, ward / "finished.toml")[0] == 0
    code, _, err = run(capsys, "client", "dictionary", table, "--out", ward / "new" / "d.toml")
    assert code == 2 and "exists already" in err
    code, _, err = run(capsys, "client", "dictionary", ward / "none.csv", "--out", ward / "other" / "d.toml")
    assert code == 2 and not (ward / "other").exists()


def test_questions_are_shown_as_the_model_sees_them_with_the_truth(tmp_path: Path, capsys):
    frame, dictionary = synthetic_registry.make(400, seed=3)
    frame.to_parquet(tmp_path / "t.parquet")
    (tmp_path / "d.toml").write_text(dump_dictionary(dictionary))
    args = ("client", "questions", tmp_path / "t.parquet", tmp_path / "d.toml", "-n", 4, "--seed", 5)
    code, out, _ = run(capsys, *args)
    assert code == 0
    assert out.startswith("Options and hidden features come from this table's own counts (400 rows)")
    assert out.count("→ truth: ") == 4 and out.count("[system]") == 4 and "\\boxed{" in out
    assert run(capsys, *args)[1] == out  # the seed decides
    korean = run(capsys, *args, "--prompt", "ko", "--reasoning")[1]
    assert "단계별로" in korean
    code, _, err = run(capsys, *args, "--prompt", "klingon")
    assert code == 2 and err.count("\n") == 1


def test_evaluate_scores_a_model_folder_and_writes_the_agreed_shape(tmp_path: Path, capsys, tiny_model_path: Path):
    frame, dictionary = synthetic_registry.make(300, seed=4)
    frame.to_parquet(tmp_path / "t.parquet")
    (tmp_path / "d.toml").write_text(dump_dictionary(dictionary))
    args = ["evaluate", tiny_model_path, tmp_path / "t.parquet", tmp_path / "d.toml", "-n", 30]
    args += ["--set", "evaluation.bootstrap_samples=200"]
    code, out, err = run(capsys, *args, "--out", tmp_path / "new" / "score.json")
    result = json.loads((tmp_path / "new" / "score.json").read_text())
    assert code == 0 and "majority" in out
    # Something is said before the model is loaded, and then what is asked is counted, not what was allowed.
    assert err == "questions: 0/30 loading the model\nquestions: 30/30 16 at a time\n"
    assert {"accuracy", "ci95", "n"} <= set(result["model"]) and result["model"]["n"] == 30
    assert 0 < result["chance"] < 1 and result["by_feature"] and result["majority"]["n"] == 30
    assert result["provenance"]["registry_digest"] and result["provenance"]["split_key"] == "public"
    run(capsys, *args, "--out", tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == result  # same model, table, seed: same score


def test_evaluate_exports_its_questions_for_the_harness_only_where_they_may_go(
    tmp_path: Path, capsys, tiny_model_path: Path
):
    frame, dictionary = synthetic_registry.make(300, seed=4)
    frame.to_parquet(tmp_path / "t.parquet")
    (tmp_path / "closed.toml").write_text(dump_dictionary(dictionary.model_copy(update={"public": False})))
    args = ["evaluate", tiny_model_path, tmp_path / "t.parquet", tmp_path / "closed.toml", "-n", 20]
    args += ["--set", "evaluation.bootstrap_samples=200", "--out", tmp_path / "s.json"]
    code, _, err = run(capsys, *args, "--export-harness", tmp_path / "task")
    assert code == 2 and "--inside-hospital" in err and err.count("\n") == 1
    assert not (tmp_path / "task").exists() and not (tmp_path / "s.json").exists()
    code, _, _ = run(capsys, *args, "--export-harness", tmp_path / "task", "--inside-hospital")
    lines = (tmp_path / "task" / "questions.jsonl").read_text().splitlines()
    assert code == 0 and len(lines) == json.loads((tmp_path / "s.json").read_text())["n"] == 20
    code, _, err = run(capsys, *args, "--export-harness", tmp_path / "task", "--inside-hospital")
    assert code == 2 and "exists already" in err


def test_evaluate_puts_a_peft_adapter_on_the_model(tmp_path: Path, capsys, tiny_model_path: Path):
    from wardround.common.config import LoraConfig, ModelConfig
    from wardround.common.lm import models

    frame, dictionary = synthetic_registry.make(300, seed=4)
    frame.to_parquet(tmp_path / "t.parquet")
    (tmp_path / "d.toml").write_text(dump_dictionary(dictionary))
    lm = models.load(ModelConfig(id=str(tiny_model_path)), LoraConfig(rank=4, alpha=8.0), seed=0)
    lm.set_vector(np.random.default_rng(0).normal(0, 2, lm.vector().size).astype(np.float32))
    lm.save_adapter(tmp_path / "adapter")
    args = ["evaluate", tiny_model_path, tmp_path / "t.parquet", tmp_path / "d.toml", "-n", 40]
    scores = {}
    for name, extra in (("base", []), ("adapted", ["--adapter", tmp_path / "adapter"])):
        out = tmp_path / f"{name}.json"
        code, _, _ = run(capsys, *args, *extra, "--out", out)
        assert code == 0
        scores[name] = json.loads(out.read_text())
    assert scores["base"]["majority"] == scores["adapted"]["majority"]  # the same questions
    assert scores["base"]["by_feature"] != scores["adapted"]["by_feature"]  # other answers


def trained_model(tiny: Path, folder: Path, dictionary: Dictionary, **facts: object) -> Path:
    """A model folder as a run over this dictionary leaves it."""
    shutil.copytree(tiny, folder)
    (folder / "provenance.json").write_text(json.dumps({"dictionary_digest": dictionary.digest(), **facts}))
    return folder


def test_evaluate_leaves_out_the_training_patients_of_the_run_that_made_the_model(
    tmp_path: Path, capsys, tiny_model_path: Path
):
    frame, dictionary = synthetic_registry.make(300, seed=4)
    frame.to_parquet(tmp_path / "t.parquet")
    (tmp_path / "d.toml").write_text(dump_dictionary(dictionary))
    key = "5e" * 32
    registry = read_registry(tmp_path / "t.parquet", dictionary)
    held_out = len(set(registry.patients[split_rows(registry, bytes.fromhex(key))["test"]]))
    model = trained_model(tiny_model_path, tmp_path / "model", dictionary, split_key=key)
    args = ["evaluate", model, tmp_path / "t.parquet", tmp_path / "d.toml", "--set", "evaluation.bootstrap_samples=200"]
    code, out, err = run(capsys, *args, "--out", tmp_path / "score.json", "--json")
    result = json.loads(out)
    assert code == 0 and result == json.loads((tmp_path / "score.json").read_text())
    assert (result["provenance"]["split_key"], result["provenance"]["test_patients"]) == ("run", held_out)
    assert err == ""

    other = trained_model(tiny_model_path, tmp_path / "other", load_dictionary("smart"))  # of another dictionary
    code, out, _ = run(capsys, "evaluate", other, *args[2:], "--out", tmp_path / "other.json", "--json")
    assert code == 0 and json.loads(out)["provenance"]["split_key"] == "public"


def test_evaluate_refuses_a_model_that_may_have_been_trained_on_these_patients(
    tmp_path: Path, capsys, tiny_model_path: Path
):
    frame, dictionary = synthetic_registry.make(300, seed=4)
    frame.to_parquet(tmp_path / "t.parquet")
    (tmp_path / "d.toml").write_text(dump_dictionary(dictionary))
    model = trained_model(tiny_model_path, tmp_path / "model", dictionary)
    args = [tmp_path / "t.parquet", tmp_path / "d.toml", "--out", tmp_path / "score.json", "-n", 5]
    code, _, err = run(capsys, "evaluate", model, *args)
    assert code == 2 and err == (
        "error: this model was trained on a registry with this dictionary: name the hospital's site.toml with --site "
        "so that its training patients are left out\n"
    )
    (tmp_path / "adapter").mkdir()  # an adapter brings its provenance too
    (model / "provenance.json").rename(tmp_path / "adapter" / "provenance.json")
    code, _, err = run(capsys, "evaluate", model, *args, "--adapter", tmp_path / "adapter")
    assert code == 2 and "this model was trained on a registry with this dictionary" in err
    (model / "provenance.json").write_text("[]")
    code, _, err = run(capsys, "evaluate", model, *args)
    assert code == 2 and "provenance.json: not a model's provenance" in err and err.count("\n") == 1
    assert not (tmp_path / "score.json").exists()
    (tmp_path / "site.toml").write_text(
        f'name = "a"\ntable = "t.parquet"\ndictionary = "d.toml"\nsplit_key = "{"5e" * 32}"\n'
    )
    code, out, _ = run(capsys, "evaluate", model, *args, "--site", tmp_path / "site.toml", "--json")
    assert code == 0 and json.loads(out)["provenance"]["split_key"] == "site"


def test_evaluate_at_a_site_without_split_key_says_what_to_do(tmp_path: Path, capsys, tiny_model_path: Path):
    frame, dictionary = synthetic_registry.make(300, seed=4)
    frame.to_parquet(tmp_path / "t.parquet")
    (tmp_path / "d.toml").write_text(dump_dictionary(dictionary))
    (tmp_path / "site.toml").write_text('name = "a"\ntable = "t.parquet"\ndictionary = "d.toml"\n')
    args = [tiny_model_path, tmp_path / "t.parquet", tmp_path / "d.toml", "--out", tmp_path / "score.json", "-n", 5]
    code, _, err = run(capsys, "evaluate", *args, "--site", tmp_path / "site.toml")
    assert code == 2 and err.count("\n") == 1 and "no split key yet, so it has no test patients" in err
    assert f"its first run makes {tmp_path / 'state' / 'split.key'}; for a model that was trained elsewhere set" in err
    assert not (tmp_path / "state").exists()
    with (tmp_path / "site.toml").open("a") as file:
        file.write(f'split_key = "{"0f" * 32}"\n')  # as the line says
    assert run(capsys, "evaluate", *args, "--site", tmp_path / "site.toml")[0] == 0


def test_evaluate_tells_before_it_scores_that_it_cannot_write(tmp_path: Path, capsys, tiny_model_path: Path):
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, "evaluate", tiny_model_path, "t", "d", "--out", tmp_path / "file" / "score.json")
    assert code == 2 and "expected a folder, got a file" in err and err.count("\n") == 1


def test_check_refuses_a_policy_that_names_no_feature(ward: Path, capsys):
    (ward / "site.toml").write_text(
        'name = "east"\ntable = "good.csv"\ndictionary = "ward.toml"\n[policy]\ntargets_never_asked = ["hiv"]\n'
    )
    code, _, err = run(capsys, "client", "check", ward / "good.csv", ward / "ward.toml", "--site", ward / "site.toml")
    assert code == 2 and err == "error: policy.targets_never_asked: dictionary 'ward' has no entry 'hiv'\n"


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"model": "no/such-model"}, "model 'no/such-model'"),
        ({"table": "none.parquet"}, "no such table"),
        ({"--schema": "d.toml"}, "not a question schema"),
        ({"--schema": "none.json"}, "no such file"),
        ({"--adapter": "."}, "no adapter_config.json in it"),
        ({"--config": "none.toml"}, "no such file"),
        ({"--set": "questions.n_options=99"}, "n_options"),
        ({"--out": "."}, "expected a file, got a folder"),
        ({"--site": "none.toml"}, "no such file"),
    ],
)
def test_evaluate_refuses_in_one_line_and_writes_nothing(
    tmp_path: Path, capsys, monkeypatch, tiny_model_path: Path, changed: dict[str, str], line: str
):
    monkeypatch.chdir(tmp_path)
    frame, dictionary = synthetic_registry.make(300, seed=4)
    frame.to_parquet("t.parquet")
    Path("d.toml").write_text(dump_dictionary(dictionary))
    args = {"--out": "score.json"} | {key: value for key, value in changed.items() if key.startswith("--")}
    options = [word for pair in args.items() for word in pair]
    model, table = changed.get("model", tiny_model_path), changed.get("table", "t.parquet")
    code, _, err = run(capsys, "evaluate", model, table, "d.toml", *options)
    lines = [text for text in err.splitlines() if not text.startswith("questions:")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and line in lines[0]
    assert not Path("score.json").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["client", "check"],
        ["client", "dictionary"],
        ["client", "questions"],
        ["client", "ledger", "show"],
        ["client", "ledger", "verify"],
        ["client", "ledger", "export"],
        ["client", "policy", "explain"],
        ["evaluate"],
    ],
)
def test_help_has_an_example(command: list[str], capsys):
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0 and f"wardround {' '.join(command)}" in out.replace("\n  ", " ").split("Example:")[1]
