"""The ledger: a signed chain in which every change, removal, insertion, reordering and known cut is found."""

import errno
import json
import multiprocessing
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from wardround.client import ledger as module
from wardround.client.ledger import START, Ledger, LedgerError
from wardround.common import ledger as lines
from wardround.common.errors import ConfigError, LedgerBehindError, RefusedError, VerificationError
from wardround.common.identity import Identity

from .ledger_case import RUN, FixedKeys, add, event, ledger_in, receipt_for


def test_entries_are_chained_and_signed_and_verify(tmp_path: Path):
    ledger = ledger_in(tmp_path)
    assert ledger.verify() == 0
    add(ledger, 3)
    assert ledger.verify() == 3
    found = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    assert found[0]["previous"] == START
    assert [line["n"] for line in found] == [1, 2, 3]
    assert ledger.path.stat().st_mode & 0o777 == 0o600


def test_a_line_is_what_the_protocol_says_it_is(tmp_path: Path):
    ledger = ledger_in(tmp_path)
    add(ledger, 2)
    first, second = ledger.path.read_bytes().splitlines(keepends=True)
    assert second.startswith(b'{"n":2,"previous":"' + lines.line_digest(first).encode() + b'","bytes":10,"code":"",')
    body, signature = second[: -len(b',"signature":"' + 128 * b"0" + b'"}\n')] + b"}", json.loads(second)["signature"]
    domain = b"wardround/secagg/1/ledger\0"
    ledger.keys.identity().key.public_key().verify(bytes.fromhex(signature), domain + body)
    content = json.loads(body)
    assert list(content)[2:] == sorted(set(content) - {"n", "previous"})


# ---- what verification finds


def forty(folder: Path) -> Ledger:
    """Forty lines of every kind: two runs, refusals, budget events, receipts, a torn line that was dropped."""
    ledger = ledger_in(folder)
    for number in range(1, 41):
        if number == 20:
            with ledger.path.open("ab") as file:
                file.write(b'{"n":20,"previous')
        run = (RUN, "cd" * 16)[number > 25]
        if number % 10 == 7:
            ledger.spend(event(), run, number, "noised training")
            continue
        entries = list(ledger.entries()) if number % 3 == 0 and number != 20 else []
        known = [entry for entry in entries if entry["run"] == run and entry["kind"] != "spend"]
        receipt = ledger.confirm(receipt_for(known[-1], len(known))) if known else None
        kind, code = ("refusal", "refused") if number % 8 == 0 else ("egress", "")
        ledger.append(
            kind,
            run_id=run,
            round_index=number,
            phase="train.local",
            purpose="a vector under masks",
            size_bytes=1000 + number,
            sha256=f"{number:064x}",
            code=code,
            registry="" if code else "ef" * 32,
            receipt=receipt,
        )
    return ledger


def damaged(data: bytes, ids: list[bytes]) -> str:
    """What is said of a changed ledger; the bytes are read as `Ledger.verify` reads them."""
    try:
        checked = lines.read(data, "ledger", ids, every_signature=True)
    except VerificationError as error:
        return str(error)
    return "cut off" if checked.torn else ""


@pytest.mark.parametrize("seed", range(10))
def test_removed_inserted_and_reordered_lines_are_found_and_named(tmp_path: Path, seed: int):
    ledger = ledger_in(tmp_path)
    add(ledger, 8)
    rng = random.Random(seed)
    good = ledger.path.read_bytes().splitlines(keepends=True)
    i, j = sorted(rng.sample(range(len(good)), 2))
    i, j = min(i, len(good) - 2), max(j, 1)  # the last line's removal is a cut, and that is another test
    removed = good[:i] + good[i + 1 :]
    inserted = [*good[:j], good[i], *good[j:]]
    swapped = list(good)
    swapped[i], swapped[j] = good[j], good[i]
    for changed, said in (
        (removed, f"line {i + 1} is entry {i + 2}: entry {i + 1} was removed"),
        (inserted, f"line {j + 1} is entry {i + 1}: it was inserted or moved there"),
        (swapped, f"line {i + 1} is entry {j + 1}: "),
    ):
        if b"".join(changed) == b"".join(good):
            continue
        ledger.path.write_bytes(b"".join(changed))
        with pytest.raises(VerificationError, match=said):
            ledger.verify()
        with pytest.raises(VerificationError, match=said):
            ledger.check()


