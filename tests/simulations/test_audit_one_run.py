"""The one-run audit: its arithmetic against an oracle, and its teeth against mechanisms that are broken on purpose."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from wardround.client.private_optimizer import PrivateOptimizer, PrivateSteps
from wardround.client.randomness import SecureRandom
from wardround.common.config import LoraConfig, ModelConfig, RunConfig
from wardround.common.lm.models import load
from wardround.common.privacy import Event, calibrate, epsilon_prv
from wardround.common.question import Question, load_prompt
from wardround.simulations.audit.bound import (
    auc,
    clopper_pearson,
    lower_bound,
    one_run,
    p_value,
    permitted_auc,
)
from wardround.simulations.audit.canaries import AuditedEngine, Canaries, WithCanaries, observe

DELTA, RATE, STEPS, BYSTANDERS, M = 1e-6, 0.2, 12, 6, 2400


class Bystanders:
    n_patients = BYSTANDERS

    def draw(self, patient_indices: np.ndarray, rng: np.random.Generator) -> list[Question]:
        return [
            Question("albumin", "Laboratory", "feature", f"Age {40 + i}. Albumin? 1 2 3", ("1", "2", "3"), i % 3, 0)
            for i in patient_indices.tolist()
        ]


def engine(
    path: Path, epsilon: float, everybody: bool, canaries: Canaries | None = None
) -> tuple[AuditedEngine, float]:
    """A local round with canaries on the tiny model, and the ε that the accountant claims for it."""
    rate, steps = (1.0, 1) if everybody else (RATE, STEPS)
    sigma = calibrate(epsilon, DELTA, rate, steps)
    config = RunConfig.model_validate(
        {
            "name": "test",
            "privacy": {"enabled": False},
            "lora": {"rank": 16},
            "grpo": {"expectation": "exact", "local_steps": steps, "learning_rate": 1e-3},
        }
    )
    lm = load(ModelConfig(id=str(path), device="cpu", dtype="float32"), LoraConfig(rank=16), seed=0)
    if canaries is None:
        canaries = Canaries.plant(lm.vector().size, M, 4, np.random.default_rng(7))
    made = AuditedEngine(
        lm,
        WithCanaries(Bystanders(), canaries),
        load_prompt("en_short"),
        config,
        canaries,
        seed=1,
        private=PrivateSteps(sigma, 0.1, rate, rate * 2000, SecureRandom(bytes(32))),
    )
    return made, epsilon_prv([Event("rounds", sigma, rate, steps)], DELTA).epsilon


def bound_of(made: AuditedEngine) -> float:
    return one_run(observe(made), made.canaries.included, DELTA).epsilon


@pytest.mark.parametrize("everybody", [True, False])
@pytest.mark.parametrize("epsilon", [1.0, 4.0])
def test_the_bound_stays_below_the_claim_where_the_mechanism_is_whole(
    tiny_model_path: Path, epsilon: float, everybody: bool
):
    made, claimed = engine(tiny_model_path, epsilon, everybody)
    found = one_run(observe(made), made.canaries.included, DELTA)
    assert found.epsilon <= claimed <= epsilon
    assert found.most > claimed  # it could have been contradicted
    if epsilon == 4.0:
        assert found.epsilon > 0.3  # and it sees something: the attack works


def noise_divided_by_ten(monkeypatch: pytest.MonkeyPatch, made: AuditedEngine) -> None:
    gaussian = SecureRandom.gaussian
    monkeypatch.setattr(SecureRandom, "gaussian", lambda self, count, std: gaussian(self, count, std / 10))


def nothing_clipped(monkeypatch: pytest.MonkeyPatch, made: AuditedEngine) -> None:
    def ones(samples, most):
        return torch.ones(len(samples[0]), dtype=torch.float64)

    monkeypatch.setattr("wardround.client.private_optimizer.clip_factors", ones)


def one_tensor_without_noise(monkeypatch: pytest.MonkeyPatch, made: AuditedEngine) -> None:
    add_noise = PrivateOptimizer.add_noise

    def forgetful(self: PrivateOptimizer) -> None:
        first = self.params[0]
        total = first.summed_grad
        add_noise(self)
        first.grad = torch.zeros_like(first) if total is None else total.to(first.dtype)

    monkeypatch.setattr(PrivateOptimizer, "add_noise", forgetful)


def canaries_beside_the_clip(monkeypatch: pytest.MonkeyPatch, made: AuditedEngine) -> None:
    """A later part of a draw is added up as it is, as when one of two code paths forgets the clip."""

    def unclipped(self: PrivateOptimizer, gradients: dict) -> None:
        for parameter in self.params:
            total = gradients[parameter].double().sum(0)
            known = parameter.summed_grad
            parameter.summed_grad = total if known is None else known + total

    training_step = AuditedEngine.training_step

    def step(self, *args):
        with pytest.MonkeyPatch.context() as patch:
            gradients = self._gradients

            def after_the_patients(drawn):
                patch.setattr(PrivateOptimizer, "absorb", unclipped)
                return gradients(drawn)

            patch.setattr(self, "_gradients", after_the_patients)
            return training_step(self, *args)

    monkeypatch.setattr(AuditedEngine, "training_step", step)


@pytest.mark.parametrize("everybody", [True, False])
@pytest.mark.parametrize(
    "broken", [noise_divided_by_ten, nothing_clipped, one_tensor_without_noise, canaries_beside_the_clip]
)
def test_a_broken_mechanism_is_refuted(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch, broken, everybody: bool):
    made, claimed = engine(tiny_model_path, 2.0, everybody)
    broken(monkeypatch, made)
    assert bound_of(made) > claimed


def test_canaries_are_drawn_at_the_rate_of_patients_and_seen_as_the_optimizer_has_them(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With the noise all but gone, the sum over steps is the number of draws, each of length C."""
    made, _ = engine(tiny_model_path, 2.0, everybody=False)
    monkeypatch.setattr(SecureRandom, "gaussian", lambda self, count, std: torch.zeros(count, dtype=torch.float64))
    seen = []

    def look(*_):
        values = torch.cat([p.grad.flatten().double() for p in made.trained]).numpy()
        seen.append(values[made.canaries.places] * made.private.expected_patients / made.private.max_grad_norm)

    optimizer = made.create_optimizer

    def watched(model=None):
        result = optimizer(model)
        made.private_optimizer.original_optimizer.register_step_pre_hook(look)
        return result

    monkeypatch.setattr(made, "create_optimizer", watched)
    observe(made)
    lengths = np.array(seen).mean(2) * 4**0.5  # equal values in four places
    drawn = lengths > 0.5
    included = made.canaries.included
    assert len(seen) == STEPS and not drawn[:, ~included].any()
    assert abs(drawn[:, included].mean() - RATE) < 4 * (RATE * (1 - RATE) / (STEPS * included.sum())) ** 0.5
    # The patients' own gradients lie over them: few patients, clipped together to C.
    assert np.abs(np.median(lengths[drawn]) - 1) < 0.02


