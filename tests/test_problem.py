"""A problem is valid by construction, and an invalid one says what was expected and what came."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spec.problem import DTYPES, Problem

GOOD = Problem("linear", 2, 64, 4, 32, 16)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"inner_model": "conv"}, "inner_model: expected one of linear, mlp, got 'conv'"),
        ({"dtype": "fp8"}, "dtype: expected one of fp64, fp32, bf16, fp16, got 'fp8'"),
        ({"matmul_precision": "high"}, "matmul_precision: expected one of ieee, tf32, got 'high'"),
        ({"batch": 0}, "batch: expected a positive integer, got 0"),
        ({"heads": -1}, "heads: expected a positive integer, got -1"),
        ({"head_dim": 64.0}, "head_dim: expected a positive integer, got 64.0"),
        ({"tokens": "64"}, "tokens: expected a positive integer, got '64'"),
        ({"batch": True}, "batch: expected a positive integer, got True"),
        ({"tokens": 65}, "tokens: expected a multiple of mini_batch = 16, got 65"),
        ({"tokens": 8}, "tokens: expected a multiple of mini_batch = 16, got 8"),
        ({"mini_batch": 0}, "mini_batch: expected a positive integer, got 0"),
        ({"eps": 0.0}, "eps: expected a positive number, got 0.0"),
        ({"eps": float("nan")}, "eps: expected a positive number, got nan"),
        (
            {"matmul_precision": "tf32", "dtype": "bf16"},
            "matmul_precision: tf32 is a mode of fp32, expected ieee for bf16",
        ),
    ],
)
def test_invalid_problem_says_what_was_expected_and_what_came(change, message):
    with pytest.raises(ValueError) as error:
        replace(GOOD, **change)
    assert str(error.value) == message


def test_axes_have_the_sizes_of_the_problem():
    assert GOOD.axes == {"B": 2, "T": 64, "H": 4, "D": 32, "M": 16, "N": 4, "F": 128}


def test_one_mini_batch_and_a_mini_batch_of_one_token_are_valid():
    assert replace(GOOD, tokens=16).mini_batches == 1
    assert replace(GOOD, mini_batch=1).mini_batches == 64


def test_problem_is_hashable_and_equal_by_value():
    assert {GOOD: "here"}[Problem("linear", 2, 64, 4, 32, 16)] == "here"


@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulation_is_fp32_but_for_fp64(dtype):
    assert replace(GOOD, dtype=dtype).accumulate_dtype == ("fp64" if dtype == "fp64" else "fp32")


def test_tf32_is_a_mode_of_fp32():
    assert replace(GOOD, matmul_precision="tf32").matmul_precision == "tf32"
