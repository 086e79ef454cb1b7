"""Peers that leave their backward to PyTorch's autograd: record the forward, pull cotangents through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from implementations.torch.scan import matmul_mode
from spec.problem import Problem
from spec.tensors import INPUTS, OUTPUTS, Inputs, Outputs, validate


class Graph(NamedTuple):
    """The recorded forward: outputs that still know how they came from the inputs."""

    inputs: Inputs
    outputs: Outputs


def forward(run: Callable[[Inputs, Problem], Outputs], inputs: Inputs, problem: Problem) -> tuple[Outputs, Graph]:
    """What `run` gives, and the autograd graph that leads to it.

    Raises:
        ValueError: a tensor has another shape or dtype than `problem` says.
    """
    validate(inputs, INPUTS, problem)
    leaves = type(inputs)(*(x.detach().requires_grad_() for x in inputs))
    with torch.enable_grad(), matmul_mode(problem):
        outputs = run(leaves, problem)
    return type(outputs)(*(x.detach() for x in outputs)), Graph(leaves, outputs)


def backward(cotangents: Outputs, residuals: Graph, problem: Problem) -> Inputs:
    """Gradients of every input by autograd, from the cotangents of the output and of the final state.

    Raises:
        ValueError: a cotangent has another shape or dtype than `problem` says.
    """
    validate(cotangents, OUTPUTS, problem)
    with matmul_mode(problem):
        gradients = torch.autograd.grad(
            residuals.outputs, residuals.inputs, cotangents, retain_graph=True, materialize_grads=True
        )
    return type(residuals.inputs)(*gradients)
