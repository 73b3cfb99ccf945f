"""Tasks of a federated evaluation: what hospitals send of their own patients' answers, and what follows from the sum.

Role: a hospital turns its scored questions into whole numbers (`TaskSums.of`), a secure sum adds hospitals, the
coordinator reads the result (`read`) and tells it (`told`). Enters: common/scored.py's questions at a hospital, sums at
the coordinator. Leaves: for a task, sums over all patients and over each stratum that the task names (patient_sums.py),
and counts of an event's probabilities (event_sums.py); for several tasks, one more set over all of them, by patient.
Private: a stratum of few patients says much about them; the coordinator can read every sum, and reports none of fewer
than `min_cell` patients. Nothing here is noised, so private runs ask no tasks (common/config.py).

What strata there are follows from task and dictionary alone, so that all hospitals send the same places and none shows
which it has. Not had from sums: calibration curves, balanced accuracy, position bias, and the result without one site.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .dictionary import Dictionary
from .errors import ConfigError, ProtocolError
from .event_sums import EVENT_SIZE, EventSums
from .findings import figures, points
from .intervals import detectable_difference
from .metrics import event_probability
from .model_figures import says_probabilities
from .patient_sums import ClusterSums, PatientSums, sums_size
from .scored import MAJORITY, Scored
from .statistics import CHANCE_UNIT, MAX_COUNT, Z95
from .subgroups import correct_family, shown_direction
from .tasks import Task, load_task

Ints = NDArray[np.int64]
Cell = tuple[str, str]  # axis and stratum; ("", "") is everybody
EVERYBODY: Cell = ("", "")
MIN_CELL = 10


def run_tasks(names: Sequence[str], dictionary: Dictionary) -> list[Task]:
    """The shipped tasks that a run's config names, checked against its dictionary.

    Raises:
        ConfigError: no such task, one that is answered in free text, or one that this dictionary cannot serve.
    """
    tasks = [load_task(name) for name in names]
    for task in tasks:
        if task.kind == "open":
            raise ConfigError(f"evaluation.tasks: '{task.name}' is answered in free text, which leaves no hospital")
        task.check(dictionary)
    return tasks


def tasks_digest(tasks: Sequence[Task]) -> str:
    """SHA-256 hex of the tasks' content: hospitals of another version of one would count something else."""
    content = json.dumps([task.model_dump(mode="json") for task in tasks], sort_keys=True)
    return hashlib.sha256(b"wardround tasks 1\0" + content.encode()).hexdigest()


def cells_of(task: Task, dictionary: Dictionary) -> list[Cell]:
    """Everybody, then every stratum of every axis."""
    return [EVERYBODY, *((axis, label) for axis, by in task.strata.items() for label in by.labels(dictionary))]


