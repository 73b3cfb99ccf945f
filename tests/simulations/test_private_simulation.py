"""A whole private run on the tiny model: what is spent, what leaves, and what happens when the budget ends."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wardround.client import payload
from wardround.client.folder import Site
from wardround.common import plan, sums
from wardround.common.config import RunConfig
from wardround.common.counts import Layout, Resolution
from wardround.common.noisy import OFFSET, results_noise
from wardround.common.privacy import Event, Filter
from wardround.common.secagg.keys import COUNTS, TEST, UPDATE
from wardround.server.tracking import SilentProgress
from wardround.simulations import federation

from .test_secure_simulation import Whole

pytestmark = pytest.mark.usefixtures("cheap_scrypt")

SITES = 3


def settings(base: Path, rounds: int = 2, **privacy: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "private",
            "seed": 3,
            "model": {"id": str(base), "device": "cpu", "prompt": "en_short"},
            "warmup": {"enabled": False},
            "questions": {"features_per_record": 4},
            "grpo": {"local_steps": 2, "patients_per_step": 4, "expectation": "exact", "learning_rate": 0.01},
            "federation": {"rounds": rounds, "validation_questions_per_site": 0},
            "evaluation": {"questions_per_site": 10, "bootstrap_samples": 100, "samples": 0},
            "privacy": {
                "enabled": True,
                "epsilon": 12.0,
                "delta": 1e-4,
                "max_grad_norm": 0.5,
                "declared_patients": 200,
                "schema_noise_multiplier": 2.0,
                "metrics_noise_multiplier": 2.0,
                **privacy,
            },
            "simulation": {"registry": "synthetic", "sites": SITES},
        }
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Whole:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(federation_scrypt(), "n", 2**4)
        return Whole(settings(tiny_model_path), tmp_path_factory.mktemp("private") / "run").run()


def federation_scrypt() -> dict[str, Any]:
    from wardround.common import identity

    return identity._SCRYPT


def sites(out: Path) -> list[Site]:
    return [Site.open(path) for path in sorted((out / "sites").glob("site-*/site.toml"))]


def test_every_site_spends_the_plan_and_nothing_else(whole: Whole):
    events = [event.to_json() for event in plan.events(whole.config)]
    assert [event["kind"] for event in events] == ["schema", "rounds", "rounds", "metrics"]
    for site in sites(whole.out):
        assert site.ledger.spent() == events
        site.ledger.verify()


def test_the_plan_fits_the_runs_epsilon_and_hardly_less_noise_would(whole: Whole):
    privacy, events = whole.config.privacy, plan.events(whole.config)
    (history,) = {json.dumps([one.orders for one in site.ledger.history()]) for site in sites(whole.out)}
    order = json.loads(history)[0]["plan"]
    budget = Filter(privacy.epsilon, privacy.delta, order)
    assert budget.affords(events[:-1], events[-1])
    less = [
        Event("rounds", e.noise_multiplier * 0.99, e.sample_rate, e.steps) if e.kind == "rounds" else e for e in events
    ]
    assert not budget.affords(less[:-1], less[-1])


def test_updates_say_nothing_of_who_was_drawn_and_results_nothing_exact(whole: Whole):
    for site in sites(whole.out):
        (folder,) = (site.state / "runs").iterdir()
        for index in (1, 2):
            given = payload.require(folder, index, UPDATE)
            known = dict(zip(sums.UPDATE_TAIL, given.tail.tolist(), strict=False))
            assert known == {**dict.fromkeys(sums.UPDATE_TAIL, 0), "weight": 1, "steps": 2}
            assert given.tail[len(sums.UPDATE_TAIL) :].tolist() == [0] * (whole.config.grpo.group_size + 1)
        counts = payload.require(folder, 0, COUNTS)
        assert counts.tail.tolist() == [200]  # as declared
        assert (counts.ring.view(np.int32) < 0).any()  # noise
        assert len(counts.ring) == Layout(site.dictionary, Resolution(24, 3)).size < Layout(site.dictionary).size / 4
        results = payload.require(folder, 2, TEST)
        assert len(results.tail) == 16 and np.abs(results.tail - OFFSET).max() < 100


def test_a_private_run_ends_with_all_its_files_and_says_what_its_results_are(whole: Whole):
    assert whole.evaluation["n"] >= 1 and 0 < whole.evaluation["chance"] < 1
    for name in ("schema.json", "evaluation.json", "report.html", "rounds.jsonl", "model/model.safetensors"):
        assert (whole.out / name).is_file(), name
    records = [json.loads(line) for line in (whole.out / "rounds.jsonl").read_text().splitlines()]
    assert [record["questions"] for record in records] == [0, 0]
    assert whole.evaluation["noise"] == results_noise(2.0, SITES)
    assert json.loads((whole.out / "privacy.json").read_text())["cost"]["half_interval"] > 0


def test_two_runs_with_one_seed_have_noise_of_their_own(whole: Whole, tmp_path: Path):
    class StoppedError(Exception):
        """The counts are there; the rest of the run would say nothing more."""

    class Counted(SilentProgress):
        def begin(self, phase: str, round_index: int, sites: object) -> None:
            if phase == "schema":
                raise StoppedError

    with pytest.raises(StoppedError):
        federation.simulate(whole.config, tmp_path / "run", resume=False, progress=Counted())
    mine, other = (sites(out)[0] for out in (whole.out, tmp_path / "run"))
    first, second = (
        payload.require(next((site.state / "runs").iterdir()), 0, COUNTS).ring.view(np.int32) for site in (mine, other)
    )
    assert not np.array_equal(first, second)


def test_a_site_whose_budget_ends_refuses_the_round_before_it_trains_and_the_run_goes_on(
    tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Budgets for 3 of 5 rounds at one site: with four sites, the others finish."""
    config = settings(tiny_model_path, rounds=5)
    config = config.model_copy(update={"simulation": config.simulation.model_copy(update={"sites": 4})})
    out = tmp_path / "run"
    write_sites = federation.write_sites

    def written(*args: Any, **kwargs: Any) -> None:
        write_sites(*args, **kwargs)
        limit(out, config, rounds=3)

    monkeypatch.setattr(federation, "write_sites", written)
    federation.simulate(config, out, resume=False)
    poor, *rich = sites(out)
    assert [event["kind"] for event in poor.ledger.spent()] == ["schema", "rounds", "rounds", "rounds"]
    assert all(len(site.ledger.spent()) == 7 for site in rich)
    (folder,) = (poor.state / "runs").iterdir()
    assert not (folder / "update-00004.record").exists()
    records = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert [record["site_count"] for record in records] == [4, 4, 4, 3, 3]
    log = (poor.state / "site.log").read_text()
    assert "policy.epsilon: this hospital allows" in log and "'rounds'" in log
    refused = [(entry["round"], entry["code"]) for entry in poor.ledger.entries() if entry["kind"] == "refusal"]
    assert refused[:2] == [(4, "refused"), (5, "refused")]
    report = json.loads((out / "privacy.json").read_text())
    assert [site["rounds"] for site in report["sites"].values()] == [3, 5, 5, 5]
    assert f"{poor.config.name} train of round 4 (refused)" in (out / "report.html").read_text()


