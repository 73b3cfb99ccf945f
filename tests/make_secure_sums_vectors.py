"""Writes tests/vectors/secure_sums/ with the reference, the same bytes every time.

    python -m tests.make_secure_sums_vectors

`n*.json` and `tail_only.json` are whole attempts: every input (identity keys and the tape of random bytes included),
every message of every site in hexadecimal, keys in between and the sum. Sites are numbers in the order of their ids.
A site's own `policy` is laid over the attempt's. Of those with `again` in their names, n4 and n6 are about one payload:
attempts 1 and 2 of one sum of counts, and the same counts in another run with t = 4 and t = 5.

`fail_*.json` are attempts that end in a named failure: `base` is the attempt to replay at `site` (exchanges 1 to
`answered`, with the base's own instructions), with `memory` laid over the base's; before it, the attempt of `earlier`
was replayed at the same site (exchanges 1 to its `answered`), which has not forgotten it; the instructions of `before`
are answered; then `instruction`, to `exchange`, gives `failure`, now with `policy` laid over the base's. In a list, an
integer i stands for what the base has: of key_list advert i, of ciphertexts the one from i to `site`, of signatures
that of i.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from . import secure_sums_reference as ref

FOLDER = Path(__file__).parent / "vectors" / "secure_sums"
Json = dict[str, Any]


def seeded(name: str, size: int) -> bytes:
    return hashlib.shake_256(f"secure sums vector, {name}".encode()).digest(size)


class Tape:
    """Random bytes that a name decides; `used` is what was taken."""

    def __init__(self, name: str):
        self.name, self.used = name, b""

    def __call__(self, size: int) -> bytes:
        start, self.used = len(self.used), seeded(self.name, len(self.used) + size)
        return self.used[start:]


POOL = sorted((seeded(f"identity {i}", 32) for i in range(10)), key=ref.ed25519_public)
SPARE, REVOKED, STRANGER = POOL[7:]
BINDING = ref.Binding(
    run_id=seeded("run", 16), round_index=3, purpose=2, attempt=2, d=5, k=2, max_sites=8, range_r=0.25,
    roster_digest=seeded("roster", 32), config_digest=seeded("config", 32),
    model_digest=seeded("model", 32), input_digest=seeded("input", 32),
)  # fmt: skip


def hexed(replies: dict[int, bytes]) -> dict[str, str]:
    return {str(i): data.hex() for i, data in replies.items()}


def pieces(data: bytes, size: int) -> list[str]:
    return [data[at : at + size].hex() for at in range(0, len(data), size)]


class Attempt:
    """A whole attempt: who sends shares, a masked vector, a signature and an answer, and what that gives."""

    def __init__(
        self, name: str, about: str, n: int, t: int, c: int, d: int, k: int, *answering: Iterable[int],
        payloads: str = "", wishes: dict[int, int] | None = None, **binding: Any,
    ):  # fmt: skip
        self.name, self.n, self.t = name, n, t
        self.payloads, self.wishes = payloads or name, wishes or {}
        self.binding = replace(BINDING, d=d, k=k, **{"purpose": 2 if d else 3} | binding)
        identities = POOL[:n]
        ids = frozenset(map(ref.ed25519_public, identities))
        spare = {ref.ed25519_public(SPARE)}
        # Where there is room for it, nobody has verified the spare member, and wants one survivor more.
        policy = ref.Policy(ids | spare, ids if n > 4 and not wishes else ids | spare, c, 3)
        tapes = [Tape(f"{name}, site {i}") for i in range(1, n + 1)]
        payloads = [self.payload(i) for i in range(1, n + 1)]
        self.sites = {
            i: ref.Site(identity, self.binding, self.policy_of(i, policy), payload, tape, ref.Memory())
            for i, (identity, payload, tape) in enumerate(zip(identities, payloads, tapes, strict=True), 1)
        }
        sharing, masking, signing, unmasking = (list(numbers) for numbers in answering)
        self.adverts = {i: site.keys() for i, site in self.sites.items()}
        self.key_list = b"".join(self.adverts.values())
        shares = {i: self.sites[i].shares(t, self.key_list) for i in sharing}
        self.recipients = ref.make_bitmap(sharing, n)
        self.ciphertexts = {v: {u: self.between(shares[u], u, v) for u in sharing if u != v} for v in sharing}
        masked = {v: self.sites[v].masked(self.recipients, b"".join(self.ciphertexts[v].values())) for v in masking}
        self.survivors = ref.make_bitmap(masking, n)
        self.signed = {v: self.sites[v].consistency(self.survivors) for v in signing}
        self.signers, signatures = ref.make_bitmap(signing, n), b"".join(self.signed.values())
        self.answers = {v: self.sites[v].unmask(self.signers, signatures) for v in unmasking}
        self.masked = masked
        total, wrong = ref.recover(t, self.key_list, self.recipients, self.survivors, masked, self.answers)
        assert not wrong
        self.json: Json = {
            "about": about,
            "parameters": {"n": n, "t": t},
            "binding": {key: v.hex() if isinstance(v, bytes) else v for key, v in asdict(self.binding).items()},
            "binding_bytes": self.binding.encode().hex(),
            "policy": {
                "active": sorted(i.hex() for i in policy.active),
                "revoked": [ref.ed25519_public(REVOKED).hex()],
                "verified": sorted(i.hex() for i in policy.verified),
                "c": c,
                "min_sites": policy.min_sites,
            },
            "sites": {str(i): self.inside(i, tapes[i - 1].used) for i in self.sites},
            "exchange_1": {"replies": hexed(self.adverts)},
            "exchange_2": {
                "instruction": {"t": t, "key_list": pieces(self.key_list, ref.ADVERT_BYTES)},
                "list_digest": ref.list_digest(t, self.key_list).hex(),
                "replies": {str(i): pieces(data, ref.CIPHERTEXT_BYTES) for i, data in shares.items()},
            },
            "exchange_3": {
                "recipients": self.recipients.hex(),
                "ciphertexts": {str(v): [c.hex() for c in sent.values()] for v, sent in self.ciphertexts.items()},
                "replies": hexed(masked),
            },
            "exchange_4": {"survivors": self.survivors.hex(), "replies": hexed(self.signed)},
            "exchange_5": {
                "instruction": {"signers": self.signers.hex(), "signatures": pieces(signatures, ref.SIGNATURE_BYTES)},
                "replies": hexed(self.answers),
            },
            "sum": {"ring": total[0], "tail": total[1]},
        }

    def policy_of(self, i: int, policy: ref.Policy) -> ref.Policy:
        return replace(policy, min_sites=self.wishes.get(i, policy.min_sites))

    def payload(self, i: int) -> ref.Vector:
        raw = seeded(f"{self.payloads}, payload {i}", 4 * self.binding.d + 5 * self.binding.k)
        tail = raw[4 * self.binding.d :]
        ring = [int.from_bytes(raw[4 * j :][:4], "little") for j in range(self.binding.d)]
        return ring, [int.from_bytes(tail[5 * j :][:5], "little") for j in range(self.binding.k)]

    def between(self, shares: bytes, u: int, v: int) -> bytes:
        """The ciphertext that u made for v, out of u's reply."""
        return shares[(v - 1 - (v > u)) * ref.CIPHERTEXT_BYTES :][: ref.CIPHERTEXT_BYTES]

    def inside(self, i: int, tape: bytes) -> Json:
        """A site's inputs, secrets and derived keys, by the number of the other site where there is one."""
        site, digest = self.sites[i], ref.list_digest(self.t, self.key_list)
        secrets, own = site.secrets, site.id
        others = {j: ref.read_advert(advert) for j, advert in self.adverts.items() if j != i}
        share_keys = {
            j: ref.share_key(secrets.encryption_key, a.encryption_key, digest, own, a.id) for j, a in others.items()
        }
        pair_keys = {j: ref.pair_key(secrets.mask_key, a.mask_key, digest, own, a.id) for j, a in others.items()}
        return {
            "identity_key": site.identity.hex(),
            "id": own.hex(),
            "policy": {"min_sites": self.wishes[i]} if i in self.wishes else {},
            "min_survivors": site.policy.min_survivors,
            "random": tape.hex(),
            "ring": site.payload[0],
            "tail": site.payload[1],
            "content_digest": ref.content_digest(self.binding, site.payload).hex(),
            "encryption_key": secrets.encryption_key.hex(),
            "mask_key": secrets.mask_key.hex(),
            "self_seed": secrets.self_seed.hex(),
            "self_key": ref.self_key(secrets.self_seed, digest, own).hex(),
            "share_keys_to": hexed(share_keys),
            "pair_keys_with": hexed(pair_keys),
        }


