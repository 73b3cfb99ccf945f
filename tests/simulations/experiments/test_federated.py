"""The federated experiment: its arms, its pairing, its intervals; and the ceiling on the same masked inputs."""

import gzip
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from wardround.client.questions import QuestionBuilder
from wardround.client.tabular import tabular_probabilities
from wardround.common.config import QuestionsConfig, RunConfig
from wardround.common.errors import ConfigError, RunFolderError
from wardround.simulations.experiments import federated, figure

pytestmark = pytest.mark.usefixtures("cheap_scrypt")


def config(base: Path, **grpo) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "trial",
            "privacy": {"enabled": False},
            "seed": 3,
            "model": {"id": str(base), "device": "cpu", "prompt": "en_short"},
            "warmup": {"enabled": False},
            "questions": {"features_per_record": 4},
            "grpo": {"local_steps": 1, "patients_per_step": 4, "expectation": "exact", "learning_rate": 0.01, **grpo},
            "federation": {"rounds": 1, "validation_questions_per_site": 3},
            "evaluation": {"bootstrap_samples": 100},
            "simulation": {"registry": "synthetic", "sites": 3},
        }
    )


@pytest.fixture(scope="module")
def exam(tiny_model_path: Path) -> federated.Exam:
    return federated.make_exam(config(tiny_model_path), per_patient=3)


def test_every_arm_asks_as_many_questions_a_step(tiny_model_path: Path, exam: federated.Exam, tmp_path: Path) -> None:
    settings = config(tiny_model_path)
    asked = {
        arm: sum(
            run.simulation.sites * run.grpo.patients_per_step
            for run in federated.arm_configs(settings, arm, exam, tmp_path)
        )
        for arm in federated.ARMS
    }
    assert asked == dict.fromkeys(federated.ARMS, 12.0)
    [skewed] = federated.arm_configs(settings, "skewed", exam, tmp_path)
    assert (skewed.simulation.partition, skewed.simulation.partition_feature) == ("dirichlet", "sex")


def test_hospitals_together_add_up_under_masks_and_one_alone_has_nobody_to_add_to(
    tiny_model_path: Path, exam: federated.Exam, tmp_path: Path
) -> None:
    for arm in federated.ARMS:
        for run in federated.arm_configs(config(tiny_model_path), arm, exam, tmp_path):
            alone = arm in ("centralised", "local")
            assert run.federation.secure_aggregation == ("none" if alone else "bonawitz")
            assert (run.simulation.sites, run.federation.min_sites) == ((1, 1) if alone else (3, 3))


def test_the_experiment_pairs_all_arms_and_goes_on_where_it_stopped(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def majority(method, builder, train_rows, questions, rows, shown, seed) -> np.ndarray:
        """In place of gradient boosting, half a minute a seed, which has a test of its own below."""
        return np.eye(10)[[question.majority for question in questions]]

    monkeypatch.setattr(federated, "tabular_probabilities", majority)
    settings, said = config(tiny_model_path), []
    result = federated.run(settings, tmp_path, seeds=[1, 2], say=said.append)
    assert set(result["arms"]) == {*federated.ARMS, "base", "warmup", "majority", "ceiling"}
    assert set(result["comparisons"]) == {label for label, _, _ in federated.COMPARISONS}
    raw = json.loads(gzip.decompress((tmp_path / "outcomes.json.gz").read_bytes()))
    for seed in ("1", "2"):
        lengths = {len(values) for values in raw[seed]["correct"].values()}
        assert lengths == {len(raw[seed]["patients"])} == {len(raw[seed]["targets"])}
    both = [np.mean(raw[s]["correct"]["federated"]) - np.mean(raw[s]["correct"]["majority"]) for s in ("1", "2")]
    assert result["comparisons"]["federated - majority"]["by_seed"] == pytest.approx(both)
    assert len(said) == 2 * (3 + 3 + 3)  # arms, three local ones; base, warmed up, ceiling
    assert not list(tmp_path.glob("runs/*/model"))
    lines = ElementTree.parse(tmp_path / "federated.svg").getroot().findall("{*}polyline")
    assert len(lines) == 2 * 3  # seeds; federated, skewed, centralised
    for line in lines:  # the model before the rounds, at 0 questions, and after the only one
        points = line.attrib["points"].split()
        assert len(points) == 2
        assert points[0].startswith("60.0,")
    said.clear()
    assert federated.run(settings, tmp_path, seeds=[1, 2], say=said.append) == result
    assert said == []


def test_validation_patients_are_others_than_test_patients(tiny_model_path: Path, exam: federated.Exam) -> None:
    other = federated.make_exam(config(tiny_model_path), 1, "validation")
    assert len(other.questions) > 0
    assert not set(other.patients) & set(exam.patients)


def test_references_made_side_by_side_are_those_made_one_after_another(tiny_model_path: Path, tmp_path: Path) -> None:
    settings, asked = config(tiny_model_path), {"seeds": [1, 2], "arms": [], "references": ["majority"]}
    together, said = tmp_path / "together", []
    result = federated.run(settings, together, **asked, jobs=2, say=said.append)
    assert sorted(said) == ["majority, seed 1: done", "majority, seed 2: done"]
    assert result == federated.run(settings, tmp_path / "apart", **asked)


@pytest.mark.parametrize("other", [{"split": "validation"}, {"per_patient": 2}, {"learning_rate": 0.02}])
def test_a_folder_with_another_experiments_answers_is_refused(
    tiny_model_path: Path, tmp_path: Path, other: dict
) -> None:
    asked = {"seeds": [1], "arms": [], "references": ["majority"]}
    federated.run(config(tiny_model_path), tmp_path, **asked)
    grpo = {key: other[key] for key in other if key == "learning_rate"}
    rest = {key: other[key] for key in other if key not in grpo}
    with pytest.raises(RunFolderError, match="use another --out"):
        federated.run(config(tiny_model_path, **grpo), tmp_path, **asked, **rest)


def test_an_arm_that_cannot_ask_its_share_is_refused_before_anything_is_trained(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    settings = config(tiny_model_path, patients_per_step=5000)
    with pytest.raises(ConfigError, match=r"arm 'federated', seed 1: a hospital has .* cannot be reached in 1 rounds"):
        federated.run(settings, tmp_path / "out", seeds=[1])
    assert not (tmp_path / "out").exists()


def test_the_picture_shows_every_arm_and_draws_a_line_for_every_seed() -> None:
    entry = {"mean": 0.5, "ci95": [0.45, 0.55]}
    result = {"n": 200, "split": "test", "chance": 0.3, "arms": {"federated": entry, "a < b": entry}}
    curves = {"federated": [[(10, 0.4), (20, 0.5)], [(11, 0.41), (21, 0.52)]]}
    picture = ElementTree.fromstring(figure.draw(result, curves))
    assert len(picture.findall("{*}polyline")) == 2
    words = [text.text for text in picture.findall("{*}text")]
    assert {"a < b", "federated", "50.0", "chance"} <= set(words)
    assert "200 questions of test patients, 95 %" in words


def test_a_run_without_validation_has_no_curve(tmp_path: Path) -> None:
    assert federated._curve(tmp_path, "federated", 1) == []  # trained elsewhere, only its answers are here
    folder = tmp_path / "runs" / "federated-seed-1-0"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"baseline": {"accuracy": None, "questions": 0}}))
    (folder / "rounds.jsonl").write_text(json.dumps({"questions": 30, "validation_accuracy": None}) + "\n")
    assert federated._curve(tmp_path, "federated", 1) == []


