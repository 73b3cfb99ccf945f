"""Private steps: gradients of single patients, clipping, noise, draws. docs/privacy.md says what rests on them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from wardround.client.draws import Draws
from wardround.client.grpo import Engine, train_local_round
from wardround.client.private_optimizer import PrivateOptimizer, PrivateSteps, clip_factors
from wardround.client.randomness import SecureRandom
from wardround.common.lm.generation import Completion
from wardround.common.lm.lora import patient_gradients
from wardround.common.lm.models import LanguageModel

from .test_grpo import GROUP, PATIENTS, TEMPLATE, TOKENS, GivenCompletions, Source, configured, model, unforced

KEY = bytes(range(32))


def steps(most: float = 0.5, sigma: float = 1.0, rate: float = 0.5) -> PrivateSteps:
    return PrivateSteps(sigma, most, rate, expected_patients=4.0, random=SecureRandom(KEY))


def sums(engine: Engine, questions: list) -> np.ndarray:
    """What noise would be added to, in double precision."""
    engine.lm.model.train()
    optimizer = engine.create_optimizer()
    assert isinstance(optimizer, PrivateOptimizer)
    for loss in engine.losses(questions, one_by_one=not engine.told_apart):
        optimizer.absorb(engine.patient_gradients(loss * engine.draws.expected_patients))
    found = [p.summed_grad if p.summed_grad is not None else torch.zeros_like(p) for p in optimizer.params]
    assert all(total.dtype == torch.float64 for total in found if total.abs().max() > 0)
    return np.concatenate([total.detach().double().numpy().ravel() for total in found])


def drawn(engine: GivenCompletions, completions: list[Completion], patients: list[int]) -> np.ndarray:
    engine.given = [c for index in patients for c in completions[index * GROUP : (index + 1) * GROUP]]
    return sums(engine, [Source().question(index) for index in patients])


@pytest.mark.parametrize("strategy", ["ffa", "fedit"])
@pytest.mark.parametrize(("reasoning", "more"), [(TOKENS, {}), (0, {"expectation": "exact"}), (TOKENS, {"beta": 0.1})])
def test_one_backward_pass_gives_the_gradients_of_all_its_patients(
    tiny_model_path: Path, strategy: str, reasoning: int, more: dict
):
    questions = [Source().question(index) for index in range(PATIENTS)]
    engine = Engine(
        model(tiny_model_path, strategy), Source(), TEMPLATE, configured(reasoning, strategy, **more), seed=0
    )
    assert engine.told_apart
    engine.lm.model.train()
    (together,) = list(engine.losses(questions))
    gradients = engine.patient_gradients(together)
    found = {name: gradients[parameter] for name, parameter in enumerate(engine.trained)}
    assert engine.part_patients == len(next(iter(found.values())))
    engine = Engine(
        model(tiny_model_path, strategy), Source(), TEMPLATE, configured(reasoning, strategy, **more), seed=0
    )
    engine.lm.model.train()
    single = []
    for loss in engine.losses(questions, one_by_one=True):
        for parameter in engine.trained:
            parameter.grad = None
        loss.backward()
        single.append([parameter.grad.clone() for parameter in engine.trained])
    assert len(single) == len(next(iter(found.values())))
    # Parts are ordered by length, so the order may differ: every single gradient is found once.
    mine = [torch.cat([gradient[i].flatten() for gradient in found.values()]) for i in range(len(single))]
    theirs = [torch.cat([gradient.flatten() for gradient in gradients]) for gradients in single]
    for expected in theirs:
        errors = [float((one - expected).abs().max()) for one in mine]
        assert min(errors) <= 1e-4 * float(expected.abs().max()) + 1e-6
        mine.pop(int(np.argmin(errors)))


def test_whatever_is_trained_beyond_fused_layers_has_a_pass_for_every_patient(tiny_model_path: Path):
    engine = GivenCompletions(
        model(tiny_model_path, "full"), Source(), TEMPLATE, configured(strategy="full"), seed=0, private=steps()
    )
    assert not engine.told_apart
    completions = unforced(len(engine.lm.tokenizer))
    whole, without = (drawn(engine, completions, patients) for patients in ([1, 2], [1]))
    assert 0 < np.linalg.norm(whole - without) <= 0.5 * (1 + 1e-12)


@pytest.mark.parametrize("strategy", ["ffa", "fedit"])
@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**16), gone=st.integers(0, PATIENTS - 1), most=st.sampled_from([1e-3, 0.05, 1.0, 50.0]))
def test_any_patient_taken_away_changes_the_sum_by_at_most_c(
    models: dict[str, LanguageModel], strategy: str, loss_type: str, seed: int, gone: int, most: float
):
    config = configured(strategy=strategy, loss_type=loss_type)
    engine = GivenCompletions(models[strategy], Source(), TEMPLATE, config, seed=0, private=steps(most))
    completions = random_completions(len(models[strategy].tokenizer), seed)
    everybody = drawn(engine, completions, list(range(PATIENTS)))
    others = drawn(engine, completions, [index for index in range(PATIENTS) if index != gone])
    assert np.linalg.norm(everybody - others) <= most * (1 + 1e-5)


@pytest.mark.parametrize(
    ("loss_type", "bounded"), [("dr_grpo", True), ("grpo", True), ("dapo", False), ("bnpo", False)]
)
def test_the_bound_fails_where_a_loss_divides_by_the_batch(tiny_model_path: Path, loss_type: str, bounded: bool):
    """Three short patients alike and a long one: with it, the others' tokens weigh less."""
    lm = model(tiny_model_path)
    short = unforced(len(lm.tokenizer))[GROUP : 2 * GROUP]
    for completion in short:
        for name in ("ids", "targets", "in_loss", "log_probs"):
            setattr(completion, name, getattr(completion, name)[:1])
    long = [Completion(generated=TOKENS, boxed=True) for _ in range(GROUP)]
    for row, completion in enumerate(long):
        completion.answer = Source().question(1).answer if row else None
        for token in range(TOKENS):
            completion.add(10 + token + row, 0.0)
    groups = [short, short, short, long]

    def total(patients: list[int], most: float) -> np.ndarray:
        engine = GivenCompletions(lm, Source(), TEMPLATE, configured(loss_type=loss_type), seed=0, private=steps(most))
        engine.given = [completion for index in patients for completion in groups[index]]
        return sums(engine, [Source().question(1) for _ in patients])

    one = max(float(np.linalg.norm(total([0], 1e9))), float(np.linalg.norm(total([3], 1e9))))
    change = float(np.linalg.norm(total([0, 1, 2, 3], one) - total([0, 1, 2], one)))
    assert (change <= one * (1 + 1e-5)) == bounded


