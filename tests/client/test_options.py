"""Options of a question (client/options.py): what they must hold, and that they do not give the truth away."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from sklearn.ensemble import HistGradientBoostingClassifier
from wardround.client.options import NARROWEST, draw_options
from wardround.common.counts import grid
from wardround.common.dictionary import Feature, load_dictionary
from wardround.common.schema import FeatureSchema

NUMBERS = [
    feature
    for name in ("support_icu", "smart", "copenhagen_stroke")
    for feature in load_dictionary(name).used
    if feature.kind == "number"
]
LOG = [feature for feature in NUMBERS if feature.scale == "log"]


def number(low: float, high: float, decimals: int, scale: str = "linear") -> Feature:
    entry = {"name": "x", "label": "x", "kind": "number", "section": "S", "low": low, "high": high}
    return Feature.model_validate({**entry, "decimals": decimals, "scale": scale})


def mixture(feature: Feature) -> FeatureSchema:
    """Three overlapping components in the middle of the plausible range."""
    low, high = np.log(feature.bounds) if feature.scale == "log" else feature.bounds
    means, sds = (low + (high - low) * np.array(share) for share in ([0.35, 0.45, 0.6], [0.05, 0.08, 0.12]))
    return FeatureSchema(
        name=feature.name, weights=(0.3, 0.4, 0.3), means=tuple(means.tolist()), sds=tuple((sds - low).tolist())
    )


def from_mixture(feature: Feature, schema: FeatureSchema, n: int, rng: np.random.Generator) -> np.ndarray:
    """n values of patients whom the schema describes."""
    component = rng.choice(len(schema.weights), n, p=schema.weights)
    drawn = rng.normal(np.array(schema.means)[component], np.array(schema.sds)[component])
    points = grid(feature)
    index = points.index(np.exp(drawn) if feature.scale == "log" else drawn)
    return points.value(np.clip(index, points.first, points.last))


def ladders(feature: Feature, schema: FeatureSchema, truth: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(options in increasing order, in decimals; the truth's rank), as someone sees them who sorts the options."""
    drawn = draw_options(truth, feature, schema, 5, 2.0, np.random.default_rng(seed))
    return np.sort(drawn.values, axis=1), np.sum(drawn.values < grid(feature).index(truth)[:, None], axis=1)


def test_levels_are_drawn_by_frequency_and_never_twice():
    feature = Feature(name="x", label="x", section="S", levels={str(i): str(i) for i in range(6)})
    schema = FeatureSchema(name="x", frequencies=(0.4, 0.3, 0.2, 0.08, 0.02, 0.0))
    drawn = draw_options(np.full(20_000, 3), feature, schema, 3, 2.0, np.random.default_rng(0))
    assert np.all(np.sort(drawn.values, axis=1)[:, :-1] != np.sort(drawn.values, axis=1)[:, 1:])
    often = np.bincount(drawn.values.ravel(), minlength=6) / 20_000
    assert often[3] == 1 and often[5] == 0
    assert often[0] > often[1] > often[2] > often[4] > 0
    weights = np.array([0.4, 0.3, 0.2, 0.02]) / 0.92  # first draw, then second draw without replacement
    expected = weights + [
        sum(weights[j] * w / (1 - weights[j]) for j in range(4) if j != i) for i, w in enumerate(weights)
    ]
    np.testing.assert_allclose(often[[0, 1, 2, 4]], expected, atol=0.02)
    best = np.take_along_axis(np.array(schema.frequencies)[drawn.values], drawn.majority[:, None], 1)[:, 0]
    assert np.all(best == np.array(schema.frequencies)[drawn.values].max(1))


@pytest.mark.parametrize("kind", ["number", "category"])
def test_sorted_options_are_the_shuffled_ones_in_order_and_the_answer_is_the_truth(kind: str):
    truth: np.ndarray
    if kind == "number":
        feature = number(0, 200, 1)
        schema = mixture(feature)
        truth = from_mixture(feature, schema, 2000, np.random.default_rng(1))
        index = grid(feature).index(truth)
    else:
        feature = Feature(name="x", label="x", section="S", levels={str(i): str(i) for i in range(6)})
        schema = FeatureSchema(name="x", frequencies=(0.4, 0.3, 0.2, 0.08, 0.02, 0.0))
        truth = index = np.random.default_rng(1).choice(6, 2000, p=schema.frequencies)
    shuffled = draw_options(truth, feature, schema, 4, 2.0, np.random.default_rng(2))
    ordered = draw_options(truth, feature, schema, 4, 2.0, np.random.default_rng(2), order="sorted")
    np.testing.assert_array_equal(ordered.values, np.sort(shuffled.values, axis=1))
    for drawn in (shuffled, ordered):
        np.testing.assert_array_equal(np.take_along_axis(drawn.values, drawn.answer[:, None], 1)[:, 0], index)
    best = [np.take_along_axis(drawn.values, drawn.majority[:, None], 1) for drawn in (shuffled, ordered)]
    np.testing.assert_array_equal(*best)


