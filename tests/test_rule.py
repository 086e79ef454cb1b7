"""The rule that calls a tensor right or wrong: its two limits, its caps, and what it says."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from harness import check as checks
from harness import rule
from harness.check import TensorCheck
from spec.cases import CASES
from spec.problem import DTYPES

CASE = CASES["size-d16"]
PROBLEM = CASE.problem("linear", "fp32")  # 4 mini-batches
YARDSTICK = TensorCheck("out", 4e-6, 1e-6, (0, 1, 0, 2), 4096)


def _compare_one(tensor: str, *arrays: np.ndarray) -> TensorCheck:
    found, true, scale = map(torch.from_numpy, arrays)
    return checks._compare_one(tensor, found, true, PROBLEM, scale)


def check(**changes) -> TensorCheck:
    return replace(YARDSTICK, worst_index=(1, 40, 1, 3), **changes)


def judge(given: TensorCheck, yardstick: TensorCheck | None = YARDSTICK) -> rule.Verdict:
    return rule.judge(given, yardstick, CASE, PROBLEM)


def limits(given: TensorCheck) -> rule.Errors:
    """The largest errors allowed, written out once more on purpose: 2 x the yardstick's, and 24 ulps of fp32."""
    few, luck = 24 * 2.0**-23, max(1 / 16, given.count**-0.5)
    return rule.Errors(2 * 4e-6 + few * min(1, 4 * luck), 2 * 1e-6 + few * luck)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_yardsticks_own_error_passes(dtype):
    verdict = rule.judge(check(), YARDSTICK, CASE, CASE.problem("linear", dtype))
    assert verdict.reason is None and 0 < verdict.error_ratio < 0.5


def test_an_error_of_zero_passes_beside_a_yardstick_without_error():
    exact = check(max_error=0.0, rms_error=0.0)
    assert judge(exact, exact) == rule.Verdict(0.0, None)


@pytest.mark.parametrize("norm", ["max", "rms"])
@pytest.mark.parametrize("count", [4096, 16, 1])
def test_the_limit_is_sharp_in_each_norm_alone(norm, count):
    limit = getattr(limits(check(count=count)), norm)
    below = judge(check(count=count, **{f"{norm}_error": limit * (1 - 1e-9)}))
    assert below.reason is None and below.error_ratio == pytest.approx(1)
    above = judge(check(count=count, **{f"{norm}_error": limit * (1 + 1e-9)}))
    assert above.error_ratio > 1
    assert above.reason.startswith(
        f"out: {norm} error {limit:.2g} is 1 times the allowed {limit:.2g}, worst at (1, 40,"
    )


def test_low_precision_has_a_floor_of_half_an_ulp_for_the_largest_of_many_errors():
    bf16 = CASE.problem("linear", "bf16")
    exact = check(max_error=0.0, rms_error=0.0)
    assert rule.judge(check(max_error=2.0**-8, rms_error=0.0), exact, CASE, bf16).error_ratio == 1
    assert rule.judge(check(max_error=2.0**-8 * 1.01, rms_error=0.0), exact, CASE, bf16).reason


@pytest.mark.parametrize("errors", [(math.nan, 1e-6), (1e-6, math.nan), (math.nan, math.nan), (math.inf, 1e-6)])
def test_an_error_that_is_no_number_fails(errors):
    for yardstick in (YARDSTICK, None):
        verdict = judge(check(max_error=errors[0], rms_error=errors[1]), yardstick)
        assert not verdict.error_ratio <= 1
        assert f"{'max' if not errors[0] < 1 else 'rms'} error" in verdict.reason


@pytest.mark.parametrize("norm", ["max_error", "rms_error"])
def test_a_yardstick_that_is_no_number_allows_nothing(norm):
    assert judge(check(), replace(YARDSTICK, **{norm: math.nan})).reason


def test_no_error_at_all_fails_with_the_fault_and_where():
    fault = check(max_error=None, rms_error=None, fault="3 elements are not finite")
    assert judge(fault) == rule.Verdict(None, "out: 3 elements are not finite, the first at (1, 40, 1, 3)")


def test_a_fault_fails_whatever_the_error():
    verdict = judge(check(max_error=0.0, rms_error=0.0, fault="two runs differ in 5 elements"))
    assert verdict == rule.Verdict(0.0, "out: two runs differ in 5 elements")


def test_the_yardstick_is_held_to_the_caps():
    for norm, cap in (("rms_error", 5e-6), ("max_error", 2e-5)):
        quiet = check(max_error=0.0, rms_error=0.0)
        assert judge(replace(quiet, **{norm: cap}), None) == rule.Verdict(1.0, None)
        assert judge(replace(quiet, **{norm: cap * 1.01}), None).reason
    nothing = replace(YARDSTICK, max_error=None, rms_error=None, fault="1 elements are not finite")
    assert judge(check(max_error=2e-5), nothing).error_ratio == 1  # a yardstick that failed is no measure


