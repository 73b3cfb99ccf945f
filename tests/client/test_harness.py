"""client/harness.py: our questions as a task of lm-evaluation-harness, with the answers that wardround gives."""

import doctest
import json
import logging
import os
import shlex
import stat
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from wardround.client.harness import write_harness_task
from wardround.common.config import LoraConfig, ModelConfig
from wardround.common.errors import ConfigError, ModelError
from wardround.common.lm.merge import merge_adapter
from wardround.common.lm.models import LanguageModel, load
from wardround.common.lm.scoring import option_log_probs, render
from wardround.common.question import LETTERS, Question, load_prompt

TEMPLATE = load_prompt("en_short")


def questions(count: int, seed: int = 0) -> list[Question]:
    """Questions with records of 1 to 8 lines and 2 to 10 options, accents and braces among them."""
    rng = np.random.default_rng(seed)
    made = []
    for row in range(count):
        n = int(rng.integers(2, 11))
        record = "; ".join(f"Ménière {{{{ {rng.integers(120, 160)} }}}} mmol/L" for _ in range(rng.integers(1, 9)))
        options = tuple(str(100 + value) for value in rng.permutation(60)[:n])
        shown = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
        text = f"{record}.\nWhat is the patient's Heart rate?\n{shown}"
        made.append(Question(f"target {row % 3}", "Vital signs", "feature", text, options, int(rng.integers(n)), 0))
    return made


@pytest.fixture(scope="module")
def lm(tiny_model_path: Path) -> LanguageModel:
    return load(ModelConfig(id=str(tiny_model_path), device="cpu", dtype="float32"), None, seed=0)


