"""Shamir's secret sharing over GF(2^256 + 297) (docs/secure-sums.md §S6, §S9; Shamir 1979, "How to Share a Secret").

A site shares its self seed and its mask key with it; the coordinator rebuilds them from t answers. Pure functions on
integers. Enters: secrets below 2^256 and random bytes. Leaves: one value a member, numbered from 1. Private: secrets
and shares; no message here holds one. Fewer than t shares say nothing about the secret, whatever the secret is. Python
integers are not constant time (§S13).

Lagrange's weights depend only on who answered, not on what: they are computed once for a set of members and kept, so
that n secrets shared among the same members cost t multiplications each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import combinations, islice

from ..errors import ProtocolError, VerificationError

PRIME = 2**256 + 297  # the smallest prime above 2^256: every 32-byte secret is an element
SECRET_BITS = 256
VALUE_BYTES = 33
COEFFICIENT_BYTES = 48  # 384 bits modulo p: within 2^-127 of uniform
MOST_TRIES = 5000  # at t = 27: any three wrong shares of 50, in seconds


def to_bytes(value: int) -> bytes:
    """A field element as 33 bytes, little-endian.

    Raises:
        ValueError: not an element.

    >>> from_bytes(to_bytes(PRIME - 1)) == PRIME - 1
    True
    """
    if not 0 <= value < PRIME:
        raise ValueError("share: expected a value from 0 to p - 1")
    return value.to_bytes(VALUE_BYTES, "little")


def from_bytes(data: bytes) -> int:
    """The inverse of `to_bytes`.

    Raises:
        ProtocolError: another length, or not below p (a second encoding of the same element).
    """
    if len(data) != VALUE_BYTES:
        raise ProtocolError(f"share: expected {VALUE_BYTES} bytes, got {len(data)}")
    value = int.from_bytes(data, "little")
    if value >= PRIME:
        raise ProtocolError("share: expected a value below p")
    return value


def share(secret: int, threshold: int, n: int, random: Callable[[int], bytes]) -> list[int]:
    """The values at 1 to n of a random polynomial of degree t − 1 whose value at 0 is the secret (§S6).

    Args:
        secret: below 2^256.
        threshold: t, 1 to n.
        n: members.
        random: gives that many uniform bytes; asked for 48 at a time, for the coefficients of degree 1, 2, … in turn.

    Raises:
        ValueError: secret or threshold out of range, or too few random bytes.

    >>> interpolate(dict(enumerate(share(7, 2, 3, lambda size: bytes([1]) * size), start=1)))
    7
    """
    if not 0 <= secret < 1 << SECRET_BITS:
        raise ValueError(f"secret: expected 0 to 2^{SECRET_BITS} - 1")
    if not 1 <= threshold <= n:
        raise ValueError(f"threshold: expected 1 to {n}, got {threshold}")
    coefficients = [secret]
    for _ in range(1, threshold):
        drawn = random(COEFFICIENT_BYTES)
        if len(drawn) != COEFFICIENT_BYTES:
            raise ValueError(f"random: expected {COEFFICIENT_BYTES} bytes, got {len(drawn)}")
        coefficients.append(int.from_bytes(drawn, "little") % PRIME)
    values: list[int] = []
    for x in range(1, n + 1):
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * x + coefficient) % PRIME
        values.append(value)
    return values


def interpolate(points: Mapping[int, int], at: int = 0) -> int:
    """The value at `at` of the polynomial of least degree through all points (x → value).

    Raises:
        ValueError: no points, or an x or a value that is not an element.
    """
    xs = tuple(sorted(points))
    if not xs or xs[0] < 0 or xs[-1] >= PRIME or not 0 <= at < PRIME:
        raise ValueError("points: expected at least one, every x from 0 to p - 1")
    if not all(0 <= value < PRIME for value in points.values()):
        raise ValueError("points: expected values from 0 to p - 1")
    return _value(_weights(xs, at), xs, points)


def reconstruct(
    points: Mapping[int, int],
    threshold: int,
    accept: Callable[[int], bool],
    *,
    most_tries: int = MOST_TRIES,
    suspects: Collection[int] = (),
) -> tuple[int, list[int]]:
    """The secret that `accept` recognises, from t of the shares, and who sent a share off its polynomial (§S9).

    The shares stand in order of x, suspects after all others. Subsets of t are tried in this order: by how far the last
    one stands; then by which earlier ones are left out, the front ones first. So with no wrong share among the first t
    one try is enough, any one wrong share costs at most t + 1, any two at most 1 + t + (t + 1)t/2; and with enough
    tries every subset comes up once. A secret of 2^256 or more is none of ours and is never given to `accept`.

    Formal Guarantees: what is returned satisfied `accept`. If `accept` holds for one secret only, and of m shares at
    most (m − t + 1) / 2 are wrong, exactly the wrong ones are named, once the tries reach t right ones: two polynomials
    of degree below t that share the secret and t − 1 points are one, so a first fit that has more off it (liars whose
    errors cancel at 0) is not believed and the search goes on. Else the fit with the fewest off it is returned; those
    named contradict it, and may be honest.

    Args:
        points: x → share, x from 1; any number of them.
        threshold: t.
        accept: whether a secret below 2^256 is the one that was committed to. A public key says it only of a clamped
            X25519 key: 32 integers have the same one.
        most_tries: subsets to try.
        suspects: x's to use last; those named for another secret, usually.

    Returns:
        The secret, and the x's whose share is off, ascending.

    Raises:
        VerificationError: fewer than t shares, or no subset tried gives an accepted secret.
        ValueError: a point that is none.
    """
    if any(not 1 <= x < PRIME or not 0 <= value < PRIME for x, value in points.items()):
        raise ValueError("points: expected x from 1 and values from 0 to p - 1")
    if threshold < 1 or most_tries < 1:
        raise ValueError(f"threshold, most_tries: expected at least 1, got {threshold} and {most_tries}")
    if len(points) < threshold:
        raise VerificationError(f"shares: expected at least {threshold}, got {len(points)}")
    order = sorted(points, key=lambda x: (x in suspects, x))
    best: tuple[int, list[int]] | None = None
    for chosen in islice(_subsets(order, threshold), most_tries):
        secret = _value(_weights(chosen, 0), chosen, points)
        if secret >> SECRET_BITS or not accept(secret):
            continue
        off = [x for x in sorted(points) if _value(_weights(chosen, x), chosen, points) != points[x]]
        if best is None or len(off) < len(best[1]):
            best = secret, off
        if 2 * len(off) <= len(points) - threshold + 1:
            break
    if best is None:
        raise VerificationError(f"shares: no {threshold} of {len(points)} give the secret that was committed to")
    return best


def _subsets(order: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    """Every subset of `size`, once, each ascending: the first `size`, then those that reach one further, and so on."""
    for reach in range(size, len(order) + 1):
        last = order[reach - 1]
        for left_out in combinations(range(reach - 1), reach - size):
            kept = [x for place, x in enumerate(order[: reach - 1]) if place not in left_out]
            yield tuple(sorted((*kept, last)))


def _value(weights: Sequence[int], xs: Sequence[int], points: Mapping[int, int]) -> int:
    return sum(weight * points[x] for weight, x in zip(weights, xs, strict=True)) % PRIME


# For 50 members one set of answers has 51 of these (0 and every x), a few kilobytes each; for 1024, 17 MB in all.
@lru_cache(maxsize=1024)
def _weights(xs: tuple[int, ...], at: int) -> tuple[int, ...]:
    """Lagrange's weights: the value at `at` is the sum of weight × value over `xs`."""
    if at in xs:
        return tuple(int(x == at) for x in xs)
    barycentric = _barycentric(xs)
    whole = 1
    for x in xs:
        whole = whole * (at - x) % PRIME
    return tuple(
        whole * weight % PRIME * inverse % PRIME
        for weight, inverse in zip(barycentric, _inverses([at - x for x in xs]), strict=True)
    )


@lru_cache(maxsize=16)
def _barycentric(xs: tuple[int, ...]) -> tuple[int, ...]:
    """1 / Π over k ≠ j of (x_j − x_k), for every j."""
    products: list[int] = []
    for x in xs:
        product = 1
        for other in xs:
            if other != x:
                product = product * (x - other) % PRIME
        products.append(product)
    return tuple(_inverses(products))


def _inverses(values: Sequence[int]) -> list[int]:
    """The inverses of non-zero elements, at the price of one and three multiplications each (Montgomery's trick)."""
    before = [1]
    for value in values:
        before.append(before[-1] * value % PRIME)
    inverse = pow(before.pop(), -1, PRIME)
    result = [0] * len(values)
    for i in range(len(values) - 1, -1, -1):
        result[i] = before[i] * inverse % PRIME
        inverse = inverse * values[i] % PRIME
    return result
