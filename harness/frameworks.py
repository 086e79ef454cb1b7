"""Whose arrays an implementation takes: how to hand them over, wait for them and read them back.

A framework is opened inside a worker process, once; nothing here is imported with the harness's command line.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import sys
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from implementations.registry import Device
from spec.cases import NUMPY_DTYPE

_PACKAGES = ("torch", "jax", "jaxlib", "triton", "cupy-cuda13x", "numba-cuda", "numpy")


class Unsupported(Exception):
    """What was asked for cannot be done on this machine; the message is the reason in one line."""


class Framework(Protocol):
    """The few things that the harness asks of PyTorch and JAX alike."""

    name: str
    device: Device

    def arrays(self, tensors: Any, strided: bool = False) -> Any:
        """The named tuple `tensors` of NumPy arrays as arrays on the device; see `Case.strided`."""

    def copies(self, tensors: Any) -> Any:
        """The named tuple `tensors` of device arrays copied into PyTorch tensors, bit for bit, on that device."""

    def synchronize(self, result: Any) -> None:
        """Wait until everything that `result` depends on has been computed."""

    def poison(self, size: int) -> None:
        """Leave NaN in some `size` bytes that the next arrays will be made of: what nobody writes shows."""

    def release_memory(self) -> None:
        """Give cached device memory back, for the other processes on the device."""

    def reset_peak_memory(self) -> None:
        """Start to count `peak_memory_bytes` anew, where the framework can."""

    def peak_memory_bytes(self) -> int | None:
        """The most device memory in use since the last reset; None where it is not counted."""

    def allocated_bytes(self) -> int | None:
        """The device memory in use; None where it is not counted."""

    def l2_bytes(self) -> int:
        """The size of the device's L2 cache; 0 on a CPU, where nothing is measured cold."""

    def touch(self) -> None:
        """Run something small on the device and wait for it."""

    def hold(self, seconds: float) -> Callable[[], bool]:
        """Keep the device busy for about so long before what is launched next, by a kernel named `HOLDS`.

        What it returns says whether that kernel still runs: whether all that was launched by then stood in a queue.
        """


HOLDS = "spin_kernel"  # what `torch.cuda._sleep` launches


def open_framework(name: str, device: Device) -> Framework:
    """The framework `name` on `device`.

    Raises:
        Unsupported: it sees no such device.
    """
    kinds: dict[str, Callable[[Device], Framework]] = {"torch": _Torch, "jax": _Jax}
    return kinds[name](device)


def l2_bytes() -> int:
    """The L2 cache of the GPU that CUDA uses first, from its driver; 0 where there is none.

    Raises:
        RuntimeError: the driver does not say.
    """
    cuda = ctypes.CDLL("libcuda.so.1")
    attribute, device, value = 38, ctypes.c_int(), ctypes.c_int()  # CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE
    failed = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0)
    failed = failed or cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    if failed or value.value <= 0:
        raise RuntimeError(f"the driver does not say how large the L2 cache is: error {failed}")
    return value.value


def versions() -> str:
    """The versions of the installed frameworks, as `name==version` separated by spaces."""
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return " ".join(found)


