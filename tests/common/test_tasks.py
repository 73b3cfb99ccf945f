"""common/tasks.py: what a task may ask and show, and how it divides patients."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wardround.common.dictionary import Dictionary, Feature, load_dictionary
from wardround.common.errors import ConfigError
from wardround.common.tasks import Axis, Task, load_task, load_tasks, shipped
from wardround.simulations import registries

YES_NO = {"0": "no", "1": "yes"}


def dictionary() -> Dictionary:
    def feature(name: str, **more: Any) -> Feature:
        return Feature(name=name, label=name.title(), section=more.pop("section", "One"), **more)

    return Dictionary(
        name="small",
        title="Small",
        public=True,
        features=(
            Feature(name="pid", label="Patient", role="id"),
            feature("age", kind="number", low=18, high=100),
            feature("diabetes", levels=YES_NO),
            feature("stroke", levels=YES_NO, section="Two"),
            feature("creatinine", kind="number", low=1, high=900, known_at=3, section="Two"),
            feature("died", role="outcome", levels=YES_NO, known_at=2, question="Did they die?", hide=("stroke",)),
        ),
    )


def task(**changes: Any) -> Task:
    content = {"name": "t", "title": "T", "registry": "small", "kind": "outcome", "targets": ("died",), "event": "yes"}
    return Task.model_validate({**content, **changes})


def test_every_shipped_task_fits_its_registry() -> None:
    tasks = load_tasks([])
    assert [item.name for item in tasks] == shipped()
    assert {item.registry for item in tasks} == {*registries.NAMES, *registries.FILED}
    for item in tasks:
        described = load_dictionary(registries.dictionary_path(item.registry))
        item.check(described)
        assert item.shown(described)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"context": ("age", "died")}, "cannot be shown|own target"),
        ({"context": ("stroke",)}, "gives it away"),
        ({"context": ("creatinine",)}, "no feature known before it"),
        ({"targets": ("lactate",)}, "no column 'lactate'"),
        ({"targets": ("diabetes",)}, "asks outcomes"),
        ({"event": "perhaps"}, "no level labelled 'perhaps'"),
        ({"sections": ("Three",)}, "no section 'Three'"),
        ({"registry": "large"}, "made for registry 'large'"),
        ({"strata": {"age": {"feature": "age"}}}, "needs edges"),
        ({"strata": {"comorbidity": {"count": ("age",), "edges": (0, 1)}}}, "no level labelled 'yes'"),
    ],
)
def test_a_task_that_the_registry_cannot_serve_or_that_shows_its_answer_is_refused(changes: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        task(**changes).check(dictionary())


def test_a_masked_feature_is_not_in_its_own_context() -> None:
    with pytest.raises(ConfigError, match="its context holds its own target 'age'"):
        task(kind="denoising", targets=("age",), event=None, context=("age", "diabetes")).check(dictionary())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"targets": ()}, "needs targets"),
        ({"metric": "auroc", "event": None}, "auroc"),
        ({"kind": "open"}, "question belongs to open tasks"),
        ({"question": "What now?"}, "question belongs to open tasks"),
        ({"only": {"died": "yes"}}, "only belongs to open tasks"),
        ({"strata": {"weekday": {"feature": "age"}}}, "expected axes among"),
        ({"strata": {"age": {"feature": "age", "count": ["diabetes"]}}}, "either feature or count"),
        ({"strata": {"age": {"feature": "age", "edges": [50, 40]}}}, "rising numbers"),
    ],
)
def test_a_task_that_contradicts_itself_is_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        task(**changes)


def test_what_is_shown_is_a_part_of_the_sections_and_known_in_time() -> None:
    assert task().shown(dictionary()) == {"age", "diabetes", "stroke", "creatinine"}
    assert task(sections=("Two",)).shown(dictionary()) == {"stroke", "creatinine"}
    assert task(known_before=3).shown(dictionary()) == {"age", "diabetes", "stroke"}
    assert task(context=("age",)).shown(dictionary()) == {"age"}


def test_patients_are_divided_by_levels_by_cut_points_and_by_how_much_they_have() -> None:
    values = {
        "age": np.array([17.0, 50.0, 64.9, 65.0, np.nan]),
        "diabetes": np.array([0, 1, 1, -1, 0], np.int16),
        "stroke": np.array([0, 0, 1, 1, -1], np.int16),
    }
    by_age = Axis(feature="age", edges=(50, 65)).strata(values, dictionary())
    assert by_age == ("under 50", "50 to under 65", "50 to under 65", "65 or more", "")
    assert Axis(feature="diabetes").strata(values, dictionary()) == ("no", "yes", "yes", "", "no")
    counted = Axis(count=("diabetes", "stroke"), edges=(0, 1, 2)).strata(values, dictionary())
    assert counted == ("0", "1", "2 or more", "1", "0")


def test_an_unknown_task_names_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shipped are ist-death14"):
        load_task("nothing")
    (tmp_path / "own.toml").write_text('name = "own"\ntitle = "O"\nregistry = "small"\nkind = "denoising"\nspeed = 3\n')
    with pytest.raises(ConfigError, match="speed"):
        load_task(tmp_path / "own.toml")
