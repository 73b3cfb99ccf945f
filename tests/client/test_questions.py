"""Questions from a registry (client/questions.py)."""

import re

import numpy as np
import pytest
from scipy.stats import chisquare
from wardround.client.questions import QuestionBuilder
from wardround.client.registry import Registry, read_registry
from wardround.common.config import QuestionsConfig
from wardround.common.counts import count
from wardround.common.errors import ConfigError, VerificationError
from wardround.common.question import PromptTemplate, Question, load_prompt
from wardround.common.schema import Schema, derive_schema
from wardround.simulations.synthetic_registry import make

ROWS = 3000
SETTINGS = QuestionsConfig(features_per_record=50)
# One marked line a feature, so that a test can read back which ones a record shows.
MARKED = PromptTemplate(
    name="marked", language="en", system="", line="<{label}|{value}>", question="?{label}", outcome="?{question}",
    option="{letter}={value}", user="{record}\n{question}\n{options}", cue="", forced="\\boxed{",
)  # fmt: skip


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> Registry:
    table, dictionary = make(ROWS, seed=5)
    hide = {"urea": ("creatinine",)}
    features = tuple(f.model_copy(update={"hide": hide.get(f.name, ())}) for f in dictionary.features)
    path = tmp_path_factory.mktemp("questions") / "table.parquet"
    table.to_parquet(path)
    return read_registry(path, dictionary.model_copy(update={"features": features}))


@pytest.fixture(scope="module")
def schema(registry: Registry) -> Schema:
    return derive_schema(count(registry.values, registry.dictionary), registry.dictionary, SETTINGS)


@pytest.fixture(scope="module")
def asked(registry: Registry, schema: Schema) -> tuple[list[Question], np.ndarray]:
    builder = QuestionBuilder(registry, schema, MARKED, SETTINGS)
    return builder.build_with_rows(np.tile(np.arange(ROWS), 5), np.random.default_rng(0))


def shown(question: Question, registry: Registry) -> dict[str, str]:
    names = {feature.label: feature.name for feature in registry.dictionary.used}
    return {names[label]: value for label, value in re.findall(r"<(.*?)\|(.*?)>", question.text)}


def value_of(registry: Registry, name: str, row: int) -> str:
    feature = registry.dictionary.feature(name)
    value = registry.values[name][row]
    return list(feature.levels.values())[value] if feature.kind == "category" else f"{value:.{feature.decimals}f}"


def test_the_truth_is_among_the_options_exactly_once(asked, registry: Registry):
    questions, rows = asked
    assert len(questions) == len(rows) > 14_000
    for question, row in zip(questions, rows, strict=True):
        assert len(set(question.options)) == len(question.options)
        assert question.options[question.answer] == value_of(registry, question.target, row)
        assert 0 <= question.majority < len(question.options)


def test_the_position_of_the_truth_is_uniform(asked, registry: Registry):
    questions, _ = asked
    assert {question.target for question in questions} == {feature.name for feature in registry.dictionary.used}
    for n in {len(question.options) for question in questions}:
        positions = np.bincount([q.answer for q in questions if len(q.options) == n], minlength=n)
        assert chisquare(positions).pvalue > 1e-4, (n, positions)
    for kind in ("feature", "outcome"):  # yes/no by a coin, for either true answer
        for truth in ("Yes", "No"):
            mine = [q.answer for q in questions if q.kind == kind and q.options[q.answer] == truth]
            assert chisquare(np.bincount(mine, minlength=2)).pvalue > 1e-4


def test_sorted_options_have_levels_in_the_dictionarys_order_and_numbers_rising(registry: Registry, schema: Schema):
    settings = SETTINGS.model_copy(update={"option_order": "sorted"})
    builder = QuestionBuilder(registry, schema, MARKED, settings)
    ordered, rows = builder.build_with_rows(np.tile(np.arange(ROWS), 2), np.random.default_rng(0))
    for question, row in zip(ordered, rows, strict=True):
        feature = registry.dictionary.feature(question.target)
        place = list(feature.levels.values()).index if feature.kind == "category" else float
        assert sorted(question.options, key=place) == list(question.options)
        assert question.options[question.answer] == value_of(registry, question.target, row)
    yes = {question.options.index("Yes") for question in ordered if "Yes" in question.options}
    assert len(yes) == 1  # a letter stands for the same level every time


