"""Cuts the open registry of a run's [simulation] as `wardround simulate deploy` does; writes one part of it.

    python tables.py CONFIG dictionary FILE       the consortium's dictionary
    python tables.py CONFIG SITE FILE             one hospital's table, Parquet

Run by the set-up containers of docker/compose.yaml. Enters: an open registry, of an installed package. Private:
nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

from wardround.client.registry import write_registry
from wardround.common.config import load_run
from wardround.common.dictionary import dump_dictionary
from wardround.simulations.federation import divide, load_registry
from wardround.simulations.partition import site_names


def main(config: str, what: str, file: Path) -> None:
    """Entry; everybody cuts alike, for the cut follows from the config's seed."""
    settings = load_run(Path(config))
    registry = load_registry(settings)
    if what == "dictionary":
        file.write_text(dump_dictionary(registry.dictionary), encoding="utf-8")
        return
    parts = divide(registry, settings)
    write_registry(registry.take(parts[site_names(len(parts)).index(what)]), file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
