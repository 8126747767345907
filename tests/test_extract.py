"""The native door: parameters, batches, masks, bad maps, and what a result offers."""

import json
import pickle
import re
import threading
import warnings
from dataclasses import replace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage, stats

import gpuroi
from gpuroi import pipeline
from gpuroi.algorithms.measure import gather
from gpuroi.backends.cpu import CpuBackend
from gpuroi.datasets import load_sample_motor_activation_image
from gpuroi.errors import DeviceMemoryError, InvalidMapError
from gpuroi.extract import _read_ahead
from gpuroi.image import threshold_img
from gpuroi.io import read_maps
from gpuroi.pipeline import extract_maps, prepare
from gpuroi.recipe import make_recipe
from gpuroi.regions import connected_regions
from gpuroi.result import COLUMNS
from gpuroi.testing import make_maps, require_backend
from tests.cuda_on_cpu import library_on_cpu

AFFINES = {
    "2 mm": np.diag([2.0, 2.0, 2.0, 1.0]),
    "anisotropic": np.array([[3.0, 0, 0, 5], [0, 1.5, 0, -7], [0, 0, 4, 11], [0, 0, 0, 1]]),
    "flipped": np.array([[-2.0, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]]),
    "oblique": np.array([[1.9, 0.4, 0, 3], [-0.5, 2.1, 0.3, 4], [0.1, -0.2, 2.4, 5], [0, 0, 0, 1]]),
}


def blobs(shape=(12, 14, 16), seed=0, scale=5.0):
    noise = np.random.default_rng(seed).standard_normal(shape)
    return (ndimage.gaussian_filter(noise, 1.2) * scale).astype(np.float32)


def image(data, affine=AFFINES["2 mm"]):
    return nib.Nifti1Image(data, affine)


@pytest.fixture(scope="module")
def sample():
    return nib.load(load_sample_motor_activation_image())


class TestLabels:
    @pytest.mark.parametrize("name", gpuroi.available_backends())
    @pytest.mark.parametrize("threshold", ["99%", "97%", "90%", "80%", 3.0])
    def test_every_backend_finds_the_same_regions_of_the_real_map(self, sample, name, threshold):
        backends = [CpuBackend(use_cc3d=False), require_backend(name)]
        backends.append(library_on_cpu())
        expected, *others = (
            gpuroi.extract_regions(sample, threshold, min_region_size=200, backend=backend)
            for backend in backends
        )
        assert len(expected) > 0
        for regions in others:
            np.testing.assert_array_equal(regions.labels, expected.labels)
            pd.testing.assert_frame_equal(regions.table, expected.table, check_exact=True)
            assert regions.cutoff == expected.cutoff

    def test_a_path_and_its_image_give_the_same(self, sample):
        path = load_sample_motor_activation_image()
        from_path, from_image = gpuroi.extract_regions(path), gpuroi.extract_regions(sample)
        np.testing.assert_array_equal(from_path.labels, from_image.labels)
        assert from_path.provenance["source"] == path

    def test_a_region_of_exactly_the_minimum_is_kept(self):
        data = np.zeros((5, 5, 5))
        data[1:3, 1:3, 1:3] = 4.0
        for affine in AFFINES.values():
            volume = 8 * abs(np.linalg.det(affine[:3, :3]))
            kept = gpuroi.extract_regions(image(data, affine), 3.0, min_region_size=volume)
            assert kept.table["voxels"].tolist() == [8]
            assert (
                len(gpuroi.extract_regions(image(data, affine), 3.0, min_region_size=volume * 1.01))
                == 0
            )

    def test_a_value_threshold_is_reached_in_the_dtype_of_the_map(self):
        data = np.full((1, 1, 2), 0.3, np.float32)
        assert len(gpuroi.extract_regions(image(data), 0.3)) == 1  # float32(0.3) > 0.3
        assert len(gpuroi.extract_regions(image(data), np.nextafter(np.float32(0.3), 1))) == 0

    @pytest.mark.parametrize("threshold", [0, 1e-60])
    def test_zeros_are_background_at_any_threshold(self, threshold):
        data = np.zeros((4, 4, 4), np.float32)
        data[1, 1, 1] = 1e-42
        assert gpuroi.extract_regions(image(data), threshold).table["voxels"].tolist() == [1]

    def test_a_percentile_has_no_unit(self):
        maps = [blobs(scale=scale) for scale in (1e-6, 1.0, 1e6)]
        expected, *others = (gpuroi.extract_regions(image(one), "95%").labels for one in maps)
        for labels in others:
            np.testing.assert_array_equal(labels, expected)


