"""`triton.best` for TTT-Linear: which variant solves a problem.

`split_linear` wherever products run on tensor cores: on one H100 its recurrence takes 1.0 to 1.3 us a mini-batch of
lm-1.3b where the loop of `ttt_linear`, which does all the work, takes 2.7 forward and 7.7 backward. In IEEE fp32 the
products themselves take the time, and one kernel is faster (38 against 53 ms forward + backward). Times of whole calls
are in results/h100/ladder.csv; those of kernels in other settings, from which the settings of `split_linear` were
chosen, in results/h100/triton_linear_kernels.csv.

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
