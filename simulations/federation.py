"""n hospitals and a coordinator in one process: the same ClientApp and ServerApp over an in-process Flower `Grid`.

Run on one machine, by `wardround simulate`. Enters: a run config. Leaves: the run folder. Nothing is simplified but the
wire: each site is a folder as a hospital has it, written once and read back for every message, so memory does not grow
with the number of sites, and one base model is in memory. The registries are open or synthetic ones, and the sites'
policies say so (`simulated = true`); a private table is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from ..client.registry import Registry, read_registry, to_registry, write_registry
from ..common.config import PolicyConfig, RunConfig, SiteConfig, to_toml
from ..common.dictionary import dump_dictionary, load_dictionary
from ..common.errors import ConfigError
from ..common.lm.packaged import resolve, weight_files
from ..common.seeds import derive, derive_rng, derive_seed
from ..server.journal import check_disk, check_folder, open_journal
from ..server.tracking import Progress, SilentProgress
from . import registries
from .partition import partition, site_names

__all__ = ["InProcessGrid", "SilentProgress", "simulate"]

SYNTHETIC_PATIENTS = 2000
_COORDINATOR_NODE = 1


class InProcessGrid(Grid):
    """A Flower grid whose nodes live in this process: an instruction is carried out when its reply is pulled.

    So at most one reply is in memory. Node ids are 2, 3, … in the order of `sites`.
    """

    def __init__(self, client: ClientApp, sites: Sequence[Path]) -> None:
        self._client = client
        self._contexts = {
            node: Context(0, node, {"site": str(path)}, RecordDict(), {})
            for node, path in enumerate(sites, start=_COORDINATOR_NODE + 1)
        }
        self._waiting: dict[str, Message] = {}
        self._sent = 0
        self.set_run(Run.create_empty(0))

    def set_run(self, run: Run) -> None:
        """Names the run in this process: Flower's messages read it from there."""
        self._run = run
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, run.run_id, _COORDINATOR_NODE

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Takes messages in; nothing runs yet."""
        ids: list[str] = []
        for message in messages:
            self._sent += 1
            message_id = f"message-{self._sent}"
            message.metadata.__dict__["_message_id"] = message_id  # as Flower's own grids do: it has no setter
            self._waiting[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Carries out each instruction and yields its reply."""
        for message_id in message_ids:
            message = self._waiting.pop(message_id)
            yield self._client(message, self._contexts[message.metadata.dst_node_id])

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return list(self.pull_messages(self.push_messages(messages)))


def simulate(config: RunConfig, out: Path, *, resume: bool, progress: Progress | None = None) -> dict[str, Any]:
    """A whole run on this machine: registry → sites' folders → rounds → final model → report.

    Args:
        config: the run.
        out: its folder; new or empty, or a run of this very config with `resume`.
        resume: continue the run in `out`.
        progress: who is told what happens.

    Returns:
        The content of evaluation.json.

    Raises:
        RunFolderError: `out` holds another run or config, or the disk is too small.
        UserError: registry, dictionary, model or config are not usable; nothing was written then.
        QuorumError: too few sites finished a phase.
    """
    from ..client.app import app as client
    from ..server.app import run

    continued = check_folder(out, config, resume)
    model = resolve(config.model.id)
    sites = out / "sites"
    if not (continued and sites.is_dir()):
        registry = load_registry(config)
        parts = divide(registry, config)
        check_disk(out, _needed_bytes(config, sum(file.stat().st_size for file in weight_files(model))))
        # The folder becomes this run's before anything else is in it: a kill from here on can be resumed.
        open_journal(out, config, resume).close()
        write_sites(registry, parts, config, sites)
        del registry, parts
    paths = sorted(sites.glob("*/site.toml"))
    dictionary = load_dictionary(paths[0].parent / "dictionary.toml")
    grid = InProcessGrid(client, paths)
    return run(grid, config, dictionary, out, resume=True, simulated=True, progress=progress)


def _needed_bytes(config: RunConfig, base_bytes: int) -> int:
    """A generous estimate: the merged model, adapters in journal and sites (a tenth of the base each), and tables."""
    adapter = base_bytes if config.lora.strategy == "full" else base_bytes // 10
    return base_bytes + adapter * (8 + 3 * config.simulation.sites) + 50_000_000


def load_registry(config: RunConfig) -> Registry:
    """The registry that the config names: a built one, "synthetic", or a table with its dictionary.

    Raises:
        RegistryError, DictionaryError: missing or malformed.
        ConfigError: the dictionary is missing, or does not say that the registry is public.
    """
    settings = config.simulation
    if settings.registry == "synthetic":
        registry = _synthetic(config)
    elif settings.dictionary is not None:
        registry = read_registry(Path(settings.registry), load_dictionary(Path(settings.dictionary)))
    elif settings.registry in registries.NAMES:
        registry = registries.load(settings.registry)
    else:
        known = ", ".join(("synthetic", *registries.NAMES))
        raise ConfigError(
            f"simulation.registry = '{settings.registry}': expected one of {known}, or a table's path together with "
            "simulation.dictionary"
        )
    if not registry.dictionary.public:
        raise ConfigError(
            f"dictionary '{registry.dictionary.name}': public = false; a simulation sends updates in the clear and "
            "shows samples, so it takes open or synthetic registries only (public = true in the dictionary)"
        )
    return registry


def _synthetic(config: RunConfig) -> Registry:
    import pyarrow as pa

    from .synthetic_registry import make

    table, dictionary = make(SYNTHETIC_PATIENTS, derive_seed(config.seed, "synthetic registry"))
    return to_registry("synthetic", pa.Table.from_pandas(table, preserve_index=False), dictionary)


def divide(registry: Registry, config: RunConfig) -> list[np.ndarray]:
    """Rows of every site."""
    settings = config.simulation
    return partition(
        registry,
        settings.sites,
        settings.partition,
        feature=settings.partition_feature,
        alpha=settings.dirichlet_alpha,
        rng=derive_rng(config.seed, "partition"),
    )


def write_sites(registry: Registry, parts: Sequence[np.ndarray], config: RunConfig, folder: Path) -> None:
    """One folder a site, as a hospital has it: table, dictionary, site.toml; all of them or none.

    The split key follows from the run's seed and is the same for all sites, so whether a patient is held out does not
    depend on how the registry is divided.
    """
    making = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    dictionary = dump_dictionary(registry.dictionary)
    key = derive(config.seed, "split key", size_bytes=32).hex()
    for name, rows in zip(site_names(len(parts)), parts, strict=True):
        site = making / name
        site.mkdir()
        write_registry(registry.take(rows), site / "registry.parquet")
        (site / "dictionary.toml").write_text(dictionary, encoding="utf-8")
        settings = SiteConfig(
            name=name,
            table="registry.parquet",
            dictionary="dictionary.toml",
            split_key=key,
            policy=PolicyConfig(simulated=True, share_samples=registry.dictionary.public),
        )
        (site / "site.toml").write_text(to_toml(settings), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    making.rename(folder)
