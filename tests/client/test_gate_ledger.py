"""The gate and the ledger together: nothing leaves that is not on disk, whatever the disk or a kill does.

What the site does here for an instruction is small (it takes a schema) or made up (it spends a piece of the privacy
budget first); everything around it is the product's own, from Flower's dispatch to the fsync.
"""

import errno
import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from flwr.app import Context, Message, RecordDict
from wardround.client import gate
from wardround.client import ledger as module
from wardround.client.app import app, pack, unpack
from wardround.client.folder import Site, SiteRun
from wardround.client.registry import to_registry
from wardround.common.config import NO_PRIVACY, RunConfig
from wardround.common.counts import count
from wardround.common.identity import Identity
from wardround.common.key_file import read_key
from wardround.common.messages import Failure, Reply, SchemaInstruction, SchemaReply, join, split
from wardround.common.receipt import Receipt
from wardround.common.schema import derive_schema
from wardround.simulations.federation import COORDINATOR, PASSPHRASE, InProcessGrid, write_sites
from wardround.simulations.synthetic_registry import make

from .ledger_case import event

pytestmark = pytest.mark.usefixtures("cheap_scrypt")

RUN = RunConfig(name="t", privacy=NO_PRIVACY)
TABLE, DICTIONARY = make(60, seed=2)
REGISTRY = to_registry("synthetic", pa.Table.from_pandas(TABLE, preserve_index=False), DICTIONARY)
SCHEMA = derive_schema(count(REGISTRY.values, DICTIONARY), DICTIONARY, RUN.questions)
RUN_ID = "0123456789abcdef" * 2


def spends(site: Site, instruction: SchemaInstruction) -> SchemaReply:
    """Work that costs privacy: recorded first, then computed."""
    site.ledger.spend(event(), instruction.run_id, instruction.round_index, "noised training")
    computed.append(instruction.round_index)
    return SchemaReply(**SiteRun(site, instruction).head, schema_digest=SCHEMA.digest())


computed: list[int] = []


@pytest.fixture
def sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_sites(REGISTRY, np.array_split(np.arange(60), 2), RUN, tmp_path / "sites")
    monkeypatch.setitem(gate.WORK, SchemaInstruction, spends)
    computed.clear()
    return tmp_path / "sites"


def send(site_toml: Path, index: int, receipt: str = "", run_id: str = RUN_ID) -> Message:
    instruction = SchemaInstruction(
        run_id=run_id, config=RUN.to_json(), config_digest=RUN.digest(), round_index=index, model_digest="",
        schema=SCHEMA.to_json(), receipt=receipt,
    )  # fmt: skip
    InProcessGrid(app, [])
    message = Message(pack(*split(instruction)), dst_node_id=7, message_type=instruction.ROUTE)
    return app(message, Context(0, 7, {"site": str(site_toml)}, RecordDict(), {}))


def digest_of(message: Message) -> str:
    """As the ledger has it; "" where nothing left but Flower's error with its fixed word."""
    if message.has_error():
        assert message.error.reason == "site"
        return ""
    return hashlib.sha256(unpack(message.content)[0]).hexdigest()


def site_of(sites: Path) -> Path:
    return sites / "site-01" / "site.toml"


# ---- a disk that is full, a machine that dies


