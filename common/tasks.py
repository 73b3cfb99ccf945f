"""Tasks of the evaluation, as data: which registry, what is asked, what may be shown, and by which groups it is read.

Runs wherever questions are scored. Enters: configs/tasks/*.toml or a user's own file. Leaves: a checked `Task`. Holds
nothing of a patient. A task never widens what the dictionary allows: its context is a part of what may be shown with a
target anyway, so a task file cannot make a question show its own answer; one that tries is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from .config import Frozen, packaged, parse, read_toml
from .dictionary import Dictionary, Feature
from .errors import ConfigError
from .scored import AXES

MOST_EDGES = 11  # of an axis: groups, not single patients
UNKNOWN = ""  # the stratum of a patient whose value is not known

Kind = Literal["denoising", "outcome", "open"]


class Axis(Frozen):
    """How patients are divided: by a feature's levels, by cut points of a number, or by how many of some are "yes".

    `feature` names one; `count` several with a level labelled `level`. `edges`: cut points, a stratum "from low to
    under high" between two of them; categories need none.
    """

    feature: str | None = None
    count: tuple[str, ...] = ()
    level: str = "yes"
    edges: tuple[float, ...] = ()

    @model_validator(mode="after")
    def one_source(self) -> Self:
        if (self.feature is None) == (not self.count):
            raise ValueError("expected either feature or count")
        if self.count and not self.edges:
            raise ValueError("count needs edges, the numbers at which a stratum begins")
        if list(self.edges) != sorted(set(self.edges)):
            raise ValueError(f"edges: expected rising numbers, got {list(self.edges)}")
        if len(self.edges) > MOST_EDGES:
            raise ValueError(f"edges: expected at most {MOST_EDGES}, got {len(self.edges)}: strata of few patients")
        named = [self._between(edge, whole=bool(self.count)) for edge in (-np.inf, *self.edges)] if self.edges else []
        if len(set(named)) < len(named):
            raise ValueError(f"edges: too close to be told apart in six digits, {list(self.edges)}")
        return self

    @property
    def features(self) -> tuple[str, ...]:
        """The columns it reads."""
        return (self.feature,) if self.feature is not None else self.count

    def strata(self, values: Mapping[str, NDArray[Any]], dictionary: Dictionary) -> tuple[str, ...]:
        """The stratum of every row, `UNKNOWN` where a value it needs is missing.

        Args:
            values: columns as a registry holds them: level indices (-1 missing) or numbers (NaN missing).
            dictionary: theirs.
        """
        if self.count:
            having = np.stack([self._has(values[name], dictionary.feature(name)) for name in self.count])
            numbers: list[int] = having.sum(axis=0).tolist()
            return tuple(self._between(number, whole=True) for number in numbers)
        feature = dictionary.feature(self.features[0])
        column = values[feature.name]
        if feature.kind == "category":
            labels = list(feature.levels.values())
            codes: list[int] = column.astype(np.int64).tolist()
            return tuple(UNKNOWN if code < 0 else labels[code] for code in codes)
        cells: list[float] = column.astype(np.float64).tolist()
        return tuple(self._between(cell, whole=False) for cell in cells)

    def labels(self, dictionary: Dictionary) -> tuple[str, ...]:
        """Every stratum there can be, in order, known before any patient is."""
        feature = None if self.count else dictionary.feature(self.features[0])
        if feature is not None and feature.kind == "category":
            return tuple(feature.levels.values())
        edges = self.edges
        return tuple(self._between(value, whole=bool(self.count)) for value in (-np.inf, *edges))

    def _has(self, column: NDArray[Any], feature: Feature) -> NDArray[np.int64]:
        """1 where the level is the one that is counted; a value that is not known counts as not having it."""
        index = list(feature.levels.values()).index(self.level)
        return (column.astype(np.int64) == index).astype(np.int64)

    def _between(self, value: float, whole: bool) -> str:
        if np.isnan(value):
            return UNKNOWN
        edges = self.edges
        place = int(np.searchsorted(edges, value, side="right"))
        if place == 0:
            return f"under {edges[0]:g}"
        if place == len(edges):
            return f"{edges[-1]:g} or more"
        low, high = edges[place - 1], edges[place]
        if whole:
            return f"{low:g}" if high - low == 1 else f"{low:g} to {high - 1:g}"
        return f"{low:g} to under {high:g}"


class Task(Frozen):
    """One task.

    Attributes:
        name, title: for files and for people.
        registry: name of the dictionary that it is about.
        kind: "denoising": masked features; "outcome": the dictionary's outcomes, with probabilities of an event;
            "open": answered in free text, for experts to compare; nothing is scored.
        targets: what is asked; empty for denoising: every feature that can be.
        event: outcome tasks: the label of the level that means "it happened".
        sections: of the record; empty: all.
        context: names of features that may be shown; empty: all of `sections`.
        known_before: only features known before this day are shown (an outcome's own time holds besides).
        question: of an open task, in full.
        only: open tasks: feature or outcome → label; only these patients are asked about.
        metric: the one figure that the task is judged by.
        strata: axis → how patients are divided.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9._-]{1,64}$")]
    title: str
    registry: str
    kind: Kind
    targets: tuple[str, ...] = ()
    event: str | None = None
    sections: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    known_before: float | None = None
    question: str | None = None
    only: Mapping[str, str] = {}
    metric: Literal["accuracy", "balanced_accuracy", "auroc", "preference"] = "accuracy"
    strata: Mapping[str, Axis] = {}

    @model_validator(mode="after")
    def a_kind_has_what_it_needs(self) -> Self:
        if self.kind == "outcome" and not self.targets:
            raise ValueError("an outcome task needs targets")
        if self.kind == "outcome" and len(self.targets) > 1 and self.event is not None:
            raise ValueError("event belongs to a task of one outcome")
        if self.metric == "auroc" and (self.kind != "outcome" or self.event is None):
            raise ValueError("metric 'auroc' needs an outcome task with an event")
        if (self.kind == "open") != (self.question is not None):
            raise ValueError("question belongs to open tasks, which need one")
        if (self.kind == "open") != (self.metric == "preference"):
            raise ValueError("metric 'preference' is that of open tasks: experts compare the answers")
        if self.only and self.kind != "open":
            raise ValueError("only belongs to open tasks: elsewhere strata show groups apart")
        unknown = sorted(set(self.strata) - set(AXES))
        if unknown:
            raise ValueError(f"strata: expected axes among {', '.join(AXES)}, got '{unknown[0]}'")
        return self

    def check(self, dictionary: Dictionary) -> None:
        """Refuses a task that this dictionary cannot serve, or whose context would hold its own answer.

        Raises:
            ConfigError: another registry; a column, level or section that it does not have; a target that is shown
                with itself, that the dictionary hides from it, or that is known only after it.
        """
        where = f"task '{self.name}'"
        if dictionary.name != self.registry:
            raise ConfigError(f"{where}: made for registry '{self.registry}', got '{dictionary.name}'")
        used = {feature.name: feature for feature in dictionary.used}
        asked = (*self.targets, *self.context, *self.only, *(n for axis in self.strata.values() for n in axis.features))
        for name in asked:
            if name not in used:
                raise ConfigError(f"{where}: registry '{dictionary.name}' has no column '{name}' that is read as data")
        sections = {feature.section for feature in dictionary.with_role("feature")}
        missing = [section for section in self.sections if section not in sections]
        if missing:
            raise ConfigError(f"{where}: registry '{dictionary.name}' has no section '{missing[0]}'")
        role = "outcome" if self.kind == "outcome" else "feature"
        for name in self.targets:
            if used[name].role != role:
                raise ConfigError(f"{where}: '{name}' has role '{used[name].role}', a {self.kind} task asks {role}s")
        if self.event is not None and self.event not in used[self.targets[0]].levels.values():
            raise ConfigError(f"{where}: '{self.targets[0]}' has no level labelled '{self.event}'")
        for name, label in self.only.items():
            if label not in used[name].levels.values():
                raise ConfigError(f"{where}: '{name}' has no level labelled '{label}'")
        for axis, division in self.strata.items():
            for name in division.features:
                if used[name].kind == "number" and not division.edges:
                    raise ConfigError(f"{where}: strata '{axis}': '{name}' is a number, so it needs edges")
                if division.count and division.level not in used[name].levels.values():
                    raise ConfigError(f"{where}: strata '{axis}': '{name}' has no level labelled '{division.level}'")
        self._check_context(dictionary)

    def _check_context(self, dictionary: Dictionary) -> None:
        for target in (dictionary.feature(name) for name in self.targets):
            allowed = {feature.name for feature in dictionary.context_of(target)}
            for name in self.context:
                if name == target.name and (self.kind == "outcome" or len(self.targets) == 1):
                    raise ConfigError(f"task '{self.name}': its context holds its own target '{name}'")
                if name != target.name and name not in allowed:
                    why = "gives it away" if name in target.hide else "is no feature known before it"
                    raise ConfigError(f"task '{self.name}': '{name}' cannot be shown with '{target.name}': it {why}")

    def shown(self, dictionary: Dictionary) -> frozenset[str]:
        """Names of the features that its records may show."""
        return frozenset(
            feature.name
            for feature in dictionary.with_role("feature")
            if (not self.sections or feature.section in self.sections)
            and (not self.context or feature.name in self.context)
            and (self.known_before is None or feature.known_at < self.known_before)
        )


def load_task(name_or_path: str | Path) -> Task:
    """A task by its name in configs/tasks or by the path of a TOML file.

    Raises:
        ConfigError: no such task; a key that is unknown or contradicts another.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = packaged("tasks", f"{name_or_path}.toml")
        if not path.exists():
            raise ConfigError(
                f"task '{name_or_path}': no such task; shipped are {', '.join(shipped())}, or give a .toml path"
            )
    return parse(Task, read_toml(path), str(path))


def shipped() -> list[str]:
    """Names of the tasks that come with wardround, sorted."""
    return sorted(item.stem for item in packaged("tasks", "").glob("*.toml"))


def load_tasks(names: Sequence[str], registries: Sequence[str] | None = None) -> list[Task]:
    """The named tasks, or all that are shipped; of these only such as are about one of `registries`."""
    tasks = [load_task(name) for name in (names or shipped())]
    return tasks if names or registries is None else [task for task in tasks if task.registry in registries]
