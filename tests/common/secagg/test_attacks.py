"""What a coordinator, its colluders or a broken site try, against the state machines: each is refused by its word.

`refused` (parties.py) asks twice and compares the site's whole state before and after: nothing was released, nothing
forgotten. Attacks on a site's folder are in tests/client/test_sharing.py; bytes that are none in test_fuzz.py.
"""

import base64
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, combinations, product

import numpy as np
import pytest
from wardround.common.errors import ConfigError, SumError, VerificationError, WardroundError
from wardround.common.fixedpoint import FixedPoint, check_counts, rounding_key
from wardround.common.identity import Card, Identity
from wardround.common.roster import Member, Roster
from wardround.common.secagg import client_state, masking, shamir
from wardround.common.secagg.client_state import CIPHERTEXT_BYTES, Membership, pair_key, self_key, statement
from wardround.common.secagg.keys import (
    COUNTS,
    UPDATE,
    Advert,
    AttemptKeys,
    Binding,
    Giving,
    bitmap,
    members_of,
    quorums_meet,
    smallest_threshold,
)
from wardround.common.secagg.server_state import Attempt

from .parties import BINDING, Party, Relay, as_lists, changed, identity, parties, plain_sum, refused, relay, tape

STRANGER = Identity.from_seed(b"s" * 32)


def threshold_of(n: int, colluders: int) -> int:
    found = smallest_threshold(n, colluders)
    assert found is not None
    return found


def begun(sites: list[Party], until: int, *, colluders: int = 1, binding: Binding = BINDING) -> Relay:
    """An honest coordinator after exchanges 1 to `until`."""
    made = relay(sites, threshold_of(len(sites), colluders), binding=binding)
    made.run(until)
    return made


def listed(adverts: Iterable[bytes]) -> bytes:
    return b"".join(sorted(adverts, key=lambda advert: advert[183:215]))


def signed_advert(site: Party, binding: Binding = BINDING, name: str = "new", **parts: bytes) -> bytes:
    """An advert that a colluder really signed, with whatever it likes in it."""
    advert = Advert.make(binding, 3, AttemptKeys.fresh(tape(name)), site.identity.key)
    unsigned = replace(advert, **parts)  # pyright: ignore[reportArgumentType]
    return replace(unsigned, signature=site.identity.key.sign(unsigned._signed())).to_bytes()


def subsets(items: Iterable[int], least: int = 0) -> Iterator[tuple[int, ...]]:
    pool = tuple(items)
    return chain.from_iterable(combinations(pool, size) for size in range(least, len(pool) + 1))


# ---- Keys


def test_swapped_keys_are_found_by_the_members_signature():
    sites = parties(5)
    adverts = [site.keys(BINDING) for site in sites]
    for start in (215, 247, 279):  # encryption key, mask key, commitment
        attacker = signed_advert(sites[4], name="attacker")
        bent = adverts[1][:start] + attacker[start : start + 32] + adverts[1][start + 32 :]
        refused("signature", sites[0], lambda bent=bent: sites[0].shares(4, listed([adverts[0], bent, *adverts[2:]])))


def test_keys_replayed_from_an_earlier_attempt_round_or_run_are_refused():
    sites = parties(5)
    adverts = {site: site.keys(changed(attempt=2)) for site in sites}
    for other in (changed(round_index=0), changed(run_id=b"x" * 16), BINDING):
        old = signed_advert(sites[1], other)
        bent = listed([old if site is sites[1] else advert for site, advert in adverts.items()])
        refused("other-sum", sites[0], lambda bent=bent: sites[0].shares(4, bent))


def test_a_sites_own_keys_of_an_earlier_attempt_are_refused():
    sites = parties(5)
    sites[0].keys(BINDING)
    adverts = [site.keys(changed(attempt=2)) for site in sites]
    bent = listed([signed_advert(sites[0], changed(attempt=2)), *adverts[1:]])
    refused("own-keys", sites[0], lambda: sites[0].shares(4, bent))
    refused("own-keys", sites[0], lambda: sites[0].shares(3, listed(adverts[1:])))


def test_unsigned_keys_are_refused():
    sites = parties(5)
    adverts = [site.keys(BINDING) for site in sites]
    for signature in (bytes(64), STRANGER.key.sign(adverts[1][:311]), adverts[2][311:]):
        bent = listed([adverts[0], adverts[1][:311] + signature, *adverts[2:]])
        refused("signature", sites[0], lambda bent=bent: sites[0].shares(4, bent))


def test_keys_of_nobody_on_the_pinned_roster_are_refused():
    sites = parties(5)
    outsider = Party(STRANGER, sites[0].members, sites[0].ring, sites[0].tail, tape("outsider"))
    adverts = [site.keys(BINDING) for site in sites]
    refused("unknown-member", sites[0], lambda: sites[0].shares(4, listed([*adverts, outsider.keys(BINDING)])))
    # Revoked since: its keys are good ones, and it is no longer active.
    sites[0].members = replace(sites[0].members, active=sites[0].members.active - {sites[2].id})
    refused("unknown-member", sites[0], lambda: sites[0].shares(4, listed(adverts)))


def test_a_key_list_in_which_two_members_have_one_key_is_refused():
    """Who knows one member's keys would be another one, too."""
    sites = parties(5)
    adverts = [site.keys(BINDING) for site in sites]
    honest = Advert.from_bytes(adverts[1])
    for parts in (
        {"mask_key": honest.mask_key},
        {"encryption_key": honest.mask_key},
        {"encryption_key": honest.encryption_key},
        {"commitment": honest.commitment},
    ):
        bent = listed([*adverts[:4], signed_advert(sites[4], **parts)])
        refused("repeated-key", sites[0], lambda bent=bent: sites[0].shares(4, bent))


# ---- Roster, parameters