@pytest.fixture(scope="module")
def models(tiny_model_path: Path) -> dict[str, LanguageModel]:
    return {strategy: model(tiny_model_path, strategy) for strategy in ("ffa", "fedit")}


def random_completions(vocabulary: int, seed: int) -> list[Completion]:
    rng, result = np.random.default_rng(seed), []
    for row in range(PATIENTS * GROUP):
        completion = Completion(generated=int(rng.integers(1, TOKENS)), boxed=True)
        for token in rng.integers(5, vocabulary, completion.generated).tolist():
            completion.add(token, 0.0)
        completion.answer = Source().question(row // GROUP).answer if rng.random() < 0.5 else None
        result.append(completion)
    return result


def test_a_short_gradient_is_kept_as_it_is_and_a_long_one_cut_to_c():
    samples = [torch.tensor([[3.0, 0.0], [0.3, 0.0], [0.0, 0.0]]), torch.tensor([[4.0], [0.4], [0.0]])]
    assert clip_factors(samples, 1.0).tolist() == pytest.approx([0.2, 1.0, 1.0])
    assert clip_factors(samples, 0.5)[1].item() == pytest.approx(1.0)
    assert clip_factors(samples, 0.5).dtype == torch.float64


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_patient_whose_gradient_is_not_finite_counts_as_nothing(bad: float):
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = PrivateOptimizer(torch.optim.SGD([weight], lr=1.0), steps())
    optimizer.absorb({weight: torch.tensor([[bad, 1.0], [0.1, 0.2]])})
    assert weight.summed_grad.tolist() == pytest.approx([0.1, 0.2])


def test_huge_finite_gradients_do_not_overflow_the_norm():
    factors = clip_factors([torch.full((1, 4), 3e38)], 1.0)
    assert torch.isfinite(factors).all() and float(factors[0] * 3e38 * 2) == pytest.approx(1.0)


def noise_of_a_step(sigma: float, most: float, expected: float = 4.0) -> np.ndarray:
    """What one step without anybody moves a weight by, times q·N̂."""
    weight = torch.nn.Parameter(torch.zeros(20_000))
    private = PrivateSteps(sigma, most, 0.1, expected, SecureRandom(KEY))
    optimizer = PrivateOptimizer(torch.optim.SGD([weight], lr=1.0), private)
    optimizer.step()
    return -weight.detach().double().numpy() * expected


@pytest.mark.parametrize(("sigma", "most"), [(1.0, 0.5), (0.7, 2.0)])
def test_a_step_without_anybody_is_noise_of_sigma_times_c_over_the_expected_patients(sigma: float, most: float):
    found = noise_of_a_step(sigma, most)
    assert stats.kstest(found, stats.norm(0, sigma * most).cdf).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(found, stats.norm(0, sigma * most * wrong).cdf).pvalue < 1e-6


def test_every_step_has_noise_of_its_own_and_sums_start_anew():
    weight = torch.nn.Parameter(torch.zeros(50))
    optimizer = PrivateOptimizer(torch.optim.SGD([weight], lr=1.0), steps(sigma=1e-9))
    moves = []
    for gradient in (0.1, 0.02):
        before = weight.detach().clone()
        optimizer.absorb({weight: torch.full((1, 50), gradient / 50**0.5)})
        optimizer.step()
        moves.append((before - weight.detach()) * 4.0 * 50**0.5)
    torch.testing.assert_close(moves[0], torch.full((50,), 0.1), rtol=0, atol=1e-6)
    torch.testing.assert_close(moves[1], torch.full((50,), 0.02), rtol=0, atol=1e-6)
    noisy = torch.nn.Parameter(torch.zeros(50))
    other = PrivateOptimizer(torch.optim.SGD([noisy], lr=1.0), steps())
    other.step()
    first = noisy.detach().clone()
    other.step()
    assert not torch.allclose(noisy.detach() - first, first)


def test_private_draws_are_the_poisson_draws_that_are_accounted_for():
    """Rate q for every patient, independent of the others and of how many there are, from the site's own stream."""
    for patients in (30, 90):
        source = type("Seen", (), {"n_patients": patients, "draw": lambda self, indices, rng: list(indices)})()
        draws = Draws(source, 5.0, 4000, np.random.default_rng(0), steps(rate=0.1))
        assert (draws.rate, draws.expected_patients) == (0.1, 4.0)
        seen = np.zeros((4000, patients))
        for step, indices in enumerate(draws):
            seen[step, indices] = 1
        counts = seen.sum(1)
        assert abs(counts.mean() - 0.1 * patients) < 4 * (0.09 * patients / 4000) ** 0.5
        assert counts.var() == pytest.approx(0.09 * patients, rel=0.12)  # fixed-size or truncated draws vary less
        assert np.abs(seen.mean(0) - 0.1).max() < 5 * (0.09 / 4000) ** 0.5
        assert abs(np.corrcoef(seen[:, 0], seen[:, 1])[0, 1]) < 0.06
        again = Draws(source, 5.0, 10, np.random.default_rng(0), steps(rate=0.1))
        different = PrivateSteps(1.0, 0.5, 0.1, 4.0, SecureRandom(bytes(32)))
        others = Draws(source, 5.0, 10, np.random.default_rng(0), different)
        assert [list(map(int, a)) for a in again] != [list(map(int, b)) for b in others]  # `rng` does not decide


@pytest.mark.parametrize(("reasoning", "more"), [(TOKENS, {}), (0, {"expectation": "exact"})])
def test_a_private_round_trains_and_no_two_are_alike(tiny_model_path: Path, reasoning: int, more: dict):
    """The run's seed decides nothing that a coordinator could take off again."""
    vectors = []
    for key in (KEY, None):
        lm = model(tiny_model_path)
        before = lm.vector()
        random = SecureRandom(key)
        private = PrivateSteps(0.5, 1.0, 0.9, 4.0, random)
        result = train_local_round(lm, Source(), TEMPLATE, configured(reasoning, **more), seed=3, private=private)
        assert result.steps == 2 and not np.array_equal(result.vector, before) and np.isfinite(result.vector).all()
        vectors.append(result.vector)
    assert not np.array_equal(vectors[0], vectors[1])


def test_a_private_round_without_patients_still_moves_by_noise(tiny_model_path: Path):
    lm = model(tiny_model_path)
    before = lm.vector()
    result = train_local_round(lm, Source(0), TEMPLATE, configured(), seed=3, private=steps())
    assert (result.questions, result.empty_draws, result.steps) == (0, 2, 2)
    assert not np.array_equal(result.vector, before)


def test_without_noise_and_with_everybody_a_private_step_is_the_usual_one(tiny_model_path: Path):
    moved = []
    for private in (None, PrivateSteps(1e-12, 1e6, 1.0, float(PATIENTS), SecureRandom(KEY))):
        lm = model(tiny_model_path)
        config = configured(0, expectation="exact", patients_per_step=PATIENTS)
        moved.append(train_local_round(lm, Source(), TEMPLATE, config, seed=3, private=private).vector)
    np.testing.assert_allclose(moved[0], moved[1], atol=2e-6)


def test_gradients_of_patients_are_told_apart_in_one_pass_at_a_time():
    with patient_gradients(2), pytest.raises(RuntimeError, match="already inside"), patient_gradients(3):
        pass
    with patient_gradients(2) as found:
        pass
    assert found == {}
