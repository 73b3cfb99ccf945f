"""simulations/suite.py and `wardround evaluate`: the whole suite with a tiny model over a real small registry."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wardround.common.cli import main
from wardround.common.config import LoraConfig, ModelConfig
from wardround.common.dictionary import load_dictionary
from wardround.common.evaluation_file import read_evaluation
from wardround.common.lm.models import load
from wardround.common.task_sums import told
from wardround.server.evaluate import baselines, verdict
from wardround.server.review import raters
from wardround.server.review.items import read_study
from wardround.server.review.judges import judge
from wardround.server.review.ratings import Rating, rate
from wardround.simulations import registries
from wardround.simulations.suite import federated

from tests.common.test_task_sums import DICTIONARY, MODELS, TASK, two_tasks
from tests.server import report_case
from tests.server.review.study_case import study

N = 100
ARGS = ["-n", str(N), "--spoken", "2", "--set", "evaluation.bootstrap_samples=200", "--set", "model.device='cpu'"]


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command."""
    try:
        main([str(arg) for arg in args])
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Path:
    """The suite's folder for one registry, scored and open tasks."""
    folder = tmp_path_factory.mktemp("suite")
    task = folder / "advice.toml"
    task.write_text(
        'name = "advice"\ntitle = "Advice"\nregistry = "copenhagen_stroke"\nkind = "open"\nmetric = "preference"\n'
        'only = { sex = "female" }\nquestion = "What next?"\n'
    )
    out = folder / "e"
    models = ["--base", str(tiny_model_path), "--beside", f"central={tiny_model_path}"]
    tasks = ["--tasks", f"stroke-denoising,stroke-mortality,{task}"]
    main(["evaluate", str(tiny_model_path), "--out", str(out), *ARGS, *models, *tasks])
    return out


def test_the_suite_writes_figures_of_every_task_with_all_models_in_one_table(made: Path) -> None:
    found = read_evaluation(made / "evaluation.json")
    assert [task["name"] for task in found["tasks"]] == ["stroke-denoising", "stroke-mortality"]
    for task in found["tasks"]:
        assert list(task["models"]) == ["base", "central", "gradient boosting", "logistic regression", "final"]
        assert task["reference"] == "base"
        assert task["n"] == task["patients"] == N
        assert {"age", "sex", "comorbidity", "severity"} <= set(task["subgroups"]["axes"])
        same = next(pair for pair in task["paired"] if (pair["model"], pair["against"]) == ("final", "base"))
        assert (same["difference"], same["only_model"], same["only_against"]) == (0, 0, 0)  # one and the same model
        assert task["position"]["models"]["final"]["permuted"]["n"] == N
    mortality = found["tasks"][1]
    for model in mortality["models"].values():
        assert model["event"]["n"] == N
        assert 10 <= model["event"]["events"] < N / 2
    assert found["reasoning"]["copenhagen_stroke"]["final"]["n"] == 2
    assert found["provenance"]["tasks"]["stroke-mortality"]["metric"] == "auroc"


def test_report_card_and_pairs_for_experts_stand_beside_the_figures(made: Path) -> None:
    page = (made / "report.html").read_text()
    assert "Death within a year of a stroke" in page
    assert "TRIPOD-LLM" in (made / "card.md").read_text()
    study = read_study(made / "review.jsonl")
    assert study.data == "open"
    assert set(study.models) == {"base", "final"}
    assert {item.section for item in study.items} >= {"Advice"}
    assert all(item.record for item in study.items)


