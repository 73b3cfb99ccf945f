"""Patients who opted out: their rows are gone before anything is counted, asked or divided.

Run by the site, where its registry is read (client/folder.py). Enters: the file that `policy.opt_out` in site.toml
names, one patient id a line. Leaves: nothing. Private: the ids; no message holds one, only lines and numbers.

Ids are read as cells of the table are (no space around them, 7 and 7.0 are one), so that a list copied from it fits. A
file that is missing, or holds anything but an id a line, stops the site: whoever is on it must not be counted. An id
that the registry does not have is no error (patients opt out before they are registered), but it may be a misspelt one:
`wardround client check --site` says how many there are. What was counted before somebody opted out stays counted.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..common.config import SiteConfig
from ..common.dictionary import Dictionary, level_code
from ..common.errors import RefusedError
from .registry import Registry

MAX_BYTES = 64 << 20
_SEPARATORS = re.compile("[,;\t]")


@dataclass(frozen=True)
class OptOut:
    """The list: ids as cells are read, and the file's digest."""

    ids: frozenset[str]
    digest: bytes

    def apply(self, registry: Registry) -> Registry:
        """The registry without the rows of these patients."""
        if not self.ids:
            return registry
        return registry.take(np.flatnonzero([level_code(patient) not in self.ids for patient in registry.patients]))

    def unknown(self, registry: Registry) -> int:
        """How many ids are no patient's of this registry, which is whole."""
        return len(self.ids - {level_code(patient) for patient in registry.patients.tolist()})


NOBODY = OptOut(frozenset(), b"")


def opted_out(config: SiteConfig, folder: Path, dictionary: Dictionary) -> OptOut:
    """Who opted out at a site.

    Args:
        config: its site.toml.
        folder: where that lies.
        dictionary: of its registry.

    Raises:
        RefusedError: as `read_opt_out`.
    """
    named, own = config.policy.opt_out, config.mapping.columns.get(dictionary.id_column, "")
    path = None if named is None else folder / named
    return read_opt_out(path, frozenset({dictionary.id_column, own} - {""}))


def read_opt_out(path: Path | None, id_columns: frozenset[str] = frozenset()) -> OptOut:
    """The list of a file; nobody's without one.

    Args:
        path: a text or CSV file, UTF-8, one id a line, or None.
        id_columns: names of the patient id column: the first line may be one, as a heading.

    Raises:
        RefusedError: missing, unreadable, no text, or a line with more than an id.
    """
    if path is None:
        return NOBODY
    what = f"policy.opt_out: {path}"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RefusedError(
            f"{what}: {(error.strerror or 'cannot be read').lower()}; no patient is counted without it"
        ) from None
    if len(data) > MAX_BYTES:
        raise RefusedError(f"{what}: expected at most {MAX_BYTES} bytes")
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise RefusedError(f"{what}: expected UTF-8 text, one patient id a line") from None
    ids: set[str] = set()
    for number, line in enumerate(lines, start=1):
        # Spreadsheets end a line of one column with separators, and put quotation marks around words.
        first, *others = (cell.strip().strip('"').strip() for cell in _SEPARATORS.split(line.strip()))
        if any(others) or (others and not first) or not first.isprintable():
            raise RefusedError(f"{what}: line {number}: expected one patient id and nothing else")
        if first and not (number == 1 and first in id_columns):
            ids.add(level_code(first))
    return OptOut(frozenset(ids), hashlib.sha256(data).digest())