def test_a_chain_that_somebody_without_the_key_wrote_anew_is_found(tmp_path: Path):
    ledger = ledger_in(tmp_path)
    add(ledger, 3)
    forged = ledger_in(tmp_path / "forged", b"x")
    add(forged, 3)
    ledger.path.write_bytes(forged.path.read_bytes())
    for look in (ledger.verify, ledger.check, lambda: add(ledger, 1)):
        with pytest.raises(VerificationError, match="line 3 was changed, or this site did not write it"):
            look()
    # Nor can lines that were signed be put behind others.
    first = ledger_in(tmp_path / "first")
    add(first, 2)
    second = ledger_in(tmp_path / "second")
    add(second, 2, run="other")
    mixed = (
        first.path.read_bytes().splitlines(keepends=True)[:1] + second.path.read_bytes().splitlines(keepends=True)[1:]
    )
    first.path.write_bytes(b"".join(mixed))
    with pytest.raises(VerificationError, match="line 2 does not follow the line before it"):
        first.verify()


def test_a_total_that_is_not_the_sum_is_found_though_it_is_signed(tmp_path: Path):
    ledger = ledger_in(tmp_path)
    add(ledger, 1)
    (entry,) = ledger.entries()
    del entry["signature"]
    ledger.path.write_bytes(lines.make_line({**entry, "total": 9}, ledger.keys.identity()))
    with pytest.raises(VerificationError, match="line 1: expected total 10, got 9"):
        ledger.verify()


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.pop("code"),
        lambda entry: entry.update(kind="other"),
        lambda entry: entry.update(bytes="10"),
        lambda entry: entry.update(more=1),
        lambda entry: entry.update(event={"kind": "rounds"}, orders={}),
        lambda entry: entry.update(receipt={"n": 1}),
    ],
    ids=["missing", "kind", "type", "unknown", "event", "receipt"],
)
def test_a_signed_line_that_is_no_entry_is_found(tmp_path: Path, change: Callable[[dict[str, Any]], object]):
    ledger = ledger_in(tmp_path)
    add(ledger, 1)
    (entry,) = ledger.entries()
    del entry["signature"]
    change(entry)
    ledger.path.write_bytes(lines.make_line(entry, ledger.keys.identity()))
    for look in (ledger.verify, ledger.check):
        with pytest.raises(VerificationError, match="line 1 is not a ledger entry"):
            look()


# ---- keys


def test_a_key_that_was_retired_still_vouches_for_its_lines_and_signs_no_more(tmp_path: Path):
    ledger = ledger_in(tmp_path)
    add(ledger, 2)
    rotated = ledger_in(tmp_path, b"k", b"n")
    add(rotated, 2)
    assert rotated.verify() == 4
    with pytest.raises(VerificationError, match="line 4 was changed, or this site did not write it"):
        ledger.verify()
    module._states.clear()
    add(Ledger(rotated.path, OldKey(), rotated.head), 1)
    with pytest.raises(VerificationError, match="line 5 was changed, or this site did not write it"):
        rotated.verify()


class OldKey(FixedKeys):
    """Signs with the key before."""

    def __init__(self) -> None:
        super().__init__(b"k", b"n")

    def identity(self) -> Identity:
        return self.all[0]


def test_without_an_identity_nobody_can_tell_whose_ledger_it_is(tmp_path: Path):
    ledger = ledger_in(tmp_path)
    add(ledger, 1)
    module._states.clear()
    bare = Ledger(ledger.path, NoKeys(), ledger.head)
    for look in (bare.verify, bare.check, bare.spent):
        with pytest.raises(VerificationError, match="this site's identity is missing"):
            look()
    with pytest.raises(ConfigError, match="no identity"):
        add(Ledger(tmp_path / "new.jsonl", NoKeys(), ledger.head), 1)
    assert (tmp_path / "new.jsonl").read_bytes() == b""


class NoKeys(FixedKeys):
    def identity(self) -> Identity:
        raise ConfigError("no identity")

    def ids(self) -> list[bytes]:
        return []


# ---- crashes and full disks


