"""TTT-MLP, the read-out: parallel over chunks of C tokens, forward and backward, from what the recurrence left behind.

A chunk holds R = C / M mini-batches and reads the weights w1, b1, w2, b2 that it starts with. Those that its later
mini-batches see differ by the updates in between, which are products of tokens of the chunk; so, as linear attention
does it, the read-out of all C tokens is one attention, with

    E[i, j] = lr[j] * (token_eta[i mod M]   j in the mini-batch of i, and not later if causal (eta_last if not causal)
                       eta_last             j in an earlier mini-batch of the chunk
                       0                    otherwise)
    z1_bar = xq w1 + b1 - (E * (xq xk^T + 1)) g_z1
    x2_bar = gelu(z1_bar)
    z2_bar = x2_bar w2 + b2 - (E * (x2_bar x2^T + 1)) g_z2
    out    = xq + LN(z2_bar)

F is walked in blocks of BF; D is padded to BD, a power of two. Bytes a token of a head in bf16, D = 64, C = 64: reads
2434 (twice in the backward).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from implementations.triton.blocks import (
    load_row,
    load_tokens,
    matmul,
    matmul_add,
    nearest,
    normalise,
    project,
    store_row,
    store_tokens,
    token_pointers,
    wide,
)
from implementations.triton.mlp_blocks import gelu, gelu_first, gelu_second, load, store


class Norm(NamedTuple):
    """Of z2_bar, for the backward: every chunk of the sequence."""

    x_hat: Any  # [B H chunks C D]
    rstd: Any  # [B H chunks C], fp32


class Pulled(NamedTuple):
    """What the read-out's backward leaves for the recurrence's, laid out as `Trace`."""

    d_x2: Any  # [B H K F C]
    d_g_z1: Any  # [B H K F C]
    d_g_z2: Any  # [B H K D C], fp32
    d_w1: Any  # [B H K F D], transposed: of the weights at the start of the chunk, as the next three
    d_b1: Any  # [B H K F], fp32
    d_w2: Any  # [B H K F D]
    d_b2: Any  # [B H K D], fp32
    d_xk: Any  # [B H K C D], fp32
    d_lr: Any  # [B H K C], fp32
    x2: Any  # [B H K F C], and what the scan multiplies with, as the next two
    slope: Any  # [B H K F C], gelu'(z1)
    curve: Any  # [B H K F C], g_x2 gelu''(z1)
    p: Any  # [B H K D C], fp32, ln_weight (LN(z2) - (xv - xk))
    mean_p: Any  # [B H K C], fp32, as the next three
    along_p: Any  # mean of p x_hat
    mean1: Any  # mean of ln_weight^2 x_hat
    mean2: Any  # mean of ln_weight^2 x_hat^2


class Sums(NamedTuple):
    """Parts of the gradients of the shared parameters, one of every chunk of the sequence, fp32."""

    d_token_eta: Any  # [B H chunks C], of each token's own mini-batch
    d_eta_last: Any  # [B H chunks C], of earlier mini-batches
    d_ln_weight: Any  # [B H chunks D]
    d_ln_bias: Any  # [B H chunks D]


@triton.jit
def rates(token_eta, M: tl.constexpr, C: tl.constexpr, CAUSAL: tl.constexpr):
    """E without lr [C, C], and where it has token i's own mini-batch and earlier ones."""
    i = tl.arange(0, C)
    eta_last = tl.load(token_eta + M - 1)
    own = i[:, None] // M == i[None, :] // M
    earlier = i[:, None] // M > i[None, :] // M
    if CAUSAL:
        own = own & (i[:, None] >= i[None, :])
        rate = tl.where(own, tl.load(token_eta + i % M)[:, None], tl.where(earlier, eta_last, 0.0))
    else:
        rate = tl.where(own | earlier, eta_last, 0.0)
    return rate, own, earlier


@triton.jit
def hidden(chunk, f, BF: tl.constexpr, F: tl.constexpr, C: tl.constexpr, M: tl.constexpr):
    """Offsets [BF, C] of rows `f` to `f + BF` of chunk `chunk` of [F, C], stored as [C/M F M]; with M = C, as [F C]."""
    c = tl.arange(0, C)[None, :]
    return chunk * F * C + (f + tl.arange(0, BF))[:, None] * M + c // M * (F * M) + c % M


@triton.jit
def load_hidden(p_x, chunk, f, BF: tl.constexpr, F: tl.constexpr, C: tl.constexpr, M: tl.constexpr):
    """Those rows, as stored; zeros past row F."""
    inside = f + tl.arange(0, BF)[:, None] < F
    return load(p_x + hidden(chunk, f, BF, F, C, M), inside, F % BF != 0)


