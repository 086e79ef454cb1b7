"""TTT-Linear in CUDA C++, the first rung: shared memory and FMA; the maths is in `kernels/plain_linear.cu`."""

from __future__ import annotations

from collections.abc import Iterator

from implementations.cuda.cupy_plain import Page, Residuals, empty_residuals
from implementations.cuda.plain_limits import limit
from implementations.kernels import CudaKernel
from spec.problem import Problem
from spec.tensors import LinearInputs, LinearOutputs

__all__ = ["backward", "empty_residuals", "forward", "kernels", "limit", "static_kernels"]


def _tile_floats(problem: Problem, backward: bool) -> int:
    """Tiles [M D], [M M] and [D D] with a column more each, and rows."""
    m, d = problem.mini_batch, problem.head_dim
    token_tiles, square_tiles, weights = (11, 3, 2) if backward else (5, 1, 1)
    return token_tiles * m * (d + 1) + square_tiles * m * (m + 1) + weights * (d * (d + 1) + d) + m


_PAGE = Page("linear", _tile_floats)


def forward(inputs: LinearInputs, problem: Problem, group: int | None = None) -> tuple[LinearOutputs, Residuals]:
    """Outputs of TTT-Linear, and what `backward` needs: the weights of every `group`-th mini-batch.

    Raises:
        ValueError: a tensor has another shape, dtype, device or layout than the kernel takes, or the problem a size.
    """
    return _PAGE.forward(inputs, problem, group)


def backward(cotangents: LinearOutputs, residuals: Residuals, problem: Problem) -> LinearInputs:
    """Gradients of every input, from the cotangents of the output and of the final state.

    Raises:
        ValueError: a cotangent has another shape, dtype, device or layout than the kernel takes.
    """
    return _PAGE.backward(cotangents, residuals, problem)


def kernels(problem: Problem) -> tuple[CudaKernel, CudaKernel]:
    """What `forward` and `backward` launch on a card with the least shared memory; elsewhere they take more of it."""
    return _PAGE.kernel(problem, False), _PAGE.kernel(problem, True)


def static_kernels() -> Iterator[CudaKernel]:
    """Both kernels in the settings of the report that compiles them."""
    return _PAGE.static_kernels()
