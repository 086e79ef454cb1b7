"""The official JAX formulation, restated as its users run it: `vmap` over batch and heads, `lax.scan`, remat.

What is its own, against this lab's pages: a dense eta, [M M] for every mini-batch of every head; B H N M D copies of
the views; flax's LayerNorm, whose variance is the mean of squares minus the square of the mean; the inner gradient
by `jax.vjp` of that LayerNorm; the derivative of gelu with its constants truncated to eight digits; the backward by
autodiff, with remat every 4 mini-batches. The model is fp32, its default: views in bf16 are cast up. For them, and
for tf32, products have JAX's default precision, which is tf32 on a GPU that has it; for fp32 that of ieee.

Source: `TTTLinearBase`, `TTTMLPBase` of github.com/test-time-training/ttt-lm-jax, and flax's LayerNorm (Apache 2).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from implementations.jax import scan
from implementations.jax.autodiff import Tape
from spec.problem import ARRAY_DTYPE, Problem
from spec.tensors import INPUTS, OUTPUTS, Inputs, Outputs

GROUP = 4  # mini-batches under one remat, as in its configurations

State = tuple[Array, ...]  # of one head: w1 [D D|F], b1 [1 D|F], and for mlp w2, b2
Batch = tuple[Array, Array, Array, Array]  # of one head: xq, xk, xv [M D], eta [M M]
Norm = Callable[[Array], Array]


def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """flax's LayerNorm, with its fast variance."""
    mean = x.mean(-1, keepdims=True)
    variance = jnp.maximum(0.0, (x * x).mean(-1, keepdims=True) - mean * mean)
    return (x - mean) * (jax.lax.rsqrt(variance + eps) * scale) + bias


def d_gelu(x: Array) -> Array:
    """Its `diff_gelu`, with its truncated constants: 0.79788456 for sqrt(2 / pi)."""
    tanh = jnp.tanh(0.79788456 * x * (1 + 0.044715 * x * x))
    return 0.5 * x * ((1 - tanh * tanh) * (0.79788456 + 0.1070322243 * x * x)) + 0.5 * (1 + tanh)


def linear_step(norm: Norm, state: State, batch: Batch) -> tuple[State, Array]:
    """One mini-batch of one head: (the fast weights after it, out [M D])."""
    (w1, b1), (xq, xk, xv, eta) = state, batch
    normed, pull_back = jax.vjp(norm, xk @ w1 + b1)
    (g_z1,) = pull_back(normed - (xv - xk))
    z1_bar, new_w1, new_b1 = _layer(xq, xk, g_z1, eta, w1, b1)
    return (new_w1, new_b1), xq + norm(z1_bar)


def mlp_step(norm: Norm, state: State, batch: Batch) -> tuple[State, Array]:
    """As `linear_step`."""
    (w1, b1, w2, b2), (xq, xk, xv, eta) = state, batch
    z1 = xk @ w1 + b1
    x2 = jax.nn.gelu(z1)
    normed, pull_back = jax.vjp(norm, x2 @ w2 + b2)
    (g_z2,) = pull_back(normed - (xv - xk))
    g_z1 = g_z2 @ w2.T * d_gelu(z1)
    z1_bar, new_w1, new_b1 = _layer(xq, xk, g_z1, eta, w1, b1)
    z2_bar, new_w2, new_b2 = _layer(jax.nn.gelu(z1_bar), x2, g_z2, eta, w2, b2)
    return (new_w1, new_b1, new_w2, new_b2), xq + norm(z2_bar)


def _layer(x_bar: Array, x: Array, g: Array, eta: Array, w: Array, b: Array) -> tuple[Array, Array, Array]:
    attn = jnp.tril(x_bar @ x.T)
    b_bar = b - (eta * jnp.tril(jnp.ones_like(attn))) @ g
    z_bar = x_bar @ w - (eta * attn) @ g + b_bar
    last = eta[-1][:, None]
    return z_bar, w - (last * x).T @ g, b - (last * g).sum(0, keepdims=True)


_STEPS = {"linear": linear_step, "mlp": mlp_step}


def forward(inputs: Inputs, problem: Problem) -> tuple[Outputs, Tape]:
    """Outputs, and the tape that leads to them.

    Raises:
        ValueError: a tensor has another shape or dtype than `problem` says.
    """
    scan.check(inputs, INPUTS, problem)
    with jax.default_matmul_precision(_precision(problem)):
        outputs, pull_back = _forward(inputs, problem)
    return outputs, Tape(pull_back)


def backward(cotangents: Outputs, residuals: Tape, problem: Problem) -> Inputs:
    """Gradients of every input, from the cotangents of the output and of the final state.

    Raises:
        ValueError: a cotangent has another shape or dtype than `problem` says.
    """
    scan.check(cotangents, OUTPUTS, problem)
    with jax.default_matmul_precision(_precision(problem)):
        return _backward(cotangents, residuals.pull_back)


def _precision(problem: Problem) -> str:
    ieee = problem.dtype in ("fp32", "fp64") and problem.matmul_precision == "ieee"
    return "highest" if ieee else "default"


@functools.partial(jax.jit, static_argnames="problem")
def _forward(inputs: Inputs, problem: Problem) -> tuple[Outputs, Callable[[Outputs], tuple[Inputs]]]:
    return jax.vjp(functools.partial(_run, problem=problem), inputs)


@jax.jit
def _backward(cotangents: Outputs, pull_back: Callable[[Outputs], tuple[Inputs]]) -> Inputs:
    (gradients,) = pull_back(cotangents)
    return gradients


def _run(inputs: Inputs, problem: Problem) -> Outputs:
    model = inputs.w1.dtype

    def split(x: Array) -> Array:  # [B T H ...] -> [B H N M ...]
        x = x.astype(model).reshape(x.shape[0], problem.mini_batches, problem.mini_batch, *x.shape[2:])
        return jnp.moveaxis(x, 3, 1)

    eta = inputs.token_eta[:, None] * split(inputs.lr)[..., None, :]  # [B H N M M]
    batches = *(split(x) for x in (inputs.xq, inputs.xk, inputs.xv)), eta
    state = tuple(x[..., None, :] if x.ndim == 3 else x for x in inputs[7:])

    def one_head(batches: Batch, gamma: Array, beta: Array, state: State) -> tuple[State, Array]:
        norm = functools.partial(layer_norm, scale=gamma, bias=beta, eps=problem.eps)
        step = functools.partial(_STEPS[problem.inner_model], norm)
        return _scan_with_remat(step, group_size(problem.mini_batches), state, batches)

    heads = jax.vmap(one_head)
    state, out = jax.vmap(heads, (0, None, None, 0))(batches, inputs.ln_weight, inputs.ln_bias, state)
    out = jnp.moveaxis(out, 1, 3).reshape(inputs.xq.shape).astype(ARRAY_DTYPE[problem.dtype])
    return OUTPUTS[problem.inner_model](out, *(x.squeeze(-2) if i % 2 else x for i, x in enumerate(state)))


def _scan_with_remat(step: Callable, size: int, state: State, batches: Batch) -> tuple[State, Array]:
    """Its `scan_remat_every_n_iterations_scan`."""
    grouped = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), batches)
    group = jax.checkpoint(functools.partial(jax.lax.scan, step), prevent_cse=False)
    state, outs = jax.lax.scan(group, state, grouped)
    return state, outs.reshape(-1, *outs.shape[2:])


def group_size(mini_batches: int) -> int:
    """The largest divisor of `mini_batches` that is not above `GROUP`: its own code needs a multiple of 4."""
    return max(size for size in range(1, GROUP + 1) if mini_batches % size == 0)
