"""The oracle against a case worked on paper, finite differences, and what must not depend on what."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.func import grad

from spec import oracle
from spec.cases import CASES, Case, Values, draw
from spec.problem import INNER_MODELS, Problem
from spec.tensors import INPUTS, Inputs, LinearInputs, LinearOutputs, Outputs

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other, ten times as long on a busy machine

PAPER = Problem("linear", batch=1, tokens=4, heads=1, head_dim=2, mini_batch=2, eps=16.0, dtype="fp64")


def _bent(values: Values) -> None:
    """Weights of order one: curvature that finite differences can follow."""
    for name in {"w1", "b1", "w2", "b2"} & values.keys():
        values[name] *= 20


TINY = Case("tiny", "two sequences, two mini-batches, two heads", 2, 8, 2, 4, 4, adjust=_bent)


def as_float64(inner_model: str, causal: bool = True, seed: int = 0) -> tuple[Inputs, Outputs, Problem]:
    problem = Problem(inner_model, 2, 8, 2, 4, 4, causal, dtype="fp64")
    inputs, cotangents = (type(drawn)(*map(torch.from_numpy, drawn)) for drawn in draw(TINY, problem, seed))
    return inputs, cotangents, problem


def outputs_of(inputs: Inputs, cotangents: Outputs, problem: Problem) -> Outputs:
    return oracle.run(inputs, cotangents, problem)[0]


# --- On paper ---


def on_paper() -> tuple[LinearInputs, LinearOutputs]:
    """Four tokens of two numbers, chosen so that every square root is of 25, and cotangents that do not matter."""
    fifth = 1 / 5
    xk = np.array([[6, 0], [0, 6], [-1, 0], [1, 1]], float)
    target = np.array([[fifth, -3 * fifth], [-6 * fifth, 3 * fifth], [fifth, -3 * fifth], [7, 7]], float)
    inputs = LinearInputs(
        xq=np.array([[-1, 3], [-1, 0], [5, 2], [4, 2]], float).reshape(1, 4, 1, 2),
        xk=xk.reshape(1, 4, 1, 2),
        xv=(xk + target).reshape(1, 4, 1, 2),
        lr=np.array([125 / 8, 125 / 4, 125 / 8, 0]).reshape(1, 4, 1),
        token_eta=np.array([1, 1 / 2]),
        ln_weight=np.array([[2.0, 1.0]]),
        ln_bias=np.array([[0.0, 1.0]]),
        w1=np.eye(2).reshape(1, 1, 2, 2),
        b1=np.ones((1, 1, 2)),
    )
    return inputs, LinearOutputs(np.ones((1, 4, 1, 2)), np.ones((1, 1, 2, 2)), np.ones((1, 1, 2)))


def test_case_worked_on_paper():
    """Two numbers z = (a, b) have mean (a + b) / 2 and deviations d, -d with d = (a - b) / 2 and variance d^2.

    So x_hat = (s, -s) with s = d / sqrt(d^2 + 16), LN(z) = (2 s, 1 - s), and with e = LN(z) - target
    dl/dd = s' (2 e[0] - e[1]) with s' = 16 / (d^2 + 16)^(3/2), and g_z = (dl/dd / 2, -dl/dd / 2).
    Everywhere below d = 3 or -3: s = 3/5 or -3/5, LN(z) = (6/5, 2/5) or (-6/5, 8/5), s' = 16/125.

    First mini-batch, from w1 = [[1, 0], [0, 1]], b1 = (1, 1):
      token 0: z = (6, 0) + (1, 1) = (7, 1), d = 3; e = (6/5, 2/5) - (1/5, -3/5) = (1, 1);
               dl/dd = 16/125 (2 - 1), g = (8/125, -8/125), lr g = (1, -1)
      token 1: z = (0, 6) + (1, 1) = (1, 7), d = -3; e = (-6/5, 8/5) - (-6/5, 3/5) = (0, 1);
               dl/dd = 16/125 (0 - 1), g = (-8/125, 8/125), lr g = (-2, 2)
      token 0 reads, with token_eta 1, w = I - (6, 0)^T (1, -1) = [[-5, 6], [0, 1]], b = (1, 1) - (1, -1) = (0, 2):
               z = (-1, 3) w + b = (5, -3) + (0, 2) = (5, -1), d = 3; out = (-1, 3) + (6/5, 2/5)
      token 1 reads, with token_eta 1/2, w = I - 1/2 ([[6, -6], [0, 0]] + [[0, 0], [-12, 12]]) = [[-2, 3], [6, -5]],
               b = (1, 1) - 1/2 ((1, -1) + (-2, 2)) = (3/2, 1/2):
               z = (-1, 0) w + b = (2, -3) + (3/2, 1/2) = (7/2, -5/2), d = 3; out = (-1, 0) + (6/5, 2/5)
    Second mini-batch, from what token 1 read:
      token 2: z = (-1, 0) w + b = (7/2, -5/2), d = 3; e = (1, 1) as for token 0; lr g = (1, -1)
      token 3: lr is 0
      token 2 reads w = [[-2, 3], [6, -5]] - (-1, 0)^T (1, -1) = [[-1, 2], [6, -5]], b = (1/2, 3/2):
               z = (5, 2) w + b = (7, 0) + (1/2, 3/2) = (15/2, 3/2), d = 3; out = (5, 2) + (6/5, 2/5)
      token 3 reads w = [[-2, 3], [6, -5]] - 1/2 [[-1, 1], [0, 0]] = [[-3/2, 5/2], [6, -5]], b = (1, 1):
               z = (4, 2) w + b = (6, 0) + (1, 1) = (7, 1), d = 3; out = (4, 2) + (6/5, 2/5)
    """
    outputs = outputs_of(*on_paper(), PAPER)
    expected = np.array([[-1, 3], [-1, 0], [5, 2], [4, 2]]) + np.array([6 / 5, 2 / 5])
    np.testing.assert_allclose(outputs.out.squeeze().numpy(), expected, rtol=1e-14)
    np.testing.assert_allclose(outputs.final_w1.squeeze().numpy(), [[-3 / 2, 5 / 2], [6, -5]], rtol=1e-14)
    np.testing.assert_allclose(outputs.final_b1.squeeze().numpy(), [1, 1], rtol=1e-14)


def test_inner_gradient_worked_on_paper():
    inputs, _ = on_paper()
    xk, xv, weight, bias = (
        torch.from_numpy(x) for x in (inputs.xk[0, 0, 0], inputs.xv[0, 0, 0], inputs.ln_weight[0], inputs.ln_bias[0])
    )
    theta = {"w1": torch.eye(2, dtype=torch.float64), "b1": torch.ones(2, dtype=torch.float64)}
    g = grad(oracle.inner_loss)(theta, xk, xv, weight, bias, 16.0)
    np.testing.assert_allclose(g["b1"], [8 / 125, -8 / 125], rtol=1e-14)  # dz/db1 is the identity
    np.testing.assert_allclose(g["w1"], [[48 / 125, -48 / 125], [0, 0]], rtol=1e-14, atol=1e-16)  # xk^T g_z1


# --- Finite differences ---


def both_slopes(inputs: Inputs, direction: Inputs, cotangents: Outputs, problem: Problem) -> tuple[float, float]:
    """Derivative of <cotangents, outputs> along `direction`: by central differences, and by the oracle's gradients."""

    def pulled(distance: float) -> float:
        moved = type(inputs)(*(x + distance * v for x, v in zip(inputs, direction, strict=True)))
        outputs = outputs_of(moved, cotangents, problem)
        return sum((c * y).sum().item() for c, y in zip(cotangents, outputs, strict=True))

    step = 1e-4  # the formula's error is of the order of step^4, rounding of 1e-15 / step
    slope = (8 * (pulled(step) - pulled(-step)) - (pulled(2 * step) - pulled(-2 * step))) / (12 * step)
    _, gradients, _ = oracle.run(inputs, cotangents, problem)
    return slope, sum((d * v).sum().item() for d, v in zip(gradients, direction, strict=True))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not-causal"])
