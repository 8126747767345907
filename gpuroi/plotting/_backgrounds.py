"""What lies behind the map: anatomy, or an outline of the head."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from gpuroi.plotting._planes import Volume

# How far below zero a map of both signs reaches, as a part of how far above.
_SIGNED = 0.1


@dataclass(frozen=True)
class Background:
    """A volume in grey; zeros of one that `hides_zeros` are not drawn."""

    volume: Volume
    lowest: float
    highest: float
    hides_zeros: bool
    is_dark: bool  # at its border
    is_anatomy: bool = True


def anatomy(data: NDArray[Any], affine: NDArray[np.float64]) -> Background:
    """Return the background of an anatomical image that the user passed."""
    finite = np.nan_to_num(np.asarray(data, np.float32), posinf=0, neginf=0)
    sample = finite[::2, ::2, ::2]
    inside = sample[sample != 0]
    lowest, highest = np.percentile(inside, [1, 99.5]) if inside.size else (0.0, 1.0)
    if lowest < -_SIGNED * highest:
        # A map of both signs: zero in the middle of grey, so that what is low is told from nothing.
        reach = float(max(-lowest, highest))
        return Background(Volume(finite, affine), -reach, reach, hides_zeros=False, is_dark=False)
    faces = [finite.take(place, axis) for axis in range(3) for place in (0, -1)]
    border = float(np.median(np.concatenate([face.ravel() for face in faces])))
    is_dark = border <= max((lowest + highest) / 2, 0.0)
    return Background(
        Volume(finite, affine),
        float(min(lowest, border)),
        float(highest),
        hides_zeros=border == 0,
        is_dark=bool(is_dark),
    )


@cache
def mni_template() -> Background | None:
    """Return the MNI152 template that nilearn brings, or None where nilearn is not installed."""
    try:
        from nilearn.datasets import load_mni152_template
    except ImportError:
        return None
    image = load_mni152_template(resolution=2)
    data = np.asarray(image.dataobj, np.float32)
    highest = float(data.max())
    # Resampling leaves ripples around the brain. In the light half of grey, so that what is drawn
    # over it stands out.
    data = np.where(data > 0.02 * highest, data, np.float32(0))
    return Background(Volume(data, image.affine), -0.7 * highest, 1.1 * highest, True, False)


def head_outline(signal: Volume) -> Background:
    """Return where the map has values, in light grey: without a template, the shape of the head."""
    inside = np.asarray(signal.data != 0)
    for axis in range(3):  # holes of slices, too: few cavities are closed on all sides
        in_slices = np.moveaxis(ndimage.generate_binary_structure(2, 1)[np.newaxis], 0, axis)
        inside = ndimage.binary_fill_holes(inside, in_slices)
    grey = np.where(inside, np.float32(0.85), np.float32(0))
    volume = Volume(grey, signal.affine, is_labels=True)
    return Background(volume, 0.0, 1.0, hides_zeros=True, is_dark=False, is_anatomy=False)
