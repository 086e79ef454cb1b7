"""CUDA kernels compiled by NVRTC for an architecture that is not there, as CuPy compiles them for one that is."""

from __future__ import annotations

from typing import Any

from harness.static_binary import Binary, CompileError, MissingTool, first_error
from implementations.kernels import CudaKernel


def version() -> str:
    """Name and version.

    Raises:
        MissingTool: NVRTC or its Python binding is not installed.
    """
    major, minor = _checked(_nvrtc().nvrtcVersion())
    return f"nvrtc {major}.{minor}"


def architecture(wanted: str) -> str:
    """What NVRTC compiles for when asked for `wanted`."""
    return wanted


def compile(kernel: CudaKernel, architecture: str) -> Binary:
    """The kernel for `architecture`.

    Raises:
        MissingTool: NVRTC, its Python binding or the CUDA headers are not installed.
        CompileError: NVRTC refused it.
    """
    nvrtc = _nvrtc()
    options = [f"--gpu-architecture={architecture}", "-Xptxas=-v", *_includes(kernel), *kernel.options]
    encoded = [option.encode() for option in options]
    try:
        text = kernel.source.read_bytes()
    except OSError as error:
        raise CompileError(f"{kernel.source}: {error.strerror}") from error
    program = _checked(nvrtc.nvrtcCreateProgram(text, kernel.source.name.encode(), 0, None, None))
    expression = kernel.expression.encode()
    try:
        _checked(nvrtc.nvrtcAddNameExpression(program, expression))
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(first_error(log.rstrip("\0")))
        return Binary(
            cubin=_text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program),
            log=log,
            entry=_checked(nvrtc.nvrtcGetLoweredName(program, expression)).decode(),
            threads=kernel.threads,
            dynamic_shared_bytes=kernel.dynamic_shared_bytes,
        )
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise MissingTool(f"cuda-bindings is not installed: {first_error(str(error))}") from error
    try:
        nvrtc.nvrtcVersion()
    except Exception as error:  # the library is looked for at the first call; the finder has its own error
        raise MissingTool("NVRTC is not installed (pip install nvidia-cuda-nvrtc)") from error
    return nvrtc


def _includes(kernel: CudaKernel) -> list[str]:
    """What lies beside the source, and the headers of the CUDA toolkit."""
    from cuda.pathfinder import find_nvidia_header_directory

    runtime = find_nvidia_header_directory("cudart")
    if not runtime:
        raise MissingTool("the CUDA headers are not installed (pip install nvidia-cuda-runtime nvidia-cuda-crt)")
    folders = [str(kernel.source.parent), runtime, find_nvidia_header_directory("cccl")]
    return [f"--include-path={folder}" for folder in folders if folder]


def _text(size: Any, get: Any, program: Any) -> bytes:
    text = b" " * _checked(size(program))
    _checked(get(program, text))
    return text


def _checked(result: tuple[Any, ...]) -> Any:
    """What an NVRTC call gave back beside its status."""
    status, *values = result
    if status.value:
        raise CompileError(f"NVRTC: {status.name}")
    return values[0] if len(values) == 1 else values
