"""What `wardround server status` shows: processes, hospitals, the run, the certificate.

Run by the coordinator. Enters: its folder, and its SuperLink's list of nodes where that runs. Leaves: a dict for
scripts, a table for people. Holds no patient value.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ..common.supervisor import holder, read_status
from . import run_status
from .certificates import RENEW_DAYS, validity
from .coordinator import CoordinatorFolder
from .disk import full
from .keeper import wanted

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .control import Node


def gather(folder: CoordinatorFolder) -> dict[str, Any]:
    """Everything that is known now.

    Raises:
        ConfigError: a file of the folder is damaged.
    """
    running = holder(folder.lock) is not None
    nodes, problem = _nodes(folder) if running else ((), "")
    supervised = (read_status(folder.status_file) or {}) if running else {}
    shown = validity(folder.tls / "server.pem")
    name = current_run(folder)
    roster = folder.roster()
    said = {} if name is None else run_status.read(folder.run(name))
    return {
        "consortium": folder.config.consortium,
        "address": folder.config.address,
        "running": running,
        "problem": full(folder.path) or problem,
        "since": supervised.get("since"),
        "processes": supervised.get("processes", {}),
        "roster_serial": None if roster is None else roster.serial,
        "sites": _sites(folder, nodes, said),
        "run": None if name is None else _run(folder, name, said, {f"node {node.id}": node.name for node in nodes}),
        "runs": folder.runs(),
        "certificate": {"ends": shown.ends.isoformat(), "days_left": shown.days_left()},
    }


def current_run(folder: CoordinatorFolder) -> str | None:
    """The run that shall go on, else the one that did something last."""
    names = folder.runs()
    active = [name for name in names if wanted(folder.run(name)) is not None]
    files = {name: folder.run(name) / run_status.FILE for name in names}
    latest = sorted(names, key=lambda name: files[name].stat().st_mtime if files[name].exists() else 0.0)
    return active[0] if active else latest[-1] if latest else None


def _nodes(folder: CoordinatorFolder) -> tuple[Sequence[Node], str]:
    from .control import Control, ControlError, NotRunningError

    try:
        with Control(folder) as control:
            return control.nodes(), ""
    except NotRunningError:
        return (), "its SuperLink does not answer yet"
    except ControlError as error:
        return (), str(error)


def _sites(folder: CoordinatorFolder, nodes: Sequence[Node], said: Mapping[str, Any]) -> list[dict[str, Any]]:
    roster, applications, keys = folder.roster(), folder.applications(), folder.node_keys()
    by_key = {node.public_key: node for node in nodes}
    found: list[dict[str, Any]] = []
    for member in sorted(() if roster is None else roster.members, key=lambda member: member.name.casefold()):
        application, in_run = applications.get(member.name), said.get("sites", {}).get(member.name, {})
        node = by_key.get(keys.get(member.name, b""))
        found.append(
            {
                "name": member.name,
                "fingerprint": member.fingerprint,
                "member": member.status,
                "node": None if node is None else node.status,
                "last_seen": None if node is None else node.last_seen,
                "version": None if application is None else application.wardround,
                "protocol": None if application is None else application.protocol,
                "phase": in_run.get("phase", ""),
                "code": in_run.get("code", ""),
                "rounds": in_run.get("rounds", 0),
                "epsilon": in_run.get("epsilon"),
            }
        )
    return found


def _run(folder: CoordinatorFolder, name: str, said: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    seconds, done, total = said.get("seconds_of_rounds", []), said.get("rounds_done", 0), said.get("rounds", 0)
    alive, ended = run_status.alive(said), said.get("ended")
    if ended and ended["code"] == "":
        state = "finished"
    elif alive:
        state = "running"
    elif wanted(folder.run(name)) is None:
        state = "stopped"
    else:
        state = "waiting" if said else "starting"
    eta = sum(seconds) / len(seconds) * (total - done) if state == "running" and seconds and done < total else None
    # Whoever has not said yet in this start which site it is, is a node's number there; its key says who it is.
    asked = [names.get(one, one) for one in said.get("asked", [])]
    answered = {names.get(one, one): code for one, code in said.get("answered", {}).items()}
    return {
        "name": name,
        "state": state,
        "phase": said.get("phase", ""),
        "round": said.get("round", 0),
        "phase_began": said.get("phase_began"),
        "answered": answered,
        "missing": sorted(set(asked) - set(answered)) if alive else [],
        "rounds_done": done,
        "rounds": total,
        "rounds_lost": said.get("rounds_lost", 0),
        "validation": said.get("validation", []),
        "epsilon_planned": said.get("epsilon_planned"),
        "delta": said.get("delta"),
        "eta_s": eta,
        "note": said.get("note", ""),
        "ended": None if alive else ended,
    }


def show(content: Mapping[str, Any]) -> RenderableType:
    """The table for people."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    lines: list[RenderableType] = [Text(line) for line in _head(content)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("site", "node", "last seen", "version", "phase", "rounds", "ε spent"):
        table.add_column(column, justify="right" if column in ("rounds", "ε spent") else "left")
    now = time.time()
    for site in content["sites"]:
        node = "revoked" if site["member"] != "active" else site["node"] or "–"
        style = {"online": "green", "offline": "yellow", "revoked": "red"}.get(node, "")
        phase = site["phase"] + (f" ({site['code']})" if site["code"] else "")
        seen = "never" if site["last_seen"] is None else f"{duration(now - site['last_seen'])} ago"
        epsilon = "–" if site["epsilon"] is None else f"{site['epsilon']:.2f}"
        cells = (seen if site["node"] else "–", site["version"] or "no application", phase or "–")
        table.add_row(site["name"], Text(node, style=style), *cells, str(site["rounds"]), epsilon)
    return Group(*lines, table) if content["sites"] else Group(*lines, Text("nobody is enrolled yet"))