class TestSeries:
    def test_a_4d_image_gives_a_result_a_volume(self):
        series = np.stack([blobs(seed=seed) for seed in range(5)], axis=-1)
        together = gpuroi.extract_regions(image(series), "95%")
        assert [one.provenance["source"][-3:] for one in together] == [f"[{i}]" for i in range(5)]
        for volume, regions in enumerate(together):
            alone = gpuroi.extract_regions(image(series[..., volume]), "95%")
            np.testing.assert_array_equal(regions.labels, alone.labels)
            assert regions.cutoff == alone.cutoff

    def test_lists_may_mix_grids_dtypes_and_series(self):
        images = [
            image(blobs()),
            image(blobs(seed=1).astype(np.float64)),
            image(blobs((6, 7, 8)), AFFINES["oblique"]),
            image(np.stack([blobs(seed=2), blobs(seed=3)], axis=-1)),
            image((blobs() * 10).astype(np.int16)),
        ]
        backend = library_on_cpu()  # takes batches
        results = gpuroi.extract_regions(images, "90%", backend=backend)
        alone = [
            regions
            for one in images
            for regions in np.atleast_1d(gpuroi.extract_regions(one, "90%", backend="cpu"))
        ]
        assert len(results) == len(alone) == 6
        for regions, expected in zip(results, alone, strict=True):
            np.testing.assert_array_equal(regions.labels, expected.labels)
            pd.testing.assert_frame_equal(regions.table, expected.table, check_exact=True)
        assert gpuroi.extract_regions(iter(images[:2]), "90%")[1].cutoff == alone[1].cutoff
        assert gpuroi.extract_regions([]) == []

    def test_a_batch_that_does_not_fit_is_halved(self):
        limit = 2

        def uploads(host):
            if host.ndim == 4 and len(host) > limit:
                raise MemoryError(f"cannot allocate {host.nbytes} bytes")
            return lambda: host.copy()

        images = [image(blobs(seed=seed)) for seed in range(7)]
        backend = library_on_cpu(uploads)
        for regions, one in zip(
            gpuroi.extract_regions(images, "95%", backend=backend), images, strict=True
        ):
            np.testing.assert_array_equal(regions.labels, gpuroi.extract_regions(one, "95%").labels)

        limit = 0
        with pytest.raises(
            DeviceMemoryError,
            match=r"one volume of shape \(12, 14, 16\) .* does not fit on a CPU in the place of a "
            r"GPU: cannot allocate 10752 bytes; pass backend='cpu'",
        ):
            gpuroi.extract_regions(images[0], backend=backend)


class TestReadingAhead:
    """A device gets maps that threads have decoded meanwhile."""

    @pytest.fixture
    def paths(self, tmp_path):
        paths = [tmp_path / f"{seed}.nii.gz" for seed in range(45)]
        for seed, path in enumerate(paths):
            nib.save(image(blobs((6, 7, 8), seed=seed)), path)
        return paths

    def test_results_come_in_order(self, paths):
        found = gpuroi.extract_regions(paths, "90%", backend=library_on_cpu())
        expected = [gpuroi.extract_regions(path, "90%", backend="cpu") for path in paths]
        assert [regions.provenance["source"] for regions in found] == [*map(str, paths)]
        for regions, reference in zip(found, expected, strict=True):
            np.testing.assert_array_equal(regions.labels, reference.labels)

    def test_no_more_files_are_opened_than_threads_can_use(self, paths, monkeypatch):
        monkeypatch.setattr("gpuroi.extract._MOST_READERS", 2)
        asked = []

        def sources():
            for path in paths:
                asked.append(path)
                yield path

        maps = _read_ahead(sources())
        next(maps)
        assert len(asked) == 5
        maps.close()

    def test_warnings_come_from_the_line_of_the_user(self, tmp_path):
        paths = [tmp_path / f"{seed}.nii.gz" for seed in range(3)]
        for seed, path in enumerate(paths):
            data = blobs((6, 7, 8), seed=seed)
            data[0, 0, :seed] = np.nan
            nib.save(image(data), path)
        with pytest.warns(UserWarning, match="NaN or infinite") as caught:
            gpuroi.extract_regions(paths, "90%", backend=library_on_cpu())
        assert [str(one.message).partition(" voxel")[0][-1] for one in caught] == ["1", "2"]
        assert {one.filename for one in caught} == {__file__}

    def test_the_first_damaged_file_is_told(self, paths):
        for damaged in (paths[7], paths[30]):
            damaged.write_bytes(damaged.read_bytes()[:-10])
        with pytest.raises(InvalidMapError, match=re.escape(str(paths[7]))):
            gpuroi.extract_regions(paths, backend=library_on_cpu())


