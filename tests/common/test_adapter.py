"""common/adapter.py: tensors to one vector and back."""

import doctest
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wardround.common.adapter import Manifest, TensorSpec, flatten, unflatten, vector_digest
from wardround.common.errors import VerificationError

SHAPES = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=6)


def manifest(*specs: TensorSpec, base: str = "00") -> Manifest:
    return Manifest(specs, base, "ffa")


def two() -> tuple[Manifest, dict[str, np.ndarray]]:
    made = manifest(TensorSpec("layer.A", (2, 3), False), TensorSpec("layer.B", (3, 2), True))
    rng = np.random.default_rng(0)
    return made, {name: rng.normal(size=shape) for name, shape in (("layer.A", (2, 3)), ("layer.B", (3, 2)))}


@given(SHAPES, st.data())
def test_what_is_flattened_comes_back(shapes: list[list[int]], data: st.DataObject) -> None:
    trained = data.draw(st.lists(st.booleans(), min_size=len(shapes), max_size=len(shapes)))
    specs = [TensorSpec(f"t{i:02}", tuple(shape), trained[i]) for i, shape in enumerate(shapes)]
    made = manifest(*specs)
    rng = np.random.default_rng(len(shapes))
    tensors = {spec.name: rng.normal(size=spec.shape).astype(np.float32) for spec in specs}
    for trainable_only in (True, False):
        kept = {spec.name: tensors[spec.name] for spec in made.kept(trainable_only)}
        vector = flatten(kept, made, trainable_only)
        assert len(vector) == (made.size if trainable_only else made.total_size)
        back = unflatten(vector, made, trainable_only)
        assert back.keys() == kept.keys()
        assert all(np.array_equal(back[name], kept[name]) for name in kept)


def test_the_order_of_the_given_tensors_does_not_matter() -> None:
    made, tensors = two()
    turned = dict(reversed(list(tensors.items())))
    assert np.array_equal(flatten(tensors, made, False), flatten(turned, made, False))


def test_a_manifest_survives_json_and_keeps_its_digest() -> None:
    made, _ = two()
    back = Manifest.from_json(made.to_json())
    assert back == made
    assert back.digest() == made.digest()
    assert manifest(*made.specs, base="01").digest() != made.digest()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"specs": [["a"]], "base_digest": "", "strategy": ""}', '{"specs": [], "base_digest": ""}'],
)
def test_a_malformed_manifest_is_refused(text: str) -> None:
    with pytest.raises(VerificationError, match="manifest"):
        Manifest.from_json(text)


@pytest.mark.parametrize("names", [["b", "a"], ["a", "a"]])
def test_names_out_of_order_or_twice_are_refused(names: list[str]) -> None:
    with pytest.raises(VerificationError, match="unique and in order"):
        manifest(*(TensorSpec(name, (1,), True) for name in names))


def test_a_missing_or_unknown_tensor_is_named() -> None:
    made, tensors = two()
    with pytest.raises(VerificationError, match=r"missing 'layer\.B'"):
        flatten({"layer.A": tensors["layer.A"]}, made, False)
    with pytest.raises(VerificationError, match=r"unknown 'layer\.C'"):
        flatten({**tensors, "layer.C": np.zeros(1)}, made, False)


def test_another_shape_of_the_same_size_is_refused() -> None:
    made, tensors = two()
    with pytest.raises(VerificationError, match="shape"):
        flatten({**tensors, "layer.A": tensors["layer.A"].T}, made, False)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    made, tensors = two()
    vector = flatten(tensors, made, False)
    vector[3] = bad
    with pytest.raises(VerificationError, match="NaN or infinity"):
        unflatten(vector, made, False)


def test_large_finite_values_are_accepted() -> None:
    made, _ = two()
    unflatten(np.full(made.total_size, 3e38, np.float32), made, False)  # their sum of squares overflows


@pytest.mark.parametrize("vector", [np.zeros(11, np.float32), np.zeros(12), np.zeros((2, 6), np.float32)])
def test_a_vector_of_another_size_or_type_is_refused(vector: np.ndarray) -> None:
    made, _ = two()
    with pytest.raises(VerificationError, match="expected float32 of 12"):
        unflatten(vector, made, False)


def test_the_digest_covers_frozen_values_and_the_manifest() -> None:
    made, tensors = two()
    vector = flatten(tensors, made, False)
    digest = vector_digest(made, vector)
    other = vector.copy()
    other[0] += 1  # layer.A, which ffa freezes
    assert vector_digest(made, vector.copy()) == digest
    assert vector_digest(made, other) != digest
    assert vector_digest(manifest(*made.specs, base="01"), vector) != digest


def test_examples_in_the_documentation_hold() -> None:
    result = doctest.testmod(import_module("wardround.common.adapter"), extraglobs={"np": np})
    assert result.attempted
    assert not result.failed
