"""client/evaluation.py and common/lm/answers.py: how a model answers held-out questions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from wardround.client.evaluation import evaluate_questions, sample_reasoning
from wardround.client.grpo import train_local_round
from wardround.common.config import LoraConfig, ModelConfig, RunConfig
from wardround.common.errors import ModelError
from wardround.common.lm.generation import has_answer_box
from wardround.common.lm.models import LanguageModel, load
from wardround.common.lm.scoring import encode, option_log_probs, option_token_ids
from wardround.common.question import load_prompt, parse_answer

from ..common.lm.test_scoring import SPELLINGS, questions, spell
from .test_grpo import Source, configured

TEMPLATE = load_prompt("en_short")


def config(reasoning_tokens: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "t",
            "privacy": {"enabled": False},
            "questions": {"reasoning_tokens": reasoning_tokens},
            "grpo": {"expectation": "sampled"},
            "speed": {"micro_batch": 3},
        }
    )


@pytest.fixture(scope="module")
def lm(tiny_model_path: Path) -> LanguageModel:
    return load(ModelConfig(id=str(tiny_model_path), device="cpu"), LoraConfig(rank=4), seed=1)


def test_answer_only_takes_the_most_probable_letter(lm: LanguageModel) -> None:
    asked = questions(8)
    outcomes = evaluate_questions(lm, asked, TEMPLATE, config(0))
    scores = option_log_probs(lm, asked, TEMPLATE, 8)
    assert np.array_equal(outcomes.chosen, scores.argmax(1))
    assert np.array_equal(outcomes.correct, outcomes.chosen == [question.answer for question in asked])
    assert outcomes.log_probs is not None
    assert np.allclose(np.exp(outcomes.log_probs).sum(1), 1, atol=1e-5)
    assert not outcomes.length.any()


def test_reasoning_is_plain_greedy_text_then_the_most_probable_letter(lm: LanguageModel) -> None:
    """Against a loop without cache, batch or padding."""
    asked = questions(5)
    outcomes = evaluate_questions(lm, asked, TEMPLATE, config(6))
    end = lm.tokenizer.eos_token_id
    for index, question in enumerate(asked):
        ids = encode(lm, TEMPLATE, question, reasoning=True)
        start, generated, boxed = len(ids), 0, False
        with torch.no_grad():
            while generated < 6 and not boxed:
                token = int(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
                generated += 1
                if token == end:
                    break
                ids.append(token)
                boxed = has_answer_box(lm.tokenizer.decode(ids[start:]))
            if boxed:
                chosen = parse_answer(lm.tokenizer.decode(ids[start:]), len(question.options))
            else:
                forced = "\n" + TEMPLATE.forced
                letters = option_token_ids(lm.tokenizer, forced, len(question.options))
                ids += lm.tokenizer(forced, add_special_tokens=False)["input_ids"]
                chosen = int(lm.model(input_ids=torch.tensor([ids])).logits[0, -1, letters].argmax())
        assert outcomes.chosen[index] == (-1 if chosen is None else chosen)
        assert outcomes.boxed[index] == boxed
        assert outcomes.length[index] == generated


@pytest.mark.parametrize("tokens", [0, 5])
def test_answers_do_not_depend_on_the_batch_or_the_order(lm: LanguageModel, tokens: int) -> None:
    asked = questions(7)
    together = evaluate_questions(lm, asked, TEMPLATE, config(tokens))
    turned = evaluate_questions(lm, asked[::-1], TEMPLATE, config(tokens))
    alone = [evaluate_questions(lm, [question], TEMPLATE, config(tokens)) for question in asked]
    assert np.array_equal(together.chosen, turned.chosen[::-1])
    assert np.array_equal(together.chosen, [outcome.chosen[0] for outcome in alone])
    assert np.array_equal(together.length, [outcome.length[0] for outcome in alone])


@pytest.mark.parametrize(("letter", "chosen"), [("B", 1), ("Z", -1)])
def test_a_box_of_the_models_own_counts_even_when_it_holds_no_option(
    lm: LanguageModel, letter: str, chosen: int
) -> None:
    script = lm.tokenizer(f"So \\boxed{{{letter}}}", add_special_tokens=False)["input_ids"]
    step = iter(script)

    def dictate(_module: torch.nn.Module, _inputs: object, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        logits[..., next(step)] += 1000
        return logits

    dictated = lm.model.get_output_embeddings().register_forward_hook(dictate)
    try:
        outcomes = evaluate_questions(lm, questions(3), TEMPLATE, config(len(script) + 5))
    finally:
        dictated.remove()
    assert outcomes.boxed.all()
    assert (outcomes.chosen == chosen).all()
    assert (outcomes.length == len(script)).all()
    if chosen < 0:
        assert not outcomes.correct.any()


def test_no_questions_give_empty_outcomes(lm: LanguageModel) -> None:
    for tokens in (0, 4):
        outcomes = evaluate_questions(lm, [], TEMPLATE, config(tokens))
        assert len(outcomes.correct) == len(outcomes.chosen) == len(outcomes.length) == 0


def test_samples_begin_with_the_cue_and_end_with_an_answer(lm: LanguageModel) -> None:
    texts = sample_reasoning(lm, questions(4), TEMPLATE, 5)
    assert all(text.startswith(TEMPLATE.cue) for text in texts)
    assert all(has_answer_box(text) for text in texts)


def test_the_base_model_is_scored_inside_base_only(tiny_model_path: Path) -> None:
    lm = load(ModelConfig(id=str(tiny_model_path), device="cpu"), LoraConfig(rank=4), seed=1)
    asked = questions(6)
    before = evaluate_questions(lm, asked, TEMPLATE, config(0)).log_probs
    lm.set_vector(lm.vector() + np.float32(0.1))
    after = evaluate_questions(lm, asked, TEMPLATE, config(0)).log_probs
    with lm.base_only():
        base = evaluate_questions(lm, asked, TEMPLATE, config(0)).log_probs
    assert before is not None
    assert after is not None
    assert np.array_equal(before, base)
    assert not np.array_equal(before, after)


@pytest.mark.parametrize("spelling", ["two tokens", "one melts into the brace"])
def test_letters_of_several_tokens_are_evaluated_without_reasoning_only(tiny_model_path: Path, spelling: str) -> None:
    lm = load(ModelConfig(id=str(tiny_model_path), device="cpu"), LoraConfig(rank=4), seed=1)
    spell(lm, SPELLINGS[spelling])
    asked = questions(6)
    outcomes = evaluate_questions(lm, asked, TEMPLATE, config(0))
    assert outcomes.log_probs is not None
    assert np.array_equal(outcomes.chosen, outcomes.log_probs.argmax(1))
    assert np.allclose(np.exp(outcomes.log_probs).sum(1), 1, atol=1e-5)
    with pytest.raises(ModelError, match="is not one token"):
        evaluate_questions(lm, asked, TEMPLATE, config(4))


@pytest.mark.parametrize("reasoning", [0, 4])
@pytest.mark.parametrize("spelling", ["two tokens", "one melts into the brace"])
def test_training_refuses_letters_of_several_tokens_in_one_line(
    tiny_model_path: Path, spelling: str, reasoning: int
) -> None:
    lm = load(ModelConfig(id=str(tiny_model_path), device="cpu"), LoraConfig(rank=4), seed=1)
    spell(lm, SPELLINGS[spelling])
    before = lm.vector()
    with pytest.raises(ModelError) as refused:
        train_local_round(lm, Source(), TEMPLATE, configured(reasoning), seed=0)
    letter = "A" if spelling == "two tokens" else "C"
    assert str(refused.value) == (
        f"tokenizer: letter '{letter}' is not one token of its own after '{TEMPLATE.forced}'; only evaluation without "
        "reasoning can score that: use another model"
    )
    assert np.array_equal(lm.vector(), before)