ALL5, ALL7 = range(1, 6), range(1, 8)
AGAIN: Json = {"payloads": "again", "purpose": 1}
OTHER_RUN: Json = {
    "run_id": seeded("run 2", 16), "round_index": 0, "attempt": 1,
    "config_digest": seeded("config 2", 32), "model_digest": seeded("model 2", 32),
}  # fmt: skip
ATTEMPTS = [
    Attempt("n3_t3", "three sites, no dropout; d is no multiple of 4", 3, 3, 1, 5, 2, *[range(1, 4)] * 4),
    Attempt("n5_t4", "five sites, no dropout", 5, 4, 1, 4, 1, *[ALL5] * 4),
    Attempt("n5_t4_keys", "site 3 is silent after its advert: no recipient", 5, 4, 1, 3, 1, *[[1, 2, 4, 5]] * 4),
    Attempt("n5_t4_shares", "site 2 is silent after its shares: no survivor", 5, 4, 2, 6, 1, ALL5, *[[1, 3, 4, 5]] * 3),
    Attempt("n5_t4_masked", "site 4 is silent after its masked vector: a survivor", 5, 4, 1, 1, 2, ALL5, ALL5,
            *[[1, 2, 3, 5]] * 2),
    Attempt("n7_t5", "site 6 is silent after its shares, site 1 after its masked vector; ring only", 7, 5, 2, 7, 0,
            ALL7, [1, 2, 3, 4, 5, 7], *[[2, 3, 4, 5, 7]] * 2),
    Attempt("tail_only", "counts of a validation: no ring", 3, 3, 1, 0, 3, *[range(1, 4)] * 4),
    Attempt("n5_t4_wish", "site 5 wants all five in the sum, and nobody drops out", 5, 4, 1, 2, 1, *[ALL5] * 4,
            wishes={5: 5}),
    Attempt("n5_t4_wish_silent", "site 5 wants all five in the sum, but is no recipient", 5, 4, 1, 2, 1,
            *[range(1, 5)] * 4, wishes={5: 5}),
    Attempt("n4_t3_again", "counts of four sites, attempt 1", 4, 3, 1, 2, 1, *[range(1, 5)] * 4, **AGAIN, attempt=1),
    Attempt("n6_t4_again", "the same counts and two sites more, attempt 2", 6, 4, 1, 2, 1, *[range(1, 7)] * 4, **AGAIN),
    Attempt("n6_t4_again_run", "the same counts and two sites more, in another run", 6, 4, 1, 2, 1, *[range(1, 7)] * 4,
            **AGAIN, **OTHER_RUN),
    Attempt("n6_t5_again_run", "as n6_t4_again_run with a threshold that makes quorums meet", 6, 5, 1, 2, 1,
            *[range(1, 7)] * 4, **AGAIN, **OTHER_RUN),
    Attempt("n4_t3_again_run", "the same counts of the same sites in another run", 4, 3, 1, 2, 1, *[range(1, 5)] * 4,
            **AGAIN, **OTHER_RUN),
]  # fmt: skip
BY_NAME = {attempt.name: attempt for attempt in ATTEMPTS}


