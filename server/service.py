"""A systemd unit that runs `wardround server start`. Run by the coordinator; writes one file, changes nothing else."""

from __future__ import annotations

import getpass
import sysconfig
from pathlib import Path

from ..common.errors import ConfigError
from ..common.files import write_atomic
from .coordinator import CoordinatorFolder

NAME = "wardround-coordinator.service"
_UNIT = """\
# wardround, coordinator of '{consortium}'. Written by `wardround server start --install-service`.
[Unit]
Description=wardround coordinator
After=network-online.target
Wants=network-online.target

[Service]
Type=exec
User={user}
ExecStart="{program}" server start --coordinator "{folder}"
Restart=on-failure
RestartSec=10
# A mistake that only a person can mend: starting again cannot help.
RestartPreventExitStatus=2
KillMode=mixed
TimeoutStopSec={grace:.0f}
UMask=0077
LimitNOFILE=8192
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths="{folder}"
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
LockPersonality=yes

[Install]
WantedBy=multi-user.target
"""


def install(folder: CoordinatorFolder, grace_s: float) -> tuple[Path, list[str]]:
    """Writes the unit into the coordinator's folder.

    Returns:
        The file, and the commands that enable it, which need root.

    Raises:
        ConfigError: the service could not open the key: no passphrase file is named; a path systemd cannot take.
    """
    if folder.passphrase_file is None:
        raise ConfigError(
            f"{folder.path / 'coordinator.toml'}: a service has nobody who sets WARDROUND_PASSPHRASE: name a file of "
            "mode 0600 with passphrase_file"
        )
    program = Path(sysconfig.get_path("scripts")) / "wardround"
    values = {"folder": str(folder.path), "program": str(program)}
    for key, value in values.items():
        if set(value) & set('"\\%$\n'):
            raise ConfigError(f"{value}: systemd takes no quote, backslash, percent or dollar sign in a path ({key})")
    path = folder.path / NAME
    consortium = folder.config.consortium
    text = _UNIT.format(consortium=consortium, user=getpass.getuser(), grace=grace_s, **values)
    write_atomic(path, text.encode(), mode=0o644)
    return path, [
        f"sudo cp {path} /etc/systemd/system/{NAME}",
        "sudo systemctl daemon-reload",
        f"sudo systemctl enable --now {NAME}",
    ]
