"""n hospitals and a coordinator in one process: the same ClientApp and ServerApp over an in-process Flower `Grid`.

Run on one machine, by `wardround simulate`. Enters: a run config. Leaves: the run folder. Nothing is simplified but the
wire: each site is a folder as a hospital has it, written once and read back for every message, so memory does not grow
with the number of sites, and one base model is in memory. Sums are secure sums, with identities and a roster made for
the run; only who verified whom is made up, and the passphrases lie beside the keys. The registries are open or
synthetic ones, and the sites' policies say so (`simulated = true`); a private table is refused.
"""

from __future__ import annotations

import secrets
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

from ..client.identity import read_roster
from ..client.registry import Registry, read_registry, split_rows, to_registry, write_registry
from ..common.adapter import Manifest
from ..common.config import IdentityConfig, PolicyConfig, RunConfig, SiteConfig, to_toml
from ..common.counts import count
from ..common.dictionary import check_reviewed, dump_dictionary, load_dictionary
from ..common.errors import ConfigError, RunFolderError, UserError
from ..common.files import private_folder, write_atomic
from ..common.identity import Card, Identity
from ..common.key_file import passphrase, read_key, write_key
from ..common.lm.packaged import resolve, weight_files
from ..common.roster import Roster
from ..common.schema import derive_schema
from ..common.seeds import derive, derive_rng, derive_seed
from ..server.aggregation import SecureSums, Sums
from ..server.journal import check_disk, check_folder, open_journal, round_phase
from ..server.phases import Consortium
from ..server.tracking import Progress, SilentProgress
from . import registries
from .partition import partition, site_names
from .plain import PlainSums

__all__ = ["InProcessGrid", "SilentProgress", "simulate"]

SYNTHETIC_PATIENTS = 2000
ROSTER, PASSPHRASE, COORDINATOR = "roster.json", "passphrase.txt", "coordinator.pem"
_COORDINATOR_NODE = 1
_ANY_BYTES = 2**62  # what a simulated site sends stays on this machine


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


