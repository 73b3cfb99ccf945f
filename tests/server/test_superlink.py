"""A whole run over Flower's own SuperLink and SuperNodes: the same adapter as in one process, every exchange on record.

Minutes long: each exchange starts a Python process at each site, and a SuperNode looks for messages every 3 s.
"""

import json
import shutil
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict
from wardround.client.app import app as client
from wardround.client.folder import Site
from wardround.common.config import RunConfig
from wardround.common.files import read_record
from wardround.server import app as server
from wardround.server.coordinator import ENVIRONMENT
from wardround.simulations.federation import InProcessGrid, divide, load_registry, write_sites

from .superlink_case import deployment, missing, write_bundle, write_coordinator

UPDATE = ["train.local", "query.shares", "query.mask", "query.survivors", "query.unmask"]
SITES = 3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(missing()), reason=f"Flower's commands are not beside this Python: {missing()}"),
]


def settings(base: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "trial",
            "privacy": {"enabled": False},
            "seed": 3,
            "model": {"id": str(base), "device": "cpu", "prompt": "en_short"},
            "warmup": {"enabled": False},
            "grpo": {"local_steps": 2, "patients_per_step": 4, "expectation": "exact", "learning_rate": 0.01},
            "federation": {"rounds": 1, "validation_questions_per_site": 0, "phase_timeout_s": 600},
            "evaluation": {"questions_per_site": 10, "bootstrap_samples": 100, "samples": 0},
            "simulation": {"registry": "synthetic", "sites": SITES},
        }
    )


def sites_of(folder: Path) -> list[Path]:
    return sorted((folder / "sites").glob("*/site.toml"))


def rounds(out: Path) -> list[dict[str, object]]:
    """rounds.jsonl without times."""
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("seconds")} for line in lines]


def test_a_run_over_flowers_own_processes_gives_the_adapter_of_the_run_in_one_process(
    tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = settings(tiny_model_path)
    wire, alone = tmp_path / "wire", tmp_path / "alone"
    wire.mkdir()
    registry = load_registry(config)
    write_sites(registry, divide(registry, config), config, wire / "sites")
    shutil.copytree(wire, alone)
    folder, other = (write_coordinator(one / "coordinator", config, one / "sites") for one in (wire, alone))

    fast = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}
    with deployment(tmp_path / "flower", sites_of(wire), folder, **fast) as running:
        run = running.submit(write_bundle(tmp_path / "bundle"), {"run": config.name})
        status = running.wait_for_run(run, timeout_s=1500)
        assert status == "finished:completed", running.logs()
    assert all(process.poll() is not None for process in running.processes.values())
    monkeypatch.setenv(ENVIRONMENT, str(other.path))
    server.main(InProcessGrid(client, sites_of(alone)), Context(0, 1, {}, RecordDict(), {"run": config.name}))

    wired, here = folder.run(config.name), other.run(config.name)
    name = "adapter/adapter_model.safetensors"
    assert (wired / name).read_bytes() == (here / name).read_bytes()
    evaluation = (wired / "evaluation.json").read_bytes()
    assert evaluation == (here / "evaluation.json").read_bytes()
    assert json.loads(evaluation)["final"]["n"] == SITES * config.evaluation.questions_per_site
    (line,) = rounds(wired)
    assert [line] == rounds(here)
    assert line["update_norm_l2"] and line["site_count"] == SITES and line["failures"] == {}
    digest = read_record(wired / "journal" / "finalize.record").values["model_digest"]
    for site in sites_of(wire):
        ledger = Site.open(site).ledger
        assert ledger.verify() == 1 + 5 + 1 + 5 + 5 + 1  # warm-up, counts, schema, update, test, final adapter
        entries = [entry for entry in ledger.entries() if entry["round"] == 1]
        assert [entry["phase"] for entry in entries][:5] == UPDATE
        assert {entry["kind"] for entry in entries} == {"egress"}
        (adapter,) = (site.parent / "state" / "runs").glob("*/adapter")
        assert (adapter / "digest.txt").read_text().strip() == digest
