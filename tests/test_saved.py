"""Results read back from disk: the regions that were written, to the last bit."""

import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

import gpuroi
from gpuroi.errors import InvalidMapError
from tests.conftest import image


def assert_same_regions(ours, theirs):
    pd.testing.assert_frame_equal(ours.table, theirs.table, check_exact=True)
    np.testing.assert_array_equal(ours.labels, theirs.labels, strict=True)
    assert ours.labels_img.header == theirs.labels_img.header
    np.testing.assert_array_equal(ours.affine, theirs.affine, strict=True)
    np.testing.assert_array_equal(ours.voxels.values, theirs.voxels.values, strict=True)
    assert ours.cutoff == theirs.cutoff
    assert ours.provenance == theirs.provenance
    assert ours.files() == theirs.files()


@pytest.fixture
def saved(tmp_path, blobs):
    """Return a function that saves the regions of a map, and returns prefix, map and regions."""

    def save(dtype=np.float32, volume=None, **options):
        data = blobs((14, 13, 12), dtype=dtype) if volume is None else volume
        img = image(data)
        regions = gpuroi.extract_regions(img, **{"threshold": "90%"} | options)
        prefix = tmp_path / "m_desc-regions_dseg"
        regions.save(prefix)
        return prefix, img, regions

    return save


@pytest.mark.parametrize("dtype", ["f4", "f8", ">f4", "i2", "u1", "i4"])
@pytest.mark.parametrize("threshold", ["90%", "0%"])
def test_they_are_what_was_saved(saved, dtype, threshold):
    prefix, img, regions = saved(np.dtype(dtype), threshold=threshold)
    assert len(regions) > 0
    assert_same_regions(gpuroi.load_regions(prefix, img), regions)


def test_more_than_8_bits_of_labels(saved):
    data = np.zeros((14, 14, 14), np.float32)
    data[::2, ::2, ::2] = np.arange(343).reshape(7, 7, 7) + 1
    prefix, img, regions = saved(volume=data, threshold=1.0)
    assert len(regions) == 343
    assert_same_regions(gpuroi.load_regions(prefix, img), regions)


@pytest.mark.parametrize(
    "options", [{"threshold": 1e6}, {"population": "nonzero", "tail": "positive"}]
)
def test_no_regions_and_no_finite_cutoff(saved, options):
    prefix, img, regions = saved(volume=np.zeros((5, 6, 7), np.float32), **options)
    assert len(regions) == 0
    assert regions.cutoff == options.get("threshold", np.inf)
    assert_same_regions(gpuroi.load_regions(prefix, img), regions)


def test_a_mask_and_voxels_that_are_not_finite(saved, blobs):
    data = blobs((14, 13, 12))
    data[0, 0, :2] = np.nan, np.inf
    mask = image((np.arange(14)[:, None, None] + np.zeros((14, 13, 12)) < 9).astype(np.uint8))
    with pytest.warns(UserWarning, match="voxels are NaN or infinite"):
        prefix, img, regions = saved(volume=data, mask_img=mask)
    assert_same_regions(gpuroi.load_regions(prefix, img), regions)


@pytest.mark.parametrize("extension", ["", ".nii.gz", ".tsv", ".json"])
def test_any_of_the_files_names_them(saved, extension):
    prefix, img, regions = saved()
    assert_same_regions(gpuroi.load_regions(f"{prefix}{extension}", img), regions)


def test_a_series_gives_the_volume_that_they_are_of(tmp_path, blobs):
    series = image(np.stack([blobs(seed=seed) for seed in range(3)], axis=-1))
    prefix = tmp_path / "s_vol-0002_desc-regions_dseg"
    regions = gpuroi.extract_regions(series, "90%")[2]
    regions.save(prefix)
    assert_same_regions(gpuroi.load_regions(prefix, series), regions)
    two = series.slicer[..., :2]
    with pytest.raises(InvalidMapError, match=r"one of the 2 volumes of .*; pass that volume"):
        gpuroi.load_regions(prefix, two)
    assert_same_regions(gpuroi.load_regions(prefix, series.slicer[..., 2]), regions)


def test_a_series_that_they_are_not_of(saved):
    prefix, img, _ = saved()
    series = image(np.stack([img.dataobj] * 2, axis=-1))
    with pytest.raises(InvalidMapError, match="expected the number of one of the 2 volumes"):
        gpuroi.load_regions(prefix, series)


class TestErrors:
    def test_another_grid(self, saved):
        prefix, img, _ = saved()
        for other in (image(np.ones((14, 13, 11))), image(np.ones((14, 13, 12)), np.eye(4))):
            with pytest.raises(InvalidMapError, match=r"expected labels on the grid of .*; pass"):
                gpuroi.load_regions(prefix, other)
        assert gpuroi.load_regions(prefix, img)

    def test_a_map_that_has_changed(self, tmp_path, blobs):
        path, prefix = tmp_path / "m.nii.gz", tmp_path / "out" / "m_desc-regions_dseg"
        nib.save(image(blobs()), path)
        regions = gpuroi.extract_regions(path, "90%")
        regions.save(prefix)
        assert_same_regions(gpuroi.load_regions(prefix, path), regions)
        nib.save(image(blobs(seed=1)), path)
        with pytest.raises(InvalidMapError, match=r"found another in .*m\.nii\.gz; pass the map"):
            gpuroi.load_regions(prefix, path)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(InvalidMapError, match=r"x\.json: expected the provenance of regions"):
            gpuroi.load_regions(tmp_path / "x", image(np.ones((3, 3, 3))))

    @pytest.mark.parametrize("content", ["{", "[]", "{}", json.dumps({"cutoff": 1})])
    def test_another_json(self, saved, content):
        prefix, img, _ = saved()
        prefix.with_name(f"{prefix.name}.json").write_text(content)
        with pytest.raises(InvalidMapError, match="found none that can be read"):
            gpuroi.load_regions(prefix, img)

    def test_no_labels(self, saved):
        prefix, img, _ = saved()
        prefix.with_name(f"{prefix.name}.nii.gz").unlink()
        with pytest.raises(InvalidMapError, match=r"dseg\.nii\.gz: no such file"):
            gpuroi.load_regions(prefix, img)
