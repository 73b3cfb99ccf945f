"""A site's folder and one run's part of it: configuration, registry, splits, questions, stored round-0 adapter.

Run by the site. Enters: the path of `site.toml`, and instructions that say everything else. Leaves: nothing from here.
Private: registry, splits and questions. No torch unless the model is asked for.

What must last is in the state folder (mode 0700), because a new process may serve every message:

    state/ledger.jsonl                 everything that left, and the privacy budget spent (client/ledger.py)
    state/site.log                     full texts of errors; never sent
    state/split.key                    splits patients when site.toml has no split_key
    state/runs/<run id>/round-0.record   manifest and round-0 adapter
    state/runs/<run id>/schema.json      the published schema
    state/runs/<run id>/update-*.record  the update of a round (client/update.py)
    state/runs/<run id>/test.record      the reply to evaluate: test patients are scored once
    state/runs/<run id>/inputs.record    what every round was trained from
    state/runs/<run id>/report.html      this site's own results and samples (client/local_report.py)
    state/runs/<run id>/adapter/         the final adapter, in peft's format

Everything is read when it is needed. From one message to the next a process keeps registries of at most 64 MB, or the
last one, and the held-out questions, which are the same every round.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.adapter import Manifest
from ..common.config import RunConfig, SiteConfig, load_site
from ..common.dictionary import Dictionary, load_dictionary
from ..common.errors import ConfigError, ProtocolError, VerificationError
from ..common.files import private_folder, read_record, record_digest, write_atomic
from ..common.global_model import GlobalModel
from ..common.messages import Instruction
from ..common.question import PromptTemplate, Question, load_prompt
from ..common.schema import Schema
from ..common.seeds import derive_rng, secret_rng
from . import policy
from .identity import SiteKeys
from .ledger import Ledger
from .opt_out import OptOut, opted_out
from .questions import QuestionBuilder
from .registry import Registry, read_registry, split_rows

if TYPE_CHECKING:
    from ..common.lm.models import LanguageModel

_REGISTRY_BYTES = 64 << 20
_RUN_ID = re.compile(r"[0-9a-f]{32}")


@lru_cache(maxsize=2)
def _config(text: str, digest: str) -> RunConfig:
    config = RunConfig.from_json(text)
    if config.digest() != digest:
        raise VerificationError(f"run config: expected digest {digest[:12]}…, got {config.digest()[:12]}…")
    return config


# Bounded: simulated sites share one dictionary, schema, manifest and model, however many there are.
_dictionaries: dict[bytes | str, Dictionary] = {}  # by the file's digest, or a shipped one's name; one at most
_round_zero: dict[bytes, GlobalModel] = {}  # by the record's checksum; one at most
_registries: dict[bytes, Registry] = {}  # by `Site.source_digest`; of 64 MB at most, or one
_splits: dict[bytes, dict[str, np.ndarray]] = {}  # by registry and split key; of the registries above
_held_out: dict[bytes, list[Question]] = {}  # by all that they follow from; 64 at most
_verified: dict[str, tuple[GlobalModel, np.ndarray, GlobalModel]] = {}  # by digest: round 0, trainable, model; one


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype == np.float32 and np.array_equal(a.view(np.uint32), b.view(np.uint32))


parse_schema = lru_cache(maxsize=2)(Schema.from_json)
parse_manifest = lru_cache(maxsize=2)(Manifest.from_json)
_template = lru_cache(maxsize=2)(load_prompt)


def is_run_id(text: str) -> bool:
    """Whether a run's id is one: it names a folder here and a line in the ledger."""
    return _RUN_ID.fullmatch(text) is not None


def config_of(instruction: Instruction) -> RunConfig:
    """The run config that an instruction carries.

    Raises:
        ProtocolError: its run id is not one; its config is not JSON.
        ConfigError: its config is out of range.
        VerificationError: its config is not the one its digest names.
    """
    if not is_run_id(instruction.run_id):
        raise ProtocolError(f"run id: expected 32 hexadecimal digits, got {len(instruction.run_id)} characters")
    try:
        return _config(instruction.config, instruction.config_digest)
    except json.JSONDecodeError:
        raise ProtocolError("run config: expected JSON") from None


