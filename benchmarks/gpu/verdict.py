"""The table, and whether what was promised was kept."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks.gpu.device import CPU, CUCIM_SINGLY, CUPY, CUPY_SINGLY, OWN
from benchmarks.gpu.work import BY_HAND, CASES, COHORT, DOOR, FILES, SUITE, VERB_STAGES

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

    def kept(text: str, figure: float | None, least: float, of: Record) -> tuple[str, str]:
        if figure is None:
            return f"{text} >= {least:g}", NOT_KEPT if "failed" in of else NOT_MEASURED
        return f"{text} >= {least:g}: {figure:.2f}", KEPT if figure >= least else NOT_KEPT

    own = _find(records, first, OWN, "components")
    text = f"{first}: components, share of 24 B/voxel at copy bandwidth"
    yield kept(text, own.get("share_of_copy"), 0.5, own)
    for peer in (CUCIM_SINGLY, CUPY_SINGLY):  # the second are the same kernels as the first
        figure = _ratio(own, _find(records, first, peer, "labels"))
        yield kept(f"{first}: components, times {peer}", figure, 20, own)
    figure = _ratio(own, _find(records, first, CPU, "components"))
    yield kept(f"{first}: components, times {CPU} on one core", figure, 500, own)

    files = {r["contender"]: r for r in records if r["case"] == FILES and "median_s" in r}
    decoders = [name for name in files if name.startswith("decoder")]
    fastest = max(decoders, key=lambda name: files[name]["maps_per_s"], default="decoder")
    for name in (BY_HAND, DOOR):
        end = _find(records, FILES, name)
        figure = _ratio(end, files.get(fastest, {}))
        yield kept(f"{FILES}: {name}, share of {fastest}", figure, 0.9, end)
    # Of which nobody promised the same: it also writes what it finds, three files a map.
    figure = _ratio(files.get(COHORT, {}), files.get(fastest, {}))
    text = f"{FILES}: {COHORT}, which writes three files a map, share of {fastest}"
    yield (text, NOT_MEASURED) if figure is None else (f"{text}: {figure:.2f}", REPORTED)

    for verb in VERB_STAGES:  # not promised, but PROVEN in gpuroi/backends/cuda.py depends on it
        each = shown(records, verb)
        text = (
            f"{verb}: identical and faster than {CUPY} in {each.count(KEPT)} of {len(each)} cases"
        )
        verdicts = [verdict for verdict in (NOT_KEPT, NOT_MEASURED) if verdict in each]
        yield text, verdicts[0] if verdicts else KEPT
    # What has failed could not be compared.
    compared = [r for r in records if r["case"] != SUITE and _was_tried(r, "compared_maps")]
    yield _all_of("identical in {} of {} comparisons", [r.get("identical") for r in compared])
    suites = [r for r in records if r["case"] == SUITE and _was_tried(r, "tests")]
    yield _all_of("contract suite: {} of {} passed", ["failed" not in r for r in suites])
    in_time = KEPT if used_s <= budget_s else NOT_KEPT
    yield f"ended after {used_s:.0f} s of {budget_s:.0f} s", in_time


def shown(records: Sequence[Record], verb: str) -> list[str]:
    """Return for each case of a verb, of one run, whether its kernels were identical and faster.

    `KEPT` if CuPy and the kernels were both measured, everybody's results were the same bits,
    nothing failed on the way, and the kernels took less time.
    """

    def verdict(records: list[Record]) -> str:
        if any(map(went_wrong, records)):
            return NOT_KEPT
        same = {r["contender"]: r["maps_per_s"] for r in records if r.get("identical")}
        if not {OWN, CUPY} <= same.keys():
            return NOT_MEASURED
        return KEPT if same[OWN] > same[CUPY] else NOT_KEPT

    return [
        verdict([r for r in records if r["case"] == case.name and r["stage"] in ("-", stage)])
        for case in CASES
        for stage in VERB_STAGES[verb]
        if stage in case.stages
    ]


def proofs(records: Iterable[Record], verb: str) -> list[str]:
    """Return the runs that show that the kernels of a verb can be its default.

    Each was made on a GPU and with the maps of all `CASES`; its contract suite passed with the
    kernels; and they were identical and faster in every case.
    """
    runs = defaultdict(list)
    for record in records:
        runs[record["run"]].append(record)
    return [
        run
        for run, of_run in runs.items()
        if all("cuda-driver" in r["versions"] and not r["quick"] for r in of_run if "median_s" in r)
        and any("failed" not in r and "tests" in r for r in of_run if r["contender"] == OWN)
        and set(shown(of_run, verb)) == {KEPT}
    ]


def went_wrong(record: Record) -> bool:
    """Return whether something failed, or differed from what others found."""
    return "failed" in record or record.get("identical") is False


def _was_tried(record: Record, outcome: str) -> bool:
    return "failed" in record or bool(record.get(outcome))


def _all_of(text: str, answers: list[Any]) -> tuple[str, str]:
    verdict = NOT_MEASURED if not answers else KEPT if all(answers) else NOT_KEPT
    return text.format(sum(map(bool, answers)), len(answers)), verdict


def _ratio(one: Record, other: Record) -> float | None:
    name = "maps_per_s"
    return one[name] / other[name] if name in one and name in other else None


def _find(records: Sequence[Record], case: str, contender: str, stage: str | None = None) -> Record:
    """Return what was measured, or else has failed, with the whole part if need be; or nothing."""
    here = [r for r in records if r["case"] == case and ("median_s" in r or "failed" in r)]
    own = [r for r in here if r["contender"] == contender and stage in (None, r["stage"])]
    return next(iter(own + [r for r in here if r["stage"] == "-"]), {})
