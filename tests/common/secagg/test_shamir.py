"""common/secagg/shamir.py: any t shares rebuild, fewer say nothing, wrong ones are found."""

import doctest
from collections.abc import Callable
from importlib import import_module
from itertools import combinations, product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wardround.common.errors import ProtocolError, VerificationError
from wardround.common.secagg import shamir
from wardround.common.secagg.shamir import (
    PRIME,
    VALUE_BYTES,
    from_bytes,
    interpolate,
    reconstruct,
    share,
    to_bytes,
)

SECRETS = st.integers(0, 2**256 - 1)


def tape(seed: int) -> Callable[[int], bytes]:
    return Random(seed).randbytes


def points(secret: int, threshold: int, n: int, seed: int = 0) -> dict[int, int]:
    return dict(enumerate(share(secret, threshold, n, tape(seed)), start=1))


def is_prime(number: int) -> bool:
    """Miller and Rabin, 40 bases."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 42):
        value = pow(base, odd, number)
        if value in (1, number - 1):
            continue
        for _ in range(twos - 1):
            value = value * value % number
            if value == number - 1:
                break
        else:
            return False
    return True


def test_the_modulus_is_the_first_prime_above_every_secret():
    assert PRIME == 2**256 + 297
    assert is_prime(PRIME)
    assert not any(is_prime(number) for number in range(2**256, PRIME))


@settings(max_examples=60, deadline=None)
@given(SECRETS, st.data())
def test_shares_rebuild_the_secret_from_any_t_of_them(secret: int, data: st.DataObject):
    n = data.draw(st.integers(1, 12))
    threshold = data.draw(st.integers(1, n))
    made = points(secret, threshold, n, data.draw(st.integers(0, 9)))
    chosen = data.draw(st.permutations(range(1, n + 1)))[:threshold]
    assert interpolate({x: made[x] for x in chosen}) == secret
    assert reconstruct({x: made[x] for x in chosen}, threshold, lambda found: found == secret) == (secret, [])


def test_every_subset_of_t_rebuilds_and_gives_every_other_share():
    made = points(2**256 - 1, 4, 7)
    for chosen in combinations(made, 4):
        some = {x: made[x] for x in chosen}
        assert interpolate(some) == 2**256 - 1
        assert all(interpolate(some, at=x) == value for x, value in made.items())


def test_shares_are_the_polynomial_of_the_random_bytes_in_the_order_of_the_specification():
    tape_bytes = b"".join(bytes([i]) * 48 for i in (1, 2))
    taken: list[int] = []

    def random(size: int) -> bytes:
        taken.append(size)
        return tape_bytes[48 * (len(taken) - 1) :][:size]

    a1, a2 = (int.from_bytes(bytes([i]) * 48, "little") for i in (1, 2))
    assert share(5, 3, 4, random) == [(5 + a1 * x + a2 * x * x) % PRIME for x in (1, 2, 3, 4)]
    assert taken == [48, 48]


def test_fewer_than_t_shares_are_consistent_with_every_secret():
    made = points(12345, 3, 5)
    two = {x: made[x] for x in (2, 5)}
    for other in (0, 1, 2**256 - 1):
        polynomial = {0: other, **two}  # degree 2 through the two shares and any secret at all
        assert interpolate(polynomial, at=2) == made[2] and interpolate(polynomial, at=5) == made[5]


@pytest.mark.parametrize("threshold", [1, 2, 3])
def test_in_a_tiny_field_fewer_than_t_shares_have_one_distribution_whatever_the_secret(
    monkeypatch: pytest.MonkeyPatch, threshold: int
):
    monkeypatch.setattr(shamir, "PRIME", 5)
    views: dict[int, list[tuple[int, ...]]] = {}
    for secret in range(5):
        seen: list[tuple[int, ...]] = []
        for coefficients in product(range(5), repeat=threshold - 1):
            drawn = iter(coefficients)
            made = share(secret, threshold, 3, lambda size, drawn=drawn: next(drawn).to_bytes(size, "little"))
            seen.append(tuple(made[: threshold - 1]))
        views[secret] = sorted(seen)
    assert all(view == views[0] for view in views.values())


@given(st.integers(0, PRIME - 1))
def test_a_value_comes_back_from_its_bytes(value: int):
    assert len(to_bytes(value)) == VALUE_BYTES
    assert from_bytes(to_bytes(value)) == value


@given(st.binary(max_size=40))
def test_bytes_are_an_element_or_refused(data: bytes):
    try:
        value = from_bytes(data)
    except ProtocolError:
        assert len(data) != VALUE_BYTES or int.from_bytes(data, "little") >= PRIME
    else:
        assert to_bytes(value) == data


@pytest.mark.parametrize("value", [PRIME, PRIME + 1, 2**264 - 1])
def test_values_that_are_not_below_p_are_refused(value: int):
    with pytest.raises(ProtocolError, match="below p"):
        from_bytes(value.to_bytes(VALUE_BYTES, "little"))
    with pytest.raises(ValueError, match="share"):
        to_bytes(value)


@pytest.mark.parametrize("size", [0, 32, 34])
def test_a_share_of_another_length_is_refused(size: int):
    with pytest.raises(ProtocolError, match=f"expected 33 bytes, got {size}"):
        from_bytes(bytes(size))


def test_any_wrong_shares_that_leave_enough_are_named():
    secret, threshold, n = 987654321, 4, 7
    made = points(secret, threshold, n)
    for wrong in [set(), *({x} for x in made), *(set(pair) for pair in combinations(made, 2))]:
        sent = {x: (value + x) % PRIME if x in wrong else value for x, value in made.items()}
        assert reconstruct(sent, threshold, lambda found: found == secret) == (secret, sorted(wrong))


def test_two_liars_whose_errors_cancel_are_named_and_not_the_honest():
    secret, threshold, n = 42, 3, 7
    made = points(secret, threshold, n)
    # Errors e1, e2 at x = 1, 2 with e1·w1 + e2·w2 = 0, w being Lagrange's weights of {1, 2, 3} at 0: 3, -3, 1.
    sent = {**made, 1: (made[1] + 5) % PRIME, 2: (made[2] + 5) % PRIME}
    assert interpolate({x: sent[x] for x in (1, 2, 3)}) == secret  # the first subset tried fits
    assert reconstruct(sent, threshold, lambda found: found == secret) == (secret, [1, 2])


@pytest.mark.parametrize(("wrong", "most"), [((), 1), ((1,), 27 + 1), ((1, 2), 1 + 27 + 28 * 27 // 2)])
def test_few_wrong_shares_of_fifty_cost_as_few_tries_as_documented(wrong: tuple[int, ...], most: int):
    secret, threshold = 2**255 + 7, 27
    sent = points(secret, threshold, 50)
    for x in wrong:
        sent[x] ^= 1
    tries = 0

    def accept(found: int) -> bool:
        nonlocal tries
        tries += 1
        return found == secret

    assert reconstruct(sent, threshold, accept, most_tries=most) == (secret, list(wrong))
    assert tries <= most
    tries = 0
    reconstruct(sent, threshold, accept, suspects=wrong)
    assert tries == 1


def test_every_subset_comes_up_once():
    for m in range(1, 8):
        for size in range(1, m + 1):
            tried = list(shamir._subsets(range(1, m + 1), size))
            assert sorted(tried) == sorted(combinations(range(1, m + 1), size))
            assert tried[0] == tuple(range(1, size + 1))


def test_when_no_subset_fits_nothing_comes_back():
    sent = points(1, 3, 5)
    with pytest.raises(VerificationError, match="no 3 of 5"):
        reconstruct(sent, 3, lambda found: False)
    sent[1] ^= 1
    with pytest.raises(VerificationError):  # right shares are left, but not within the tries allowed
        reconstruct(sent, 3, lambda found: found == 1, most_tries=1)
    with pytest.raises(VerificationError, match="at least 3, got 2"):
        reconstruct({1: 1, 2: 2}, 3, lambda found: True)


def test_a_value_above_every_secret_is_never_offered():
    seen: list[int] = []

    def accept(found: int) -> bool:
        seen.append(found)
        return True

    with pytest.raises(VerificationError):
        reconstruct({1: 2**256, 2: 2**256}, 2, accept)
    assert seen == []


def test_no_error_shows_a_share_or_secret():
    sent = points(1234567890123456789, 3, 5)
    with pytest.raises(VerificationError) as caught:
        reconstruct(sent, 3, lambda found: False)
    assert not any(str(value) in str(caught.value) for value in (*sent.values(), 1234567890123456789))


@pytest.mark.parametrize(
    "call",
    [
        lambda: share(-1, 2, 3, tape(0)),
        lambda: share(2**256, 2, 3, tape(0)),
        lambda: share(1, 0, 3, tape(0)),
        lambda: share(1, 4, 3, tape(0)),
        lambda: share(1, 2, 3, lambda size: bytes(size - 1)),
        lambda: interpolate({}),
        lambda: interpolate({1: PRIME}),
        lambda: interpolate({-1: 1}),
        lambda: interpolate({1: 1}, at=-1),
        lambda: reconstruct({0: 1, 1: 1}, 2, lambda found: True),
        lambda: reconstruct({1: -1, 2: 1}, 2, lambda found: True),
        lambda: reconstruct({1: 1}, 0, lambda found: True),
        lambda: reconstruct({1: 1}, 1, lambda found: True, most_tries=0),
    ],
)
def test_what_is_out_of_range_is_refused(call: Callable[[], object]):
    with pytest.raises(ValueError, match="expected"):
        call()


def test_the_examples_in_the_documentation_hold():
    assert doctest.testmod(import_module("wardround.common.secagg.shamir")).failed == 0
