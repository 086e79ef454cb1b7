"""The truth: the definition of the operation in float64, differentiated automatically.

Written for one token of one head, on vectors, exactly as the definition reads; `torch.func.grad` takes the inner
gradient of each token's loss, `vmap` spreads it over tokens, heads and batch, and `vjp` takes the outer
gradients. No formula of the dual form, no hand-written derivative and no line of any implementation is in here.

That is the primal form: every token's own fast weights `theta_i` exist, one mini-batch at a time. Only the weights
at the start of each mini-batch are kept, and it is computed again on the way back. Where even that is too much,
`form="dual"` stands in: the read-out of the dual form, with the inner gradients still those of autograd; the two
agree to 1e-10 on every small case (`tests/test_oracle.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.func import grad, vjp, vmap
from torch.nn.functional import gelu
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from spec.cost import Form
from spec.problem import Problem
from spec.tensors import INPUTS, OUTPUTS, Inputs, Outputs

Theta = dict[str, torch.Tensor]


class Truth(NamedTuple):
    """What is true of one problem, as float64 torch tensors on the CPU.

    The gradient of `token_eta` is the sum of a term for each mini-batch of each head. `token_eta_scale`, [M], is the
    root of the sum of their squares: by how much independent errors in the terms add up, however the terms cancel.
    """

    outputs: Outputs
    gradients: Inputs
    token_eta_scale: torch.Tensor


def layer_norm(z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm of one vector `z` [D], biased variance."""
    centred = z - z.mean()
    return weight * centred / torch.sqrt((centred * centred).mean() + eps) + bias


def inner_model(theta: Theta, x: torch.Tensor) -> torch.Tensor:
    """f(x; theta) of one token: `x w1 + b1`, or `gelu_tanh(x w1 + b1) w2 + b2`; [D] -> [D]."""
    z = x @ theta["w1"] + theta["b1"]
    return gelu(z, approximate="tanh") @ theta["w2"] + theta["b2"] if "w2" in theta else z


def inner_loss(
    theta: Theta, xk: torch.Tensor, xv: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """The inner loss of one token: 1/2 || LN(f(xk; theta)) - (xv - xk) ||^2."""
    error = layer_norm(inner_model(theta, xk), weight, bias, eps) - (xv - xk)
    return (error * error).sum() / 2


def run(
    inputs: Any, cotangents: Any, problem: Problem, device: str = "cpu", form: Form = "primal"
) -> Truth:
    """Outputs and exact gradients of `problem`.

    Args:
        inputs: the arrays of `spec.tensors.INPUTS`, anything that `torch.as_tensor` can read, of any float dtype.
        cotangents: those of `spec.tensors.OUTPUTS`, for the output AND the final state.
        device: where to compute.
        form: the primal form, or the dual form for what that is too large for (`spec.cost.affordable_form`).
    """
    inputs = INPUTS[problem.inner_model](*(_as_float64(x, device) for x in inputs))
    cotangents = OUTPUTS[problem.inner_model](*(_as_float64(x, device) for x in cotangents))
    names = inputs._fields[7:]  # w1, b1 and for mlp w2, b2
    # Each head gets a token_eta of its own, so that the terms of its gradient come out one by one.
    token_eta = inputs.token_eta.expand(problem.batch, problem.heads, -1)
    shared = token_eta, inputs.ln_weight, inputs.ln_bias
    mini_batches = list(zip(*(_cut(x, problem) for x in inputs[:4]), strict=True))
    step = {"primal": _primal, "dual": _dual}[form](problem)

    def pull_back(d_outputs, *arguments):
        return vjp(step, *arguments)[1](d_outputs)

    forward, backward = (_recorded(function, problem, device) for function in (step, pull_back))
    starts, outs = [dict(zip(names, inputs[7:], strict=True))], []
    for tokens in mini_batches:
        out, theta = forward(starts[-1], *tokens, *shared)
        outs.append(out)
        starts.append(theta)
    outputs = _join(outs), *starts.pop().values()

    d_theta, d_tokens = dict(zip(names, cotangents[1:], strict=True)), []
    d_shared = [torch.zeros_like(x) for x in shared]
    squares = torch.zeros_like(token_eta)
    for tokens, d_out in zip(mini_batches[::-1], _cut(cotangents.out, problem)[::-1], strict=True):
        d_theta, *d = backward((d_out, d_theta), starts.pop(), *tokens, *shared)
        d_tokens.append(d[:4])
        d_shared = [total + part for total, part in zip(d_shared, d[4:], strict=True)]
        squares = squares + d[4] ** 2
    d_shared[0] = d_shared[0].sum((0, 1))
    gradients = *(_join(d[::-1]) for d in zip(*d_tokens, strict=True)), *d_shared, *d_theta.values()
    return Truth(
        OUTPUTS[problem.inner_model](*(x.cpu() for x in outputs)),
        INPUTS[problem.inner_model](*(x.cpu() for x in gradients)),
        squares.sum((0, 1)).sqrt().cpu(),
    )


def _recorded(function: Callable[..., Any], problem: Problem, device: str) -> Callable[..., Any]:
    """The same function; where a chain is long, a GPU records it once and replays it, one launch for thousands."""
    if device == "cpu" or problem.mini_batches < 16:
        return function
    record: list[tuple[torch.cuda.CUDAGraph, list[torch.Tensor], Any]] = []

    def call(*arguments: Any) -> Any:
        tensors, form = tree_flatten(arguments)
        if not record:
            given = [x.clone() for x in tensors]
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):  # what libraries set up at the first call is not recorded
                function(*tree_unflatten(given, form))
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = function(*tree_unflatten(given, form))
            record.append((graph, given, results))
        graph, given, results = record[0]
        for into, x in zip(given, tensors, strict=True):
            into.copy_(x)
        graph.replay()
        return tree_map(torch.clone, results)

    return call


