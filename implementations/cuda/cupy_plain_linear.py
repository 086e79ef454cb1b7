"""TTT-Linear in CUDA C++, the first rung: shared memory and FMA; the maths is in `kernels/plain_linear.cu`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from implementations.cuda.arguments import KERNEL_DTYPE, View, check, contiguous_like, default_group, view
from implementations.cuda.module import launch
from implementations.cuda.plain_limits import limit
from implementations.kernels import CudaKernel
from spec.problem import Problem
from spec.tensors import INPUTS, OUTPUTS, LinearInputs, LinearOutputs

THREADS = 256
OPTIONS = ("--device-as-default-execution-space",)  # of lambdas in lambdas
SHARED_BYTES = 99 * 1024  # what a block may have on every card from sm_80 on; the kernels count with the same


class State(NamedTuple):
    """Fast weights: `w` [... D D] and `b` [... D]."""

    w: Tensor
    b: Tensor


class Shared(NamedTuple):
    """`Inputs` in the kernels' file."""

    xq: View
    xk: View
    xv: View
    lr: View
    token_eta: Tensor
    ln_weight: Tensor
    ln_bias: Tensor
    heads: int
    mini_batches: int
    group: int
    groups: int
    eps: float
    scratch: Tensor
    scratch_size: int


class Residuals(NamedTuple):
    """What the backward needs: the inputs, and the weights at the start of every `group`-th mini-batch."""

    inputs: LinearInputs
    kept: State  # [B H groups ...]
    group: int


def forward(inputs: LinearInputs, problem: Problem, group: int | None = None) -> tuple[LinearOutputs, Residuals]:
    """Outputs of TTT-Linear, and what `backward` needs.

    Raises:
        ValueError: a tensor has another shape, dtype, device or layout than the kernel takes, or the problem a size.
    """
    check(inputs, INPUTS, problem, limit(problem))
    group = default_group(problem) if group is None else group
    outputs = LinearOutputs(*map(contiguous_like, (inputs.xq, *inputs[7:])))
    kept = _states(inputs, problem, -(-problem.mini_batches // group))
    arguments = _shared(inputs, problem, group, False), State(*inputs[7:]), kept, State(*outputs[1:]), outputs.out
    launch(_kernel(problem, False), problem.batch * problem.heads, arguments, inputs.xq.device, problem)
    return outputs, Residuals(inputs, kept, group)


def backward(cotangents: LinearOutputs, residuals: Residuals, problem: Problem) -> LinearInputs:
    """Gradients of every input, from the cotangents of the output and of the final state.

    Raises:
        ValueError: a cotangent has another shape, dtype, device or layout than the kernel takes.
    """
    inputs, kept, group = residuals
    check(cotangents, OUTPUTS, problem, limit(problem), inputs.xq)
    m, d = problem.mini_batch, problem.head_dim
    d_tokens, d_first = [contiguous_like(x) for x in inputs[:4]], State(*map(contiguous_like, inputs[7:]))
    sums = inputs.w1.new_empty(problem.batch, problem.heads, 2 * m + 2 * d)
    arguments = (
        _shared(inputs, problem, group, True), kept, _states(inputs, problem, group),
        view(cotangents.out), State(*cotangents[1:]), d_first, *d_tokens, sums,
    )  # fmt: skip
    launch(_kernel(problem, True), problem.batch * problem.heads, arguments, inputs.xq.device, problem)
    return LinearInputs(*d_tokens, *finish_sums(sums, problem), *d_first)


def finish_sums(sums: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of token_eta, ln_weight and ln_bias, from the sums of each chain [B H 2 M + 2 D]."""
    m, d = problem.mini_batch, problem.head_dim
    read, update, d_ln_weight, d_ln_bias = sums.split([m, m, d, d], -1)
    read, update = read.sum((0, 1)), update.sum()
    last = torch.nn.functional.pad((update if problem.causal else update + read.sum()).unsqueeze(0), (m - 1, 0))
    return (read + last if problem.causal else last), d_ln_weight.sum(0), d_ln_bias.sum(0)


def static_kernels() -> Iterator[CudaKernel]:
    """Both kernels in bf16 at D = 64: M = 16 causal, and M = 64 not causal."""
    for mini_batch, causal in ((16, True), (64, False)):
        problem = Problem("linear", 1, mini_batch, 1, 64, mini_batch, causal, dtype="bf16")
        yield from (_kernel(problem, False), _kernel(problem, True))


def _kernel(problem: Problem, backward: bool) -> CudaKernel:
    causal = "true" if problem.causal else "false"
    sizes = f"{KERNEL_DTYPE[problem.dtype]}, {problem.head_dim}, {problem.mini_batch}, {causal}"
    return CudaKernel(
        source=Path(__file__).parent / "kernels" / "plain_linear.cu",
        expression=f"ttt::plain::linear_{'backward' if backward else 'forward'}<{sizes}>",
        inner_model="linear",
        options=OPTIONS,
        threads=THREADS,
        dynamic_shared_bytes=min(SHARED_BYTES, 4 * _tile_floats(problem, backward)),
    )


def _tile_floats(problem: Problem, backward: bool) -> int:
    """Of all tiles of a chain: [M D], [M M] and [D D] with a column more each, and a few rows."""
    m, d = problem.mini_batch, problem.head_dim
    token_tiles, square_tiles, weights = (11, 3, 2) if backward else (5, 1, 1)
    return token_tiles * m * (d + 1) + square_tiles * m * (m + 1) + weights * (d * (d + 1) + d) + m


def _shared(inputs: LinearInputs, problem: Problem, group: int, backward: bool) -> Shared:
    size = _tile_floats(problem, backward)  # more than does not fit into shared memory
    scratch = inputs.w1.new_empty(problem.batch * problem.heads, size if 4 * size > SHARED_BYTES else 0)
    return Shared(
        *map(view, inputs[:4]), *inputs[4:7], problem.heads, problem.mini_batches, group,
        -(-problem.mini_batches // group), problem.eps, scratch, size,
    )  # fmt: skip


def _states(inputs: LinearInputs, problem: Problem, count: int) -> State:
    b, h, d = problem.batch, problem.heads, problem.head_dim
    return State(inputs.w1.new_empty(b, h, count, d, d), inputs.w1.new_empty(b, h, count, d))
