"""The pieces that both inner models are made of, each with its hand-written derivative.

Everything is written for one mini-batch of one head (`M D` is a matrix, `M` a vector); `scan.over_heads` spreads it.
Every function takes and returns arrays of the accumulation dtype; `dot` alone rounds to the problem's dtype. A
function named `f_backward` takes the cotangents of what `f` returned and gives the cotangents of what `f` took.

Source: the dual form of arXiv 2407.04620, section 2.5 and appendix A; derivatives worked out here.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from spec.problem import ARRAY_DTYPE, Problem


class Norm(NamedTuple):
    """What a LayerNorm's derivative needs of its forward: `x_hat` [M D] normalised, `rstd` [M 1] = 1 / std."""

    x_hat: Array
    rstd: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot(a: Array, b: Array, problem: Problem) -> Array:
    """Matrix product: operands rounded to the problem's dtype, sums kept in the accumulation dtype.

    The precision is always spelled out, so that no global default decides it; tf32 is an error where there is none.
    The derivative is two products of the same kind: JAX's own would round their results to the problem's dtype too.
    """
    tf32 = problem.matmul_precision == "tf32"
    product = functools.partial(
        jax.lax.dot,
        precision=jax.lax.DotAlgorithmPreset.TF32_TF32_F32 if tf32 else jax.lax.Precision.HIGHEST,
        preferred_element_type=ARRAY_DTYPE[problem.accumulate_dtype],
    )
    if problem.dtype == problem.accumulate_dtype:
        return product(a, b)
    io = ARRAY_DTYPE[problem.dtype]
    # XLA for CPUs compiles bf16 products that it then cannot run (jax 0.10.2): rounded fp32 is the same there.
    return jax.lax.platform_dependent(
        a,
        b,
        cpu=lambda *operands: product(*(x.astype(io).astype(x.dtype) for x in operands)),
        default=lambda *operands: product(*(x.astype(io) for x in operands)),
    )


dot.defvjp(
    lambda a, b, problem: (dot(a, b, problem), (a, b)),
    lambda problem, operands, d: (dot(d, operands[1].T, problem), dot(operands[0].T, d, problem)),
)


# --- LayerNorm ---


def normalise(z: Array, eps: float) -> Norm:
    """x_hat = (z - mean) rstd over the last axis, biased variance."""
    centred = z - z.mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + eps)
    return Norm(centred * rstd, rstd)


def project(d_x_hat: Array, norm: Norm) -> Array:
    """The derivative of `normalise`, which is symmetric: rstd (d - mean(d) - x_hat mean(d x_hat))."""
    mean = d_x_hat.mean(-1, keepdims=True)
    along = (d_x_hat * norm.x_hat).mean(-1, keepdims=True)
    return norm.rstd * (d_x_hat - mean - norm.x_hat * along)


def layer_norm_backward(d_y: Array, norm: Norm, ln_weight: Array) -> tuple[Array, Array, Array]:
    """Of y = gamma x_hat + beta: (d_z [M D], d_ln_weight [D], d_ln_bias [D])."""
    return project(d_y * ln_weight, norm), (d_y * norm.x_hat).sum(0), d_y.sum(0)


# --- The inner gradient: LayerNorm backward fused with the L2 loss ---


def inner_gradient(z: Array, target: Array, ln_weight: Array, ln_bias: Array, eps: float) -> tuple[Array, Norm]:
    """g_z = d(1/2 ||LN(z) - target||^2) / dz of every token, [M D], and the LayerNorm it went through."""
    norm = normalise(z, eps)
    error = ln_weight * norm.x_hat + ln_bias - target
    return project(error * ln_weight, norm), norm


def inner_gradient_backward(
    d_g: Array, g: Array, norm: Norm, target: Array, ln_weight: Array, ln_bias: Array
) -> tuple[Array, Array, Array, Array]:
    """The second order: (d_z [M D], d_target [M D], d_ln_weight [D], d_ln_bias [D]) of d_g [M D].

    With e = gamma x_hat + beta - target and p = gamma e, g = rstd (p - mean(p) - x_hat mean(p x_hat)): d_g reaches
    p through the projection, x_hat through the last term, and z through both x_hat and rstd.
    """
    x_hat, rstd = norm
    error = ln_weight * x_hat + ln_bias - target
    p = ln_weight * error
    d_p = project(d_g, norm)
    d_error = ln_weight * d_p
    along_p = (p * x_hat).mean(-1, keepdims=True)
    along_d_g = (d_g * x_hat).mean(-1, keepdims=True)
    d_x_hat = ln_weight * d_error - rstd * (along_p * d_g + along_d_g * p)
    through_rstd = (d_g * g).mean(-1, keepdims=True)
    d_z = project(d_x_hat, norm) - rstd * x_hat * through_rstd
    return d_z, -d_error, (d_p * error + d_error * x_hat).sum(0), d_error.sum(0)


