"""TTT-MLP in CUDA C++: the fastest rung of the ladder that takes the problem on its device.

A rung is a page with `limit(problem)`, why it cannot solve a problem or None, and `kernels(problem)`, what it launches,
beside `forward` and `backward`.
"""

from __future__ import annotations

from typing import Any

from implementations.cuda import cupy_mlp_registers, cupy_plain_mlp
from implementations.cuda.dispatch import first_that_takes
from spec.problem import Problem
from spec.tensors import MlpInputs, MlpOutputs

RUNGS = (cupy_mlp_registers, cupy_plain_mlp)  # fastest first


def forward(inputs: MlpInputs, problem: Problem) -> tuple[MlpOutputs, Any]:
    """Outputs of TTT-MLP, and what `backward` needs.

    Raises:
        ValueError: a tensor has another shape, dtype, device or layout than the kernels take, or the problem a size.
        NotImplementedError: this machine cannot run any rung, with the reason.
    """
    return first_that_takes(problem, inputs.xq.device, RUNGS).forward(inputs, problem)


def backward(cotangents: MlpOutputs, residuals: Any, problem: Problem) -> MlpInputs:
    """Gradients of every input, from the cotangents of the output and of the final state.

    Raises:
        ValueError: a cotangent has another shape, dtype, device or layout than the kernels take.
    """
    return first_that_takes(problem, residuals.inputs.xq.device, RUNGS).backward(cotangents, residuals, problem)
