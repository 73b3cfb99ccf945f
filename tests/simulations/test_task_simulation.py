"""A run whose config names tasks: sites ask their own test patients, and the report tells what one place would tell."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from wardround.client import task_exams
from wardround.client.exam import Exam, answered
from wardround.client.folder import Site, SiteRun
from wardround.common.config import RunConfig, load_run, to_toml
from wardround.common.dictionary import load_dictionary
from wardround.common.errors import ConfigError
from wardround.common.files import read_record
from wardround.common.messages import SchemaInstruction
from wardround.common.schema import Schema
from wardround.common.scored import MAJORITY, concat
from wardround.common.summary import summarise_task
from wardround.common.task_sums import TaskSums, run_tasks
from wardround.server.tracking import SilentProgress
from wardround.simulations.cli import simulate as command
from wardround.simulations.federation import simulate
from wardround.simulations.registries import dictionary_path

pytestmark = pytest.mark.usefixtures("cheap_scrypt")

TASKS = ("support-mortality", "support-denoising")
MODELS = ("base", "warmup", "final")


def settings(base: Path, **changes: Any) -> RunConfig:
    data: dict[str, Any] = {
        "name": "trial",
        "privacy": {"enabled": False},
        "model": {"id": str(base), "device": "cpu", "prompt": "en_short"},
        "warmup": {"enabled": False},
        "questions": {"features_per_record": 4},
        "grpo": {"local_steps": 2, "patients_per_step": 4, "expectation": "exact", "learning_rate": 0.03},
        "federation": {"rounds": 1, "validation_questions_per_site": 0},
        "evaluation": {"questions_per_site": 40, "bootstrap_samples": 100, "samples": 0, "tasks": TASKS},
        "simulation": {"registry": "support_icu", "sites": 3},
    }
    return RunConfig.model_validate({**data, **changes})


Seen = list[tuple[list[Exam], dict[str, Any]]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> tuple[Path, dict[str, Any], Seen]:
    """The run, and what every site asked and was answered."""
    seen: Seen = []
    whole = task_exams.task_vector

    def spy(tasks: Any, exams: Any, outcomes: Any, *more: Any) -> Any:
        seen.append((list(exams), dict(outcomes)))
        return whole(tasks, exams, outcomes, *more)

    out = tmp_path_factory.mktemp("tasks") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_exams, "task_vector", spy)
        return out, simulate(settings(tiny_model_path), out, resume=False), seen


def test_the_report_tells_what_all_answers_in_one_place_tell(run: tuple[Path, dict[str, Any], Seen]):
    _, evaluation, seen = run
    assert [task["name"] for task in evaluation["tasks"]] == list(TASKS)
    for index, task in enumerate(evaluation["tasks"]):
        sites = []
        for exams, outcomes in seen:
            options = [len(question.options) for question in exams[index].questions]
            sites.append(exams[index].scored({m: answered(outcomes[m][index], options) for m in MODELS}, {}))
        whole = concat([replace(site, strata={**site.strata, "site": ("",) * len(site)}) for site in sites])
        one = summarise_task(whole, name="t", reference="base", final="final", n_bootstrap=500)
        assert (task["n"], task["patients"]) == (one["n"], one["patients"]) == (120, 120)
        for model in MODELS:
            value = task["models"][model]["accuracy"]["value"]
            assert value == pytest.approx(one["models"][model]["accuracy"]["value"])
        assert task["models"][MAJORITY]["accuracy"]["value"] == pytest.approx(one["majority"]["accuracy"]["value"])
        pairs = {(pair["model"], pair["against"]): pair for pair in one["paired"]}
        for pair in task["paired"]:
            if ("final", pair["against"]) in pairs:
                assert pair["p"] == pytest.approx(pairs["final", pair["against"]]["mcnemar_p"])
        for axis, table in one["subgroups"]["axes"].items():
            if axis == "site":
                continue
            expected = {row["stratum"]: row["models"]["final"]["accuracy"]["value"] for row in table["strata"]}
            got = {row["stratum"]: row["accuracy"]["value"] for row in task["subgroups"]["axes"][axis]["strata"]}
            assert got == pytest.approx(expected)


def test_all_tasks_together_are_told_by_patient(run: tuple[Path, dict[str, Any], Seen]):
    _, evaluation, seen = run
    asked = {
        (site, str(exam.registry.patients[row]))
        for site, (exams, _) in enumerate(seen)
        for exam in exams
        for row in exam.rows
    }
    assert evaluation["all_tasks"]["n"] == 240
    assert evaluation["all_tasks"]["patients"] == len(asked) < 240


def test_only_sums_are_in_the_coordinators_journal(run: tuple[Path, dict[str, Any], Seen]):
    out, _, _ = run
    record = read_record(out / "journal" / "evaluate.record")
    assert set(record.vectors) == {"tally", "tasks"} and record.values["samples"] == []


def test_the_report_shows_each_task_and_its_subgroups(run: tuple[Path, dict[str, Any], Seen]):
    page = (run[0] / "report.html").read_text()
    assert "Death in hospital, ICU patients" in page and "Masked values of ICU patients" in page
    assert "age: 50 to under 65" in page and "All tasks together, 240 questions" in page.replace(
        "\N{NO-BREAK SPACE}", " "
    )


def test_a_finished_run_is_shown_again_with_its_tasks(run: tuple[Path, dict[str, Any], Seen], tiny_model_path: Path):
    out, evaluation, _ = run
    assert (
        simulate(settings(tiny_model_path), out, resume=True)
        == evaluation
        == json.loads((out / "evaluation.json").read_text())
    )


def test_the_terminal_tells_the_tasks(run: tuple[Path, dict[str, Any], Seen], tmp_path: Path, tiny_model_path: Path):
    (tmp_path / "run.toml").write_text(to_toml(settings(tiny_model_path)))
    arguments = ["run", str(tmp_path / "run.toml"), "--out", str(run[0]), "--resume"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    assert "support-mortality: 120 questions of 120 patients" in result.output
    assert "warmup" not in result.output  # it was off


def _divided(seen: Any, config: RunConfig, site: Site, never: tuple[str, ...]) -> list[dict[str, Any]]:
    """The strata of the second task that a hospital with this policy fills."""
    exams, outcomes = seen
    tasks = run_tasks(config.evaluation.tasks, site.dictionary)[1:]
    policy = site.config.policy.model_copy(update={"targets_never_asked": never})
    answers = {name: found[1:] for name, found in outcomes.items()}
    vector = task_exams.task_vector(tasks, exams[1:], answers, site.dictionary, policy)
    cells = TaskSums.from_vector(vector, tasks[0], site.dictionary, MODELS).cells
    return [{"axis": axis, "stratum": label} for (axis, label), cell in cells.items() if axis and cell.patients]


def test_a_hospital_that_never_asks_an_outcome_adds_nothing_to_its_task(
    run: tuple[Path, dict[str, Any], Seen], tmp_path: Path, tiny_model_path: Path
):
    """Its policy holds for tasks as well."""
    site, config = Site.open(next((run[0] / "sites").glob("*/site.toml"))), settings(tiny_model_path)

    policy = site.config.policy.model_copy(update={"targets_never_asked": ("hospdead", "age")})
    limited = replace(site, config=site.config.model_copy(update={"policy": policy}))
    about = {"run_id": "0" * 32, "round_index": 1, "config": config.to_json(), "config_digest": config.digest()}
    site_run = SiteRun(limited, SchemaInstruction(**about, model_digest="m", schema="{}"))
    schema = Schema.from_json((run[0] / "schema.json").read_text())
    mortality, denoising = task_exams.make_exams(site_run, schema, run_tasks(config.evaluation.tasks, site.dictionary))
    assert mortality is None
    assert denoising is not None and "age" not in {question.target for question in denoising.questions}
    assert {row["axis"] for row in _divided(run[2][0], config, site, ("hospdead", "age"))} == {
        "sex",
        "comorbidity",
        "severity",
    }
    nothing = task_exams.task_vector(
        run_tasks(config.evaluation.tasks[:1], site.dictionary),
        [None],
        {name: [] for name in MODELS},
        site.dictionary,
        policy,
    )
    assert not np.any(nothing)


@pytest.mark.parametrize(
    "tasks, said",
    [
        (["smart-mace"], "made for registry 'smart'"),
        (["support-antibiotics"], "free text"),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused_before_anything_is_trained(
    tasks: list[str], said: str, tmp_path: Path, tiny_model_path: Path
):
    with pytest.raises(ConfigError, match=said):
        config = settings(tiny_model_path, evaluation={"questions_per_site": 4, "tasks": tasks})
        simulate(config, tmp_path / "run", resume=False)
    assert not (tmp_path / "run" / "journal" / "warmup.record").exists()


def test_the_config_holds_its_tasks_in_full_so_that_its_digest_says_what_is_asked(tiny_model_path: Path):
    config = settings(tiny_model_path)
    assert [task["targets"] for task in config.evaluation.tasks if "targets" in task] == [["hospdead"]]
    assert RunConfig.model_validate(json.loads(config.to_json())).digest() == config.digest()
    own = {**config.evaluation.tasks[0], "name": "our-deaths", "known_before": 2}
    other = settings(tiny_model_path, evaluation={"tasks": [own]})
    assert run_tasks(other.evaluation.tasks, load_dictionary(dictionary_path("support_icu")))[0].known_before == 2
    assert other.digest() != settings(tiny_model_path, evaluation={"tasks": [{**own, "known_before": 3}]}).digest()


def test_answers_of_fewer_patients_than_a_hospital_allows_are_in_no_sum(
    run: tuple[Path, dict[str, Any], Seen], tmp_path: Path, tiny_model_path: Path
):
    """Whatever the coordinator asks for; nobody sees which hospital it was."""
    every = {"questions_per_site": 2000, "bootstrap_samples": 100, "samples": 0, "tasks": TASKS}
    config, out = settings(tiny_model_path, evaluation=every), tmp_path / "run"

    class Stricter(SilentProgress):
        def begin(self, phase: str, round_index: int, sites: object) -> None:
            if phase == "evaluate":
                path = out / "sites" / "site-02" / "site.toml"
                path.write_text(path.read_text().replace("min_test_patients = 1", "min_test_patients = 2000"))

    evaluation = simulate(config, out, resume=False, progress=Stricter())
    assert evaluation["sites"] == 3
    others = [Site.open(out / "sites" / name / "site.toml").patients_of("test") for name in ("site-01", "site-03")]
    assert evaluation["final"]["n"] == sum(map(len, others))
    assert 0 < evaluation["tasks"][0]["n"] <= sum(map(len, others))
    assert not list((out / "sites" / "site-02" / "state" / "runs").glob("*/report.html"))


@pytest.mark.parametrize(
    "tasks",
    [
        ["../../etc/passwd.toml"], ["a/b"], ["no-such"], ["a\nb"], ["support-mortality", "support-mortality"], [1], "x",
        [{"name": "a"}],
    ],
)  # fmt: skip
def test_a_coordinator_names_no_file_and_no_task_twice(tasks: list[str], tiny_model_path: Path):
    with pytest.raises(ValueError, match="tasks"):
        settings(tiny_model_path, evaluation={"tasks": tasks})
    toml = json.dumps(tasks).replace('{"name": ', "{name = ")
    with pytest.raises(ConfigError) as refused:
        load_run(Path("demo"), (f"evaluation.tasks={toml}",))
    assert len(str(refused.value).splitlines()) == 1


def test_a_private_run_asks_no_tasks_for_their_sums_carry_no_noise(tiny_model_path: Path):
    private = {"enabled": True, "epsilon": 3, "delta": 1e-5, "max_grad_norm": 1.0, "declared_patients": 500}
    with pytest.raises(ValueError, match=r"evaluation\.tasks.*carry no noise"):
        settings(tiny_model_path, privacy=private)