def test_an_interrupted_evaluation_goes_on_and_ends_with_the_same_figures(
    made: Path, capsys: pytest.CaptureFixture[str], tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All answers are kept: what is asked again is what models said in words."""
    from wardround.common.lm import answers

    def never(*_: object, **__: object) -> None:
        raise AssertionError("asked again")

    before = json.loads((made / "evaluation.json").read_text())
    (made / "evaluation.json").unlink()
    monkeypatch.setattr(answers, "answer_questions", never)
    args = ["--base", tiny_model_path, "--out", made, *ARGS, "--beside", f"central={tiny_model_path}", "--spoken", 0]
    code, out, _ = run(
        capsys, "evaluate", tiny_model_path, *args, "--tasks", "stroke-denoising,stroke-mortality", "--json"
    )
    assert code == 0
    assert json.loads(out)["tasks"] == before["tasks"]
    code, out, _ = run(capsys, "evaluate", "--compare", made / "evaluation.json", made / "evaluation.json")
    assert code == 0
    assert "Death within a year" in " ".join(out.split())


def test_calibrated_rows_have_no_liking_for_a_letter_left(
    made: Path, capsys: pytest.CaptureFixture[str], tiny_model_path: Path
) -> None:
    args = ["--base", tiny_model_path, "--out", made, *ARGS, "--beside", f"central={tiny_model_path}", "--spoken", 0]
    code, out, err = run(
        capsys,
        "evaluate",
        tiny_model_path,
        *args,
        "--tasks",
        "stroke-mortality",
        "--calibrate",
        "--no-tabular",
        "--json",
    )
    assert code == 0, err
    [task] = json.loads(out)["tasks"]
    assert list(task["models"]) == ["base", "central", "base, calibrated", "final, calibrated", "final"]
    liked = {name: found["by_options"][0]["chosen"][0] for name, found in task["position"]["models"].items()}
    assert abs(liked["final, calibrated"] - 0.5) < 0.12 < abs(liked["final"] - 0.5)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "expected MODEL and --out"),
        (["m", "--out", "o", "--beside", "final=m"], "name of another row"),
        (["m", "--out", "o", "--beside", "central"], "expected NAME=…"),
        (["m", "--out", "o", "--tasks", "nothing"], "no such task"),
        (["m", "--out", "o", "--tasks", "ist-death14"], "--table ist_stroke=FILE"),
        (["m", "--out", "o", "--tasks", "ist-death14", "--table", "ist_stroke=none.csv"], "cannot be read"),
        (["m", "--out", "o", "--samples", "5"], "reasoning_tokens above 0"),
        (
            [
                "m",
                "--out",
                "o",
                "--calibrate",
                "--set",
                "questions.reasoning_tokens=4",
                "--set",
                "grpo.expectation='sampled'",
            ],
            "reasoning_tokens = 0",
        ),
        (
            ["m", "--out", "o", "--calibrate", "--set", "questions.option_order='sorted'"],
            "questions.option_order = 'shuffled'",
        ),
        (["m", "--out", "o", "--site", "s.toml"], "belongs to a TABLE"),
        (["m", "t.csv", "d.toml", "--out", "o", "--tasks", "smart-mace"], "belongs to the suite"),
        (["m", "t.csv", "d.toml", "--out", "o", "--samples", "3"], "--samples belongs to the suite"),
        (["m", "t.csv", "d.toml", "--out", "o", "--spoken", "0"], "--spoken belongs to the suite"),
        (["m", "t.csv", "d.toml", "--out", "o", "--no-tabular"], "--no-tabular belongs to the suite"),
        (["m", "t.csv", "d.toml", "--out", "o", "--review", "s.json"], "--review belongs to the suite"),
        (["m", "--out", "o", "--export-harness", "h"], "belongs to a TABLE"),
        (["m", "--out", "o", "--review", "none.json"], "none.json: cannot be read"),
        (["m", "t.csv", "--out", "o"], "expected its DICTIONARY"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "evaluate", *args)
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_a_runs_own_folder_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text("{}")
    code, _, err = run(capsys, "evaluate", "m", "--out", tmp_path)
    assert code == 2
    assert "the folder of a run" in err


def test_a_task_that_shows_its_own_answer_is_refused_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.toml").write_text(
        'name = "t"\ntitle = "T"\nregistry = "support_icu"\nkind = "outcome"\ntargets = ["sepsis_any"]\nevent = "yes"\n'
        'context = ["age", "seps"]\n'
    )
    code, _, err = run(capsys, "evaluate", "no-model", "--out", tmp_path / "o", "--tasks", tmp_path / "t.toml")
    assert code == 2
    assert "'seps' cannot be shown with 'sepsis_any': it gives it away" in err


def test_majority_of_samples_is_the_answer_and_votes_are_its_probabilities(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model_path: Path
) -> None:
    settings = ["--set", "questions.reasoning_tokens=4", "--set", "grpo.expectation='sampled'", "--no-tabular"]
    args = [*ARGS, *settings, "--samples", 3, "--tasks", "stroke-mortality", "--spoken", 0, "--json"]
    code, out, err = run(capsys, "evaluate", tiny_model_path, "--out", tmp_path / "o", *args)
    assert code == 0, err
    [task] = json.loads(out)["tasks"]
    assert list(task["models"]) == ["final"]
    assert task["models"]["final"]["brier"] is not None
    assert task["models"]["final"]["mean_length"]["value"] > 0


def test_an_adapter_of_a_run_stands_beside_as_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model_path: Path
) -> None:
    """As a hospital's own training leaves it."""
    lm = load(ModelConfig(id=str(tiny_model_path), device="cpu"), LoraConfig(), seed=0)
    lm.set_vector(np.full(len(lm.vector(trainable_only=False)), 0.2, np.float32), trainable_only=False)
    adapter = tmp_path / "adapter"
    lm.save_adapter(adapter)
    args = [*ARGS, "--base", tiny_model_path, "--tasks", "stroke-mortality", "--spoken", 0, "--no-tabular", "--json"]
    args += ["--beside", f"local north={adapter}"]
    code, _, err = run(capsys, "evaluate", tiny_model_path, "--out", tmp_path / "o", *args)
    assert code == 2
    assert "no provenance.json" in err
    facts = {"dictionary_digest": "0" * 64, "split_key": "0a" * 32, "base_model": str(tiny_model_path)}
    (adapter / "provenance.json").write_text(json.dumps(facts))
    code, out, err = run(capsys, "evaluate", tiny_model_path, "--out", tmp_path / "o", *args)
    assert code == 0, err
    [task] = json.loads(out)["tasks"]
    pairs = {pair["against"]: pair for pair in task["paired"] if pair["model"] == "final"}
    assert list(task["models"]) == ["base", "local north", "final"]
    assert (pairs["base"]["only_model"], pairs["base"]["only_against"]) == (0, 0)
    assert pairs["local north"]["brier"]["difference"] != 0


def test_models_of_two_divisions_of_a_registry_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model_path: Path
) -> None:
    """One's test patients would be the other's training patients; one division is used, and said."""
    digest = load_dictionary(registries.dictionary_path("copenhagen_stroke")).digest()
    models = []
    for name, key in (("a", "0a" * 32), ("b", "0b" * 32), ("c", "0a" * 32)):
        shutil.copytree(tiny_model_path, tmp_path / name)
        facts = {"dictionary_digest": digest, "split_key": key, "base_model": str(tiny_model_path)}
        (tmp_path / name / "provenance.json").write_text(json.dumps(facts))
        models.append(tmp_path / name)
    a, b, c = models
    args = [*ARGS, "--config", "demo", "--tasks", "stroke-mortality", "--spoken", 0, "--no-tabular", "--json"]
    code, _, err = run(capsys, "evaluate", a, "--out", tmp_path / "o", *args, "--beside", f"central={b}")
    assert code == 2
    assert "divided in two ways" in err
    code, out, _ = run(capsys, "evaluate", a, "--out", tmp_path / "o", *args, "--beside", f"central={c}")
    assert code == 0
    assert json.loads(out)["provenance"]["registries"]["copenhagen_stroke"]["split_key"] == "run"