def hexes(items: list[Any]) -> list[Any]:
    return [item.hex() if isinstance(item, bytes) else item for item in items]


def case(name: str, base: str, exchange: int, failure: str, instruction: Json, site: int = 1, **more: Any) -> Json:
    return {
        "name": name,
        "base": base,
        "site": site,
        "answered": exchange - 1,
        "exchange": exchange,
        "instruction": {key: hexes(v) if isinstance(v, list) else v for key, v in instruction.items()},
        "failure": failure,
        **more,
    }


def fail_keys() -> list[Json]:
    return [
        case("attempt was answered before", "n3_t3", 1, "out-of-turn", {}, memory={"attempt": 2}),
        case("attempt below one that was answered", "n3_t3", 1, "out-of-turn", {}, memory={"attempt": 3}),
        case("survivors of this sum were signed", "n3_t3", 1, "out-of-turn", {}, memory={"attempt": 1, "signed": True}),
        case(
            "survivors were signed in attempt 1",
            "n6_t4_again",
            1,
            "out-of-turn",
            {},
            earlier={"base": "n4_t3_again", "answered": 4},
        ),
        case(
            "attempt 2 was answered",
            "n4_t3_again",
            1,
            "out-of-turn",
            {},
            earlier={"base": "n6_t4_again", "answered": 1},
        ),
    ]


