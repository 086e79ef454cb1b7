"""`ttt` in PyTorch against finite differences, through the output and through the final state."""

from dataclasses import replace

import pytest
import torch

from implementations.torch.function import ttt
from spec.cases import Case, draw
from spec.tensors import INPUTS

TINY = Case("tiny", "two mini-batches", batch=1, tokens=4, heads=1, head_dim=3, mini_batch=2)


@pytest.mark.parametrize("inner_model", ["linear", "mlp"])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_finite_differences(inner_model, causal):
    case = replace(TINY, causal=causal)
    problem = case.problem(inner_model, "fp64")
    inputs, _ = draw(case, problem)
    leaves = [torch.from_numpy(x).requires_grad_() for x in inputs]
    # gradcheck differentiates every output: `out` and each tensor of the final state.
    assert torch.autograd.gradcheck(lambda *x: tuple(ttt(INPUTS[inner_model](*x), problem)), leaves, fast_mode=False)


def test_a_loss_of_the_final_state_alone_reaches_the_inputs():
    problem = TINY.problem("mlp", "fp32")
    inputs = INPUTS["mlp"](*(torch.from_numpy(x).requires_grad_() for x in draw(TINY, problem)[0]))
    ttt(inputs, problem).final_w1.square().sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in inputs)
    assert inputs.xk.grad.abs().max() > 0
    assert inputs.xq.grad.abs().max() == 0  # the test view writes nothing


def test_a_wrong_shape_is_named():
    problem = TINY.problem("linear", "fp32")
    inputs = INPUTS["linear"](*map(torch.from_numpy, draw(TINY, problem)[0]))
    with pytest.raises(ValueError, match=r"lr: expected \(B, T, H\) = \(1, 4, 1\), got \(1, 4, 2\)"):
        ttt(inputs._replace(lr=inputs.lr.expand(-1, -1, 2)), problem)