def test_canaries_have_places_of_their_own_and_fair_coins():
    found = Canaries.plant(40_000, 8000, 4, np.random.default_rng(0))
    everything = np.concatenate([found.places.ravel(), found.spare])
    assert np.array_equal(np.sort(everything), np.arange(40_000))
    assert abs(found.included.mean() - 0.5) < 4 * (0.25 / 8000) ** 0.5
    with pytest.raises(ValueError, match="7/8"):
        Canaries.plant(40_000, 9000, 4, np.random.default_rng(0))


def brute_force(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2 from every outcome of r coins."""
    q = math.exp(epsilon) / (math.exp(epsilon) + 1)

    def f(least: int) -> float:
        return sum(
            math.prod(q if hit else 1 - q for hit in outcome)
            for outcome in itertools.product((0, 1), repeat=r)
            if sum(outcome) >= least
        )

    more = max(((f(v - i) - f(v)) / i for i in range(1, m + 1)), default=0.0)
    return min(1.0, f(v) + 2 * m * delta * more)


@pytest.mark.parametrize("epsilon", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.02])
def test_the_probability_of_right_guesses_is_that_of_the_theorem(epsilon: float, delta: float):
    for r, v in ((1, 1), (5, 3), (8, 8), (9, 0), (10, 6)):
        assert p_value(12, r, v, epsilon, delta) == pytest.approx(brute_force(12, r, v, epsilon, delta), rel=1e-9)


def test_the_bound_is_where_the_probability_crosses_the_error():
    for m, r, v, delta in ((2000, 600, 450, 1e-6), (5000, 5000, 4900, 1e-5), (100, 100, 100, 0.0)):
        found = lower_bound(m, r, v, delta, 0.05)
        assert p_value(m, r, v, found, delta) < 0.05 <= p_value(m, r, v, found + 2e-4, delta)
    assert lower_bound(2000, 600, 300, 1e-6, 0.05) == 0.0


def test_guesses_at_random_refute_nothing_in_nineteen_of_twenty_runs():
    rng = np.random.default_rng(3)
    false = sum(one_run(rng.random(500), rng.random(500) < 0.5, 1e-6).epsilon > 0 for _ in range(40))
    assert false <= 6  # expected at most 2


def test_the_bound_holds_for_the_mechanism_that_it_is_tight_for():
    """Randomised response at ε tells as much as ε allows: the bound comes close, and passes it in 5 % at most."""
    rng, epsilon, passed, found = np.random.default_rng(4), 1.5, 0, []
    for _ in range(25):
        included = rng.random(2000) < 0.5
        truthful = rng.random(2000) < math.exp(epsilon) / (1 + math.exp(epsilon))
        scores = np.where(included == truthful, 1.0, -1.0) + 1e-3 * rng.random(2000)
        found.append(one_run(scores, included, 0.0).epsilon)
        passed += found[-1] > epsilon
    assert passed <= 6 and np.median(found) > 1.2


@pytest.mark.parametrize("ties", [False, True])
def test_auc_is_the_share_of_pairs_and_its_interval_that_of_delong(ties: bool):
    rng = np.random.default_rng(0)
    members, others = rng.normal(0.7, 1, 150), rng.normal(0, 1, 210)
    if ties:
        members, others = members.round(), others.round()
    wins = (members[:, None] > others) + 0.5 * (members[:, None] == others)
    value, (low, high) = auc(members, others)
    assert value == pytest.approx(wins.mean())
    spread = wins.mean(1).var(ddof=1) / 150 + wins.mean(0).var(ddof=1) / 210
    assert high - low == pytest.approx(2 * 1.96 * spread**0.5)


def test_the_permitted_auc_is_the_area_under_the_best_test():
    for epsilon, delta in ((0.0, 0.0), (1.0, 1e-5), (2.0, 0.05), (0.3, 0.2)):
        x = np.linspace(0, 1, 200_001)
        power = np.minimum(delta + math.exp(epsilon) * x, 1 - math.exp(-epsilon) * (1 - delta - x))
        assert permitted_auc(epsilon, delta) == pytest.approx(np.trapezoid(np.minimum(power, 1), x), abs=1e-6)


def test_exact_intervals_of_shares_are_those_of_the_tables():
    assert clopper_pearson(0, 10) == pytest.approx([0.0, 0.3085], abs=1e-4)
    assert clopper_pearson(3, 20) == pytest.approx([0.0321, 0.3789], abs=1e-4)
    assert clopper_pearson(10, 10) == pytest.approx([0.6915, 1.0], abs=1e-4)