def fail_shares() -> list[Json]:
    """Exchange 2. Site 1 of n3_t3 is given another advert of member 2, unless the case says otherwise."""
    base = BY_NAME["n3_t3"]
    honest = {i: ref.read_advert(advert) for i, advert in base.adverts.items()}
    binding = base.binding

    def body(a: ref.Advert) -> bytes:
        start = a.magic + a.binding + a.min_survivors.to_bytes(2, "little")
        return start + a.id + a.encryption_key + a.mask_key + a.commitment

    def advert(identity: bytes = POOL[1], about: ref.Binding = binding, use: str = "advert", **parts: Any) -> bytes:
        """An advert that `identity` really signed, with other parts."""
        a = honest[2]._replace(id=ref.ed25519_public(identity), binding=about.encode())._replace(**parts)
        return body(a) + ref.sign(identity, ref.domain(use) + body(a))

    def keys(failure: str, name: str, *key_list: int | bytes, t: int = 3, on: str = "n3_t3", **more: Any) -> Json:
        return case(name, on, 2, failure, {"t": t, "key_list": list(key_list)}, **more)

    def swapped(name: str, **parts: bytes) -> Json:
        a = honest[2]._replace(**parts)
        return keys("signature", name, 1, body(a) + a.signature, 3)

    def about(failure: str, name: str, **parts: Any) -> Json:
        return keys(failure, name, 1, advert(about=replace(binding, **parts)), 3)

    def public(u: int) -> bytes:
        return u.to_bytes(32, "little")

    own = ref.make_advert(POOL[0], binding.encode(), 3, ref.make_secrets(Tape("other keys of site 1")))
    fresh = ref.make_advert(SPARE, binding.encode(), 3, ref.make_secrets(Tape("keys of the spare member")))
    bit = bytes([base.adverts[1][279] ^ 1])
    top = public(int.from_bytes(honest[2].mask_key, "little") | 1 << 255)
    spelled_twice = public(9 + ref.FIELD)  # 9 + p is below 2^255, and a second spelling of the base point
    first = {"exchange": 2, "instruction": {"t": 4, "key_list": list(ALL5)}}
    other = seeded("another digest", 32)
    tampered = base.adverts[1][:279] + bit + base.adverts[1][280:]
    long = BY_NAME["n7_t5"]
    nine = [*long.adverts.values(), fresh, fresh]
    return [
        keys("malformed", "two members", 1, 2),
        keys("malformed", "empty list", t=3),
        keys("malformed", "last advert truncated", 1, 2, base.adverts[3][:-1]),
        keys("malformed", "one byte too many", 1, 2, base.adverts[3] + b"\0"),
        keys("malformed", "more members than max_sites", *nine),
        keys("malformed", "other magic", 1, advert(magic=b"WSK2"), 3),
        keys("malformed", "other magic, signed by nobody", 1, b"WSK2" + base.adverts[2][4:], 3),
        *(keys("malformed", f"{kind}: {name}", 1, advert(**{kind: key}), 3)
          for kind in ("encryption_key", "mask_key")
          for name, key in (
              ("p + 9", spelled_twice), ("p", public(ref.FIELD)), ("top bit set", top), ("2^256 - 1", b"\xff" * 32),
              *((f"low order, {i}", public(u)) for i, u in enumerate(sorted(ref.LOW_ORDER))))),
        keys("malformed", "own advert with a key of low order", advert(POOL[0], mask_key=bytes(32)), 2, 3),
        keys("malformed", "min_survivors of 2", 1, advert(min_survivors=2), 3),
        keys("malformed", "min_survivors of 1025", 1, advert(min_survivors=1025), 3),
        about("malformed", "purpose 0", purpose=0),
        about("malformed", "purpose 5", purpose=5),
        about("malformed", "attempt 0", attempt=0),
        about("malformed", "k above 2^20", k=2**20 + 1),
        about("malformed", "d above 2^32", d=2**32 + 1),
        about("malformed", "max_sites of 2", max_sites=2),
        about("malformed", "max_sites of 1025", max_sites=1025),
        keys("malformed", "ids out of order", 2, 1, 3),
        keys("malformed", "a member twice", 1, 2, 2, 3),
        keys("unknown-member", "unknown member", *by_id(base, advert(STRANGER))),
        keys("unknown-member", "revoked member", *by_id(base, advert(REVOKED))),
        keys("unknown-member", "member revoked since", 1, 2, 3,
             policy={"active": [a.id.hex() for a in (honest[1], honest[3])]}),
        keys("signature", "unsigned", 1, base.adverts[2][:311] + bytes(64), 3),
        keys("signature", "signed by another member", 1, base.adverts[2][:311] + advert(POOL[2])[311:], 3),
        keys("signature", "signed for another use", 1, advert(use="survivors"), 3),
        swapped("swapped encryption key", encryption_key=ref.x25519_public(seeded("attacker", 32))),
        swapped("swapped mask key", mask_key=ref.x25519_public(seeded("attacker", 32))),
        swapped("swapped commitment", commitment=other),
        swapped("another min_survivors", min_survivors=4),
        keys("signature", "own advert altered", tampered, 2, 3),
        about("other-roster", "other roster", roster_digest=other),
        about("other-config", "other config", config_digest=other),
        about("other-model", "other model", model_digest=other),
        about("other-input", "other input", input_digest=other),
        about("other-sum", "other model and other config", model_digest=other, config_digest=other),
        about("other-sum", "other run", run_id=other[:16]),
        about("other-sum", "other run and other model", run_id=other[:16], model_digest=other),
        about("other-sum", "other round", round_index=4),
        about("other-sum", "other purpose", purpose=1),
        about("other-sum", "advert of the attempt before", attempt=1),
        about("other-sum", "other d", d=6),
        about("other-sum", "other k", k=3),
        about("other-sum", "other max_sites", max_sites=9),
        about("other-sum", "other clipping range", range_r=0.5),
        keys("own-keys", "own advert with other keys, signed", own, 2, 3),
        keys("own-keys", "own advert missing", *by_id(base, fresh, without=1)),
        keys("repeated-key", "encryption key of another member", 1, advert(encryption_key=honest[3].encryption_key), 3),
        keys("repeated-key", "mask key of another member", 1, advert(mask_key=honest[3].mask_key), 3),
        keys("repeated-key", "mask key as encryption key", 1, advert(encryption_key=honest[2].mask_key), 3),
        keys("repeated-key", "commitment of another member", 1, advert(commitment=honest[3].commitment), 3),
        keys("threshold", "threshold too low", 1, 2, 3, t=2),
        about("other-sum", "other model of one member, other config of another", model_digest=other) | {
            "instruction": {"t": 3, "key_list": hexes([
                1, advert(about=replace(binding, model_digest=other)),
                advert(POOL[2], replace(binding, config_digest=other))])}},
        keys("threshold", "threshold above n", 1, 2, 3, t=4),
        keys("threshold", "a member that wants more survivors than members", 1, advert(min_survivors=4), 3),
        keys("threshold", "2t = n + c + f", *ALL5, t=3, on="n5_t4"),
        keys("threshold", "t - c - f = 1", 1, 2, 3, policy={"c": 2}),
        keys("threshold", "an invented hospital: 2t = n + c + f", *ALL5, t=4, on="n5_t4_shares",
             policy={"verified": verified("n5_t4_shares", 1, 2, 3, 4)}),
        keys("threshold", "fewer than min_sites verified", *ALL5, t=4, on="n5_t4", policy={"min_sites": 6}),
        keys("out-of-turn", "second key list in one attempt: other threshold", *ALL5, t=5, on="n5_t4", before=[first]),
        keys("out-of-turn", "second key list in one attempt: one member less", 1, 2, 3, 4, t=4, on="n5_t4",
             before=[first]),
        keys("out-of-turn", "second key list in one attempt, malformed", 1, 2, t=4, on="n5_t4", before=[first]),
        keys("out-of-turn", "before the advert", 1, 2, t=3, answered=0),
    ]  # fmt: skip