@pytest.mark.parametrize("inner_model", ["linear", "mlp"])
def test_caps_widen_where_the_case_amplifies(inner_model):
    large = CASES["stress-large"]
    plain, wide = CASE.problem(inner_model, "bf16"), large.problem(inner_model, "bf16")
    assert rule.caps(CASE, plain) == (0.1, 2.5e-2)
    assert rule.caps(large, wide) == pytest.approx((0.8, 0.2))
    assert rule.caps(CASE, CASE.problem(inner_model, "fp32", "tf32")) == (8e-3, 2e-3)


def test_the_floor_widens_for_one_number_and_where_the_case_amplifies():
    one, many, large = check(count=1.0), check(count=1e6), CASES["stress-large"]
    assert rule.floor(one, CASE, PROBLEM).rms == 16 * rule.floor(many, CASE, PROBLEM).rms
    assert rule.floor(one, CASE, PROBLEM).max == 4 * rule.floor(many, CASE, PROBLEM).max
    fp32, bf16 = (large.problem("linear", dtype) for dtype in ("fp32", "bf16"))
    assert rule.floor(many, large, fp32).rms == 8 * rule.floor(many, CASE, fp32).rms
    assert rule.floor(many, large, bf16).rms == 8 * rule.floor(one, CASE, bf16).rms  # one draw in all of its numbers


@pytest.mark.parametrize(("count", "values"), [(1, [1, 0, 0, 0]), (4, [1, -1, 1, -1]), (0, [0, 0, 0, 0])])
def test_one_value_that_dwarfs_the_others_counts_alone(count, values):
    scale = np.array(values, float)
    assert _compare_one("d_token_eta", scale, scale, scale).count == pytest.approx(count)


@pytest.mark.parametrize(("tensor", "first", "order"), [("out", 1, "0 to 3"), ("d_xq", 2, "3 to 0")])
def test_the_first_mini_batch_that_diverges_is_the_last_for_a_gradient(tensor, first, order):
    wrong = check(tensor=tensor, max_error=1.0, profile=(0.0, 0.5, 1.0, 1e-6))
    verdict = judge(wrong, replace(YARDSTICK, tensor=tensor))
    assert verdict.diverging_mini_batch == first
    assert verdict.reason.startswith(f"{tensor}: max error 1 is ")
    assert verdict.reason.endswith(f"worst at (1, 40, 1, 3), diverges in mini-batch {first} of {order}")


def test_an_error_over_rms_alone_diverges_nowhere():
    verdict = judge(check(rms_error=1e-3, profile=(1e-6,) * 4))
    assert verdict.reason and verdict.diverging_mini_batch is None and "mini-batch" not in verdict.reason


def test_a_truth_of_zero_is_measured_absolutely():
    shape = (PROBLEM.batch, PROBLEM.tokens, PROBLEM.heads, PROBLEM.head_dim)
    zeros = np.zeros(shape, np.float32)
    right = _compare_one("d_xv", zeros, zeros.astype(np.float64), zeros)
    assert (right.max_error, right.rms_error, right.count) == (0, 0, 0)
    assert judge(right, right).reason is None and judge(right, None).reason is None
    spoiled = zeros.copy()
    spoiled[1, 50, 0, 7] = 1e-3
    wrong = _compare_one("d_xv", spoiled, zeros.astype(np.float64), zeros)
    assert wrong.max_error == pytest.approx(1e-3) and wrong.worst_index == (1, 50, 0, 7)
    verdict = judge(wrong, right)
    assert verdict.reason.endswith("worst at (1, 50, 0, 7), diverges in mini-batch 3 of 3 to 0")


def test_errors_are_relative_to_the_scale_given():
    shape = (PROBLEM.batch, PROBLEM.tokens, PROBLEM.heads, PROBLEM.head_dim)
    base, true = np.ones(shape, np.float32), np.full(shape, 1.001)
    found = _compare_one("out", base, true, true - base)
    assert found.max_error == pytest.approx(1) and found.rms_error == pytest.approx(1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_element_that_is_not_finite_fails(value):
    shape = (PROBLEM.batch, PROBLEM.tokens, PROBLEM.heads, PROBLEM.head_dim)
    found, true = np.ones(shape, np.float32), np.ones(shape)
    found[0, 63, 1, 15] = value
    verdict = judge(_compare_one("out", found, true, true))
    assert verdict == rule.Verdict(None, "out: 1 elements are not finite, the first at (0, 63, 1, 15)")
