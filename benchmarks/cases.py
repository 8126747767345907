"""The work that is timed, and the proof that all contenders do the same work."""

import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel as nib
import numpy as np
from nilearn.datasets import load_sample_motor_activation_image
from nilearn.image import resample_img
from nilearn.image import threshold_img as nilearn_threshold_img
from nilearn.plotting import plot_prob_atlas as nilearn_plot_prob_atlas
from nilearn.regions import connected_regions as nilearn_connected_regions
from scipy import ndimage, stats

import gpuroi
from benchmarks.cohort import PROCESSES, Cohort
from benchmarks.cohort import contenders as cohort_contenders
from benchmarks.memory import peak_of_process, peak_of_processes
from gpuroi.algorithms import dirichlet
from gpuroi.algorithms.checkerboard import HAS_CHOLMOD
from gpuroi.backends.cpu import CpuBackend, cc3d
from gpuroi.image import threshold_img
from gpuroi.plotting import plot_prob_atlas
from gpuroi.regions import connected_regions
from gpuroi.space import voxel_volume_mm3
from gpuroi.testing import expected_labels

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
    memory_of: Callable[[Callable[[], Any]], int] | None = None
    most_bytes: int | None = None  # of memory, that was promised
    floor: tuple[str, float] | None = None  # a contender that does less, and how often its time
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
    maps = sample_maps(tiny)
    for grid, img in maps.items():
        yield _against_nilearn(grid, img, "97%", 1500.0, promised[grid])
    if not tiny:
        yield many_regions()
        # Large arrays teach malloc to keep its pages, which spares nilearn more than gpuroi.
        name = "3 mm, after large arrays"
        yield _against_nilearn(name, maps["3 mm"], "97%", 1500.0, promised["3 mm"])


def white_noise() -> Comparison:
    """Return the case with most seeds: no smoothing, and a maximum in every window."""
    affine, shape = GRID_2MM
    noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    img = nib.Nifti1Image(noise, affine)
    return _walkers("2 mm noise", img, "80%", 1.0, 3, smoothing_fwhm=0, min_region_size=0)


