"""Federated against centralised against alone: the same questions of test patients, answered by every arm's model.

Run on one machine over an open registry, by `wardround simulate experiment federated`. Every arm is a whole run
(simulations/federation.py) from the same warmed-up adapter; per round and step all arms together ask as many questions:

    federated     `sites` hospitals of equal size
    skewed        as many hospitals, unequal: Dirichlet over `partition_feature`
    centralised   one site with all patients, `sites` times the patients a step
    local         each hospital alone, with its share of the questions: its own schema, no exchange; mean over hospitals

Beside them, without training here: the base and the warmed-up model, the majority option, and gradient boosting on the
same masked inputs (client/tabular.py). A seed decides the split of patients, the partition, and all draws, so arms of
one seed share their test patients and their questions; comparisons are paired.

OUT/outcomes/ gets one file an arm and seed as soon as it is scored, so an interrupted experiment goes on where it was.
Settings are searched with the exam put to validation patients (`split`); test patients are for the settings chosen.
Test patients' rows are open data here; nothing of this runs at a hospital.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...client.questions import QuestionBuilder
from ...client.registry import Registry, split_rows, write_registry
from ...client.tabular import tabular_probabilities
from ...common.config import RunConfig
from ...common.counts import count
from ...common.dictionary import dump_dictionary
from ...common.errors import ConfigError, RunFolderError
from ...common.files import write_atomic
from ...common.question import Question, load_prompt
from ...common.schema import derive_schema
from ...common.seeds import derive_rng
from ...server.tracking import Progress
from ..federation import divide, load_registry, simulate, split_key
from ..partition import site_names
from . import figure

ARMS = ("federated", "skewed", "centralised", "local")
REFERENCES = ("base", "warmup", "majority", "ceiling")  # what needs no training in this experiment
# (name, arm, what it is compared with)
COMPARISONS = (
    ("federated - warmup", "federated", "warmup"),
    ("federated - majority", "federated", "majority"),
    ("federated - centralised", "federated", "centralised"),
    ("federated - local", "federated", "local"),
    ("skewed - federated", "skewed", "federated"),
    ("ceiling - federated", "ceiling", "federated"),
)
SKEW_ALPHA = 0.3
BOOTSTRAP = 10_000
Say = Callable[[str], None]
Split = Literal["test", "validation"]


@dataclass(frozen=True, eq=False)
class Exam:
    """The held-out questions of one seed, the same for every arm."""

    registry: Registry
    builder: QuestionBuilder
    questions: list[Question]
    rows: np.ndarray  # of the registry, one a question
    shown: np.ndarray  # bool (questions, features)
    train_rows: np.ndarray
    key: str  # what it follows from: another config, split or number of questions has another

    @property
    def patients(self) -> np.ndarray:
        return self.registry.patients[self.rows]


def make_exam(config: RunConfig, per_patient: int, split: Split = "test") -> Exam:
    """Questions of all held-out patients under the schema of all training patients.

    Args:
        config: of the federated arm with this seed.
        per_patient: questions of each of these patients.
        split: which patients.
    """
    registry = load_registry(config)
    splits = split_rows(registry, bytes.fromhex(split_key(config)))
    train = registry.take(splits["train"])
    schema = derive_schema(count(train.values, registry.dictionary), registry.dictionary, config.questions)
    builder = QuestionBuilder(registry, schema, load_prompt(config.model.prompt), config.questions)
    questions, rows, shown = builder.build_with_records(
        np.tile(splits[split], per_patient), derive_rng(config.seed, f"experiment {split} questions")
    )
    key = f"{config.digest()} {split} {per_patient}"
    return Exam(registry, builder, questions, rows, shown, splits["train"], key)


def arm_configs(config: RunConfig, arm: str, exam: Exam, out: Path) -> list[RunConfig]:
    """The run or, for `local`, the runs of an arm; tables of single hospitals are written below `out`."""
    settings, sites = config.simulation, config.simulation.sites
    one = {"min_sites": 1, "secure_aggregation": "none"}  # of one site there is no sum; the integers are the same
    if arm in ("federated", "skewed"):
        return [arm_config(config, arm, exam)]
    if arm == "centralised":
        return [
            _with(
                config,
                simulation=settings.model_copy(update={"sites": 1}),
                federation=config.federation.model_copy(
                    update={
                        **one,
                        "validation_questions_per_site": sites * config.federation.validation_questions_per_site,
                    }
                ),
                grpo=config.grpo.model_copy(update={"patients_per_step": sites * config.grpo.patients_per_step}),
            )
        ]
    configs: list[RunConfig] = []
    for name, rows in zip(site_names(sites), divide(exam.registry, config), strict=True):
        folder = out / "tables" / f"seed-{config.seed}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        write_registry(exam.registry.take(rows), folder / "table.parquet")
        write_atomic(folder / "dictionary.toml", dump_dictionary(exam.registry.dictionary).encode(), mode=0o644)
        source = {
            "registry": str(folder / "table.parquet"),
            "dictionary": str(folder / "dictionary.toml"),
            "sites": 1,
            "partition": "even",
        }
        configs.append(
            _with(
                config,
                simulation=settings.model_copy(update=source),
                federation=config.federation.model_copy(update=one),
            )
        )
    return configs


def arm_config(config: RunConfig, arm: str, exam: Exam) -> RunConfig:
    """The run of several hospitals: `federated` or `skewed`."""
    if arm == "federated":
        return config
    skew = {
        "partition": "dirichlet",
        "partition_feature": skew_feature(config, exam),
        "dirichlet_alpha": SKEW_ALPHA,
    }
    return _with(config, simulation=config.simulation.model_copy(update=skew))


def check_budget(config: RunConfig, arm: str, exam: Exam) -> None:
    """Refuses an arm that would ask fewer questions than the others: a step asks a patient once at most.

    Raises:
        ConfigError: names the hospital with the fewest training patients.
    """
    settings = arm_config(config, arm, exam) if arm in ("federated", "skewed") else config
    if arm == "centralised":
        numbers = [len(np.unique(exam.registry.patients[exam.train_rows]))]
        needed = config.simulation.sites * config.grpo.patients_per_step
    else:
        numbers = [
            len(np.unique(exam.registry.patients[np.intersect1d(rows, exam.train_rows)]))
            for rows in divide(exam.registry, settings)
        ]
        needed = config.grpo.patients_per_step
    if min(numbers) < needed:
        raise ConfigError(
            f"arm '{arm}', seed {config.seed}: a hospital has {min(numbers)} training patients, and a step asks "
            f"{needed:g}: its share of the questions cannot be reached in {config.federation.rounds} rounds. Lower "
            "grpo.patients_per_step, use fewer sites, or leave the arm out with --arms"
        )


def skew_feature(config: RunConfig, exam: Exam) -> str:
    """What hospitals of the `skewed` arm differ in: the config's feature, else the first category of the dictionary."""
    dictionary = exam.registry.dictionary
    categories = [feature.name for feature in dictionary.with_role("feature") if feature.kind == "category"]
    return config.simulation.partition_feature or categories[0]


