"""The official PyTorch formulation, restated as its users run it: eager, one Python loop over mini-batches.

What is its own, against this lab's pages: a dense eta, [M M] for every mini-batch of every head; B H N M D copies of
the views; outputs written in place into one tensor; the derivative of gelu with its constants truncated to eight
digits; the backward by autograd, without checkpoints. The model is fp32, its default: views in bf16 are cast up.

Source: `TTTLinear.ttt` and `TTTMLP.ttt` of github.com/test-time-training/ttt-lm-pytorch, the dual form (MIT).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu

from implementations.peers import recorded
from implementations.peers.recorded import Graph, backward
from spec.problem import ARRAY_DTYPE, Problem
from spec.tensors import OUTPUTS, Inputs, Outputs

__all__ = ["backward", "forward"]

State = tuple[Tensor, ...]  # w1 [B H D D|F], b1 [B H 1 D|F], and for mlp w2, b2
Step = Callable[..., tuple[Tensor, State]]


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Its `ln_fwd`."""
    std = torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + eps)
    return gamma * ((x - x.mean(-1, keepdim=True)) / std) + beta


def inner_gradient(x: Tensor, target: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Its `ln_fused_l2_bwd`: the gradient of 1/2 ||LN(x) - target||^2."""
    dim = x.shape[-1]
    std = torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + eps)
    x_hat = (x - x.mean(-1, keepdim=True)) / std
    d_x_hat = (gamma * x_hat + beta - target) * gamma
    along = x_hat * (d_x_hat * x_hat).sum(-1, keepdim=True)
    return (1.0 / dim) * (dim * d_x_hat - d_x_hat.sum(-1, keepdim=True) - along) / std


def d_gelu(x: Tensor) -> Tensor:
    """Its `gelu_bwd`, with its truncated constants: 0.79788456 for sqrt(2 / pi)."""
    tanh = torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))
    return 0.5 * x * ((1 - tanh * tanh) * (0.79788456 + 0.1070322243 * x * x)) + 0.5 * (1 + tanh)


def linear_step(
    state: State, xq: Tensor, xk: Tensor, xv: Tensor, eta: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, State]:
    """One mini-batch of every head: views [B H M D], eta [B H M M] -> (out [B H M D], the fast weights after it)."""
    w1, b1 = state
    g_z1 = inner_gradient(xk @ w1 + b1, xv - xk, gamma, beta, eps)
    z1_bar, new_w1, new_b1 = _layer(xq, xk, g_z1, eta, w1, b1)
    return xq + layer_norm(z1_bar, gamma, beta, eps), (new_w1, new_b1)


def mlp_step(
    state: State, xq: Tensor, xk: Tensor, xv: Tensor, eta: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, State]:
    """As `linear_step`."""
    w1, b1, w2, b2 = state
    z1 = xk @ w1 + b1
    x2 = gelu(z1, approximate="tanh")
    g_z2 = inner_gradient(x2 @ w2 + b2, xv - xk, gamma, beta, eps)
    g_z1 = g_z2 @ w2.mT * d_gelu(z1)
    z1_bar, new_w1, new_b1 = _layer(xq, xk, g_z1, eta, w1, b1)
    z2_bar, new_w2, new_b2 = _layer(gelu(z1_bar, approximate="tanh"), x2, g_z2, eta, w2, b2)
    return xq + layer_norm(z2_bar, gamma, beta, eps), (new_w1, new_b1, new_w2, new_b2)


def _layer(x_bar: Tensor, x: Tensor, g: Tensor, eta: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attn = torch.tril(x_bar @ x.mT)
    b_bar = b - torch.tril(eta) @ g
    z_bar = x_bar @ w - (eta * attn) @ g + b_bar
    last = eta[:, :, -1, :, None]
    return z_bar, w - (last * x).mT @ g, b - (last * g).sum(-2, keepdim=True)


STEPS: dict[str, Step] = {"linear": linear_step, "mlp": mlp_step}


def run(step: Step, inputs: Inputs, problem: Problem) -> Outputs:
    """All mini-batches, in the dtype of the fast weights."""
    model = inputs.w1.dtype
    cut = (problem.mini_batches, problem.mini_batch)

    def split(x: Tensor) -> Tensor:  # [B T H ...] -> [N B H M ...]
        return x.to(model).unflatten(1, cut).movedim((1, 3), (0, 2)).contiguous()

    lr = split(inputs.lr).unsqueeze(-2)  # [N B H 1 M]
    eta = inputs.token_eta[:, None] * lr  # [N B H M M]
    views = [split(x) for x in (inputs.xq, inputs.xk, inputs.xv)]
    gamma, beta = inputs.ln_weight.unsqueeze(-2), inputs.ln_bias.unsqueeze(-2)  # [H 1 D]
    state: State = tuple(x.unsqueeze(-2) if x.dim() == 3 else x for x in inputs[7:])
    outs = torch.empty_like(views[0])
    for n in range(problem.mini_batches):
        outs[n], state = step(state, *(x[n] for x in views), eta[n], gamma, beta, problem.eps)
    out = outs.movedim((0, 2), (1, 3)).flatten(1, 2)
    final = (x.squeeze(-2) if i % 2 else x for i, x in enumerate(state))
    return OUTPUTS[problem.inner_model](out.to(getattr(torch, ARRAY_DTYPE[problem.dtype])), *final)


def forward(inputs: Inputs, problem: Problem) -> tuple[Outputs, Graph]:
    """Outputs, and the autograd graph that `backward` follows."""
    return recorded.forward(functools.partial(run, STEPS[problem.inner_model]), inputs, problem)
