"""A whole run whose every received byte is kept: no site's payload is in it, and the sum is the plain one."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from wardround.client import payload
from wardround.client.app import unpack
from wardround.client.payload import Payload
from wardround.common import sums
from wardround.common.config import RunConfig
from wardround.common.fixedpoint import rounding_key
from wardround.common.messages import (
    REPLIES,
    EvaluateReply,
    Failure,
    FinalizeReply,
    KeysReply,
    MaskedReply,
    Reply,
    SchemaReply,
    WarmupReply,
    dtypes_of,
    encode,
    join,
)
from wardround.common.secagg.keys import COUNTS, PURPOSES, TEST, UPDATE, VALIDATION, Advert
from wardround.server.cohort import QuorumError
from wardround.server.tracking import SilentProgress
from wardround.simulations import federation

pytestmark = pytest.mark.usefixtures("cheap_scrypt")

SITES, ROUNDS = 3, 2
RANGE = 0.004
BINDING = slice(4, 181)  # of an advert: what the coordinator asked for, so it may hold any small number
WINDOW = 32  # bytes


def settings(base: Path, secure: str = "bonawitz", **changes: Any) -> RunConfig:
    data: dict[str, Any] = {
        "name": "trial",
        "privacy": {"enabled": False},
        "seed": 3,
        "model": {"id": str(base), "device": "cpu", "prompt": "en_short"},
        "warmup": {"enabled": False},
        "questions": {"features_per_record": 4},
        "grpo": {"local_steps": 2, "patients_per_step": 4, "expectation": "exact", "learning_rate": 0.01},
        "federation": {
            "rounds": ROUNDS,
            "validation_questions_per_site": 5,
            "rollback_tolerance": 1.0,
            "weighting": "patients",
            "update_range": RANGE,  # some values are clipped
            "secure_aggregation": secure,
        },
        "evaluation": {"questions_per_site": 10, "bootstrap_samples": 100, "samples": 0},
        "simulation": {"registry": "synthetic", "sites": SITES},
    }
    return RunConfig.model_validate({**data, **changes})


@dataclass(eq=False)
class Whole:
    """A run: its folder, its result, and every message that the coordinator received."""

    config: RunConfig
    out: Path
    evaluation: dict[str, Any] = field(default_factory=dict)
    received: list[Message] = field(default_factory=list)

    def run(self) -> "Whole":
        received = self.received

        class Recorder(federation.InProcessGrid):
            """Keeps what the coordinator pulls; there is no other way to it."""

            def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
                for message in super().pull_messages(message_ids):
                    received.append(message)
                    yield message

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(federation, "InProcessGrid", Recorder)
            self.evaluation = federation.simulate(self.config, self.out, resume=False)
        return self

    @property
    def replies(self) -> list[Reply]:
        return [join(*unpack(message.content), Reply) for message in self.received]

    def payloads(self) -> Iterator[tuple[str, int, int, Payload]]:
        """Every site's payload of every sum: site, purpose, round, payload."""
        for folder in sorted((self.out / "sites").glob("site-*")):
            (run_folder,) = (folder / "state" / "runs").iterdir()
            for purpose in PURPOSES:
                for index in range(ROUNDS + 1):
                    given = payload.load(run_folder, index, purpose)
                    if given is not None:
                        yield folder.name, purpose, index, given


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Whole:
    return Whole(settings(tiny_model_path), tmp_path_factory.mktemp("secure") / "run").run()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Whole:
    return Whole(settings(tiny_model_path, "none"), tmp_path_factory.mktemp("plain") / "run").run()


def clear(config: RunConfig, site: str, index: int, given: Payload) -> tuple[np.ndarray, np.ndarray]:
    """What the masks of a payload hide: the ring as uint32, and the tail."""
    if given.ring.dtype == np.uint32:
        return given.ring, given.tail
    key, tail = rounding_key(config.seed, site, index), given.tail.copy()
    ring, tail[sums.CLIPPED] = sums.fixed_point(config).quantise(given.ring.astype(np.float32), float(tail[0]), key)
    return ring, tail


