"""The forward of the pages with JAX's own `vjp` for the backward: the two backwards must agree.

Mini-batches are run in groups of up to `GROUP` under `jax.checkpoint`: kept are the fast weights at the start of each
group, and the rest of a group is computed again on the way back, as in the official JAX code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from implementations.jax import scan, ttt_linear, ttt_mlp
from implementations.jax.scan import MiniBatch, State
from spec.problem import Problem
from spec.tensors import INPUTS, OUTPUTS, Inputs, Outputs

# Memory grows with N / GROUP states kept plus GROUP mini-batches recomputed: least near sqrt(N), 11 for the paper's
# 2048 tokens in mini-batches of 16, and a power of two divides such an N.
GROUP = 16

_PAGES = {"linear": ttt_linear, "mlp": ttt_mlp}


class Tape(NamedTuple):
    """The recorded forward: a function from cotangents to gradients, which is a pytree of the arrays that it needs."""

    pull_back: Callable[[Outputs], tuple[Inputs]]


def forward(inputs: Inputs, problem: Problem) -> tuple[Outputs, Tape]:
    """Outputs, and the tape that leads to them.

    Raises:
        ValueError: a tensor has another shape or dtype than `problem` says.
    """
    scan.check(inputs, INPUTS, problem)
    outputs, pull_back = _forward(inputs, problem)
    return outputs, Tape(pull_back)


def backward(cotangents: Outputs, residuals: Tape, problem: Problem) -> Inputs:
    """Gradients of every input, from the cotangents of the output and of the final state.

    Raises:
        ValueError: a cotangent has another shape or dtype than `problem` says.
    """
    scan.check(cotangents, OUTPUTS, problem)
    return _backward(cotangents, residuals.pull_back)


@functools.partial(jax.jit, static_argnames="problem")
def _forward(inputs: Inputs, problem: Problem) -> tuple[Outputs, Callable[[Outputs], tuple[Inputs]]]:
    return jax.vjp(functools.partial(_run, problem=problem), inputs)


@jax.jit
def _backward(cotangents: Outputs, pull_back: Callable[[Outputs], tuple[Inputs]]) -> Inputs:
    (gradients,) = pull_back(cotangents)
    return gradients


def _run(inputs: Inputs, problem: Problem) -> Outputs:
    batches, parameters, state = scan.cut(inputs, problem)
    one = scan.over_heads(_PAGES[problem.inner_model].forward_step, problem)
    size = group_size(problem.mini_batches)

    def body(state: State, batch: MiniBatch) -> tuple[State, jax.Array]:
        out, state = one(state, batch, parameters)
        return state, out

    @jax.checkpoint
    def group(state: State, batches: MiniBatch) -> tuple[State, jax.Array]:
        return jax.lax.scan(body, state, batches)

    grouped = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), batches)
    state, outs = jax.lax.scan(group, state, grouped)
    return OUTPUTS[problem.inner_model](scan.join(outs.reshape(-1, *outs.shape[2:])), *state)


def group_size(mini_batches: int) -> int:
    """The largest divisor of `mini_batches` that is not above `GROUP`."""
    return max(size for size in range(1, GROUP + 1) if mini_batches % size == 0)
