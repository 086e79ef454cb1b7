"""Bytes and FLOPs against counts made by hand."""

from __future__ import annotations

import pytest

from spec.cases import CASES
from spec.cost import bytes_min, flops
from spec.problem import Problem


def test_bytes_of_a_small_linear_problem_counted_by_hand():
    problem = Problem("linear", batch=1, tokens=4, heads=1, head_dim=2, mini_batch=2, dtype="bf16")
    # xq, xk, xv 3 x 8 numbers and lr 4, in bf16; token_eta 2, ln_weight 2, ln_bias 2, w1 4, b1 2, in fp32.
    inputs = (24 + 4) * 2 + (2 + 2 + 2 + 4 + 2) * 4
    # out 8 numbers in bf16; w1 4, b1 2, in fp32.
    outputs = 8 * 2 + (4 + 2) * 4
    assert bytes_min(problem, "forward") == inputs + outputs == 144
    # Inputs and cotangents in, gradients out.
    assert bytes_min(problem, "backward") == 2 * inputs + outputs == 248
    assert bytes_min(problem, "forward_backward") == 144 + 248


def test_bytes_of_a_small_mlp_problem_counted_by_hand():
    problem = Problem("mlp", batch=1, tokens=4, heads=1, head_dim=2, mini_batch=2, dtype="fp32")
    state = 2 * 8 + 8 + 8 * 2 + 2  # w1, b1, w2, b2
    assert bytes_min(problem, "forward") == 4 * ((24 + 4 + 6 + state) + (8 + state))


@pytest.mark.parametrize(
    "inner_model, causal, expected",
    [
        # D = 2, F = 8, M = 3: a token sees (3 + 1) / 2 = 2 tokens. 6 tokens, 2 FLOPs a multiply-add.
        ("linear", False, 6 * 2 * (3 * 4)),  # xk w1, (lr xk)^T g_z1, xq w1
        ("linear", True, 6 * 2 * (3 * 4 + 2 * 2 * 2)),  # and xq xk^T, (eta attn) g_z1
        ("mlp", False, 6 * 2 * (3 * 16 + 3 * 16 + 16)),  # three for each layer, and g_z2 w2^T
        ("mlp", True, 6 * 2 * (7 * 16 + 2 * 2 * 2 + 2 * 2 * 8)),  # layer 1: D + F for each token seen; layer 2: F + D
    ],
)
def test_flops_counted_by_hand(inner_model, causal, expected):
    problem = Problem(inner_model, batch=1, tokens=6, heads=1, head_dim=2, mini_batch=3, causal=causal)
    assert flops(problem, "forward") == expected
    assert flops(problem, "backward") == 2 * expected
    assert flops(problem, "forward_backward") == 3 * expected


def test_paper_layer_moves_about_134_megabytes_forward():
    problem = CASES["lm-1.3b"].problem("linear", "bf16")
    views_and_output = 4 * (4 * 2048 * 32 * 64 * 2)
    assert views_and_output == pytest.approx(134e6, rel=0.01)
    state_in_and_out = 2 * 4 * (4 * 32 * 64 * 64 + 4 * 32 * 64)
    lr, parameters = 4 * 2048 * 32 * 2, 4 * (16 + 2 * 32 * 64)
    assert bytes_min(problem, "forward") == views_and_output + state_in_and_out + lr + parameters
