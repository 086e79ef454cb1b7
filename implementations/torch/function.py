"""`ttt`, differentiable by PyTorch with the written-out backward of the pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from implementations.torch import ttt_linear, ttt_mlp
from implementations.torch.scan import Residuals
from spec.problem import Problem
from spec.tensors import INPUTS, OUTPUTS, Inputs, Outputs, validate

_PAGES = {"linear": ttt_linear, "mlp": ttt_mlp}


def ttt(inputs: Inputs, problem: Problem) -> Outputs:
    """`LinearOutputs` of `LinearInputs`, or `MlpOutputs` of `MlpInputs`: a TTT layer's output and final state.

    Every input has a gradient, and cotangents of `out` AND of the final state reach it. Reverse mode, once.

    Raises:
        ValueError: a tensor has another shape or dtype than `problem` says.
    """
    validate(inputs, INPUTS, problem)
    return OUTPUTS[problem.inner_model](*_Ttt.apply(problem, *inputs))


class _Ttt(torch.autograd.Function):
    """Takes and returns tensors alone, as autograd needs; the states of all mini-batches are saved flat."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs, residuals = _PAGES[problem.inner_model].forward(INPUTS[problem.inner_model](*tensors), problem)
        ctx.problem = problem
        ctx.save_for_backward(*tensors, *(x for state in residuals.states for x in state))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        kind, outputs = INPUTS[ctx.problem.inner_model], OUTPUTS[ctx.problem.inner_model]
        count, width = len(kind._fields), len(outputs._fields) - 1  # of the inputs, and of one state
        inputs, flat = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        states = [flat[i : i + width] for i in range(0, len(flat), width)]
        residuals = Residuals(kind(*inputs), states)
        return None, *_PAGES[ctx.problem.inner_model].backward(outputs(*cotangents), residuals, ctx.problem)
