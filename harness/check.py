"""Run one implementation on one problem and measure how far every tensor is from the truth.

What is measured here is judged in `rule`. Runs inside a worker process. Whatever the framework, its arrays are copied
and compared as PyTorch tensors where they are, in float64: a GPU does in milliseconds what takes its host seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.frameworks import Framework
from spec.cost import working_bytes
from spec.problem import ARRAY_DTYPE, Pass, Problem
from spec.tensors import INPUTS, OUTPUTS, Inputs, Outputs, tensor_specs, validate

if TYPE_CHECKING:  # the command line reads what is declared here, and never waits for PyTorch
    import torch

VARIES = "two runs differ"  # the fault of what does not repeat bit for bit: in a reason, and marked in the matrices


@dataclass(frozen=True)
class Truth:
    """What the oracle says of one problem, as float64 PyTorch tensors on the CPU, mapped from files."""

    outputs: Outputs
    gradients: Inputs
    token_eta_scale: torch.Tensor


@dataclass(frozen=True)
class TensorCheck:
    """How far one tensor is from the truth.

    Errors are relative: the largest error over the largest true value, the root mean square error over that of
    the true values (absolute where the truth is zero throughout). Two tensors have a fairer scale: `out` that of
    `out - xq`, since the residual would hide its errors, and `d_token_eta` that of the terms it sums, since they
    cancel. `profile` is the largest error in each mini-batch, for tensors with a T axis; `count` the effective number
    of values that the RMS is taken over; `fault` says what else is wrong, whatever the errors. `first_call_s` is what
    the first call took that gave the tensor, by the host, compilation and autotuning in it.
    """

    tensor: str
    max_error: float | None
    rms_error: float | None
    worst_index: tuple[int, ...] | None
    count: float
    profile: tuple[float, ...] | None = None
    fault: str | None = None
    first_call_s: float | None = None


def examine(
    page: ModuleType,
    problem: Problem,
    passes: tuple[Pass, ...],
    drawn: tuple[Inputs, Outputs],
    framework: Framework,
    truth: Truth,
    strided: bool = False,
) -> list[TensorCheck]:
    """Every output and gradient of `page` on `problem`, held to `truth`.

    `drawn` holds the inputs and the cotangents of the outputs, as `spec.cases.draw` gives them. Fresh memory holds
    NaN while the page runs, so that an element that nobody wrote shows. It runs twice from the same arrays; any bit
    that differs between the runs, and any bit of the inputs or outputs that a pass changes, is a fault.
    """
    given, pulled = (framework.arrays(arrays, strided) for arrays in drawn)
    inputs, cotangents = framework.copies(given), framework.copies(pulled)

    memory = working_bytes(problem)
    framework.poison(memory)
    (results, residuals), forward_s = _timed(framework, page.forward, given, problem)
    _require_arrays(results, OUTPUTS, problem)
    outputs = framework.copies(results)
    faults = {"out": _difference("forward changed its input", inputs, framework.copies(given))}

    gradients, backward_s = None, None
    if "backward" in passes:
        framework.poison(memory)
        pulled_back, backward_s = _timed(framework, page.backward, pulled, residuals, problem)
        _require_arrays(pulled_back, INPUTS, problem, "d_")
        gradients = framework.copies(pulled_back)
        del pulled_back
        repeated = framework.copies(page.backward(pulled, residuals, problem))
        faults["d_xq"] = (
            _difference("backward changed the input", inputs, framework.copies(given))
            or _difference("backward changed the output", outputs, framework.copies(results))
            or _difference("backward changed its cotangent of", cotangents, framework.copies(pulled))
        )
        faults |= _unequal(gradients, repeated, prefix="d_")
        del repeated

    del residuals, results
    framework.poison(memory)
    faults |= _unequal(outputs, framework.copies(page.forward(given, problem)[0]))
    del given, pulled

    checks = _compare(outputs, truth.outputs, problem, residual=inputs.xq)
    checks = [replace(check, first_call_s=forward_s) for check in checks]
    if gradients is not None:
        found, true = _of_one_lr(gradients, problem), _of_one_lr(truth.gradients, problem)
        of_gradients = _compare(found, true, problem, "d_", token_eta=truth.token_eta_scale)
        checks += [replace(check, first_call_s=backward_s) for check in of_gradients]
    return [replace(check, fault=check.fault or faults.get(check.tensor)) for check in checks]


def _require_arrays(tensors: Any, kinds: Mapping[str, type], problem: Problem, prefix: str = "") -> None:
    """What `validate` requires, and that all of them are arrays: a gradient may be None, say."""
    kind = kinds[problem.inner_model]
    specs = tensor_specs(kind, problem) if type(tensors) is kind else ()  # `validate` refuses another tuple
    for spec, tensor in zip(specs, tensors, strict=False):
        if not (hasattr(tensor, "shape") and hasattr(tensor, "dtype")):
            expected = f"({', '.join(spec.axes)}) = {spec.shape} of {ARRAY_DTYPE[spec.dtype]}"
            got = None if tensor is None else type(tensor).__name__
            raise ValueError(f"{prefix}{spec.name}: expected {expected}, got {got}")
    validate(tensors, kinds, problem)


def _timed(framework: Framework, function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What the function returns, and after how many seconds all of it is there."""
    started = time.perf_counter()
    result = function(*arguments)
    framework.synchronize(result)
    return result, time.perf_counter() - started