class TestBatches:
    """A device gets the maps in batches, of which several are under way at once."""

    @pytest.fixture
    def backend(self):
        """Return a backend that likes four maps at once, and notes how many it was given."""
        sizes = []

        def uploads(host):
            if host.ndim == 4:
                sizes.append(len(host))
            copied = np.array(host, order="C")
            return lambda: copied

        backend = library_on_cpu(uploads)
        backend._free_bytes = lambda: 24 * 4 * blobs().nbytes
        backend.sizes = sizes
        return backend

    def maps(self, n):
        for seed in range(n):
            yield prepare(*read_maps(image(blobs(seed=seed))))

    def test_they_are_as_large_as_the_device_likes(self, backend):
        found = list(extract_maps(self.maps(10), make_recipe("95%"), backend))
        expected = extract_maps(self.maps(10), make_recipe("95%"), CpuBackend())
        for regions, reference in zip(found, expected, strict=True):
            np.testing.assert_array_equal(regions.labels, reference.labels)
            pd.testing.assert_frame_equal(regions.table, reference.table, check_exact=True)
        assert backend.sizes == [4, 4, 2]

    @pytest.mark.parametrize("fails", ["copies", "verbs"])
    def test_what_the_device_had_no_room_for_is_not_tried_again(self, backend, fails):
        """Batches that were on their way already are, and no others."""
        refused = []

        def refuse(maps):
            if maps.ndim == 4 and len(maps) > 2:
                refused.append(len(maps))
                raise MemoryError

        if fails == "copies":
            begin = backend._uploads._begin
            backend._uploads._begin = lambda host: refuse(host) or begin(host)
        else:
            verbs = backend._verbs["components"]
            find = verbs.component_voxels
            verbs.component_voxels = lambda maps, *others: refuse(maps) or find(maps, *others)
        found = list(extract_maps(self.maps(64), make_recipe("95%"), backend))
        assert len(found) == 64
        assert len(refused) <= 4
        assert backend.sizes[-20:] == [2] * 20

    def test_they_become_smaller_where_two_have_no_room_at_once(self, backend, monkeypatch):
        def no_room_beside_the_one_before(n):
            raise MemoryError

        staging = backend.staging

        def full(shape, dtype):
            return replace(staging(shape, dtype), send=no_room_beside_the_one_before)

        monkeypatch.setattr(backend, "staging", full)
        assert len(list(extract_maps(self.maps(30), make_recipe("95%"), backend))) == 30
        assert backend.sizes[0] == 4
        assert backend.sizes[-10:] == [1] * 10

    def test_the_device_is_the_one_of_the_thread_that_asks(self, backend):
        """As CuPy's current device is: other threads have their own."""
        backend._device = lambda: threading.current_thread().name
        found = extract_maps(self.maps(5), make_recipe("95%"), backend)
        here = threading.current_thread().name
        assert [regions.provenance["device"] for regions in found] == [here] * 5

    def test_maps_in_any_layout(self, backend):
        maps = [blobs(), np.asfortranarray(blobs()), blobs()[::-1], blobs().astype(">f4")]
        found = gpuroi.extract_regions([*map(image, maps)], "95%", backend=backend)
        assert backend.sizes == [4]
        for one, regions in zip(maps, found, strict=True):
            expected = gpuroi.extract_regions(image(one), "95%", backend="cpu")
            np.testing.assert_array_equal(regions.labels, expected.labels)

    def test_no_more_than_a_few_are_ahead(self, backend):
        asked = []
        maps = (asked.append(one) or one for one in self.maps(100))
        results = extract_maps(maps, make_recipe("95%"), backend)
        for n_results in range(1, 50):
            next(results)
            assert len(asked) <= n_results + 4 * 4
        results.close()

    def test_batches_before_a_failure_are_not_lost_to_it(self, backend):
        def failing():
            yield from self.maps(9)
            raise InvalidMapError("damaged")

        results = extract_maps(failing(), make_recipe("95%"), backend)
        assert len([next(results) for _ in range(8)]) == 8
        with pytest.raises(InvalidMapError, match="damaged"):
            next(results)

    def test_a_map_that_cannot_be_measured_ends_the_series_at_its_place(self, backend, monkeypatch):
        def measure(found, volume):
            if volume is maps[5].volume:
                raise ValueError("odd")
            return gather(found, volume)

        monkeypatch.setattr(pipeline, "gather", measure)
        maps = list(self.maps(20))
        results = extract_maps(iter(maps), make_recipe("95%"), backend)
        assert [next(results).labels.shape for _ in range(5)] == [(12, 14, 16)] * 5
        with pytest.raises(ValueError, match="odd"):
            next(results)
        assert list(results) == []


