"""Secure sums at a site's folder: what is refused, what is remembered over restarts, what lies on the disk.

Five hospitals with identities and a roster, each message served as by a new process. `refused` compares book and
counter byte for byte: a refusal writes nothing.
"""

import base64
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wardround.client import gate, payload, sharing, update
from wardround.client import identity as client_identity
from wardround.client.folder import Site, SiteRun
from wardround.client.identity import SiteKeys
from wardround.client.sharing import Book, Sharing
from wardround.common import identity as identity_module
from wardround.common import sums
from wardround.common.config import (
    NO_PRIVACY,
    FederationConfig,
    IdentityConfig,
    PolicyConfig,
    RunConfig,
    SiteConfig,
    to_toml,
)
from wardround.common.errors import ConfigError, ProtocolError, SumError, VerificationError, WardroundError
from wardround.common.files import private_folder
from wardround.common.identity import Card, Identity
from wardround.common.key_file import write_key
from wardround.common.messages import (
    CountInstruction,
    Failure,
    MaskInstruction,
    Reply,
    SharesInstruction,
    SurvivorsInstruction,
    TrainInstruction,
    UnmaskInstruction,
    decode,
    encode,
    join,
    split,
)
from wardround.common.roster import Roster
from wardround.common.secagg.client_state import ClientSum
from wardround.common.secagg.keys import COUNTS, UPDATE, Advert, bitmap, smallest_threshold
from wardround.common.secagg.server_state import Attempt

RUN = RunConfig(
    name="trial", privacy=NO_PRIVACY, seed=5, federation=FederationConfig(update_range=1.0, weighting="patients")
)
RUN_ID, OTHER_RUN_ID = "ab" * 16, "cd" * 16
MODEL, OTHER_MODEL = "11" * 32, "22" * 32
COORDINATOR = Identity.from_seed(b"k" * 32)
SECRET = b"open sesame, twice"
COUNT_INPUTS = sums.input_digest("33" * 32)
D = 9
BOOKS = ("state/sums-0.sealed", "state/sums-1.sealed")
FILES = (*BOOKS, "sums.counter")


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(identity_module._SCRYPT, "n", 2**4)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # the tests' kills are not a power cut
    monkeypatch.delenv("WARDROUND_PASSPHRASE", raising=False)


@dataclass(frozen=True)
class About:
    """What an instruction's head says."""

    run_id: str = RUN_ID
    config: RunConfig = RUN
    round_index: int = 0
    model: str = MODEL
    purpose: int = COUNTS
    attempt: int = 1

    def head(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "config": self.config.to_json(),
            "config_digest": self.config.digest(),
            "round_index": self.round_index,
            "model_digest": self.model,
        }

    def of_sum(self) -> dict[str, Any]:
        return {**self.head(), "purpose": self.purpose, "attempt": self.attempt}


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


@dataclass(eq=False)
class House:
    """A hospital's folder, and its messages, each answered as by a new process."""

    folder: Path
    identity: Identity
    counts: np.ndarray
    tail: np.ndarray

    @property
    def id(self) -> bytes:
        return self.identity.id

    def open(self) -> Site:
        client_identity._loaded.clear()
        return Site.open(self.folder / "site.toml")

    def files(self) -> dict[str, bytes | None]:
        paths = {name: self.folder / name for name in FILES}
        return {name: path.read_bytes() if path.exists() else None for name, path in paths.items()}

    def edit(self, **policy: Any) -> None:
        """Changes of site.toml's [policy]."""
        config = self.open().config
        changed = config.model_copy(update={"policy": config.policy.model_copy(update=policy)})
        (self.folder / "site.toml").write_text(to_toml(changed), encoding="utf-8")

    def store(self, about: About) -> payload.Payload:
        folder = private_folder(self.open().run_folder(about.run_id))
        if about.purpose == UPDATE:
            given = payload.load(folder, about.round_index, UPDATE)
            assert given is not None
            return given
        given = payload.Payload(about.model, COUNT_INPUTS, self.counts, self.tail)
        payload.store(folder, about.round_index, about.purpose, given)
        return given

    def keys(self, about: About) -> bytes:
        given = self.store(about)
        kind: Any = {"attempt": about.attempt}
        if about.purpose == UPDATE:
            instruction = TrainInstruction(
                **about.head(), **kind, schema_digest="44" * 32, vector=np.zeros(0, np.float32)
            )
        else:
            instruction = CountInstruction(**about.head(), **kind, dictionary_digest="33" * 32)
        return sharing.offer(SiteRun(self.open(), instruction), about.purpose, about.attempt, given).tobytes()

    def shares(self, about: About, threshold: int, key_list: bytes) -> bytes:
        asked = SharesInstruction(**about.of_sum(), threshold=threshold, key_list=array(key_list))
        return sharing.shares(self.open(), asked).ciphertexts.tobytes()

    def masked(self, about: About, recipients: bytes, ciphertexts: bytes) -> np.ndarray:
        asked = MaskInstruction(**about.of_sum(), recipients=array(recipients), ciphertexts=array(ciphertexts))
        return sharing.mask(self.open(), asked).masked

    def survivors(self, about: About, survivors: bytes) -> bytes:
        asked = SurvivorsInstruction(**about.of_sum(), survivors=array(survivors))
        return sharing.survivors(self.open(), asked).signature.tobytes()

    def unmask(self, about: About, signers: bytes, signatures: bytes) -> bytes:
        asked = UnmaskInstruction(**about.of_sum(), signers=array(signers), signatures=array(signatures))
        return sharing.unmask(self.open(), asked).answer.tobytes()

    def book(self) -> Book:
        with Sharing.open(self.open()).book() as book:
            return book