@dataclass
class Disk:
    """The calls by which something gets on disk, of which number `at` goes wrong."""

    wrong: Callable[[], object]
    at: int = 0
    half: bool = False  # the data of a write that goes wrong is written half
    after: bool = False  # goes wrong after it was done
    calls: int = 0
    real: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("write", "fsync", "ftruncate"):
            self.real[name] = getattr(os, name)
            patch.setattr(os, name, self.watched(name))

    def watched(self, name: str) -> Callable[..., Any]:
        def call(handle: int, *given: Any) -> Any:
            self.calls += 1
            if self.calls != self.at:
                return self.real[name](handle, *given)
            if name == "write" and self.half:
                self.real[name](handle, given[0][: len(given[0]) // 2])
            elif self.after:
                self.real[name](handle, *given)
            return self.wrong()

        return call


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def points(sites: Path, messages: int) -> int:
    """How many calls there are when nothing goes wrong."""
    disk = Disk(full)
    with pytest.MonkeyPatch.context() as patch:
        disk.install(patch)
        for index in range(1, messages + 1):
            send(site_of(sites), index)
    return disk.calls


def rounds(run: RunConfig = RUN) -> int:
    return run.federation.rounds


def test_every_write_of_a_message_is_one_of_the_ledgers(sites: Path):
    # The folder's name for the file, once; the budget event's line, ledger.head and its name; the reply's line.
    assert points(sites, rounds()) == 1 + rounds() * (2 + 2 + 2)


@pytest.mark.parametrize("half", [False, True], ids=["nothing", "half"])
def test_a_full_disk_at_any_write_point_lets_nothing_out(sites: Path, half: bool, tmp_path: Path):
    write_sites(REGISTRY, np.array_split(np.arange(60), 2), RUN, tmp_path / "counted")
    for at in range(1, points(tmp_path / "counted", rounds()) + 1):
        folder = tmp_path / f"at-{at}"
        write_sites(REGISTRY, np.array_split(np.arange(60), 2), RUN, folder)
        disk = Disk(full, at, half)
        sent: list[str] = []
        computed.clear()
        with pytest.MonkeyPatch.context() as patch:
            disk.install(patch)
            sent += [digest_of(send(site_of(folder), index)) for index in range(1, rounds() + 1)]
        assert sent.count("") == 1, (at, sent)
        ledger = Site.open(site_of(folder)).ledger
        found = list(ledger.entries())
        assert set(sent) - {""} <= {entry["sha256"] for entry in found}
        assert {entry["round"] for entry in found if entry["kind"] == "spend"} >= set(computed)
        assert "nothing leaves: LedgerError" in (site_of(folder).parent / "state" / "site.log").read_text()
        # When there is space again, the site goes on, and what was spent is spent once.
        assert all(digest_of(send(site_of(folder), index)) for index in range(1, rounds() + 1))
        assert len(ledger.spent()) == rounds() and ledger.verify() == ledger.check()


def died() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_process_that_dies(site_toml: Path, disk: Disk) -> list[str]:
    """What left, and which rounds were computed, as somebody outside saw it, before the process was killed."""
    outlet, inlet = os.pipe()
    write = os.write
    child = os.fork()
    if child == 0:  # everything that it keeps of the parent is of no use to it
        os.close(outlet)
        module._states.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"{__name__}.computed", Told(lambda index: write(inlet, f"computed {index}\n".encode())))
            disk.install(patch)
            for index in range(1, rounds() + 1):
                write(inlet, f"left {digest_of(send(site_toml, index))}\n".encode())
        os._exit(0)
    os.close(inlet)
    with os.fdopen(outlet) as told:
        lines = told.read().splitlines()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (disk.at, os.WEXITSTATUS(status))
    return lines


class Told(list[int]):
    """A list that tells somebody outside what is put into it."""

    def __init__(self, tell: Callable[[int], object]) -> None:
        super().__init__()
        self.tell = tell

    def append(self, index: int) -> None:
        self.tell(index)


@pytest.mark.parametrize(
    ("half", "after"), [(False, False), (True, False), (False, True)], ids=["before", "half", "after"]
)
def test_kill_9_at_every_write_point_leaves_a_ledger_that_verifies_and_no_unrecorded_egress(
    sites: Path, half: bool, after: bool, tmp_path: Path
):
    write_sites(REGISTRY, np.array_split(np.arange(60), 2), RUN, tmp_path / "counted")
    torn = 0
    for at in range(1, points(tmp_path / "counted", rounds()) + 1):
        folder = tmp_path / f"at-{at}"
        write_sites(REGISTRY, np.array_split(np.arange(60), 2), RUN, folder)
        lines = [line.split(" ", 1) for line in in_a_process_that_dies(site_of(folder), Disk(died, at, half, after))]
        left = {text for what, text in lines if what == "left"}
        computed_in = {int(text) for what, text in lines if what == "computed"}
        assert "" not in left
        ledger = Site.open(site_of(folder)).ledger
        before = ledger.path.read_bytes() if ledger.path.exists() else b""
        torn += bool(before) and not before.endswith(b"\n")
        ledger.check()
        found = list(read(ledger))
        assert left <= {entry["sha256"] for entry in found if entry["kind"] == "egress"}
        assert computed_in <= {entry["round"] for entry in found if entry["kind"] == "spend"}
        assert all(digest_of(send(site_of(folder), index)) for index in range(1, rounds() + 1))
        assert ledger.verify() == ledger.check() and len(ledger.spent()) == rounds()
    assert (torn > 0) == half


def read(ledger: module.Ledger) -> Iterator[dict[str, Any]]:
    """Its whole lines, checked; a torn line was followed by nothing."""
    ids = ledger.keys.ids()
    yield from module.lines.read(ledger.path.read_bytes() if ledger.path.exists() else b"", "ledger", ids).entries


# ---- receipts


def coordinator_of(sites: Path) -> Identity:
    return read_key(sites / COORDINATOR, (sites / PASSPHRASE).read_bytes())


def receipt_for(sites: Path, entry: dict[str, Any], nth: int, **changes: Any) -> str:
    about = {
        "number": nth, "run": entry["run"], "round_index": entry["round"], "phase": entry["phase"],
        "site": "site-01", "size_bytes": entry["bytes"], "sha256": entry["sha256"],
    }  # fmt: skip
    return Receipt(**{**about, **changes}).signed(coordinator_of(sites)).to_json()


def replies(sites: Path) -> list[dict[str, Any]]:
    return [entry for entry in Site.open(site_of(sites)).ledger.entries() if entry["kind"] != "spend"]


def code_of(message: Message) -> str:
    reply = join(*unpack(message.content), Reply)
    return reply.code if isinstance(reply, Failure) else ""


def log(sites: Path) -> str:
    return (site_of(sites).parent / "state" / "site.log").read_text()


def test_a_receipt_stands_in_the_entry_of_the_reply_to_the_instruction_that_brought_it(sites: Path):
    send(site_of(sites), 1)
    receipt = receipt_for(sites, replies(sites)[0], 1)
    assert code_of(send(site_of(sites), 2, receipt)) == ""
    first, second = replies(sites)
    parsed = Receipt.parse(receipt)
    assert "receipt" not in first
    assert second["receipt"] == {"n": first["n"], "number": 1, "signature": parsed.signature.hex()}


@pytest.mark.parametrize("loss", ["cut", "old", "gone"])
def test_a_site_whose_ledger_was_cut_or_put_back_says_so_and_does_no_work(sites: Path, loss: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Ledger, "_write_head", lambda *_: None)  # what shows it without any receipt
        for index in (1, 2):
            send(site_of(sites), index)
        ledger = Site.open(site_of(sites)).ledger
        receipt = receipt_for(sites, replies(sites)[1], 2)
        lines = ledger.path.read_bytes().splitlines(keepends=True)
        if loss == "gone":
            ledger.path.unlink()
        else:
            ledger.path.write_bytes(b"".join(lines[: -1 if loss == "cut" else 2]))
        computed.clear()
        for _ in range(2):  # saying so does not make it whole
            assert code_of(send(site_of(sites), 2, receipt)) == "ledger-behind"
        assert computed == [] and "the coordinator received 2 replies of this run" in log(sites)
        assert [entry["code"] for entry in replies(sites)][-2:] == ["ledger-behind"] * 2
        ledger.path.write_bytes(b"".join(lines))  # the newest copy is put back
        assert code_of(send(site_of(sites), 2, receipt)) == ""


@pytest.mark.parametrize("loss", ["cut", "gone"])
def test_a_ledger_that_lost_a_budget_event_lets_nothing_out_though_no_receipt_came(sites: Path, loss: str):
    send(site_of(sites), 1)
    path = Site.open(site_of(sites)).ledger.path
    path.write_bytes(b"") if loss == "cut" else path.unlink()
    assert digest_of(send(site_of(sites), 2, run_id="ab" * 16)) == ""
    assert "entry 1, which spent privacy budget, is missing of 0" in log(sites)
    assert not path.exists() or path.read_bytes() == b""


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"sha256": "00" * 32}, "ledger-behind", "does not show them all"),
        ({"size_bytes": 1}, "ledger-behind", "does not show them all"),
        ({"round_index": 2}, "ledger-behind", "does not show them all"),
        ({"phase": "query.mask"}, "ledger-behind", "does not show them all"),
        ({"number": 2}, "ledger-behind", "does not show them all"),
        ({"site": "site-02"}, "protocol", "for another run or site"),
        ({"run": "ab" * 16}, "protocol", "for another run or site"),
    ],
)
def test_a_receipt_for_something_else_is_none(sites: Path, changes: dict[str, Any], code: str, said: str):
    send(site_of(sites), 1)
    assert code_of(send(site_of(sites), 2, receipt_for(sites, replies(sites)[0], 1, **changes))) == code
    assert computed == [1] and said in log(sites)


def test_a_receipt_that_the_pinned_rosters_coordinator_did_not_sign_is_none(sites: Path):
    send(site_of(sites), 1)
    good = Receipt.parse(receipt_for(sites, replies(sites)[0], 1))
    forged = good.signed(Identity.generate()).to_json()
    assert code_of(send(site_of(sites), 2, forged)) == "verification"
    for text in ("x", "{}", forged.replace('"number":1', '"number":01'), forged + " "):
        assert code_of(send(site_of(sites), 2, text)) == "protocol"
    assert computed == [1] and "wrong signature" in log(sites)
    toml = site_of(sites)
    toml.write_text("\n".join(line for line in toml.read_text().splitlines() if not line.startswith("roster_digest")))
    assert code_of(send(toml, 2, good.to_json())) == "config"  # a site that pinned nothing cannot tell


def test_a_site_that_is_refused_work_still_confirms_what_was_received(sites: Path):
    send(site_of(sites), 1)
    receipt = receipt_for(sites, replies(sites)[0], 1)
    assert code_of(send(site_of(sites), 99, receipt)) == "refused"
    assert replies(sites)[-1]["receipt"]["number"] == 1
