"""A coordinator with fifty hospitals: whether a run completes, and the memory of each of the coordinator's processes.

    python benchmarks/many_sites.py

The coordinator is real: `wardround server init`, `start` and `run`, over TLS on loopback. So is every hospital's
identity, node key, registry and ClientApp; hospitals are light (benchmarks/light_sites.py), a few processes for all of
them. A run of one round: round-0 adapter to all, secure sums of counts, of the update and of test results, the final
model merged. Three of them, so that what grows shows: 50 sites × 2.5 million values (10 MB), 10 sites × as many, 50
sites × 12,000 values.

Peak memory is each process's own VmHWM, read ten times a second, by component; together is their sum, as if all had
been at their peak at once, with what they share counted in each. Bound: 1.5 GB together at 50 sites × 10 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

ROUNDS, PROCESSES = 1, 2
SIZES = {"10 MB": (152, 1024), "50 kB": (48, 16)}  # of a model and its adapter's rank: 2.5 million and 12,000 values
RUNS = ((50, "10 MB"), (10, "10 MB"), (50, "50 kB"))
BOUND_MB = 1500.0
COMPONENTS = ("superlink", "ServerApp", "serverapps", "runs", "supervisor")
_RUN_S = 3600.0


def settings(model: Path, sites: int, rank: int) -> dict[str, Any]:
    """The run: next to no training."""
    return {
        "name": "benchmark",
        "privacy": {"enabled": False},
        "seed": 5,
        "model": {"id": str(model), "device": "cpu", "prompt": "en_short"},
        "warmup": {"enabled": False},
        "lora": {"rank": rank},
        "grpo": {"local_steps": 1, "patients_per_step": 2, "expectation": "exact"},
        "federation": {"rounds": ROUNDS, "validation_questions_per_site": 0, "phase_timeout_s": 1200, "min_sites": 10},
        "evaluation": {"questions_per_site": 2, "samples": 0, "bootstrap_samples": 100},
        "speed": {"threads": 1},
        "simulation": {"registry": "synthetic", "sites": sites},
    }


# ---- the coordinator's memory


class Memory:
    """The peak of every process of a coordinator so far, in MB, by component; a thread looks."""

    def __init__(self, supervisor: int, status: Path) -> None:
        self._supervisor, self._status = supervisor, status
        self._peaks: dict[int, tuple[str, float]] = {}
        self.most_at_once_mb = 0.0  # of what was resident at one look
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def by_component(self) -> dict[str, float]:
        """Peaks; of a component that was started again, or has several processes, the largest."""
        found: dict[str, float] = dict.fromkeys(COMPONENTS, 0.0)
        for name, peak in list(self._peaks.values()):
            found[name] = max(found[name], round(peak, 1))
        return found

    def _look_on(self) -> None:
        while not self._done.wait(0.1):
            resident = 0.0
            for name, pid in self._processes():
                with suppress(OSError, StopIteration, ValueError):  # it has just ended
                    text = Path(f"/proc/{pid}/status").read_text("ascii", "replace")
                    peak, now = (_field(text, field) for field in ("VmHWM:", "VmRSS:"))
                    self._peaks[pid] = (name, max(peak, self._peaks.get(pid, ("", 0.0))[1]))
                    resident += now
            self.most_at_once_mb = max(self.most_at_once_mb, round(resident, 1))

    def _processes(self) -> Iterator[tuple[str, int]]:
        yield "supervisor", self._supervisor
        try:
            known = json.loads(self._status.read_bytes())["processes"]
        except (OSError, ValueError):
            return
        for name, about in known.items():
            if about["pid"]:
                yield name, about["pid"]
                if name == "serverapps":
                    for child in _children(about["pid"]):
                        yield "ServerApp", child


def _children(pid: int) -> list[int]:
    """All below a process."""
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *_children(child)]
    return found


def _field(status: str, name: str) -> float:
    line = next(line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


# ---- a consortium


def found(folder: Path, config: Any) -> tuple[Any, list[Path]]:
    """A coordinator by its own commands, and hospitals' folders that its roster is about."""
    from wardround.client.identity import SiteKeys
    from wardround.client.node import make_node_key, node_key
    from wardround.common.config import load_site
    from wardround.common.enrolment import Application
    from wardround.common.identity import Card
    from wardround.server.coordinator import CoordinatorFolder
    from wardround.server.roster_cli import KEY_FILE
    from wardround.simulations.deployment import free_port
    from wardround.simulations.federation import COORDINATOR, PASSPHRASE, ROSTER, divide, load_registry, write_sites

    registry, sites = load_registry(config), folder / "sites"
    write_sites(registry, divide(registry, config), config, sites)
    command = (
        "server",
        "init",
        folder / "coordinator",
        "--consortium",
        "Many",
        "--passphrase-file",
        sites / PASSPHRASE,
    )
    address = f"127.0.0.1:{free_port()}"
    wardround(*command, "--address", address, "--loopback-port", free_port())
    coordinator = CoordinatorFolder.open(folder / "coordinator")
    # The key and roster of the sites just written: 50 hospitals do not compare 49 fingerprints each by telephone here.
    shutil.copy(sites / COORDINATOR, coordinator.path / KEY_FILE)
    shutil.copy(sites / ROSTER, coordinator.path / "roster-1.json")
    files = sorted(sites.glob("*/site.toml"))
    for file in files:
        keys, path = SiteKeys(file.parent, load_site(file)), file.parent / "state" / "node.pem"
        make_node_key(path)
        identity = keys.load()
        coordinator.keep(Application.make(identity, Card.make(identity, file.parent.name), node_key(path)))
    return coordinator, files


