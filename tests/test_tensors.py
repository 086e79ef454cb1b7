"""Shapes, dtypes and bytes follow the annotations; validation names the tensor, what was expected and what came."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spec.cases import NUMPY_DTYPE
from spec.problem import ARRAY_DTYPE, Problem
from spec.tensors import INPUTS, OUTPUTS, LinearInputs, MlpInputs, tensor_specs, validate

LINEAR = Problem("linear", 2, 64, 4, 64, 16, dtype="bf16")
MLP = Problem("mlp", 2, 64, 4, 64, 16, dtype="bf16")


def zeros(kind: type, problem: Problem, library: str) -> tuple:
    """Tensors of `kind` that are valid for `problem`."""
    specs = tensor_specs(kind, problem)
    if library == "numpy":
        return kind(*(np.zeros(spec.shape, NUMPY_DTYPE[spec.dtype]) for spec in specs))
    return kind(*(torch.zeros(spec.shape, dtype=getattr(torch, ARRAY_DTYPE[spec.dtype])) for spec in specs))


def test_linear_tensors_derive_from_their_annotations():
    specs = {
        spec.name: spec for spec in (*tensor_specs(INPUTS["linear"], LINEAR), *tensor_specs(OUTPUTS["linear"], LINEAR))
    }
    assert {name: (spec.shape, spec.dtype) for name, spec in specs.items()} == {
        "xq": ((2, 64, 4, 64), "bf16"),
        "xk": ((2, 64, 4, 64), "bf16"),
        "xv": ((2, 64, 4, 64), "bf16"),
        "lr": ((2, 64, 4), "bf16"),
        "token_eta": ((16,), "fp32"),
        "ln_weight": ((4, 64), "fp32"),
        "ln_bias": ((4, 64), "fp32"),
        "w1": ((2, 4, 64, 64), "fp32"),
        "b1": ((2, 4, 64), "fp32"),
        "out": ((2, 64, 4, 64), "bf16"),
        "final_w1": ((2, 4, 64, 64), "fp32"),
        "final_b1": ((2, 4, 64), "fp32"),
    }
    assert specs["xq"].axes == ("B", "T", "H", "D") and specs["w1"].axes == ("B", "H", "D", "D")
    assert specs["xq"].bytes == 2 * 64 * 4 * 64 * 2
    assert specs["w1"].bytes == 2 * 4 * 64 * 64 * 4


def test_mlp_has_a_hidden_layer_four_times_as_wide():
    shapes = {spec.name: spec.shape for spec in tensor_specs(MlpInputs, MLP)}
    assert shapes["w1"] == (2, 4, 64, 256) and shapes["b1"] == (2, 4, 256)
    assert shapes["w2"] == (2, 4, 256, 64) and shapes["b2"] == (2, 4, 64)


def test_final_state_has_the_axes_of_the_initial_state():
    for inner, problem in (("linear", LINEAR), ("mlp", MLP)):
        initial = [(spec.name, spec.axes) for spec in tensor_specs(INPUTS[inner], problem)[7:]]
        final = [(spec.name.removeprefix("final_"), spec.axes) for spec in tensor_specs(OUTPUTS[inner], problem)[1:]]
        assert initial == final


def test_fp64_problem_is_fp64_throughout():
    problem = Problem("linear", 1, 16, 1, 16, 16, dtype="fp64")
    assert {spec.dtype for spec in tensor_specs(LinearInputs, problem)} == {"fp64"}


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("problem", [LINEAR, MLP], ids=["linear", "mlp"])
def test_valid_tensors_pass(library, problem):
    validate(zeros(INPUTS[problem.inner_model], problem, library), INPUTS, problem)
    validate(zeros(OUTPUTS[problem.inner_model], problem, library), OUTPUTS, problem)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize(
    "name, cut, message",
    [
        ("xk", np.s_[..., :32], "xk: expected (B, T, H, D) = (2, 64, 4, 64), got (2, 64, 4, 32)"),
        ("lr", np.s_[..., 0], "lr: expected (B, T, H) = (2, 64, 4), got (2, 64)"),
        ("token_eta", np.s_[:15], "token_eta: expected (M) = (16,), got (15,)"),
        ("b1", np.s_[:1], "b1: expected (B, H, D) = (2, 4, 64), got (1, 4, 64)"),
    ],
)
def test_wrong_shape_is_named(library, name, cut, message):
    inputs = zeros(LinearInputs, LINEAR, library)
    with pytest.raises(ValueError) as error:
        validate(inputs._replace(**{name: getattr(inputs, name)[cut]}), INPUTS, LINEAR)
    assert str(error.value) == message


def test_wrong_dtype_is_named():
    arrays = zeros(LinearInputs, LINEAR, "numpy")
    with pytest.raises(ValueError) as error:
        validate(arrays._replace(xv=arrays.xv.astype(np.float16)), INPUTS, LINEAR)
    assert str(error.value) == "xv: expected bfloat16, got float16"
    tensors = zeros(LinearInputs, LINEAR, "torch")
    with pytest.raises(ValueError) as error:
        validate(tensors._replace(w1=tensors.w1.bfloat16()), INPUTS, LINEAR)
    assert str(error.value) == "w1: expected float32, got bfloat16"


def test_wrong_tuple_is_named():
    message = "tensors of mlp: expected MlpInputs, got LinearInputs"
    with pytest.raises(ValueError) as error:
        validate(zeros(LinearInputs, LINEAR, "numpy"), INPUTS, MLP)
    assert str(error.value) == message
    with pytest.raises(ValueError, match="got tuple$"):
        validate(tuple(zeros(MlpInputs, MLP, "numpy")), INPUTS, MLP)
