"""The host's side of both plain pages: memory, arguments, launches, and the sums over chains when they are done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implementations.cuda.arguments import KERNEL_DTYPE, View, check, contiguous_like, default_group, view
from implementations.cuda.module import launch
from implementations.cuda.plain_limits import limit
from implementations.kernels import CudaKernel
from spec.problem import InnerModel, Problem
from spec.tensors import INPUTS, OUTPUTS, Inputs, Outputs

THREADS = 256
SHARED_BYTES = 99 * 1024  # what a block may have on every card from sm_80 on; the kernels count with the same
OPTIONS = ("--device-as-default-execution-space",)  # of lambdas in lambdas

State = tuple[Tensor, ...]  # w1, b1 and for mlp w2, b2


class Shared(NamedTuple):
    """`Inputs` in the kernels' files."""

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

    inputs: Inputs
    kept: State  # [B H groups ...]
    group: int


@dataclass(frozen=True)
class Page:
    """The kernels of one inner model, in `kernels/plain_{inner_model}.cu`.

    Attributes:
        tile_floats: of (problem, backward), how many numbers the tiles of a chain hold at most.
    """

    inner_model: InnerModel
    tile_floats: Callable[[Problem, bool], int]

    def kernel(self, problem: Problem, backward: bool) -> CudaKernel:
        """The forward or the backward kernel for `problem`."""
        causal = "true" if problem.causal else "false"
        sizes = f"{KERNEL_DTYPE[problem.dtype]}, {problem.head_dim}, {problem.mini_batch}, {causal}"
        return CudaKernel(
            source=Path(__file__).parent / "kernels" / f"plain_{self.inner_model}.cu",
            expression=f"ttt::plain::{self.inner_model}_{'backward' if backward else 'forward'}<{sizes}>",
            inner_model=self.inner_model,
            options=OPTIONS,
            threads=THREADS,
            dynamic_shared_bytes=min(SHARED_BYTES, 4 * self.tile_floats(problem, backward)),
        )

    def forward(self, inputs: Any, problem: Problem, group: int | None) -> tuple[Any, Residuals]:
        """Outputs, and the residuals with every `group`-th state."""
        check(inputs, INPUTS, problem, limit(problem))
        group = default_group(problem) if group is None else group
        if group < 1:
            raise ValueError(f"group: expected at least 1 mini-batch, got {group}")
        outputs = OUTPUTS[self.inner_model](*map(contiguous_like, (inputs.xq, *inputs[7:])))
        kept = _states(inputs, problem, -(-problem.mini_batches // group))
        arguments = self._shared(inputs, problem, group, False), inputs[7:], kept, outputs[1:], outputs.out
        self._launch(problem, False, arguments, inputs.xq)
        return outputs, Residuals(inputs, kept, group)

    def backward(self, cotangents: Outputs, residuals: Residuals, problem: Problem) -> Any:
        """Gradients of every input."""
        inputs, kept, group = residuals
        check(cotangents, OUTPUTS, problem, limit(problem), inputs.xq)
        d_tokens, d_first = [*map(contiguous_like, inputs[:4])], tuple(map(contiguous_like, inputs[7:]))
        sums = inputs.w1.new_empty(problem.batch, problem.heads, 2 * (problem.mini_batch + problem.head_dim))
        work = _states(inputs, problem, group)
        shared = self._shared(inputs, problem, group, True)
        arguments = shared, kept, work, view(cotangents.out), cotangents[1:], d_first, *d_tokens, sums
        self._launch(problem, True, arguments, inputs.xq)
        return INPUTS[self.inner_model](*d_tokens, *_finish_sums(sums, problem), *d_first)

    def _shared(self, inputs: Inputs, problem: Problem, group: int, backward: bool) -> Shared:
        size = self.tile_floats(problem, backward)  # more than what does not fit into shared memory
        scratch = inputs.w1.new_empty(problem.batch * problem.heads, size if 4 * size > SHARED_BYTES else 0)
        groups = -(-problem.mini_batches // group)
        counts = problem.heads, problem.mini_batches, group, groups
        return Shared(*map(view, inputs[:4]), *inputs[4:7], *counts, problem.eps, scratch, size)

    def _launch(self, problem: Problem, backward: bool, arguments: tuple[Any, ...], like: Tensor) -> None:
        launch(self.kernel(problem, backward), problem.batch * problem.heads, arguments, like.device, problem)


def _states(inputs: Inputs, problem: Problem, count: int) -> State:
    """Room for `count` states of every chain."""
    return tuple(x.new_empty(problem.batch, problem.heads, count, *x.shape[2:]) for x in inputs[7:])


def _finish_sums(sums: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of token_eta, ln_weight and ln_bias, from the sums of each chain [B H 2 M + 2 D]."""
    m, d = problem.mini_batch, problem.head_dim
    read, update, d_ln_weight, d_ln_bias = sums.split([m, m, d, d], -1)
    read, last = read.sum((0, 1)), update.sum()
    if not problem.causal:  # every token reads with the last entry
        read, last = torch.zeros_like(read), last + read.sum()
    read[-1] += last
    return read, d_ln_weight.sum(0), d_ln_bias.sum(0)
