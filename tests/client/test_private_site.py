"""One site in private runs: what it spends survives restarts, crashes and new runs; what it draws is its own secret."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tomli_w
from wardround.client import grpo, site
from wardround.client import ledger as ledger_module
from wardround.client.folder import Site, SiteRun
from wardround.client.gate import respond
from wardround.client.policy import NO_SAMPLES
from wardround.client.registry import to_registry
from wardround.client.reward import LocalResult
from wardround.common import plan
from wardround.common.config import RunConfig, read_toml
from wardround.common.counts import count
from wardround.common.global_model import GlobalModel
from wardround.common.lm import models
from wardround.common.messages import (
    CountInstruction,
    EvaluateInstruction,
    EvaluateReply,
    Failure,
    Instruction,
    KeysReply,
    Reply,
    SchemaInstruction,
    SchemaReply,
    TrainInstruction,
    WarmupInstruction,
    WarmupReply,
    join,
    split,
)
from wardround.common.privacy import Filter, pin_order
from wardround.common.question import load_prompt
from wardround.common.schema import Schema, derive_schema
from wardround.common.seeds import derive_seed
from wardround.simulations.federation import write_sites
from wardround.simulations.synthetic_registry import make

pytestmark = pytest.mark.usefixtures("cheap_scrypt")

RUN, OTHER_RUN = "0123456789abcdef" * 2, "fedcba9876543210" * 2
TABLE, DICTIONARY = make(60, seed=2)
REGISTRY = to_registry("synthetic", pa.Table.from_pandas(TABLE, preserve_index=False), DICTIONARY)
ROUNDS, AFFORDED = 5, 3
# A process of its own: instructions from standard input to one site, in order; the kind or code of every reply.
PROCESS = """
import json, sys
from pathlib import Path
from wardround.client.gate import respond
from wardround.common import identity, messages
identity._SCRYPT["n"] = 2**4  # as this site was made
for line in sys.stdin:
    kind, head, vectors = json.loads(line)
    vectors = {name: bytes.fromhex(vector) for name, vector in vectors.items()}
    answer = respond(Path(sys.argv[1]), getattr(messages, kind), bytes.fromhex(head), vectors)
    reply = messages.join(*answer, messages.Reply)
    print(reply.code if isinstance(reply, messages.Failure) else type(reply).__name__)
"""


class Hospital:
    """One site, and a coordinator's instructions to it in a run of `ROUNDS` private rounds."""

    def __init__(self, folder: Path, base: Path, **privacy: Any) -> None:
        private = {"epsilon": 12.0, "delta": 1e-4, "max_grad_norm": 0.5, "declared_patients": 200}
        self.config = RunConfig.model_validate(
            {
                "name": "t",
                "privacy": {"enabled": True, **private} if privacy.get("enabled", True) else {"enabled": False},
                "model": {"id": str(base), "device": "cpu", "prompt": "en_short"},
                "grpo": {"local_steps": 2, "patients_per_step": 4, "expectation": "exact"},
                "federation": {"rounds": ROUNDS, "validation_questions_per_site": 0},
                "evaluation": {"questions_per_site": 4, "samples": 1, "sample_tokens": 2},
            }
        )
        write_sites(REGISTRY, [np.arange(60)], self.config, folder / "sites")
        self.site_toml = folder / "sites" / "site-01" / "site.toml"
        lm = models.load(self.config.model, self.config.lora, seed=1)
        self.model = GlobalModel(lm.manifest, lm.vector(trainable_only=False))
        self.made: Schema = derive_schema(count(REGISTRY.values, DICTIONARY), DICTIONARY, self.config.questions)

    @property
    def site(self) -> Site:
        return Site.open(self.site_toml)

    def head(self, index: int = 0, run: str = RUN) -> dict[str, Any]:
        about = {"run_id": run, "config": self.config.to_json(), "config_digest": self.config.digest()}
        return {**about, "round_index": index, "model_digest": self.model.digest}

    def warmup(self, run: str = RUN) -> WarmupInstruction:
        return WarmupInstruction(
            **self.head(run=run),
            manifest=self.model.manifest.to_json(),
            dictionary_digest=DICTIONARY.digest(),
            prompt_digest=load_prompt(self.config.model.prompt).digest(),
            vector=self.model.full,
        )

    def counts(self, run: str = RUN) -> CountInstruction:
        return CountInstruction(**self.head(run=run), attempt=1, dictionary_digest=DICTIONARY.digest())

    def schema(self) -> SchemaInstruction:
        return SchemaInstruction(**self.head(), schema=self.made.to_json())

    def train(self, index: int) -> TrainInstruction:
        return TrainInstruction(
            **self.head(index), attempt=1, schema_digest=self.made.digest(), vector=self.model.trainable
        )

    def test(self, index: int) -> EvaluateInstruction:
        more = {"schema_digest": self.made.digest(), "warmup_digest": self.model.digest}
        return EvaluateInstruction(
            **self.head(index), attempt=1, **more, warmup=self.model.full, final=self.model.full
        )  # fmt: skip

    def ask(self, instruction: Instruction) -> Reply:
        return join(*respond(self.site_toml, type(instruction), *split(instruction)), Reply)

    def set_up(self) -> None:
        expected = (WarmupReply, KeysReply, SchemaReply)
        for instruction, kind in zip((self.warmup(), self.counts(), self.schema()), expected, strict=True):
            assert isinstance(self.ask(instruction), kind), self.log()

    def limit(self, **limits: Any) -> None:
        written = read_toml(self.site_toml)
        written["policy"] |= limits
        self.site_toml.write_text(tomli_w.dumps(written))

    def log(self) -> str:
        path = self.site.state / "site.log"
        return path.read_text() if path.exists() else ""

    def kinds(self) -> list[str]:
        return [event["kind"] for event in self.site.ledger.spent()]


