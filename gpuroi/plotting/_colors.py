"""Colours: for values, and for regions that lie side by side."""

import contextlib
import importlib
import numbers
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.colors import Colormap, ListedColormap, Normalize
from numpy.typing import NDArray

from gpuroi.checks import check_choice, shown

# The palette of Okabe and Ito, "Color Universal Design" (2008), without black: told apart with any
# colour vision. In an order in which neighbours differ most.
_SAFE = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#0072b2", "#f0e442")

# From the eighth region on they return, in turn mixed with black and with white, so that neighbours
# differ in lightness, too: these shares of it, each for two rounds of the palette.
_SHARES = (0.5, 0.2, 0.35)

#: Colours of regions before they repeat.
N_COLORS = len(_SAFE) * (1 + 2 * len(_SHARES))

# Relative luminance, of which white has 1: brighter lines, such as yellow ones, are lost on white.
# At this one the contrast with white (WCAG 2.2) is 1.67; that of the darkest with black is 1.73.
_BRIGHTEST = 0.58
_LUMINANCE = (0.2126, 0.7152, 0.0722)
_GAMMA = 2.2  # of sRGB, nearly

#: Ends of a colour bar, in matplotlib's words.
Ends = Literal["neither", "both", "min", "max"]

# A threshold's part of a colour bar.
_LEAST_READABLE = 0.01


def region_colors(n: int, cmap: str | Colormap | None = None) -> list[tuple[float, ...]]:
    """Return `n` colours (RGBA): those of `cmap` at equal distances, by default safe ones."""
    if cmap is not None:
        return [tuple(color) for color in color_map(cmap)(np.linspace(0, 1, n)).tolist()]
    return [region_color(k) for k in range(1, n + 1)]


def region_color(number: int) -> tuple[float, ...]:
    """Return the safe colour of region `number`, from 1 on: one seen on white and on black."""
    index = (number - 1) % N_COLORS
    round_, place = divmod(index, len(_SAFE))
    towards = index % 2  # black or white
    share = _SHARES[(round_ - 1) // 2] if round_ else 0.0
    color = np.array(mpl.colors.to_rgb(_SAFE[place]))
    color += (towards - color) * share
    luminance = float(color**_GAMMA @ _LUMINANCE)
    color *= min(1.0, _BRIGHTEST / luminance) ** (1 / _GAMMA)
    red, green, blue = color.tolist()
    return red, green, blue, 1.0


def color_map(cmap: str | Colormap) -> Colormap:
    """Return a colour map by its name, nilearn's included where nilearn is installed."""
    if isinstance(cmap, Colormap):
        return cmap
    if cmap not in mpl.colormaps:
        with contextlib.suppress(ImportError):
            importlib.import_module("nilearn.plotting.cm")  # which registers its maps
    if cmap not in mpl.colormaps:
        raise ValueError(
            f"cmap={cmap!r} is no colour map; pass a name of matplotlib.colormaps, such as "
            "'RdBu_r' or 'viridis', or a Colormap."
        )
    return mpl.colormaps[cmap]


@dataclass(frozen=True)
class ValueColors:
    """How values become colours; those below the threshold are not drawn."""

    cmap: Colormap
    norm: Normalize
    threshold: float

    @classmethod
    def of(
        cls,
        lowest: float,
        highest: float,
        *,
        threshold: float,
        cmap: str | Colormap,
        vmin: float | None,
        vmax: float | None,
        symmetric: bool | str,
    ) -> "ValueColors":
        """Return colours for values from `lowest` to `highest`.

        ``symmetric="auto"``: around zero if the map has both signs, from or to zero if not.
        """
        check_choice("symmetric_cbar", symmetric, (True, False, "auto"))
        for name, value in (("vmin", vmin), ("vmax", vmax)):
            if value is not None and not (isinstance(value, numbers.Real) and np.isfinite(value)):
                raise ValueError(f"{name}={shown(value)} is no finite number.")
        if symmetric == "auto":
            is_one_end = vmin is None or (vmin < 0 and vmax is None)
            symmetric = lowest < 0 < highest and is_one_end and (vmax is None or vmax > 0)
        if symmetric:
            given = [abs(value) for value in (vmin, vmax) if value is not None]
            reach = max(given) if given else max(-lowest, highest)
            low, high = -reach, reach
        else:
            low = vmin if vmin is not None else min(0.0, lowest)
            high = vmax if vmax is not None else max(0.0, highest)
        if low > high:
            raise ValueError(f"vmin={low:g} is above vmax={high:g}; pass the smaller one first.")
        if low == high:
            low, high = low - 1.0, high + 1.0
        base = color_map(cmap)
        if not symmetric and not (low < 0 < high) and _is_diverging(base):
            # One sign alone takes its half of a diverging map: red is positive, whatever else.
            half = np.linspace(0.5, 1.0, 256) if high > 0 else np.linspace(0.0, 0.5, 256)
            base = ListedColormap(base(half))
        return cls(base, Normalize(low, high), threshold)

    def are_drawn(self, values: NDArray[Any]) -> NDArray[np.bool_]:
        """Return where `values` reach the threshold, and have a sign that the colours have."""
        drawn: NDArray[np.bool_] = np.abs(values) >= self.threshold
        if (self.norm.vmin or 0) >= 0:
            drawn &= values >= 0
        elif (self.norm.vmax or 0) <= 0:
            drawn &= values <= 0
        return drawn

    def ticks(self) -> list[float]:
        """Return what a reader looks for: the ends, the threshold, zero; in that order.

        A threshold that only tells something from nothing is none to read.
        """
        low, high = float(self.norm.vmin or 0), float(self.norm.vmax or 0)
        inside = [v for v in (self.threshold, -self.threshold) if low < v < high]
        if self.threshold < _LEAST_READABLE * (high - low):
            inside = []
        return [low, high, *inside, *([0.0] if low < 0 < high else [])]

    def beyond(self, values: NDArray[Any]) -> Ends:
        """Return at which ends of the colours drawn values lie beyond."""
        drawn = values[self.are_drawn(values)]
        is_below = drawn.size > 0 and bool(drawn.min() < (self.norm.vmin or 0))
        is_above = drawn.size > 0 and bool(drawn.max() > (self.norm.vmax or 0))
        if is_below and is_above:
            return "both"
        return "min" if is_below else "max" if is_above else "neither"

    def labels(self, tick_format: str) -> list[str]:
        """Return what is written at the `ticks`, in printf style."""
        try:
            texts = [tick_format % tick for tick in self.ticks()]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"cbar_tick_format={shown(tick_format)} does not format a number; pass '%.2g'."
            ) from error
        return [text.replace("-", "\N{MINUS SIGN}") for text in texts]

    def with_gap(self) -> Colormap:
        """Return the colour map of a colour bar: grey where values are not drawn."""
        values = np.linspace(self.norm.vmin or 0, self.norm.vmax or 0, 256)
        colors: Any = self.cmap(np.linspace(0, 1, 256))
        low, high = tuple(colors[0]), tuple(colors[-1])
        colors[np.abs(values) < self.threshold] = (0.5, 0.5, 0.5, 1.0)
        return ListedColormap(colors).with_extremes(under=low, over=high)


def _is_diverging(cmap: Colormap) -> bool:
    """Return whether the middle of `cmap` is lighter, or darker, than both its ends."""
    red, green, blue = np.array(cmap([0.0, 0.5, 1.0]))[:, :3].T
    low, middle, high = 0.3 * red + 0.6 * green + 0.1 * blue
    return bool((middle > low and middle > high) or (middle < low and middle < high))