Run = Callable[..., str]


@pytest.fixture
def run_model(tmp_path: Path, tiny_model_path: Path) -> Run:
    """Makes the folder of a finished run, as far as an evaluation reads it, and returns its model."""

    def make(warmup: bool = True, tasks: bool = True, **changes: Any) -> str:
        case = report_case.case(warmup=warmup)
        about = {"final_digest": "a" * 64, "secure_aggregation": "bonawitz"}
        before = "warmup" if warmup else "base"
        asked = told(two_tasks(), [TASK, TASK], DICTIONARY, MODELS, before, "final", 120) if tasks else {}
        facts = {**case["provenance"], "split_key": "0a" * 32, "base_model": str(tiny_model_path)}
        files = {
            "evaluation.json": {**case["evaluation"], **asked},
            "run.json": {**case["run"], **about},
            "model/provenance.json": facts,
        }
        folder = tmp_path / "run"
        shutil.copytree(tiny_model_path, folder / "model", dirs_exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content | changes.get(name, {})))
        return str(folder / "model")

    return make


def test_of_a_runs_model_it_is_told_what_the_sites_own_patients_gave(run_model: Run) -> None:
    found, whole = federated(run_model()), report_case.case()["evaluation"]
    assert (found["run"], found["sites"], found["n"], found["simulated"], found["masked"]) == (
        "demo", 4, whole["n"], True, True
    )  # fmt: skip
    assert list(found["models"]) == ["base", "warmup", "final", "majority"]
    for name, figure in found["models"].items():
        assert (figure["value"], figure["ci95"]) == (whole[name]["accuracy"], whole[name]["ci95"])
    pairs = {f"{pair['model']}-{pair['against']}": pair for pair in found["paired"]}
    assert {name: pair["p"] for name, pair in pairs.items()} == {
        name: pair["mcnemar_p"] for name, pair in whole["paired"].items()
    }
    assert found["findings"][:2] == [verdict(whole), baselines(whole)]
    assert found["findings"][2].startswith("All tasks together, 240 questions of 120 patients")
    assert [task["name"] for task in found["tasks"]] == [TASK.name, TASK.name]
    assert "by_feature" not in found  # of five patients or more; the suite tells of ten
    assert federated(run_model(tasks=False))["tasks"] == [] and len(federated(run_model(tasks=False))["findings"]) == 2