def test_a_roster_with_an_extra_or_a_missing_member_stops_every_site_before_anything_is_shared():
    coordinator, identities = Identity.from_seed(b"k" * 32), [identity(i) for i in range(5)]
    cards = [Card.make(one, f"site-{i}") for i, one in enumerate(identities)]
    whole = Roster.first(coordinator, "all", cards)
    extra = whole.adding(coordinator, [Card.make(STRANGER, "stranger")])
    missing = Roster.first(coordinator, "all", cards[:4])
    assert len({whole.digest, extra.digest, missing.digest}) == 3
    for other in (extra, missing):
        sites = parties(5)
        adverts = [
            site.keys(changed(roster=(other if site is sites[3] else whole).digest)) for site in sites
        ]  # fmt: skip
        for site in sites:
            refused("other-roster", site, lambda site=site, adverts=adverts: site.shares(4, listed(adverts)))


def test_a_roster_that_was_changed_after_it_was_signed_is_none():
    coordinator = Identity.from_seed(b"k" * 32)
    roster = Roster.first(coordinator, "all", [Card.make(identity(i), f"site-{i}") for i in range(3)])
    extra = tuple(sorted((*roster.members, Member("stranger", STRANGER.id)), key=lambda member: member.id))
    for members in (extra, roster.members[1:]):
        forged = replace(roster, members=members)
        with pytest.raises(VerificationError):
            Roster.parse(forged.to_json().encode(), "roster.json")


@pytest.mark.parametrize("what", ["model", "config", "input", "roster"])
def test_another_model_config_input_or_roster_at_one_site_makes_every_site_abort_with_its_name(what: str):
    sites = parties(5)
    adverts = [site.keys(changed(**{what: b"x" * 32}) if site is sites[2] else BINDING) for site in sites]
    for site in sites:
        refused(f"other-{what}", site, lambda site=site: site.shares(4, listed(adverts)))
    attempt = Attempt(BINDING)
    with pytest.raises(SumError) as caught:  # the coordinator's own look at it
        attempt.add_advert(sites[2].id, adverts[2])
    assert caught.value.code == f"other-{what}" and attempt.adverts == {}


@pytest.mark.parametrize("n", range(3, 10))
@pytest.mark.parametrize("c", range(1, 4))
def test_sites_take_a_threshold_exactly_where_two_quorums_meet_in_an_honest_member(n: int, c: int):
    """The edge of 2t > n + c + f, with every number f of members that a site has not verified."""
    for f in range(n - 2):
        sites = parties(n, c, min_sites=3)
        trusted = frozenset(site.id for site in sites[: n - f])
        adverts = listed(site.keys(BINDING) for site in sites)
        sites[0].members = replace(sites[0].members, verified=trusted)
        accepted = []
        for t in range(n + 2):
            try:
                before = sites[0].state
                sites[0].shares(t, adverts)
                sites[0].sums = dict.fromkeys(sites[0].sums, before)
                accepted.append(t)
            except SumError as error:
                assert error.code == ("threshold" if t else "malformed")
        # Two quorums of t, all colluders and unverified members signing both: an honest one must be in both. And a sum
        # holds two honest members.
        fine = [t for t in range(n + 1) if 2 * (t - c - f) > n - c - f and t - c - f >= 2]
        assert accepted == fine
        if f == 0:
            assert smallest_threshold(n, c) == min(fine, default=None)


@pytest.mark.parametrize("threshold", [-(2**63), -1, 0, 2**16, 2**32, 2**63 - 1])
def test_a_threshold_that_is_no_number_of_members_is_refused(threshold: int):
    sites = parties(5)
    adverts = listed(site.keys(BINDING) for site in sites)
    error = refused("malformed", sites[0], lambda: sites[0].shares(threshold, adverts))
    assert "threshold" in str(error)


def test_a_threshold_or_cohort_below_the_sites_own_minimum_is_refused():
    sites = parties(5, 2)
    adverts = listed(site.keys(BINDING) for site in sites)
    refused("threshold", sites[0], lambda: sites[0].shares(3, adverts))  # enough for c = 0
    sites[0].members = replace(sites[0].members, min_sites=6)
    refused("threshold", sites[0], lambda: sites[0].shares(4, adverts))
    few = parties(4, 1, min_sites=5)
    adverts = listed(site.keys(BINDING) for site in few)
    refused("threshold", few[0], lambda: few[0].shares(3, adverts))


def test_recipients_and_survivors_below_the_sites_own_minimum_are_refused():
    sites = parties(7, 1, min_sites=6)
    run = begun(sites, 2)
    there = [0, 1, 2, 3, 4]
    sealed = b"".join(run.attempt._sealed[u][-1 if u == 0 else 0] for u in there if u != 0)
    refused("threshold", sites[0], lambda: sites[0].masked(bitmap(there, 7), sealed))
    run.masked()
    refused("threshold", sites[0], lambda: sites[0].consistency(bitmap(there, 7)))


def test_a_recipients_wish_for_more_survivors_is_enforced_by_those_who_sign():
    sites = parties(6, 1)
    sites[5].members = replace(sites[5].members, min_sites=6)
    run = relay(sites, 4)
    run.run(3)
    # Site 6 is not asked to sign, so its own policy is not: the others refuse in its place.
    refused("threshold", sites[0], lambda: sites[0].consistency(bitmap(range(5), 6)))
    run.consistency()
    assert as_lists(run.unmask()) == plain_sum(sites)


