"""Where pictures of a map are drawn: what lies behind, how far it reaches, and how large."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from gpuroi.plotting._backgrounds import Background, head_outline, mni_template
from gpuroi.plotting._planes import Volume, hull_mm

# Pixels: three slices side by side fill a page of 1280, and are no taller than this.
_SLICES_WIDTH = 1100
_SLICES_HEIGHT = 420

_TEMPLATE_MM = 3.0
# A quarter of the levels halves the file, and nobody sees it.
_LEVEL_STEP = 4


@dataclass(frozen=True)
class Backdrop:
    """A volume in grey: levels from 1 to 255, and 0 where nothing is drawn."""

    grey: NDArray[np.uint8]  # (X, Y, Z)
    affine: NDArray[np.float64]


@dataclass(frozen=True)
class Scene:
    """What pictures of a map have in common; `is_shared` if other maps have the same backdrop."""

    bounds_mm: NDArray[np.float64]  # (3, 2)
    backdrop: Backdrop | None
    is_shared: bool

    @property
    def pixels_per_mm(self) -> float:
        """Scale of the page's slices."""
        x, y, z = np.diff(self.bounds_mm, axis=1).ravel()
        return round(float(min(_SLICES_WIDTH / (x + x + y), _SLICES_HEIGHT / max(y, z))), 4)

    @property
    def sides(self) -> list[int]:
        """Pixels along x, y and z of the page's slices."""
        lengths_mm: list[float] = np.diff(self.bounds_mm, axis=1).ravel().tolist()
        return [max(1, round(length * self.pixels_per_mm)) for length in lengths_mm]


def scene_of(signal: Volume, values: NDArray[Any] | None) -> Scene:
    """Return the scene of labels or counts: the MNI152 template, or without nilearn an outline.

    It is the outline of `values` ``(X, Y, Z)``, the map itself; with neither there is no backdrop.
    """
    shared = template()
    if shared is not None:
        brain = Volume(shared.grey, shared.affine).bounds_of_content_mm()
        return Scene(hull_mm([signal.bounds_of_content_mm(), brain]), shared, True)
    if values is None:
        return Scene(signal.bounds_mm, None, False)
    head = Volume(np.nan_to_num(values), signal.affine)
    return Scene(head.bounds_of_content_mm(), _levels(head_outline(head)), False)


@cache
def template() -> Backdrop | None:
    """Return the MNI152 template on a grid of 3 mm, or None where nilearn is not installed."""
    background = mni_template()
    if background is None:
        return None
    bounds = background.volume.bounds_of_content_mm()
    shape = np.ceil(np.diff(bounds, axis=1).ravel() / _TEMPLATE_MM).astype(int) + 1
    affine = np.diag([_TEMPLATE_MM, _TEMPLATE_MM, _TEMPLATE_MM, 1.0])
    affine[:3, 3] = bounds[:, 0]
    to_voxels = np.linalg.inv(background.volume.affine) @ affine
    data = background.volume.data
    inside, total = (
        ndimage.affine_transform(
            volume, to_voxels[:3, :3], to_voxels[:3, 3], tuple(shape), order=1, prefilter=False
        )
        for volume in ((data != 0).astype(np.float32), data)
    )
    # The mean of what is inside: with the zeros outside, the brain would have a dark rim.
    resampled = np.where(inside > 0.5, total / np.maximum(inside, 0.5), np.float32(0))
    volume = Volume(resampled, affine)
    return _levels(
        Background(volume, background.lowest, background.highest, hides_zeros=True, is_dark=False)
    )


def _levels(background: Background) -> Backdrop:
    """Return a background that hides zeros as grey levels."""
    data = background.volume.data
    share = (data - background.lowest) / (background.highest - background.lowest)
    steps = np.rint(share.clip(0, 1) * (255 // _LEVEL_STEP))
    grey = (steps * _LEVEL_STEP).clip(_LEVEL_STEP, 255).astype(np.uint8)
    grey[data == 0] = 0
    return Backdrop(grey, background.volume.affine)
