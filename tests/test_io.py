"""Files in and out: what is read is what is there, and nothing damaged passes for it."""

import gzip
import hashlib
import json
import os
import re
import stat
import struct
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

import gpuroi
from gpuroi import io
from gpuroi.errors import InvalidMapError
from gpuroi.result import COLUMNS, COLUMNS_ON_DISK
from gpuroi.space import same_grid

SHAPE = (5, 6, 7)
DATA = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
AFFINE = np.array([[-2.0, 0.25, 0, 90], [0.25, 3, 0.5, -126], [0, -0.5, 4, -72], [0, 0, 0, 1]])

NII = nib.Nifti1Image(DATA, AFFINE).to_bytes()
NII2 = nib.Nifti2Image(DATA, AFFINE).to_bytes()
GZ = gzip.compress(NII, mtime=0)

# The parts of the messages that tests share.
NO_HEADER = "expected a NIfTI header at its start, found {}; the file is no NIfTI image or .*"
BAD_HEADER = r"expected a valid NIfTI header, found a damaged one \({}\)\."
BAD_DIMENSIONS = r"expected a valid NIfTI header, found dimensions \({}\)\."
BAD_LENGTH = (
    r"its header announces {} \+ {} bytes for data of shape \(.*\) and type float\d\d, the file "
    r"holds {} \({}\)\."
)
BAD_GZIP = (
    r"expected a whole gzip stream, found one that is damaged, cut short or followed by other "
    r"bytes \({}\); fetch or write it again\."
)
BAD_FORMAT = (
    "expected NIfTI or another format that nibabel reads, found something else or a damaged file "
    r"\({}\)\."
)
BAD_SHAPE = r"expected a 3-D map or a 4-D series of maps, got shape \({}\)\."
BAD_AFFINE = r"its affine is singular or not finite, so voxels have no size in mm: \[\[.*\]\]\."


# nibabel's MGH reader does not close the file that it reads the header from.
leaves_files_open = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture
def write(tmp_path):
    """Return what writes bytes to a file of a name and returns its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def with_header(**fields):
    """Return `NII` with other values in header fields, or in entries of them: ``dim={1: -5}``."""
    header = nib.Nifti1Header(NII[:348], check=False)
    for field, value in fields.items():
        if isinstance(value, dict):
            for entry, number in value.items():
                header[field][entry] = number
        else:
            header[field] = value
    return header.binaryblock + NII[348:]


def with_byte(content, position, change):
    """Return `content` with the bits of `change` flipped in one byte."""
    damaged = bytearray(content)
    damaged[position] ^= change
    return bytes(damaged)


def assert_refused(path, message, named=None):
    """Assert that `path` is refused in one message: the file's name, then `message`."""
    name = re.escape(str(named or path))
    with pytest.raises(InvalidMapError, match=rf"\A{name}: {message}\Z"):
        io.read_maps(path)


def assert_reads(path, data=DATA, affine=AFFINE):
    (one,) = io.read_maps(path)
    assert one.name == str(path)
    np.testing.assert_array_equal(one.data, data)
    np.testing.assert_array_equal(one.affine, affine)


class TestFormats:
    @pytest.mark.parametrize(
        ("image_class", "name"),
        [
            (nib.Nifti1Image, "map.nii"),
            (nib.Nifti1Image, "map.nii.gz"),
            (nib.Nifti1Image, "map.nii.bz2"),
            (nib.Nifti2Image, "map.nii"),
            (nib.Nifti2Image, "map.nii.gz"),
            (nib.Nifti1Pair, "map.img"),
            (nib.Nifti1Pair, "map.hdr"),
            (nib.Nifti1Pair, "map.img.gz"),
            (nib.Nifti1Pair, "map.hdr.gz"),
            (nib.Nifti2Pair, "map.img"),
            (nib.Nifti2Pair, "map.hdr"),
            (nib.AnalyzeImage, "map.img"),
            pytest.param(nib.MGHImage, "map.mgh", marks=leaves_files_open),
            pytest.param(nib.MGHImage, "map.mgz", marks=leaves_files_open),
        ],
    )
    def test_is_read_as_nibabel_reads_it(self, tmp_path, image_class, name):
        path = tmp_path / name
        affine = np.diag([2.0, 3.0, 4.0, 1.0]) if image_class is nib.AnalyzeImage else AFFINE
        image_class(DATA, affine).to_filename(path)
        assert_reads(path, DATA, nib.load(path).affine)

    @pytest.mark.parametrize("order", "<>")
    @pytest.mark.parametrize("kind", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
    def test_any_real_type_in_any_byte_order(self, tmp_path, kind, order):
        path, data = tmp_path / "map.nii", (DATA * 40).astype(order + kind)
        header = nib.Nifti1Header(endianness=order)
        header.set_data_dtype(data.dtype)
        nib.Nifti1Image(data, AFFINE, header).to_filename(path)
        assert_reads(path, data)
        assert io.read_maps(path)[0].data.dtype == data.dtype

    def test_scaled_integers_are_scaled(self, tmp_path):
        path, stored = tmp_path / "map.nii.gz", np.arange(-105, 105, dtype=np.int16).reshape(SHAPE)
        image = nib.Nifti1Image(stored, AFFINE)
        image.header.set_slope_inter(0.25, 10)
        image.to_filename(path)
        assert_reads(path, stored * 0.25 + 10)

    @pytest.mark.parametrize("content", [NII, GZ], ids=["plain", "gzip"])
    @pytest.mark.parametrize(
        "name", ["map.nii", "map.nii.gz", "MAP.NII", "MAP.NII.GZ", "map", "zstat_3.1", "map.dat"]
    )
    def test_the_content_decides_not_the_extension(self, write, name, content):
        path = write(name, content)
        assert_reads(path)
        assert io.load(path).get_filename() == str(path)

    @pytest.mark.parametrize(
        "content",
        [
            gzip.compress(NII[:500]) + gzip.compress(NII[500:]),
            b"".join(gzip.compress(NII[start : start + 100]) for start in range(0, len(NII), 100)),
            GZ + gzip.compress(b""),
            gzip.compress(NII[:500]) + gzip.compress(b"") + gzip.compress(NII[500:]),
            gzip.compress(b"") + GZ,
            GZ + bytes(512),
        ],
        ids=[
            "two members",
            "twelve members",
            "an empty member behind",
            "an empty member between",
            "an empty member before",
            "padded with zeros",
        ],
    )
    def test_gzip_files_of_many_members(self, write, content):
        assert_reads(write("map.nii.gz", content))

    @pytest.mark.parametrize("pad", [b"", bytes(8)])
    def test_a_gzip_file_of_almost_nothing(self, tmp_path, pad):
        path, data = tmp_path / "map.nii.gz", np.zeros((70, 70, 70))
        data[3, 4, 5] = 7
        nib.Nifti1Image(data, AFFINE).to_filename(path)
        path.write_bytes(path.read_bytes() + pad)
        assert path.stat().st_size * 100 < data.nbytes
        assert_reads(path, data)

    def test_extensions_of_the_header_are_no_garbage(self, write):
        image = nib.Nifti1Image(DATA, AFFINE)
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"t-test " * 20))
        assert_reads(write("map.nii", image.to_bytes()))

    def test_home_is_expanded(self, write, monkeypatch):
        monkeypatch.setenv("HOME", str(write("map.nii.gz", GZ).parent))
        (one,) = io.read_maps("~/map.nii.gz")
        np.testing.assert_array_equal(one.data, DATA)

    def test_an_image_is_taken_as_it_is(self, write):
        image = nib.Nifti1Image(DATA, AFFINE)
        assert io.load(image) is image
        assert io.read_maps(image)[0].name == "<Nifti1Image in memory>"
        path = write("map.nii", NII)
        assert io.read_maps(nib.load(path))[0].name == str(path)

    @pytest.mark.parametrize(
        ("source", "name"),
        [(3, "int"), (None, "NoneType"), (b"map.nii", "bytes"), (nib.GiftiImage(), "GiftiImage")],
    )
    def test_what_is_no_image_is_a_type_error(self, source, name):
        with pytest.raises(TypeError, match=f"a {name} is not an image; pass a path or a nibabel"):
            io.load(source)


