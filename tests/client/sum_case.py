"""Three sites' folders, as hospitals have them, with payloads in place; and a coordinator's instructions to them."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from wardround.client import payload, update
from wardround.client.folder import Site
from wardround.client.gate import respond
from wardround.client.registry import to_registry
from wardround.common import sums
from wardround.common.config import RunConfig
from wardround.common.messages import (
    Instruction,
    KeysReply,
    MaskedReply,
    MaskInstruction,
    Reply,
    SharesInstruction,
    SharesReply,
    SurvivorsInstruction,
    SurvivorsReply,
    TrainInstruction,
    UnmaskInstruction,
    UnmaskReply,
    ValidateInstruction,
    join,
    split,
)
from wardround.common.roster import Roster
from wardround.common.secagg.keys import UPDATE, VALIDATION, Advert
from wardround.common.secagg.server_state import Attempt
from wardround.simulations.federation import write_sites
from wardround.simulations.synthetic_registry import make

RUN = "0123456789abcdef" * 2
MODEL, SCHEMA = "ab" * 32, "schema"
NAMES = ("site-01", "site-02", "site-03")
VALUES = 5  # of an update here
ROUND = 1


def config(**federation: Any) -> RunConfig:
    return RunConfig.model_validate({"name": "t", "privacy": {"enabled": False}, "federation": federation})


def write_three(folder: Path, run: RunConfig) -> dict[str, Path]:
    """site.toml of three sites by name."""
    table, dictionary = make(60, seed=2)
    registry = to_registry("synthetic", pa.Table.from_pandas(table, preserve_index=False), dictionary)
    write_sites(registry, np.array_split(np.arange(60), 3), run, folder)
    return {name: folder / name / "site.toml" for name in NAMES}


def run_folder(site_toml: Path) -> Path:
    return Site.open(site_toml).run_folder(RUN)


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


@dataclass
class Coordinator:
    """Goes through the exchanges of one attempt with every site; `purpose` is UPDATE or VALIDATION.

    Attributes:
        sites: site.toml by name.
        run: the config of the instructions.
        asked: the last mask instruction by site, for those who want to ask again.
    """

    sites: dict[str, Path]
    run: RunConfig
    purpose: int
    attempt: int = 1
    asked: dict[str, MaskInstruction] = field(default_factory=dict)

    def head(self, **changes: Any) -> dict[str, Any]:
        run = changes.pop("run", self.run)
        about = {"run_id": RUN, "config": run.to_json(), "config_digest": run.digest(), "round_index": ROUND}
        return {**about, "model_digest": MODEL, **changes}

    def ask(self, name: str, instruction: Instruction) -> Reply:
        head, vectors = respond(self.sites[name], type(instruction), *split(instruction))
        return join(head, vectors, Reply)

    def work(self) -> Instruction:
        kind = {UPDATE: TrainInstruction, VALIDATION: ValidateInstruction}[self.purpose]
        return kind(**self.head(), attempt=self.attempt, schema_digest=SCHEMA, vector=np.zeros(VALUES, np.float32))

    def place(self, name: str, delta: np.ndarray, tail: np.ndarray) -> payload.Payload:
        """Puts a payload where the site's own work would have left it; for validation the tail alone."""
        folder, inputs = run_folder(self.sites[name]), sums.input_digest(SCHEMA)
        folder.mkdir(parents=True, exist_ok=True)
        if self.purpose == UPDATE:
            parts = [RUN, str(ROUND), self.run.digest(), MODEL, SCHEMA]
            digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
            update.store(folder, ROUND, update.StoredUpdate(digest, MODEL, inputs.hex(), delta, tail))
        else:
            given = payload.Payload(MODEL, inputs, np.zeros(0, np.uint32), tail)
            payload.store(folder, ROUND, self.purpose, given)
        return payload.require(folder, ROUND, self.purpose)

    def masked(self) -> Iterator[tuple[str, MaskedReply]]:
        """Exchanges 1 to 3; yields each site's masked vector, and adds it up when asked for the next."""
        roster = Roster.parse((self.sites[NAMES[0]].parent.parent / "roster.json").read_bytes(), "roster")
        self.ids = {member.name: member.id for member in roster.members}
        names = {site: name for name, site in self.ids.items()}
        adverts: dict[str, bytes] = {}
        for name in self.sites:
            keys = self.ask(name, self.work())
            assert isinstance(keys, KeysReply), keys
            adverts[name] = keys.advert.tobytes()
        self.sum = Attempt(Advert.from_bytes(adverts[NAMES[0]]).binding)
        for name, advert in adverts.items():
            self.sum.add_advert(self.ids[name], advert)
        listed = array(self.sum.close_keys(len(self.sites)).to_bytes())
        about = self.head(purpose=self.purpose, attempt=self.attempt)
        for name in self.sites:
            shares = self.ask(name, SharesInstruction(**about, threshold=len(self.sites), key_list=listed))
            assert isinstance(shares, SharesReply), shares
            self.sum.add_shares(self.ids[name], shares.ciphertexts.tobytes())
        recipients = array(self.sum.close_shares())
        for site in self.sum.recipients:
            name = names[site]
            self.asked[name] = MaskInstruction(
                **about, recipients=recipients, ciphertexts=array(self.sum.ciphertexts_for(site))
            )
            reply = self.ask(name, self.asked[name])
            assert isinstance(reply, MaskedReply), reply
            yield name, reply
            self.sum.add_masked(site, reply.masked)

    def survivors(self) -> SurvivorsInstruction:
        about = self.head(purpose=self.purpose, attempt=self.attempt)
        return SurvivorsInstruction(**about, survivors=array(self.sum.close_sum()))

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Exchanges 4 and 5: ring and tail of the sum."""
        about, asked = self.head(purpose=self.purpose, attempt=self.attempt), self.survivors()
        for name in self.sites:
            signed = self.ask(name, asked)
            assert isinstance(signed, SurvivorsReply), signed
            self.sum.add_signature(self.ids[name], signed.signature.tobytes())
        signers, signatures = map(array, self.sum.close_signatures())
        for name in self.sites:
            answer = self.ask(name, UnmaskInstruction(**about, signers=signers, signatures=signatures))
            assert isinstance(answer, UnmaskReply), answer
            self.sum.add_answer(self.ids[name], answer.answer.tobytes())
        return self.sum.unmask()
