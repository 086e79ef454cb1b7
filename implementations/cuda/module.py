"""From a CUDA kernel and its arguments to a launch: by CuPy on a GPU, by the emulator on a CPU.

A kernel takes one struct, all of whose fields have 8 bytes; here that is a named tuple with the same fields in the same
order, where a tensor stands for its pointer. On a GPU NVRTC compiles the kernel once for each setting and architecture,
and CuPy keeps what came out on disk: by source, options and architecture, and by the contents of the `.cuh` files:
CuPy by itself does not look at what a source includes, so a hash of them goes into the options. A launch is on
PyTorch's current stream, and copies nothing.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from typing import Any

import torch
from torch import Tensor

from implementations.cuda import emulator
from implementations.kernels import CudaKernel
from spec.problem import Problem


class CudaError(RuntimeError):
    """A kernel was not compiled, loaded or launched; the message names it and its problem."""


def launch(
    kernel: CudaKernel, grid: int, arguments: tuple[Any, ...], device: torch.device, problem: Problem | None = None
) -> None:
    """Run `grid` blocks of `kernel` with the named tuple `arguments` (or tuples in it): tensors, int, bool, float.

    Raises:
        NotImplementedError: this device cannot run it, see `refusal`.
        CudaError: it was not compiled, loaded or launched.
        implementations.cuda.emulator.EmulatorError: on a CPU, where the kernel does something wrong.
    """
    values = pack(arguments)
    if device.type == "cpu":
        emulator.run(kernel, grid, values)
        return
    try:
        _launch_on_gpu(kernel, grid, values, device)
    except NotImplementedError:  # what `refusal` says
        raise
    except Exception as error:  # of CuPy, its NVRTC, the driver: each has its own
        where = f" of {problem}" if problem else ""
        lines = str(error).strip().splitlines() or [type(error).__name__]
        said = next((line for line in lines if "error" in line), lines[0])
        raise CudaError(f"{kernel.name} {kernel.variant}{where}: {type(error).__name__}: {said}") from error


def pack(arguments: Any) -> bytes:
    """The struct that a kernel takes: of a tensor its pointer, of an int an int64, of a float a double."""
    if isinstance(arguments, Tensor):
        return struct.pack("P", arguments.data_ptr())
    if isinstance(arguments, tuple):
        return b"".join(map(pack, arguments))
    return struct.pack("d" if isinstance(arguments, float) else "q", arguments)


def refusal(kernel: CudaKernel, device: torch.device) -> str | None:
    """Why `kernel` cannot be launched on `device`, found out without a launch; None if it can."""
    if device.type == "cpu":
        return emulator.missing()
    if reason := fault():
        return reason
    properties = torch.cuda.get_device_properties(device)
    have, wanted = properties.major * 10 + properties.minor, _least(kernel.architectures)
    if have < wanted:
        return f"{kernel.name} takes sm_{wanted} or newer, and {properties.name} is sm_{have}"
    if kernel.dynamic_shared_bytes > properties.shared_memory_per_block_optin:
        return (
            f"{kernel.name} takes {kernel.dynamic_shared_bytes} bytes of shared memory, and a block of "
            f"{properties.name} has {properties.shared_memory_per_block_optin}"
        )
    return None


@functools.cache
def shared_bytes(device: torch.device | None) -> int:
    """The shared memory that a block may have on `device`; for a CPU or None, that of the largest SM there is."""
    if device is None or device.type != "cuda":
        return 227 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache  # what is installed does not change
def fault() -> str | None:
    """Why no CUDA kernel can be launched on a GPU here, in a line, or None."""
    try:
        import cupy
    except ImportError as error:
        return f"cupy is not installed: pip install cupy-cuda13x ({error})"
    try:
        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy's own
        return f"no CUDA driver or device: {error}"
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:  # the library is loaded at the first call
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"NVRTC is not installed: pip install nvidia-cuda-nvrtc ({first})"
    return None


def _least(architectures: tuple[str, ...]) -> int:
    return min(int("".join(filter(str.isdigit, each))) for each in architectures)


def _launch_on_gpu(kernel: CudaKernel, grid: int, values: bytes, device: torch.device) -> None:
    import cupy

    index = torch.cuda.current_device() if device.index is None else device.index
    with cupy.cuda.Device(index):
        function = _function(kernel, index)
        with cupy.cuda.ExternalStream(torch.cuda.current_stream(index).cuda_stream, index):
            function((grid,), (kernel.threads,), (by_value(values),), shared_mem=kernel.dynamic_shared_bytes)


def by_value(struct_bytes: bytes) -> Any:
    """A struct as CuPy passes one: a NumPy array of one item."""
    import numpy

    return numpy.frombuffer(struct_bytes, numpy.dtype((numpy.void, len(struct_bytes))))


@functools.cache
def _function(kernel: CudaKernel, device: int) -> Any:
    """The compiled kernel, on the current device, which `device` tells apart from others."""
    import cupy

    if reason := refusal(kernel, torch.device("cuda", device)):
        raise NotImplementedError(reason)
    headers = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(kernel.source.parent.glob("*.cuh"))))
    options = (
        f"-DTTT_HEADERS=0x{headers.hexdigest()[:8]}",
        f"--include-path={kernel.source.parent}",
        *kernel.options,
    )
    module = cupy.RawModule(
        code=kernel.source.read_text(), options=options, name_expressions=(kernel.expression,), backend="nvrtc"
    )
    function = module.get_function(kernel.expression)
    if kernel.dynamic_shared_bytes > 48 * 1024:
        function.max_dynamic_shared_size_bytes = kernel.dynamic_shared_bytes
    return function