def by_id(base: Attempt, *extra: bytes, without: int = 0) -> list[int | bytes]:
    items: list[int | bytes] = [i for i in base.adverts if i != without]
    items += extra
    return sorted(items, key=lambda item: (base.adverts[item] if isinstance(item, int) else item)[183:215])


def verified(name: str, *members: int) -> list[str]:
    return [BY_NAME[name].sites[i].id.hex() for i in members]


def fail_masked() -> list[Json]:
    """Exchange 3 at site 1 of n5_t4."""
    base = BY_NAME["n5_t4"]
    sent, digest = base.ciphertexts[1], ref.list_digest(base.t, base.key_list)

    def masked(failure: str, name: str, *ciphertexts: int | bytes, members: Iterable[int] = ALL5, **more: Any) -> Json:
        recipients = more.pop("recipients", ref.make_bitmap(members, 5))
        instruction = {"recipients": recipients.hex(), "ciphertexts": list(ciphertexts)}
        return case(name, more.pop("on", "n5_t4"), 3, failure, instruction, **more)

    def from_2(pair: bytes) -> bytes:
        a, b = base.sites[2], base.sites[1]
        key = ref.share_key(
            a.secrets.encryption_key, ref.read_advert(base.adverts[1]).encryption_key, digest, a.id, b.id
        )
        return ref.encrypt_pair(key, digest, a.id, b.id, pair)

    first = {"exchange": 3, "instruction": {"recipients": base.recipients.hex(), "ciphertexts": [2, 3, 4, 5]}}
    at_p, two = ref.P.to_bytes(33, "little"), (2).to_bytes(33, "little")
    return [
        masked("malformed", "bitmap too long", 2, 3, 4, 5, recipients=base.recipients + b"\0"),
        masked("malformed", "empty bitmap", recipients=b""),
        masked("malformed", "unused bit set", 2, 3, 4, 5, recipients=b"\x3f"),
        masked("malformed", "truncated ciphertext", 2, 3, 4, sent[5][:-1]),
        masked("malformed", "one ciphertext missing", 2, 3, 4),
        masked("malformed", "one ciphertext repeated, one too many", 2, 3, 4, 5, 5),
        masked("own-keys", "recipients without the site itself", 2, 3, 4, 5, members=[2, 3, 4, 5]),
        masked("threshold", "fewer than t recipients", 2, 3, members=[1, 2, 3]),
        masked("threshold", "fewer than min_sites recipients", 2, 3, 4, members=[1, 2, 3, 4], policy={"min_sites": 5}),
        masked("threshold", "fewer than t verified recipients", 3, 4, 5, members=[1, 3, 4, 5],
               policy={"verified": verified("n5_t4", 1, 2, 3, 4)}),
        masked("share", "tampered ciphertext", 2, 3, 4, bytes([sent[5][0] ^ 1]) + sent[5][1:]),
        masked("share", "tampered tag", 2, 3, 4, sent[5][:-1] + bytes([sent[5][-1] ^ 128])),
        masked("share", "ciphertexts reordered", 3, 2, 4, 5),
        masked("share", "one ciphertext in place of another", 2, 3, 4, 4),
        masked("share", "ciphertext for another site", 2, 3, 4, base.ciphertexts[2][5]),
        masked("share", "own ciphertext sent back", base.ciphertexts[2][1], 3, 4, 5),
        masked("share", "ciphertext of another attempt", BY_NAME["n5_t4_masked"].ciphertexts[1][2], 3, 4, 5),
        masked("share", "seed value is p", from_2(at_p + two), 3, 4, 5),
        masked("share", "key value is p", from_2(two + at_p), 3, 4, 5),
        masked("share", "value of 33 bytes of ff", from_2(b"\xff" * 66), 3, 4, 5),
        masked("malformed", "wrong length, and the site itself left out", 2, 3, 4, members=[2, 3, 4, 5]),
        masked("malformed", "wrong length, and fewer than t recipients", 2, members=[1, 2, 3]),
        masked("out-of-turn", "before the shares", 2, 3, 4, 5, answered=1),
        masked("out-of-turn", "before the shares, malformed", recipients=b"", answered=1),
        masked("out-of-turn", "second recipients in one attempt", 2, 3, 4, members=[1, 2, 3, 4], before=[first]),
        masked("out-of-turn", "other ciphertexts in one attempt", 2, 3, 4, sent[5][:-1] + bytes([sent[5][-1] ^ 1]),
               before=[first]),
        masked("out-of-turn", "second recipients in one attempt, malformed", recipients=b"", before=[first]),
        *(masked("difference", f"quorums that do not meet between two {what}", *range(2, 7), on=on,
                 recipients=BY_NAME[on].recipients, earlier={"base": "n4_t3_again", "answered": 3})
          for what, on in (("attempts", "n6_t4_again"), ("runs", "n6_t4_again_run"))),
        masked("difference", "quorums that do not meet: the smaller list comes second", 2, 3, 4, on="n4_t3_again_run",
               recipients=b"\x0f", earlier={"base": "n6_t4_again", "answered": 3}),
        masked("difference", "quorums that do not meet: one more colluder", *range(2, 7), on="n6_t5_again_run",
               recipients=b"\x3f", earlier={"base": "n4_t3_again", "answered": 3}, policy={"c": 2}),
        masked("difference", "quorums that do not meet: a member of the earlier list was not verified", 2, 3, 4,
               on="n4_t3_again", recipients=b"\x0f", earlier={"base": "n6_t5_again_run", "answered": 3},
               policy={"verified": verified("n4_t3_again", 1, 2, 3, 4)}),
    ]  # fmt: skip


