"""CUDA kernels on a CPU, for tests: `device.h` makes g++ compile them, and this module runs what it made.

A library is built once for each kernel, setting and source, into the user's cache folder.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

from implementations.kernels import CudaKernel

_HEADER = Path(__file__).with_name("device.h")
_FLAGS = ("-std=c++17", "-O2", "-ftree-vectorize", "-fno-math-errno", "-fno-strict-aliasing", "-w")
_FLAGS += ("-shared", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique")  # each library has its own state
_ONE_AT_A_TIME = threading.Lock()
_WRAPPER = """
#include "{source}"
extern "C" __attribute__((visibility("default")))
const char* launch(const void* arguments, int grid, int cluster, int threads, long shared, int order) {{
    using namespace ttt::emulator;
    ttt::emulator::arguments = arguments;
    ttt::emulator::order = order;
    body = [](const void* given) {{ call({expression}, given); }};
    return run(grid, cluster, threads, shared) ? nullptr : error;
}}
"""


class EmulatorError(RuntimeError):
    """A kernel does not compile for the CPU, or does what a GPU would not do or forgive."""


def missing() -> str | None:
    """Why nothing can be emulated here, or None."""
    if os.name != "posix":
        return "CUDA kernels run on a CPU where POSIX and g++ are, and only there"
    return None if shutil.which("g++") else "g++ is not installed, which compiles CUDA kernels for a CPU"


def run(kernel: CudaKernel, grid: int, arguments: bytes, order: int = 0) -> None:
    """Run `grid` blocks of `kernel` with `arguments`, the bytes of its struct; threads take turns from 0 up, or down.

    Raises:
        EmulatorError: g++ is missing or refuses the kernel, or the kernel did something wrong; the message says what.
    """
    function = _library(kernel, _sources_hash(kernel.source.parent)).launch
    function.restype = ctypes.c_char_p
    with _ONE_AT_A_TIME:
        error = function(
            arguments, grid, kernel.cluster, kernel.threads, ctypes.c_long(kernel.dynamic_shared_bytes), order
        )
    if error:
        raise EmulatorError(f"{kernel.name}: {error.decode()}")


def _sources_hash(folder: Path) -> str:
    """Of all that a kernel there may include."""
    digest = hashlib.sha256()
    for path in (_HEADER, *sorted(folder.glob("*.cu*"))):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _library(kernel: CudaKernel, sources: str) -> ctypes.CDLL:
    if reason := missing():
        raise EmulatorError(reason)
    defines = [option for option in kernel.options if option.startswith("-D")]
    wrapper = _WRAPPER.format(source=kernel.source.resolve(), expression=kernel.expression)
    key = hashlib.sha256("\0".join((sources, wrapper, *_FLAGS, *defines, _compiler())).encode()).hexdigest()[:24]
    built = _cache_folder() / f"{key}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            made = Path(folder) / "kernel.so"
            include = f"-I{_HEADER.parent.parent / 'kernels'}"  # where device.cuh is, for a kernel from elsewhere
            command = ["g++", *_FLAGS, *defines, include, "-x", "c++", "-", "-o", str(made)]
            done = subprocess.run(command, input=wrapper, capture_output=True, text=True, check=False)
            if done.returncode:
                raise EmulatorError(f"{kernel.name}: g++ refuses it: {_first_error(done.stderr)}")
            made.replace(built)  # at once, or not at all: other processes build the same
    return ctypes.CDLL(str(built))


@functools.cache
def _compiler() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout.partition("\n")[0]


def _first_error(log: str) -> str:
    lines = log.strip().splitlines() or ["no message"]
    return next((line for line in lines if "error" in line), lines[-1])


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "ttt-lab" / "cuda-emulator"
