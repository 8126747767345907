"""The array door: shapes, batches, and what is refused."""

import numpy as np
import pytest

from gpuroi import arrays
from gpuroi.testing import make_maps, require_backend

MAPS = make_maps("smooth", (3, 8, 9, 10), "float32", 0)


def test_a_batch_is_its_volumes():
    labels, counts = arrays.label(MAPS, [0.4, 0.5, 0.6], connectivity=18, min_voxels=3)
    scores = arrays.percentile_cutoff(MAPS, 90, tail="negative")
    assert labels.shape == MAPS.shape
    assert labels.dtype == counts.dtype == np.int32
    for volume, volume_labels, count, score, cutoff in zip(
        MAPS, labels, counts, scores, (0.4, 0.5, 0.6), strict=True
    ):
        alone, alone_count = arrays.label(volume, cutoff, connectivity=18, min_voxels=3)
        np.testing.assert_array_equal(alone, volume_labels)
        assert alone_count == count
        assert arrays.percentile_cutoff(volume, 90, tail="negative") == score


def test_a_population_of_one_volume_holds_for_all():
    population = np.random.default_rng(0).random(MAPS.shape[1:]) < 0.5
    expected = [arrays.percentile_cutoff(volume, 80, population=population) for volume in MAPS]
    assert arrays.percentile_cutoff(MAPS, 80, population=population).tolist() == expected


def test_nobody_ranked_is_infinite_without_hiding_the_others():
    maps = np.stack([np.full((2, 2, 2), -1.0), np.full((2, 2, 2), 2.0)])
    cutoffs = arrays.percentile_cutoff(maps, 50, tail="positive")
    assert cutoffs.tolist() == [np.inf, np.nextafter(2.0, 3.0)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_background_and_rank_as_zero(bad):
    volume = np.array([[[bad, 3.0, 1.0, bad]]])
    labels, count = arrays.label(volume, 0.5)
    assert labels.tolist() == [[[0, 1, 1, 0]]]
    assert count == 1
    assert arrays.percentile_cutoff(volume, 50) == np.nextafter(0.5, 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: arrays.label(MAPS[0, 0], 1.0), ValueError, r"shape \(9, 10\); pass \(X, Y, Z\)"),
        (lambda: arrays.label([[[1.0]]], 1.0), TypeError, "list is no array of a backend"),
        (lambda: arrays.label(MAPS * 1j, 1.0), TypeError, "maps are complex64; pass real"),
        (lambda: arrays.label(MAPS, -1.0), ValueError, "cutoff=-1.0 is below zero; pass magn"),
        (lambda: arrays.label(MAPS, "97%"), TypeError, "cutoff='97%' is a str; pass a magnitude"),
        (lambda: arrays.threshold(MAPS, "97%"), TypeError, "percentile_cutoff returns those of a"),
        (lambda: arrays.label(MAPS, None), TypeError, "cutoff=None is a NoneType; pass a magn"),
        (lambda: arrays.label(MAPS, True), TypeError, "cutoff=True is a bool; pass a magnitude"),
        (lambda: arrays.label(MAPS, 3j), TypeError, "cutoff=3j is a complex; pass a magnitude"),
        (lambda: arrays.label(MAPS, ["1", "2", "3"]), TypeError, r"cutoff=\['1', '2', '3'\] is a"),
        (lambda: arrays.label(MAPS, [1, [2], 3]), TypeError, r"cutoff=\[1, \[2\], 3\] is a list"),
        (lambda: arrays.label(MAPS, 1.0, min_voxels="3"), TypeError, "cannot be interpreted as an"),
        (lambda: arrays.label(np.ma.array(MAPS), 1.0), TypeError, "a MaskedArray is no array of"),
        (lambda: arrays.percentile_cutoff(MAPS, "97"), TypeError, "percentile='97' is a str"),
        (lambda: arrays.label(MAPS, 1.0, tail="two"), ValueError, "tail='two' is not one of"),
        (lambda: arrays.label(MAPS, 1.0, connectivity=8), ValueError, "connectivity=8 is not"),
        (lambda: arrays.percentile_cutoff(MAPS, 101), ValueError, "percentile=101 is outside"),
        (lambda: arrays.percentile_cutoff(MAPS, 5, tail=""), ValueError, "tail='' is not one of"),
        (lambda: arrays.region_sizes(MAPS[0]), TypeError, "labels are float32; pass integers"),
        (lambda: arrays.remove_small(MAPS[0, 0], 2), ValueError, r"labels have shape \(9, 10\)"),
    ],
)
def test_what_cannot_be_used_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "cutoff", [1, np.float32(1), np.array(1, np.uint8), [1.0] * 3, (1, np.float64(1), 1.0)]
)
def test_cutoffs_are_numbers_of_any_kind(cutoff):
    expected, _ = arrays.label(MAPS, 1.0)
    np.testing.assert_array_equal(arrays.label(MAPS, cutoff)[0], expected)


