"""Sites that answer every phase with small payloads and the real state machines of a secure sum, and can misbehave.

What a site keeps is in `Sites`, so that a coordinator can be stopped and another one go on with the same sites. Nothing
here trains or scores: an update follows from the model it starts from, everything else is a small table's.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from wardround.client.payload import Payload
from wardround.client.registry import to_registry
from wardround.common import sums
from wardround.common.adapter import Manifest, TensorSpec
from wardround.common.config import RunConfig
from wardround.common.counts import Counts, count
from wardround.common.errors import ProtocolError, SumError
from wardround.common.global_model import GlobalModel
from wardround.common.identity import Card, Identity
from wardround.common.messages import (
    CountInstruction,
    EvaluateInstruction,
    EvaluateReply,
    Failure,
    FinalizeInstruction,
    FinalizeReply,
    Instruction,
    KeysReply,
    MaskedReply,
    MaskInstruction,
    Reply,
    SchemaInstruction,
    SchemaReply,
    SharesInstruction,
    SharesReply,
    SumInstruction,
    SurvivorsInstruction,
    SurvivorsReply,
    TrainInstruction,
    UnmaskInstruction,
    UnmaskReply,
    ValidateInstruction,
    WarmupInstruction,
    WarmupReply,
    encode,
)
from wardround.common.roster import Roster
from wardround.common.schema import Schema
from wardround.common.secagg import client_state
from wardround.common.secagg.client_state import ClientSum, Membership
from wardround.common.secagg.keys import COUNTS as COUNTS_SUM
from wardround.common.secagg.keys import TEST, UPDATE, VALIDATION, Giving
from wardround.common.statistics import CHANCE_UNIT, Tally
from wardround.server.evaluate import MODELS
from wardround.server.phases import Answer
from wardround.simulations.synthetic_registry import make

SPECS = (TensorSpec("a", (2,), False), TensorSpec("b", (3,), True))
ROUND_ZERO = GlobalModel(Manifest(SPECS, "base", "ffa"), np.array([1, 2, 0, 0, 0], np.float32))
TABLE, DICTIONARY = make(200, seed=2)
REGISTRY = to_registry("synthetic", pa.Table.from_pandas(TABLE, preserve_index=False), DICTIONARY)
COUNTS: Counts = count(REGISTRY.values, DICTIONARY)
PATIENTS = 100  # of every site

# The work that begins a sum, by purpose; its later exchanges are "Train/Shares", "Train/Mask", …
WORK: dict[int, type[Instruction]] = {
    COUNTS_SUM: CountInstruction,
    UPDATE: TrainInstruction,
    VALIDATION: ValidateInstruction,
    TEST: EvaluateInstruction,
}
PURPOSE_OF = {kind: purpose for purpose, kind in WORK.items()}
EXCHANGES = ("", "/Shares", "/Mask", "/Survivors", "/Unmask")
Twist = Callable[[Any], Reply]  # what a site makes of its right reply


class Stopped(BaseException):
    """Stands for a kill: nothing catches it."""


def failing(code: str) -> Twist:
    """The site has done its work, and its reply says only that it failed; as a reply that was lost."""
    return lambda reply: Failure(run_id=reply.run_id, site=reply.site, round_index=reply.round_index, code=code)


def changed(**fields: Any) -> Twist:
    """The right reply with other fields."""
    return lambda reply: replace(reply, **fields)


def identity(name: str) -> Identity:
    """A site's, always the same."""
    return Identity.from_seed(hashlib.sha256(name.encode()).digest())


def roster_of(names: Sequence[str]) -> Roster:
    """Signed by the coordinator."""
    return Roster.first(identity("the coordinator"), "trial", [Card.make(identity(name), name) for name in names])


def names_of(sites: int) -> dict[int, str]:
    """Nodes 2, 3, … with their sites."""
    return {node: f"site-{node - 1:02d}" for node in range(2, sites + 2)}


def kind_of(instruction: Instruction) -> str:
    """What is asked, in a word: "Train", "Train/Mask"."""
    word = type(instruction).__name__.removesuffix("Instruction")
    if isinstance(instruction, SumInstruction):
        return f"{WORK[instruction.purpose].__name__.removesuffix('Instruction')}/{word}"
    return word


