"""The coordinator's receipts: one for every reply, none twice, sent when they are on disk; and ledgers that agree.

The sites are those of sites_case.py with ledgers as hospitals have them, which look up every receipt they are sent.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from wardround.client.ledger import Ledger
from wardround.common import ledger as lines
from wardround.common.cli import main
from wardround.common.config import RunConfig
from wardround.common.errors import LedgerBehindError, ProtocolError, RunFolderError, VerificationError
from wardround.common.identity import Card, Identity
from wardround.common.messages import Failure, Instruction, split
from wardround.common.receipt import Receipt
from wardround.common.roster import Roster
from wardround.server.aggregation import SecureSums
from wardround.server.journal import open_journal
from wardround.server.phases import Answer, Consortium
from wardround.server.receipts import FILE, Agreement, Receipts, check, describe, read_receipts, read_run
from wardround.server.roll_call import RollCall
from wardround.server.run import Coordinator
from wardround.server.tracking import SilentProgress

from .sites_case import DICTIONARY, ROUND_ZERO, Sites, Stopped, failing, identity

CONFIG = RunConfig.model_validate({"name": "t", "privacy": {"enabled": False}})
COORDINATOR = identity("the coordinator")
RUN_ID = "ab" * 16


class Keys:
    """A site's."""

    def __init__(self, name: str) -> None:
        self.key = identity(name)

    def identity(self) -> Identity:
        return self.key

    def ids(self) -> list[bytes]:
        return [self.key.id]


@dataclass
class Recorded(Sites):
    """Sites with ledgers in a folder. `lost`: replies that leave the site and never arrive, by (name, kind)."""

    folder: Path = Path()
    lost: set[tuple[str, str]] = field(default_factory=set)
    sent: list[tuple[str, str]] = field(default_factory=list)  # site and receipt of every instruction

    def ledger(self, site: str) -> Ledger:
        (self.folder / site).mkdir(parents=True, exist_ok=True)
        return Ledger(self.folder / site / "ledger.jsonl", Keys(site), self.folder / site / "ledger.head")

    def ask(self, instructions: Mapping[int, Instruction]) -> Iterator[Answer]:
        kept = {node: replace(one, receipt="") for node, one in instructions.items()}
        self.receipts = {node: one.receipt for node, one in instructions.items()}
        return super().ask(kept)

    def answer(self, node: int, site: str, kind: str, instruction: Instruction) -> Answer:
        self.sent.append((site, self.receipts[node]))
        answer, confirmed = super().answer(node, site, kind, instruction), None
        reply = answer.reply
        if reply is None:
            return answer
        ledger = self.ledger(site)
        try:
            if self.receipts[node]:
                receipt = Receipt.parse(self.receipts[node])
                receipt.verify(self.roster.coordinator)
                confirmed = ledger.confirm(receipt)
        except LedgerBehindError as error:
            reply = Failure(run_id=reply.run_id, site=reply.site, round_index=reply.round_index, code=error.code)
        head, vectors = split(reply)
        size, digest = len(head) + sum(map(len, vectors.values())), hashlib.sha256(head).hexdigest()
        code = reply.code if isinstance(reply, Failure) else ""
        ledger.append(
            "refusal" if code else "egress", run_id=reply.run_id, round_index=reply.round_index,
            phase=instruction.ROUTE, purpose="p", size_bytes=size, sha256=digest, code=code, receipt=confirmed,
        )  # fmt: skip
        if (site, kind) in self.lost:
            return Answer(node, None, "silent", 0, answer.bytes_down)
        return Answer(node, reply, code, size, answer.bytes_down, digest)

    def ledgers(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(self.folder.glob("*/ledger.jsonl"))}