def simulate(
    config: RunConfig,
    out: Path,
    *,
    resume: bool,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """A whole run on this machine: registry → sites' folders → rounds → final model → report.

    Args:
        config: the run.
        out: its folder; new or empty, or a run of this very config with `resume`.
        resume: continue the run in `out`.
        progress: who is told what happens, at the sites as well.

    Returns:
        The content of evaluation.json.

    Raises:
        RunFolderError: `out` holds another run or config, or the disk is too small.
        UserError: registry, dictionary, model, prompt or config are not usable; a new run leaves nothing then, so that
            the corrected command works.
        QuorumError: too few sites finished a phase.
    """
    from ..client import site
    from ..client.app import app as client
    from ..server.app import run

    was_there = out.exists()
    check_folder(out, config, resume)
    made = None if _site_files(out, config) else prepare(config, out)
    with open_journal(out, config, resume) as journal:
        try:
            # Under the lock, and looked at again: another process may have been here before it was taken.
            if made is not None and not _site_files(out, config):
                write_sites(*made, config, out / "sites")
            del made
            paths = _site_files(out, config)
            dictionary = load_dictionary(paths[0].parent / "dictionary.toml")
            site.on_work = None if progress is None else progress.at_site
            grid = InProcessGrid(client, paths)

            def make_sums(consortium: Consortium) -> Sums:
                if config.federation.secure_aggregation == "none":
                    return PlainSums(consortium, {path.parent.name: path for path in paths})
                roster = read_roster(out / "sites" / ROSTER)
                return SecureSums(consortium, roster)

            return run(
                grid,
                config,
                dictionary,
                out,
                journal,
                make_sums=make_sums,
                identity=_coordinator(out / "sites"),
                split_key=split_key(config),
                progress=progress,
            )
        except UserError:
            if not journal.resumed and not journal.has(round_phase(1, "apply")):
                _take_back(out, was_there)
            raise
        finally:
            site.on_work = None


def _coordinator(folder: Path) -> Identity:
    """The key that signed the roster of the simulated sites, and signs their receipts."""
    return read_key(folder / COORDINATOR, passphrase(folder / PASSPHRASE, {}, PASSPHRASE))


def _site_files(out: Path, config: RunConfig) -> list[Path]:
    """The site.toml of every site; none where they are still to be written.

    Raises:
        RunFolderError: some are missing.
    """
    paths = sorted((out / "sites").glob("*/site.toml"))
    if paths and len(paths) != config.simulation.sites:
        raise RunFolderError(
            f"{out / 'sites'}: expected {config.simulation.sites} sites with their site.toml, found {len(paths)}; "
            "remove the folder, and --resume writes all of them again"
        )
    return paths


def _take_back(out: Path, was_there: bool) -> None:
    """Removes what a new run wrote: the folder was empty, or not there at all."""
    for item in out.iterdir():
        if item.is_dir():
            shutil.rmtree(item)
        else:
            item.unlink()
    if not was_there:
        out.rmdir()


def prepare(config: RunConfig, out: Path) -> tuple[Registry, list[np.ndarray]]:
    """Registry and rows of every site, after a look at all that a person can get wrong; writes nothing.

    Raises:
        ConfigError, RegistryError, DictionaryError, ModelError: not usable; as the run itself would find out later.
        RunFolderError: not enough disk.
        VerificationError: the released warm-up adapter is not the one that was released.
    """
    from ..common.lm import models
    from ..server.warmup import load_released

    n_sites, least, most = config.simulation.sites, config.federation.min_sites, config.federation.max_sites
    if n_sites > most:
        raise ConfigError(f"simulation.sites = {n_sites}: expected at most federation.max_sites = {most}")
    if n_sites < least:
        raise ConfigError(
            f"simulation.sites = {n_sites}: expected at least federation.min_sites = {least}, else no phase is complete"
        )
    resolve(config.model.id)
    models.pick_device(config.model.device)
    registry = load_registry(config)
    parts = divide(registry, config)
    splits = split_rows(registry, bytes.fromhex(split_key(config)))
    able = sum(bool(np.isin(rows, splits["train"]).any()) for rows in parts)
    if able < least:
        raise ConfigError(
            f"simulation.sites = {n_sites}: only {able} have a training patient, expected at least "
            f"federation.min_sites = {least}; use fewer sites or a larger registry"
        )
    everyone = np.concatenate(parts)
    if not np.isin(everyone, splits["test"]).any():
        raise ConfigError(f"simulation.registry = '{config.simulation.registry}': no patient is left for the test")
    training = everyone[np.isin(everyone, splits["train"])]
    counts = count({name: column[training] for name, column in registry.values.items()}, registry.dictionary)
    derive_schema(counts, registry.dictionary, config.questions)
    lm = models.shared(config.model, config.lora, config.seed)  # the one that the run uses
    if config.warmup.enabled and config.warmup.adapter is not None:
        load_released(config.warmup.adapter, lm)
    base_bytes = sum(file.stat().st_size for file in weight_files(lm.path))
    check_disk(out, needed_bytes(config, base_bytes, lm.manifest))
    return registry, parts


def needed_bytes(config: RunConfig, base_bytes: int, manifest: Manifest) -> int:
    """Disk that a whole run takes, estimated a little high.

    Args:
        config: the run's.
        base_bytes: weights of the base model, and so of the merged one.
        manifest: of the adapter.
    """
    full, trainable = 4 * manifest.total_size, 4 * manifest.size
    moments = 4 * trainable if config.federation.server_optimizer == "fedadam" else 0  # two vectors of float64
    journal = full + 3 * (trainable + moments)  # round 0; the round kept, the newest, and one being written
    site = 2 * full + 3 * trainable  # round 0 and the final adapter; two updates, and one being written
    return base_bytes + full + journal + config.simulation.sites * site + 50_000_000  # and tables, reports, logs


def split_key(config: RunConfig) -> str:
    """The key that all simulated sites divide their patients with, hex.

    It follows from the run's seed and is the same for all sites, so whether a patient is held out does not depend on
    how the registry is divided. Only open registries are simulated, so it is no secret.
    """
    return derive(config.seed, "split key", size_bytes=32).hex()


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
            f"dictionary '{registry.dictionary.name}': public = false; a simulation has all sites on one machine and "
            "shows samples, so it takes open or synthetic registries only (public = true in the dictionary)"
        )
    if config.privacy.enabled:
        check_reviewed(registry.dictionary)
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
    """One folder a site, as a hospital has it: table, dictionary, identity, roster, site.toml; all of them or none.

    The sites' own limits are what this run needs: a simulation does not stop at a hospital's. All have verified all.
    """
    making = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    dictionary, names = dump_dictionary(registry.dictionary), site_names(len(parts))
    identities = {name: Identity.generate() for name in names}
    cards = [Card.make(identity, name) for name, identity in identities.items()]
    coordinator, secret = Identity.generate(), secrets.token_hex(16).encode()
    roster = Roster.first(coordinator, f"simulation-{config.name}", cards)
    (making / ROSTER).write_text(roster.to_json(), encoding="utf-8")
    write_atomic(making / PASSPHRASE, secret)
    write_key(making / COORDINATOR, coordinator, secret)
    for name, rows in zip(names, parts, strict=True):
        site = making / name
        private_folder(site / "state")
        secret = secrets.token_hex(16).encode()
        write_atomic(site / PASSPHRASE, secret)
        write_key(site / "state" / "identity.pem", identities[name], secret)
        write_registry(registry.take(rows), site / "registry.parquet")
        (site / "dictionary.toml").write_text(dictionary, encoding="utf-8")
        settings = SiteConfig(
            name=name,
            table="registry.parquet",
            dictionary="dictionary.toml",
            split_key=split_key(config),
            identity=IdentityConfig(
                roster=f"../{ROSTER}",
                roster_digest=roster.digest.hex(),
                verified=tuple(card.fingerprint for card in cards),
                passphrase_file=PASSPHRASE,
            ),
            policy=PolicyConfig(
                simulated=True,
                share_samples=registry.dictionary.public,
                max_rounds=config.federation.rounds,
                max_local_steps=config.grpo.local_steps,
                max_upload_bytes=_ANY_BYTES,
                colluders=config.federation.colluders,
            ),
        )
        (site / "site.toml").write_text(to_toml(settings), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    making.rename(folder)
