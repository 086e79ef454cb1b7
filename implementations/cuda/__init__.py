"""TTT layers in raw CUDA: numba.cuda to read, and CUDA C++ through CuPy, a ladder of rungs from plain to fast."""

import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from implementations.cuda.linear_split_limits import limit as linear_split_limit
from implementations.cuda.mlp_registers_limits import limit as mlp_registers_limit
from implementations.cuda.plain_limits import limit as plain_limit
from implementations.registry import Implementation
from spec.cost import flops
from spec.problem import Problem

Supports = Callable[[Problem], str | None]
_DTYPES = ("fp32", "bf16", "fp16")
# A Python thread for each CUDA thread: a floating-point operation takes microseconds, and a check runs each pass twice.
_SIMULATED_FLOPS = 1_100_000
_EMULATED_FLOPS = 300_000_000  # of C++, a fiber for each CUDA thread


def _numba_limits(problem: Problem) -> str | None:
    if problem.matmul_precision == "tf32":
        return "plain fp32 arithmetic: no tensor cores, and so no tf32"
    return _numba_fault()


def _numba_fault() -> str | None:
    """Why the installed numba-cuda cannot be imported beside the other packages; it would be a crash otherwise."""
    try:
        cuda, numba, numpy = (version(name) for name in ("numba-cuda", "numba", "numpy"))
    except PackageNotFoundError:  # said by `requires`
        return None
    if _numbers(cuda) < (0, 30, 4) and _numbers(numba) >= (0, 68):
        return f"numba-cuda {cuda} does not import beside numba {numba}: it takes numba-cuda 0.30.4"
    if _numbers(cuda) <= (0, 30, 4) and _numbers(numpy) >= (2, 5):
        return f"numba-cuda {cuda} does not import beside NumPy {numpy}, which has no row_stack: it takes numpy<2.5"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())


def _simulator_limits(problem: Problem) -> str | None:
    return "the simulator takes minutes at this size" if flops(problem, "forward") > _SIMULATED_FLOPS else None


def _emulator_limits(problem: Problem) -> str | None:
    if not shutil.which("g++"):
        return "CUDA C++ runs on a CPU in an emulator that g++ compiles, and g++ is not installed"
    return "the emulator takes minutes at this size" if flops(problem, "forward") > _EMULATED_FLOPS else None


def _cupy(key: str, pages: dict[str, str], supports: Supports, kernels: str = "") -> Implementation:
    """A rung in CUDA C++; what a machine lacks to run it on a GPU is found out there, and said in a line."""
    return Implementation(
        key,
        "torch",
        pages,
        dtypes=_DTYPES,
        supports=supports,
        supports_on_cpu=_emulator_limits,
        kernels=kernels,
        timed_on=("cuda",),
    )


ENTRIES = (
    Implementation(
        "cuda.numba",
        "torch",
        {inner: f"implementations.cuda.numba_ttt_{inner}" for inner in ("linear", "mlp")},
        dtypes=_DTYPES,
        requires=("numba", "numba_cuda"),
        supports=_numba_limits,
        supports_on_cpu=_simulator_limits,
        timed_on=("cuda",),
    ),
    # The fastest rung that takes the problem; the report of compiled kernels has them in the rows of the rungs.
    _cupy("cuda.cupy", {inner: f"implementations.cuda.cupy_ttt_{inner}" for inner in ("linear", "mlp")}, plain_limit),
    _cupy(
        "cuda.cupy_plain",
        {inner: f"implementations.cuda.cupy_plain_{inner}" for inner in ("linear", "mlp")},
        plain_limit,
        "implementations.cuda.cupy_plain_kernels",
    ),
    _cupy(
        "cuda.cupy_linear_split",
        {"linear": "implementations.cuda.cupy_linear_split"},
        linear_split_limit,
        "implementations.cuda.cupy_linear_split",
    ),
    _cupy(
        "cuda.cupy_mlp_registers",
        {"mlp": "implementations.cuda.cupy_mlp_registers"},
        mlp_registers_limit,
        "implementations.cuda.cupy_mlp_registers",
    ),
)
