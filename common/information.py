"""How much two columns say of each other, from a table of counts, without noise and with it.

Run by the coordinator when it derives the question schema (common/schema.py). Pure. Enters: contingency tables of all
sites together. Leaves: mutual information in nats, and as a share of the target's entropy.

Counts without noise: Miller-Madow's correction, after bins of numbers were merged where a table has too few rows for
its cells (`dense`). Counts with noise: `noised_information`, which takes off what the noise adds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Below this many rows a cell the Miller-Madow correction is too small: two independent numbers of 80 patients would
# share half of each other in 24 × 24 bins.
ROWS_PER_CELL = 5
# Cells that expect fewer rows than this times the standard deviation of their noise are merged with others. From 0.25
# to 1 the schema of the demo is worth about the same (docs/privacy.md §P7); at 2 hardly a table is left.
NOISE_PER_CELL = 0.5


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


def noised_information(
    table: NDArray[np.int64],
    noise: float,
    margins: tuple[Floats, Floats],
    ordered: tuple[bool, bool],
) -> tuple[float, float]:
    """I(X;Y) in nats and I(X;Y) / H(Y), 0 to 1, from a table whose cells carry noise; what the noise adds is taken off.

    Bins are merged first until no cell expects less than `NOISE_PER_CELL` of its noise; where two by two are still too
    many, nothing is known of the pair, and both results are 0. H(Y) is that of the merged bins.

    Args:
        table: counts with noise (X rows, Y columns), some below zero.
        noise: standard deviation of the normal noise on every cell; positive.
        margins: shares of the bins of X and of Y, positive: from the one-way counts, whose noise is smaller.
        ordered: whether X's bins have an order, as those of numbers: then only neighbours are merged; likewise Y's.

    Formal Guarantees: none of privacy, which the noise gives; this is a reading of it. Where X and Y are independent
    the expected value before it is cut at 0 is 0 to second order in noise / expected rows. Of dependent pairs it takes
    off too little for cells with fewer rows than independence expects, and no expansion holds where those are far below
    their noise: an exact copy comes out as less than one.
    """
    total = max(int(table.sum()), 1)
    groups, enough = _groups(total, noise, margins, ordered)
    if not enough:
        return 0.0, 0.0
    x, y = (group @ margin for group, margin in zip(groups, margins, strict=True))
    variance = noise**2 * np.outer(*(group.sum(1) for group in groups))
    merged = np.rint(groups[0] @ table @ groups[1].T).astype(np.int64)
    nats = max(0.0, mutual_information(np.maximum(merged, 0)) - _added(variance, total * np.outer(x, y)))
    return nats, min(1.0, nats / -float(y @ np.log(y)))


def _added(variance: Floats, expected: Floats) -> float:
    """What sampling and noise of this variance add to plug-in mutual information, nats, for independent columns.

    I = f / n with f = Σ n_ij log n_ij − Σ n_i· log n_i· − Σ n_·j log n_·j + n log n, of cells, rows, columns and total.
    Let every n_ij have an error of mean 0 and variance v_ij, independent of the others: rows have Σ_j v_ij, and so on.
    (n log n)″ = 1 / n, so by Taylor's second term

        E f − f ≈ ½ (Σ v_ij / n_ij − Σ v_i· / n_i· − Σ v_·j / n_·j + v / n),

    and dividing by a total that has an error as well adds nothing where I = 0. Sampling alone, v_ij = n_ij, gives
    (R C − R − C + 1) / 2 n, the correction of Miller (1955, "Note on the bias of information estimates") as used above;
    Panzeri and Treves (1996) have it for mutual information. Noise is another v_ij beside it: both are added up. For
    n_ij stands what independence expects, because a noised cell may be next to nothing, and its inverse anything.
    """
    total, (rows, columns) = float(expected.sum()), expected.shape
    of_noise = (variance / expected).sum() + variance.sum() / total
    for axis in (0, 1):
        of_noise -= (variance.sum(axis) / expected.sum(axis)).sum()
    return float(of_noise + (rows - 1) * (columns - 1)) / (2 * total)


def _groups(total: int, noise: float, margins: Sequence[Floats], ordered: Sequence[bool]) -> tuple[list[Floats], bool]:
    """Which bins of X and of Y are taken together, as (groups, bins) of 0 and 1, and whether that is enough.

    The smallest bin goes to its smaller neighbour, or where there is no order to the next smallest; on the axis where
    it is smaller for how many bins there are. By the margins alone: the noise of the table itself does not choose.
    """
    groups = [np.eye(len(margin)) for margin in margins]
    while True:
        shares = [group @ margin for group, margin in zip(groups, margins, strict=True)]
        noises = noise * np.sqrt(np.outer(*(group.sum(1) for group in groups)))
        enough = bool(np.all(total * np.outer(*shares) >= NOISE_PER_CELL * noises))
        axes = [axis for axis in (0, 1) if len(shares[axis]) > 2]
        if enough or not axes:
            return groups, enough
        axis = min(axes, key=lambda axis: float(shares[axis].min()) * len(shares[axis]))
        kept, gone = _smallest_two(shares[axis], ordered[axis])
        groups[axis][kept] += groups[axis][gone]
        groups[axis] = np.delete(groups[axis], gone, axis=0)


def _smallest_two(shares: Floats, ordered: bool) -> tuple[int, int]:
    """The smallest bin and the smaller of its neighbours, or the two smallest bins; in order."""
    first = int(np.argmin(shares))
    others = [other for other in range(len(shares)) if other != first and (not ordered or abs(other - first) == 1)]
    second = min(others, key=lambda other: float(shares[other]))
    return min(first, second), max(first, second)
