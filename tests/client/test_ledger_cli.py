"""`wardround client ledger` and `policy explain`: what a privacy officer sees."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from wardround.client.folder import Site
from wardround.client.ledger import Ledger
from wardround.client.policy_words import explain
from wardround.common.cli import main
from wardround.common.config import IdentityConfig, PolicyConfig, SiteConfig, load_site, packaged, to_toml
from wardround.common.identity import Card, Identity
from wardround.common.key_file import write_key
from wardround.common.receipt import Receipt
from wardround.common.roster import Roster

from .ledger_case import COORDINATOR, RUN, event, receipt_for

pytestmark = pytest.mark.usefixtures("cheap_scrypt")

SECRET = b"correct horse battery"


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command."""
    try:
        main([str(arg) for arg in args])
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def site_toml(tmp_path: Path) -> Path:
    """A hospital with an identity and a pinned roster; no table."""
    identity = Identity.from_seed(b"n" * 32)
    others = [Card.make(Identity.from_seed(seed * 32), f"site-{seed.decode()}") for seed in (b"s", b"e")]
    roster = Roster.first(COORDINATOR, "trial", [Card.make(identity, "north"), *others])
    (tmp_path / "state").mkdir()
    write_key(tmp_path / "state" / "identity.pem", identity, SECRET)
    (tmp_path / "roster.json").write_text(roster.to_json())
    (tmp_path / "passphrase.txt").write_bytes(SECRET)
    (tmp_path / "passphrase.txt").chmod(0o600)
    pinned = IdentityConfig(roster_digest=roster.digest.hex(), passphrase_file="passphrase.txt")
    config = SiteConfig(name="north", table="t.csv", dictionary="d.toml", identity=pinned)
    (tmp_path / "site.toml").write_text(to_toml(config))
    return tmp_path / "site.toml"


def filled(site_toml: Path) -> Ledger:
    """Five entries: a reply, a refusal, a budget event, a reply with a receipt, a reply."""
    ledger = Site.open(site_toml).ledger
    about: dict[str, Any] = {"run_id": RUN, "phase": "train.local", "purpose": "statistics", "size_bytes": 1000}
    ledger.append("egress", round_index=1, sha256="1" * 64, **about)
    ledger.append("refusal", round_index=1, sha256="2" * 64, code="refused", **about)
    ledger.spend(event(), RUN, 2, "noised training")
    second = list(ledger.entries())[1]
    ledger.append("egress", round_index=2, sha256="3" * 64, receipt=ledger.confirm(receipt_for(second, 2)), **about)
    ledger.append("egress", round_index=3, sha256="4" * 64, **about)
    return ledger


def test_the_ledger_is_shown_a_line_an_entry(site_toml: Path, capsys: pytest.CaptureFixture[str]):
    ledger = filled(site_toml)
    code, out, _ = run(capsys, "client", "ledger", "show", site_toml)
    assert code == 0 and "5 entries" in out and "refusal: refused" in out and "2,000" in out and "abababab" in out
    assert "spend: rounds (noise_multiplier 1.5, sample_rate 0.01, steps 4), noised training" in out
    for entry, line in zip(ledger.entries(), out.splitlines()[2:], strict=True):  # whole, however wide it is
        assert line.split()[:3] == [str(entry["n"]), *entry["time"][:19].split("T")]
    code, out, _ = run(capsys, "client", "ledger", "show", site_toml, "--json")
    assert code == 0 and [json.loads(line) for line in out.splitlines()] == list(ledger.entries())


def test_verify_says_whose_it_is_what_was_confirmed_and_what_it_cannot_know(
    site_toml: Path, capsys: pytest.CaptureFixture[str]
):
    ledger = filled(site_toml)
    code, out, _ = run(capsys, "client", "ledger", "verify", site_toml)
    fingerprint = Identity.from_seed(b"n" * 32).fingerprint
    assert code == 0 and out.splitlines() == [
        f"{ledger.path}: 5 entries, each as it was written",
        f"signed by {fingerprint}",
        "the coordinator confirmed 1 reply, the last of them line 2",
        "whether entries after line 5 were cut off, this ledger cannot show: the coordinator's receipts can "
        "(--receipts), up to its newest",
    ]


