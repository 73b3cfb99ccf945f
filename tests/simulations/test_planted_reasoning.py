"""Planted defects of reasoning, and how many of them the audit finds (simulations/planted_reasoning.py)."""

from dataclasses import fields

import numpy as np
import pytest
from wardround.common.errors import UserError
from wardround.common.question import load_prompt
from wardround.common.reasoning import KINDS, audit
from wardround.simulations.planted_reasoning import PLANTS, Found, Planted, measure, open_questions, plant
from wardround.simulations.planted_wordings import HELD_OUT, TUNED

# Least precision and recall of every flag; benchmarks/results/reasoning_audit.json has what was measured.
PRECISION, RECALL = 0.97, 0.93


def written(name: str, held_out: bool, n: int, prompt: str = "en_short") -> list[Planted]:
    rng = np.random.default_rng([7, held_out])
    template = load_prompt(prompt)
    try:
        questions, dictionary = open_questions(name, template, n, rng)
    except UserError as error:
        pytest.skip(str(error))
    return list(plant(questions, template, dictionary, held_out=held_out, rng=rng))


def test_the_two_sets_of_wordings_share_no_sentence():
    for field in fields(TUNED):
        assert not set(getattr(TUNED, field.name)) & set(getattr(HELD_OUT, field.name))


@pytest.mark.parametrize("held_out", [False, True])
def test_every_defect_is_planted_at_its_place(held_out: bool):
    texts = written("synthetic", held_out, 600)
    assert {text.plant for text in texts} == {"clean", *PLANTS}
    for text in texts:
        assert (text.span is None) == (text.plant == "clean")
        if text.span is not None:
            assert 0 <= text.span[0] <= text.span[1] <= len(text.text)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("name", ["support_icu", "smart", "copenhagen_stroke", "synthetic"])
def test_planted_defects_are_found_and_clean_texts_left_alone(name: str, held_out: bool):
    texts = written(name, held_out, 300)
    found = measure(texts, [audit(text.record, text.text) for text in texts])
    for kind in KINDS:
        assert found[kind].planted >= 8, kind
        assert found[kind].recall >= RECALL - 0.5 / found[kind].planted ** 0.5, (kind, found[kind])
        assert found[kind].precision >= PRECISION, (kind, found[kind])
    clean = sum(text.plant == "clean" for text in texts)
    assert found["clean"].raised <= 0.02 * clean


def test_a_flag_elsewhere_in_the_text_is_not_counted_as_found():
    texts = written("synthetic", False, 300)
    flags = [audit(text.record, text.text) for text in texts]
    spanless = [
        text
        if text.plant != "another conclusion"
        else Planted(text.question, text.record, text.text, text.plant, (0, 1))
        for text in texts
    ]
    assert measure(spanless, flags)["another conclusion"].found < measure(texts, flags)["another conclusion"].found
    assert np.isnan(Found(0, 0, 0, 0).recall)
