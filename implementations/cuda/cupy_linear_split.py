"""TTT-Linear on tensor cores, the recurrence split off: some warps of a block carry the fast weights, others read them.

`kernels/linear_recurrence.cuh` says how D / 16 warps of a block carry w1 in registers from one mini-batch to the next,
with one barrier among them a mini-batch; `kernels/linear_forward.cu` how other warps, a few mini-batches behind,
compute `out`; `kernels/linear_backward.cu` how the same split makes the way back, in a second pass over what the
forward again kept. One block has a chain (batch, head); where mini-batches are long and the device has room for two
blocks, each has one of the backward's passes.

Memory. The forward reads the inputs once, writes `out` once, and saves the fast weights of every G-th mini-batch, by
default of every 1024 tokens: 4 (D^2 + D) / (G M) bytes a token and head, 16 at D = 64, beside 386 for the inputs in
bf16. The backward goes from the last group of G mini-batches to the first, and keeps of one group what its second pass
needs of its first: 2 D^2 / M + 6 D + 32 (+ 4 M, causal) bytes a token, 16 KB a mini-batch at D = 64 and M = 16. For the
128 chains of lm-1.3b that is 134 MB; with G = 16 it stays in the L2 cache of an H100, and yet the backward takes longer
(0.495 instead of 0.468 ms with the forward), since its passes start and end more often.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from implementations.cuda.arguments import KERNEL_DTYPE, View, check, contiguous_like, default_split, view
from implementations.cuda.linear_split_limits import (
    Ring,
    Rings,
    backward_bytes,
    backward_rings,
    forward_bytes,
    forward_ring,
    kept_bytes,
    limit,
    threads,
)
from implementations.cuda.module import launch
from implementations.kernels import ARCHITECTURES, CudaKernel, architectures_with
from spec.problem import Problem
from spec.tensors import INPUTS, OUTPUTS, LinearInputs, LinearOutputs

GROUP_TOKENS = 1024  # between two saved states
_KERNELS = Path(__file__).with_name("kernels")
# Declared spills of the backward by (D, M), in bytes a thread, of the worst of sm_80, sm_90 and sm_100. At D = 96 nine
# warps have 168 registers a thread, and a third team of readers is worth more than the 255 that eight would have; at
# M = 64 the four tiles of a mini-batch are in registers at once, and only a dozen numbers are not.
_SPILLS = {(96, 16): 1024, (64, 64): 256}


class Residuals(NamedTuple):
    """What the backward needs: the inputs, and the fast weights of every `group`-th mini-batch."""

    inputs: LinearInputs
    saved: Tensor  # [B, H, ceil(N / G), D (D + 1)], in the order of the kernels' registers
    group: int


class ForwardArguments(NamedTuple):
    """The struct of the same name in `kernels/linear_forward.cu`."""

    xq: View
    xk: View
    xv: View
    lr: View
    token_eta: Tensor
    ln_weight: Tensor
    ln_bias: Tensor
    w1: Tensor
    b1: Tensor
    out: View
    final_w1: Tensor
    final_b1: Tensor
    saved: Tensor
    heads: int
    mini_batches: int
    group: int
    eps: float


class BackwardArguments(NamedTuple):
    """The struct of the same name in `kernels/linear_backward.cu`."""

    xq: View
    xk: View
    xv: View
    lr: View
    token_eta: Tensor
    ln_weight: Tensor
    ln_bias: Tensor
    saved: Tensor
    d_out: View
    d_final_w1: Tensor
    d_final_b1: Tensor
    d_xq: View
    d_xk: View
    d_xv: View
    d_lr: View
    d_token_eta: Tensor  # [B H split, M], the parts of each block; the next two too
    d_ln_weight: Tensor  # [B, H, split, D]
    d_ln_bias: Tensor
    d_w1: Tensor
    d_b1: Tensor
    d_weights: Tensor
    scratch: Tensor
    heads: int
    mini_batches: int
    group: int
    eps: float


def aligned(x: Tensor) -> bool:
    """Whether every row `D` starts at a multiple of 16 bytes, as the kernels' copies take it."""
    return x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])


def forward(
    inputs: LinearInputs, problem: Problem, group: int | None = None, ring: Ring | None = None
) -> tuple[LinearOutputs, Residuals]:
    """Outputs of TTT-Linear, and what `backward` needs; `group` is G, `ring` the kernel's setting.

    Raises:
        ValueError: a tensor has another shape, dtype, device or layout than the kernel takes, or the problem a size.
    """
    check(inputs, INPUTS, problem, limit(problem))
    _check_aligned(xq=inputs.xq, xk=inputs.xk, xv=inputs.xv)
    if group is not None and group < 1:
        raise ValueError(f"group: expected at least 1 mini-batch between saved states, got {group}")
    outputs = LinearOutputs(*map(contiguous_like, (inputs.xq, *inputs[7:])))
    residuals = empty_residuals(inputs, problem, group)
    arguments = ForwardArguments(
        *map(view, inputs[:4]), *inputs[4:], view(outputs.out), *outputs[1:], residuals.saved,
        problem.heads, problem.mini_batches, residuals.group, problem.eps,
    )  # fmt: skip
    launch(_forward_kernel(problem, ring), problem.batch * problem.heads, arguments, inputs.xq.device, problem)
    return outputs, residuals


