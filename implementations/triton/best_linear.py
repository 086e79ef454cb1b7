"""`triton.best` for TTT-Linear: which variant and which configuration solves a problem fastest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from implementations.kernels import TritonKernel
from implementations.triton import split_linear
from spec.problem import Problem
from spec.tensors import LinearInputs, LinearOutputs


def page(problem: Problem) -> Any:
    """The module that solves `problem`."""
    return split_linear


def forward(inputs: LinearInputs, problem: Problem, group: int | None = None) -> tuple[LinearOutputs, Any]:
    """As the page's."""
    return page(problem).forward(inputs, problem, group)


def backward(cotangents: LinearOutputs, residuals: Any, problem: Problem) -> LinearInputs:
    """As the page's."""
    return page(problem).backward(cotangents, residuals, problem)


def saved_shapes(problem: Problem) -> tuple[tuple[int, ...], ...]:
    """Of what `forward` saves beside the inputs."""
    return page(problem).saved_shapes(problem)


def residuals(inputs: LinearInputs, saved: list[Tensor], problem: Problem) -> Any:
    """What `forward` saved, as `backward` takes it."""
    return page(problem).residuals(inputs, saved, problem)


def static_kernels() -> Iterator[TritonKernel]:
    """Those of every page it may choose."""
    yield from split_linear.static_kernels()