def _with(config: RunConfig, **sections: Any) -> RunConfig:
    """The config with other sections, checked again."""
    return RunConfig.model_validate({**config.model_dump(), **{k: v.model_dump() for k, v in sections.items()}})


def run(
    config: RunConfig,
    out: Path,
    *,
    seeds: Sequence[int],
    arms: Sequence[str] = ARMS,
    references: Sequence[str] = REFERENCES,
    per_patient: int = 1,
    split: Split = "test",
    jobs: int = 1,
    progress: Progress | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """The whole experiment; what OUT holds already is not done again.

    Args:
        config: of the federated arm; its seed is replaced by each of `seeds`.
        out: a folder.
        seeds: of splits, partitions and draws.
        arms: of `ARMS`.
        references: of `REFERENCES`.
        per_patient: questions of each held-out patient.
        split: which patients are asked.
        jobs: arms and references at a time, each in a process of its own; above 1 `progress` is not told.
        progress: of the runs.
        say: told what is being done.

    Returns:
        The content of OUT/federated.json; single outcomes are in OUT/outcomes.json.gz, a picture in OUT/federated.svg.

    Raises:
        ConfigError: a hospital of some arm has too few patients for its share of the questions.
    """
    names = [*arms, *references]
    exams = {seed: make_exam(_seeded(config, seed), per_patient, split) for seed in seeds}
    for seed, exam in exams.items():
        for arm in arms:
            check_budget(_seeded(config, seed), arm, exam)
    if jobs > 1:
        missing = [(name, seed) for name in names for seed in seeds if not _path(out, name, seed).exists()]
        _side_by_side(config, out, missing, per_patient, split, jobs, say)
    found: dict[int, dict[str, Any]] = {}
    for seed, exam in exams.items():
        settings = _seeded(config, seed)
        found[seed] = {
            "patients": exam.patients.tolist(),
            "targets": [question.target for question in exam.questions],
            "chance": [1 / len(question.options) for question in exam.questions],
            "correct": {name: _outcome(name, settings, exam, out, progress, say) for name in names},
        }
    result = {"split": split, **summarise(found)}
    raw = json.dumps({str(seed): entry for seed, entry in found.items()}, separators=(",", ":")).encode()
    write_atomic(out / "outcomes.json.gz", gzip.compress(raw, mtime=0), mode=0o644)
    write_atomic(out / "federated.json", (json.dumps(result, indent=1) + "\n").encode(), mode=0o644)
    curves = {arm: [c for seed in seeds if (c := _curve(out, arm, seed))] for arm in arms if arm != "local"}
    picture = figure.draw(result, {arm: several for arm, several in curves.items() if several})
    write_atomic(out / "federated.svg", picture.encode(), mode=0o644)
    return result


def _curve(out: Path, arm: str, seed: int) -> list[tuple[int, float]]:
    """(questions so far, validation accuracy) before the first round and after each; empty without the run's folder."""
    folder, asked, curve = out / "runs" / f"{arm}-seed-{seed}-0", 0, list[tuple[int, float]]()
    if not (folder / "run.json").is_file():
        return curve
    before = json.loads((folder / "run.json").read_text(encoding="utf-8"))["baseline"]["accuracy"]
    if before is not None:
        curve.append((0, before))
    for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        asked += record["questions"]
        if record["validation_accuracy"] is not None:
            curve.append((asked, record["validation_accuracy"]))
    return curve


def _seeded(config: RunConfig, seed: int) -> RunConfig:
    """The config of one seed. A run's own test is not the experiment's: one question a site keeps it out of the way."""
    evaluation = config.evaluation.model_copy(update={"questions_per_site": 1, "samples": 0})
    return _with(config.model_copy(update={"seed": seed}), evaluation=evaluation)


def _side_by_side(
    config: RunConfig,
    out: Path,
    missing: Sequence[tuple[str, int]],
    per_patient: int,
    split: Split,
    jobs: int,
    say: Say,
) -> None:
    """Makes outcomes in `jobs` processes: on a GPU one small model leaves most of it idle."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(min(jobs, len(missing) or 1), mp_context=context) as pool:
        begun = {
            pool.submit(_one_of_many, config, out, name, seed, per_patient, split, threads): (name, seed)
            for name, seed in missing
        }
        try:
            for done in as_completed(begun):
                done.result()
                say("{}, seed {}: done".format(*begun[done]))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _one_of_many(
    config: RunConfig, out: Path, name: str, seed: int, per_patient: int, split: Split, threads: int
) -> None:
    """One outcome, in a process of its own."""
    from ...common.cli import limit_threads, quiet_third_parties

    quiet_third_parties()
    limit_threads(config.speed.threads or threads)
    settings = _seeded(config, seed)
    _outcome(name, settings, make_exam(settings, per_patient, split), out)


def _run_arm(arm: str, config: RunConfig, exam: Exam, out: Path, progress: Progress | None, say: Say) -> list[float]:
    """Trains an arm and answers the exam: share of its models that had each question right."""
    right: list[np.ndarray] = []
    for index, settings in enumerate(arm_configs(config, arm, exam, out)):
        folder = out / "runs" / f"{arm}-seed-{config.seed}-{index}"
        say(f"{arm}, seed {config.seed}: {folder}")
        simulate(settings, folder, resume=True, progress=progress)
        right.append(_answers(settings, exam, folder / "adapter"))
        shutil.rmtree(folder / "model", ignore_errors=True)  # the adapter says as much in a fiftieth of the space
    return np.mean(right, axis=0).tolist()


def _reference(name: str, config: RunConfig, exam: Exam, say: Say) -> list[float]:
    """What needs no training in this experiment."""
    if name == "majority":
        return [float(question.majority == question.answer) for question in exam.questions]
    say(f"{name}, seed {config.seed}")
    if name == "ceiling":
        chosen = tabular_probabilities(
            "gradient boosting", exam.builder, exam.train_rows, exam.questions, exam.rows, exam.shown, config.seed
        ).argmax(axis=1)
        return [float(question.answer == choice) for question, choice in zip(exam.questions, chosen, strict=True)]
    return _answers(config, exam, None, base=name == "base").tolist()


def _answers(config: RunConfig, exam: Exam, adapter: Path | None, *, base: bool = False) -> np.ndarray:
    """Right or not, float64 (questions,), of the base model, of the warmed-up one, or of an adapter folder."""
    from ...client.evaluation import evaluate_questions
    from ...common.lm import models
    from ...server.warmup import round_zero_adapter

    lm = models.shared(config.model, config.lora, config.seed)
    template = load_prompt(config.model.prompt)
    if adapter is not None:
        lm.load_adapter_folder(adapter)
    elif not base:
        round_zero_adapter(lm, config)
    if base:
        with lm.base_only():
            return evaluate_questions(lm, exam.questions, template, config).correct.astype(np.float64)
    return evaluate_questions(lm, exam.questions, template, config).correct.astype(np.float64)


def _path(out: Path, name: str, seed: int) -> Path:
    return out / "outcomes" / f"{name}-seed-{seed}.json"


def _outcome(
    name: str,
    config: RunConfig,
    exam: Exam,
    out: Path,
    progress: Progress | None = None,
    say: Say = lambda text: None,
) -> list[float]:
    """What an arm or a reference answered, from disk or made now.

    Raises:
        RunFolderError: the folder holds another experiment's answer.
    """
    path = _path(out, name, config.seed)
    if not path.exists():
        if name in ARMS:
            right = _run_arm(name, config, exam, out, progress, say)
        else:
            right = _reference(name, config, exam, say)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(
            path,
            json.dumps({"name": name, "seed": config.seed, "exam": exam.key, "correct": right}).encode(),
            mode=0o644,
        )
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["exam"] != exam.key:
        raise RunFolderError(f"{path}: answers of another config, split or number of questions; use another --out")
    return list(found["correct"])


def summarise(found: Mapping[int, Mapping[str, Any]], n_bootstrap: int = BOOTSTRAP) -> dict[str, Any]:
    """Accuracies over all seeds, paired differences, both with 95 % intervals.

    Intervals resample patients, not questions: a patient may be a test patient of several seeds, and a seed's models
    are the same for all patients, so the spread between seeds is given beside them.

    Args:
        found: seed → "patients", "chance", "targets", and "correct": name → share right of each question.

    Returns:
        "seeds", "n", "chance"; "arms": name → accuracy, ci95, by_seed; "comparisons": name → difference, ci95, by_seed.
    """
    seeds = sorted(found)
    names = list(found[seeds[0]]["correct"])
    patients, cluster = np.unique(np.concatenate([found[s]["patients"] for s in seeds]), return_inverse=True)
    right = {name: np.concatenate([found[s]["correct"][name] for s in seeds]) for name in names}
    sizes = [len(found[s]["patients"]) for s in seeds]
    weights = np.random.default_rng(0).multinomial(
        len(patients), np.full(len(patients), 1 / len(patients)), n_bootstrap
    )
    asked = weights @ np.bincount(cluster, minlength=len(patients))

    def estimate(values: np.ndarray) -> dict[str, Any]:
        drawn = weights @ np.bincount(cluster, values, minlength=len(patients)) / asked
        low, high = np.quantile(drawn, [0.025, 0.975])
        parts = np.split(values, np.cumsum(sizes)[:-1])
        return {
            "mean": float(values.mean()),
            "ci95": [float(low), float(high)],
            "by_seed": [float(part.mean()) for part in parts],
        }

    return {
        "seeds": seeds,
        "n": int(sum(sizes)),
        "patients": len(patients),
        "chance": float(np.mean(np.concatenate([found[s]["chance"] for s in seeds]))),
        "arms": {name: estimate(right[name]) for name in names},
        "comparisons": {
            label: estimate(right[one] - right[other])
            for label, one, other in COMPARISONS
            if one in right and other in right
        },
    }
