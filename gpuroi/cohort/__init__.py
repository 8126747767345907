"""Cohorts: as many maps as there are, one call, nothing lost.

`extract_cohort` finds the maps, works through them in processes, and keeps a ledger, so that a run
that was stopped, or met a damaged file, goes on where it was.
"""

from gpuroi.cohort._discover import MapFile, find_maps
from gpuroi.cohort._ledger import Record
from gpuroi.cohort._results import write_report
from gpuroi.cohort._run import CohortReport, Progress, extract_cohort

__all__ = [
    "CohortReport",
    "MapFile",
    "Progress",
    "Record",
    "extract_cohort",
    "find_maps",
    "write_report",
]