def fail_consistency() -> list[Json]:
    """Exchange 4 at site 1: five recipients in n5_t4, without site 3 in n5_t4_keys."""

    def survivors(failure: str, name: str, *members: int, **more: Any) -> Json:
        bitmap = more.pop("bitmap", ref.make_bitmap(members, 5))
        return case(name, more.pop("on", "n5_t4"), 4, failure, {"survivors": bitmap.hex()}, **more)

    first = {"exchange": 4, "instruction": {"survivors": ref.make_bitmap(ALL5, 5).hex()}}
    return [
        survivors("malformed", "bitmap too long", bitmap=b"\x1f\0"),
        survivors("malformed", "unused bit set", bitmap=b"\x3f"),
        survivors("malformed", "a survivor that is no recipient", *ALL5, on="n5_t4_keys"),
        survivors("own-keys", "survivors without the site itself", 2, 3, 4, 5),
        survivors("out-of-turn", "before the masked vector", *ALL5, answered=2),
        survivors("out-of-turn", "before the masked vector, malformed", bitmap=b"", answered=2),
        survivors("threshold", "fewer than t survivors", 1, 2, 3),
        survivors("threshold", "fewer than min_sites survivors", 1, 2, 3, 4, policy={"min_sites": 5}),
        survivors("threshold", "fewer than t verified survivors", 1, 3, 4, 5,
                  policy={"verified": verified("n5_t4", 1, 2, 3, 4)}),
        survivors("threshold", "fewer survivors than a recipient wants that is not among them", 1, 2, 3, 4,
                  on="n5_t4_wish"),
        survivors("threshold", "fewer survivors than a survivor wants", 1, 3, 4, 5, on="n5_t4_wish"),
        survivors("survivors", "two survivor sets", 1, 2, 3, 4, before=[first]),
        survivors("survivors", "two survivor sets, the second too small", 1, 2, before=[first]),
        survivors("survivors", "two survivor sets, the second malformed", bitmap=b"", before=[first]),
        survivors("difference", "the same payload with other survivors, in another run", on="n6_t5_again_run",
                  bitmap=b"\x3f", earlier={"base": "n4_t3_again", "answered": 4}),
        survivors("difference", "the same payload with fewer survivors, in another run", on="n4_t3_again_run",
                  bitmap=b"\x07", earlier={"base": "n4_t3_again", "answered": 4}),
        survivors("difference", "the same payload with other survivors, as the book says", *ALL5,
                  memory={"given": [{"t": 4, "ids": verified("n5_t4", *ALL5),
                                     "survivors": verified("n5_t4", 1, 2, 3, 4)}]}),
    ]  # fmt: skip