def test_verify_needs_no_passphrase(
    site_toml: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    filled(site_toml)
    (site_toml.parent / "passphrase.txt").unlink()
    monkeypatch.delenv("WARDROUND_PASSPHRASE", raising=False)
    for command in ("verify", "show", "export"):
        assert run(capsys, "client", "ledger", command, site_toml)[0] == 0


def test_a_changed_ledger_ends_every_command_with_its_first_bad_line(
    site_toml: Path, capsys: pytest.CaptureFixture[str]
):
    ledger = filled(site_toml)
    ledger.path.write_bytes(ledger.path.read_bytes().replace(b'"round":2', b'"round":7'))
    for command in ("show", "verify", "export"):
        code, out, err = run(capsys, "client", "ledger", command, site_toml)
        said = "line 3 was changed, or this site did not write it: its signature is wrong"
        assert (code, out, err) == (2, "", f"error: {ledger.path}: {said}\n")


def receipts_file(folder: Path, *receipts: Receipt) -> Path:
    path = folder / "receipts.jsonl"
    path.write_text('{"start":1}\n' + "".join(receipt.to_json() + "\n" for receipt in receipts))
    return path


def test_a_cut_tail_is_found_with_the_coordinators_receipts(site_toml: Path, capsys: pytest.CaptureFixture[str]):
    ledger = filled(site_toml)
    entries = list(ledger.entries())
    path = receipts_file(
        site_toml.parent, receipt_for(entries[0], 1), receipt_for(entries[1], 9, "south"), receipt_for(entries[4], 4)
    )
    code, out, _ = run(capsys, "client", "ledger", "verify", site_toml, "--receipts", path)
    assert code == 0 and out.splitlines()[-1] == f"{path}: 2 receipts for north, each for a reply that is in the ledger"
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    assert run(capsys, "client", "ledger", "verify", site_toml)[0] == 0  # whole by itself
    code, _, err = run(capsys, "client", "ledger", "verify", site_toml, "--receipts", path)
    assert code == 2 and "the coordinator received 4 replies of this run, the last in round 3" in err


def test_receipts_that_are_not_the_coordinators_are_refused(site_toml: Path, capsys: pytest.CaptureFixture[str]):
    ledger = filled(site_toml)
    forged = receipt_for(next(ledger.entries()), 1).signed(Identity.generate())
    code, _, err = run(
        capsys, "client", "ledger", "verify", site_toml, "--receipts", receipts_file(site_toml.parent, forged)
    )
    assert code == 2 and "receipt 1: wrong signature" in err
    (site_toml.parent / "bad").write_text("hello\n")
    for name, said in (("bad", "line 1 is not a receipt"), ("none", "expected a file of receipts")):
        code, _, err = run(capsys, "client", "ledger", "verify", site_toml, "--receipts", site_toml.parent / name)
        assert code == 2 and said in err and err.count("\n") == 1


def test_receipts_in_the_ledger_are_checked(site_toml: Path, capsys: pytest.CaptureFixture[str]):
    ledger = filled(site_toml)
    first = next(ledger.entries())
    forged = receipt_for(first, 1).signed(Identity.generate())
    held = {"n": 1, "number": 1, "signature": forged.signature.hex()}
    about: dict[str, Any] = {"run_id": RUN, "phase": "p", "purpose": "p", "size_bytes": 1, "sha256": "5" * 64}
    ledger.append("egress", round_index=3, receipt=held, **about)
    code, out, _ = run(capsys, "client", "ledger", "verify", site_toml)
    assert code == 0 and "confirmed 1 reply, the last of them line 2; 1 more are signed by another key" in out
    ledger.append("egress", round_index=3, receipt={**held, "n": 99}, **about)
    code, _, err = run(capsys, "client", "ledger", "verify", site_toml)
    assert code == 2 and "line 7: its receipt is for line 99, which is not before it" in err


def test_an_export_holds_every_entry_as_a_table_or_as_json(site_toml: Path, capsys: pytest.CaptureFixture[str]):
    ledger = filled(site_toml)
    entries = list(ledger.entries())
    out = site_toml.parent / "out" / "ledger.csv"
    code, printed, err = run(capsys, "client", "ledger", "export", site_toml, "--out", out)
    assert (code, printed, err) == (0, "", f"{out}: 5 entries\n")
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [row["n"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert set(rows[0]) >= {key for entry in entries for key in entry}
    assert json.loads(rows[2]["event"]) == event() and rows[3]["total"] == "2000"
    assert run(capsys, "client", "ledger", "export", site_toml, "--out", out)[0] == 2  # never over a file
    code, printed, _ = run(capsys, "client", "ledger", "export", site_toml, "--format", "jsonl", "--run", RUN[:6])
    assert [json.loads(line) for line in printed.splitlines()] == entries
    assert run(capsys, "client", "ledger", "export", site_toml, "--run", "f" * 32)[1].count("\n") == 1


def test_a_site_that_sent_nothing_has_an_empty_ledger_and_gets_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "site.toml").write_text('name = "east"\ntable = "t.csv"\ndictionary = "d.toml"\n')
    assert "0 entries" in run(capsys, "client", "ledger", "verify", tmp_path / "site.toml")[1]
    assert "0 entries" in run(capsys, "client", "ledger", "show", tmp_path / "site.toml")[1]
    assert not (tmp_path / "state").exists()


# ---- the policy in sentences


def sentences(**limits: Any) -> dict[str, str]:
    return dict(explain(PolicyConfig(**limits)))


def test_every_limit_has_a_sentence_whether_it_is_set_or_not():
    everything = {
        "epsilon": 3.0, "epsilon_per_run": 1.0, "delta": 1e-5, "min_noise_multiplier": 0.7, "max_grad_norm": 0.5,
        "require_privacy": True, "tasks": ("counts",), "targets_allowed": ("age",), "targets_never_asked": ("sex",),
        "min_training_patients": 50, "min_test_patients": 30, "min_level_patients": 5, "opt_out": "left.txt",
        "max_bytes_per_run": 10**9,
        "hours": "20:00-06:00", "allowed_models": ("ab" * 32,), "repeat_with_others": True, "share_samples": True,
        "simulated": True, "min_sites": 7, "colluders": 3, "max_rounds": 11, "max_local_steps": 12, "max_runs": 13,
        "max_upload_bytes": 14,
    }  # fmt: skip
    assert set(everything) == set(PolicyConfig.model_fields) == set(sentences())
    off, on = sentences(), sentences(**everything)
    for name, value in everything.items():
        assert off[name].endswith(".") and on[name].endswith("."), name
        assert off[name] != on[name], f"{name} = {value}: the sentence does not change"
    for name, shown in {
        "epsilon": "ε = 3 at δ = 1e-05", "epsilon_per_run": "ε = 1", "min_noise_multiplier": "at least 0.7",
        "max_grad_norm": "at most 0.5", "targets_allowed": "'age'", "targets_never_asked": "'sex'",
        "min_training_patients": "50", "min_test_patients": "30", "min_level_patients": "5 patients",
        "opt_out": "left.txt", "max_bytes_per_run": "1,000,000,000", "hours": "20:00-06:00",
        "allowed_models": "ab" * 32, "min_sites": "7",
        "colluders": "3", "max_rounds": "11", "max_local_steps": "12", "max_runs": "13", "max_upload_bytes": "14",
    }.items():  # fmt: skip
        assert shown in on[name], name


def test_limits_that_are_off_are_said_to_be():
    off = sentences()
    assert off["allowed_models"] == "Any base model is accepted."
    assert off["hours"] == "Work begins at any hour."
    assert off["epsilon"] == "No total privacy budget is set, so no private run is accepted: set epsilon and delta."
    assert off["require_privacy"].startswith("Only runs with differential privacy")
    assert "WITHOUT" in sentences(require_privacy=False)["require_privacy"]
    assert sentences(tasks=())["tasks"] == "Nothing may be computed of patients."


def test_explain_prints_them(site_toml: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    code, out, _ = run(capsys, "client", "policy", "explain", site_toml)
    assert code == 0 and out.startswith(f"north, {site_toml}: what this hospital allows\n")
    found = explain(load_site(site_toml).policy)
    assert [re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in out.splitlines()[2:]] == [
        list(one) for one in found
    ]
    monkeypatch.chdir(site_toml.parent)
    code, out, _ = run(capsys, "client", "policy", "explain", "--json")
    assert code == 0 and json.loads(out) == dict(found)


def test_the_example_site_is_explained(capsys: pytest.CaptureFixture[str]):
    code, out, _ = run(capsys, "client", "policy", "explain", packaged("", "site.example.toml"))
    assert code == 0 and "differential privacy" in out
