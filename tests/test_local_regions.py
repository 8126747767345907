"""`local_regions` through both doors, against nilearn's own code with an exact solver in it."""

import nibabel as nib
import numpy as np
import pytest
from nilearn import regions as nilearn_regions
from nilearn._utils import segmentation
from scipy import ndimage
from scipy.sparse.linalg import splu

import gpuroi
from gpuroi.algorithms import dirichlet
from gpuroi.algorithms.checkerboard import HAS_CHOLMOD
from gpuroi.algorithms.local_regions import Contest, Foreground, warn_of_undecided
from gpuroi.algorithms.walker import Confidence
from gpuroi.backends.cpu import CpuBackend
from gpuroi.regions import connected_regions
from tests.conftest import AFFINES, image

GRID = AFFINES["anisotropic"]


def islands(blobs, shape=(20, 22, 24), seed=0, dtype=np.float32, cut=3.0):
    data = blobs(shape, seed, np.float64)
    return np.where(np.abs(data) > cut, data, 0).astype(dtype)


@pytest.fixture
def solved(monkeypatch):
    """Let nilearn solve its equations directly: everything but the iteration is nilearn's own.

    A tighter tolerance would not do: on these systems conjugate gradients never arrive.
    """

    def directly(laplacian, right_sides, tol):
        factors = splu(laplacian.tocsc())
        columns = [-np.asarray(side.todense()).ravel() for side in right_sides]
        return np.argmax([factors.solve(column) for column in columns], axis=0)

    monkeypatch.setattr(segmentation, "_solve_cg", directly)


class TestAgainstNilearn:
    @pytest.mark.usefixtures("solved")
    @pytest.mark.parametrize("smoothing_fwhm", [6, 2.5, 0, None])
    @pytest.mark.parametrize("shape", [(20, 22, 24), (20, 22, 24, 3)])
    @pytest.mark.filterwarnings("ignore:The parameter 'fwhm'", "ignore:Random walker")
    def test_same_regions_in_the_same_order(self, blobs, affine, shape, smoothing_fwhm, backend):
        img = image(islands(blobs, shape), affine)
        ours, our_index = connected_regions(img, 20, smoothing_fwhm=smoothing_fwhm, backend=backend)
        theirs, their_index = nilearn_regions.connected_regions(
            img, 20, smoothing_fwhm=smoothing_fwhm
        )
        assert our_index == their_index
        assert len(our_index) > 1
        np.testing.assert_array_equal(ours.dataobj, theirs.dataobj)

    @pytest.mark.usefixtures("solved")
    @pytest.mark.parametrize("dtype", ["float64", "int16", "int32", "int64", "uint8"])
    @pytest.mark.filterwarnings("ignore:Data array used", "ignore:Image data has type")
    def test_every_dtype(self, blobs, dtype):
        data = blobs((20, 22, 24), 1, dtype)
        threshold = 3 if np.dtype(dtype).kind == "f" else 30
        img = image(np.where(np.abs(data) > threshold, data, 0).astype(dtype))
        ours, our_index = connected_regions(img, 20)
        theirs, their_index = nilearn_regions.connected_regions(img, 20)
        assert our_index == their_index
        np.testing.assert_array_equal(ours.dataobj, theirs.dataobj)

    @pytest.mark.usefixtures("solved")
    @pytest.mark.parametrize("threshold", ["99%", "97%", 3.0])
    def test_the_real_map_at_default_parameters(self, sample_img, threshold):
        thresholded = gpuroi.image.threshold_img(sample_img, threshold)
        ours, our_index = connected_regions(thresholded)
        theirs, their_index = nilearn_regions.connected_regions(thresholded)
        assert our_index == their_index
        np.testing.assert_array_equal(ours.dataobj, theirs.dataobj)

    @pytest.mark.usefixtures("solved")
    def test_a_mask(self, blobs):
        img = image(islands(blobs))
        mask = image((np.indices(img.shape).sum(axis=0) < 36).astype(np.uint8))
        ours, our_index = connected_regions(img, 20, mask_img=mask)
        theirs, their_index = nilearn_regions.connected_regions(img, 20, mask_img=mask)
        assert our_index == their_index
        np.testing.assert_array_equal(ours.dataobj, theirs.dataobj)

    @pytest.mark.parametrize("value", [0, 3])
    def test_a_constant_map_has_no_seeds(self, value):
        img = image(np.full((6, 7, 8), value, np.float32))
        with pytest.warns(UserWarning, match="no region is larger than"):
            assert connected_regions(img, 0) == (None, None)


