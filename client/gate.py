"""The only way out of a site: instruction bytes in, reply bytes out, past policy and ledger.

Run by the site, called by client/app.py (and by any other transport). Enters: head and vectors of an instruction.
Leaves: the reply's, after client/policy.py allowed it and client/ledger.py has it on disk. Whatever goes wrong leaves
as an enumerated code; its text goes to the site's own `state/site.log`, because texts may hold what a
patient's row held.

Before anything else the ledger is checked: a site whose ledger is not what was written answers nothing. Then the
receipt that the instruction carries is looked up in it: a site whose ledger does not show what the coordinator received
does no work.
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..common.errors import ProtocolError, WardroundError
from ..common.messages import (
    CountInstruction,
    EvaluateInstruction,
    Failure,
    FinalizeInstruction,
    Instruction,
    MaskInstruction,
    Reply,
    SchemaInstruction,
    SharesInstruction,
    SurvivorsInstruction,
    TrainInstruction,
    UnmaskInstruction,
    ValidateInstruction,
    WarmupInstruction,
    join,
    split,
)
from ..common.receipt import Receipt
from . import policy, sharing, site
from .folder import Site, config_of, is_run_id
from .identity import SiteKeys
from .ledger import LedgerError

Wire = tuple[bytes, dict[str, bytes]]
BUNDLE = "bundle"  # code of a message that came with another bundle than the pinned one

WORK: dict[type[Instruction], Callable[[Site, Any], Reply]] = {
    WarmupInstruction: site.warm_up,
    CountInstruction: site.count_registry,
    SchemaInstruction: site.take_schema,
    TrainInstruction: site.train,
    ValidateInstruction: site.validate,
    EvaluateInstruction: site.evaluate,
    FinalizeInstruction: site.finalize,
    SharesInstruction: sharing.shares,
    MaskInstruction: sharing.mask,
    SurvivorsInstruction: sharing.survivors,
    UnmaskInstruction: sharing.unmask,
}


def respond(site_toml: Path, kind: type[Instruction], head: bytes, vectors: Mapping[str, bytes | memoryview]) -> Wire:
    """Does what one instruction asks and gives the reply that may leave.

    Args:
        site_toml: this site.
        kind: the instruction that the route promises.
        head: as `messages.split` made it.
        vectors: likewise.

    Returns:
        Head and vectors of the reply; of a `Failure` when anything went wrong.

    Raises:
        OSError: the ledger cannot be written: then not even a code may leave.
        WardroundError: the site cannot be opened, or its ledger is damaged or cannot be signed; likewise.
    """
    here = Site.open(site_toml)
    try:
        here.ledger.check()
        return _respond(here, kind, head, vectors)
    except (OSError, WardroundError) as error:
        with suppress(OSError):
            _log(here, kind, f"nothing leaves: {type(error).__name__}: {error}")
        raise


def refuse_bundle(site_toml: Path, phase: str, bundle: str) -> None:
    """Records that a message was not looked at, because another bundle came with it than the pinned one.

    Args:
        site_toml: this site.
        phase: the message's route, as the coordinator wrote it.
        bundle: SHA-256 of what came, hexadecimal.

    Raises:
        OSError, WardroundError: as `respond`; then not even that may be said.
    """
    here = Site.open(site_toml)
    here.ledger.check()
    known = {kind.ROUTE for kind in WORK}
    here.ledger.append(
        "refusal",
        run_id="invalid",  # what the message says is not read
        round_index=0,
        phase=phase if phase in known else "",
        purpose=f"{policy.PURPOSE[Failure]}: another bundle than the pinned one came",
        size_bytes=0,
        sha256=bundle,
        code=BUNDLE,
    )


def _respond(here: Site, kind: type[Instruction], head: bytes, vectors: Mapping[str, bytes | memoryview]) -> Wire:
    instruction: Instruction | None = None
    confirmed: dict[str, Any] | None = None
    try:
        instruction = join(head, vectors, kind)
        config = config_of(instruction)
        confirmed = _confirmed(here, instruction)
        policy.check_instruction(here.config.policy, here.dictionary, config, instruction)
        here.opted_out  # noqa: B018  a list that is named and not there stops everything
        here.admit(instruction.run_id)
        return _release(here, kind, WORK[kind](here, instruction), confirmed)
    except LedgerError:
        raise
    except WardroundError as error:
        _log(here, kind, f"{type(error).__name__}: {error}")
        code = error.code
    except Exception:  # noqa: BLE001  the boundary: Flower would send str(exception) to the coordinator
        _log(here, kind, traceback.format_exc())
        code = WardroundError.code
    failure = Failure(
        run_id=instruction.run_id if instruction and is_run_id(instruction.run_id) else "",
        site=here.config.name,
        round_index=instruction.round_index if instruction else 0,
        code=code,
    )
    return _release(here, kind, failure, confirmed)


def _confirmed(here: Site, instruction: Instruction) -> dict[str, Any] | None:
    """The coordinator's newest receipt, as the next entry of the ledger holds it; None where it sent none.

    Raises:
        ProtocolError: not a receipt of this run for this site.
        VerificationError: not signed by the coordinator on the roster that this site pinned.
        LedgerBehindError: the ledger does not show the reply.
        ConfigError: this site has pinned no roster.
    """
    if not instruction.receipt:
        return None
    receipt = Receipt.parse(instruction.receipt)
    if (receipt.run, receipt.site) != (instruction.run_id, here.config.name):
        raise ProtocolError(f"receipt {receipt.number}: for another run or site than this instruction")
    receipt.verify(SiteKeys(here.folder, here.config).roster().coordinator)
    return here.ledger.confirm(receipt)


def _release(here: Site, kind: type[Instruction], reply: Reply, confirmed: dict[str, Any] | None) -> Wire:
    """Policy, then ledger on disk, then the bytes."""
    head, vectors = split(reply)
    size = len(head) + sum(len(vector) for vector in vectors.values())
    failed = isinstance(reply, Failure)
    ledger = here.ledger
    if failed:  # a code always leaves, also from a site whose dictionary cannot be read
        purpose = policy.PURPOSE[Failure]
    else:
        sent = ledger.sent_bytes(), ledger.sent_bytes(reply.run_id)
        purpose = policy.check_egress(here.config.policy, here.dictionary, reply, size, *sent)
    ledger.append(
        "refusal" if failed else "egress",
        run_id=reply.run_id or "invalid",  # never what a coordinator wrote in place of an id: it may be of any length
        round_index=reply.round_index,
        phase=kind.ROUTE,
        purpose=purpose,
        size_bytes=size,
        sha256=hashlib.sha256(head).hexdigest(),  # the head holds the SHA-256 of every vector
        code=reply.code if isinstance(reply, Failure) else "",
        registry="" if failed else here.registry_read,
        receipt=confirmed,
    )
    return head, vectors


def _log(here: Site, kind: type[Instruction], text: str) -> None:
    """One event to this site's own log, mode 0600."""
    path = here.state / "site.log"
    path.touch(mode=0o600)
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:  # a name may hold half a character
        file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {kind.ROUTE} {text.rstrip()}\n")