class TestPopulationsAndMasks:
    def test_nonzero_ranks_no_background(self):
        data = blobs()
        data[np.random.default_rng(0).random(data.shape) < 0.7] = 0
        regions = gpuroi.extract_regions(image(data), "90%", population="nonzero")
        score = stats.scoreatpercentile(np.abs(data[data != 0]), 90)
        assert regions.provenance["percentile_score"] == score
        assert regions.provenance["voxels_ranked"] == np.count_nonzero(data)

    def test_a_population_mask_ranks_its_voxels_but_hides_none(self):
        data = blobs()
        inside = np.zeros(data.shape, np.uint8)
        inside[:6] = 1
        regions = gpuroi.extract_regions(image(data), "90%", population=image(inside))
        assert regions.provenance["percentile_score"] == stats.scoreatpercentile(
            np.abs(data[:6]), 90
        )
        assert regions.labels[6:].any()

    def test_a_mask_hides_and_is_the_population(self):
        data = blobs()
        inside = (np.indices(data.shape).sum(axis=0) < 25).astype(np.uint8)
        regions = gpuroi.extract_regions(image(data), "90%", mask_img=image(inside))
        score = stats.scoreatpercentile(np.abs(data[inside == 1]), 90)
        assert regions.provenance["percentile_score"] == score
        assert not regions.labels[inside == 0].any()
        masked = gpuroi.extract_regions(image(data * inside), float(regions.cutoff))
        np.testing.assert_array_equal(regions.labels, masked.labels)

    def test_a_mask_on_another_grid_is_an_error_unless_resampling_is_asked_for(self):
        coarse = image(np.ones((6, 7, 8), np.uint8), np.diag([4.0, 4.0, 4.0, 1.0]))
        with pytest.raises(
            InvalidMapError,
            match=r"(?s)another grid .*\(6, 7, 8\) against \(12, 14, 16\).*resample_mask=True",
        ):
            gpuroi.extract_regions(image(blobs()), mask_img=coarse)
        regions = gpuroi.extract_regions(image(blobs()), mask_img=coarse, resample_mask=True)
        assert len(regions) > 0

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (np.zeros((12, 14, 16)), "is zero everywhere: it would"),
            (np.arange(12 * 14 * 16.0).reshape(12, 14, 16), "has 2687 values besides 0"),
            (np.ones((12, 14, 16, 2)), r"expected a 3-D mask, got shape \(12, 14, 16, 2\)"),
        ],
    )
    def test_a_mask_has_one_value_inside(self, mask, message):
        with pytest.raises(InvalidMapError, match=f"mask_img .*{message}"):
            gpuroi.extract_regions(image(blobs()), mask_img=image(mask))


class TestMostlyZero:
    """A percentile that most of a map is below keeps all of its voxels."""

    DATA = np.where(np.arange(12)[:, np.newaxis, np.newaxis] < 8, 0, blobs())

    def test_is_told(self):
        told = "at least 50% of the voxels ranked are zero, so that"
        with pytest.warns(UserWarning, match=told):
            everything = gpuroi.extract_regions(image(self.DATA), "50%")
        assert np.array_equal(everything.labels != 0, self.DATA != 0)

    def test_is_not_told_where_it_does_not_matter(self):
        img = image(self.DATA)
        gpuroi.extract_regions(img, "50%", population="nonzero")
        gpuroi.extract_regions(img, "0%")  # as asked
        gpuroi.extract_regions(image(np.zeros((4, 4, 4))), "50%")  # nothing is kept
        gpuroi.extract_regions(img, 1.0)