@dataclass(frozen=True, eq=False)
class TaskSums:
    """Sufficient statistics of one task, for M models.

    Attributes:
        task: whose.
        chance: Σ of `CHANCE_UNIT` / number of options.
        cells: everybody first, then every stratum there can be.
        events: model → its probabilities of the event, of nobody where answers were written out; empty for tasks
            without an event.
    """

    task: Task
    chance: int
    cells: Mapping[Cell, PatientSums]
    events: Mapping[str, EventSums]

    @classmethod
    def of(cls, scored: Scored | None, task: Task, dictionary: Dictionary, models: Sequence[str]) -> Self:
        """The sums of one hospital's questions, at most one a patient; of none, zeros."""
        if scored is None:
            return cls.from_vector(np.zeros(task_size(task, dictionary, models), np.int64), task, dictionary, models)
        right = np.stack([scored.correct(name) for name in (*models, MAJORITY)], axis=1)
        cells: dict[Cell, PatientSums] = {}
        for axis, label in cells_of(task, dictionary):
            own = np.array([not axis or stratum == label for stratum in scored.strata.get(axis, ("",) * len(scored))])
            cells[axis, label] = PatientSums.of_answers(models, scored.patients[own], right[own])
        events: dict[str, EventSums] = {}
        if task.event is not None:
            # Of answers that were written out no probability is known: then nobody's is counted.
            known = all(says_probabilities(scored.models[name], scored.n_options) for name in models)
            rows = np.flatnonzero((scored.event >= 0) & known)
            happened = scored.answer[rows] == scored.event[rows]
            for name in models:
                said = event_probability(scored.models[name].probabilities[rows], scored.event[rows])
                events[name] = EventSums.of(said, happened)
        return cls(task, int(np.sum(CHANCE_UNIT // scored.n_options)), cells, events)

    @property
    def questions(self) -> int:
        """Of everybody."""
        return int(self.cells[EVERYBODY].first[0])

    def to_vector(self) -> Ints:
        """int64 (`task_size`,) of 0 or more: adding vectors adds patients."""
        parts = [np.array([self.chance], np.int64), *(cell.to_vector() for cell in self.cells.values())]
        return np.concatenate([*parts, *(event.to_vector() for event in self.events.values())])

    @classmethod
    def from_vector(cls, vector: Ints, task: Task, dictionary: Dictionary, models: Sequence[str]) -> Self:
        """The sums whose entries are `vector`.

        Raises:
            ProtocolError: wrong length, an entry out of range, or sums that contradict each other.
        """
        if vector.shape != (task_size(task, dictionary, models),):
            raise ProtocolError(f"task '{task.name}': expected {task_size(task, dictionary, models)} sums")
        names, size = cells_of(task, dictionary), sums_size(models)
        cells, events = np.split(vector[1:], [size * len(names)])
        of_cells = [PatientSums.from_vector(part, models) for part in cells.reshape(-1, size)]
        of_events = [EventSums.from_vector(part) for part in events.reshape(-1, EVENT_SIZE)]
        found = cls(
            task,
            int(vector[0]),
            dict(zip(names, of_cells, strict=True)),
            dict(zip(models, of_events, strict=True)) if of_events else {},
        )
        found._check()
        return found

    def _check(self) -> None:
        total = self.cells[EVERYBODY]
        inside = dict.fromkeys(self.task.strata, 0)
        for (axis, _), cell in self.cells.items():
            if axis:
                inside[axis] += cell.patients
        fits = all(number <= total.patients for number in inside.values())
        fits = fits and all(event.n <= total.patients for event in self.events.values())
        fits = fits and len({(event.n, event.events) for event in self.events.values()}) <= 1
        fits = fits and self.questions * CHANCE_UNIT <= 10 * self.chance <= 10 * self.questions * CHANCE_UNIT
        if not fits:
            raise ProtocolError(f"task '{self.task.name}': sums that contradict each other")


def task_size(task: Task, dictionary: Dictionary, models: Sequence[str]) -> int:
    """Length of a task's vector."""
    events = len(models) * EVENT_SIZE if task.event is not None else 0
    return 1 + sums_size(models) * len(cells_of(task, dictionary)) + events


def tasks_size(tasks: Sequence[Task], dictionary: Dictionary, models: Sequence[str]) -> int:
    """Length of what a hospital sends of all tasks: each task's vector, then the sums over all, where there are two."""
    return sum(task_size(task, dictionary, models) for task in tasks) + (sums_size(models) if len(tasks) > 1 else 0)


def read(
    vector: Ints, tasks: Sequence[Task], dictionary: Dictionary, models: Sequence[str]
) -> tuple[list[TaskSums], PatientSums | None]:
    """Every task's sums, and those over all tasks, None of a single one.

    Raises:
        ProtocolError: not sums of these tasks.
    """
    if vector.shape != (tasks_size(tasks, dictionary, models),) or np.any(vector < 0) or np.any(vector > MAX_COUNT):
        raise ProtocolError("sums of tasks: another length than these tasks have, or a number out of range")
    found: list[TaskSums] = []
    for task in tasks:
        size = task_size(task, dictionary, models)
        found.append(TaskSums.from_vector(vector[:size], task, dictionary, models))
        vector = vector[size:]
    if len(tasks) < 2:
        return found, None
    pooled = PatientSums.from_vector(vector, models)
    if pooled.first[0] != sum(one.questions for one in found):
        raise ProtocolError("sums of tasks: all of them together are of another number of questions")
    return found, pooled


def told(
    found: Sequence[TaskSums], pooled: PatientSums | None, reference: str, final: str, min_cell: int = MIN_CELL
) -> dict[str, Any]:
    """What a run's evaluation.json says of its tasks: "tasks", one entry each, and "all_tasks", None of a single one.

    Args:
        found, pooled: as `read` gives them, summed over hospitals.
        reference: what changes are taken against: the model before the rounds.
        final: the model after them.
        min_cell: fewest patients of whom anything is told.
    """
    everything = None
    if pooled is not None and pooled.patients >= min_cell:
        everything = {**_size(pooled), "models": _accuracies(pooled), "paired": _pairs(pooled, final)}
    return {"tasks": [_told(one, reference, final, min_cell) for one in found], "all_tasks": everything}


def _told(sums: TaskSums, reference: str, final: str, min_cell: int) -> dict[str, Any]:
    total, task = sums.cells[EVERYBODY], sums.task
    about = {"name": task.name, "title": task.title, "kind": task.kind, "metric": task.metric, **_size(total)}
    if total.patients < min_cell:
        why = f"{total.patients} patients were asked, too few to tell anything of (expected {min_cell} or more)"
        return {**about, "findings": [why]}
    models = _accuracies(total)
    for name, event in sums.events.items():
        fewest = min(event.events, event.n - event.events)
        models[name]["event"] = _event(event) if fewest >= min_cell else None
    summary = {
        **about,
        "reference": reference,
        "final": final,
        "min_cell": min_cell,
        "chance": sums.chance / CHANCE_UNIT / sums.questions,
        "models": models,
        "paired": _pairs(total, final),
        "subgroups": _subgroups(sums, reference, final, min_cell),
    }
    return {**summary, "findings": _findings(summary)}


def _size(sums: PatientSums) -> dict[str, int]:
    return {"n": int(sums.first[0]), "patients": sums.patients}


def _figure(ratio: ClusterSums) -> dict[str, Any]:
    return {"value": ratio.value, "ci95": ratio.ci95()}


def _accuracies(sums: PatientSums) -> dict[str, dict[str, Any]]:
    return {name: {"accuracy": _figure(sums.accuracy(name))} for name in (*sums.models, MAJORITY)}


def _event(event: EventSums) -> dict[str, Any]:
    (area, about_area), (score, about_score) = event.auroc(), event.brier()
    return {
        "n": event.n,
        "events": event.events,
        "auroc": {"value": area, "ci95": about_area},
        "brier": {"value": score, "ci95": about_score},
    }


def _pairs(sums: PatientSums, final: str) -> list[dict[str, Any]]:
    """Final against every other model and the majority option."""
    pairs: list[dict[str, Any]] = []
    for against in (*(name for name in sums.models if name != final), MAJORITY):
        pair: dict[str, Any] = {"model": final, "against": against, **sums.compare(final, against)}
        if pair["only_model"] is not None:
            n = int(sums.first[0])
            pair["detectable"] = detectable_difference(n, (pair["only_model"] + pair["only_against"]) / n)
        pairs.append(pair)
    return pairs


def _subgroups(sums: TaskSums, reference: str, final: str, min_cell: int) -> dict[str, Any]:
    """As common/subgroups.py tells them, for the final model: accuracy, gap to everybody else, change."""
    total, axes = sums.cells[EVERYBODY], dict[str, Any]()
    for axis in sums.task.strata:
        cells = {label: cell for (of, label), cell in sums.cells.items() if of == axis and cell.patients}
        kept = shown_cells({label: cell.patients for label, cell in cells.items()}, total.patients, min_cell)
        hidden = total.patients - sum(cells[label].patients for label in kept)
        strata = [
            {
                "stratum": label,
                **_size(cells[label]),
                "accuracy": _figure(cells[label].accuracy(final)),
                "gap": _gap(cells[label].accuracy(final), total.without(cells[label]).accuracy(final)),
                "change": cells[label].compare(final, reference),
            }
            for label in kept
        ]
        axes[axis] = {"strata": strata, "hidden_patients": hidden}
    rows = [row for axis in axes.values() for row in axis["strata"]]
    for kind in ("gap", "change"):
        correct_family([row[kind] for row in rows if row[kind] is not None])
    named: dict[int, list[dict[str, Any]]] = {-1: [], 0: [], 1: []}
    for axis, table in axes.items():
        for row in table["strata"]:
            named[shown_direction(row["change"])].append({"axis": axis, "stratum": row["stratum"], **row["change"]})
    return {"axes": axes, "worse": named[-1], "better": named[1]}


def shown_cells(patients: Mapping[str, int], total: int, min_cell: int) -> list[str]:
    """The strata that may be told: of `min_cell` patients or more, and no small rest follows by subtraction.

    >>> shown_cells({"young": 40, "old": 12, "oldest": 3}, 55, 10)
    ['young']
    """
    shown = [label for label, number in patients.items() if number >= min_cell]
    while shown and 0 < total - sum(patients[label] for label in shown) < min_cell:
        shown.remove(min(shown, key=lambda label: patients[label]))
    return shown


def _gap(inside: ClusterSums, outside: ClusterSums) -> dict[str, Any] | None:
    """A stratum minus everybody else, who are other patients; None where nobody else is."""
    if outside.patients < 2 or inside.patients < 2:
        return None
    difference = inside.value - outside.value
    error = math.hypot(inside.standard_error, outside.standard_error)
    low, high = max(-1.0, difference - Z95 * error), min(1.0, difference + Z95 * error)
    p = math.erfc(abs(difference) / error / math.sqrt(2)) if error else 1.0
    return {"difference": difference, "ci95": [low, high], "p": p}


def compared(pair: Mapping[str, Any], n: int) -> str:
    """A paired difference of `told` in a sentence."""
    final = pair["model"]
    other = "always choosing the most frequent option" if pair["against"] == MAJORITY else pair["against"]
    if way := shown_direction(dict(pair)):
        word = "better" if way > 0 else "worse"
        return f"{final} is {word} than {other} by {100 * abs(pair['difference']):.1f} points ({figures(pair)})."
    told = f"{final} cannot be told apart from {other} ({points(pair['difference'])} points, {figures(pair)}"
    if "detectable" not in pair:
        return f"{told})."
    missed = f"a true difference under {100 * pair['detectable']:.1f} points is missed more than one time in five"
    return f"{told}; with n = {n:,} {missed})."


def _findings(summary: Mapping[str, Any]) -> list[str]:
    """The result in sentences: against the model before, the majority option, by subgroup, and how events rank."""
    final, found = summary["final"], list[str]()
    for pair in summary["paired"]:
        if pair["against"] in (summary["reference"], MAJORITY):
            found.append(compared(pair, summary["n"]))
    for way, word in (("worse", "worse"), ("better", "better")):
        for row in summary["subgroups"][way]:
            found.append(
                f"{row['axis']} {row['stratum']}: {word} than {summary['reference']} by "
                f"{100 * abs(row['difference']):.1f} points ({figures(row)})."
            )
    event = summary["models"][final].get("event")
    if event:
        low, high = event["auroc"]["ci95"]
        found.append(
            f"{final} ranks the event with AUROC {event['auroc']['value']:.3f} ({low:.3f} to {high:.3f}; "
            f"{event['events']:,} of {event['n']:,} had it; 0.5 is guessing)."
        )
    return found