def write_house(folder: Path, identity: Identity, roster: Roster, verified: list[str], n: int) -> House:
    private_folder(folder / "state")
    (folder / "passphrase.txt").write_bytes(SECRET)
    (folder / "passphrase.txt").chmod(0o600)
    write_key(folder / "state" / "identity.pem", identity, SECRET)
    (folder / "roster.json").write_text(roster.to_json(), encoding="utf-8")
    settings = SiteConfig(
        name=f"site-{n}",
        table="table.parquet",
        dictionary="support_icu",
        identity=IdentityConfig(
            roster_digest=roster.digest.hex(), verified=tuple(verified), passphrase_file="passphrase.txt"
        ),
        policy=PolicyConfig(simulated=True),
    )
    (folder / "site.toml").write_text(to_toml(settings), encoding="utf-8")
    rng = np.random.default_rng(n)
    return House(folder, identity, rng.integers(0, 10**6, D).astype(np.uint32), rng.integers(0, 2**40, 1))


def identity_of(n: int) -> Identity:
    return Identity.from_seed(bytes([n]) * 32)


def build(folder: Path, n: int, extra: int = 0) -> list[House]:
    """n hospitals in the order of their ids; the roster has `extra` members that nobody has verified."""
    identities = [identity_of(i + 1) for i in range(n)]
    cards = [Card.make(one, f"site-{i}") for i, one in enumerate(identities)]
    invented = [Card.make(identity_of(100 + i), f"invented-{i}") for i in range(extra)]
    roster = Roster.first(COORDINATOR, "trial", cards + invented)
    verified = [card.fingerprint for card in cards]
    houses = [write_house(folder / f"site-{i}", one, roster, verified, i) for i, one in enumerate(identities)]
    return sorted(houses, key=lambda house: house.id)


@pytest.fixture
def houses(tmp_path: Path) -> list[House]:
    return build(tmp_path, 5)


@dataclass(eq=False)
class Coordinator:
    """An honest one, an exchange at a time."""

    houses: list[House]
    about: About = About()
    threshold: int = 0
    tail: int = 1
    inputs: bytes = COUNT_INPUTS
    attempt: Attempt = field(init=False)
    said: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        about, members = self.about, SiteKeys.open(self.houses[0].folder / "site.toml").roster()
        binding = sums.binding(
            about.config,
            run_id=about.run_id,
            round_index=about.round_index,
            purpose=about.purpose,
            attempt=about.attempt,
            ring_values=D,
            tail_values=self.tail,
            roster=members.digest,
            model_digest=about.model,
            inputs=self.inputs,
        )
        self.attempt = Attempt(binding)
        self.threshold = self.threshold or smallest_threshold(len(self.houses), 1) or 0
        self.by_id = {house.id: house for house in self.houses}

    def keys(self) -> None:
        for house in self.houses:
            self.attempt.add_advert(house.id, house.keys(self.about))
        self.said["key_list"] = self.attempt.close_keys(self.threshold).to_bytes()

    def shares(self) -> None:
        for house in self.houses:
            sealed = house.shares(self.about, self.threshold, self.said["key_list"])
            self.attempt.add_shares(house.id, sealed)
        self.said["recipients"] = self.attempt.close_shares()

    def asked_masked(self, house: House) -> tuple[About, bytes, bytes]:
        return self.about, self.said["recipients"], self.attempt.ciphertexts_for(house.id)

    def masked(self) -> None:
        for house in self.houses:
            self.attempt.add_masked(house.id, house.masked(*self.asked_masked(house)))
        self.said["survivors"] = self.attempt.close_sum()

    def consistency(self) -> None:
        for house in self.houses:
            self.attempt.add_signature(house.id, house.survivors(self.about, self.said["survivors"]))
        self.said["signers"], self.said["signatures"] = self.attempt.close_signatures()

    def unmask(self) -> tuple[list[int], list[int]]:
        for house in self.houses:
            answer = house.unmask(self.about, self.said["signers"], self.said["signatures"])
            self.attempt.add_answer(house.id, answer)
        ring, tail = self.attempt.unmask()
        return ring.tolist(), tail.tolist()

    def run(self, until: int = 5) -> Any:
        steps: list[Callable[[], Any]] = [self.keys, self.shares, self.masked, self.consistency, self.unmask]
        return [step() for step in steps[:until]][-1]


