"""What the report is told, map by map, and what it writes."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuroi import io
from gpuroi.overlap import Overlap
from gpuroi.plotting._planes import Volume
from gpuroi.report import _html as html
from gpuroi.report._charts import histogram_of_counts, histogram_of_volumes
from gpuroi.report._payload import backdrop_payload, map_payload
from gpuroi.report._pictures import count_palette, draw_cuts, hex_color, region_palette
from gpuroi.report._scene import scene_of, template
from gpuroi.result import ENDING, EXTENSIONS, Regions
from gpuroi.words import counted, threshold_asked, what_was_found

#: Maps whose slices are in the page; of more, all lie beside it.
MOST_EMBEDDED = 50

# Regions in a caption.
_MOST_NAMED = 20

# These are one map's; the rest of a provenance is the run's.
_OF_ONE_MAP = (
    "source",
    "source_sha256",
    "shape",
    "voxel_volume_mm3",
    "dtype",
    "percentile_score",
    "voxels_ranked",
    "cutoff",
    "min_voxels",
    "voxels_not_finite",
    "largest_magnitude",
    "regions",
    "random_walker",
)


@dataclass
class _Views:
    """What is drawn of a map: picture and slices, until they are written beside the page."""

    sides: list[int]  # pixels
    first: int  # the region that is shown first
    not_numbered: list[int]  # labels without a number in the picture
    picture: bytes = b""
    payload: dict[str, Any] | None = None


@dataclass(frozen=True)
class _MapRecord:
    """What the page says of a map; one without regions has no views."""

    line: html.MapLine
    facts: str
    warnings: Sequence[str]
    table: str
    details: str
    views: _Views | None


class Report:
    """A page about the regions of maps; what it holds of a map is small and compressed.

    Parameters
    ----------
    folder : path
        Where the outputs of the maps are, and the page goes.
    parameters : mapping, optional
        Of the extraction, as in the provenance; for a page on which every map failed.

    Examples
    --------
    >>> import tempfile
    >>> import gpuroi
    >>> from gpuroi.datasets import make_stat_map
    >>> from gpuroi.report import Report
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     regions = gpuroi.extract_regions(make_stat_map().img, 5.0)
    ...     report = Report(folder)
    ...     report.add(regions, regions.save(f"{folder}/sub-01_desc-regions_dseg")["labels"])
    ...     report.write().name
    'report.html'
    """

    def __init__(self, folder: str | Path, parameters: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self._run: dict[str, Any] = {"parameters": dict(parameters or {})}
        self._maps: list[_MapRecord] = []
        self._volumes_mm3: list[float] = []
        self._failures: list[tuple[str, str]] = []
        self._overlap = Overlap()

    def __len__(self) -> int:
        """Return the number of maps that did not fail."""
        return len(self._maps)

    def add(
        self,
        regions: Regions,
        path: str | Path,
        values: NDArray[Any] | None = None,
        warnings: Sequence[str] = (),
    ) -> None:
        """Take in the regions of a map.

        From the map after `MOST_EMBEDDED` on, slices are written to ``report_data`` at once.

        Parameters
        ----------
        regions : Regions
        path : path
            Of its label image, in `folder` or below it.
        values : array (X, Y, Z), optional
            The map, for the outline of the head where there is no template.
        warnings : sequence of str
            What there is to say of the map.

        Raises
        ------
        OSError
            If slices cannot be written.
        """
        table, provenance = regions.table, dict(regions.provenance)
        volumes: list[float] = table["volume_mm3"].tolist()
        self._volumes_mm3 += volumes
        # Not `regions.labels`, which would be kept.
        self._overlap.add(regions.voxels.labels() != 0, regions.affine, regions.header)
        own = {name: provenance.pop(name) for name in _OF_ONE_MAP if name in provenance}
        self._run = provenance
        labels_file = _below(self.folder, Path(path))
        line = html.MapLine(
            number=f"{len(self._maps) + 1:04d}",
            name=labels_file.removesuffix(f"{ENDING}{EXTENSIONS['labels']}"),
            labels_file=labels_file,
            n_regions=len(regions),
            volume_mm3=sum(volumes),
            cutoff=regions.cutoff,
        )
        self._maps.append(
            _MapRecord(
                line,
                _facts(regions),
                warnings,
                html.region_table(table) if volumes else "",
                html.definitions("This map", own),
                _views(regions, int(np.argmax(volumes)) + 1, values) if volumes else None,
            )
        )
        if len(self._maps) > MOST_EMBEDDED:
            self._set_aside()

    def fail(self, name: str, reason: str) -> None:
        """Take in a map that failed.

        Parameters
        ----------
        name : str
            Of the map.
        reason : str
        """
        self._failures.append((name, reason))

    def write(self, overlap_file: str | None = None) -> Path:
        """Write the page, whole or not at all.

        Parameters
        ----------
        overlap_file : str, optional
            An image in `folder` to name as the one that counts maps; the page only draws counts.

        Returns
        -------
        Path
            Of the page.

        Raises
        ------
        OSError
            If it cannot be written; an older one is left as it was.
        """
        path = self.folder / "report.html"
        io.write_text(self._page(overlap_file), path)
        return path

    def _set_aside(self) -> None:
        """Write what is drawn of maps into files beside the page, which loads them on demand."""
        folder = self.folder / "report_data"
        folder.mkdir(exist_ok=True)
        for record in self._maps:
            views, number = record.views, record.line.number
            if views is None or views.payload is None:
                continue
            content = views.payload | {"picture": html.data_uri(views.picture)}
            call = f'gpuroiReport.receive("{number}",{html.json_block(content)});\n'
            io.write_text(call, folder / f"{number}.js")
            views.payload, views.picture = None, b""

    def _page(self, overlap_file: str | None) -> str:
        away = len(self._maps) > MOST_EMBEDDED
        n_regions = len(self._volumes_mm3)
        title = f"Regions of {counted(len(self._maps), 'map')}"
        if len(self._maps) == 1:
            title = f"Regions of {self._maps[0].line.name}"
        summary = f"{counted(n_regions, 'region')} in {counted(len(self._maps), 'map')}"
        if self._failures:
            summary += f"; {counted(len(self._failures), 'map')} failed"
        body = [html.failures_section(self._failures), self._cohort(overlap_file)]
        body += [_section(record, away=away) for record in self._maps]
        body.append(html.definitions("How this was made", self._run | _now(), "provenance"))
        data = {
            "backdrop": backdrop_payload(template()),
            "maps": {
                record.line.number: record.views.payload
                for record in self._maps
                if record.views is not None and not away
            },
        }
        return html.page(title, f"{summary}.", "\n".join(body), data, has_files_beside=away)

    def _cohort(self, overlap_file: str | None) -> str:
        """Return the part of the page about all maps together."""
        if len(self._maps) < 2:
            return ""
        lines = [record.line for record in self._maps]
        charts = histogram_of_counts([line.n_regions for line in lines], "regions in a map")
        if self._volumes_mm3:
            charts += histogram_of_volumes(self._volumes_mm3, "volume of a region (mm³)")
        return (
            f'<section id="cohort"><h2>All maps</h2>{html.maps_table(lines)}'
            f'<h3>How many, and how large</h3><div class="charts">{charts}</div>'
            f"<h3>Overlap</h3>{self._overlap_figure(overlap_file)}</section>"
        )

    def _overlap_figure(self, overlap_file: str | None) -> str:
        counts, affine = self._overlap.counts, self._overlap.affine
        if counts is None:
            return (
                '<p class="note">The maps are on different grids, so voxels cannot be counted '
                "across them.</p>"
            )
        most = int(counts.max(initial=0))
        if most == 0:
            return '<p class="note">No voxel is in a region of any map.</p>'
        palette = count_palette(most)
        scene = scene_of(Volume(counts, affine), counts)
        picture, _ = draw_cuts(counts, affine, scene, palette, numbered=False)
        return html.overlap_figure(
            picture,
            [hex_color(color) for color in palette],
            len(self._maps),
            overlap_file,
        )


def _below(folder: Path, path: Path) -> str:
    """Return `path` as a link from a page in `folder`; of another folder, its name."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100  # as it is named, links not followed
    root = Path(os.path.abspath(folder))  # noqa: PTH100
    return absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else path.name


