"""common/lm/scoring.py: prompts as tokens, log-probabilities of options."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import normalizers
from wardround.common.config import LoraConfig, ModelConfig
from wardround.common.errors import ModelError
from wardround.common.lm import scoring
from wardround.common.lm.models import LanguageModel, load
from wardround.common.lm.scoring import (
    encode,
    log_probs_after,
    option_log_probs,
    option_token_ids,
    render,
    whole_text_log_probs,
)
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


def moved(path: Path, dtype: str = "float32") -> LanguageModel:
    """The tiny model with an adapter that is in the computation."""
    config = ModelConfig.model_validate({"id": str(path), "device": "cpu", "dtype": dtype})
    made = load(config, LoraConfig(rank=4), seed=1)
    rng = np.random.default_rng(0)
    made.set_vector((rng.normal(size=made.manifest.size) * 0.1).astype(np.float32))
    return made


@pytest.fixture(scope="module")
def lm(tiny_model_path: Path) -> LanguageModel:
    return moved(tiny_model_path)


# Characters that take the place of others before text becomes tokens. "q" begins no longer token, "~" stands for one
# token of brace and letter: the prompt's own last token, "{", is not in the text with that letter.
SPELLINGS = {
    "two tokens": {"A": "qx", "B": "qy", "D": "wvw"},
    "all begin alike": {letter: f"q{letter.lower()}" for letter in LETTERS},
    "one melts into the brace": {"{C": "~"},
    "all melt into the brace": {"{" + letter: "~" + letter.lower() for letter in LETTERS},
    "both": {"{A": "~", "B": "qy", "E": "qx"},
}


def spell(lm: LanguageModel, spelling: dict[str, str]) -> LanguageModel:
    """The model, whose tokenizer now reads letters so."""
    replaced = [normalizers.Replace(letter, written) for letter, written in spelling.items()]
    lm.tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(replaced)
    return lm


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


@pytest.mark.parametrize("micro_batch", [1, 4, 64])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_letters_of_several_tokens_are_scored_as_whole_texts(
    tiny_model_path: Path, spelling: str, micro_batch: int
) -> None:
    """Against the probability of every token of prompt + letter, each text a forward pass of its own in float64."""
    lm = spell(moved(tiny_model_path), SPELLINGS[spelling])
    exact = copy.deepcopy(lm.model).double()
    asked = questions(11)
    with pytest.raises(ModelError, match="is not one token"):
        option_token_ids(lm.tokenizer, render(lm, TEMPLATE, asked[0], False), 5)
    done: list[int] = []
    scores = option_log_probs(lm, asked, TEMPLATE, micro_batch, on_done=done.append)
    assert scores.dtype == np.float32
    assert scores.shape == (11, 5)
    assert sum(done) == 11
    for question, row in zip(asked, scores, strict=True):
        n, text = len(question.options), render(lm, TEMPLATE, question, False)
        expected = torch.zeros(n, dtype=torch.float64)
        for option, letter in enumerate(LETTERS[:n]):
            ids = torch.tensor(lm.tokenizer(text + letter, add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                log_probs = torch.log_softmax(exact(input_ids=ids[None]).logits[0, :-1], 1)
            expected[option] = log_probs.gather(1, ids[1:, None]).sum()
        np.testing.assert_allclose(row[:n], torch.log_softmax(expected, 0), atol=1e-5)
        assert np.all(row[n:] == -np.inf)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_whole_texts_and_single_tokens_give_the_same_scores(
    tiny_model_path: Path, dtype: str, tolerance: float
) -> None:
    lm, asked = moved(tiny_model_path, dtype), questions(13)
    texts = [render(lm, TEMPLATE, question, False) for question in asked]
    general = whole_text_log_probs(lm, texts, [len(question.options) for question in asked], 4)
    np.testing.assert_allclose(general, option_log_probs(lm, asked, TEMPLATE, 4), atol=tolerance)


def test_without_the_tree_whole_texts_have_the_same_scores(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: padded on the right, every context a row of its own."""
    lm, asked = spell(moved(tiny_model_path), SPELLINGS["both"]), questions(7)
    tree = option_log_probs(lm, asked, TEMPLATE, 4)

    def padded(lm: LanguageModel, batch: list[list[int]]) -> torch.Tensor:
        ends = torch.tensor([len(ids) - 1 for ids in batch])
        return scoring.hidden_states(lm, batch)[torch.arange(len(batch)), ends]

    monkeypatch.setattr(scoring, "_last_states", padded)
    np.testing.assert_allclose(option_log_probs(lm, asked, TEMPLATE, 4), tree, atol=1e-5)


def test_letters_of_one_token_never_take_the_slow_way(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "whole_text_log_probs", None)
    option_log_probs(lm, questions(3), TEMPLATE, 4)


@pytest.mark.parametrize("spelling", [{"A": "q", "B": "q"}, {"A": "q", "B": "qy"}, {"B": ""}])
def test_letters_that_no_token_tells_apart_are_refused(tiny_model_path: Path, spelling: dict[str, str]) -> None:
    lm = spell(moved(tiny_model_path), spelling)
    with pytest.raises(ModelError, match="one option letter begin those of another after") as refused:
        option_log_probs(lm, questions(3), TEMPLATE, 4)
    assert "\n" not in str(refused.value)


def test_a_chat_template_that_refuses_a_system_turn_is_named(lm: LanguageModel) -> None:
    kept = lm.tokenizer.chat_template
    lm.tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    try:
        with pytest.raises(ModelError, match="no system role"):
            render(lm, TEMPLATE, questions(1)[0], False)
    finally:
        lm.tokenizer.chat_template = kept
