"""The tables: what the newest recorded lines say, written between the marks in the pages.

python -m benchmarks.report          rewrites the pages
python -m benchmarks.report --check  exits with 1 if it would change one
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.run import RESULTS

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
_BLOCK = re.compile(r"(<!-- benchmarks:(\w+) -->\n).*?(<!-- /benchmarks -->)", re.DOTALL)

# What a reader in a hurry is told: file of results, comparison, what it is, contender.
_SUMMARY = (
    ("components", "components, 3 mm", "Connected components, 3 mm", "gpuroi[fast]"),
    ("components", "components, 2 mm", "Connected components, 2 mm", "gpuroi[fast]"),
    (
        "components",
        "components, 2 mm, all regions",
        "Every region of a noisy map, 2 mm",
        "gpuroi[fast]",
    ),
    (
        "local_regions",
        "local_regions, 3 mm, 97%",
        "Random walker, 3 mm",
        "gpuroi[cholmod] as nilearn",
    ),
    (
        "local_regions",
        "local_regions, 2 mm, 97%",
        "Random walker, 2 mm",
        "gpuroi[cholmod] as nilearn",
    ),
    ("plots", "plot_prob_atlas, 2 mm", "Contours of 15 regions, 2 mm", "gpuroi"),
    ("cohort", "cohort, 3 mm, connected_components", "Files: components, 3 mm", "gpuroi"),
    ("cohort", "cohort, 2 mm, connected_components", "Files: components, 2 mm", "gpuroi"),
    ("cohort", "cohort, 3 mm, local_regions", "Files: random walker, 3 mm", "gpuroi"),
    ("cohort", "cohort, 2 mm, local_regions", "Files: random walker, 2 mm", "gpuroi"),
)


def latest(results: Path) -> list[dict[str, Any]]:
    """Return the newest record of each comparison in `results`, in the order first seen."""
    newest: dict[str, dict[str, Any]] = {}
    for line in results.read_text().splitlines():
        record = json.loads(line)
        newest[record["comparison"]] = record
    return list(newest.values())


def table(records: list[dict[str, Any]]) -> str:
    """Return `records` as a Markdown table, with the circumstances under it."""
    lines = [
        "| | contender | time | speed-up | promised | turns | peak memory |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for record in records:
        title = record["comparison"]
        if n_maps := record["parameters"].get("n_maps"):
            title += f", {n_maps:,} maps"
        for name, seconds in record["median_s"].items():
            cells = [title, name, _time(seconds), *_kept(record, name)]
            cells += [
                str(record["repeats"]) if title else "",
                _size(record["peak_bytes"].get(name)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
            title = ""
    return "\n".join([*lines, "", *_floors(records), _circumstances(records), ""])


def summary() -> str:
    """Return what a reader in a hurry is told: nilearn's time and gpuroi's, case by case."""
    lines = ["| | nilearn | gpuroi | speed-up |", "| --- | ---: | ---: | ---: |"]
    for results, comparison, title, contender in _SUMMARY:
        (record,) = (
            one for one in latest(RESULTS / f"{results}.jsonl") if one["comparison"] == comparison
        )
        n_maps = record["parameters"].get("n_maps", 1)
        times = [record["median_s"][name] / n_maps for name in (record["reference"], contender)]
        speed_up = f"{record['speed_up'][contender]:.1f}x"
        lines.append(f"| {' | '.join([title, *map(_time, times), speed_up])} |")
    return "\n".join(
        [
            *lines,
            "",
            f"On {record['processor']}, Python {record['python']}, {record['date'][:10]}.",
            "",
        ]
    )


def render(page: str) -> str:
    """Return `page` with every block between marks rewritten from its file of results."""

    def block(match: re.Match[str]) -> str:
        is_summary = match[2] == "summary"
        shown = summary() if is_summary else table(latest(RESULTS / f"{match[2]}.jsonl"))
        return match[1] + shown + match[3]

    return _BLOCK.sub(block, page)


def _kept(record: dict[str, Any], name: str) -> tuple[str, str]:
    """Return how much faster a contender is, and what was promised of it."""
    if not record["targets"]:  # what does other work is no faster or slower
        return "", ""
    speed_up, target = record["speed_up"][name], record["targets"].get(name)
    if target is None:
        return f"{speed_up:.1f}x", ""
    return f"{speed_up:.1f}x", f"{target:g}x" + (", missed" if speed_up < target else "")


def _floors(records: list[dict[str, Any]]) -> Iterator[str]:
    """Yield how often the time of a contender that does less is taken, where it was promised."""
    for record in records:
        if floor := record.get("floor"):
            for name, times in floor["times"].items():
                missed = ", missed" if times > floor["promised"] else ""
                yield (
                    f"{record['comparison']}: {name} takes {times:.1f} times as long as "
                    f"{floor['of']} (promised {floor['promised']:g}{missed})."
                )
                yield ""


def _circumstances(records: list[dict[str, Any]]) -> str:
    newest = max(records, key=lambda record: record["date"])
    commits = ", ".join(dict.fromkeys(record["commit"] or "unknown" for record in records))
    versions = ", ".join(f"{package} {number}" for package, number in newest["versions"].items())
    n_processes = newest["parameters"].get("processes", 1)
    where = "in one process" if n_processes == 1 else f"with {n_processes} processes each"
    return (
        f"Medians of the turns {where}, BLAS at one thread, on {newest['processor']}, "
        f"Python {newest['python']}, {versions}; commits {commits}, {newest['date'][:10]}."
    )


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def _size(n_bytes: int | None) -> str:
    if n_bytes is None:
        return ""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


def main(arguments: list[str] | None = None) -> int:
    """Rewrite the pages, or check that they are up to date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(arguments).check
    is_stale = False
    for path in PAGES:
        page = path.read_text()
        is_stale |= page != render(page)
        if not check:
            path.write_text(render(page))
    return int(check and is_stale)


if __name__ == "__main__":
    sys.exit(main())