@triton.jit
def store_hidden(p_x, x, chunk, f, BF: tl.constexpr, F: tl.constexpr, C: tl.constexpr, M: tl.constexpr):
    """Those rows, rounded to what is stored there."""
    tl.store(p_x + hidden(chunk, f, BF, F, C, M), nearest(x, p_x.dtype.element_ty))


@triton.jit
def across(chunk, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, M: tl.constexpr):
    """Offsets [C, BD] of chunk `chunk` of [D, C], stored as [C/M D M], and which of them are there."""
    return tl.trans(hidden(chunk, 0, BD, D, C, M)), tl.arange(0, BD)[None, :] < D


@triton.jit
def _rows(index, f, BF: tl.constexpr, F: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Offsets [BF, BD] of rows `f` to `f + BF` of matrix `index` of [F, D], and which of them are there."""
    d = tl.arange(0, BD)[None, :]
    return index * F * D + (f + tl.arange(0, BF))[:, None] * D + d, d < D


@triton.jit
def load_rows(p_x, index, f, BF: tl.constexpr, F: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Those rows, as stored; zeros past column D."""
    at, inside = _rows(index, f, BF, F, D, BD)
    return load(p_x + at, inside, D != BD)


@triton.jit
def store_rows(p_x, x, index, f, BF: tl.constexpr, F: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Those rows, rounded to what is stored there."""
    at, inside = _rows(index, f, BF, F, D, BD)
    store(p_x + at, nearest(x, p_x.dtype.element_ty), inside, D != BD)


@triton.jit
def inner(trace, chunk, f, BF: tl.constexpr, F: tl.constexpr, C: tl.constexpr, M: tl.constexpr):
    """(x2^T, g_z1^T) [BF, C], rounded."""
    DTYPE: tl.constexpr = trace.z1.dtype.element_ty
    x2, slope = gelu_first(load_hidden(trace.z1, chunk, f, BF, F, C, M).to(tl.float32))
    g_x2 = load_hidden(trace.g_x2, chunk, f, BF, F, C, M).to(tl.float32)
    return nearest(x2, DTYPE), nearest(g_x2 * slope, DTYPE)


@triton.jit
def first_layer(
    trace, chunk, slot, f, xq, scores1, g_z1,
    BF: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """(z1_bar [C, BF], w1^T, w2 [BF, D])."""
    w1 = load_rows(trace.w1, chunk, f, BF, 4 * D, D, BD)
    w2 = load_rows(trace.w2, slot, f, BF, 4 * D, D, BD)
    b1 = tl.load(trace.b1 + chunk * 4 * D + f + tl.arange(0, BF))
    z1_bar = matmul(xq, tl.trans(w1), DTYPE, "ieee") + b1[None, :]  # [C, D] @ [D, BF] -> [C, BF]
    z1_bar -= matmul(scores1, tl.trans(g_z1), DTYPE, "ieee")  # [C, C] @ [C, BF] -> [C, BF]
    return z1_bar, w1, w2


@triton.jit(do_not_specialize=["first", "chunks", "all_chunks"])
def read_out(
    inputs, shared, trace, out, norm, first, chunks, all_chunks, heads,
    D: tl.constexpr, BD: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, CAUSAL: tl.constexpr,
    EPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Chunk `first + program_id(0) % chunks` of chain `program_id(0) / chunks`."""
    DTYPE: tl.constexpr = inputs.xq.p.dtype.element_ty
    chain, n = tl.program_id(0) // chunks, first + tl.program_id(0) % chunks
    batch, head, chunk = chain // heads, chain % heads, wide(tl.program_id(0))
    xq = load_tokens(inputs.xq, batch, head, n, C, D, BD)
    xk = load_tokens(inputs.xk, batch, head, n, C, D, BD)
    lr = tl.load(token_pointers(inputs.lr, batch, head, n, C)).to(tl.float32)
    rate, _own, _earlier = rates(shared.token_eta, M, C, CAUSAL)
    rate_lr = rate * lr[None, :]
    scores1 = nearest(rate_lr * (matmul(xq, tl.trans(xk), DTYPE, "ieee") + 1.0), DTYPE)  # [C, D] @ [D, C] -> [C, C]
    z2_bar = tl.zeros([C, BD], tl.float32)
    attn2 = tl.full([C, C], 1.0, tl.float32)
    for f in tl.range(0, 4 * D, BF, num_stages=STAGES):
        x2, g_z1 = inner(trace, chunk, f, BF, 4 * D, C, M)
        z1_bar, _, w2 = first_layer(trace, chunk, chunk, f, xq, scores1, g_z1, BF, D, BD, DTYPE)
        x2_bar = nearest(gelu(z1_bar), DTYPE)
        attn2 = matmul_add(x2_bar, x2, attn2, DTYPE, "ieee")  # [C, BF] @ [BF, C] -> [C, C]
        z2_bar = matmul_add(x2_bar, w2, z2_bar, DTYPE, "ieee")  # [C, BF] @ [BF, D] -> [C, D]
    g_z2 = load_hidden(trace.g_z2, chunk, 0, BD, D, C, M)
    z2_bar -= matmul(rate_lr * attn2, tl.trans(g_z2), DTYPE, "ieee")  # [C, C] @ [C, D] -> [C, D]
    x_hat, rstd = normalise(z2_bar + load_row(trace.b2, chunk, D, BD)[None, :], EPS, D, BD)
    part = wide(chain) * all_chunks + n
    store_rows(norm.x_hat, x_hat, part, 0, C, C, D, BD)
    tl.store(norm.rstd + part * C + tl.arange(0, C), tl.sum(rstd, 1))
    ln_weight = load_row(shared.ln_weight, head, D, BD)[None, :]
    ln_bias = load_row(shared.ln_bias, head, D, BD)[None, :]
    store_tokens(out, xq.to(tl.float32) + ln_weight * x_hat + ln_bias, batch, head, n, C, D, BD)


@triton.jit(do_not_specialize=["first", "chunks", "all_chunks"])
def read_out_backward(
    inputs, shared, trace, norm, d_out, d_xq, pulled, sums, first, chunks, all_chunks, heads,
    D: tl.constexpr, BD: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Of the same chunk: d_xq, and what the read-out adds to the cotangents of all that it read."""
    F: tl.constexpr = 4 * D
    DTYPE: tl.constexpr = inputs.xq.p.dtype.element_ty
    chain, n = tl.program_id(0) // chunks, first + tl.program_id(0) % chunks
    batch, head, chunk = chain // heads, chain % heads, wide(tl.program_id(0))
    slot = chunk * (C // M)
    part = wide(chain) * all_chunks + n
    c = tl.arange(0, C)
    xq = load_tokens(inputs.xq, batch, head, n, C, D, BD)
    xk = load_tokens(inputs.xk, batch, head, n, C, D, BD)
    lr = tl.load(token_pointers(inputs.lr, batch, head, n, C)).to(tl.float32)
    rate, _own, _earlier = rates(shared.token_eta, M, C, CAUSAL)
    rate_lr = rate * lr[None, :]
    scores1 = nearest(rate_lr * (matmul(xq, tl.trans(xk), DTYPE, "ieee") + 1.0), DTYPE)

    # out = xq + LN(z2_bar)
    x_hat = load_rows(norm.x_hat, part, 0, C, C, D, BD).to(tl.float32)
    rstd = tl.load(norm.rstd + part * C + c)[:, None]
    d_o = load_tokens(d_out, batch, head, n, C, D, BD).to(tl.float32)
    ln_weight = load_row(shared.ln_weight, head, D, BD)[None, :]
    store_row(sums.d_ln_weight, tl.sum(d_o * x_hat, 0), part, D, BD)
    store_row(sums.d_ln_bias, tl.sum(d_o, 0), part, D, BD)
    d_z2_bar = project(d_o * ln_weight, x_hat, rstd, D, BD)
    store_row(pulled.d_b2, tl.sum(d_z2_bar, 0), chunk, D, BD)
    d_z2_bar = nearest(d_z2_bar, DTYPE)
    g_z2 = load_hidden(trace.g_z2, chunk, 0, BD, D, C, M)
    d_attn2 = nearest(-rate_lr * matmul(d_z2_bar, g_z2, DTYPE, "ieee"), DTYPE)  # [C, D] @ [D, C] -> [C, C]

    attn2 = tl.full([C, C], 1.0, tl.float32)
    # What the scan would else compute of the inner LayerNorm.
    xv = load_tokens(inputs.xv, batch, head, n, C, D, BD).to(tl.float32)
    at, inside = across(chunk, D, BD, C, M)
    x_hat = load(trace.x_hat + at, inside, D != BD)
    ln_bias = load_row(shared.ln_bias, head, D, BD)[None, :]
    p = ln_weight * (ln_weight * x_hat + ln_bias - (xv - xk.to(tl.float32)))
    store(pulled.p + at, p, inside, D != BD)
    tl.store(pulled.mean_p + chunk * C + c, tl.sum(p, 1) * (1.0 / D))
    tl.store(pulled.along_p + chunk * C + c, tl.sum(p * x_hat, 1) * (1.0 / D))
    scaled = ln_weight * ln_weight * x_hat
    tl.store(pulled.mean1 + chunk * C + c, tl.sum(scaled, 1) * (1.0 / D))
    tl.store(pulled.mean2 + chunk * C + c, tl.sum(scaled * x_hat, 1) * (1.0 / D))

    d_x_q = d_o
    d_scores = tl.zeros([C, C], tl.float32)
    for f in tl.range(0, F, BF, num_stages=STAGES):
        # What the scan would else compute from z1.
        x2, slope, bend = gelu_second(load_hidden(trace.z1, chunk, f, BF, F, C, M).to(tl.float32))
        g_x2 = load_hidden(trace.g_x2, chunk, f, BF, F, C, M).to(tl.float32)
        x2, g_z1 = nearest(x2, DTYPE), nearest(g_x2 * slope, DTYPE)
        store_hidden(pulled.x2, x2, chunk, f, BF, F, C, M)
        store_hidden(pulled.slope, slope, chunk, f, BF, F, C, M)
        store_hidden(pulled.curve, g_x2 * bend, chunk, f, BF, F, C, M)

        z1_bar, w1, w2 = first_layer(trace, chunk, slot, f, xq, scores1, g_z1, BF, D, BD, DTYPE)
        x2_bar, slope = gelu_first(z1_bar)
        x2_bar = nearest(x2_bar, DTYPE)
        attn2 = matmul_add(x2_bar, x2, attn2, DTYPE, "ieee")  # [C, BF] @ [BF, C] -> [C, C]
        d_x2_bar = matmul(d_z2_bar, tl.trans(w2), DTYPE, "ieee")  # [C, D] @ [D, BF] -> [C, BF]
        d_x2_bar = matmul_add(d_attn2, tl.trans(x2), d_x2_bar, DTYPE, "ieee")
        d_z1_bar = d_x2_bar * slope
        tl.store(pulled.d_b1 + chunk * F + f + tl.arange(0, BF), tl.sum(d_z1_bar, 0))
        d_z1_bar = nearest(d_z1_bar, DTYPE)
        store_rows(pulled.d_w2, matmul(tl.trans(x2_bar), d_z2_bar, DTYPE, "ieee"), chunk, f, BF, F, D, BD)
        store_hidden(pulled.d_x2, matmul(tl.trans(x2_bar), d_attn2, DTYPE, "ieee"), chunk, f, BF, F, C, M)
        store_rows(pulled.d_w1, matmul(tl.trans(d_z1_bar), xq, DTYPE, "ieee"), chunk, f, BF, F, D, BD)
        store_hidden(pulled.d_g_z1, -matmul(tl.trans(d_z1_bar), scores1, DTYPE, "ieee"), chunk, f, BF, F, C, M)
        d_x_q = matmul_add(d_z1_bar, w1, d_x_q, DTYPE, "ieee")  # [C, BF] @ [BF, D] -> [C, D]
        d_scores = matmul_add(d_z1_bar, g_z1, d_scores, DTYPE, "ieee")  # [C, BF] @ [BF, C] -> [C, C]

    # The attention of both layers; the rates again, so that no register holds them through the loop.
    lr = tl.load(token_pointers(inputs.lr, batch, head, n, C)).to(tl.float32)
    rate, own, earlier = rates(shared.token_eta, M, C, CAUSAL)
    rate_lr = rate * lr[None, :]
    d_attn1 = nearest(-d_scores * rate_lr, DTYPE)
    d_x_q = matmul_add(d_attn1, xk, d_x_q, DTYPE, "ieee")
    store_tokens(d_xq, d_x_q, batch, head, n, C, D, BD)
    d_x_k = matmul(tl.trans(d_attn1), xq, DTYPE, "ieee")
    store_rows(pulled.d_xk, d_x_k, chunk, 0, C, C, D, BD)
    d_g_z2 = -matmul(tl.trans(nearest(rate_lr * attn2, DTYPE)), d_z2_bar, DTYPE, "ieee")  # [C, C] @ [C, D]
    store(pulled.d_g_z2 + at, d_g_z2, inside, D != BD)
    d_rate_lr = -d_scores * (matmul(xq, tl.trans(xk), DTYPE, "ieee") + 1.0)
    d_rate_lr -= matmul(d_z2_bar, g_z2, DTYPE, "ieee") * attn2
    tl.store(pulled.d_lr + chunk * C + c, tl.sum(d_rate_lr * rate, 0))
    d_rate = d_rate_lr * lr[None, :]
    tl.store(sums.d_token_eta + part * C + c, tl.sum(tl.where(own, d_rate, 0.0), 1))
    tl.store(sums.d_eta_last + part * C + c, tl.sum(tl.where(earlier, d_rate, 0.0), 1))