def test_of_a_run_without_warm_up_nothing_is_called_warmed_up(run_model: Run) -> None:
    found = federated(run_model(warmup=False))
    assert list(found["models"]) == ["base", "final", "majority"]
    assert found["findings"][0].startswith(("Final and base", "The rounds"))
    assert "warmup" not in json.dumps(found)


def test_rounds_that_did_harm_are_named_among_what_got_worse(run_model: Run) -> None:
    paired = copy.deepcopy(report_case.case()["evaluation"]["paired"])
    paired["final-warmup"] |= {"difference": -0.1, "ci95": [-0.15, -0.05], "mcnemar_p": 0.001}
    evaluation = json.loads((Path(run_model()).parent / "evaluation.json").read_text())
    row = {"axis": "age", "stratum": "80+", "difference": -0.2, "ci95": [-0.3, -0.1], "p": 0.001, "p_holm": 0.01}
    tasks = [{**evaluation["tasks"][0], "subgroups": {"axes": {}, "worse": [row], "better": []}}]
    worse = federated(run_model(**{"evaluation.json": {"paired": paired, "tasks": tasks}}))["worse"]
    assert worse[0].startswith("The rounds lowered accuracy") and len(worse) == 2
    assert worse[1].endswith("age '80+' got worse by 20.0 points (95 % interval −30.0 to −10.0, corrected p = 0.01).")
    assert federated(run_model())["worse"] == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("evaluation.json", None),
        ("evaluation.json", "{"),
        ("evaluation.json", "[1]"),
        ("evaluation.json", '{"evaluation_schema": 1, "tasks": []}'),
        ("run.json", None),
        ("run.json", "[" * 100_000),
        ("model/provenance.json", "3"),
    ],
)
def test_a_run_whose_files_do_not_tell_has_no_such_part(run_model: Run, file: str, text: str | None) -> None:
    model = run_model()
    assert federated(model)
    path = Path(model).parent / file
    path.unlink() if text is None else path.write_text(text)
    assert federated(model) == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"run.json": {"final_digest": "c" * 64}},  # another model lies there
        {"evaluation.json": {"n": "many"}},
        {"evaluation.json": {"chance": float("nan")}},
        {"evaluation.json": {"tasks": 3}},
        {"evaluation.json": {"tasks": [{"name": "t"}]}},
        {"evaluation.json": {"all_tasks": {"n": 3}}},
        {"evaluation.json": {"paired": {"final": {}}}},
    ],
)
def test_figures_that_are_not_of_this_model_or_no_figures_are_left_out(run_model: Run, changes: dict[str, Any]) -> None:
    assert federated(run_model(**changes)) == {}


