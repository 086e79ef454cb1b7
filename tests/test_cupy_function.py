"""The CUDA C++ pages as an operator of PyTorch, and for arrays that speak DLPack; in the emulator, on tiny problems."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from implementations.cuda import emulator
from implementations.torch.function import ttt as eager
from spec.cases import CASES, draw
from spec.problem import INNER_MODELS, Dtype, InnerModel, Problem
from spec.tensors import INPUTS

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))
function = pytest.importorskip("implementations.cuda.function")
TINY = replace(CASES["size-d16"], batch=1, tokens=32, heads=2)
NUMBERS = {"mini_batch": 16, "causal": True, "eps": 1e-6}


def drawn(inner_model: InnerModel, dtype: Dtype = "fp32") -> tuple[Any, Any, Problem]:
    problem = TINY.problem(inner_model, dtype)
    inputs, cotangents = (type(x)(*map(_tensor, x)) for x in draw(TINY, problem))
    return inputs, cotangents, problem


def _tensor(x: Any) -> torch.Tensor:
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(x)


@pytest.mark.parametrize("inner_model", INNER_MODELS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_are_those_of_the_page_in_torch(inner_model: InnerModel, dtype: Dtype) -> None:
    inputs, cotangents, problem = drawn(inner_model, dtype)
    gradients = []
    for ttt in (function.ttt, eager):
        leaves = type(inputs)(*(x.clone().requires_grad_() for x in inputs))
        torch.autograd.backward(ttt(leaves, problem), cotangents)
        gradients.append([x.grad for x in leaves])
    for name, found, expected in zip(inputs._fields, *gradients, strict=True):
        scale = expected.float().abs().max()
        assert (found.float() - expected.float()).abs().max() < scale * (1e-5 if dtype == "fp32" else 0.05), name


def test_what_is_strided_or_expanded_is_copied() -> None:
    inputs, _, problem = drawn("linear", "bf16")
    strided = inputs._replace(xk=inputs.xk.repeat(1, 1, 1, 2)[..., ::2].copy_(inputs.xk))
    usual, other = (type(inputs)(*(x.detach().requires_grad_() for x in each)) for each in (inputs, strided))
    for leaves in (usual, other):
        function.ttt(leaves, problem).out.sum().backward()  # its cotangent is one number, expanded
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(usual, other, strict=True))


@pytest.mark.parametrize("inner_model", INNER_MODELS)
def test_the_operators_keep_to_the_rules_of_pytorch(inner_model: InnerModel) -> None:
    inputs, cotangents, _ = drawn(inner_model)
    leaves = [x.requires_grad_() for x in inputs]
    numbers = inner_model, *NUMBERS.values()
    torch.library.opcheck(function._forward, (leaves, *numbers))
    with torch.no_grad():
        saved = function._forward(leaves, *numbers)[len(cotangents) :]
        given = [x.detach() for x in leaves]
        torch.library.opcheck(function._backward, ([*cotangents], given, saved, *numbers))


def test_a_compiled_model_traces_through_it() -> None:
    inputs, _, problem = drawn("linear")
    compiled = torch.compile(
        lambda *x: function.ttt(INPUTS["linear"](*x), problem).out * 2, backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(*inputs), function.ttt(inputs, problem).out * 2)


@pytest.mark.parametrize("inner_model", INNER_MODELS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_arrays_of_jax_come_back_as_arrays_of_jax(inner_model: InnerModel, dtype: Dtype) -> None:
    jax = pytest.importorskip("jax")
    problem = TINY.problem(inner_model, dtype)
    inputs, cotangents = (type(x)(*map(jax.numpy.asarray, x)) for x in draw(TINY, problem))
    outputs, residuals = function.forward(inputs, problem)
    found = [*outputs, *function.backward(cotangents, residuals, problem)]
    assert all(isinstance(x, jax.Array) for x in found)
    assert residuals.inputs.xq.data_ptr() == inputs.xq.unsafe_buffer_pointer()  # nothing was copied
    given, pulled, _ = drawn(inner_model, dtype)
    page = function._PAGES[inner_model]
    outputs, residuals = page.forward(given, problem)
    expected = [*outputs, *page.backward(pulled, residuals, problem)]
    assert all(torch.equal(torch.from_dlpack(x), y) for x, y in zip(found, expected, strict=True))


def test_wrong_inputs_are_named() -> None:
    inputs, _, problem = drawn("linear")
    with pytest.raises(ValueError, match=r"lr: expected \(B, T, H\) = \(1, 32, 2\), got \(1, 32, 1\)"):
        function.ttt(inputs._replace(lr=inputs.lr[..., :1]), problem)
    with pytest.raises(ValueError, match="matmul_precision: expected ieee, got tf32"):
        function.ttt(inputs, replace(problem, matmul_precision="tf32"))
