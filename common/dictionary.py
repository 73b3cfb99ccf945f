"""The data dictionary: what each column of a registry means, shared by every site and the coordinator.

A dictionary is a TOML file (`configs/registries/*.toml`, docs/dictionary.md). It holds knowledge about columns, never
about patients: labels, units, plausible ranges, codes. Both ends need it, because bins, options and prompts come from
it and never from one hospital's own minima and maxima; its digest tells two ends that they mean the same thing.

A draft (`wardround client dictionary`) is no such file yet: its levels and ranges are those of one hospital's patients.
It says so (`drafted_from`), and no private run is made over it (`check_reviewed`).

The time of a value is `known_at`, days since admission. An outcome is asked with features known strictly before it,
and `hide` names features that are never shown with a target because they restate it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, model_validator

from .config import Frozen, packaged, parse, read_toml
from .errors import ConfigError, DictionaryError

Role = Literal["id", "site", "feature", "outcome", "excluded"]
Name = Annotated[str, Field(min_length=1, pattern=r"^[^\r\n]+$")]

# A stored float differs a little from what was typed (333.3 is kept as 333.3125), so a sentinel matches within this
# share of itself: 5 significant digits. Tight enough to tell a fill-in pH of 7.4 from a measured one kept as 7.3994;
# write sentinels as the table holds them. 0 matches 0 only.
SENTINEL_RELATIVE_TOLERANCE = 5e-5
MAX_LEVELS = 254  # with "missing" a level's number fits in uint8, in which a site counts (common/counts.py)
_WHOLE = re.compile(r"(-?\d+)\.0+")


def level_code(cell: str) -> str:
    """A code as cells are read: no space around it, whole numbers without a point, so that 1, 1.0 and "1.0" are one.

    >>> level_code(" 2.0 "), level_code("2.50"), level_code("2.0.0")
    ('2', '2.50', '2.0.0')
    """
    cell = cell.strip()
    whole = _WHOLE.fullmatch(cell)
    return whole[1] if whole else cell


class Feature(Frozen):
    """One column: what it is called, how it is read, when it is known, whether it is asked or shown."""

    name: Name  # column in the table
    label: Name  # as a clinician would write it
    description: str = ""
    role: Role = "feature"
    section: str = ""  # heading of the record under which it is shown
    kind: Literal["number", "category"] = "category"
    unit: str | None = None
    low: float | None = None  # numbers: plausible range, inclusive, in `unit`; a value outside becomes missing
    high: float | None = None
    decimals: Annotated[int, Field(ge=0, le=6)] = 0  # numbers: kept and shown with this many
    scale: Literal["linear", "log"] = "linear"  # spacing of the schema's bins between low and high
    levels: Mapping[str, str] = {}  # categories: code in the table → label shown; the order is kept
    sentinels: tuple[float | str, ...] = ()  # values that mean "not measured"
    known_at: Annotated[float, Field(ge=0)] = 0.0  # days since admission when the value is known
    hide: tuple[str, ...] = ()  # features never shown when this one is the target
    question: str | None = None  # outcomes: the question, in full
    # A person has looked: neither the column's name nor its cells identify a patient, whatever they look like.
    not_identifying: bool = False
    # A person has looked: the value is known at `known_at` and restates no outcome, whatever its name looks like.
    not_outcome: bool = False
    reason: str | None = None  # excluded columns: why

    @property
    def used(self) -> bool:
        """Whether the column is read as data: features and outcomes."""
        return self.role in ("feature", "outcome")

    @cached_property
    def codes(self) -> tuple[str, ...]:
        """Level codes in order; a category's value is an index into this."""
        return tuple(self.levels)

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high) of a number that is read as data."""
        if self.low is None or self.high is None:
            raise DictionaryError(f"feature '{self.name}' has no plausible range")
        return self.low, self.high

    @property
    def grid_ends(self) -> tuple[int, int]:
        """First and last value that a number can have, inclusive, in steps of its decimals."""
        low, high = self.bounds
        step = 10.0**-self.decimals
        first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
        return (max(first, 1) if self.scale == "log" else first), last

    @model_validator(mode="after")
    def a_role_has_what_it_needs(self) -> Self:
        if self.role == "outcome" and self.kind != "category":
            raise ValueError("an outcome is asked with its levels: kind must be 'category'")
        if self.role == "outcome" and not self.question:
            raise ValueError("an outcome needs question, the text that is asked")
        if self.role != "outcome" and self.question:
            raise ValueError(f"question belongs to outcomes, this is role '{self.role}'")
        if self.role == "excluded" and not self.reason:
            raise ValueError("an excluded column needs reason, why it is neither shown nor asked")
        if self.used and not self.section:
            raise ValueError(f"a column of role '{self.role}' needs section, the heading it is shown under")
        return self

    @model_validator(mode="after")
    def a_number_has_a_range_and_a_category_levels(self) -> Self:
        if not self.used:
            return self
        if self.kind == "number":
            if self.levels:
                raise ValueError("levels belong to kind = 'category'")
            if self.low is None or self.high is None:
                raise ValueError("a number needs low and high, its plausible range")
            if self.low >= self.high:
                raise ValueError(f"expected low < high, got {self.low:g} and {self.high:g}")
            if self.scale == "log" and self.low <= 0:
                raise ValueError(f"scale = 'log' needs low > 0, got {self.low:g}")
            first, last = self.grid_ends
            if last <= first:
                raise ValueError(
                    f"expected at least two values between low = {self.low:g} and high = {self.high:g} with decimals = "
                    f"{self.decimals}: the schema counts values in steps of the decimals"
                )
            return self
        if self.low is not None or self.high is not None:
            raise ValueError("low and high belong to kind = 'number'")
        if len(self.levels) < 2:
            raise ValueError(f"a category needs at least 2 levels, got {len(self.levels)}: it would have one answer")
        if len(self.levels) > MAX_LEVELS:
            raise ValueError(f"expected at most {MAX_LEVELS} levels, got {len(self.levels)}: group them")
        if any(not label.strip() for label in self.levels.values()):
            raise ValueError("a level has an empty label")
        if len(set(self.levels.values())) < len(self.levels):
            raise ValueError("two levels have the same label: as options they could not be told apart")
        return self

    @model_validator(mode="after")
    def codes_and_sentinels_are_written_as_cells_are_read(self) -> Self:
        words = [mark for mark in self.sentinels if isinstance(mark, str)]
        for what, word in [*(("level code", code) for code in self.levels), *(("sentinel", word) for word in words)]:
            if level_code(word) != word:
                raise ValueError(f"{what} '{word}' is never found: cells are read as '{level_code(word)}', write that")
        for word in words if self.kind == "number" else ():
            if _is_number(word):
                raise ValueError(f"sentinel '{word}' of a number is text: write {word}, without quotes")
        return self


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


class Dictionary(Frozen):
    """A whole data dictionary: one patient id column, at most one site column, features and outcomes."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    title: str
    language: str = "en"
    public: bool = False  # True only for open or synthetic registries: their samples may be shown to anyone
    # What a draft was made from; levels and ranges are then those of one hospital's patients. Empty: the consortium has
    # reviewed it.
    drafted_from: Literal["", "table", "redcap"] = ""
    source: str = ""
    licence: str = ""
    features: tuple[Feature, ...]

    @model_validator(mode="after")
    def names_are_unique_and_known(self) -> Self:
        seen: set[str] = set()
        for feature in self.features:
            if feature.name in seen:
                raise ValueError(f"feature '{feature.name}' is described twice")
            seen.add(feature.name)
        for feature in self.features:
            unknown = [name for name in feature.hide if name not in seen]
            if unknown:
                raise ValueError(f"feature '{feature.name}' hides '{unknown[0]}', which the dictionary does not have")
        shown: dict[str, str] = {}
        for feature in self.features:
            other = shown.setdefault(feature.label, feature.name) if feature.used else feature.name
            if other != feature.name:
                raise ValueError(
                    f"features '{other}' and '{feature.name}' have the same label '{feature.label}': "
                    f"a question could not tell them apart (short prompts show no section)"
                )
        return self

    @model_validator(mode="after")
    def one_id_and_something_to_ask(self) -> Self:
        ids = [feature.name for feature in self.features if feature.role == "id"]
        sites = [feature.name for feature in self.features if feature.role == "site"]
        if len(ids) != 1:
            got = "none" if not ids else "columns " + " and ".join(f"'{name}'" for name in ids)
            raise ValueError(f"expected one feature with role = 'id' (the patient), got {got}")
        if len(sites) > 1:
            raise ValueError(f"expected at most one feature with role = 'site', got {', '.join(sites)}")
        features = self.with_role("feature")
        if not features:
            raise ValueError("no usable feature: none has role = 'feature'")
        earliest = min(feature.known_at for feature in features)
        for outcome in self.with_role("outcome"):
            if outcome.known_at <= earliest:
                raise ValueError(
                    f"outcome '{outcome.name}' has known_at = {outcome.known_at:g}, but no feature is known before "
                    f"that: set the day on which the outcome is known"
                )
        return self

    @cached_property
    def _by_name(self) -> dict[str, Feature]:
        return {feature.name: feature for feature in self.features}

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def feature(self, name: str) -> Feature:
        """The entry of one column.

        Raises:
            DictionaryError: the dictionary has no such entry.
        """
        try:
            return self._by_name[name]
        except KeyError:
            raise DictionaryError(f"dictionary '{self.name}' has no entry '{name}'") from None

    def with_role(self, role: Role) -> tuple[Feature, ...]:
        """All entries of one role, in dictionary order."""
        return tuple(feature for feature in self.features if feature.role == role)

    @cached_property
    def used(self) -> tuple[Feature, ...]:
        """Features and outcomes, in dictionary order: the columns of `Registry.values`."""
        return tuple(feature for feature in self.features if feature.used)

    def context_of(self, target: Feature) -> tuple[Feature, ...]:
        """Features that may be shown when `target` is asked (before any shortcut filter).

        An outcome sees only what is known before it; `hide` is never shown; the target itself neither.
        """
        return tuple(
            feature
            for feature in self.with_role("feature")
            if feature.name != target.name
            and feature.name not in target.hide
            and (target.role != "outcome" or feature.known_at < target.known_at)
        )

    @property
    def id_column(self) -> str:
        """Name of the patient id column."""
        return self.with_role("id")[0].name

    @property
    def site_column(self) -> str | None:
        """Name of the site column, where there is one."""
        sites = self.with_role("site")
        return sites[0].name if sites else None

    def digest(self) -> str:
        """SHA-256 hex of the canonical content; levels count in their order, which gives them their numbers.

        `not_outcome` is left out: it answers a question of `check`, and no record or question differs by it. So is an
        empty `drafted_from`; a draft and what becomes of it by review have two digests.
        """
        content = self.model_dump(mode="json")
        if not self.drafted_from:
            del content["drafted_from"]
        for feature in content["features"]:
            feature["levels"] = list(feature["levels"].items())
            del feature["not_outcome"]
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_reviewed(dictionary: Dictionary) -> None:
    """Refuses a draft; called before anything is counted in a private run.

    A person takes the mark away, by the consortium's decision, and every hospital gets that very file: it has another
    digest than the draft, which warm-up compares and every site signs for before counts are added up.

    Raises:
        DictionaryError: levels and ranges are still those of one hospital's patients.
    """
    if dictionary.drafted_from:
        what = {"table": "a hospital's table", "redcap": "a REDCap export"}[dictionary.drafted_from]
        raise DictionaryError(
            f"dictionary '{dictionary.name}': a draft made from {what}, whose levels and ranges are patients' values "
            "that no noise covers: have the consortium review every entry, remove the line "
            f'drafted_from = "{dictionary.drafted_from}", and give all hospitals that file; then start the private run'
        )