class TestNothingFound:
    @pytest.mark.parametrize(
        ("data", "threshold"),
        [
            (np.zeros((3, 4, 5), np.float32), "97%"),
            (np.full((3, 4, 5), 1000.0, np.float32), "97%"),
            (np.full((3, 4, 5), 5.0), "100%"),
            (np.zeros((3, 4, 5)), 0.0),
            (np.ones((3, 4, 5), np.int16), 2.0),
            (np.ones((3, 4, 5)), 1e300),
            (np.ones((3, 4, 5), np.float32), 1e300),
            (np.full((3, 4, 5), np.finfo("f4").max, np.float32), "50%"),
        ],
        ids=[
            "zeros",
            "constant",
            "100%",
            "zeros by value",
            "too low",
            "far too low",
            "overflow",
            "largest",
        ],
    )
    def test_types_stay_the_same(self, tmp_path, data, threshold):
        regions = gpuroi.extract_regions(image(data), threshold)
        assert len(regions) == 0
        assert regions.labels_img.shape == (3, 4, 5)
        assert not np.any(regions.labels_img.dataobj)
        assert list(regions.table.columns) == list(COLUMNS)
        assert len(regions.table) == 0
        found = gpuroi.extract_regions(image(blobs())).table
        assert (regions.table.dtypes == found.dtypes).all()
        paths = regions.save(tmp_path / "none")
        assert len(pd.read_csv(paths["table"], sep="\t")) == 0
        with pytest.raises(ValueError, match="no regions to stack"):
            regions.to_4d_img()

    def test_an_empty_population_finds_nothing(self):
        regions = gpuroi.extract_regions(image(-np.ones((2, 2, 2))), "50%", tail="positive")
        assert len(regions) == 0
        assert regions.cutoff == np.inf
        assert regions.provenance["percentile_score"] is None
        json.dumps(regions.provenance, allow_nan=False)


class TestNotFinite:
    def test_is_background_counted_and_warned_of_once(self):
        data = blobs()
        clean = data.copy()
        data[0, :3, 0] = [np.nan, np.inf, -np.inf]
        clean[0, :3, 0] = 0
        with pytest.warns(UserWarning, match="3 voxels are NaN or infinite, and become") as caught:
            regions = gpuroi.extract_regions(image(data), "90%")
        assert len(caught) == 1
        assert regions.provenance["voxels_not_finite"] == 3
        np.testing.assert_array_equal(
            regions.labels, gpuroi.extract_regions(image(clean), "90%").labels
        )

    def test_nothing_but_nan(self):
        with pytest.warns(UserWarning, match="8 voxels"):
            assert len(gpuroi.extract_regions(image(np.full((2, 2, 2), np.nan)))) == 0