def wardround(*arguments: object) -> None:
    """A command, to its end.

    Raises:
        RuntimeError: it failed.
    """
    from wardround.simulations.deployment import WARDROUND

    command = [str(WARDROUND), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.returncode}\n{done.stdout}{done.stderr}")


@contextmanager
def running(folder: Path, coordinator: Any, sites: Sequence[Path]) -> Iterator[subprocess.Popen[bytes]]:
    """The coordinator's process with all sites connected; everything ends with the block."""
    from wardround.common.supervisor import end_with_parent
    from wardround.simulations.deployment import WARDROUND

    processes: list[subprocess.Popen[bytes]] = []

    def start(name: str, *command: str) -> None:
        with (folder / f"{name}.log").open("wb") as output:
            processes.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=end_with_parent,
                )
            )

    try:
        start("coordinator", str(WARDROUND), "server", "start", "-C", str(coordinator.path))
        _until(lambda: "startup complete" in _log(coordinator.logs / "superlink.log"), "the SuperLink is up", processes)
        authority = str(coordinator.tls / "ca.pem")
        for index in range(PROCESSES):
            part = [str(site) for site in sites[index::PROCESSES]]
            program = str(HERE / "light_sites.py")
            start(f"sites-{index}", sys.executable, program, coordinator.config.address, authority, *part)
        logs = [folder / f"sites-{index}.log" for index in range(PROCESSES)]
        _until(lambda: sum(_log(one).count(" is node ") for one in logs) == len(sites), "all are connected", processes)
        yield processes[0]
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGKILL if process is not processes[0] else signal.SIGTERM)
        for process in processes:
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                process.kill()


def _log(path: Path) -> str:
    return path.read_text("utf-8", "replace") if path.exists() else ""


