"""The coordinator's receipt for one reply that it received, signed: what a site looks up in its own ledger.

Used by both roles; docs/protocol.md §6 is the specification. Pure. Enters: what a reply was. Leaves: a line of text
with the coordinator's signature, in the site's next instruction. Private: nothing; a receipt holds what the ledger's
line of that reply holds: run, round, phase, size and digest.

Formal Guarantees:
    A `Receipt` whose `verify` returned was made by the holder of the coordinator's key for this site, run, round,
    phase, size, digest and number, and for nothing else.

Not protected: a coordinator that gives no receipts, or keeps old ones back, takes a site's proof away, not its safety.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, cast

from .config import NAME
from .errors import ProtocolError
from .identity import Identity, verify
from .secagg.keys import SIGNATURE_BYTES

USE_RECEIPT = "receipt"
MAX_RECEIPT_CHARACTERS = 1024
_TEXT = {"phase": r"[a-z.]{1,40}", "run": "[0-9a-f]{32}", "sha256": "[0-9a-f]{64}", "site": NAME}
_NUMBERS = ("bytes", "number", "round")


@dataclass(frozen=True)
class Receipt:
    """One reply, as the coordinator received it.

    Attributes:
        number: 1 for the run's first reply of this site that was received, then one more each.
        run: the run's id.
        round_index: of the reply.
        phase: the instruction's route.
        site: whose reply it was.
        size_bytes: of the whole reply.
        sha256: hex, of the reply's head.
        signature: the coordinator's, over `statement`.
    """

    number: int
    run: str
    round_index: int
    phase: str
    site: str
    size_bytes: int
    sha256: str
    signature: bytes = b""

    def _content(self) -> dict[str, str | int]:
        return {
            "bytes": self.size_bytes,
            "number": self.number,
            "phase": self.phase,
            "round": self.round_index,
            "run": self.run,
            "sha256": self.sha256,
            "site": self.site,
        }

    def statement(self) -> bytes:
        """What is signed: canonical JSON (sorted keys, no spaces, ASCII) of everything but the signature."""
        return _canonical(self._content()).encode("ascii")

    def signed(self, coordinator: Identity) -> Self:
        """The same with the coordinator's signature."""
        return replace(self, signature=coordinator.sign(USE_RECEIPT, self.statement()))

    def verify(self, coordinator: bytes) -> None:
        """Checks the signature.

        Args:
            coordinator: the public key on the roster that the checker pinned.

        Raises:
            VerificationError: it is none of this key over this.
        """
        verify(coordinator, USE_RECEIPT, self.statement(), self.signature, f"receipt {self.number}")

    def to_json(self) -> str:
        """The line that travels and that the coordinator keeps."""
        return _canonical({**self._content(), "signature": self.signature.hex()})

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `to_json`; the signature is not checked.

        Raises:
            ProtocolError: anything but what `to_json` writes.
        """
        wrong = ProtocolError(f"receipt: expected what protocol.md §6 says, got {len(text)} other characters")
        if len(text) > MAX_RECEIPT_CHARACTERS:
            raise wrong
        try:
            content: Any = json.loads(text)
        except (ValueError, RecursionError):
            raise wrong from None
        if not isinstance(content, dict):
            raise wrong
        found = cast("dict[str, Any]", content)
        texts = {**_TEXT, "signature": f"[0-9a-f]{{{2 * SIGNATURE_BYTES}}}"}
        if set(found) != {*texts, *_NUMBERS}:
            raise wrong
        if not all(type(found[key]) is str and re.fullmatch(shape, found[key]) for key, shape in texts.items()):
            raise wrong
        if not all(type(found[key]) is int and 0 <= found[key] < 2**63 for key in _NUMBERS):
            raise wrong
        receipt = cls(
            number=found["number"],
            run=found["run"],
            round_index=found["round"],
            phase=found["phase"],
            site=found["site"],
            size_bytes=found["bytes"],
            sha256=found["sha256"],
            signature=bytes.fromhex(found["signature"]),
        )
        if receipt.to_json() != text:
            raise wrong
        return receipt


def _canonical(content: Mapping[str, str | int]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