class TestScaling:
    """Against nibabel's float64."""

    @staticmethod
    def stored(dtype):
        """Return every value of a type."""
        limits = np.iinfo(dtype)
        return np.arange(limits.min, limits.max + 1).astype(dtype).reshape(16, 16, -1)

    @staticmethod
    def saved(path, stored, slope, inter, image_class=nib.Nifti1Image, order="<"):
        header = image_class.header_class(endianness=order)
        header.set_data_dtype(stored.dtype.newbyteorder(order))
        image = image_class(stored, AFFINE, header)
        image.header.set_slope_inter(slope, inter)
        image.to_filename(path)
        return nib.load(path)

    @pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image, nib.Nifti1Pair])
    @pytest.mark.parametrize("order", "<>")
    @pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2"])
    @pytest.mark.parametrize(("slope", "inter"), [(0.1, 0), (-0.1, 0), (3e-5, 1.3), (1, -100)])
    def test_narrow_integers_become_float32(
        self, tmp_path, image_class, order, dtype, slope, inter
    ):
        stored = self.stored(dtype)
        path = tmp_path / ("map.img" if image_class is nib.Nifti1Pair else "map.nii.gz")
        image = self.saved(path, stored, slope, inter, image_class, order)
        exact = np.asanyarray(image.dataobj)
        (one,) = io.read_maps(path)
        (in_memory,) = io.read_maps(image)
        assert one.data.dtype == in_memory.data.dtype == np.float32
        np.testing.assert_array_equal(one.data, in_memory.data)
        # The slope (float64 in NIfTI-2) and the product are rounded, of which zero stays zero. With
        # an intercept two more numbers of at most 2**17 steps are.
        bound = 2**-23 * np.abs(exact) if inter == 0 else abs(slope) / 50
        assert (np.abs(one.data - exact) <= bound).all()
        assert (np.diff(np.sort(one.data, axis=None)) > 0).all(), "no two of them became one"
        assert (one.data[exact == 0] == 0).all()

    @pytest.mark.parametrize("fields", [{"scl_slope": np.nan}, {"scl_slope": 0}, {"scl_slope": 1}])
    def test_without_a_slope_integers_stay_what_they_are(self, tmp_path, fields):
        stored = np.arange(210, dtype=np.int16).reshape(SHAPE)
        image = nib.Nifti1Image(stored, AFFINE)
        content = bytearray(image.to_bytes())
        header = nib.Nifti1Header(bytes(content[:348]), check=False)
        header["scl_inter"] = 0 if fields["scl_slope"] == 1 else 7
        header["scl_slope"] = fields["scl_slope"]
        path = tmp_path / "map.nii"
        path.write_bytes(header.binaryblock + bytes(content[348:]))
        assert_reads(path, stored)
        assert io.read_maps(path)[0].data.dtype == np.int16
        assert io.read_maps(nib.load(path))[0].data.dtype == np.int16

    @pytest.mark.parametrize(
        ("dtype", "slope", "inter", "image_class"),
        [
            ("i4", 0.1, 0, nib.Nifti1Image),
            ("f4", 0.1, 0, nib.Nifti1Image),
            ("f4", 2, 1, nib.Nifti2Image),
            ("i2", 0.1, 1e5, nib.Nifti1Image),
            ("i2", 1e-39, 0, nib.Nifti1Image),
            ("i2", 1e-60, 0, nib.Nifti2Image),
            ("i2", 1e34, 0, nib.Nifti1Image),
            ("i2", 1e60, 0, nib.Nifti2Image),
        ],
    )
    def test_what_float32_does_not_hold_is_nibabels(
        self, tmp_path, dtype, slope, inter, image_class
    ):
        path, stored = tmp_path / "map.nii", (DATA * 40).astype(dtype)
        exact = np.asanyarray(self.saved(path, stored, slope, inter, image_class).dataobj)
        (one,) = io.read_maps(path)
        assert one.data.dtype == exact.dtype == np.float64
        np.testing.assert_array_equal(one.data, exact)
        np.testing.assert_array_equal(io.read_maps(nib.load(path))[0].data, exact)

    def test_a_slope_of_analyze(self, tmp_path):
        stored = (DATA * 40).astype(np.int16)
        image = nib.Spm2AnalyzeImage(stored, np.diag([2.0, 3.0, 4.0, 1.0]))
        image.header["scl_slope"] = 0.1
        image.to_filename(tmp_path / "map.img")
        exact = np.asanyarray(nib.load(tmp_path / "map.img").dataobj)
        (one,) = io.read_maps(tmp_path / "map.img")
        np.testing.assert_allclose(one.data, exact, rtol=2**-24)

    def test_nilearns_door_has_nibabels_numbers(self, tmp_path):
        image = self.saved(tmp_path / "map.nii", self.stored("i2"), 0.1, 0)
        exact = np.asanyarray(image.dataobj)
        data = io.read_data(io.load(tmp_path / "map.nii"), "map")
        assert data.dtype == exact.dtype == np.float64
        np.testing.assert_array_equal(data, exact)