def test_hospitals_that_the_coordinator_invented_count_as_colluders():
    """Sybils on a roster that everybody pinned: t must rise with them, and reaches no quorum of theirs."""
    invented = [Party(identity(100 + i), parties(1)[0].members, *([np.zeros(0)] * 2), tape(str(i))) for i in range(6)]  # pyright: ignore[reportArgumentType]
    ids = [one.id for one in invented]
    for many in range(1, 7):
        sites = parties(5, 1, extra=ids)
        adverts = [site.keys(BINDING) for site in sites]
        fakes = [signed_advert(one, name=one.id.hex()) for one in invented[:many]]
        n = 5 + many
        for t in range(1, n + 1):
            honest_quorum = 2 * t > n + 1 + many and t - 1 - many >= 2
            if not honest_quorum or n < sites[0].members.min_survivors:
                bent, site = listed([*adverts, *fakes]), sites[0]
                refused("threshold", site, lambda t=t, bent=bent, site=site: site.shares(t, bent))
        # min_survivors counts all of them as if they were in the sum.
        assert Advert.from_bytes(adverts[0]).min_survivors == 3 + 6


# ---- Survivors


def test_a_second_set_of_survivors_is_refused():
    sites = parties(5)
    run = begun(sites, 3)
    sites[0].consistency(run.said["survivors"])
    for members in subsets(range(5)):
        if len(members) < 5:
            refused("survivors", sites[0], lambda members=members: sites[0].consistency(bitmap(members, 5)))
    sites[0].restart()
    refused("survivors", sites[0], lambda: sites[0].consistency(bitmap(range(4), 5)))


def both_ways(n: int, colluders: int, victim: int) -> tuple[int, int]:
    """The most signatures for the victim alive, and for it dropped, over all ways to show honest sites one of the two.

    Colluders sign both. Returns the largest smaller one, and how many ways there are.
    """
    honest = list(range(colluders, n))
    best, ways = 0, 0
    for shown in product([True, False], repeat=len(honest)):
        ways += 1
        alive = colluders + sum(shown)
        dropped = colluders + sum(not show for show, site in zip(shown, honest, strict=True) if site != victim)
        best = max(best, min(alive, dropped))
    return best, ways


@pytest.mark.parametrize(("n", "c"), [(3, 1), (4, 1), (5, 1), (5, 2), (6, 2), (7, 2), (8, 3), (9, 3)])
def test_a_site_cannot_be_made_both_alive_and_dropped(n: int, c: int):
    """Both the self seed and the mask key of one site would show its payload; each takes t signatures first."""
    t = threshold_of(n, c)
    best, ways = both_ways(n, c, n - 1)
    assert best < t and ways == 2 ** (n - c)


def test_showing_half_of_the_sites_other_survivors_gives_nobodys_shares():
    n, c = 5, 2
    for split in subsets(range(c, n - 1)):
        sites = parties(n, c)
        run = begun(sites, 3, colluders=c)
        keys, recipients = run.attempt.keys, run.said["recipients"]
        whole, without = bitmap(range(n), n), bitmap(range(n - 1), n)
        signatures: dict[bytes, dict[int, bytes]] = {whole: {}, without: {}}
        for i, site in enumerate(sites):
            shown = without if i in split else whole
            signatures[shown][i] = site.consistency(shown)
        for i in range(c):  # colluders sign whatever is wanted
            for said, found in signatures.items():
                found[i] = sites[i].identity.key.sign(statement(keys, recipients, said))
        opened = set()
        for site in sites[c:]:
            for said, found in signatures.items():
                signers = bitmap(found, n), b"".join(found[i] for i in sorted(found))
                try:
                    site.unmask(*signers)
                    opened.add(said)
                except SumError as error:
                    assert error.code in ("threshold", "signature", "malformed", "out-of-turn")
        assert len(opened) <= 1


def test_no_answer_holds_both_shares_of_one_member():
    sites = parties(5)
    run = relay(sites, 4, gone={3: [sites[1].id]})
    run.run(4)
    state = sites[0].state
    pairs = dict(zip(members_of(state.recipients, 5), state.shares, strict=True))
    answer = sites[0].unmask(run.said["signers"], run.said["signatures"])
    values = [answer[i : i + 33] for i in range(0, len(answer), 33)]
    for member, value in enumerate(values):
        wanted = pairs[member][33:] if member == 1 else pairs[member][:33]
        assert value == wanted
    assert sites[0].state.shares == () and sites[0].state.secrets is None


def test_a_second_unmask_request_is_refused_and_the_same_one_gets_the_same_bytes():
    sites = parties(5)
    run = begun(sites, 4)
    signers, signatures = run.said["signers"], run.said["signatures"]
    first = sites[0].unmask(signers, signatures)
    fewer = bitmap(range(4), 5), signatures[: 4 * 64]
    refused("out-of-turn", sites[0], lambda: sites[0].unmask(*fewer))
    refused("out-of-turn", sites[0], lambda: sites[0].unmask(b"", b""))
    sites[0].restart()
    assert sites[0].unmask(signers, signatures) == first
    refused("survivors", sites[0], lambda: sites[0].consistency(bitmap(range(4), 5)))


def test_unmasking_without_a_quorum_of_signatures_is_refused():
    sites = parties(5)
    run = begun(sites, 4)
    signatures = run.said["signatures"]
    each = [signatures[i : i + 64] for i in range(0, len(signatures), 64)]
    said = statement(run.attempt.keys, run.said["recipients"], run.said["survivors"])
    for members in subsets(range(5)):
        if len(members) < 4:
            chosen = b"".join(each[i] for i in members)
            refused("threshold", sites[0], lambda m=members, c=chosen: sites[0].unmask(bitmap(m, 5), c))
    forged = b"".join([*each[:3], STRANGER.key.sign(said)])
    refused("signature", sites[0], lambda: sites[0].unmask(bitmap(range(4), 5), forged))
    other = statement(run.attempt.keys, run.said["recipients"], bitmap(range(4), 5))
    forged = b"".join([*each[:3], sites[3].identity.key.sign(other)])
    refused("signature", sites[0], lambda: sites[0].unmask(bitmap(range(4), 5), forged))


