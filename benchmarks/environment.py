"""Where a benchmark ran, and the file that keeps its figures: benchmarks/results/<name>.json.

from environment import record
record("questions", {"questions_per_s": 48_000})
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "wardround",
    "numpy",
    "pandas",
    "pyarrow",
    "torch",
    "transformers",
    "trl",
    "peft",
    "flwr",
    "fastapi",
    "uvicorn",
    "cryptography",
)


def environment() -> dict[str, Any]:
    """Machine, cores this process may use, accelerator if torch is loaded, and the versions that decide speed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    torch = sys.modules.get(
        "torch"
    )  # only if the benchmark itself uses it: importing it here would cost 3 s and memory
    gpu = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpu,
        "system": platform.platform(),
        "python": platform.python_version(),
        "threads": {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ},
        "versions": versions,
    }


def peak_rss_bytes() -> int:
    """The largest resident size this process has had so far.

    On Linux not `ru_maxrss`: that of a child begins with its parent's, however small the child stays.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def record(name: str, payload: dict[str, Any]) -> Path:
    """Write `payload` with the environment and the time to benchmarks/results/<name>.json; returns the path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    whole = {
        "benchmark": name,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        **payload,
    }
    path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return path


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