# --- Causal read-out: one layer, with the weights that token i sees ---


def read_out(
    x_bar: Array, x: Array, g: Array, lr: Array, token_eta: Array, w: Array, b: Array, problem: Problem
) -> Array:
    """z_bar = x_bar w + b - (eta * (tril(x_bar x^T) + tril(1))) g, with eta[i, j] = token_eta[i] lr[j].

    x_bar, x [M K] are the layer's inputs in the test and the training view, g [M L] the inner gradient of its
    output, w [K L], b [L], lr and token_eta [M]; z_bar is [M L].
    """
    attn = jnp.tril(dot(x_bar, x.T, problem) + 1)  # [M K] @ [K M] -> [M M]
    return dot(x_bar, w, problem) + b - dot(token_eta[:, None] * lr * attn, g, problem)


def read_out_backward(
    d_z_bar: Array, x_bar: Array, x: Array, g: Array, lr: Array, token_eta: Array, w: Array, problem: Problem
) -> tuple[Array, Array, Array, Array, Array, Array, Array]:
    """(d_x_bar [M K], d_x [M K], d_g [M L], d_lr [M], d_token_eta [M], d_w [K L], d_b [L])."""
    attn = jnp.tril(dot(x_bar, x.T, problem) + 1)
    eta = token_eta[:, None] * lr
    d_scores = -jnp.tril(dot(d_z_bar, g.T, problem))  # of eta * attn, [M L] @ [L M] -> [M M]
    d_eta = d_scores * attn
    d_attn = d_scores * eta
    return (
        dot(d_z_bar, w.T, problem) + dot(d_attn, x, problem),
        dot(d_attn.T, x_bar, problem),
        -dot((eta * attn).T, d_z_bar, problem),
        (d_eta * token_eta[:, None]).sum(0),
        (d_eta * lr).sum(1),
        dot(x_bar.T, d_z_bar, problem),
        d_z_bar.sum(0),
    )


# --- The update of one layer's fast weights after a mini-batch ---


def update(
    x: Array, g: Array, lr: Array, token_eta: Array, w: Array, b: Array, problem: Problem
) -> tuple[Array, Array]:
    """w - eta_last (lr x)^T g and b - eta_last sum_j lr_j g_j, with eta_last = token_eta[M - 1]."""
    lr_x, lr_g = lr[:, None] * x, lr[:, None] * g
    return (
        w - token_eta[-1] * dot(lr_x.T, g, problem),  # [K M] @ [M L] -> [K L]
        b - token_eta[-1] * lr_g.sum(0),
    )


def update_backward(
    d_w: Array, d_b: Array, x: Array, g: Array, lr: Array, token_eta: Array, problem: Problem
) -> tuple[Array, Array, Array, Array]:
    """(d_x [M K], d_g [M L], d_lr [M], d_token_eta [M]); d_w and d_b themselves pass through unchanged."""
    pulled = dot(x, d_w, problem) + d_b  # [M K] @ [K L] -> [M L]
    along = (g * pulled).sum(1)
    eta = token_eta[-1] * lr
    d_eta_last = -(lr * along).sum(keepdims=True)
    return (
        -eta[:, None] * dot(g, d_w.T, problem),  # [M L] @ [L K] -> [M K]
        -eta[:, None] * pulled,
        -token_eta[-1] * along,
        jnp.pad(d_eta_last, (len(token_eta) - 1, 0)),
    )


# --- gelu, tanh form, with sqrt(2 / pi) itself ---
# (1 + tanh u) / 2 is sigmoid(2 u): its derivative sigmoid(2 u) sigmoid(-2 u) does not cancel where 1 - tanh^2 would.

_GELU_SCALE = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


def gelu(z: Array) -> Array:
    """z sigmoid(v) with v = 2 sqrt(2 / pi) (z + 0.044715 z^3)."""
    return z * jax.nn.sigmoid(_GELU_SCALE * (z + _GELU_CUBIC * z**3))


def gelu_first(z: Array) -> Array:
    """gelu'(z)."""
    v = _GELU_SCALE * (z + _GELU_CUBIC * z**3)
    slope = _GELU_SCALE * (1 + 3 * _GELU_CUBIC * z**2)  # dv/dz
    return jax.nn.sigmoid(v) * (1 + z * jax.nn.sigmoid(-v) * slope)


def gelu_second(z: Array) -> Array:
    """gelu''(z): the outer gradient differentiates the inner one."""
    v = _GELU_SCALE * (z + _GELU_CUBIC * z**3)
    slope = _GELU_SCALE * (1 + 3 * _GELU_CUBIC * z**2)
    bend = _GELU_SCALE * 6 * _GELU_CUBIC * z  # d2v/dz2
    s, s_other = jax.nn.sigmoid(v), jax.nn.sigmoid(-v)
    return s * s_other * (2 * slope + z * (bend + (s_other - s) * slope**2))