@pytest.mark.parametrize("inner_model", INNER_MODELS)
def test_gradients_are_those_of_finite_differences(inner_model, causal):
    inputs, cotangents, problem = as_float64(inner_model, causal)
    direction, _, _ = as_float64(inner_model, causal, seed=1)
    slope, exact = both_slopes(inputs, direction, cotangents, problem)
    assert slope == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("inner_model, name", [(inner, name) for inner in INPUTS for name in INPUTS[inner]._fields])
def test_gradient_of_each_input_is_that_of_finite_differences(inner_model, name):
    """One input at a time: a small gradient can not hide behind a large one."""
    inputs, cotangents, problem = as_float64(inner_model)
    direction = type(inputs)(*(torch.zeros_like(x) for x in inputs))
    getattr(direction, name).normal_(generator=torch.Generator().manual_seed(0))
    slope, exact = both_slopes(inputs, direction, cotangents, problem)
    assert slope == pytest.approx(exact, rel=1e-6)


# --- What depends on what ---


@pytest.mark.parametrize("inner_model", INNER_MODELS)
def test_no_output_depends_on_a_later_token(inner_model):
    inputs, cotangents, problem = as_float64(inner_model)
    before = outputs_of(inputs, cotangents, problem).out
    for t in (1, 3, 4, 6):  # within a mini-batch, and at its edges
        moved = {name: getattr(inputs, name).clone() for name in ("xq", "xk", "xv", "lr")}
        for x in moved.values():
            x[:, t] += 0.5
        after = outputs_of(inputs._replace(**moved), cotangents, problem).out
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any(-1).all()


