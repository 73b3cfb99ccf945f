"""Tasks of a federated evaluation: what hospitals send of their own patients' answers, and what follows from the sum.

Role: a hospital turns its scored questions into whole numbers (`TaskSums.of`), a secure sum adds hospitals, the
coordinator reads the result (`read`) and tells it (`told`). Enters: common/scored.py's questions at a hospital, sums at
the coordinator. Leaves: for a task, sums over all patients and over each stratum that the task names (patient_sums.py),
and counts of an event's probabilities (event_sums.py); for several tasks, one more set over all of them, by patient.
Private: a stratum of few patients says much about them; the coordinator can read every sum, and reports none of fewer
than `min_cell` patients. Nothing here is noised, so private runs ask no tasks (common/config.py).

What strata there are follows from task and dictionary alone, so that all hospitals send the same places and none shows
which it has. Not told from sums: calibration curves, position bias, how often an answer was forced, and the result
without one site.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .dictionary import Dictionary
from .errors import ConfigError, ProtocolError
from .event_sums import EVENT_SIZE, EventSums
from .findings import auroc, figures, points
from .intervals import detectable_difference, independent_difference
from .metrics import event_probability, majority_classes
from .model_figures import says_probabilities
from .patient_sums import ClusterSums, PatientSums, sums_size
from .scored import MAJORITY, Scored
from .statistics import CHANCE_UNIT, MAX_COUNT
from .subgroups import correct_family, shown_direction
from .tasks import Task

Ints = NDArray[np.int64]
Cell = tuple[str, str]  # axis and stratum; ("", "") is everybody
EVERYBODY: Cell = ("", "")
CLASS: Cell = ("", "class")  # patients with the event; of features, those whose value is not the most frequent option
MIN_CELL = 10
_SPOKEN = {
    "base": "the base model",
    "warmup": "the warmed-up model",
    "final": "the final model",
    MAJORITY: "always choosing the most frequent option",
}


def run_tasks(tasks: Sequence[Mapping[str, Any]], dictionary: Dictionary) -> list[Task]:
    """The tasks that a run's config holds, checked against its dictionary.

    Raises:
        ConfigError: one that is answered in free text, or one that this dictionary cannot serve.
    """
    found = [Task.model_validate(task) for task in tasks]
    for task in found:
        if task.kind == "open":
            raise ConfigError(f"evaluation.tasks: '{task.name}' is answered in free text, which leaves no hospital")
        if "site" in task.strata:
            raise ConfigError(
                f"evaluation.tasks: '{task.name}' has strata 'site', but a sum does not tell hospitals apart"
            )
        task.check(dictionary)
    return found


def cells_of(task: Task, dictionary: Dictionary) -> list[Cell]:
    """Everybody, one of both classes of balanced accuracy, every stratum of every axis, axes by name.

    For a config that went through JSON may have them in another order.
    """
    strata = [(axis, label) for axis, by in sorted(task.strata.items()) for label in by.labels(dictionary)]
    return [EVERYBODY, CLASS, *strata]


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
        classes = majority_classes(scored.answer, scored.majority, scored.event)
        for axis, label in cells_of(task, dictionary):
            if axis:
                own = np.array([stratum == label for stratum in scored.strata.get(axis, ("",) * len(scored))])
            else:
                own = classes == 1 if label else np.ones(len(scored), np.bool_)
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
        """One question a patient, strata of an axis that are other people, and nobody in one who is not in all."""
        whole = self.cells[EVERYBODY]
        fits = all(map(_of_one_question, self.cells.values()))
        fits = fits and all(_of_one_question(whole.without(cell)) for cell in self.cells.values())
        for axis in ("", *self.task.strata):
            own = [cell for (of, label), cell in self.cells.items() if of == axis and label]
            if own:
                fits = fits and bool(np.all(sum(cell.to_vector() for cell in own) <= whole.to_vector()))
        fits = fits and all(event.n <= whole.patients for event in self.events.values())
        fits = fits and len({(event.n, event.events) for event in self.events.values()}) <= 1
        fits = fits and self.questions * CHANCE_UNIT <= 10 * self.chance <= 10 * self.questions * CHANCE_UNIT
        if not fits:
            raise ProtocolError(f"task '{self.task.name}': sums that contradict each other")


def _of_one_question(sums: PatientSums) -> bool:
    """Whether these can be sums over patients of one question each: 2 × 2 tables of every two models, none negative."""
    right, both, n = np.diag(sums.second), sums.second, sums.patients
    least, most = np.maximum(0, right[:, None] + right - n), np.minimum(right[:, None], right)
    return n == sums.first[0] and np.array_equal(right, sums.first) and bool(np.all((both >= least) & (both <= most)))


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
    vector: Ints,
    tasks: Sequence[Task],
    dictionary: Dictionary,
    models: Sequence[str],
    reference: str,
    final: str,
    most_questions: int,
    min_cell: int = MIN_CELL,
) -> dict[str, Any]:
    """What a run's evaluation.json says of its tasks.

    Args:
        vector: what the hospitals sent of all tasks, summed.
        tasks, dictionary, models: as at the hospitals.
        reference: what changes are taken against: the model before the rounds.
        final: the model after them.
        most_questions: that the hospitals were asked to ask of a task, all together.
        min_cell: fewest patients of whom anything is told.

    Returns:
        "tasks", one entry each; "all_tasks", None of a single one. Where a hospital sent what cannot be, which only the
        sum shows, there are none, and "tasks_unreadable" says so: the run's other results do not depend on it.
    """
    try:
        found, pooled = read(vector, tasks, dictionary, models)
        if any(one.questions > most_questions for one in found):
            raise ProtocolError("sums of tasks: of more questions than were asked for")
    except ProtocolError as error:
        return {"tasks": [], "all_tasks": None, "tasks_unreadable": str(error)}
    everything = None
    # Nothing over all tasks where one is too small to be told: it would follow by subtraction.
    hides = any(0 < one.questions < min_cell for one in found)
    if pooled is not None and pooled.patients >= min_cell and not hides:
        everything = {**_size(pooled), "models": _accuracies(pooled), "paired": _pairs(pooled, final)}
    return {"tasks": [_told(one, reference, final, min_cell) for one in found], "all_tasks": everything}


def _told(sums: TaskSums, reference: str, final: str, min_cell: int) -> dict[str, Any]:
    total, task = sums.cells[EVERYBODY], sums.task
    about = {"name": task.name, "title": task.title, "kind": task.kind, "metric": task.metric, **_size(total)}
    if total.patients < min_cell:
        why = f"{total.patients} patients were asked, too few to tell anything of (expected {min_cell} or more)"
        return {**about, "findings": [why]}
    models = _accuracies(total)
    have, others = sums.cells[CLASS], total.without(sums.cells[CLASS])
    if min(have.patients, others.patients) >= min_cell:
        for name, figures in models.items():
            figures["balanced_accuracy"] = _mean(have.accuracy(name), others.accuracy(name))
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


def _mean(one: ClusterSums, other: ClusterSums) -> dict[str, Any]:
    """Of the accuracies in two groups of other people: balanced accuracy; its interval is of both groups' own."""
    value, (low, high), (below, above) = (one.value + other.value) / 2, one.ci95(), other.ci95()
    least = math.hypot(one.value - low, other.value - below) / 2
    return {"value": value, "ci95": [value - least, value + math.hypot(high - one.value, above - other.value) / 2]}


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
    for axis in sorted(sums.task.strata):
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
    """The strata that may be told: of `min_cell` patients or more, and no smaller one follows by subtraction.

    Patients whose value is not known are no stratum: a few of them alone hide nobody else.

    >>> shown_cells({"young": 40, "old": 12, "oldest": 3}, 55, 10)
    ['young']
    """
    shown = [label for label, number in patients.items() if number >= min_cell]
    while 0 < len(shown) < len(patients) and total - sum(patients[label] for label in shown) < min_cell:
        shown.remove(min(shown, key=lambda label: patients[label]))
    return shown