def fail_unmask() -> list[Json]:
    """Exchange 5 at site 1 of n5_t4_shares: survivors 1, 3, 4, 5."""
    name = "n5_t4_shares"
    base = BY_NAME[name]
    signed, digest, alive = base.signed, ref.list_digest(base.t, base.key_list), [1, 3, 4, 5]

    def unmask(failure: str, about: str, *signatures: int | bytes, members: Iterable[int] = alive, **more: Any) -> Json:
        signers = more.pop("signers", ref.make_bitmap(members, 5))
        instruction = {"signers": signers.hex(), "signatures": list(signatures)}
        return case(about, more.pop("on", name), 5, failure, instruction, **more)

    other = ref.sign(POOL[4], ref.statement(digest, base.recipients, ref.make_bitmap(ALL5, 5)))
    narrow = ref.sign(POOL[4], ref.statement(digest, base.survivors, base.survivors))
    raw = ref.sign(POOL[4], ref.statement(digest, base.recipients, base.survivors)[len(ref.domain("survivors")) :])
    two = ref.sign(POOL[1], ref.statement(digest, base.recipients, base.survivors))
    first = {"exchange": 5, "instruction": {"signers": ref.make_bitmap(ALL5, 5).hex(), "signatures": list(ALL5)}}
    return [
        unmask("malformed", "bitmap too long", *alive, signers=base.signers + b"\0"),
        unmask("malformed", "unused bit set", *alive, signers=b"\x3d"),
        unmask("malformed", "a signer that is no survivor", 1, two, 3, 4, 5, members=ALL5),
        unmask("malformed", "one signature missing", 1, 3, 4),
        unmask("malformed", "one signature too many", 1, 3, 4, 5, 5),
        unmask("malformed", "truncated signature", 1, 3, 4, signed[5][:-1]),
        unmask("signature", "zeros for a signature", 1, 3, 4, bytes(64)),
        unmask("signature", "signatures reordered", 1, 4, 3, 5),
        unmask("signature", "one signature for another", 1, 3, 4, 4),
        unmask("signature", "signed other survivors", 1, 3, 4, other),
        unmask("signature", "signed other recipients", 1, 3, 4, narrow),
        unmask("signature", "signed for no use", 1, 3, 4, raw),
        unmask("signature", "signed in another attempt", 1, 3, 4, BY_NAME["n5_t4"].signed[5]),
        unmask("threshold", "too few signatures", 1, 3, 4, members=[1, 3, 4]),
        unmask("threshold", "no signature", members=[]),
        unmask("threshold", "too few verified signers", 1, 2, 3, 5, members=[1, 2, 3, 5], on="n5_t4",
               policy={"verified": verified("n5_t4", 1, 2, 3, 4)}),
        unmask("out-of-turn", "before it signed", *alive, answered=3),
        unmask("out-of-turn", "before it signed, malformed", signers=b"", answered=3),
        unmask("out-of-turn", "second unmask", 1, 2, 3, 4, members=[1, 2, 3, 4], before=[first], on="n5_t4"),
        unmask("out-of-turn", "second unmask, malformed", signers=b"", before=[first], on="n5_t4"),
    ]  # fmt: skip


