"""Pictures of slices, drawn in NumPy: a tenth of the time of a figure, however many regions.

They are transparent where there is nothing, and legible on light and dark pages.
"""

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from gpuroi.plotting._colors import region_colors
from gpuroi.plotting._cuts import cuts_along
from gpuroi.plotting._planes import Volume
from gpuroi.report._scene import Scene

N_CUTS = 7

# Pixels.
_WIDTH = 1200
_MOST_HEIGHT = 260
_GAP = 24  # with the insets wide enough that R and L of two cuts are no pair
_INSET = 8  # of the letters
_FOOT = 16
_TEXT = 12

_OPACITY = 0.65  # of regions; their edges are opaque
_INK = (128, 128, 128, 255)  # as far from white as from black
_COLORS_IN_FILE = 96

_MOST_NUMBERS = 12  # in one cut
_SMALLEST_NUMBERED = 40  # pixels


def region_palette(n: int) -> NDArray[np.uint8]:
    """Return the colours ``(n, 3)`` of regions, those of `gpuroi.plotting`."""
    return _bytes(np.array(region_colors(n)))


def count_palette(n: int) -> NDArray[np.uint8]:
    """Return colours ``(n, 3)`` for counts from 1 to n."""
    return _bytes(mpl.colormaps["plasma"](np.linspace(0.2, 0.95, n)))


def value_palette() -> NDArray[np.uint8]:
    """Return the diverging colours ``(256, 3)``; 128 is zero."""
    return _bytes(mpl.colormaps["RdBu_r"]((np.arange(256) - 1) / 254))


def _bytes(colors: Any) -> NDArray[np.uint8]:
    rgb: NDArray[np.uint8] = np.rint(255 * np.asarray(colors)[:, :3]).astype(np.uint8)
    return rgb


def hex_color(color: Sequence[int] | NDArray[np.uint8]) -> str:
    """Return ``#rrggbb``."""
    return "#" + "".join(f"{int(part):02x}" for part in color)


