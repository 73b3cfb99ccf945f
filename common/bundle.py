"""The bundle that a run is started with in Flower: it names what is installed, and holds no code.

Used by both roles: the coordinator submits it (server/control.py), a site computes its digest and refuses every other
(client/worker.py). Pure. Enters: the installed version. Leaves: the bundle's one file. Private: nothing.

Flower ships a bundle to every site and puts its folder first on `sys.path`: whatever is in it would run there. So a
site takes none but this one, which another version of wardround or of the protocol cannot have.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from .messages import PROTOCOL_VERSION

NAME, PUBLISHER = "wardround-bundle", "wardround"
COMPONENTS = {"serverapp": "wardround.server.app:app", "clientapp": "wardround.client.app:app"}
RUN_KEYS = {"run": "", "resume": False}  # all that a run's config says, with its defaults: it reaches every site
_TEMPLATE = """\
[project]
name = "{name}"
version = "{protocol}.0.0"
description = "wardround {wardround}, protocol {protocol}: names what is installed and holds no code"
dependencies = []

[tool.flwr.app]
publisher = "{publisher}"

[tool.flwr.app.components]
serverapp = "{serverapp}"
clientapp = "{clientapp}"

[tool.flwr.app.config]
run = ""
resume = false
"""


def wardround_version() -> str:
    """The installed version."""
    return version("wardround")


def bundle_files() -> dict[str, bytes]:
    """The bundle: path in it → content."""
    text = _TEMPLATE.format(
        name=NAME, publisher=PUBLISHER, protocol=PROTOCOL_VERSION, wardround=wardround_version(), **COMPONENTS
    )
    return {"pyproject.toml": text.encode()}


def write_bundle(folder: Path) -> Path:
    """Writes the bundle's files to a folder, made if it is not there; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in bundle_files().items():
        (folder / name).write_bytes(content)
    return folder
