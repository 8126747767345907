"""The lazy 4-D image of regions: it answers like the dense one of nilearn, without its memory."""

import copy
import gzip
import pickle
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from nilearn import image as nilearn_image
from nilearn import maskers
from nilearn.regions import connected_regions as nilearn_connected_regions

from gpuroi.algorithms.measure import gather
from gpuroi.backends.cpu import CpuBackend
from gpuroi.regions import connected_regions
from gpuroi.stack import RegionImage, RegionStack, stack_image
from tests.conftest import AFFINES, image

COMPONENTS = "connected_components"

HEADERS = {
    "NIfTI-1": nib.Nifti1Header(),
    "big-endian NIfTI-1": nib.Nifti1Header(endianness=">"),
    "NIfTI-2": nib.Nifti2Header(),
    "big-endian NIfTI-2": nib.Nifti2Header(endianness=">"),
}

SHAPE = (9, 8, 7, 17)

OBLIQUE = AFFINES["oblique"]

SLICERS = {
    "int": 3,
    "negative int": -2,
    "ints": (3, -1, 2, 4),
    "NumPy ints": (np.int64(3), np.int8(-1)),
    "last volume": (..., -1),
    "slices": (slice(2, 5), slice(None), slice(-3, None), slice(1, 9)),
    "steps": (slice(None, None, 2), slice(1, None, 3), slice(None), slice(None, None, 4)),
    "negative steps": (slice(None, None, -1), slice(6, 1, -2), slice(None), slice(9, None, -3)),
    "empty": (slice(5, 2), ..., slice(0, 0)),
    "beyond the end": (slice(3, 100), slice(-100, 4), ..., slice(8, 99)),
    "everything": (),
    "Ellipsis": ...,
    "Ellipsis and none left for it": (1, 2, 3, 4, ...),
    "Ellipsis in between": (2, ..., slice(3, 6)),
    "new axis": None,
    "new axes": (None, 2, None, ..., None, 1, None),
    "new axis at the end": (..., None),
}


def peak_bytes(function, *args):
    """Return what `function` returns, and the memory that it held at most while it ran."""
    tracemalloc.start()
    try:
        value = function(*args)
        return value, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def maps(blobs):
    """Return two maps, of several regions and of both signs."""
    data = blobs((9, 8, 7, 2))
    return np.where(np.abs(data) > 3.5, data, 0)


@pytest.fixture(params=HEADERS)  # by name: headers of either byte order compare equal
def header(request):
    return HEADERS[request.param]


@pytest.fixture
def regions_img(maps, header):
    return connected_regions(image(maps, OBLIQUE, header), 0, COMPONENTS)[0]


@pytest.fixture(scope="module")
def stack(maps):
    return connected_regions(image(maps, OBLIQUE), 0, COMPONENTS)[0].dataobj


@pytest.fixture(scope="module")
def dense(maps):
    """Return the voxels of nilearn's regions, without a sign at zeros, where gpuroi has none."""
    theirs, _ = nilearn_connected_regions(image(maps, OBLIQUE), 0, COMPONENTS)
    return np.asarray(theirs.dataobj) + 0.0


@pytest.fixture
def dense_img(regions_img, dense):
    """Return the same image as nibabel makes it of an array."""
    return image(dense, regions_img.affine, regions_img.header)


