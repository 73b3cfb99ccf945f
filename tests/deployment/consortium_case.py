"""Whole runs of a coordinator and four hospitals as processes, for tests of what happens to them on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wardround.common.config import RunConfig, to_toml
from wardround.common.supervisor import read_status
from wardround.server import keeper, run_status

from .coordinator_case import Running, make_coordinator, started, wardround
from .site_case import Site, client, enrolled, new_hospital, running

NAMES = ("north", "south", "west", "east")  # three go on where one is away


def settings(base: Path, name: str, *, rounds: int = 1, steps: int = 10, deadline_s: float = 600) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": name,
            "privacy": {"enabled": False},
            "seed": 3,
            "model": {"id": str(base), "device": "cpu", "prompt": "en_short"},
            "warmup": {"enabled": False},
            "grpo": {
                "local_steps": steps, "patients_per_step": 4, "expectation": "exact", "learning_rate": 0.001,
            },
            "federation": {"rounds": rounds, "validation_questions_per_site": 0, "phase_timeout_s": deadline_s},
            "evaluation": {"questions_per_site": 5, "bootstrap_samples": 100, "samples": 0},
        }
    )  # fmt: skip


@dataclass(eq=False)
class Consortium:
    """A coordinator and four hospitals that run."""

    coordinator: Running
    sites: dict[str, Site]
    home: Path

    def submit(self, config: RunConfig) -> Path:
        """Starts a run; its folder."""
        file = self.home / f"{config.name}.toml"
        file.write_text(to_toml(config))
        dictionary = self.home / f"{NAMES[0]}-data" / "dictionary.toml"
        wardround("server", "run", file, "-C", self.coordinator.folder.path, "--dictionary", dictionary)
        return self.coordinator.folder.run(config.name)

    def finished(self, run: Path, timeout_s: float = 900) -> float:
        """Waits for the end of a run that came to one; the second at which it did.

        Raises:
            AssertionError: it is not over in time, or waits for a person.
        """

        def over() -> float | None:
            said = run_status.read(run)
            wanted = keeper.wanted(run) is not None
            if (said.get("ended") or {}).get("code") == "":
                return None if wanted else float(said["ended"]["at"])  # another may be submitted once the keeper knows
            assert wanted, f"it waits for a person: {said}\n{self.coordinator.logs()}"
            return None

        try:
            return self.coordinator.until(f"{run.name} ends", over, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{run_status.read(run)}\n{self.sites[NAMES[0]].logs()}") from None

    def at(self, run: Path, phase: str, round_index: int) -> dict[str, Any] | None:
        """What a run says of itself, once it is at a phase."""
        said = run_status.read(run)
        return said if (said.get("phase"), said.get("round")) == (phase, round_index) else None

    def restarts(self, *names: str) -> dict[str, int]:
        """How often processes of these parties were started again; a worker that wanted to be does not count."""
        folders = {name: site.node.status_path for name, site in self.sites.items()}
        folders["coordinator"] = self.coordinator.folder.status_file
        found: dict[str, int] = {}
        for name in names or folders:
            for process, one in (read_status(folders[name]) or {"processes": {}})["processes"].items():
                if one["restarts"] and not (process == "worker" and one["last_exit"] == 0):
                    found[f"{name} {process}"] = one["restarts"]
        return found

    def agree(self, run: Path) -> None:
        """Every ledger verifies; ledgers and receipts say the same.

        Raises:
            AssertionError: not so.
        """
        for site in self.sites.values():
            client("ledger", "verify", site.node.site_toml)
        ledgers = [site.node.state / "ledger.jsonl" for site in self.sites.values()]
        roster = self.coordinator.folder.path / "roster.json"
        wardround("server", "receipts", "check", run, *ledgers, "--roster", roster)


@contextmanager
def consortium(
    home: Path, *more: object, names: Sequence[str] = NAMES, place: Callable[[str], Any] | None = None,
    coordinator_folder: Path | None = None,
) -> Iterator[Consortium]:  # fmt: skip
    """Founded and started.

    Args:
        home: for everything.
        more: of the coordinator's `init`.
        names: of the hospitals.
        place: in whose block a hospital is started.
        coordinator_folder: if it is to be elsewhere.
    """
    folder = make_coordinator(coordinator_folder or home / "coordinator", *more)
    nodes = [new_hospital(home, name) for name in names]
    enrolled(folder, nodes, home / "mail")
    with ExitStack() as stack:
        coordinator = stack.enter_context(started(folder))
        sites: dict[str, Site] = {}
        for node in nodes:
            with ExitStack() as there:
                if place is not None:
                    there.enter_context(place(node.config.name))
                sites[node.config.name] = stack.enter_context(running(node))
        for site in sites.values():
            site.until("it is connected", site.connected)
        yield Consortium(coordinator, sites, home)


def rounds(run: Path) -> list[dict[str, Any]]:
    return [json.loads(record) for record in (run / "rounds.jsonl").read_text().splitlines()]


def report(record_property: Callable[[str, object], None], what: str, **figures: float) -> None:
    """A line of docs/reliability.md in the making."""
    for name, value in figures.items():
        record_property(name, round(value, 1))
    print(f"{what}: " + ", ".join(f"{name} {value:.1f}" for name, value in figures.items()))


def answered_since(run: Path, name: str, when: float) -> float | None:
    at = run_status.read(run).get("sites", {}).get(name, {}).get("answered")
    return at if at is not None and at > when else None