class TestNativeDoor:
    def extract(self, data, threshold, **kwargs):
        return gpuroi.extract_regions(
            nib.Nifti1Image(data, GRID), threshold, method="local_regions", **kwargs
        )

    def test_a_positive_map_is_the_nilearn_door_numbered_by_first_voxel(self, blobs):
        data = np.abs(islands(blobs))
        regions = self.extract(data, 3.0, min_region_size=30)
        stack, _ = connected_regions(nib.Nifti1Image(data, GRID), 30 - 1e-6)
        theirs = np.moveaxis(np.asarray(stack.dataobj) != 0, 3, 0)
        by_first = sorted(theirs, key=lambda region: np.flatnonzero(region)[0])
        for label, region in enumerate(by_first, start=1):
            np.testing.assert_array_equal(regions.labels == label, region)
        assert len(regions) == len(by_first) > 1

    def test_each_sign_has_seeds_of_its_own(self, blobs):
        data = islands(blobs, cut=2.0)
        both = self.extract(data, 2.0)
        positive = self.extract(data, 2.0, tail="positive")
        negative = self.extract(-data, 2.0, tail="positive")
        assert (self.extract(data, 2.0, tail="negative").labels == negative.labels).all()
        assert set(both.table["sign"]) == {-1, 1}
        assert len(both) == len(positive) + len(negative)
        np.testing.assert_array_equal(
            both.labels > 0, (positive.labels > 0) | (negative.labels > 0)
        )
        for regions, sign in ((positive, 1), (negative, -1)):
            ours = both.labels * (np.sign(data) == sign)
            pairs = np.unique(
                np.stack([ours[regions.labels > 0], regions.labels[regions.labels > 0]]), axis=1
            )
            assert pairs.shape[1] == len(regions)

    def test_every_backend_and_batch_gives_the_same(self, blobs, backend):
        images = [nib.Nifti1Image(blobs((14, 15, 16), seed), GRID) for seed in range(4)]
        expected = [
            gpuroi.extract_regions(one, "90%", method="local_regions", backend=CpuBackend())
            for one in images
        ]
        found = gpuroi.extract_regions(images, "90%", method="local_regions", backend=backend)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours.labels, theirs.labels)
            assert ours.provenance["random_walker"] == theirs.provenance["random_walker"]

    def test_seed_distance_and_smoothing_matter(self, blobs):
        data = blobs((20, 22, 24))
        near = self.extract(data, "90%", seed_distance=1, smoothing_fwhm=0)
        far = self.extract(data, "90%", seed_distance=20, smoothing_fwhm=0)
        smooth = self.extract(data, "90%", seed_distance=1, smoothing_fwhm=12)
        assert len(near) > len(far)
        assert len(near) > len(smooth)
        asked = near.provenance["parameters"]
        assert asked["seed_distance"] == 1
        assert asked["smoothing_fwhm"] == 0.0

    def test_provenance_says_how_sure_the_labels_are(self, blobs):
        sure = self.extract(blobs((20, 22, 24)), "70%", seed_distance=2).provenance["random_walker"]
        assert 0 < sure["error"] < 1e-6
        assert 0 <= sure["smallest_margin"] < 1
        assert sure["residual"] < 1e-12
        assert sure["n_undecided"] == 0

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"connectivity": 26}, ValueError, "connectivity=26 has no meaning for method='local"),
            ({"seed_distance": 0}, ValueError, "seed_distance=0 is not a number of voxels >= 1"),
            (
                {"seed_distance": 2.5},
                TypeError,
                "seed_distance=2.5 is a float; pass a number of voxels",
            ),
        ],
    )
    def test_what_cannot_be_meant_is_refused(self, blobs, arguments, error, message):
        with pytest.raises(error, match=message):
            self.extract(blobs(), 1.0, **arguments)


