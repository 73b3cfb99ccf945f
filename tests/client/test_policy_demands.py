"""What a coordinator may demand × what a hospital's policy says, each through the site's Flower app.

Every row is a hospital with a policy of its own, an instruction, and what comes of it: the reply's kind, or the code
that leaves; and what the hospital reads in its own log: the limit, what it is, what was asked.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tomli_w
from flwr.app import Context, Message, RecordDict
from wardround.client import policy
from wardround.client.app import app, pack, unpack
from wardround.client.folder import Site
from wardround.client.registry import to_registry
from wardround.common.config import RunConfig, read_toml
from wardround.common.counts import count
from wardround.common.global_model import GlobalModel
from wardround.common.lm import models
from wardround.common.messages import (
    CountInstruction,
    EvaluateInstruction,
    Failure,
    FinalizeInstruction,
    Instruction,
    KeysReply,
    MaskInstruction,
    Reply,
    SchemaInstruction,
    SchemaReply,
    SharesInstruction,
    SurvivorsInstruction,
    TrainInstruction,
    UnmaskInstruction,
    ValidateInstruction,
    WarmupInstruction,
    WarmupReply,
    join,
    split,
)
from wardround.common.question import load_prompt
from wardround.common.schema import Schema, derive_schema
from wardround.common.secagg.keys import COUNTS, TEST, UPDATE, VALIDATION
from wardround.simulations.federation import InProcessGrid, write_sites
from wardround.simulations.synthetic_registry import make

pytestmark = pytest.mark.usefixtures("cheap_scrypt")

RUN, OTHER_RUN = "0123456789abcdef" * 2, "fedcba9876543210" * 2
PATIENTS = 200
TABLE, DICTIONARY = make(PATIENTS, seed=2)
REGISTRY = to_registry("synthetic", pa.Table.from_pandas(TABLE, preserve_index=False), DICTIONARY)

# A hospital's policy, and a run that keeps to all of it; rows say what is different.
HOSPITAL: dict[str, Any] = {
    "simulated": False,
    "epsilon": 6.0,
    "epsilon_per_run": 3.0,
    "delta": 1e-4,
    "min_noise_multiplier": 0.8,
    "max_grad_norm": 1.0,
    "max_rounds": 10,
    "max_local_steps": 8,
}
PRIVATE: dict[str, Any] = {
    "enabled": True,
    "epsilon": 3.0,
    "delta": 1e-4,
    "max_grad_norm": 1.0,
    "declared_patients": 1000,
    "noise_multiplier": 0.8,
}
ROUNDS = {"rounds": 10, "validation_questions_per_site": 0}


@dataclass(frozen=True)
class Row:
    """One demand.

    Attributes:
        name: of the row.
        verdict: kind of the reply, or the code of a failure.
        said: pattern of what the hospital's log says of a refusal.
        site: keys of [policy] that are different; None takes one away.
        privacy, run: keys of the run's config that are different.
        ask: what is asked, of the world; by default that a question schema is taken.
        before: done to the site's folder first.
    """

    name: str
    verdict: type[Reply] | str
    said: str = ""
    site: dict[str, Any] = field(default_factory=dict)
    privacy: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    ask: Callable[["World"], Instruction] = lambda world: world.schema()
    before: Callable[["World"], object] = lambda world: None
    at: str = "12:00"


@dataclass
class World:
    """One hospital in its folder, and one run."""

    folder: Path
    config: RunConfig
    model: GlobalModel

    def head(self, index: int = 0, **changes: Any) -> dict[str, Any]:
        about = {"run_id": RUN, "config": self.config.to_json(), "config_digest": self.config.digest()}
        return {**about, "round_index": index, "model_digest": self.model.digest, **changes}

    def schema(self, made: Schema | None = None, **changes: Any) -> SchemaInstruction:
        made = made or derive_schema(count(REGISTRY.values, DICTIONARY), DICTIONARY, self.config.questions)
        return SchemaInstruction(**self.head(**changes), schema=made.to_json())

    def warmup(self) -> WarmupInstruction:
        return WarmupInstruction(
            **self.head(),
            manifest=self.model.manifest.to_json(),
            dictionary_digest=DICTIONARY.digest(),
            prompt_digest=load_prompt(self.config.model.prompt).digest(),
            vector=self.model.full,
        )

    def counts(self) -> CountInstruction:
        return CountInstruction(**self.head(), attempt=1, dictionary_digest=DICTIONARY.digest())

    def train(self, index: int = 1) -> TrainInstruction:
        return TrainInstruction(**self.head(index), attempt=1, schema_digest="s", vector=self.model.trainable)

    def validate(self) -> ValidateInstruction:
        return ValidateInstruction(**self.head(1), attempt=1, schema_digest="s", vector=self.model.trainable)

    def test(self) -> EvaluateInstruction:
        more = {"schema_digest": "s", "warmup_digest": "w", "warmup": self.model.full, "final": self.model.full}
        return EvaluateInstruction(**self.head(1), attempt=1, **more)

    def finalize(self) -> FinalizeInstruction:
        return FinalizeInstruction(**self.head(1), manifest=self.model.manifest.to_json(), vector=self.model.full)

    def exchange(self, purpose: int, kind: str = "mask") -> Instruction:
        about, some = {**self.head(1), "purpose": purpose, "attempt": 1}, np.zeros(3, np.uint8)
        return {
            "shares": lambda: SharesInstruction(**about, threshold=3, key_list=some),
            "mask": lambda: MaskInstruction(**about, recipients=some, ciphertexts=some),
            "survivors": lambda: SurvivorsInstruction(**about, survivors=some),
            "unmask": lambda: UnmaskInstruction(**about, signers=some, signatures=some),
        }[kind]()

    def spend(self, run_id: str, steps: int) -> None:
        """What an earlier round spent, σ = 10, of every patient."""
        event = {"kind": "rounds", "noise_multiplier": 10.0, "sample_rate": 1.0, "steps": steps}
        Site.open(self.folder / "site.toml").ledger.spend(event, run_id, 1, "training steps of a round")

    def sent(self, instruction: Instruction) -> Reply:
        """Through Flower's own dispatch."""
        InProcessGrid(app, [])  # names the run, which Flower's messages need
        message = Message(pack(*split(instruction)), dst_node_id=7, message_type=instruction.ROUTE)
        answer = app(message, Context(0, 7, {"site": str(self.folder / "site.toml")}, RecordDict(), {}))
        return join(*unpack(answer.content), Reply)

    def log(self) -> str:
        path = self.folder / "state" / "site.log"
        return path.read_text() if path.exists() else ""