class TestSlicing:
    @pytest.mark.parametrize("slicer", SLICERS.values(), ids=SLICERS)
    def test_is_that_of_an_array(self, stack, dense, slicer):
        np.testing.assert_array_equal(stack[slicer], dense[slicer], strict=True)

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(slicer=hnp.basic_indices(SHAPE, allow_newaxis=True))
    def test_of_any_form_is_that_of_an_array(self, stack, dense, slicer):
        np.testing.assert_array_equal(stack[slicer], dense[slicer], strict=True)

    @pytest.mark.parametrize("number", range(SHAPE[3]))
    def test_gives_each_region(self, stack, dense, number):
        np.testing.assert_array_equal(stack[..., number], dense[..., number], strict=True)
        assert stack[..., number].any()

    @pytest.mark.parametrize("slicer", [9, -10, (0, 8), (0, 0, -8), (..., 17), (..., -18)])
    def test_out_of_bounds(self, stack, slicer):
        with pytest.raises(IndexError, match=r"index out of bounds for axis \d with size \d+"):
            stack[slicer]

    def test_with_too_many_indices(self, stack):
        with pytest.raises(IndexError, match="out of range"):
            stack[0, 0, 0, 0, 0]

    @pytest.mark.parametrize(
        "slicer", [[0, 2], np.array([0, 2]), (..., [1]), np.zeros(SHAPE, bool), (0, np.arange(3))]
    )
    def test_that_is_fancy(self, stack, slicer):
        with pytest.raises(ValueError, match="Cannot handle fancy indexing"):
            stack[slicer]

    def test_by_no_step(self, stack):
        with pytest.raises(ValueError, match="slice step cannot be zero"):
            stack[::0]


class TestArray:
    def test_has_what_proxies_have(self, stack, dense):
        assert nib.is_proxy(stack)
        assert (stack.shape, stack.ndim, stack.dtype) == (dense.shape, dense.ndim, dense.dtype)
        assert stack.shape == SHAPE
        assert (stack.slope, stack.inter) == (1, 0)

    @pytest.mark.parametrize("dtype", [None, np.float32, np.float64, ">f4", np.int16])
    def test_is_made_in_any_dtype(self, stack, dense, dtype):
        expected = dense if dtype is None else dense.astype(dtype)
        array = np.asarray(stack, dtype)
        np.testing.assert_array_equal(array, expected, strict=True)
        assert array.flags.f_contiguous

    def test_is_new_each_time(self, stack, dense):
        np.asarray(stack)[:] = 5
        stack[...][:] = 5
        np.testing.assert_array_equal(np.array(stack, copy=True), dense)

    def test_cannot_be_shared(self, stack):
        with pytest.raises(ValueError, match="no dense array to share; it makes a new one"):
            np.array(stack, copy=False)


class TestImage:
    def test_is_lazy_until_asked(self, regions_img, dense):
        assert isinstance(regions_img.dataobj, RegionStack)
        assert not regions_img.in_memory
        np.testing.assert_array_equal(
            regions_img.get_fdata(), dense.astype(np.float64), strict=True
        )
        assert regions_img.in_memory
        regions_img.uncache()
        assert not regions_img.in_memory
        single = regions_img.get_fdata(dtype=np.float32, caching="unchanged")
        np.testing.assert_array_equal(single, dense, strict=True)
        assert not regions_img.in_memory

    def test_has_the_class_and_byte_order_of_the_maps(self, regions_img, header):
        in_nifti2 = isinstance(header, nib.Nifti2Header)
        assert isinstance(regions_img, RegionImage)
        assert isinstance(regions_img, nib.Nifti2Image) == in_nifti2
        assert type(regions_img.header) is type(header)
        assert regions_img.header.endianness == header.endianness
        assert regions_img.get_data_dtype().newbyteorder("=") == np.float32

    def test_says_its_range(self, regions_img, dense):
        assert regions_img.header["cal_max"] == dense.max()
        assert regions_img.header["cal_min"] == dense.min()

    @pytest.mark.parametrize(
        "slicer",
        [
            (..., 0),
            (..., slice(1, 9, 2)),
            (slice(2, 6), slice(None, None, 2), slice(3, 4), -1),
            slice(1, 5),
        ],
    )
    def test_is_cut_with_its_affine(self, regions_img, dense_img, assert_same_image, slicer):
        assert_same_image(regions_img.slicer[slicer], dense_img.slicer[slicer])

    def test_is_not_cut_to_nothing(self, regions_img):
        with pytest.raises(IndexError, match="Empty slice requested"):
            regions_img.slicer[5:5]
        with pytest.raises(IndexError, match="Scalar indices disallowed in spatial dimensions"):
            regions_img.slicer[0]

    @pytest.mark.parametrize(
        "duplicate",
        [copy.copy, copy.deepcopy, lambda img: pickle.loads(pickle.dumps(img))],
        ids=["copy", "deepcopy", "pickle"],
    )
    def test_is_copied(self, regions_img, dense_img, assert_same_image, duplicate):
        assert_same_image(duplicate(regions_img), dense_img)