def plain_sum(houses: list[House]) -> tuple[list[int], list[int]]:
    ring = [sum(map(int, column)) % 2**32 for column in zip(*(house.counts for house in houses), strict=True)]
    return ring, [sum(map(int, column)) for column in zip(*(house.tail for house in houses), strict=True)]


def refused(
    code: str, house: House, ask: Callable[[], object], kind: type[WardroundError] = SumError
) -> WardroundError:
    """The refusal of one request, twice, with book and counter as they were."""
    before, errors = house.files(), []
    for _ in range(2):
        with pytest.raises(kind) as caught:
            ask()
        errors.append(caught.value)
        assert caught.value.code == code, caught.value
        assert house.files() == before
    return errors[0]


# ---- The whole way


def test_five_hospitals_add_up_each_message_in_a_new_process(houses: list[House]):
    assert Coordinator(houses).run() == plain_sum(houses)


def test_every_exchange_gives_the_same_bytes_again_after_a_restart(houses: list[House]):
    house, made = houses[0], Coordinator(houses)
    made.keys()
    assert house.keys(made.about) == made.attempt.adverts[house.id].to_bytes()
    first = house.shares(made.about, 4, made.said["key_list"])
    made.shares()
    assert house.shares(made.about, 4, made.said["key_list"]) == first
    vector = house.masked(*made.asked_masked(house))
    sealed = made.attempt.ciphertexts_for(house.id)
    made.masked()
    signature = house.survivors(made.about, made.said["survivors"])
    # Also after it signed, until it forgets its keys.
    assert house.masked(made.about, made.said["recipients"], sealed).tobytes() == vector.tobytes()
    made.consistency()
    answer = house.unmask(made.about, made.said["signers"], made.said["signatures"])
    assert made.unmask() == plain_sum(houses)
    before = house.files()
    assert house.keys(made.about) == made.attempt.keys.adverts[0].to_bytes()
    assert house.shares(made.about, 4, made.said["key_list"]) == first
    assert house.survivors(made.about, made.said["survivors"]) == signature
    assert house.unmask(made.about, made.said["signers"], made.said["signatures"]) == answer
    assert house.files() == before  # answers from the book write nothing
    refused("out-of-turn", house, lambda: house.masked(made.about, made.said["recipients"], sealed))


# ---- Roster and policy


def other_roster(house: House, roster: Roster, *, pin: bool) -> None:
    (house.folder / "roster.json").write_text(roster.to_json(), encoding="utf-8")
    if pin:
        config = house.open().config
        identity = config.identity.model_copy(update={"roster_digest": roster.digest.hex()})
        (house.folder / "site.toml").write_text(to_toml(config.model_copy(update={"identity": identity})))


def rosters(houses: list[House]) -> tuple[Roster, Roster]:
    """With a member more, and with one less."""
    whole = SiteKeys.open(houses[0].folder / "site.toml").roster()
    extra = whole.adding(COORDINATOR, [Card.make(identity_of(50), "stranger")])
    return extra, whole.revoking(COORDINATOR, whole.member(houses[4].id).name)  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("which", [0, 1], ids=["extra", "missing"])
def test_a_roster_that_the_site_did_not_pin_is_refused_at_every_exchange(houses: list[House], which: int):
    made, house = Coordinator(houses), houses[0]
    made.run(2)
    other_roster(house, rosters(houses)[which], pin=False)
    for ask in (
        lambda: house.keys(replace(made.about, attempt=2)),
        lambda: house.shares(made.about, 4, made.said["key_list"]),
        lambda: house.masked(*made.asked_masked(house)),
        lambda: house.survivors(made.about, b"\x1f"),
        lambda: house.unmask(made.about, b"\x1f", b""),
    ):
        refused("verification", house, ask, VerificationError)


@pytest.mark.parametrize("which", [0, 1], ids=["extra", "missing"])
def test_a_site_that_pinned_another_roster_stops_the_sum_by_name(houses: list[House], which: int):
    other_roster(houses[2], rosters(houses)[which], pin=True)
    adverts = b"".join(house.keys(About()) for house in houses)
    for house in houses:
        code = "unknown-member" if which and house is houses[2] else "other-roster"
        refused(code, house, lambda house=house: house.shares(About(), 4, adverts))


def test_hospitals_that_the_coordinator_invented_count_as_colluders(tmp_path: Path):
    houses = build(tmp_path, 5, extra=2)
    binding = Advert.from_bytes(houses[0].keys(About())).binding
    fakes = []
    for i in range(2):
        keys = sharing.client_state.AttemptKeys(*(bytes([9 + 3 * i + j]) * 32 for j in range(3)))
        fakes.append(Advert.make(binding, 3, keys, identity_of(100 + i).key).to_bytes())
    adverts = sorted([*(house.keys(About()) for house in houses), *fakes], key=lambda advert: advert[183:215])
    # n = 7, c = 1, f = 2: 2t > 10, and t - 3 >= 2; five verified ones are all the honest ones there can be.
    for t in range(1, 6):
        refused("threshold", houses[0], lambda t=t: houses[0].shares(About(), t, b"".join(adverts)))
    assert houses[0].shares(About(), 6, b"".join(adverts))
    assert Advert.from_bytes(houses[0].keys(About())).min_survivors == 5  # min_sites and two that it has not verified


