"""The JAX pages and `jax.autodiff` against the oracle, and what users of `ttt` rely on."""

import functools
import importlib
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from implementations.jax import autodiff, scan
from implementations.jax.function import ttt
from spec import oracle
from spec.cases import Case, draw
from spec.tensors import INPUTS

TINY = Case("tiny", "three mini-batches", batch=2, tokens=24, heads=2, head_dim=16, mini_batch=8)
PAGES = ("implementations.jax.ttt_{}", "implementations.jax.autodiff")
# Three to five times the largest relative errors measured; fp64 has 7e-15.
ALLOWED = {"fp64": 1e-10, "fp32": 1.5e-6, "bf16": 2e-2, "fp16": 3e-3}
# All in fp64, where a mistake has nothing to hide behind; the other dtypes where they could go wrong.
GRID = [("fp64", page, causal) for page in PAGES for causal in (True, False)]
GRID += [(dtype, PAGES[0], True) for dtype in ("fp32", "bf16", "fp16")] + [("fp16", PAGES[1], True)]
BOTH = pytest.mark.parametrize("inner_model", ["linear", "mlp"])


@pytest.fixture(scope="module", autouse=True)
def x64_and_quick_compiles():
    """fp64 in JAX, and half the compile time; everything as it was afterwards."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


def solve(page, inputs, cotangents, problem):
    """Outputs and gradients of `page` as NumPy tuples."""
    outputs, residuals = page.forward(jax.tree.map(jnp.asarray, inputs), problem)
    gradients = page.backward(jax.tree.map(jnp.asarray, cotangents), residuals, problem)
    return jax.tree.map(np.asarray, (outputs, gradients))


@functools.cache
def truth(inner_model, causal, dtype):
    """Problem, inputs, cotangents and the oracle's answers."""
    case = replace(TINY, causal=causal)
    problem = case.problem(inner_model, dtype)
    inputs, cotangents = draw(case, problem)
    as_torch = functools.partial(jax.tree.map, lambda x: torch.from_numpy(x.astype(np.float64)))
    return problem, inputs, cotangents, oracle.run(as_torch(inputs), as_torch(cotangents), problem)


@BOTH
@pytest.mark.parametrize(("dtype", "page", "causal"), GRID)
def test_agrees_with_the_oracle(page, inner_model, causal, dtype):
    problem, inputs, cotangents, expected = truth(inner_model, causal, dtype)
    page = importlib.import_module(page.format(inner_model))
    for given, wanted in zip(solve(page, inputs, cotangents, problem), expected[:2], strict=True):
        for name, x, y in zip(given._fields, given, wanted, strict=True):
            scale = expected.token_eta_scale if name == "token_eta" else y
            error = np.linalg.norm(x.astype(np.float64) - y.numpy()) / np.linalg.norm(scale)
            assert error <= ALLOWED[dtype], f"{name}: {error:.1e}"  # false for NaN


def test_fp32_is_the_same_bits_with_x64_on_and_off():
    problem, inputs, cotangents, _ = truth("linear", True, "fp32")
    page = importlib.import_module(PAGES[0].format("linear"))
    with_x64 = solve(page, inputs, cotangents, problem)
    with jax.enable_x64(False):
        without = solve(page, inputs, cotangents, problem)
    jax.tree.map(np.testing.assert_array_equal, with_x64, without)


@BOTH
def test_nothing_in_an_fp32_problem_is_float64(inner_model):
    problem, inputs, cotangents, _ = truth(inner_model, True, "fp32")
    page = importlib.import_module(PAGES[0].format(inner_model))
    assert "f64" not in str(jax.make_jaxpr(lambda *x: solve_traced(page, *x, problem))(inputs, cotangents))


def solve_traced(page, inputs, cotangents, problem):
    """Forward and backward, of tracers."""
    return page.backward(cotangents, page.forward(inputs, problem)[1], problem)


@BOTH
def test_ttt_has_the_gradients_of_the_written_out_backward(inner_model):
    problem, inputs, cotangents, _ = truth(inner_model, True, "fp32")
    page = importlib.import_module(PAGES[0].format(inner_model))
    outputs, pull_back = jax.vjp(lambda x: ttt(x, problem), jax.tree.map(jnp.asarray, inputs))
    (gradients,) = pull_back(jax.tree.map(jnp.asarray, cotangents))
    jax.tree.map(np.testing.assert_array_equal, (outputs, gradients), solve(page, inputs, cotangents, problem))