class TestParameters:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"threshold": "97"}, ValueError, "threshold='97' has no percent sign; pass '97%'"),
            (
                {"threshold": "x%"},
                ValueError,
                "threshold='x%' is no number followed by a percent sign; pass a percentile",
            ),
            ({"threshold": "nan"}, ValueError, "threshold='nan' is text; pass a percentile such"),
            ({"threshold": "0.97"}, ValueError, "no percent sign; pass '97%' for a percentile or"),
            ({"threshold": "1e4"}, ValueError, "threshold='1e4' is text; pass a percentile such"),
            ({"resample_mask": "yes"}, ValueError, "resample_mask='yes' is not one of True, False"),
            ({"threshold": "-3%"}, ValueError, "threshold='-3%' is outside 0% to 100%"),
            ({"threshold": "101%"}, ValueError, "threshold='101%' is outside 0% to 100%"),
            ({"threshold": "nan%"}, ValueError, "threshold='nan%' is outside 0% to 100%"),
            ({"threshold": "%"}, ValueError, "threshold='%' is no number"),
            ({"threshold": "9_7%"}, ValueError, "threshold='9_7%' is no number"),
            ({"threshold": "\N{ARABIC-INDIC DIGIT NINE}%"}, ValueError, "is no number followed"),
            ({"threshold": np.nan}, ValueError, "threshold=nan is not a number that voxels can"),
            ({"threshold": True}, TypeError, "threshold=True is a bool; pass a percentile"),
            ({"threshold": None}, TypeError, "threshold=None is a NoneType; pass a percentile"),
            ({"threshold": -2.5}, ValueError, "threshold=2.5 with tail='negative'"),
            ({"tail": "left"}, ValueError, "tail='left' is not one of 'both', 'positive'"),
            ({"connectivity": 8}, ValueError, "connectivity=8 is not one of 6, 18, 26"),
            ({"method": "watershed"}, ValueError, "method='watershed' is not one of"),
            ({"min_region_size": -1}, ValueError, r"min_region_size=-1 is not .*mm\^3"),
            ({"min_region_size": "10"}, TypeError, "min_region_size='10' is a str; pass"),
            ({"min_region_size": np.inf}, ValueError, "min_region_size=inf is not a finite"),
            ({"smoothing_fwhm": -1}, ValueError, r"smoothing_fwhm=-1 is not .*in mm"),
            ({"population": "brain"}, ValueError, "population='brain' is neither 'all' nor"),
            ({"backend": "tpu"}, ValueError, "backend='tpu' is unknown"),
        ],
    )
    def test_what_cannot_be_meant_is_refused(self, arguments, error, message):
        with pytest.raises(error, match=message):
            gpuroi.extract_regions(image(blobs()), **arguments)

    def test_what_is_no_image_is_refused(self):
        with pytest.raises(TypeError, match="a ndarray is not an image; pass a path or a nibabel"):
            gpuroi.extract_regions(blobs())
        with pytest.raises(TypeError, match="a int is not an image"):
            gpuroi.extract_regions([3])


