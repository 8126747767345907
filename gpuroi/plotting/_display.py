"""Panels of a figure, one a cut, all at the same scale."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import BoundaryNorm, Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.transforms import Affine2D, Bbox
from numpy.typing import NDArray

from gpuroi.plotting._colors import Ends
from gpuroi.plotting._planes import DIRECTIONS, Direction, Plane

# Inches.
_ROW_HEIGHT = 2.4
_MOST_WIDTH = 13.0
_TITLE_HEIGHT = 0.36
_BAR_WIDTH = 0.4  # without its labels
_MARGIN = 0.06

# Points.
_NUMBER_SIZE = 8
_TITLE_SIZE = 11.0
_SMALLEST_TITLE = 7.0

# Between panels, as a part of the tallest.
_GAP = 0.04


@dataclass(frozen=True)
class Cut:
    """A plane across a direction, at a place.

    Attributes
    ----------
    direction : {"x", "y", "z"}
    at_mm : float
    """

    direction: Direction
    at_mm: float

    def __str__(self) -> str:
        return f"{self.direction}={self.at_mm:.4g}".replace("-", "\N{MINUS SIGN}")


class Display:
    """A figure of cuts.

    Attributes
    ----------
    figure : matplotlib Figure
    panels : dict
        The matplotlib Axes of each `Cut`, in mm.

    Use it as a context manager, or call `close`, to free the figure.
    """

    def __init__(
        self, figure: Figure, panels: dict[Cut, Axes], bar: Axes | None, *, black: bool
    ) -> None:
        self.figure = figure
        self.panels = panels
        self._bar = bar
        self._foreground, self._background = _inks(black)
        self._written: dict[Cut, list[Bbox]] = {cut: [] for cut in panels}

    def savefig(self, path: str | Path, dpi: float | None = None) -> None:
        """Write the figure to a file.

        Parameters
        ----------
        path : path
            Its extension says in which format.
        dpi : float, optional
            Dots an inch, by default those of the figure.
        """
        self.figure.savefig(
            Path(path).expanduser(), dpi=dpi or "figure", facecolor=self.figure.get_facecolor()
        )

    def close(self) -> None:
        """Free the figure."""
        from matplotlib import pyplot

        pyplot.close(self.figure)

    def __enter__(self) -> "Display":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def draw_picture(
        self, cut: Cut, plane: Plane, cmap: Colormap, norm: Normalize, shown: NDArray[np.bool_]
    ) -> None:
        """Draw pixels of a plane.

        Parameters
        ----------
        cut : Cut
            One of `panels`.
        plane : Plane
        cmap : matplotlib Colormap
        norm : matplotlib Normalize
        shown : bool array of the shape of ``plane.pixels``
            The pixels to draw.
        """
        if shown.any():
            self.panels[cut].imshow(
                np.ma.array(plane.pixels, mask=~shown),
                cmap=cmap,
                norm=norm,
                origin="lower",
                extent=plane.extent,
                interpolation="nearest",
            )

    def draw_contour(
        self,
        cut: Cut,
        plane: Plane,
        level: float,
        color: tuple[float, ...],
        linewidth: float,
        fill_alpha: float = 0.0,
    ) -> None:
        """Draw the line at a level, closed at the border of the field of view, and its inside.

        Parameters
        ----------
        cut : Cut
            One of `panels`.
        plane : Plane
        level : float
            In units of the pixels; nothing is drawn of a plane that does not reach it.
        color : RGB or RGBA
        linewidth : float
            In points.
        fill_alpha : float
            Opacity of the inside.
        """
        highest = plane.pixels.max(initial=0)
        if highest < level:
            return
        columns, rows = (_padded(centers) for centers in plane.centers())
        pixels = np.pad(plane.pixels, 1)
        panel = self.panels[cut]
        if fill_alpha:
            above = np.nextafter(float(highest), np.inf)
            panel.contourf(columns, rows, pixels, [level, above], colors=[color], alpha=fill_alpha)
        panel.contour(columns, rows, pixels, [level], colors=[color], linewidths=linewidth)

    def draw_cross(self, places_mm: dict[Direction, float]) -> None:
        """Draw where the other cuts lie.

        Parameters
        ----------
        places_mm : dict
            By direction.
        """
        for cut, panel in self.panels.items():
            across, up = (axis for axis in DIRECTIONS if axis != cut.direction)
            halo = [patheffects.withStroke(linewidth=1, foreground=self._background, alpha=0.4)]
            style: dict[str, Any] = {
                "color": self._foreground,
                "linewidth": 0.5,
                "alpha": 0.6,
                "path_effects": halo,
            }
            if across in places_mm:
                panel.axvline(places_mm[across], **style)
            if up in places_mm:
                panel.axhline(places_mm[up], **style)

    def annotate(self) -> None:
        """Write the place of each cut, and which side is left."""
        points = Affine2D().scale(72 / self.figure.dpi)
        text: dict[str, Any] = {"fontsize": 9, "color": self._foreground}
        outline = [patheffects.withStroke(linewidth=2, foreground=self._background)]
        for cut, panel in self.panels.items():
            low, high = panel.get_xlim()
            panel.text(
                0.02,
                0.02,
                str(cut),
                transform=panel.transAxes,
                va="bottom",
                path_effects=outline,
                **text,
            )
            sides = "" if cut.direction == "x" else "LR" if low < high else "RL"
            for place, side in zip((0.02, 0.98), sides, strict=False):
                panel.text(
                    place,
                    0.98,
                    side,
                    transform=panel.transAxes,
                    ha="left" if place < 0.5 else "right",
                    va="top",
                    fontweight="bold",  # the foot of a thin L is easily lost
                    path_effects=outline,
                    **text,
                )

            for written in panel.texts:
                self._written[cut].append(written.get_window_extent().transformed(points))

    def number(self, cut: Cut, place_mm: tuple[float, float], room_mm: float, text: str) -> None:
        """Write a number at a place of a panel; beside it where there is no room around.

        Not where it would touch another number, or leave the panel: call it for what matters first.

        Parameters
        ----------
        cut : Cut
            One of `panels`.
        place_mm : (float, float)
            Across and up.
        room_mm : float
            How far it is from there to the border of what is numbered.
        text : str
        """
        panel = self.panels[cut]
        frame = panel.get_window_extent()
        points = 72 / self.figure.dpi
        room = room_mm * frame.width / abs(np.ptp(panel.get_xlim())) * points
        shift = 0 if room > _NUMBER_SIZE / 2 else _NUMBER_SIZE
        x, y = panel.transData.transform(place_mm) * points + (shift, shift / 2)
        half = (0.35 * _NUMBER_SIZE * len(text), 0.55 * _NUMBER_SIZE)
        box = Bbox([[x - half[0], y - half[1]], [x + half[0], y + half[1]]])
        inside = frame.transformed(Affine2D().scale(points))
        is_out = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0
        if is_out or box.y1 > inside.y1 or box.count_overlaps(self._written[cut]):
            return
        self._written[cut].append(box)
        panel.annotate(
            text,
            place_mm,
            xytext=(shift, shift / 2),
            textcoords="offset points",
            fontsize=_NUMBER_SIZE,
            fontweight="bold",
            color="black",
            ha="center",
            va="center",
            path_effects=[patheffects.withStroke(linewidth=2, foreground="white")],
        )

    def color_bar(
        self,
        cmap: Colormap,
        norm: Normalize,
        ticks: Sequence[float],
        labels: Sequence[str],
        beyond: Ends = "neither",
    ) -> None:
        """Draw what the colours stand for, if there is room set aside for it.

        Parameters
        ----------
        cmap : matplotlib Colormap
        norm : matplotlib Normalize
        ticks : sequence of float
            In the order of their importance: of those whose labels would touch, the earlier are
            drawn.
        labels : sequence of str
        beyond : {"neither", "min", "max", "both"}
            Ends that get an arrow, as there are values beyond them.
        """
        if self._bar is None:
            return
        kept = self._apart(ticks, norm)
        shown = [ticks[place] for place in kept]
        mappable = mpl.cm.ScalarMappable(norm, cmap)
        bar = Colorbar(self._bar, mappable, ticks=shown, extend=beyond)
        bar.outline.set_edgecolor(self._foreground)
        bar.ax.tick_params(colors=self._foreground, labelsize=8, length=2)
        bar.set_ticklabels([labels[place] for place in kept])
        bar.ax.minorticks_off()

    def _apart(self, ticks: Sequence[float], norm: Normalize) -> list[int]:
        """Return which of `ticks` have room for their labels; the earlier ones come first."""
        assert self._bar is not None
        height = self._bar.get_position().height * self.figure.get_size_inches()[1] * 72
        places = [float(norm(tick)) * height for tick in ticks]
        if isinstance(norm, BoundaryNorm):
            places = [float(tick) * height / norm.Ncmap for tick in ticks]
        kept: list[int] = []
        for place, at in enumerate(places):
            if all(abs(at - places[other]) >= 1.3 * _NUMBER_SIZE for other in kept):
                kept.append(place)
        return sorted(kept, key=lambda place: places[place])


def _inks(black: bool) -> tuple[str, str]:
    """Return the colours of what is written and of what it is written on."""
    return ("white", "black") if black else ("black", "white")


def arrange(
    rows: Sequence[Sequence[Cut]],
    bounds_mm: NDArray[np.float64],
    *,
    figure: Figure | int | None,
    axes: Axes | tuple[float, float, float, float] | None,
    title: str | None,
    bar_letters: int,
    black: bool,
    radiological: bool,
) -> Display:
    """Return a display with an empty panel for each cut of `rows`, from top to bottom.

    There is room for a colour bar whose labels have up to `bar_letters`; for none if that is 0.
    """
    sizes = [[_size_mm(cut.direction, bounds_mm) for cut in row] for row in rows]
    row_heights = [max(height for _, height in row) for row in sizes]
    gap = _GAP * max(row_heights)
    row_widths = [sum(width for width, _ in row) + gap * (len(row) - 1) for row in sizes]
    total_height = sum(row_heights) + gap * (len(rows) - 1)
    bar_width = _BAR_WIDTH + 0.7 * _NUMBER_SIZE / 72 * bar_letters if bar_letters else 0.0
    title_height = _TITLE_HEIGHT if title else 0.0
    foreground, background = _inks(black)

    is_ours = axes is None and not isinstance(figure, Figure)
    figure, area = _figure_and_area(
        figure,
        axes,
        (max(row_widths), total_height, len(rows)),
        (bar_width, title_height),
        background,
    )
    left, bottom, width, height = area  # inches
    room = (width - bar_width - 2 * _MARGIN, height - title_height - 2 * _MARGIN)
    scale = max(min(room[0] / max(row_widths), room[1] / total_height), 1e-6)  # inches a mm
    used_width, used_height = scale * max(row_widths), scale * total_height
    x_start = left + _MARGIN + (room[0] - used_width) / 2
    y_start = bottom + _MARGIN + (room[1] - used_height) / 2

    def panel_at(x: float, y: float, w: float, h: float) -> Axes:
        full_width, full_height = figure.get_size_inches()
        place = (x / full_width, y / full_height, w / full_width, h / full_height)
        return figure.add_axes(place, label=f"gpuroi-{len(figure.axes)}")

    if not is_ours:  # whose colour is somebody else's
        ground = panel_at(left, bottom, width, height)
        ground.set_facecolor(background)
        ground.set(xticks=[], yticks=[], zorder=-1)
        ground.spines[:].set_visible(False)
    panels: dict[Cut, Axes] = {}
    top = y_start + used_height
    for row, row_sizes, row_width, row_height in zip(
        rows, sizes, row_widths, row_heights, strict=True
    ):
        x = x_start + (used_width - scale * row_width) / 2
        for cut, (panel_width, panel_height) in zip(row, row_sizes, strict=True):
            y = top - scale * row_height + scale * (row_height - panel_height) / 2
            panel = panel_at(x, y, scale * panel_width, scale * panel_height)
            panel.set_axis_off()
            across, up = _span_mm(cut.direction, bounds_mm)
            flipped = radiological and cut.direction != "x"
            panel.set_xlim(*(across[::-1] if flipped else across))
            panel.set_ylim(*up)
            panel.set_autoscale_on(False)
            panels[cut] = panel
            x += scale * (panel_width + gap)
        top -= scale * (row_height + gap)
    bar = None
    if bar_letters:
        bar = panel_at(
            x_start + used_width + 0.12, y_start + 0.1 * used_height, 0.13, 0.8 * used_height
        )
        bar.set_facecolor(background)
    if title:
        full_width, full_height = figure.get_size_inches()
        text, size = _fitted(title, width - 2 * _MARGIN)
        figure.text(
            (left + _MARGIN) / full_width,
            (bottom + height - _MARGIN) / full_height,
            text,
            fontsize=size,
            color=foreground,
            va="top",
        )
    return Display(figure, panels, bar, black=black)


def _fitted(title: str, width: float) -> tuple[str, float]:
    """Return `title` and its size in points, smaller and in two lines if `width` inches are few."""
    a_letter = 0.6 / 72  # inches, of a letter of one point
    size = min(_TITLE_SIZE, width / (a_letter * max(1, len(title))))
    if size >= _SMALLEST_TITLE:
        return title, size
    letters = max(8, int(width / (a_letter * _SMALLEST_TITLE)))
    return textwrap.fill(title, letters, max_lines=2, placeholder=" \N{HORIZONTAL ELLIPSIS}"), (
        _SMALLEST_TITLE
    )


def _figure_and_area(
    figure: Figure | int | None,
    axes: Axes | tuple[float, float, float, float] | None,
    content_mm: tuple[float, float, int],
    extra_inches: tuple[float, float],
    background: str,
) -> tuple[Figure, tuple[float, float, float, float]]:
    """Return the figure to draw in and, in inches, the part of it to use."""
    from matplotlib import pyplot

    if isinstance(axes, Axes):
        axes.set_axis_off()
        axes.set_facecolor(background)
        figure = axes.get_figure(root=True)
        fraction = axes.get_position().bounds
    else:
        fraction = (0.0, 0.0, 1.0, 1.0) if axes is None else axes
        if figure is None or isinstance(figure, int):
            width_mm, height_mm, n_rows = content_mm
            scale = min(n_rows * _ROW_HEIGHT / height_mm, _MOST_WIDTH / width_mm)
            size = (
                scale * width_mm + extra_inches[0] + 2 * _MARGIN,
                scale * height_mm + extra_inches[1] + 2 * _MARGIN,
            )
            figure = pyplot.figure(figure, figsize=size, facecolor=background)
    if not isinstance(figure, Figure):
        raise TypeError(f"figure={figure!r} is no matplotlib Figure, and no number of one.")
    width, height = figure.get_size_inches()
    x, y, w, h = fraction
    return figure, (x * width, y * height, w * width, h * height)


def _span_mm(
    direction: Direction, bounds_mm: NDArray[np.float64]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the mm across and up of a panel."""
    across, up = (axis for axis in range(3) if DIRECTIONS[axis] != direction)
    spans: Any = bounds_mm.tolist()
    return tuple(spans[across]), tuple(spans[up])


def _size_mm(direction: Direction, bounds_mm: NDArray[np.float64]) -> tuple[float, float]:
    (left, right), (low, high) = _span_mm(direction, bounds_mm)
    return right - left, high - low


def _padded(centers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `centers` with one more at each end."""
    step = centers[1] - centers[0] if centers.size > 1 else 1.0
    return np.concatenate([[centers[0] - step], centers, [centers[-1] + step]])
