"""The cases are those of SPEC.md, and their numbers are the same for everybody."""

from __future__ import annotations

import numpy as np
import pytest

from spec.cases import CASES, NUMPY_DTYPE, draw
from spec.problem import INNER_MODELS
from spec.tensors import INPUTS, OUTPUTS, validate

SMALL = [case for case in CASES.values() if case.group != "named"]


def as_bytes(case: str, inner_model: str = "linear", dtype: str = "fp32", seed: int = 0) -> list[bytes]:
    inputs, cotangents = draw(CASES[case], CASES[case].problem(inner_model, dtype), seed)
    return [x.tobytes() for x in (*inputs, *cotangents)]


@pytest.mark.parametrize(
    "name, sizes, causal",
    [
        ("lm-125m", (8, 2048, 12, 64, 16), True),
        ("lm-760m", (4, 2048, 16, 96, 16), True),
        ("lm-1.3b", (4, 2048, 32, 64, 16), True),
        ("lm-1.3b-long", (1, 32768, 32, 64, 16), True),
        ("lm-1.3b-m64", (4, 2048, 32, 64, 64), True),
        ("video-5b", (1, 18432, 48, 64, 64), False),
    ],
)
def test_named_case_has_the_sizes_of_the_spec(name, sizes, causal):
    case = CASES[name]
    assert (case.batch, case.tokens, case.heads, case.head_dim, case.mini_batch) == sizes
    assert case.causal is causal and case.group == "named"


def test_named_cases_are_those_of_the_spec_and_each_has_a_twin_of_its_layer():
    named = [case for case in CASES.values() if case.group == "named"]
    assert len(named) == 6
    for case in named:
        twin = CASES[f"{case.name}-small"]
        assert (twin.head_dim, twin.mini_batch, twin.causal) == (case.head_dim, case.mini_batch, case.causal)
        assert twin.tokens >= 4 * twin.mini_batch and twin.group == "small"


def test_every_size_that_must_work_is_in_a_case():
    assert {case.head_dim for case in CASES.values()} == {16, 32, 64, 96, 128}
    assert {case.mini_batch for case in CASES.values()} == {16, 32, 64, 128}


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_drawn_tensors_are_valid_finite_and_stored_as_the_problem_says(case):
    for inner_model in INNER_MODELS:
        for dtype in case.dtypes:
            problem = case.problem(inner_model, dtype)
            inputs, cotangents = draw(case, problem)
            validate(inputs, INPUTS, problem)
            validate(cotangents, OUTPUTS, problem)
            assert all(np.isfinite(x.astype(np.float64)).all() for x in (*inputs, *cotangents))


def test_same_numbers_in_every_call():
    assert as_bytes("size-d16") == as_bytes("size-d16")


def test_other_numbers_for_another_seed_and_another_case():
    drawn = as_bytes("size-d16")
    assert all(x != y for x, y in zip(drawn, as_bytes("size-d16", seed=1), strict=True))
    base, same_sizes = as_bytes("stress-strided"), as_bytes("stress-not-causal")
    assert all(x != y for x, y in zip(base, same_sizes, strict=True))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_dtype_is_given_the_same_numbers_rounded(dtype):
    case = CASES["size-d16"]
    exact = draw(case, case.problem("mlp", "fp32"))
    rounded = draw(case, case.problem("mlp", dtype))
    for wide, narrow in zip((*exact[0], *exact[1]), (*rounded[0], *rounded[1]), strict=True):
        assert np.array_equal(wide.astype(narrow.dtype), narrow)
    assert rounded[0].xq.dtype == NUMPY_DTYPE[dtype] and rounded[0].w1.dtype == np.float32
    fp64 = draw(case, case.problem("mlp", "fp64"))
    assert all(np.array_equal(x, y.astype(np.float32)) for x, y in zip(exact[0], fp64[0], strict=True))


def test_values_are_those_of_a_layer_at_its_initialisation():
    inputs, _ = draw(CASES["lm-760m-small"], CASES["lm-760m-small"].problem("mlp", "fp32"))
    assert inputs.xq.std() == pytest.approx(1, rel=0.05)
    assert (inputs.lr > 0).all() and (inputs.lr * 96 < 1).all()
    assert inputs.token_eta == pytest.approx(1 / np.arange(1, 17), abs=0.1) and (inputs.token_eta >= 0).all()
    assert inputs.w1.std() == pytest.approx(0.02, rel=0.05) and np.abs(inputs.b2).max() > 0


@pytest.mark.parametrize("inner_model", INNER_MODELS)
def test_eps_dominates_near_constant_rows_that_still_vary(inner_model):
    case = CASES["stress-near-constant-rows"]
    problem = case.problem(inner_model, "fp64")
    inputs, _ = draw(case, problem)
    heads_first = inputs.xk.swapaxes(1, 2)
    z = heads_first @ inputs.w1 + inputs.b1[:, :, None]
    if inner_model == "mlp":
        gelu = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
        z = gelu @ inputs.w2 + inputs.b2[:, :, None]
    ratio = z.var(-1) / problem.eps
    assert 0.01 < np.median(ratio) < 10  # measured: 0.5 for linear, 0.016 for mlp
    assert np.median(np.abs(z)) == pytest.approx(0.01, rel=0.1)


def test_stress_cases_are_what_they_say():
    drawn = {
        name: draw(case, case.problem("linear", "fp32"))[0] for name, case in CASES.items() if case.group == "stress"
    }
    assert not drawn["stress-zero-lr"].lr.any()
    eta = drawn["stress-zeros-in-token-eta"].token_eta
    assert not eta[::3][:-1].any() and eta[-1] > 0
    assert drawn["stress-large"].xk.std() == pytest.approx(32, rel=0.05)
    assert drawn["stress-tiny"].xk.std() == pytest.approx(2.0**-10, rel=0.05)
    largest = np.abs(drawn["stress-outlier-token"].xk).max((0, 2, 3))
    assert largest.argmax() == 32 and largest[32] > 10 * np.delete(largest, 32).max()
    assert CASES["stress-one-mini-batch"].problem("linear", "fp32").mini_batches == 1
    assert CASES["stress-strided"].strided and not CASES["stress-not-causal"].causal
