"""TTT-Linear on tensor cores, the recurrence split off: some warps of a block carry the fast weights, others read them.

One block runs one chain (batch, head). `kernels/linear_blocks.cuh` says how D / 16 warps carry w1 in registers, and
`kernels/linear_forward.cu` how other warps, up to four mini-batches behind them, compute `out`.

Memory: the forward reads the inputs once, writes `out` once, and saves the fast weights of every G-th mini-batch:
4 (D^2 + D) / (G M) bytes a token and head, at D = 64 and G = 16: 65 (M = 16) or 16 (M = 64) beside 386 for the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implementations.cuda.module import launch
from implementations.kernels import CudaKernel
from spec.problem import Problem
from spec.tensors import INPUTS, OUTPUTS, LinearInputs, LinearOutputs, validate

GROUP = 16  # G: mini-batches between two saved states
KERNELS = Path(__file__).with_name("kernels")
SHARED_BYTES = 227 * 1024  # of a block on sm_90 and sm_100
TYPES = {"bf16": "ttt::bf16", "fp16": "ttt::fp16"}


class Residuals(NamedTuple):
    """What the backward needs: the inputs, and the fast weights of every `group`-th mini-batch."""

    inputs: LinearInputs
    saved: Tensor  # [B, H, ceil(N / G), D (D + 1)], in the order of the kernels' accumulators
    group: int


class View(NamedTuple):
    """A tensor `B T H D` or `B T H` as a kernel takes it; strides in numbers."""

    p: Tensor
    stride_b: int
    stride_t: int
    stride_h: int


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
    d_token_eta: Tensor
    d_ln_weight: Tensor
    d_ln_bias: Tensor
    d_w1: Tensor
    d_b1: Tensor
    d_weights: Tensor
    scratch: Tensor
    heads: int
    mini_batches: int
    group: int
    eps: float


class Ring(NamedTuple):
    """How far readers may fall behind: teams of readers, and of each team slots (of weights) and stages (of tokens)."""

    groups: int
    slots: int
    stages: int


# By M, the first that fits into shared memory is taken. In the backward both passes have the same teams.
FORWARD_RINGS = {
    16: (Ring(4, 1, 3), Ring(3, 1, 3), Ring(2, 1, 3), Ring(2, 1, 2)),
    32: (Ring(2, 2, 5), Ring(2, 1, 3), Ring(1, 1, 3), Ring(1, 1, 2)),
    64: (Ring(1, 2, 5), Ring(1, 2, 4), Ring(1, 1, 3), Ring(1, 1, 2)),
    128: (Ring(1, 1, 3), Ring(1, 1, 2)),
}
BACKWARD_RINGS = {
    16: ((4, 3, 2), (3, 3, 2), (2, 3, 2), (1, 3, 3), (1, 2, 2)),  # teams, stages forth, stages back
    32: ((2, 3, 2), (1, 3, 2), (1, 2, 2)),
    64: ((1, 3, 2), (1, 2, 2)),
    128: ((1, 2, 2),),
}


def _forward_bytes(problem: Problem, ring: Ring) -> int:
    """Shared memory of a block: `Plan::BYTES` of FORWARD."""
    d, m = problem.head_dim, problem.mini_batch
    tokens = 2 * m * (d + 8)
    stage = 3 * tokens + 4 * m
    slot = 2 * d * (d + 8) + 4 * d + (tokens if problem.causal else 0)
    return 12 * d + 4 * m + 16 + 4 * d * m + ring.groups * (ring.stages * stage + ring.slots * slot)


def _backward_bytes(problem: Problem, groups: int, forth: int, back: int) -> int:
    """The larger `Plan::BYTES` of AGAIN and REVERSE."""
    d, m = problem.head_dim, problem.mini_batch
    tokens, pairs = 2 * m * (d + 8), 2 * m * (m + 8) if problem.causal else 0
    readers = groups * min(m // 16, 4)
    fixed = 12 * d + 4 * m + 16 + (readers + 1) * 8 * d + (groups * m + d // 16 + 3) // 4 * 16
    again = forth * (4 * tokens + 4 * m) + 2 * d * (d + 8) + 4 * d + (tokens if problem.causal else 0)
    reverse = back * (4 * tokens + 4 * m + 2 * pairs + 4 * m * d + 32 * m) + 2 * d * (d + 8) + 3 * tokens
    return fixed + 4 * d * m + groups * max(again, reverse)


def _first_that_fits(rings, count, problem: Problem):
    return next((ring for ring in rings.get(problem.mini_batch, ()) if count(problem, ring) <= SHARED_BYTES), None)


def _kernel(name: str, problem: Problem, groups: int, ring: tuple[int, ...], shared: int, options: tuple[str, ...]):
    d, m = problem.head_dim, problem.mini_batch
    threads = 2 * d + 32 * min(m // 16, 4) * groups
    settings = ", ".join(map(str, (d, m, str(problem.causal).lower(), groups, *ring)))
    return CudaKernel(
        source=KERNELS / f"{name}.cu",
        expression=f"ttt::{name}<{TYPES[problem.dtype]}, {settings}>",
        inner_model="linear",
        threads=threads,
        options=("--std=c++17", f"-DTTT_SHARED_BYTES={shared}", f"-DTTT_THREADS={threads}", *options),
        dynamic_shared_bytes=shared,
    )


def forward_kernel(problem: Problem, ring: Ring | None = None, options: tuple[str, ...] = ()) -> CudaKernel:
    """The instance that solves `problem`."""
    ring = ring or _first_that_fits(FORWARD_RINGS, _forward_bytes, problem)
    return _kernel("linear_forward", problem, ring[0], ring[1:], _forward_bytes(problem, ring), options)


def kept_bytes(problem: Problem) -> int:
    """What the backward keeps of a mini-batch: `Kept::BYTES`."""
    d, m = problem.head_dim, problem.mini_batch
    return 2 * d * d + 6 * m * d + 32 * m + (4 * m * m if problem.causal else 0)


def backward_kernel(problem: Problem, ring=None, options: tuple[str, ...] = ()) -> CudaKernel:
    """The instance that solves `problem`."""
    count = lambda problem, ring: _backward_bytes(problem, *ring)
    groups, forth, back = ring or _first_that_fits(BACKWARD_RINGS, count, problem)
    shared = _backward_bytes(problem, groups, forth, back)
    options = (f"-DTTT_KEPT_BYTES={kept_bytes(problem)}", *options)
    return _kernel("linear_backward", problem, groups, (1, forth, 1, back), shared, options)


def view(x: Tensor) -> View:
    """`x` as a kernel takes it."""
    return View(x, *x.stride()[:3])


def forward(
    inputs: LinearInputs, problem: Problem, group: int = GROUP, ring: Any = None, options: tuple[str, ...] = ()
) -> tuple[LinearOutputs, Residuals]:
    """Outputs of TTT-Linear, and what `backward` needs."""
    validate(inputs, INPUTS, problem)
    b, t, h, d = inputs.xq.shape
    like, fp32 = inputs.xq, dict(dtype=torch.float32, device=inputs.xq.device)
    outputs = LinearOutputs(
        torch.empty(b, t, h, d, dtype=like.dtype, device=like.device),
        torch.empty(b, h, d, d, **fp32),
        torch.empty(b, h, d, **fp32),
    )
    saved = torch.empty(b, h, -(-problem.mini_batches // group), d * (d + 1), **fp32)
    arguments = ForwardArguments(
        *map(view, inputs[:4]), *inputs[4:], view(outputs.out), *outputs[1:], saved, h, problem.mini_batches, group,
        problem.eps,
    )  # fmt: skip
    launch(forward_kernel(problem, ring and Ring(*ring), options), b * h, arguments, like.device, problem)
    return outputs, Residuals(inputs, saved, group)


def backward(
    cotangents: LinearOutputs, residuals: Residuals, problem: Problem, ring: Any = None, options: tuple[str, ...] = ()
) -> LinearInputs:
    """Gradients of every input, from the cotangents of the output and of the final state."""
    validate(cotangents, OUTPUTS, problem)
    inputs, saved, group = residuals
    b, t, h, d = inputs.xq.shape
    like = inputs.xq

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=like.device)

    d_tokens = [empty(b, t, h, d, dtype=like.dtype) for _ in range(3)]
    d_lr = empty(b, t, h, dtype=like.dtype)
    parts = empty(b * h, problem.mini_batch), empty(b, h, d), empty(b, h, d)
    d_w1, d_b1 = empty(b, h, d, d), empty(b, h, d)
    arguments = BackwardArguments(
        *map(view, inputs[:4]), *inputs[4:7], saved, view(cotangents.out), *cotangents[1:],
        *map(view, d_tokens), view(d_lr), *parts, d_w1, d_b1, empty(b, h, d * (d + 1)),
        empty(b, h, group + 1, kept_bytes(problem), dtype=torch.uint8), h, problem.mini_batches, group, problem.eps,
    )  # fmt: skip
    launch(backward_kernel(problem, ring, options), b * h, arguments, like.device, problem)
    return LinearInputs(*d_tokens, d_lr, *(part.sum(0) for part in parts), d_w1, d_b1)