def parse_dictionary(data: Mapping[str, Any], source: str) -> Dictionary:
    """A dictionary from TOML data; a problem in one entry names that entry.

    Raises:
        DictionaryError: unknown or missing key, value out of range, contradiction; one line.
    """
    entries: object = data.get("features")
    try:
        if isinstance(entries, list):
            for position, entry in enumerate(cast("list[object]", entries)):
                fields = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
                name = fields.get("name", f"number {position + 1}")
                parse(Feature, fields, f"{source}: feature '{name}'")
        return parse(Dictionary, data, source)
    except ConfigError as error:
        # pydantic puts the checked input behind a model-level message; here that is a whole entry, so it is cut.
        text = str(error).split(", got {", 1)[0].replace("'(whole file)': ", "")
        raise DictionaryError(text) from None


def load_dictionary(path: Path | str) -> Dictionary:
    """A dictionary from a TOML file, or by name from those shipped (`support_icu`, `smart`, `copenhagen_stroke`).

    Raises:
        DictionaryError: no such file, not TOML, or not a valid dictionary; one line.
    """
    path = Path(path)
    if not path.is_file() and path.suffix == "" and packaged("registries", f"{path.name}.toml").exists():
        path = packaged("registries", f"{path.name}.toml")
    try:
        data = read_toml(path)
    except ConfigError as error:
        raise DictionaryError(str(error)) from None
    return parse_dictionary(data, str(path))


