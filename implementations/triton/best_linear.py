"""`triton.best` for TTT-Linear: which variant solves a problem.

`split_linear` wherever products run on tensor cores. On one H100 in bf16, ms of a forward / of forward and backward:

                  split_linear     ttt_linear
    lm-1.3b       0.176 / 0.84     0.217 / 1.27
    lm-1.3b-long   1.92 / 5.43      4.5 / 20.5 (an earlier run)
    video-5b       0.60 / 2.26     0.77 / 7.1
    lm-1.3b-m64   0.163 / 0.77     0.128 / 2.0 (development runs)

A forward alone of a short chain of large mini-batches is faster in one kernel, but what it saves is of no use to the
other's backward. In IEEE fp32 the products themselves take the time, and one kernel is faster (38 against 53 ms forward
and backward, an earlier run).

The names of the kernels say which variant ran, those of `split_linear` begin with `split_`; a sweep's row lists them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from implementations.triton import split_linear, ttt_linear
from implementations.triton.limits import split_limit
from spec.problem import Problem
from spec.tensors import LinearInputs, LinearOutputs


def page(problem: Problem) -> Any:
    """The module that solves `problem`; in IEEE fp32 the products themselves take the time, and one kernel is best."""
    exact = problem.dtype == "fp32" and problem.matmul_precision == "ieee"
    return ttt_linear if exact or split_limit(problem) else split_linear


def forward(inputs: LinearInputs, problem: Problem, group: int | None = None) -> tuple[LinearOutputs, Any]:
    """As the page's; `group` is the page's own choice unless told.

    Raises:
        ValueError: `problem` is beyond the limits of the Triton pages, or a tensor does not fit it or the kernels.
    """
    chosen = page(problem)
    return chosen.forward(inputs, problem, chosen.default_group(problem) if group is None else group)


def backward(cotangents: LinearOutputs, residuals: Any, problem: Problem) -> LinearInputs:
    """As the page's.

    Raises:
        ValueError: a cotangent does not fit `problem` or the kernels.
    """
    return page(problem).backward(cotangents, residuals, problem)


def saved_shapes(problem: Problem) -> tuple[tuple[int, ...], ...]:
    """Of what `forward` saves beside the inputs, all fp32."""
    return page(problem).saved_shapes(problem)


def residuals(inputs: LinearInputs, saved: list[Tensor], problem: Problem) -> Any:
    """What `forward` saved, as `backward` takes it."""
    return page(problem).residuals(inputs, saved, problem)