def test_intervals_resample_patients_not_questions() -> None:
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(200), 10)
    right = np.repeat(rng.random(200) < 0.5, 10).astype(float)  # ten copies say no more than one
    entry = {"patients": patients.tolist(), "targets": [], "chance": [0.5] * 2000}
    entry["correct"] = {"federated": right.tolist(), "warmup": [0.0] * 2000}
    low, high = federated.summarise({1: entry})["arms"]["federated"]["ci95"]
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 200), rel=0.15)


def test_a_paired_difference_of_equal_answers_has_no_width() -> None:
    right = [1.0, 0.0] * 50
    entry = {"patients": list(range(100)), "targets": [], "chance": [0.5] * 100}
    entry["correct"] = {"federated": right, "warmup": right, "majority": [0.0] * 100}
    found = federated.summarise({1: entry})["comparisons"]
    assert found["federated - warmup"]["ci95"] == [0.0, 0.0]
    assert found["federated - majority"]["mean"] == 0.5


def test_gradient_boosting_beats_the_majority_option_on_the_same_masked_inputs(tiny_model_path: Path) -> None:
    whole = config(tiny_model_path).model_copy(update={"questions": QuestionsConfig(features_per_record=30)})
    exam = federated.make_exam(whole, per_patient=10)
    targets = ("lactate", "heart_rate", "mean_pressure", "creatinine")
    mine = [i for i, question in enumerate(exam.questions) if question.target in targets]
    questions = [exam.questions[i] for i in mine]
    truth = np.array([question.answer for question in questions])
    majority = np.array([question.majority for question in questions])
    for method in ("gradient boosting", "logistic regression"):
        asked = exam.builder, exam.train_rows, questions, exam.rows[mine]
        found = tabular_probabilities(method, *asked, exam.shown[mine], seed=0)
        assert found.sum(axis=1) == pytest.approx(1)
        assert (found.argmax(axis=1) == truth).mean() > (majority == truth).mean()
        hidden = tabular_probabilities(method, *asked, np.zeros_like(exam.shown[mine]), seed=0).argmax(axis=1)
        assert (hidden == truth).mean() < (found.argmax(axis=1) == truth).mean()  # it sees what the record shows only


def test_the_exam_is_the_same_for_the_same_seed(tiny_model_path: Path, exam: federated.Exam) -> None:
    again = federated.make_exam(config(tiny_model_path), per_patient=3)
    assert [q.text for q in again.questions] == [q.text for q in exam.questions]
    assert isinstance(again.builder, QuestionBuilder)
    other = federated.make_exam(config(tiny_model_path).model_copy(update={"seed": 4}), per_patient=3)
    assert set(other.patients) != set(exam.patients)
