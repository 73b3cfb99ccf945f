"""Imports stay cheap and on their side of the fence (DESIGN.md §2, docs/architecture.md)."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "trl", "transformers", "peft", "flwr", "opacus", "pandas", "sklearn")


def loaded_by(module: str) -> set[str]:
    """The top-level packages in sys.modules after importing `module` in a fresh interpreter."""
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "messages",
        "config",
        "dictionary",
        "schema",
        "question",
        "adapter",
        "statistics",
        "errors",
        "cli",
        "identity",
        "roster",
        "key_file",
        "fixedpoint",
        "ledger",
        "noisy",
        "plan",
        "privacy",  # Opacus's accountants, which load torch, are imported when they are asked
        "receipt",
        "sums",
        "secagg.keys",
        "secagg.shamir",
        "secagg.prg",
        "secagg.masking",
        "secagg.client_state",
        "secagg.server_state",
    ],
)
def test_common_loads_nothing_heavy(module: str) -> None:
    assert not loaded_by(f"wardround.common.{module}") & set(HEAVY)


@pytest.mark.parametrize("module", ["client.sharing", "client.payload", "client.gate", "server.aggregation"])
def test_secure_sums_load_nothing_heavy_but_what_reads_tables(module: str) -> None:
    assert not loaded_by(f"wardround.{module}") & set(HEAVY) - {"pandas"}


@pytest.mark.parametrize("module", ["client.cli", "server.cli", "simulations.cli"])
def test_command_groups_load_nothing_heavy_until_a_command_runs(module: str) -> None:
    assert not loaded_by(f"wardround.{module}") & set(HEAVY)


def test_the_folders_keep_to_their_side() -> None:
    lint = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([str(lint)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_help_imports_no_command_group() -> None:
    code = (
        "import sys\nfrom wardround.common.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted(n for n in sys.modules if n.startswith('wardround.')), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "wardround.client" not in done.stderr and "wardround.simulations" not in done.stderr
