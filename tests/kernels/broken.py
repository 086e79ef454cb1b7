"""Kernels that no compiler takes."""

from pathlib import Path

from implementations.kernels import CudaKernel, TritonKernel
from tests.kernels.product import refused


def static_kernels():
    yield TritonKernel(function=refused, inner_model="linear", signature={"p_a": "*fp32"}, constexprs={"N": 48})
    yield CudaKernel(
        source=Path(__file__).with_name("product.cu"), expression="product<K>", inner_model="linear", threads=32
    )