class TestResult:
    @pytest.fixture(params=AFFINES.values(), ids=AFFINES.keys())
    def regions(self, request):
        return gpuroi.extract_regions(image(blobs(), request.param), "90%", min_region_size=50)

    def test_table_is_what_scipy_measures(self, regions):
        data, labels, index = blobs().astype(np.float64), regions.labels, regions.table["label"]
        table = regions.table
        assert index.tolist() == list(range(1, len(regions) + 1))
        voxels = np.bincount(labels.ravel())[1:]
        np.testing.assert_array_equal(table["voxels"], voxels)
        np.testing.assert_allclose(
            table["volume_mm3"], voxels * abs(np.linalg.det(regions.affine[:3, :3])), rtol=1e-14
        )
        peaks = ndimage.maximum_position(np.abs(data), labels, index)
        np.testing.assert_array_equal(table["peak_value"], [data[peak] for peak in peaks])
        np.testing.assert_array_equal(table["sign"], np.sign(table["peak_value"]))
        # Sums are taken in another order than SciPy's, hence the last digits.
        np.testing.assert_allclose(
            table["mean_value"], ndimage.mean(data, labels, index), rtol=1e-13
        )
        centers = np.array(ndimage.center_of_mass(np.abs(data), labels, index))
        for name, voxel in (("peak", np.array(peaks)), ("center_of_mass", centers)):
            in_mm = nib.affines.apply_affine(regions.affine, voxel)
            columns = [f"{name}_{axis}" for axis in "xyz"]
            np.testing.assert_allclose(table[columns], in_mm, rtol=1e-12, atol=1e-12)
        interior = np.zeros(labels.shape, bool)
        interior[1:-1, 1:-1, 1:-1] = True
        on_edge = [not interior[labels == label].all() for label in index]
        assert table["touches_edge"].tolist() == on_edge
        assert set(on_edge) == {True, False}

    def test_images_agree_with_each_other(self, regions):
        labels = np.asanyarray(regions.labels_img.dataobj)
        assert labels.dtype == np.int32
        np.testing.assert_array_equal(labels, regions.labels)
        np.testing.assert_array_equal(regions.labels_img.affine, regions.affine)
        stack = regions.to_4d_img()
        assert stack.shape == (*labels.shape, len(regions))
        for label in range(1, len(regions) + 1):
            expected = np.where(labels == label, blobs(), 0)
            np.testing.assert_array_equal(stack.dataobj[..., label - 1], expected)

    def test_more_regions_than_16_bits_count(self):
        data = np.zeros((84, 84, 84), np.float32)
        data[::2, ::2, ::2] = np.arange(42**3).reshape(42, 42, 42) + 1
        regions = gpuroi.extract_regions(image(data), 0.5)
        assert len(regions) == 42**3 > np.iinfo(np.uint16).max
        np.testing.assert_array_equal(regions.labels, data)
        np.testing.assert_array_equal(regions.table["peak_value"], regions.table["label"])

    def test_the_stack_is_float32_however_it_is_read(self):
        data = np.where(blobs() > 1, np.pi * blobs().astype(np.float64), 0)
        stack = gpuroi.extract_regions(image(data), 1.0).to_4d_img()
        dense = stack.get_fdata()
        np.testing.assert_array_equal(dense, np.asanyarray(stack.dataobj))
        np.testing.assert_array_equal(dense.sum(axis=3), data.astype(np.float32))

    def test_peak_is_the_first_of_equals(self):
        data = np.zeros((3, 3, 3))
        data[1, 1] = data[1, :, 1] = 2.0
        table = gpuroi.extract_regions(image(data, np.eye(4)), 1.0).table
        assert table[["peak_x", "peak_y", "peak_z"]].to_numpy().tolist() == [[1.0, 0.0, 1.0]]

    def test_later_changes_to_the_map_do_not_reach_it(self):
        data = blobs()
        regions = gpuroi.extract_regions(image(data), "90%")
        expected = gpuroi.extract_regions(image(blobs()), "90%").table
        data[:] = 0
        pd.testing.assert_frame_equal(regions.table, expected)

    @pytest.mark.parametrize("threshold", ["99.99995%", "97%", 3.1234567, 1234567.0])
    def test_provenance_keeps_every_digit_of_the_threshold(self, threshold):
        asked = gpuroi.extract_regions(image(blobs()), threshold).provenance["parameters"]
        assert asked["threshold"] == threshold

    @pytest.mark.parametrize("method", ["connected_components", "local_regions"])
    @pytest.mark.parametrize("threshold", ["97.5%", 2])
    def test_an_extraction_is_repeated_from_its_provenance(self, tmp_path, method, threshold):
        inside = np.zeros((12, 13, 14), np.uint8)
        inside[2:, 3:] = 1
        for name, data in [("map", blobs((12, 13, 14))), ("mask", inside)]:
            nib.save(image(data), tmp_path / f"{name}.nii.gz")
        asked = {"threshold": threshold, "mask_img": tmp_path / "mask.nii.gz", "method": method}
        first = gpuroi.extract_regions(tmp_path / "map.nii.gz", **asked, min_region_size=1)
        kept = json.loads(json.dumps(first.provenance))
        again = gpuroi.extract_regions(kept["source"], **kept["parameters"])
        assert again.provenance == first.provenance
        assert again.table.equals(first.table)

    @pytest.mark.parametrize(
        ("img", "error", "hint"),
        [
            (None, TypeError, "connected_regions returns None: lower the threshold or min_region"),
            ("maps/*.nii", InvalidMapError, "no such file; where one path is asked for, patterns"),
        ],
    )
    def test_what_is_passed_by_mistake_is_told_what_to_do(self, img, error, hint):
        with pytest.raises(error, match=hint):
            gpuroi.extract_regions(img)

    def test_regions_are_no_image_but_have_two(self):
        with pytest.raises(TypeError, match=r"such as regions\.labels_img or regions\.to_4d_img"):
            connected_regions(gpuroi.extract_regions(image(blobs())))

    @pytest.mark.parametrize(("threshold", "warns"), [(97, True), (97.5, True), (30, False)])
    def test_a_value_that_looks_like_a_percentile_is_warned_of(self, threshold, warns):
        one = image(blobs())
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert len(gpuroi.extract_regions([one, one], threshold)[1]) == 0
        expected = f"no voxel reaches {threshold}, .* for a percentile pass '{threshold}%'"
        assert len(said) == 2 * warns
        assert all(re.search(expected, str(warning.message)) for warning in said)

    def test_repr_says_the_essential(self, regions):
        assert repr(regions).startswith(f"Regions({len(regions)} regions of ")

    def test_survives_pickling(self, regions):
        copy = pickle.loads(pickle.dumps(regions))
        pd.testing.assert_frame_equal(copy.table, regions.table)
        np.testing.assert_array_equal(copy.labels_img.dataobj, regions.labels_img.dataobj)

    def test_provenance_says_how_it_was_made(self, regions):
        provenance = json.loads(json.dumps(regions.provenance, allow_nan=False))
        assert provenance["backend"] == "cpu"
        assert provenance["versions"]["gpuroi"] == gpuroi.__version__
        assert provenance["versions"]["numpy"] == np.__version__
        assert provenance["parameters"]["threshold"] == "90%"
        assert provenance["cutoff"] == regions.cutoff
        assert provenance["regions"] == len(regions)


