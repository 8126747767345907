"""`gpuroi.image.threshold_img` against nilearn's: the same arguments, the same voxels."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nilearn import image as nilearn_image

from gpuroi.errors import InvalidMapError
from gpuroi.image import threshold_img
from tests.conftest import AFFINES, image

GRID = AFFINES["anisotropic"]

DTYPES = ("<f4", "<f8", ">f4", ">f8", "i1", "u1", "<i2", ">i2", "<u2", "<i4", "<i8", "<u8")

LAYOUTS = {
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "every second of twice as many": lambda data: np.repeat(data, 2, axis=0)[::2],
    "backwards": lambda data: data[::-1, :, ::-1].copy()[::-1, :, ::-1],
    "other axes first": lambda data: np.moveaxis(np.moveaxis(data, 2, 0).copy(), 0, 2),
}

THRESHOLDS = (
    *("0%", "50%", "97.5%", "100%", " 5%", "5 %"),
    *(0, 0.0, 1e-7, 1.5, 2, 1e9, np.inf, np.float32(2.3), np.int64(3)),
)

#: Maps on which a one-sided threshold may find nobody on its side, or everybody.
PLAIN_MAPS = {
    "zeros": np.zeros((4, 3, 2), np.float32),
    "constant": np.full((4, 3, 2), 2.0, np.float32),
    "below nilearn's offset": np.full((4, 3, 2), 5e-6, np.float32),
    "bytes": np.full((4, 3, 2), 7, np.uint8),
    "beyond 32 bits": np.full((4, 3, 2), 2**40, np.int64),
    "far apart": np.arange(-12, 12).reshape(4, 3, 2) * 2**50,
    "one voxel": np.full((1, 1, 1), 5.0, np.float32),
    "signed zeros": np.where(np.arange(24).reshape(4, 3, 2) % 2, 3, -0.0).astype(np.float32),
    "denormal": np.linspace(-1e-42, 1e-42, 24, dtype=np.float32).reshape(4, 3, 2),
    "huge": np.linspace(-3e38, 3e38, 24, dtype=np.float32).reshape(4, 3, 2),
}

two_sided_or_not = pytest.mark.parametrize("two_sided", [True, False])


@pytest.fixture(scope="session")
def assert_same_answer(answer, assert_same_image):
    """Return a function that calls gpuroi and nilearn with a new image each."""

    def compare(make_image, *args, on_disk=None, **kwargs):
        our_image, their_image = make_image(), make_image()
        ours = answer(threshold_img, our_image, *args, **kwargs)
        theirs = answer(nilearn_image.threshold_img, their_image, *args, **kwargs)
        assert ours.error is theirs.error is None
        assert ours.warnings == theirs.warnings
        assert_same_image(ours.value, theirs.value, on_disk)
        if isinstance(our_image, nib.Nifti1Image):  # changed, or not, as nilearn's
            np.testing.assert_array_equal(our_image.dataobj, their_image.dataobj)
        return ours.value

    return compare


class TestThresholds:
    @two_sided_or_not
    @pytest.mark.parametrize("cluster_threshold", [0, 20])
    @pytest.mark.parametrize("threshold", ["0%", "50%", "97%", "100%", 0, 1e-7, 3.0, 100])
    def test_of_the_real_map(
        self, sample_img, assert_same_answer, threshold, cluster_threshold, two_sided
    ):
        assert_same_answer(lambda: sample_img, threshold, cluster_threshold, two_sided)

    @two_sided_or_not
    @pytest.mark.parametrize("threshold", THRESHOLDS, ids=repr)
    @pytest.mark.parametrize("shape", [(9, 8, 7), (9, 8, 7, 3), (9, 8, 7, 1)])
    def test_of_maps_and_series(self, blobs, assert_same_answer, shape, threshold, two_sided):
        assert_same_answer(lambda: image(blobs(shape)), threshold, two_sided=two_sided)

    @pytest.mark.parametrize("threshold", [-1e-9, -1.0, -2, -1e9, -np.inf])
    @pytest.mark.parametrize("dtype", ["<f4", "<i2"])
    def test_below_zero_keep_what_lies_below(self, blobs, assert_same_answer, threshold, dtype):
        kept = assert_same_answer(lambda: image(blobs(dtype=dtype)), threshold, two_sided=False)
        assert not (kept.get_fdata() > 0).any()

    @two_sided_or_not
    @pytest.mark.parametrize("data", PLAIN_MAPS.values(), ids=PLAIN_MAPS)
    def test_of_plain_maps(self, data, assert_same_answer, two_sided):
        for threshold in THRESHOLDS:
            assert_same_answer(lambda: image(data.copy()), threshold, two_sided=two_sided)

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(
        data=hnp.arrays(
            np.float32,
            hnp.array_shapes(min_dims=3, max_dims=4, min_side=2, max_side=5),
            elements=st.floats(-8, 8, width=16),
        ),
        threshold=st.floats(0, 100).map("{}%".format) | st.floats(0, 9),
        cluster_threshold=st.integers(0, 4),
        two_sided=st.booleans(),
    )
    def test_of_any_map(self, assert_same_answer, data, threshold, cluster_threshold, two_sided):
        data[0, 0, 0], data[-1, -1, -1] = 0, 1  # without, some answers of nilearn are defects
        assert_same_answer(
            lambda: image(data.copy()), threshold, cluster_threshold, two_sided=two_sided
        )

    @pytest.mark.parametrize("threshold", ["80%", 2.0])
    def test_on_every_backend(self, blobs, assert_same_image, backend, threshold):
        series = image(blobs((9, 8, 7, 3)))
        assert_same_image(
            threshold_img(series, threshold, 5, backend=backend),
            nilearn_image.threshold_img(series, threshold, 5),
        )


class TestClusters:
    @pytest.mark.parametrize("cluster_threshold", [-1, 0, 1, 2, 5, 12, 1000, np.int8(3)])
    @pytest.mark.parametrize("shape", [(9, 8, 7), (9, 8, 7, 3)])
    @pytest.mark.parametrize("dtype", ["<f4", ">i2", "u1"])
    def test_of_fewer_voxels_are_cut(
        self, blobs, assert_same_answer, cluster_threshold, shape, dtype
    ):
        assert_same_answer(lambda: image(blobs(shape, dtype=dtype)), "85%", cluster_threshold)

    @pytest.mark.parametrize("n_voxels", [1, 2, 4])
    def test_of_exactly_as_many_are_kept(self, assert_same_answer, n_voxels):
        data = np.zeros((3, 3, 9), np.float32)
        data[1, 1, 1 : 1 + n_voxels] = 4
        for cluster_threshold in (n_voxels, n_voxels + 1):
            kept = assert_same_answer(lambda: image(data.copy()), 1.0, cluster_threshold)
            assert kept.get_fdata().any() == (cluster_threshold == n_voxels)

    def test_of_opposite_signs_count_apart(self, assert_same_answer):
        data = np.array([[[3.0, 3, -3, -3, -3, 0, 3]]], np.float32)
        kept = assert_same_answer(lambda: image(data.copy()), 1.0, 3)
        assert kept.get_fdata().tolist() == [[[0, 0, -3, -3, -3, 0, 0]]]

    @pytest.mark.parametrize(("fraction", "whole"), [(4.5, 5), (np.float32(5), 5), (0.5, 0)])
    def test_take_fractions(self, blobs, answer, assert_same_image, fraction, whole):
        # nilearn refuses the floats that its documentation promises to take.
        img = image(blobs())
        assert answer(nilearn_image.threshold_img, img, "85%", fraction).error is TypeError
        assert_same_image(
            threshold_img(img, "85%", fraction), nilearn_image.threshold_img(img, "85%", whole)
        )


class TestVoxels:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
    @pytest.mark.parametrize("shape", [(9, 8, 7), (9, 8, 7, 2)])
    def test_of_any_dtype_and_layout(self, blobs, assert_same_answer, dtype, layout, shape):
        for threshold in ("80%", 2.0, 0):
            for two_sided in (True, False):
                assert_same_answer(
                    lambda: image(layout(blobs(shape, dtype=dtype))),
                    threshold,
                    cluster_threshold=4,
                    two_sided=two_sided,
                )

    @pytest.mark.parametrize("copy", [True, False])
    @pytest.mark.parametrize("threshold", ["60%", 1.0])
    def test_that_are_not_finite_become_zero_with_one_warning(
        self, blobs, assert_same_answer, threshold, copy
    ):
        data = blobs()
        data[2, 3, :4] = [np.nan, np.inf, -np.inf, np.nan]
        kept = assert_same_answer(lambda: image(data.copy()), threshold, copy=copy)
        assert not kept.get_fdata()[2, 3, :4].any()
        with pytest.warns(UserWarning, match="4 voxels are NaN or infinite, and set to zero"):
            threshold_img(image(data), threshold)

    def test_that_are_never_finite_leave_nothing(self, assert_same_answer):
        data = np.full((2, 2, 2), np.nan, np.float32)
        assert not assert_same_answer(lambda: image(data.copy()), "50%").get_fdata().any()

    @pytest.mark.parametrize(
        ("data", "match"),
        [
            (np.full((2, 2, 2), 3, np.int64), "64-bit integers.* the result is int32"),
            (np.full((2, 2, 2), -(2**31) - 1, np.int64), "some do not fit into 32 bits"),
            (np.full((2, 2, 2), 2**31, np.uint64), "some do not fit into 32 bits"),
        ],
    )
    def test_of_64_bits_become_32_where_they_fit(self, assert_same_answer, data, match):
        assert_same_answer(lambda: image(data.copy()), 1)
        with pytest.warns(UserWarning, match=match):
            threshold_img(image(data), 1)

    @pytest.mark.parametrize(
        ("threshold", "two_sided", "match"),
        [
            (9, True, r"threshold=9.0 exceeds 8.0, the largest magnitude"),
            (6, False, r"threshold=6.0 exceeds 5.0, the largest value"),
            (3, False, r"threshold=3.0 exceeds -1.0, the largest value"),
            (-9, False, r"threshold=-9.0 is below -8.0, the smallest value"),
        ],
    )
    def test_that_all_fall_short_are_worth_a_warning(self, threshold, two_sided, match):
        data = np.array([[[5.0, -8.0, 0.0]]]) if threshold != 3 else np.full((2, 2, 2), -1.0)
        with pytest.warns(UserWarning, match=match):
            assert not threshold_img(image(data), threshold, 0, two_sided).get_fdata().any()


class TestMemory:
    @pytest.mark.parametrize("copy", [True, False])
    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
    def test_is_shared_only_without_copy(self, blobs, assert_same_answer, copy, layout):
        images = []

        def make_image():
            images.append(image(layout(blobs())))
            return images[-1]

        kept = assert_same_answer(make_image, "90%", copy=copy)
        assert np.shares_memory(kept.dataobj, images[0].dataobj) == (not copy)
        assert np.array_equal(images[0].dataobj, blobs()) == copy
        theirs = nilearn_image.threshold_img(make_image(), "90%", copy=copy)
        assert kept.dataobj.strides == theirs.dataobj.strides

    @pytest.mark.parametrize("copy", [True, False])
    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    def test_of_a_file_is_left_alone(self, blobs, assert_same_answer, tmp_path, copy, suffix):
        path = tmp_path / f"map{suffix}"
        image(blobs()).to_filename(path)
        before = path.read_bytes()
        img = nib.load(path)
        assert_same_answer(lambda: img, "90%", copy=copy)
        np.testing.assert_array_equal(img.get_fdata(), blobs())
        assert path.read_bytes() == before

    def test_of_a_file_is_left_alone_even_if_it_was_read_before(self, blobs, tmp_path):
        # nilearn then keeps the thresholded array in the image, for its next call to find.
        image(blobs()).to_filename(tmp_path / "map.nii")
        for function, same in ((threshold_img, True), (nilearn_image.threshold_img, False)):
            img = nib.load(tmp_path / "map.nii")
            img.get_fdata()
            function(img, "90%", copy=False)
            assert np.array_equal(nilearn_image.get_data(img), blobs()) == same


class TestHeaders:
    @pytest.fixture(params=[nib.Nifti1Image, nib.Nifti2Image])
    def rich_image(self, request, blobs, affine):
        """Return a function that makes an image with much to say in its header."""

        def make():
            img = request.param(blobs(), affine)
            img.header.set_xyzt_units("mm", "sec")
            img.header.set_intent("t test", (12,), name="motor")
            img.header["descrip"] = b"left against right"
            img.header["cal_max"] = 99
            if request.param is nib.Nifti1Image:
                img.header["glmax"] = 99
            img.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"keep me"))
            img.set_qform(affine, 1, strip_shears=True)
            return img

        return make

    @pytest.mark.parametrize("copy_header", [True, False])
    def test_are_kept_if_asked(self, assert_same_answer, rich_image, copy_header):
        kept = assert_same_answer(rich_image, "90%", copy_header=copy_header)
        assert (kept.header["descrip"] == b"left against right") == copy_header
        assert len(kept.header.extensions) == copy_header

    def test_say_float_where_scaled_integers_would_lose_the_zeros(self, blobs, tmp_path):
        # nilearn keeps int16: scaled on disk, zero is no level, and no voxel is background again.
        data = blobs(dtype=np.float64) + 1
        scaled = nib.Nifti1Image(data, GRID)
        scaled.set_data_dtype(np.int16)
        scaled.to_filename(tmp_path / "scaled.nii")
        background = {}
        for function in (threshold_img, nilearn_image.threshold_img):
            kept = function(tmp_path / "scaled.nii", "90%")
            kept.to_filename(tmp_path / "kept.nii")
            stored = nib.load(tmp_path / "kept.nii").get_fdata()
            background[function] = np.count_nonzero(stored == 0) / stored.size
        assert background == {threshold_img: 453 / 504, nilearn_image.threshold_img: 0}


class TestFiles:
    @pytest.mark.parametrize("as_path", [str, Path])
    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_of_any_dtype(self, blobs, assert_same_answer, tmp_path, dtype, suffix, as_path):
        path = tmp_path / f"map{suffix}"
        image(blobs(dtype=dtype)).to_filename(path)
        assert_same_answer(lambda: as_path(path), "80%")

    @pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image])
    @pytest.mark.parametrize("byte_order", ["<", ">"])
    @pytest.mark.parametrize("shape", [(9, 8, 7), (9, 8, 7, 2)])
    def test_of_other_headers(
        self, blobs, assert_same_answer, tmp_path, image_class, byte_order, shape
    ):
        header = image_class.header_class(endianness=byte_order)
        image_class(blobs(shape), GRID, header).to_filename(tmp_path / "map.nii")
        kept = assert_same_answer(lambda: tmp_path / "map.nii", 2.0)
        assert type(kept) is image_class
        assert kept.header.endianness == byte_order

    @pytest.mark.parametrize("dtype", [np.int16, np.uint8])
    @pytest.mark.parametrize("threshold", ["80%", 2.0])
    def test_of_scaled_integers(self, blobs, assert_same_answer, tmp_path, dtype, threshold):
        img = nib.Nifti1Image(blobs(), GRID)
        img.set_data_dtype(dtype)
        img.to_filename(tmp_path / "map.nii.gz")
        assert nib.load(tmp_path / "map.nii.gz").dataobj.slope != 1
        assert_same_answer(lambda: tmp_path / "map.nii.gz", threshold, on_disk=np.float64)

    @pytest.mark.parametrize("as_path", [str, Path])
    @pytest.mark.parametrize(
        "pattern", ["run-*.nii", "run-[01].nii", "run-?.n*", "run-2*", "*2.nii"]
    )
    @pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
    def test_that_match_a_pattern_are_one_series(
        self, blobs, assert_same_answer, tmp_path, as_path, pattern, dtype
    ):
        for number in (2, 0, 1):
            image(blobs(seed=number, dtype=dtype)).to_filename(tmp_path / f"run-{number}.nii")
        kept = assert_same_answer(lambda: as_path(tmp_path / pattern), "90%")
        assert kept.shape == (9, 8, 7, len(list(tmp_path.glob(pattern))))

    def test_at_home(self, blobs, assert_same_answer, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        image(blobs()).to_filename(tmp_path / "map.nii")
        assert assert_same_answer(lambda: "~/map.nii", "90%").ndim == 3
        assert assert_same_answer(lambda: "~/ma*.nii", "90%").ndim == 4

    def test_with_brackets_in_their_name_are_no_pattern(self, blobs, tmp_path, assert_same_image):
        # nilearn takes them for a pattern, and finds nothing.
        img, path = image(blobs()), tmp_path / "map[1].nii"
        img.to_filename(path)
        assert_same_image(threshold_img(path, "90%"), nilearn_image.threshold_img(img, "90%"))

    @pytest.mark.parametrize("suffix", [".img", ".hdr"])
    def test_that_are_pairs(self, blobs, answer, tmp_path, assert_same_image, suffix):
        # nilearn loads a pair as a class that it then compares with the threshold as a number.
        nib.Nifti1Pair(blobs(), GRID).to_filename(tmp_path / "map.img")
        path = tmp_path / f"map{suffix}"
        assert answer(nilearn_image.threshold_img, path, "90%").error is TypeError
        kept = threshold_img(path, "90%")
        assert type(kept) is nib.Nifti1Image
        expected = nilearn_image.threshold_img(image(blobs()), "90%")
        np.testing.assert_array_equal(kept.dataobj, expected.dataobj, strict=True)

    def test_of_several_dtypes_lose_nothing(self, blobs, tmp_path):
        # nilearn casts all files to the dtype of the first, here cutting off the decimals.
        image(blobs(dtype=np.int16)).to_filename(tmp_path / "0.nii")
        image(blobs()).to_filename(tmp_path / "1.nii")
        kept = threshold_img(str(tmp_path / "?.nii"), 0)
        np.testing.assert_array_equal(
            kept.dataobj, np.stack([blobs(dtype=np.int16), blobs()], axis=-1), strict=True
        )

    def test_that_are_missing(self, answer, tmp_path):
        for path, match in (
            (tmp_path / "none.nii", "none.nii: no such file"),
            (str(tmp_path / "none*.nii"), r"none\*.nii: no file matches this pattern"),
        ):
            assert answer(nilearn_image.threshold_img, path, 1).error is ValueError
            with pytest.raises(InvalidMapError, match=match):  # a ValueError
                threshold_img(path, 1)


class TestMasks:
    """On the grid of the map; other grids are in test_masks.py."""

    @two_sided_or_not
    @pytest.mark.parametrize("threshold", ["0%", "70%", "100%", 0, 2.0])
    @pytest.mark.parametrize("shape", [(9, 8, 7), (9, 8, 7, 2)])
    @pytest.mark.parametrize("mask_dtype", ["u1", "<f4", ">i2"])
    def test_hide_voxels_from_the_map_and_the_ranks(
        self, blobs, assert_same_answer, threshold, two_sided, shape, mask_dtype
    ):
        mask = image((blobs(seed=1) > 0).astype(mask_dtype))
        for cluster_threshold in (0, 4):
            kept = assert_same_answer(
                lambda: image(blobs(shape)), threshold, cluster_threshold, two_sided, mask
            )
            assert not kept.get_fdata()[np.asarray(mask.dataobj) == 0].any()

    @pytest.mark.parametrize("as_path", [str, Path])
    def test_may_be_files(self, blobs, assert_same_answer, tmp_path, as_path):
        image((blobs(seed=1) > 0).astype(np.uint8)).to_filename(tmp_path / "mask.nii.gz")
        mask = as_path(tmp_path / "mask.nii.gz")
        assert_same_answer(lambda: image(blobs()), "70%", mask_img=mask)

    @pytest.mark.parametrize("copy", [True, False])
    def test_change_the_image_only_without_copy(self, blobs, assert_same_answer, copy):
        mask = image((blobs(seed=1) > 0).astype(np.uint8))
        assert_same_answer(lambda: image(blobs()), 2.0, mask_img=mask, copy=copy)


class TestBadParameters:
    """The class of the error is nilearn's, or derives from it."""

    @pytest.mark.parametrize(
        ("kwargs", "error", "match"),
        [
            ({"threshold": "97"}, ValueError, r"'97' has no percent sign; pass '97%'"),
            ({"threshold": "x%"}, ValueError, r"threshold='x%' is no number"),
            ({"threshold": "nan%"}, ValueError, "threshold='nan%' is outside 0% to 100%"),
            ({"threshold": "-3%"}, ValueError, "threshold='-3%' is outside 0% to 100%"),
            ({"threshold": "101%"}, ValueError, "threshold='101%' is outside 0% to 100%"),
            ({"threshold": -1.0}, ValueError, "threshold=-1.0 is below zero, which needs two_si"),
            ({"threshold": np.nan}, ValueError, "threshold=nan is not a number that voxels can"),
            ({"threshold": True}, TypeError, "threshold=True is a bool"),
            ({"threshold": np.True_}, TypeError, r"threshold=np.True_ is a bool"),
            ({"threshold": None}, TypeError, "threshold=None is a NoneType"),
            ({"threshold": [1.0]}, TypeError, r"threshold=\[1.0\] is a list"),
            ({"cluster_threshold": True}, TypeError, "cluster_threshold=True; pass a number of"),
            ({"cluster_threshold": "5"}, TypeError, "cluster_threshold='5'; pass a number of"),
            ({"cluster_threshold": np.inf}, TypeError, "cluster_threshold=inf; pass a number of"),
            ({"cluster_threshold": np.nan}, TypeError, "cluster_threshold=nan; pass a number of"),
            ({"cluster_threshold": None}, TypeError, "cluster_threshold=None; pass a number of"),
            ({"img": 5}, TypeError, "img is a int; pass a path or a 3-D or 4-D nibabel image"),
            ({"img": []}, TypeError, "img is a list"),
            ({"img": np.zeros((2, 2, 2))}, TypeError, "img is a ndarray"),
            ({"mask_img": [1]}, TypeError, r"mask_img=\[1\] is a list; pass a path or an image"),
            ({"mask_img": np.ones((9, 8, 7))}, TypeError, "is a ndarray; pass a path or an image"),
        ],
    )
    def test_raise_what_nilearn_raises(self, blobs, answer, kwargs, error, match):
        kwargs = {"img": image(blobs()), "threshold": 1.0, **kwargs}
        assert answer(nilearn_image.threshold_img, **kwargs).error is error
        with pytest.raises(error, match=match):
            threshold_img(**kwargs)

    def test_an_unknown_backend_is_refused(self, blobs):
        with pytest.raises(ValueError, match="backend='tpu' is unknown"):
            threshold_img(image(blobs()), 1.0, backend="tpu")

    @pytest.mark.parametrize(
        ("data", "match"),
        [
            (np.zeros((3, 3), np.float32), r"expected a 3-D or 4-D image, got shape \(3, 3\)"),
            (np.zeros((3, 3, 3, 1, 2), np.float32), r"got shape \(3, 3, 3, 1, 2\)"),
            (np.zeros((3, 3, 3), np.complex64), "its voxels are complex"),
            (np.zeros((3, 3, 3), [(c, "u1") for c in "RGB"]), "its voxels are RGB"),
        ],
        ids=["2-D", "5-D", "complex", "RGB"],
    )
    def test_images_that_are_no_maps_are_refused(self, data, match):
        with pytest.raises(InvalidMapError, match=match):
            threshold_img(image(data), 1.0)

    def test_a_singular_affine_is_refused(self, blobs):
        header = nib.Nifti1Header()
        header["sform_code"] = 1
        header["srow_x"], header["srow_y"] = [1, 0, 0, 0], [0, 1, 0, 0]
        with pytest.raises(InvalidMapError, match="its affine is singular or not finite"):
            threshold_img(nib.Nifti1Image(blobs(), None, header), 1.0)


