"""What the figures have in common: cuts, background, frame."""

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gpuroi import io
from gpuroi.checks import check_choice, shown
from gpuroi.errors import DimensionError
from gpuroi.niimg import load_images
from gpuroi.plotting._backgrounds import Background, anatomy, head_outline, mni_template
from gpuroi.plotting._cuts import cut_through_signal, cuts_along
from gpuroi.plotting._display import Cut, Display, arrange
from gpuroi.plotting._planes import DIRECTIONS, Direction, Volume, hull_mm
from gpuroi.types import ImageLike

DisplayMode = Literal["ortho", "x", "y", "z", "mosaic"]
DISPLAY_MODES: tuple[DisplayMode, ...] = ("ortho", "x", "y", "z", "mosaic")

_N_CUTS = 7
_MOST_IN_A_ROW = 8


@dataclass(frozen=True)
class Frame:
    """Where a figure is drawn, and what is written around it; see `plot_stat_map`."""

    title: str | None
    annotate: bool
    draw_cross: bool
    black_bg: bool | Literal["auto"]
    radiological: bool
    figure: Figure | int | None
    axes: Axes | tuple[float, float, float, float] | None
    output_file: str | Path | None

    def finish(self, display: Display) -> Display | None:
        """Return the display, or write it where a file was asked for."""
        if self.output_file is None:
            return display
        with display:
            display.savefig(self.output_file)
        return None


def volume_of(img: ImageLike, parameter: str) -> Volume:
    """Return a 3-D image (or a 4-D one of one volume) with what is not finite at zero."""
    image = load_images(img)
    data = io.read_data(image, io.describe(image))
    if data.ndim == 4 and data.shape[3] == 1:
        data = data[..., 0]
    if data.ndim != 3:
        raise DimensionError(
            f"{parameter} has shape {data.shape}; pass one volume, for example img.slicer[..., 0]."
        )
    return Volume(finite(data), image.affine)


def finite(data: NDArray[Any]) -> NDArray[Any]:
    """Return `data` in native bytes, signed integers as floats, what is not finite at zero."""
    if data.dtype.kind == "i":  # whose smallest value has no magnitude
        return data.astype(np.float32 if data.dtype.itemsize <= 2 else np.float64)
    native: NDArray[Any] = data.astype(data.dtype.newbyteorder("="), copy=False)
    if native.dtype.kind == "f" and not np.isfinite(native).all():
        return np.asarray(np.nan_to_num(native, posinf=0, neginf=0))
    return native


def background_of(
    bg_img: ImageLike | Literal["auto", False] | None, signal: Volume
) -> Background | None:
    """Return what to draw behind `signal`."""
    if bg_img is None or bg_img is False:  # nilearn's word for nothing, too
        return None
    if isinstance(bg_img, str) and bg_img == "auto":
        return mni_template() or head_outline(signal)
    volume = volume_of(bg_img, "bg_img")
    return anatomy(volume.data, volume.affine)


def rows_of_cuts(
    signal: Volume, display_mode: DisplayMode, cut_coords: Any
) -> tuple[list[list[Cut]], dict[Direction, float]]:
    """Return the cuts of a figure, row by row, and the places where they cross."""
    check_choice("display_mode", display_mode, DISPLAY_MODES)
    if display_mode == "ortho":
        places = _three_places(cut_coords, signal)
        return [[Cut(direction, places[direction]) for direction in DIRECTIONS]], places
    directions = DIRECTIONS if display_mode == "mosaic" else (display_mode,)
    if display_mode == "mosaic" and isinstance(cut_coords, dict):
        unknown = set(cut_coords) - set(DIRECTIONS)
        if unknown:
            raise ValueError(f"cut_coords has {shown(sorted(unknown, key=str))}; pass x, y and z.")
        each = [cut_coords.get(direction) for direction in directions]
    elif display_mode == "mosaic" and isinstance(cut_coords, Sequence | np.ndarray):
        each = list(cut_coords)
        if len(each) != 3:
            raise ValueError(
                f"cut_coords={shown(cut_coords)} has {len(each)} entries; for a mosaic pass a "
                "number, or one entry each for x, y and z."
            )
    else:
        each = [cut_coords] * len(directions)
    rows = []
    for direction, asked in zip(directions, each, strict=True):
        once = dict.fromkeys(_places_along(direction, asked, signal))
        rows += _wrapped([Cut(direction, at_mm) for at_mm in once])
    return rows, {}


