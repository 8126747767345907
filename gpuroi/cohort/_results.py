"""What a run has left on disk, whichever run wrote it: read back, and made into a page."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gpuroi import io
from gpuroi.cohort._ledger import unchanged
from gpuroi.cohort._outputs import output_names
from gpuroi.cohort._run import CohortReport
from gpuroi.cohort._summary import remove_page_data
from gpuroi.result import Regions
from gpuroi.saved import read_back


def done_maps(cohort: CohortReport) -> Iterator[tuple[str, list[Path]]]:
    """Yield the path of each map that did not fail, and what its volumes' outputs begin with."""
    for one, record in zip(cohort.maps, cohort.records, strict=True):
        if record.status == "done":
            names = output_names(record.stem, record.n_volumes)
            yield one.source, [cohort.folder / name for name in names]


def read_results(cohort: CohortReport) -> Iterator[tuple[Path, Regions, NDArray[Any], list[str]]]:
    """Yield, for each volume, what its outputs begin with, its regions, voxels and warnings."""
    warnings = {record.source: record.warnings for record in cohort.records}
    for path, prefixes in done_maps(cohort):
        for prefix, volume in zip(prefixes, io.read_maps(path), strict=True):
            named = (warning.partition(": ") for warning in warnings[path])
            said = [what for name, _, what in named if Path(name).name == Path(volume.name).name]
            yield prefix, read_back(prefix, volume), volume.data, said


def labels_path(prefix: Path) -> Path:
    """Return where the label image of a volume is."""
    return prefix.with_name(f"{prefix.name}.nii.gz")


def write_report(cohort: CohortReport) -> Path:
    """Write a page to look through the results of `extract_cohort`, and return where it is.

    Parameters
    ----------
    cohort : CohortReport
        Its maps and their outputs are read from where they are.

    Returns
    -------
    Path
        ``report.html`` in the folder of the outputs; of many maps, pictures lie beside it.

    Raises
    ------
    FolderInUseError
        If another run writes to the folder.
    OutputChangedError
        If another run has worked on these maps since.
    InvalidMapError
        If a map or an output has changed since.
    OSError
        If the page cannot be written.

    Examples
    --------
    >>> import tempfile, nibabel as nib, numpy as np
    >>> from gpuroi.cohort import extract_cohort, write_report
    >>> folder = tempfile.mkdtemp()
    >>> data = np.zeros((8, 8, 8), np.float32)
    >>> data[1:4, 1:4, 1:4] = 5.0
    >>> nib.save(nib.Nifti1Image(data, np.eye(4)), folder + "/map.nii.gz")
    >>> write_report(extract_cohort(folder, folder + "/out", {"threshold": 3.0})).name
    'report.html'
    """
    from gpuroi.report import Report  # with matplotlib, which processes of a run do without

    with unchanged(cohort.folder, cohort.records):
        remove_page_data(cohort.folder)
        report = Report(cohort.folder, cohort.parameters)
        for one, record in zip(cohort.maps, cohort.records, strict=True):
            if record.status == "failed":
                report.fail(one.path, record.message)
        for prefix, regions, values, warnings in read_results(cohort):
            report.add(regions, labels_path(prefix), values, warnings)
        overlap = cohort.summary.get("overlap")
        return report.write(None if overlap is None else overlap.name)