class TestSharedHeaders:
    """Headers are parsed once for all files that have the same one."""

    @pytest.fixture(params=["one.nii", "one.nii.gz"])
    def paths(self, request, tmp_path):
        paths = tmp_path / request.param, tmp_path / f"other-{request.param}"
        for number, path in enumerate(paths):
            nib.Nifti1Image(DATA + number, AFFINE).to_filename(path)
        return paths

    def test_voxels_are_each_files_own(self, paths):
        for number, path in enumerate(paths):
            assert_reads(path, DATA + np.float32(number))

    def test_what_is_done_to_one_map_is_not_done_to_the_next(self, paths):
        (one,) = io.read_maps(paths[0])
        one.header["descrip"] = b"mine"
        one.header.set_data_shape((1, 2, 3))
        one.affine[:] = 0
        assert_reads(paths[1], DATA + np.float32(1))
        (other,) = io.read_maps(paths[1])
        assert other.header == nib.load(paths[1]).header

    def test_results_leave_the_header_alone(self, paths):
        header = nib.load(paths[0]).header
        regions = gpuroi.extract_regions(paths[0], "80%", backend="cpu")
        regions.labels_img.header["descrip"] = b"labels"
        regions.to_4d_img().header["descrip"] = b"stack"
        regions.files()
        assert regions.header == header
        assert io.read_maps(paths[1])[0].header == header

    @pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image])
    @pytest.mark.parametrize("order", "<>")
    @pytest.mark.parametrize("name", ["one.nii", "one.nii.gz"])
    def test_another_header_is_another_map(self, tmp_path, image_class, order, name):
        for number in range(1, 30):  # more than are remembered
            path = tmp_path / f"{number}-{name}"
            affine = np.diag([number, 3.0, 4.0, 1.0])
            header = image_class.header_class(endianness=order)
            header.set_data_dtype(np.dtype(order + "f4"))
            image_class(DATA, affine, header).to_filename(path)
            assert_reads(path, DATA, affine)
            (one,), expected = io.read_maps(path), nib.load(path).header
            assert type(one.header) is type(expected)
            assert one.header == expected

    def test_extensions_are_each_files_own(self, tmp_path):
        for number in range(3):
            image = nib.Nifti1Image(DATA, AFFINE)
            comment = nib.nifti1.Nifti1Extension("comment", b"map %d" % number * 20)
            image.header.extensions.extend([comment] * (number > 0))
            image.to_filename(tmp_path / f"{number}.nii.gz")
        for number in range(3):
            (one,) = io.read_maps(tmp_path / f"{number}.nii.gz")
            np.testing.assert_array_equal(one.data, DATA)
            contents = [extension.get_content() for extension in one.header.extensions]
            assert contents == [b"map %d" % number * 20] * (number > 0)

    def test_a_place_of_the_voxels_that_is_no_multiple_of_their_size(self, write):
        content = with_header(vox_offset=357)
        path = write("map.nii", content[:352] + b"xxxxx" + content[352:])
        assert_reads(path)

    def test_the_same_header_before_data_of_another_length(self, paths):
        io.read_maps(paths[0])
        longer = paths[1].with_name("longer.nii")
        longer.write_bytes(NII + b"x")
        assert_refused(longer, BAD_LENGTH.format(352, 840, 1193, "trailing garbage"))


class TestChecksums:
    @pytest.mark.parametrize("name", ["map.nii", "map.nii.gz", "map.nii.bz2"])
    def test_of_the_file_as_it_is_on_disk(self, tmp_path, name):
        path = tmp_path / name
        nib.Nifti1Image(np.stack([DATA, DATA], axis=3), AFFINE).to_filename(path)
        expected = hashlib.sha256(path.read_bytes()).hexdigest()
        assert [one.sha256 for one in io.read_maps(path)] == [expected, expected]

    @pytest.mark.parametrize("named", ["map.img", "map.hdr"])
    def test_of_the_voxels_of_a_pair(self, tmp_path, named):
        nib.Nifti1Pair(DATA, AFFINE).to_filename(tmp_path / "map.img")
        expected = hashlib.sha256((tmp_path / "map.img").read_bytes()).hexdigest()
        assert io.read_maps(tmp_path / named)[0].sha256 == expected

    def test_an_image_has_none(self, write):
        assert io.read_maps(nib.Nifti1Image(DATA, AFFINE))[0].sha256 is None
        assert io.read_maps(nib.load(write("map.nii", NII)))[0].sha256 is None


