"""TTT-Linear in CUDA C++: the fastest rung of the ladder that takes the problem on its device.

A rung is a page with `limit(problem)`, why it cannot solve a problem or None, and `kernels(problem)`, what it launches,
beside `forward` and `backward`. The tensor-core rung copies rows 16 bytes at a time: inputs whose rows start elsewhere
go to the plain rung, and a cotangent is copied.
"""

from __future__ import annotations

from typing import Any

import torch

from implementations.cuda import cupy_linear_split, cupy_plain_linear
from implementations.cuda.dispatch import first_that_takes
from spec.problem import Problem
from spec.tensors import LinearInputs, LinearOutputs

RUNGS = (cupy_linear_split, cupy_plain_linear)  # fastest first


def forward(inputs: LinearInputs, problem: Problem) -> tuple[LinearOutputs, Any]:
    """Outputs of TTT-Linear, and what `backward` needs.

    Raises:
        ValueError: a tensor has another shape, dtype, device or layout than the kernels take, or the problem a size.
        NotImplementedError: this machine cannot run any rung, with the reason.
    """
    rungs = RUNGS if all(map(cupy_linear_split.aligned, inputs[:3])) else RUNGS[1:]
    return first_that_takes(problem, inputs.xq.device, rungs).forward(inputs, problem)


def backward(cotangents: LinearOutputs, residuals: Any, problem: Problem) -> LinearInputs:
    """Gradients of every input, from the cotangents of the output and of the final state.

    Raises:
        ValueError: a cotangent has another shape, dtype, device or layout than the kernels take.
    """
    if not isinstance(residuals, cupy_linear_split.Residuals):
        return cupy_plain_linear.backward(cotangents, residuals, problem)
    if not cupy_linear_split.aligned(cotangents.out):
        cotangents = cotangents._replace(out=cotangents.out.clone(memory_format=torch.contiguous_format))
    return cupy_linear_split.backward(cotangents, residuals, problem)
