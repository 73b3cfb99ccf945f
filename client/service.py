"""The systemd unit of `wardround client start`. Run by the site; writes one file beside site.toml."""

from __future__ import annotations

from pathlib import Path

from ..common import service
from ..common.errors import ConfigError
from ..common.lm.packaged import cache_folder
from .node import NODE_GRACE_S, WORKER_GRACE_S, Node


def install(node: Node) -> tuple[Path, list[str]]:
    """Writes the unit; gives the file, and the commands that enable it.

    Raises:
        ConfigError: the service could not open the identity: no passphrase file is named; a path systemd cannot take.
    """
    if node.config.identity.passphrase_file is None:
        raise ConfigError(
            f"{node.site_toml}: a service has nobody who sets WARDROUND_PASSPHRASE: name a file of mode 0600 with "
            "identity.passphrase_file"
        )
    cache, name = cache_folder().resolve(), node.config.name
    unit = service.Service(
        name=f"wardround-{name}.service",
        title=f"wardround site {name}",
        start="client start",
        option="--site",
        argument=node.site_toml,
        writable=(node.folder, cache),
        grace_s=WORKER_GRACE_S + NODE_GRACE_S + 15,
        environment=(("WARDROUND_CACHE", cache),),
    )
    cache.mkdir(parents=True, exist_ok=True)
    return service.install(unit, node.folder)
