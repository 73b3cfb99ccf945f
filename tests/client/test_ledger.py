"""The ledger: a chain in which every change, removal, insertion and reordering is found."""

import json
import multiprocessing
import random
from pathlib import Path

import pytest
from wardround.client import ledger as module
from wardround.client.ledger import START, Ledger
from wardround.common.errors import VerificationError


def add(ledger: Ledger, n: int, run: str = "r", kind: str = "egress", size: int = 10) -> None:
    for index in range(n):
        ledger.append(
            kind, run_id=run, round_index=index, phase="train.local", purpose="p", size_bytes=size, sha256="ab", code=""
        )


def test_entries_are_chained_and_verify(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.verify() == 0
    add(ledger, 3)
    assert ledger.verify() == 3
    lines = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    assert lines[0]["previous"] == START
    assert [line["n"] for line in lines] == [1, 2, 3]
    assert ledger.path.stat().st_mode & 0o777 == 0o600


def test_every_single_byte_change_is_found(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    add(ledger, 6)
    good = ledger.path.read_bytes()
    # The last line has no successor to hold its digest: only its form and its place in the chain can be checked.
    last = good[:-1].rfind(b"\n") + 1
    for position in range(last):
        ledger.path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(VerificationError, match="line"):
            ledger.verify()


@pytest.mark.parametrize("seed", range(10))
def test_removed_inserted_and_reordered_lines_are_found(tmp_path: Path, seed: int):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    add(ledger, 8)
    rng = random.Random(seed)
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    i, j = sorted(rng.sample(range(len(lines)), 2))
    removed = lines[:i] + lines[i + 1 :]
    inserted = [*lines[:j], lines[i], *lines[j:]]
    swapped = list(lines)
    swapped[i], swapped[j] = lines[j], lines[i]
    for changed in (removed, inserted, swapped):
        ledger.path.write_bytes(b"".join(changed))
        with pytest.raises(VerificationError):
            ledger.verify()


@pytest.mark.parametrize("kept", [1, 20, 300])
def test_a_line_cut_by_a_crash_is_dropped_and_said_so(tmp_path: Path, kept: int):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    add(ledger, 2)
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole + whole.splitlines(keepends=True)[0][:kept].rstrip(b"\n"))
    torn = len(ledger.path.read_bytes()) - len(whole)
    add(ledger, 1)
    assert ledger.verify() == 3
    assert json.loads(ledger.path.read_text().splitlines()[-1])["dropped_torn_bytes"] == torn


def test_a_first_line_cut_by_a_crash_leaves_a_usable_ledger(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.path.write_bytes(b'{"n": 1, "byt')
    add(ledger, 1)
    assert ledger.verify() == 1


def test_a_ledger_whose_last_line_is_something_else_stops_the_site(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.path.write_bytes(b"hello\n")
    with pytest.raises(VerificationError, match="not a ledger entry"):
        add(ledger, 1)
    assert ledger.path.read_bytes() == b"hello\n"


def test_bytes_are_summed_over_all_runs_without_refusals(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.sent_bytes() == 0
    add(ledger, 3, run="a", size=7)
    add(ledger, 2, run="b", size=100)
    add(ledger, 2, run="a", kind="refusal", size=50)
    assert ledger.sent_bytes() == 221
    assert [entry["total"] for entry in ledger.entries()] == [7, 14, 21, 121, 221, 221, 221]


def test_a_total_that_is_not_the_sum_is_found(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    add(ledger, 1)
    ledger.path.write_bytes(ledger.path.read_bytes().replace(b'"total":10', b'"total":9'))
    with pytest.raises(VerificationError, match="line 1: expected total 10"):
        ledger.verify()


def test_a_line_that_a_crash_cut_off_is_told_from_a_changed_one(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    add(ledger, 2)
    with ledger.path.open("ab") as file:
        file.write(b'{"bytes":1')
    with pytest.raises(VerificationError, match="line 3 is cut off, as by a crash"):
        ledger.verify()
    add(ledger, 1)
    assert ledger.verify() == 3


def test_the_name_of_a_new_ledger_is_on_disk_before_anything_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[Path] = []
    monkeypatch.setattr(module, "sync_folder", synced.append)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    add(ledger, 3)
    assert synced == [tmp_path]


def test_another_kind_of_entry_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="ledger kind"):
        add(Ledger(tmp_path / "ledger.jsonl"), 1, kind="other")


def test_two_processes_write_one_chain(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    workers = [multiprocessing.get_context("fork").Process(target=add, args=(ledger, 20)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert ledger.verify() == 60