class TestShapes:
    @pytest.mark.parametrize("shape", [(5, 6, 7, 1), (5, 6, 7, 1, 1), (5, 6, 7, 1, 1, 1)])
    def test_trailing_axes_of_one_voxel_are_dropped(self, tmp_path, shape):
        path = tmp_path / "map.nii.gz"
        nib.Nifti1Image(DATA.reshape(shape), AFFINE).to_filename(path)
        assert_reads(path)

    @pytest.mark.parametrize("shape", [(5, 6, 1), (1, 1, 1)])
    def test_a_slice_is_a_map(self, tmp_path, shape):
        path, data = tmp_path / "map.nii.gz", np.ones(shape, np.float32)
        nib.Nifti1Image(data, AFFINE).to_filename(path)
        assert_reads(path, data)

    @pytest.mark.parametrize("extra", [(), (1,)])
    @pytest.mark.parametrize("shape", [(5, 6, 7), (1, 1, 1)])
    def test_a_series_is_its_maps_named_by_volume(self, tmp_path, shape, extra):
        path = tmp_path / "series.nii.gz"
        data = np.random.default_rng(1).standard_normal((*shape, 3, *extra))
        nib.Nifti1Image(data, AFFINE).to_filename(path)
        maps = io.read_maps(path)
        assert [one.name for one in maps] == [f"{path}[0]", f"{path}[1]", f"{path}[2]"]
        for volume, one in enumerate(maps):
            np.testing.assert_array_equal(one.data, data.reshape(*shape, 3)[..., volume])
            np.testing.assert_array_equal(one.affine, AFFINE)

    @pytest.mark.parametrize("shape", [(5,), (5, 6), (5, 6, 7, 2, 2), (5, 6, 7, 1, 2)])
    def test_other_shapes_are_refused(self, tmp_path, shape):
        path = tmp_path / "map.nii.gz"
        nib.Nifti1Image(np.ones(shape, np.float32), AFFINE).to_filename(path)
        assert_refused(path, BAD_SHAPE.format(re.escape(str(shape)[1:-1])))

    @pytest.mark.parametrize(
        ("dtype", "kind"),
        [
            ("c8", r"complex \(complex64\)"),
            ("c16", r"complex \(complex128\)"),
            ([(channel, "u1") for channel in "RGB"], r"RGB \(\[\('R', .*\]\)"),
            ([(channel, "u1") for channel in "RGBA"], r"RGB \(\[\('R', .*\]\)"),
        ],
    )
    def test_voxels_of_several_numbers_are_refused(self, tmp_path, dtype, kind):
        path = tmp_path / "map.nii.gz"
        nib.Nifti1Image(np.zeros(SHAPE, dtype), AFFINE).to_filename(path)
        assert_refused(path, rf"its voxels are {kind}; expected one real number a voxel\.")


class TestAffines:
    @pytest.mark.parametrize(
        "fields",
        [
            {"srow_x": {0: np.nan}},
            {"srow_y": {3: np.inf}},
            {"srow_x": 0},
            {"srow_x": {0: 0.25, 1: 3, 2: 0.5}},
            {"sform_code": 0, "qform_code": 0, "pixdim": {2: np.nan}},
        ],
        ids=["NaN", "infinite", "a zero row", "two equal rows", "NaN voxel size"],
    )
    def test_without_a_voxel_size_is_refused(self, write, fields):
        assert_refused(write("map.nii", with_header(**fields)), BAD_AFFINE)

    def test_none_at_all_is_refused(self):
        image = nib.spatialimages.SpatialImage(DATA, None)
        assert_refused(image, r"its affine is .*: None\.", named="<SpatialImage in memory>")

    @pytest.mark.parametrize("codes", [(0, 4), (1, 0), (1, 4), (0, 0)])
    def test_sform_before_qform_before_voxel_sizes(self, write, codes):
        qform_code, sform_code = codes
        image = nib.Nifti1Image(DATA, AFFINE)
        image.set_qform(np.diag([2.0, 3.0, 4.0, 1.0]) if qform_code else None, qform_code)
        image.set_sform(AFFINE if sform_code else None, sform_code)
        path = write("map.nii", image.to_bytes())
        assert_reads(path, DATA, nib.load(path).affine)

    def test_voxel_volume(self, write):
        volume = io.read_maps(write("map.nii", NII))[0].voxel_volume_mm3
        assert volume == abs(np.linalg.det(AFFINE[:3, :3]))


class TestNotAFile:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda path: None, r"no such file\."),
            (
                lambda path: path.symlink_to("nowhere.nii"),
                r"no such file; it is a link to nowhere\.nii\.",
            ),
            (Path.touch, r"expected an image, found an empty file\."),
            (Path.mkdir, r"expected an image file, found a folder\."),
            pytest.param(
                lambda path: os.mkfifo(path),  # opening it would wait for ever
                r"expected an image file, found a pipe or a device\.",
                marks=pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here"),
            ),
        ],
        ids=["missing", "broken link", "empty", "folder", "pipe"],
    )
    @pytest.mark.parametrize("name", ["map.nii.gz", "map.img", "map"])
    def test_is_refused(self, tmp_path, name, make, message):
        path = tmp_path / name
        make(path)
        assert_refused(path, message)


