"""The page's markup. Whatever comes from outside passes through `escape`."""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from gpuroi.plotting._colors import N_COLORS
from gpuroi.report._pictures import hex_color, region_palette, value_palette
from gpuroi.result import COLUMNS

if TYPE_CHECKING:
    import pandas as pd

# What a person still looks through; the .tsv has all.
MOST_ROWS = 200

_TALL = 14  # rows; longer tables scroll by themselves

_HEADINGS = {
    "label": "label",
    "sign": "sign",
    "voxels": "voxels",
    "volume_mm3": "volume (mm³)",
    "peak_value": "peak (map\N{NO-BREAK SPACE}units)",
    "peak_x": "peak x (mm)",
    "peak_y": "peak y (mm)",
    "peak_z": "peak z (mm)",
    "mean_value": "mean (map\N{NO-BREAK SPACE}units)",
    "center_of_mass_x": "centre x (mm)",
    "center_of_mass_y": "centre y (mm)",
    "center_of_mass_z": "centre z (mm)",
    "touches_edge": "touches edge",
}
_FORMATS = {"volume_mm3": ".6g", "peak_value": ".4g", "mean_value": ".4g"} | {
    f"{place}_{axis}": ".1f" for place in ("peak", "center_of_mass") for axis in "xyz"
}

_VIEWS = (("x", "Sagittal", (1, 2)), ("y", "Coronal", (0, 2)), ("z", "Axial", (0, 1)))


@dataclass(frozen=True)
class MapLine:
    """What the overview says of a map."""

    number: str
    name: str
    labels_file: str
    n_regions: int
    volume_mm3: float
    cutoff: float


def map_section(line: MapLine, facts: str, content: str, first: int | None, *, away: bool) -> str:
    """Return the part of the page about one map; `first` is the region that is shown first."""
    viewed = "" if first is None else f' data-map="{line.number}" data-first="{first}"'
    stem = line.labels_file.removesuffix(".nii.gz")
    links = " · ".join(
        f'<a href="{escape(quote(stem + extension))}">{kind}</a>'
        for kind, extension in (("labels", ".nii.gz"), ("table", ".tsv"), ("provenance", ".json"))
    )
    return (
        f'<section class="map{" away" if away else ""}" id="map-{line.number}"{viewed}>'
        f"<h2>{escape(line.name)}</h2>"
        f'<p class="facts">{escape(facts)} · {links}</p>{content}</section>'
    )


def notes(texts: Iterable[str]) -> str:
    """Return a paragraph for each text."""
    return "".join(f'<p class="note">{escape(text)}</p>' for text in texts)


