"""One local GRPO round: parity with stock trl, draws, strategies, determinism, and leaving no trace."""

import math
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from wardround.client.draws import Draws
from wardround.client.grpo import Engine, train_local_round
from wardround.client.grpo_loss import StepScale, exact_loss, parts_by_tokens
from wardround.common.config import LoraConfig, ModelConfig, RunConfig
from wardround.common.lm.generation import Completion
from wardround.common.lm.models import LanguageModel, load
from wardround.common.lm.scoring import encode
from wardround.common.question import Question, load_prompt

TEMPLATE = load_prompt("en_short")
PATIENTS, GROUP, TOKENS, TEMPERATURE = 4, 3, 8, 0.9


class Source:
    """Patient i has one question, always the same."""

    def __init__(self, n_patients: int = PATIENTS) -> None:
        self.n_patients = n_patients

    def question(self, index: int) -> Question:
        options = ("1.0", "2.5", "3", "9")[: 2 + index % 3]
        text = f"Age: {40 + index} years\n" * (1 + index % 2) + "Albumin? " + " ".join(options)
        return Question("albumin", "Laboratory", "feature", text, options, answer=index % len(options), majority=0)

    def draw(self, patient_indices: np.ndarray, rng: np.random.Generator) -> list[Question]:
        return [self.question(int(index)) for index in patient_indices]


def configured(reasoning: int = TOKENS, strategy: str = "ffa", speed: dict | None = None, **grpo) -> RunConfig:
    settings = {"group_size": GROUP, "local_steps": 2, "patients_per_step": PATIENTS, "temperature": TEMPERATURE}
    return RunConfig.model_validate(
        {
            "name": "test",
            "privacy": {"enabled": False},
            "lora": {"strategy": strategy, "rank": 4},
            "questions": {"reasoning_tokens": reasoning},
            "grpo": {**settings, **grpo},
            "speed": speed or {},
        }
    )


def model(path: Path, strategy: str = "ffa", moved: float = 0.05, dtype: str = "float32") -> LanguageModel:
    """The tiny model; B is not zero, so that the adapter is in the computation."""
    lora = LoraConfig(strategy=strategy, rank=4)
    found = load(ModelConfig(id=str(path), device="cpu", dtype=dtype), lora, seed=0)
    move(found, moved, seed=3)
    return found


def move(lm: LanguageModel, size: float, seed: int) -> None:
    step = np.random.default_rng(seed).standard_normal(lm.manifest.size).astype(np.float32) * np.float32(size)
    lm.set_vector(lm.vector() + step)


def gradients(lm: LanguageModel) -> np.ndarray:
    return np.concatenate([p.grad.detach().numpy().ravel() for p in lm.trainable().values()])


def close(ours: np.ndarray, other: np.ndarray, tolerance: float = 1e-4) -> bool:
    return bool(np.abs(ours - other).max() <= tolerance * np.abs(other).max())


class GivenCompletions(Engine):
    """The engine with completions that a test chose in place of its rollout."""

    given: list[Completion]

    def _complete(self, asked):
        self._known = None
        return self.given


