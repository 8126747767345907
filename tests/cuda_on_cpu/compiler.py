"""Compile the CUDA kernels as C++ and run them on the CPU, in the place of `cupy.RawModule`.

Two engines: fibers on one thread, whose order a seed decides, as a shared library; and a thread for
each CUDA thread under ThreadSanitizer, as a program that is run once a launch.
"""

import atexit
import ctypes
import functools
import hashlib
import mmap
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

FOLDER = Path(__file__).parent
_KERNEL = re.compile(r'extern "C" __global__ void (\w+)\(([^)]*)\)')
_CTYPES = {"int": ctypes.c_int, "unsigned": ctypes.c_uint}
# Sums round as on a device: no multiply-add. Alignment and so on are undefined behaviour there too.
_FLAGS = ["-std=c++20", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-w"]
_SANITIZED = ["-O1", "-g", "-fsanitize=thread", "-pthread"]
_NO_ACCESS = 0  # PROT_NONE
_MOST_FENCED = 2**20  # bytes; larger arrays take long to copy for each launch


class RaceError(AssertionError):
    """ThreadSanitizer has seen two threads at one place, or threads wait for ever."""


class NotRunError(Exception):
    """Nothing was learnt about the kernels: they could not be compiled, or not be started."""


@dataclass(frozen=True)
class Parameter:
    """One argument of a kernel."""

    type: str
    name: str

    @property
    def is_pointer(self):
        return self.type.endswith("*")


def kernels_of(source):
    """Return the parameters of each kernel in `source`, by its name."""
    return {
        name: [Parameter(*one.strip().rsplit(" ", 1)) for one in parameters.split(",")]
        for name, parameters in _KERNEL.findall(source)
    }


def compiler_is_missing():
    """Return why no kernel can be compiled here, or None."""
    return None if shutil.which("g++") else "g++ is not installed"


def sanitizer_is_missing():
    """Return why no program runs under ThreadSanitizer here, or None."""
    return _sanitizer()[1]


@functools.cache
def _sanitizer():
    """Return the words in front of a program under ThreadSanitizer, and why there are none."""
    try:
        program = _compile("int main() { return 0; }", _SANITIZED, "")
    except NotRunError as error:
        return [], f"ThreadSanitizer cannot be linked: {error}"
    # Its shadow memory has fixed addresses. Random ones of the program's may lie within
    # ("unexpected memory mapping"), on some kernels now and then: better none are random.
    setarch = shutil.which("setarch")
    for words in ([setarch, platform.machine(), "-R"] if setarch else [], []):
        done = subprocess.run([*words, str(program)], capture_output=True, check=False)
        if done.returncode == 0:
            return words, None
    return [], f"ThreadSanitizer cannot start: {done.stderr.decode(errors='replace')[:500]}"


def _compile(code, flags, suffix):
    """Return the path of a compiled `code`, made once a session."""
    key = hashlib.sha256(repr((code, flags, suffix)).encode()).hexdigest()[:16]
    path = Path(_session_folder().name) / f"{key}{suffix}"
    if not path.exists():
        command = ["g++", "-x", "c++", "-", *_FLAGS, *flags, f"-I{FOLDER}", "-o", str(path)]
        try:
            subprocess.run(command, input=code, text=True, capture_output=True, check=True)
        except FileNotFoundError as error:
            raise NotRunError("g++ is not installed") from error
        except subprocess.CalledProcessError as error:
            raise NotRunError(error.stderr) from error
    return path


@functools.cache
def _session_folder():
    folder = TemporaryDirectory(prefix="gpuroi-kernels-")
    atexit.register(folder.cleanup)
    return folder


def _defines(options):
    return [option for option in options if option.startswith("-D")]


class Fibers:
    """A `gpuroi.backends._kernels.Compiler`; every launch has another order of threads.

    `chosen` says from a launch's number of blocks which of them run.
    """

    def __init__(self, seed=0, chosen=np.arange):
        self._seeds = np.random.default_rng(seed)
        self._chosen = chosen

    def __call__(self, source, options):
        kernels = kernels_of(source)
        wrappers = [
            f'extern "C" int run_{name}(const unsigned* numbers, unsigned blocks, '
            + "unsigned threads, unsigned seed, "
            + ", ".join(f"{one.type} {one.name}" for one in parameters)
            + ") { return engine::launch(numbers, blocks, threads, seed, [=] { "
            + f"{name}({', '.join(one.name for one in parameters)}); }}); }}"
            for name, parameters in kernels.items()
        ]
        code = "\n".join(['#include "fibers.h"', '#include "device.h"', source, *wrappers])
        path = _compile(code, ["-O1", "-shared", "-fPIC", *_defines(options)], ".so")
        return _FibersModule(ctypes.CDLL(str(path)), kernels, self._seeds, self._chosen)


@dataclass(frozen=True)
class _FibersModule:
    library: ctypes.CDLL
    kernels: dict
    seeds: np.random.Generator
    chosen: Callable[[int], Sequence[int]]

    def get_function(self, name):
        def run(blocks, threads, arguments):
            passed = [
                (parameter, argument, _fenced(argument))
                for parameter, argument in zip(self.kernels[name], arguments, strict=True)
            ]
            words = [_by_ctypes(parameter, copy) for parameter, _, copy in passed]
            numbers = np.array(self.chosen(*blocks), np.uint32)
            grid = map(ctypes.c_uint, (numbers.size, *threads, self.seeds.integers(2**32)))
            function = getattr(self.library, f"run_{name}")
            if function(ctypes.c_void_p(numbers.ctypes.data), *grid, *words):
                raise RaceError(f"{name}: threads wait at a barrier for others that have ended")
            for parameter, argument, copy in passed:
                if copy is not argument and not parameter.type.startswith("const"):
                    argument[...] = copy

        return run


def _fenced(argument):
    """Return a copy of an array, a page behind it that nobody may touch: reading on is a crash."""
    if not isinstance(argument, np.ndarray):
        return argument
    assert argument.flags.c_contiguous
    if argument.nbytes > _MOST_FENCED:
        return argument
    end = -(-argument.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, end + mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    fence = ctypes.addressof(ctypes.c_char.from_buffer(memory, end))
    failed = _libc().mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(mmap.PAGESIZE), _NO_ACCESS)
    assert not failed, "no page can be fenced off"
    copy = np.ndarray(argument.shape, argument.dtype, memory, end - argument.nbytes)
    copy[...] = argument
    return copy


@functools.cache
def _libc():
    return ctypes.CDLL(None)


def _by_ctypes(parameter, argument):
    if not parameter.is_pointer:
        assert argument.itemsize == 4, f"{parameter.name} has another size on a device"
        return _CTYPES[parameter.type](int(argument))
    if isinstance(argument, np.ndarray):
        return ctypes.c_void_p(argument.ctypes.data)
    assert argument == 0
    assert argument.itemsize == ctypes.sizeof(ctypes.c_void_p)
    return ctypes.c_void_p(0)


class Threads:
    """A `gpuroi.backends._kernels.Compiler` whose launches raise `RaceError` on a data race."""

    def __call__(self, source, options):
        kernels = kernels_of(source)
        cases = []
        for name, parameters in kernels.items():
            arguments = [
                f"({one.type})pointer({place})"
                if one.is_pointer
                else f"({one.type})scalar({place})"
                for place, one in enumerate(parameters)
            ]
            cases.append(
                f'if (name == "{name}") kernel = [] {{ {name}({", ".join(arguments)}); }};'
            )
        program = (FOLDER / "program.cpp").read_text().replace("// CASES", "\n    ".join(cases))
        code = "\n".join(['#include "threads.h"', '#include "device.h"', source, program])
        words, reason = _sanitizer()
        if reason is not None:
            raise NotRunError(reason)
        program = _compile(code, [*_SANITIZED, *_defines(options)], "")
        return _ThreadsModule([*words, str(program)], kernels)


@dataclass(frozen=True)
class _ThreadsModule:
    command: list
    kernels: dict

    def get_function(self, name):
        def run(blocks, threads, arguments):
            parts = [f"{name} {blocks[0]} {threads[0]} {len(arguments)}\n".encode()]
            arrays = [one for one in arguments if isinstance(one, np.ndarray)]
            for parameter, one in zip(self.kernels[name], arguments, strict=True):
                if not isinstance(one, np.ndarray):
                    assert one.itemsize == (8 if parameter.is_pointer else 4)
                is_array = isinstance(one, np.ndarray)
                size, value = (one.nbytes, 0) if is_array else (-1, int(one))
                parts += [f"{size} {value}\n".encode(), one.tobytes() if is_array else b""]
            done = subprocess.run(
                self.command,
                input=b"".join(parts),
                capture_output=True,
                check=False,
                timeout=120,
                env={"TSAN_OPTIONS": "exitcode=66 halt_on_error=1"},
            )
            if done.returncode != 0:
                error = NotRunError if b"FATAL: ThreadSanitizer" in done.stderr else RaceError
                raise error(f"{name}: {done.stderr.decode(errors='replace')[:4000]}")
            after = memoryview(done.stdout)
            for array in arrays:
                flat = np.frombuffer(after[: array.nbytes], array.dtype)
                array[...] = flat.reshape(array.shape)
                after = after[array.nbytes :]

        return run