class TestDamage:
    @pytest.mark.parametrize(
        ("name", "content"), [("map.nii", NII), ("map.nii.gz", GZ), ("map", NII), ("map", GZ)]
    )
    def test_cut_short_anywhere(self, tmp_path, name, content):
        path = tmp_path / name
        path.write_bytes(content)
        lengths = {1, 2, 3, 17, 347, 348, 351, 352, 353, *range(10, len(content), 19)}
        for length in sorted(lengths | {len(content) - missing for missing in range(1, 10)})[::-1]:
            os.truncate(path, length)
            assert_refused(path, r"expected .*|its header announces .* \(cut short\)\.")

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("map.nii", b"h", NO_HEADER.format("68")),
            ("map.nii", b"hello world", NO_HEADER.format("68 65 6c 6c")),
            ("MAP.NII.GZ", b"<!DOCTYPE html>", NO_HEADER.format("3c 21 44 4f")),
            ("map.nii.gz", gzip.compress(b"hello world", mtime=0), NO_HEADER.format("68 65 6c 6c")),
            ("map.nii", with_header(magic=b"n+9"), NO_HEADER.format("5c 01 00 00")),
            ("map.nii", NII2[:4] + b"n+3" + NII2[7:], NO_HEADER.format("1c 02 00 00")),
            ("map.txt", b"hello world", BAD_FORMAT.format("ImageFileError: Cannot work out .*")),
            ("map.hdr", b"hello world", BAD_FORMAT.format("ImageFileError: Cannot work out .*")),
            ("map", gzip.compress(b"hello", mtime=0), BAD_FORMAT.format("ImageFileError: .*")),
            ("map.gii", b"hello world", BAD_FORMAT.format("ExpatError: .*")),
            ("map.mnc", b"CDF\x01" + bytes(30), BAD_FORMAT.format("KeyError: .*")),
            ("map.gii", b"<GIFTI></GIFTI>", r"expected a volume, found a GiftiImage\."),
        ],
    )
    def test_another_format(self, write, name, content, message):
        assert_refused(write(name, content), message)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (GZ[:-8] + b"abcd" + GZ[-4:], BAD_GZIP.format("CRC check failed .*")),
            (GZ[:-4] + b"abcd", BAD_GZIP.format("Incorrect length of data produced")),
            (GZ + b"garbage", BAD_GZIP.format(".+")),
            (GZ + b"x", BAD_GZIP.format(".+")),
            (GZ + GZ[:30], BAD_GZIP.format(".+")),
            (GZ + GZ, BAD_LENGTH.format(352, 840, 2384, "trailing garbage")),
            (
                gzip.compress(NII + b"garbage"),
                BAD_LENGTH.format(352, 840, 1199, "trailing garbage"),
            ),
            (gzip.compress(NII[:-1]), BAD_LENGTH.format(352, 840, 1191, "cut short")),
        ],
        ids=[
            "checksum",
            "length",
            "garbage behind the stream",
            "a byte behind the stream",
            "half a member behind the stream",
            "the same again",
            "garbage in the stream",
            "data cut short before compression",
        ],
    )
    def test_of_a_gzip_stream(self, write, content, message):
        assert_refused(write("map.nii.gz", content), message)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (NII + b"x", BAD_LENGTH.format(352, 840, 1193, "trailing garbage")),
            (NII2[:-1], BAD_LENGTH.format(544, 840, 1383, "cut short")),
            (with_header(dim={1: 6}), BAD_LENGTH.format(352, 1008, 1192, "cut short")),
            (with_header(dim={1: 4}), BAD_LENGTH.format(352, 672, 1192, "trailing garbage")),
            (with_header(dim=32767, datatype=64), BAD_HEADER.format("data code .*")),
            (
                with_header(dim={i: 32767 if i else 7 for i in range(8)}),
                BAD_LENGTH.format(352, 4 * 32767**7, 1192, "cut short"),
            ),
            (with_header(datatype=64), BAD_LENGTH.format(352, 1680, 1192, "cut short")),
            (with_header(datatype=9999), BAD_HEADER.format("data code 9999 not recognized")),
            (with_header(datatype=0), BAD_HEADER.format("data code 0 not supported")),
            (with_header(datatype=1), BAD_HEADER.format("data code 1 not supported")),
            (with_header(dim={1: -5}), BAD_DIMENSIONS.format("-5, 6, 7")),
            (with_header(dim={1: -5, 2: -6}), BAD_DIMENSIONS.format("-5, -6, 7")),
            (with_header(dim={3: 0}), BAD_DIMENSIONS.format("5, 6, 0")),
            (with_header(dim={0: 4, 4: 0}), BAD_DIMENSIONS.format("5, 6, 7, 0")),
            (with_header(dim={0: 0}), BAD_DIMENSIONS.format("0,")),
            (with_header(dim={0: -3}), BAD_HEADER.format(".+")),
            (with_header(dim={0: 9}), BAD_HEADER.format(".+")),
            (with_header(vox_offset=np.inf), BAD_HEADER.format("cannot convert float infinity.*")),
            (with_header(vox_offset=np.nan), BAD_HEADER.format("cannot convert float NaN .*")),
            (with_header(vox_offset=-1), BAD_HEADER.format("vox offset -1 too low .*")),
            (with_header(vox_offset=0), BAD_LENGTH.format(0, 840, 1192, "trailing garbage")),
            (with_header(vox_offset=1e30), BAD_LENGTH.format(r"\d{31}", 840, 1192, "cut short")),
            (with_header(scl_slope=2, scl_inter=np.nan), BAD_HEADER.format(".*intercept nan")),
            (
                with_header(sform_code=0, qform_code=1, quatern_b=9),
                BAD_HEADER.format("w2 should be positive, .*"),
            ),
        ],
    )
    def test_of_a_header_or_its_data(self, write, content, message):
        assert_refused(write("map.nii", content), message)

    @pytest.mark.parametrize(("content", "n_bytes"), [(NII, 352), (NII2, 544)])
    def test_any_damaged_header_byte_is_refused_or_harmless_to_the_reader(
        self, tmp_path, content, n_bytes
    ):
        path, n_refused = tmp_path / "map.nii", 0
        for position in range(n_bytes):
            for change in (0x01, 0x80, 0xFF):
                path.write_bytes(with_byte(content, position, change))
                try:
                    io.read_maps(path)  # nothing in the file tells an affine from a wrong one
                except InvalidMapError:
                    n_refused += 1
        assert n_refused > 40

    def test_a_flipped_byte_is_noticed_or_changes_nothing(self, tmp_path):
        path, rng, n_refused = tmp_path / "map.nii.gz", np.random.default_rng(0), 0
        for _ in range(300):
            position, change = int(rng.integers(len(GZ))), int(rng.integers(1, 256))
            path.write_bytes(with_byte(GZ, position, change))
            try:
                (one,) = io.read_maps(path)
            except InvalidMapError:
                n_refused += 1
            else:
                assert position < 10, "only the time stamp and the like carry no data"
                np.testing.assert_array_equal(one.data, DATA)
                np.testing.assert_array_equal(one.affine, AFFINE)
        assert 280 < n_refused < 300

    def test_a_length_that_cannot_be_is_not_allocated(self, write):
        path = write("map.nii.gz", GZ[:-4] + b"\xff" * 4)
        tracemalloc.start()
        assert_refused(path, BAD_GZIP.format("Incorrect length of data produced"))
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak_bytes < 2**23

    @pytest.mark.parametrize("named", [".hdr", ".img"])
    @pytest.mark.parametrize(
        ("damaged", "change", "message"),
        [
            (".img", lambda raw: raw[:-1], BAD_LENGTH.format(0, 840, 839, "cut short")),
            (".img", lambda raw: raw + b"x", BAD_LENGTH.format(0, 840, 841, "trailing garbage")),
            (".hdr", lambda raw: raw[:100], BAD_FORMAT.format("ImageFileError: .*")),
        ],
    )
    def test_of_a_pair(self, tmp_path, named, damaged, change, message):
        nib.Nifti1Pair(DATA, AFFINE).to_filename(tmp_path / "map.img")
        path = tmp_path / f"map{damaged}"
        path.write_bytes(change(path.read_bytes()))
        blamed = tmp_path / ("map.img" if damaged == ".img" else f"map{named}")
        assert_refused(tmp_path / f"map{named}", message, named=blamed)

    @pytest.mark.parametrize("named", [".hdr.gz", ".img.gz"])
    @pytest.mark.parametrize("damaged", [".hdr.gz", ".img.gz"])
    def test_of_a_compressed_pair(self, tmp_path, named, damaged):
        nib.Nifti1Pair(DATA, AFFINE).to_filename(tmp_path / "map.img.gz")
        path = tmp_path / f"map{damaged}"
        path.write_bytes(with_byte(path.read_bytes(), -8, 0xFF))
        with pytest.raises(InvalidMapError, match=r"map\.(hdr|img)\.gz: expected "):
            io.read_maps(tmp_path / f"map{named}")

    @pytest.mark.parametrize(
        ("named", "missing", "message"),
        [
            ("map.hdr", "map.img", r"no such file\."),
            ("map.img", "map.hdr", BAD_FORMAT.format("ImageFileError: .*")),
        ],
    )
    def test_half_a_pair(self, tmp_path, named, missing, message):
        nib.Nifti1Pair(DATA, AFFINE).to_filename(tmp_path / "map.img")
        (tmp_path / missing).unlink()
        blamed = tmp_path / ("map.img" if missing == "map.img" else named)
        assert_refused(tmp_path / named, message, named=blamed)

    @leaves_files_open
    @pytest.mark.parametrize("length", [1, 20, 100, 284, 400, 1123])
    def test_of_a_freesurfer_volume(self, tmp_path, length):
        path = tmp_path / "map.mgh"
        nib.MGHImage(DATA, AFFINE).to_filename(path)
        os.truncate(path, length)
        assert_refused(path, f"{BAD_FORMAT.format('.*')}|(?s:its voxels cannot be read .*)")

    @pytest.mark.parametrize(
        "content", [GZ[:200], with_byte(GZ, 10, 0x06)], ids=["cut short", "damaged"]
    )
    @pytest.mark.parametrize("scaled", [False, True])
    def test_of_an_image_that_nibabel_reads_later(self, write, content, scaled):
        path = write("map.nii.gz", GZ)
        if scaled:
            header = nib.load(path).header
            header.set_data_dtype(np.int16)
            nib.Nifti1Image(DATA, AFFINE, header).to_filename(path)
            content = path.read_bytes()[:200]
        image = nib.load(path)
        write("map.nii.gz", content)
        assert_refused(image, r"its voxels cannot be read \(.*\)\.", named=path)