class TestFiles:
    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    def test_are_those_of_the_dense_image(self, regions_img, dense_img, dense, tmp_path, suffix):
        written = []
        for img in (regions_img, dense_img):
            img.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"as it was"))
            path = tmp_path / f"regions{suffix}"
            img.to_filename(path)
            assert img.get_filename() == str(path)
            np.testing.assert_array_equal(nib.load(path).dataobj, dense)
            raw = path.read_bytes()
            written.append(gzip.decompress(raw) if suffix == ".nii.gz" else raw)
        assert written[0] == written[1]
        assert isinstance(regions_img.dataobj, RegionStack)

    def test_follow_the_header(self, regions_img, dense_img):
        for img in (regions_img, dense_img):
            img.header.set_sform(np.eye(4))  # the image's affine comes first
            img.header.set_data_offset(1024)
            img.header["descrip"] = b"twelve regions"
        assert regions_img.to_bytes() == dense_img.to_bytes()

    def test_in_memory(self, regions_img, dense_img):
        assert regions_img.to_bytes() == dense_img.to_bytes()

    @pytest.mark.parametrize("dtype", [np.float32, "f4", "<f4", ">f4", np.float64, np.int16, "u1"])
    @pytest.mark.parametrize("header_dtype", [np.float32, np.int16])
    def test_of_a_dtype(self, regions_img, dense_img, tmp_path, dtype, header_dtype):
        written = []
        for img in (regions_img, dense_img):
            img.set_data_dtype(header_dtype)
            img.to_filename(tmp_path / "regions.nii", dtype=dtype)
            written.append((tmp_path / "regions.nii").read_bytes())
            assert img.get_data_dtype().newbyteorder("=") == header_dtype
        assert written[0] == written[1]

    @pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, "compat"])
    def test_of_a_dtype_in_the_header(self, regions_img, dense_img, dtype):
        for img in (regions_img, dense_img):
            img.set_data_dtype(dtype)
        assert regions_img.to_bytes() == dense_img.to_bytes()

    @pytest.mark.parametrize("dtype", ["smallest", "nonsense"])
    def test_of_no_dtype(self, regions_img, tmp_path, dtype):
        with pytest.raises(nib.spatialimages.HeaderDataError, match=f'"{dtype}" not recognized'):
            regions_img.to_filename(tmp_path / "regions.nii", dtype=dtype)

    def test_of_a_cut_image(self, regions_img, dense_img):
        assert regions_img.slicer[2:5].to_bytes() == dense_img.slicer[2:5].to_bytes()

    @pytest.mark.parametrize("name", ["regions.img", "regions.mgz"])
    def test_of_other_formats(self, regions_img, dense, tmp_path, name):
        nib.save(regions_img, tmp_path / name)
        np.testing.assert_array_equal(nib.load(tmp_path / name).dataobj, dense)


