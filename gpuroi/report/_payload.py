"""What the page's JavaScript is told of a map: small volumes, compressed, in text."""

import base64
import gzip
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuroi.algorithms.measure import RegionVoxels, measure
from gpuroi.report._scene import Backdrop, Scene
from gpuroi.result import Regions

# Codes of values: 128 is zero, 1 and 255 are the largest magnitude of either sign.
_ZERO, _STEPS = 128, 127


def map_payload(regions: Regions, labels: NDArray[np.int32], scene: Scene) -> dict[str, Any]:
    """Return labels, values and places of a map with regions; JSON-serialisable.

    ``values`` has a byte for each voxel of a region, region by region and in C order within one,
    as `RegionVoxels` has them: the labels say where they belong.
    """
    voxels = regions.voxels
    reach = float(np.abs(voxels.values.astype(np.float64)).max(initial=0))
    peaks = measure(voxels).peak @ regions.affine[:3, :3].T + regions.affine[:3, 3]
    return {
        "shape": list(voxels.shape),
        "inverse": _inverse(regions.affine),
        "bits": 8 * _label_dtype(len(regions)).itemsize,
        "labels": pack(labels.astype(_label_dtype(len(regions)))),
        "values": pack(_codes(voxels, reach)),
        "reach": reach,
        "peaks": np.round(peaks, 3).tolist(),
        "step": float(np.sqrt((regions.affine[:3, :3] ** 2).sum(axis=0)).min()),
        "bounds": np.round(scene.bounds_mm, 3).tolist(),
        "scale": scene.pixels_per_mm,
        "backdrop": None if scene.is_shared else backdrop_payload(scene.backdrop),
    }


def backdrop_payload(backdrop: Backdrop | None) -> dict[str, Any] | None:
    """Return grey levels as `map_payload` does labels."""
    if backdrop is None:
        return None
    return {
        "shape": list(backdrop.grey.shape),
        "inverse": _inverse(backdrop.affine),
        "grey": pack(backdrop.grey),
    }


def pack(volume: NDArray[Any]) -> str:
    """Return the bytes of `volume` in C order, gzip'ed, as base64; the same text every time."""
    return base64.b64encode(gzip.compress(volume.tobytes(), 6, mtime=0)).decode()


def _label_dtype(n_labels: int) -> np.dtype[np.unsignedinteger]:
    """Return the smallest type of JavaScript's arrays that holds labels up to `n_labels`."""
    return np.dtype("<u1" if n_labels < 1 << 8 else "<u2" if n_labels < 1 << 16 else "<u4")


def _codes(voxels: RegionVoxels, reach: float) -> NDArray[np.uint8]:
    scaled = voxels.values.astype(np.float64) * (_STEPS / reach if reach else 0.0)
    return (np.rint(scaled) + _ZERO).astype(np.uint8)


def _inverse(affine: NDArray[np.float64]) -> list[list[float]]:
    """Return mm to voxels, without the last row."""
    inverse: list[list[float]] = np.linalg.inv(affine)[:3].tolist()
    return inverse