def test_ladder_steps_are_at_most_two_sds_of_a_component_drawn_by_its_density():
    feature = number(-1000, 1000, 1)
    schema = FeatureSchema(name="x", weights=(0.5, 0.5), means=(0.0, 0.0), sds=(1.0, 6.5))
    values, rank = ladders(feature, schema, np.zeros(20_000))
    steps = np.diff(values, axis=1)
    assert np.all(np.ptp(steps, axis=1) <= 1)  # even, but for rounding to tenths
    steps = steps.mean(1)
    narrow, wide = steps < 30, steps > 30
    assert steps[narrow].min() >= NARROWEST * 20 - 0.5 and steps[narrow].max() <= 20.5  # in tenths
    assert steps[wide].min() >= NARROWEST * 130 - 0.5 and steps[wide].max() <= 130.5
    for mine, widest in ((narrow, 20), (wide, 130)):
        assert steps[mine].mean() == pytest.approx((1 + NARROWEST) / 2 * widest, rel=0.02)
    assert np.mean(narrow) == pytest.approx(6.5 / 7.5, abs=0.01)  # densities at 0 are 6.5 : 1
    assert chisquare(np.bincount(rank, minlength=5)).pvalue > 1e-4
    far, _ = ladders(feature, schema, np.full(2000, 12.0))
    assert np.all(np.diff(far, axis=1) > 30)  # twelve sds off the narrow one


@pytest.mark.parametrize("feature", NUMBERS, ids=lambda feature: feature.name)
def test_the_rank_of_the_truth_is_uniform_where_the_range_has_room_for_every_rank(feature: Feature):
    schema, rng = mixture(feature), np.random.default_rng(1)
    low, high = np.log(feature.bounds) if feature.scale == "log" else feature.bounds
    inside = from_mixture(feature, schema, 6000, rng)
    place = (np.log(inside) if feature.scale == "log" else inside) - low
    reach = 4 * max(max(schema.sds) * 2 * NARROWEST, 2 * 10.0**-feature.decimals if feature.scale == "linear" else 0)
    inside = inside[(place > reach) & (place < high - low - reach)][:2000]
    _, rank = ladders(feature, schema, inside)
    assert len(inside) > 300
    assert chisquare(np.bincount(rank, minlength=5)).pvalue > 1e-5


def consistent_anchors(values: np.ndarray, steps: list[float] | None) -> np.ndarray:
    """Which rungs could be the exact, unrounded anchor of a geometric ladder that has the others as rounded rungs.

    Args:
        values: (m, n) sorted options, in decimals.
        steps: in nats, where they are known; None: any one step.
    """
    rungs = np.arange(values.shape[1])
    possible = np.zeros(values.shape, dtype=bool)
    for c in rungs:
        if steps is not None:
            for step in steps:
                exact = values[:, [c]] * np.exp((rungs - c) * step)
                possible[:, c] |= (np.rint(exact) == values).all(axis=1)
            continue
        narrow, wide = np.zeros(len(values)), np.full(len(values), np.inf)
        for k in rungs[rungs != c]:  # the steps under which rung k rounds to what it is
            ends = [np.log(np.maximum(values[:, k] + half, 1e-9) / values[:, c]) / (k - c) for half in (-0.5, 0.5)]
            narrow, wide = np.maximum(narrow, np.minimum(*ends)), np.minimum(wide, np.maximum(*ends))
        possible[:, c] = wide > narrow
    return possible


@pytest.mark.parametrize("known_steps", [False, True])
def test_no_rung_of_a_geometric_ladder_is_told_by_being_exact(known_steps: bool):
    """The attack of someone who sees five options and no record; it made 0.27 to 0.34 of an anchor that was exact."""
    hits = questions = 0.0
    for feature in LOG:
        schema = mixture(feature)
        values, rank = ladders(feature, schema, from_mixture(feature, schema, 1000, np.random.default_rng(2)))
        possible = consistent_anchors(values, [2 * sd for sd in schema.sds] if known_steps else None)
        n, right = possible.sum(1), possible[np.arange(len(rank)), rank]
        hits += float(np.where(n == 0, 0.2, right / np.maximum(n, 1)).sum())
        questions += len(rank)
    assert hits / questions < 0.205


