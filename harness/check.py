"""Run one implementation on one problem and measure how far every tensor is from the truth.

What is measured here is judged in `rule`. Runs inside a worker process.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np

from harness.frameworks import Framework
from spec.cases import Case, draw
from spec.problem import Pass, Problem
from spec.tensors import INPUTS, OUTPUTS, Inputs, Outputs, validate


@dataclass(frozen=True)
class Truth:
    """What the oracle says of one problem, as float64 NumPy arrays (memory-mapped where they are large)."""

    outputs: Outputs
    gradients: Inputs
    token_eta_scale: np.ndarray


@dataclass(frozen=True)
class TensorCheck:
    """How far one tensor is from the truth.

    Errors are relative: the largest error over the largest true value, the root mean square error over that of
    the true values (absolute where the truth is zero throughout). Two tensors have a fairer scale: `out` that of
    `out - xq`, since the residual would hide its errors, and `d_token_eta` that of the terms it sums, since they
    cancel. `profile` is the largest error in each mini-batch, for tensors with a T axis; `count` the effective number
    of values that the RMS is taken over; `fault` says what else is wrong, whatever the errors.
    """

    tensor: str
    max_error: float | None
    rms_error: float | None
    worst_index: tuple[int, ...] | None
    count: float
    profile: tuple[float, ...] | None = None
    fault: str | None = None


def examine(
    page: ModuleType,
    case: Case,
    problem: Problem,
    passes: tuple[Pass, ...],
    seed: int,
    framework: Framework,
    truth: Truth,
) -> list[TensorCheck]:
    """Every output and gradient of `page` on `problem`, held to `truth`.

    Fresh memory holds NaN while it runs, so that an element that nobody wrote shows. It runs twice from the same
    arrays; any bit that differs between the runs, and any bit of the inputs or outputs that a pass changes, is a
    fault.
    """
    inputs, cotangents = draw(case, problem, seed)
    given, pulled = framework.arrays(inputs, case.strided), framework.arrays(cotangents, case.strided)

    framework.poison()
    results, residuals = page.forward(given, problem)
    validate(results, OUTPUTS, problem)
    outputs = framework.numpy(results)
    checks = _compare(outputs, truth.outputs, problem, out=truth.outputs.out - inputs.xq.astype(np.float64))
    faults = {"out": _difference("forward changed its input", inputs, framework.numpy(given))}

    if "backward" in passes:
        framework.poison()
        pulled_back = page.backward(pulled, residuals, problem)
        validate(pulled_back, INPUTS, problem)
        gradients = framework.numpy(pulled_back)
        found, true = _of_one_lr(gradients, problem), _of_one_lr(truth.gradients, problem)
        checks += _compare(found, true, problem, "d_", token_eta=truth.token_eta_scale)
        repeated = framework.numpy(page.backward(pulled, residuals, problem))
        faults["d_xq"] = (
            _difference("backward changed the input", inputs, framework.numpy(given))
            or _difference("backward changed the output", outputs, framework.numpy(results))
            or _difference("backward changed its cotangent of", cotangents, framework.numpy(pulled))
        )
        faults |= _unequal(gradients, repeated, prefix="d_")

    del residuals
    framework.poison()
    faults |= _unequal(outputs, framework.numpy(page.forward(given, problem)[0]))
    return [replace(check, fault=check.fault or faults.get(check.tensor)) for check in checks]


def _of_one_lr(gradients: Inputs, problem: Problem) -> Inputs:
    """Where a mini-batch has one lr, `d_lr` is the sum over its tokens, [B N H]: how it is shared out means nothing."""
    if not getattr(problem, "one_lr", False):
        return gradients
    cut = gradients.lr.reshape(problem.batch, problem.mini_batches, problem.mini_batch, problem.heads)
    return gradients._replace(lr=cut.astype(np.float64).sum(2))


def _compare(found: Any, true: Any, problem: Problem, prefix: str = "", **scales: np.ndarray) -> list[TensorCheck]:
    return [
        _compare_one(prefix + name, x, t, problem, scales.get(name, t))
        for name, x, t in zip(found._fields, found, true, strict=True)
    ]


def _compare_one(
    tensor: str, found: np.ndarray, true: np.ndarray, problem: Problem, scale: np.ndarray
) -> TensorCheck:
    error = found.astype(np.float64)
    finite = np.isfinite(error)
    if not finite.all():
        worst = tuple(map(int, np.argwhere(~finite)[0]))
        return TensorCheck(tensor, None, None, worst, found.size, fault=f"{(~finite).sum()} elements are not finite")
    error -= true
    np.abs(error, out=error)
    worst = tuple(map(int, np.unravel_index(error.argmax(), error.shape)))
    largest = max(scale.max(), -scale.min()) or 1.0
    profile = None
    if error.ndim > 2 and error.shape[:2] == (problem.batch, problem.tokens):
        cut = error.reshape(problem.batch, problem.mini_batches, -1)
        profile = tuple(map(float, cut.max(axis=(0, 2)) / largest))
    return TensorCheck(
        tensor,
        float(error[worst] / largest),
        float(np.linalg.norm(error) / (np.linalg.norm(scale) or 1.0)),
        worst,
        _effective_count(scale),
        profile,
    )


def _effective_count(scale: np.ndarray) -> float:
    """How many elements the mean square of `scale` is made of: one that dwarfs the others counts alone."""
    squares = np.square(scale)
    return float(squares.sum() ** 2 / (np.square(squares, out=squares).sum() or 1.0))


def _difference(what: str, before: Any, after: Any) -> str | None:
    """`what` and the name of the first tensor whose bits differ, or None."""
    for name, x, y in zip(before._fields, before, after, strict=True):
        if x.tobytes() != y.tobytes():
            return f"{what} {name}"
    return None


def _unequal(first: Any, second: Any, prefix: str = "") -> dict[str, str]:
    """For each tensor whose bits differ between two runs, in how many elements."""
    found = {}
    for name, x, y in zip(first._fields, first, second, strict=True):
        if x.tobytes() != y.tobytes():
            found[prefix + name] = f"two runs differ in {int((x != y).sum())} elements"
    return found
