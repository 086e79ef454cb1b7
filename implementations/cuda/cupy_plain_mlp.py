"""TTT-MLP in CUDA C++, the first rung: shared memory and FMA; the maths is in `kernels/plain_mlp.cu`."""

from __future__ import annotations

from collections.abc import Iterator

from implementations.cuda.cupy_plain import Page, Residuals, empty_residuals
from implementations.cuda.plain_limits import limit
from implementations.kernels import CudaKernel
from spec.problem import Problem
from spec.tensors import MlpInputs, MlpOutputs

__all__ = ["backward", "empty_residuals", "forward", "kernels", "limit", "static_kernels"]


def _tile_floats(problem: Problem, backward: bool) -> int:
    """Tiles [M D], [M M], [M F], [D F] and [F D] with a column more each, and rows."""
    m, d, f = problem.mini_batch, problem.head_dim, problem.hidden
    token_tiles, square_tiles, hidden_tiles, weights, rows = (11, 6, 9, 2, 3) if backward else (5, 1, 4, 1, 1)
    tokens = token_tiles * m * (d + 1) + square_tiles * m * (m + 1) + hidden_tiles * m * (f + 1)
    return tokens + weights * (f * (d + 1) + d * (f + 1) + f + d) + rows * m


_PAGE = Page("mlp", _tile_floats)


def forward(inputs: MlpInputs, problem: Problem, group: int | None = None) -> tuple[MlpOutputs, Residuals]:
    """Outputs of TTT-MLP, and what `backward` needs: the weights of every `group`-th mini-batch.

    Raises:
        ValueError: a tensor has another shape, dtype, device or layout than the kernel takes, or the problem a size.
    """
    return _PAGE.forward(inputs, problem, group)


def backward(cotangents: MlpOutputs, residuals: Residuals, problem: Problem) -> MlpInputs:
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