class Run:
    """The coordinator's process, with receipts."""

    def __init__(self, out: Path, sites: Recorded, key: Identity = COORDINATOR, *, resume: bool = False) -> None:
        self.journal = open_journal(out, CONFIG, resume)
        self.receipts = Receipts.open(self.journal, key)
        self.consortium = Consortium(sites, CONFIG, self.journal, SilentProgress(), self.receipts)
        sums = SecureSums(self.consortium, sites.roster)
        self.coordinator = Coordinator(CONFIG, DICTIONARY, out, self.journal, self.consortium, sums)
        self.roll_call = RollCall(self.consortium, DICTIONARY.digest(), "p", ROUND_ZERO)

    def set_up(self) -> None:
        """Warm-up, counts, schema: seven exchanges."""
        self.roll_call.everyone()
        self.coordinator.schema(self.roll_call)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.receipts.close()
        self.journal.close()


def recorded(tmp_path: Path, **changes: Any) -> Recorded:
    return Recorded(folder=tmp_path / "sites", **changes)


def agree(out: Path, sites: Recorded, **ledgers: bytes) -> list[Agreement]:
    run_id, found, losses = read_run(out)
    return check(found, run_id, {**sites.ledgers(), **ledgers}, sites.roster, losses)


def problems(agreements: list[Agreement]) -> list[str]:
    return [f"{one.site}: {problem}" for one in agreements for problem in one.problems]


def test_every_reply_is_signed_for_and_the_next_instruction_brings_the_receipt(tmp_path: Path):
    sites = recorded(tmp_path)
    with Run(tmp_path / "run", sites) as run:
        run.set_up()
    receipts = read_receipts(tmp_path / "run" / "journal" / FILE, run.journal.run_id).receipts
    assert len(receipts) == 5 * 7 and len(sites.sent) == 5 * 7
    for name in sites.names.values():
        mine = [receipt for receipt in receipts if receipt.site == name]
        assert [receipt.number for receipt in mine] == list(range(1, 8))
        assert [text for site, text in sites.sent if site == name] == ["", *(one.to_json() for one in mine[:-1])]
        entries = list(sites.ledger(name).entries())
        assert [entry.get("receipt", {}).get("n") for entry in entries] == [None, *range(1, 7)]
    agreements = agree(tmp_path / "run", sites)
    assert problems(agreements) == []
    assert [(one.site, one.replies, one.received, one.unconfirmed) for one in agreements] == [
        (name, 7, 7, []) for name in sites.names.values()
    ]


def test_receipts_are_on_disk_before_they_are_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, synced = tmp_path / "run" / "journal" / FILE, [0]
    real = os.fsync

    def fsync(handle: int) -> None:
        real(handle)
        if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
            synced.append(os.fstat(handle).st_size)

    monkeypatch.setattr(os, "fsync", fsync)

    class Watching(Recorded):
        def ask(self, instructions: Mapping[int, Instruction]) -> Iterator[Answer]:
            durable = path.read_bytes()[: synced[-1]].decode()
            assert all(one.receipt in durable for one in instructions.values())
            return super().ask(instructions)

    with Run(tmp_path / "run", Watching(folder=tmp_path / "sites")) as run:
        run.set_up()
    assert len(synced) - 1 == 1 + 7  # at the start; once an exchange, the last when it is closed


def test_a_site_whose_ledger_was_cut_is_left_out_by_that_word_until_it_is_whole(tmp_path: Path):
    sites = recorded(tmp_path)
    with Run(tmp_path / "run", sites) as run:
        run.roll_call.everyone()
        path = sites.ledger("site-03").path
        whole = path.read_bytes()
        path.write_bytes(b"")
        run.coordinator.schema(run.roll_call)
        losses = {(loss["site"], loss["code"]) for loss in run.journal.losses()}
        assert losses == {("site-03", "ledger-behind")}
        newest = run.receipts.newest("site-03")
        assert Receipt.parse(newest).number == 1  # the word itself is not signed for
        assert run.consortium.cohort.ready == {"site-01", "site-02", "site-04", "site-05"}
        path.write_bytes(whole)
        run.roll_call.latecomers()
        assert "site-03" in run.consortium.cohort.ready
    assert problems(agree(tmp_path / "run", sites)) == []


