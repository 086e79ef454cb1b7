"""The forward of the pages with PyTorch's own autograd for the backward: the two backwards must agree."""

from __future__ import annotations

from typing import NamedTuple

import torch

from implementations.torch import scan, ttt_linear, ttt_mlp
from spec.problem import Problem
from spec.tensors import OUTPUTS, Inputs, Outputs, validate

_PAGES = {"linear": ttt_linear, "mlp": ttt_mlp}


class Graph(NamedTuple):
    """The recorded forward: outputs that still know how they came from the inputs."""

    inputs: Inputs
    outputs: Outputs


def forward(inputs: Inputs, problem: Problem) -> tuple[Outputs, Graph]:
    """Outputs, and the autograd graph that leads to them.

    Raises:
        ValueError: a tensor has another shape or dtype than `problem` says.
    """
    leaves = type(inputs)(*(x.detach().requires_grad_() for x in inputs))
    with torch.enable_grad():
        outputs, _ = _PAGES[problem.inner_model].forward(leaves, problem)
    return type(outputs)(*(x.detach() for x in outputs)), Graph(leaves, outputs)


def backward(cotangents: Outputs, residuals: Graph, problem: Problem) -> Inputs:
    """Gradients of every input, from the cotangents of the output and of the final state.

    Raises:
        ValueError: a cotangent has another shape or dtype than `problem` says.
    """
    validate(cotangents, OUTPUTS, problem)
    with scan.matmul_mode(problem):
        gradients = torch.autograd.grad(
            residuals.outputs, residuals.inputs, cotangents, retain_graph=True, materialize_grads=True
        )
    return type(residuals.inputs)(*gradients)
