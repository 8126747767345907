"""Histograms as inline SVG: sharp at any size, in the colours of the page."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

# User units of the drawing, which is as wide as its column.
_WIDTH, _HEIGHT = 460, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 18, 38

_LEAST_BINS, _MOST_BINS = 6, 24


def histogram_of_counts(counts: Sequence[int], title: str) -> str:
    """Return a histogram of whole numbers; of several in a bar, the lowest is at its left."""
    width = -(-(max(counts) - min(counts) + 1) // _MOST_BINS)
    edges = np.arange(min(counts) - 0.5, max(counts) + width + 0.5, width)
    every = -(-(edges.size - 1) // 8)
    ticks = [(edge + 0.5, f"{edge + 0.5:,.0f}") for edge in edges[:-1:every].tolist()]
    return _histogram(np.asarray(counts, np.float64), edges, ticks, title, "maps")


def histogram_of_volumes(volumes_mm3: Sequence[float], title: str) -> str:
    """Return a histogram of volumes on a logarithmic axis."""
    logarithms = np.log10(np.asarray(volumes_mm3, np.float64))
    low, high = float(logarithms.min()), float(logarithms.max())
    if high - low < 0.5:  # one size has an axis, too
        low, high = low - 0.25, high + 0.25
    n_bins = 1 + min(_MOST_BINS, max(_LEAST_BINS, math.ceil(math.sqrt(logarithms.size)) * 2))
    edges = np.linspace(low, high * (1 + 1e-12) + 1e-12, n_bins + 1)
    steps = [(1, 0.0), (2, math.log10(2)), (5, math.log10(5))]
    if high - low > 3:
        steps = steps[:1]
    ticks = [
        (decade + offset, _volume(digit * 10.0**decade))
        for decade in range(math.floor(low), math.ceil(high) + 1)
        for digit, offset in steps
        if low <= decade + offset <= high
    ]
    if len(set(volumes_mm3)) == 1:
        ticks = [(float(logarithms[0]), _volume(volumes_mm3[0]))]
    return _histogram(logarithms, edges, ticks, title, "regions")


def _volume(mm3: float) -> str:
    return f"{mm3:,.0f}" if mm3 >= 1 else f"{mm3:.6g}"


def _histogram(
    values: NDArray[np.float64],
    edges: NDArray[np.float64],
    ticks: Sequence[tuple[float, str]],
    title: str,
    counted: str,
) -> str:
    heights, _ = np.histogram(values, edges)
    most = int(heights.max(initial=1))
    span = float(edges[-1] - edges[0])
    base, room = _HEIGHT - _BOTTOM, _HEIGHT - _BOTTOM - _TOP

    def x(value: float) -> float:
        return _LEFT + (value - float(edges[0])) / span * (_WIDTH - _LEFT - _RIGHT)

    # One count alone would be a slab.
    widest = (_WIDTH - _LEFT - _RIGHT) / _LEAST_BINS

    def bar(left: float, right: float, height: int) -> str:
        width = max(1.0, min(x(right) - x(left), widest) - 2)
        tall = room * height / most
        return (
            f'<rect x="{(x(left) + x(right) - width) / 2:.1f}" y="{base - tall:.1f}" '
            f'width="{width:.1f}" height="{tall:.1f}"/>'
        )

    bars = [
        bar(left, right, height)
        for left, right, height in zip(
            edges[:-1].tolist(), edges[1:].tolist(), heights.tolist(), strict=True
        )
        if height
    ]
    most_right = _WIDTH - _RIGHT - 30
    marks = [
        f'<text x="{x(place):.1f}" y="{base + 15}" '
        f'text-anchor="{"end" if x(place) > most_right else "middle"}">{escape(text)}</text>'
        for place, text in ticks
    ]
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(bars)}'
        f'<line x1="{_LEFT}" y1="{base}" x2="{_WIDTH - _RIGHT}" y2="{base}"/>{"".join(marks)}'
        f'<text x="{_LEFT - 6}" y="{_TOP + 4}" text-anchor="end">{most}</text>'
        f'<text x="{_LEFT - 6}" y="{base}" text-anchor="end">0</text>'
        f'<text transform="translate(14 {(_TOP + base) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{counted}</text>"
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">'
        f"{escape(title)}</text></svg>"
    )
