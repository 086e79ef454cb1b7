"""The pieces that both inner models are made of, each with its hand-written derivative.

Shapes: `M D` stands for `[B, H, M, D]`; leading axes broadcast. Every function takes and returns tensors of the
accumulation dtype; `dot` alone rounds to the problem's dtype. A function named `f_backward` takes the cotangents of
what `f` returned and gives the cotangents of what `f` took.

Source: the dual form of arXiv 2407.04620, section 2.5 and appendix A; derivatives worked out here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from spec.problem import ARRAY_DTYPE, Problem


class Norm(NamedTuple):
    """What a LayerNorm's derivative needs of its forward: `x_hat` [M D] normalised, `rstd` [M 1] = 1 / std."""

    x_hat: Tensor
    rstd: Tensor


def dot(a: Tensor, b: Tensor, problem: Problem) -> Tensor:
    """Matrix product: operands rounded to the problem's dtype, sums kept in the accumulation dtype.

    The product of two fp16 or bf16 numbers is the same in tf32, so tensor cores may take it (`scan.matmul_mode`).
    """
    if problem.dtype != problem.accumulate_dtype:
        io_dtype = getattr(torch, ARRAY_DTYPE[problem.dtype])
        a, b = a.to(io_dtype).to(a.dtype), b.to(io_dtype).to(b.dtype)
    return a @ b


# --- LayerNorm ---


def normalise(z: Tensor, eps: float) -> Norm:
    """x_hat = (z - mean) rstd over the last axis, biased variance."""
    centred = z - z.mean(-1, keepdim=True)
    rstd = ((centred * centred).mean(-1, keepdim=True) + eps).rsqrt()
    return Norm(centred * rstd, rstd)


def project(d_x_hat: Tensor, norm: Norm) -> Tensor:
    """The derivative of `normalise`, which is symmetric: rstd (d - mean(d) - x_hat mean(d x_hat))."""
    mean = d_x_hat.mean(-1, keepdim=True)
    along = (d_x_hat * norm.x_hat).mean(-1, keepdim=True)
    return norm.rstd * (d_x_hat - mean - norm.x_hat * along)


