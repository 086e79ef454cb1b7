"""The host's side of both plain pages: memory, arguments, launches, and the sums over chains when they are done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implementations.cuda.arguments import KERNEL_DTYPE, View, check, contiguous_like, default_group, view
from implementations.cuda.module import launch, shared_bytes
from implementations.cuda.plain_limits import limit
from implementations.kernels import CudaKernel
from spec.problem import InnerModel, Problem
from spec.tensors import INPUTS, OUTPUTS, Inputs, Outputs

THREADS = 256
LEAST_SHARED = 99 * 1024  # bytes that a block may have on every card from sm_80 on
SHARED = {("sm_80",): 163 * 1024, ("sm_90", "sm_100"): 227 * 1024}
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

    def kernel(self, problem: Problem, backward: bool, room: int = LEAST_SHARED) -> CudaKernel:
        """The forward or the backward kernel for `problem`, where a block may have `room` bytes of shared memory."""
        causal = "true" if problem.causal else "false"
        sizes = f"{KERNEL_DTYPE[problem.dtype]}, {problem.head_dim}, {problem.mini_batch}, {causal}"
        shared = min(room, 4 * self.tile_floats(problem, backward))
        return CudaKernel(
            source=Path(__file__).parent / "kernels" / f"plain_{self.inner_model}.cu",
            expression=f"ttt::plain::{self.inner_model}_{'backward' if backward else 'forward'}<{sizes}>",
            inner_model=self.inner_model,
            options=(*OPTIONS, f"-DTTT_SHARED_BYTES={shared}"),
            threads=THREADS,
            dynamic_shared_bytes=shared,
        )

    def static_kernels(self) -> Iterator[CudaKernel]:
        """Both kernels in bf16 at D = 64, as A100 and H100 launch them: M = 16 causal, and M = 64 not causal."""
        for (mini_batch, causal), backward in product(((16, True), (64, False)), (False, True)):
            problem = Problem(self.inner_model, 1, mini_batch, 1, 64, mini_batch, causal, dtype="bf16")
            each = {self.kernel(problem, backward, room): cards for cards, room in SHARED.items()}
            yield from each if len(each) == 1 else (replace(x, architectures=cards) for x, cards in each.items())

    def forward(self, inputs: Any, problem: Problem, group: int | None) -> tuple[Any, Residuals]:
        """Outputs, and the residuals with every `group`-th state."""
        check(inputs, INPUTS, problem, limit(problem))
        if group is not None and group < 1:
            raise ValueError(f"group: expected at least 1 mini-batch, got {group}")
        outputs = OUTPUTS[self.inner_model](*map(contiguous_like, (inputs.xq, *inputs[7:])))
        residuals = empty_residuals(inputs, problem, group)
        shared = self._shared(inputs, problem, residuals.group, False)
        self._launch(problem, False, (shared, inputs[7:], residuals.kept, outputs[1:], outputs.out), inputs.xq)
        return outputs, residuals

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
        size = self.tile_floats(problem, backward)  # more than what has no place in shared memory
        fits = 4 * size <= shared_bytes(inputs.w1.device)
        scratch = inputs.w1.new_empty(problem.batch * problem.heads, 0 if fits else size)
        groups = -(-problem.mini_batches // group)
        counts = problem.heads, problem.mini_batches, group, groups
        return Shared(*map(view, inputs[:4]), *inputs[4:7], *counts, problem.eps, scratch, size)

    def _launch(self, problem: Problem, backward: bool, arguments: tuple[Any, ...], like: Tensor) -> None:
        kernel = self.kernel(problem, backward, shared_bytes(like.device))
        launch(kernel, problem.batch * problem.heads, arguments, like.device, problem)


def empty_residuals(inputs: Inputs, problem: Problem, group: int | None = None) -> Residuals:
    """Residuals with room for the kept states and nothing in it yet."""
    group = group or default_group(problem)
    return Residuals(inputs, _states(inputs, problem, -(-problem.mini_batches // group)), group)


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
