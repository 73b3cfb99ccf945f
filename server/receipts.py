"""The coordinator's receipts: what it signs for every reply that it received, so that no hospital's ledger can shrink.

Run by the coordinator. Enters: size and digest of replies (server/app.py measures them), the coordinator's key. Leaves:
each site's newest receipt, in its next instruction. Private: the key, in memory. In the run's folder:

    journal/receipts.jsonl   a receipt a line as it was signed; between them, a line for every start of the coordinator

A receipt is on disk before it is sent (`newest`, one fsync an exchange), so no number is given twice. A coordinator
that was killed may have received replies that it gave no receipt for: at most one of every site for every start.

`check` compares the receipts of a run with the sites' ledgers: anybody who is given both can.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common import ledger
from ..common.errors import LedgerBehindError, ProtocolError, RunFolderError, VerificationError
from ..common.files import read_record, sync_folder
from ..common.identity import Identity
from ..common.receipt import Receipt
from ..common.roster import Roster
from .journal import Journal

FILE = "receipts.jsonl"
_START = '{"start":%d}'


@dataclass(eq=False)
class Receipts:
    """The receipts of one run, open for more; one process at a time, which holds the journal.

    Attributes:
        path: the file.
        run_id: the run's.
        identity: the coordinator's, whose public key is on the roster that sites pinned.
    """

    path: Path
    run_id: str
    identity: Identity
    _numbers: Counter[str] = field(default_factory=Counter)
    _newest: dict[str, Receipt] = field(default_factory=dict)
    _handle: int = -1
    _synced: bool = True

    @classmethod
    def open(cls, journal: Journal, identity: Identity) -> Receipts:
        """Those of a journal, with a line that this process begins here.

        Raises:
            RunFolderError: a line is no receipt of this run.
        """
        path = journal.folder / FILE
        found = read_receipts(path, journal.run_id) if path.exists() else Found([], 0, 0)
        self = cls(path, journal.run_id, identity)
        for receipt in found.receipts:
            self._numbers[receipt.site] = receipt.number
            self._newest[receipt.site] = receipt
        # After another key signed, sites that pinned this one could not check those: they begin again with new ones.
        for site, receipt in list(self._newest.items()):
            try:
                receipt.verify(identity.id)
            except VerificationError:
                del self._newest[site]
                self._numbers[site] = 0
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.ftruncate(self._handle, found.whole_bytes)  # a line that a crash cut off was never sent
        self._write(_START % (found.starts + 1))
        self._sync()
        sync_folder(path.parent)
        return self

    def note(self, site: str, round_index: int, phase: str, size_bytes: int, sha256: str) -> None:
        """Signs for a reply that came.

        Args:
            site: whose it is.
            round_index: of the instruction it answers.
            phase: that instruction's route.
            size_bytes: of the whole reply.
            sha256: hex, of its head.
        """
        number = self._numbers[site] + 1
        receipt = Receipt(number, self.run_id, round_index, phase, site, size_bytes, sha256).signed(self.identity)
        self._write(receipt.to_json())
        self._numbers[site], self._newest[site] = number, receipt

    def newest(self, site: str) -> str:
        """A site's newest receipt as its next instruction carries it, on disk; "" where there is none."""
        self._sync()
        found = self._newest.get(site)
        return "" if found is None else found.to_json()

    def close(self) -> None:
        """Puts everything on disk and closes the file."""
        if self._handle >= 0:
            self._sync()
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Receipts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, line: str) -> None:
        data = line.encode("ascii") + b"\n"
        self._synced = False
        while data:
            data = data[os.write(self._handle, data) :]

    def _sync(self) -> None:
        if not self._synced:
            os.fsync(self._handle)
            self._synced = True


@dataclass(frozen=True)
class Found:
    """What a file of receipts holds: receipts in order, how often the coordinator started, bytes of whole lines."""

    receipts: list[Receipt]
    starts: int
    whole_bytes: int


