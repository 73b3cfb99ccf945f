"""Patients who opted out: gone before anything is counted, and a list that is not one stops everything."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from wardround.client.folder import Site
from wardround.client.opt_out import NOBODY, read_opt_out
from wardround.client.registry import to_registry
from wardround.common.cli import main
from wardround.common.config import RunConfig
from wardround.common.errors import RefusedError
from wardround.simulations.federation import write_sites
from wardround.simulations.synthetic_registry import make

pytestmark = pytest.mark.usefixtures("cheap_scrypt")

TABLE, DICTIONARY = make(120, seed=2)
REGISTRY = to_registry("synthetic", pa.Table.from_pandas(TABLE, preserve_index=False), DICTIONARY)
IDS = sorted(set(REGISTRY.patients.tolist()))
SECRET = "patient-4711"


def listed(folder: Path, text: str | bytes) -> Path:
    path = folder / "left.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a\nb\n", {"a", "b"}),
        ("a\r\nb", {"a", "b"}),
        ("\n  a  \n\n\tb\n", {"a", "b"}),
        ('"a";\nb,,,\n', {"a", "b"}),
        ("pid\na\n", {"a"}),
        ("a\npid\n", {"a", "pid"}),  # a heading is in the first line alone
        ("007\n7.0\n-3\n", {"007", "7", "-3"}),
        ("\ufeffa\n", {"a"}),
        ("", set()),
    ],
)
def test_ids_are_read_as_cells_of_the_table_are(tmp_path: Path, text: str, ids: set[str]):
    assert read_opt_out(listed(tmp_path, text), frozenset({"pid"})).ids == ids


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\nb,c\n", "line 2: expected one patient id and nothing else"),
        ("a\n,c\n", "line 2: expected one patient id"),
        ("a\tb\n", "line 1: expected one patient id"),
        ("a\n4711\x00\n", "line 2: expected one patient id"),
        (b"caf\xe9\n", "expected UTF-8 text"),
    ],
)
def test_what_is_no_list_is_refused_and_no_id_is_in_the_message(tmp_path: Path, text: str | bytes, said: str):
    with pytest.raises(RefusedError, match=said) as caught:
        read_opt_out(listed(tmp_path, text))
    assert "4711" not in str(caught.value)


def test_a_list_that_is_named_and_missing_is_refused(tmp_path: Path):
    assert read_opt_out(None) == NOBODY
    for missing in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(RefusedError, match="no patient is counted without it"):
            read_opt_out(missing)


def test_ids_that_are_no_patients_are_counted_and_change_nothing(tmp_path: Path):
    found = read_opt_out(listed(tmp_path, f"{IDS[0]}\nnobody\nnor he\n"))
    assert found.unknown(REGISTRY) == 2
    assert len(found.apply(REGISTRY)) == int(np.sum(REGISTRY.patients != IDS[0]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = RunConfig.model_validate({"name": "t", "privacy": {"enabled": False}})
    write_sites(REGISTRY, [np.arange(len(REGISTRY))], config, tmp_path / "sites")
    return tmp_path / "sites" / "site-01"


def open_with(folder: Path, text: str | None) -> Site:
    """The site with a list; None: without."""
    site_toml = folder / "site.toml"
    content = re.sub(r'\nopt_out = ".*"', "", site_toml.read_text())
    if text is not None:
        listed(folder, text)
        content = content.replace("[policy]", '[policy]\nopt_out = "left.csv"')
    site_toml.write_text(content)
    return Site.open(site_toml)


def test_rows_of_patients_who_opted_out_are_in_no_split_and_no_count(folder: Path):
    whole = open_with(folder, None)
    gone = set(IDS[::3])
    site = open_with(folder, "\n".join(gone))
    assert not gone & set(site.registry.patients.tolist())
    assert set(site.registry.patients.tolist()) == set(IDS) - gone
    for split in ("train", "validation", "test"):  # those who stayed are where they were
        before = {whole.registry.patients[rows[0]] for rows in whole.patients_of(split)}
        assert {site.registry.patients[rows[0]] for rows in site.patients_of(split)} == before - gone


def test_who_opted_out_is_in_the_registrys_digest_so_no_registry_of_before_is_used(folder: Path):
    digests = []
    for text in (None, IDS[0], f"{IDS[0]}\n{IDS[1]}", IDS[0], None):
        site = open_with(folder, text)
        digests.append((site.source_digest, site.registry_digest))
        gone = set() if text is None else set(text.split("\n"))
        assert set(site.registry.patients.tolist()) == set(IDS) - gone
        assert site.registry_read == site.registry_digest
    assert digests[0] == digests[4] and digests[1] == digests[3] and len(set(digests)) == 3


def test_the_ledgers_digest_of_a_registry_tells_nothing_to_whoever_lacks_the_sites_key(folder: Path):
    """A ledger is shown to others: nobody may try out with it whether a copy of the table lacks one patient."""
    site_toml = folder / "site.toml"
    told = []
    for key in ("11" * 32, "22" * 32):
        site_toml.write_text(re.sub(r'split_key = ".*"', f'split_key = "{key}"', site_toml.read_text()))
        site = Site.open(site_toml)
        assert site.registry_read == ""  # nothing was read
        told.append((site.source_digest, site.registry_digest))
    assert told[0][0] == told[1][0] and told[0][1] != told[1][1]


def test_when_all_opted_out_nobody_is_left(folder: Path):
    site = open_with(folder, "\n".join(IDS))
    assert len(site.registry) == 0 and site.patients_of("train") == []


# ---- what people see


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    try:
        main([str(arg) for arg in args])
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_check_says_how_many_opted_out_and_how_many_ids_it_does_not_know(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    open_with(folder, f"{IDS[0]}\n{IDS[1]}\n{SECRET}\n")
    command = [
        "client",
        "check",
        folder / "registry.parquet",
        folder / "dictionary.toml",
        "--site",
        folder / "site.toml",
    ]
    code, out, _ = run(capsys, *command)
    assert code == 0 and SECRET not in out
    assert "opted out: 2 patients of this table are never read" in out and "1 more ids on the list are no" in out
    code, out, _ = run(capsys, *command, "--json")
    assert json.loads(out)["opted_out"] == {"patients": 2, "not_in_table": 1} and SECRET not in out
    (folder / "left.csv").unlink()
    code, _, err = run(capsys, *command)
    assert code == 2 and "no patient is counted without it" in err and err.count("\n") == 1


def test_questions_are_made_of_patients_who_are_left(folder: Path, capsys: pytest.CaptureFixture[str]):
    command = ["client", "questions", folder / "registry.parquet", folder / "dictionary.toml", "--site"]
    open_with(folder, "\n".join(IDS[3:]))
    code, out, _ = run(capsys, *command, folder / "site.toml")
    kept = int(np.sum(np.isin(REGISTRY.patients, IDS[:3])))
    assert code == 0 and f"this table's own counts ({kept} rows)" in out
