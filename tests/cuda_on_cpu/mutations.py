"""Faults put into the kernels, each of which the tests must notice.

``python -m tests.cuda_on_cpu.mutations`` prints how each is caught.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from gpuroi.testing import KINDS
from tests.cuda_on_cpu import kernels_on_cpu
from tests.cuda_on_cpu.cases import CONTENDED, VERBS, Case, random_maps, special
from tests.cuda_on_cpu.compiler import Fibers, NotRunError, Threads
from tests.cuda_on_cpu.far import FAR
from tests.cuda_on_cpu.nvrtc import (
    CompileError,
    assert_threads_see_what_others_write,
    compile_as_cupy,
)

_ROOT = Path(__file__).parents[2]
#: Notices by the instructions for a device.
PTX = "PTX"

_MOST_SECONDS = 180  # a fault may have no end; a launch of `Threads` gives up by itself before


@dataclass(frozen=True)
class Mutation:
    """A text in a file of kernels, and the faulty one in its place.

    Fibers switch at loads, atomics and barriers only, so some races leave no trace in the answers
    to the battery. For those `noticed_by` names the case of `CONTENDED` in which ThreadSanitizer
    sees two threads meet; for offsets of 32 bits, that of `FAR`; and `PTX` for what is not C++.
    """

    name: str
    file: str
    old: str
    new: str
    noticed_by: str = "battery"

    @property
    def engine(self) -> str:
        """Return who has to notice."""
        if self.noticed_by == PTX:
            return "NVRTC"
        return "threads" if self.noticed_by in CONTENDED else "fibers"


MUTATIONS = (
    Mutation(
        "load: the compiler may remember what was there before",
        "common.cu",
        "return *(const volatile int*)place;",
        "return *place;",
        noticed_by=PTX,
    ),
    Mutation(
        "load: not from memory at all",
        "common.cu",
        "return *(const volatile int*)place;",
        "return 7;",
        noticed_by=PTX,
    ),
    Mutation(
        "store: forgotten",
        "common.cu",
        "*(volatile int*)place = value;",
        "",
        noticed_by=PTX,
    ),
    Mutation(
        "own_chunk: 32 bits for the offset of a volume",
        "common.cu",
        "(long long)chunk.volume * n_voxels",
        "chunk.volume * n_voxels",
        noticed_by="voxels",
    ),
    Mutation(
        "own_list: 32 bits for the offset of a list",
        "common.cu",
        "(long long)blockIdx.x * CHUNK",
        "blockIdx.x * CHUNK",
        noticed_by="voxels",
    ),
    Mutation(
        "count_digits: 32 bits for the offset of a volume",
        "select.cu",
        "(long long)volume * n_voxels",
        "volume * n_voxels",
        noticed_by="voxels",
    ),
    Mutation(
        "count_digits: 32 bits for the offset of a histogram",
        "select.cu",
        "long long job = (long long)volume * n_ranks + rank;",
        "int job = volume * n_ranks + rank;",
        noticed_by="voxels",
    ),
    Mutation(
        "pick_digit: 32 bits for the offset of a histogram",
        "select.cu",
        "(long long)blockIdx.x * DIGITS",
        "blockIdx.x * DIGITS",
        noticed_by="voxels",
    ),
    Mutation(
        "number_chunks: 32 bits for the offset of a volume's chunks",
        "components.cu",
        "(long long)blockIdx.x * chunks",
        "blockIdx.x * chunks",
        noticed_by="chunks",
    ),
    Mutation(
        "gather_labelled: 32 bits for the number of voxels before",
        "components.cu",
        "long long begin = blockIdx.x ? ends[blockIdx.x - 1] : 0;",
        "int begin = blockIdx.x ? ends[blockIdx.x - 1] : 0;",
        noticed_by="labelled voxels",
    ),
    Mutation(
        "NaN sorts by its bits",
        "common.cu",
        "if ((bits & ~SIGN) > INFINITE) return ~(Bits)0;",
        "",
    ),
    Mutation(
        "negative values sort by magnitude",
        "common.cu",
        "return bits & SIGN ? ~bits : bits | SIGN;",
        "return bits ^ SIGN;",
    ),
    Mutation(
        "-0 takes the key of 0, which moves every negative value",
        "common.cu",
        "return bits & SIGN ? ~bits : bits | SIGN;",
        "return bits & SIGN ? ~bits + 1 : bits | SIGN;",
    ),
    Mutation(
        "sum_before: sums of warps read before all are there",
        "common.cu",
        "if (lane == 31) warp_sums[warp] = sum;\n    __syncthreads();",
        "if (lane == 31) warp_sums[warp] = sum;",
    ),
    Mutation(
        "sum_before: the next call may write while this one reads",
        "common.cu",
        "__syncthreads();  // before the next call writes",
        "",
        noticed_by="voxels of components",
    ),
    Mutation(
        "list_marked: places read before all rows have theirs",
        "common.cu",
        "total += strip;\n    }\n    __syncthreads();",
        "total += strip;\n    }",
        noticed_by="voxels of components",
    ),
    Mutation(
        "read_chunk: reads beyond the end of the batch",
        "common.cu",
        "values[j] = i < n_voxels ? maps[i] : 0;",
        "values[j] = maps[i];",
    ),
    Mutation(
        "count_digits: reads beyond the end of the batch",
        "select.cu",
        "values[j] = is_member[j] ? maps[offset + i] : 0;",
        "values[j] = maps[offset + i];",
    ),
    Mutation(
        "count_digits: reads beyond the end of the population",
        "select.cu",
        "is_member[j] && population[offset + from + j * step]",
        "population[offset + from + j * step] && is_member[j]",
    ),
    Mutation(
        "count_digits: counting begins before the counters are cleared",
        "select.cu",
        "smallest_above[0] = ~(Bits)0;\n    __syncthreads();",
        "smallest_above[0] = ~(Bits)0;",
    ),
    Mutation(
        "count_digits: counters are written out while others count",
        "select.cu",
        "atomicMin(smallest_above, smallest);\n    __syncthreads();",
        "atomicMin(smallest_above, smallest);",
    ),
    Mutation(
        "count_digits: additions within a block get lost",
        "select.cu",
        "\n    if (repetitions) atomicAdd(counts + last_digit, repetitions);",
        "\n    if (repetitions) counts[last_digit] += repetitions;",
        noticed_by="neighbouring ranks",
    ),
    Mutation(
        "count_digits: additions of blocks get lost",
        "select.cu",
        "atomicAdd(histograms + job * DIGITS + digit, counts[digit]);",
        "store(histograms + job * DIGITS + digit,"
        " load(histograms + job * DIGITS + digit) + counts[digit]);",
    ),
    Mutation(
        "count_digits: the smallest key above is not the minimum of all threads",
        "select.cu",
        "atomicMin(smallest_above, smallest);",
        "if (smallest < smallest_above[0]) smallest_above[0] = smallest;",
        noticed_by="neighbouring ranks",
    ),
    Mutation(
        "count_digits: the smallest key above is not the minimum of all blocks",
        "select.cu",
        "atomicMin(next + job, smallest_above[0]);",
        "if (smallest_above[0] < next[job]) next[job] = smallest_above[0];",
        noticed_by="neighbouring ranks",
    ),
    Mutation(
        "count_digits: the last key above instead of the smallest",
        "select.cu",
        "above > prefix && key < smallest",
        "above > prefix",
    ),
    Mutation(
        "count_digits: every volume has the population of the first",
        "select.cu",
        "population[offset + from + j * step]",
        "population[from + j * step]",
    ),
    Mutation(
        "pick_digit: the prefix is shifted by the wrong digit's width",
        "select.cu",
        "Bits above = prefixes[blockIdx.x] << digit_bits;",
        "Bits above = prefixes[blockIdx.x] << 11;",
    ),
    Mutation(
        "pick_digit: the rank still counts the keys before the digit",
        "select.cu",
        "picked[1] = rank - before;",
        "picked[1] = rank;",
    ),
    Mutation(
        "pick_digit: the key after the rank is never an equal one",
        "select.cu",
        "if (is_last && picked[1] + 1 < histogram[digit]) {",
        "if (false) {",
    ),
    Mutation(
        "pick_digit: the key after the rank is always an equal one",
        "select.cu",
        "picked[1] + 1 < histogram[digit]",
        "picked[1] < histogram[digit]",
    ),
    Mutation(
        "pick_digit: the histogram is cleared while others read it",
        "select.cu",
        "ranks[blockIdx.x] = picked[1];\n    }\n    __syncthreads();",
        "ranks[blockIdx.x] = picked[1];\n    }",
        noticed_by="neighbouring ranks",
    ),
    Mutation(
        "threshold: a voxel at the cut-off is background",
        "components.cu",
        "magnitude >= cutoff",
        "magnitude > cutoff",
    ),
    Mutation(
        "threshold: NaN is foreground",
        "components.cu",
        "magnitude >= cutoff && magnitude <= INFINITE",
        "magnitude >= cutoff",
    ),
    Mutation(
        "join: a link made by another thread is forgotten",
        "components.cu",
        "one = before;  // somebody else has linked it meanwhile: that link has to be kept too",
        "return;",
    ),
    Mutation(
        "join: links overwrite each other",
        "components.cu",
        "int before = atomicMin(parents + one, other + 1) - 1;",
        "int before = one;\n        store(parents + one, other + 1);",
    ),
    Mutation(
        "join: minimum without an atomic",
        "components.cu",
        "int before = atomicMin(parents + one, other + 1) - 1;",
        "int before = parents[one] - 1;\n        if (other < before) parents[one] = other + 1;",
        noticed_by="one dense component",
    ),
    Mutation(
        "merge: rows wrap around at their end",
        "components.cu",
        "if (z + dz < 0 || z + dz >= nz) continue;",
        "if (z + dz < 0) continue;",
    ),
    Mutation(
        "merge: planes wrap around at their beginning",
        "components.cu",
        "|| y + dy < 0 ||",
        "|| y + dy < (x > 1 ? -1 : 0) ||",  # where the voxel is another one of the volume
    ),
    Mutation(
        "merge: planes wrap around at their end",
        "components.cu",
        " || y + dy >= ny) continue;",
        ") continue;",
    ),
    Mutation(
        "merge: opposite signs join",
        "components.cu",
        "if (by_sign && (maps[i] ^ maps[other]) >= SIGN) continue;",
        "",
    ),
    Mutation(
        "flatten: sizes count in the first volume",
        "components.cu",
        "atomicAdd(sizes + chunk.offset + root, __popc(same));",
        "atomicAdd(sizes + root, __popc(same));",
    ),
    Mutation(
        "flatten: additions to sizes get lost",
        "components.cu",
        "atomicAdd(sizes + chunk.offset + root, __popc(same));",
        "sizes[chunk.offset + root] += __popc(same);",
        noticed_by="one dense component",
    ),
    Mutation(
        "is_kept: a component of min_voxels is too small",
        "components.cu",
        "sizes[voxel] >= min_voxels",
        "sizes[voxel] > min_voxels",
    ),
    Mutation(
        "number_chunks: each strip of chunks starts from nothing",
        "components.cu",
        "int place = before + sum_before(",
        "int place = sum_before(",
    ),
    Mutation(
        "number: small components keep their size as a label",
        "components.cu",
        "if (k < n && parents[list[k]] == list[k] + 1) sizes[list[k]] = kept ? own : 0;",
        "if (kept) sizes[list[k]] = own;",
    ),
    Mutation(
        "number: each strip of a chunk repeats the labels",
        "components.cu",
        "label += total;",
        "",
    ),
    Mutation(
        "gather_labelled: each strip of a chunk is written over the one before",
        "components.cu",
        "begin += total;",
        "",
    ),
    Mutation(
        "list_candidates: a plateau beats itself",
        "maxima.cu",
        "<= height;",
        "< height;",
    ),
    Mutation(
        "list_candidates: a voxel at the floor is a maximum",
        "maxima.cu",
        "height > floor_key;",
        "height >= floor_key;",
    ),
    Mutation(
        "reject_candidates: the window ends a voxel early",
        "maxima.cu",
        "int z_end = z + distance < nz ? z + distance : nz - 1;",
        "int z_end = z + distance < nz ? z + distance - 1 : nz - 1;",
    ),
    Mutation(
        "reject_candidates: rejected in the first volume",
        "maxima.cu",
        "parents[chunk.offset + i] = 0;",
        "parents[i] = 0;",
    ),
    Mutation(
        "smooth_axis: lines wrap around instead of reflecting",
        "smooth.cu",
        "return place < length ? place : period - 1 - place;",
        "return place < length ? place : place - length;",
    ),
    Mutation(
        "smooth_axis: products are summed one by one",
        "smooth.cu",
        "sum += (before + after) * weights[offset];",
        "sum += before * weights[offset] + after * weights[offset];",
    ),
    Mutation(
        "widen: denormals go through a float, which is flushed",
        "smooth.cu",
        "if ((bits & INFINITE) != 0) return (double)__uint_as_float(bits);",
        "return (double)__uint_as_float(bits);",
    ),
    Mutation(
        "narrow: denormals go through a float, which is flushed",
        "smooth.cu",
        "if (magnitude >= SMALLEST_NORMAL) return",
        "return",
    ),
    Mutation(
        "smooth_axis: denormal sums lose their sign",
        "smooth.cu",
        "| (wide < 0 ? SIGN : 0u);",
        ";",
    ),
)


def mutated(mutation, compiler):
    """Return `compiler` with the fault in what it is given."""
    file = (resources.files("gpuroi.backends") / "kernels" / mutation.file).read_text()
    assert file.count(mutation.old) == 1, f"{mutation.name}: not once in {mutation.file}"

    def compile_mutated(source, options):
        assert file in source
        return compiler(source.replace(file, file.replace(mutation.old, mutation.new)), options)

    return compile_mutated


def battery() -> Iterator[tuple[str, Case]]:
    """Yield cases that together notice every fault but the races, with names."""
    for seed, kind in enumerate(KINDS * 5):
        for verb, draw in VERBS.items():
            rng = np.random.default_rng(seed)
            yield f"{verb} of {kind}", draw(random_maps(kind, "float32", rng), rng)
    yield from special("float32").items()
    name = "a kernel wider than the volume"  # float32 rounds away in which order it was summed
    yield name, special("float64")[name]


def how_caught(mutation: Mutation) -> str | None:
    """Return what the fault led to, or None if every answer was right.

    In a process of its own, which may crash or never end.
    """
    command = [sys.executable, "-m", "tests.cuda_on_cpu.mutations", mutation.name]
    with TemporaryDirectory() as folder:  # what a crash leaves behind goes with it
        try:
            done = subprocess.run(
                command,
                cwd=_ROOT,
                env=os.environ | {"TMPDIR": folder},
                capture_output=True,
                text=True,
                check=False,
                timeout=_MOST_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return f"no end within {_MOST_SECONDS} s"
    if done.returncode < 0:
        return f"a crash by signal {-done.returncode}"
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() or None


def _questions(mutation):
    """Yield names, and functions that raise where they notice the fault."""
    by, with_fault = mutation.noticed_by, partial(mutated, mutation)
    if by == PTX:
        yield by, partial(assert_threads_see_what_others_write, with_fault(compile_as_cupy))
    elif by in FAR:
        yield by, partial(FAR[by], with_fault)
    else:
        engine = Threads() if by in CONTENDED else Fibers()
        backend = kernels_on_cpu(with_fault(engine))
        for name, case in [(by, CONTENDED[by])] if by in CONTENDED else battery():
            yield name, partial(case.check, backend)


def _try_out(mutation):
    """Return what the fault led to in this process."""
    for name, ask in _questions(mutation):
        try:
            ask()
        except (NotRunError, CompileError):
            raise
        except Exception as error:  # wrong counts lead to any
            return f"{type(error).__name__} in {name}"
    return None


def main(names):
    """Print how the mutation of that name is caught, or a table of all."""
    by_name = {mutation.name: mutation for mutation in MUTATIONS}
    if names:
        (name,) = names
        sys.stdout.write(_try_out(by_name[name]) or "")
        return
    for name, mutation in by_name.items():
        caught = how_caught(mutation) or "NOT CAUGHT"
        sys.stdout.write(f"{mutation.file:14} {mutation.engine:8} {name:75} {caught}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