def vectors_of(config: RunConfig, site: str, index: int, given: Payload) -> dict[str, bytes]:
    """Every form in which a payload could have left: what it is called, and its bytes."""
    ring, tail = clear(config, site, index, given)
    forms = {
        "tail": tail.astype("<i8").tobytes(),
        "tail in halves": tail.astype("<u8").view("<u4").tobytes(),
        "tail as uint32": tail.astype("<u4").tobytes(),
        "tail as float64": tail.astype("<f8").tobytes(),
        "tail as JSON": json.dumps(tail.tolist()).encode(),
    }
    if len(ring):
        forms |= {
            "ring": ring.astype("<u4").tobytes(),
            "ring as int64": ring.astype("<i8").tobytes(),
            "signed ring as int64": ring.view(np.int32).astype("<i8").tobytes(),
            "ring as float32": ring.view(np.int32).astype("<f4").tobytes(),
        }
    if given.ring.dtype == np.float32:
        forms |= {"update": given.ring.astype("<f4").tobytes(), "update as float64": given.ring.astype("<f8").tobytes()}
        weighted = given.ring.astype(np.float64) * tail[0]
        forms |= {"weighted update": weighted.astype("<f4").tobytes(), "in float64": weighted.astype("<f8").tobytes()}
    return forms


def numbers_of(tail: np.ndarray) -> set[bytes]:
    """Every single number of a tail but 0, as 8 little-endian bytes."""
    return {int(value).to_bytes(8, "little") for value in tail if value}


def pieces_of(form: bytes) -> list[bytes]:
    """A vector's pieces that are no run of a few values: each by itself would say something of patients."""
    cut = [form[start : start + WINDOW] for start in range(0, len(form) - WINDOW + 1, WINDOW)]
    return [piece for piece in cut if len(set(piece)) > 8]