class TestAtomicWriter:
    @pytest.fixture(params=[None, b"old"], ids=["new file", "old file"])
    def path(self, request, tmp_path):
        path = tmp_path / "table.tsv"
        if request.param is not None:
            path.write_bytes(request.param)
        return path

    def test_replaces_when_the_block_ends(self, path):
        before = path.read_bytes() if path.exists() else None
        with io.atomic_writer(path) as stream:
            stream.write(b"new")
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == b"new"
        assert list(path.parent.iterdir()) == [path]

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
    def test_leaves_everything_as_it_was_when_the_block_fails(self, path, error):
        before = {one: one.read_bytes() for one in path.parent.iterdir()}

        def write_half():
            with io.atomic_writer(path) as stream:
                stream.write(b"new")
                raise error("half way")

        with pytest.raises(error, match="half way"):
            write_half()
        assert {one: one.read_bytes() for one in path.parent.iterdir()} == before

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_leaves_everything_as_it_was_when_the_disk_fails(self, path, call, monkeypatch):
        def fail(*_):
            raise OSError(28, "No space left on device")

        before = {one: one.read_bytes() for one in path.parent.iterdir()}
        monkeypatch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space left on device"):
            io.write_text("new", path)
        assert {one: one.read_bytes() for one in path.parent.iterdir()} == before

    @pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
    def test_permissions_are_those_of_any_new_file(self, path, umask):
        old = os.umask(umask)
        try:
            io.write_text("new", path)
        finally:
            os.umask(old)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask

    def test_a_folder_in_the_way_stays(self, tmp_path):
        folder = tmp_path / "table.tsv"
        folder.mkdir()
        with pytest.raises(OSError, match=re.escape(str(folder))):
            io.write_text("new", folder)
        assert list(tmp_path.iterdir()) == [folder]

    def test_text_is_utf_8(self, path):
        io.write_text("mm³\n", path)
        assert path.read_bytes() == b"mm\xc2\xb3\n"


class TestWriteImage:
    def test_same_bytes_for_the_same_image(self, tmp_path):
        paths = tmp_path / "one.nii.gz", tmp_path / "other.nii.gz"
        for path in paths:
            io.write_image(nib.Nifti1Image(DATA, AFFINE), path)
        one, other = (path.read_bytes() for path in paths)
        assert one == other
        flags, seconds = struct.unpack_from("<3xBI", one)
        assert (flags, seconds) == (0, 0)  # neither file name nor time of writing

    def test_others_read_it(self, tmp_path):
        path = tmp_path / "map.nii.gz"
        io.write_image(nib.Nifti1Image(DATA, AFFINE), path)
        assert gzip.decompress(path.read_bytes()) == NII
        assert_reads(path)


