"""What a question says is usual of its target: from the published schema alone."""

import numpy as np
import pytest
from wardround.client.questions import QuestionBuilder
from wardround.client.usual import usual_words
from wardround.common.config import QuestionsConfig
from wardround.common.counts import count
from wardround.common.dictionary import Feature
from wardround.common.question import load_prompt
from wardround.common.schema import FeatureSchema, derive_schema
from wardround.simulations import registries

TEMPLATE = load_prompt("en_usual")


def number(scale: str = "linear", **changes) -> Feature:
    settings = {
        "name": "sodium",
        "label": "Sodium",
        "section": "Laboratory",
        "role": "feature",
        "kind": "number",
        "unit": "mmol/L",
        "low": 100,
        "high": 180,
        "decimals": 0,
        "scale": scale,
    }
    return Feature.model_validate({**settings, **changes})


def test_a_numbers_usual_value_is_the_densest_and_its_range_holds_two_thirds() -> None:
    schema = FeatureSchema(name="sodium", weights=(1.0,), means=(140.0,), sds=(5.0,))
    words = usual_words(number(), schema, TEMPLATE, str, " mmol/L")
    assert words == " Usually 140, mostly 135 to 145."


def test_on_a_logarithmic_scale_the_range_is_even_in_the_logarithm() -> None:
    schema = FeatureSchema(name="sodium", weights=(1.0,), means=(float(np.log(10.0)),), sds=(0.5,))
    feature = number("log", low=1, high=100)
    _, low_high = usual_words(feature, schema, TEMPLATE, str, "").rstrip(".").split(", mostly ")
    low, high = map(int, low_high.split(" to "))
    assert low == pytest.approx(10 * np.exp(-0.97 * 0.5), abs=1)
    assert high == pytest.approx(10 * np.exp(0.97 * 0.5), abs=1)


def test_of_levels_the_most_frequent_are_named_first() -> None:
    levels = {"0": "none", "1": "localised", "2": "metastatic", "3": "unknown"}
    feature = Feature.model_validate(
        {"name": "ca", "label": "Cancer", "section": "History", "role": "feature", "kind": "category", "levels": levels}
    )
    schema = FeatureSchema(name="ca", frequencies=(0.61, 0.25, 0.1, 0.04))
    words = usual_words(feature, schema, TEMPLATE, list(levels.values()).__getitem__, "")
    assert words == " Usually none 61 %, localised 25 %, metastatic 10 %."


def test_a_prompt_without_it_says_nothing_of_what_is_usual() -> None:
    schema = FeatureSchema(name="sodium", weights=(1.0,), means=(140.0,), sds=(5.0,))
    assert usual_words(number(), schema, load_prompt("en_short"), str, "") == ""


def test_questions_differ_in_nothing_but_what_is_usual() -> None:
    registry = registries.load("support_icu").take(np.arange(200))
    settings = QuestionsConfig(features_per_record=4)
    schema = derive_schema(count(registry.values, registry.dictionary), registry.dictionary, settings)
    made = [
        QuestionBuilder(registry, schema, load_prompt(name), settings).build(np.arange(100), np.random.default_rng(1))
        for name in ("en_short", "en_usual")
    ]
    for plain, informed in zip(*made, strict=True):
        assert (plain.target, plain.options, plain.answer) == (informed.target, informed.options, informed.answer)
        before, usual, after = informed.text.rpartition(" Usually ")[0], informed.text, plain.text
        assert after.startswith(before)
        assert usual.count(" Usually ") == 1
