"""The question schema all sites share: how options are drawn for each feature, and which features give a target away.

Derived by the coordinator from the sum of all sites' counts (common/counts.py) and published; a site's own counts are
not needed and not seen. So a small hospital asks the same questions as a large one. The schema describes the pooled
registry: without noise on the counts it is aggregated, not differentially private.

Shortcuts. A feature X is hidden when target Y is asked if I(X;Y) / H(Y) exceeds the threshold: the share of the answer
that X gives away, 1 for an exact copy at any prevalence. Raw mutual information in nats, as in C-Reason (Kim et al.
2025, arXiv 2505.02722), cannot exceed H(Y), so a copy of a rare yes/no feature passes it; `mi_normalisation = "none"`
reproduces that. Both quantities of the share carry the Miller-Madow correction, without which small registries would
see shortcuts everywhere; it leaves an exact copy at exactly 1. The correction holds while a table has several rows for
each of its cells, so the bins of numbers are merged first where it has fewer (`dense`). Counts with noise have a
correction of their own (common/information.py), and what cannot be told from noise counts as nothing.
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
from .information import dense, information_nats, mutual_information, noised_information, share_given_away
from .mixture import Mixture, fit_mixture

# A component narrower than this share of the whole spread is a heap of one favourite value (37.0 °C), and nobody could
# tell options two of its sds apart.
SD_FLOOR_SHARE = 0.1


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
        reason = _why_unusable(feature, histogram, noised=counts.bin_noise > 0)
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
        said = {name: _information(counts, dictionary.feature(name), feature, settings) for name in context}
        scores = {name: score for name, (_, score) in said.items()}
        found = tuple(name for name in context if scores[name] > settings.mi_threshold)
        out_of_sight = tuple(name for name in context if name in {*found, *feature.hide})
        if feature.role == "feature" and settings.min_information_nats > 0:
            most = max((nats for name, (nats, _) in said.items() if name not in out_of_sight), default=0.0)
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


def _information(counts: Counts, x: Feature, y: Feature, settings: QuestionsConfig) -> tuple[float, float]:
    """What X says of Y: in nats, and as shortcuts are judged by (`mi_normalisation`)."""
    table, raw = counts.table(x.name, y.name), settings.mi_normalisation == "none"
    ordered = x.kind == "number", y.kind == "number"
    if counts.cell_noise:
        margins = counts.margin(x.name), counts.margin(y.name)
        nats, share = noised_information(table, counts.cell_noise, margins, ordered)
        return nats, nats if raw else share
    full = dense(table, *ordered)
    return information_nats(full), mutual_information(table) if raw else share_given_away(full)


def _why_unusable(feature: Feature, histogram: NDArray[np.int64], noised: bool) -> str:
    """Why a column cannot be asked, or ''."""
    occupied = np.flatnonzero(histogram)
    if noised and len(occupied) < 2:
        return "fewer than two of its bins or levels can be told from the noise on the counts"
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
