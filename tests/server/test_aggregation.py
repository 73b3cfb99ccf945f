"""The mean of the sites' updates, against the plain mean; and the server's step, against the paper's formulas."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from wardround.common.errors import ProtocolError
from wardround.server.aggregation import MeanUpdate

finite = st.floats(-1e3, 1e3, width=32)


@given(
    deltas=hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 30)), elements=finite),
    weights=st.lists(st.integers(1, 5000), min_size=6, max_size=6),
)
def test_the_mean_is_the_weighted_mean(deltas: np.ndarray, weights: list[int]):
    total = MeanUpdate(deltas.shape[1])
    for site, delta in enumerate(deltas):
        total.add(f"site-{site}", delta, weights[site])
    used = np.array(weights[: len(deltas)], np.float64)
    expected = (deltas.astype(np.float64) * used[:, None]).sum(axis=0) / used.sum()
    assert np.allclose(total.mean(), expected, rtol=1e-12, atol=1e-9)


def test_vectors_longer_than_a_block_are_summed_whole():
    rng = np.random.default_rng(0)
    deltas = rng.standard_normal((3, 600_001)).astype(np.float32)
    total = MeanUpdate(deltas.shape[1])
    for site, delta in enumerate(deltas):
        total.add(str(site), delta, 1)
    assert np.allclose(total.mean(), deltas.astype(np.float64).mean(axis=0), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    ("delta", "weight", "said"),
    [
        (np.zeros(3, np.float32), 1, "expected float32"),
        (np.zeros(4), 1, "expected float32"),
        (np.array([0, np.nan, 0, 0], np.float32), 1, "NaN or infinity"),
        (np.array([0, np.inf, 0, 0], np.float32), 1, "NaN or infinity"),
        (np.zeros(4, np.float32), 0, "weight"),
        (np.zeros(4, np.float32), -1, "weight"),
        (np.zeros(4, np.float32), 2**40, "weight"),
    ],
)
def test_a_bad_update_is_refused_and_adds_nothing(delta: np.ndarray, weight: int, said: str):
    total = MeanUpdate(4)
    total.add("a", np.ones(4, np.float32), 2)
    with pytest.raises(ProtocolError, match=said):
        total.add("b", delta, weight)
    assert total.mean().tolist() == [1.0] * 4
    assert (total.sites, total.weight) == (["a"], 2)


def test_a_site_counts_once():
    total = MeanUpdate(1)
    total.add("a", np.ones(1, np.float32), 1)
    with pytest.raises(ProtocolError, match="a second"):
        total.add("a", np.ones(1, np.float32), 1)


def test_there_is_no_mean_of_nothing():
    with pytest.raises(ProtocolError, match="at least one site"):
        MeanUpdate(3).mean()


def test_memory_does_not_grow_with_the_number_of_sites():
    delta = np.ones(500_000, np.float32)
    peaks = []
    for sites in (2, 40):
        tracemalloc.start()
        total = MeanUpdate(len(delta))
        for site in range(sites):
            total.add(str(site), delta, 1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.05 * peaks[0]
