"""simulations/suite.py and `wardround evaluate`: the whole suite with a tiny model over a real small registry."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from wardround.common.cli import main
from wardround.common.config import LoraConfig, ModelConfig
from wardround.common.dictionary import load_dictionary
from wardround.common.evaluation_file import read_evaluation
from wardround.common.lm.models import load
from wardround.server.review.items import read_study
from wardround.simulations import registries

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
        (["m", "--out", "o", "--site", "s.toml"], "belongs to a TABLE"),
        (["m", "t.csv", "d.toml", "--out", "o", "--tasks", "smart-mace"], "belongs to the suite"),
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
