"""TTT-MLP, the part that is sequential: one program a chain, and what the parallel kernels need of it, written out.

For every mini-batch of a segment, blocks with a hidden axis transposed and cut into [W, F/W, ...]: a warp that holds
rows of the fast weights holds the same rows of everything that it makes from them, as the tensor cores leave it and
take it again (`mlp_lanes.py`), so that only operands [M, D] and the sum over F pass through shared memory:

    z1^T [F M] = w1^T xk^T + b1               w1^T [F D] in fp32 registers, rounded in place
    z2 [M D]   = gelu(z1) w2 + b2             the sum over F: both operands through shared memory
    g_z2       = d(1/2 ||LN(z2) - (xv - xk)||^2) / dz2
    g_x2^T     = w2 g_z2^T                    w2 [F D] in fp32 registers, rounded in place
    w1^T      -= eta_last (lr g_x2 * gelu'(z1))^T xk,   w2 -= eta_last gelu(z1)^T (lr g_z2)

These are products for `mma.m16n8k16`: Triton takes it for blocks of three axes. The warp-group products that it would
take for others fence memory before each, and wait for every load and store in flight.

Fast weights and mini-batches too large for that are those of `mlp_tiles.py`.

Bytes a token of a head in bf16, D = 64: reads 258; writes 4 F + 2 D = 1152, and 4 F D / C = 1024 of weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from implementations.triton.blocks import matmul, matmul_add, nearest, wide
from implementations.triton.mlp_blocks import INTERPRETED, gelu_first
from implementations.triton.mlp_lanes import (
    ask_for_tokens,
    column,
    everywhere,
    load_block,
    load_tokens_apart,
    over_hidden,
    pointers_apart,
    store_block,
    store_narrow,
    token,
)


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
def load_weights(weights, at, D: tl.constexpr, W: tl.constexpr):
    """State `at`: (w1^T [W, F/W, D], b1 [W, F/W], w2 [W, F/W, D], b2 [D]), columns in the order of `column`."""
    F: tl.constexpr = 4 * D
    f, d = tl.arange(0, F).reshape(W, F // W), column(D)
    return (
        load_block(weights.w1 + at * D * F, F, D, W, True),
        tl.load(weights.b1 + at * F + f),
        load_block(weights.w2 + at * D * F, F, D, W),
        tl.load(weights.b2 + at * D + d),
    )


@triton.jit
def store_weights(weights, at, w1, b1, w2, b2, D: tl.constexpr, W: tl.constexpr):
    """State `at`, as `load_weights` gives it."""
    F: tl.constexpr = 4 * D
    f, d = tl.arange(0, F).reshape(W, F // W), column(D)
    store_block(weights.w1 + at * D * F, w1, F, D, W, True)
    tl.store(weights.b1 + at * F + f, b1)
    store_block(weights.w2 + at * D * F, w2, F, D, W)
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
def sum_2(a, b):
    """The sums of two blocks [M, D] over D at once: warps meet once for all of them."""
    if INTERPRETED:
        return tl.sum(a, 1), tl.sum(b, 1)
    else:
        return tl.reduce((a, b), 1, _add_2)


@triton.jit
def sum_4(a, b, c, d):
    """As `sum_2`."""
    if INTERPRETED:
        return tl.sum(a, 1), tl.sum(b, 1), tl.sum(c, 1), tl.sum(d, 1)
    else:
        return tl.reduce((a, b, c, d), 1, _add_4)


@triton.jit
def sum_5(a, b, c, d, e):
    """As `sum_2`."""
    if INTERPRETED:
        return tl.sum(a, 1), tl.sum(b, 1), tl.sum(c, 1), tl.sum(d, 1), tl.sum(e, 1)
    else:
        return tl.reduce((a, b, c, d, e), 1, _add_5)


@triton.jit
def inner_gradient(z2, target, ln_weight, ln_bias, EPS: tl.constexpr, D: tl.constexpr):
    """(g_z2, x_hat [M, D], rstd [M]) of z2 [M, D]; ln_weight, ln_bias [1, D].

    Two sums after each other: of z2, and of all that its mean is taken from.
    """
    gamma2 = ln_weight * ln_weight
    q = ln_weight * (ln_bias - target)
    sum_z2, sum_q = sum_2(z2, q)
    centred = z2 - (sum_z2 * (1.0 / D))[:, None]
    scaled = gamma2 * centred
    variance, mean1, mean2, mean_q = sum_4(centred * centred, scaled, scaled * centred, q * centred)
    rstd = tl.rsqrt(variance * (1.0 / D) + EPS)
    mean1 *= rstd * (1.0 / D)  # of gamma^2 x_hat
    mean2 *= rstd * rstd * (1.0 / D)  # of gamma^2 x_hat^2
    mean_p = mean1 + sum_q * (1.0 / D)
    along_p = mean2 + rstd * mean_q * (1.0 / D)  # the mean of p x_hat
    rstds = rstd[:, None]
    x_hat = centred * rstds
    p = gamma2 * x_hat + q
    return rstds * (p - mean_p[:, None] - x_hat * along_p[:, None]), x_hat, rstd


@triton.jit(do_not_specialize=["start_states", "end_states", "first", "count"])
def recurrence(
    inputs, shared, start, end, trace, start_states, end_states, first, count, heads,
    D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, W: tl.constexpr, EPS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Mini-batches `first` to `first + count` of chain `program_id(0)`, whose states are so many apart."""
    F: tl.constexpr = 4 * D
    R: tl.constexpr = C // M  # mini-batches in a chunk
    DTYPE: tl.constexpr = inputs.xk.p.dtype.element_ty
    # Keeps the small numbers lr g_z2 in the range of fp16.
    SCALE: tl.constexpr = 16.0 if DTYPE.is_fp16() else 1.0
    chain = tl.program_id(0)
    batch, head = chain // heads, chain % heads
    f, d = tl.arange(0, F).reshape(W, F // W), column(D)
    eta_last = tl.load(shared.token_eta + M - 1)
    ln_weight = tl.load(shared.ln_weight + head * D + d)[None, :]
    ln_bias = tl.load(shared.ln_bias + head * D + d)[None, :]
    w1, b1, w2, b2 = load_weights(start, wide(chain) * start_states, D, W)
    next_xk = load_tokens_apart(inputs.xk, batch, head, first, M, D)
    for n in range(count):
        chunk = wide(chain) * tl.cdiv(count, R) + n // R
        w2_start = nearest(w2, DTYPE)
        if n % R == 0:
            store_block(trace.w1 + chunk * D * F, w1, F, D, W)
            tl.store(trace.b1 + chunk * F + f, b1)
            if not BACKWARD:
                store_block(trace.w2 + chunk * D * F, w2_start, F, D, W)
            tl.store(trace.b2 + chunk * D + d, b2)
        if BACKWARD:
            store_block(trace.w2 + (chunk * R + n % R) * D * F, w2_start, F, D, W)
        xk = next_xk
        ahead = first + tl.minimum(n + 1, count - 1)
        ask_for_tokens(inputs.xk, batch, head, ahead, M)
        ask_for_tokens(inputs.xv, batch, head, ahead, M)
        ask_for_tokens(inputs.lr, batch, head, ahead, M)
        slot = chunk * R + n % R
        at_f, at_d = slot * F * M, slot * D * M

        z1 = matmul(w1, everywhere(tl.trans(xk), W), DTYPE, "ieee") + b1[:, :, None]  # [F/W, D] @ [D, M] -> [F/W, M]
        x2, slope = gelu_first(z1)
        store_block(trace.z1 + at_f, z1, F, M, W)
        x2 = nearest(x2, DTYPE)
        z2 = over_hidden(x2, w2_start, tl.zeros([M, D], tl.float32) + b2[None, :], DTYPE)

        # Loaded no sooner: registers are few, and a load that is spilled is waited for.
        xv = load_tokens_apart(inputs.xv, batch, head, first + n, M, D)
        lr = tl.load(pointers_apart(inputs.lr, batch, head, first + n, M)).to(tl.float32)
        target = xv.to(tl.float32) - xk.to(tl.float32)
        g_z2, x_hat, rstd = inner_gradient(z2, target, ln_weight, ln_bias, EPS, D)

        g_z2_t = tl.trans(nearest(g_z2, DTYPE))
        g_x2 = matmul(w2, everywhere(g_z2_t, W), DTYPE, "ieee")  # [F/W, D] @ [D, M] -> [F/W, M]
        next_xk = load_tokens_apart(inputs.xk, batch, head, ahead, M, D)
        lr_g_z1 = (-eta_last * lr)[None, None, :] * g_x2 * slope
        b1 += tl.sum(lr_g_z1, 2)
        if DTYPE.is_fp16():
            lr_g_z1, xk = lr_g_z1 * SCALE, xk.to(tl.float32) * (1 / SCALE)
        w1 = matmul_add(lr_g_z1, everywhere(nearest(xk, DTYPE), W), w1, DTYPE, "ieee")  # [F/W, M] @ [M, D] -> [F/W, D]
        lr_g_z2 = (-eta_last * lr)[:, None] * g_z2
        if DTYPE.is_fp16():
            x2 = x2.to(tl.float32) * (1 / SCALE)
        w2 = matmul_add(x2, everywhere(nearest(SCALE * lr_g_z2, DTYPE), W), w2, DTYPE, "ieee")  # [F/W, M] @ [M, D]
        b2 += tl.sum(lr_g_z2, 0)

        store_block(trace.g_x2 + at_f, g_x2, F, M, W)
        store_narrow(trace.g_z2 + at_d, g_z2, M, D)
        if BACKWARD:
            store_narrow(trace.x_hat + at_d, x_hat, M, D)
            tl.store(trace.rstd + chunk * C + n % R * M + token(M), rstd)
    store_weights(end, wide(chain) * end_states, w1, b1, w2, b2, D, W)
