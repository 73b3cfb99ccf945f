"""common/lm/scoring.py: prompts as tokens, log-probabilities of options."""

from pathlib import Path

import numpy as np
import pytest
import torch
from wardround.common.config import LoraConfig, ModelConfig
from wardround.common.errors import ModelError
from wardround.common.lm.models import LanguageModel, load
from wardround.common.lm.scoring import encode, log_probs_after, option_log_probs, option_token_ids, render
from wardround.common.question import LETTERS, Question, load_prompt

from ...tiny import tiny_tokenizer

TEMPLATE = load_prompt("en_short")


def questions(count: int, seed: int = 0) -> list[Question]:
    """Questions with records of 1 to 8 lines and 2 to 5 options."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        record = "; ".join(f"Sodium {rng.integers(120, 160)} mmol/L" for _ in range(rng.integers(1, 9)))
        options = tuple(str(100 + value) for value in rng.permutation(60)[: rng.integers(2, 6)])
        shown = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
        text = f"{record}.\nWhat is the patient's Heart rate?\n{shown}"
        made.append(Question("hr", "Vital signs", "feature", text, options, int(rng.integers(len(options))), 0))
    return made


@pytest.fixture(scope="module")
def lm(tiny_model_path: Path) -> LanguageModel:
    made = load(ModelConfig(id=str(tiny_model_path), device="cpu"), LoraConfig(rank=4), seed=1)
    rng = np.random.default_rng(0)
    made.set_vector((rng.normal(size=made.manifest.size) * 0.1).astype(np.float32))
    return made


@pytest.mark.parametrize("micro_batch", [1, 3, 16])
def test_batches_give_what_single_full_forwards_give(lm: LanguageModel, micro_batch: int) -> None:
    asked = questions(13)
    scores = option_log_probs(lm, asked, TEMPLATE, micro_batch)
    assert scores.dtype == np.float32
    assert scores.shape == (13, max(len(question.options) for question in asked))
    for question, row in zip(asked, scores, strict=True):
        ids = torch.tensor([encode(lm, TEMPLATE, question, reasoning=False)])
        n = len(question.options)
        letters = option_token_ids(lm.tokenizer, render(lm, TEMPLATE, question, False), n)
        with torch.no_grad():
            expected = torch.log_softmax(lm.model(input_ids=ids).logits[0, -1, letters], 0).numpy()
        assert np.abs(row[:n] - expected).max() <= 1e-4
        assert np.all(row[n:] == -np.inf)


@pytest.mark.parametrize("alike", ["nothing", "beginning", "one holds another", "all"])
def test_a_beginning_that_prompts_share_changes_no_score(lm: LanguageModel, alike: str) -> None:
    rng = np.random.default_rng(3)
    first = [int(token) for token in rng.integers(5, 200, 14)]
    prompts = [
        {
            "nothing": [10 + row, *rng.integers(5, 200, 4 + row)],
            "beginning": [*first, 10 + row, *rng.integers(5, 200, row)],
            "one holds another": [*first, *first][: 14 + row],
            "all": first,
        }[alike]
        for row in range(9)
    ]
    prompts = [list(map(int, ids)) for ids in prompts]
    text = render(lm, TEMPLATE, questions(1)[0], reasoning=False)
    together = log_probs_after(lm, prompts, [5] * 9, text, micro_batch=4)
    alone = [log_probs_after(lm, [ids], [5], text, micro_batch=1)[0] for ids in prompts]  # too few to share anything
    np.testing.assert_allclose(together, alone, atol=2e-5)


def test_scores_differ_between_questions_and_from_the_base_model(lm: LanguageModel) -> None:
    asked = questions(4)
    scores = option_log_probs(lm, asked, TEMPLATE, 2)
    with lm.base_only():
        base = option_log_probs(lm, asked, TEMPLATE, 2)
    assert len(np.unique(scores[:, 0])) == 4
    assert not np.allclose(scores[:, 0], base[:, 0], atol=1e-3)


def test_a_prompt_holds_system_user_and_the_beginning_of_the_answer(lm: LanguageModel) -> None:
    [question] = questions(1)
    text = lm.tokenizer.decode(encode(lm, TEMPLATE, question, reasoning=False))
    assert text.startswith(
        f"<|im_start|>system\n{TEMPLATE.system}<|im_end|>\n<|im_start|>user\n{question.text}<|im_end|>"
    )
    assert text.endswith(f"<|im_start|>assistant\n{TEMPLATE.forced}")
    reasoning = lm.tokenizer.decode(encode(lm, TEMPLATE, question, reasoning=True))
    assert reasoning.endswith(f"<|im_start|>assistant\n{TEMPLATE.cue}")


def test_bfloat16_scoring_is_close_to_float32(lm: LanguageModel, tiny_model_path: Path) -> None:
    half = load(ModelConfig(id=str(tiny_model_path), device="cpu", dtype="bfloat16"), LoraConfig(rank=4), seed=1)
    half.set_vector(lm.vector(False), trainable_only=False)
    asked = questions(6)
    exact, rough = option_log_probs(lm, asked, TEMPLATE, 4), option_log_probs(half, asked, TEMPLATE, 4)
    known = np.isfinite(exact)
    assert 0 < np.abs(exact[known] - rough[known]).max() < 0.5


def test_no_questions_give_an_empty_result(lm: LanguageModel) -> None:
    assert option_log_probs(lm, [], TEMPLATE, 4).shape == (0, 0)


def test_progress_counts_every_question_once(lm: LanguageModel) -> None:
    done: list[int] = []
    option_log_probs(lm, questions(7), TEMPLATE, 3, on_done=done.append)
    assert done == [3, 3, 1]


def test_letters_are_looked_up_in_context() -> None:
    tokenizer = tiny_tokenizer()
    ids = option_token_ids(tokenizer, "The answer is \\boxed{", 10)
    assert [tokenizer.decode([token]) for token in ids] == list(LETTERS)


def test_a_letter_that_melts_into_its_context_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["{C"])  # a token that spans the brace and the letter
    option_token_ids(tokenizer, "\\boxed{", 2)
    with pytest.raises(ModelError, match="'C' is not one token"):
        option_token_ids(tokenizer, "\\boxed{", 3)


def test_a_chat_template_that_refuses_a_system_turn_is_named(lm: LanguageModel) -> None:
    kept = lm.tokenizer.chat_template
    lm.tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    try:
        with pytest.raises(ModelError, match="no system role"):
            render(lm, TEMPLATE, questions(1)[0], False)
    finally:
        lm.tokenizer.chat_template = kept