@pytest.mark.parametrize("inner_model", INNER_MODELS)
def test_not_causal_shares_the_final_state_and_the_last_read_out_of_each_mini_batch(inner_model):
    causal, free = (outputs_of(*as_float64(inner_model, causal)) for causal in (True, False))
    for x, y in zip(causal[1:], free[1:], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=0)
    torch.testing.assert_close(causal.out[:, 3::4], free.out[:, 3::4], rtol=1e-13, atol=0)
    assert (causal.out[:, 0] - free.out[:, 0]).abs().min() > 1e-6


@pytest.mark.parametrize("inner_model", INNER_MODELS)
def test_state_stays_where_lr_is_zero(inner_model):
    inputs, cotangents, problem = as_float64(inner_model)
    outputs = outputs_of(inputs._replace(lr=torch.zeros_like(inputs.lr)), cotangents, problem)
    for initial, final in zip(inputs[7:], outputs[1:], strict=True):
        assert torch.equal(initial, final)


@pytest.mark.parametrize("inner_model", INNER_MODELS)
def test_token_with_no_token_eta_reads_the_weights_at_the_start_of_its_mini_batch(inner_model):
    inputs, cotangents, problem = as_float64(inner_model)
    inputs.token_eta[1] = 0
    out = outputs_of(inputs, cotangents, problem).out[0, 1, 0]
    theta0 = {name: x[0, 0] for name, x in zip(inputs._fields[7:], inputs[7:], strict=True)}
    x = inputs.xq[0, 1, 0]
    read = oracle.layer_norm(oracle.inner_model(theta0, x), inputs.ln_weight[0], inputs.ln_bias[0], problem.eps)
    torch.testing.assert_close(out, x + read, rtol=1e-13, atol=1e-15)


def test_inputs_may_be_arrays_of_any_float_dtype():
    case = CASES["stress-one-mini-batch"]
    inputs, cotangents = draw(case, case.problem("linear", "fp16"))
    outputs, gradients, _ = oracle.run(inputs, cotangents, case.problem("linear", "fp16"))
    assert {x.dtype for x in (*outputs, *gradients)} == {torch.float64}
    assert type(gradients) is INPUTS["linear"]


@pytest.mark.parametrize("inner_model", INNER_MODELS)
@pytest.mark.parametrize("name", ["size-d32-m32", "stress-near-constant-rows", "stress-not-causal", "stress-large"])
def test_dual_form_is_the_primal_form(inner_model, name):
    case = CASES[name]
    problem = case.problem(inner_model, "fp64")
    inputs, cotangents = draw(case, problem)
    primal = oracle.run(inputs, cotangents, problem)
    dual = oracle.run(inputs, cotangents, problem, form="dual")
    for expected, found in zip((*primal[0], *primal[1], primal[2]), (*dual[0], *dual[1], dual[2]), strict=True):
        assert (found - expected).norm() <= 1e-10 * expected.norm()