def draw_cuts(
    volume: NDArray[np.integer[Any]],
    affine: NDArray[np.float64],
    scene: Scene,
    palette: NDArray[np.uint8],
    *,
    numbered: bool,
) -> tuple[bytes, set[int]]:
    """Return a PNG of up to seven cuts along z, and which labels are numbered in it.

    Parameters
    ----------
    volume : array of whole numbers (X, Y, Z)
        Labels or counts; k has colour k - 1 of `palette`.
    numbered : bool
        Whether they are labels: regions are outlined and have their numbers, and the cuts lie where
        as many as possible are seen.
    """
    cuts = cuts_along(Volume(volume, affine, is_labels=numbered), "z", N_CUTS)
    width_mm, height_mm, _ = np.diff(scene.bounds_mm, axis=1).ravel()
    panel = (_WIDTH - (N_CUTS - 1) * _GAP) // N_CUTS
    scale = min(panel / width_mm, _MOST_HEIGHT / height_mm)
    width, height = max(1, round(width_mm * scale)), max(1, round(height_mm * scale))
    inset = min(_INSET, width // 8)
    picture = Image.new(
        "RGBA", (len(cuts) * (width + _GAP) - _GAP, height + _FOOT), (128, 128, 128, 0)
    )
    draw = ImageDraw.Draw(picture)
    written: set[int] = set()
    for place, at_mm in enumerate(cuts):
        left = place * (width + _GAP)
        mm = _places_mm(scene.bounds_mm, at_mm, width, height)
        front = _nearest(volume, affine, mm)
        pixels = _paint(front, _backdrop(scene, mm), palette, outlined=numbered)
        picture.paste(Image.fromarray(pixels), (left, 0))
        for x, text, anchor in ((inset, "L", "la"), (width - inset, "R", "ra")):
            draw.text((left + x, 0), text, _INK, _font(), anchor=anchor)
        text = f"z = {at_mm:.4g}".replace("-", "\N{MINUS SIGN}")
        draw.text((left, height + 1), text, _INK, _font())
        if numbered:
            places = _places_of_numbers(front)
            written |= set(places)
            for label, (row, column, radius) in places.items():
                row, column = _free_place(front, row, column, radius)
                draw.text(
                    (left + column, row),
                    str(label),
                    "white",
                    _font(),
                    anchor="mm",
                    stroke_width=2,
                    stroke_fill="black",
                )
    stream = io.BytesIO()
    few = picture.quantize(_COLORS_IN_FILE, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(stream, "png", compress_level=6)  # 9 is a tenth smaller, and takes ten times as long
    return stream.getvalue(), written


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(
        str(Path(mpl.get_data_path()) / "fonts/ttf/DejaVuSans-Bold.ttf"), _TEXT
    )


def _places_mm(
    bounds_mm: NDArray[np.float64], at_mm: float, width: int, height: int
) -> NDArray[np.float64]:
    """Return the mm ``(3, height, width)`` of pixels: x to the right, y upwards."""
    (left, right), (bottom, top), _ = bounds_mm
    places = np.empty((3, height, width))
    places[0] = left + (np.arange(width) + 0.5) * (right - left) / width
    places[1] = (top - (np.arange(height) + 0.5) * (top - bottom) / height)[:, np.newaxis]
    places[2] = at_mm
    return places


def _voxels(affine: NDArray[np.float64], mm: NDArray[np.float64]) -> NDArray[np.float64]:
    inverse = np.linalg.inv(affine)
    places: NDArray[np.float64] = np.tensordot(inverse[:3, :3], mm, axes=1)
    return places + inverse[:3, 3].reshape(3, 1, 1)


def _nearest(
    volume: NDArray[Any], affine: NDArray[np.float64], mm: NDArray[np.float64]
) -> NDArray[Any]:
    """Return the values of the voxels that `mm` lies in; zero outside."""
    index = np.floor(_voxels(affine, mm) + 0.5).astype(np.int64)
    shape = np.array(volume.shape).reshape(3, 1, 1)
    inside = ((index >= 0) & (index < shape)).all(axis=0)
    x, y, z = np.where(inside, index, 0)
    return np.where(inside, volume[x, y, z], 0)


def _backdrop(scene: Scene, mm: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return grey levels between voxels, without what is not drawn darkening the edge."""
    if scene.backdrop is None:
        return np.zeros(mm.shape[1:], np.uint8)
    places = _voxels(scene.backdrop.affine, mm)
    grey = scene.backdrop.grey.astype(np.float32)
    drawn, total = (
        ndimage.map_coordinates(data, places, order=1, prefilter=False)
        for data in ((grey > 0).astype(np.float32), grey)
    )
    seen = drawn > 0.5
    return np.where(seen, total / np.where(seen, drawn, 1), 0).astype(np.uint8)


def _paint(
    front: NDArray[Any], grey: NDArray[np.uint8], palette: NDArray[np.uint8], *, outlined: bool
) -> NDArray[np.uint8]:
    """Return pixels ``(height, width, 4)`` of regions or counts over grey."""
    shown, is_region = grey > 0, front > 0
    opacity = np.where(_edges(front), 1.0, _OPACITY) if outlined else np.ones(front.shape)
    opacity = np.where(is_region, opacity, 0.0)[..., np.newaxis]
    color = palette[np.where(is_region, front - 1, 0)] if len(palette) else 0
    behind = np.where(shown, grey, 255)[..., np.newaxis]
    pixels = np.empty((*front.shape, 4), np.uint8)
    pixels[..., :3] = np.rint(opacity * color + (1 - opacity) * behind)
    pixels[..., 3] = 255 * (shown | is_region)
    return pixels


def _edges(front: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where a neighbouring pixel has another number."""
    padded = np.pad(front, 1)
    return np.asarray(
        (padded[:-2, 1:-1] != front)
        | (padded[2:, 1:-1] != front)
        | (padded[1:-1, :-2] != front)
        | (padded[1:-1, 2:] != front)
    )


def _free_place(front: NDArray[Any], row: int, column: int, radius: int) -> tuple[int, int]:
    """Return where a number covers no other region: on its own if that is large, else beside it."""
    if radius > _TEXT:
        return row, column
    aside, half = radius + _TEXT // 2, _TEXT // 2
    height, width = front.shape
    for down, right in ((0, aside), (0, -aside), (-aside, 0), (aside, 0)):
        y, x = row + down, column + right
        if half <= y < height - half and half <= x < width - half:
            covered = front[y - half : y + half, x - half : x + half]
            if not (covered * (covered != front[row, column])).any():
                return y, x
    return row, column


def _places_of_numbers(front: NDArray[Any]) -> dict[int, tuple[int, int, int]]:
    """Return for the largest labels of a cut the pixel nearest to their centre, and a radius."""
    labels, sizes = np.unique(front[front > 0], return_counts=True)
    order = np.argsort(-sizes, kind="stable")[:_MOST_NUMBERS]
    places = {}
    for label in labels[order[sizes[order] >= _SMALLEST_NUMBERED]].tolist():
        pixels = np.argwhere(front == label)
        nearest = ((pixels - pixels.mean(axis=0)) ** 2).sum(axis=1).argmin()
        row, column = pixels[nearest].tolist()
        places[label] = (row, column, round(float(np.sqrt(len(pixels) / np.pi))))
    return places
