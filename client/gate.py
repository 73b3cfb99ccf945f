"""The only way out of a site: instruction bytes in, reply bytes out, past policy and ledger.

Run by the site, called by client/app.py (and by any other transport). Enters: head and vectors of an instruction.
Leaves: the reply's, after client/policy.py allowed it and client/ledger.py has it on disk. Whatever goes wrong leaves
as an enumerated code; its text goes to the site's own `state/site.log`, because texts may hold what a
patient's row held.
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..common.errors import WardroundError
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
from . import policy, sharing, site
from .folder import Site, config_of, is_run_id

Wire = tuple[bytes, dict[str, bytes]]

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
        WardroundError: the site cannot be opened, or its ledger is damaged; likewise.
    """
    here = Site.open(site_toml)
    instruction: Instruction | None = None
    try:
        instruction = join(head, vectors, kind)
        policy.check_instruction(here.config.policy, here.dictionary, config_of(instruction), instruction)
        here.admit(instruction.run_id)
        return _release(here, kind, WORK[kind](here, instruction))
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
    return _release(here, kind, failure)


def _release(here: Site, kind: type[Instruction], reply: Reply) -> Wire:
    """Policy, then ledger on disk, then the bytes."""
    head, vectors = split(reply)
    size = len(head) + sum(len(vector) for vector in vectors.values())
    failed = isinstance(reply, Failure)
    if failed:  # a code always leaves, also from a site whose dictionary cannot be read
        purpose = policy.PURPOSE[Failure]
    else:
        purpose = policy.check_egress(here.config.policy, here.dictionary, reply, size, here.ledger.sent_bytes())
    here.ledger.append(
        "refusal" if failed else "egress",
        run_id=reply.run_id or "invalid",  # never what a coordinator wrote in place of an id: it may be of any length
        round_index=reply.round_index,
        phase=kind.ROUTE,
        purpose=purpose,
        size_bytes=size,
        sha256=hashlib.sha256(head).hexdigest(),  # the head holds the SHA-256 of every vector
        code=reply.code if isinstance(reply, Failure) else "",
    )
    return head, vectors


def _log(here: Site, kind: type[Instruction], text: str) -> None:
    """One event to this site's own log, mode 0600."""
    path = here.state / "site.log"
    path.touch(mode=0o600)
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:  # a name may hold half a character
        file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {kind.ROUTE} {text.rstrip()}\n")