def test_a_model_of_no_run_has_no_sums(tiny_model_path: Path) -> None:
    assert federated(str(tiny_model_path)) == federated("smollm2-135m") == {}


@pytest.fixture
def figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """What `wardround server review stats --json` prints of a study that a person and a program have rated."""
    with study(tmp_path) as database:
        raters.invite(database, "Kim")
        judge(database, "program")
        for row in database.all("SELECT rater, place, item FROM slots"):
            rate(database, row["rater"], row["place"], Rating((row["item"] + row["rater"]) % 5 - 2))
    code, out, _ = run(capsys, "server", "review", "stats", tmp_path / "study", "--json")
    assert code == 0
    path = tmp_path / "stats.json"
    path.write_text(out)
    return path


def test_a_review_and_the_runs_sums_stand_beside_what_is_scored_and_change_none_of_it(
    run_model: Run, figures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o"
    args = ["evaluate", run_model(), "--out", out, "--config", "demo", "--tasks", "stroke-mortality", "-n", 20]
    args += ["--spoken", 0, "--no-tabular", *ARGS[4:]]
    code, _, err = run(capsys, *args)
    assert code == 0, err
    before = read_evaluation(out / "evaluation.json")
    assert before["review"] == {} and before["federated"]["n"] == 320
    code, said, err = run(capsys, *args, "--review", figures)
    assert code == 0, err
    assert "the sites' own test patients, run demo" in said
    after = read_evaluation(out / "evaluation.json")
    assert after == {**before, "review": json.loads(figures.read_text())}
    assert after["review"]["people"] and after["review"]["judges"]
    page, card = (out / "report.html").read_text(), (out / "card.md").read_text()
    for text in (page, card):
        assert "Programs as judges" in text and "20 pairs of answers of mimosa-7b and omega-13b" in text
        assert "own test patients" in text and "simulated sites" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "got something else"),
        ([1], "got something else"),
        ({"version": 2}, "'version'"),
        ({"models": ["base"]}, "'models': expected the names of two models"),
        ({"models": ["base", " "]}, "'models': expected the names of two models"),
        ({"people": {"preference": {}}}, "missing key 'people.preference.n'"),
        ({"items": float("nan")}, "'items'"),
        ({"more": 1}, "unknown key 'more'"),
    ],
)
def test_another_file_than_a_reviews_statistics_is_refused_before_a_model_is_looked_for(
    change: Any, said: str, figures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {**json.loads(figures.read_text()), **change} if isinstance(change, dict) else change
    figures.write_text("{" if content is None else json.dumps(content))
    code, _, err = run(capsys, "evaluate", "no-model", "--out", tmp_path / "o", "--review", figures)
    assert code == 2
    assert said in err and str(figures) in err and "wardround server review stats" in err
    assert len(err.strip().splitlines()) == 1 and not (tmp_path / "o").exists()
