"""The tasks of a run's evaluation at one hospital: its own test patients' questions, and the sums that leave of them.

Run by the site, in the test phase of a run whose config names tasks. Enters: tasks, this site's test patients, what
each model answered. Leaves, as a part of the payload of a secure sum: whole numbers (common/task_sums.py); a task that
this hospital's policy does not allow, or that none of its patients can be asked, adds zeros. Private: the questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.config import PolicyConfig
from ..common.dictionary import Dictionary
from ..common.errors import ConfigError, RegistryError
from ..common.patient_sums import PatientSums, sums_size
from ..common.schema import Schema
from ..common.scored import MAJORITY
from ..common.seeds import derive_rng
from ..common.task_sums import TaskSums
from ..common.tasks import UNKNOWN, Task
from . import policy
from .exam import Exam, answered, make_exam
from .folder import SiteRun

Ints = NDArray[np.int64]


def make_exams(run: SiteRun, schema: Schema, tasks: Sequence[Task]) -> list[Exam | None]:
    """Each task's questions, one a test patient, at most `evaluation.questions_per_site`.

    Args:
        run: of this site, without differential privacy.
        schema: the published one.
        tasks: the run's, checked against the dictionary.

    Returns:
        One entry a task; None: nobody can be asked, or fewer than this hospital's policy adds to a sum.

    Raises:
        RefusedError: the policy leaves no target to ask at all.
    """
    site, allowed = run.site, policy.allowed_targets(run.site.config.policy, schema.names)
    exams: list[Exam | None] = []
    for task in tasks:
        left = [name for name in task.targets or schema.names if name in allowed]
        rng = derive_rng(run.config.seed, "task", task.name, site.config.name)
        asked, most = task.model_copy(update={"targets": tuple(left)}), run.config.evaluation.questions_per_site
        exam = None
        if left:
            with suppress(ConfigError, RegistryError):  # the schema has none of its targets; nobody has a value
                exam = make_exam(asked, site.registry, site.splits, schema, run.template, run.config, most, rng)
        enough = exam is not None and policy.enough_test_patients(site.config.policy, len(exam.questions))
        exams.append(exam if enough else None)
    return exams


def task_vector(
    tasks: Sequence[Task],
    exams: Sequence[Exam | None],
    outcomes: Mapping[str, Sequence[Any]],
    dictionary: Dictionary,
    site_policy: PolicyConfig,
) -> Ints:
    """What this site adds to the sum of all tasks (`common.task_sums.tasks_size` numbers).

    An axis that divides patients by what this hospital never asks has zeros from it.

    Args:
        tasks: the run's.
        exams: as `make_exams` gives them.
        outcomes: model → `common.lm.answers.Outcomes` of every exam there is, in their order.
        dictionary: of the registry.
        site_policy: this hospital's.
    """
    models, parts, never = tuple(outcomes), list[Ints](), set(site_policy.targets_never_asked)
    people: list[NDArray[Any]] = []
    right: list[NDArray[np.bool_]] = []
    asked = 0
    for task, exam in zip(tasks, exams, strict=True):
        scored = None
        if exam is not None:
            options = [len(question.options) for question in exam.questions]
            scored = exam.scored({name: answered(found[asked], options) for name, found in outcomes.items()}, {})
            divided = {
                axis: (UNKNOWN,) * len(scored) if never & set(task.strata[axis].features) else labels
                for axis, labels in scored.strata.items()
                if axis in task.strata
            }
            scored = replace(scored, strata=divided)
            people.append(exam.registry.patients[exam.rows].astype(str))
            right.append(np.stack([scored.correct(name) for name in (*models, MAJORITY)], axis=1))
            asked += 1
        parts.append(TaskSums.of(scored, task, dictionary, models).to_vector())
    if len(tasks) > 1:
        if people:
            parts.append(PatientSums.of_answers(models, np.concatenate(people), np.concatenate(right)).to_vector())
        else:
            parts.append(np.zeros(sums_size(models), np.int64))
    return np.concatenate(parts)