def with_json(world: World, **changes: Any) -> SchemaInstruction:
    """A config that no honest coordinator can write: its JSON is changed afterwards. A section is merged."""
    content = json.loads(world.config.to_json())
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) and key in content else value
    return replace(world.schema(), config=json.dumps(content, sort_keys=True, separators=(",", ":")))


def rare_level(world: World) -> SchemaInstruction:
    """A schema that shows a level with two patients of 200."""
    made = derive_schema(count(REGISTRY.values, DICTIONARY), DICTIONARY, world.config.questions)
    first = next(target for target in made.targets if len(target.frequencies) == 2)
    rare = first.model_copy(update={"frequencies": (0.99, 0.01)})
    targets = tuple(rare if target is first else target for target in made.targets)
    return world.schema(made.model_copy(update={"targets": targets}))


def opt_out(text: str) -> Callable[[World], object]:
    return lambda world: (world.folder / "left.txt").write_text(text)


ROWS = [
    # ---- differential privacy
    Row("a private run at the very limits", SchemaReply),
    Row(
        "a run without privacy", "refused", privacy={"enabled": False},
        said="require_privacy: this hospital allows runs with differential privacy only.* enabled = false",
    ),
    Row(
        "a run without privacy at a hospital that set nothing", "refused", privacy={"enabled": False},
        site=dict.fromkeys(HOSPITAL), said="require_privacy: this hospital allows runs with differential privacy only",
    ),
    Row("a run without privacy that the hospital wants", SchemaReply, site={"require_privacy": False},
        privacy={"enabled": False}),
    Row("a run without privacy at a simulated site of a public registry", SchemaReply, privacy={"enabled": False},
        site={**dict.fromkeys(HOSPITAL), "simulated": True}),
    Row("a run without privacy at a simulated site with a budget", "refused", site={"simulated": True},
        privacy={"enabled": False}, said="require_privacy"),
    Row("a run without privacy at a simulated site that wants privacy", "refused",
        site={**dict.fromkeys(HOSPITAL), "simulated": True, "require_privacy": True}, privacy={"enabled": False},
        said="require_privacy"),
    Row("more ε than a run may have", "refused", privacy={"epsilon": 3.1},
        said=r"policy\.epsilon_per_run: this hospital allows 3\.0, the coordinator asks for 3\.1"),
    Row("more δ", "refused", privacy={"delta": 1e-3, "declared_patients": 100},
        said=r"policy\.delta: this hospital allows 0\.0001, the coordinator asks for 0\.001"),
    Row("δ above 1 / (10 N̂)", "config", ask=lambda world: with_json(world, privacy={"declared_patients": 1001}),
        said=r"delta = 0\.0001: expected at most 1 / \(10 · declared_patients\) = 9\.99e-05"),
    Row("an N̂ too large for the hospital's own δ", "refused",
        privacy={"delta": 1e-5, "declared_patients": 10_000},
        said=r"policy\.delta = 0\.0001: .* at most 1 / \(10 · declared_patients\) = 1e-05, with .* = 10000"),
    Row("more training patients here than δ allows", "refused", site={"delta": 1e-3},
        privacy={"delta": 1e-3, "declared_patients": 100}, ask=World.warmup,
        said=r"the run's delta = 0\.001: .* 1 / \(10 · training patients here\)"),
    Row("a larger clipping bound", "refused", privacy={"max_grad_norm": 1.5},
        said=r"policy\.max_grad_norm: this hospital allows 1\.0, the coordinator asks for 1\.5"),
    Row("too little noise", "refused", privacy={"noise_multiplier": 0.7},
        said=r"min_noise_multiplier: .* allows 0\.8 or more, the coordinator asks for noise_multiplier = 0\.7"),
    Row("too little noise on the counts", "refused", privacy={"schema_noise_multiplier": 0.1},
        said=r"the coordinator asks for schema_noise_multiplier = 0\.1"),
    Row("too little noise on the results", "refused", privacy={"metrics_noise_multiplier": 0.1},
        said=r"the coordinator asks for metrics_noise_multiplier = 0\.1"),
    Row("privacy without an ε", "config", ask=lambda world: with_json(world, privacy={"epsilon": None}),
        said="enabled = true needs epsilon"),
    Row("privacy with a negative ε", "config", ask=lambda world: with_json(world, privacy={"epsilon": -1.0}),
        said=r"'privacy\.epsilon': .* greater than 0"),
    Row("a private run at a hospital that set no budget", "refused",
        site={"epsilon": None, "epsilon_per_run": None, "delta": None},
        said=r"policy\.epsilon: not set, so this hospital allows nothing, the coordinator asks for 3\.0"),
    # ---- the budget, as the ledger has it
    Row("counts within the budget", KeysReply, before=lambda world: world.sent(world.warmup()), ask=World.counts),
    Row("counts once more", KeysReply, ask=World.counts,
        before=lambda world: (world.sent(world.warmup()), world.sent(world.counts()))),
    Row("counts when the budget is spent", "refused", ask=World.counts,
        before=lambda world: (world.sent(world.warmup()), world.spend(OTHER_RUN, steps=200)),
        said=r"policy\.epsilon: this hospital allows 6 at delta = 0\.0001; spent .* with 'schema' .* it would be"),
    Row("counts when the run's share is spent", "refused", ask=World.counts,
        before=lambda world: (world.sent(world.warmup()), world.spend(RUN, steps=60)),
        said=r"policy\.epsilon_per_run: this hospital allows 3 at delta = 0\.0001; spent .* with 'schema'"),
    Row("counts when another run spent as much", KeysReply, ask=World.counts,
        before=lambda world: (world.sent(world.warmup()), world.spend(OTHER_RUN, steps=60))),
    # ---- sums
    Row("sums in the clear", "refused", run={"federation": {**ROUNDS, "secure_aggregation": "none"}},
        said="adds updates and counts up in the clear: only a simulated site"),
    # ---- size
    Row("more rounds", "refused", run={"federation": {**ROUNDS, "rounds": 11}},
        said="max_rounds: this hospital allows 10, the coordinator asks for 11"),
    Row("more local steps", "refused", run={"grpo": {"local_steps": 9}},
        said="max_local_steps: this hospital allows 8, the coordinator asks for 9"),
    Row("a round after the last", "refused", ask=lambda world: world.schema(index=11),
        said="round 11: .* rounds 0 to 10"),
    Row("a round before the first", "refused", ask=lambda world: world.schema(index=-1), said="round -1"),
    Row("one run more", "refused", site={"max_runs": 1}, ask=lambda world: world.schema(run_id=OTHER_RUN),
        before=lambda world: world.sent(world.schema()),
        said="max_runs: this hospital allows 1, the coordinator asks for 2"),
    Row("the run that is under way", SchemaReply, site={"max_runs": 1},
        before=lambda world: world.sent(world.schema())),
    Row("more bytes in one run", "refused", site={"max_bytes_per_run": 300},
        before=lambda world: world.sent(world.schema()),
        said=r"max_bytes_per_run: this hospital allows 300, the coordinator asks for \d{3}"),
    Row("as many bytes in another run", SchemaReply, site={"max_bytes_per_run": 300},
        before=lambda world: world.sent(world.schema()), ask=lambda world: world.schema(run_id=OTHER_RUN)),
    Row("more bytes in all", "refused", site={"max_upload_bytes": 300}, before=lambda world: world.sent(world.schema()),
        ask=lambda world: world.schema(run_id=OTHER_RUN),
        said=r"max_upload_bytes: this hospital allows 300, the coordinator asks for \d{3}"),
    # ---- tasks
    Row("counts, which are not allowed", "refused", site={"tasks": ["train", "test"]}, ask=World.counts,
        said="policy.tasks: this hospital allows 'train', 'test', the coordinator asks for 'counts'"),
    Row("training, which is not allowed", "refused", site={"tasks": ["counts"]}, ask=World.train,
        said="policy.tasks: this hospital allows 'counts', the coordinator asks for 'train'"),
    Row("validation, which is not allowed", "refused", site={"tasks": ["counts", "train"]}, ask=World.validate,
        said="the coordinator asks for 'validate'"),
    Row("a test, which is not allowed", "refused", site={"tasks": []}, ask=World.test,
        said="policy.tasks: this hospital allows none, the coordinator asks for 'test'"),
    *(
        Row(f"exchange {kind} of a sum of {task}, which is not allowed", "refused",
            site={"tasks": [other for other in ("counts", "train", "validate", "test") if other != task]},
            ask=lambda world, purpose=purpose, kind=kind: world.exchange(purpose, kind),
            said=f"policy.tasks: .* the coordinator asks for '{task}'")
        for kind, purpose, task in (
            ("shares", COUNTS, "counts"), ("mask", UPDATE, "train"), ("survivors", VALIDATION, "validate"),
            ("unmask", TEST, "test"),
        )
    ),
    Row("a task that is allowed, out of turn", "out-of-turn", site={"tasks": ["train"]},
        ask=lambda world: world.exchange(UPDATE, "shares")),
    # ---- models and targets
    Row("another base model", "refused", site={"allowed_models": ["ab" * 32]}, ask=World.warmup,
        said="is not among policy.allowed_models"),
    Row("any base model, where none is listed", WarmupReply, ask=World.warmup),
    Row("targets of which none is allowed", "refused",
        site={"targets_allowed": ["died"], "targets_never_asked": ["died"]},
        said="targets_allowed and targets_never_asked leave no target to ask"),
    Row("targets of which some are not asked", SchemaReply, site={"targets_never_asked": ["died"]}),
    Row("anything, where the policy names no entry of the dictionary", "config", site={"targets_allowed": ["hiv"]},
        said="policy.targets_allowed: dictionary 'synthetic' has no entry 'hiv'"),
    # ---- patients
    Row("work on fewer patients", "refused", site={"min_training_patients": PATIENTS}, ask=World.warmup,
        said="min_training_patients: this hospital allows 200 or more, there are 1"),
    Row("work on enough patients", WarmupReply, site={"min_training_patients": PATIENTS // 2}, ask=World.warmup),
    Row("a run that asks fewer test patients", "refused", site={"min_test_patients": PATIENTS},
        said=r"min_test_patients: this hospital allows 200 or more, the coordinator asks for 100 \(evaluation"),
    Row("a test of fewer patients", "refused", site={"min_test_patients": PATIENTS}, ask=World.test,
        run={"evaluation": {"questions_per_site": PATIENTS}},
        said="min_test_patients: this hospital allows 200 or more, there are"),
    Row("a schema with a level of two patients", "refused", site={"min_level_patients": 5}, ask=rare_level,
        said="min_level_patients: this hospital allows 5 or more, the schema shows a level of '.*' with about 2"),
    Row("a schema with a level of as few as allowed", SchemaReply, site={"min_level_patients": 2}, ask=rare_level),
    Row("anything, while the list of those who opted out is missing", "refused", site={"opt_out": "left.txt"},
        said="policy.opt_out: .*left.txt: no such file"),
    Row("anything, while the list of those who opted out is no list", "refused", site={"opt_out": "left.txt"},
        before=opt_out("a\nb;c\n"), said="opt_out: .*left.txt: line 2: expected one patient id and nothing else"),
    Row("work without those who opted out", WarmupReply, site={"opt_out": "left.txt"}, before=opt_out("nobody\n"),
        ask=World.warmup),
    Row("work, when too few are left after some opted out", "refused", ask=World.warmup,
        site={"opt_out": "left.txt", "min_training_patients": PATIENTS // 2},
        before=opt_out("\n".join(REGISTRY.patients[: PATIENTS * 3 // 4])), said="min_training_patients"),
    # ---- hours
    *(
        Row(f"work at {at}, with hours {hours}", verdict, site={"hours": hours}, at=at, said=said)
        for hours, at, verdict, said in (
            ("20:00-06:00", "19:59", "refused", "policy.hours: this hospital allows 20:00-06:00, .* asks at 19:59"),
            ("20:00-06:00", "20:00", SchemaReply, ""),
            ("20:00-06:00", "05:59", SchemaReply, ""),
            ("20:00-06:00", "06:00", "refused", "asks at 06:00"),
            ("08:30-17:00", "08:29", "refused", "asks at 08:29"),
            ("08:30-17:00", "16:59", SchemaReply, ""),
        )
    ),
    *(
        Row(f"{ask.__name__} outside the hours", "refused", site={"hours": "08:30-17:00"}, at="23:00", ask=ask,
            said="policy.hours")
        for ask in (World.warmup, World.counts, World.train, World.validate, World.test, World.finalize)
    ),
    Row("an exchange of a sum outside the hours", "out-of-turn", site={"hours": "08:30-17:00"}, at="23:00",
        ask=lambda world: world.exchange(UPDATE, "shares")),
    # ---- a coordinator that wants a limit loosened
    Row("a config with limits of its own", "config", ask=lambda world: with_json(world, policy={"max_rounds": 10**6}),
        said="unknown key 'policy'"),
    Row("privacy with limits of its own", "config",
        ask=lambda world: with_json(world, privacy={"min_noise_multiplier": 0}),
        said=r"unknown key 'privacy\.min_noise_multiplier'"),
    Row("a config that is not the one its digest names", "verification",
        ask=lambda world: with_json(world, privacy={"noise_multiplier": 9.0}), said="run config: expected digest"),
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], GlobalModel]:
    """A hospital's folder to copy, the run's config, the round-0 adapter."""
    content: dict[str, Any] = {
        "name": "t",
        "privacy": PRIVATE,
        "model": {"id": str(tiny_model_path), "device": "cpu", "prompt": "en_short"},
        "grpo": {"local_steps": 8},
        "federation": ROUNDS,
    }
    config = RunConfig.model_validate(content)
    sites = tmp_path_factory.mktemp("hospital") / "sites"
    write_sites(REGISTRY, [np.arange(PATIENTS)], config, sites)
    lm = models.load(config.model, config.lora, seed=1)
    return sites, content, GlobalModel(lm.manifest, lm.vector(trainable_only=False))


def test_the_table_has_a_demand_for_every_limit_and_no_row_twice():
    assert len(ROWS) >= 25 and len({row.name for row in ROWS}) == len(ROWS)
    named = {key for row in ROWS for key in row.site} | set(HOSPITAL)
    # Enforced where sums are agreed to (tests/common/secagg, tests/client/test_sharing.py); samples in test_policy.py.
    elsewhere = {"min_sites", "colluders", "repeat_with_others", "share_samples"}
    assert named | elsewhere == set(policy.PolicyConfig.model_fields)


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_what_becomes_of_a_demand(
    row: Row, base: tuple[Path, dict[str, Any], GlobalModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sites, content, model = base
    shutil.copytree(sites, tmp_path / "sites")
    folder = tmp_path / "sites" / "site-01"
    written = read_toml(folder / "site.toml")
    limits = {**HOSPITAL, **row.site}
    written["policy"] = {key: value for key, value in limits.items() if value is not None}
    (folder / "site.toml").write_text(tomli_w.dumps(written))
    config = RunConfig.model_validate({**content, **row.run, "privacy": {**PRIVATE, **row.privacy}})
    world = World(folder, config, model)
    monkeypatch.setattr(policy, "local_time", lambda: datetime.fromisoformat(f"2026-03-01T{row.at}"))
    row.before(world)
    records = set((folder / "state").rglob("*.record"))
    reply = world.sent(row.ask(world))
    if isinstance(row.verdict, str):
        assert isinstance(reply, Failure) and reply.code == row.verdict, (reply, world.log())
        assert re.search(row.said, world.log()), world.log()
    else:
        assert isinstance(reply, row.verdict), (reply, world.log())
    found = list(Site.open(folder / "site.toml").ledger.entries())
    assert found[-1]["kind"] == ("refusal" if isinstance(row.verdict, str) else "egress")
    # Nothing was counted or trained for a demand that was refused, nothing spent, and nothing spent twice.
    if isinstance(row.verdict, str):
        assert set((folder / "state").rglob("*.record")) == records
    assert sum(entry["kind"] == "spend" and entry["event"]["kind"] == "schema" for entry in found) == (
        row.verdict is KeysReply
    )
