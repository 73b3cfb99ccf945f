"""A deployed consortium whose processes are killed at random while it trains: `wardround simulate soak`.

Run on one machine. Enters: a config, a seed, how long. Leaves: soak.json, with every kill, every round and what memory
each process held. It ends with 1 where anything that was acknowledged is gone: a round that is not accounted for, a
ledger that does not verify, receipts and ledgers that differ, memory that grows. Private: nothing; synthetic patients.

Kills are `kill -9` of one process: a hospital's SuperNode, its worker, its whole service; the coordinator's SuperLink,
its ServerApp (through the executor that started it), the keeper of its runs, its whole service. A service that was
killed is started again by hand here, as systemd would.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..common.config import RunConfig
from ..common.files import write_atomic
from .deployment import Deployment, DeploymentError, Party, deployment

SERVICE = "service"  # the process of the `start` command itself
COORDINATOR_PROCESSES = ("superlink", "serverapps", "runs", SERVICE)
SITE_PROCESSES = ("supernode", "worker", SERVICE)
# One hospital away costs its round's share, two cost the round: so while one is being mended no other is killed. And
# a kill every 15 s leaves no phase alone: at 4 to 15 s of pause, two rounds took nine minutes, most of them beginnings.
_PAUSE_S = (12.0, 40.0)
_SAMPLE_S = 2.0
# Memory of a process is judged from its third round on: whenever it was started, it loads its libraries with the first
# it sees, of which it may see but the end, and its model with the second. Then its last third against its first.
GROWTH = 1.25
LOADING_ROUNDS = 2
MIN_ROUNDS = 3  # fewer beyond these say nothing about growth
JUDGED = ("superlink", "supernode", "worker")  # of each, one at least in a run of twice as many rounds


@dataclass(frozen=True)
class Kill:
    """One process that was killed.

    Attributes:
        second: since the run was submitted.
        party: whose.
        process: which.
        phase: what the run was at.
        round: of the run.
        back_s: until the party was up again, or None: the run ended before.
    """

    second: float
    party: str
    process: str
    phase: str
    round: int
    back_s: float | None


def soak(
    config: RunConfig,
    out: Path,
    *,
    seed: int,
    minutes: float,
    kills: int | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """A whole run under random kills.

    Args:
        config: the run.
        out: a new folder.
        seed: of who is killed and when.
        minutes: the run has to be over by then; kills stop at two thirds of it.
        kills: how many at most; None: as many as come.
        tell: called with every line of progress.

    Returns:
        The content of soak.json; "defects" is empty where nothing was lost.

    Raises:
        DeploymentError: the consortium could not be set up.
    """
    chance, began = random.Random(seed), time.monotonic()
    with deployment(out, config, tell, OMP_NUM_THREADS="1") as made:
        made.submit()
        began = time.monotonic()
        watch = _Watch(made, began)
        done: list[Kill] = []
        while not watch.over() and time.monotonic() - began < 60 * minutes:
            watch.wait(chance.uniform(*_PAUSE_S))
            late = time.monotonic() - began > 40 * minutes
            if watch.over() or late or (kills is not None and len(done) >= kills):
                continue
            party = chance.choice([made.coordinator, *made.hospitals.values()])
            process = chance.choice(COORDINATOR_PROCESSES if party is made.coordinator else SITE_PROCESSES)
            done.append(watch.kill(party, process))
            tell(f"{done[-1].second:5.0f} s  killed {party.name} {process} in {done[-1].phase}, round {done[-1].round}")
        seconds = time.monotonic() - began
        defects = [] if watch.over() else [f"the run was not over after {minutes:g} minutes"]
        defects += check_run(made) if not defects else []
        defects += watch.growth()
        made.stop()
        defects += check_records(made)
        content = {
            "config": config.name,
            "seed": seed,
            "seconds": round(seconds, 1),
            "kills": [asdict(one) for one in done],
            "rounds": _records(made),
            "memory_mb": watch.memory(),
            "memory_judged_mb": watch.judged(),
            "defects": defects,
        }
    write_atomic(made.out / "soak.json", json.dumps(content, indent=1).encode() + b"\n", mode=0o644)
    return content


def check_run(made: Deployment) -> list[str]:
    """What is missing of a run that is over: rounds, evaluation, final model, report; [] where it is all there."""
    records, wanted = _records(made), made.config.federation.rounds
    defects: list[str] = []
    if [record["round"] for record in records] != list(range(1, wanted + 1)):
        defects.append(f"rounds.jsonl: expected rounds 1 to {wanted}, got {[record['round'] for record in records]}")
    least = made.config.federation.min_sites
    defects += [
        f"round {record['round']}: {record['site_count']} sites in the sum, expected at least {least}"
        for record in records
        if record["site_count"] < least
    ]
    for name in ("evaluation.json", "privacy.json", "report.html", "model/model.safetensors"):
        if not (made.run_folder / name).is_file():
            defects.append(f"{name}: missing")
    return defects


def check_records(made: Deployment) -> list[str]:
    """Whether every ledger verifies and agrees with the coordinator's receipts; everything is stopped."""
    ledgers = [party.state / "ledger.jsonl" for party in made.hospitals.values()]
    defects: list[str] = []
    for name in made.hospitals:
        verified = made.call("client", "ledger", "verify", made.site_toml(name), check=False)
        if verified.returncode != 0:
            defects.append(f"{name}: ledger: {(verified.stderr or verified.stdout).strip().splitlines()[-1]}")
    roster = made.coordinator.folder / "roster.json"
    agree = made.call("server", "receipts", "check", made.run_folder, *ledgers, "--roster", roster, check=False)
    if agree.returncode != 0:
        defects.append(f"receipts: {(agree.stderr or agree.stdout).strip().splitlines()[-1]}")
    return defects