def test_a_stranger_with_a_sites_name_gets_no_receipt_in_its_name(tmp_path: Path):
    sites = recorded(tmp_path)
    with Run(tmp_path / "run", sites) as run:
        run.roll_call.everyone()
        sites.names[99] = "site-02"
        run.roll_call.latecomers()
        assert [loss["site"] for loss in run.journal.losses()] == ["node 99"]
        assert Receipt.parse(run.receipts.newest("site-02")).number == 1
    assert "site-02" in {one.site for one in agree(tmp_path / "run", sites)}


@pytest.mark.parametrize(
    "change", [{"run_id": "cd" * 16}, {"round_index": 5}, {"site": "site-02"}], ids=["run", "round", "name"]
)
def test_a_reply_that_answers_something_else_is_not_signed_for(tmp_path: Path, change: dict[str, Any]):
    def twist(reply: Any) -> Any:
        return replace(reply, **change)

    sites = recorded(tmp_path, twists={("site-01", "Count"): twist})
    with Run(tmp_path / "run", sites) as run:
        run.roll_call.everyone()
        run.coordinator.schema(run.roll_call)
        assert {loss["code"] for loss in run.journal.losses()} == {"protocol"}
        found = read_receipts(run.receipts.path, run.journal.run_id).receipts
    assert [one.phase for one in found if one.site == "site-01"] == ["query.warmup", "query.schema"]


def test_refusals_are_signed_for_as_well(tmp_path: Path):
    sites = recorded(tmp_path, twists={("site-04", "Count"): failing("refused")})
    with Run(tmp_path / "run", sites) as run:
        run.set_up()
    (mine,) = [one for one in agree(tmp_path / "run", sites) if one.site == "site-04"]
    assert (mine.replies, mine.received, mine.problems) == (3, 3, [])


@pytest.mark.parametrize("after", range(1, 36, 5))
def test_a_coordinator_that_was_killed_goes_on_with_the_next_number(tmp_path: Path, after: int):
    sites = recorded(tmp_path, stop_after=after)
    with pytest.raises(Stopped), Run(tmp_path / "run", sites) as run:
        run.set_up()
    path = tmp_path / "run" / "journal" / FILE
    path.write_bytes(path.read_bytes() + b'{"bytes":12,"num')  # and in the middle of a receipt
    sites.stop_after = 10**9
    with Run(tmp_path / "run", sites, resume=True) as run:
        run.set_up()
    found = read_receipts(path, run.journal.run_id)
    assert found.starts == 2
    for name in sites.names.values():
        numbers = [one.number for one in found.receipts if one.site == name]
        assert numbers == list(range(1, len(numbers) + 1))
    assert problems(agree(tmp_path / "run", sites)) == []


def test_a_kill_between_a_reply_and_its_receipt_is_no_disagreement_a_missing_receipt_is(tmp_path: Path):
    sites = recorded(tmp_path)
    with Run(tmp_path / "run", sites) as run:
        run.set_up()
    path = tmp_path / "run" / "journal" / FILE
    whole = path.read_text().splitlines(keepends=True)
    mine = [line for line in whole if '"site":"site-01"' in line]
    path.write_text("".join(line for line in whole if line != mine[-1]))  # the last one may be missing
    assert problems(agree(tmp_path / "run", sites)) == []
    path.write_text("".join(line for line in whole if line not in mine[-2:]))
    said = problems(agree(tmp_path / "run", sites))
    assert said == [
        "site-01: line 7 holds receipt 6, which the coordinator does not have",
        "site-01: lines 6, 7 were recorded and not received; 1 may be: one for every start of the coordinator, and "
        "what it noted as lost",
    ]


