"""A systemd unit that runs `wardround client start`. Run by the site; writes one file, changes nothing else."""

from __future__ import annotations

import getpass
import sysconfig
from pathlib import Path

from ..common.errors import ConfigError
from ..common.files import write_atomic
from ..common.lm.packaged import cache_folder
from .node import NODE_GRACE_S, WORKER_GRACE_S, Node

_UNIT = """\
# wardround, site '{name}'. Written by `wardround client start --install-service`.
[Unit]
Description=wardround site {name}
After=network-online.target
Wants=network-online.target

[Service]
Type=exec
User={user}
ExecStart="{program}" client start --site "{site}"
Restart=on-failure
RestartSec=10
# A mistake that only a person can mend: starting again cannot help.
RestartPreventExitStatus=2
# The message under way may finish; local training goes on after the next start.
KillMode=mixed
TimeoutStopSec={grace:.0f}
UMask=0077
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths="{folder}" "{cache}"
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
LockPersonality=yes
Environment=WARDROUND_CACHE="{cache}"

[Install]
WantedBy=multi-user.target
"""


def install(node: Node) -> tuple[Path, list[str]]:
    """Writes the unit beside site.toml.

    Returns:
        The file, and the commands that enable it, which need root.

    Raises:
        ConfigError: the service could not open the identity: no passphrase file is named; a path systemd cannot take.
    """
    if node.config.identity.passphrase_file is None:
        raise ConfigError(
            f"{node.site_toml}: a service has nobody who sets WARDROUND_PASSPHRASE: name a file of mode 0600 with "
            "identity.passphrase_file"
        )
    cache, program = cache_folder().resolve(), Path(sysconfig.get_path("scripts")) / "wardround"
    values = {"site": str(node.site_toml), "folder": str(node.folder), "cache": str(cache), "program": str(program)}
    for key, value in values.items():
        if set(value) & set('"\\%$\n'):
            raise ConfigError(f"{value}: systemd takes no quote, backslash, percent or dollar sign in a path ({key})")
    name = f"wardround-{node.config.name}.service"
    path = node.folder / name
    cache.mkdir(parents=True, exist_ok=True)
    text = _UNIT.format(
        name=node.config.name, user=getpass.getuser(), grace=WORKER_GRACE_S + NODE_GRACE_S + 15, **values
    )
    write_atomic(path, text.encode(), mode=0o644)
    return path, [
        f"sudo cp {path} /etc/systemd/system/{name}",
        "sudo systemctl daemon-reload",
        f"sudo systemctl enable --now {name}",
    ]
