"""Masks on any grid: the voxels that nilearn takes, and errors that say what is wrong."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nibabel.affines import from_matvec
from nilearn import image as nilearn_image
from nilearn import regions as nilearn_regions
from nilearn.exceptions import DimensionError
from nilearn.masking import load_mask_img

from gpuroi.errors import InvalidMapError
from gpuroi.image import threshold_img
from gpuroi.masks import load_mask
from gpuroi.regions import connected_regions
from tests.conftest import AFFINES, image

SHAPE = (9, 8, 7)
GRID, OBLIQUE = AFFINES["anisotropic"], AFFINES["oblique"]

COS, SIN = np.cos(np.deg2rad(10)), np.sin(np.deg2rad(10))

#: Where the voxels of a mask lie, in voxels of the map; and the shape of the mask.
GRIDS = {
    "the same": (np.eye(4), SHAPE),
    "the same but for rounding": (from_matvec(np.eye(3), [0, 0, 1e-10]), SHAPE),
    "one voxel further": (from_matvec(np.eye(3), [1, 0, 2]), SHAPE),
    "one voxel before": (from_matvec(np.eye(3), [-1, -2, 0]), SHAPE),
    "larger": (from_matvec(np.eye(3), [-2, -2, -2]), (14, 13, 12)),
    "longer": (np.eye(4), (9, 8, 9)),
    "smaller": (np.eye(4), (4, 5, 6)),
    "half a voxel further": (from_matvec(np.eye(3), [0.5, 0.5, 0.5]), SHAPE),
    "thirds of a voxel further": (from_matvec(np.eye(3), [1 / 3, -1 / 3, 0.7]), SHAPE),
    "coarser": (np.diag([2.0, 2, 2, 1]), (6, 6, 6)),
    "coarser by three, half a voxel further": (from_matvec(np.eye(3) * 3, [0.5] * 3), SHAPE),
    "finer": (np.diag([0.5, 0.5, 0.5, 1]), (18, 16, 14)),
    "finer, anisotropic": (np.diag([0.5, 0.6, 0.7, 1]), (18, 14, 12)),
    "flipped": (from_matvec(np.diag([-1, 1, 1]), [8, 0, 0]), SHAPE),
    "flipped in all axes": (from_matvec(np.diag([-1, -1, -1]), [9, 8.5, 7]), (14, 13, 12)),
    "turned by 10 degrees": (
        from_matvec([[COS, -SIN, 0], [SIN, COS, 0], [0, 0, 1]], [-2, -2, -2]),
        (14, 13, 12),
    ),
    "turned by 90 degrees": (from_matvec([[0, -1, 0], [1, 0, 0], [0, 0, 1]], [8, 0, 0]), SHAPE),
    "of other axes": (from_matvec([[0, 1, 0], [0, 0, 1], [1, 0, 0]], [0, 0, 0]), (7, 9, 8)),
    "sheared": (from_matvec([[1, 0.2, 0], [0, 1, 0.1], [0, 0, 1]], [0, 0, 0]), SHAPE),
}

some_grid = pytest.mark.parametrize(("to_map", "shape"), GRIDS.values(), ids=GRIDS)


def random_mask(shape=SHAPE, dtype=np.uint8):
    return (np.random.default_rng(0).random(shape) > 0.4).astype(dtype)


def load(mask_img, affine=GRID):
    return load_mask(mask_img, SHAPE, affine, resample=True)


def nilearn_load(mask_img, affine=GRID):
    """Return what `nilearn.image.threshold_img` makes of a mask."""
    on_map = nilearn_image.resample_img(mask_img, affine, SHAPE, interpolation="nearest")
    return load_mask_img(on_map)[0]


class TestGrids:
    @some_grid
    @pytest.mark.parametrize("dtype", ["u1", "i2", ">i2", "f4", ">f4", "f8"])
    def test_are_sampled_where_nilearn_does(self, affine, to_map, shape, dtype):
        mask_img = image(random_mask(shape, dtype), affine @ to_map)
        np.testing.assert_array_equal(
            load(mask_img, affine), nilearn_load(mask_img, affine), strict=True
        )

    @some_grid
    @pytest.mark.parametrize("threshold", ["70%", 2.0])
    @pytest.mark.parametrize("as_file", [False, True])
    def test_of_threshold_img(
        self, blobs, assert_same_image, tmp_path, affine, to_map, shape, threshold, as_file
    ):
        mask_img = image(random_mask(shape), affine @ to_map)
        mask_img.to_filename(tmp_path / "mask.nii")
        ours, theirs = (
            function(
                image(blobs((*SHAPE, 2)), affine),
                threshold,
                cluster_threshold=3,
                mask_img=tmp_path / "mask.nii" if as_file else mask_img,
            )
            for function in (threshold_img, nilearn_image.threshold_img)
        )
        assert_same_image(ours, theirs)

    @some_grid
    def test_of_connected_regions(self, blobs, assert_same_image, affine, to_map, shape):
        mask_img = image(random_mask(shape), affine @ to_map)
        maps = blobs((*SHAPE, 2))
        maps_img = image(np.where(np.abs(maps) > 3, maps, 0), affine)
        (ours, our_index), (theirs, their_index) = (
            function(maps_img, 0, "connected_components", mask_img=mask_img)
            for function in (connected_regions, nilearn_regions.connected_regions)
        )
        assert our_index == their_index
        assert_same_image(ours, theirs)

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(
        matrix=hnp.arrays(np.float64, (3, 3), elements=st.integers(-9, 9).map(lambda n: n / 10)),
        shift=hnp.arrays(np.float64, (3,), elements=st.integers(-6, 6).map(lambda n: n / 2)),
        shape=hnp.array_shapes(min_dims=3, max_dims=3, min_side=2, max_side=12),
    )
    def test_of_any_affine(self, answer, matrix, shift, shape):
        assume(abs(np.linalg.det(matrix)) > 0.05)
        mask_img = image(random_mask(shape), OBLIQUE @ from_matvec(matrix, shift))
        ours, theirs = answer(load, mask_img, OBLIQUE), answer(nilearn_load, mask_img, OBLIQUE)
        assert ours.error is (None if theirs.error is None else InvalidMapError)
        np.testing.assert_array_equal(ours.value, theirs.value)

    def test_of_the_same_affine_keep_their_borders(self):
        # Times its rounded inverse, the affine would put voxels at the border outside by 1e-17.
        assert load(image(np.ones((9, 8, 9), np.uint8), OBLIQUE), OBLIQUE).all()

    @pytest.mark.parametrize("voxels", [100, -100])
    def test_that_miss_the_map_are_refused(self, answer, voxels):
        mask_img = image(random_mask(), GRID @ from_matvec(np.eye(3), [voxels] * 3))
        assert issubclass(answer(nilearn_load, mask_img).error, ValueError)
        with pytest.raises(InvalidMapError, match="is zero everywhere on the map: it would hide"):
            load(mask_img)

    @some_grid
    def test_are_resampled_only_if_asked(self, to_map, shape):
        mask_img = image(random_mask(shape), GRID @ to_map)
        if shape == SHAPE and np.allclose(to_map, np.eye(4)):
            inside = load_mask(mask_img, SHAPE, GRID, resample=False)
            np.testing.assert_array_equal(inside, random_mask().astype(bool))
        else:
            match = r"population <Nifti1Image in memory> is on another grid than the map: "
            with pytest.raises(InvalidMapError, match=match + r"(shape \(|affine \[\[)[^\n]+$"):
                load_mask(mask_img, SHAPE, GRID, resample=False, parameter="population")


class TestValues:
    @pytest.mark.parametrize("value", [1, 3, -1, 100])
    @pytest.mark.parametrize("dtype", ["i1", "i2", ">i4", "f4", ">f8"])
    def test_may_be_any_beside_zero(self, value, dtype):
        mask_img = image(random_mask(dtype=dtype) * np.array(value, dtype))
        np.testing.assert_array_equal(load(mask_img), nilearn_load(mask_img), strict=True)
        np.testing.assert_array_equal(load(mask_img), random_mask().astype(bool))

    @pytest.mark.parametrize("value", [1e-42, 1e30])
    def test_may_be_tiny_or_huge(self, value):
        mask_img = image(random_mask(dtype=np.float32) * np.float32(value))
        np.testing.assert_array_equal(load(mask_img), random_mask().astype(bool))

    def test_may_be_one_everywhere(self):
        mask_img = image(np.full(SHAPE, 2, np.int16))
        assert load(mask_img).all()
        assert nilearn_load(mask_img).all()

    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    @pytest.mark.parametrize("as_path", [str, Path])
    def test_may_come_from_a_file(self, tmp_path, suffix, as_path):
        path = tmp_path / f"mask{suffix}"
        image(random_mask()).to_filename(path)
        np.testing.assert_array_equal(load(as_path(path)), random_mask().astype(bool))

    def test_may_be_a_series_of_one(self):
        mask_img = image(random_mask((*SHAPE, 1)))
        np.testing.assert_array_equal(load(mask_img), random_mask().astype(bool))
        np.testing.assert_array_equal(load(mask_img), nilearn_load(mask_img))

    @pytest.mark.parametrize(
        ("grid", "their_warnings", "theirs_is_changed"),
        [("the same", [UserWarning], True), ("larger", [RuntimeWarning, UserWarning], False)],
    )
    def test_that_are_not_finite_are_outside(
        self, blobs, answer, assert_same_image, grid, their_warnings, theirs_is_changed
    ):
        # nilearn writes zeros into the mask that it was given; gpuroi leaves it alone.
        to_map, shape = GRIDS[grid]
        data = np.ones(shape, np.float32)
        data[3, 3, 3:6] = np.nan, np.inf, -np.inf
        our_mask, their_mask = (image(data.copy(), GRID @ to_map) for _ in range(2))
        img = image(blobs())
        ours = answer(threshold_img, img, 1.0, mask_img=our_mask)
        theirs = answer(nilearn_image.threshold_img, img, 1.0, mask_img=their_mask)
        assert_same_image(ours.value, theirs.value)
        assert (ours.warnings, theirs.warnings) == ([UserWarning], their_warnings)
        np.testing.assert_array_equal(our_mask.dataobj, data)
        assert np.isfinite(their_mask.dataobj).all() == theirs_is_changed
        with pytest.warns(UserWarning, match=r"mask_img <.*>: 3 voxels are NaN or infinite, and"):
            load(our_mask)


class TestBadMasks:
    @pytest.mark.parametrize(
        ("data", "their_error", "match"),
        [
            (np.zeros(SHAPE), ValueError, "mask_img <Nifti1Image in memory> is zero everywhere"),
            (np.arange(504).reshape(SHAPE) % 3.0, ValueError, r"has 2 values besides 0 \(1 to 2\)"),
            (np.arange(504).reshape(SHAPE) % 2.0 + 1, ValueError, "Binarise it first, for example"),
            (np.ones((*SHAPE, 2)), DimensionError, r"a 3-D mask, got shape \(9, 8, 7, 2\)"),
            (np.ones((9, 8)), DimensionError, r"got shape \(9, 8\)"),
        ],
        ids=["empty", "three values", "no zeros", "4-D", "2-D"],
    )
    def test_are_refused_by_both_functions(self, blobs, answer, data, their_error, match):
        img, mask_img = image(blobs()), image(data)
        theirs = answer(nilearn_image.threshold_img, img, 1.0, mask_img=mask_img)
        assert theirs.error is their_error
        with pytest.raises(InvalidMapError, match=match):
            threshold_img(img, 1.0, mask_img=mask_img)
        with pytest.raises(InvalidMapError, match=match):
            connected_regions(img, 0, "connected_components", mask_img=mask_img)

    def test_are_missing(self, tmp_path):
        with pytest.raises(InvalidMapError, match=r"mask\.nii: no such file"):
            load(tmp_path / "mask.nii")

    def test_are_no_images(self):
        with pytest.raises(TypeError, match="is a ndarray; pass a path or an image"):
            load(random_mask())

    def test_have_a_singular_affine(self):
        header = nib.Nifti1Header()
        header["sform_code"] = 1
        header["srow_x"], header["srow_y"] = [1, 0, 0, 0], [0, 1, 0, 0]
        with pytest.raises(InvalidMapError, match="its affine is singular or not finite"):
            load(nib.Nifti1Image(random_mask(), None, header))


class TestDeviations:
    """Where nilearn warns of something that changes nothing."""

    def test_without_an_sform(self, answer):
        # The qform says as much; nilearn warns that its result may not be as expected.
        header = nib.Nifti1Header()
        header.set_qform(from_matvec(np.diag([2.0, 3, 1.5]), [-11, 2, 6]), 1)
        mask_img = nib.Nifti1Image(random_mask((14, 13, 12)), None, header)
        ours, theirs = answer(load, mask_img), answer(nilearn_load, mask_img)
        assert (ours.warnings, theirs.warnings) == ([], [UserWarning])
        np.testing.assert_array_equal(ours.value, theirs.value)

    @pytest.mark.parametrize("dtype", [np.int64, np.uint64])
    def test_of_64_bits(self, answer, dtype):
        # nilearn warns that it makes them 32, which no mask needs and nobody sees.
        mask_img = image(random_mask(dtype=dtype))
        ours, theirs = answer(load, mask_img, np.eye(4)), answer(nilearn_load, mask_img, np.eye(4))
        assert (ours.warnings, theirs.warnings) == ([], [UserWarning])
        np.testing.assert_array_equal(ours.value, theirs.value)