class Haystack:
    """Bytes to be searched for many needles: the 8 bytes at every place are looked up before anything is compared."""

    def __init__(self, parts: Iterable[bytes]) -> None:
        self.data = b"|".join(parts)
        shifted = [np.frombuffer(self.data[at : at + (len(self.data) - at) // 8 * 8], "<u8") for at in range(8)]
        self.words = np.unique(np.concatenate(shifted))

    def holds(self, needles: list[bytes]) -> bool:
        """Whether any of the needles, of at least 8 bytes each, is in the data."""
        first = np.array([int.from_bytes(needle[:8], "little") for needle in needles], np.uint64)
        places = np.minimum(np.searchsorted(self.words, first), len(self.words) - 1)
        return any(needles[at] in self.data for at in np.flatnonzero(self.words[places] == first))

    def found(self, forms: dict[str, bytes]) -> set[str]:
        """Which vectors are in the data, whole or in a piece."""
        long = {name: form for name, form in forms.items() if len(form) >= 8}
        return {name for name, form in long.items() if self.holds([form, *pieces_of(form)])}


def unannounced(reply: Reply) -> bytes:
    """A reply's vectors without the binding, which the coordinator knows beforehand."""
    parts = [getattr(reply, name).tobytes() for name in dtypes_of(type(reply))]
    if isinstance(reply, KeysReply | EvaluateReply) and reply.advert.size:
        advert = reply.advert.tobytes()
        parts = [advert[: BINDING.start] + advert[BINDING.stop :]]
    return b"".join(parts)


def test_every_site_gave_something_to_every_sum(secure: Whole):
    assert number_of_payloads(secure) == {
        COUNTS: SITES,
        UPDATE: SITES * ROUNDS,
        VALIDATION: SITES * (ROUNDS + 1),
        TEST: SITES,
    }
    clipped = [given.ring for _, purpose, _, given in secure.payloads() if purpose == UPDATE]
    assert all(ring.dtype == np.float32 and np.abs(ring).max() > RANGE for ring in clipped)
    weights = {int(given.tail[0]) for _, purpose, _, given in secure.payloads() if purpose == UPDATE}
    assert min(weights) > 100


def number_of_payloads(whole: Whole) -> dict[int, int]:
    counted = dict.fromkeys(PURPOSES, 0)
    for _, purpose, _, _ in whole.payloads():
        counted[purpose] += 1
    return counted


def test_every_received_byte_is_one_of_a_message_of_the_protocol(secure: Whole):
    exchanges = ROUNDS + (ROUNDS + 1) + 2  # updates; validations; counts and test
    assert len(secure.received) == SITES * (5 * exchanges + 3)  # warm-up, schema, finalize beside
    for message, reply in zip(secure.received, secure.replies, strict=True):
        assert isinstance(message.content, RecordDict) and message.has_content()
        assert set(message.content) == {"wardround", "wardround.vectors"}
        assert set(message.content.config_records["wardround"]) == {"head"}
        head, vectors = unpack(message.content)
        assert head + b"".join(vectors.values()) == encode(reply)
    assert {reply.samples for reply in secure.replies if isinstance(reply, EvaluateReply)} == {"[]"}
    kinds = {type(reply) for reply in secure.replies}
    assert kinds == set(REPLIES) - {Failure}


@pytest.fixture(scope="module")
def secure_bytes(secure: Whole) -> tuple[Haystack, Haystack]:
    """Every received byte; and without what the coordinator knows beforehand, where small numbers must not be."""
    return Haystack(map(encode, secure.replies)), Haystack(map(unannounced, secure.replies))


@pytest.mark.parametrize("purpose", PURPOSES, ids=PURPOSES.values())
def test_no_payload_of_a_site_is_in_any_byte_that_the_coordinator_received(
    secure: Whole, secure_bytes: tuple[Haystack, Haystack], purpose: int
):
    received, without_binding = secure_bytes
    for site, kind, index, given in secure.payloads():
        if kind == purpose:
            assert not received.found(vectors_of(secure.config, site, index, given))
            _, tail = clear(secure.config, site, index, given)
            assert not without_binding.holds(sorted(numbers_of(tail)))


def test_the_search_finds_every_form_of_a_payload_in_a_message_that_carries_it(secure: Whole):
    for site, _, index, given in list(secure.payloads())[: 1 + 2 * ROUNDS + 1 + 1]:  # of one site
        ring, tail = clear(secure.config, site, index, given)
        forms = {name: form for name, form in vectors_of(secure.config, site, index, given).items() if len(form) >= 8}
        for name, form in forms.items():
            for part in (form, *pieces_of(form)[-1:]):
                message = KeysReply(run_id="", site="", round_index=0, advert=np.frombuffer(b"odd" + part, np.uint8))
                assert Haystack([encode(message)]).found({name: form}) == {name}
        bare = np.concatenate([ring, tail.astype("<u8").view("<u4")])
        message = MaskedReply(run_id="", site="", round_index=0, masked=bare)
        assert {"tail", "ring"} & set(forms) <= Haystack([encode(message)]).found(forms)
        assert all(number in unannounced(message) for number in numbers_of(tail))


def test_no_payload_of_a_site_is_in_a_file_of_the_coordinators(secure: Whole):
    files = [path for path in secure.out.rglob("*") if path.is_file() and "sites" not in path.parts]
    assert {"run.json", "rounds.jsonl", "finalize.record"} <= {path.name for path in files}
    kept = Haystack(path.read_bytes() for path in files)
    for site, _, index, given in secure.payloads():
        # A number alone, and a short tail as text, may be there by chance.
        forms = vectors_of(secure.config, site, index, given)
        assert not kept.found({name: form for name, form in forms.items() if len(form) >= 32})


def test_masked_vectors_of_one_site_look_like_noise_each_by_itself(secure: Whole):
    values = np.concatenate([reply.masked for reply in secure.replies if isinstance(reply, MaskedReply)])
    shares = np.bincount(values >> np.uint32(28), minlength=16) / len(values)
    assert len(values) > 10_000 and np.abs(shares - 1 / 16).max() < 5 * np.sqrt(1 / 16 / len(values))


def test_every_attempt_had_keys_of_its_own(secure: Whole):
    adverts = [
        Advert.from_bytes(reply.advert.tobytes())
        for reply in secure.replies
        if isinstance(reply, KeysReply | EvaluateReply)
    ]
    keys = [key for advert in adverts for key in (advert.encryption_key, advert.mask_key, advert.commitment)]
    assert len(keys) == len(set(keys)) == 3 * SITES * (2 * ROUNDS + 3)
    assert len({advert.id for advert in adverts}) == SITES


def test_secure_sums_give_the_plain_sums_adapter_and_evaluation_byte_for_byte(secure: Whole, plain: Whole):
    for file in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "model/model.safetensors"):
        assert (secure.out / file).read_bytes() == (plain.out / file).read_bytes()
    assert (secure.out / "evaluation.json").read_bytes() == (plain.out / "evaluation.json").read_bytes()
    assert (secure.out / "schema.json").read_bytes() == (plain.out / "schema.json").read_bytes()
    assert secure.evaluation == plain.evaluation and secure.config.digest() != plain.config.digest()
    varying = {"seconds", "seconds_train", "bytes_up", "bytes_down"}
    lines = [
        [
            {key: value for key, value in json.loads(line).items() if key not in varying}
            for line in (whole.out / "rounds.jsonl").read_text().splitlines()
        ]
        for whole in (secure, plain)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == ROUNDS


def test_the_sum_that_moved_the_adapter_is_that_of_the_stored_updates(secure: Whole):
    first = json.loads((secure.out / "rounds.jsonl").read_text().splitlines()[0])
    moved = np.zeros(0)
    weights = 0
    for _, purpose, index, given in secure.payloads():
        if (purpose, index) == (UPDATE, 1):
            weight = float(given.tail[0])
            clipped = np.clip(given.ring.astype(np.float64), -RANGE, RANGE) * weight
            moved, weights = clipped if not len(moved) else moved + clipped, weights + weight
    assert first["update_norm_l2"] == pytest.approx(np.linalg.norm(moved / weights), rel=1e-5)


def test_sums_in_the_clear_send_no_payload_either(plain: Whole):
    received = Haystack(map(encode, plain.replies))
    assert {type(reply) for reply in plain.replies} == {
        WarmupReply, KeysReply, SchemaReply, EvaluateReply, FinalizeReply,
    }  # fmt: skip
    assert not any(unannounced(reply) for reply in plain.replies)
    for site, _, index, given in plain.payloads():
        assert not received.found(vectors_of(plain.config, site, index, given))


def test_one_site_that_is_not_simulated_ends_a_run_in_the_clear_and_not_a_secure_one(
    tmp_path: Path, tiny_model_path: Path
):
    class Real(SilentProgress):
        """Turns site-02 into a hospital's before it hears of the run."""

        def __init__(self, out: Path) -> None:
            self.site = out / "sites" / "site-02" / "site.toml"

        def begin(self, phase: str, round_index: int, sites: object) -> None:
            if phase == "warm-up":
                text = self.site.read_text().replace("simulated = true", "simulated = false\nrequire_privacy = false")
                self.site.write_text(text)

    out = tmp_path / "plain"
    with pytest.raises(QuorumError, match=r"warm-up: .*site-02 \(refused\)"):
        federation.simulate(settings(tiny_model_path, "none"), out, resume=False, progress=Real(out))
    assert not list((out / "sites" / "site-02" / "state").rglob("*.record"))
    out = tmp_path / "secure"
    short = {"rounds": 1, "validation_questions_per_site": 0}
    federation.simulate(settings(tiny_model_path, federation=short), out, resume=False, progress=Real(out))
    assert (out / "evaluation.json").is_file()