def test_guessing_the_middle_lowest_or_highest_number_hardly_beats_chance(asked, registry: Registry):
    """The GCS is left out: most patients have its highest value, which is the highest option of any honest question."""
    ranks: dict[str, list[int]] = {}
    for question in asked[0]:
        if registry.dictionary.feature(question.target).kind == "number" and question.target != "coma_scale":
            numbers = [float(option) for option in question.options]
            ranks.setdefault(question.target, []).append(sorted(numbers).index(numbers[question.answer]))
    pooled = np.bincount(np.concatenate(list(ranks.values())), minlength=5)
    assert pooled.sum() > 5000
    assert np.all(np.abs(pooled / pooled.sum() - 0.2) < 0.02), pooled
    for name, mine in ranks.items():
        assert np.all(np.abs(np.bincount(mine, minlength=5) / len(mine) - 0.2) < 0.09), name


def test_options_of_numbers_keep_range_and_decimals(asked, registry: Registry):
    for question in asked[0]:
        feature = registry.dictionary.feature(question.target)
        if feature.kind == "number":
            low, high = feature.bounds
            for option in question.options:
                assert low <= float(option) <= high
                assert len(option.partition(".")[2]) == feature.decimals


def test_a_feature_above_the_threshold_never_appears_in_the_record(registry: Registry):
    counts = count(registry.values, registry.dictionary)
    for threshold in (0.02, 0.1, 0.5):
        settings = SETTINGS.model_copy(update={"mi_threshold": threshold})
        schema = derive_schema(counts, registry.dictionary, settings)
        assert any(schema.shortcuts.values())
        questions = QuestionBuilder(registry, schema, MARKED, settings).build(np.arange(ROWS), np.random.default_rng(1))
        for question in questions:
            for name in shown(question, registry):
                assert schema.mi[question.target][name] <= threshold + 1e-4  # the table is rounded to 4 decimals
                assert name not in schema.hidden[question.target]


def test_the_record_shows_known_context_and_nothing_else(asked, registry: Registry, schema: Schema):
    dictionary = registry.dictionary
    for question, row in zip(*asked, strict=True):
        context = dictionary.context_of(dictionary.feature(question.target))
        expected = {
            feature.name: value_of(registry, feature.name, row)
            for feature in context
            if feature.name not in schema.hidden[question.target]
            and (registry.values[feature.name][row] >= 0 or registry.values[feature.name][row] < -1)
        }
        assert shown(question, registry) == expected
        assert "died" not in expected and question.target not in expected
        if question.target == "died":
            assert "late_lactate" not in expected  # known at the outcome's time
        if question.target == "urea":
            assert "creatinine" not in expected  # hidden by the dictionary


def test_outcomes_are_asked_in_the_share_that_the_config_says(registry: Registry, schema: Schema):
    rows = np.arange(ROWS)
    for share in (0.0, 0.25, 1.0):
        builder = QuestionBuilder(registry, schema, MARKED, SETTINGS.model_copy(update={"outcome_share": share}))
        kinds = [question.kind for question in builder.build(rows, np.random.default_rng(0))]
        assert abs(kinds.count("outcome") / len(kinds) - share) <= (0.03 if 0 < share < 1 else 0)


@pytest.mark.parametrize("limit", [1, 4, 16])
def test_a_record_shows_a_random_subset_in_dictionary_order(registry: Registry, schema: Schema, limit: int):
    builder = QuestionBuilder(registry, schema, MARKED, SETTINGS.model_copy(update={"features_per_record": limit}))
    questions = builder.build(np.arange(500), np.random.default_rng(0))
    features = registry.dictionary.with_role("feature")
    sections = list(dict.fromkeys(feature.section for feature in features))
    order = [feature.name for section in sections for feature in features if feature.section == section]
    seen: set[str] = set()
    for question in questions:
        names = list(shown(question, registry))
        assert 1 <= len(names) <= limit
        assert names == sorted(names, key=order.index)
        seen.update(names)
    assert len(seen) == len(order)


def test_an_informative_record_shows_what_says_most_about_the_target(registry: Registry, schema: Schema):
    settings = SETTINGS.model_copy(update={"features_per_record": 2, "context": "informative"})
    builder = QuestionBuilder(registry, schema, MARKED, settings)
    questions, rows = builder.build_with_rows(np.arange(ROWS), np.random.default_rng(1))
    for question, row in zip(questions, rows, strict=True):
        target = registry.dictionary.feature(question.target)
        allowed = {f.name for f in registry.dictionary.context_of(target)} - set(schema.hidden[question.target])
        known = [name for name in allowed if builder._known(registry.dictionary.feature(name), np.array([row]))[0]]
        information = sorted((schema.mi[question.target][name] for name in known), reverse=True)[:2]
        mine = [schema.mi[question.target][name] for name in shown(question, registry)]
        assert sorted(mine, reverse=True) == information


