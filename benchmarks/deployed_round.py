"""A secure sum between a coordinator and four hospitals as they are deployed, by exchange, beside plain Flower.

    python benchmarks/deployed_round.py

A consortium from nothing on this machine (simulations/deployment.py): `wardround server start` and four times
`wardround client start`, over TLS on loopback, an update of 2.5 million values (10 MB) a site, next to no training. The
clocks are in those processes (benchmarks/hooks/sitecustomize.py). Three peers then exchange as many bytes each way,
over the same SuperLink, the same SuperNode command and the same node keys:

    bare      messages pushed and replies looked for as ours, answered by a resident echo (benchmarks/echo_worker.py):
              what Flower's SuperLink and SuperNodes take by themselves. The one that the bound is held against.
    waiting   the same echo, awaited with `grid.send_and_receive`, as Flower's documentation does: it looks every 3 s
    stock     as Flower comes: `send_and_receive`, and `flower-superexec`, which starts a process for every message

An exchange lasts from the first message pushed to the last reply taken in. Training is not overhead: what the slowest
site spent in it is taken off the first exchange. Bounds: each exchange at most 1.1 times the bare one, medians; the
second round's first training step begins at most 1 s after the worker has the message, at the slowest of all sites.
How long the SuperNode is at fetching it, the worker waiting for it already, stands beside that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

SITES, ROUNDS, TIMES = 4, 3, 2
HIDDEN, RANK = 152, 1024  # of the model and its adapter: 2.5 million values
EXCHANGES = ("train.local", "query.shares", "query.mask", "query.survivors", "query.unmask")
NAMES = ("1 keys", "2 shares", "3 masked vectors", "4 consistency", "5 unmask")
SHARED = (True, True, False, True, True)  # whether all sites are sent the same
PEERS = {"bare": ("ours", "echo"), "waiting": ("flower", "echo"), "stock": ("flower", "superexec")}
RATIO, WARM_S = 1.1, 1.0
_RUN_S = 1500.0


def settings(model: Path) -> dict[str, Any]:
    """The run: short rounds of a large adapter, no validation between them."""
    return {
        "name": "benchmark",
        "privacy": {"enabled": False},
        "seed": 5,
        "model": {"id": str(model), "device": "cpu", "prompt": "en_short"},
        "warmup": {"enabled": False},
        "lora": {"rank": RANK},
        "grpo": {"local_steps": 1, "patients_per_step": 2, "expectation": "exact"},
        "federation": {"rounds": ROUNDS, "validation_questions_per_site": 0, "phase_timeout_s": 300, "patience": 99},
        "evaluation": {"questions_per_site": 4, "samples": 0, "bootstrap_samples": 100},
        "speed": {"threads": 1},
        "simulation": {"registry": "synthetic", "sites": SITES},
    }


# ---- our rounds


def our_rounds(made: Any) -> None:
    """The run, to its end.

    Raises:
        RuntimeError: it came to a halt, or did not end in time.
    """
    made.submit()
    deadline, path = time.monotonic() + _RUN_S, made.run_folder / "progress.json"
    while time.monotonic() < deadline:
        if path.exists() and (ended := json.loads(path.read_bytes())["ended"]) is not None:
            if ended["code"]:
                raise RuntimeError(f"the run ended with {ended}")
            return
        time.sleep(0.5)
    raise RuntimeError(f"the run is not over after {_RUN_S:.0f} s")


def read_events(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """(process, event), as the hooks wrote them."""
    files = sorted(folder.glob("[0-9]*.jsonl"))
    return [(file.stem, json.loads(line)) for file in files for line in file.read_text().splitlines()]


def trainings(events: Sequence[tuple[str, Mapping[str, Any]]]) -> list[list[dict[str, float]]]:
    """By round, for each site: seconds from the message's arrival at the worker to it all being there, to the call of
    training, to its first step, and of training.
    """
    by_process: dict[str, list[dict[str, float]]] = {}
    done: dict[str, Mapping[str, Any]] = {}
    for process, event in events:  # a training is over before its message is answered
        if event["event"] == "train":
            done[process] = event
        if event["event"] == "task" and event["route"] == "train.local" and process in done:
            training, began = done.pop(process), event["began"]
            by_process.setdefault(process, []).append(
                {
                    "pulled_s": event["pulled"] - began,
                    "called_s": training["began"] - began,
                    "first_step_s": training["first_step"] - began,
                    "warm_s": training["first_step"] - event["pulled"],
                    "training_s": training["ended"] - training["began"],
                    "answered_s": event["answered"] - training["ended"],
                }
            )
    if len(by_process) != SITES or any(len(rounds) != ROUNDS for rounds in by_process.values()):
        raise RuntimeError(f"expected {ROUNDS} trainings at {SITES} sites, got {[*map(len, by_process.values())]}")
    return [list(sites) for sites in zip(*by_process.values(), strict=True)]


def our_exchanges(events: Sequence[tuple[str, Mapping[str, Any]]], trained: Sequence[Any]) -> list[dict[str, Any]]:
    """The five exchanges of an update's sum, over all rounds; the first without round 1, whose workers are cold."""
    found: list[dict[str, Any]] = []
    for name, route, shared in zip(NAMES, EXCHANGES, SHARED, strict=True):
        by_round: dict[int, Mapping[str, Any]] = {}
        for _, event in events:  # the first of a round: the test results' sum comes after the last update's
            if event["event"] == "exchange" and event["route"] == route and event["round"] in range(1, ROUNDS + 1):
                by_round.setdefault(event["round"], event)
        lines = [by_round[index] for index in sorted(by_round)]
        if len(lines) != ROUNDS or any(any(line["codes"]) or len(line["codes"]) != SITES for line in lines):
            raise RuntimeError(f"{route}: expected {ROUNDS} exchanges with {SITES} replies, got {lines}")
        took = {line["round"]: line["seconds"] for line in lines}
        if route == "train.local":
            took = {
                index: seconds - max(site["training_s"] for site in trained[index - 1])
                for index, seconds in took.items()
                if index > 1
            }
        found.append(
            {
                "exchange": name,
                "shared": shared,
                "down": lines[-1]["bytes_down"] // SITES,
                "up": lines[-1]["bytes_up"] // SITES,
                "seconds": [round(took[index], 3) for index in sorted(took)],
            }
        )
    return found


