"""Whether a container's coordinator or hospital is in order: exit code 0, else 1 and a line why.

    python health.py coordinator | python health.py site SITE_TOML

Run by the container's health check, inside it. Enters: the folder; for the coordinator, its own public socket's answer
over TLS, checked against its own authority. Leaves: nothing. Reads no key and no patient.
"""

from __future__ import annotations

import http.client
import os
import ssl
import sys
from pathlib import Path

from wardround.common.config import load_site
from wardround.common.errors import WardroundError
from wardround.common.supervisor import holder, read_status

PATIENCE_S = 10.0


def coordinator(folder: Path) -> str:
    """What is wrong with the coordinator, or "": its public socket does not answer."""
    from wardround.server.coordinator import CoordinatorFolder

    opened = CoordinatorFolder.open(folder)
    trust = ssl.create_default_context(cafile=str(opened.tls / "ca.pem"))
    try:
        connection = http.client.HTTPSConnection(
            "127.0.0.1", opened.config.listen_port, timeout=PATIENCE_S, context=trust
        )
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"port {opened.config.listen_port}: {error}"
    return "" if status == 200 else f"port {opened.config.listen_port}: answered {status}"


def site(site_toml: Path) -> str:
    """What is wrong with the hospital, or "": nobody runs it, or one of its processes is being started again."""
    state = site_toml.parent / load_site(site_toml).state
    if holder(state / "lock") is None:
        return "is not started"
    processes = (read_status(state / "status.json") or {}).get("processes", {})
    down = [name for name, one in processes.items() if one["pid"] is None]
    return f"{', '.join(down) or 'no process'}: not running now" if down or not processes else ""


def main(arguments: list[str]) -> int:
    """Entry."""
    try:
        if arguments == ["coordinator"]:
            wrong = coordinator(Path(os.environ.get("WARDROUND_COORDINATOR", ".")))
        elif len(arguments) == 2 and arguments[0] == "site":
            wrong = site(Path(arguments[1]))
        else:
            wrong = "expected `coordinator` or `site SITE_TOML`"
    except (OSError, WardroundError) as error:
        wrong = str(error)
    if wrong:
        print(wrong, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