def fail_coordinator() -> list[Json]:
    """What the coordinator must refuse of a site. The specification has no words here; these are the nearest."""
    base = BY_NAME["n5_t4"]
    whole = base.masked[2]

    def vector(name: str, reply: bytes) -> Json:
        about = {"name": name, "base": "n5_t4", "site": 2, "exchange": 3}
        return {**about, "reply": reply.hex(), "failure": "malformed"}

    return [
        vector("masked vector one byte short", whole[:-1]),
        vector("masked vector one value long", whole + bytes(4)),
        vector("empty masked vector", b""),
    ]


def recovery() -> list[Json]:
    """Answers of exchange 5 that differ from n5_t4's: what the coordinator makes of them."""
    base = BY_NAME["n5_t4"]

    def off(i: int, u: int) -> bytes:
        at, answer = (u - 1) * ref.VALUE_BYTES, base.answers[i]
        value = (int.from_bytes(answer[at:][: ref.VALUE_BYTES], "little") + 1) % ref.P
        return answer[:at] + value.to_bytes(ref.VALUE_BYTES, "little") + answer[at + ref.VALUE_BYTES :]

    def answers(name: str, changed: dict[int, bytes | None], **result: Any) -> Json:
        given = {str(i): data and data.hex() for i, data in changed.items()}
        return {"name": name, "base": "n5_t4", "answers_instead": given, **result}

    return [
        answers("one answer missing", {3: None}, wrong=[]),
        answers("site 2 lies about site 1's seed", {2: off(2, 1)}, wrong=[[1, 2]]),
        answers("site 5 lies about its own seed", {5: off(5, 5)}, wrong=[[5, 5]]),
        answers("two sites lie, each about another seed", {2: off(2, 1), 3: off(3, 4)}, wrong=[[1, 2], [4, 3]]),
        answers("a lie, and no answer to spare", {2: off(2, 1), 3: None}, failure="share"),
        answers("two lies about one seed", {2: off(2, 1), 3: off(3, 1)}, failure="share"),
        answers("too few answers", {2: None, 3: None}, failure="threshold"),
        answers("a truncated answer is none", {2: base.answers[2][:-1]}, wrong=[]),
    ]


def fixed_point() -> list[Json]:
    """Values are float32, rounding the u32 of a stream as in §S10."""

    def one(about: str, x: list[float], w: int, largest_w: int, range_r: float, max_sites: int, r: list[int]) -> Json:
        ring, clipped = ref.quantise(x, w, largest_w, range_r, max_sites, r)
        given = {"x": x, "w": w, "W": largest_w, "range": range_r, "max_sites": max_sites, "rounding": r}
        result = {"ring": ring, "clipped": clipped, "alone": ref.dequantise(ring, range_r, max_sites)}
        return {"about": about, **given, **result}

    half, top = 2**31, 2**32 - 1
    return [
        one("zero and a quarter", [0.0, 0.0625, -0.0625], 1, 1, 0.25, 3, [0, half, half]),
        one("weight 3 of 7", [0.125, -0.125, 0.5], 3, 7, 1.0, 8, [1, half, top]),
        one("both ends, rounded both ways", [2.0, 2.0, -2.0, -2.0], 5, 5, 2.0, 1024, [0, top, 0, top]),
        one("outside the range: clipped and counted", [3.0, -3.0, 2.0**100], 5, 5, 2.0, 10, [0, 0, half]),
        one(
            "rounding of (seed 7, site north, round 3)",
            [0.01, -0.02, 0.03, 0.04],
            2,
            3,
            1.0,
            10,
            ref.rounding(7, "north", 3, 4),
        ),
        one("float64 rounds the draw up: the value is limit, not limit - 1", [1.0], 1, 1, 1.0, 3, [top]),
    ]


def files() -> dict[str, str]:
    """Every file by its name."""
    contents: dict[str, Any] = {attempt.name: attempt.json for attempt in ATTEMPTS}
    contents |= {
        "fail_keys": fail_keys(),
        "fail_shares": fail_shares(),
        "fail_masked": fail_masked(),
        "fail_consistency": fail_consistency(),
        "fail_unmask": fail_unmask(),
        "fail_coordinator": fail_coordinator(),
        "recovery": recovery(),
        "fixed_point": fixed_point(),
    }
    return {f"{name}.json": json.dumps(content, indent=1) + "\n" for name, content in contents.items()}


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for file_name, text in files().items():
        (FOLDER / file_name).write_text(text)