@dataclass(frozen=True, eq=False)
class Site:
    """One hospital as its folder says: `site.toml`, and what it names relative to it."""

    folder: Path
    config: SiteConfig

    @classmethod
    def open(cls, path: Path) -> Site:
        """The site of a `site.toml`; makes its state folder.

        Raises:
            ConfigError: missing or malformed.
        """
        site = cls(path.resolve().parent, load_site(path))
        private_folder(site.state)
        return site

    @cached_property
    def state(self) -> Path:
        return self.folder / self.config.state

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.state / "ledger.jsonl", SiteKeys(self.folder, self.config), self.folder / "ledger.head")

    @cached_property
    def opted_out(self) -> OptOut:
        """Patients whose rows are never read.

        Raises:
            RefusedError: the list that the policy names is not there, or not a list.
        """
        return opted_out(self.config, self.folder, self.dictionary)

    @property
    def registry_read(self) -> str:
        """`registry_digest` if the registry was asked for since this site was opened; else ""."""
        return self.registry_digest if "source_digest" in self.__dict__ else ""

    @property
    def registry_digest(self) -> str:
        """What the ledger calls the registry, hex: `source_digest` under the split key.

        Ledgers are shown to others. Without a key, whoever has a copy of the table that lacks one patient could try out
        whether that patient is in it.
        """
        return hmac.new(self.split_key(), b"registry" + self.source_digest, hashlib.sha256).hexdigest()

    def run_folder(self, run_id: str) -> Path:
        """Where a run's files lie; `run_id` has been checked."""
        return self.state / "runs" / run_id

    def admit(self, run_id: str) -> None:
        """Makes the folder of a run that is new here, which counts it.

        Raises:
            RefusedError: this hospital has taken part in as many runs as it allows.
        """
        folder = self.run_folder(run_id)
        if folder.is_dir():
            return
        runs = self.state / "runs"
        policy.check_runs(self.config.policy, 1 + (sum(1 for _ in runs.iterdir()) if runs.is_dir() else 0))
        private_folder(folder)

    @cached_property
    def dictionary(self) -> Dictionary:
        path = self.folder / self.config.dictionary
        key = hashlib.sha256(path.read_bytes()).digest() if path.is_file() else path.name
        if key not in _dictionaries:
            _dictionaries.clear()
            _dictionaries[key] = load_dictionary(path)
        return _dictionaries[key]

    @cached_property
    def source_digest(self) -> bytes:
        """Of everything that the registry follows from: table, dictionary, mapping, who opted out.

        Raises:
            RegistryError: the table cannot be read.
            RefusedError: as `opted_out`.
        """
        path = self.folder / self.config.table
        state = hashlib.sha256(self.dictionary.digest().encode())
        state.update(self.config.mapping.model_dump_json().encode() + path.suffix.encode())
        state.update(b"opt-out" + self.opted_out.digest)
        try:
            with path.open("rb") as file:
                state.update(hashlib.file_digest(file, "sha256").digest())
        except OSError:
            read_registry(path, self.dictionary, self.config.mapping)  # says what is wrong
            raise
        return state.digest()

    @cached_property
    def registry(self) -> Registry:
        if self.source_digest not in _registries:
            found = read_registry(self.folder / self.config.table, self.dictionary, self.config.mapping)
            found = self.opted_out.apply(found)
            if sum(known.n_bytes for known in _registries.values()) + found.n_bytes > _REGISTRY_BYTES:
                _registries.clear()
                _splits.clear()
            _registries[self.source_digest] = found
        return _registries[self.source_digest]

    @cached_property
    def splits(self) -> dict[str, np.ndarray]:
        """Row indices of training, validation and test patients."""
        key = self.source_digest + self.split_key()
        if key not in _splits:
            _splits[key] = split_rows(self.registry, self.split_key())
        return _splits[key]

    def patients_of(self, split: str) -> list[np.ndarray]:
        """The rows of every patient of a split, in the order of the patients' ids (not of the table)."""
        rows = self.splits[split]
        ids = self.registry.patients[rows].astype(str)
        order = np.lexsort((rows, ids))
        starts = np.flatnonzero(np.r_[True, ids[order][1:] != ids[order][:-1]]) if len(rows) else []
        return np.split(rows[order], starts[1:]) if len(rows) else []

    def split_key(self) -> bytes:
        """The key by which patients are held out, site.toml's or this site's own; it stays here."""
        if self.config.split_key is not None:
            try:
                return bytes.fromhex(self.config.split_key)
            except ValueError:
                raise ConfigError("site.toml: 'split_key': expected hexadecimal digits") from None
        path = self.state / "split.key"
        if not path.exists():
            write_atomic(path, secrets.token_bytes(32))
        return path.read_bytes()