def test_no_voxel_reaches_a_cutoff_that_is_a_very_large_integer():
    assert arrays.label(MAPS, 10**30)[1].tolist() == [0, 0, 0]


def test_labels_of_a_batch_are_measured_volume_by_volume():
    labels, _ = arrays.label(MAPS, [0.4, 0.5, 0.6])
    sizes, large = arrays.region_sizes(labels), arrays.remove_small(labels, 4)
    for volume, volume_sizes, volume_large in zip(labels, sizes, large, strict=True):
        alone = arrays.region_sizes(volume)
        np.testing.assert_array_equal(volume_sizes[: alone.size], alone)
        assert not volume_sizes[alone.size :].any()
        np.testing.assert_array_equal(volume_large, arrays.remove_small(volume, 4))
    assert arrays.remove_small(labels > 0, 10**6).sum() == 0


def test_percentiles_of_a_batch_can_be_labelled_whatever_they_are():
    maps = np.stack(
        [np.full((3, 3, 3), -1.0), np.eye(9).reshape(3, 3, 9)[:, :, :3], np.zeros((3,) * 3)]
    )
    cutoffs = arrays.percentile_cutoff(maps, 50, tail="positive")
    smallest = np.nextafter(0.0, 1.0)
    assert cutoffs.tolist() == [np.inf, smallest, smallest]
    _, counts = arrays.label(maps, cutoffs, tail="positive")
    assert counts.tolist() == [0, np.count_nonzero(maps[1]), 0]


@pytest.mark.parametrize("shape", [(0, 3, 4), (0, 3, 4, 5), (2, 3, 0, 5)])
def test_empty_arrays_have_nothing(shape):
    empty = np.zeros(shape, np.float32)
    labels, counts = arrays.label(empty, 1.0)
    assert labels.shape == shape
    assert counts.sum() == 0
    assert np.all(np.isinf(arrays.percentile_cutoff(empty, 97)))
    assert arrays.remove_small(labels, 2).shape == shape


def test_cupy_in_cupy_out():
    cuda = require_backend("cuda")
    device_maps = cuda.to_device(MAPS)
    labels, counts = arrays.label(device_maps, 0.5)
    assert type(labels) is type(counts) is type(device_maps)
    for actual, expected in zip((labels, counts), arrays.label(MAPS, 0.5), strict=True):
        np.testing.assert_array_equal(cuda.to_host(actual), expected)
    for cutoff in (np.float32(0.5), np.full(3, 0.5), cuda.to_device(np.full(3, 0.5))):
        np.testing.assert_array_equal(
            cuda.to_host(arrays.label(device_maps, cutoff)[0]), cuda.to_host(labels)
        )
    of_the_host, _ = arrays.label(MAPS, cuda.to_device(np.full(3, 0.5)))
    np.testing.assert_array_equal(of_the_host, cuda.to_host(labels))
    np.testing.assert_array_equal(
        arrays.percentile_cutoff(device_maps, 97), arrays.percentile_cutoff(MAPS, 97)
    )
    np.testing.assert_array_equal(
        cuda.to_host(arrays.threshold(device_maps, 0.5)), arrays.threshold(MAPS, 0.5)
    )
    np.testing.assert_array_equal(
        cuda.to_host(arrays.remove_small(labels[0], 4)), arrays.remove_small(labels[0].get(), 4)
    )


def test_shapes_that_do_not_fit_are_told():
    maps = np.zeros((2, 3, 4, 5), np.float32)
    with pytest.raises(
        ValueError, match=r"cutoff has shape \(3,\); pass one number, or one for each of the 2"
    ):
        arrays.label(maps, [1, 2, 3])
    with pytest.raises(ValueError, match=r"population has shape \(4, 5\); pass \(2, 3, 4, 5\)"):
        arrays.percentile_cutoff(maps, 97, population=np.ones((4, 5), bool))
    volume = np.ones((3, 4, 5), bool)
    smallest = float(np.nextafter(np.float32(0), np.float32(1)))
    assert arrays.percentile_cutoff(maps, 97, population=volume).tolist() == [smallest] * 2


@pytest.mark.parametrize("label", [-1, 2**40])
@pytest.mark.parametrize(
    "function", [arrays.region_sizes, lambda labels: arrays.remove_small(labels, 2)]
)
def test_impossible_labels_are_told(label, function):
    with pytest.raises(ValueError, match=r"labels go from .*; pass 0 \(background\) to 2147483647"):
        function(np.array([[[0, label]]]))