class TestNilearn:
    """Functions of nilearn give for the lazy image what they give for the dense one."""

    @pytest.mark.parametrize(
        "function",
        [
            nilearn_image.load_img,
            nilearn_image.copy_img,
            nilearn_image.mean_img,
            nilearn_image.crop_img,
            nilearn_image.binarize_img,
            lambda img: nilearn_image.index_img(img, 2),
            lambda img: nilearn_image.index_img(img, slice(1, 9, 3)),
            lambda img: nilearn_image.index_img(img, np.array([4, 0])),
            lambda img: list(nilearn_image.iter_img(img))[-1],
            lambda img: nilearn_image.concat_imgs([img, img]),
            lambda img: nilearn_image.threshold_img(img, 4.0, cluster_threshold=2),
            lambda img: nilearn_image.smooth_img(img, 4),
            lambda img: nilearn_image.math_img("img.sum(axis=3)", img=img),
            lambda img: nilearn_image.resample_img(
                img, np.diag([3.0, 3, 3, 1]), (5, 5, 5), interpolation="nearest"
            ),
            lambda img: nilearn_connected_regions(img, 0, COMPONENTS)[0],
        ],
    )
    def test_images(self, maps, dense, assert_same_image, function):
        affine = np.diag([2.0, 2, 2, 1])
        ours, _ = connected_regions(image(maps, affine), 0, COMPONENTS)
        assert_same_image(function(ours), function(image(dense, affine, ours.header)))

    @pytest.mark.parametrize(
        "extract",
        [
            lambda img, mask: maskers.NiftiMasker(mask, standardize=None).fit_transform(img),
            lambda img, mask: maskers.NiftiLabelsMasker(mask, standardize=None).fit_transform(img),
            lambda img, mask: maskers.NiftiSpheresMasker(
                [(8, 8, 6)], radius=5, standardize=None
            ).fit_transform(img),
            lambda img, mask: maskers.NiftiMapsMasker(img, standardize=None).fit_transform(mask),
            lambda img, mask: nilearn_image.get_data(img),
        ],
        ids=["voxels", "labels", "spheres", "maps", "array"],
    )
    def test_signals(self, maps, dense, extract):
        affine = np.diag([2.0, 2, 2, 1])
        ours, _ = connected_regions(image(maps, affine), 0, COMPONENTS)
        mask = image((maps[..., 0] != 0).astype(np.uint8), affine)
        np.testing.assert_array_equal(
            extract(ours, mask), extract(image(dense, affine, ours.header), mask)
        )

    def test_the_regions_of_regions_are_the_same(self, regions_img, dense):
        again, index = connected_regions(regions_img, 0, COMPONENTS)
        np.testing.assert_array_equal(again.dataobj, dense, strict=True)
        assert index == list(range(SHAPE[3]))


@pytest.fixture(scope="module")
def large_map():
    """Return a map of 2 mm with 2,016 regions: 7.3 GB of dense volumes."""
    data = np.zeros((91, 109, 91), np.float32)
    data[::8, ::8, ::8] = data[1::8, ::8, ::8] = 3
    return data


class TestMemory:
    def test_to_build_it_is_less_than_one_volume(self, large_map):
        (found,) = CpuBackend().component_voxels(
            large_map[np.newaxis], np.ones(1, np.float32), "positive", 6, 1
        )

        def build():
            return stack_image([gather(found, large_map)], np.eye(4), nib.Nifti1Header())

        regions_img, peak = peak_bytes(build)
        assert regions_img.shape == (91, 109, 91, 12 * 14 * 12)
        assert peak < large_map.nbytes

    def test_to_keep_it_is_less_than_one_volume(self, large_map):
        tracemalloc.start()
        regions_img, _ = connected_regions(image(large_map, np.eye(4)), 0, COMPONENTS)
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert regions_img.shape[3] > 1000
        assert kept < large_map.nbytes

    def test_to_look_at_some_is_what_they_fill(self, large_map):
        regions_img, _ = connected_regions(image(large_map, np.eye(4)), 0, COMPONENTS)
        some, peak = peak_bytes(lambda: regions_img.dataobj[..., 5:8])
        assert np.count_nonzero(some) == 3 * 2
        assert peak < 4 * large_map.nbytes

    @pytest.mark.parametrize("byte_order", ["<", ">"])
    @pytest.mark.parametrize("dtype", [None, np.float32])
    def test_to_write_it_is_a_few_volumes(self, byte_order, dtype, tmp_path):
        data = np.zeros((32, 32, 32), np.float32)
        data[::4, ::4, ::4] = 3
        header = nib.Nifti1Header(endianness=byte_order)
        regions_img, _ = connected_regions(image(data, np.eye(4), header), 0, COMPONENTS)
        path = tmp_path / "regions.nii"
        _, peak = peak_bytes(lambda: regions_img.to_filename(path, dtype=dtype))
        assert path.stat().st_size > 500 * data.nbytes
        assert peak < 6 * data.nbytes
