"""server/review/agreement.py against published examples and brute force."""

import itertools

import numpy as np
import pytest
from wardround.server.review.agreement import AgreementError, bradley_terry, krippendorff_alpha

# Krippendorff 2011, section C: four observers, twelve units, missing data.
_ = np.nan
OBSERVERS = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
        [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
    ]
)

# Agresti, Categorical Data Analysis, section 10.6: American League, 1987. Rows beat columns.
TEAMS = ("Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore")
SEASON = np.array(
    [
        [0, 7, 9, 7, 7, 9, 11],
        [6, 0, 7, 5, 11, 9, 9],
        [4, 6, 0, 7, 7, 8, 12],
        [6, 8, 6, 0, 6, 7, 10],
        [6, 2, 6, 7, 0, 7, 12],
        [4, 4, 5, 6, 6, 0, 6],
        [2, 4, 1, 3, 1, 7, 0],
    ],
    dtype=float,
)


@pytest.mark.parametrize(("level", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_is_that_of_krippendorffs_example(level, published) -> None:
    assert krippendorff_alpha(OBSERVERS, level) == pytest.approx(published, abs=5e-4)


def test_alpha_for_ratios_is_that_of_krippendorffs_example() -> None:
    assert krippendorff_alpha(OBSERVERS, "ratio") == pytest.approx(0.797, abs=5e-4)


@pytest.mark.parametrize("seed", range(5))
def test_nominal_alpha_is_disagreeing_pairs_over_those_that_chance_gives(seed: int) -> None:
    """By brute force over all pairs of ratings, within items and overall."""
    rng = np.random.default_rng(seed)
    ratings = rng.integers(0, 3, (4, 15)).astype(float)
    ratings[rng.random(ratings.shape) < 0.3] = np.nan
    items = [column[~np.isnan(column)] for column in ratings.T]
    items = [item for item in items if len(item) > 1]
    pooled = np.concatenate(items)
    within = sum(sum(a != b for a, b in itertools.permutations(item, 2)) / (len(item) - 1) for item in items) / len(
        pooled
    )
    overall = np.mean([a != b for a, b in itertools.permutations(pooled, 2)])
    assert krippendorff_alpha(ratings) == pytest.approx(1 - within / overall)


def test_raters_who_never_differ_agree_whatever_they_say() -> None:
    assert krippendorff_alpha(np.array([[1.0, 2.0], [1.0, 2.0]])) == 1.0
    assert krippendorff_alpha(np.ones((2, 3))) == 1.0


def test_one_rater_is_no_agreement() -> None:
    with pytest.raises(AgreementError, match="two raters"):
        krippendorff_alpha(np.array([[1.0, 2.0, 1.0]]))


def test_abilities_are_those_of_the_published_season() -> None:
    found = bradley_terry(SEASON)
    published = dict(zip(TEAMS, (1.581, 1.436, 1.294, 1.248, 1.108, 0.684, 0.0), strict=True))
    for team, value in published.items():
        difference, _ = found.difference(TEAMS.index(team), TEAMS.index("Baltimore"))
        assert difference == pytest.approx(value, abs=1e-3)


def test_the_standard_error_of_a_season_is_that_of_logistic_regression() -> None:
    """The same model as a generalised linear one, by a numerical second derivative of its log-likelihood."""

    def likelihood(ability: np.ndarray) -> float:
        full = np.append(ability, 0.0)
        return -float((SEASON * np.log1p(np.exp(full - full[:, None]))).sum())

    found = bradley_terry(SEASON)
    at = found.log_ability[:-1] - found.log_ability[-1]
    h, n = 1e-3, len(at)
    hessian = np.empty((n, n))
    for i, j in itertools.product(range(n), repeat=2):
        a, b = np.eye(n)[i] * h, np.eye(n)[j] * h
        hessian[i, j] = (
            likelihood(at + a + b) - likelihood(at + a - b) - likelihood(at - a + b) + likelihood(at - a - b)
        ) / (4 * h * h)
    errors = np.sqrt(np.diag(np.linalg.inv(-hessian)))
    assert [found.difference(i, n)[1] for i in range(n)] == pytest.approx(errors.tolist(), rel=1e-3)


def test_two_that_are_compared_have_the_logit_of_their_wins() -> None:
    difference, error = bradley_terry(np.array([[0.0, 30.0], [10.0, 0.0]])).difference(0, 1)
    assert difference == pytest.approx(np.log(3))
    assert error == pytest.approx(np.sqrt(1 / 30 + 1 / 10))


def test_who_never_won_has_no_ability() -> None:
    with pytest.raises(AgreementError, match="never won"):
        bradley_terry(np.array([[0.0, 3.0], [0.0, 0.0]]))
