"""The question schema all sites share: how options are drawn for each feature, and which features give a target away.

Derived by the coordinator from the sum of all sites' counts (common/counts.py) and published; a site's own counts are
not needed and not seen. So a small hospital asks the same questions as a large one. The schema describes the pooled
registry: without noise on the counts it is aggregated, not differentially private.

Shortcuts. A feature X is hidden when target Y is asked if I(X;Y) / H(Y) exceeds the threshold: the share of the answer
that X gives away, 1 for an exact copy at any prevalence. Raw mutual information in nats, as in C-Reason (Kim et al.
2025, arXiv 2505.02722), cannot exceed H(Y), so a copy of a rare yes/no feature passes it; `mi_normalisation = "none"`
reproduces that. Both quantities of the share carry the Miller-Madow correction, without which small registries would
see shortcuts everywhere; it leaves an exact copy at exactly 1. The correction holds while a table has several rows for
each of its cells, so the bins of numbers are merged first where it has fewer (`dense`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from .config import Frozen, QuestionsConfig, parse
from .counts import Bins, Counts
from .dictionary import Dictionary, Feature
from .errors import RegistryError, VerificationError
from .mixture import Mixture, fit_mixture

# A component narrower than this share of the whole spread is a heap of one favourite value (37.0 °C), and nobody could
# tell options two of its sds apart.
SD_FLOOR_SHARE = 0.1
# Below this many rows a cell the Miller-Madow correction is too small: two independent numbers of 80 patients would
# share half of each other in 24 × 24 bins.
ROWS_PER_CELL = 5


class FeatureSchema(Frozen):
    """How options are drawn for one feature or outcome.

    Numbers have a mixture on their dictionary scale (natural logarithm for scale = "log"), categories a frequency per
    level in dictionary order.
    """

    name: str
    weights: tuple[float, ...] = ()
    means: tuple[float, ...] = ()
    sds: tuple[float, ...] = ()
    frequencies: tuple[float, ...] = ()

    @property
    def mixture(self) -> Mixture:
        return Mixture(np.array(self.weights), np.array(self.means), np.array(self.sds))


class Schema(Frozen):
    """What is published to every site; the same for all."""

    version: Literal[1] = 1
    dictionary_digest: str
    rows: int
    mi_threshold: float
    mi_normalisation: Literal["target-entropy", "none"]
    targets: tuple[FeatureSchema, ...]  # usable, in dictionary order
    unusable: Mapping[str, str]  # feature → why it is never asked
    hidden: Mapping[
        str, tuple[str, ...]
    ]  # target → features never shown with it: shortcuts and the dictionary's `hide`
    shortcuts: Mapping[str, tuple[str, ...]]  # the part of `hidden` that was found in the data
    mi: Mapping[str, Mapping[str, float]]  # target → feature → share given away (or nats), 4 decimals

    def target(self, name: str) -> FeatureSchema:
        """One usable target.

        Raises:
            KeyError: this feature is not asked.
        """
        for item in self.targets:
            if item.name == name:
                return item
        raise KeyError(name)

    @property
    def names(self) -> tuple[str, ...]:
        """Usable targets, in dictionary order."""
        return tuple(item.name for item in self.targets)

    def to_json(self) -> str:
        """Canonical JSON: what is published and what the digest covers."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return parse(cls, json.loads(text), "question schema")

    def digest(self) -> str:
        """SHA-256 hex of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def verify(self, dictionary: Dictionary) -> None:
        """Raises VerificationError unless the schema was derived over this dictionary."""
        if self.dictionary_digest != dictionary.digest():
            raise VerificationError(
                f"the question schema belongs to another dictionary: expected digest {dictionary.digest()[:12]}…, "
                f"got {self.dictionary_digest[:12]}…"
            )


def mutual_information(table: NDArray[np.int64]) -> float:
    """Plug-in mutual information of a contingency table in nats; 0 for an empty one.

    >>> round(mutual_information(np.array([[5, 0], [0, 5]])), 4)
    0.6931
    """
    total = int(table.sum())
    if total == 0:
        return 0.0
    x, y = np.nonzero(table)
    joint = table[x, y] / total
    return max(0.0, float(joint @ (np.log(joint) - np.log((table.sum(1)[x] / total) * (table.sum(0)[y] / total)))))


def information_nats(table: NDArray[np.int64]) -> float:
    """I(X;Y) of a table in nats, Miller-Madow corrected, at least 0."""
    total = int(table.sum())
    if total == 0:
        return 0.0
    x, y, xy = (int(np.count_nonzero(counts)) for counts in (table.sum(1), table.sum(0), table))
    return max(0.0, mutual_information(table) + (x + y - xy - 1) / (2 * total))


def share_given_away(table: NDArray[np.int64]) -> float:
    """I(X;Y) / H(Y) of a table (X rows, Y columns), both Miller-Madow corrected, 0 to 1.

    The correction adds (occupied cells - 1) / (2 n) to every plug-in entropy, and I = H(X) + H(Y) - H(X,Y).

    >>> copy = np.array([[95, 0], [0, 5]])
    >>> share_given_away(copy), round(mutual_information(copy), 3)
    (1.0, 0.199)
    """
    total = int(table.sum())
    if total == 0:
        return 0.0
    frequency = table.sum(0)[table.sum(0) > 0] / total
    if len(frequency) < 2:
        return 0.0
    entropy = -float(frequency @ np.log(frequency)) + (len(frequency) - 1) / (2 * total)
    return min(1.0, round(information_nats(table) / entropy, 12))


def dense(table: NDArray[np.int64], merge_x: bool, merge_y: bool) -> NDArray[np.int64]:
    """The table with fewer, fuller cells: adjacent bins merged until there are ROWS_PER_CELL rows for each cell.

    The two neighbours with the fewest rows between them are merged, on the axis with more bins, on both where they have
    equally many: so the table of an exact copy stays diagonal. An axis keeps two bins.

    Args:
        table: pair table (X rows, Y columns).
        merge_x: whether X's bins have an order, as those of numbers; levels are never merged.
        merge_y: likewise.

    >>> dense(np.diag([8, 1, 1, 10]), True, True)
    array([[10,  0],
           [ 0, 10]])
    """
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    rows = int(table.sum())
    while rows < ROWS_PER_CELL * table.size:
        x, y = (size if may and size > 2 else 0 for size, may in zip(table.shape, (merge_x, merge_y), strict=True))
        if not x and not y:
            break
        # Both from the table as it is: the margins of an exact copy are equal, and must be merged alike.
        first_x, first_y = _fewest(table.sum(1)), _fewest(table.sum(0))
        if x >= y:
            table = _merged(table, first_x)
        if y >= x:
            table = _merged(table.T, first_y).T
    return table


def _merged(table: NDArray[np.int64], row: int) -> NDArray[np.int64]:
    """The table with this row and the next as one."""
    both: NDArray[np.int64] = table[row : row + 1] + table[row + 1 : row + 2]
    return np.concatenate([table[:row], both, table[row + 2 :]])


def _fewest(margin: NDArray[np.int64]) -> int:
    """The first of the two neighbours with the fewest rows between them."""
    return int(np.argmin(margin[:-1] + margin[1:])) if len(margin) > 1 else 0


def derive_schema(counts: Counts, dictionary: Dictionary, settings: QuestionsConfig) -> Schema:
    """The schema of the pooled registry, from the sum of all sites' counts and from nothing else.

    Raises:
        RegistryError: no feature can be asked.
        VerificationError: the counts were made over another dictionary.
    """
    if counts.dictionary.digest() != dictionary.digest():
        raise VerificationError("the schema counts were made over another dictionary")
    targets: list[FeatureSchema] = []
    unusable: dict[str, str] = {}
    for feature, bins in zip(counts.layout.features, counts.layout.bins, strict=True):
        histogram = counts.one_way(feature.name)
        reason = _why_unusable(feature, histogram)
        if reason:
            unusable[feature.name] = reason
        elif feature.kind == "number":
            targets.append(_number(feature, bins, histogram, settings.mixture_components))
        else:
            frequencies = tuple((histogram / histogram.sum()).tolist())
            targets.append(FeatureSchema(name=feature.name, frequencies=frequencies))
    _require_a_feature(targets, unusable, dictionary)
    mi: dict[str, dict[str, float]] = {}
    shortcuts: dict[str, tuple[str, ...]] = {}
    hidden: dict[str, tuple[str, ...]] = {}
    for target in list(targets):
        feature = dictionary.feature(target.name)
        context = [other.name for other in dictionary.with_role("feature") if other.name != target.name]
        tables = {name: _dense_table(counts, dictionary.feature(name), feature) for name in context}
        if settings.mi_normalisation == "none":
            scores = {name: mutual_information(counts.table(name, target.name)) for name in context}
        else:
            scores = {name: share_given_away(table) for name, table in tables.items()}
        found = tuple(name for name in context if scores[name] > settings.mi_threshold)
        out_of_sight = tuple(name for name in context if name in {*found, *feature.hide})
        if feature.role == "feature" and settings.min_information_nats > 0:
            most = max((information_nats(tables[name]) for name in context if name not in out_of_sight), default=0.0)
            if most < settings.min_information_nats:
                targets.remove(target)
                unusable[target.name] = (
                    f"no feature that may be shown with it says {settings.min_information_nats:g} nats about it "
                    f"(at most {most:.3f}; questions.min_information_nats)"
                )
                continue
        mi[target.name] = {name: round(score, 4) for name, score in scores.items()}
        shortcuts[target.name], hidden[target.name] = found, out_of_sight
    _require_a_feature(targets, unusable, dictionary)
    return Schema(
        dictionary_digest=dictionary.digest(),
        rows=counts.rows,
        mi_threshold=settings.mi_threshold,
        mi_normalisation=settings.mi_normalisation,
        targets=tuple(targets),
        unusable=unusable,
        hidden=hidden,
        shortcuts=shortcuts,
        mi=mi,
    )


def _require_a_feature(targets: list[FeatureSchema], unusable: Mapping[str, str], dictionary: Dictionary) -> None:
    if not any(dictionary.feature(target.name).role == "feature" for target in targets):
        first = next(iter(unusable.items()), ("", "the dictionary has none"))
        raise RegistryError(f"no usable feature: none of {len(unusable)} can be asked; '{first[0]}': {first[1]}")


def _dense_table(counts: Counts, x: Feature, y: Feature) -> NDArray[np.int64]:
    return dense(counts.table(x.name, y.name), x.kind == "number", y.kind == "number")


def _why_unusable(feature: Feature, histogram: NDArray[np.int64]) -> str:
    """Why a column cannot be asked, or ''."""
    occupied = np.flatnonzero(histogram)
    if len(occupied) == 0:
        return "no value is known at any site"
    if len(occupied) == 1:
        if feature.kind == "category":
            return f"only one level occurs: '{list(feature.levels.values())[occupied[0]]}'"
        return "all values are the same, or too close together for its plausible range"
    return ""


def _number(feature: Feature, bins: Bins, histogram: NDArray[np.int64], components: int) -> FeatureSchema:
    """Mixture of a number. The floor is half a bin (no finer was counted), half a decimal, a tenth of the spread."""
    centers, widths = bins.centers(feature)
    share = histogram / histogram.sum()
    spread = float(np.sqrt(share @ (centers - share @ centers) ** 2))
    decimal = 10.0**-feature.decimals if feature.scale == "linear" else 0.0
    floor = max(float(share @ widths) / 2, decimal / 2, SD_FLOOR_SHARE * spread)
    mixture = fit_mixture(centers, histogram, components, floor, widths)
    return FeatureSchema(
        name=feature.name,
        weights=tuple(mixture.weights.tolist()),
        means=tuple(mixture.means.tolist()),
        sds=tuple(mixture.sds.tolist()),
    )