def test_what_the_coordinator_noted_as_lost_may_be_unconfirmed(tmp_path: Path):
    sites = recorded(tmp_path, lost={("site-05", "Count"), ("site-05", "Schema")})
    with Run(tmp_path / "run", sites) as run:
        run.set_up()
    (mine,) = [one for one in agree(tmp_path / "run", sites) if one.site == "site-05"]
    assert (mine.replies, mine.received, mine.unconfirmed, mine.problems) == (3, 1, [2, 3], [])


def test_with_another_key_receipts_begin_again_and_those_of_before_are_not_sent(tmp_path: Path):
    sites = recorded(tmp_path)
    with Run(tmp_path / "run", sites) as run:
        run.roll_call.everyone()
    with Run(tmp_path / "run", sites, Identity.generate(), resume=True) as run:
        assert run.receipts.newest("site-01") == ""
        run.receipts.note("site-01", 0, "query.warmup", 10, "0" * 64)
        assert Receipt.parse(run.receipts.newest("site-01")).number == 1


# ---- what does not agree


@dataclass
class Two:
    """A run of a site, made by hand."""

    folder: Path
    roster: Roster = field(
        default_factory=lambda: Roster.first(
            COORDINATOR, "trial", [Card.make(identity(name), name) for name in ("north", "south")]
        )
    )
    receipts: list[Receipt] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.folder / "ledger.jsonl", Keys("north"), self.folder / "ledger.head")

    def reply(self, index: int, *, received: bool = True, run: str = RUN_ID, **held: Any) -> None:
        about = {"run_id": run, "round_index": index, "phase": "train.local", "purpose": "p", "size_bytes": 10}
        held = {"receipt": self.ledger.confirm(self.receipts[-1])} if self.receipts and not held else held
        entry = self.ledger.append("egress", sha256=f"{index:064x}", **about, **held)
        if received:
            number = len(self.receipts) + 1
            receipt = Receipt(number, run, index, "train.local", "north", 10, entry["sha256"])
            self.receipts.append(receipt.signed(COORDINATOR))

    def check(self, *changed: Receipt, ledgers: Mapping[str, bytes] | None = None, starts: int = 1) -> list[str]:
        path = self.folder / FILE
        receipts = list(changed) or self.receipts
        starting = "".join(f'{{"start":{n}}}\n' for n in range(1, starts + 1))
        path.write_text(starting + "".join(receipt.to_json() + "\n" for receipt in receipts))
        given = ledgers if ledgers is not None else {"north.jsonl": self.ledger.path.read_bytes()}
        return problems(check(read_receipts(path, RUN_ID), RUN_ID, given, self.roster))


@pytest.fixture
def two(tmp_path: Path) -> Two:
    made = Two(tmp_path)
    for index in (1, 2, 3):
        made.reply(index)
    return made


def test_a_run_that_agrees_has_no_problem_and_other_runs_are_not_looked_at(two: Two):
    two.reply(9, received=False, run="cd" * 16, receipt=None)
    two.ledger.spend({"kind": "rounds"}, RUN_ID, 3, "p")
    assert two.check() == []


def test_a_reply_that_was_received_and_not_recorded_is_found(two: Two):
    cut = b"".join(two.ledger.path.read_bytes().splitlines(keepends=True)[:2])
    said = "north: receipt 3: a reply of round 3 (train.local, 10 bytes) was received and is not in the ledger"
    assert two.check(ledgers={"north.jsonl": cut}) == [said]
    again = replace(two.receipts[2], number=4).signed(COORDINATOR)
    assert two.check(*two.receipts, again) == [said.replace("receipt 3", "receipt 4")]  # received twice, recorded once
    other = replace(two.receipts[2], size_bytes=11).signed(COORDINATOR)
    assert "11 bytes) was received and is not in the ledger" in two.check(*two.receipts[:2], other)[0]


