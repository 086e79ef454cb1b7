"""Kernels that compile everywhere and spill nowhere."""

from pathlib import Path

from implementations.kernels import CudaKernel, TritonKernel
from tests.kernels.product import add, product

SIGNATURE = {"p_a": "*bf16", "p_b": "*bf16", "p_c": "*fp32"}


def static_kernels():
    flat = {"p_a": "*fp32", "p_b": "*fp32", "p_out": "*fp32", "n": "i32"}
    yield TritonKernel(function=add, inner_model="linear", signature=flat, constexprs={"BLOCK": 1024})
    yield TritonKernel(
        function=product, inner_model="linear", signature=SIGNATURE, constexprs={"M": 64, "N": 64, "K": 64}
    )
    yield CudaKernel(
        source=Path(__file__).with_name("product.cu"),
        expression="product<64>",
        inner_model="linear",
        options=("--std=c++17",),
        threads=32,
        dynamic_shared_bytes=128,
    )
