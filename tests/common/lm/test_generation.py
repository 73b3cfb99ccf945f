"""Shared-prefix attention against plain forward passes; rollouts, ends, boxes, forced answers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from wardround.common.config import LoraConfig, ModelConfig
from wardround.common.errors import ModelError
from wardround.common.lm import prefix as prefix_module
from wardround.common.lm.generation import Answering, Completion, completion_log_probs, draw, rollout
from wardround.common.lm.models import LanguageModel, load
from wardround.common.lm.prefix import SharedPrefix, token_log_probs
from wardround.common.question import load_prompt

PROMPTS = [list(range(10, 40)), list(range(50, 61)), [7, 8, 9, 10, 11]]
N_OPTIONS = [5, 2, 3]
GROUP = 4


@pytest.fixture(scope="module")
def lm(tiny_model_path: Path) -> LanguageModel:
    found = load(ModelConfig(id=str(tiny_model_path), device="cpu"), LoraConfig(), seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in found.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return found


@pytest.fixture(scope="module")
def answering(lm: LanguageModel) -> Answering:
    return Answering(lm, load_prompt("en"))


def sampled(lm: LanguageModel, answering: Answering, seed: int = 1, **settings) -> list[Completion]:
    chosen = {"group_size": GROUP, "max_tokens": 9, "temperature": 0.9, **settings}
    generator = torch.Generator().manual_seed(seed)
    shape = len(PROMPTS) * chosen["group_size"], chosen["max_tokens"] + 1
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return rollout(lm, answering, PROMPTS, N_OPTIONS, uniform=uniform, **chosen)


def naive(
    lm: LanguageModel, answering: Answering, row: int, completion: Completion, temperature: float
) -> torch.Tensor:
    """Log-probabilities of one completion by a whole forward pass of its own."""
    prompt, n_options = PROMPTS[row // GROUP], N_OPTIONS[row // GROUP]
    logits = lm.model(input_ids=torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1] / temperature
    log_probs = torch.log_softmax(logits, 1)
    result = []
    for i, target in enumerate(completion.targets):
        if completion.forced and i == len(completion.ids) - 1:
            result.append(torch.log_softmax(logits[i, answering.letters[:n_options]], 0)[completion.answer])
        else:
            result.append(log_probs[i, target] * completion.in_loss[i])
    return torch.stack(result)


@pytest.mark.parametrize("attention", ["grouped", "expanded"])
def test_shared_prefix_log_probs_and_gradients_equal_plain_forward_passes(lm, answering, attention, monkeypatch):
    completions = sampled(lm, answering)
    if attention == "expanded":
        monkeypatch.setattr(prefix_module, "_EAGER_BYTES", 0)
    weight = torch.Generator().manual_seed(2)
    ours = completion_log_probs(lm, answering, PROMPTS, completions, N_OPTIONS, 0.9)
    factors = torch.randn(ours.shape, generator=weight)
    trained = [p for p in lm.model.parameters() if p.requires_grad]
    ours_gradient = torch.autograd.grad((ours * factors).sum(), trained)
    plain = [naive(lm, answering, row, completion, 0.9) for row, completion in enumerate(completions)]
    loss = sum((one * factors[row, : len(one)]).sum() for row, one in enumerate(plain))
    plain_gradient = torch.autograd.grad(loss, trained)
    for row, one in enumerate(plain):
        torch.testing.assert_close(ours[row, : len(one)], one, rtol=0, atol=1e-5)
        assert not ours[row, len(one) :].any()
    scale = max(float(g.abs().max()) for g in plain_gradient)
    for mine, other in zip(ours_gradient, plain_gradient, strict=True):
        assert float((mine - other).abs().max()) <= 1e-5 * scale


def test_log_probs_of_a_rollout_are_those_that_training_computes(lm, answering):
    completions = sampled(lm, answering)
    with torch.no_grad():
        scored = completion_log_probs(lm, answering, PROMPTS, completions, N_OPTIONS, 0.9)
    for row, completion in enumerate(completions):
        assert scored[row, : len(completion.ids)].tolist() == pytest.approx(completion.log_probs, abs=1e-5)


def test_greedy_rollout_equals_generate(lm, answering):
    completions = rollout(lm, answering, PROMPTS, N_OPTIONS, group_size=1, max_tokens=12)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected = lm.model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        own = completion.targets[: completion.generated]
        assert own == expected[0, len(prompt) :].tolist()[: len(own)]


def test_what_a_completion_becomes_does_not_depend_on_what_is_decoded_beside_it(lm, answering):
    uniform = torch.rand((len(PROMPTS) * GROUP, 10), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    together = sampled(lm, answering)
    for p in range(len(PROMPTS)):
        rows = slice(p * GROUP, (p + 1) * GROUP)
        alone = rollout(
            lm,
            answering,
            PROMPTS[p : p + 1],
            N_OPTIONS[p : p + 1],
            group_size=GROUP,
            max_tokens=9,
            temperature=0.9,
            uniform=uniform[rows],
        )
        assert [c.ids for c in alone] == [c.ids for c in together[rows]]


def test_same_numbers_give_the_same_completions_and_others_give_others(lm, answering):
    assert sampled(lm, answering, 3) == sampled(lm, answering, 3)
    assert sampled(lm, answering, 3) != sampled(lm, answering, 4)


def test_sampled_tokens_follow_the_model_at_the_temperature(lm, answering):
    completions = sampled(lm, answering, group_size=3000, max_tokens=1, temperature=0.3)[:3000]
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.3
    expected = torch.softmax(logits, 0).double().numpy() * len(completions)
    counts = np.bincount([c.targets[0] for c in completions], minlength=len(expected))
    common = expected >= 5
    observed, expected = np.append(counts[common], counts[~common].sum()), np.append(expected[common], 0.0)
    expected[-1] = len(completions) - expected.sum()
    assert chisquare(observed, expected).pvalue > 1e-3


def test_forced_letters_are_options_drawn_from_the_restricted_softmax(lm, answering):
    group = 2000
    completions = sampled(lm, answering, group_size=group, max_tokens=0, temperature=0.5)
    for p, (prompt, n_options) in enumerate(zip(PROMPTS, N_OPTIONS, strict=True)):
        mine = completions[p * group : (p + 1) * group]
        assert all(c.forced and not c.boxed and c.ids[:-1] == answering.forced_ids for c in mine)
        assert all(c.in_loss == [False] * len(answering.forced_ids) + [True] for c in mine)
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([prompt + answering.forced_ids])).logits[0, -1]
        expected = torch.softmax(logits[answering.letters[:n_options]] / 0.5, 0).double().numpy()
        counts = np.bincount([c.answer for c in mine], minlength=n_options)
        assert len(counts) == n_options
        assert chisquare(counts, expected / expected.sum() * group).pvalue > 1e-3


def test_forced_text_takes_the_place_of_the_end_token_whose_choice_stays_in_the_loss(lm, answering):
    end = lm.tokenizer.eos_token_id
    others = [token for token in range(len(lm.tokenizer)) if token != end]
    for completion in sampled(lm, answering, suppress=others):
        assert completion.generated == 1
        assert completion.ids == [*answering.forced_ids, int(answering.letters[completion.answer])]
        assert completion.targets[0] == end and completion.targets[1:] == completion.ids[1:]
        assert completion.in_loss == [True, *[False] * (len(answering.forced_ids) - 1), True]


def test_completions_of_different_lengths_are_forced_after_their_own_last_token(lm, answering):
    completions = sampled(lm, answering, seed=8, group_size=40, max_tokens=40, temperature=2.0)
    ends = [c for c in completions if c.targets != c.ids]
    assert ends and len(ends) < len(completions)  # some ended early, some ran out
    for row in (completions.index(ends[0]), completions.index(ends[-1])):
        completion = completions[row]
        prompt, n_options = PROMPTS[row // 40], N_OPTIONS[row // 40]
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([prompt + completion.ids[:-1]])).logits[0, -1] / 2.0
        restricted = torch.log_softmax(logits[answering.letters[:n_options]], 0)
        assert float(restricted[completion.answer]) == pytest.approx(completion.log_probs[-1], abs=1e-5)


def test_a_completed_box_ends_a_completion_and_is_not_forced(lm, answering):
    class AfterThree(Answering):
        def completes_box(self, ids) -> bool:
            return len(ids) == 3

        def text(self, ids) -> str:
            return "so \\boxed{B}"

    stopped = AfterThree(lm, load_prompt("en"))
    for row, completion in enumerate(sampled(lm, stopped, suppress=[lm.tokenizer.eos_token_id])):
        assert completion.boxed and not completion.forced and completion.generated == 3
        assert completion.in_loss == [True] * 3 and completion.answer == 1, row


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("so \\boxed{B}", True),
        ("so \\boxed{\\text{B}}", True),
        ("so \\boxed{\\text{B}", False),
        ("in \\boxed{}", False),
        ("B}", False),
        ("in \\boxed{}. So \\boxed{C}", True),
    ],
)
def test_a_box_is_complete_when_it_is_closed_and_not_empty(lm, answering, text, complete):
    assert answering.completes_box(lm.tokenizer(text, add_special_tokens=False)["input_ids"]) is complete


def test_draw_never_takes_a_token_of_probability_zero():
    log_probs = torch.log(torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]))
    uniform = torch.tensor([[0.0, 0.25 - 1e-9, 0.25 + 1e-9, np.nextafter(1.0, 0.0)]], dtype=torch.float64)
    assert draw(log_probs, uniform).tolist() == [[1, 1, 3, 3]]


def test_draw_inverts_the_distribution_function_over_a_whole_vocabulary():
    generator = torch.Generator().manual_seed(3)
    log_probs = torch.log_softmax(6 * torch.randn(5, 1000, generator=generator), 1)
    log_probs[:, 100:600] = float("-inf")  # a whole block without mass
    uniform = torch.rand(5, 400, generator=generator, dtype=torch.float64)
    below = log_probs.double().exp().cumsum(1)
    expected = torch.searchsorted(below, uniform * below[:, -1:], right=True)
    drawn = draw(log_probs, uniform)
    assert (drawn != expected).sum() <= 1  # a number may lie between two roundings of one boundary
    assert log_probs.gather(1, drawn).isfinite().all()


def test_token_log_probs_have_the_gradient_of_log_softmax(lm):
    base = lm.model.get_base_model()
    hidden = torch.randn(700, base.config.hidden_size, generator=torch.Generator().manual_seed(1), requires_grad=True)
    targets = torch.arange(700) % base.config.vocab_size
    factors = torch.linspace(-1, 1, 700)
    plain = torch.log_softmax(base.get_output_embeddings()(hidden) / 0.7, 1).gather(1, targets[:, None]).squeeze(1)
    (expected,) = torch.autograd.grad((plain * factors).sum(), hidden)
    ours = token_log_probs(base, hidden, targets, 0.7)
    (gradient,) = torch.autograd.grad((ours * factors).sum(), hidden)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_and_attention_windows_are_refused(tiny_model_path, lm, monkeypatch):
    own = load(ModelConfig(id=str(tiny_model_path), device="cpu"), LoraConfig(), seed=0)
    own.model.get_base_model().gradient_checkpointing_enable()
    with pytest.raises(ModelError, match="gradient checkpointing"):
        SharedPrefix(own, PROMPTS, 1)
    monkeypatch.setattr(lm.model.get_base_model().config, "sliding_window", 16, raising=False)
    with pytest.raises(ModelError, match="attention windows"):
        SharedPrefix(lm, PROMPTS, 1)


def test_attention_setting_is_restored_after_use(lm, answering):
    before = lm.model.get_base_model().config._attn_implementation
    sampled(lm, answering)
    assert lm.model.get_base_model().config._attn_implementation == before
