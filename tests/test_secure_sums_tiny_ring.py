"""Secure sums over a ring so small that every secret is enumerated: exactly what the adversary's view depends on.

The protocol of docs/secure-sums.md, three things made tiny. A payload is one value modulo q. The streams of self keys
and of pair keys are uniform values modulo q, all enumerated (that HKDF and AES-256-CTR look like that is the assumption
of §S13). Shamir's field is GF(5); a mask key is shared as the pair masks that it gives, one polynomial each. The
adversary is the coordinator with the `colluders`, and sees every masked vector (late ones too), the colluders' share of
every secret, and all answers of exchange 5. It may show every honest site other recipients and other survivors.

A view's distribution is exact: a count of each outcome over all secrets. Coefficients of Shamir's polynomials are
independent of everything else, so an outcome holds, in place of the shares seen, their distribution given the secret.
`test_shares_seen_have_one_law_or_disjoint_ones` enumerates that two such distributions are identical or never overlap,
so mixtures of them are equal exactly if their labels are; `test_labels_tell_apart_what_the_shares_tell_apart` checks
that against views with every coefficient enumerated.

The masking arithmetic is an argument (`Layer`). To put the product's in, write one more function like `embedded`, which
does it for the reference: it embeds Z_q by multiplying payload and streams by 2^32 / q (2^64 / q in the tail), exactly
for q a power of two, and gives the product those values in place of its key streams.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations, product
from math import prod

import numpy as np
import pytest

from . import secure_sums_reference as ref

FIELD = 5
Members = frozenset[int]
Layer = Callable[[int, int, int, Members, int, dict[int, int]], int]
"""(q, payload, own number, recipients, self mask, pair masks by other member) → masked value modulo q."""
Statement = tuple[Members, Members]
"""Recipients and survivors, as a site signs them."""
Inputs = tuple[int, ...]
"""Payloads of the honest sites, in order."""


def plain(q: int, payload: int, own: int, recipients: Members, self_mask: int, pairs: dict[int, int]) -> int:
    """§S7 written out for one value."""
    later, earlier = (sum(pairs[w] for w in recipients if sign(w)) for sign in (own.__lt__, own.__gt__))
    return (payload + self_mask + later - earlier) % q


def embedded(q: int, payload: int, own: int, recipients: Members, self_mask: int, pairs: dict[int, int]) -> int:
    """The reference's masking of a ring and a tail value, Z_q embedded in the high bits of both."""

    def vector(value: int) -> ref.Vector:
        return [value * (2**32 // q)], [value * (2**64 // q)]

    streams = {w: vector(value) for w, value in pairs.items()}
    (ring,), (tail,) = ref.mask(vector(payload), own, sorted(recipients), vector(self_mask), streams)
    assert (ring * 2**32) == tail
    return ring // (2**32 // q)


def without_self_mask(q: int, payload: int, own: int, recipients: Members, _: int, pairs: dict[int, int]) -> int:
    return plain(q, payload, own, recipients, 0, pairs)


def without_pair_masks(q: int, payload: int, own: int, recipients: Members, self_mask: int, _: dict[int, int]) -> int:
    return plain(q, payload, own, frozenset([own]), self_mask, {})


def one_pair_mask(q: int, payload: int, own: int, recipients: Members, self_mask: int, pairs: dict[int, int]) -> int:
    """Only neighbours in the list share a mask."""
    near = {w for w in recipients if abs(w - own) == 1}
    return plain(q, payload, own, frozenset(near | {own}), self_mask, pairs)


# ---- What a coordinator does, and what honest sites do about it


@dataclass(frozen=True)
class Game:
    """One behaviour of the coordinator towards the honest sites, all in one attempt.

    `masked` has every set of recipients that a site masks for (the protocol allows one), `answers` the statement for
    which a site answers exchange 5, `late` is left to the adversary: it sees the vector of every site in `masked`.
    """

    n: int
    t: int
    colluders: Members
    masked: dict[int, list[Members]]
    answers: dict[int, Statement] = field(default_factory=dict)
    colluders_masks: int = 0

    @property
    def honest(self) -> list[int]:
        return [v for v in range(1, self.n + 1) if v not in self.colluders]

    def holders(self, of_key: bool, u: int) -> Members:
        """Who gave the coordinator a share of u's self seed, or of its mask key."""
        giving = {v for v, (shared, alive) in self.answers.items() if u in (shared - alive if of_key else alive)}
        return self.colluders | giving

    def total(self, survivors: Members, inputs: Inputs) -> int:
        return sum(x for v, x in zip(self.honest, inputs, strict=True) if v in survivors)


def saying(members: Iterable[int], recipients: Members, survivors: Members) -> dict[int, Statement]:
    return dict.fromkeys(members, (recipients, survivors))


def signed_by_quorum(statements: dict[int, Statement], t: int, colluders: Members) -> dict[int, Statement]:
    """§S9: a site answers for the statement that it signed, if t survivors, colluders among them, signed that too."""
    signers = {s: {v for v, mine in statements.items() if mine == s} | colluders for s in statements.values()}
    return {v: s for v, s in statements.items() if len(signers[s] & s[1]) >= t}


def play(n: int, t: int, colluders: Iterable[int], statements: dict[int, Statement], **more: int) -> Game:
    """The protocol: every honest site masks for its recipients, signs its survivors where it is one, and may answer."""
    recipients = {v: [shared] for v, (shared, _) in statements.items()}
    signed = {v: s for v, s in statements.items() if v in s[1]}
    return Game(
        n, t, frozenset(colluders), recipients, signed_by_quorum(signed, t, frozenset(colluders)), **more
    )  # fmt: skip


def subsets(members: Iterable[int], at_least: int) -> Iterator[Members]:
    members = sorted(members)
    for size in range(at_least, len(members) + 1):
        yield from map(frozenset, combinations(members, size))


def every_behaviour(n: int, t: int, colluders: Members) -> Iterator[dict[int, Statement]]:
    """All a coordinator can show to the honest sites that each of them accepts: recipients, then survivors."""
    everyone = range(1, n + 1)
    shown = [
        [(v, (r, s)) for r in subsets(everyone, t) if v in r for s in subsets(r, t)]
        for v in everyone
        if v not in colluders
    ]
    for choice in product(*shown):
        yield dict(choice)


# ---- Shares over GF(5), and the exact distribution of a view


@cache
def law(secret: int, t: int, holders: Members) -> frozenset[tuple[tuple[int, ...], int]]:
    """How often each tuple of the holders' shares occurs, over all polynomials with this secret."""
    seen = Counter(
        tuple(sum(a * i**e for e, a in enumerate((secret, *rest))) % FIELD for i in sorted(holders))
        for rest in product(range(FIELD), repeat=t - 1)
    )
    return frozenset(seen.items())


NUMBERS: dict[Hashable, int] = {}


def number(what: Hashable) -> int:
    """A small number for what a part of a view shows; equal numbers mean that it shows the same."""
    return NUMBERS.setdefault(what, len(NUMBERS))


@cache
def label(secret: int, t: int, holders: Members) -> int:
    return number(law(secret, t, holders))


def parts(game: Game, layer: Layer, q: int) -> Callable[[int, int, int, tuple[int, ...]], tuple[list, list]]:
    """A function that gives a site's masked vectors, and (secret, holders) for everything it shared."""

    def of(u: int, payload: int, self_mask: int, pair_masks: tuple[int, ...]) -> tuple[list, list]:
        with_honest = dict(zip((w for w in game.honest if w != u), pair_masks, strict=True))
        others = with_honest | dict.fromkeys(game.colluders, game.colluders_masks)
        masked = [layer(q, payload, u, r, self_mask, others) for r in game.masked.get(u, [])]
        shared = [(self_mask, game.holders(False, u))]
        return masked, shared + [(value, game.holders(True, u)) for value in with_honest.values()]

    return of


def worlds(game: Game, q: int) -> list[list[tuple[int, tuple[int, ...]]]]:
    """Every choice of the honest sites' secrets: of each its self mask and its pair masks with the other honest sites.

    What the adversary shares with them is constant: it knows it, so a view is a view given that.
    """
    pairs = list(combinations(game.honest, 2))
    found = []
    for values in product(range(q), repeat=len(game.honest) + len(pairs)):
        self_masks, pair_masks = values[: len(game.honest)], dict(zip(pairs, values[len(game.honest) :], strict=True))
        between = [tuple(pair_masks[min(u, w), max(u, w)] for w in game.honest if w != u) for u in game.honest]
        found.append(list(zip(self_masks, between, strict=True)))
    return found


Views = dict[Inputs, frozenset[tuple[Hashable, int]]]


def all_views(game: Game, layer: Layer, q: int) -> Views:
    """For all inputs, how often the adversary sees what; of shares seen, the label of their distribution."""
    part = parts(game, layer, q)

    @cache
    def seen(u: int, payload: int, self_mask: int, pair_masks: tuple[int, ...]) -> int:
        masked, shared = part(u, payload, self_mask, pair_masks)
        return number((*masked, *(label(secret, game.t, holders) for secret, holders in shared)))

    secrets, views = worlds(game, q), {}
    # What every site shows in every world, by payload; then a view is its sites' numbers as one number.
    of_site = [
        [np.array([seen(u, x, *world[place]) for world in secrets], np.int64) for x in range(q)]
        for place, u in enumerate(game.honest)
    ]
    most = 1 + max(int(shown.max()) for by_payload in of_site for shown in by_payload)
    assert most ** len(of_site) < 2**63
    for inputs in product(range(q), repeat=len(game.honest)):
        whole = np.zeros(len(secrets), np.int64)
        for by_payload, x in zip(of_site, inputs, strict=True):
            whole = whole * most + by_payload[x]
        outcomes, counts = np.unique(whole, return_counts=True)
        views[inputs] = frozenset(zip(outcomes.tolist(), counts.tolist(), strict=True))
    return views


def all_views_with_shares(game: Game, layer: Layer, q: int) -> Views:
    """The same with every coefficient of every polynomial of which the adversary sees a share: slow, for a check."""
    part, secrets, views = parts(game, layer, q), worlds(game, q), {}
    for inputs in product(range(q), repeat=len(game.honest)):
        total: Counter[Hashable] = Counter()
        for world in secrets:
            sites = [part(u, x, *own) for u, x, own in zip(game.honest, inputs, world, strict=True)]
            masked = tuple(value for of_site, _ in sites for value in of_site)
            laws = [law(secret, game.t, holders) for _, shared in sites for secret, holders in shared if holders]
            for shares in product(*laws):
                total[masked, tuple(values for values, _ in shares)] += prod(count for _, count in shares)
        views[inputs] = frozenset(total.items())
    return views


def explains(survivors: Members, game: Game, views: Views, q: int) -> bool:
    """Whether inputs with equal sums over these survivors always have the same view."""
    view_of_sum: dict[int, frozenset] = {}
    sums = {inputs: game.total(survivors, inputs) % q for inputs in views}
    return all(view_of_sum.setdefault(sums[inputs], seen) == seen for inputs, seen in views.items())


def leaks(game: Game, layer: Layer, q: int) -> bool:
    """Whether the view says more than one sum over one survivor set that was answered for, or than nothing."""
    views, answered = all_views(game, layer, q), {alive for _, alive in game.answers.values()}
    return not any(explains(alive, game, views, q) for alive in answered or {frozenset[int]()})


A3, A4 = frozenset((1, 2, 3)), frozenset((1, 2, 3, 4))
HONEST_RUNS = {
    "n = 3, t = 3, site 3 colludes": (3, 3, {3}, A3, A3),
    "n = 3, t = 2, no colluder, site 3 dropped, its vector late": (3, 2, set(), A3, frozenset((1, 2))),
    "n = 3, t = 2, no colluder, site 1 dropped, its vector late": (3, 2, set(), A3, frozenset((2, 3))),
    "n = 3, t = 2, no colluder, no dropout": (3, 2, set(), A3, A3),
}


@pytest.mark.parametrize("layer", [plain, embedded])
@pytest.mark.parametrize("run", HONEST_RUNS)
def test_views_of_z4_are_identical_exactly_for_equal_sums_of_survivors(run: str, layer: Layer):
    n, t, colluders, recipients, survivors = HONEST_RUNS[run]
    honest = [v for v in range(1, n + 1) if v not in colluders]
    game = play(n, t, colluders, saying(honest, recipients, survivors), colluders_masks=3)
    assert set(game.answers) == survivors - set(colluders)
    view_of_sum: dict[int, frozenset] = {}
    for inputs, seen in all_views(game, layer, 4).items():
        assert view_of_sum.setdefault(game.total(survivors, inputs) % 4, seen) == seen
    assert len(view_of_sum) == 4
    outcomes = [{outcome for outcome, _ in seen} for seen in view_of_sum.values()]
    assert not any(a & b for a, b in combinations(outcomes, 2)), "a view tells the sum, always"


@pytest.mark.parametrize("survivors", [A4, frozenset((1, 2, 4)), frozenset((2, 3, 4))])
@pytest.mark.parametrize("masks", [0, 1, 2])
def test_four_sites_with_a_colluder_and_a_dropout(survivors: Members, masks: int):
    game = play(4, 3, {4}, saying((1, 2, 3), A4, survivors), colluders_masks=masks)
    assert set(game.answers) == survivors - {4}
    assert not leaks(game, plain, 3)
    assert len(set(all_views(game, plain, 3).values())) == 3


@pytest.mark.parametrize(
    ("n", "t", "colluders"), [(3, 2, ()), (3, 3, (1,)), (3, 3, (2,)), (4, 3, (2,)), (4, 3, (4,))]
)  # fmt: skip
def test_no_behaviour_of_the_coordinator_teaches_more_than_one_sum(n: int, t: int, colluders: tuple[int, ...]):
    games = [play(n, t, colluders, shown) for shown in every_behaviour(n, t, frozenset(colluders))]
    assert all(len({alive for _, alive in game.answers.values()}) <= 1 for game in games)
    assert any(game.answers for game in games)
    different = {repr((game.masked, sorted(game.answers.items()))): game for game in games}
    assert not any(leaks(game, plain, 2) for game in different.values())


@pytest.mark.parametrize(("n", "t", "colluders"), [(3, 2, ()), (3, 3, (3,)), (4, 3, (4,))])
def test_masked_vectors_and_the_colluders_shares_alone_tell_nothing(n: int, t: int, colluders: tuple[int, ...]):
    everyone = frozenset(range(1, n + 1))
    game = Game(n, t, frozenset(colluders), {v: [everyone] for v in everyone.difference(colluders)})
    assert len(set(all_views(game, plain, 2).values())) == 1


# ---- Why labels may stand for shares


@pytest.mark.parametrize("t", [1, 2, 3, 4])
def test_shares_seen_have_one_law_or_disjoint_ones(t: int):
    for holders in subsets(range(1, FIELD), 0):
        laws = [law(secret, t, holders) for secret in range(FIELD)]
        if len(holders) < t:
            assert len(set(laws)) == 1
        else:
            assert not any({x for x, _ in a} & {x for x, _ in b} for a, b in combinations(laws, 2))


def test_labels_tell_apart_what_the_shares_tell_apart():
    half = frozenset((1, 2))
    for game in (
        play(3, 2, (), saying((1, 2, 3), A3, half)),
        play(3, 2, (3,), saying((1, 2), A3, A3)),
        Game(3, 2, frozenset((3,)), {1: [A3], 2: [A3]}),
        Game(3, 2, frozenset((3,)), {1: [A3], 2: [A3]}, {1: (A3, frozenset((1, 3))), 2: (A3, frozenset((2, 3)))}),
    ):
        labels, shares = all_views(game, plain, 2), all_views_with_shares(game, plain, 2)
        for a, b in combinations(labels, 2):
            assert (labels[a] == labels[b]) == (shares[a] == shares[b])


# ---- The same tests fail where the protocol is broken

SPLIT = saying((1, 2), A4, frozenset((1, 2)))
BROKEN: dict[str, tuple[Layer, Game]] = {
    "no self mask, and the vector of a site that was called dropped is there": (
        without_self_mask,
        play(3, 2, (), saying((1, 2, 3), A3, frozenset((1, 2)))),
    ),
    "no pair masks": (without_pair_masks, play(3, 3, {3}, saying((1, 2), A3, A3))),
    "pair masks with neighbours only, and the neighbour colludes": (
        one_pair_mask,
        play(4, 3, {2}, saying((1, 3, 4), A4, A4)),
    ),
    "two survivor sets": (
        plain,
        Game(4, 2, frozenset(), {v: [A4] for v in A4}, SPLIT | saying((3, 4), A4, frozenset((3, 4)))),
    ),
    "both shares of site 2": (
        plain,
        Game(4, 2, frozenset(), {v: [A4] for v in A4}, SPLIT | saying((3, 4), A4, frozenset((1, 3, 4)))),
    ),
    "a site masks for several sets of recipients": (
        plain,
        Game(3, 2, frozenset(), {1: [A3, frozenset((1, 2)), frozenset((1, 3))], 2: [A3], 3: [A3]},
             saying((1, 2, 3), A3, A3)),
    ),
    "as many colluders as the threshold": (plain, Game(4, 2, frozenset((3, 4)), {1: [A4], 2: [A4]})),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_protocol_is_seen_to_leak(what: str):
    layer, game = BROKEN[what]
    assert leaks(game, layer, 2)


def test_a_threshold_at_the_bound_lets_some_behaviour_leak():
    """n = 3, c = 1, t = 2: 2t > n + c does not hold."""
    games = [play(3, 2, (3,), shown) for shown in every_behaviour(3, 2, frozenset((3,)))]
    assert any(len({alive for _, alive in game.answers.values()}) == 2 for game in games)
    assert any(leaks(game, plain, 2) for game in games)


def test_without_the_quorum_of_signatures_some_behaviour_leaks():
    known: set[str] = set()
    for shown in every_behaviour(4, 3, frozenset((4,))):
        answers = {v: statement for v, statement in shown.items() if v in statement[1]}
        game = Game(4, 3, frozenset((4,)), {v: [shared] for v, (shared, _) in shown.items()}, answers)
        same = repr((game.masked, sorted(answers.items())))
        if same not in known and leaks(game, plain, 2):
            return
        known.add(same)
    pytest.fail("nothing leaked")
