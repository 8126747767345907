"""The random walker against direct solutions of the whole system, and against nilearn."""

from fractions import Fraction
from threading import Thread

import nibabel as nib
import numpy as np
import pytest
from nilearn._utils.segmentation import random_walker as nilearn_random_walker
from nilearn.image import resample_img
from scipy import ndimage, sparse
from scipy.sparse.linalg import splu
from threadpoolctl import threadpool_info, threadpool_limits

import gpuroi
from gpuroi.algorithms import dirichlet
from gpuroi.algorithms._blas import one_blas_thread
from gpuroi.algorithms.checkerboard import HAS_CHOLMOD, Checkerboard, CholmodFactors, superlu
from gpuroi.algorithms.dirichlet import DirichletProblem
from gpuroi.algorithms.local_regions import find_seeds
from gpuroi.algorithms.multifrontal import MultifrontalCholesky
from gpuroi.algorithms.walker import random_walk
from gpuroi.backends.cpu import CpuBackend
from gpuroi.datasets import load_sample_motor_activation_image


def seeded(volume, sigma_voxels=(1.0, 1.0, 1.0), distance=10):
    (foreground,) = find_seeds(CpuBackend(), volume[np.newaxis], sigma_voxels, distance)
    return foreground


def as_volume(foreground, label):
    volume = np.zeros(foreground.shape, np.int32)
    volume.ravel()[foreground.index] = label
    return volume


def solved_at_once(volume, seeds):
    """Return the labels by one direct solution of the whole foreground, straight from Grady.

    Every label has its own right-hand side, and nothing is split into components, except that
    those without a seed or without an unlabelled voxel are left out, as nilearn does.
    """
    volume = np.asarray(volume, np.float64)
    foreground = volume != 0
    components, _ = ndimage.label(foreground)
    with_seed = np.isin(components, components[(seeds > 0) & foreground])
    with_free = np.isin(components, components[(seeds == 0) & foreground])
    taken = foreground & with_seed & with_free
    place = np.full(volume.shape, -1)
    place[taken] = np.arange(np.count_nonzero(taken))
    n = np.count_nonzero(taken)

    rows, columns, weights = [], [], []
    for axis in range(3):
        lower = np.moveaxis(place, axis, 0)[:-1].ravel()
        upper = np.moveaxis(place, axis, 0)[1:].ravel()
        step = (np.moveaxis(volume, axis, 0)[:-1] - np.moveaxis(volume, axis, 0)[1:]).ravel()
        both = (lower >= 0) & (upper >= 0)
        rows.append(lower[both])
        columns.append(upper[both])
        weights.append(np.exp(-130 * step[both] ** 2 / (10 * volume.std())) + 1e-10)
    rows, columns, weights = map(np.concatenate, (rows, columns, weights))
    graph = sparse.coo_array((weights, (rows, columns)), shape=(n, n)).tocsr()
    graph = graph + graph.T
    laplacian = (sparse.diags_array(graph.sum(axis=1)) - graph).tocsr()

    seed = seeds[taken]
    free, fixed = np.flatnonzero(seed == 0), np.flatnonzero(seed > 0)
    numbers = np.unique(seed[fixed])
    indicator = (seed[fixed][:, np.newaxis] == numbers).astype(np.float64)
    right = -laplacian[free][:, fixed] @ indicator
    probability = splu(laplacian[free][:, free].tocsc()).solve(right)
    labels = seed.copy()
    labels[free] = numbers[np.argmax(probability, axis=1)]
    out = np.zeros(volume.shape, np.int32)
    out[taken] = labels
    return out


def thresholded(volume, percent):
    magnitude = np.abs(volume)
    return np.where(magnitude > np.percentile(magnitude, percent), volume, 0)


@pytest.fixture(autouse=True, params=["scipy", "cholmod"])
def library(request, monkeypatch):
    """Solve with SciPy alone, and with CHOLMOD."""
    if request.param == "scipy":
        monkeypatch.setattr(dirichlet, "HAS_CHOLMOD", False)
    elif not HAS_CHOLMOD:
        pytest.skip("cvxopt is not installed")
    return request.param


@pytest.fixture(scope="module")
def real_maps():
    packaged = nib.load(load_sample_motor_activation_image())
    at_3mm = nib.Nifti1Image(np.asanyarray(packaged.dataobj), packaged.affine)
    affine = np.array([[-2.0, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])
    at_2mm = resample_img(at_3mm, affine, (91, 109, 91))
    return {"3 mm": np.asanyarray(at_3mm.dataobj), "2 mm": np.asanyarray(at_2mm.dataobj)}


def noise(seed, shape=(26, 28, 30)):
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 1.5)
    return (smooth / smooth.std()).astype(np.float32)


def steep():
    """Blobs whose flanks cross ten orders of magnitude of weights within a few voxels."""
    return np.sinh(noise(1) * 3).astype(np.float32)


