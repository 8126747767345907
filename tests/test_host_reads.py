"""The host never reads a device array by accident, and waits no more often for more volumes."""

import nibabel as nib
import numpy as np
import pytest

import gpuroi
from gpuroi.backends._kernels import KernelVerbs
from gpuroi.backends._library import LibraryVerbs
from gpuroi.backends.cpu import CpuBackend
from gpuroi.testing import BackendContract, make_maps
from tests.cuda_on_cpu import ITEMS, THREADS, needs_compiler, on_cpu
from tests.cuda_on_cpu.compiler import Fibers
from tests.cuda_on_cpu.device_array import DeviceArray, filters, unpacking, xp


def library():
    return on_cpu(LibraryVerbs(xp, filters), xp)


def kernels():
    return on_cpu(KernelVerbs(xp, unpacking(Fibers()), THREADS, ITEMS), xp)


EACH = pytest.mark.parametrize("make", [library, pytest.param(kernels, marks=needs_compiler)])


class TestLibraryVerbs(BackendContract):
    @pytest.fixture
    def backend(self):
        return library()


@needs_compiler
class TestKernelVerbs(BackendContract):
    @pytest.fixture
    def backend(self):
        return kernels()


def test_the_door_is_shut():
    array = xp.zeros((2, 3), np.float32)
    for read in (float, int, bool, np.asarray, np.sort):
        with pytest.raises(TypeError, match="read by the host without get"):
            read(array)
    for mix in (
        lambda: array + np.ones(3),
        lambda: array[np.array([0])],
        lambda: xp.sort(np.ones(3)),
    ):
        with pytest.raises(TypeError, match="an array of the host among those of a device"):
            mix()
    assert (array + 1).get().tolist() == [[1, 1, 1], [1, 1, 1]]


@EACH
@pytest.mark.parametrize("method", ["connected_components", "local_regions"])
@pytest.mark.parametrize("population", ["all", "nonzero"])
def test_a_series_of_maps_from_file_to_table(make, method, population):
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    maps = make_maps("smooth", (4, 9, 10, 11), "float32", 0)
    mask = nib.Nifti1Image(np.ones(maps.shape[1:], np.uint8), affine)
    images = [nib.Nifti1Image(volume, affine) for volume in maps]
    options = {"method": method, "population": population, "mask_img": mask}
    found = gpuroi.extract_regions(images, "80%", **options, backend=make())
    expected = gpuroi.extract_regions(images, "80%", **options, backend=CpuBackend())
    for regions, reference in zip(found, expected, strict=True):
        np.testing.assert_array_equal(regions.labels, reference.labels)


@EACH
@pytest.mark.parametrize("method", ["connected_components", "local_regions"])
def test_the_host_reads_as_often_for_many_volumes_as_for_two(make, method):
    def reads(n_volumes):
        maps = make_maps("smooth", (n_volumes, 6, 7, 8), "float32", 0)
        images = [nib.Nifti1Image(volume, np.diag([3.0, 3.0, 3.0, 1.0])) for volume in maps]
        before = DeviceArray.n_reads
        gpuroi.extract_regions(images, "80%", method=method, backend=make())
        return DeviceArray.n_reads - before

    assert 0 < reads(12) == reads(2) <= 20
