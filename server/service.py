"""The systemd unit of `wardround server start`. Run by the coordinator; writes one file into its folder."""

from __future__ import annotations

from pathlib import Path

from ..common import service
from ..common.errors import ConfigError
from ..common.lm.packaged import cache_folder
from .coordinator import CoordinatorFolder

NAME = "wardround-coordinator.service"


def install(folder: CoordinatorFolder, grace_s: float) -> tuple[Path, list[str]]:
    """Writes the unit; gives the file, and the commands that enable it.

    Raises:
        ConfigError: the service could not open the key: no passphrase file is named; a path systemd cannot take.
    """
    if folder.passphrase_file is None:
        raise ConfigError(
            f"{folder.path / 'coordinator.toml'}: a service has nobody who sets WARDROUND_PASSPHRASE: name a file of "
            "mode 0600 with passphrase_file"
        )
    cache = cache_folder().resolve()  # models of packages are converted there, and the warm-up is kept
    unit = service.Service(
        name=NAME,
        title="wardround coordinator",
        start="server start",
        option="--coordinator",
        argument=folder.path,
        writable=(folder.path, cache),
        grace_s=grace_s,
        environment=(("WARDROUND_CACHE", cache),),
    )
    cache.mkdir(parents=True, exist_ok=True)
    return service.install(unit, folder.path)
