"""The figures."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import (
    BoundaryNorm,
    Colormap,
    LinearSegmentedColormap,
    ListedColormap,
    Normalize,
)
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import ndimage

from gpuroi import io
from gpuroi.algorithms.threshold import between, cutoff_above, parse_threshold
from gpuroi.checks import at_least_zero, check_choice
from gpuroi.errors import DimensionError, warn
from gpuroi.niimg import load_images
from gpuroi.plotting._colors import ValueColors, region_color, region_colors
from gpuroi.plotting._display import Display
from gpuroi.plotting._planes import Plane, Volume
from gpuroi.plotting._scene import DisplayMode, Frame, background_of, finite, stage, volume_of
from gpuroi.result import Regions
from gpuroi.stack import RegionStack
from gpuroi.types import ImageLike

ViewType = Literal["auto", "contours", "filled_contours", "continuous"]


def plot_stat_map(
    stat_map_img: ImageLike,
    bg_img: ImageLike | Literal["auto"] | None = "auto",
    cut_coords: Any = None,
    output_file: str | Path | None = None,
    display_mode: DisplayMode = "ortho",
    colorbar: bool = True,
    cbar_tick_format: str = "%.2g",
    figure: Figure | int | None = None,
    axes: Axes | tuple[float, float, float, float] | None = None,
    title: str | None = None,
    threshold: float | str | None = 1e-6,
    annotate: bool = True,
    draw_cross: bool = True,
    black_bg: bool | Literal["auto"] = "auto",
    cmap: str | Colormap = "RdBu_r",
    symmetric_cbar: bool | Literal["auto"] = "auto",
    vmin: float | None = None,
    vmax: float | None = None,
    radiological: bool = False,
) -> Display | Any:
    """Plot cuts of a statistical map over an anatomical image.

    Parameters
    ----------
    stat_map_img : path or nibabel image (X, Y, Z)
    bg_img : path, image, "auto" or None
        What lies behind: ``"auto"`` is the MNI152 template where nilearn is installed, else the
        outline of the map; None is nothing.
    cut_coords : None, int, list or dict
        For ``"ortho"``: (x, y, z) in mm, by default the peak of the map. For one direction: mm, or
        a number of cuts, which are laid where the signal is. For ``"mosaic"``: a number, or one of
        these for each direction.
    output_file : path, optional
        Write the figure there and return None.
    display_mode : {"ortho", "x", "y", "z", "mosaic"}
    colorbar : bool
    cbar_tick_format : str
        In printf style.
    figure : matplotlib Figure or int, optional
    axes : matplotlib Axes or (left, bottom, width, height), optional
        Part of the figure to use; a tuple is in fractions of the figure.
    title : str, optional
    threshold : float, str or None
        What is drawn: magnitudes from a number in map units on, those above a percentile such as
        ``"97%"``, or ``"auto"``, from the 80th percentile on. 0 leaves out zeros, None nothing.
    annotate : bool
        Write the place of cuts in mm, and L and R.
    draw_cross : bool
        Draw where the cuts of ``"ortho"`` cross.
    black_bg : bool or "auto"
        Whether the figure is black; ``"auto"`` follows the border of `bg_img`.
    cmap : str or matplotlib Colormap
    symmetric_cbar : bool or "auto"
        Whether colours are symmetric around zero; ``"auto"`` if the map has both signs.
    vmin, vmax : float, optional
        Values of the first and last colour.
    radiological : bool
        Draw the right side on the left.

    Returns
    -------
    Display, or None if `output_file` was given

    Raises
    ------
    InvalidMapError
        If an image cannot be read, or has more than one volume.
    ValueError, TypeError
        If a parameter is none of the above.

    Examples
    --------
    >>> import nibabel as nib, numpy as np
    >>> from gpuroi import plotting
    >>> data = np.zeros((10, 10, 10), np.float32)
    >>> data[2:5, 2:5, 2:5] = 4.0
    >>> img = nib.Nifti1Image(data, np.diag([3.0, 3.0, 3.0, 1.0]))
    >>> with plotting.plot_stat_map(img, None, [9.0], display_mode="z") as display:
    ...     [str(cut) for cut in display.panels]
    ['z=9']
    """
    signal = volume_of(stat_map_img, "stat_map_img")
    frame = Frame(title, annotate, draw_cross, black_bg, radiological, figure, axes, output_file)
    values = signal.data
    level = 0.0
    if threshold is not None:
        magnitudes = _magnitudes(values)
        level = _level(threshold, magnitudes, values.size, auto=80)
        if level == 0 and isinstance(threshold, numbers.Real):  # 0 hides zeros, as in nilearn
            level = magnitudes.min(initial=np.inf) / 2
        _warn_of_emptiness(threshold, level, magnitudes.max(initial=0))
    colors = ValueColors.of(
        float(values.min(initial=0)),
        float(values.max(initial=0)),
        threshold=level,
        cmap=cmap,
        vmin=vmin,
        vmax=vmax,
        symmetric=symmetric_cbar,
    )
    drawn = colors.are_drawn(values)
    visible = Volume(np.where(drawn, values, 0), signal.affine) if drawn.any() else None
    background = background_of(bg_img, signal)
    labels = colors.labels(cbar_tick_format) if colorbar else []
    display = stage(
        signal, background, display_mode, cut_coords, frame, bar_labels=labels, visible=visible
    )
    for cut in display.panels:
        plane = signal.plane(cut.direction, cut.at_mm)
        display.draw_picture(cut, plane, colors.cmap, colors.norm, colors.are_drawn(plane.pixels))
    beyond = colors.beyond(values)
    display.color_bar(colors.with_gap(), colors.norm, colors.ticks(), labels, beyond)
    return frame.finish(display)


def plot_prob_atlas(
    maps_img: ImageLike,
    bg_img: ImageLike | Literal["auto"] | None = "auto",
    view_type: ViewType = "auto",
    threshold: float | str | Sequence[float | str] | None = "auto",
    linewidths: float = 2.0,
    cut_coords: Any = None,
    output_file: str | Path | None = None,
    display_mode: DisplayMode = "ortho",
    figure: Figure | int | None = None,
    axes: Axes | tuple[float, float, float, float] | None = None,
    title: str | None = None,
    annotate: bool = True,
    draw_cross: bool = True,
    black_bg: bool | Literal["auto"] = "auto",
    colorbar: bool = True,
    cmap: str | Colormap | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    alpha: float = 0.7,
    radiological: bool = False,
) -> Display | Any:
    """Plot the volumes of a 4-D image over an anatomical image, each in a colour of its own.

    Parameters
    ----------
    maps_img : path or nibabel image (X, Y, Z, n)
        Regions of `connected_regions`, or a probabilistic atlas.
    view_type : {"auto", "contours", "filled_contours", "continuous"}
        Lines, lines with their inside, or magnitudes from transparent to full colour. ``"auto"``:
        continuous up to 10 volumes, filled lines up to 20, lines beyond.
    threshold : float, str, list or None
        Level of the lines, in magnitude: a number, a percentile of each volume's magnitudes, one
        of these for each volume, or ``"auto"``: the percentile that leaves a fifth of the voxels to
        all volumes together. Where that is zero, the line runs halfway to the smallest value.
    linewidths : float
        In points.
    cmap : str or matplotlib Colormap, optional
        By default colours that are safe for colour-blind readers.
    vmin, vmax : float, optional
        Magnitudes of the first and last shade of ``"continuous"``.
    alpha : float
        Opacity of what is filled.
    bg_img, cut_coords, output_file, display_mode, figure, axes, title, annotate, draw_cross
        As in `plot_stat_map`; cuts are laid where the sum of the volumes is.
    black_bg, colorbar, radiological
        As in `plot_stat_map`; the colour bar numbers the volumes from 1.

    Returns
    -------
    Display, or None if `output_file` was given

    Raises
    ------
    InvalidMapError
        If an image cannot be read.
    ValueError, TypeError
        If a parameter is none of the above.

    Examples
    --------
    >>> import nibabel as nib, numpy as np
    >>> from gpuroi import plotting
    >>> data = np.zeros((10, 10, 10, 2), np.float32)
    >>> data[2:5, 2:5, 2:5, 0] = data[6:9, 6:9, 2:5, 1] = 4.0
    >>> img = nib.Nifti1Image(data, np.diag([3.0, 3.0, 3.0, 1.0]))
    >>> with plotting.plot_prob_atlas(img, bg_img=None, display_mode="z", cut_coords=1) as display:
    ...     [str(cut) for cut in display.panels]
    ['z=9']
    """
    at_least_zero("linewidths", linewidths, "points")
    check_choice("view_type", view_type, ("auto", "contours", "filled_contours", "continuous"))
    atlas = _Atlas.read(maps_img)
    n = len(atlas.volumes)
    if view_type == "auto":
        view_type = "continuous" if n <= 10 else "filled_contours" if n <= 20 else "contours"
    share = {"contours": 0.2, "filled_contours": 0.16, "continuous": 0.1}[view_type]
    levels = atlas.levels(threshold, share)
    frame = Frame(title, annotate, draw_cross, black_bg, radiological, figure, axes, output_file)
    background = background_of(bg_img, atlas.total)
    names = [str(number) for number in range(1, n + 1)] if colorbar else []
    display = stage(
        atlas.total, background, display_mode, cut_coords, frame, bar_labels=names, is_sparse=True
    )

    colors = region_colors(n, cmap)
    for cut in display.panels:
        for volume, magnitudes, level, color in zip(
            atlas.volumes, atlas.magnitudes, levels, colors, strict=True
        ):
            plane = volume.plane(cut.direction, cut.at_mm)
            magnitude = Plane(np.abs(plane.pixels), plane.extent)
            if view_type == "continuous":
                highest = max(vmax if vmax is not None else magnitudes.max(initial=0), level)
                lowest = level if level < highest else 0.0  # one magnitude has the full colour
                shades = LinearSegmentedColormap.from_list("shades", [(*color[:3], 0.15), color])
                norm = Normalize(vmin if vmin is not None else lowest, highest)
                display.draw_picture(cut, magnitude, shades, norm, magnitude.pixels >= level)
            else:
                filled = alpha if view_type == "filled_contours" else 0.0
                display.draw_contour(cut, magnitude, level, color, linewidths, filled)
    _number_bar(display, colors, names)
    return frame.finish(display)


def plot_regions(
    regions: "Regions | ImageLike",
    stat_map: ImageLike | None = None,
    bg_img: ImageLike | Literal["auto"] | None = "auto",
    cut_coords: Any = None,
    output_file: str | Path | None = None,
    display_mode: DisplayMode = "ortho",
    figure: Figure | int | None = None,
    axes: Axes | tuple[float, float, float, float] | None = None,
    title: str | None = None,
    annotate: bool = True,
    draw_cross: bool = True,
    black_bg: bool | Literal["auto"] = "auto",
    colorbar: bool = True,
    cmap: str | Colormap | None = None,
    linewidths: float = 1.5,
    alpha: float = 0.6,
    numbers: bool = True,
    radiological: bool = False,
) -> Display | Any:
    """Plot regions as labels: one colour and one line each, with the numbers of the table.

    Parameters
    ----------
    regions : Regions, or path or image of labels (X, Y, Z)
        Whole numbers; 0 is background.
    stat_map : path or image, optional
        Map to show inside the lines, instead of the colours of the regions.
    alpha : float
        Opacity of the colours inside the lines, where there is no `stat_map`.
    numbers : bool
        Write each label into its region.
    colorbar : bool
        Of the map where there is one, else of the labels.
    cut_coords : None, int, list or dict
        As in `plot_stat_map`; by default through the middle of the largest region, and of one
        direction where as many regions as possible are seen.
    bg_img, output_file, display_mode, figure, axes, title, annotate, draw_cross, black_bg
        As in `plot_stat_map`.
    cmap, linewidths, radiological
        As in `plot_prob_atlas`.

    Returns
    -------
    Display, or None if `output_file` was given

    Raises
    ------
    InvalidMapError
        If an image cannot be read.
    ValueError, TypeError
        If labels are not whole numbers from 0 on, or a parameter is none of the above.

    Examples
    --------
    >>> import gpuroi, nibabel as nib, numpy as np
    >>> from gpuroi import plotting
    >>> data = np.zeros((10, 10, 10), np.float32)
    >>> data[2:5, 2:5, 2:5] = 4.0
    >>> img = nib.Nifti1Image(data, np.diag([3.0, 3.0, 3.0, 1.0]))
    >>> found = gpuroi.extract_regions(img, 3.0)
    >>> with plotting.plot_regions(found, bg_img=None) as display:
    ...     [str(cut) for cut in display.panels]
    ['x=9', 'y=9', 'z=9']
    """
    at_least_zero("linewidths", linewidths, "points")
    labels = _Labels.read(regions)
    n = labels.numbers.size
    frame = Frame(title, annotate, draw_cross, black_bg, radiological, figure, axes, output_file)
    values = None if stat_map is None else volume_of(stat_map, "stat_map")
    background = background_of(bg_img, labels.places if values is None else values)
    if cut_coords is None and display_mode == "ortho" and n > 0:
        cut_coords = labels.middle_of_largest()
    shades = None if values is None else _shades(values)
    names = [str(number) for number in labels.numbers.tolist()]
    if shades is not None:
        names = shades.labels("%.2g")
    display = stage(
        labels.places,
        background,
        display_mode,
        cut_coords,
        frame,
        bar_labels=names if colorbar else [],
        is_sparse=True,
    )

    colors = region_colors(n, cmap)
    if cmap is None:  # the same in every figure
        colors = [region_color(number) for number in labels.numbers.tolist()]
    for cut in display.panels:
        plane = labels.places.plane(cut.direction, cut.at_mm)
        if values is not None and shades is not None:
            picture = values.plane(cut.direction, cut.at_mm)
            seen = shades.are_drawn(picture.pixels)
            display.draw_picture(cut, picture, shades.cmap, shades.norm, seen)
        regions_here = _regions_of(plane)
        for place, inside in regions_here:
            filled = alpha if values is None else 0.0
            display.draw_contour(cut, inside, 0.5, colors[place - 1], linewidths, filled)
        if numbers:
            for place, inside in regions_here:
                display.number(cut, *_deepest(inside), str(labels.numbers[place - 1]))
    if shades is not None:
        display.color_bar(shades.with_gap(), shades.norm, shades.ticks(), names)
    else:
        _number_bar(display, colors, names)
    return frame.finish(display)


def show() -> None:
    """Show all figures that are open; where there is no screen, do nothing.

    Examples
    --------
    >>> from gpuroi import plotting
    >>> plotting.show()
    """
    from matplotlib import pyplot

    if mpl.get_backend().lower() != "agg":
        pyplot.show()


def _level(threshold: float | str, magnitudes: NDArray[Any], n_voxels: int, auto: float) -> float:
    """Return the magnitude that `threshold` asks for.

    `magnitudes` are those above zero of `n_voxels`, of which a percentile ranks all; `auto` is the
    percentile that "auto" stands for, counted as nilearn does: down to a rank, ties included.
    """
    n_zeros = n_voxels - magnitudes.size
    if isinstance(threshold, str) and threshold == "auto":
        rank = int(auto / 100 * (n_voxels - 1)) - n_zeros
        return float(np.partition(magnitudes, rank)[rank]) if rank >= 0 else 0.0
    parsed = parse_threshold(threshold)
    if parsed.is_percentile:
        place = parsed.value / 100 * (n_voxels - 1)
        ranks = np.array([int(place), math.ceil(place)]) - n_zeros
        ranked = np.partition(magnitudes, ranks[ranks >= 0])
        lower, upper = (float(ranked[rank]) if rank >= 0 else 0.0 for rank in ranks)
        score = np.array([between(lower, upper, place)])
        return float(cutoff_above(score, magnitudes.dtype)[0])
    if parsed.value < 0:
        raise ValueError(f"threshold={threshold!r} is below zero; a threshold is a magnitude.")
    return parsed.value


def _warn_of_emptiness(threshold: Any, lowest: float, highest: float) -> None:
    """Warn if there is something, and no magnitude up to `highest` reaches the `lowest` level."""
    if 0 < highest < lowest:
        warn(
            f"threshold={threshold}: nothing is drawn, the largest magnitude is {highest:g}"
            f"{'' if '%' in str(threshold) else '; a percentile is text, such as 97%'}."
        )


def _magnitudes(values: NDArray[Any]) -> NDArray[Any]:
    """Return the magnitudes above zero."""
    above: NDArray[Any] = np.abs(values[values != 0])
    return above


@dataclass(frozen=True)
class _Atlas:
    """The volumes of a 4-D image, the sum of their magnitudes, and all magnitudes above zero."""

    volumes: list[Volume]
    total: Volume
    magnitudes: list[NDArray[Any]]

    @classmethod
    def read(cls, maps_img: ImageLike) -> "_Atlas":
        image = load_images(maps_img)
        if len(image.shape) == 4 and image.shape[3] == 0:
            raise DimensionError(f"maps_img has shape {image.shape}: there is no volume to draw.")
        if len(image.shape) == 4 and isinstance(image.dataobj, RegionStack):
            data = [image.dataobj[..., k] for k in range(image.shape[3])]  # one at a time
            total = np.zeros(image.shape[:3], np.float32)
            for volume in data:
                total += np.abs(volume)
            magnitudes = [_magnitudes(volume) for volume in data]
        else:
            series = finite(np.asanyarray(image.dataobj)).reshape((*image.shape[:3], -1))
            total = np.abs(series).sum(axis=3, dtype=np.float32)
            inside = series[total > 0]
            magnitudes = [_magnitudes(inside[:, k]) for k in range(series.shape[3])]
            data = list(np.moveaxis(series, 3, 0))
        volumes = [Volume(volume, image.affine) for volume in data]
        return cls(volumes, Volume(total, image.affine), magnitudes)

    def levels(self, threshold: Any, share: float) -> list[float]:
        """Return a level above zero for each volume; ``"auto"`` leaves `share` to all together."""
        n = len(self.volumes)
        auto = 100 * (1 - share / n)
        each = [threshold] * n
        if isinstance(threshold, Sequence | np.ndarray) and not isinstance(threshold, str):
            each = list(threshold)
            if len(each) != n:
                raise ValueError(f"threshold has {len(each)} entries, and maps_img {n} volumes.")
        levels = []
        for one, magnitudes in zip(each, self.magnitudes, strict=True):
            n_voxels = self.total.data.size
            level = 0.0 if one is None else _level(one, magnitudes, n_voxels, auto)
            smallest = float(magnitudes.min(initial=np.inf))
            if level < smallest:  # the line runs halfway to it
                level = smallest / 2 if magnitudes.size else 1.0
            levels.append(level)
        highest = max((one.max(initial=0) for one in self.magnitudes), default=0)
        _warn_of_emptiness(threshold, min(levels, default=0), highest)
        return levels


@dataclass(frozen=True)
class _Labels:
    """A label image whose labels are replaced by their places 1..n among the `numbers`."""

    places: Volume
    numbers: NDArray[np.int64]  # (n,) ascending

    @classmethod
    def read(cls, regions: "Regions | ImageLike") -> "_Labels":
        if isinstance(regions, Regions):
            data, affine = regions.labels, regions.affine
        else:
            image = load_images(regions)
            data, affine = finite(io.read_data(image, io.describe(image))), image.affine
        if data.ndim == 4 and data.shape[3] == 1:
            data = data[..., 0]
        if data.ndim != 3:
            raise DimensionError(
                f"labels have shape {data.shape}; pass one volume, or plot_prob_atlas for a stack."
            )
        labels = data.astype(np.int64)
        if labels.min(initial=0) < 0 or not np.array_equal(labels, data):
            raise ValueError(
                "labels are whole numbers from 0 on; for a statistical map use plot_stat_map."
            )
        # As few numbers as there are regions: labels of some atlases go to hundreds of millions.
        inside = labels > 0
        numbers, place = np.unique(labels[inside], return_inverse=True)
        places = np.zeros(labels.shape, np.int32)
        places[inside] = place + 1
        return cls(Volume(places, affine, is_labels=True), numbers)

    def middle_of_largest(self) -> tuple[float, float, float]:
        """Return the mm of the voxel of the largest region that is nearest to its centre."""
        sizes = np.bincount(self.places.data.ravel())
        sizes[0] = 0
        voxels = np.argwhere(self.places.data == int(sizes.argmax()))
        nearest = voxels[((voxels - voxels.mean(axis=0)) ** 2).sum(axis=1).argmin()]
        x, y, z = (self.places.affine @ [*nearest, 1.0])[:3].tolist()
        return x, y, z


def _regions_of(plane: Plane) -> list[tuple[int, Plane]]:
    """Return the regions of a plane of labels, the largest first, each in its box as 0 and 1."""
    regions = []
    for place, box in enumerate(ndimage.find_objects(plane.pixels.astype(np.int32)), start=1):
        if box is not None:
            cropped = plane.cropped(*box)
            regions.append((place, Plane((cropped.pixels == place) * 1.0, cropped.extent)))
    return sorted(regions, key=lambda region: -region[1].pixels.sum())


def _deepest(inside: Plane) -> tuple[tuple[float, float], float]:
    """Return the mm of the pixel that lies deepest inside a region, and how deep."""
    columns, rows = inside.centers()
    depth = ndimage.distance_transform_edt(np.pad(inside.pixels, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    side_mm = (inside.extent[1] - inside.extent[0]) / columns.size
    return (float(columns[column]), float(rows[row])), float(depth.max()) * side_mm


def _shades(values: Volume) -> ValueColors:
    """Return the colours of a whole map."""
    return ValueColors.of(
        float(values.data.min(initial=0)),
        float(values.data.max(initial=0)),
        threshold=1e-6,
        cmap="RdBu_r",
        vmin=None,
        vmax=None,
        symmetric="auto",
    )


def _number_bar(display: Display, colors: list[tuple[float, ...]], names: Sequence[str]) -> None:
    """Draw a colour bar with a colour and a name for each region."""
    n = len(colors)
    if n > 0:
        norm = BoundaryNorm(np.arange(-0.5, n), n)
        display.color_bar(ListedColormap(colors), norm, range(n), names)