@pytest.fixture
def seeds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Training in no time, that a test of what surrounds it needs; what it was seeded with."""
    seen: list[int] = []

    def train(lm: Any, *_: Any, seed: int, **__: Any) -> LocalResult:
        seen.append(seed)
        vector = lm.vector() + np.float32(1e-3)
        return LocalResult(vector, 4, 28, 9.0, 28, 28, 2, 0, np.zeros(8, np.int64), 0.1)

    monkeypatch.setattr(grpo, "train_local_round", train)
    return seen


def enough_for(config: RunConfig, rounds: int) -> float:
    """The smallest ε that holds the schema and so many rounds: by bisection."""
    schema, *steps = plan.events(config)
    low, high = 1.0, 12.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        budget = Filter(middle, 1e-4, pin_order((schema, *steps), middle, 1e-4))
        fits = budget.affords((schema, *steps[: rounds - 1]), steps[rounds - 1])
        low, high = (low, middle) if fits else (middle, high)
    return high


def test_neither_a_restart_nor_a_new_run_gives_a_spent_budget_back(
    tmp_path: Path, tiny_model_path: Path, seeds: list[int]
):
    hospital = Hospital(tmp_path, tiny_model_path)
    hospital.limit(epsilon=enough_for(hospital.config, AFFORDED), delta=1e-4)
    hospital.set_up()
    for index in range(1, AFFORDED + 1):
        ledger_module._states.clear()  # what a process remembers of a ledger
        assert isinstance(hospital.ask(hospital.train(index)), KeysReply), hospital.log()
    spent = ["schema", *["rounds"] * AFFORDED]
    assert hospital.kinds() == spent and len(seeds) == AFFORDED
    reply = hospital.ask(hospital.train(AFFORDED + 1))
    assert isinstance(reply, Failure) and reply.code == "refused"
    # In a process that has seen nothing of it: the refused round again, the results, and a new run from its beginning.
    asked = [
        hospital.train(AFFORDED + 1),
        hospital.test(AFFORDED + 1),
        hospital.warmup(OTHER_RUN),
        hospital.counts(OTHER_RUN),
    ]
    lines = []
    for instruction in asked:
        head, vectors = split(instruction)
        lines.append(
            json.dumps([type(instruction).__name__, head.hex(), {name: bytes(v).hex() for name, v in vectors.items()}])
        )
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, str(hospital.site_toml)],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["refused", "refused", "WarmupReply", "refused"], hospital.log()
    assert hospital.kinds() == spent and len(seeds) == AFFORDED
    assert hospital.log().count("policy.epsilon: this hospital allows") == 4
    # Only the hospital gives more, and what was spent before still counts.
    hospital.limit(epsilon=enough_for(hospital.config, AFFORDED + 1))
    assert isinstance(hospital.ask(hospital.train(AFFORDED + 1)), KeysReply), hospital.log()
    reply = hospital.ask(hospital.train(AFFORDED + 2))
    assert isinstance(reply, Failure) and reply.code == "refused"
    assert hospital.kinds() == [*spent, "rounds"]


def test_in_a_private_run_no_draw_follows_from_what_the_coordinator_knows(
    tmp_path: Path, tiny_model_path: Path, seeds: list[int]
):
    """Who gets which question is drawn one after the other: in a known stream one patient more would move them all."""
    for name in ("one", "two"):
        hospital = Hospital(tmp_path / name, tiny_model_path)
        hospital.set_up()
        assert isinstance(hospital.ask(hospital.train(1)), KeysReply), hospital.log()
    known = derive_seed(hospital.config.seed, "train", "site-01", 1)
    assert len({*seeds, known}) == 3 and min(seeds).bit_length() > 64
    hospital = Hospital(tmp_path / "open", tiny_model_path, enabled=False)
    hospital.set_up()
    assert isinstance(hospital.ask(hospital.train(1)), KeysReply), hospital.log()
    assert seeds[2:] == [known]


def test_work_that_a_crash_lost_is_paid_once_and_done_again_unless_some_of_it_left(
    tmp_path: Path, tiny_model_path: Path, seeds: list[int]
):
    hospital = Hospital(tmp_path, tiny_model_path)
    hospital.set_up()
    stored = hospital.site.run_folder(RUN) / "update-00001.record"
    assert isinstance(hospital.ask(hospital.train(1)), KeysReply)
    stored.unlink()
    assert isinstance(hospital.ask(hospital.train(1)), KeysReply), hospital.log()
    assert hospital.kinds() == ["schema", "rounds"] and len(seeds) == 2
    about = {"run_id": RUN, "round_index": 1, "size_bytes": 9, "sha256": "0" * 64, "purpose": "p"}
    hospital.site.ledger.append("egress", phase="query.mask", **about)
    stored.unlink()
    reply = hospital.ask(hospital.train(1))
    assert isinstance(reply, Failure) and reply.code == "refused" and len(seeds) == 2
    assert "training steps of a round: released already" in hospital.log()
    # The test of the same round is another work: that the round's update left says nothing of it.
    assert isinstance(hospital.ask(hospital.test(1)), EvaluateReply), hospital.log()
    for path in hospital.site.run_folder(RUN).glob("test*.record"):
        path.unlink()
    assert isinstance(hospital.ask(hospital.test(1)), EvaluateReply), hospital.log()
    assert hospital.kinds() == ["schema", "rounds", "metrics"]


@pytest.mark.parametrize("private", [True, False])
def test_samples_of_an_open_registry_leave_in_runs_without_privacy_alone(
    tmp_path: Path, tiny_model_path: Path, private: bool
):
    hospital = Hospital(tmp_path, tiny_model_path, enabled=private)
    hospital.set_up()
    reply = hospital.ask(hospital.test(1))
    assert isinstance(reply, EvaluateReply), hospital.log()
    assert (reply.samples == NO_SAMPLES) == private
    report = (hospital.site.run_folder(RUN) / "report.html").read_text()
    assert "<h2>Sample questions</h2>" in report  # the site's own shows them


@pytest.mark.parametrize("private", [True, False])
def test_a_patient_who_cannot_be_asked_turns_no_results_of_a_private_run_into_zeros(
    tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch, private: bool
):
    """One patient more would then change them by all that are asked, which the noise is not made for."""
    hospital = Hospital(tmp_path, tiny_model_path, enabled=private)
    hospital.set_up()
    hospital.limit(min_test_patients=4)
    held_out, seen = SiteRun.held_out, list[int]()

    def one_less(run: SiteRun, split: str, schema: Schema, n: int) -> Any:
        return held_out(run, split, schema, n)[:-1]

    def scored(*about: Any) -> Any:
        tally, *more = whole(*about)
        seen.append(int(tally.n.sum()))
        return tally, *more

    whole = site._scored
    monkeypatch.setattr(SiteRun, "held_out", one_less)
    monkeypatch.setattr(site, "_scored", scored)
    assert isinstance(hospital.ask(hospital.test(1)), EvaluateReply), hospital.log()
    assert seen == [3 if private else 0]


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"allowed_models": ["ab" * 32]}, "is not among policy.allowed_models"),
        ({"min_level_patients": 1000}, "policy.min_level_patients: this hospital allows 1000 or more"),
    ],
    ids=["allowed_models", "min_level_patients"],
)
def test_a_limit_that_is_set_in_the_middle_of_a_run_holds_from_the_next_instruction(
    tmp_path: Path, tiny_model_path: Path, seeds: list[int], limits: dict[str, Any], said: str
):
    hospital = Hospital(tmp_path, tiny_model_path)
    hospital.set_up()
    hospital.limit(**limits)
    for instruction in (hospital.train(1), hospital.test(1)):
        reply = hospital.ask(instruction)
        assert isinstance(reply, Failure) and reply.code == "refused"
        assert said in hospital.log()
    assert hospital.kinds() == ["schema"] and seeds == []