def test_no_warning_of_numpy_escapes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*of the voxels ranked are zero")
        for kind in ("denormal", "constant", "signed zeros"):
            for volume in make_maps(kind, (2, 5, 6, 7), "float32", 0):
                gpuroi.extract_regions(image(volume), "50%")
                gpuroi.extract_regions(image(volume), 1e300)


def test_sizes_forgive_the_rounding_of_affines():
    data = np.zeros((8, 8, 8))
    data[:5, :5, :2] = 4.0
    affine = np.diag([np.float32(2.9999998)] * 3 + [1.0])  # 50 voxels of 27 mm^3, nearly
    assert len(gpuroi.extract_regions(image(data, affine), 3.0, min_region_size=1350)) == 1
    assert len(gpuroi.extract_regions(image(data, affine), 3.0, min_region_size=1351)) == 0


def test_warnings_point_at_the_line_of_the_user():
    data = blobs()
    data[0, 0, 0] = np.nan
    img = image(data)
    for call in (
        lambda: gpuroi.extract_regions(img),
        lambda: gpuroi.extract_regions([img], method="local_regions"),
        lambda: gpuroi.extract_regions(
            image(blobs()), mask_img=image(np.where(data > 0, 1, data * 0))
        ),
        lambda: threshold_img(img, 1.0),
        lambda: connected_regions(img, 0),
    ):
        with pytest.warns(UserWarning, match="NaN or infinite") as caught:
            call()
        assert {warning.filename for warning in caught} == {__file__}


def test_a_wrong_mask_is_shown_in_a_line():
    with pytest.raises(
        TypeError, match=r"mask_img=array.* is a ndarray; pass a path or an image"
    ) as caught:
        gpuroi.extract_regions(image(blobs()), mask_img=np.ones((30, 30, 30)))
    assert len(str(caught.value)) < 200


class TestTablesAreTheirOwners:
    def test_what_one_does_to_a_table_reaches_no_other(self):
        one, other = (gpuroi.extract_regions(image(blobs()), "90%") for _ in range(2))
        one.table.columns.name = "mine"
        assert other.table.columns.name is None

    @pytest.mark.parametrize("threshold", ["50%", "99%", 1e9])
    def test_the_file_is_what_pandas_would_write(self, threshold):
        data = blobs().astype(np.float64) * 1e-5
        regions = gpuroi.extract_regions(image(data), threshold)
        table = regions.table.rename(columns={"label": "index"})
        table.insert(1, "name", [f"region-{label}" for label in table["index"]])
        expected = table.to_csv(sep="\t", index=False, lineterminator="\n", na_rep="n/a")
        assert regions.files()["table"] == (".tsv", expected.encode())

    def test_files_hold_what_was_found(self, tmp_path):
        regions = gpuroi.extract_regions(image(blobs()), "90%")
        assert len(regions) > 1
        expected = regions.save(tmp_path / "before")
        regions.table["name"] = "anatomy"
        regions.table["voxels"] = 0
        regions.labels[:] = 0
        found = regions.save(tmp_path / "after")
        assert found["table"].read_text() == expected["table"].read_text()
        np.testing.assert_array_equal(
            nib.load(found["labels"]).dataobj, nib.load(expected["labels"]).dataobj
        )


def test_numbers_of_numpy_are_numbers():
    img = image(blobs())
    expected = gpuroi.extract_regions(img, 1.0, connectivity=18, min_region_size=40).labels
    for connectivity in np.array([18], "i8"), np.array([18], "u1"):
        regions = gpuroi.extract_regions(
            img, np.float32(1), connectivity=connectivity[0], min_region_size=np.int64(40)
        )
        np.testing.assert_array_equal(regions.labels, expected)
        assert type(regions.provenance["parameters"]["connectivity"]) is int