@pytest.mark.parametrize(
    ("feature", "means", "sds"),
    [
        (number(18, 105, 0), (60.0,), (15.0,)),
        (number(70, 260, 0), (135.0,), (22.0,)),
        (number(0.2, 26, 1, "log"), (0.0, 0.8), (0.3, 0.9)),
        (number(0.1, 65, 1, "log"), (-0.3, 1.0), (0.4, 1.1)),
    ],
    ids=["age", "pressure", "creatinine", "bilirubin"],
)
def test_a_learned_attack_on_the_options_does_no_better_than_the_schema_itself(
    feature: Feature, means: tuple[float, ...], sds: tuple[float, ...]
):
    """Trees that see options, gaps and room at both ends of the range, against the densest option: what the schema
    says of any patient is published. Ranges are a few steps long, so most ladders touch an end."""
    schema = FeatureSchema(name="x", weights=(1 / len(sds),) * len(sds), means=means, sds=sds)
    truth = from_mixture(feature, schema, 12_000, np.random.default_rng(3))
    values, rank = ladders(feature, schema, truth)
    points = grid(feature)
    line = np.log(values) if feature.scale == "log" else values
    gaps = np.diff(line, axis=1)
    seen = np.column_stack(
        [values, gaps, np.diff(gaps, axis=1), values[:, 0] - points.first, points.last - values[:, -1]]
    )
    half = len(rank) // 2
    trees = HistGradientBoostingClassifier(max_iter=40, random_state=0).fit(seen[:half], rank[:half])
    real = points.value(values[half:])
    densest = np.argmax(schema.mixture.log_density(np.log(real) if feature.scale == "log" else real), axis=1)
    assert trees.score(seen[half:], rank[half:]) < np.mean(densest == rank[half:]) + 0.03


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("sd", [0.4, 2.0, 30.0])
def test_every_option_could_have_been_the_truth_of_the_same_options(scale: str, sd: float):
    """Every set of options of every value of a short range, also where it ends: whichever is true, the set occurs."""
    feature = number(1, 14, 0, scale)
    schema = FeatureSchema(name="x", weights=(1.0,), means=(2.0,), sds=(sd / 5 if scale == "log" else sd,))
    seen: dict[int, dict[tuple[int, ...], int]] = {}
    for truth in range(1, 15):
        drawn = draw_options(np.full(20_000, truth), feature, schema, 3, 2.0, np.random.default_rng(truth))
        sets, counts = np.unique(np.sort(drawn.values, axis=1), axis=0, return_counts=True)
        seen[truth] = dict(zip(map(tuple, sets.tolist()), counts.tolist(), strict=True))
    often = {options for counts in seen.values() for options, times in counts.items() if times > 200}
    assert len(often) >= 12
    for options in often:
        assert all(options in seen[truth] for truth in options), options


@given(
    st.integers(0, 10**6),
    st.integers(0, 2),
    st.integers(1, 400),
    st.floats(0.001, 300),
    st.integers(2, 10),
    st.sampled_from(["linear", "log"]),
)
@settings(max_examples=150, deadline=None)
def test_a_ladder_holds_the_truth_once_and_stays_in_range(seed, decimals, width, sd, n_options, scale):
    rng = np.random.default_rng(seed)
    low = float(rng.integers(1, 50))
    feature = number(low, low + width, decimals, scale)
    points = grid(feature)
    truth = points.value(rng.integers(points.first, points.last + 1, size=64))
    truth[:2] = feature.bounds
    mean, spread = (np.log(low + width / 2), sd / 100) if scale == "log" else (low + width / 2, sd)
    schema = FeatureSchema(name="x", weights=(1.0,), means=(float(mean),), sds=(spread,))
    drawn = draw_options(truth, feature, schema, n_options, 2.0, rng)
    assert drawn.values.shape == (64, min(n_options, points.size))
    assert np.all(np.diff(np.sort(drawn.values, axis=1), axis=1) > 0)
    assert drawn.values.min() >= points.first and drawn.values.max() <= points.last
    np.testing.assert_array_equal(drawn.values[np.arange(64), drawn.answer], points.index(truth))
