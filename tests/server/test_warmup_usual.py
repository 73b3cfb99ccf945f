"""server/warmup_usual.py: questions that say what is usual, and how likely each of their options is."""

import re

import numpy as np
import pytest
from wardround.client.options import NARROWEST
from wardround.common.config import QuestionsConfig
from wardround.common.question import load_prompt
from wardround.server import warmup_usual
from wardround.server.warmup_questions import Stated, synthetic_questions
from wardround.server.warmup_usual import Law, draw_law
from wardround.server.warmup_words import Item

TEMPLATE = load_prompt("en_usual")


def made(count: int, seed: int, *, hinted: float = 1.0, n_options: int = 5) -> list[Stated]:
    return synthetic_questions(
        count,
        np.random.default_rng(seed),
        TEMPLATE,
        features_per_record=4,
        n_options=n_options,
        hinted_share=hinted,
    )


def kind(item: Stated) -> tuple[str, str]:
    """What is asked, and what tells."""
    what = "number" if "mostly" in item.question.text else "level"
    return what, "usual" if item.reason.startswith("Usually") else "another time"


@pytest.mark.parametrize("what", ["number", "level"])
@pytest.mark.parametrize("tells", ["usual", "another time"])
def test_the_options_are_right_as_often_as_their_shares_say(what: str, tells: str) -> None:
    """Calibration in ten bins: within four standard errors, and a twentieth for the ends of ladders."""
    items = [item for item in made(12_000, 1) if kind(item) == (what, tells)]
    shares = np.concatenate([item.shares for item in items])
    right = np.concatenate([np.arange(len(item.shares)) == item.question.answer for item in items])
    bins = np.minimum((shares * 10).astype(int), 9)
    for b in np.unique(bins):
        said, seen = shares[bins == b], right[bins == b]
        if len(said) >= 100:
            error = np.sqrt((said * (1 - said)).sum()) / len(said)
            assert abs(said.mean() - seen.mean()) < 4 * error + 0.05, (b, said.mean(), seen.mean(), len(said))


def test_shares_are_those_of_the_options_and_sum_to_one() -> None:
    for item in made(500, 2, hinted=0.5):
        assert len(item.shares) == len(item.question.options)
        assert sum(item.shares) == pytest.approx(1.0)
        assert len(set(item.question.options)) == len(item.question.options)


def test_a_stated_answer_is_certain() -> None:
    for item in made(200, 3, hinted=0.0):
        assert item.shares[item.question.answer] == 1.0


def test_a_record_hints_with_another_time_and_never_states_the_asked() -> None:
    for item in made(800, 4):
        record, label = item.question.text.split("\n")[0], item.question.target
        assert not re.search(rf"(^|; ){re.escape(label)} ", record)
        if kind(item)[1] == "another time":
            assert item.reason.startswith(label.partition(",")[0] + ", ")


def test_the_share_of_a_number_given_another_time_is_that_of_many_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brute force: of pairs of two times with one law, those that look like the record, and where their second lies."""
    law = Law(np.ones(1), np.array([100.0]), np.array([10.0]), False, 0)
    monkeypatch.setattr(warmup_usual, "draw_law", lambda rng, bimodal: law)
    rng = np.random.default_rng(5)
    rho = rng.choice(warmup_usual._CORRELATIONS, 2_000_000)
    first = rng.normal(size=rho.size)
    second = 100 + 10 * (rho * first + np.sqrt(1 - rho**2) * rng.normal(size=rho.size))
    blank = Item("Lamp", "number", "", "", 0.0, 0)
    for _ in range(5):
        _, known, options, shares, usual = warmup_usual._number(rng, TEMPLATE, blank, 5, True)
        alike = second[np.abs(100 + 10 * first - known.number) < 0.5]
        seen = np.array([(np.abs(alike - float(option)) < 0.5).sum() for option in options], dtype=float)
        assert shares == pytest.approx((seen / seen.sum()).tolist(), abs=0.03)
        assert usual == " Usually 100, mostly 90 to 110."


@pytest.mark.parametrize("bimodal", [False, True])
def test_what_is_usual_of_a_law_is_what_its_draws_are(bimodal: bool) -> None:
    rng = np.random.default_rng(6)
    for _ in range(20):
        law = draw_law(rng, bimodal=bimodal)
        component = rng.choice(len(law.means), size=40_000, p=law.weights)
        numbers = law.number(rng.normal(law.means[component], law.sds[component]))
        _, low, high = law.usual()
        assert (numbers < low).mean() == pytest.approx(1 / 6, abs=0.02)
        assert (numbers < high).mean() == pytest.approx(5 / 6, abs=0.02)


def test_numbers_lie_as_close_together_as_those_of_patients() -> None:
    """A sodium of 138, mostly 131 to 144, is a spread of a twentieth; some are narrower."""
    spreads = []
    for item in made(3000, 7):
        found = re.search(r"Usually ([\d.]+), mostly ([\d.]+) to (\d+(?:\.\d+)?)", item.question.text)
        if found and float(found[1]) > 0:
            spreads.append((float(found[3]) - float(found[2])) / float(found[1]))
    assert np.quantile(spreads, 0.1) < 0.1
    assert np.quantile(spreads, 0.9) > 0.9


def test_a_step_has_the_same_questions_whichever_process_writes_them(tiny_model_path) -> None:
    from wardround.common.config import LoraConfig, ModelConfig, RunConfig
    from wardround.common.lm.models import load
    from wardround.server import warmup

    config = RunConfig.model_validate(
        {
            "name": "t",
            "privacy": {"enabled": False},
            "model": {"id": str(tiny_model_path), "device": "cpu", "prompt": "en_usual"},
            "warmup": {"steps": 3, "batch_size": 5},
        }
    )
    lm = load(ModelConfig(id=str(tiny_model_path), device="cpu"), LoraConfig(rank=4), seed=0)
    batches = warmup._Batches(warmup._Tokens(lm.config, lm.tokenizer), config, TEMPLATE)
    in_turn = list(warmup._batches(lm, config, TEMPLATE))
    assert in_turn == [batches[step] for step in (0, 1, 2)]
    assert in_turn[0] != in_turn[1]
    assert [len(item.prompt) for item in in_turn[0]] == sorted(len(item.prompt) for item in in_turn[0])


def test_ladders_are_as_wide_as_a_hospitals() -> None:
    sigma = QuestionsConfig().option_spacing_sigma
    assert (NARROWEST * sigma, sigma) == pytest.approx(warmup_usual._STEP)
