"""What the tests of the nilearn door share: maps, affines, and how two answers are compared."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nilearn.datasets import load_sample_motor_activation_image
from scipy import ndimage

from gpuroi.backends.cpu import CpuBackend
from gpuroi.testing import require_backend
from tests.cuda_on_cpu import library_on_cpu

AFFINES = {
    "1 mm": np.eye(4),
    "anisotropic": np.array([[2.0, 0, 0, -10], [0, 3, 0, 5], [0, 0, 1.5, 7], [0, 0, 0, 1]]),
    "oblique": np.array(
        [[1.9, 0.3, 0.1, -10], [-0.3, 2.1, 0.2, 5], [0, -0.2, 1.5, 7], [0, 0, 0, 1]]
    ),
    "negative determinant": np.array([[-2.0, 0, 0, 30], [0, 2, 0, -5], [0, 0, 2, 7], [0, 0, 0, 1]]),
}


#: Every way to compute that needs no GPU, and the GPU where there is one.
BACKENDS = {
    "cpu": "cpu",
    "cuda": "cuda",
    "cpu without cc3d": CpuBackend(use_cc3d=False),
    "cuda on numpy": library_on_cpu(),
}


def image(data, affine=AFFINES["anisotropic"], header=None):
    """Return a NIfTI-1 image, or a NIfTI-2 image for such a header, of any dtype."""
    in_nifti2 = isinstance(header, nib.Nifti2Header)
    image_class = nib.Nifti2Image if in_nifti2 else nib.Nifti1Image
    return image_class(data, affine, header, dtype=data.dtype)


@dataclass(frozen=True)
class Answer:
    """What a call came to: a value or an error, and the classes of its warnings."""

    value: Any
    error: type[Exception] | None
    warnings: list[type[Warning]]


@pytest.fixture(scope="session")
def sample_img():
    return nib.load(load_sample_motor_activation_image())


@pytest.fixture(params=AFFINES)
def affine(request):
    return AFFINES[request.param]


@pytest.fixture(params=BACKENDS)
def backend(request):
    chosen = BACKENDS[request.param]
    return require_backend(chosen) if isinstance(chosen, str) else chosen


@pytest.fixture(scope="session")
def blobs():
    """Return a function that makes smooth noise of both signs, standard deviation 3."""

    def make(shape=(9, 8, 7), seed=0, dtype=np.float32):
        noise = np.random.default_rng(seed).standard_normal(shape)
        smooth = ndimage.gaussian_filter(noise, (1.2,) * 3 + (0,) * (len(shape) - 3))
        dtype = np.dtype(dtype)
        smooth *= (3 if dtype.kind == "f" else 30) / smooth.std()
        return (np.abs(smooth) if dtype.kind == "u" else smooth).astype(dtype)

    return make


@pytest.fixture(scope="session")
def answer():
    """Return a function that calls another and returns its `Answer`."""

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Answer:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                value, error = function(*args, **kwargs), None
            except Exception as raised:
                value, error = None, type(raised)
        return Answer(value, error, [warning.category for warning in caught])

    return call


@pytest.fixture(scope="session")
def assert_same_image():
    """Return a function that compares voxels, dtype, shape, affine, header and class."""

    def compare(ours, theirs, on_disk=None):
        """`on_disk` is the dtype that our header has instead of theirs."""
        np.testing.assert_array_equal(
            np.asanyarray(ours.dataobj), np.asanyarray(theirs.dataobj), strict=True
        )
        np.testing.assert_array_equal(ours.affine, theirs.affine, strict=True)
        assert ours.header.get_zooms() == theirs.header.get_zooms()
        our_header, header = ours.header.copy(), theirs.header.copy()
        if on_disk is not None:
            header.set_data_dtype(on_disk)
        for field in ("cal_max", "cal_min"):  # nilearn's zeros may have a sign
            our_header[field] += 0.0
            header[field] += 0.0
        assert our_header == header
        assert isinstance(ours, type(theirs))

    return compare


@pytest.fixture
def cohort(tmp_path, blobs):
    """Return a folder with twelve maps below two folders."""
    from tests.cohort_files import save_maps

    names = [f"group-{i % 2}/sub-{i:02d}_tmap.nii.gz" for i in range(12)]
    save_maps(tmp_path / "maps", names, blobs)
    return tmp_path / "maps"