def _toml(value: object) -> str:
    """One value as TOML, mappings inline. A JSON string is a TOML basic string except for the DEL character."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    if isinstance(value, Mapping):
        pairs = cast("Mapping[str, object]", value)
        return "{ " + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in pairs.items()) + " }"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml(item) for item in cast("Sequence[object]", value)) + "]"
    return str(value)


def _lines(model: Frozen, skip: Sequence[str] = ()) -> list[str]:
    """`key = value` for every field that differs from its default."""
    result: list[str] = []
    for name, field in type(model).model_fields.items():
        value: object = getattr(model, name)
        if name not in skip and (field.is_required() or value != field.default):
            result.append(f"{name} = {_toml(value)}")
    return result


def dump_dictionary(dictionary: Dictionary, notes: Mapping[str, Sequence[str]] | None = None) -> str:
    """The dictionary as TOML that `load_dictionary` reads back to an equal one.

    Args:
        dictionary: what to write; fields at their default are left out.
        notes: comment lines put above entries, by feature name; "" is the head of the file.
    """
    notes = notes or {}
    out = [f"# {line}" for line in notes.get("", ())]
    out += _lines(dictionary, skip=("features",))
    for feature in dictionary.features:
        out += ["", *(f"# {line}" for line in notes.get(feature.name, ())), "[[features]]", *_lines(feature)]
    return "\n".join(out) + "\n"