def test_a_threshold_or_cohort_below_the_hospitals_own_minimum_is_refused(houses: list[House]):
    made, house = Coordinator(houses), houses[0]
    made.keys()
    house.edit(colluders=2)
    refused("threshold", house, lambda: house.shares(made.about, 3, made.said["key_list"]))
    house.edit(colluders=1, min_sites=6)
    refused("threshold", house, lambda: house.shares(made.about, 5, made.said["key_list"]))
    house.edit(min_sites=5)
    made.shares()
    made.masked()
    refused("threshold", house, lambda: house.survivors(made.about, bitmap(range(4), 5)))


def test_a_site_without_a_pinned_roster_or_identity_shares_nothing(houses: list[House]):
    house = houses[0]
    config = house.open().config
    bare = config.model_copy(update={"identity": config.identity.model_copy(update={"roster_digest": None})})
    (house.folder / "site.toml").write_text(to_toml(bare))
    refused("config", house, lambda: house.keys(About()), ConfigError)
    (house.folder / "state" / "identity.pem").unlink()
    refused("config", house, lambda: house.keys(About()), ConfigError)


# ---- Once


def test_a_second_key_list_recipients_survivors_or_signers_are_refused(houses: list[House]):
    house, made = houses[0], Coordinator(houses)
    made.run(2)
    about, said = made.about, made.said
    refused("out-of-turn", house, lambda: house.shares(about, 5, said["key_list"]))
    refused("out-of-turn", house, lambda: house.shares(about, 4, said["key_list"][375:]))
    sealed = made.attempt.ciphertexts_for(house.id)
    made.masked()
    refused("out-of-turn", house, lambda: house.masked(about, bitmap(range(4), 5), sealed[: 3 * 82]))
    refused("out-of-turn", house, lambda: house.masked(about, said["recipients"], sealed[::-1]))
    house.survivors(about, said["survivors"])
    for other in (range(4), (0, 1, 2, 4), range(2)):
        refused("survivors", house, lambda other=other: house.survivors(about, bitmap(other, 5)))
    made.consistency()
    house.unmask(about, said["signers"], said["signatures"])
    refused("out-of-turn", house, lambda: house.unmask(about, bitmap(range(4), 5), said["signatures"][: 4 * 64]))
    refused("survivors", house, lambda: house.survivors(about, bitmap(range(4), 5)))


def test_two_survivor_sets_at_the_same_time_get_one_signature(houses: list[House]):
    """Two processes serve two instructions at once: the book is held by one of them."""
    house, made = houses[0], Coordinator(houses)
    made.run(3)
    site = house.open()
    asked = [
        SurvivorsInstruction(**made.about.of_sum(), survivors=array(bitmap(who, 5))) for who in (range(5), range(4))
    ]

    def ask(instruction: SurvivorsInstruction) -> str:
        try:
            sharing.survivors(site, instruction)
        except SumError as error:
            return error.code
        return "signed"

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(ask, asked)) == ["signed", "survivors"]


def test_messages_of_another_round_run_purpose_or_attempt_are_refused(houses: list[House]):
    house, made = houses[0], Coordinator(houses)
    made.run(2)
    sealed = made.attempt.ciphertexts_for(house.id)
    for part, value in (("attempt", 2), ("attempt", 0)):
        about = replace(made.about, **{part: value})
        refused("out-of-turn", house, lambda about=about: house.shares(about, 4, made.said["key_list"]))
        refused("out-of-turn", house, lambda about=about: house.masked(about, made.said["recipients"], sealed))
        refused("out-of-turn", house, lambda about=about: house.survivors(about, b"\x1f"))
        refused("out-of-turn", house, lambda about=about: house.unmask(about, b"\x1f", b""))
    for part, value in (("round_index", 1), ("run_id", OTHER_RUN_ID), ("purpose", UPDATE)):
        about = replace(made.about, **{part: value})
        refused("out-of-turn", house, lambda about=about: house.shares(about, 4, made.said["key_list"]))
        # There is no payload to mask, and no sum that was begun.
        with pytest.raises(ProtocolError):
            house.masked(about, made.said["recipients"], sealed)
        if about.purpose == COUNTS:
            house.store(about)
            refused("out-of-turn", house, lambda about=about: house.masked(about, made.said["recipients"], sealed))
            refused("out-of-turn", house, lambda about=about: house.survivors(about, b"\x1f"))
        refused("out-of-turn", house, lambda about=about: house.unmask(about, b"\x1f", b""))
    for purpose in (0, 5, -1):
        about = replace(made.about, purpose=purpose)
        with pytest.raises(ProtocolError, match="purpose"):
            house.shares(about, 4, made.said["key_list"])


def test_a_message_of_another_protocol_version_is_refused():
    message = encode(SharesInstruction(**About().of_sum(), threshold=4, key_list=array(b"")))
    for version in (0, 2, 4, 65535):
        with pytest.raises(ProtocolError, match="version"):
            decode(message[:4] + version.to_bytes(2, "little") + message[6:], SharesInstruction)


