"""How fast the review's pages answer, with 10,000 pairs and 5 raters: python benchmarks/review.py

The server is `wardround server review start` itself, over a real socket on loopback, on the cores that the clients use
too. Records have 50 lines, answers 1,500 characters; the raters have rated 0, 25, 50, 75 and 99 % of their pairs. Each
fetches pairs here and there, saves ratings (which are on the disk before the answer comes) and looks through the list:
one rater alone; all five at once, each a request every 50 ms or so; all five without any pause, which says how many
requests a second there can be. Bound: 100 ms for 99 of 100 requests of every kind, of the first two. Writes
benchmarks/results/review.json, with the machine's load before each, for others may work on it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
from environment import record
from wardround.server.review import raters
from wardround.server.review.database import Database
from wardround.server.review.items import read_study
from wardround.server.review.ratings import Rating

ITEMS, RATERS, REQUESTS, PAUSE_S, BOUND_MS = 10_000, 5, 200, 0.05, 100.0
RATED = (0.0, 0.25, 0.5, 0.75, 0.99)
WARDROUND = Path(sys.executable).parent / "wardround"


def write_items(path: Path) -> None:
    """Pairs of the length that a model's reasoning has."""
    rng = np.random.default_rng(0)
    text = "Heart rate, blood pressure and lactate are weighed against each other. " * 21
    sections = ("Patient", "History", "Vital signs", "Laboratory", "Treatment")
    with path.open("w", encoding="utf-8") as file:
        for number in range(ITEMS):
            values = np.round(rng.normal(100, 20, 50), 1).tolist()
            entries = [
                {"section": sections[k // 10], "label": f"Measurement {k}", "value": value, "unit": "mg/dL"}
                for k, value in enumerate(values)
            ]
            answers = {model: {"text": f"{text}{number}", "chosen": k} for k, model in enumerate(("one", "two"))}
            line = {
                "id": f"{number}", "section": sections[number % 5], "target": "t", "record": entries,
                "question": "Which option fits the record?", "options": ["below", "above"], "answers": answers,
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")


def make(folder: Path) -> tuple[list[str], dict[str, float]]:
    """The study, its raters' tokens, and how long that took."""
    write_items(folder / "items.jsonl")
    start = time.perf_counter()
    study = read_study(folder / "items.jsonl", "synthetic", "Benchmark")
    with Database.create(folder / "study", study, 0.1) as database:
        made = time.perf_counter()
        tokens = [raters.invite(database, f"rater {number}") for number in range(RATERS)]
        invited = time.perf_counter()
        rating = Rating(1)
        for number, share in enumerate(RATED, start=1):
            with database.transaction():
                total = database.all("SELECT place, item FROM slots WHERE rater = ?", number)
                for row in total[: round(share * len(total))]:
                    database.write(
                        "UPDATE slots SET preference = 1, detail = ?, rated_at = '' WHERE rater = ? AND place = ?",
                        rating.to_json(), number, row["place"],
                    )  # fmt: skip
                    database.note(number, "rated", place=row["place"], item=row["item"], new=rating.to_json())
    return tokens, {"make_s": round(made - start, 2), "invite_s_each": round((invited - made) / RATERS, 2)}


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, int]]:
    """The address of the study while the block runs, and the server's process."""
    from wardround.simulations.deployment import free_port

    url = f"127.0.0.1:{free_port()}"
    command = [str(WARDROUND), "server", "review", "start", str(folder / "study"), "--listen", url]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        process.stderr.readline()  # says that it is up
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def one_rater(
    url: str, token: str, seed: int, pause_s: float, times: dict[str, list[float]], lock: threading.Lock
) -> None:
    """REQUESTS of each kind, each timed."""
    rng, cookies = np.random.default_rng(seed), dict[str, str]()
    with closing(HTTPConnection(url, timeout=60)) as connection:

        def ask(method: str, path: str, **given: str) -> tuple[int, str, float]:
            """Status, page, and milliseconds from the first byte sent to the last one received."""
            headers = {"Cookie": "; ".join(f"{name}={value}" for name, value in cookies.items())}
            if given:
                headers["Content-Type"] = "application/x-www-form-urlencoded"
            start = time.perf_counter()
            connection.request(method, path, urlencode(given) if given else None, headers)
            answer = connection.getresponse()
            page = answer.read()
            took = time.perf_counter() - start
            for header in answer.headers.get_all("Set-Cookie") or ():
                name, _, value = header.partition(";")[0].partition("=")
                cookies[name] = value
            return answer.status, page.decode(), 1000 * took

        def hidden(page: str, name: str) -> str:
            found = re.search(rf'name="{name}" value="([^"]+)"', page)
            assert found, page
            return found[1]

        def timed(kind: str, expected: int, method: str, path: str, **given: str) -> str:
            time.sleep(pause_s)
            status, page, took = ask(method, path, **given)
            assert status == expected, (path, status)
            with lock:
                times[kind].append(took)
            return page

        form = hidden(ask("GET", "/login")[1], "form")
        status, page, _ = ask("POST", "/login", form=form, token=token)
        if status == 409:  # logged in by the measurement before
            status, _, _ = ask("POST", "/takeover", form=form, ticket=hidden(page, "ticket"))
        assert status == 303
        for _ in range(REQUESTS):
            number = int(rng.integers(1, round(1.1 * ITEMS) + 1))
            form, comment = hidden(timed("pair", 200, "GET", f"/pairs/{number}"), "form"), str(rng.integers(10**9))
            timed("save", 303, "POST", f"/pairs/{number}", form=form, preference="second-much", comment=comment)
            timed("next", 303, "GET", "/next")
            timed("list", 200, "GET", f"/pairs?page={rng.integers(1, 111)}")


def measure(url: str, pid: int, tokens: list[str], pause_s: float) -> dict[str, Any]:
    """Milliseconds by kind of request, all raters at once; requests a second; the server's own time."""
    load, used, start = os.getloadavg()[0], cpu_s(pid), time.perf_counter()
    times: dict[str, list[float]] = {"pair": [], "save": [], "next": [], "list": []}
    lock = threading.Lock()
    threads = [
        threading.Thread(target=one_rater, args=(url, token, seed, pause_s, times, lock))
        for seed, token in enumerate(tokens)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if any(len(found) != REQUESTS * len(tokens) for found in times.values()):
        raise RuntimeError("a rater's requests failed")
    seconds, used, requests = time.perf_counter() - start, cpu_s(pid) - used, sum(map(len, times.values()))
    by_kind = {
        kind: {
            "n": len(found),
            "p50_ms": round(float(np.percentile(found, 50)), 2),
            "p99_ms": round(float(np.percentile(found, 99)), 2),
            "max_ms": round(max(found), 2),
        }
        for kind, found in times.items()
    }
    return {
        "load_before": round(load, 1),
        "requests_per_s": round(requests / seconds, 1),
        "server_cpu_ms_per_request": round(1000 * used / requests, 2),
        "worst_p99_ms": max(found["p99_ms"] for found in by_kind.values()),
        **by_kind,
    }


def cpu_s(pid: int) -> float:
    """Seconds of a core that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens, made = make(folder)
        with served(folder) as (url, pid):
            runs = {
                "one_rater": measure(url, pid, tokens[2:3], PAUSE_S),
                "five_raters": measure(url, pid, tokens, PAUSE_S),
                "five_without_a_pause": measure(url, pid, tokens, 0.0),
            }
        size = (folder / "study" / "review.db").stat().st_size
    worst = max(runs[name]["worst_p99_ms"] for name in ("one_rater", "five_raters"))
    result = {
        "items": ITEMS,
        "raters": RATERS,
        "rated": RATED,
        **made,
        "database_bytes": size,
        "niceness": os.nice(0),
        **runs,
        "targets_met": {f"p99 <= {BOUND_MS:.0f} ms": worst <= BOUND_MS},
    }
    path = record("review", result)
    print(json.dumps(result, indent=2))
    print(f"written to {path}")
    return 0 if worst <= BOUND_MS else 1


if __name__ == "__main__":
    sys.exit(main())
