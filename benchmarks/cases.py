"""The work that is timed, and the proof that all contenders do the same work."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import nibabel as nib
import numpy as np
from nilearn.datasets import load_sample_motor_activation_image
from nilearn.image import resample_img
from nilearn.image import threshold_img as nilearn_threshold_img
from nilearn.regions import connected_regions as nilearn_connected_regions

import gpuroi
from gpuroi.backends.cpu import CpuBackend, cc3d
from gpuroi.image import threshold_img
from gpuroi.regions import connected_regions

# The grid of the 2 mm MNI152 template.
GRID_2MM = (
    np.array([[-2.0, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]]),
    (91, 109, 91),
)


@dataclass(frozen=True)
class Comparison:
    """Functions that do the same job; the first is the one the others are measured against."""

    name: str
    parameters: dict[str, Any]
    contenders: dict[str, Callable[[], Any]]
    check: Callable[[dict[str, Any]], None]
    targets: dict[str, float] = field(default_factory=dict)  # speed-up that was promised
    measure_memory: bool = False
    repeats: int = 31


def sample_maps(tiny: bool) -> dict[str, nib.Nifti1Image]:
    """Return the motor map at 3 mm and resampled to 2 mm, in memory; or a corner of it."""
    packaged = nib.load(load_sample_motor_activation_image())
    at_3mm = nib.Nifti1Image(np.asanyarray(packaged.dataobj), packaged.affine)
    if tiny:
        return {"3 mm": at_3mm.slicer[20:40, 20:40, 20:40]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the packaged file has no sform
        at_2mm = resample_img(at_3mm, *GRID_2MM)
    return {"3 mm": at_3mm, "2 mm": nib.Nifti1Image(np.asanyarray(at_2mm.dataobj), at_2mm.affine)}


def components(tiny: bool = False) -> Iterator[Comparison]:
    """Time threshold, components, size filter and table against nilearn on arrays in memory."""
    promised = {"3 mm": (5, 8), "2 mm": (10, 16)}
    for grid, img in sample_maps(tiny).items():
        yield _against_nilearn(grid, img, "97%", 1500.0, promised[grid])
    if not tiny:
        yield many_regions()


def many_regions() -> Comparison:
    """Return the case that dense volumes lose: every region of a noisy 2 mm map, however small."""
    rng = np.random.default_rng(0)
    affine, shape = GRID_2MM
    from scipy import ndimage

    data = ndimage.gaussian_filter(rng.standard_normal(shape), 1.5).astype(np.float32)
    data /= data.std()
    return _against_nilearn(
        "2 mm, all regions",
        nib.Nifti1Image(data, affine),
        "97%",
        0.0,
        (200, 200),
        measure_memory=True,
        repeats=3,
    )


def _against_nilearn(
    grid: str,
    img: nib.Nifti1Image,
    threshold: str,
    min_region_size: float,
    promised: tuple[float, float],
    **options: Any,
) -> Comparison:
    def nilearn() -> Any:
        thresholded = nilearn_threshold_img(img, threshold, copy=True)
        return nilearn_connected_regions(thresholded, min_region_size, "connected_components")[0]

    def native(backend: CpuBackend) -> Callable[[], Any]:
        def extract() -> Any:
            regions = gpuroi.extract_regions(
                img, threshold, min_region_size=min_region_size, backend=backend
            )
            return regions.labels, regions.table

        return extract

    def drop_in() -> Any:
        thresholded = threshold_img(img, threshold, backend="cpu")
        return connected_regions(
            thresholded, min_region_size, "connected_components", backend="cpu"
        )[0]

    contenders: dict[str, Callable[[], Any]] = {
        "nilearn": nilearn,
        "gpuroi": native(CpuBackend(use_cc3d=False)),
    }
    targets = {"gpuroi": promised[0]}
    if cc3d is not None:
        contenders["gpuroi[fast]"] = native(CpuBackend())
        targets["gpuroi[fast]"] = promised[1]
    contenders["gpuroi as nilearn"] = drop_in

    def check(results: dict[str, Any]) -> None:
        expected = results["nilearn"]
        stack = results["gpuroi as nilearn"]
        assert stack.shape == expected.shape
        for volume in range(expected.shape[3]):
            assert np.array_equal(stack.dataobj[..., volume], expected.dataobj[..., volume])
        labels, table = results["gpuroi"]
        assert len(table) == labels.max() >= expected.shape[3]
        if cc3d is not None:
            assert np.array_equal(labels, results["gpuroi[fast]"][0])

    return Comparison(
        name=f"components, {grid}",
        parameters={
            "shape": list(img.shape),
            "threshold": threshold,
            "min_region_size_mm3": min_region_size,
        },
        contenders=contenders,
        check=check,
        targets=targets,
        **options,
    )


CASES: dict[str, Callable[[bool], Iterator[Comparison]]] = {"components": components}
