"""Random maps of every dtype and layout against SciPy, on every way to compute."""

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

import gpuroi
from gpuroi import arrays
from gpuroi.backends.cpu import CpuBackend
from gpuroi.testing import expected_labels
from gpuroi.types import CONNECTIVITIES, TAILS
from tests.cuda_on_cpu import library_on_cpu

BACKENDS = {
    "cpu": CpuBackend(),
    "cpu without cc3d": CpuBackend(use_cc3d=False),
    "cuda on numpy": library_on_cpu(),
}
DTYPES = ("float16", "float32", "float64", ">f4", ">f8", "int8", "uint8", "int16", ">i2", "int32")

some_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
many = settings(max_examples=300, deadline=None)
mostly_zero = pytest.mark.filterwarnings("ignore:.*of the voxels ranked are zero:UserWarning")


@st.composite
def volumes(draw):
    """Draw a map (X, Y, Z) with ties, zeros, both signs, in any layout."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(hnp.array_shapes(min_dims=3, max_dims=3, max_side=9))
    # Few different values make ties; quarters are exact in every float dtype.
    quarters = draw(hnp.arrays(np.int8, shape, elements=st.integers(-8, 8)))
    volume = (np.abs(quarters) if dtype.kind == "u" else quarters) * (
        1 if dtype.kind in "iu" else 0.25
    )
    volume = np.asarray(volume, dtype=dtype)
    if dtype.itemsize >= 4 and dtype.kind == "f" and draw(st.booleans()):
        noise = np.random.default_rng(draw(st.integers(0, 2**16))).standard_normal(shape)
        volume = (volume + noise * (quarters != 0)).astype(dtype)
    layout = draw(st.sampled_from(["C", "F", "sliced", "reversed"]))
    if layout == "F":
        return np.asfortranarray(volume)
    if layout == "sliced":
        return np.repeat(volume, 2, axis=1)[:, ::2]
    return volume[::-1, :, ::-1] if layout == "reversed" else volume


def as_float(volume):
    """Return the map in the float dtype that voxels are compared in."""
    small = volume.dtype.itemsize <= 2 or volume.dtype in ("float32", ">f4")
    return volume.astype(np.float32 if small else np.float64)


def ranked(volume, tail):
    volume = as_float(volume)
    return np.abs(
        volume[{"both": volume == volume, "positive": volume >= 0}.get(tail, volume <= 0)]
    )


@mostly_zero
@some_backend
@many
@given(
    volume=volumes(),
    percent=st.floats(0, 100) | st.sampled_from([0.0, 50.0, 97.0, 100.0]),
    tail=st.sampled_from(TAILS),
    connectivity=st.sampled_from(CONNECTIVITIES),
    min_voxels=st.integers(0, 6),
)
def test_percentile_regions_are_scipys(backend, volume, percent, tail, connectivity, min_voxels):
    # Built from an array: NIfTI has no float16, the native door takes whatever has a dtype.
    image = nib.spatialimages.SpatialImage(volume, np.diag([2.0, 2.0, 2.0, 1.0]))
    regions = gpuroi.extract_regions(
        image,
        f"{percent!r}%",
        tail=tail,
        connectivity=connectivity,
        min_region_size=8.0 * min_voxels,
        backend=backend,
    )
    population = ranked(volume, tail)
    reference = as_float(volume)
    expected = np.zeros(volume.shape, np.int32)
    if population.size:
        score = stats.scoreatpercentile(population, percent)
        assert regions.provenance["percentile_score"] == score
        # ">" in exact arithmetic is ">=" for the next number of the dtype.
        cutoff = reference.dtype.type(regions.cutoff)
        assert cutoff > score >= np.nextafter(cutoff, reference.dtype.type(0))
        expected = expected_labels(reference, cutoff, tail, connectivity, min_voxels)
    np.testing.assert_array_equal(regions.labels, expected)
    sizes = np.bincount(expected.ravel())[1:]
    np.testing.assert_array_equal(regions.table["voxels"], sizes)


@some_backend
@many
@given(
    volume=volumes(),
    cutoff=st.sampled_from([0.25, 0.3, 1.0, 1.5, 1e-30, 1000.0]),
    tail=st.sampled_from(TAILS),
    connectivity=st.sampled_from(CONNECTIVITIES),
)
def test_value_regions_are_scipys(backend, volume, cutoff, tail, connectivity):
    image = nib.spatialimages.SpatialImage(volume, np.eye(4))
    regions = gpuroi.extract_regions(
        image, cutoff, tail=tail, connectivity=connectivity, backend=backend
    )
    reference = as_float(volume)
    expected = expected_labels(reference, reference.dtype.type(cutoff), tail, connectivity, 0)
    np.testing.assert_array_equal(regions.labels, expected)


@many
@given(volume=volumes(), percent=st.floats(0, 100), tail=st.sampled_from(TAILS))
def test_array_percentiles_keep_what_is_above_scoreatpercentile(volume, percent, tail):
    population = ranked(volume, tail)
    cutoff = arrays.percentile_cutoff(volume, percent, tail=tail)
    kept = arrays.threshold(volume, cutoff, tail=tail)
    if not population.size:
        assert np.isinf(cutoff)
        return
    score = stats.scoreatpercentile(population, percent)
    assert np.count_nonzero(kept) == np.count_nonzero(population > score)
    assert as_float(volume).dtype.type(cutoff) == cutoff
    assert np.nextafter(as_float(volume).dtype.type(cutoff), -1) <= score < cutoff


@mostly_zero
@many
@given(volume=volumes(), percent=st.sampled_from([0.0, 50.0, 80.0]), tail=st.sampled_from(TAILS))
def test_arrays_and_images_have_the_same_regions(volume, percent, tail):
    image = nib.spatialimages.SpatialImage(volume, np.eye(4))
    regions = gpuroi.extract_regions(image, f"{percent}%", tail=tail, backend="cpu")
    cutoff = arrays.percentile_cutoff(volume, percent, tail=tail)
    labels, count = arrays.label(volume, cutoff, tail=tail)
    np.testing.assert_array_equal(labels, regions.labels)
    assert (count, cutoff) == (len(regions), regions.cutoff)


@many
@given(volume=volumes(), cutoff=st.sampled_from([0.25, 0.3, 1.0]), tail=st.sampled_from(TAILS))
def test_array_threshold_and_label_agree(volume, cutoff, tail):
    kept = arrays.threshold(volume, cutoff, tail=tail)
    labels, count = arrays.label(volume, cutoff, tail=tail, connectivity=26)
    assert kept.dtype == volume.dtype.newbyteorder("=")
    np.testing.assert_array_equal(kept, np.where(labels > 0, volume, 0))
    reference = as_float(volume)
    np.testing.assert_array_equal(
        labels, expected_labels(reference, reference.dtype.type(cutoff), tail, 26, 1)
    )
    assert count == labels.max()
    large = arrays.remove_small(labels, 3)
    np.testing.assert_array_equal(
        large, expected_labels(reference, reference.dtype.type(cutoff), tail, 26, 3)
    )
    np.testing.assert_array_equal(arrays.region_sizes(labels), np.bincount(labels.ravel()))


@mostly_zero
@some_backend
@settings(max_examples=100, deadline=None)
@given(volume=volumes(), tail=st.sampled_from(TAILS))
def test_layout_and_dtype_of_the_same_values_do_not_matter(backend, volume, tail):
    def extract(data):
        image = nib.spatialimages.SpatialImage(data, np.diag([3.0, 2.0, 4.0, 1.0]))
        return gpuroi.extract_regions(image, "60%", tail=tail, backend=backend)

    # Quarters and small integers are the same number in every dtype below.
    quarters = np.round(as_float(volume) * 4) / 4
    reference = extract(np.ascontiguousarray(quarters, np.float64))
    for dtype in ("float32", "float64", ">f4"):
        for order in ("C", "F"):
            other = extract(np.asarray(quarters, dtype=dtype, order=order))
            np.testing.assert_array_equal(other.labels, reference.labels)
            assert other.table.equals(reference.table)