class TestDeviations:
    """Where nilearn's answer is a defect; each test shows both answers."""

    @pytest.mark.parametrize("percentile", ["0%", "50%", "100%"])
    def test_nobody_at_or_above_zero_leaves_nothing(self, percentile):
        # The percentile of nobody is NaN, and nothing compares with NaN: nilearn keeps all voxels.
        data = np.full((2, 2, 2), -3.0)
        kept = nilearn_image.threshold_img(image(data), percentile, two_sided=False)
        np.testing.assert_array_equal(kept.dataobj, data)
        ours = threshold_img(image(data), percentile, two_sided=False)
        np.testing.assert_array_equal(ours.dataobj, np.zeros_like(data), strict=True)

    @pytest.mark.parametrize(("value", "threshold"), [(-3.0, 0), (-3.0, 2), (3.0, -1), (3.0, -9)])
    def test_nobody_on_the_side_of_the_threshold_leaves_nothing(self, answer, value, threshold):
        # nilearn fails on the maximum of no voxels, with a message about NumPy.
        data = np.full((2, 2, 2), value)
        theirs = answer(nilearn_image.threshold_img, image(data), threshold, two_sided=False)
        assert theirs.error is ValueError
        ours = answer(threshold_img, image(data), threshold, two_sided=False)
        assert ours.warnings == ([UserWarning] if threshold else [])
        assert not ours.value.get_fdata().any()

    @pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64])
    def test_the_most_negative_integer_is_large(self, answer, dtype):
        # Its magnitude does not fit into its dtype: NumPy's is negative, and so nilearn's cut-off.
        data = np.full((2, 2, 2), 5, dtype)
        data[0, 0, 0] = np.iinfo(dtype).min
        theirs = answer(nilearn_image.threshold_img, image(data), "0%").value
        np.testing.assert_array_equal(theirs.dataobj, data)
        ours = answer(threshold_img, image(data), "0%").value  # the percentile is 5
        np.testing.assert_array_equal(ours.dataobj, np.where(data < 0, data, 0))

    def test_the_most_negative_integer_has_clusters(self):
        # As above; nilearn misses such clusters, and keeps them whatever their size.
        data = np.zeros((3, 3, 3), np.int16)
        data[1, 1, 1] = -32768
        assert nilearn_image.threshold_img(image(data), 0, 5).get_fdata().any()
        assert not threshold_img(image(data), 0, 5).get_fdata().any()

    def test_a_cluster_that_fills_the_volume_can_be_too_small(self):
        # nilearn takes the first label for the background, which such a volume has not.
        data = np.full((2, 2, 2), 3.0)
        assert nilearn_image.threshold_img(image(data), 1, 9).get_fdata().all()
        assert not threshold_img(image(data), 1, 9).get_fdata().any()

    def test_a_threshold_that_is_no_number_is_refused(self):
        # One-sided, nilearn keeps all voxels, because nothing compares with NaN.
        data = np.array([[[3.0, -3.0, 0.0]]])
        kept = nilearn_image.threshold_img(image(data), np.nan, two_sided=False)
        np.testing.assert_array_equal(kept.dataobj, data)
        with pytest.raises(ValueError, match="threshold=nan is not a number that voxels can reach"):
            threshold_img(image(data), np.nan, two_sided=False)

    def test_other_classes_of_images_are_thresholded_too(self, blobs, answer):
        # nilearn takes them from a path only, and returns them as the same class.
        img = nib.MGHImage(blobs(), GRID)
        assert answer(nilearn_image.threshold_img, img, "90%").error is TypeError
        kept = threshold_img(img, "90%")
        assert type(kept) is nib.MGHImage
        expected = nilearn_image.threshold_img(image(blobs()), "90%")
        np.testing.assert_array_equal(kept.dataobj, expected.dataobj, strict=True)
