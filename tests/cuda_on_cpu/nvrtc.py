"""Compile CUDA for devices that are not here: by NVRTC from the pip wheel, or else by nvcc."""

import ctypes
import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from gpuroi.backends._kernels import source


class CompileError(AssertionError):
    """The compiler has refused the source, or has warned of something in it."""


def cuda_compiler_is_missing():
    """Return why no CUDA can be compiled here, or None."""
    if find_library() or shutil.which("nvcc"):
        return None
    return "neither nvidia-cuda-nvrtc nor nvcc is installed"


def cuda_compiler():
    """Return NVRTC where the wheel is installed, else nvcc."""
    reason = cuda_compiler_is_missing()
    assert reason is None, reason
    return Nvrtc(find_library()) if find_library() else Nvcc()


@functools.cache
def find_library():
    """Return the path of the newest NVRTC among NVIDIA's wheels, or None."""
    spec = importlib.util.find_spec("nvidia")  # a namespace, one folder for each place of wheels
    folders = spec.submodule_search_locations if spec else []
    paths = [path for folder in folders for path in Path(folder).glob("*/lib/libnvrtc.so.*")]
    return max(paths, key=lambda path: int(path.suffix[1:]), default=None)


def compile_as_cupy(source, options, architecture="compute_90"):
    """Return what CuPy has a device load: see `Nvrtc.compile`."""
    return cuda_compiler().compile(source, [*options, "-ftz=true"], architecture)


def body_of(kernel, ptx):
    """Return the instructions of a kernel."""
    (body,) = re.findall(rf"\.entry {kernel}\(.*?\n\}}", ptx.decode(), re.DOTALL)
    return body


def assert_threads_see_what_others_write(compiler):
    """Assert that threads read trees from memory each time, and write them there."""
    ptx = compiler(source(), ())
    for kernel, needed in {"merge": {"ld"}, "flatten": {"ld", "st"}}.items():
        found = re.findall(r"\b(ld|st)\.(?:volatile|relaxed)\b", body_of(kernel, ptx))
        assert set(found) == needed, kernel


class Nvrtc:
    """CUDA's compiler as a library: what CuPy calls on a device."""

    def __init__(self, path):
        self._library = ctypes.CDLL(str(path))
        major, minor, n = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call("Version", ctypes.byref(major), ctypes.byref(minor))
        self._call("GetNumSupportedArchs", ctypes.byref(n))
        known = (ctypes.c_int * n.value)()
        self._call("GetSupportedArchs", known)
        self.version, self.architectures = (major.value, minor.value), set(known)

    def compile(self, source, options, architecture):
        """Return a CUBIN for an architecture like sm_90, PTX for one like compute_90."""
        program = ctypes.c_void_p()
        self._call(
            *("CreateProgram", ctypes.byref(program), source.encode(), b"kernels.cu"),
            *(0, None, None),
        )
        words = [f"-arch={architecture}".encode(), *(option.encode() for option in options)]
        outcome = self._library.nvrtcCompileProgram(
            program, len(words), (ctypes.c_char_p * len(words))(*words)
        )
        log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if outcome or log:
            raise CompileError(f"NVRTC {self.version} for {architecture}: {log}")
        code = self._read(program, "CUBIN" if architecture.startswith("sm_") else "PTX")
        self._call("DestroyProgram", ctypes.byref(program))
        return code

    def _read(self, program, what):
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", program, code)
        return code.raw

    def _call(self, name, *arguments):
        outcome = getattr(self._library, f"nvrtc{name}")(*arguments)
        assert outcome == 0, f"nvrtc{name} returned {outcome}"


class Nvcc:
    """The compiler of a CUDA toolkit."""

    def __init__(self):
        release = re.search(r"release (\d+)\.(\d+)", self._run("--version"))
        self.version = tuple(map(int, release.groups()))
        self.architectures = set(
            map(int, re.findall(r"sm_(\d+)$", self._run("--list-gpu-code"), re.M))
        )

    def compile(self, source, options, architecture):
        """Return a CUBIN for an architecture like sm_90, PTX for one like compute_90."""
        with TemporaryDirectory() as folder:
            path, out = Path(folder, "kernels.cu"), Path(folder, "compiled")
            path.write_text(source)
            kind = "-cubin" if architecture.startswith("sm_") else "-ptx"
            strict = ("-Werror", "all-warnings")
            self._run(kind, f"-arch={architecture}", *strict, *options, str(path), "-o", str(out))
            return out.read_bytes()

    def _run(self, *words):
        done = subprocess.run(["nvcc", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompileError(done.stderr)
        return done.stdout