def _of_one_lr(gradients: Inputs, problem: Problem) -> Inputs:
    """Where a mini-batch has one lr, `d_lr` is the sum over its tokens, [B N H]: how it is shared out means nothing."""
    if not getattr(problem, "one_lr", False):
        return gradients
    cut = gradients.lr.reshape(problem.batch, problem.mini_batches, problem.mini_batch, problem.heads)
    return gradients._replace(lr=cut.double().sum(2))


def _compare(
    found: Any,
    true: Any,
    problem: Problem,
    prefix: str = "",
    residual: torch.Tensor | None = None,
    token_eta: torch.Tensor | None = None,
) -> list[TensorCheck]:
    """A check of each tensor; `residual` is what the scale of `out` is without, `token_eta` the scale of that one."""
    checks = []
    for name, x, t in zip(found._fields, found, true, strict=True):
        t = scale = t.to(x.device)
        if name == "out" and residual is not None:
            scale = t - residual
        if name == "token_eta" and token_eta is not None:
            scale = token_eta.to(x.device)
        checks.append(_compare_one(prefix + name, x, t, problem, scale))
    return checks


def _compare_one(
    tensor: str, found: torch.Tensor, true: torch.Tensor, problem: Problem, scale: torch.Tensor
) -> TensorCheck:
    error = found.double()
    finite = error.isfinite()
    if not finite.all():
        worst = tuple((~finite).nonzero()[0].tolist())
        fault = f"{int((~finite).sum())} elements are not finite"
        return TensorCheck(tensor, None, None, worst, found.numel(), fault=fault)
    error = (error - true).abs()
    worst = tuple(map(int, np.unravel_index(int(error.argmax()), error.shape)))
    largest = float(scale.abs().max()) or 1.0
    profile = None
    if error.dim() > 2 and error.shape[:2] == (problem.batch, problem.tokens):
        cut = error.reshape(problem.batch, problem.mini_batches, -1)
        profile = tuple((cut.amax((0, 2)) / largest).tolist())
    return TensorCheck(
        tensor,
        float(error[worst]) / largest,
        float(error.norm()) / (float(scale.norm()) or 1.0),
        worst,
        _effective_count(scale),
        profile,
    )


def _effective_count(scale: torch.Tensor) -> float:
    """How many elements the mean square of `scale` is made of: one that dwarfs the others counts alone."""
    squares = scale.square()
    return float(squares.sum()) ** 2 / (float(squares.square().sum()) or 1.0)


def _same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    import torch

    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return torch.equal(x.view(bits), y.view(bits))


def _difference(what: str, before: Any, after: Any) -> str | None:
    """`what` and the name of the first tensor whose bits differ, or None."""
    for name, x, y in zip(before._fields, before, after, strict=True):
        if not _same_bits(x, y):
            return f"{what} {name}"
    return None


def _unequal(first: Any, second: Any, prefix: str = "") -> dict[str, str]:
    """For each tensor whose bits differ between two runs, in how many elements."""
    found = {}
    for name, x, y in zip(first._fields, first, second, strict=True):
        if not _same_bits(x, y):
            found[prefix + name] = f"{VARIES} in {int((x != y).sum())} elements"
    return found