def _views(regions: Regions, first: int, values: NDArray[Any] | None) -> _Views:
    labels = regions.voxels.labels()  # not kept, as `regions.labels` would be
    scene = scene_of(Volume(labels, regions.affine, is_labels=True), values)
    palette = region_palette(len(regions))
    picture, numbered = draw_cuts(labels, regions.affine, scene, palette, numbered=True)
    others = [label for label in range(1, len(regions) + 1) if label not in numbered]
    return _Views(scene.sides, first, others, picture, map_payload(regions, labels, scene))


def _section(record: _MapRecord, *, away: bool) -> str:
    views, notes = record.views, html.notes(record.warnings)
    if views is None:
        content = f"{notes}{html.notes(['No regions were found.'])}{record.details}"
        return html.map_section(record.line, record.facts, content, None, away=False)
    figure = html.picture_figure(
        None if away else views.picture,
        f"Regions of {record.line.name} in cuts along z",
        "Cuts along z, in mm; left is left. Numbers are those of the table"
        f"{_without(views.not_numbered)}.",
    )
    viewer = html.viewer(views.sides, away=away)
    content = notes + figure + viewer + record.table + record.details
    return html.map_section(record.line, record.facts, content, views.first, away=away)


def _without(labels: list[int]) -> str:
    """Return what a caption says of `labels` that it has no number of."""
    if not labels:
        return ""
    named = ", ".join(map(str, labels[:_MOST_NAMED]))
    rest = len(labels) - _MOST_NAMED
    return f"; not numbered in these cuts: {named}{f' and {rest} more' if rest > 0 else ''}"


def _facts(regions: Regions) -> str:
    """Return what was asked of a map and found, as one line."""
    provenance = regions.provenance
    return (
        f"{what_was_found(provenance)} (threshold {threshold_asked(provenance)}); largest "
        f"magnitude {provenance['largest_magnitude']:.6g}"
    )


def _now() -> dict[str, str]:
    """Return the date, that of SOURCE_DATE_EPOCH where a reproducible page is wanted."""
    asked = os.environ.get("SOURCE_DATE_EPOCH")
    moment = datetime.fromtimestamp(int(asked), UTC) if asked else datetime.now(UTC)
    return {"date": moment.strftime("%Y-%m-%d %H:%M UTC")}