def _as_float64(x: Any, device: str) -> torch.Tensor:
    return torch.as_tensor(x).to(device, torch.float64)


def _cut(x: torch.Tensor, problem: Problem) -> tuple[torch.Tensor, ...]:
    """[B T H ...] -> N times [B H M ...]."""
    return x.unflatten(1, (problem.mini_batches, problem.mini_batch)).movedim(3, 2).unbind(1)


def _join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """N times [B H M ...] -> [B T H ...]."""
    return torch.stack(list(parts), 1).movedim(2, 3).flatten(1, 2)


def _primal(problem: Problem) -> Callable[..., tuple[torch.Tensor, Theta]]:
    """One mini-batch of every head: (theta0, xq, xk, xv, lr, token_eta, ln_weight, ln_bias) -> (out, theta0')."""

    def one_head(theta0, xq, xk, xv, lr, token_eta, ln_weight, ln_bias):
        gradients = vmap(grad(inner_loss), in_dims=(None, 0, 0, None, None, None))(
            theta0, xk, xv, ln_weight, ln_bias, problem.eps
        )
        thetas = {}
        for name, gradient in gradients.items():  # gradient [M ...]: one for each token, all taken at theta0
            across = (-1,) + (1,) * (gradient.dim() - 1)
            summed = (lr.reshape(across) * gradient).cumsum(0)
            if problem.causal:
                thetas[name] = theta0[name] - token_eta.reshape(across) * summed
            else:
                thetas[name] = theta0[name] - token_eta[-1] * summed[-1:].expand_as(summed)
        out = vmap(
            lambda theta, x: x + layer_norm(inner_model(theta, x), ln_weight, ln_bias, problem.eps)
        )(thetas, xq)
        return out, {name: theta[-1] for name, theta in thetas.items()}

    heads = vmap(one_head, in_dims=(0, 0, 0, 0, 0, 0, 0, 0))
    return vmap(heads, in_dims=(0, 0, 0, 0, 0, 0, None, None))


def _dual(problem: Problem) -> Callable[..., tuple[torch.Tensor, Theta]]:
    """As `_primal`, for all heads at once and without the fast weights of each token."""

    def step(theta, xq, xk, xv, lr, token_eta, ln_weight, ln_bias):  # xq [B H M D], lr, token_eta [B H M], ln_* [H D]
        layers = 2 if "w2" in theta else 1

        def norm(z):
            across_heads = vmap(vmap(vmap(partial(layer_norm, eps=problem.eps), (0, None, None))), (0, None, None))
            return across_heads(z, ln_weight, ln_bias)

        def loss_of_shifts(shifts):
            """The summed inner loss if `shifts` were added to each layer's output, and each layer's input."""
            x, xs = xk, []
            for layer in range(1, layers + 1):
                xs.append(x)
                z = x @ theta[f"w{layer}"] + theta[f"b{layer}"].unsqueeze(-2) + shifts[layer - 1]
                x = gelu(z, approximate="tanh")
            error = norm(z) - (xv - xk)
            return (error * error).sum() / 2, xs

        zeros = [xk.new_zeros(*xk.shape[:-1], theta[f"b{layer}"].shape[-1]) for layer in range(1, layers + 1)]
        gradients, xs = grad(loss_of_shifts, has_aux=True)(zeros)

        new_theta: Theta = {}
        x = xq
        for layer, (x_train, g) in enumerate(zip(xs, gradients, strict=True), 1):
            w, b = theta[f"w{layer}"], theta[f"b{layer}"].unsqueeze(-2)
            steps = (token_eta[..., -1:] * lr).unsqueeze(-1) * g
            new_w, new_b = w - x_train.mT @ steps, b - steps.sum(-2, keepdim=True)
            if problem.causal:
                eta = token_eta.unsqueeze(-1) * lr.unsqueeze(-2)
                z = x @ w + b - (eta * ((x @ x_train.mT).tril() + torch.ones_like(eta).tril())) @ g
            else:
                z = x @ new_w + new_b
            x = gelu(z, approximate="tanh")
            new_theta |= {f"w{layer}": new_w, f"b{layer}": new_b.squeeze(-2)}
        return xq + norm(z), new_theta

    return step