def _head(content: Mapping[str, Any]) -> list[str]:
    ends = datetime.fromisoformat(content["certificate"]["ends"]).astimezone(UTC)
    left = content["certificate"]["days_left"]
    since = f", since {duration(time.time() - content['since'])}" if content["since"] else ""
    state = f"running{since}" if content["running"] else "not running: call `wardround server start`"
    lines = [f"{content['consortium']} at {content['address']}: {state}"]
    if content["problem"]:
        lines.append(f"  {content['problem']}")
    for name, one in content["processes"].items():
        if one["restarts"] or one["pid"] is None:
            exit_code = f", last exit {one['last_exit']}" if one["last_exit"] is not None else ""
            lines.append(
                f"  {name}: {'up' if one['pid'] else 'down'}, started again {one['restarts']} times{exit_code}"
            )
    urgent = "; it is made anew at the next start" if left < RENEW_DAYS else ""
    lines.append(f"certificate until {ends:%Y-%m-%d}, {left} days{urgent}")
    if content["run"] is None:
        return [*lines, "no run yet", ""]
    run = content["run"]
    eta = f", about {duration(run['eta_s'])} of rounds left" if run["eta_s"] is not None else ""
    rounds = f", {run['rounds_done']} of {run['rounds']} rounds" if run["rounds"] else ""
    lines.append(f"run {run['name']}: {run['state']}{rounds}{eta}")
    if run["rounds_lost"]:
        lines.append(f"  in {run['rounds_lost']} of them no sum could be had: the model stayed as it was")
    if run["state"] == "running":
        for_s = f" for {duration(time.time() - run['phase_began'])}" if run["phase_began"] else ""
        waits = f"; waiting for {', '.join(run['missing'])}" if run["missing"] else ""
        lines.append(f"  {run['phase']} (round {run['round']}){for_s}{waits}")
    if run["note"] and run["state"] == "running":
        lines.append(f"  {run['note']}")
    if run["ended"] and run["ended"]["code"]:
        lines.append(f"  {run['ended']['code']}: {run['ended']['message']}")
    if run["state"] == "waiting":
        lines.append("  it is tried again by itself; logs/runs.log says when")
    if run["state"] == "stopped":
        lines.append(f"  `wardround server run {run['name']} --resume` continues it")
    if run["epsilon_planned"] is not None:
        lines.append(f"  planned: ε = {run['epsilon_planned']:g} at δ = {run['delta']:g}, of a patient of one site")
    return [*lines, ""]


def duration(seconds: float) -> str:
    """A time span as people say it.

    >>> duration(5), duration(150), duration(9000), duration(200000)
    ('5 s', '2 min', '2.5 h', '2.3 d')
    """
    if seconds < 100:
        return f"{max(0.0, seconds):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} d"