class TestLabelsImage:
    LABELS = np.arange(210, dtype=np.uint8).reshape(SHAPE)

    @pytest.fixture(params=[nib.Nifti1Image, nib.Nifti2Image, nib.Nifti1Pair, nib.Nifti2Pair])
    def image(self, request):
        return request.param(DATA, AFFINE)

    def written(self, tmp_path, image):
        """Return the label image of `image` after both went through files."""
        name = "map.nii" if isinstance(image, nib.Nifti1Image) else "map.img"
        image.to_filename(tmp_path / name)
        (source,) = io.read_maps(tmp_path / name)
        labels = io.labels_image(self.LABELS, source.affine, source.header)
        io.write_image(labels, tmp_path / "labels.nii.gz")
        return nib.load(tmp_path / "labels.nii.gz")

    @pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 4), (1, 4), (4, 2)])
    def test_space_and_units_are_kept(self, tmp_path, image, codes):
        qform_code, sform_code = codes
        image.set_qform(np.diag([2.0, 3.0, 4.0, 1.0]) if qform_code else None, qform_code)
        image.set_sform(AFFINE if sform_code else None, sform_code)
        image.header.set_xyzt_units("mm", "sec")
        labels = self.written(tmp_path, image)
        assert (labels.header["qform_code"], labels.header["sform_code"]) == codes
        assert labels.header.get_xyzt_units() == ("mm", "sec")
        assert labels.header.get_zooms() == image.header.get_zooms()
        np.testing.assert_array_equal(labels.get_qform(), image.get_qform())
        np.testing.assert_array_equal(labels.get_sform(), image.get_sform())
        np.testing.assert_array_equal(labels.affine, image.header.get_best_affine())

    def test_the_map_s_own_words_are_not(self, tmp_path, image):
        image.set_data_dtype(np.int16)
        image.header.set_slope_inter(0.25, 10)
        image.header.set_intent("t test", (12,), name="contrast")
        image.header["descrip"] = b"t-map, 12 degrees of freedom"
        image.header["cal_max"], image.header["cal_min"] = 8, -8
        labels = self.written(tmp_path, image)
        np.testing.assert_array_equal(np.asanyarray(labels.dataobj), self.LABELS)
        assert labels.get_data_dtype() == np.uint8
        assert labels.header.get_intent() == ("label", (), "regions")
        assert labels.header["descrip"] == b""
        assert (labels.header["cal_min"], labels.header["cal_max"]) == (0, 209)
        nifti2 = isinstance(image, nib.Nifti2Image | nib.Nifti2Pair)
        assert labels.header["sizeof_hdr"] == (540 if nifti2 else 348)

    def test_extensions_of_the_map_are_dropped(self, tmp_path):
        image = nib.Nifti1Image(DATA, AFFINE)
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"t-test"))
        assert self.written(tmp_path, image).header.extensions == []
        assert len(image.header.extensions) == 1

    @leaves_files_open
    @pytest.mark.parametrize("name", ["map.mgh", "map.img"])
    def test_other_formats_become_nifti_1(self, tmp_path, name):
        image_class = nib.MGHImage if name == "map.mgh" else nib.AnalyzeImage
        image_class(DATA, np.diag([2.0, 3.0, 4.0, 1.0])).to_filename(tmp_path / name)
        (source,) = io.read_maps(tmp_path / name)
        labels = io.labels_image(self.LABELS, source.affine, source.header)
        assert type(labels) is nib.Nifti1Image
        np.testing.assert_array_equal(labels.affine, source.affine)

    @pytest.mark.parametrize(
        ("n_labels", "dtype"),
        [
            (0, "uint8"),
            (255, "uint8"),
            (256, "int16"),
            (2**15 - 1, "int16"),
            (2**15, "int32"),
            (2**31 - 1, "int32"),
        ],
    )
    def test_smallest_dtype(self, n_labels, dtype):
        assert io.smallest_label_dtype(n_labels) == dtype

    def test_more_labels_than_fit(self):
        with pytest.raises(ValueError, match="2147483648 labels do not fit into 32 bits"):
            io.smallest_label_dtype(2**31)


class TestCompressedLabels:
    """Against what nibabel writes of `labels_image`."""

    @staticmethod
    def assert_same_file(labels, affine, header):
        before = header.copy()
        expected = io.labels_image(labels, affine, header).to_bytes()
        in_file_order = np.asfortranarray(labels)
        for order in (in_file_order, np.ascontiguousarray(labels)):
            assert gzip.decompress(io.compressed_labels(order, affine, header)) == expected
        assert header == before

    @pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image, nib.Nifti1Pair])
    @pytest.mark.parametrize("order", "<>")
    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32])
    @pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 4), (1, 4)])
    def test_are_nibabels_bytes(self, image_class, order, dtype, codes):
        header = image_class.header_class(endianness=order)
        qform_code, sform_code = codes
        header.set_data_shape(SHAPE)
        header.set_qform(np.diag([2.0, 3.0, 4.0, 1.0]) if qform_code else None, qform_code)
        header.set_sform(AFFINE if sform_code else None, sform_code)
        header.set_xyzt_units("mm", "sec")
        header["descrip"] = b"t-map"
        header["cal_max"], header["cal_min"] = 8, -8
        header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"t-test"))
        affine = header.get_best_affine()
        for largest in (0, 3, np.iinfo(dtype).max):
            labels = np.random.default_rng(0).integers(0, largest, SHAPE, dtype, endpoint=True)
            self.assert_same_file(labels, affine, header)

    @pytest.mark.parametrize("shape", [(1, 1, 1), (5, 6, 1), (5, 6, 7)])
    @pytest.mark.parametrize(
        "affine", [AFFINE, np.diag([-2.0, 3.0, 4.0, 1.0]), np.diag([1e-4, 1e4, 1, 1])]
    )
    def test_of_an_affine_that_the_header_has_not(self, shape, affine):
        header = nib.Nifti1Image(DATA, np.eye(4)).header
        self.assert_same_file(np.ones(shape, np.uint8), affine, header)

    @leaves_files_open
    @pytest.mark.parametrize("image_class", [nib.MGHImage, nib.AnalyzeImage, nib.Spm2AnalyzeImage])
    def test_of_a_map_in_another_format(self, tmp_path, image_class):
        path = tmp_path / ("map.mgh" if image_class is nib.MGHImage else "map.img")
        image_class(DATA, np.diag([2.0, 3.0, 4.0, 1.0])).to_filename(path)
        (one,) = io.read_maps(path)
        labels = np.arange(210, dtype=np.uint8).reshape(SHAPE)
        self.assert_same_file(labels, one.affine, one.header)

    @pytest.mark.parametrize("threshold", ["80%", 1e9], ids=["regions", "none"])
    def test_are_what_is_saved(self, tmp_path, threshold):
        regions = gpuroi.extract_regions(
            nib.Nifti1Image(DATA, AFFINE), threshold, min_region_size=0, backend="cpu"
        )
        _, content = regions.files()["labels"]
        assert (len(regions) == 0) == (threshold == 1e9)
        labels = regions.labels.astype(np.uint8)
        assert content == io.compressed(io.labels_image(labels, AFFINE, regions.header))


