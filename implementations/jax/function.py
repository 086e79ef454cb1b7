"""`ttt`, differentiable by JAX with the written-out backward of the pages."""

from __future__ import annotations

import functools

import jax

from implementations.jax import ttt_linear, ttt_mlp
from implementations.jax.scan import Residuals
from spec.problem import Problem
from spec.tensors import Inputs, Outputs

_PAGES = {"linear": ttt_linear, "mlp": ttt_mlp}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def ttt(inputs: Inputs, problem: Problem) -> Outputs:
    """`LinearOutputs` of `LinearInputs`, or `MlpOutputs` of `MlpInputs`: a TTT layer's output and final state.

    Every input has a gradient, and cotangents of `out` AND of the final state reach it. Reverse mode, once.

    Raises:
        ValueError: a tensor has another shape or dtype than `problem` says, or fp64 is asked for without x64.
    """
    return _forward(inputs, problem)[0]


def _forward(inputs: Inputs, problem: Problem) -> tuple[Outputs, Residuals]:
    return _PAGES[problem.inner_model].forward(inputs, problem)


def _backward(problem: Problem, residuals: Residuals, cotangents: Outputs) -> tuple[Inputs]:
    return (_PAGES[problem.inner_model].backward(cotangents, residuals, problem),)


ttt.defvjp(_forward, _backward)
