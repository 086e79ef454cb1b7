"""The chain over mini-batches, for any inner model: cut, `lax.scan`, put together again.

`forward_step` and `backward_step` of a page do one mini-batch of one head; this module spreads them over heads and
batch with `vmap` and runs them along the tokens. One program is compiled for each problem.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from jax import Array

from spec.problem import ARRAY_DTYPE, Problem
from spec.tensors import INPUTS, OUTPUTS, Inputs, Outputs, validate

State = tuple[Array, ...]  # w1 [D D|F], b1 [D|F], and for mlp w2, b2; [B H ...] outside the steps
Step = Callable


class MiniBatch(NamedTuple):
    """One mini-batch of one head; [B M H ...] outside the steps, [N B M H ...] for all of them."""

    xq: Array  # [M D]
    xk: Array  # [M D]
    xv: Array  # [M D]
    lr: Array  # [M]


class Parameters(NamedTuple):
    """What every mini-batch shares."""

    token_eta: Array  # [M]
    ln_weight: Array  # [D], [H D] outside the steps
    ln_bias: Array  # [D], [H D] outside the steps


class Residuals(NamedTuple):
    """What the backward needs: the inputs, and the fast weights at the start of every mini-batch, [N B H ...]."""

    inputs: Inputs
    states: State


def forward(step: Step, inputs: Inputs, problem: Problem) -> tuple[Outputs, Residuals]:
    """Run `step(state, mini_batch, parameters, problem) -> (out, state)` over all mini-batches, first to last."""
    check(inputs, INPUTS, problem)
    outputs, states = _forward(step, inputs, problem)
    return outputs, Residuals(inputs, states)


def backward(step: Step, cotangents: Outputs, residuals: Residuals, problem: Problem) -> Inputs:
    """Run `step(d_state, d_out, state, mini_batch, parameters, problem)` over all mini-batches, last to first.

    A step gives (d_state, d_mini_batch, d_parameters); the gradients of the parameters are summed over heads,
    batch and mini-batches as their shapes say.
    """
    check(cotangents, OUTPUTS, problem)
    return _backward(step, cotangents, residuals, problem)


def check(tensors: tuple, kinds: Mapping[str, type], problem: Problem) -> None:
    """`spec.tensors.validate`, and that JAX will not quietly make an fp64 problem an fp32 one."""
    validate(tensors, kinds, problem)
    if problem.dtype == "fp64" and not jax.config.jax_enable_x64:
        raise ValueError("fp64: expected jax_enable_x64 to be on, got off")


@functools.partial(jax.jit, static_argnames=("step", "problem"))
def _forward(step: Step, inputs: Inputs, problem: Problem) -> tuple[Outputs, State]:
    batches, parameters, state = cut(inputs, problem)
    one = over_heads(step, problem)

    def body(state: State, batch: MiniBatch) -> tuple[State, tuple[Array, State]]:
        out, new_state = one(state, batch, parameters)
        return new_state, (out, state)

    state, (outs, states) = jax.lax.scan(body, state, batches)
    return OUTPUTS[problem.inner_model](join(outs), *state), states


@functools.partial(jax.jit, static_argnames=("step", "problem"))
def _backward(step: Step, cotangents: Outputs, residuals: Residuals, problem: Problem) -> Inputs:
    batches, parameters, _ = cut(residuals.inputs, problem)
    one = over_heads_backward(step, problem)

    def body(carry: tuple[State, Parameters], batch: tuple) -> tuple[tuple[State, Parameters], MiniBatch]:
        d_state, d_parameters = carry
        d_state, d_batch, d_shared = one(d_state, *batch, parameters)
        return (d_state, jax.tree.map(jax.numpy.add, d_parameters, d_shared)), d_batch

    carry = cotangents[1:], jax.tree.map(jax.numpy.zeros_like, parameters)
    d_outs = cut_tokens(cotangents.out, problem)
    (d_state, d_parameters), d_batches = jax.lax.scan(body, carry, (d_outs, residuals.states, batches), reverse=True)
    return INPUTS[problem.inner_model](*map(join, d_batches), *d_parameters, *d_state)


def over_heads(step: Step, problem: Problem) -> Step:
    """A page's forward step for every head: (state, mini_batch, parameters) -> (out, state), I/O dtype outside."""

    def one(state: State, batch: MiniBatch, parameters: Parameters) -> tuple[Array, State]:
        out, state = step(state, _cast(batch, problem.accumulate_dtype), parameters, problem)
        return out.astype(ARRAY_DTYPE[problem.dtype]), state

    # The head is the last axis but one of tokens, [M H D]: no transposed copy.
    heads = jax.vmap(one, (0, MiniBatch(1, 1, 1, 1), Parameters(None, 0, 0)), (1, 0))
    return jax.vmap(heads, (0, 0, None))


def over_heads_backward(step: Step, problem: Problem) -> Step:
    """A page's backward step for every head; the gradients of the parameters come summed over heads and batch."""

    def one(
        d_state: State, d_out: Array, state: State, batch: MiniBatch, parameters: Parameters
    ) -> tuple[State, MiniBatch, Parameters]:
        d_out, batch = _cast((d_out, batch), problem.accumulate_dtype)
        d_state, d_batch, d_parameters = step(d_state, d_out, state, batch, parameters, problem)
        return d_state, _cast(d_batch, problem.dtype), d_parameters

    tokens, parameters = MiniBatch(1, 1, 1, 1), Parameters(None, 0, 0)
    heads = jax.vmap(one, (0, 1, 0, tokens, parameters), (0, tokens, 0))
    batch = jax.vmap(heads, (0, 0, 0, 0, None))

    def summed(*arguments) -> tuple[State, MiniBatch, Parameters]:
        d_state, d_batch, d = batch(*arguments)
        return d_state, d_batch, Parameters(d.token_eta.sum((0, 1)), d.ln_weight.sum(0), d.ln_bias.sum(0))

    return summed


def cut(inputs: Inputs, problem: Problem) -> tuple[MiniBatch, Parameters, State]:
    """All mini-batches [N B M H ...], the parameters, and the initial state."""
    batches = MiniBatch(*(cut_tokens(x, problem) for x in inputs[:4]))
    return batches, Parameters(*inputs[4:7]), tuple(inputs[7:])


def cut_tokens(x: Array, problem: Problem) -> Array:
    """[B T H ...] -> [N B M H ...]."""
    return x.reshape(x.shape[0], problem.mini_batches, problem.mini_batch, *x.shape[2:]).swapaxes(0, 1)


def join(x: Array) -> Array:
    """[N B M H ...] -> [B T H ...]."""
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def _cast(tree, dtype: str):
    return jax.tree.map(lambda x: x.astype(ARRAY_DTYPE[dtype]), tree)
