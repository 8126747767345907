"""`gpuroi.regions.connected_regions` against nilearn's: the same regions, in the same order."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nilearn import regions as nilearn_regions
from nilearn.image import threshold_img

from gpuroi.errors import InvalidMapError
from gpuroi.regions import connected_regions
from tests.conftest import AFFINES, image

GRID = AFFINES["anisotropic"]
VOXEL_MM3 = 9.0

COMPONENTS = "connected_components"


@pytest.fixture(scope="session")
def islands(blobs):
    """Return a function that makes maps of several regions of both signs on a background of 0."""

    def make(shape=(12, 11, 10), seed=0, dtype=np.float32):
        data = blobs(shape, seed, dtype)
        return np.where(np.abs(data) > (4 if data.dtype.kind == "f" else 40), data, 0).astype(dtype)

    return make


@pytest.fixture(scope="session")
def assert_same_answer(answer, assert_same_image):
    """Return a function that calls gpuroi and nilearn with new maps each."""

    def compare(make_maps, min_region_size=0, backend="auto", **kwargs):
        arguments = (min_region_size, COMPONENTS)
        ours = answer(connected_regions, make_maps(), *arguments, backend=backend, **kwargs)
        theirs = answer(nilearn_regions.connected_regions, make_maps(), *arguments, **kwargs)
        assert ours.error is theirs.error is None
        assert ours.warnings == theirs.warnings
        our_image, our_index = ours.value
        their_image, their_index = theirs.value
        assert our_index == their_index
        if their_image is not None:
            assert our_image.dataobj.dtype == np.float32
            # The dtype on disk differs: see TestDeviations.
            assert_same_image(our_image, their_image, on_disk=np.float32)
        return our_image, our_index

    return compare


class TestRegions:
    @pytest.mark.parametrize("threshold", ["95%", "97%", "99%", 3.0])
    @pytest.mark.parametrize("min_region_size", [0, 27, 1350])
    def test_of_the_real_map(self, sample_img, assert_same_answer, threshold, min_region_size):
        thresholded = threshold_img(sample_img, threshold)
        _, index = assert_same_answer(lambda: thresholded, min_region_size)
        assert set(index) == {0}

    @pytest.mark.parametrize("min_region_size", [0, 20, 150])
    @pytest.mark.parametrize("shape", [(12, 11, 10), (12, 11, 10, 1), (12, 11, 10, 3)])
    def test_of_every_grid(self, islands, assert_same_answer, affine, shape, min_region_size):
        assert_same_answer(lambda: image(islands(shape), affine), min_region_size)

    def test_on_every_backend(self, islands, assert_same_answer, backend):
        _, index = assert_same_answer(
            lambda: image(islands((12, 11, 10, 5))), 3 * VOXEL_MM3, backend
        )
        assert set(index) == set(range(5))

    def test_tell_the_map_they_come_from(self, islands, assert_same_answer):
        data = islands((12, 11, 10, 4))
        data[..., 1] = 0
        regions_img, index = assert_same_answer(lambda: image(data))
        assert set(index) == {0, 2, 3}
        assert regions_img.shape[3] == len(index)
        for number in (0, 2, 3):
            volumes = regions_img.get_fdata()[..., np.array(index) == number]
            np.testing.assert_array_equal(volumes.sum(axis=3), data[..., number])

    def test_join_opposite_signs_and_no_corners(self, assert_same_answer):
        data = np.zeros((3, 3, 6), np.float32)
        data[1, 1, :2] = 3, -3
        data[2, 1, 2] = data[0, 0, 5] = 2
        regions_img, _ = assert_same_answer(lambda: image(data))
        sizes = np.count_nonzero(regions_img.get_fdata(), axis=(0, 1, 2))
        assert sizes.tolist() == [1, 2, 1]

    def test_may_fill_the_volume(self, assert_same_answer):
        regions_img, index = assert_same_answer(lambda: image(np.full((3, 4, 5), 2.0)))
        assert (regions_img.shape, index) == ((3, 4, 5, 1), [0])

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(
        data=hnp.arrays(
            np.float32,
            hnp.array_shapes(min_dims=3, max_dims=4, max_side=6),
            elements=st.sampled_from([0.0, -0.0, 0.0, 1.5, -2.0]),
        ),
        min_voxels=st.integers(0, 5),
    )
    def test_of_any_map(self, assert_same_answer, data, min_voxels):
        assert_same_answer(lambda: image(data), min_voxels * VOXEL_MM3)


class TestMinimumSize:
    @pytest.mark.parametrize("n_voxels", [1, 3, 7])
    def test_is_to_be_exceeded(self, assert_same_answer, affine, n_voxels):
        data = np.zeros((3, 3, 9))
        data[1, 1, 1 : 1 + n_voxels] = 3
        volume_mm3 = n_voxels * np.abs(np.linalg.det(affine[:3, :3]))
        below, above = np.nextafter(volume_mm3, [0, np.inf])
        for size in (volume_mm3, below, above, volume_mm3 * 0.999, volume_mm3 * 1.001):
            _, index = assert_same_answer(lambda: image(data, affine), size)
            if size in (volume_mm3 * 0.999, volume_mm3 * 1.001):
                assert (index == [0]) == (size < volume_mm3)

    @pytest.mark.parametrize("n_voxels", range(1, 9))
    @pytest.mark.parametrize("scalar", [float, np.float32, np.float64, np.int16])
    def test_may_be_any_scalar(self, assert_same_answer, n_voxels, scalar):
        data = np.zeros((3, 3, 10))
        data[1, 1, 1 : 1 + n_voxels] = 3
        affine = np.diag([1.3, 1.3, 1.3, 1])
        assert_same_answer(lambda: image(data, affine), scalar(n_voxels * 1.3**3))

    @pytest.mark.parametrize("min_region_size", [1350, 1e9, 1e300, np.inf])
    @pytest.mark.parametrize("shape", [(12, 11, 10), (12, 11, 10, 3)])
    def test_that_nobody_exceeds_gives_none(
        self, islands, assert_same_answer, shape, min_region_size
    ):
        data = image(islands(shape))
        assert assert_same_answer(lambda: data, min_region_size) == (None, None)
        with pytest.warns(UserWarning, match="no region is larger than min_region_size="):
            connected_regions(data, min_region_size, COMPONENTS)

    def test_of_zero_finds_nothing_in_nothing(self, assert_same_answer):
        assert assert_same_answer(lambda: image(np.zeros((3, 3, 3)))) == (None, None)

    def test_is_1350_mm3_unless_given(self, answer, islands):
        img = image(islands(), np.diag([4.0, 4.0, 4.0, 1.0]))
        ours, index = connected_regions(img, extract_type=COMPONENTS)
        theirs, expected = nilearn_regions.connected_regions(img, extract_type=COMPONENTS)
        assert index == expected
        np.testing.assert_array_equal(ours.dataobj, theirs.dataobj, strict=True)


class TestVoxels:
    @pytest.mark.parametrize("dtype", ["<f4", "<f8", "i1", "u1", "<i2", "<u2", "<i4", "<u4"])
    @pytest.mark.parametrize("order", ["C", "F", "strided"])
    @pytest.mark.parametrize("shape", [(12, 11, 10), (12, 11, 10, 2)])
    def test_of_any_dtype_and_layout(self, islands, assert_same_answer, dtype, order, shape):
        data = islands(shape, dtype=dtype)
        data = np.repeat(data, 2, axis=1)[:, ::2] if order == "strided" else data.copy(order)
        before = data.copy()
        assert_same_answer(lambda: image(data), 3 * VOXEL_MM3)
        np.testing.assert_array_equal(data, before)

    @pytest.mark.parametrize("value", [1e-42, -1e-42, 3e38])
    def test_of_any_magnitude(self, assert_same_answer, value):
        data = np.zeros((3, 3, 3), np.float32)
        data[1, 1, 1] = value
        assert_same_answer(lambda: image(data))


class TestSources:
    @pytest.mark.parametrize("as_path", [str, Path])
    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    @pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image])
    def test_may_be_a_file(
        self, islands, assert_same_answer, tmp_path, as_path, suffix, image_class
    ):
        path = tmp_path / f"map{suffix}"
        image_class(islands(), GRID).to_filename(path)
        assert_same_answer(lambda: as_path(path))

    @pytest.mark.parametrize("shape", [(12, 11, 10), (12, 11, 10, 2)])
    def test_may_be_scaled_integers(self, islands, assert_same_answer, tmp_path, shape):
        data = np.round(islands(shape))
        data[0, 0, 0], data[-1, -1, -1] = 127, -128  # so that the levels are whole, zero is one
        img = nib.Nifti1Image(data / 4, GRID)
        img.set_data_dtype(np.int8)
        img.to_filename(tmp_path / "map.nii")
        assert nib.load(tmp_path / "map.nii").dataobj.slope == 0.25
        assert_same_answer(lambda: tmp_path / "map.nii")

    @pytest.mark.parametrize("pattern", ["*.nii", "1.nii", "[12].nii", "[1].nii"])
    def test_may_be_a_pattern(self, islands, assert_same_answer, tmp_path, pattern):
        for number in (2, 0, 1):
            image(islands(seed=number)).to_filename(tmp_path / f"{number}.nii")
        _, index = assert_same_answer(lambda: str(tmp_path / pattern))
        assert set(index) == set(range(len(list(tmp_path.glob(pattern)))))

    @pytest.mark.parametrize(
        "make",
        [
            lambda a, b, c, series, path: [a],
            lambda a, b, c, series, path: [a, b, c],
            lambda a, b, c, series, path: (a, b),
            lambda a, b, c, series, path: [str(path), path, c],
            lambda a, b, c, series, path: [series, series],
            lambda a, b, c, series, path: [[a, b], [c, a]],
        ],
        ids=["one", "list", "tuple", "paths", "series", "nested"],
    )
    @pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
    def test_may_be_a_list(self, islands, assert_same_answer, tmp_path, make, dtype):
        maps = [image(islands(seed=seed, dtype=dtype)) for seed in range(3)]
        series = image(islands((12, 11, 10, 2), dtype=dtype))
        maps[0].to_filename(tmp_path / "map.nii.gz")
        assert_same_answer(lambda: make(*maps, series, tmp_path / "map.nii.gz"), 2 * VOXEL_MM3)


class TestMasks:
    """On the grid of the map; other grids are in test_masks.py."""

    @pytest.mark.parametrize("shape", [(12, 11, 10), (12, 11, 10, 2)])
    @pytest.mark.parametrize("dtype", ["u1", "<f4", ">i2"])
    @pytest.mark.parametrize("as_file", [False, True])
    def test_cut_regions(self, blobs, islands, assert_same_answer, tmp_path, shape, dtype, as_file):
        mask = image((blobs((12, 11, 10), seed=1) > 0).astype(dtype))
        mask.to_filename(tmp_path / "mask.nii")
        mask_img = tmp_path / "mask.nii" if as_file else mask
        regions_img, _ = assert_same_answer(lambda: image(islands(shape)), mask_img=mask_img)
        assert not regions_img.get_fdata()[np.asarray(mask.dataobj) == 0].any()

    def test_that_cover_no_region_leave_none(self, assert_same_answer):
        data = np.zeros((3, 3, 3))
        data[1, 1, 1] = 3
        mask = image((data == 0).astype(np.uint8))
        assert assert_same_answer(lambda: image(data), mask_img=mask) == (None, None)


class TestBadParameters:
    """The class of the error is nilearn's, or derives from it."""

    @pytest.mark.parametrize(
        ("kwargs", "error", "match"),
        [
            ({"extract_type": "local"}, ValueError, "extract_type='local' is not one of 'connec"),
            ({"extract_type": None}, ValueError, "extract_type=None is not one of"),
            ({"min_region_size": "5"}, TypeError, "min_region_size='5' is a str; pass mm"),
            ({"min_region_size": None}, TypeError, "min_region_size=None is a NoneType"),
            ({"maps_img": 5}, TypeError, "a int is not an image; pass a path or a nibabel image"),
            ({"maps_img": None}, TypeError, "a NoneType is not an image"),
            ({"maps_img": []}, TypeError, "the list of images is empty; pass at least one"),
            ({"maps_img": [5]}, TypeError, "a int is not an image"),
            ({"maps_img": np.zeros((2, 2, 2))}, TypeError, "a ndarray is not an image"),
        ],
    )
    def test_raise_what_nilearn_raises(self, islands, answer, kwargs, error, match):
        kwargs = {"maps_img": image(islands()), "extract_type": COMPONENTS, **kwargs}
        assert answer(nilearn_regions.connected_regions, **kwargs).error is error
        with pytest.raises(error, match=match):
            connected_regions(**kwargs)

    @pytest.mark.parametrize(
        ("shape", "affine"),
        [((12, 11, 9), GRID), ((12, 11, 10), GRID + 0.01), ((12, 11, 10), np.eye(4))],
    )
    def test_lists_have_one_grid(self, islands, answer, shape, affine):
        maps = [image(islands()), image(islands(shape), affine)]
        assert answer(nilearn_regions.connected_regions, maps).error is ValueError
        with pytest.raises(InvalidMapError, match=r"image 1 of the list .* is on another grid"):
            connected_regions(maps, 0, COMPONENTS)

    def test_a_missing_file_is_named(self, answer, tmp_path):
        path = tmp_path / "none.nii"
        assert answer(nilearn_regions.connected_regions, path).error is ValueError
        with pytest.raises(InvalidMapError, match=r"none\.nii: no such file"):
            connected_regions(path, 0, COMPONENTS)


