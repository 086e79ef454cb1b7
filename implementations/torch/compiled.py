"""The pages with `torch.compile` around the step of one mini-batch, as users of the public code run it.

The loop over mini-batches stays in Python: compiling it whole would unroll the chain.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch._dynamo

from implementations.torch import scan, ttt_linear, ttt_mlp
from implementations.torch.scan import Residuals
from spec.problem import Problem
from spec.tensors import Inputs, Outputs

_PAGES = {"linear": ttt_linear, "mlp": ttt_mlp}


# One program for each problem, as a user has who has one, without end: past PyTorch's limit of 8 it would raise.
_PROGRAMS = torch._dynamo.config.patch(recompile_limit=2**16, accumulated_recompile_limit=2**16)


@functools.cache
def _compiled(step: Callable) -> Callable:
    return torch.compile(step, fullgraph=True, dynamic=False)


def forward(inputs: Inputs, problem: Problem) -> tuple[Outputs, Residuals]:
    """Outputs, and what `backward` needs; see the page of the inner model."""
    with _PROGRAMS:
        return scan.forward(_compiled(_PAGES[problem.inner_model].forward_step), inputs, problem)


def backward(cotangents: Outputs, residuals: Residuals, problem: Problem) -> Inputs:
    """Gradients of every input; see the page of the inner model."""
    with _PROGRAMS:
        return scan.backward(_compiled(_PAGES[problem.inner_model].backward_step), cotangents, residuals, problem)