def test_another_config_or_model_after_the_keys_is_refused(houses: list[House]):
    """The config decides range, weights and rounding: two vectors under the same masks would show their difference."""
    house, made = houses[0], Coordinator(houses)
    made.run(2)
    other = RUN.model_copy(update={"federation": RUN.federation.model_copy(update={"update_range": 0.5})})
    for about in (replace(made.about, config=other), replace(made.about, model=OTHER_MODEL)):
        _, recipients, sealed = made.asked_masked(house)
        refused("out-of-turn", house, lambda about=about: house.shares(about, 4, made.said["key_list"]))
        refused("out-of-turn", house, lambda about=about, r=recipients, s=sealed: house.masked(about, r, s))
    made.masked()
    for about in (replace(made.about, config=other), replace(made.about, model=OTHER_MODEL)):
        refused("out-of-turn", house, lambda about=about: house.survivors(about, made.said["survivors"]))


def test_another_model_at_one_site_makes_every_site_abort_with_its_name(houses: list[House]):
    about = [replace(About(), model=OTHER_MODEL if house is houses[3] else MODEL) for house in houses]
    adverts = b"".join(house.keys(said) for house, said in zip(houses, about, strict=True))
    for house, said in zip(houses, about, strict=True):
        refused("other-model", house, lambda house=house, said=said: house.shares(said, 4, adverts))


def test_another_payload_under_the_same_masks_is_refused(houses: list[House]):
    house, made = houses[0], Coordinator(houses)
    made.run(2)
    first = house.masked(*made.asked_masked(house))
    folder, asked = house.open().run_folder(RUN_ID), made.asked_masked(house)
    payload.store(folder, 0, COUNTS, payload.Payload(MODEL, COUNT_INPUTS, house.counts + np.uint32(1), house.tail))
    refused("other-sum", house, lambda: house.masked(*asked))
    payload.store(folder, 0, COUNTS, payload.Payload(OTHER_MODEL, COUNT_INPUTS, house.counts, house.tail))
    refused("other-sum", house, lambda: house.masked(*asked))
    house.store(About())
    assert house.masked(*asked).tobytes() == first.tobytes()


def test_survivors_are_signed_for_what_was_masked_whatever_lies_on_disk_now(houses: list[House]):
    house, made = houses[0], Coordinator(houses)
    made.run(3)
    masked = payload.require(house.open().run_folder(RUN_ID), 0, COUNTS).content_digest(COUNTS)
    other = payload.Payload(MODEL, COUNT_INPUTS, house.counts + np.uint32(1), house.tail)
    payload.store(house.open().run_folder(RUN_ID), 0, COUNTS, other)
    house.survivors(made.about, made.said["survivors"])
    assert [content for content, givings in house.book().given.items() if givings[0].survivors] == [masked]


def test_rounds_only_go_forward(houses: list[House]):
    house = houses[0]
    house.keys(About(round_index=2))
    refused("out-of-turn", house, lambda: house.keys(About(round_index=1)))
    refused("out-of-turn", house, lambda: house.shares(About(round_index=1), 4, b""))
    house.keys(About(run_id=OTHER_RUN_ID))  # of another run


# ---- Updates


def with_update(house: House, delta: np.ndarray, weight: int = 10) -> About:
    about = About(round_index=1, purpose=UPDATE)
    tail = np.zeros(sums.update_tail(RUN), np.int64)
    tail[0] = weight
    inputs = sums.input_digest("44" * 32).hex()
    folder = private_folder(house.open().run_folder(RUN_ID))
    update.store(folder, 1, update.StoredUpdate("55" * 32, MODEL, inputs, delta.astype(np.float32), tail))
    return about


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_never_leaves_and_nothing_is_remembered_of_it(houses: list[House], value: float):
    about = About(round_index=1, purpose=UPDATE)
    for house in houses:
        with_update(house, np.full(D, value if house is houses[0] else 0.25))
    tail = sums.update_tail(RUN)
    made = Coordinator(houses, about, tail=tail, inputs=sums.input_digest("44" * 32))
    made.run(2)
    house = houses[0]
    refused("verification", house, lambda: house.masked(*made.asked_masked(house)), VerificationError)


def test_updates_add_up_clipped_weighted_and_counted(houses: list[House]):
    about, tail = About(round_index=1, purpose=UPDATE), sums.update_tail(RUN)
    deltas = []
    for i, house in enumerate(houses):
        deltas.append(np.linspace(-0.5, 0.5 + i, D))
        with_update(house, deltas[-1], weight=i + 1)
    ring, tails = Coordinator(houses, about, tail=tail, inputs=sums.input_digest("44" * 32)).run()
    mean = sums.fixed_point(RUN).mean(np.array(ring, np.uint32), 15.0)
    wanted = sum((i + 1) * np.clip(delta, -1, 1) for i, delta in enumerate(deltas)) / 15
    assert np.allclose(mean, wanted, atol=5 * 100_000 / sums.fixed_point(RUN).scale / 15)
    assert tails[:2] == [15, sum(int((np.abs(delta.astype(np.float32)) > 1).sum()) for delta in deltas)]