def plateaus():
    """Few values, so that maxima are flat and probabilities tie."""
    return np.round(noise(2) * 2).astype(np.float32) / 2


class TestLabels:
    @pytest.mark.slow
    @pytest.mark.parametrize("percent", [99, 97, 95, 90])
    @pytest.mark.parametrize("grid", ["3 mm", "2 mm"])
    def test_real_map(self, real_maps, grid, percent):
        volume = thresholded(real_maps[grid], percent)
        sigma = 6 / (np.sqrt(8 * np.log(2)) * int(grid[0]))
        foreground = seeded(volume, (sigma,) * 3)
        walk = foreground.walk()
        expected = solved_at_once(volume, as_volume(foreground, foreground.seeds))
        np.testing.assert_array_equal(as_volume(foreground, walk.label), expected)
        assert walk.confidence.n_undecided == 0
        assert walk.confidence.error < walk.confidence.smallest_margin

    @pytest.mark.parametrize("seed", range(50))
    def test_noise(self, seed):
        volume = thresholded(noise(seed), (70, 80, 90)[seed % 3])
        foreground = seeded(volume, distance=(2, 4, 10)[seed // 3 % 3])
        expected = solved_at_once(volume, as_volume(foreground, foreground.seeds))
        np.testing.assert_array_equal(as_volume(foreground, foreground.walk().label), expected)

    @pytest.mark.parametrize("volume", [steep(), plateaus()], ids=["steep", "plateaus"])
    @pytest.mark.parametrize("percent", [60, 80, 95])
    def test_steep_and_flat(self, volume, percent):
        volume = thresholded(volume, percent)
        foreground = seeded(volume, distance=3)
        expected = solved_at_once(volume, as_volume(foreground, foreground.seeds))
        np.testing.assert_array_equal(as_volume(foreground, foreground.walk().label), expected)

    def test_a_region_without_contest_is_nilearns(self):
        """Where no component has two seeds, nilearn's tolerance decides nothing either."""
        data = np.zeros((30, 30, 30), np.float32)
        for corner in ((2, 2, 2), (18, 3, 4), (5, 19, 20)):
            x, y, z = corner
            data[x : x + 7, y : y + 6, z : z + 5] = noise(sum(corner), (7, 6, 5)) + 6
        foreground = seeded(data)
        seeds = as_volume(foreground, foreground.seeds)
        seeds[data == 0] = -1
        expected = nilearn_random_walker(data, seeds)
        expected[expected == -1] = 0
        np.testing.assert_array_equal(as_volume(foreground, foreground.walk().label), expected)

    @pytest.mark.parametrize("threads", [1, 2])
    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_threads_layout_and_dtype_do_not_matter(self, dtype, order, threads):
        volume = thresholded(noise(7, (40, 40, 40)), 75)
        reference = random_walk_of(volume)
        with threadpool_limits(threads):
            label = random_walk_of(np.asarray(volume, dtype=dtype, order=order))
        np.testing.assert_array_equal(label, reference)


def random_walk_of(volume):
    foreground = seeded(volume, distance=5)
    return as_volume(foreground, foreground.walk().label)


def cube_on_arms(n):
    """Return a plateau of n^3 voxels between two arms of three voxels, too steep to step on."""
    volume = np.zeros((n + 6, n, n))
    volume[3:-3] = 1000.0
    volume[:3, 0, 0] = volume[-3:, 0, 0] = 1.0
    return volume


def walk_to_a_cube(n):
    """Let the two ends of the arms compete for the cube; by symmetry, nobody wins."""
    volume = cube_on_arms(n)
    seeds = np.zeros(volume.shape, np.int32)
    seeds[0, 0, 0], seeds[-1, 0, 0] = 1, 2
    index = np.flatnonzero(volume)
    return random_walk(index, volume.ravel()[index], seeds.ravel()[index], volume.shape)


class TestRules:
    def walk(self, values, seeds):
        volume, seeds = np.asarray(values, np.float64), np.asarray(seeds, np.int32)
        index = np.flatnonzero(volume)
        walk = random_walk(index, volume.ravel()[index], seeds.ravel()[index], volume.shape)
        labels = np.zeros(volume.size, np.int32)
        labels[index] = walk.label
        return labels.reshape(volume.shape)

    def test_a_tie_goes_to_the_lowest_label(self):
        assert self.walk([[[2, 2, 2, 2, 2]]], [[[2, 0, 0, 0, 1]]]).tolist() == [[[2, 2, 1, 1, 1]]]

    @pytest.mark.parametrize("n", [6, 14, 20])
    def test_a_plateau_on_two_weak_arms_is_a_tie(self, n):
        """The worst condition there is: a cube that hangs on its seeds by edges of 1e-10."""
        walk = walk_to_a_cube(n)
        assert walk.confidence.n_undecided == 0
        assert walk.confidence.error <= 1e-10
        assert np.bincount(walk.label).tolist() == [0, n**3 + 3, 3]

    def test_what_float64_cannot_hold_is_undecided(self):
        """A hundred plateaus in a row, each on the next by one weakest edge: no digit is left."""
        n = 100
        volume = np.zeros((12 * n, 5, 5))
        for k in range(n):
            volume[12 * k : 12 * k + 11] = 1 + 100 * (k % 2)
        volume[11::12, 2, 2] = 1e4
        volume[-1] = 0
        seeds = np.zeros(volume.shape, np.int32)
        seeds[0, 0, 0], seeds[12 * n - 2, 2, 2] = 1, 2
        index = np.flatnonzero(volume)
        walk = random_walk(index, volume.ravel()[index], seeds.ravel()[index], volume.shape)
        confidence = walk.confidence
        assert confidence.error <= 1e-10 or (
            confidence.error <= 1 and confidence.n_undecided > volume.size // 4
        )

    def test_huge_values_do_not_overflow(self):
        volume = np.zeros((8, 8, 24))
        volume[2:5, 2:5, 2:22] = 1e200
        seeds = np.zeros(volume.shape, np.int32)
        seeds[3, 3, 3], seeds[3, 3, 20] = 1, 2
        index = np.flatnonzero(volume)
        labels = [
            random_walk(index, values.ravel()[index], seeds.ravel()[index], volume.shape).label
            for values in (volume, volume * 2.0**-600)
        ]
        np.testing.assert_array_equal(labels[0], labels[1])
        assert np.bincount(labels[0]).tolist() == [0, 90, 90]

    def test_undecided_voxels_are_counted(self, monkeypatch):
        monkeypatch.setattr(dirichlet, "_MOST_REFINEMENTS", 1)
        confidence = walk_to_a_cube(14).confidence
        assert confidence.error > 1e-6
        assert confidence.n_undecided >= 14**3

    def test_undecided_voxels_are_warned_of_at_the_door(self, monkeypatch):
        monkeypatch.setattr(dirichlet, "_MOST_REFINEMENTS", 1)
        volume = cube_on_arms(14)
        volume[0, 0, 0] = volume[-1, 0, 0] = 2000.0  # the only maxima in a window this wide
        image = nib.Nifti1Image(volume, np.eye(4))
        with pytest.warns(UserWarning, match="voxels lie between two regions more closely"):
            regions = gpuroi.extract_regions(
                image, 0.5, method="local_regions", smoothing_fwhm=0, seed_distance=30
            )
        assert regions.provenance["random_walker"]["n_undecided"] >= 14**3

    def test_components_without_a_seed_or_of_seeds_only_are_dropped(self):
        labels = self.walk([[[2, 3, 0, 4, 0, 5, 5]]], [[[1, 0, 0, 2, 0, 0, 0]]])
        assert labels.tolist() == [[[1, 1, 0, 0, 0, 0, 0]]]

    def test_seeds_stay_where_there_is_nothing_else(self):
        values, seeds = [[[2, 0, 3, 0, 1]]], np.array([[[1, 0, 2, 0, 0]]])
        with pytest.warns(UserWarning, match="only contains isolated seeds"):
            expected = nilearn_random_walker(
                np.array(values, float), np.where(np.array(values) == 0, -1, seeds)
            )
        assert self.walk(values, seeds).tolist() == np.maximum(expected, 0).tolist()

    def test_an_empty_foreground(self):
        assert self.walk(np.zeros((2, 3, 4)), np.zeros((2, 3, 4))).sum() == 0

    def test_a_voxel_never_gets_the_label_of_a_region_it_does_not_touch(self):
        volume = thresholded(noise(11, (40, 40, 40)), 80)
        labels = random_walk_of(volume)
        components, _ = ndimage.label(volume)
        seeds = as_volume(seeded(volume, distance=5), seeded(volume, distance=5).seeds)
        for component in np.unique(components[labels > 0]):
            inside = components == component
            assert set(labels[inside]) <= set(seeds[inside & (seeds > 0)])


class TestDirichletProblem:
    @pytest.mark.parametrize("large", [0, 100_000])
    def test_a_chain_of_steep_steps_to_nine_digits(self, monkeypatch, large):
        """Between two seeds the probability falls as the resistance grows: known exactly."""
        monkeypatch.setattr(dirichlet, "_LARGE", large)
        n = 400
        weights = np.where(np.random.default_rng(0).random(n + 1) < 0.2, 1e-10, 1.0)
        boundary = np.zeros((n, 2))
        boundary[0, 0], boundary[-1, 1] = weights[0], weights[-1]
        solution = DirichletProblem(
            edges=np.stack([np.arange(n - 1), np.arange(1, n)]),
            weights=weights[1:-1],
            boundary_weights=boundary,
            coordinates=np.stack([np.arange(n), np.zeros(n, int), np.zeros(n, int)], axis=1),
        ).solve()
        resistance = [1 / Fraction(weight) for weight in weights]
        total, passed, exact = sum(resistance), Fraction(0), []
        for step in resistance[:-1]:
            passed += step
            exact.append(float(1 - passed / total))
        # Conditions of 1e10 leave six digits to a float64 solution; refinement gives these.
        np.testing.assert_allclose(solution.probabilities[:, 0], exact, rtol=0, atol=1e-9)
        np.testing.assert_allclose(solution.probabilities.sum(axis=1), 1, rtol=0, atol=1e-15)
        assert solution.error < 1e-6

    @pytest.mark.parametrize("solver", ["multifrontal", "checkerboard"])
    @pytest.mark.parametrize(
        "shape",
        [(1, 1, 1), (2, 1, 1), (1, 1, 40), (700, 1, 1), (3, 50, 2), (9, 10, 11), (14, 14, 14)],
    )
    def test_factorisations_solve_what_scipy_solves(self, shape, solver, library):
        rng = np.random.default_rng(0)
        # Some voxels are missing, so that parts fall apart and cuts are empty.
        voxels = np.flatnonzero((rng.random(shape) < 0.8).ravel() | (np.prod(shape) < 3))
        place = np.full(np.prod(shape), -1)
        place[voxels] = np.arange(voxels.size)
        place = place.reshape(shape)
        pairs = []
        for axis in range(3):
            ends = [
                np.moveaxis(place, axis, 0)[part].ravel() for part in (slice(-1), slice(1, None))
            ]
            pairs.append(np.stack(ends)[:, (ends[0] >= 0) & (ends[1] >= 0)])
        edges = np.concatenate(pairs, axis=1)
        weights = rng.random(edges.shape[1])
        graph = sparse.coo_array((weights, edges), shape=(voxels.size,) * 2).tocsr()
        graph = graph + graph.T
        degree = 0.1 + graph.sum(axis=1)
        coordinates = np.stack(np.unravel_index(voxels, shape), axis=1) + 3
        right = rng.standard_normal((voxels.size, 3))
        grid = edges, weights, degree, coordinates
        if solver == "multifrontal":
            factors = MultifrontalCholesky(*grid)
        else:
            factors = Checkerboard(*grid, superlu if library == "scipy" else CholmodFactors)
        x = factors.solve(right)
        expected = splu((sparse.diags_array(degree) - graph).tocsc()).solve(right)
        # Well conditioned: the two agree but for rounding.
        np.testing.assert_allclose(x, expected, rtol=1e-10, atol=1e-10)

    def test_a_matrix_that_is_not_positive_definite_is_refused(self):
        no_edges = np.zeros((2, 0), int), np.zeros(0)
        with pytest.raises(np.linalg.LinAlgError, match="not positive definite"):
            MultifrontalCholesky(*no_edges, -np.ones(2), np.arange(6).reshape(2, 3))

    def test_what_rounding_has_made_indefinite_is_solved_without_square_roots(self, monkeypatch):
        def refuse(*_):
            raise np.linalg.LinAlgError("the matrix is not positive definite")

        volume = thresholded(noise(3), 80)
        expected = random_walk_of(volume)
        monkeypatch.setattr(dirichlet, "_LARGE", 0)
        monkeypatch.setattr(dirichlet, "CholmodFactors", refuse)
        monkeypatch.setattr(dirichlet, "MultifrontalCholesky", refuse)
        np.testing.assert_array_equal(random_walk_of(volume), expected)

    def test_blas_threads_are_as_before_when_several_have_solved_at_once(self):
        def blas_threads():
            info = threadpool_info()
            return [one["num_threads"] for one in info if one["user_api"] == "blas"]

        inside = []

        def work():
            for _ in range(20):
                with one_blas_thread():
                    inside.append(blas_threads())

        before = blas_threads()
        threads = [Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert inside == [[1] * len(before)] * 60
        assert blas_threads() == before

    def test_cholmod_refuses_a_matrix_that_is_not_positive_definite(self, library):
        if library == "cholmod":
            with pytest.raises(np.linalg.LinAlgError, match="not positive definite"):
                CholmodFactors(sparse.csc_array(-np.eye(3)))

    def test_large_and_compact_problems_get_the_same_labels_from_either_solver(self, monkeypatch):
        volume = thresholded(noise(3, (48, 48, 48)), 60)
        expected = random_walk_of(volume)
        for large in (0, 10**9):
            monkeypatch.setattr(dirichlet, "_LARGE", large)
            monkeypatch.setattr(dirichlet, "_LEAST_COMPACT", 10**9)
            np.testing.assert_array_equal(random_walk_of(volume), expected)
