"""Small problems through kernels, for a tool that watches them run: see `cuda.exercise` and `triton.exercise`.

A few mini-batches and two chains each, bf16. A line ends in a hash of every bit that came out; arguments choose by a
part of the line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from spec.cases import Case, draw
from spec.problem import InnerModel, Problem
from spec.tensors import INPUTS, OUTPUTS, validate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Run(NamedTuple):
    """The two passes of a page, by a name; sizes are (D, M, causal), each with so many tokens."""

    name: str
    inner_model: InnerModel
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    sizes: Sequence[tuple[int, int, bool]]
    mini_batches: int


def exercise(runs: Iterable[Run], parts: Sequence[str]) -> None:
    """Print a line for every run and size that has all `parts` in it."""
    for run in runs:
        for d, m, causal in run.sizes:
            line = f"{run.name} D={d} M={m} {'causal' if causal else 'not causal'}"
            if all(part in line for part in parts):
                case = Case("exercise", "", 1, run.mini_batches * m, 2, d, m, causal, adjust=_every_weight_moves)
                problem = case.problem(run.inner_model, "bf16")
                print(line, _solve(case, problem, run.forward, run.backward), flush=True)


def _solve(case: Case, problem: Problem, forward: Any, backward: Any) -> str:
    """A hash of outputs and gradients; what is handed in was checked and copied from the host."""
    inputs, cotangents = (type(x)(*map(_tensor, x)) for x in draw(case, problem))
    validate(inputs, INPUTS, problem)
    validate(cotangents, OUTPUTS, problem)
    outputs, residuals = forward(inputs, problem)
    found = [*outputs, *backward(cotangents, residuals, problem)]
    return hashlib.sha256(b"".join(x.cpu().view(torch.uint8).numpy().tobytes() for x in found)).hexdigest()[:16]


def _tensor(x: Any) -> torch.Tensor:
    bits = torch.from_numpy(x.view("int16")).view(torch.bfloat16) if x.dtype.name == "bfloat16" else torch.from_numpy(x)
    return bits.to(DEVICE)


def _every_weight_moves(values: dict[str, Any]) -> None:
    values["token_eta"] += 0.1  # drawn, the last may be 0