@pytest.mark.parametrize("kept", [1, 20, 300])
def test_a_line_cut_by_a_crash_is_dropped_and_said_so(tmp_path: Path, kept: int):
    ledger = ledger_in(tmp_path)
    add(ledger, 2)
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole + whole.splitlines(keepends=True)[0][:kept].rstrip(b"\n"))
    torn = len(ledger.path.read_bytes()) - len(whole)
    with pytest.raises(VerificationError, match="line 3 is cut off, as by a crash"):
        ledger.verify()
    add(ledger, 1)
    assert ledger.verify() == 3
    assert json.loads(ledger.path.read_text().splitlines()[-1])["dropped_torn_bytes"] == torn


def test_a_first_line_cut_by_a_crash_leaves_a_usable_ledger(tmp_path: Path):
    ledger = ledger_in(tmp_path)
    ledger.path.write_bytes(b'{"n": 1, "byt')
    add(ledger, 1)
    assert ledger.verify() == 1


def test_a_whole_line_that_lost_its_end_alone_is_kept(tmp_path: Path):
    ledger = ledger_in(tmp_path)
    add(ledger, 2)
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole[:-1])
    assert ledger.check() == 2
    assert ledger.path.read_bytes() == whole
    ledger.path.write_bytes(whole[:-1] + b"x")
    for look in (ledger.verify, ledger.check):
        with pytest.raises(VerificationError, match="line 2 was changed at its end"):
            look()


def test_a_ledger_whose_last_line_is_something_else_stops_the_site(tmp_path: Path):
    ledger = ledger_in(tmp_path)
    ledger.path.write_bytes(b"hello\n")
    with pytest.raises(VerificationError, match="line 1 was changed"):
        add(ledger, 1)
    assert ledger.path.read_bytes() == b"hello\n"


def test_the_name_of_a_new_ledger_is_on_disk_before_anything_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[Path] = []
    monkeypatch.setattr(module, "sync_folder", synced.append)
    ledger = ledger_in(tmp_path)
    add(ledger, 3)
    assert synced == [tmp_path / "state"]


