"""The kernels of both plain pages, for the report that compiles them."""

from collections.abc import Iterator

from implementations.cuda import cupy_plain_linear, cupy_plain_mlp
from implementations.kernels import CudaKernel


def static_kernels() -> Iterator[CudaKernel]:
    """Those of TTT-Linear, then those of TTT-MLP."""
    yield from cupy_plain_linear.static_kernels()
    yield from cupy_plain_mlp.static_kernels()