def read_receipts(path: Path, run_id: str) -> Found:
    """The receipts of a run, without a line that a crash cut off. Signatures are not checked.

    Raises:
        RunFolderError: missing, or a line is no receipt of this run, or not in its place.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise RunFolderError(f"{path}: no such file: the receipts of a run") from None
    lines = data.split(b"\n")
    whole = len(data) - len(lines.pop())
    receipts: list[Receipt] = []
    numbers: Counter[str] = Counter()
    starts = 0
    for place, line in enumerate(lines, start=1):
        if line == (_START % (starts + 1)).encode():
            starts += 1
            continue
        try:
            receipt = Receipt.parse(line.decode("ascii"))
        except (ProtocolError, UnicodeDecodeError):
            raise RunFolderError(f"{path}: line {place} is not a receipt") from None
        if receipt.run != run_id:
            raise RunFolderError(f"{path}: line {place} is a receipt of another run")
        if receipt.number not in (numbers[receipt.site] + 1, 1):  # 1 again: with another key of the coordinator
            raise RunFolderError(
                f"{path}: line {place}: receipt {receipt.number} of {receipt.site} follows {numbers[receipt.site]}"
            )
        numbers[receipt.site] = receipt.number
        receipts.append(receipt)
    return Found(receipts, starts, whole)


# ---- do receipts and ledgers agree?


@dataclass(eq=False)
class Agreement:
    """One site's ledger and the coordinator's receipts for it, compared.

    Attributes:
        site: its name.
        replies: what the ledger records of the run.
        received: what the coordinator signed for.
        unconfirmed: recorded, and no receipt: lines of the ledger.
        repeated: recorded once more than it was received, the same bytes: lines of the ledger.
        problems: what does not agree, a sentence each.
    """

    site: str
    replies: int = 0
    received: int = 0
    unconfirmed: list[int] = field(default_factory=list)
    repeated: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def check(
    found: Found,
    run_id: str,
    ledgers: Mapping[str, bytes],
    roster: Roster,
    losses: Sequence[Mapping[str, Any]] = (),
) -> list[Agreement]:
    """Compares the receipts of a run with the ledgers of its sites.

    Every reply that was received must be recorded, as often and with the same size, round and phase. Every reply that
    was recorded must have been received, but for the last, for one at every start of the coordinator after the first,
    and for those that it noted as lost on the way. Of one that was recorded several times, for it was lost and asked
    again, one must have been received: the others are the same bytes. A receipt that a ledger holds must be among the
    coordinator's.

    Args:
        found: the coordinator's receipts.
        run_id: the run's.
        ledgers: a ledger's bytes by what to call it.
        roster: signed by the coordinator; names the sites by their keys.
        losses: who did not finish what (server/journal.py): "site", "code".

    Returns:
        One for every ledger, and for every site that has receipts and no ledger here; sorted by name.

    Raises:
        VerificationError: a ledger is not what was written, or of no member of the roster; two of one site.
    """
    signed: dict[str, list[Receipt]] = {}
    agreements: dict[str, Agreement] = {}
    for receipt in found.receipts:
        signed.setdefault(receipt.site, []).append(receipt)
    for source, data in ledgers.items():
        checked, site = _whose(data, source, roster)
        if site in agreements:
            raise VerificationError(f"{source}: a second ledger of {site}")
        lost = sum(loss["site"] == site and _without_receipt(loss) for loss in losses)
        entries = [entry for entry in checked.entries if entry["run"] == run_id and entry["kind"] != ledger.SPEND]
        # Never signed for: a ledger that was behind would else be made whole by saying so.
        entries = [entry for entry in entries if entry["code"] != LedgerBehindError.code]
        mine = signed.pop(site, [])
        agreements[site] = _compare(site, entries, checked.entries, mine, roster, found.starts + lost)
    for site, receipts in signed.items():
        agreements[site] = Agreement(site, received=len(receipts), problems=["no ledger of this site was given"])
    return [agreements[site] for site in sorted(agreements)]


def _without_receipt(loss: Mapping[str, Any]) -> bool:
    """Whether a site may have sent something here that the coordinator did not sign for."""
    return loss["code"] in ("silent", "transport", "protocol") or loss["phase"] == "warm-up"


def _whose(data: bytes, source: str, roster: Roster) -> tuple[ledger.Checked, str]:
    """A ledger, checked, and the member that signed its last line, which vouches for all before it."""
    checked = ledger.read(data, source, [member.id for member in roster.members])
    member = roster.member(checked.signer)
    if member is None:
        raise VerificationError(f"{source}: an empty ledger: it is nobody's")
    return checked, member.name


def _compare(
    site: str,
    entries: Sequence[Mapping[str, Any]],
    whole: Sequence[Mapping[str, Any]],
    receipts: Sequence[Receipt],
    roster: Roster,
    may_be_unconfirmed: int,
) -> Agreement:
    result = Agreement(site, len(entries), len(receipts))
    left: dict[tuple[Any, ...], list[int]] = {}  # what a reply was → its lines that have no receipt yet
    for entry in entries:
        left.setdefault(_about(entry), []).append(entry["n"])
    for receipt in receipts:
        try:
            receipt.verify(roster.coordinator)
        except VerificationError as error:
            result.problems.append(str(error))
        lines = left.get(_about_of(receipt), [])
        if not lines:
            result.problems.append(
                f"receipt {receipt.number}: a reply of round {receipt.round_index} ({receipt.phase}, "
                f"{receipt.size_bytes} bytes) was received and is not in the ledger"
            )
        else:
            lines.pop(0)
    kept = {receipt.signature.hex(): receipt for receipt in receipts}
    for entry in entries:
        if (held := entry.get("receipt")) is None:
            continue
        receipt = kept.get(held["signature"])
        if receipt is None or receipt.number != held["number"]:
            result.problems.append(
                f"line {entry['n']} holds receipt {held['number']}, which the coordinator does not have"
            )
        elif not 1 <= held["n"] < entry["n"] or _about(whole[held["n"] - 1]) != _about_of(receipt):
            result.problems.append(f"line {entry['n']}: its receipt is not for line {held['n']}, which it names")
    received = {_about_of(receipt) for receipt in receipts}
    result.repeated = sorted(line for about, lines in left.items() if about in received for line in lines)
    result.unconfirmed = sorted(line for about, lines in left.items() if about not in received for line in lines)
    if len(result.unconfirmed) > may_be_unconfirmed:
        lines = ", ".join(map(str, result.unconfirmed))
        result.problems.append(
            f"lines {lines} were recorded and not received; {may_be_unconfirmed} may be: one for every start of the "
            "coordinator, and what it noted as lost"
        )
    return result


def _about(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return entry["sha256"], entry["round"], entry["phase"], entry["bytes"]


def _about_of(receipt: Receipt) -> tuple[Any, ...]:
    return receipt.sha256, receipt.round_index, receipt.phase, receipt.size_bytes


def read_run(folder: Path) -> tuple[str, Found, list[dict[str, Any]]]:
    """A run's id, receipts and losses from its folder; opens nothing for writing.

    Raises:
        RunFolderError: no run, damaged, no receipts.
    """
    journal = folder / "journal"
    try:
        run_id = str(read_record(journal / "run.record").values["run_id"])
        losses = journal / "losses.record"
        lost = list(read_record(losses).values["losses"]) if losses.exists() else []
    except FileNotFoundError:
        raise RunFolderError(f"{folder}: holds no run of wardround") from None
    except VerificationError as error:
        raise RunFolderError(str(error)) from None
    return run_id, read_receipts(journal / FILE, run_id), lost


def describe(agreement: Agreement) -> str:
    """One site as a line for a person."""
    text = f"{agreement.site}: {agreement.replies} replies recorded, {agreement.received} received"
    if agreement.unconfirmed:
        lines = ", ".join(map(str, agreement.unconfirmed))
        text += f"; recorded and not confirmed: line{'s' * (len(agreement.unconfirmed) > 1)} {lines}"
    if agreement.repeated:
        text += f"; sent again: line{'s' * (len(agreement.repeated) > 1)} {', '.join(map(str, agreement.repeated))}"
    return text + ("" if agreement.problems else "; they agree")