class TestDeviations:
    """Where nilearn's answer is a defect; each test shows both answers."""

    def test_voxels_that_are_not_finite_belong_to_no_region(self):
        # In nilearn NaN is foreground, and the background of each region, 0 times NaN, is NaN.
        data = np.zeros((1, 1, 9), np.float32)
        data[0, 0, [0, 1, 3, 5]] = 3, np.nan, 4, np.inf
        with np.errstate(invalid="ignore"):
            theirs, _ = nilearn_regions.connected_regions(image(data), 0, COMPONENTS)
        assert np.isnan(theirs.get_fdata()[0, 0, 1]).all()
        with pytest.warns(UserWarning, match="2 voxels are NaN or infinite, and background"):
            ours, _ = connected_regions(image(data), 0, COMPONENTS)
        expected = np.zeros((1, 1, 9, 2), np.float32)
        expected[0, 0, 0, 0], expected[0, 0, 3, 1] = 3, 4
        np.testing.assert_array_equal(ours.dataobj, expected, strict=True)

    def test_voxels_outside_the_mask_need_not_be_finite(self, assert_same_answer):
        data = np.array([[[3.0, np.nan, 4.0, 0.0]]])
        mask = image(np.isfinite(data).astype(np.uint8))
        assert_same_answer(lambda: image(data), mask_img=mask)

    @pytest.mark.parametrize("min_region_size", [-1, -1e9])
    def test_the_background_is_no_region(self, islands, min_region_size):
        # nilearn compares the background's size, set to 0, with the minimum like any region's.
        img = image(islands())
        expected, index = nilearn_regions.connected_regions(img, 0, COMPONENTS)
        theirs, _ = nilearn_regions.connected_regions(img, min_region_size, COMPONENTS)
        assert theirs.shape[3] == expected.shape[3] + 1
        ours, our_index = connected_regions(img, min_region_size, COMPONENTS)
        assert our_index == index
        np.testing.assert_array_equal(ours.dataobj, expected.dataobj, strict=True)

    def test_a_minimum_that_is_no_number_is_refused(self, answer, islands):
        # Nothing compares with NaN, so nilearn reports that there is no region.
        theirs = answer(nilearn_regions.connected_regions, image(islands()), np.nan, COMPONENTS)
        assert theirs.value == (None, None)
        with pytest.raises(ValueError, match="min_region_size=nan is no volume; pass mm"):
            connected_regions(image(islands()), np.nan, COMPONENTS)

    @pytest.mark.parametrize("dtype", [">f4", ">f8", ">i2", ">i4"])
    @pytest.mark.parametrize("shape", [(12, 11, 10), (12, 11, 10, 2)])
    def test_big_endian_maps_have_regions(
        self, islands, answer, assert_same_image, tmp_path, dtype, shape
    ):
        # SciPy labels native bytes only, and nilearn passes it the map as it is.
        img, native = (
            nib.Nifti1Image(
                islands(shape, dtype=order), GRID, nib.Nifti1Header(endianness=order[0])
            )
            for order in (dtype, dtype.replace(">", "<"))
        )
        img.set_data_dtype(dtype)
        img.to_filename(tmp_path / "map.nii")
        theirs = answer(nilearn_regions.connected_regions, img, 0, COMPONENTS)
        assert theirs.error is ValueError
        expected, expected_index = nilearn_regions.connected_regions(native, 0, COMPONENTS)
        for source in (img, tmp_path / "map.nii"):
            ours, index = connected_regions(source, 0, COMPONENTS)
            assert index == expected_index
            assert ours.header.endianness == ">"
            np.testing.assert_array_equal(ours.dataobj, expected.dataobj, strict=True)

    @pytest.mark.parametrize("dtype", [np.int64, np.uint64])
    def test_the_result_is_no_64_bit_integers_to_warn_of(self, islands, answer, dtype):
        # nilearn warns once a region that a helper image, not the result, is cut to 32 bits.
        img = image(islands(dtype=dtype))
        theirs = answer(nilearn_regions.connected_regions, img, 0, COMPONENTS)
        assert UserWarning in theirs.warnings
        ours, index = connected_regions(img, 0, COMPONENTS)
        expected, expected_index = theirs.value
        assert index == expected_index
        np.testing.assert_array_equal(ours.dataobj, expected.dataobj, strict=True)

    @pytest.mark.parametrize("dtype", [np.int16, np.uint8])
    def test_the_file_holds_what_the_image_does(self, blobs, tmp_path, dtype):
        # nilearn keeps the dtype of the maps for float32 voxels: scaled, zeros are lost on disk.
        scaled = nib.Nifti1Image(blobs() + 1, GRID)
        scaled.set_data_dtype(dtype)
        scaled.to_filename(tmp_path / "maps.nii")
        thresholded = threshold_img(tmp_path / "maps.nii", "90%")
        for function, same in (
            (nilearn_regions.connected_regions, False),
            (connected_regions, True),
        ):
            regions_img, _ = function(thresholded, 0, COMPONENTS)
            regions_img.to_filename(tmp_path / "regions.nii")
            stored = nib.load(tmp_path / "regions.nii").get_fdata(dtype=np.float32)
            assert np.array_equal(stored, regions_img.get_fdata(dtype=np.float32)) == same

    def test_lists_of_several_dtypes_lose_nothing(self, islands):
        # nilearn casts all maps to the dtype of the first, here cutting off the decimals.
        maps = [image(islands(dtype=np.int16)), image(islands(seed=1))]
        ours, index = connected_regions(maps, 0, COMPONENTS)
        of_second = ours.get_fdata(dtype=np.float32)[..., np.array(index) == 1].sum(axis=3)
        np.testing.assert_array_equal(of_second, islands(seed=1))
        theirs, index = nilearn_regions.connected_regions(maps, 0, COMPONENTS)
        of_second = theirs.get_fdata(dtype=np.float32)[..., np.array(index) == 1].sum(axis=3)
        assert not np.array_equal(of_second, islands(seed=1))

    def test_lists_may_mix_maps_and_series_and_be_generators(self, islands, answer):
        # nilearn asks for one number of axes, and uses generators up while it checks them.
        one, series = image(islands()), image(islands((12, 11, 10, 2), seed=1))
        for maps in ([one, series], (each for each in [one, one])):
            assert answer(nilearn_regions.connected_regions, maps, 0).error is not None
        ours, index = connected_regions((each for each in [one, series]), 0, COMPONENTS)
        data = np.concatenate([islands()[..., np.newaxis], series.dataobj], axis=3)
        expected, expected_index = nilearn_regions.connected_regions(image(data), 0, COMPONENTS)
        assert index == expected_index
        np.testing.assert_array_equal(ours.dataobj, expected.dataobj, strict=True)

    @pytest.mark.parametrize("image_class", [nib.MGHImage, nib.Nifti1Pair])
    def test_regions_are_single_nifti_files(self, islands, image_class):
        # nilearn answers in the class of the maps, some of which cannot be saved under .nii.
        ours, index = connected_regions(image_class(islands(), GRID), 0, COMPONENTS)
        assert isinstance(ours, nib.Nifti1Image)
        expected, expected_index = nilearn_regions.connected_regions(
            image(islands()), 0, COMPONENTS
        )
        assert index == expected_index
        np.testing.assert_array_equal(ours.dataobj, expected.dataobj, strict=True)
        np.testing.assert_array_equal(ours.affine, expected.affine)

    def test_more_regions_than_nifti1_has_volumes_are_in_nifti2(self):
        # nilearn would fill 11 GB with volumes, only to find that NIfTI-1 counts to 32,767.
        data = (np.indices((42, 42, 42)).sum(axis=0) % 2).astype(np.float32)
        ours, index = connected_regions(image(data), 0, COMPONENTS)
        assert isinstance(ours, nib.Nifti2Image)
        assert ours.shape[3] == len(index) == 42**3 // 2
        assert np.count_nonzero(ours.dataobj[..., -1]) == 1


@pytest.mark.parametrize("size", ["5", None, True])
def test_a_size_that_is_no_number_is_told(size):
    img = image(np.ones((3, 3, 3)))
    with pytest.raises(TypeError, match=r"min_region_size=.* pass mm\^3, 0 to keep all regions"):
        connected_regions(img, size)


def test_an_array_is_no_image():
    with pytest.raises(TypeError, match="a ndarray is not an image"):
        connected_regions(np.ones((3, 3, 3), np.float32))
    with pytest.raises(TypeError, match="smoothing_fwhm"):
        connected_regions(image(np.ones((3, 3, 3))), 5, smoothing_fwhm=np.array([3, 3, 3]))