def unforced(vocabulary: int) -> list[Completion]:
    """Completions of 1 to TOKENS tokens that all answered by themselves; groups 0 and 3 have no reward variance."""
    rng, result = np.random.default_rng(0), []
    for row in range(PATIENTS * GROUP):
        completion = Completion(generated=1 + row % TOKENS, boxed=True)
        for token in rng.integers(5, vocabulary, completion.generated).tolist():
            completion.add(token, 0.0)
        truth = Source().question(row // GROUP).answer
        completion.answer = truth if row % GROUP < (row // GROUP) % GROUP else None
        result.append(completion)
    return result


def stock(lm: LanguageModel, config: RunConfig, completions: list[Completion], folder: Path) -> GRPOTrainer:
    """Stock trl's trainer, whose rollouts are the given completions."""
    prompts = [encode(lm, TEMPLATE, Source().question(row // GROUP), True) for row in range(len(completions))]
    rewards = [float(c.answer is not None) for c in completions]

    def given(_, trainer):
        ids = [c.ids for c in completions]
        return {"prompt_ids": prompts, "completion_ids": ids, "logprobs": None}

    arguments = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=len(completions),
        num_generations=GROUP,
        max_completion_length=TOKENS + 1,
        temperature=TEMPERATURE,
        loss_type=config.grpo.loss_type,
        scale_rewards=config.grpo.scale_rewards,
        beta=config.grpo.beta,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
    )
    trainer = GRPOTrainer(
        model=lm.model,
        args=arguments,
        reward_funcs=[lambda prompts, **_: rewards],
        rollout_func=given,
        train_dataset=Dataset.from_dict({"prompt": [""]}),
        processing_class=lm.tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    lm.model.train()
    return trainer


def our_loss(engine: Engine, lm: LanguageModel, one_by_one: bool = False) -> float:
    """The engine's step on all patients, without the optimizer: its loss, with gradients left in place."""
    lm.model.train()
    for parameter in engine.trained:
        parameter.grad = torch.zeros_like(parameter)
    total = 0.0
    for loss in engine.losses([Source().question(index) for index in range(PATIENTS)], one_by_one=one_by_one):
        loss.backward()
        total += float(loss.detach())
    return total


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("scale_rewards", ["group", "none"])
@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo", "bnpo", "dapo"])
def test_loss_and_gradients_equal_stock_trl(tiny_model_path, tmp_path, loss_type, scale_rewards, beta):
    config = configured(loss_type=loss_type, scale_rewards=scale_rewards, beta=beta)
    mine, theirs = model(tiny_model_path), model(tiny_model_path)
    completions = unforced(len(mine.tokenizer))
    engine = GivenCompletions(mine, Source(), TEMPLATE, config, seed=0)
    engine.given = completions
    trainer = stock(theirs, config, completions, tmp_path)
    for lm in (mine, theirs):
        move(lm, 0.05, seed=4)  # away from the reference, as after a few steps of a round
    batch = trainer._generate_and_score_completions([{"prompt": ""} for _ in completions])
    expected = trainer._compute_loss(theirs.model, batch)
    expected.backward()
    loss = our_loss(engine, mine)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-6)
    assert np.abs(gradients(theirs)).max() > 0
    assert close(gradients(mine), gradients(theirs))


@pytest.mark.parametrize("strategy", ["fedit", "full"])
def test_gradients_equal_stock_trl_whatever_is_trained(tiny_model_path, tmp_path, strategy):
    config = configured(strategy=strategy)
    mine, theirs = model(tiny_model_path, strategy), model(tiny_model_path, strategy)
    engine = GivenCompletions(mine, Source(), TEMPLATE, config, seed=0)
    engine.given = unforced(len(mine.tokenizer))
    trainer = stock(theirs, config, engine.given, tmp_path)
    batch = trainer._generate_and_score_completions([{"prompt": ""} for _ in engine.given])
    trainer._compute_loss(theirs.model, batch).backward()
    our_loss(engine, mine)
    assert close(gradients(mine), gradients(theirs))


@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo", "bnpo", "dapo"])
@pytest.mark.parametrize(
    ("reasoning", "settings"), [(0, {}), (0, {"expectation": "exact"}), (TOKENS, {}), (TOKENS, {"beta": 0.1})]
)
def test_parts_of_a_step_add_up_whatever_their_size(tiny_model_path, loss_type, reasoning, settings):
    found = []
    for tokens, one_by_one in [(10_000, False), (1, False), (10_000, True)]:
        lm = model(tiny_model_path)
        config = configured(reasoning, loss_type=loss_type, speed={"tokens_per_backward": tokens}, **settings)
        our_loss(Engine(lm, Source(), TEMPLATE, config, seed=0), lm, one_by_one)
        found.append(gradients(lm))
    assert np.abs(found[0]).max() > 0
    assert close(found[1], found[0]) and close(found[2], found[0])


@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo"])
def test_a_patients_share_does_not_depend_on_who_else_was_drawn(tiny_model_path, loss_type):
    lm = model(tiny_model_path)
    engine = GivenCompletions(lm, Source(), TEMPLATE, configured(loss_type=loss_type), seed=0)
    completions = unforced(len(lm.tokenizer))
    shares = []
    for drawn in ([2], [1, 2], [1]):
        for parameter in engine.trained:
            parameter.grad = torch.zeros_like(parameter)
        engine.given = [c for index in drawn for c in completions[index * GROUP : (index + 1) * GROUP]]
        for loss in engine.losses([Source().question(index) for index in drawn]):
            loss.backward()
        shares.append(gradients(lm))
    assert close(shares[0] + shares[2], shares[1])


def option_probabilities(lm: LanguageModel, engine: Engine, question: Question) -> torch.Tensor:
    ids = torch.tensor([encode(lm, TEMPLATE, question, False)])
    logits = lm.model(input_ids=ids).logits[0, -1, engine.answering.letters[: len(question.options)]]
    return torch.softmax(logits / TEMPERATURE, 0)


@pytest.mark.parametrize("scale_rewards", ["group", "none"])
def test_exact_gradient_equals_the_enumerated_expectation(tiny_model_path, scale_rewards):
    lm = model(tiny_model_path)
    engine = Engine(lm, Source(), TEMPLATE, configured(0, expectation="exact", scale_rewards=scale_rewards), seed=0)
    our_loss(engine, lm)
    ours = gradients(lm)
    lm.model.zero_grad(set_to_none=True)
    for index in range(PATIENTS):
        question = Source().question(index)
        p = option_probabilities(lm, engine, question)
        right = float(p[question.answer].detach())
        spread = math.sqrt(right * (1 - right)) + 1e-4 if scale_rewards == "group" else 1.0
        for option in range(len(question.options)):
            advantage = (float(option == question.answer) - right) / spread
            loss = -float(p[option].detach()) * advantage * torch.log(p[option]) / PATIENTS
            loss.backward(retain_graph=True)
    assert close(ours, gradients(lm))


def test_sampled_answers_have_the_exact_gradient_on_average(tiny_model_path):
    lm = model(tiny_model_path)
    our_loss(Engine(lm, Source(), TEMPLATE, configured(0, expectation="exact", scale_rewards="none"), seed=0), lm)
    exact = gradients(lm)
    our_loss(Engine(lm, Source(), TEMPLATE, configured(0, scale_rewards="none", group_size=64), seed=0), lm)
    small = np.linalg.norm(gradients(lm) - exact)
    wide = configured(0, scale_rewards="none").model_copy()
    wide = wide.model_copy(update={"grpo": wide.grpo.model_copy(update={"group_size": 6400})})
    our_loss(Engine(lm, Source(), TEMPLATE, wide, seed=0), lm)
    assert np.linalg.norm(gradients(lm) - exact) < small / 3
    assert np.linalg.norm(gradients(lm) - exact) < 0.1 * np.linalg.norm(exact)


def test_exact_loss_is_zero_with_the_gradient_of_the_truths_probability():
    logits = torch.tensor([[0.3, -0.2, 0.9]], requires_grad=True)
    log_probs = torch.log_softmax(logits, 1)
    loss = exact_loss(log_probs, torch.tensor([2]), "none")
    assert float(loss.detach()) == pytest.approx(0, abs=1e-7)
    (ours,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(-log_probs.exp()[0, 2], logits)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("scale_rewards", ["none", "group"])
def test_the_entropy_bonus_adds_torchs_entropy_of_the_own_options(scale_rewards: str):
    logits = torch.tensor([[0.3, -0.2, 0.9, 4.0], [1.0, 2.0, -1.0, 0.5]], requires_grad=True)
    own = torch.tensor([3, 4])
    truth = torch.tensor([2, 1])

    def loss(bonus: float) -> torch.Tensor:
        masked = logits.masked_fill(torch.arange(4) >= own[:, None], -torch.inf)
        return exact_loss(torch.log_softmax(masked, 1), truth, scale_rewards, bonus)

    entropy = torch.stack(
        [torch.distributions.Categorical(logits=row[:n]).entropy() for row, n in zip(logits, own, strict=True)]
    )
    torch.testing.assert_close(loss(0.7), loss(0.0) - 0.7 * entropy)
    (with_bonus,) = torch.autograd.grad(loss(0.7).sum(), logits)
    (expected,) = torch.autograd.grad((loss(0.0) - 0.7 * entropy).sum(), logits)
    torch.testing.assert_close(with_bonus, expected)
    assert with_bonus.isfinite().all() and with_bonus[0, 3] == 0


def best_policy(loss_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Probabilities over three options that minimise a loss of their logarithms."""
    logits = torch.tensor([2.0, -3.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=0.3)
    for _ in range(6000):
        optimizer.zero_grad()
        loss_of(torch.log_softmax(logits, 0)).backward()
        optimizer.step()
    return torch.softmax(logits, 0).detach()


def test_the_best_policy_under_the_entropy_bonus_is_unsure_and_has_the_order_of_what_is_probable():
    probable, bonus = torch.tensor([0.55, 0.3, 0.15], dtype=torch.float64), 0.4

    def ours(scale_rewards: str) -> torch.Tensor:
        def loss(log_probs: torch.Tensor) -> torch.Tensor:
            each = exact_loss(log_probs.expand(3, 3), torch.arange(3), scale_rewards, bonus)
            return (probable * each).sum()

        return best_policy(loss)

    def angle(log_probs: torch.Tensor) -> torch.Tensor:
        p = log_probs.exp()
        return -(probable * 2 * p.sqrt().asin()).sum() + bonus * (p * log_probs).sum()

    torch.testing.assert_close(ours("none"), torch.softmax(probable / bonus, 0))
    grouped = ours("group")
    torch.testing.assert_close(grouped, best_policy(angle), rtol=0, atol=1e-3)  # ADVANTAGE_EPSILON is in ours
    assert 0.9 > grouped[0] > grouped[1] > grouped[2] > 0.01


@pytest.mark.parametrize("scale_rewards", ["none", "group"])
def test_under_the_entropy_bonus_a_policy_that_knows_nothing_stays_even(scale_rewards: str):
    def loss(log_probs: torch.Tensor) -> torch.Tensor:
        return exact_loss(log_probs.expand(3, 3), torch.arange(3), scale_rewards, 0.3).mean()

    torch.testing.assert_close(best_policy(loss), torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=1e-3)


def test_poisson_draws_have_binomial_counts_and_every_patient_the_same_rate():
    draws = Draws(Source(50), 5.0, 4000, np.random.default_rng(0))
    drawn = np.zeros((4000, 50))
    draws.source = type("Seen", (), {"n_patients": 50, "draw": lambda self, indices, rng: list(indices)})()
    for step, indices in enumerate(draws):
        drawn[step, indices] = 1
    counts = drawn.sum(1)
    assert counts.mean() == pytest.approx(5.0, abs=4 * math.sqrt(4.5 / 4000))
    assert counts.var() == pytest.approx(4.5, rel=0.12)  # a fixed-size or truncated draw would have less
    assert np.abs(drawn.mean(0) - 0.1).max() < 5 * math.sqrt(0.09 / 4000)
    assert draws.expected_patients == 5.0


def test_more_patients_a_step_than_there_are_draws_all_of_them():
    draws = Draws(Source(3), 8.0, 2, np.random.default_rng(0))
    assert [len(questions) for questions in draws] == [3, 3]
    assert draws.expected_patients == 3.0


class Scripted:
    """Draws that a test wrote down."""

    expected_patients = float(PATIENTS)

    def __init__(self, steps: list[list[Question]]) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self):
        return iter(self.steps)


def test_an_empty_draw_steps_the_optimizer_with_a_zero_gradient(tiny_model_path):
    lm = model(tiny_model_path)
    start = lm.vector()
    config = configured(0, expectation="exact", local_steps=3, learning_rate=0.01)
    engine = Engine(lm, Source(), TEMPLATE, config, seed=0)
    everyone = [Source().question(index) for index in range(PATIENTS)]
    our_loss(engine, lm)
    first_gradient = torch.tensor(gradients(lm))
    engine.draws = Scripted([everyone, [], []])
    engine.train()
    assert (engine.counts.questions, engine.counts.empty_draws, engine.state.global_step) == (PATIENTS, 2, 3)
    reference = torch.nn.Parameter(torch.tensor(start))
    optimizer = torch.optim.AdamW([reference], lr=0.01, weight_decay=0.0)
    for gradient in (first_gradient, torch.zeros_like(first_gradient), torch.zeros_like(first_gradient)):
        reference.grad = gradient
        optimizer.step()
    np.testing.assert_allclose(lm.vector(), reference.detach().numpy(), rtol=0, atol=1e-5)


def test_draws_that_are_all_empty_leave_the_adapter_as_it_was(tiny_model_path):
    lm = model(tiny_model_path)
    start = lm.vector()
    result = train_local_round(lm, Source(), TEMPLATE, configured(0, patients_per_step=1e-9), seed=0)
    assert (result.questions, result.empty_draws, result.steps) == (0, 2, 2)
    assert result.reward_sum == 0 and not result.reward_histogram.any()
    assert np.array_equal(result.vector, start)
    assert train_local_round(lm, Source(0), TEMPLATE, configured(0), seed=0).empty_draws == 2


@pytest.mark.parametrize(
    "config",
    [configured(), configured(0), configured(0, expectation="exact"), configured(beta=0.1), configured(0, beta=0.1)],
    ids=["sampled", "answer-only", "exact", "sampled-beta", "answer-only-beta"],
)
def test_same_seed_gives_the_same_bits_and_another_seed_does_not(tiny_model_path, config):
    config = config.model_copy(update={"grpo": config.grpo.model_copy(update={"patients_per_step": 2.0})})
    found = []
    for seed in (1, 1, 2):
        lm = model(tiny_model_path)
        found.append(train_local_round(lm, Source(), TEMPLATE, config, seed=seed))
    assert np.array_equal(found[0].vector, found[1].vector)
    assert found[0].reward_sum == found[1].reward_sum
    assert not np.array_equal(found[0].vector, found[2].vector)


@pytest.mark.parametrize("strategy", ["ffa", "fedit", "full"])
def test_a_round_moves_what_the_strategy_trains_and_nothing_else(tiny_model_path, strategy):
    lm = model(tiny_model_path, strategy, moved=0.0 if strategy == "full" else 0.05)
    before = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
    names = {id(p) for p in lm.trainable().values()}
    result = train_local_round(lm, Source(), TEMPLATE, configured(strategy=strategy), seed=0)
    moved = {name for name, p in lm.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in lm.model.named_parameters() if id(p) in names}
    assert np.array_equal(result.vector, lm.vector())
    if strategy == "ffa":
        assert moved and all("lora_B" in name for name in moved)


def test_counts_of_a_round_are_consistent(tiny_model_path):
    steps = []
    config = configured(local_steps=3, patients_per_step=3.0)
    result = train_local_round(
        model(tiny_model_path), Source(), TEMPLATE, config, seed=5, on_step=lambda *step: steps.append(step)
    )
    assert [step[:2] for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert result.completions == result.questions * GROUP == result.reward_histogram.sum() * GROUP
    assert result.reward_sum == result.reward_histogram @ np.arange(GROUP + 1)
    assert 0 < result.completion_tokens <= result.completions * TOKENS
    assert sum(result.phase_seconds.values()) == pytest.approx(result.seconds)


def test_a_bfloat16_base_trains(tiny_model_path):
    lm = model(tiny_model_path, dtype="bfloat16")
    start = lm.vector()
    result = train_local_round(lm, Source(), TEMPLATE, configured(), seed=0)
    assert result.vector.dtype == np.float32 and not np.array_equal(result.vector, start)


def test_fifty_rounds_need_no_network_write_nothing_and_leave_the_model_as_it_was(
    tiny_model_path, tmp_path, monkeypatch, capfd
):
    def refuse(*_):
        raise AssertionError("a local round tried to reach the network")

    lm = model(tiny_model_path)
    base = lm.model.get_base_model()
    names = [name for name, _ in lm.model.named_parameters()]
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    for round_index in range(50):
        config = configured(0, expectation="exact", local_steps=1)
        train_local_round(lm, Source(), TEMPLATE, config, seed=round_index)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert "forward" not in vars(base) and not lm.model.training
    assert [name for name, _ in lm.model.named_parameters()] == names
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_step_weights_are_constants_for_separable_losses_and_add_up_for_coupled_ones():
    for loss_type in ("dr_grpo", "grpo"):
        assert StepScale(loss_type, 8.0, 5, 50).weight(2, 13) == StepScale(loss_type, 8.0, 9, 99).weight(2, 77) == 0.25
    scale = StepScale("bnpo", 8.0, 4, 40)
    assert scale.weight(1, 10) + scale.weight(3, 30) == pytest.approx(4 / 8)
    assert StepScale("dapo", 8.0, 4, 40).weight(1, 10) == 4 / 8


def test_parts_keep_to_the_budget_and_lose_nobody():
    costs = np.random.default_rng(0).integers(1, 300, 60).tolist()
    parts = list(parts_by_tokens(costs, 500))
    assert sorted(index for part in parts for index in part) == list(range(60))
    assert all(len(part) == 1 or len(part) * max(costs[i] for i in part) <= 500 for part in parts)
    assert [len(part) for part in parts_by_tokens(costs, 500, one_by_one=True)] == [1] * 60


def test_the_learning_rate_falls_over_the_rounds(tiny_model_path):
    moved = []
    for round_index in (1, 3):
        lm = model(tiny_model_path)
        config = configured(0, expectation="exact", local_steps=1, final_rate_share=0.25)
        config = config.model_copy(update={"federation": config.federation.model_copy(update={"rounds": 3})})
        before = lm.vector()
        train_local_round(lm, Source(), TEMPLATE, config, seed=0, round_index=round_index)
        moved.append(np.abs(lm.vector() - before).max())
    assert moved[0] == pytest.approx(2e-4, rel=1e-2)  # Adam's first step is the rate
    assert moved[1] == pytest.approx(0.25 * moved[0], rel=1e-2)