# ---- plain exchanges


def plain_bundle() -> bytes:
    """plain_flower.py as Flower ships an app."""
    from flwr.cli.build import build_fab_from_files
    from wardround.common.bundle import COMPONENTS, bundle_files

    text = bundle_files()["pyproject.toml"].decode()
    text = text.replace(COMPONENTS["serverapp"], "plain_flower:server").replace(
        COMPONENTS["clientapp"], "plain_flower:client"
    )
    return build_fab_from_files(
        {"pyproject.toml": text.encode(), "plain_flower.py": (HERE / "plain_flower.py").read_bytes()}
    )[0]


@contextmanager
def hospitals(made: Any, executor: str, bundle: bytes) -> Iterator[None]:
    """The hospitals' SuperNodes as `wardround client start` runs them, each with another executor."""
    import hashlib

    from wardround.client.node import Node, free_port
    from wardround.common.supervisor import end_with_parent

    processes: list[subprocess.Popen[bytes]] = []
    logs: list[Path] = []
    try:
        for name in made.hospitals:
            node, port = Node.open(made.site_toml(name)), free_port()
            supernode, worker = node.children(port)
            secret = worker.command[worker.command.index("--secret") + 1]
            runtime = f"127.0.0.1:{port}"
            if executor == "echo":
                digest = hashlib.sha256(bundle).hexdigest()
                arguments = ("--site", str(node.site_toml), "--runtime", runtime, "--secret", secret)
                command = (sys.executable, str(HERE / "echo_worker.py"), *arguments, "--bundle", digest)
            else:
                program = str(Path(supernode.command[0]).with_name("flower-superexec"))
                options = ("--insecure", "--runtime-api-address", runtime)
                command = (program, *options, "--superexec-auth-secret-file", secret)
            environment = {**os.environ, **made.environment, **supernode.environment}
            environment["PATH"] = f"{Path(supernode.command[0]).parent}{os.pathsep}{environment.get('PATH', '')}"
            for kind, line in (("supernode", supernode.command), ("executor", command)):
                logs.append(made.out / f"{name}-{executor}-{kind}.log")
                with logs[-1].open("wb") as output:
                    processes.append(
                        subprocess.Popen(
                            line,
                            stdin=subprocess.DEVNULL,
                            stdout=output,
                            stderr=subprocess.STDOUT,
                            env=environment,
                            start_new_session=True,
                            preexec_fn=end_with_parent,
                        )
                    )
        deadline = time.monotonic() + 120
        while not all("SuperNode ID:" in log.read_text("utf-8", "replace") for log in logs[::2]):
            if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
                raise RuntimeError("\n".join(f"== {log.name}\n{log.read_text()[-1500:]}" for log in logs))
            time.sleep(0.3)
        yield
    finally:
        _end(processes)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Everything that these sessions hold; executors first, for a SuperNode leaves in order."""
    import signal

    for number, patience in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
        for process in reversed(processes):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                continue
        for process in processes:
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                continue


def plain_exchanges(made: Any, times: Path, peer: str, ours: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Seconds of each exchange at one peer; the first time of all, when a SuperNode fetches the bundle, is left out."""
    from wardround.server import control
    from wardround.server.coordinator import CoordinatorFolder

    polls, executor = PEERS[peer]
    bundle = plain_bundle()
    exchanges = [{key: line[key] for key in ("exchange", "shared", "down", "up")} for line in ours]
    plan = {"peer": peer, "polls": polls, "sites": SITES, "times": TIMES + 1, "exchanges": exchanges}
    (times / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    (times / "plain.jsonl").unlink(missing_ok=True)
    own, control.bundle = control.bundle, lambda: bundle
    try:
        with (
            hospitals(made, executor, bundle),
            control.Control(CoordinatorFolder.open(made.coordinator.folder)) as link,
        ):
            run, deadline = link.start(peer, resume=False), time.monotonic() + _RUN_S
            while not (status := next(one for one in link.runs() if one.id == run)).over:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{peer}: not over after {_RUN_S:.0f} s")
                time.sleep(1)
            if status.status != control.COMPLETED:
                raise RuntimeError(f"{peer}: {status.status}: {status.details}\n{made.coordinator.log('serverapps')}")
    finally:
        control.bundle = own
    lines = [json.loads(line) for line in (times / "plain.jsonl").read_text().splitlines()]
    if any(line["failed"] for line in lines):
        raise RuntimeError(f"{peer}: a site failed: {lines}")
    return {name: [round(line["seconds"], 3) for line in lines if line["exchange"] == name][1:] for name in NAMES}


# ---- together


@contextmanager
def again_started(folder: Path, config: Any, tell: Any, environment: Mapping[str, str]) -> Iterator[Any]:
    """A kept deployment whose run is over, its coordinator started again: for the peers alone."""
    from wardround.server.coordinator import CoordinatorFolder
    from wardround.simulations.deployment import Deployment, Party

    made = Deployment(folder / "consortium", config, tell, dict(environment))
    made.port = CoordinatorFolder.open(made.coordinator.folder).config.listen_port
    for path in sorted((made.out / "hospitals").iterdir()):
        made.hospitals[path.name] = Party(path.name, path, path / "state")
    try:
        made.start(made.coordinator.name)
        yield made
    finally:
        made.stop(made.coordinator.name)


def measured(folder: Path, chosen: Sequence[str]) -> dict[str, Any]:
    """Everything, in one deployment."""
    from wardround.common.config import RunConfig
    from wardround.simulations.deployment import deployment

    from tests.tiny import tiny_model

    times = folder / "times"
    times.mkdir(exist_ok=True)
    config = RunConfig.model_validate(settings(tiny_model(folder / "model", hidden=HIDDEN)))
    environment = {
        "WARDROUND_TIMES": str(times),
        "WARDROUND_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(HERE / "hooks"),
    }
    before = os.getloadavg()[0]

    def say(line: str) -> None:
        print(line[:110], flush=True)

    again = (folder / "consortium").exists()
    with (
        again_started(folder, config, say, environment)
        if again
        else deployment(folder / "consortium", config, say, 0, **environment) as made
    ):
        if not again:
            our_rounds(made)
            (folder / "load.json").write_text(json.dumps(round(os.getloadavg()[0], 2)))
            made.stop(*made.hospitals)
        events = read_events(times)
        trained = trainings(events)
        ours = our_exchanges(events, trained)
        peers: dict[str, dict[str, list[float]]] = {}
        loads = {"before": round(before, 2), "ours": json.loads((folder / "load.json").read_text())}
        for peer in chosen:
            peers[peer] = plain_exchanges(made, times, peer, ours)
            loads[peer] = round(os.getloadavg()[0], 2)
    for line in ours:
        line["median_s"] = round(statistics.median(line["seconds"]), 3)
        line["peers_s"] = {peer: found[line["exchange"]] for peer, found in peers.items()}
        line["ratio"] = {
            peer: round(line["median_s"] / statistics.median(found), 3) for peer, found in line["peers_s"].items()
        }
    warm = [{name: round(max(site[name] for site in sites), 3) for name in sites[0]} for sites in trained]
    return {
        "sites": SITES,
        "values": (ours[2]["up"] - 1000) // 4,  # with the tail and without the head, about
        "exchanges": ours,
        "ratio_bound": RATIO,
        "worker_slowest_site_by_round": warm,
        "warm_bound_s": WARM_S,
        "load_average": loads,
    }


def show(result: Mapping[str, Any]) -> bool:
    """Prints the tables; whether every bound holds."""
    peers = [*result["exchanges"][0]["ratio"]]
    print(f"\n{result['sites']} sites, {result['values']:,} values, load {result['load_average']}")
    heads = "".join(f"{peer + ' s':>11}{'ratio':>7}" for peer in peers)
    print(f"{'exchange':<20}{'MB down':>9}{'MB up':>9}{'ours s':>9}{heads}")
    met = True
    for line in result["exchanges"]:
        cells = "".join(
            f"{statistics.median(line['peers_s'][peer]):>11.2f}{line['ratio'][peer]:>7.2f}" for peer in peers
        )
        sizes = f"{line['down'] / 1e6:>9.3f}{line['up'] / 1e6:>9.3f}"
        print(f"{line['exchange']:<20}{sizes}{line['median_s']:>9.2f}{cells}")
        met &= line["ratio"].get("bare", float("inf")) <= RATIO
    print(
        "\nslowest site, seconds: from the worker's taking the task to the whole message, from there to the first step:"
    )
    print(f"{'round':<8}{'fetched':>9}{'first step':>12}{'(training)':>12}")
    for index, line in enumerate(result["worker_slowest_site_by_round"], start=1):
        cells = f"{line['pulled_s']:>9.2f}{line['warm_s']:>12.2f}"
        print(f"{index:<8}{cells}{line['training_s']:>12.2f}")
    return met and result["worker_slowest_site_by_round"][1]["warm_s"] <= WARM_S


def main() -> int:
    """One deployment, writes benchmarks/results/deployed_round.json; 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", nargs="*", choices=[*PEERS], default=[*PEERS], help="all; none: nothing is written")
    parser.add_argument("--keep", type=Path, help="a folder for the deployment; a finished one: peers alone")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from environment import record
    from wardround.common.cli import quiet_third_parties

    from tests.server.superlink_case import missing

    quiet_third_parties()
    if missing():
        print(f"not beside this Python: {', '.join(missing())}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = asked.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        result = measured(folder, asked.peers)
    met = show(result)
    if asked.peers:
        print(record("deployed_round", {**result, "met": met}))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