def limit(out: Path, config: RunConfig, rounds: int) -> None:
    """Gives the first site a budget that holds the schema and so many rounds."""
    events = plan.events(config)
    from wardround.common.privacy import pin_order

    first = min((out / "sites").glob("site-*/site.toml"))
    low, high = 0.01, 50.0
    for _ in range(60):  # the smallest ε that affords schema and rounds: then one round more is not afforded
        middle = (low + high) / 2
        try:
            fits = Filter(middle, 1e-4, pin_order(events, middle, 1e-4)).affords(events[:rounds], events[rounds])
        except Exception:  # noqa: BLE001  too small for any order
            fits = False
        low, high = (low, middle) if fits else (middle, high)
    text = first.read_text()
    assert "[policy]" in text
    first.write_text(text.replace("[policy]", f"[policy]\nepsilon = {high * 1.0001}\ndelta = 1e-4", 1))


def test_the_privacy_report_says_what_the_run_cost_by_part_and_in_words(whole: Whole):
    report = json.loads((whole.out / "privacy.json").read_text())
    assert report["epsilon"]["prv"] <= report["epsilon"]["rdp"] <= report["epsilon_planned"] * 1.001
    assert set(report["components"]) == {"schema", "rounds", "metrics"}
    assert all(0 < part["prv"] < report["epsilon"]["prv"] for part in report["components"].values())
    assert [site["rounds"] for site in report["sites"].values()] == [2] * SITES
    page = (whole.out / "report.html").read_text()
    assert report["statement"] in page and "adds up across sites" in page and "is not accounted" in page
    assert "no patient-level guarantee" not in page.lower()