def _wrapped(cuts: list[Cut]) -> list[list[Cut]]:
    """Return `cuts` in rows of equal lengths, short enough to be read."""
    n_rows = -(-len(cuts) // _MOST_IN_A_ROW)
    length = -(-len(cuts) // n_rows)
    return [cuts[i : i + length] for i in range(0, len(cuts), length)]


def _three_places(cut_coords: Any, signal: Volume) -> dict[Direction, float]:
    if cut_coords is None:
        return dict(zip(DIRECTIONS, cut_through_signal(signal), strict=True))
    places = _numbers(cut_coords)
    if places is None or len(places) != 3:
        raise ValueError(
            f"cut_coords={shown(cut_coords)} does not fit display_mode='ortho'; pass (x, y, z) in "
            "mm, or None to cut through the signal."
        )
    return dict(zip(DIRECTIONS, places, strict=True))


def _places_along(direction: Direction, asked: Any, signal: Volume) -> list[float]:
    if asked is None:
        asked = _N_CUTS
    is_count = isinstance(asked, numbers.Integral) and not isinstance(asked, bool)
    if is_count and int(asked) >= 1:
        return cuts_along(signal, direction, int(asked))
    places = _numbers(asked)
    if not places:
        raise ValueError(
            f"cut_coords={shown(asked)} along {direction} is neither a number of cuts from 1 on "
            "nor a list of mm."
        )
    return places


def _numbers(values: Any) -> list[float] | None:
    try:
        places = [float(value) for value in values]
    except (TypeError, ValueError):
        return None
    return places if np.isfinite(places).all() else None


def stage(
    signal: Volume,
    background: Background | None,
    display_mode: DisplayMode,
    cut_coords: Any,
    frame: Frame,
    *,
    bar_labels: Sequence[str],
    is_sparse: bool = False,
    visible: Volume | None = None,
) -> Display:
    """Return a display with the background drawn, ready for what is in front.

    There is room for a colour bar with `bar_labels`, if there are any. A signal that `is_sparse`
    shows no head: without anatomy it gets the whole field of view. Cuts are laid where the part
    that is `visible` is, by default all of it.
    """
    rows, crossing = rows_of_cuts(visible or signal, display_mode, cut_coords)
    bounds = [signal.bounds_mm if is_sparse else signal.bounds_of_content_mm()]
    if background is not None and background.is_anatomy:
        bounds = [signal.bounds_of_content_mm(), background.volume.bounds_of_content_mm()]
    fields = [signal.bounds_mm] + ([] if background is None else [background.volume.bounds_mm])
    for cut in (cut for row in rows for cut in row):
        low, high = hull_mm(fields)[DIRECTIONS.index(cut.direction)].tolist()
        if not low <= cut.at_mm <= high:
            raise ValueError(
                f"the cut at {cut.direction}={cut.at_mm:g} mm misses the image, which reaches from "
                f"{low:g} to {high:g} mm."
            )
    check_choice("black_bg", frame.black_bg, (True, False, "auto"))
    is_dark = background is not None and background.is_dark
    display = arrange(
        rows,
        hull_mm(bounds),
        figure=frame.figure,
        axes=frame.axes,
        title=frame.title,
        bar_letters=max(map(len, bar_labels), default=0),
        black=is_dark if frame.black_bg == "auto" else bool(frame.black_bg),
        radiological=frame.radiological,
    )
    if background is not None:
        grey = Normalize(background.lowest, background.highest)
        for cut in display.panels:
            plane = background.volume.plane(cut.direction, cut.at_mm)
            seen = (
                plane.pixels != 0 if background.hides_zeros else np.ones(plane.pixels.shape, bool)
            )
            display.draw_picture(cut, plane, mpl.colormaps["gray"], grey, seen)
    if frame.draw_cross:
        display.draw_cross(crossing)
    if frame.annotate:
        display.annotate()
    return display
