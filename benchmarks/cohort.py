"""Cohorts on disk: gpuroi, nilearn under joblib, and the floor, with two processes each."""

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip
from joblib import Parallel, delayed
from nilearn.image import threshold_img
from nilearn.regions import connected_regions

from gpuroi import extract_regions
from gpuroi.cohort import extract_cohort

PROCESSES = 2
_DISTINCT = 10
_NIFTI_HEADER = 352  # bytes before the voxels


class Cohort:
    """Maps on disk, and the ways to work through them; each way writes to a folder of its own."""

    def __init__(self, folder: Path, img: nib.Nifti1Image, n_maps: int, method: str) -> None:
        self._folder = folder
        self.inputs = Path(tempfile.mkdtemp(prefix="maps", dir=folder))
        self._method = method
        self._recipe = {"threshold": "97%", "min_region_size": 1500, "method": method}
        for number in range(n_maps):  # noise is slow to make: ten maps, again and again
            path = self.inputs / f"map-{number:05d}.nii.gz"
            if number < _DISTINCT:
                path.write_bytes(_noisy(img, seed=number))
            else:
                path.hardlink_to(self.inputs / f"map-{number % _DISTINCT:05d}.nii.gz")
        self.paths = sorted(self.inputs.iterdir())

    def gpuroi(self) -> Path:
        """Write labels, tables and sidecars, the table of all maps and the overlap."""
        out = self._fresh("gpuroi")
        report = extract_cohort(self.inputs, out, self._recipe, jobs=PROCESSES, backend="cpu")
        assert report.n_done == len(self.paths)
        return out

    def nilearn(self) -> Path:
        """Write the 4-D images of nilearn."""
        out = self._fresh("nilearn")
        with Parallel(n_jobs=PROCESSES) as pool:
            pool(delayed(_nilearn)(path, out / path.name, self._method) for path in self.paths)
        return out

    def floor(self) -> None:
        """Decode every map and look at each voxel once."""
        with Parallel(n_jobs=PROCESSES) as pool:
            pool(delayed(_decode)(path) for path in self.paths)

    def check(self, results: dict[str, Any]) -> None:
        """Look at what has been written: a file a map, and the labels of a map alone."""
        written = {path.name for path in results["nilearn, joblib"].iterdir()}
        assert written <= {path.name for path in self.paths}  # none where there is no region
        for path in self.paths[:_DISTINCT]:
            stem = path.name.removesuffix(".nii.gz")
            labels = nib.load(results["gpuroi"] / f"{stem}_desc-regions_dseg.nii.gz")
            alone = extract_regions(path, **self._recipe, backend="cpu").labels
            assert np.array_equal(np.asanyarray(labels.dataobj), alone)

    def _fresh(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=name, dir=self._folder))


def contenders(cohort: Cohort) -> dict[str, Callable[[], Any]]:
    """Return the ways to work through `cohort`, the one to compare with first."""
    return {
        "nilearn, joblib": cohort.nilearn,
        "gpuroi": cohort.gpuroi,
        "decoding alone, joblib": cohort.floor,
    }


def _noisy(img: nib.Nifti1Image, seed: int) -> bytes:
    """Return the content of a file: the map, scaled and with some noise where it is not zero."""
    rng = np.random.default_rng(seed)
    data = np.asanyarray(img.dataobj)
    noise = rng.normal(0, 0.05, data.shape) * (data != 0)
    changed = (data * rng.uniform(0.8, 1.2) + noise).astype(np.float32)
    return igzip.compress(nib.Nifti1Image(changed, img.affine).to_bytes(), 1)


def _nilearn(path: Path, out: Path, method: str) -> None:
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        regions, _ = connected_regions(threshold_img(path, "97%"), 1500, method)
    if regions is not None:
        regions.to_filename(out)


def _decode(path: Path) -> float:
    content = igzip.decompress(path.read_bytes())
    return float(np.abs(np.frombuffer(content, np.float32, offset=_NIFTI_HEADER)).max())