def test_a_weight_out_of_range_is_refused(houses: list[House]):
    about = About(round_index=1, purpose=UPDATE)
    for house in houses:
        with_update(house, np.zeros(D), weight=RUN.federation.max_weight + (house is houses[0]))
    made = Coordinator(houses, about, tail=sums.update_tail(RUN), inputs=sums.input_digest("44" * 32))
    made.run(2)
    house = houses[0]
    refused("config", house, lambda: house.masked(*made.asked_masked(house)), ConfigError)


# ---- Differencing


@pytest.mark.parametrize("repeat_with_others", [False, True])  # which is about other sums, not this one
def test_the_quorums_of_two_attempts_that_share_no_honest_site_are_refused(tmp_path: Path, repeat_with_others: bool):
    houses = build(tmp_path, 6)
    for house in houses:
        house.edit(repeat_with_others=repeat_with_others)
    few, more = Coordinator(houses[:4], threshold=3), Coordinator(houses, About(attempt=2), threshold=4)
    few.run(3)
    more.run(2)
    for house in houses[:4]:
        refused("difference", house, lambda house=house: house.masked(*more.asked_masked(house)))
    assert Coordinator(houses, About(attempt=3), threshold=5).run() == plain_sum(houses)


@pytest.mark.parametrize("about", [About(OTHER_RUN_ID), About(OTHER_RUN_ID, model=OTHER_MODEL), About(round_index=1)])
def test_the_quorums_of_two_sums_of_the_same_counts_that_share_no_honest_site_are_refused(tmp_path: Path, about: About):
    houses = build(tmp_path, 6)
    Coordinator(houses[:4], threshold=3).run(3)
    more = Coordinator(houses, about, threshold=4)
    more.run(2)
    refused("difference", houses[0], lambda: houses[0].masked(*more.asked_masked(houses[0])))


def test_the_same_counts_are_signed_into_no_second_run_with_other_survivors(tmp_path: Path):
    houses = build(tmp_path, 6)
    Coordinator(houses[:4], threshold=3).run()
    about = About(OTHER_RUN_ID, model=OTHER_MODEL)
    other = Coordinator(houses, about, threshold=5)
    other.run(3)
    house = houses[0]
    refused("difference", house, lambda: house.survivors(about, other.said["survivors"]))
    same = Coordinator(houses[:4], About("ef" * 16), threshold=3)
    assert same.run() == plain_sum(houses[:4])
    house.edit(repeat_with_others=True)  # the hospital's own decision
    assert house.survivors(about, other.said["survivors"])


def test_after_signing_a_site_joins_no_other_attempt_and_a_new_attempt_closes_the_one_before(houses: list[House]):
    house = houses[0]
    first, second = Coordinator(houses), Coordinator(houses, About(attempt=2))
    first.run(3)
    second.run(1)
    refused("out-of-turn", house, lambda: house.keys(About()))
    refused("out-of-turn", house, lambda: house.survivors(About(), first.said["survivors"]))
    refused("out-of-turn", house, lambda: house.shares(About(), 4, first.said["key_list"]))
    second.shares()
    second.masked()
    second.consistency()
    for attempt in (1, 3, 2**32 - 1):
        refused("out-of-turn", house, lambda attempt=attempt: house.keys(About(attempt=attempt)))
    assert second.unmask() == plain_sum(houses)
    refused("out-of-turn", house, lambda: house.keys(About(attempt=3)))


# ---- What lies on the disk


@pytest.mark.parametrize("writes", [1, 2])  # the book is written to two files in turn: two ago, it was in the same one
def test_a_state_folder_restored_from_a_copy_is_refused(houses: list[House], tmp_path: Path, writes: int):
    house, made = houses[0], Coordinator(houses)
    made.run(3)
    shutil.copytree(house.folder / "state", tmp_path / "copy")
    before = newest_book(house.folder)
    house.survivors(made.about, made.said["survivors"])
    if writes == 2:
        house.keys(About(OTHER_RUN_ID))
    assert (newest_book(house.folder) == before) == (writes == 2)
    shutil.rmtree(house.folder / "state")
    shutil.copytree(tmp_path / "copy", house.folder / "state")
    for ask in (
        lambda: house.survivors(made.about, bitmap(range(4), 5)),
        lambda: house.survivors(made.about, made.said["survivors"]),
        lambda: house.keys(About(attempt=2)),
        lambda: house.keys(About(OTHER_RUN_ID)),
    ):
        refused("restored", house, ask)


