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


class Ring(NamedTuple):
    """How far readers may fall behind: teams of readers, and of each team slots (of weights) and stages (of tokens)."""

    groups: int
    slots: int
    stages: int


# By M, most first; `_ring` takes the first that fits into shared memory.
RINGS = {
    16: (Ring(4, 1, 3), Ring(3, 1, 3), Ring(2, 1, 3), Ring(2, 1, 2)),
    32: (Ring(2, 2, 5), Ring(2, 1, 3), Ring(1, 1, 3), Ring(1, 1, 2)),
    64: (Ring(1, 2, 5), Ring(1, 2, 4), Ring(1, 1, 3), Ring(1, 1, 2)),
    128: (Ring(1, 1, 3), Ring(1, 1, 2)),
}


def forward_bytes(problem: Problem, ring: Ring) -> int:
    """Shared memory of a block: `Plan::BYTES`."""
    d, m = problem.head_dim, problem.mini_batch
    tokens = 2 * m * (d + 8)
    stage = 3 * tokens + 4 * m
    slot = 2 * d * (d + 8) + 4 * d + (tokens if problem.causal else 0)
    return ring.groups * (ring.stages * stage + ring.slots * slot) + 2 * 2 * d * m + 12 * d + 4 * m + 16


def forward_kernel(problem: Problem, ring: Ring | None = None, options: tuple[str, ...] = ()) -> CudaKernel:
    """The instance that solves `problem`."""
    d, m = problem.head_dim, problem.mini_batch
    ring = ring or next(ring for ring in RINGS[m] if forward_bytes(problem, ring) <= SHARED_BYTES)
    threads = 2 * d + 32 * min(m // 16, 4) * ring.groups
    shared = forward_bytes(problem, ring)
    causal = str(problem.causal).lower()
    return CudaKernel(
        source=KERNELS / "linear_forward.cu",
        expression=f"ttt::linear_forward<{TYPES[problem.dtype]}, {d}, {m}, {causal}, {', '.join(map(str, ring))}>",
        inner_model="linear",
        threads=threads,
        options=("--std=c++17", f"-DTTT_SHARED_BYTES={shared}", f"-DTTT_THREADS={threads}", *options),
        dynamic_shared_bytes=shared,
    )


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
