"""The one rule by which the whole repository calls a tensor right or wrong.

A tensor is right if it is finite, repeats bit for bit, and its error against the float64 oracle is at most twice
that of the plain PyTorch dual form (`torch.eager`, the yardstick) in the same dtype on the same inputs, plus a
floor of a few ulps: in both the largest-error and the root-mean-square norm. The yardstick itself is held to
absolute caps. Source of the factor: the tests of flash-attention, which derive their tolerance in the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from harness.check import TensorCheck
from spec.cases import Case
from spec.problem import ULP, Problem

YARDSTICK = "torch.eager"
FACTOR = 2.0

# RMS error that the yardstick may have, by dtype; its largest error may be four times that. The worst measured, in
# cases that do not amplify rounding: fp64 4e-15, fp32 2.1e-6, fp16 1.9e-3, bf16 1.9e-2 on a CPU, in d_token_eta of tiny
# cases or d_lr; 7e-7, 9e-4 and 8e-3 in the named cases on an H100. `out` has 9e-16, 3e-7, 4e-4 and 3e-3: rounding the
# operands of one product costs up to 2^-12 in fp16 and 2^-9 in bf16, and two or three products follow each other.
CAP = {"fp64": 2e-14, "fp32": 5e-6, "fp16": 3e-3, "bf16": 2.5e-2}
TF32_CAP = 2e-3  # tf32 keeps the 10 mantissa bits of fp16
MAX_OVER_RMS = 4.0
# The floor for one number. fp32 and fp64: sums of thousands of terms, whose order is free. fp32 also: on one CPU
# JAX has single elements of `d_w1` (`stress-one-mini-batch`) 12 ulps of the largest off, where PyTorch has 4.
FLOOR_ULPS = {"fp64": 16.0, "fp32": 24.0, "fp16": 2.0, "bf16": 2.0}


class Measured(Protocol):
    """A tensor's errors as they were measured: a `TensorCheck`, or its row."""

    @property
    def max_error(self) -> float | None:
        """The largest, relative."""

    @property
    def rms_error(self) -> float | None:
        """The root mean square, relative."""


class Errors(NamedTuple):
    """A largest and a root-mean-square error, both relative."""

    max: float
    rms: float


@dataclass(frozen=True)
class Verdict:
    """What the rule says of one tensor; `reason` is None exactly where it is right."""

    error_ratio: float | None
    reason: str | None
    diverging_mini_batch: int | None = None


def caps(case: Case, problem: Problem) -> Errors:
    """The absolute errors that the yardstick may have."""
    rms = TF32_CAP if problem.matmul_precision == "tf32" else CAP[problem.dtype]
    rms *= case.amplifies
    return Errors(MAX_OVER_RMS * rms, rms)


def floor(check: TensorCheck, case: Case, problem: Problem) -> Errors:
    """A few ulps: what two right implementations may differ by through the order of their sums alone.

    The error of one number is a draw of luck, and the yardstick's may have been a lucky one; the RMS over many is
    not. So the floor shrinks as 1 / sqrt(count), to a sixteenth for the RMS and a quarter for the largest error.
    What a case amplifies comes from a few roundings in one chain: one draw, however many numbers it shows in.
    """
    ulp = ULP["fp16"] if problem.matmul_precision == "tf32" else ULP[problem.dtype]
    few = FLOOR_ULPS[problem.dtype] * ulp * case.amplifies
    luck = max(1 / 16, max(check.count, 1) ** -0.5)
    if case.amplifies > 1 and problem.accumulate_dtype != problem.dtype:  # few, since the sums are more precise
        luck = 1.0
    return Errors(few * min(1.0, 4 * luck), few * luck)


def judge(check: TensorCheck, yardstick: Measured | None, case: Case, problem: Problem) -> Verdict:
    """Hold `check` to the error of the yardstick on the same problem; to the absolute caps if that is None."""
    if yardstick is None or yardstick.max_error is None or yardstick.rms_error is None:
        allowed = caps(case, problem)
    else:
        least = floor(check, case, problem)
        allowed = Errors(FACTOR * yardstick.max_error + least.max, FACTOR * yardstick.rms_error + least.rms)
    if check.max_error is None or check.rms_error is None:
        return Verdict(None, f"{check.tensor}: {check.fault}, the first at {check.worst_index}")
    ratios = Errors(check.max_error / allowed.max, check.rms_error / allowed.rms)
    norm, ratio = max(ratios._asdict().items(), key=lambda item: (math.isnan(item[1]), item[1]))  # NaN is the worst
    if check.fault:
        return Verdict(ratio, f"{check.tensor}: {check.fault}")
    if ratio <= 1:
        return Verdict(ratio, None)
    reason = (
        f"{check.tensor}: {norm} error {getattr(Errors(check.max_error, check.rms_error), norm):.2g} is {ratio:.3g} "
        f"times the allowed {getattr(allowed, norm):.2g}, worst at {check.worst_index}"
    )
    first = _first_diverging(check, allowed)
    if first is not None:
        last = problem.mini_batches - 1
        order = f"{last} to 0" if check.tensor.startswith("d_") else f"0 to {last}"
        reason += f", diverges in mini-batch {first} of {order}"
    return Verdict(ratio, reason, first)


def _first_diverging(check: TensorCheck, allowed: Errors) -> int | None:
    """The first mini-batch over the allowed error, in the order of the chain: gradients come from the end."""
    if check.profile is None:
        return None
    over = [n for n, error in enumerate(check.profile) if error > allowed.max]
    return (over[-1] if check.tensor.startswith("d_") else over[0]) if over else None