def _records(made: Deployment) -> list[dict[str, Any]]:
    path = made.run_folder / "rounds.jsonl"
    if not path.exists():
        return []
    keys = ("round", "site_count", "sites", "seconds")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [{key: record[key] for key in keys} for record in records]


class _Watch:
    """Looks at a run and at the memory of all processes; kills, and sees the killed come back."""

    def __init__(self, made: Deployment, began: float) -> None:
        self._made, self._began = made, began
        self._samples: dict[tuple[str, str], list[tuple[int, float, int]]] = {}  # (round, MB, process number)
        self._sampled, self._round = 0.0, 0

    def progress(self) -> dict[str, Any]:
        """The run's own account of where it is."""
        try:
            return json.loads((self._made.run_folder / "progress.json").read_bytes())
        except (OSError, ValueError):
            return {}

    def over(self) -> bool:
        """Whether the run has come to its end."""
        ended = self.progress().get("ended")
        return ended is not None and ended.get("code") == ""

    def wait(self, seconds: float) -> None:
        """Waits, or until the run is over; looks at memory meanwhile."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.over():
            self._sample()
            time.sleep(0.2)

    def kill(self, party: Party, process: str) -> Kill:
        """Kills one process of a party and waits until the party is up again, starting its service where that died."""
        said, killed = self.progress(), time.monotonic()
        if process == SERVICE:
            self._kill_service(party)
        else:
            try:
                before = self._made.kill(party.name, process)
            except (DeploymentError, ProcessLookupError):
                before = None  # it was just being started again
            self._wait_for_another(party, process, before)
        back = time.monotonic() - killed
        return Kill(
            round(killed - self._began, 1),
            party.name,
            process,
            str(said.get("phase", "")),
            int(said.get("round", 0)),
            None if self.over() else round(back, 1),
        )

    def _kill_service(self, party: Party) -> None:
        assert party.process is not None
        os.kill(party.process.pid, signal.SIGKILL)
        party.process.wait()
        self._made.start(party.name)

    def _wait_for_another(self, party: Party, process: str, before: int | None) -> None:
        deadline = time.monotonic() + 120.0
        while time.monotonic() < deadline and not self.over():
            if party.pid(process) not in (None, before):
                return
            self._sample()
            time.sleep(0.2)

    def _sample(self) -> None:
        now = time.monotonic()
        if now - self._sampled < _SAMPLE_S:
            return
        self._sampled = now
        self._round = max(self._round, int(self.progress().get("round", 0)))  # a ServerApp that starts again says 0
        for party in (self._made.coordinator, *self._made.hospitals.values()):
            for process in COORDINATOR_PROCESSES if party is self._made.coordinator else SITE_PROCESSES:
                pid = party.process.pid if process == SERVICE and party.process else party.pid(process)
                held = resident_mb(pid) if pid else None
                if pid and held is not None:
                    key = (party.name, process)
                    self._samples.setdefault(key, []).append((self._round, held, pid))

    def memory(self) -> dict[str, list[float]]:
        """Least and most MB that each process held."""
        return {
            f"{party} {process}": [round(min(one[1] for one in held), 1), round(max(one[1] for one in held), 1)]
            for (party, process), held in self._samples.items()
        }

    def judged(self) -> list[list[Any]]:
        """Processes that lived long enough for growth to be seen: which, MB in the first third, MB in the last."""
        found: list[list[Any]] = []
        for (party, process), held in self._samples.items():
            for pid in dict.fromkeys(one[2] for one in held):
                seen = sorted({one[0] for one in held if one[2] == pid})
                own = [mb for at, mb, number in held if number == pid and at in seen[LOADING_ROUNDS:]]
                if len(seen) >= LOADING_ROUNDS + MIN_ROUNDS:
                    first, last = max(own[: len(own) // 3 + 1]), max(own[-(len(own) // 3 + 1) :])
                    found.append([f"{party} {process}", round(first, 1), round(last, 1)])
        return found

    def growth(self) -> list[str]:
        """Of these, those whose memory grew; and kinds of which none lived so long in a run that was long enough."""
        judged = self.judged()
        grew = [
            f"{which}: held {first:.0f} MB, later {last:.0f} MB"
            for which, first, last in judged
            if last > GROWTH * first
        ]
        if self._round >= 2 * (LOADING_ROUNDS + MIN_ROUNDS):
            kinds = {which.split()[-1] for which, _, _ in judged}
            grew += [f"no {kind} lived long enough for its memory to be judged" for kind in JUDGED if kind not in kinds]
        return grew


def resident_mb(pid: int) -> float | None:
    """What a process holds in memory now, in MB; None: it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith("VmRSS:")), None)
    return int(found.split()[1]) / 1024 if found else None