def test_signatures_of_members_that_were_not_verified_count_for_nothing():
    sites = parties(5)
    run = begun(sites, 4)
    site, signatures = sites[0], run.said["signatures"]
    site.members = replace(site.members, verified=frozenset(one.id for one in sites[:4]))
    unverified = bitmap((0, 1, 2, 4), 5), signatures[: 3 * 64] + signatures[4 * 64 :]
    refused("threshold", site, lambda: site.unmask(*unverified))
    assert site.unmask(bitmap(range(4), 5), signatures[: 4 * 64])


def test_a_survivor_that_is_no_recipient_is_refused():
    sites = parties(5)
    run = relay(sites, 4, gone={2: [sites[4].id]})
    run.run(3)
    refused("malformed", sites[0], lambda: sites[0].consistency(bitmap(range(5), 5)))


# ---- Shares and masked vectors


def bent_shares(kind: str, sealed: list[bytes]) -> bytes:
    first, second, *rest = sealed
    bent: dict[str, Callable[[], list[bytes]]] = {
        "tampered": lambda: [bytes([first[0] ^ 1]) + first[1:], second, *rest],
        "tampered tag": lambda: [first[:-1] + bytes([first[-1] ^ 1]), second, *rest],
        "truncated": lambda: [first[:-1], second, *rest],
        "reordered": lambda: [second, first, *rest],
        "repeated": lambda: [first, first, *rest],
        "left out": lambda: [second, *rest],
        "one too many": lambda: [*sealed, first],
        "zeros": lambda: [bytes(len(first)), second, *rest],
    }
    return b"".join(bent[kind]())


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("tampered", "share"),
        ("tampered tag", "share"),
        ("truncated", "malformed"),
        ("reordered", "share"),
        ("repeated", "share"),
        ("left out", "malformed"),
        ("one too many", "malformed"),
        ("zeros", "share"),
    ],
)
def test_a_bent_share_is_refused(kind: str, code: str):
    sites = parties(5)
    run = begun(sites, 2)
    whole = run.attempt.ciphertexts_for(sites[0].id)
    sealed = [whole[i : i + CIPHERTEXT_BYTES] for i in range(0, len(whole), CIPHERTEXT_BYTES)]
    refused(code, sites[0], lambda: sites[0].masked(run.said["recipients"], bent_shares(kind, sealed)))
    run.masked()  # what was refused changed nothing: the good one still works
    run.consistency()
    assert as_lists(run.unmask()) == plain_sum(sites)


def test_shares_of_another_attempt_or_for_another_member_do_not_open():
    sites = parties(5)
    first = begun(sites, 2)
    second = begun(sites, 2, binding=changed(attempt=2))
    me = sites[0].id
    for bent in (first.attempt.ciphertexts_for(me), second.attempt.ciphertexts_for(sites[1].id)):
        refused("share", sites[0], lambda bent=bent: sites[0].masked(second.said["recipients"], bent))


def test_a_second_answer_to_any_exchange_is_refused():
    """Each exchange is answered once, before anything else is looked at."""
    sites = parties(6)
    run = begun(sites, 1)
    site, key_list = sites[0], run.said["key_list"]
    refused("out-of-turn", site, lambda: site.keys(changed(input=b"x" * 32)))
    run.shares()
    refused("out-of-turn", site, lambda: site.shares(5, key_list))
    refused("out-of-turn", site, lambda: site.shares(4, key_list[:-375]))
    refused("out-of-turn", site, lambda: site.shares(4, b""))
    run.masked()
    refused("out-of-turn", site, lambda: site.masked(bitmap(range(5), 6), b""))
    refused("out-of-turn", site, lambda: site.masked(b"", b""))


@pytest.mark.parametrize("stage", range(5))
def test_exchanges_out_of_order_are_refused(stage: int):
    sites = parties(5)
    made = begun(parties(5), 4)  # the same requests as below, from the same tapes
    made_ciphertexts = begun(parties(5), 2).attempt.ciphertexts_for(sites[0].id)
    begun(sites, stage)
    said, site = made.said, sites[0]
    site.now = site.now or (BINDING.run_id, BINDING.round_index, BINDING.purpose)
    asks: dict[int, Callable[[], object]] = {
        2: lambda: site.shares(4, said["key_list"]),
        3: lambda: site.masked(said["recipients"], made_ciphertexts),
        4: lambda: site.consistency(said["survivors"]),
        5: lambda: site.unmask(said["signers"], said["signatures"]),
    }
    for exchange, ask in asks.items():
        if exchange > stage + 1 and site.state.advert:
            refused("out-of-turn", site, ask)
    if stage == 0:
        for exchange in (2, 4, 5):
            refused("out-of-turn", site, asks[exchange])


@pytest.mark.parametrize("length", [0, 1, 9, 11, 12])
def test_a_masked_vector_of_the_wrong_length_is_left_out_of_the_sum(length: int):
    sites = parties(5)
    run = begun(sites, 2)
    with pytest.raises(SumError, match="malformed"):
        run.attempt.add_masked(sites[0].id, np.zeros(length, np.uint32))
    for dtype in (np.int32, np.float32, np.uint64):
        with pytest.raises(SumError, match="malformed"):
            run.attempt.add_masked(sites[0].id, np.zeros(10, dtype))  # pyright: ignore[reportArgumentType]
    run.gone = {3: [sites[0].id]}
    run.masked()
    run.consistency()
    assert as_lists(run.unmask()) == plain_sum(sites[1:])


