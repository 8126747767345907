"""The table, and whether what was promised was kept."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.gpu.device import CPU, CUCIM_SINGLY, CUPY, CUPY_SINGLY, OWN
from benchmarks.gpu.work import BY_HAND, CASES, COHORT, DOOR, FILES, REQUIRED, STAGES

Record = dict[str, Any]

KEPT, NOT_KEPT, NOT_MEASURED, REPORTED = "kept", "NOT KEPT", "not measured", "reported"

HEADING = f"{'case':10} {'stage':18} {'contender':20} {'time':>14} {'maps/s':>11} of copy identical"


def row(record: Record) -> str:
    """Return a record as a line of the table."""
    line = f"{record['case']:10} {record['stage']:18} {record['contender']:20}"
    notes = [f"{n} {outcome}" for outcome, n in record.get("tests", {}).items()]
    notes += [f"{word}: {record[word]:.300}" for word in ("skipped", "failed") if word in record]
    if "bytes_per_s" in record:
        notes.append(f"{record['bytes_per_s'] / 1e9:.0f} GB/s read and written")
    if notes:
        return f"{line} {', '.join(notes)}"
    scale = record["maps"] / record["timed_maps"]
    time_ms = f"{'~' if scale != 1 else ''}{record['median_s'] * scale * 1e3:.3f} ms"
    share = record.get("share_of_copy")
    copy = "" if share is None else f"{share:.1%}"
    same = {True: "yes", False: "NO", None: "-"}[record.get("identical")]
    return f"{line} {time_ms:>14} {record['maps_per_s']:11.1f} {copy:>7} {same:>9}"


def promises(
    records: Sequence[Record], used_s: float, budget_s: float
) -> Iterator[tuple[str, str]]:
    """Yield each promise with what was measured, and whether it was kept."""
    first = CASES[0].name

    def kept(text: str, figure: float | None, least: float) -> tuple[str, str]:
        if figure is None:
            return f"{text} >= {least:g}", NOT_MEASURED
        return f"{text} >= {least:g}: {figure:.2f}", KEPT if figure >= least else NOT_KEPT

    own = _find(records, first, "components", OWN) or {}
    share = own.get("share_of_copy")
    yield kept(f"{first}: components, share of 24 B/voxel at copy bandwidth", share, 0.5)
    for peer in (CUCIM_SINGLY, CUPY_SINGLY):  # the second are the same kernels as the first
        text = f"{first}: components, times {peer}"
        yield kept(text, _ratio(own, _find(records, first, "labels", peer)), 20)
    cpu = _find(records, first, "components", CPU)
    yield kept(f"{first}: components, times {CPU} on one core", _ratio(own, cpu), 500)

    files = {r["contender"]: r for r in records if r["case"] == FILES and "median_s" in r}
    decoders = [name for name in files if name.startswith("decoder")]
    fastest = max(decoders, key=lambda name: files[name]["maps_per_s"], default="decoder")
    for name in (BY_HAND, DOOR):
        figure = _ratio(files.get(name), files.get(fastest))
        yield kept(f"{FILES}: {name}, share of {fastest}", figure, 0.9)
    # Of which nobody promised the same: it also writes what it finds, three files a map.
    figure = _ratio(files.get(COHORT), files.get(fastest))
    text = f"{FILES}: {COHORT}, which writes three files a map, share of {fastest}"
    yield (text, NOT_MEASURED) if figure is None else (f"{text}: {figure:.2f}", REPORTED)

    for verb in STAGES:  # not promised, but PROVEN in gpuroi/backends/cuda.py depends on it
        figure = _ratio(_find(records, first, verb, OWN), _find(records, first, verb, CUPY))
        text, verdict = kept(f"{first}: {verb}, identical in all cases, times {CUPY}", figure, 1)
        yield text, verdict if all(_answers(records, verb)) else NOT_KEPT
    yield _all_of("identical in {} of {} comparisons", _answers(records))
    suites = ["failed" not in record for record in records if record["stage"] == REQUIRED]
    yield _all_of("contract suite: {} of {} passed", suites)
    in_time = KEPT if used_s <= budget_s else NOT_KEPT
    yield f"ended after {used_s:.0f} s of {budget_s:.0f} s", in_time


def _all_of(text: str, answers: list[bool]) -> tuple[str, str]:
    verdict = NOT_MEASURED if not answers else KEPT if all(answers) else NOT_KEPT
    return text.format(sum(answers), len(answers)), verdict


def _ratio(one: Record | None, other: Record | None) -> float | None:
    return one["maps_per_s"] / other["maps_per_s"] if one and other else None


def _find(records: Sequence[Record], case: str, stage: str, contender: str) -> Record | None:
    """Return the record of this measurement."""
    for record in records:
        names = (record["case"], record["stage"], record["contender"])
        if names == (case, stage, contender) and "median_s" in record:
            return record
    return None


def _answers(records: Sequence[Record], *stages: str) -> list[bool]:
    """Return what the comparisons of these stages have shown; of all by default."""
    compared = [record for record in records if record.get("compared_maps")]
    return [r["identical"] for r in compared if not stages or r["stage"] in stages]