def test_a_reply_that_was_recorded_and_not_received_is_found(two: Two):
    two.reply(4, received=False)
    assert two.check() == []  # the last may be
    two.reply(5, received=False, receipt=None)
    assert "lines 4, 5 were recorded and not received; 1 may be" in two.check()[0]
    assert two.check(starts=2) == []


def test_a_reply_that_was_lost_and_sent_again_is_received_once(two: Two):
    """The same bytes: nothing more has left than what was signed for. Of one that never arrived that is not so."""
    for _ in range(3):
        two.reply(4, received=False, receipt=None)
    assert "lines 4, 5, 6 were recorded and not received" in two.check()[0]
    two.reply(4, receipt=None)
    assert two.check() == []
    for _ in range(3):
        two.reply(3, received=False, receipt=None)
    path = two.folder / FILE
    (agreement,) = check(read_receipts(path, RUN_ID), RUN_ID, {"x": two.ledger.path.read_bytes()}, two.roster)
    assert (agreement.problems, agreement.unconfirmed, agreement.repeated) == ([], [], [5, 6, 7, 8, 9, 10])
    assert (
        describe(agreement) == "north: 10 replies recorded, 4 received; sent again: lines 5, 6, 7, 8, 9, 10; they agree"
    )


def test_a_receipt_that_the_coordinator_did_not_sign_or_no_longer_has_is_found(two: Two):
    forged = two.receipts[0].signed(Identity.generate())
    assert two.check(forged, *two.receipts[1:]) == [
        "north: receipt 1: wrong signature: it was changed, or signed by another key",
        "north: line 2 holds receipt 1, which the coordinator does not have",
    ]
    wrong = {"n": 1, "number": 2, "signature": two.receipts[1].signature.hex()}
    two.reply(4, receipt=wrong)
    assert two.check() == ["north: line 4: its receipt is not for line 1, which it names"]


def test_ledgers_that_are_changed_missing_somebodys_or_there_twice_are_named(two: Two):
    good = two.ledger.path.read_bytes()
    with pytest.raises(VerificationError, match=r"north.jsonl: line 2 was changed"):
        two.check(ledgers={"north.jsonl": good.replace(b'"round":2', b'"round":7')})
    with pytest.raises(VerificationError, match=r"copy.jsonl: a second ledger of north"):
        two.check(ledgers={"north.jsonl": good, "copy.jsonl": good})
    with pytest.raises(VerificationError, match=r"x.jsonl: line 3 was changed, or this site did not write it"):
        roster = Roster.first(COORDINATOR, "trial", [Card.make(identity("south"), "south")])
        check(read_receipts(two.folder / FILE, RUN_ID), RUN_ID, {"x.jsonl": good}, roster)
    with pytest.raises(VerificationError, match="an empty ledger"):
        two.check(ledgers={"x.jsonl": b""})
    assert two.check(ledgers={}) == ["north: no ledger of this site was given"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: "hello\n" + text, "line 1 is not a receipt"),
        (lambda text: text.replace(RUN_ID, "cd" * 16), "line 2 is a receipt of another run"),
        (lambda text: text + '{"start":3}\n', "line 5 is not a receipt"),
        (
            lambda text: "".join(line for line in text.splitlines(True) if '"number":2' not in line),
            "receipt 3 of north follows 1",
        ),
    ],
)
def test_a_file_of_receipts_that_is_not_one_is_refused(two: Two, change: Any, said: str):
    assert two.check() == []
    path = two.folder / FILE
    path.write_text(change(path.read_text()))
    with pytest.raises(RunFolderError, match=said):
        read_receipts(path, RUN_ID)


# ---- the command


