"""A ledger with a site's key, without a site around it; entries and receipts for it."""

from pathlib import Path
from typing import Any

from wardround.client.ledger import Ledger
from wardround.common.identity import Identity
from wardround.common.receipt import Receipt

RUN = "ab" * 16
COORDINATOR = Identity.from_seed(b"c" * 32)


class FixedKeys:
    """A site's keys, the one in use last."""

    def __init__(self, *seeds: bytes) -> None:
        self.all = [Identity.from_seed(seed * 32) for seed in seeds or (b"k",)]

    def identity(self) -> Identity:
        return self.all[-1]

    def ids(self) -> list[bytes]:
        return [one.id for one in self.all]


def ledger_in(folder: Path, *seeds: bytes) -> Ledger:
    """As a site has it: the ledger in its state folder, `ledger.head` beside that."""
    (folder / "state").mkdir(parents=True, exist_ok=True)
    return Ledger(folder / "state" / "ledger.jsonl", FixedKeys(*seeds), folder / "ledger.head")


def add(ledger: Ledger, n: int, run: str = RUN, kind: str = "egress", size: int = 10, **more: Any) -> None:
    """Entries whose replies differ."""
    for _ in range(n):
        number = ledger.check() + 1
        about = {"round_index": number, "phase": "train.local", "purpose": "p", "size_bytes": size}
        ledger.append(kind, run_id=run, **{**about, "sha256": f"{number:064x}", **more})


def receipt_for(entry: dict[str, Any], number: int, site: str = "north") -> Receipt:
    """What the coordinator signs for a reply that an entry records."""
    return Receipt(number, entry["run"], entry["round"], entry["phase"], site, entry["bytes"], entry["sha256"]).signed(
        COORDINATOR
    )


def event(kind: str = "rounds", sigma: float = 1.5, steps: int = 4) -> dict[str, Any]:
    """A budget event."""
    return {"kind": kind, "noise_multiplier": sigma, "sample_rate": 0.01, "steps": steps}