def newest_book(folder: Path) -> Path:
    writes = json.loads((folder / "sums.counter").read_bytes())["writes"]
    return folder / BOOKS[writes % 2]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "sums.counter").unlink(),
        lambda folder: (folder / "sums.counter").write_bytes(b"{}"),
        lambda folder: (folder / "sums.counter").write_bytes(b"[]"),
        lambda folder: (folder / "sums.counter").write_bytes(b"\xff"),
        lambda folder: (folder / "sums.counter").write_bytes(b'{"writes": null, "sha256": 5}'),
        lambda folder: newest_book(folder).unlink(),
        lambda folder: newest_book(folder).write_bytes(b""),
    ],
)
def test_a_book_or_counter_that_is_missing_or_damaged_is_refused(houses: list[House], damage: Callable[[Path], object]):
    house, made = houses[0], Coordinator(houses)
    made.run(3)
    damage(house.folder)
    refused("restored", house, lambda: house.survivors(made.about, made.said["survivors"]))
    refused("restored", house, lambda: house.keys(About(OTHER_RUN_ID)))


def before_reply(house: House, ask: Callable[[], Any]) -> Any:
    """The reply of a process that is killed after the counter was written: it never left, and the old book is there."""
    older = newest_book(house.folder).read_bytes() if (house.folder / "sums.counter").exists() else b""
    reply = ask()
    (other,) = {house.folder / name for name in BOOKS} - {newest_book(house.folder)}
    other.write_bytes(older)
    return reply


def test_a_crash_between_counter_and_reply_gives_the_same_reply_again(houses: list[House]):
    house, made = houses[0], Coordinator(houses)
    advert = before_reply(house, lambda: house.keys(made.about))
    assert house.keys(made.about) == advert
    made.keys()
    sealed = before_reply(house, lambda: house.shares(made.about, 4, made.said["key_list"]))
    with pytest.raises(SumError, match="out-of-turn"):
        house.shares(made.about, 5, made.said["key_list"])
    assert house.shares(made.about, 4, made.said["key_list"]) == sealed
    made.shares()
    vector = before_reply(house, lambda: house.masked(*made.asked_masked(house)))
    assert house.masked(*made.asked_masked(house)).tobytes() == vector.tobytes()
    made.masked()
    signature = before_reply(house, lambda: house.survivors(made.about, made.said["survivors"]))
    with pytest.raises(SumError, match="survivors"):
        house.survivors(made.about, bitmap(range(4), 5))
    assert house.survivors(made.about, made.said["survivors"]) == signature
    made.consistency()
    answer = before_reply(house, lambda: house.unmask(made.about, made.said["signers"], made.said["signatures"]))
    assert house.unmask(made.about, made.said["signers"], made.said["signatures"]) == answer
    assert made.unmask() == plain_sum(houses)


def test_a_crash_before_the_counter_changed_nothing(houses: list[House], monkeypatch: pytest.MonkeyPatch):
    """The reply never left, so another instruction may follow."""
    house, made = houses[0], Coordinator(houses)
    made.run(3)
    newest = newest_book(house.folder)
    before = newest.read_bytes(), (house.folder / "sums.counter").read_bytes()

    def killed(path: Path, *parts: bytes) -> None:
        assert path.name == "sums.counter"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sharing, "write_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            house.survivors(made.about, made.said["survivors"])
    assert (newest.read_bytes(), (house.folder / "sums.counter").read_bytes()) == before
    assert house.survivors(made.about, bitmap(range(4), 5))


def test_nothing_is_answered_when_the_book_cannot_be_written(houses: list[House], monkeypatch: pytest.MonkeyPatch):
    house, made = houses[0], Coordinator(houses)
    made.run(3)

    def full(path: Path, *parts: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sharing, "write_atomic", full)
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            house.survivors(made.about, made.said["survivors"])


def test_the_book_of_one_hospital_says_nothing_to_another_and_survives_a_rotation(houses: list[House]):
    house, other = houses[0], houses[1]
    made = Coordinator(houses)
    made.run(3)
    for name in FILES:
        shutil.copy(house.folder / name, other.folder / name)
    refused("verification", other, lambda: other.keys(About(attempt=2)), VerificationError)
    # A rotation: the book is under the key that was retired.
    state = house.folder / "state"
    os.link(state / "identity.pem", state / "identity.retired-1.pem")
    (state / "identity.pem").unlink()
    new = identity_of(77)
    write_key(state / "identity.pem", new, SECRET)
    config = house.open().config
    whole = SiteKeys(house.folder, config).roster()
    rotated = whole.adding(COORDINATOR, [Card.make(new, config.name, house.identity)])
    other_roster(house, rotated, pin=True)
    assert house.book().newest == {RUN_ID: 0}
    refused("out-of-turn", house, lambda: house.shares(About(attempt=2), 4, made.said["key_list"]))


def secrets_of(state: ClientSum) -> list[bytes]:
    keys = state.secrets
    found = [value for pair in (*state.shares, state.own_shares) for value in (pair[:33], pair[33:]) if value]
    return found + ([keys.encryption_key, keys.mask_key, keys.self_seed] if keys else [])