def test_ttt_is_differentiable_inside_jit():
    problem, inputs, _, _ = truth("linear", True, "fp32")
    gradients = jax.jit(jax.grad(lambda x: (ttt(x, problem).final_w1 ** 2).sum()))(inputs)
    assert all(np.isfinite(x).all() for x in gradients)
    assert np.abs(gradients.xk).max() > 0
    assert np.abs(gradients.xq).max() == 0  # the test view writes nothing


def test_autodiff_traces_each_problem_once():
    problem, inputs, cotangents, _ = truth("linear", True, "fp32")
    solve(autodiff, inputs, cotangents, problem)
    traced = autodiff._forward._cache_size(), autodiff._backward._cache_size()
    solve(autodiff, inputs, cotangents, problem)
    assert (autodiff._forward._cache_size(), autodiff._backward._cache_size()) == traced


@pytest.mark.parametrize(("mini_batches", "size"), [(1, 1), (7, 7), (16, 16), (24, 12), (34, 2), (128, 16), (17, 1)])
def test_groups_divide_the_chain(mini_batches, size):
    assert autodiff.group_size(mini_batches) == size


@pytest.mark.parametrize("page", PAGES)
def test_wrong_tensors_are_named(page):
    page = importlib.import_module(page.format("linear"))
    problem, inputs, cotangents, _ = truth("linear", True, "fp32")
    with pytest.raises(ValueError, match=r"xk: expected \(B, T, H, D\) = \(2, 24, 2, 16\), got \(2, 24, 2, 8\)"):
        page.forward(inputs._replace(xk=inputs.xk[..., :8]), problem)
    with pytest.raises(ValueError, match="w1: expected float32, got float64"):
        page.forward(inputs._replace(w1=inputs.w1.astype(np.float64)), problem)
    _, residuals = page.forward(inputs, problem)
    with pytest.raises(ValueError, match="final_b1: expected float32, got float16"):
        page.backward(cotangents._replace(final_b1=cotangents.final_b1.astype(np.float16)), residuals, problem)


def test_fp64_without_x64_is_refused():
    problem, inputs, _, _ = truth("linear", True, "fp64")
    with jax.enable_x64(False), pytest.raises(ValueError, match="fp64: expected jax_enable_x64 to be on, got off"):
        scan.check(inputs, INPUTS, problem)


@pytest.mark.parametrize(
    ("dtype", "precision", "product"),
    [
        ("fp32", "ieee", r"precision = \[HIGHEST, HIGHEST\] : \(tensor<\S*xf32>, tensor<\S*xf32>\) -> tensor<\S*xf32>"),
        ("fp32", "tf32", r"lhs_precision_type = tf32.* : \(tensor<\S*xf32>, tensor<\S*xf32>\) -> tensor<\S*xf32>"),
        ("bf16", "ieee", r": \(tensor<\S*xbf16>, tensor<\S*xbf16>\) -> tensor<\S*xf32>"),
        ("fp16", "ieee", r": \(tensor<\S*xf16>, tensor<\S*xf16>\) -> tensor<\S*xf32>"),
    ],
)
def test_every_product_on_a_gpu_is_of_the_asked_kind(dtype, precision, product):
    problem = TINY.problem("linear", dtype, precision)
    inputs, cotangents = draw(TINY, problem)
    page = importlib.import_module("implementations.jax.ttt_linear")
    traced = jax.jit(lambda *x: solve_traced(page, *x, problem)).trace(inputs, cotangents)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()  # needs no GPU
    products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert all(re.search(product, line) for line in products), products


def test_tf32_is_refused_on_a_cpu():
    problem = TINY.problem("linear", "fp32", "tf32")
    inputs, _ = draw(TINY, problem)
    page = importlib.import_module("implementations.jax.ttt_linear")
    with jax.default_device(jax.devices("cpu")[0]), pytest.raises(ValueError, match="TF32"):
        page.forward(inputs, problem)
