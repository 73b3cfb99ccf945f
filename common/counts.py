"""What a site counts for the question schema: histograms and contingency tables over the dictionary's bins.

Runs at every site (`count`) and at the coordinator (`Counts.from_vector` on the secure sum). Enters: the values of a
registry's training patients. Leaves: int64 counts as one flat vector whose layout follows from dictionary and run
config, so that vectors of different sites add up and a secure sum can carry them. Bins never depend on a site's own
minima and maxima, which would be patients' values. Counts of one site are private; only their sum is for the
coordinator.

The layout of the vector: rows; the fine histogram of every feature and outcome in dictionary order; the coarse table of
every pair (i, j), i before j in dictionary order, row-major, except pairs of two outcomes (outcomes are never context).
Missing values are counted nowhere, so tables are pairwise complete. Without noise the sum is aggregated, not
differentially private. In private runs bins are fewer (`Resolution`, from the run's config), because every count
carries noise of one size however few patients it holds (common/noisy.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .dictionary import Dictionary, Feature
from .errors import ProtocolError

FINE_BINS = 192  # at most, for the mixtures of numbers; with "missing" a code fits in uint8
COARSE_BINS = 24  # at most, for the pairs: plug-in mutual information is biased by about bins² / (2 × patients)
SEEN_FROM = 2.0  # standard deviations of its noise from which a count is taken to be more than noise
CHUNK_ROWS = 1 << 16  # codes of a pair stay in the processor's cache

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """A number's representable values: integers × 10^-decimals from `first` to `last` inclusive."""

    first: int
    last: int
    decimals: int

    @property
    def size(self) -> int:
        return self.last - self.first + 1

    def index(self, values: NDArray[Any]) -> Integers:
        """Nearest grid integers; NaN must be handled before."""
        return np.rint(values * 10.0**self.decimals).astype(np.int64)

    def value(self, index: NDArray[Any]) -> Floats:
        return np.asarray(index, dtype=np.float64) / 10.0**self.decimals


def grid(feature: Feature) -> Grid:
    """The grid of a number: its plausible range at its decimals."""
    first, last = feature.grid_ends
    return Grid(first, last, feature.decimals)


@dataclass(frozen=True)
class Resolution:
    """How many bins a number has at most: fine ones in its histogram, coarse ones in its pairs."""

    fine: int = FINE_BINS
    coarse: int = COARSE_BINS


EXACT = Resolution()  # of counts without noise