def spellings(secret: bytes) -> Iterator[bytes]:
    number = int.from_bytes(secret, "little")
    yield from (secret, secret.hex().encode(), str(number).encode(), repr(secret)[2:-1].encode())
    encoded = base64.b64encode(secret).decode()
    yield from (encoded.encode(), encoded[: len(encoded) // 4 * 4 - 4].encode(), f"{number:x}".encode())


def everything_below(folder: Path, leaving: tuple[str, ...]) -> Mapping[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in leaving
    }


def test_no_key_share_or_payload_lies_in_the_clear_and_modes_are_the_owners(houses: list[House]):
    house, made = houses[0], Coordinator(houses)
    private = [house.identity.storage_key(), house.identity.key.private_bytes_raw()]
    for step in (made.keys, made.shares, made.masked, made.consistency):
        step()
        (state,) = [state for sums_ in house.book().sums.values() for _, state in sums_.values()]
        private += secrets_of(state)
        for name, data in everything_below(house.folder, ("passphrase.txt",)).items():
            for secret in private:
                assert not any(spelling in data for spelling in spellings(secret)), name
            if not name.startswith("state/runs/"):  # payloads lie there, mode 0700
                assert house.counts.tobytes() not in data
    assert len(private) > 20
    for name in (*BOOKS, "state/sums.lock"):
        assert (house.folder / name).stat().st_mode & 0o077 == 0
    assert (house.folder / "state").stat().st_mode & 0o077 == 0
    assert (house.folder / "sums.counter").stat().st_mode & 0o077 == 0
    made.unmask()
    (state,) = [state for sums_ in house.book().sums.values() for _, state in sums_.values()]
    assert secrets_of(state) == [] and state.secrets is None  # forgotten
    assert sorted((house.folder / name).stat().st_size > 0 for name in BOOKS) == [False, True]  # and no older book left


def test_every_write_has_its_own_nonce_and_a_changed_byte_is_found(houses: list[House]):
    house, seen = houses[0], set()
    for attempt in range(1, 6):
        house.keys(About(attempt=attempt))
        seen.add(newest_book(house.folder).read_bytes()[:12])
    assert len(seen) == 5
    here, path = Sharing.open(house.open()), newest_book(house.folder)
    sealed = path.read_bytes()
    for at in (0, 11, 12, len(sealed) - 1):
        bent = sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :]
        with pytest.raises(VerificationError):
            here._open(bent)
    assert json.loads(here._open(sealed))["newest"] == {RUN_ID: 0}


def test_errors_logs_and_reprs_hold_nothing_secret(houses: list[House]):
    """Through the gate, as a coordinator would: failure codes leave, texts go to the site's log."""
    house, made = houses[0], Coordinator(houses)
    made.run(2)
    _, recipients, sealed = made.asked_masked(house)
    (state,) = [state for sums_ in house.book().sums.values() for _, state in sums_.values()]
    private = [*secrets_of(state), house.identity.storage_key(), house.identity.key.private_bytes_raw(), SECRET]
    head = made.about.of_sum()
    asks = [
        (SharesInstruction(**head, threshold=5, key_list=array(made.said["key_list"])), "out-of-turn"),
        (SharesInstruction(**{**head, "attempt": 2}, threshold=5, key_list=array(b"")), "out-of-turn"),
        (MaskInstruction(**head, recipients=array(recipients), ciphertexts=array(sealed[::-1])), "share"),
        (MaskInstruction(**head, recipients=array(recipients), ciphertexts=array(sealed[1:])), "malformed"),
        (SurvivorsInstruction(**head, survivors=array(b"\x1f")), "out-of-turn"),
        (UnmaskInstruction(**head, signers=array(b"\x1f"), signatures=array(b"")), "out-of-turn"),
        (SharesInstruction(**{**head, "purpose": 9}, threshold=5, key_list=array(b"")), "protocol"),
        (SharesInstruction(**head, threshold=-1, key_list=array(b"")), "out-of-turn"),
    ]
    replies = []
    for instruction, code in asks:
        client_identity._loaded.clear()
        reply_head, vectors = gate.respond(house.folder / "site.toml", type(instruction), *split(instruction))
        reply = join(reply_head, vectors, Reply)
        assert isinstance(reply, Failure) and reply.code == code, reply
        replies.append(reply_head)
    shown = [repr(state).encode(), repr(Sharing.open(house.open())).encode(), repr(house.book()).encode(), *replies]
    log = (house.folder / "state" / "site.log").read_bytes()
    assert re.search(rb"SumError: share", log) and (house.folder / "state" / "site.log").stat().st_mode & 0o077 == 0
    for text in (*shown, log, (house.folder / "state" / "ledger.jsonl").read_bytes()):
        for secret in private:
            assert not any(spelling in text for spelling in spellings(secret))


def test_the_book_reads_back_what_it_wrote(houses: list[House]):
    Coordinator(houses).run()
    Coordinator(houses, About(OTHER_RUN_ID)).run(3)
    book = houses[0].book()
    text = book.to_json()
    assert Book.from_json(text).to_json() == text
    assert len(book.sums) == 2 and len(book.given) == 1
    ((only,),) = (book.given.values(),)
    assert sorted(len(giving.survivors) for giving in only) == [0, 5]  # each sum apart; the second was not signed
