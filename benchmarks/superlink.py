"""Secure sums over Flower's own SuperLink and SuperNodes: seconds and bytes of each exchange, three sizes of adapter.

    python benchmarks/superlink.py

3 sites, each with a SuperNode of its own, and the coordinator, all processes of one machine
(tests/server/superlink_case.py): real site folders, identities, messages and secure sums; a small but complete language
model whose adapter is as large as wanted. One run a size: the round-0 adapter to all sites, the sum of their counts,
the schema, the sum of one update; training is short and inside the update's first exchange. "At sites" is the time from
sending to the last site's entry in its ledger (all processes share a clock), "back" the rest: the reply's way and the
coordinator's look for it. Every exchange starts a Python process at every site, so on a machine whose cores the sites
share these figures are higher than between hospitals; the file says how many cores, how busy, and the processor time of
all processes together, which other work does not lengthen as much.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

SITES = 3
# Hidden size and LoRA rank → values of an update: about 12,000, 2.5 million, 10 million.
SIZES = {"tiny": (48, 16), "2.5M": (152, 1024), "10M": (616, 1024)}
NAMES = {
    "query.warmup": "warm-up (round-0 adapter)",
    "query.count": "1 keys (counting)",
    "train.local": "1 keys (training)",
    "query.shares": "2 shares",
    "query.mask": "3 masked vectors",
    "query.survivors": "4 consistency",
    "query.unmask": "5 unmask",
    "query.schema": "schema",
}


def settings(model: Path, rank: int) -> dict[str, Any]:
    """The run: one short round."""
    return {
        "name": "benchmark",
        "privacy": {"enabled": False},
        "seed": 5,
        "model": {"id": str(model), "device": "cpu", "prompt": "en_short"},
        "warmup": {"enabled": False},
        "lora": {"rank": rank},
        "grpo": {"local_steps": 1, "patients_per_step": 2, "expectation": "exact"},
        "federation": {"rounds": 1, "validation_questions_per_site": 0, "phase_timeout_s": 600},
        "evaluation": {"questions_per_site": 4, "samples": 0, "bootstrap_samples": 100},
        "simulation": {"registry": "synthetic", "sites": SITES},
    }


def one_run(name: str, folder: Path) -> dict[str, Any]:
    """One size, over a deployment that is started for it and ended after it."""
    from wardround.common.config import RunConfig
    from wardround.common.messages import MaskedReply, dtypes_of
    from wardround.simulations.federation import divide, load_registry, write_sites

    from tests.server.superlink_case import deployment, write_bundle, write_coordinator
    from tests.tiny import tiny_model

    hidden, rank = SIZES[name]
    config = RunConfig.model_validate(settings(tiny_model(folder / "model", hidden=hidden), rank))
    registry = load_registry(config)
    write_sites(registry, divide(registry, config), config, folder / "sites")
    sites = sorted((folder / "sites").glob("*/site.toml"))
    coordinator = write_coordinator(folder / "coordinator", config, folder / "sites")
    before, used = os.getloadavg()[0], _processor_s()
    here = str(Path(__file__).resolve().parent)
    with deployment(folder / "flower", sites, coordinator, PYTHONPATH=here) as running:
        bundle = write_bundle(folder / "bundle", "superlink_app:app")
        status = running.wait_for_run(running.submit(bundle, {"run": config.name}), timeout_s=1800)
        if status != "finished:completed":
            raise RuntimeError(f"{status}\n{running.logs()}")
    exchanges = [
        json.loads(line) for line in (coordinator.run(config.name) / "exchanges.jsonl").read_text().splitlines()
    ]
    ready = _ledger_times(sites)
    for line in exchanges:
        if any(line["codes"]):
            raise RuntimeError(f"{line['route']}: {line['codes']}")
        came = [
            time for route, time in ready if route == line["route"] and 0 <= time - line["began"] <= line["seconds"]
        ]
        line["at_sites"] = max(came) - line["began"]
    values = next(line["bytes_up"] for line in exchanges if (line["route"], line["round"]) == ("query.mask", 1))
    return {
        "adapter": name,
        "values": values // SITES // dtypes_of(MaskedReply)["masked"].itemsize,  # with the tail and the head
        "processor_s": round(_processor_s() - used, 1),  # SuperLink, SuperNodes and apps, from start to end
        "load_average": [round(before, 2), round(os.getloadavg()[0], 2)],
        "sum_s": round(sum(line["seconds"] for line in exchanges if line["round"] == 1), 2),
        "exchanges": [
            {
                "exchange": NAMES[line["route"]],
                "round": line["round"],
                "seconds": round(line["seconds"], 2),
                "at_the_sites_s": round(line["at_sites"], 2),
                "back_s": round(line["seconds"] - line["at_sites"], 2),
                "bytes_up": line["bytes_up"],
                "bytes_down": line["bytes_down"],
            }
            for line in exchanges
        ],
    }


def _processor_s() -> float:
    """Of the processes that ended so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _ledger_times(sites: list[Path]) -> list[tuple[str, float]]:
    """Route and time of every reply, as the sites wrote them down before it left."""
    lines = [line for site in sites for line in (site.parent / "state" / "ledger.jsonl").read_text().splitlines()]
    entries = [json.loads(line) for line in lines]
    return [(entry["phase"], datetime.fromisoformat(entry["time"]).timestamp()) for entry in entries]


def show(result: dict[str, Any]) -> None:
    """One size as a table."""
    print(f"\n{result['adapter']}: {result['values']:,} values, {SITES} sites, load {result['load_average']}")
    print(f"{'exchange':<28}{'round':>6}{'seconds':>9}{'at sites':>10}{'back':>7}{'MB up':>9}{'MB down':>9}")
    for line in result["exchanges"]:
        sent = f"{line['bytes_up'] / 1e6:>9.3f}{line['bytes_down'] / 1e6:>9.3f}"
        times = f"{line['seconds']:>9.2f}{line['at_the_sites_s']:>10.2f}{line['back_s']:>7.2f}"
        print(f"{line['exchange']:<28}{line['round']:>6}{times}{sent}")
    print(
        f"the update's five exchanges: {result['sum_s']} s; processor, whole run: {result['processor_s']} s", flush=True
    )


def main() -> int:
    """Every size once, writes benchmarks/results/superlink.json after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=tuple(SIZES), help="one size, nothing written")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from environment import record
    from wardround.common.cli import quiet_third_parties

    from tests.server.superlink_case import missing

    quiet_third_parties()
    if missing():
        print(f"not beside this Python: {', '.join(missing())}", file=sys.stderr)
        return 2
    results = []
    for name in (asked.only,) if asked.only else SIZES:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["WARDROUND_CACHE"] = f"{folder}/cache"
            results.append(one_run(name, Path(folder)))
        show(results[-1])
        if not asked.only:
            print(record("superlink", {"sites": SITES, "runs": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