class TestSave:
    @pytest.fixture
    def regions(self):
        return gpuroi.extract_regions(nib.Nifti1Image(DATA, AFFINE), "80%", backend="cpu")

    def test_three_files_that_read_back(self, regions, tmp_path):
        paths = regions.save(tmp_path / "new" / "folder" / "sub-01.run-1_dseg")
        assert {kind: path.name for kind, path in paths.items()} == {
            "labels": "sub-01.run-1_dseg.nii.gz",
            "table": "sub-01.run-1_dseg.tsv",
            "provenance": "sub-01.run-1_dseg.json",
        }
        assert sorted(paths.values()) == sorted((tmp_path / "new/folder").iterdir())

        labels = nib.load(paths["labels"])
        np.testing.assert_array_equal(np.asanyarray(labels.dataobj), regions.labels)
        np.testing.assert_array_equal(labels.affine, AFFINE)
        assert labels.get_data_dtype() == np.uint8

        table = pd.read_csv(paths["table"], sep="\t")
        assert list(table.columns) == ["index", "name", *list(COLUMNS)[1:]]
        assert table["name"].tolist() == [f"region-{index}" for index in table["index"]]
        pd.testing.assert_frame_equal(
            table.drop(columns="name").rename(columns={"index": "label"}),
            regions.table,
            check_dtype=False,
            rtol=1e-15,  # pandas may read the last bit of a float wrong
            atol=0,
        )

        def refuse(word):
            raise AssertionError(f"{word} is not JSON")

        sidecar = json.loads(paths["provenance"].read_text(), parse_constant=refuse)
        assert sidecar == {**regions.provenance, "columns": COLUMNS_ON_DISK}
        assert [*sidecar["columns"]] == paths["table"].read_text().splitlines()[0].split("\t")

    @pytest.mark.parametrize("ending", [".nii.gz", ".tsv", ".json"])
    def test_an_extension_is_not_doubled(self, regions, tmp_path, ending):
        regions.save(f"{tmp_path}/a_dseg{ending}")
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "a_dseg.json",
            "a_dseg.nii.gz",
            "a_dseg.tsv",
        ]

    def test_the_map_itself_is_not_replaced(self, tmp_path):
        path = tmp_path / "a.nii.gz"
        nib.save(nib.Nifti1Image(np.stack([DATA, DATA], axis=-1), AFFINE), path)
        before = path.read_bytes()
        (tmp_path / "link.nii.gz").symlink_to(path)
        for regions in (gpuroi.extract_regions(path, 1e6), gpuroi.extract_regions([path], 1e6)):
            for prefix in ("a", "a.nii.gz", "link"):
                with pytest.raises(ValueError, match=r"a\.nii\.gz is the map itself"):
                    regions[0].save(tmp_path / prefix)
        assert path.read_bytes() == before

    @pytest.mark.parametrize("prefix", ["", "/", "/new/", "/.."])
    def test_a_folder_is_no_prefix(self, regions, tmp_path, prefix):
        with pytest.raises(ValueError, match="is a folder; add what the names of the files begin"):
            regions.save(f"{tmp_path}{prefix}")
        assert not any(tmp_path.iterdir())

    def test_again_gives_the_same_bytes(self, regions, tmp_path):
        first = {kind: path.read_bytes() for kind, path in regions.save(tmp_path / "map").items()}
        again = {kind: path.read_bytes() for kind, path in regions.save(tmp_path / "map").items()}
        assert first == again
        assert len(list(tmp_path.iterdir())) == 3

    def test_many_regions_take_a_wider_type(self, tmp_path):
        data = np.zeros((20, 20, 20), np.float32)
        data[::2, ::2, ::2] = 4.0
        regions = gpuroi.extract_regions(nib.Nifti1Image(data, AFFINE), 3.0, backend="cpu")
        labels = nib.load(regions.save(tmp_path / "map")["labels"])
        assert labels.get_data_dtype() == np.int16
        np.testing.assert_array_equal(np.asanyarray(labels.dataobj), regions.labels)
        assert regions.labels.max() == 1000


@pytest.mark.parametrize(
    ("shape", "shift", "same"),
    [(SHAPE, 0, True), ((*SHAPE, 4), 0, True), (SHAPE, 1e-9, True), (SHAPE, 0.1, False)],
)
def test_same_grid(shape, shift, same):
    assert same_grid(SHAPE, AFFINE, shape, AFFINE + shift) is same
    assert not same_grid((5, 6, 8), AFFINE, shape, AFFINE)