def picture_figure(png: bytes | None, alt: str, caption: str) -> str:
    """Return a picture that is in the page, or the place of one that comes later."""
    source = "" if png is None else f' src="{data_uri(png)}"'
    hidden = " hidden" if png is None else ""
    return (
        f'<figure{hidden}><div class="wide"><img{source} alt="{escape(alt)}"></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def data_uri(png: bytes) -> str:
    """Return a picture as the address of an image."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def viewer(sides: Sequence[int], *, away: bool) -> str:
    """Return the place of three slices, whose `sides` along x, y and z are in pixels."""
    canvases = "".join(
        f'<canvas data-axis="{axis}" width="{sides[across]}" height="{sides[up]}" role="img" '
        f'aria-label="{name} slice; arrow keys move the cross"></canvas>'
        for axis, name, (across, up) in _VIEWS
    )
    opener = '<button type="button" data-open>Show the slices</button>' if away else ""
    return (
        f'<div class="viewer"><div class="slices">{canvases}</div><div class="controls">{opener}'
        '<p class="readout" aria-live="polite"></p>'
        '<button type="button" data-values aria-pressed="false">Colour by value</button>'
        '<span class="scale" hidden><span></span><canvas width="255" height="1"></canvas>'
        "<span></span></span></div></div>"
    )


def region_table(table: "pd.DataFrame") -> str:
    """Return the largest regions as a table, in the order of their labels."""
    n_left_out = len(table) - MOST_ROWS
    shown = table
    if n_left_out > 0:
        shown = table.nlargest(MOST_ROWS, "volume_mm3").sort_values("label")
    rows = []
    for row in shown.itertuples(index=False):
        cells = "".join(f"<td>{_cell(name, getattr(row, name))}</td>" for name in COLUMNS)
        rows.append(f'<tr data-label="{row.label}">{cells}</tr>')
    headers = [(_HEADINGS[name], COLUMNS[name], "") for name in COLUMNS]
    note = ""
    if n_left_out > 0:
        note = f'<p class="note">{n_left_out} smaller regions are in the table file only.</p>'
    return sortable_table("regions", headers, rows) + note


def _cell(name: str, value: Any) -> str:
    if name == "touches_edge":
        return "yes" if value else ""
    text = format(value, _FORMATS.get(name, ""))
    if name == "label":
        return f'<i class="c{(value - 1) % N_COLORS}"></i>{text}'
    return "0.0" if text == "-0.0" else text


def sortable_table(
    caption: str, headers: Sequence[tuple[str, str, str]], rows: Sequence[str]
) -> str:
    """Return a table whose headers (heading, explanation, class) are buttons that sort."""
    heads = "".join(
        f'<th scope="col" title="{escape(explained)}"{_class(kind)}>'
        f'<button type="button">{escape(heading)}</button></th>'
        for heading, explained, kind in headers
    )
    tall = " tall" if len(rows) > _TALL else ""
    return (
        f'<div class="table{tall}" tabindex="-1"><table aria-label="{escape(caption)}">'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def maps_table(lines: Iterable[MapLine]) -> str:
    """Return the overview of maps."""
    headers = [
        ("map", "goes to the map on this page", "words"),
        ("regions", "number of regions", ""),
        ("total volume (mm³)", "of all regions together", ""),
        ("cut-off (map units)", "magnitude that voxels had to reach", ""),
    ]
    rows = [
        f'<tr><td class="words"><a href="#map-{line.number}">{escape(line.name)}</a></td>'
        f"<td>{line.n_regions}</td><td>{line.volume_mm3:.6g}</td><td>{line.cutoff:.6g}</td></tr>"
        for line in lines
    ]
    return sortable_table("maps", headers, rows)


def failures_section(failures: Sequence[tuple[str, str]]) -> str:
    """Return what failed, and why."""
    if not failures:
        return ""
    rows = [
        f'<tr><td class="words">{escape(name)}</td><td class="words">{escape(reason)}</td></tr>'
        for name, reason in failures
    ]
    headers = [("map", "that failed", "words"), ("reason", "why it failed", "words")]
    return (
        f'<section class="failed" id="failures"><h2>Failed: {len(failures)}</h2>'
        f"{sortable_table('failures', headers, rows)}</section>"
    )


def scale_of_counts(colors: Sequence[str]) -> str:
    """Return what the colours of an overlap map stand for."""
    n = len(colors)
    width = max(160, min(480, 24 * n)) / n
    bars = "".join(
        f'<rect x="{k * width:.2f}" width="{width + 0.3:.2f}" height="12" '
        f'fill="{color}"><title>{k + 1}</title></rect>'
        for k, color in enumerate(colors)
    )
    last = f'<text x="{n * width - 2:.1f}" y="26" text-anchor="end">{n}</text>' if n > 1 else ""
    return (
        f'<svg class="counts" viewBox="0 0 {n * width:.0f} 30" width="{n * width:.0f}" height="30" '
        f'role="img" aria-label="colours for 1 to {n} maps">{bars}'
        f'<text x="2" y="26">1</text>{last}</svg>'
    )


def overlap_figure(png: bytes, colors: Sequence[str], n_maps: int, overlap_file: str | None) -> str:
    """Return the picture of an overlap map, what its colours stand for, and where counts are."""
    caption = (
        f"In how many of {n_maps} maps each voxel lies in a region. Cuts along z, in mm; left is "
        "left."
    )
    note = ""
    if overlap_file is not None:
        note = (
            f'<p class="note"><a href="{escape(quote(overlap_file))}">{escape(overlap_file)}</a> '
            "has the counts.</p>"
        )
    return (
        picture_figure(png, "Overlap of the maps in cuts along z", caption)
        + scale_of_counts(colors)
        + note
    )


def definitions(heading: str, content: Mapping[str, Any], identifier: str = "") -> str:
    """Return a mapping as a block that opens; nested ones are on lines of their own."""
    named = f' id="{identifier}"' if identifier else ""
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(_said(value))}</dd>"
        for name, value in _flat(content).items()
    )
    return f"<details{named}><summary>{escape(heading)}</summary><dl>{items}</dl></details>"


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}: ")
        else:
            flat[prefix + name] = value
    return flat


def _said(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_said, value))
    return str(value)


def page(
    title: str, summary: str, body: str, data: Mapping[str, Any], *, has_files_beside: bool
) -> str:
    """Return the whole page; the policy in its head forbids other scripts, and all networks."""
    palette = "".join(
        f".c{k} {{ background: {hex_color(color)}; }}\n"
        for k, color in enumerate(region_palette(N_COLORS))
    )
    style, script = _part("page.css") + palette, _part("page.js")
    beside = " 'self' file:" if has_files_beside else ""
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
        f"script-src '{_digest(script)}'{beside}"
    )
    colors = {
        "colors": [hex_color(color) for color in region_palette(N_COLORS)],
        "shades": [hex_color(color) for color in value_palette()],
    }
    parts = {
        "policy": policy,
        "title": escape(title),
        "summary": escape(summary),
        "style": style,
        "body": body,
        "data": json_block({**colors, **data}),
        "script": script,
    }
    # One pass: what is put in is not looked through again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _part("page.html"))


def json_block(content: Any) -> str:
    """Return JSON that cannot end the element it is in."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


@cache
def _part(name: str) -> str:
    return (files("gpuroi.report") / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