@dataclass(frozen=True, eq=False)
class SiteRun:
    """One run at one site: what its instruction and the state folder say together."""

    site: Site
    instruction: Instruction
    config: RunConfig = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", config_of(self.instruction))

    @property
    def folder(self) -> Path:
        return self.site.run_folder(self.instruction.run_id)

    @property
    def head(self) -> dict[str, Any]:
        """The fields that every reply begins with."""
        instruction = self.instruction
        return {"run_id": instruction.run_id, "site": self.site.config.name, "round_index": instruction.round_index}

    @cached_property
    def round_zero(self) -> GlobalModel:
        """The round-0 adapter that the warm-up phase left here.

        Raises:
            ProtocolError: there was none.
            RefusedError: this hospital no longer allows its base model.
        """
        path = self.folder / "round-0.record"
        if not path.exists():
            raise ProtocolError("this site has no round-0 adapter of this run: warm-up comes first")
        key = record_digest(path)
        if key not in _round_zero:
            record = read_record(path)
            _round_zero.clear()
            _round_zero[key] = GlobalModel(parse_manifest(record.values["manifest"]), record.vectors["vector"])
        policy.check_model(self.site.config.policy, _round_zero[key].manifest.base_digest)
        return _round_zero[key]

    def global_model(self, trainable: np.ndarray, expected: str) -> GlobalModel:
        """The round-0 adapter with this trainable part, checked against the digest that the instruction names.

        Raises:
            VerificationError: another digest, wrong size, NaN or infinity.
        """
        known = _verified.get(expected)
        if known is not None and known[0] is self.round_zero and _same_bits(known[1], trainable):
            return known[2]
        model = self.round_zero.moved(trainable)
        model.verify(expected)
        _verified.clear()
        _verified[expected] = (self.round_zero, trainable, model)
        return model

    def schema(self, digest: str) -> Schema:
        """The published schema.

        Raises:
            ProtocolError: none was published here.
            VerificationError: it is another one.
            RefusedError: this hospital no longer allows what it shows.
        """
        path = self.folder / "schema.json"
        if not path.exists():
            raise ProtocolError("this site has no question schema of this run: the schema phase comes first")
        schema = parse_schema(path.read_text(encoding="utf-8"))
        if schema.digest() != digest:
            raise VerificationError(f"schema: expected digest {digest[:12]}…, got {schema.digest()[:12]}…")
        policy.check_schema(self.site.config.policy, schema)
        return schema

    @cached_property
    def template(self) -> PromptTemplate:
        return _template(self.config.model.prompt)

    def builder(self, schema: Schema) -> QuestionBuilder:
        return QuestionBuilder(self.site.registry, schema, self.template, self.config.questions)

    def language_model(self, model: GlobalModel) -> LanguageModel:
        """The shared model of this process with `model` in it."""
        from ..common.lm import models
        from ..common.lm.packaged import find_imported

        config, folder = self.config.model, find_imported(model.manifest.base_digest)
        if folder is not None:
            config = config.model_copy(update={"id": str(folder)})
        lm = models.shared(config, self.config.lora, self.config.seed)
        if lm.manifest.digest() != model.manifest.digest():
            raise VerificationError("adapter manifest: this site's base model or adapter is another one")
        lm.set_vector(model.full, trainable_only=False)
        return lm

    def held_out(self, split: str, schema: Schema, n: int) -> list[Question]:
        """Up to `n` questions, one a patient, the same whenever asked: they do not depend on the round."""
        site, asked = self.site, policy.allowed_targets(self.site.config.policy, schema.names)
        about = (site.config.name, split, n, self.config.digest(), schema.digest(), self.template.digest(), asked)
        key = hashlib.sha256(site.source_digest + site.split_key() + json.dumps(about).encode()).digest()
        if key not in _held_out:
            questions = (self._each_alone if self.config.privacy.enabled else self._together)(split, schema, asked)[:n]
            if len(_held_out) >= 64:
                _held_out.clear()
            _held_out[key] = questions
        return _held_out[key]

    def _together(self, split: str, schema: Schema, asked: list[str]) -> list[Question]:
        rng, patients = derive_rng(self.config.seed, split, self.site.config.name), self.site.patients_of(split)
        rows = [rng.choice(patients[index]) for index in rng.permutation(len(patients))]
        return self.builder(schema).build(np.array(rows), rng, targets=asked) if rows else []

    def _each_alone(self, split: str, schema: Schema, asked: list[str]) -> list[Question]:
        """In private runs: a patient's question, and its place among them, do not depend on the other patients, so that
        one more patient changes the results by one question, or by one in the place of another.
        """
        found: list[tuple[float, list[Question]]] = []
        builder, key = self.builder(schema), self.site.split_key()
        for rows in self.site.patients_of(split):
            rng = secret_rng(key, split, str(self.config.seed), str(self.site.registry.patients[rows[0]]))
            place = float(rng.random())
            found.append((place, builder.build(np.array([rng.choice(rows)]), rng, targets=asked)))
        return [question for _, questions in sorted(found, key=lambda one: one[0]) for question in questions]


@dataclass(frozen=True, eq=False)
class TrainingPatients:
    """Questions of training patients for client/grpo.py: one encounter and one question a drawn patient."""

    builder: QuestionBuilder
    patients: list[np.ndarray]
    targets: list[str]

    @property
    def n_patients(self) -> int:
        return len(self.patients)

    def draw(self, patient_indices: np.ndarray, rng: np.random.Generator) -> list[Question]:
        """At most one question for each index; patients with nothing to ask give none."""
        rows = np.array([rng.choice(self.patients[index]) for index in patient_indices], dtype=np.int64)
        return self.builder.build(rows, rng, targets=self.targets)
