"""TTT-MLP, the part that is sequential: one program a chain, and what the parallel kernels need of it, written out.

For every mini-batch of a segment, all transposed, so that a mini-batch of 16 tokens is the narrow side of a product,
and a warp that holds rows of the fast weights holds the same rows of everything that it makes from them:

    z1^T [F M]  = w1^T xk^T + b1              w1^T [F D] in fp32 registers, rounded in place: no shared memory
    z2^T [D M]  = w2^T gelu(z1^T) + b2        the sum over F crosses warps: w2, rounded, passes through shared memory
    g_z2^T      = d(1/2 ||LN(z2) - (xv - xk)||^2) / dz2
    g_x2^T      = w2 g_z2^T                   w2 [F D] in fp32 registers, rounded in place
    w1^T       -= eta_last (g_x2 * gelu'(z1))^T (lr xk),   w2 -= eta_last gelu(z1)^T (lr g_z2)

Mini-batches too large for that are those of `mlp_wide.py`.

Bytes a token of a head in bf16, D = 64: reads 258; writes 4 F + 2 D = 1152, and 4 F D / C = 1024 of weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from implementations.triton.blocks import load_tokens, matmul, matmul_add, nearest, token_pointers, wide
from implementations.triton.mlp_blocks import INTERPRETED, gelu_first


class Weights(NamedTuple):
    """Fast weights, one of the states of every chain; the others may lie in between."""

    w1: Any  # [B H D F]
    b1: Any  # [B H F]
    w2: Any  # [B H F D]
    b2: Any  # [B H D]


class Trace(NamedTuple):
    """What the recurrence leaves behind of one segment, in chunks of C tokens; K chunks a chain.

    F C and D C stand for C/M F M and C/M D M: what a step of a walk reads and writes of a mini-batch lies together.
    """

    z1: Any  # [B H K F C]
    g_x2: Any  # [B H K F C]
    g_z2: Any  # [B H K D C]
    w1: Any  # [B H K F D], transposed, at the start of every chunk
    b1: Any  # [B H K F], fp32
    w2: Any  # [B H K F D]; for the backward at the start of every mini-batch, [B H K C/M F D]
    b2: Any  # [B H K D], fp32
    x_hat: Any  # [B H K D C], fp32, of z2; for the backward alone, as the next one
    rstd: Any  # [B H K C], fp32


@triton.jit
def load_weights(weights, at, D: tl.constexpr):
    """State `at`: (w1^T [F, D], b1 [F], w2 [F, D], b2 [D])."""
    F: tl.constexpr = 4 * D
    f, d = tl.arange(0, F), tl.arange(0, D)
    return (
        tl.load(weights.w1 + at * D * F + f[:, None] + d[None, :] * F),
        tl.load(weights.b1 + at * F + f),
        tl.load(weights.w2 + at * D * F + f[:, None] * D + d[None, :]),
        tl.load(weights.b2 + at * D + d),
    )


@triton.jit
def store_weights(weights, at, w1, b1, w2, b2, D: tl.constexpr):
    """State `at`, as `load_weights` gives it."""
    F: tl.constexpr = 4 * D
    f, d = tl.arange(0, F), tl.arange(0, D)
    tl.store(weights.w1 + at * D * F + f[:, None] + d[None, :] * F, w1)
    tl.store(weights.b1 + at * F + f, b1)
    tl.store(weights.w2 + at * D * F + f[:, None] * D + d[None, :], w2)
    tl.store(weights.b2 + at * D + d, b2)


@triton.jit
def _add_2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _add_4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _add_5(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def sum_2(a, b, AXIS: tl.constexpr):
    """The sums of two blocks at once: warps meet once for all of them."""
    if INTERPRETED:
        return tl.sum(a, AXIS), tl.sum(b, AXIS)
    else:
        return tl.reduce((a, b), AXIS, _add_2)


@triton.jit
def sum_4(a, b, c, d, AXIS: tl.constexpr):
    """As `sum_2`."""
    if INTERPRETED:
        return tl.sum(a, AXIS), tl.sum(b, AXIS), tl.sum(c, AXIS), tl.sum(d, AXIS)
    else:
        return tl.reduce((a, b, c, d), AXIS, _add_4)


@triton.jit
def sum_5(a, b, c, d, e, AXIS: tl.constexpr):
    """As `sum_2`."""
    if INTERPRETED:
        return tl.sum(a, AXIS), tl.sum(b, AXIS), tl.sum(c, AXIS), tl.sum(d, AXIS), tl.sum(e, AXIS)
    else:
        return tl.reduce((a, b, c, d, e), AXIS, _add_5)


@triton.jit
def inner_gradient(z2, target, ln_weight, ln_bias, EPS: tl.constexpr, D: tl.constexpr):
    """(g_z2, x_hat [D, M], rstd [M]) of z2 [D, M]; ln_weight, ln_bias [D, 1].

    Two sums after each other: of z2, and of all that its mean is taken from.
    """
    gamma2 = ln_weight * ln_weight
    q = ln_weight * (ln_bias - target)
    sum_z2, sum_q = sum_2(z2, q, 0)
    centred = z2 - (sum_z2 * (1.0 / D))[None, :]
    scaled = gamma2 * centred
    variance, mean1, mean2, mean_q = sum_4(centred * centred, scaled, scaled * centred, q * centred, 0)
    rstd = tl.rsqrt(variance * (1.0 / D) + EPS)
    mean1 *= rstd * (1.0 / D)  # of gamma^2 x_hat
    mean2 *= rstd * rstd * (1.0 / D)  # of gamma^2 x_hat^2
    mean_p = mean1 + sum_q * (1.0 / D)
    along_p = mean2 + rstd * mean_q * (1.0 / D)  # the mean of p x_hat
    x_hat = centred * rstd[None, :]
    p = gamma2 * x_hat + q
    return rstd[None, :] * (p - mean_p[None, :] - x_hat * along_p[None, :]), x_hat, rstd


@triton.jit(do_not_specialize=["start_states", "end_states", "first", "count"])
def recurrence(
    inputs, shared, start, end, trace, start_states, end_states, first, count, heads,
    D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Mini-batches `first` to `first + count` of chain `program_id(0)`, whose states are so many apart."""
    F: tl.constexpr = 4 * D
    R: tl.constexpr = C // M  # mini-batches in a chunk
    DTYPE: tl.constexpr = inputs.xk.p.dtype.element_ty
    # Keeps the small numbers lr g_z2 in the range of fp16.
    SCALE: tl.constexpr = 16.0 if DTYPE.is_fp16() else 1.0
    chain = tl.program_id(0)
    batch, head = chain // heads, chain % heads
    f, d, m = tl.arange(0, F), tl.arange(0, D), tl.arange(0, M)
    tile = f[:, None] * D + d[None, :]  # offsets in [F, D], [F, M] and [D, M]
    of_f = f[:, None] * M + m[None, :]
    of_d = d[:, None] * M + m[None, :]
    eta_last = tl.load(shared.token_eta + M - 1)
    ln_weight = tl.load(shared.ln_weight + head * D + d)[:, None]
    ln_bias = tl.load(shared.ln_bias + head * D + d)[:, None]
    w1, b1, w2, b2 = load_weights(start, wide(chain) * start_states, D)
    # Rounded copies that the loop carries: Triton takes those from shared memory, and others from registers.
    w1_start = nearest(w1, DTYPE)
    w2_start = tl.trans(nearest(w2, DTYPE))
    # Tokens are loaded one mini-batch ahead.
    next_xk = load_tokens(inputs.xk, batch, head, first, M, D, D)
    next_xv = load_tokens(inputs.xv, batch, head, first, M, D, D)
    next_lr = tl.load(token_pointers(inputs.lr, batch, head, first, M))
    for n in range(count):
        chunk = wide(chain) * tl.cdiv(count, R) + n // R
        column = (n % R) * M
        if column == 0:
            tl.store(trace.w1 + chunk * D * F + tile, nearest(w1, DTYPE))
            tl.store(trace.b1 + chunk * F + f, b1)
            if not BACKWARD:
                tl.store(trace.w2 + chunk * D * F + tile, nearest(w2, DTYPE))
            tl.store(trace.b2 + chunk * D + d, b2)
        if BACKWARD:
            tl.store(trace.w2 + (chunk * R + n % R) * D * F + tile, nearest(w2, DTYPE))
        xk, xv, lr = next_xk, next_xv, next_lr.to(tl.float32)
        ahead = first + tl.minimum(n + 1, count - 1)
        next_xk = load_tokens(inputs.xk, batch, head, ahead, M, D, D)
        next_xv = load_tokens(inputs.xv, batch, head, ahead, M, D, D)
        next_lr = tl.load(token_pointers(inputs.lr, batch, head, ahead, M))
        slot = chunk * R + n % R
        at_f, at_d = slot * F * M, slot * D * M

        z1 = matmul(w1_start, tl.trans(xk), DTYPE, "ieee") + b1[:, None]  # [F, D] @ [D, M] -> [F, M]
        x2, slope = gelu_first(z1)
        tl.store(trace.z1 + at_f + of_f, nearest(z1, DTYPE))
        x2 = nearest(x2, DTYPE)
        z2 = matmul(w2_start, x2, DTYPE, "ieee") + b2[:, None]  # [D, F] @ [F, M] -> [D, M]

        target = tl.trans(xv.to(tl.float32) - xk.to(tl.float32))
        g_z2, x_hat, rstd = inner_gradient(z2, target, ln_weight, ln_bias, EPS, D)

        g_x2 = matmul(w2, g_z2, DTYPE, "ieee")  # [F, D] @ [D, M] -> [F, M]
        g_z1 = (-eta_last) * g_x2 * slope
        w1 = matmul_add(g_z1, lr[:, None] * xk.to(tl.float32), w1, DTYPE, "ieee")  # [F, M] @ [M, D] -> [F, D]
        b1 += tl.sum(lr[None, :] * g_z1, 1)
        lr_g_z2 = (-eta_last * lr)[None, :] * g_z2
        if DTYPE.is_fp16():
            x2 = x2.to(tl.float32) * (1 / SCALE)
        w2 = matmul_add(x2, tl.trans(SCALE * lr_g_z2), w2, DTYPE, "ieee")  # [F, M] @ [M, D] -> [F, D]
        b2 += tl.sum(lr_g_z2, 1)

        tl.store(trace.g_x2 + at_f + of_f, nearest(g_x2, DTYPE))
        tl.store(trace.g_z2 + at_d + of_d, nearest(g_z2, DTYPE))
        if BACKWARD:
            token = chunk * C + column + m
            tl.store(trace.x_hat + at_d + of_d, x_hat)
            tl.store(trace.rstd + token, rstd)
        w1_start = nearest(w1, DTYPE)
        w2_start = tl.trans(nearest(w2, DTYPE))
    store_weights(end, wide(chain) * end_states, w1, b1, w2, b2, D)
