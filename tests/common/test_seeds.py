"""Named streams are the same everywhere and do not collide."""

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st
from wardround.common.seeds import derive, derive_rng, derive_seed

labels = st.lists(st.one_of(st.text(max_size=6), st.integers(-5, 5)), max_size=4)


def test_a_stream_is_the_one_that_was_published():
    assert derive(17, "train", "site-01", 2).hex() == "8b195b4a8a44b52a"


def test_a_stream_does_not_depend_on_the_process():
    code = "from wardround.common.seeds import derive_seed; print(derive_seed(3, 'train', 'é', 1))"
    command = [sys.executable, "-c", code]
    found = [
        subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}).stdout
        for seed in ("1", "2")
    ]
    assert found == [f"{derive_seed(3, 'train', 'é', 1)}\n"] * 2


@given(a=labels, b=labels)
def test_different_labels_give_different_streams(a: list, b: list):
    same = [(type(x), x) for x in a] == [(type(x), x) for x in b]
    assert (derive(0, *a) == derive(0, *b)) == same


def test_generators_of_two_streams_differ():
    assert derive_rng(1, "a").integers(2**62) != derive_rng(1, "b").integers(2**62)
    assert 0 <= derive_seed(1, "a") < 2**32
