"""A systemd unit that runs one of the `start` commands, for `--install-service` of both roles.

Enters: a party's folder and command. Leaves: one file in that folder, mode 0644, without a secret; nothing else is
changed. The service may write the folders that it is given and nothing else of the machine.
"""

from __future__ import annotations

import getpass
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError
from .files import write_atomic

_UNIT = """\
# {title}. Written by `wardround {start} --install-service`.
[Unit]
Description={title}
After=network-online.target
Wants=network-online.target

[Service]
Type=exec
User={user}
ExecStart="{program}" {start} {option} "{argument}"
Restart=on-failure
RestartSec=10
# A mistake that only a person can mend: starting again cannot help.
RestartPreventExitStatus=2
# What is under way may finish.
KillMode=mixed
TimeoutStopSec={grace:.0f}
UMask=0077
LimitNOFILE=8192
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={writable}
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
LockPersonality=yes
{environment}
[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True)
class Service:
    """What a unit runs.

    Attributes:
        name: of the unit, "wardround-north.service".
        title: for people, one line.
        start: the command behind `wardround`, "client start".
        option: of it that names where.
        argument: where.
        writable: folders that it may write.
        grace_s: time to end in, seconds.
        environment: for the process; nothing secret.
    """

    name: str
    title: str
    start: str
    option: str
    argument: Path
    writable: Sequence[Path]
    grace_s: float
    environment: Sequence[tuple[str, Path]] = ()


def install(service: Service, folder: Path) -> tuple[Path, list[str]]:
    """Writes the unit into a folder.

    Returns:
        The file, and the commands that enable it, which need root.

    Raises:
        ConfigError: a path that systemd cannot take.
    """
    program, environment = Path(sysconfig.get_path("scripts")) / "wardround", dict(service.environment)
    for path in (service.argument, *service.writable, program, *environment.values()):
        if set(str(path)) & set('"\\%$\n'):
            raise ConfigError(f"{path}: systemd takes no quote, backslash, percent or dollar sign in a path")
    text = _UNIT.format(
        title=service.title,
        start=service.start,
        user=getpass.getuser(),
        program=program,
        option=service.option,
        argument=service.argument,
        grace=service.grace_s,
        writable=" ".join(f'"{path}"' for path in service.writable),
        environment="".join(f'Environment={name}="{path}"\n' for name, path in environment.items()),
    )
    written = folder / service.name
    write_atomic(written, text.encode(), mode=0o644)
    return written, [
        f"sudo cp {written} /etc/systemd/system/{service.name}",
        "sudo systemctl daemon-reload",
        f"sudo systemctl enable --now {service.name}",
    ]