def empty_residuals(inputs: LinearInputs, problem: Problem, group: int | None = None) -> Residuals:
    """Residuals with room for the saved states and nothing in it yet."""
    group = GROUP_TOKENS // problem.mini_batch if group is None else group
    states, d = -(-problem.mini_batches // group), problem.head_dim
    return Residuals(inputs, inputs.w1.new_empty(problem.batch, problem.heads, states, d * (d + 1)), group)


def backward(
    cotangents: LinearOutputs,
    residuals: Residuals,
    problem: Problem,
    rings: Rings | None = None,
    split: int | None = None,
) -> LinearInputs:
    """Gradients of every input, from the cotangents of the output and of the final state.

    `split` blocks work on a chain, 1 or 2; by default 2 where mini-batches are long and the device has room for all.

    Raises:
        ValueError: a cotangent has another shape, dtype, device or layout than the kernel takes.
    """
    inputs, saved, group = residuals
    check(cotangents, OUTPUTS, problem, limit(problem), inputs.xq)
    _check_aligned(out=cotangents.out)
    b, h, d, m = problem.batch, problem.heads, problem.head_dim, problem.mini_batch
    empty, split = inputs.w1.new_empty, split or _default_split(problem, inputs.xq.device)
    d_tokens = [*map(contiguous_like, inputs[:4])]
    d_token_eta, d_ln_weight, d_ln_bias = empty(b * h * split, m), empty(b, h, split, d), empty(b, h, split, d)
    d_w1, d_b1 = map(contiguous_like, inputs[7:])
    scratch = empty(b * h * split, group + 1, kept_bytes(problem) // 4)
    arguments = BackwardArguments(
        *map(view, inputs[:4]), *inputs[4:7], saved, view(cotangents.out), *cotangents[1:],
        *map(view, d_tokens), d_token_eta, d_ln_weight, d_ln_bias, d_w1, d_b1, empty(b * h, d * (d + 1)), scratch,
        h, problem.mini_batches, group, problem.eps,
    )  # fmt: skip
    launch(backward_kernel(problem, rings, split), b * h * split, arguments, inputs.xq.device, problem)
    sums = d_token_eta.sum(0), d_ln_weight.sum((0, 2)), d_ln_bias.sum((0, 2))  # always in the same order
    return LinearInputs(*d_tokens, *sums, d_w1, d_b1)


def kernels(problem: Problem) -> tuple[CudaKernel, CudaKernel]:
    """What `forward` and `backward` launch."""
    return _forward_kernel(problem, None), backward_kernel(problem)


def static_kernels() -> Iterator[CudaKernel]:
    """Both kernels at the sizes of the named cases."""
    for d, m, causal in ((64, 16, True), (96, 16, True), (64, 64, True), (64, 64, False)):
        problem = Problem("linear", 1, m, 1, d, m, causal, dtype="bf16")
        yield from kernels(problem)
        if not causal:
            yield backward_kernel(problem, split=2)


@functools.cache
def _forward_kernel(problem: Problem, ring: Ring | None) -> CudaKernel:
    ring = ring or forward_ring(problem)
    return _kernel("linear_forward", problem, ring.groups, ring, forward_bytes(problem, ring))


@functools.cache
def backward_kernel(problem: Problem, rings: Rings | None = None, split: int = 1) -> CudaKernel:
    """The instance that solves `problem` with `split` blocks a chain."""
    rings = rings or backward_rings(problem)
    options = f"-DTTT_KEPT_BYTES={kept_bytes(problem)}", f"-DTTT_SPLIT={split}"
    kernel = _kernel("linear_backward", problem, rings.groups, rings, backward_bytes(problem, rings), *options)
    spills = _SPILLS.get((problem.head_dim, problem.mini_batch), 0)
    kernel = replace(kernel, declared_spill_bytes=spills, cluster=split)
    return kernel if split == 1 else replace(kernel, architectures=ARCHITECTURES[1:])


def _default_split(problem: Problem, device: torch.device) -> int:
    """Two blocks a chain took 1.68 ms instead of 2.01 on video-5b, M = 64, but 4.81 instead of 4.22 on lm-1.3b-long."""
    return default_split(problem, device) if problem.mini_batch >= 64 else 1


def _kernel(
    name: str, problem: Problem, groups: int, settings: tuple[int, ...], shared_bytes: int, *options: str
) -> CudaKernel:
    sizes = problem.head_dim, problem.mini_batch, str(problem.causal).lower(), *settings
    count = threads(problem, groups)
    return CudaKernel(
        source=_KERNELS / f"{name}.cu",
        expression=f"ttt::{name}<{KERNEL_DTYPE[problem.dtype]}, {', '.join(map(str, sizes))}>",
        inner_model="linear",
        threads=count,
        options=(f"-DTTT_SHARED_BYTES={shared_bytes}", f"-DTTT_THREADS={count}", *options),
        dynamic_shared_bytes=shared_bytes,
        architectures=architectures_with(shared_bytes),
    )


def _check_aligned(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not aligned(x):
            raise ValueError(
                f"{name}: expected rows at multiples of 16 bytes, got address {x.data_ptr():#x} and strides "
                f"{x.stride()}: call .contiguous(), or use cuda.cupy_plain"
            )
