"""The tables: what the newest recorded lines say, written between the marks in the README.

python -m benchmarks.report          rewrites the README
python -m benchmarks.report --check  exits with 1 if it would change
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.run import RESULTS

README = Path(__file__).parents[1] / "README.md"
_BLOCK = re.compile(r"(<!-- benchmarks:(\w+) -->\n).*?(<!-- /benchmarks -->)", re.DOTALL)


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
        "| | contender | time | speed-up | peak memory |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for record in records:
        title = record["comparison"]
        if n_maps := record["parameters"].get("n_maps"):
            title += f", {n_maps:,} maps"
        for name, seconds in record["median_s"].items():
            peak = record["peak_bytes"].get(name)
            # What does other work is no faster or slower.
            speed_up = f"{record['speed_up'][name]:.1f}x" if record["targets"] else ""
            lines.append(
                f"| {title} | {name} | {_time(seconds)} | {speed_up} "
                f"| {'' if peak is None else _size(peak)} |"
            )
            title = ""
    newest = max(records, key=lambda record: record["date"])
    commits = ", ".join(dict.fromkeys(record["commit"] or "unknown" for record in records))
    versions = ", ".join(f"{package} {number}" for package, number in newest["versions"].items())
    lines += [
        "",
        f"Medians of {min(r['repeats'] for r in records)} or more turns {_processes(newest)}, BLAS "
        f"at one thread, on {newest['processor']}, Python {newest['python']}, {versions}; commits "
        f"{commits}, {newest['date'][:10]}.",
        "",
    ]
    return "\n".join(lines)


def render(page: str) -> str:
    """Return `page` with every block between marks rewritten from its file of results."""

    def block(match: re.Match[str]) -> str:
        return match[1] + table(latest(RESULTS / f"{match[2]}.jsonl")) + match[3]

    return _BLOCK.sub(block, page)


def _processes(record: dict[str, Any]) -> str:
    n_processes = record["parameters"].get("processes", 1)
    return "in one process" if n_processes == 1 else f"with {n_processes} processes each"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


def main(arguments: list[str] | None = None) -> int:
    """Rewrite the README, or check that it is up to date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(arguments).check
    page = README.read_text()
    if check:
        return int(page != render(page))
    README.write_text(render(page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