def test_a_masked_vector_that_comes_twice_or_late_changes_no_sum():
    sites = parties(5)
    run = begun(sites, 2)
    vectors = {site: site.masked(run.said["recipients"], run.attempt.ciphertexts_for(site.id)) for site in sites}
    for site in sites[:4]:
        run.attempt.add_masked(site.id, vectors[site])
        with pytest.raises(SumError, match="out-of-turn"):
            run.attempt.add_masked(site.id, vectors[site])
    run.said["survivors"] = run.attempt.close_sum()
    with pytest.raises(SumError, match="out-of-turn"):
        run.attempt.add_masked(sites[4].id, vectors[sites[4]])
    run.consistency()
    assert as_lists(run.unmask()) == plain_sum(sites[:4])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_an_update_that_is_not_finite_is_refused_and_stays_as_it_was(value: float, place: int):
    vector = np.linspace(-1, 1, 1000, dtype=np.float32)
    vector[place] = value
    before, tail = vector.copy(), np.ones(2, np.uint64)
    keys = [bytes([i]) * 32 for i in (1, 2)]
    with pytest.raises(VerificationError):
        masking.quantise_and_mask(vector, tail, FixedPoint(1.0, 8, 1.0), 1.0, rounding_key(0, "a", 1), keys, [])
    assert vector.tobytes() == before.tobytes() and tail.tolist() == [1, 1]


def test_an_update_out_of_range_is_clipped_and_counted():
    vector, tail = np.array([3.0, -3.0, 0.5, 1e30], np.float32), np.zeros(1, np.uint64)
    fixed_point, keys = FixedPoint(1.0, 8, 1.0), [b"k" * 32]
    ring, clipped = masking.quantise_and_mask(
        vector, tail, fixed_point, 1.0, rounding_key(0, "a", 1), keys, [], clipped_slot=0
    )
    assert clipped == 3
    masking.apply(ring, tail, [], keys)
    assert tail.tolist() == [3]
    mean = fixed_point.mean(ring, 1.0)
    assert np.allclose(mean, [1, -1, 0.5, 1], atol=1e-6)


def test_counts_tail_values_and_weights_that_could_overflow_are_refused():
    with pytest.raises(VerificationError):
        check_counts(np.array([0, 2**30], np.uint32), 8)
    vector, keys = np.zeros(4, np.float32), [b"k" * 32]
    with pytest.raises(VerificationError):
        masking.quantise_and_mask(
            vector, np.array([2**40 + 1], np.uint64), FixedPoint(1.0, 8, 2.0), 1.0, b"r" * 32, keys, []
        )
    for weight in (0.0, 3.0, np.nan, np.inf, -1.0):
        with pytest.raises(ConfigError):
            masking.quantise_and_mask(
                vector, np.zeros(1, np.uint64), FixedPoint(1.0, 8, 2.0), weight, b"r" * 32, keys, []
            )
    assert not vector.any()


# ---- Wrong shares


def lying(sites: list[Party], run: Relay, lies: dict[int, list[int]], byte: int = 16) -> dict[int, bytes]:
    """Answers, with a wrong share of every dealer that a holder lies about."""
    answers = {}
    for i, site in enumerate(sites):
        answer = bytearray(site.unmask(run.said["signers"], run.said["signatures"]))
        for dealer in lies.get(i, []):
            answer[33 * dealer + (byte and byte + i)] ^= 1  # each liar elsewhere: errors that cancel do no harm
        answers[i] = bytes(answer)
    return answers


@pytest.mark.parametrize("dropped", [None, 2])
@pytest.mark.parametrize("liar", [0, 3])
@pytest.mark.parametrize("dealer", [0, 1, 2])
def test_a_wrong_share_is_found_and_its_pair_named_and_the_sum_is_right(dropped: int | None, liar: int, dealer: int):
    """Seven sites, t = 5 of c = 2: against the commitment of a survivor, the public key of one that dropped out."""
    sites = parties(7, 2)
    run = relay(sites, 5, gone={} if dropped is None else {3: [sites[dropped].id]})
    run.run(4)
    there = [site for i, site in enumerate(sites) if i != dropped]
    for i, answer in lying(there, run, {there.index(sites[liar]): [dealer]}).items():
        run.attempt.add_answer(there[i].id, answer)
    assert as_lists(run.attempt.unmask()) == plain_sum(there)
    assert run.attempt.misfits == ((sites[dealer].id, sites[liar].id),)


def test_fewer_than_t_answers_release_nothing():
    sites = parties(5)
    run = begun(sites, 4)
    for site in sites[:3]:
        run.attempt.add_answer(site.id, site.unmask(run.said["signers"], run.said["signatures"]))
    before = run.attempt.to_record()[1]["ring"].tobytes()
    with pytest.raises(SumError) as caught:
        run.attempt.unmask()
    assert caught.value.code == "threshold"
    assert run.attempt.to_record()[1]["ring"].tobytes() == before
    run.attempt.add_answer(sites[3].id, sites[3].unmask(run.said["signers"], run.said["signatures"]))
    assert as_lists(run.attempt.unmask()) == plain_sum(sites)


def test_a_lie_in_the_bits_that_x25519_ignores_leaves_the_sum_right():
    """32 integers have one public key, so a small lie about a mask key may fit, and an honest share be off then: the
    name is the other's, the sum is not touched (shamir.reconstruct says so)."""
    sites = parties(7, 2)
    run = relay(sites, 5, gone={3: [sites[2].id]})
    run.run(4)
    there = [site for i, site in enumerate(sites) if i != 2]
    for i, answer in lying(there, run, {0: [2]}, byte=0).items():
        run.attempt.add_answer(there[i].id, answer)
    assert as_lists(run.attempt.unmask()) == plain_sum(there)
    assert {dealer for dealer, _ in run.attempt.misfits} <= {sites[2].id}


