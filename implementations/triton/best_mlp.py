"""`triton.best` for TTT-MLP: which variant solves a problem."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from implementations.triton import ttt_mlp, ttt_mlp_offchain
from implementations.triton.mlp_limits import offchain_limit
from spec.problem import Problem
from spec.tensors import MlpInputs, MlpOutputs


def page(problem: Problem) -> Any:
    """The module that solves `problem`: off the chain where that can."""
    return ttt_mlp if offchain_limit(problem) else ttt_mlp_offchain


def forward(inputs: MlpInputs, problem: Problem, group: int | None = None) -> tuple[MlpOutputs, Any]:
    """As the page's."""
    return page(problem).forward(inputs, problem, group)


def backward(cotangents: MlpOutputs, residuals: Any, problem: Problem) -> MlpInputs:
    """As the page's."""
    return page(problem).backward(cotangents, residuals, problem)


def saved_shapes(problem: Problem) -> tuple[tuple[int, ...], ...]:
    """Of what `forward` saves beside the inputs."""
    return page(problem).saved_shapes(problem)


def residuals(inputs: MlpInputs, saved: list[Tensor], problem: Problem) -> Any:
    """What `forward` saved, as `backward` takes it."""
    return page(problem).residuals(inputs, saved, problem)