def layer_norm_backward(d_y: Tensor, norm: Norm, ln_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of y = gamma x_hat + beta: (d_z [M D], d_ln_weight [1 D], d_ln_bias [1 D])."""
    return (
        project(d_y * ln_weight, norm),
        (d_y * norm.x_hat).sum(-2, keepdim=True),
        d_y.sum(-2, keepdim=True),
    )


# --- The inner gradient: LayerNorm backward fused with the L2 loss ---


def inner_gradient(z: Tensor, target: Tensor, ln_weight: Tensor, ln_bias: Tensor, eps: float) -> tuple[Tensor, Norm]:
    """g_z = d(1/2 ||LN(z) - target||^2) / dz of every token, [M D], and the LayerNorm it went through."""
    norm = normalise(z, eps)
    error = ln_weight * norm.x_hat + ln_bias - target
    return project(error * ln_weight, norm), norm


def inner_gradient_backward(
    d_g: Tensor, g: Tensor, norm: Norm, target: Tensor, ln_weight: Tensor, ln_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The second order: (d_z [M D], d_target [M D], d_ln_weight [1 D], d_ln_bias [1 D]) of d_g [M D].

    With e = gamma x_hat + beta - target and p = gamma e, g = rstd (p - mean(p) - x_hat mean(p x_hat)): d_g reaches
    p through the projection, x_hat through the last term, and z through both x_hat and rstd.
    """
    x_hat, rstd = norm
    error = ln_weight * x_hat + ln_bias - target
    p = ln_weight * error
    d_p = project(d_g, norm)
    d_error = ln_weight * d_p
    along_p = (p * x_hat).mean(-1, keepdim=True)
    along_d_g = (d_g * x_hat).mean(-1, keepdim=True)
    d_x_hat = ln_weight * d_error - rstd * (along_p * d_g + along_d_g * p)
    through_rstd = (d_g * g).mean(-1, keepdim=True)
    d_z = project(d_x_hat, norm) - rstd * x_hat * through_rstd
    d_ln_weight = (d_p * error + d_error * x_hat).sum(-2, keepdim=True)
    return d_z, -d_error, d_ln_weight, d_error.sum(-2, keepdim=True)


# --- Causal read-out: one layer, with the weights that token i sees ---


def read_out(
    x_bar: Tensor, x: Tensor, g: Tensor, lr: Tensor, token_eta: Tensor, w: Tensor, b: Tensor, problem: Problem
) -> Tensor:
    """z_bar = x_bar w + b - (eta * (tril(x_bar x^T) + tril(1))) g, with eta[i, j] = token_eta[i] lr[j].

    x_bar, x [M K] are the layer's inputs in the test and the training view, g [M L] the inner gradient of its
    output, w [K L], b [1 L], lr and token_eta [M 1]; z_bar is [M L].
    """
    attn = (dot(x_bar, x.mT, problem) + 1).tril()  # [M K] @ [K M] -> [M M]
    return dot(x_bar, w, problem) + b - dot(token_eta * lr.mT * attn, g, problem)


def read_out_backward(
    d_z_bar: Tensor, x_bar: Tensor, x: Tensor, g: Tensor, lr: Tensor, token_eta: Tensor, w: Tensor, problem: Problem
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(d_x_bar [M K], d_x [M K], d_g [M L], d_lr [M 1], d_token_eta [M 1], d_w [K L], d_b [1 L])."""
    attn = (dot(x_bar, x.mT, problem) + 1).tril()
    eta = token_eta * lr.mT
    d_scores = -dot(d_z_bar, g.mT, problem).tril()  # of eta * attn, [M L] @ [L M] -> [M M]
    d_eta = d_scores * attn
    d_attn = d_scores * eta
    return (
        dot(d_z_bar, w.mT, problem) + dot(d_attn, x, problem),
        dot(d_attn.mT, x_bar, problem),
        -dot((eta * attn).mT, d_z_bar, problem),
        (d_eta * token_eta).sum(-2, keepdim=True).mT,
        (d_eta * lr.mT).sum(-1, keepdim=True),
        dot(x_bar.mT, d_z_bar, problem),
        d_z_bar.sum(-2, keepdim=True),
    )


# --- The update of one layer's fast weights after a mini-batch ---


def update(
    x: Tensor, g: Tensor, lr: Tensor, token_eta: Tensor, w: Tensor, b: Tensor, problem: Problem
) -> tuple[Tensor, Tensor]:
    """w - eta_last (lr x)^T g and b - eta_last sum_j lr_j g_j, with eta_last = token_eta[M - 1]."""
    eta_last = token_eta[-1:]
    return (
        w - eta_last * dot((lr * x).mT, g, problem),  # [K M] @ [M L] -> [K L]
        b - eta_last * (lr * g).sum(-2, keepdim=True),
    )


def update_backward(
    d_w: Tensor, d_b: Tensor, x: Tensor, g: Tensor, lr: Tensor, token_eta: Tensor, problem: Problem
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d_x [M K], d_g [M L], d_lr [M 1], d_token_eta [M 1]); d_w and d_b themselves pass through unchanged."""
    eta_last = token_eta[-1:]
    pulled = dot(x, d_w, problem) + d_b  # [M K] @ [K L] -> [M L]
    along = (g * pulled).sum(-1, keepdim=True)
    d_eta_last = -(lr * along).sum(-2, keepdim=True)
    return (
        -eta_last * lr * dot(g, d_w.mT, problem),  # [M L] @ [L K] -> [M K]
        -eta_last * lr * pulled,
        -eta_last * along,
        torch.nn.functional.pad(d_eta_last, (0, 0, x.shape[-2] - 1, 0)),
    )


# --- gelu, tanh form, with sqrt(2 / pi) itself ---
# (1 + tanh u) / 2 is sigmoid(2 u): its derivative sigmoid(2 u) sigmoid(-2 u) does not cancel where 1 - tanh^2 would.

_GELU_SCALE = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


def gelu(z: Tensor) -> Tensor:
    """z sigmoid(v) with v = 2 sqrt(2 / pi) (z + 0.044715 z^3)."""
    return z * torch.sigmoid(_GELU_SCALE * (z + _GELU_CUBIC * z**3))


def gelu_first(z: Tensor) -> Tensor:
    """gelu'(z)."""
    v = _GELU_SCALE * (z + _GELU_CUBIC * z**3)
    slope = _GELU_SCALE * (1 + 3 * _GELU_CUBIC * z**2)  # dv/dz
    return torch.sigmoid(v) * (1 + z * torch.sigmoid(-v) * slope)


def gelu_second(z: Tensor) -> Tensor:
    """gelu''(z): the outer gradient differentiates the inner one."""
    v = _GELU_SCALE * (z + _GELU_CUBIC * z**3)
    slope = _GELU_SCALE * (1 + 3 * _GELU_CUBIC * z**2)
    bend = _GELU_SCALE * 6 * _GELU_CUBIC * z  # d2v/dz2
    s, s_other = torch.sigmoid(v), torch.sigmoid(-v)
    return s * s_other * (2 * slope + z * (bend + (s_other - s) * slope**2))