def test_wrong_shares_release_nothing_once_fewer_than_t_good_answers_are_left():
    sites = parties(5)
    run = begun(sites, 4)
    for i, answer in lying(sites, run, {0: [2], 1: [2]}).items():
        run.attempt.add_answer(sites[i].id, answer)
    with pytest.raises(SumError) as caught:
        run.attempt.unmask()
    assert caught.value.code == "share" and run.attempt.misfits == ()
    masked = run.attempt.to_record()[1]["ring"].view(np.uint32).tolist()
    assert masked != plain_sum(sites)[0]


def test_a_dealer_that_lies_to_one_site_is_named_with_it_and_does_not_stop_the_sum():
    sites = parties(5)
    run = begun(sites, 1)
    key_list = run.said["key_list"]
    sealed = {site: site.shares(4, key_list) for site in sites}
    # The dealer seals a share off its polynomial for the last site.
    dealer, fooled = sites[0], sites[4]
    keys, state = run.attempt.keys, dealer.state
    assert state.secrets is not None
    key = client_state._share_key(keys, state.secrets, 0, 4, sending=True)
    data = client_state._share_data(keys, 0, 4)
    gcm = client_state.AESGCM(key)
    pair = gcm.decrypt(bytes(12), sealed[dealer][-CIPHERTEXT_BYTES:], data)
    wrong = shamir.to_bytes((shamir.from_bytes(pair[:33]) + 1) % shamir.PRIME) + pair[33:]
    sealed[dealer] = sealed[dealer][:-CIPHERTEXT_BYTES] + gcm.encrypt(bytes(12), wrong, data)
    for site, ciphertexts in sealed.items():
        run.attempt.add_shares(site.id, ciphertexts)
    run.said["recipients"] = run.attempt.close_shares()
    run.masked()
    run.consistency()
    assert as_lists(run.unmask()) == plain_sum(sites)
    assert run.attempt.misfits == ((dealer.id, fooled.id),)


# ---- Differencing


def test_the_quorums_of_two_attempts_that_share_no_honest_site_are_refused():
    """Attempt 1 with {X, 1, 2, 3} and t = 3, attempt 2 with {X, 1 … 5} and t = 4: X would be in both sums, and their
    difference, with the colluder's payload, is one of 4 and 5."""
    sites = parties(6, 1)
    few = relay(sites[:4], 3)
    few.run(3)
    more = relay(sites, 4, binding=changed(attempt=2))
    more.run(2)
    for site in sites[:4]:
        sealed = more.attempt.ciphertexts_for(site.id)
        refused("difference", site, lambda site=site, sealed=sealed: site.masked(more.said["recipients"], sealed))
    # Nothing forbids the larger threshold: then any two quorums meet.
    again = relay(sites, 5, binding=changed(attempt=3))
    assert as_lists(again.run()) == plain_sum(sites)  # pyright: ignore[reportArgumentType]


def test_the_quorums_of_two_runs_that_share_no_honest_site_are_refused():
    """Counts are the same in every run over the same registry, whatever its model."""
    sites = parties(6, 1)
    relay(sites[:4], 3).run(3)
    other = changed(run_id=b"y" * 16, model=b"x" * 32, config=b"x" * 32, round_index=0)
    more = relay(sites, 4, binding=other)
    more.run(2)
    sealed = more.attempt.ciphertexts_for(sites[0].id)
    refused("difference", sites[0], lambda: sites[0].masked(more.said["recipients"], sealed))


def test_the_same_payload_is_signed_into_no_second_sum_with_other_survivors():
    sites = parties(6, 1)
    relay(sites[:4], 3).run()
    other = relay(sites, 5, binding=changed(run_id=b"y" * 16))
    other.run(3)
    for site in sites[:4]:
        refused("difference", site, lambda site=site: site.consistency(other.said["survivors"]))
    with pytest.raises(SumError, match="difference"):
        other.consistency()
    # The same survivors once more tell nothing new.
    same = relay(sites[:4], 3, binding=changed(run_id=b"z" * 16))
    assert as_lists(same.run()) == plain_sum(sites[:4])  # pyright: ignore[reportArgumentType]


def test_another_payload_is_free_to_go_into_another_sum():
    sites = parties(6, 1)
    relay(sites[:4], 3).run()
    for site in sites:
        site.ring = site.ring + np.uint32(1)
    other = relay(sites, 4, binding=changed(run_id=b"y" * 16))
    assert as_lists(other.run()) == plain_sum(sites)  # pyright: ignore[reportArgumentType]


def test_after_signing_a_site_joins_no_other_attempt_of_the_sum():
    sites = parties(5)
    run = begun(sites, 4)
    for attempt in (1, 2, 2**32 - 1):
        binding = changed(attempt=attempt, input=b"x" * 32)
        refused("out-of-turn", sites[0], lambda binding=binding: sites[0].keys(binding))
    assert sites[0].keys(BINDING) == run.attempt.adverts[sites[0].id].to_bytes()
    assert as_lists(run.unmask()) == plain_sum(sites)
    refused("out-of-turn", sites[0], lambda: sites[0].keys(changed(attempt=2)))


def test_a_new_attempt_closes_the_one_before_for_good():
    sites = parties(5)
    first = begun(sites, 3)
    second = begun(sites, 1, binding=changed(attempt=2))
    site = sites[0]
    assert site.state.secrets is not None
    refused("out-of-turn", site, lambda: site.keys(BINDING))
    refused("out-of-turn", site, lambda: site.consistency(first.said["survivors"]))
    refused("other-sum", site, lambda: site.shares(4, first.said["key_list"]))
    second.shares()
    refused("out-of-turn", site, lambda: site.consistency(first.said["survivors"]))


