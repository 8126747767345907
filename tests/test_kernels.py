"""The CUDA kernels, compiled as C++ for a CPU and by NVIDIA's compiler for devices not here."""

import re
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from gpuroi.backends._kernels import KernelVerbs, source
from gpuroi.backends.cpu import CpuBackend
from gpuroi.testing import KINDS, BackendContract, make_maps
from gpuroi.types import CONNECTIVITIES
from tests.cuda_on_cpu import (
    kernels_on_cpu,
    library_on_cpu,
    needs_compiler,
    on_cpu,
    skipped_for,
)
from tests.cuda_on_cpu.cases import CONTENDED, VERBS, Case, random_maps, snake, special, spiral
from tests.cuda_on_cpu.compiler import (
    Fibers,
    RaceError,
    Threads,
    kernels_of,
    sanitizer_is_missing,
)
from tests.cuda_on_cpu.far import FAR
from tests.cuda_on_cpu.mutations import MUTATIONS, battery, how_caught, mutated
from tests.cuda_on_cpu.nvrtc import (
    CompileError,
    assert_threads_see_what_others_write,
    body_of,
    compile_as_cupy,
    cuda_compiler,
    cuda_compiler_is_missing,
)

DTYPES = ("float32", "float64")

#: Chunks are 256 voxels in these tests, and 4096 where order statistics count.
SHAPES_AT_CHUNKS = {
    "a voxel": (3, 1, 1, 1),
    "a chunk": (2, 4, 8, 8),
    "a chunk and a voxel, along x": (2, 257, 1, 1),
    "a chunk and a voxel, along z": (2, 1, 1, 257),
    "two chunks less a voxel": (3, 7, 73, 1),
    "two chunks and a voxel": (2, 27, 1, 19),
    "a chunk of counting": (2, 16, 16, 16),
    "a chunk of counting and a voxel": (2, 17, 241, 1),
    "three chunks of counting": (1, 12, 32, 32),
}

#: Of all generations that CuPy 14 supports.
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)

needs_cuda_compiler = skipped_for(cuda_compiler_is_missing())


class Launches:
    """A compiler whose kernels write down their numbers of blocks; without another, they rest."""

    def __init__(self, compiler=None):
        self.blocks = {}
        self.compiled = []
        self._compiler = compiler

    def __call__(self, code, options):
        self.compiled.append((code, options))
        module = self._compiler and self._compiler(code, options)

        def get_function(name):
            def launch(blocks, threads, arguments):
                self.blocks.setdefault(name, []).extend(blocks)
                if module:
                    module.get_function(name)(blocks, threads, arguments)

            return launch

        return SimpleNamespace(get_function=get_function)


@needs_compiler
class TestKernelsOnFibers(BackendContract):
    @pytest.fixture
    def backend(self):
        return kernels_on_cpu()


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", VERBS)
def test_random_questions_in_another_order_of_threads_each(verb, kind, dtype):
    library = library_on_cpu()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        case = VERBS[verb](random_maps(kind, dtype, rng), rng)
        case.check(kernels_on_cpu(Fibers(seed)), library)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES_AT_CHUNKS.values(), ids=SHAPES_AT_CHUNKS)
@pytest.mark.parametrize("verb", VERBS)
def test_volumes_as_large_as_chunks(verb, shape, dtype):
    for seed in range(8):
        maps = make_maps(KINDS[seed % len(KINDS)], shape, dtype, seed)
        VERBS[verb](maps, np.random.default_rng(seed)).check(kernels_on_cpu(Fibers(seed)))


@needs_compiler
@pytest.mark.parametrize(("threads", "items"), [(256, 16), (32, 64), (96, 1)])
@pytest.mark.parametrize("verb", VERBS)
def test_blocks_of_every_size(verb, threads, items):
    backend = on_cpu(KernelVerbs(np, Fibers(), threads, items))
    for seed, kind in enumerate(KINDS):
        rng = np.random.default_rng(seed)
        for shape in ((2, 17, 17, 17), (3, 5, 6, 7)):
            VERBS[verb](make_maps(kind, shape, "float32", seed), rng).check(backend)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", special("float32"))
def test_special_questions(name, dtype):
    special(dtype)[name].check(kernels_on_cpu())


@needs_compiler
@pytest.mark.parametrize("connectivity", CONNECTIVITIES)
@pytest.mark.parametrize("path", [spiral(31), snake(13)], ids=["spiral", "snake"])
def test_a_path_is_one_region_in_whatever_order_its_links_are_made(path, connectivity):
    case = Case("components", (path, np.ones(1, np.float32), "both", connectivity, 1))
    labels, counts = CpuBackend().components(*case.arguments)
    assert counts.tolist() == [1]
    np.testing.assert_array_equal(labels, path.astype(np.int32))
    for seed in range(30):
        case.check(kernels_on_cpu(Fibers(seed)))