@dataclass
class Sites:
    """The consortium, as the coordinator reaches it: implements `Exchange`.

    Attributes:
        names: node → what the site calls itself.
        twists: by (name, kind) or (name, kind, round): what it answers; a word where it is silent for that reason, and
            has not even seen the instruction.
        once: each twist is used up by one answer.
        away: sites that are not there.
        stop_after: after so many instructions the coordinator is killed.
        correct: right answers of a site in a round's validation, of 100.
        targets: of the schema.
        payloads: ring and tail in place of the phase's own, by name.
        identities: keys in place of the site's own, by name.
        colluders, min_sites: of every site's policy; `wanted` by name in place of `min_sites`.
        rosters: pinned in place of the coordinator's, by name.
        asked: every question: who, what.
        attempts: of every sum, the attempts that a site was asked in.
        instructions: the same, whole.
        given: what every site remembers of its payloads.
    """

    names: dict[int, str] = field(default_factory=lambda: names_of(5))
    twists: dict[tuple[str, str] | tuple[str, str, int], Twist | str] = field(default_factory=dict)
    once: bool = False
    away: set[str] = field(default_factory=set)
    stop_after: int = 10**9
    correct: Callable[[str, int], int] = lambda site, index: 50 + index
    targets: tuple[str, ...] = ()
    payloads: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    identities: dict[str, Identity] = field(default_factory=dict)
    rosters: dict[str, Roster] = field(default_factory=dict)
    colluders: int = 1
    min_sites: int = 3
    wanted: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    instructions: list[tuple[str, Instruction]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    stored: dict[tuple[str, int, int], Payload] = field(default_factory=dict)
    states: dict[tuple[str, int, int], ClientSum] = field(default_factory=dict)
    given: dict[tuple[str, str], list[Giving]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.roster = roster_of(list(self.names.values()))

    def nodes(self) -> list[int]:
        return [node for node, name in self.names.items() if name not in self.away]

    def ask(self, instructions: Mapping[int, Instruction]) -> Iterator[Answer]:
        for node, instruction in instructions.items():
            if len(self.asked) >= self.stop_after:
                raise Stopped
            site, kind = self.names.get(node, "?"), kind_of(instruction)
            self.asked.append((site, kind))
            self.instructions.append((site, instruction))
            answer = self.answer(node, site, kind, instruction)
            self.answers.append(answer)
            yield answer

    def answer(self, node: int, site: str, kind: str, instruction: Instruction) -> Answer:
        down = len(encode(instruction))
        keys = ((site, kind, instruction.round_index), (site, kind))
        key = next((key for key in keys if key in self.twists), keys[1])
        twist = (self.twists.pop if self.once else self.twists.get)(key, None)
        if site in self.away or site == "?" or isinstance(twist, str):
            return Answer(node, None, twist if isinstance(twist, str) else "silent", 0, down)
        try:
            reply = self.reply(site, instruction)
        except (SumError, ProtocolError) as error:  # as client/gate.py answers
            head = {"run_id": instruction.run_id, "site": site, "round_index": instruction.round_index}
            reply = Failure(**head, code=error.code)
        if twist is not None:
            reply = twist(reply)
        return Answer(node, reply, reply.code if isinstance(reply, Failure) else "", len(encode(reply)), down)

    def reply(self, site: str, instruction: Instruction) -> Reply:
        head = {"run_id": instruction.run_id, "site": site, "round_index": instruction.round_index}
        if isinstance(instruction, SumInstruction):
            return self.exchange(site, instruction, head)
        if type(instruction) in PURPOSE_OF:
            advert = self.advert(site, instruction)
            if isinstance(instruction, EvaluateInstruction):
                return EvaluateReply(**head, samples="[]", advert=advert)
            return KeysReply(**head, advert=advert)
        if isinstance(instruction, WarmupInstruction):
            return WarmupReply(**head, model_digest=ROUND_ZERO.digest, dictionary_digest=DICTIONARY.digest())
        if isinstance(instruction, SchemaInstruction):
            return SchemaReply(**head, schema_digest=Schema.from_json(instruction.schema).digest())
        assert isinstance(instruction, FinalizeInstruction)
        return FinalizeReply(**head, model_digest=instruction.model_digest)

    # ---- secure sums

    def members(self, site: str) -> Membership:
        roster = self.rosters.get(site, self.roster)
        active = frozenset(member.id for member in roster.members if member.active)
        return Membership(active, active, self.colluders, self.wanted.get(site, self.min_sites))

    def advert(self, site: str, instruction: Any) -> np.ndarray:
        """Exchange 1. The work is done once, as at a real site."""
        config, purpose = RunConfig.from_json(instruction.config), PURPOSE_OF[type(instruction)]
        key = (site, instruction.round_index, purpose)
        if key not in self.stored:
            ring, tail = self.payloads.get(site) or self.payload(site, instruction)
            self.stored[key] = Payload(instruction.model_digest, self.inputs(instruction), ring, tail)
        given = self.stored[key]
        about = sums.binding(
            config,
            run_id=instruction.run_id,
            round_index=instruction.round_index,
            purpose=purpose,
            attempt=instruction.attempt,
            ring_values=len(given.ring),
            tail_values=len(given.tail),
            roster=self.rosters.get(site, self.roster).digest,
            model_digest=given.model_digest,
            inputs=given.inputs,
        )
        key_of = self.identities.get(site) or identity(site)
        self.states[key], advert = client_state.advertise(
            self.states.get(key, ClientSum()), self.members(site), about, key_of.key, os.urandom
        )
        return np.frombuffer(advert, np.uint8)

    def exchange(self, site: str, asked: SumInstruction, head: dict[str, Any]) -> Reply:
        """Exchanges 2 to 5."""
        key, members = (site, asked.round_index, asked.purpose), self.members(site)
        state, given = self.states.get(key, ClientSum()), self.stored[key]
        if state.attempt != asked.attempt:
            raise SumError("out-of-turn", "another attempt")
        content = (site, given.content_digest(asked.purpose))
        known = self.given.setdefault(content, [])
        if isinstance(asked, SharesInstruction):
            state, data = client_state.share(state, members, asked.threshold, asked.key_list.tobytes(), os.urandom)
            reply: Reply = SharesReply(**head, ciphertexts=np.frombuffer(data, np.uint8))
        elif isinstance(asked, MaskInstruction):
            state, keys = client_state.mask(
                state, members, asked.recipients.tobytes(), asked.ciphertexts.tobytes(), known
            )
            known.append(Giving(state.threshold, frozenset(state.list.ids)))
            masked = given.masked(RunConfig.from_json(asked.config), site, asked.round_index, keys)
            reply = MaskedReply(**head, masked=masked)
        elif isinstance(asked, SurvivorsInstruction):
            key_of = self.identities.get(site) or identity(site)
            state, data = client_state.sign(state, members, asked.survivors.tobytes(), key_of.key, known)
            known.append(Giving(state.threshold, frozenset(state.list.ids), state.survivor_ids))
            reply = SurvivorsReply(**head, signature=np.frombuffer(data, np.uint8))
        else:
            assert isinstance(asked, UnmaskInstruction)
            state, data = client_state.unmask(state, members, asked.signers.tobytes(), asked.signatures.tobytes())
            reply = UnmaskReply(**head, answer=np.frombuffer(data, np.uint8))
        self.states[key] = state
        return reply

    def inputs(self, instruction: Any) -> bytes:
        """What the work depends on, as the site sees it."""
        if isinstance(instruction, CountInstruction):
            return sums.input_digest(instruction.dictionary_digest)
        more = (instruction.warmup_digest,) if isinstance(instruction, EvaluateInstruction) else ()
        return sums.input_digest(instruction.schema_digest, *more)

    def payload(self, site: str, instruction: Any) -> tuple[np.ndarray, np.ndarray]:
        """Ring and tail of a site's work."""
        index, nothing = instruction.round_index, np.zeros(0, np.uint32)
        if isinstance(instruction, CountInstruction):
            return COUNTS.to_vector().astype(np.uint32), np.array([PATIENTS])
        if isinstance(instruction, TrainInstruction):
            # The update depends on the model it starts from, so that a wrong start shows in every later round.
            moved = 0.1 * instruction.vector + int(site[-2:]) * index
            numbers = [self.weight(site), 0, 1, 4, 8, 4 * sums.REWARD_UNIT, 8, 16, 1, 2, 1, 0, 0, 0, 0, 0]
            return moved.astype(np.float32), np.array(numbers)
        if isinstance(instruction, ValidateInstruction):
            return nothing, np.array([100, self.correct(site, index)])
        return nothing, self.tally().to_vector()

    def weight(self, site: str) -> int:
        return 1

    def tally(self) -> Tally:
        result = Tally.empty(self.targets, MODELS)
        result.patterns[0, [0, 8]] = [6, 4]  # ten questions; the final model has four right
        result.chance[0] = 10 * CHANCE_UNIT // 5
        return result

    # ---- what tests look at

    def attempts(self, purpose: int) -> list[int]:
        """Numbers in which the work of a sum was asked for, as they came, each once in a row."""
        found = [asked.attempt for _, asked in self.instructions if isinstance(asked, WORK[purpose])]  # type: ignore[attr-defined]
        return [number for i, number in enumerate(found) if i == 0 or number != found[i - 1]]
