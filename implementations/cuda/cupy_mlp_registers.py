"""TTT-MLP in CUDA C++ on tensor cores: one block a chain, the state of both passes in its registers.

Forward (`kernels/mlp_forward.cu`): the fast weights, fp32, are accumulators of `mma.sync`: rounded as they lie they are
operands of the products with xk and xq, so they never leave the registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from implementations.cuda.arguments import KERNEL_DTYPE, View, check, contiguous_like, view
from implementations.cuda.module import launch
from implementations.kernels import CudaKernel
from spec.problem import Problem
from spec.tensors import INPUTS, OUTPUTS, MlpInputs, MlpOutputs

_KERNELS = Path(__file__).with_name("kernels")
HEAD_DIMS, MINI_BATCHES = (16, 32, 64), (16, 32, 64)
GROUP = 8  # mini-batches between two saved states


def supports(problem: Problem) -> str | None:
    """Why not, or None."""
    if problem.dtype not in ("bf16", "fp16"):
        return "the products are those of tensor cores, in bf16 or fp16"
    if problem.head_dim not in HEAD_DIMS or problem.mini_batch not in MINI_BATCHES:
        return f"a state in registers takes D of {HEAD_DIMS} and M of {MINI_BATCHES}"
    return None


class ForwardArguments(NamedTuple):
    """As in `mlp_forward.cu`."""

    xq: View
    xk: View
    xv: View
    lr: View
    token_eta: Tensor
    ln_weight: Tensor
    ln_bias: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    out: Tensor
    final_w1: Tensor
    final_b1: Tensor
    final_w2: Tensor
    final_b2: Tensor
    saved: Tensor
    x_hat: Tensor
    x_hat_bar: Tensor
    rstd: Tensor
    rstd_bar: Tensor
    heads: int
    mini_batches: int
    group: int
    aligned: int
    eps: float


class BackwardArguments(NamedTuple):
    """As in `mlp_backward.cu`."""

    xq: View
    xk: View
    xv: View
    lr: View
    token_eta: Tensor
    ln_weight: Tensor
    ln_bias: Tensor
    d_out: View
    d_final_w1: Tensor
    d_final_b1: Tensor
    d_final_w2: Tensor
    d_final_b2: Tensor
    saved: Tensor
    x_hat: Tensor
    x_hat_bar: Tensor
    rstd: Tensor
    rstd_bar: Tensor
    d_xq: Tensor
    d_xk: Tensor
    d_xv: Tensor
    d_lr: Tensor
    d_w1: Tensor
    d_b1: Tensor
    d_w2: Tensor
    d_b2: Tensor
    d_token_eta: Tensor
    d_ln_weight: Tensor
    d_ln_bias: Tensor
    work: Tensor
    work_size: int
    heads: int
    mini_batches: int
    group: int
    aligned: int
    eps: float


class Residuals(NamedTuple):
    """The inputs; the fast weights of every `group`-th mini-batch; the LayerNorm that `out` went through."""

    inputs: MlpInputs
    saved: Tensor
    x_hat: Tensor
    x_hat_bar: Tensor
    rstd: Tensor
    rstd_bar: Tensor
    group: int


def record(head_dim: int) -> int:
    """Floats of the fast weights that a group starts from: w1, w2, b1."""
    return 8 * head_dim**2 + 4 * head_dim


def forward(inputs: MlpInputs, problem: Problem, group: int = GROUP) -> tuple[MlpOutputs, Residuals]:
    """Outputs of TTT-MLP, and what `backward` needs.

    Raises:
        ValueError: a tensor has another shape, dtype, device or layout than the kernel takes.
    """
    check(inputs, INPUTS, problem, supports(problem))
    chains, like = problem.batch * problem.heads, inputs.w1
    groups = -(-problem.mini_batches // group)
    saved = like.new_empty(chains, groups, record(problem.head_dim))
    norms = [like.new_empty(chains, problem.tokens, problem.head_dim, dtype=torch.float16) for _ in range(2)]
    norms += [like.new_empty(chains, problem.tokens) for _ in range(2)]
    outputs = MlpOutputs(
        contiguous_like(inputs.xq), *(contiguous_like(x) for x in inputs[7:])
    )
    arguments = ForwardArguments(
        *map(view, inputs[:4]), *inputs[4:], *outputs, saved, *norms,
        problem.heads, problem.mini_batches, group, int(all(map(aligned, inputs[:3]))), problem.eps,
    )  # fmt: skip
    launch(forward_kernel(problem), chains, arguments, like.device, problem)
    return outputs, Residuals(inputs, saved, *norms, group)


def backward(cotangents: MlpOutputs, residuals: Residuals, problem: Problem) -> MlpInputs:
    """Gradients of every input, from the cotangents of the output and of the final state.

    Raises:
        ValueError: a cotangent has another shape, dtype, device or layout than the kernel takes.
    """
    inputs, *kept, group = residuals
    check(cotangents, OUTPUTS, problem, supports(problem), inputs.xq)
    chains, like = problem.batch * problem.heads, inputs.w1
    d_tokens = [contiguous_like(x) for x in inputs[:4]]
    d_state = [contiguous_like(x) for x in inputs[7:]]
    d_shared = [like.new_empty(chains, size) for size in (problem.mini_batch, problem.head_dim, problem.head_dim)]
    size = work_bytes(problem, group)
    work = like.new_empty(chains, size, dtype=torch.uint8)
    arguments = BackwardArguments(
        *map(view, inputs[:4]), *inputs[4:7], view(cotangents.out), *cotangents[1:], *kept,
        *d_tokens, *d_state, *d_shared, work, size,
        problem.heads, problem.mini_batches, group, int(all(map(aligned, (*inputs[:3], cotangents.out)))), problem.eps,
    )  # fmt: skip
    launch(backward_kernel(problem), chains, arguments, like.device, problem)
    d_token_eta, d_ln_weight, d_ln_bias = (x.unflatten(0, (problem.batch, problem.heads)) for x in d_shared)
    return MlpInputs(*d_tokens, d_token_eta.sum((0, 1)), d_ln_weight.sum(0), d_ln_bias.sum(0), *d_state)


def work_bytes(problem: Problem, group: int) -> int:
    """What a chain of the backward has in global memory: `Work` in `mlp_backward.cu`, and `group + 1` states."""
    d, m = problem.head_dim, problem.mini_batch
    chunks, warps = m // 16, d // 8
    fixed = 32 * d * d + 4 * m * d + 7 * chunks * warps * 1024 + chunks * (chunks + 1) // 2 * warps * 512
    return fixed + (group + 1) * (16 * d * d + 16 * d)


def backward_kernel(problem: Problem) -> CudaKernel:
    """The instance that solves `problem`."""
    d, m, causal = problem.head_dim, problem.mini_batch, problem.causal
    row, chunks, warps = d + 8, m // 16, d // 8
    stages = 2 if chunks < 4 else 1
    kept = min(7 if causal else 5, 7 if chunks < 2 else 6 if chunks < 4 else 3 if causal else 4)
    squares = chunks * (chunks + 1) // 2 if causal else 0
    ahead = causal and chunks == 1
    shared = (2 * stages + 3) * m * row * 2 + (2 if chunks == 2 else 1) * warps * 16 * row * 4
    shared += (8 * m * row * 2 + warps * (128 * d + 2048)) if ahead else 64 + 32 * warps
    shared += kept * chunks * warps * 1024 + 2 * (squares + 1) * (1024 if chunks < 4 else 512)
    shared += 4 * (3 * stages * m + m + 8 * d + warps * d + warps * m + m + 2 * (warps if causal else 1) * m)
    return _kernel(problem, "mlp_backward", -(-shared // 16) * 16, 0)


def forward_kernel(problem: Problem) -> CudaKernel:
    """The instance that solves `problem`."""
    d, m, causal = problem.head_dim, problem.mini_batch, problem.causal
    row, chunks, warps = d + 8, m // 16, d // 8
    tile = m * row * 2
    squares = chunks * (chunks + 1) // 2 if causal else 0
    shared = 8 * tile + 2 * warps * 16 * row * 4 + 2 * chunks * warps * 1024 + (squares + 1) * 512
    shared += 4 * (3 * m + 4 * d + warps * d)
    return _kernel(problem, "mlp_forward", shared, _SPILLS.get((m, causal), 0))


_SPILLS = {(16, True): 64, (64, True): 512}


def _kernel(problem: Problem, name: str, shared: int, spills: int) -> CudaKernel:
    d, m, causal = problem.head_dim, problem.mini_batch, str(problem.causal).lower()
    return CudaKernel(
        source=_KERNELS / f"{name}.cu",
        expression=f"ttt::{name}<{KERNEL_DTYPE[problem.dtype]}, {d}, {m}, {causal}>",
        inner_model="mlp",
        threads=4 * d,
        dynamic_shared_bytes=shared,
        declared_spill_bytes=spills,
    )


def aligned(x: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    return x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])


def static_kernels() -> Iterator[CudaKernel]:
    """The instances of the named cases in bf16."""
    for mini_batch, causal in ((16, True), (64, True), (64, False)):
        problem = Problem("mlp", 1, mini_batch, 1, 64, mini_batch, causal, dtype="bf16")
        yield forward_kernel(problem)
        yield backward_kernel(problem)