@dataclass(frozen=True)
class Bins:
    """The bins of one column: fine ones for its histogram, coarse ones (merged fine ones) for its pairs.

    Attributes:
        fine: number of fine bins; the code `fine` means missing.
        merge: fine bins in one coarse bin (1 for categories).
        edges: numbers: (fine + 1,) edges in grid units, half-way between grid values, so that rounding never moves a
            value over an edge and no bin is empty by aliasing; empty for categories.
    """

    fine: int
    merge: int
    edges: Floats

    @property
    def coarse(self) -> int:
        return -(-self.fine // self.merge)

    @classmethod
    def of(cls, feature: Feature, resolution: Resolution = EXACT) -> Self:
        """Equal bins on the feature's scale, from dictionary and resolution alone; a category's are its levels."""
        if feature.kind == "category":
            return cls(len(feature.levels), 1, np.empty(0))
        values = grid(feature)
        low, high = values.first - 0.5, values.last + 0.5
        if feature.scale == "log":
            inner = np.floor(np.geomspace(low, high, resolution.fine + 1)[1:-1]) + 0.5
            edges = np.unique(np.concatenate([[low], inner[(inner > low) & (inner < high)], [high]]))
        else:
            each = -(-values.size // resolution.fine)
            edges = np.append(np.arange(low, high, each), high)
        fine = len(edges) - 1
        return cls(fine, -(-fine // resolution.coarse), edges)

    def codes(self, feature: Feature, values: NDArray[Any]) -> NDArray[np.uint8]:
        """The fine bin of every value, `fine` for missing or out of range."""
        if feature.kind == "category":
            inside = (values >= 0) & (values < self.fine)
            return np.where(inside, values, self.fine).astype(np.uint8)
        scaled = np.rint(values * 10.0**feature.decimals)
        found = np.searchsorted(self.edges, scaled, side="right") - 1  # NaN sorts last
        found[(found < 0) | (found >= self.fine)] = self.fine
        return found.astype(np.uint8)

    def centers(self, feature: Feature) -> tuple[Floats, Floats]:
        """Centres and widths of a number's fine bins on the feature's scale (natural logarithm, or the unit)."""
        edges = self.edges / 10.0**feature.decimals
        if feature.scale == "log":
            edges = np.log(edges)
        return (edges[1:] + edges[:-1]) / 2, np.diff(edges)


class Layout:
    """Where each count lies in the flat vector; a function of dictionary and resolution alone."""

    def __init__(self, dictionary: Dictionary, resolution: Resolution = EXACT) -> None:
        self.features = dictionary.used
        self.bins = [Bins.of(feature, resolution) for feature in self.features]
        self.number = {feature.name: i for i, feature in enumerate(self.features)}
        offset = 1
        self.one_way: list[int] = []
        for bins in self.bins:
            self.one_way.append(offset)
            offset += bins.fine
        self.first_table = offset
        self.pairs: dict[tuple[int, int], int] = {}
        for i, j in combinations(range(len(self.features)), 2):
            if self.features[i].role == "outcome" and self.features[j].role == "outcome":
                continue
            self.pairs[i, j] = offset
            offset += self.bins[i].coarse * self.bins[j].coarse
        self.size = offset


@dataclass(frozen=True)
class Counts:
    """Counts of one site, or their sum over sites (`+`).

    Attributes:
        dictionary: gives the bins, with `resolution`.
        vector: int64, as `Layout` has it; with noise some are below zero.
        resolution: how fine the bins are.
        bin_noise: standard deviation of the noise on rows and bins; 0: none.
        cell_noise: of that on the cells of tables.
    """

    dictionary: Dictionary
    vector: Integers
    resolution: Resolution = EXACT
    bin_noise: float = 0.0
    cell_noise: float = 0.0

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.dictionary, self.resolution)

    @property
    def rows(self) -> int:
        """Rows counted, with missing values or not; at least one where they carry noise."""
        return int(max(self.vector[0], 1)) if self.bin_noise else int(self.vector[0])

    def one_way(self, name: str) -> Integers:
        """Fine histogram of a column, (bins.fine,); what cannot be told from noise is 0."""
        fine = self._fine(name)
        return np.where(fine < SEEN_FROM * self.bin_noise, 0, fine)

    def margin(self, name: str) -> Floats:
        """Share of each coarse bin of a column, (bins.coarse,); with noise, none is below that of one row."""
        fine, bins = self._fine(name), self.layout.bins[self.layout.number[name]]
        coarse = np.maximum(np.add.reduceat(fine, np.arange(0, bins.fine, bins.merge)), 1)
        return coarse / coarse.sum()

    def _fine(self, name: str) -> Integers:
        i = self.layout.number[name]
        start = self.layout.one_way[i]
        return self.vector[start : start + self.layout.bins[i].fine]

    def table(self, x: str, y: str) -> Integers:
        """Coarse table of rows where both are known: (bins of x, bins of y)."""
        i, j = self.layout.number[x], self.layout.number[y]
        if i > j:
            return self.table(y, x).T
        start = self.layout.pairs[i, j]
        rows, columns = self.layout.bins[i].coarse, self.layout.bins[j].coarse
        return self.vector[start : start + rows * columns].reshape(rows, columns)

    def __add__(self, other: Counts) -> Counts:
        if (self.dictionary.digest(), self.resolution) != (other.dictionary.digest(), other.resolution):
            raise ProtocolError("counts over different dictionaries or bins cannot be added")
        return Counts(self.dictionary, self.vector + other.vector, self.resolution)

    def to_vector(self) -> Integers:
        """The flat int64 vector, a copy."""
        return self.vector.copy()

    @classmethod
    def from_vector(cls, vector: NDArray[Any], dictionary: Dictionary) -> Self:
        """Counts without noise, from a vector of one site or of a sum.

        Raises:
            ProtocolError: not integers, not the length that the dictionary gives, or negative.
        """
        expected = Layout(dictionary).size
        if vector.shape != (expected,) or not np.issubdtype(vector.dtype, np.integer):
            raise ProtocolError(f"schema counts: expected {expected} integers, got {vector.dtype} of {vector.shape}")
        if vector.size and vector.min() < 0:
            raise ProtocolError("schema counts: expected no negative count")
        return cls(dictionary, vector.astype(np.int64))


def count(values: Mapping[str, NDArray[Any]], dictionary: Dictionary, resolution: Resolution = EXACT) -> Counts:
    """Count a registry's rows.

    Args:
        values: every feature and outcome of the dictionary, all of one length: numbers as float64 with NaN for missing,
            categories as int16 level index with -1 for missing.
        dictionary: gives the bins.
        resolution: how fine they are.

    Memory beyond `values` is one chunk of uint8 codes; time is about 2 ns a row and pair.
    """
    layout = Layout(dictionary, resolution)
    result = np.zeros(layout.size, dtype=np.int64)
    for codes in _chunks(values, layout):
        result[0] += codes.shape[1]
        coarse: list[NDArray[np.uint16]] = []
        for bins, start, fine in zip(layout.bins, layout.one_way, codes, strict=True):
            result[start : start + bins.fine] += np.bincount(fine, minlength=bins.fine + 1)[: bins.fine]
            merged = (np.arange(bins.fine + 1) // bins.merge).astype(np.uint16)
            merged[bins.fine] = bins.coarse  # missing keeps a code of its own
            coarse.append(merged[fine])
        for (i, j), start in layout.pairs.items():
            rows, columns = layout.bins[i].coarse, layout.bins[j].coarse
            joint = coarse[i] * np.uint16(columns + 1) + coarse[j]  # < 255 × 255: fits
            table = np.bincount(joint, minlength=(rows + 1) * (columns + 1)).reshape(rows + 1, columns + 1)
            result[start : start + rows * columns] += table[:rows, :columns].ravel()
    return Counts(dictionary, result, resolution)


def _chunks(values: Mapping[str, NDArray[Any]], layout: Layout) -> Iterator[NDArray[np.uint8]]:
    """Fine codes of CHUNK_ROWS rows at a time, (columns, rows)."""
    n = len(values[layout.features[0].name])
    for start in range(0, n, CHUNK_ROWS):
        part = slice(start, min(start + CHUNK_ROWS, n))
        codes = np.empty((len(layout.features), part.stop - start), dtype=np.uint8)
        for i, (feature, bins) in enumerate(zip(layout.features, layout.bins, strict=True)):
            codes[i] = bins.codes(feature, values[feature.name][part])
        yield codes