@needs_compiler
def test_minus_zero_comes_before_zero():
    values = np.random.default_rng(0).permuted([0.0, -0.0, 1e-45, -1e-45] * 5)
    maps = values.astype(np.float32).reshape(1, 4, 5, 1)
    found = kernels_on_cpu().order_statistics(maps, np.arange(20)[np.newaxis], False, None)
    assert np.signbit(found[0]).tolist() == [True] * 10 + [False] * 10
    assert (found[0] == 0).tolist() == [False] * 5 + [True] * 10 + [False] * 5


@needs_compiler
@pytest.mark.parametrize("ranks", [(8, 9), (9, 9), (9, 8), (9, 3), (3, 9, 3)], ids=str)
def test_ranks_in_any_order(ranks):
    maps = make_maps("noise", (2, 4, 5, 6), "float32", 0)
    Case("order_statistics", (maps, np.array([ranks] * 2), True, None)).check(kernels_on_cpu())


@needs_compiler
def test_populations_of_any_memory_layout():
    maps = make_maps("noise", (2, 5, 6, 7), "float32", 0)
    population = np.asfortranarray(np.random.default_rng(0).random(maps.shape) < 0.5)
    ranks = np.array([[3, 4], [50, 51]])
    Case("order_statistics", (maps, ranks, False, population)).check(kernels_on_cpu())


@needs_compiler
@pytest.mark.parametrize(("cutoff", "is_gathered"), [(1.0, False), (1.5, True), (99.0, True)])
def test_few_voxels_are_gathered_and_many_come_with_the_background(cutoff, is_gathered):
    launches = Launches(Fibers())
    maps = make_maps("plateaus", (3, 6, 7, 8), "float32", 0)
    cutoffs = np.full(3, cutoff, np.float32)
    Case("component_voxels", (maps, cutoffs, "both", 26, 1)).check(kernels_on_cpu(launches))
    assert ("gather_labelled" in launches.blocks) == is_gathered


@needs_compiler
def test_a_batch_of_nothing_is_answered_without_a_launch():
    launches = Launches(Fibers())
    maps, none = np.zeros((0, 3, 4, 5), np.float32), np.zeros(0, np.float32)
    for case in (
        Case("order_statistics", (maps, np.zeros((0, 2), np.int64), True, None)),
        Case("order_statistics", (maps, np.zeros((0, 3), np.int64), False, maps > 0)),
        Case("components", (maps, none, "both", 6, 1)),
        Case("component_voxels", (maps, none, "both", 6, 1)),
        Case("smooth", (maps, (1.0, 0.0, 2.0))),
        Case("local_maxima", (maps, 2, none)),
    ):
        case.check(kernels_on_cpu(launches))
    assert launches.blocks == {}


def test_a_volume_beyond_32_bits_is_refused():
    kernels = KernelVerbs(np, Launches())
    maps = np.broadcast_to(np.float32(1), (1, 2**11, 2**10, 2**10))
    at_1 = np.ones(1, np.float32)
    for verb, *arguments in (
        ("order_statistics", np.zeros((1, 2), np.int64), True, None),
        ("components", at_1, "both", 6, 1),
        ("component_voxels", at_1, "both", 6, 1),
        ("smooth", (1.0, 1.0, 1.0)),
        ("local_maxima", 1, at_1),
    ):
        with pytest.raises(ValueError, match="a volume of 2147483648 voxels is too large"):
            getattr(kernels, verb)(maps, *arguments)


@needs_compiler
@pytest.mark.parametrize("what", FAR)
def test_offsets_beyond_32_bits_are_right(what):
    FAR[what](lambda compiler: compiler)


@pytest.fixture(scope="module")
def threads():
    if (reason := sanitizer_is_missing()) is not None:
        pytest.skip(reason)
    return Threads()


@needs_compiler
def test_contended_cases_launch_every_kernel_in_several_blocks():
    launches = Launches(Fibers())
    for case in CONTENDED.values():
        case.check(kernels_on_cpu(launches))
    assert set(launches.blocks) == set(kernels_of(source()))
    assert min(min(blocks) for blocks in launches.blocks.values()) >= 2


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", CONTENDED)
def test_no_two_threads_meet_at_one_place(threads, name):
    CONTENDED[name].check(kernels_on_cpu(threads))


@needs_compiler
def test_threads_that_do_meet_are_noticed(threads):
    """Neither answers nor races pass unseen: the sanitizer's verdict comes through as an error."""
    with pytest.raises(RaceError, match="data race"):
        CONTENDED["one dense component"].check(
            kernels_on_cpu(mutated(_named("flatten: additions to sizes get lost"), threads))
        )