def test_the_same_generator_state_gives_the_same_questions(registry: Registry, schema: Schema):
    builder = QuestionBuilder(registry, schema, load_prompt("en"), SETTINGS)
    one, same, other = (builder.build(np.arange(200), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one == same != other


def test_a_question_depends_on_no_other_patient(registry: Registry, schema: Schema):
    row = np.array([17])
    alone = QuestionBuilder(registry.take(row), schema, MARKED, SETTINGS).build(np.array([0]), np.random.default_rng(3))
    among = QuestionBuilder(registry, schema, MARKED, SETTINGS).build(row, np.random.default_rng(3))
    assert alone == among


def test_only_the_targets_given_are_asked(registry: Registry, schema: Schema):
    builder = QuestionBuilder(registry, schema, MARKED, SETTINGS)
    questions, rows = builder.build_with_rows(np.arange(300), np.random.default_rng(0), targets=["urea", "age"])
    assert {question.target for question in questions} == {"urea", "age"}
    assert len(rows) == 300
    only = builder.build_with_rows(np.arange(300), np.random.default_rng(0), targets=["urea"])[1]
    assert only.tolist() == np.flatnonzero(~np.isnan(registry.values["urea"][:300])).tolist()
    with pytest.raises(ConfigError, match="'hospital' is not asked"):
        builder.build(np.arange(3), np.random.default_rng(0), targets=["hospital"])


def test_a_level_that_the_schema_does_not_show_is_never_asked(registry: Registry, schema: Schema):
    """Lost in the noise of a private run, or of no training patient: it would be an option only where it is right."""
    first = next(target for target in schema.targets if len(target.frequencies) > 2)
    lost = first.model_copy(update={"frequencies": (0.0, *first.frequencies[1:])})
    fewer = schema.model_copy(update={"targets": tuple(lost if t is first else t for t in schema.targets)})
    rows = np.arange(len(registry))
    builders = [QuestionBuilder(registry, one, load_prompt("en"), SETTINGS) for one in (schema, fewer)]
    before, after = (b.build_with_rows(rows, np.random.default_rng(0), targets=[first.name])[1] for b in builders)
    has = registry.values[first.name] == 0
    assert has[before].any() and not has[after].any()
    assert set(after) == set(before[~has[before]])
    label = next(iter(registry.dictionary.feature(first.name).levels.values()))
    for question in builders[1].build(rows, np.random.default_rng(0), targets=[first.name]):
        assert label not in question.options


def test_no_rows_and_rows_without_values_give_no_question(registry: Registry, schema: Schema):
    builder = QuestionBuilder(registry, schema, MARKED, SETTINGS)
    assert builder.build(np.empty(0, np.int64), np.random.default_rng(0)) == []
    empty = {name: np.full(2, -1 if v.dtype.kind == "i" else np.nan, v.dtype) for name, v in registry.values.items()}
    empty["age"][0] = 50.0  # a target, but nothing to show with it
    bare = Registry(registry.dictionary, registry.patients[:2], empty)
    questions, rows = QuestionBuilder(bare, schema, MARKED, SETTINGS).build_with_rows(
        np.array([0, 1]), np.random.default_rng(0)
    )
    assert questions == [] and len(rows) == 0


def test_a_schema_of_another_dictionary_is_refused(registry: Registry, schema: Schema):
    with pytest.raises(VerificationError):
        QuestionBuilder(registry, schema.model_copy(update={"dictionary_digest": "0" * 64}), MARKED, SETTINGS)


@pytest.mark.parametrize("name", ["en", "en_short", "ko"])
def test_every_template_writes_record_question_and_options(registry: Registry, schema: Schema, name: str):
    template = load_prompt(name)
    builder = QuestionBuilder(registry, schema, template, SETTINGS)
    questions = builder.build(np.arange(40), np.random.default_rng(0))
    for question in questions:
        feature = registry.dictionary.feature(question.target)
        assert (feature.question or feature.label) in question.text
        for letter, option in zip("ABCDE", question.options, strict=False):
            assert f"{letter}. {option}" in question.text
        headings = re.findall(r"^\[(.*)\]$", question.text, re.MULTILINE)
        assert bool(headings) == bool(template.section)
        assert len(headings) == len(set(headings))
        if template.masked and question.kind == "feature":
            assert question.section in headings
            assert question.text.count(template.masked.format(label=feature.label, unit="")) == 1


def test_the_short_template_is_short(registry: Registry, schema: Schema):
    settings = SETTINGS.model_copy(update={"features_per_record": 16})
    questions = QuestionBuilder(registry, schema, load_prompt("en_short"), settings).build(
        np.arange(200), np.random.default_rng(0)
    )
    assert np.mean([len(question.text) for question in questions]) < 600