def run_harness(folder: Path, name: str, lm: LanguageModel, batch_size: int) -> tuple[float, list[dict[str, Any]]]:
    """The harness's accuracy, and what it kept of each question."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = HFLM(lm.model, tokenizer=lm.tokenizer, batch_size=batch_size, add_bos_token=False)
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[name],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    assert found is not None
    return found["results"][name]["acc,none"], found["samples"][name]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_harness_chooses_what_wardround_chooses(tmp_path: Path, lm: LanguageModel, batch_size: int) -> None:
    asked = questions(24)
    write_harness_task(tmp_path / "task", asked, TEMPLATE, lm, "heart_rates", public=True)
    accuracy, samples = run_harness(tmp_path / "task", "heart_rates", lm, batch_size)
    ours = option_log_probs(lm, asked, TEMPLATE, 5)
    assert accuracy == np.mean(ours.argmax(1) == [question.answer for question in asked])
    assert len(samples) == 24
    for sample in samples:
        row, n = sample["doc_id"], len(asked[sample["doc_id"]].options)
        theirs = np.array([answer[0] for answer in sample["filtered_resps"]])
        assert len(theirs) == n
        assert theirs.argmax() == ours[row].argmax()
        renormalised = theirs - np.log(np.exp(theirs).sum())
        np.testing.assert_allclose(renormalised, ours[row, :n], atol=2e-5)


def test_the_task_holds_the_prompts_that_wardround_scores(tmp_path: Path, lm: LanguageModel) -> None:
    asked = questions(5)
    command = write_harness_task(tmp_path / "a task", asked, TEMPLATE, lm, "heart_rates", public=True)
    lines = [json.loads(line) for line in (tmp_path / "a task" / "questions.jsonl").read_text("utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == [render(lm, TEMPLATE, question, False) for question in asked]
    assert [len(line["letters"]) for line in lines] == [len(question.options) for question in asked]
    assert [line["answer"] for line in lines] == [question.answer for question in asked]
    words = shlex.split(command)
    assert words[words.index("--include_path") + 1] == str(tmp_path / "a task")
    assert "add_bos_token=False" in command
    assert command in (tmp_path / "a task" / "heart_rates.yaml").read_text("utf-8")


def test_patients_are_exported_only_where_somebody_answers_for_the_folder(tmp_path: Path, lm: LanguageModel) -> None:
    asked = questions(2)
    with pytest.raises(ConfigError, match="--inside-hospital"):
        write_harness_task(tmp_path / "task", asked, TEMPLATE, lm, "mine", public=False)
    assert not (tmp_path / "task").exists()
    write_harness_task(tmp_path / "task", asked, TEMPLATE, lm, "mine", public=False, inside_hospital=True)
    assert stat.S_IMODE((tmp_path / "task").stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "task").iterdir()} == {0o600}


def test_the_names_of_registries_become_names_of_tasks() -> None:
    result = doctest.testmod(import_module("wardround.client.harness"))
    assert (result.attempted, result.failed) == (1, 0)


@pytest.mark.parametrize("name", ["", "ICU", "a,b", "a*", "a__b", "a b", "../a"])
def test_a_name_that_the_harness_would_misread_is_refused(tmp_path: Path, lm: LanguageModel, name: str) -> None:
    with pytest.raises(ConfigError, match="task name"):
        write_harness_task(tmp_path / "task", questions(1), TEMPLATE, lm, name, public=True)


def test_nothing_is_overwritten_and_nothing_is_exported_of_no_question(tmp_path: Path, lm: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        write_harness_task(tmp_path, questions(1), TEMPLATE, lm, "task", public=True)
    with pytest.raises(ConfigError, match="no question"):
        write_harness_task(tmp_path / "task", [], TEMPLATE, lm, "task", public=True)


def test_letters_that_are_no_tokens_of_their_own_are_refused(tmp_path: Path, tiny_model_path: Path) -> None:
    lm = load(ModelConfig(id=str(tiny_model_path), device="cpu"), None, seed=0)
    lm.tokenizer.add_tokens(["{B"])
    with pytest.raises(ModelError, match="'B' is not one token"):
        write_harness_task(tmp_path / "task", questions(1), TEMPLATE, lm, "task", public=True)
    assert not (tmp_path / "task").exists()


def test_the_task_is_plain_multiple_choice_with_nothing_between_prompt_and_letter(
    tmp_path: Path, lm: LanguageModel
) -> None:
    write_harness_task(tmp_path / "task", questions(1), TEMPLATE, lm, "task", public=True)
    text = (tmp_path / "task" / "task.yaml").read_text("utf-8").replace("!function ", "")
    task = yaml.safe_load(text)
    assert task["output_type"] == "multiple_choice"
    assert task["target_delimiter"] == ""
    assert "description" not in task  # the harness would put it before every prompt


def test_make_installs_the_harness_that_the_project_names() -> None:
    root = Path(__file__).parents[2]
    named = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]["harness"]
    variable = (root / "Makefile").read_text("utf-8").split("HARNESS :=")[1].split("\n\n")[0]
    assert variable.replace("\\", " ").split() == named
    pinned = (root / "constraints.txt").read_text("utf-8").splitlines()
    assert {one.replace("lm-eval", "lm_eval") for one in named} <= set(pinned)


@pytest.mark.slow
def test_the_harness_agrees_on_the_merged_model_from_its_own_command(tmp_path: Path) -> None:
    """SmolLM2 with the shipped adapter merged in, questions of the SUPPORT ICU registry, one process of its own."""
    from wardround.client.questions import QuestionBuilder
    from wardround.common.config import QuestionsConfig
    from wardround.common.counts import count
    from wardround.common.schema import derive_schema
    from wardround.server.warmup import load_released
    from wardround.simulations import registries

    base = load(ModelConfig(id="smollm2-135m", device="cpu", dtype="float32"), LoraConfig(), seed=0)
    base.set_vector(load_released("smollm2-135m", base).vector_full, trainable_only=False)
    base.save_adapter(tmp_path / "adapter")
    merge_adapter(base.path, tmp_path / "adapter", tmp_path / "model")
    del base
    lm = load(ModelConfig(id=str(tmp_path / "model"), device="cpu", dtype="float32"), None, seed=0)
    registry, template = registries.load("support_icu"), load_prompt("en_usual")
    settings = QuestionsConfig(features_per_record=6)
    schema = derive_schema(count(registry.values, registry.dictionary), registry.dictionary, settings)
    rng = np.random.default_rng(0)
    rows = rng.choice(len(registry), 200)
    asked = QuestionBuilder(registry, schema, template, settings).build(rows, rng)[:100]
    command = write_harness_task(
        tmp_path / "task", asked, template, lm, "support_icu", public=registry.dictionary.public
    )
    words = shlex.split(command.replace("MODEL", str(tmp_path / "model")))
    program = [str(Path(sys.executable).with_name(words[0])), *words[1:]]
    done = subprocess.run(
        [*program, "--device", "cpu", "--log_samples", "--output_path", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    accuracy = json.loads(results.read_text("utf-8"))["results"]["support_icu"]["acc,none"]
    (lines,) = (tmp_path / "out").rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in lines.read_text("utf-8").splitlines()]
    theirs = {s["doc_id"]: int(np.argmax([float(answer[0]) for answer in s["filtered_resps"]])) for s in samples}
    ours = option_log_probs(lm, asked, template, 16).argmax(1)
    assert [theirs[row] for row in range(100)] == ours.tolist()
    assert accuracy == np.mean(ours == [question.answer for question in asked])
    assert not (tmp_path / "hf" / "datasets").exists()  # no copy of the questions stays in a cache