def _poison_malloc() -> None:
    """Have glibc fill fresh memory with 0xFF bytes: NaN in every float dtype. Elsewhere this does nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        m_perturb = -6
        mallopt(m_perturb, 0x100)  # fresh memory gets the complement of the low byte, 0x00


class _Torch:
    name = "torch"

    def __init__(self, device: Device):
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise Unsupported("PyTorch sees no CUDA device")
        self.torch, self.device = torch, device

    def arrays(self, tensors: Any, strided: bool = False) -> Any:
        return type(tensors)(*(self._array(x, strided and name in _TOKENS) for name, x in _items(tensors)))

    def _array(self, x: np.ndarray, strided: bool) -> Any:
        torch = self.torch
        bits = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype == _BF16 else torch.from_numpy(x)
        array = bits.to(self.device, copy=True)
        return array.transpose(1, 2).contiguous().transpose(1, 2) if strided else array

    def copies(self, tensors: Any) -> Any:
        """See `Framework`: what is overwritten later shall show."""
        return type(tensors)(*(x.detach().clone(memory_format=self.torch.contiguous_format) for x in tensors))

    def synchronize(self, result: Any) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def poison(self, size: int) -> None:
        if self.device == "cpu":
            _poison_malloc()
        else:  # freed blocks go back to the caching allocator, which hands them out again
            free, _ = self.torch.cuda.mem_get_info()
            sizes = [min(free // 4, size, 2**32) // 4] + 64 * [2**17]
            _ = [self.torch.full((size,), float("nan"), device="cuda") for size in sizes]

    def release_memory(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.empty_cache()

    def reset_peak_memory(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.reset_peak_memory_stats()

    def peak_memory_bytes(self) -> int | None:
        return self.torch.cuda.max_memory_allocated() if self.device == "cuda" else None

    def allocated_bytes(self) -> int | None:
        return self.torch.cuda.memory_allocated() if self.device == "cuda" else None

    def l2_bytes(self) -> int:
        return l2_bytes() if self.device == "cuda" else 0

    def touch(self) -> None:
        self.synchronize(self.torch.ones(1, device=self.device) + 1)

    def hold(self, seconds: float) -> Callable[[], bool]:
        self.torch.cuda._sleep(int(seconds * 2e9))  # cycles, at about the highest clock
        ended = self.torch.cuda.Event()
        ended.record()
        return lambda: not ended.query()


class _Jax:
    name = "jax"

    def __init__(self, device: Device):
        import jax

        jax.config.update("jax_enable_x64", True)
        try:
            self.place = jax.devices("gpu" if device == "cuda" else "cpu")[0]
        except RuntimeError:
            raise Unsupported(f"JAX sees no {device} device") from None
        self.jax, self.device = jax, device

    def arrays(self, tensors: Any, strided: bool = False) -> Any:
        """JAX has no strides: `strided` changes nothing."""
        return type(tensors)(*(self.jax.device_put(x, self.place) for x in tensors))

    def copies(self, tensors: Any) -> Any:
        import torch

        copies = type(tensors)(*(torch.from_dlpack(x).clone() for x in self.jax.block_until_ready(tensors)))
        if self.device == "cuda":
            torch.cuda.synchronize()  # JAX knows nothing of the copies, and may write where they are read
        return copies

    def synchronize(self, result: Any) -> None:
        self.jax.block_until_ready(result)

    def poison(self, size: int) -> None:
        if self.device == "cpu":
            _poison_malloc()

    def release_memory(self) -> None:
        """JAX keeps what it has (see `parity.CUDA_ENVIRONMENT`), PyTorch nothing of what was copied."""
        if self.device == "cuda" and (torch := sys.modules.get("torch")):
            torch.cuda.empty_cache()

    def reset_peak_memory(self) -> None:
        """JAX counts one peak for the whole process: not reported."""

    def peak_memory_bytes(self) -> int | None:
        return None

    def allocated_bytes(self) -> int | None:
        return None

    def l2_bytes(self) -> int:
        return l2_bytes() if self.device == "cuda" else 0

    def touch(self) -> None:
        self.synchronize(self.jax.device_put(np.ones(1), self.place) + 1)

    def hold(self, seconds: float) -> Callable[[], bool]:
        """JAX's stream is its own: nothing can be put in front of a call there, and none is called late."""
        return lambda: True


_BF16 = NUMPY_DTYPE["bf16"]
_TOKENS = ("xq", "xk", "xv", "lr", "out")  # the tensors with a T axis


def _items(tensors: Any) -> list[tuple[str, np.ndarray]]:
    return list(zip(tensors._fields, tensors, strict=True))
