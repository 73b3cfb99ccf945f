"""Questions from a hospital's registry: mask one value, drop what gives it away, draw options, write the prompt.

Runs at a hospital. Enters: its registry, the published schema, a prompt template. What comes out are `Question`s, which
hold patients' records and never leave the hospital. Which letter is right depends on the row's own value and the
generator alone, never on other patients of the hospital.

Vectorised over rows: every column writes each of its distinct values once, and rows are joined from those lines.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import cast

import numpy as np

from ..common.config import QuestionsConfig
from ..common.counts import grid
from ..common.dictionary import Feature
from ..common.errors import ConfigError
from ..common.question import LETTERS, PromptTemplate, Question
from ..common.schema import Schema
from .options import draw_options
from .registry import Registry
from .usual import usual_words

CHUNK_ROWS = 4096


class QuestionBuilder:
    """Makes questions from rows of one registry; the same generator state gives the same questions.

    Formal Guarantees: a record never shows the target, an outcome, a feature that the schema or the dictionary hides
    from the target, or (for an outcome) a feature known at the outcome's time or later.

    Raises:
        VerificationError: the schema was derived over another dictionary.
    """

    def __init__(
        self,
        registry: Registry,
        schema: Schema,
        template: PromptTemplate,
        settings: QuestionsConfig,
        context: Collection[str] | None = None,
    ) -> None:
        """A builder over `registry`; `context`: names of the features that may be shown at all, None: every one."""
        dictionary = registry.dictionary
        schema.verify(dictionary)
        self.registry, self.schema, self.template, self.settings = registry, schema, template, settings
        sections = list(dict.fromkeys(feature.section for feature in dictionary.with_role("feature")))
        self._shown = sorted(dictionary.with_role("feature"), key=lambda feature: sections.index(feature.section))
        self._targets = [dictionary.feature(name) for name in schema.names]
        self._is_outcome = np.array([target.role == "outcome" for target in self._targets], dtype=bool)
        self._visible = np.zeros((len(self._targets), len(self._shown)), dtype=bool)  # may be shown with the target
        self._information = np.zeros(self._visible.shape)
        self._own = np.full(len(self._targets), -1)  # the target's own place in the record
        self._usual: dict[int, str] = {}  # what a question says is usual of its target, as they are first asked
        for t, target in enumerate(self._targets):
            allowed = {feature.name for feature in dictionary.context_of(target)} - set(schema.hidden[target.name])
            if context is not None:
                allowed &= set(context)
            for f, feature in enumerate(self._shown):
                self._visible[t, f] = feature.name in allowed
                self._information[t, f] = schema.mi[target.name].get(feature.name, 0.0)
                if feature.name == target.name:
                    self._own[t] = f

    def build(
        self, rows: np.ndarray, rng: np.random.Generator, *, targets: Sequence[str] | None = None
    ) -> list[Question]:
        """`build_with_rows` without the rows."""
        return self.build_with_rows(rows, rng, targets=targets)[0]

    def build_with_rows(
        self, rows: np.ndarray, rng: np.random.Generator, *, targets: Sequence[str] | None = None
    ) -> tuple[list[Question], np.ndarray]:
        """One question for every row that has something to ask and something to show.

        Args:
            rows: int (m,) row indices of the registry, repeats allowed.
            rng: decides target, shown features, options and letters.
            targets: only these; None: every usable target of the schema.

        Returns:
            The questions and the rows they come from, in the order of `rows`; rows where no allowed target is known, or
            no feature can be shown, are left out.

        Raises:
            ConfigError: `targets` names a feature that is not asked.
        """
        return self.build_with_records(rows, rng, targets=targets)[:2]

    @property
    def features(self) -> list[str]:
        """Names of all features that a record may show, in the order in which it shows them."""
        return [feature.name for feature in self._shown]

    def build_with_records(
        self, rows: np.ndarray, rng: np.random.Generator, *, targets: Sequence[str] | None = None
    ) -> tuple[list[Question], np.ndarray, np.ndarray]:
        """As `build_with_rows`, and which of `features` each question's record shows: bool (questions, features)."""
        allowed = self._allowed(targets)
        rows = np.asarray(rows, dtype=np.int64)
        questions: list[Question] = []
        kept: list[np.ndarray] = [np.empty(0, np.int64)]
        shown: list[np.ndarray] = [np.empty((0, len(self._shown)), dtype=bool)]
        for start in range(0, len(rows), CHUNK_ROWS):
            part = rows[start : start + CHUNK_ROWS]
            target = self._draw_targets(part, allowed, rng)
            part, target = part[target >= 0], target[target >= 0]
            show = self._draw_shown(part, target, rng)
            something = show.any(axis=1)
            part, target, show = part[something], target[something], show[something]
            questions += self._write(part, target, show, rng)
            kept.append(part)
            shown.append(show)
        return questions, np.concatenate(kept), np.concatenate(shown)

    def records(self, rows: np.ndarray, context: Collection[str], rng: np.random.Generator) -> list[str]:
        """The records of rows, nothing asked and nothing masked: at most `features_per_record` features of `context`.

        Args:
            rows: int (m,) row indices of the registry.
            context: names of features that may be shown.
            rng: decides which, where there are more.
        """
        rows = np.asarray(rows, dtype=np.int64)
        show = np.array([[feature.name in context for feature in self._shown]] * len(rows), dtype=bool)
        show = show.reshape(len(rows), len(self._shown))
        for f, feature in enumerate(self._shown):
            show[:, f] &= self._known(feature, rows)
        limit = self.settings.features_per_record
        if limit < len(self._shown):
            keys = np.where(show, rng.random(show.shape), 2.0)
            show &= keys <= np.partition(keys, limit - 1, axis=1)[:, limit - 1][:, None]
        return self._records(rows, np.full(len(rows), -1), show)

    def _allowed(self, targets: Sequence[str] | None) -> np.ndarray:
        if targets is None:
            return np.ones(len(self._targets), dtype=bool)
        for name in targets:
            if name not in self.schema.names:
                why = self.schema.unusable.get(name, "it is no feature or outcome of the dictionary")
                raise ConfigError(f"target '{name}' is not asked: {why}")
        return np.array([target.name in targets for target in self._targets], dtype=bool)

    def _known(self, feature: Feature, rows: np.ndarray) -> np.ndarray:
        column = self.registry.values[feature.name][rows]
        return column >= 0 if feature.kind == "category" else ~np.isnan(column)

    def _askable(self, t: int, rows: np.ndarray) -> np.ndarray:
        """Whether a target is known and its level is in the schema: one that is not is never a wrong option, so it
        would always be the right one.
        """
        target, known = self._targets[t], self._known(self._targets[t], rows)
        if target.kind == "category":
            levels = np.array(self.schema.target(target.name).frequencies) > 0
            known[known] = levels[self.registry.values[target.name][rows[known]]]
        return known

    def _draw_targets(self, rows: np.ndarray, allowed: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A target for every row, uniform among those known in it and of the drawn kind; -1 where there is none."""
        share = self.settings.outcome_share
        open_ = np.zeros((len(rows), len(self._targets)), dtype=bool)
        for t in np.flatnonzero(allowed).tolist():
            open_[:, t] = self._askable(t, rows)
        outcome_open = (open_ & self._is_outcome).any(axis=1)
        feature_open = (open_ & ~self._is_outcome).any(axis=1)
        ask_outcome = rng.random(len(rows)) < share
        if 0 < share < 1:  # with 0 or 1 the other kind is never asked, not even where nothing else is known
            ask_outcome = np.where(ask_outcome, outcome_open | ~feature_open, ~feature_open & outcome_open)
        open_ &= self._is_outcome == ask_outcome[:, None]
        keys = np.where(open_, rng.random(open_.shape), -1.0)
        return np.where(open_.any(axis=1), np.argmax(keys, axis=1), -1)

    def _draw_shown(self, rows: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Which features each record shows, bool (m, features): some of those known and not hidden."""
        show = self._visible[target]
        for f, feature in enumerate(self._shown):
            show[:, f] &= self._known(feature, rows)
        limit = self.settings.features_per_record
        if limit < len(self._shown):
            keys = np.where(show, rng.random(show.shape), 2.0)
            if self.settings.context == "informative":  # most information first, ties by chance
                keys = np.where(show, 1e-9 * keys - self._information[target], np.inf)
            last = np.partition(keys, limit - 1, axis=1)[:, limit - 1]
            show &= keys <= last[:, None]
        return show

    def _write(
        self, rows: np.ndarray, target: np.ndarray, show: np.ndarray, rng: np.random.Generator
    ) -> list[Question]:
        records = self._records(rows, target, show)
        result: list[Question | None] = [None] * len(rows)
        for t in np.unique(target).tolist():
            mine = np.flatnonzero(target == t)
            feature, template = self._targets[t], self.template
            drawn = draw_options(
                self.registry.values[feature.name][rows[mine]],
                feature,
                self.schema.target(feature.name),
                self.settings.n_options,
                self.settings.option_spacing_sigma,
                rng,
                order=self.settings.option_order,
            )
            if feature.role == "outcome":
                asked = template.outcome.format(label=feature.label, question=feature.question)
            else:
                asked = template.question.format(label=feature.label, unit=_unit(feature), section=feature.section)
            distinct, inverse = np.unique(drawn.values, return_inverse=True)
            value_of = _writer(feature)
            if t not in self._usual:
                self._usual[t] = usual_words(
                    feature, self.schema.target(feature.name), template, value_of, _unit(feature)
                )
            asked += self._usual[t]
            words = [value_of(index) for index in distinct.tolist()]
            lines = [
                [template.option.format(letter=letter, value=word, unit=_unit(feature)) for word in words]
                for letter in LETTERS[: drawn.values.shape[1]]
            ]
            chosen = cast("list[list[int]]", inverse.reshape(len(mine), -1).tolist())
            for i, picks, answer, majority in zip(
                mine.tolist(), chosen, drawn.answer.tolist(), drawn.majority.tolist(), strict=True
            ):
                options = template.option_separator.join([line[pick] for line, pick in zip(lines, picks, strict=True)])
                result[i] = Question(
                    target=feature.name,
                    section=feature.section,
                    kind="outcome" if feature.role == "outcome" else "feature",
                    text=template.user.format(record=records[i], question=asked, options=options),
                    options=tuple([words[pick] for pick in picks]),
                    answer=answer,
                    majority=majority,
                )
        return [question for question in result if question is not None]

    def _records(self, rows: np.ndarray, target: np.ndarray, show: np.ndarray) -> list[str]:
        """The record of every row: headings and lines in dictionary order, joined."""
        parts = np.full((len(self._shown) + self._headings(), len(rows)), "", dtype=object)
        own = self._own[target] if (target >= 0).all() else np.full(len(rows), -2)  # -2: nothing is masked
        for place, member in enumerate(self._parts()):
            if isinstance(member, tuple):  # a section's heading, where anything of it is written
                heading, columns = member
                written = show[:, columns].any(axis=1)
                if self.template.masked:
                    written |= np.isin(own, columns)
                parts[place, written] = heading
                continue
            feature = self._shown[member]
            shown = np.flatnonzero(show[:, member])
            if len(shown):
                parts[place, shown] = self._lines(feature, rows[shown])
            if self.template.masked:
                masked = self.template.masked.format(label=feature.label, unit=_unit(feature))
                parts[place, own == member] = masked
        join = self.template.separator.join
        return [join([part for part in row if part]) for row in parts.T.tolist()]

    def _headings(self) -> int:
        return len({feature.section for feature in self._shown}) if self.template.section else 0

    def _parts(self) -> Iterator[int | tuple[str, list[int]]]:
        """The record's parts in order: a column's place in `_shown`, or (heading, its columns)."""
        section = None
        for f, feature in enumerate(self._shown):
            if self.template.section and feature.section != section:
                section = feature.section
                columns = [g for g, other in enumerate(self._shown) if other.section == section]
                yield self.template.section.format(section=section), columns
            yield f

    def _lines(self, feature: Feature, rows: np.ndarray) -> np.ndarray:
        """The feature's line of every row, each distinct value written once; object (m,)."""
        column = self.registry.values[feature.name][rows]
        index = grid(feature).index(column) if feature.kind == "number" else column
        distinct, inverse = np.unique(index, return_inverse=True)
        value_of, unit, line = _writer(feature), _unit(feature), self.template.line
        lines = [line.format(label=feature.label, value=value_of(i), unit=unit) for i in distinct.tolist()]
        return np.array(lines, dtype=object)[inverse]


def _unit(feature: Feature) -> str:
    return f" {feature.unit}" if feature.unit else ""


def _writer(feature: Feature) -> Callable[[int], str]:
    """How an option or record value is written: a level's label, or the number with its decimals."""
    if feature.kind == "category":
        labels = list(feature.levels.values())
        return labels.__getitem__
    scale, decimals = 10.0**feature.decimals, feature.decimals
    return lambda index: f"{index / scale:.{decimals}f}"