def _gap(inside: ClusterSums, outside: ClusterSums) -> dict[str, Any] | None:
    """A stratum minus everybody else, who are other patients of one question each; None where nobody else is."""
    return independent_difference(inside.x, inside.n, outside.x, outside.n) if outside.n else None


def compared(pair: Mapping[str, Any], n: int) -> str:
    """A paired difference of `told` in a sentence."""
    final, other = _first(_spoken(pair["model"])), _spoken(pair["against"])
    if way := shown_direction(dict(pair)):
        word = "better" if way > 0 else "worse"
        return f"{final} is {word} than {other} by {100 * abs(pair['difference']):.1f} points ({figures(pair)})."
    told = f"{final} cannot be told apart from {other} ({points(pair['difference'])} points, {figures(pair)}"
    if "detectable" not in pair:
        return f"{told})."
    missed = f"a true difference under {100 * pair['detectable']:.1f} points is missed more than one time in five"
    return f"{told}; with n = {n:,} {missed})."


def _spoken(name: str) -> str:
    return _SPOKEN.get(name, name)


def _first(text: str) -> str:
    """As the beginning of a sentence."""
    return text[:1].upper() + text[1:]


def _findings(summary: Mapping[str, Any]) -> list[str]:
    """The result in sentences: against the model before, the majority option, by subgroup, and how events rank."""
    final, before = _spoken(summary["final"]), _spoken(summary["reference"])
    found: list[str] = []
    for pair in summary["paired"]:
        if pair["against"] in (summary["reference"], MAJORITY):
            found.append(compared(pair, summary["n"]))
    for way, word in (("worse", "worse"), ("better", "better")):
        for row in summary["subgroups"][way]:
            found.append(
                f"{row['axis']} {row['stratum']}: {word} than {before} by "
                f"{100 * abs(row['difference']):.1f} points ({figures(row)})."
            )
    event = summary["models"][summary["final"]].get("event")
    if event:
        had = f"{event['events']:,} of {event['n']:,} had it"
        found.append(f"{_first(final)} ranks patients by the event with {auroc(event['auroc'])}; {had}.")
    return found