def many_regions() -> Comparison:
    """Return the case that dense volumes lose: every region of a noisy 2 mm map, however small."""
    rng = np.random.default_rng(0)
    affine, shape = GRID_2MM
    data = ndimage.gaussian_filter(rng.standard_normal(shape), 1.5).astype(np.float32)
    data /= data.std()
    return _against_nilearn(
        "2 mm, all regions",
        nib.Nifti1Image(data, affine),
        "97%",
        0.0,
        (200, 200),
        memory_of=peak_of_process,
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
        data = np.asanyarray(img.dataobj)
        score = np.float32(stats.scoreatpercentile(np.abs(data), float(threshold[:-1])))
        cutoff = np.nextafter(score, np.float32(np.inf))
        min_voxels = math.ceil(min_region_size / voxel_volume_mm3(img.affine))
        assert np.array_equal(labels, expected_labels(data, cutoff, "both", 6, min_voxels))
        assert len(table) == labels.max()
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


def local_regions(tiny: bool = False) -> Iterator[Comparison]:
    """Time threshold, seeds, random walker and size filter against nilearn."""
    if tiny:
        maps = sample_maps(tiny=True)
        thresholds: dict[str, tuple[str, ...]] = {"3 mm": ("90%",)}
    else:
        maps = sample_maps(tiny=False)
        thresholds = {"3 mm": ("97%", "90%", "80%"), "2 mm": ("97%", "95%", "90%", "80%")}
    promised = {("3 mm", "97%"): 8.0, ("2 mm", "97%"): 8.0, ("2 mm", "90%"): 3.0}
    for grid, img in maps.items():
        for threshold in thresholds[grid]:
            slow = (grid, threshold) in {("2 mm", "90%"), ("2 mm", "80%")}
            yield _walkers(
                grid, img, threshold, promised.get((grid, threshold), 1.0), 3 if slow else 21
            )
    if not tiny:
        yield white_noise()
        yield _one_mm(maps["3 mm"])


def _walkers(
    grid: str,
    img: nib.Nifti1Image,
    threshold: str,
    promised: float,
    repeats: int,
    min_region_size: float = 1500,
    smoothing_fwhm: float = 6,
) -> Comparison:
    options = {"min_region_size": min_region_size, "smoothing_fwhm": smoothing_fwhm}

    def nilearn() -> Any:
        return nilearn_connected_regions(nilearn_threshold_img(img, threshold), **options)

    def with_cholmod() -> Any:
        thresholded = threshold_img(img, threshold, backend="cpu")
        return connected_regions(thresholded, **options, backend="cpu")

    def native() -> Any:
        regions = gpuroi.extract_regions(
            img, threshold, method="local_regions", **options, backend="cpu"
        )
        return regions.labels, regions.table

    def check(results: dict[str, Any]) -> None:
        # Not the labels: nilearn's depend on its tolerance. tests/test_walker.py compares with
        # direct solutions of the whole system.
        expected = results["gpuroi as nilearn"][0]
        assert expected.shape[:3] == results["nilearn"][0].shape[:3]
        if HAS_CHOLMOD:
            _assert_same_volumes(results["gpuroi[cholmod] as nilearn"][0], expected)

    contenders = {"nilearn": nilearn, "gpuroi as nilearn": without_cholmod(with_cholmod)}
    if HAS_CHOLMOD:
        contenders["gpuroi[cholmod] as nilearn"] = with_cholmod
    contenders[f"gpuroi{'[cholmod]' * HAS_CHOLMOD}"] = native
    return Comparison(
        name=f"local_regions, {grid}, {threshold}",
        parameters={"shape": list(img.shape), "threshold": threshold, **options},
        contenders=contenders,
        check=check,
        targets={"gpuroi as nilearn": 1.0, "gpuroi[cholmod] as nilearn": promised},
        repeats=repeats,
    )


def _assert_same_volumes(found: nib.Nifti1Image, expected: nib.Nifti1Image) -> None:
    """Compare volume by volume: both images are lazy, and would not fit into memory whole."""
    assert found.shape == expected.shape
    for volume in range(expected.shape[3]):
        assert np.array_equal(found.dataobj[..., volume], expected.dataobj[..., volume])


def without_cholmod(work: Callable[[], Any]) -> Callable[[], Any]:
    """Return `work` as it runs where cvxopt is not installed."""

    def with_scipy() -> Any:
        with mock.patch.object(dirichlet, "HAS_CHOLMOD", False):
            return work()

    return with_scipy


def _one_mm(at_3mm: nib.Nifti1Image) -> Comparison:
    """Return the case that must end within 4 GiB."""
    affine = np.array([[-1.0, 0, 0, 90], [0, 1, 0, -126], [0, 0, 1, -72], [0, 0, 0, 1]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        at_1mm = resample_img(at_3mm, affine, (182, 218, 182))
    img = nib.Nifti1Image(np.asanyarray(at_1mm.dataobj), at_1mm.affine)

    def with_cholmod() -> Any:
        return connected_regions(threshold_img(img, "97%", backend="cpu"), 1500, backend="cpu")

    def check(results: dict[str, Any]) -> None:
        first, *others = [regions for regions, _ in results.values()]
        for other in others:
            _assert_same_volumes(first, other)

    contenders = {"gpuroi as nilearn": without_cholmod(with_cholmod)}
    if HAS_CHOLMOD:
        contenders["gpuroi[cholmod] as nilearn"] = with_cholmod
    return Comparison(
        name="local_regions, 1 mm, 97%",
        parameters={"shape": [182, 218, 182], "threshold": "97%", "min_region_size_mm3": 1500},
        contenders=contenders,
        check=check,
        memory_of=peak_of_process,
        most_bytes=4 * 2**30,
        repeats=1,
    )


def plots(tiny: bool = False) -> Iterator[Comparison]:
    """Time the figure of fifteen regions against nilearn, from image to file."""
    if tiny:
        maps, n_regions = sample_maps(tiny=True), 2
    else:
        maps, n_regions = {"2 mm": sample_maps(tiny=False)["2 mm"]}, 15
    for grid, img in maps.items():
        regions = gpuroi.extract_regions(img, "90%", backend="cpu")
        sizes = regions.table["voxels"].to_numpy()
        largest = np.sort(np.argsort(sizes)[-n_regions:])
        stack = regions.to_4d_img()
        volumes = np.stack([stack.dataobj[..., region] for region in largest], axis=-1)
        yield _figures(grid, nib.Nifti1Image(volumes, img.affine))


def _figures(grid: str, regions_img: nib.Nifti1Image) -> Comparison:
    options = {"view_type": "contours", "cut_coords": (20, -30, 40)}

    def drawn(plot: Callable[..., Any]) -> Callable[[], bytes]:
        def draw() -> bytes:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "regions.png"
                plot(regions_img, **options, output_file=path)
                return path.read_bytes()

        return draw

    def check(results: dict[str, Any]) -> None:
        assert all(picture.startswith(b"\x89PNG") for picture in results.values())

    return Comparison(
        name=f"plot_prob_atlas, {grid}",
        parameters={"shape": list(regions_img.shape), **options},
        contenders={"nilearn": drawn(nilearn_plot_prob_atlas), "gpuroi": drawn(plot_prob_atlas)},
        check=check,
        targets={"gpuroi": 3.0},
        repeats=15,
    )


def cohort(tiny: bool = False) -> Iterator[Comparison]:
    """Time cohorts on disk with two processes each, writing included; look at their memory."""
    promised = {  # maps, times nilearn, times the floor
        ("3 mm", "connected_components"): (4000, 6.0, 2.5),
        ("2 mm", "connected_components"): (500, 12.0, 2.5),
        ("3 mm", "local_regions"): (1000, 5.0, None),
        ("2 mm", "local_regions"): (240, 7.0, None),
    }
    maps = sample_maps(tiny)
    # One folder, removed at the end: file systems are slow for a while after many files are gone.
    with tempfile.TemporaryDirectory() as folder:
        for (grid, method), (n_maps, times_nilearn, times_floor) in promised.items():
            if grid not in maps:
                continue
            files = Cohort(Path(folder), maps[grid], 3 if tiny else n_maps, method)
            yield Comparison(
                name=f"cohort, {grid}, {method}",
                parameters={
                    "n_maps": len(files.paths),
                    "threshold": "97%",
                    "min_region_size_mm3": 1500,
                    "processes": PROCESSES,
                },
                contenders=cohort_contenders(files),
                check=files.check,
                targets={"gpuroi": times_nilearn},
                floor=times_floor and ("decoding alone, joblib", times_floor),
                repeats=3,
            )
        yield cohort_memory(Path(folder), maps["3 mm"], (3, 6) if tiny else (100, 1000, 10_000))


def cohort_memory(folder: Path, img: nib.Nifti1Image, sizes: tuple[int, ...]) -> Comparison:
    """Return the case of cohorts that grow, and whose memory should not."""

    def of(n_maps: int) -> Callable[[], Any]:
        return Cohort(folder, img, n_maps, "connected_components").gpuroi

    return Comparison(
        name="cohort, memory, 3 mm",
        parameters={"processes": PROCESSES},
        contenders={f"gpuroi, {n_maps:,} maps": of(n_maps) for n_maps in sizes},
        check=lambda results: None,
        memory_of=peak_of_processes,
        repeats=1,
    )


CASES: dict[str, Callable[[bool], Iterator[Comparison]]] = {
    "components": components,
    "local_regions": local_regions,
    "plots": plots,
    "cohort": cohort,
}
