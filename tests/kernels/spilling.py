"""The kernels of `good` by name, with too few registers: each spills, and its file does not say so."""

from dataclasses import replace
from pathlib import Path

from implementations.kernels import CudaKernel
from tests.kernels import good


def static_kernels():
    _, product, _ = good.static_kernels()
    yield replace(product, maxnreg=64, constexprs={"M": 128, "N": 128, "K": 64})
    yield CudaKernel(
        source=Path(__file__).with_name("product.cu"), expression="reversed<64>", inner_model="linear", threads=1024
    )