def _until(look: Any, what: str, processes: Sequence[subprocess.Popen[bytes]], timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not look():
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            raise RuntimeError(f"{what}: it is not so, or a process ended")
        time.sleep(0.3)


def one_run(sites: int, size: str, folder: Path) -> dict[str, Any]:
    """One run to its end, with its coordinator's peaks."""
    from wardround.common.config import RunConfig, to_toml
    from wardround.server.coordinator import CoordinatorFolder

    from tests.tiny import tiny_model

    hidden, rank = SIZES[size]
    config = RunConfig.model_validate(settings(tiny_model(folder / "model", hidden=hidden), sites, rank))
    coordinator: CoordinatorFolder
    coordinator, files = found(folder, config)
    (folder / "run.toml").write_text(to_toml(config), encoding="utf-8")
    before, out = os.getloadavg()[0], coordinator.run(config.name)
    with (
        running(folder, coordinator, files) as process,
        Memory(process.pid, coordinator.status_file) as memory,
    ):
        began = time.monotonic()
        dictionary = files[0].parent / "dictionary.toml"
        wardround("server", "run", folder / "run.toml", "--dictionary", dictionary, "-C", coordinator.path)
        reached: dict[str, dict[str, float]] = {}
        ended: Mapping[str, Any] | None = None
        said: dict[str, Any] = {}
        while ended is None:
            time.sleep(0.5)
            with suppress(OSError, ValueError):
                said = json.loads((out / "progress.json").read_bytes())
                ended = said["ended"]
                reached[f"{said['phase']} {said['round']}"] = memory.by_component()
            if time.monotonic() - began > _RUN_S or process.poll() is not None:
                raise RuntimeError(f"not over: {said}\n{_log(coordinator.logs / 'serverapps.log')[-2000:]}")
        took = time.monotonic() - began
    if ended["code"]:
        raise RuntimeError(f"the run ended with {ended}")
    records = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    if len(records) != ROUNDS or any(len(record["sites"]) != sites for record in records):
        raise RuntimeError(f"expected {ROUNDS} rounds with {sites} sites, got {records}")
    peaks = memory.by_component()
    return {
        "sites": sites,
        "adapter": size,
        "values": records[-1]["bytes_up"] // sites // 4,  # the masked vector is nearly all of it
        "completed": True,
        "seconds": round(took, 1),
        "seconds_of_rounds": [round(record["seconds"], 1) for record in records],
        "peak_mb": peaks,
        "together_mb": round(sum(peaks.values()), 1),
        "most_at_once_mb": memory.most_at_once_mb,
        "database_mb": round(sum(file.stat().st_size for file in coordinator.path.glob("superlink.db*")) / 1e6, 1),
        "peak_mb_by_phase": reached,
        "load_average": [round(before, 2), round(os.getloadavg()[0], 2)],
    }


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """The table."""
    heads = "".join(f"{name:>12}" for name in COMPONENTS)
    print(f"\n{'peak, MB':<18}{heads}{'together':>12}{'at once':>10}{'run s':>9}{'load':>14}")
    for one in results:
        cells = "".join(f"{one['peak_mb'][name]:>12.0f}" for name in COMPONENTS)
        load = "{} to {}".format(*one["load_average"])
        end = f"{one['together_mb']:>12.0f}{one['most_at_once_mb']:>10.0f}{one['seconds']:>9.0f}{load:>14}"
        print(f"{one['sites']} sites × {one['adapter']:<8}{cells}{end}", flush=True)


def main() -> int:
    """Every size once, writes benchmarks/results/many_sites.json; 1 where the bound is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sites", type=int, help="one run with so many sites × 10 MB, nothing written")
    parser.add_argument("--keep", type=Path, help="a new folder for that one run, kept")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from environment import record
    from wardround.common.cli import quiet_third_parties

    quiet_third_parties()
    results: list[dict[str, Any]] = []
    for sites, size in ((asked.sites, "10 MB"),) if asked.sites else RUNS:
        with tempfile.TemporaryDirectory() as name:
            folder = asked.keep or Path(name)
            folder.mkdir(parents=True, exist_ok=True)
            os.environ["WARDROUND_CACHE"] = f"{folder}/cache"
            results.append(one_run(sites, size, folder))
        show(results[-1:])
    show(results)
    met = all(one["together_mb"] <= BOUND_MB for one in results)
    if not asked.sites:
        print(record("many_sites", {"bound_mb": BOUND_MB, "runs": results, "met": met}))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