@pytest.mark.parametrize("c", [1, 2])
def test_sites_mask_again_exactly_where_any_two_quorums_share_an_honest_site(c: int):
    """Brute force over quorums, for lists of up to six: every t' of the second list, every c."""
    everyone = frozenset(bytes([i]) for i in range(6))
    for size in (4, 5, 6):
        first, second = frozenset(sorted(everyone)[:size]), everyone
        for t1, t2 in product(range(1, size + 1), range(1, 7)):
            met = quorums_meet(Giving(t1, first), Giving(t2, second), everyone, c)
            # The worst case: the two quorums overlap as little as they can, and c of the overlap collude.
            overlap = min(
                len(set(a) & set(b)) for a in combinations(sorted(first), t1) for b in combinations(sorted(second), t2)
            )
            assert not met or overlap > c
            assert met == (t1 + t2 > 6 + c)


# ---- Collusion


class View:
    """What the coordinator and its colluders hold after a whole attempt."""

    def __init__(self, sites: list[Party], colluding: Iterable[int], run: Relay, masked: dict[int, np.ndarray]) -> None:
        self.sites, self.run, self.masked = sites, run, masked
        self.colluding = frozenset(colluding)
        self.keys = run.attempt.keys

    def unmasked(self, members: Iterable[int], dropped: Iterable[int], secrets: dict[int, AttemptKeys]) -> np.ndarray:
        """The sum of some honest sites' masked vectors without every mask that the adversary can compute."""
        chosen = list(members)
        total = np.zeros_like(self.masked[chosen[0]])
        d = BINDING.ring_values
        for i in chosen:
            total[:d] += self.masked[i][:d]
            total[d:].view(np.uint64)[:] += self.masked[i][d:].view(np.uint64)
        plus: list[bytes] = []
        minus = [self_key(self.keys, secrets[i].self_seed, i) for i in chosen]  # opened in exchange 5
        for i in chosen:
            for other in (*self.colluding, *dropped):
                key = pair_key(self.keys, secrets[other].mask_key, other, i)
                (minus if other > i else plus).append(key)
        masking.apply(total[:d], total[d:].view(np.uint64), plus, minus)
        return total


@pytest.mark.parametrize("dropped", [(), (6,)])
def test_coordinator_and_colluders_see_no_sum_but_the_whole_honest_one(dropped: tuple[int, ...]):
    """Seven sites, two colluders, t = 5: from what all of them hold, every proper subset of the honest survivors stays
    masked by a pair key that only honest sites know, and the whole of them is their sum."""
    sites = parties(7, 2)
    masked: dict[int, np.ndarray] = {}
    run = relay(sites, 5, gone={3: [sites[i].id for i in dropped]})
    run.keys()
    run.shares()
    secrets = {i: site.state.secrets for i, site in enumerate(sites)}
    for i, site in enumerate(sites):
        if i not in dropped:
            masked[i] = site.masked(run.said["recipients"], run.attempt.ciphertexts_for(site.id))
    run.masked()
    run.consistency()
    assert as_lists(run.unmask()) == plain_sum(site for i, site in enumerate(sites) if i not in dropped)
    view = View(sites, (0, 1), run, masked)
    honest = [i for i in range(2, 7) if i not in dropped]
    d = BINDING.ring_values
    for members in subsets(honest, 1):
        seen = view.unmasked(members, dropped, secrets)  # pyright: ignore[reportArgumentType]
        found = seen[:d].tolist(), seen[d:].view(np.uint64).tolist()
        if len(members) == len(honest):
            assert found == plain_sum(sites[i] for i in members)
        else:  # 8 values of which none is the true one: 2^-32 each by chance
            assert not any(
                a == b for a, b in zip(chain(*found), chain(*plain_sum(sites[i] for i in members)), strict=True)
            )


def test_colluders_hold_too_few_shares_of_any_honest_mask_key():
    """Fewer than t shares fit every secret; the whole attempt gives none away but the colluders' own."""
    n, c = 5, 2
    t = threshold_of(n, c)
    sites = parties(n, c)
    run = begun(sites, 2, colluders=c)
    secrets = [site.state.secrets for site in sites]
    run.masked()
    pairs = [dict(zip(members_of(site.state.recipients, n), site.state.shares, strict=True)) for site in sites]
    run.consistency()
    run.unmask()
    for honest in range(c, n):
        held = {i + 1: shamir.from_bytes(pairs[i][honest][33:]) for i in range(c)}
        assert len(held) < t
        for other in (0, 1, 2**256 - 1):  # a polynomial of degree t - 1 has room for any secret, with any share left
            points = {0: other, **held, n + 1: 5}
            value = shamir.interpolate(points, 1)
            assert len(points) <= t and value == held[1]
        found = secrets[honest]
        assert found is not None
        with pytest.raises(VerificationError):
            shamir.reconstruct(held, t, lambda value: True)


def transcript(sites: list[Party], until: int = 5) -> dict[str, object]:
    run, seen = relay(sites, threshold_of(len(sites), 2)), dict[str, object]()
    run.keys()
    seen["adverts"] = run.said["key_list"]
    run.shares()
    seen["sealed"] = {site.id: run.attempt.ciphertexts_for(site.id) for site in sites}
    seen["masked"] = {
        site.id: site.masked(run.said["recipients"], run.attempt.ciphertexts_for(site.id)).copy() for site in sites
    }
    seen["colluders"] = [site.state.to_json() for site in sites[:2]]
    run.masked()
    seen["signed"] = run.consistency()
    seen["answers"] = {site.id: site.unmask(run.said["signers"], run.said["signatures"]) for site in sites}
    seen["sum"] = as_lists(run.unmask())
    return seen


