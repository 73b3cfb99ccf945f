"""Records read back from questions' text (common/record.py)."""

from dataclasses import replace

import numpy as np
import pytest
from wardround.client.questions import QuestionBuilder
from wardround.client.registry import Registry, to_registry
from wardround.common.config import QuestionsConfig
from wardround.common.counts import count
from wardround.common.dictionary import Dictionary, Feature
from wardround.common.errors import VerificationError
from wardround.common.question import PromptTemplate, Question, load_prompt
from wardround.common.record import record_of
from wardround.common.schema import Schema, derive_schema
from wardround.simulations.synthetic_registry import make

SETTINGS = QuestionsConfig(features_per_record=12, outcome_share=0.2)


@pytest.fixture(scope="module")
def registry() -> Registry:
    import pyarrow as pa

    table, dictionary = make(400, seed=3)
    return to_registry("synthetic", pa.Table.from_pandas(table, preserve_index=False), dictionary)


@pytest.fixture(scope="module")
def schema(registry: Registry) -> Schema:
    return derive_schema(count(registry.values, registry.dictionary), registry.dictionary, SETTINGS)


def read_back(registry: Registry, schema: Schema, template: PromptTemplate) -> int:
    builder = QuestionBuilder(registry, schema, template, SETTINGS)
    questions, rows, shown = builder.build_with_records(np.arange(400), np.random.default_rng(1))
    for question, row, show in zip(questions, rows, shown, strict=True):
        record = record_of(question, template, registry.dictionary)
        wanted = {}
        for name in np.array(builder.features)[show].tolist():
            feature, value = registry.dictionary.feature(name), registry.values[name][row]
            levels = list(feature.levels.values())
            wanted[name] = levels[value] if feature.kind == "category" else f"{value:.{feature.decimals}f}"
        assert dict(record.values) == wanted
        assert list(record.values) == list(wanted)
        assert record.target.name == question.target
        assert record.options == question.options
    return len(questions)


@pytest.mark.parametrize("prompt", ["en", "en_short", "en_usual", "ko"])
def test_a_record_reads_back_to_the_values_it_was_written_from(prompt: str, registry: Registry, schema: Schema):
    assert read_back(registry, schema, load_prompt(prompt)) > 300


def test_a_template_with_its_parts_in_another_order_reads_back(registry: Registry, schema: Schema):
    template = PromptTemplate(
        name="turned", language="en", system="", line="{value}{unit} {label}", separator=" / ", question="{label}??",
        option="{letter}) {value}", user="{question}\n{options}\nof {{one}} patient with {record}", cue="",
        forced="\\boxed{",
    )  # fmt: skip
    assert read_back(registry, schema, template) > 300


def test_a_question_of_another_prompt_is_refused_without_a_value_in_the_message(registry: Registry, schema: Schema):
    en, short = load_prompt("en"), load_prompt("en_short")
    question = QuestionBuilder(registry, schema, en, SETTINGS).build(np.arange(1), np.random.default_rng(0))[0]
    with pytest.raises(VerificationError, match="not made with prompt 'en_short'"):
        record_of(question, short, registry.dictionary)
    record = record_of(question, en, registry.dictionary)
    label, value = record.pairs()[0]
    changed = replace(question, text=question.text.replace(f"{label}: {value}", f"{label}: ?"))
    with pytest.raises(VerificationError, match="begins no line") as caught:
        record_of(changed, en, registry.dictionary)
    assert value not in str(caught.value).replace("character 0", "")


def test_of_levels_that_begin_alike_the_one_written_is_read():
    score = Feature(name="coma", label="Coma score", section="S", levels={"9": "9", "94": "94", "1": "94; deep"})
    sex = Feature(name="sex", label="Sex", section="S", levels={"m": "male", "f": "female"})
    patient = Feature(name="pid", label="Patient", role="id")
    dictionary = Dictionary(name="d", title="D", features=(patient, score, sex))
    for level in score.levels.values():
        text = f"Coma score {level}.\nWhat is the patient's Sex?\nA. male\nB. female"
        question = Question("sex", "S", "feature", text, ("male", "female"), 0, 0)
        assert record_of(question, load_prompt("en_short"), dictionary).pairs() == [("Coma score", level)]