@pytest.mark.parametrize(
    ("smoothing_fwhm", "error", "message"),
    [
        ("fast", TypeError, "smoothing_fwhm='fast' is a str; pass a number of mm >= 0"),
        (-1, ValueError, "smoothing_fwhm=-1 is not a finite number >= 0"),
        (np.nan, ValueError, "smoothing_fwhm=nan is not a finite number"),
    ],
)
def test_widths_that_are_none(blobs, smoothing_fwhm, error, message):
    with pytest.raises(error, match=message):
        connected_regions(image(blobs()), smoothing_fwhm=smoothing_fwhm)


def test_undecided_voxels_are_warned_of():
    with pytest.warns(UserWarning, match="map.nii: 3 voxels lie between two regions more closely"):
        warn_of_undecided("map.nii", Confidence(error=1e-5, n_undecided=3))


def test_sides_are_numbered_together_by_first_voxel():
    def side(index, seeds):
        voxels = np.array(index)
        return Foreground(voxels, np.ones(voxels.size), np.array(seeds, np.int32), (1, 1, 12))

    contest = Contest((side([3, 4, 8, 9], [1, 0, 2, 0]), side([0, 1, 6, 11], [2, 0, 0, 1])))
    found, _ = contest.settle(min_voxels=0)  # seed 1 of the other side is alone, and dropped
    assert found.n_regions == 3
    found, confidence = contest.settle(min_voxels=2)
    assert found.index.tolist() == [0, 1, 3, 4, 8, 9]
    assert found.label.tolist() == [1, 1, 2, 2, 3, 3]
    assert found.n_regions == 3
    assert confidence == Confidence()


def test_a_peak_beside_the_box_of_an_island_is_found_as_in_the_whole_volume():
    """Smoothing and maxima only look at the part of a map that is not zero."""
    data = np.zeros((30, 31, 32), np.float32)
    data[4:7, 20:23, 9:12] = np.arange(27).reshape(3, 3, 3) + 1
    expected = data.copy()
    for axis in range(3):
        expected = ndimage.gaussian_filter1d(expected, 1.5, axis=axis)
    smoothed = CpuBackend().smooth(data[np.newaxis], (1.5, 1.5, 1.5))[0]
    np.testing.assert_array_equal(smoothed, expected)


def test_the_provenance_names_what_solved(monkeypatch):
    two_peaks = np.zeros((30, 8, 8), np.float32)
    two_peaks[1:-1, 2:6, 2:6] = 2
    two_peaks[[4, 25], 4, 4] = 5

    def provenance(data=two_peaks, **options):
        return gpuroi.extract_regions(image(data), 1.0, **options, backend="cpu").provenance

    contested = provenance(method="local_regions")
    solver = "cholmod" if HAS_CHOLMOD else "superlu"
    assert contested["random_walker"]["solvers"] == (solver,)
    assert ("cvxopt" in contested["versions"]) == HAS_CHOLMOD
    uncontested = provenance(np.ones((4, 4, 4)), method="local_regions")
    assert uncontested["random_walker"]["solvers"] == ()
    for other in (uncontested, provenance()):
        assert "cvxopt" not in other["versions"]
    monkeypatch.setattr(dirichlet, "HAS_CHOLMOD", False)
    assert provenance(method="local_regions")["random_walker"]["solvers"] == ("superlu",)