class Disk:
    """os.write, os.fsync and os.ftruncate, of which the n-th fails; a failed write leaves half of what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: int) -> None:
        self.left, self.calls = fails, 0
        for name in ("write", "fsync"):
            monkeypatch.setattr(os, name, self.failing(getattr(os, name), name))

    def failing(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(handle: int, *data: bytes) -> Any:
            self.calls += 1
            if self.calls == self.left:
                if name == "write":
                    call(handle, data[0][: len(data[0]) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(handle, *data)

        return run


@pytest.mark.parametrize("fails", range(1, 8))
@pytest.mark.parametrize("before", [0, 2], ids=["new", "known"])
def test_a_full_disk_at_any_write_leaves_a_ledger_that_verifies(tmp_path: Path, before: int, fails: int):
    ledger = ledger_in(tmp_path)
    add(ledger, before)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, fails)
        try:
            add(ledger, 1)
            ledger.spend(event(), RUN, 7, "noised training")
            add(ledger, 1)
        except LedgerError as error:
            assert error.errno == errno.ENOSPC
            failed = True
        else:
            failed = False
    assert failed == (disk.calls >= fails)
    assert before <= ledger.verify() <= before + 3
    add(ledger, 1)
    ledger.spend(event(), RUN, 7, "noised training")
    assert ledger.spent() == [event()]
    assert ledger.verify() == ledger.check()


def test_all_write_points_were_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disk = Disk(monkeypatch, 0)
    ledger = ledger_in(tmp_path)
    add(ledger, 1)
    ledger.spend(event(), RUN, 7, "noised training")
    add(ledger, 1)
    # The new file's name, line and fsync; line and fsync; ledger.head and its name; line and fsync: one fsync an entry.
    assert disk.calls == 3 + 2 + 2 + 2


def test_two_processes_write_one_chain(tmp_path: Path):
    ledger = ledger_in(tmp_path)
    workers = [multiprocessing.get_context("fork").Process(target=add_blindly, args=(ledger, 20)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert ledger.verify() == 60


def add_blindly(ledger: Ledger, n: int) -> None:
    for index in range(n):
        ledger.append(
            "egress", run_id=RUN, round_index=index, phase="p", purpose="p", size_bytes=1, sha256=f"{os.getpid():064x}"
        )


def test_a_ledger_that_something_else_changed_is_read_again(tmp_path: Path):
    ledger = ledger_in(tmp_path)
    add(ledger, 3)
    good = ledger.path.read_bytes()
    ledger.path.write_bytes(good.replace(b'"round":2', b'"round":9'))
    for look in (ledger.check, ledger.sent_bytes, ledger.spent, lambda: add(ledger, 1)):
        with pytest.raises(VerificationError, match="line 2 was changed"):
            look()
    ledger.path.write_bytes(good)
    assert ledger.check() == 3


# ---- what a ledger says


def test_another_kind_of_entry_is_refused(tmp_path: Path):
    for kind in ("other", "spend"):
        with pytest.raises(ValueError, match="ledger kind"):
            add(ledger_in(tmp_path), 1, kind=kind)


def test_bytes_are_summed_over_all_runs_and_for_each_without_refusals(tmp_path: Path):
    ledger = ledger_in(tmp_path)
    assert ledger.sent_bytes() == 0
    add(ledger, 3, run="a", size=7)
    add(ledger, 2, run="b", size=100)
    add(ledger, 2, run="a", kind="refusal", size=50)
    for _ in range(2):
        assert [ledger.sent_bytes(run) for run in (None, "a", "b", "c")] == [221, 21, 200, 0]
        module._states.clear()
    assert [entry["total"] for entry in ledger.entries()] == [7, 14, 21, 121, 221, 221, 221]


def test_every_entry_of_a_round_holds_the_digest_of_the_registry_that_its_work_read(tmp_path: Path):
    ledger = ledger_in(tmp_path)
    about = {"round_index": 1, "registry": "11" * 32}
    add(ledger, 1, **about)
    add(ledger, 1, round_index=1)
    module._states.clear()
    add(ledger, 1, round_index=1)
    add(ledger, 1, round_index=2)
    add(ledger, 1, round_index=1, run="other")
    add(ledger, 1, round_index=1, kind="refusal")
    add(ledger, 1, round_index=1, registry="22" * 32)
    add(ledger, 1, round_index=1)
    assert [entry["registry"][:2] for entry in ledger.entries()] == ["11", "11", "11", "", "", "", "22", "22"]


def test_what_left_is_known_by_run_round_and_phase(tmp_path: Path):
    ledger = ledger_in(tmp_path)
    assert not ledger.has_left(RUN, 1, "query.mask")
    add(ledger, 1, round_index=1, phase="query.mask", kind="refusal", code="refused")
    assert not ledger.has_left(RUN, 1, "query.mask")
    add(ledger, 1, round_index=1, phase="query.mask")
    module._states.clear()
    asked = [(RUN, 1, "query.mask"), (RUN, 2, "query.mask"), (RUN, 1, "query.unmask"), ("cd" * 16, 1, "query.mask")]
    assert [ledger.has_left(*about) for about in asked] == [True, False, False, False]
    assert [ledger.has_left(RUN, 1, "query.mask", since=number) for number in (1, 2)] == [True, False]
    add(ledger, 1, round_index=1, phase="query.mask")
    assert ledger.has_left(RUN, 1, "query.mask", since=2)


# ---- budget events


def test_a_budget_event_is_recorded_once_for_a_round_however_often_it_is_asked(tmp_path: Path):
    ledger = ledger_in(tmp_path)
    assert ledger.spent() == []
    assert ledger.spend(event(), RUN, 1, "noised training") == 1
    for _ in range(2):
        assert ledger.spend(event(), RUN, 1, "noised training") == 1  # its line, again
        module._states.clear()
    assert ledger.spend(event("schema"), RUN, 1, "noised counts") == 2
    assert ledger.spend(event(), RUN, 2, "noised training") == 3
    assert ledger.spend(event(), "cd" * 16, 1, "noised training") == 4
    assert ledger.spent() == [event(), event("schema"), event(), event()]
    assert ledger.spent(RUN) == [event(), event("schema"), event()]
    assert [(one.run, one.round_index) for one in ledger.history()] == [(RUN, 1), (RUN, 1), (RUN, 2), ("cd" * 16, 1)]
    with pytest.raises(RefusedError, match="round 1: 'rounds' was spent as"):
        ledger.spend(event(sigma=0.5), RUN, 1, "noised training")
    assert ledger.verify() == 4


def test_a_budget_event_is_on_disk_before_the_computation_begins(tmp_path: Path):
    ledger = ledger_in(tmp_path)
    ledger.spend(event(), RUN, 1, "noised training")
    (entry,) = ledger_in(tmp_path).entries()
    assert (entry["kind"], entry["event"], entry["run"], entry["round"]) == ("spend", event(), RUN, 1)
    assert (entry["bytes"], entry["total"], entry["purpose"]) == (0, 0, "noised training")


def test_what_decides_over_an_event_sees_all_before_it_and_leaves_nothing_when_it_refuses(tmp_path: Path):
    ledger = ledger_in(tmp_path)
    seen: list[int] = []

    def afford(history: Any) -> dict[str, float]:
        seen.append(len(history))
        if len(history) > 1:
            raise RefusedError("policy.epsilon")
        return {"total": 8.0} if not history else {}

    for index in (1, 2, 2, 1):
        ledger.spend(event(), RUN, index, "noised training", afford)
    with pytest.raises(RefusedError, match=r"policy\.epsilon"):
        ledger.spend(event(), RUN, 3, "noised training", afford)
    assert seen == [0, 1, 2] and len(ledger.spent()) == 2
    assert [one.orders for one in ledger.history()] == [{"total": 8.0}, {}]


@pytest.mark.parametrize(
    "bad", [{}, {"kind": 3}, {"kind": ""}, {"kind": "x", "a": [1]}, {"kind": "x", "a": float("inf")}]
)
def test_what_is_no_budget_event_is_not_recorded(tmp_path: Path, bad: dict[str, Any]):
    ledger = ledger_in(tmp_path)
    with pytest.raises(ValueError, match="budget event"):
        ledger.spend(bad, RUN, 1, "p")
    assert ledger.verify() == 0


@pytest.mark.parametrize("loss", ["cut", "gone", "old"])
def test_a_ledger_that_lost_a_budget_event_stops_the_site_without_any_receipt(tmp_path: Path, loss: str):
    ledger = ledger_in(tmp_path)
    add(ledger, 2)
    old = ledger.path.read_bytes()
    ledger.spend(event(), RUN, 1, "noised training")
    whole = ledger.path.read_bytes()
    if loss == "gone":
        ledger.path.unlink()
    elif loss == "cut":
        ledger.path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    else:
        ledger.path.write_bytes(old)
        with pytest.raises(VerificationError):
            add(ledger, 3)
    said = "entry 3, which spent privacy budget, is missing of"
    for look in (ledger.check, ledger.verify, ledger.spent, ledger.sent_bytes, lambda: add(ledger, 1)):
        with pytest.raises(VerificationError, match=said):
            look()
    ledger.path.write_bytes(whole)
    assert ledger.check() == 3


def test_a_kill_between_a_budget_event_and_its_head_is_mended_by_the_repetition(tmp_path: Path):
    ledger = ledger_in(tmp_path)
    ledger.spend(event(), RUN, 1, "noised training")
    before = ledger.head.read_bytes()
    ledger.head.unlink()
    assert ledger.spend(event(), RUN, 1, "noised training") == 1
    assert ledger.head.read_bytes() == before
    ledger.head.write_bytes(b"{")
    with pytest.raises(VerificationError, match="damaged"):
        ledger.check()


# ---- receipts


def test_a_receipt_for_a_reply_that_is_here_is_confirmed(tmp_path: Path):
    ledger = ledger_in(tmp_path)
    add(ledger, 3)
    second = list(ledger.entries())[1]
    receipt = receipt_for(second, 2)
    assert ledger.confirm(receipt) == {"n": 2, "number": 2, "signature": receipt.signature.hex()}
    add(ledger, 1, receipt=ledger.confirm(receipt))
    assert list(ledger.entries())[-1]["receipt"]["n"] == 2


@pytest.mark.parametrize("loss", ["cut", "gone", "old", "other"])
def test_a_receipt_shows_that_a_ledger_was_cut_or_put_back(tmp_path: Path, loss: str):
    ledger = ledger_in(tmp_path)
    add(ledger, 3)
    old = ledger.path.read_bytes()
    add(ledger, 2)
    receipt = receipt_for(list(ledger.entries())[-1], 5)
    if loss == "gone":
        ledger.path.unlink()
    elif loss == "cut":
        ledger.path.write_bytes(b"".join(ledger.path.read_bytes().splitlines(keepends=True)[:-1]))
    elif loss == "old":
        ledger.path.write_bytes(old)
    else:
        other = ledger_in(tmp_path / "other")
        add(other, 9, size=11)
        ledger.path.write_bytes(other.path.read_bytes())
    ledger.check()  # it is a whole ledger, of an earlier time: by itself it shows nothing
    with pytest.raises(LedgerBehindError, match="the coordinator received 5 replies of this run, the last in round 5"):
        ledger.confirm(receipt)


def test_a_cut_behind_a_reply_that_was_sent_twice_is_found_by_the_number_of_replies(tmp_path: Path):
    ledger = ledger_in(tmp_path)
    same = {"round_index": 1, "sha256": "aa" * 32}
    add(ledger, 1, **same)
    cut = ledger.path.read_bytes()
    add(ledger, 1, **same)
    receipt = receipt_for(list(ledger.entries())[-1], 2)
    assert ledger.confirm(receipt)["n"] == 2
    ledger.path.write_bytes(cut)
    for _ in range(2):  # and saying so does not make up for it
        with pytest.raises(LedgerBehindError):
            ledger.confirm(receipt)
        add(ledger, 1, kind="refusal", code="ledger-behind", **same)


def test_failures_of_two_phases_with_the_same_bytes_are_told_apart(tmp_path: Path):
    ledger = ledger_in(tmp_path)
    same = {"round_index": 1, "sha256": "aa" * 32, "kind": "refusal", "code": "refused"}
    add(ledger, 1, phase="query.shares", **same)
    add(ledger, 1, phase="query.mask", **same)
    first, second = ledger.entries()
    assert ledger.confirm(receipt_for(first, 1))["n"] == 1
    assert ledger.confirm(receipt_for(second, 2))["n"] == 2


# ---- exhaustive changes, the longest of these tests


def test_every_single_byte_change_of_a_forty_line_ledger_is_found_and_its_line_named(tmp_path: Path):
    ledger = forty(tmp_path)
    good, ids, rng = ledger.path.read_bytes(), ledger.keys.ids(), random.Random(1)
    assert damaged(good, ids) == "" and ledger.verify() == 40
    line = 1
    for position, byte in enumerate(good):
        other = (byte + rng.randrange(1, 256)) % 256
        said = damaged(good[:position] + bytes([other]) + good[position + 1 :], ids)
        at_end = byte == ord("\n") or other == ord("\n")
        assert said and (f"line {line} " in said or at_end), (position, other, said)
        line += byte == ord("\n")


@pytest.mark.slow  # eight times the test above: every bit
def test_every_single_bit_change_of_a_forty_line_ledger_is_found(tmp_path: Path):
    ledger = forty(tmp_path)
    good, ids = ledger.path.read_bytes(), ledger.keys.ids()
    for position, byte in enumerate(good):
        for bit in range(8):
            assert damaged(good[:position] + bytes([byte ^ 1 << bit]) + good[position + 1 :], ids), (position, bit)


def thousand(folder: Path) -> tuple[bytes, list[bytes]]:
    """A thousand lines as they would be written, made without a thousand fsyncs."""
    ledger = ledger_in(folder)
    add(ledger, 1)
    (entry,), data, previous, total = list(ledger.entries()), [], START, 0
    del entry["signature"]
    for number in range(1, 1001):
        total += entry["bytes"]
        line = lines.make_line(
            {**entry, "n": number, "previous": previous, "sha256": f"{number:064x}", "total": total},
            ledger.keys.identity(),
        )
        data.append(line)
        previous = lines.line_digest(line)
    return b"".join(data), ledger.keys.ids()


def test_five_thousand_random_single_byte_changes_of_a_thousand_line_ledger_are_found(tmp_path: Path):
    good, ids = thousand(tmp_path)
    assert damaged(good, ids) == ""
    rng = random.Random(7)
    for _ in range(5000):
        position = rng.randrange(len(good))
        other = (good[position] + rng.randrange(1, 256)) % 256
        said = damaged(good[:position] + bytes([other]) + good[position + 1 :], ids)
        number = good.count(b"\n", 0, position) + 1
        assert said and (f"line {number} " in said or 10 in (other, good[position])), (position, other, said)