def run_cli(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    try:
        main([str(arg) for arg in args])
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_compares_a_run_with_its_sites_ledgers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sites = recorded(tmp_path)
    with Run(tmp_path / "run", sites) as run:
        run.set_up()
    (tmp_path / "roster.json").write_text(sites.roster.to_json())
    paths = sorted(sites.folder.glob("*/ledger.jsonl"))
    command = ["server", "receipts", "check", tmp_path / "run", *paths, "--roster", tmp_path / "roster.json"]
    code, out, err = run_cli(capsys, *command)
    assert (code, err) == (0, "")
    assert out.splitlines() == [f"{name}: 7 replies recorded, 7 received; they agree" for name in sites.names.values()]
    code, out, _ = run_cli(capsys, *command, "--json")
    assert code == 0 and len(json.loads(out)["sites"]) == 5
    whole = paths[0].read_bytes()
    for cut in (b"".join(whole.splitlines(keepends=True)[:-1]), whole[:-20]):  # a torn line counts for nothing
        paths[0].write_bytes(cut)
        code, out, err = run_cli(capsys, *command)
        assert code == 2 and "error: site-01: receipt 7: a reply of round 0 (query.schema" in err
        assert "site-02: 7 replies recorded, 7 received; they agree" in out
    for wrong, said in (
        (["server", "receipts", "check", tmp_path / "run", *paths], "name the consortium's roster with --roster"),
        (["server", "receipts", "check", tmp_path, *paths, "--roster", tmp_path / "roster.json"], "holds no run"),
        ([*command, tmp_path / "none.jsonl"], "ledger: cannot be read: no such file"),
    ):
        code, _, err = run_cli(capsys, *wrong)
        assert code == 2 and said in err and err.count("\n") == 1


# ---- the receipt itself


GOOD = Receipt(3, RUN_ID, 2, "train.local", "north", 1234, "ef" * 32).signed(COORDINATOR)


def test_a_receipt_is_the_bytes_that_the_protocol_says():
    content = json.loads(GOOD.to_json())
    signature = bytes.fromhex(content.pop("signature"))
    assert content == {
        "bytes": 1234, "number": 3, "phase": "train.local", "round": 2, "run": RUN_ID, "sha256": "ef" * 32,
        "site": "north",
    }  # fmt: skip
    said = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    COORDINATOR.key.public_key().verify(signature, b"wardround/secagg/1/receipt\0" + said)
    assert Receipt.parse(GOOD.to_json()) == GOOD


@pytest.mark.parametrize(
    "change",
    [
        {"number": 4}, {"run": "cd" * 16}, {"round_index": 3}, {"phase": "query.mask"}, {"site": "south"},
        {"size_bytes": 1}, {"sha256": "00" * 32},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_signature_is_over_every_field(change: dict[str, Any]):
    GOOD.verify(COORDINATOR.id)
    with pytest.raises(VerificationError, match="wrong signature"):
        replace(GOOD, **change).verify(COORDINATOR.id)


def test_a_receipt_is_no_signature_of_another_use():
    entry = lines.make_line({"n": 1, "previous": lines.START}, COORDINATOR)
    assert lines.signer_of(entry[:-1], [COORDINATOR.id]) == COORDINATOR.id
    swapped = replace(GOOD, signature=COORDINATOR.sign(lines.USE_LEDGER, GOOD.statement()))
    with pytest.raises(VerificationError):
        swapped.verify(COORDINATOR.id)


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "[]", "{}", "9" * 2000, "[" * 900, GOOD.to_json() + " ",
        GOOD.to_json().replace('"round":2', '"round":-2'), GOOD.to_json().replace('"round":2', '"round":2.0'),
        GOOD.to_json().replace('"round":2', '"round":true'), GOOD.to_json().replace("north", "no/rth"),
        GOOD.to_json().replace("train.local", "TRAIN"), GOOD.to_json().replace(RUN_ID, RUN_ID[:-1]),
        GOOD.to_json().replace('{"bytes"', '{"extra":1,"bytes"'), GOOD.to_json().replace(",", ", "),
        GOOD.to_json().upper(),
    ],
)  # fmt: skip
def test_what_is_no_receipt_is_refused(text: str):
    with pytest.raises(ProtocolError, match="receipt: expected"):
        Receipt.parse(text)