def test_two_runs_with_equal_sums_differ_in_masked_vectors_only_and_there_by_what_a_pair_mask_hides():
    """Two honest sites of five, server and the rest watching. The same random bytes, payloads moved between the two:
    all messages are the same but their masked vectors, which differ by ± the move. Each of the two is under a stream
    whose key nobody but they can compute (the tests above): uniform to everybody else, and so is the moved one; their
    sum is the same. That masked vectors hide a payload exactly, over all keys, is tests/test_secure_sums_tiny_ring.py.
    """
    one, two = parties(5, 2), parties(5, 2)
    move = np.arange(1, 1 + BINDING.ring_values, dtype=np.uint32) * np.uint32(0x12345678)
    two[2].ring = two[2].ring + move
    two[4].ring = two[4].ring - move
    first, second = transcript(one), transcript(two)
    moved = {two[2].id: move, two[4].id: -move}
    d = BINDING.ring_values
    for kind, seen in first.items():
        if kind != "masked":
            assert second[kind] == seen, kind
            continue
        for site, vector in seen.items():  # pyright: ignore[reportAttributeAccessIssue]
            other = second["masked"][site]  # pyright: ignore[reportIndexIssue]
            assert (other[:d] - vector[:d] == moved.get(site, np.zeros(d, np.uint32))).all()
            assert (other[d:] == vector[d:]).all()


# ---- Restarts, and what shows


@pytest.mark.parametrize("dropped", [(), (1,)])
def test_a_restart_between_every_two_exchanges_gives_identical_bytes(dropped: tuple[int, ...]):
    """A site that was killed after it wrote its state and before it answered is asked again."""
    straight, halting = parties(5), parties(5)
    runs = []
    for sites in (straight, halting):
        run = relay(sites, 4, gone={3: [sites[i].id for i in dropped]})
        if sites is halting:

            def restart(exchange: int, sites: list[Party] = sites) -> None:
                for site in sites:
                    site.restart()

            run.before = restart
        total = run.run()
        assert total is not None
        runs.append((run.said, as_lists(total)))
    assert runs[0] == runs[1]
    assert runs[0][1] == plain_sum(site for i, site in enumerate(straight) if i not in dropped)
    # What was asked, once more: the same bytes, out of what was read back.
    there, said = next(site for i, site in enumerate(halting) if i not in dropped), runs[1][0]
    replies = []
    for _ in range(2):
        there.restart()
        replies.append(
            (
                there.keys(BINDING),
                there.shares(4, said["key_list"]),
                there.consistency(said["survivors"]),
                there.unmask(said["signers"], said["signatures"]),
            )
        )
    assert replies[0] == replies[1] and replies[0][0] in said["key_list"]


def test_a_coordinator_that_was_killed_after_closing_the_sum_finishes_it():
    sites = parties(5)
    run = begun(sites, 3)
    run.attempt = Attempt.from_record(*run.attempt.to_record())
    run.consistency()
    run.attempt = Attempt.from_record(*run.attempt.to_record())  # signatures are in its journal
    assert as_lists(run.unmask()) == plain_sum(sites)


def spelled(secret: bytes) -> set[str]:
    number = int.from_bytes(secret, "little")
    return {secret.hex(), base64.b64encode(secret).decode()[:40], repr(secret)[2:-1], str(number), f"{number:x}"}


def test_nothing_secret_is_in_a_repr_or_an_error():
    sites = parties(5)
    errors: list[WardroundError] = []

    def tried(ask: Callable[[], object]) -> None:
        with pytest.raises(WardroundError) as caught:
            ask()
        errors.append(caught.value)

    run = begun(sites, 1)
    site = sites[0]
    secrets = site.state.secrets
    assert secrets is not None
    private = [secrets.encryption_key, secrets.mask_key, secrets.self_seed, site.identity.storage_key()]
    private.append(site.identity.key.private_bytes_raw())
    shown = [repr(site.state), repr(secrets)]
    tried(lambda: site.shares(3, run.said["key_list"]))
    run.shares()
    shown.append(repr(site.state))
    private.append(site.state.own_shares)
    sealed = run.attempt.ciphertexts_for(site.id)
    tried(lambda: site.masked(run.said["recipients"], bytes(len(sealed))))
    vector = site.masked(run.said["recipients"], sealed)
    run.masked()
    shown.append(repr(site.state))
    private += [value for pair in site.state.shares for value in (pair[:33], pair[33:], pair)]
    private.append(self_key(run.attempt.keys, secrets.self_seed, 0))
    private += [pair_key(run.attempt.keys, secrets.mask_key, 0, other) for other in range(1, 5)]
    private += [site.ring.tobytes(), vector.tobytes()]
    tried(lambda: site.consistency(bitmap(range(3), 5)))
    run.consistency()
    tried(lambda: site.unmask(bitmap(range(3), 5), run.said["signatures"][: 3 * 64]))
    run.unmask()
    shown.append(repr(site.state))
    texts = shown + [f"{error} {error!r} {error.args} {error.__cause__} {error.__context__}" for error in errors]
    for text in texts:
        for secret in private:
            assert not any(spelling in text for spelling in spelled(secret))
    for state in (site.state, site.state.to_json()):
        after = str(state)
        for secret in private[:4]:
            assert not any(spelling in after for spelling in spelled(secret)), "not forgotten after exchange 5"


def test_purposes_are_apart():
    """The counts' sum and the update's have different ids, keys and attempts, at the same time."""
    sites = parties(5)
    counts, update = begun(sites, 1), begun(sites, 1, binding=changed(purpose=UPDATE))
    assert BINDING.purpose == COUNTS
    site = sites[0]
    refused("other-sum", site, lambda: site.shares(4, counts.said["key_list"]))
    assert len(site.shares(4, update.said["key_list"])) == 4 * CIPHERTEXT_BYTES


def test_membership_counts_every_unverified_member_as_a_survivor_it_wants_beside():
    ids = frozenset(bytes([i]) * 32 for i in range(8))
    some = frozenset(sorted(ids)[:5])
    assert Membership(ids, some, 1, 3).min_survivors == 6
    assert Membership(ids, ids, 1, 4).min_survivors == 4