#: Kernels in which threads meet; in `reverse` alone a barrier lies between whatever two of them do.
MEETINGS = """
__device__ void reach(int* found) {
    if (threadIdx.x == 0 && (int)blockIdx.x >= found[0]) found[0] = blockIdx.x + 1;
}
extern "C" __global__ void before_a_barrier(int* found) { reach(found); __syncthreads(); }
extern "C" __global__ void after_a_barrier(int* found) { __syncthreads(); reach(found); }
extern "C" __global__ void after_a_vote(int* found) { if (__any_sync(ALL, 1)) reach(found); }
extern "C" __global__ void after_others_have_ended(int* found) {
    if (threadIdx.x > 40) return;
    __syncthreads();
    reach(found);
}
extern "C" __global__ void within_a_warp_after_a_vote(int* found) {
    if (__any_sync(ALL, 1) && threadIdx.x < 2) found[64 * blockIdx.x] = threadIdx.x;
}
extern "C" __global__ void reverse(int* found) {
    SHARED(int, places, 64);
    for (int step = 0; step < 3 && (int)threadIdx.x < 64 - step; step++) {
        places[threadIdx.x] = threadIdx.x;
        __syncthreads();
        found[64 * blockIdx.x + threadIdx.x] = places[63 - step - threadIdx.x];
        __syncthreads();
    }
}
"""


@needs_compiler
@pytest.mark.parametrize("name", kernels_of(MEETINGS))
def test_barriers_put_in_order_what_a_block_does_and_nothing_else(threads, name):
    found = np.zeros((3, 64), np.int32)
    is_ordered = name == "reverse"
    with nullcontext() if is_ordered else pytest.raises(RaceError, match="data race"):
        threads(f"#define ALL 0xffffffffu{MEETINGS}", ()).get_function(name)((3,), (64,), (found,))
    if is_ordered:
        np.testing.assert_array_equal(found[:, :62], [np.arange(61, -1, -1)] * 3)


def _named(name):
    return next(mutation for mutation in MUTATIONS if mutation.name == name)


@needs_compiler
def test_kernels_without_a_fault_pass_the_battery():
    backend = kernels_on_cpu()
    for _, case in battery():
        case.check(backend)


def test_every_fault_finds_its_place_once():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    for mutation in MUTATIONS:
        compiled = Launches()
        mutated(mutation, compiled)(source(), ())
        ((code, _),) = compiled.compiled
        assert code != source()


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    "mutation",
    [
        pytest.param(one, id=one.name, marks=[needs_cuda_compiler] * (one.engine == "NVRTC"))
        for one in MUTATIONS
    ],
)
def test_every_fault_is_noticed(mutation, request):
    if mutation.engine == "threads":
        request.getfixturevalue("threads")
    assert how_caught(mutation) is not None


def _compiled_for(architecture, dtype, **replaced):
    """Return the code that CuPy would load, compiled as the backend has it compiled."""
    launches = Launches()
    KernelVerbs(np, launches).smooth(np.zeros((1, 2, 2, 2), dtype), (1.0, 1.0, 1.0))
    ((code, options),) = launches.compiled
    options = [replaced.get(option, option) for option in options]
    return compile_as_cupy(code, options, architecture)


@needs_cuda_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_without_a_warning(architecture, dtype):
    compiler = cuda_compiler()
    if architecture not in compiler.architectures:
        assert compiler.version < (13, 0)
        pytest.skip(f"CUDA {compiler.version} knows no sm_{architecture}")
    code = _compiled_for(f"sm_{architecture}", dtype)
    for name in kernels_of(source()):
        assert f".text.{name}\0".encode() in code


@needs_cuda_compiler
def test_a_warning_of_the_compiler_is_an_error():
    with pytest.raises(CompileError, match='variable "unused" was declared but never referenced'):
        cuda_compiler().compile("__global__ void kernel() { int unused; }", (), "sm_90")


@needs_cuda_compiler
def test_threads_see_what_others_write():
    assert_threads_see_what_others_write(compile_as_cupy)


@needs_cuda_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_the_gaussian_are_not_fused(dtype):
    def instructions(**replaced):
        body = body_of("smooth_axis", _compiled_for("compute_90", dtype, **replaced))
        return set(re.findall(r"\b(?:fma|mul|add)\.\S*f64\b", body))

    # Without ".rn" the assembler might still fuse them.
    assert instructions() == {"mul.rn.f64", "add.rn.f64"}
    assert "fma.rn.f64" in instructions(**{"-fmad=false": "-fmad=true"})
