"""TTT-Linear in Triton with nothing but the recurrence left in the sequential loop.

What it changes against `ttt_linear`: only w -> z1 -> LayerNorm gradient -> w' must be done mini-batch by mini-batch,
and backwards only d_w' -> d_g_z1 -> d_z1 -> d_w. Two kernels with one program a chain do that and no more; all else
is done by kernels with one program for every chunk of C = R M tokens of every chain:

    forward    _recurrence   stores w, b at the start of each chunk and lr g_z1 of each token
               _read_out     z1_bar = xq w + b - (eta * (xq xk^T + 1)) (lr g_z1) of a chunk, as if it were one mini-batch
    backward   _recurrence   again, of one segment at a time, from the last to the first
               _read_out_backward   d_xq, and all that reaches w and lr g_z1 of the chunk through the read-out
               _reverse_recurrence  d_lr_g of each token, and d_w, d_b at the end of each chunk
               _update_backward     d_xk, d_xv, d_lr

In the read-out of a chunk eta[i, j] is token_eta[i] within a mini-batch (j <= i), token_eta[M-1] where j's mini-batch
is before i's, else 0: the dual form holds for any number of mini-batches once their gradients are known. Products
over the chunk, of 64 tokens even at M = 16, replace D^2 numbers of fast weights a mini-batch by D^2 a chunk.

Two identities shorten the loop. The LayerNorm sees z1 less its mean over D, and g_z1 sums to zero over D: so the mean
of w1 and b1 over their last axis never moves; it is taken off at the start and put back at the end, z1 has mean zero,
and var = mean(z1^2). And with c = ln_weight (ln_bias - target) less its mean,

    g_z1 = rstd (x_hat (ln_weight^2 - mean(p x_hat)) + c - rstd mean(ln_weight^2 z1))
    mean(p x_hat) = rstd^2 mean(ln_weight^2 z1^2) + rstd mean(c z1)

four sums over z1 that one reduction takes together: one round of barriers a mini-batch. The second order likewise,
of v = lr d_lr_g, with y = 2 ln_weight^2 x_hat + c and mean(v) = 0:

    d_z1 = rstd^2 ((ln_weight^2 - q) v - a y - (mean(ln_weight^2 v) - a q1) - x_hat (mean(v y) - a q3))
    a = mean(v x_hat), q = mean(p x_hat), q1 = mean(y), q3 = mean(ln_weight^2 x_hat^2) + 3 q

Memory: see `workspace_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from implementations.kernels import TritonKernel
from implementations.triton.arguments import Shared, State, check, empty, tokens, view
from implementations.triton.blocks import (
    inner_gradient_backward,
    inside,
    load_lr,
    load_matrix,
    load_row,
    load_tokens,
    matmul,
    matmul_add,
    mean,
    nearest,
    normalise,
    project,
    store_matrix,
    store_row,
    store_tokens,
    token_pointers,
    wide,
)
from implementations.triton.launch import Launch, meta
from implementations.triton.limits import block_d
from spec.problem import Problem
from spec.tensors import INPUTS, OUTPUTS, LinearInputs, LinearOutputs


class Segment(NamedTuple):
    """Pointers to what the kernels of one segment hand to each other; [tokens] counts those of the segment."""

    w: Any  # [B H, chunks + 1, D, D] I/O dtype, transposed: before each chunk and after the last
    b: Any  # [B H, chunks + 1, D]
    lr_g: Any  # [B H, tokens, D] I/O dtype


class Kept(NamedTuple):
    """Pointers to what the second order needs of the inner LayerNorm of each token."""

    x_hat: Any  # [B H, tokens, D] I/O dtype
    y: Any  # [B H, tokens, D] I/O dtype
    lr: Any  # [B H, tokens] fp32, one beside the other: the loop can fetch them ahead
    rstd: Any  # [B H, tokens]
    q: Any  # [B H, tokens]
    q1: Any  # [B H, tokens]
    q3: Any  # [B H, tokens]


class Pulled(NamedTuple):
    """Pointers to cotangents on their way from one kernel of the backward to the next."""

    read_w: Any  # [B H, chunks, D, D] transposed: what the read-out adds to d_w
    read_b: Any  # [B H, chunks, D]
    part: Any  # [B H, tokens, D] I/O dtype: d_lr_g of the read-out
    d_lr_g: Any  # [B H, tokens, D] I/O dtype
    d_w: Any  # [B H, chunks, D, D] I/O dtype, transposed: at the end of the chunk
    d_b: Any  # [B H, chunks, D]


# --- Pieces ---


@triton.jit
def _four_sums(a, b, c, d, AXIS: tl.constexpr):
    """Over one axis, in one reduction."""
    ab, cd = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), AXIS, keep_dims=True))
    a, b = tl.split(ab)
    c, d = tl.split(cd)
    return a, b, c, d


@triton.jit
def _turn(x, TURN: tl.constexpr):
    return tl.trans(x) if TURN else x


@triton.jit
def _over_d(x, TURN: tl.constexpr):
    """[D] along the axis of D of a block."""
    return x[:, None] if TURN else x[None, :]


@triton.jit
def _over_tokens(x, TURN: tl.constexpr):
    """[M] along the axis of the tokens of a block."""
    return x[None, :] if TURN else x[:, None]


@triton.jit
def _inside(x, D: tl.constexpr, BLOCK_D: tl.constexpr, TURN: tl.constexpr):
    if D != BLOCK_D:
        x = tl.where(_over_d(tl.arange(0, BLOCK_D), TURN) < D, x, 0.0)
    return x


@triton.jit
def _rows(p, row, D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr):
    """[M, D], M rows of contiguous `... D` from `row` on."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    at = p + wide(row) * D + tl.arange(0, M)[:, None] * D + columns
    return tl.load(at) if D == BLOCK_D else tl.load(at, columns < D, 0.0)


@triton.jit
def _store_rows(p, x, row, D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)[None, :]
    at = p + wide(row) * D + tl.arange(0, M)[:, None] * D + columns
    x = nearest(x, p.dtype.element_ty)
    if D == BLOCK_D:
        tl.store(at, x)
    else:
        tl.store(at, x, columns < D)


@triton.jit
def _multiply_add(a, b, c, scale, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """c + scale a @ b; fp16 would lose the small numbers of `scale a`, and fp32 a rounding of c for every row of b."""
    if DTYPE.is_fp16() or DTYPE.is_fp32():
        c += scale * matmul(a, b, DTYPE, PRECISION)
    else:
        c = matmul_add(scale * a, b, c, DTYPE, PRECISION)
    return c


@triton.jit
def _prepare(inputs, batch, head, n, ln_weight, ln_bias, M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(c [M, D], lr [M]) of a mini-batch: nothing that waits for the chain."""
    xk = load_tokens(inputs.xk, batch, head, n, M, D, BLOCK_D)
    xv = load_tokens(inputs.xv, batch, head, n, M, D, BLOCK_D)
    lr = tl.load(token_pointers(inputs.lr, batch, head, n, M))
    c = ln_weight * (ln_bias + (xk.to(tl.float32) - xv.to(tl.float32)))
    return inside(c - mean(c, D), D, BLOCK_D), lr


@triton.jit
def _seen(token_eta, M: tl.constexpr, C: tl.constexpr, CAUSAL: tl.constexpr):
    """eta[i, j] / lr[j] of a chunk [C, C], and where it is token_eta[i] and where token_eta[M - 1]."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    last = tl.load(token_eta + M - 1)
    if CAUSAL:
        own = (i // M == j // M) & (i >= j)
        before = i // M > j // M
    else:
        own = (i < 0) & (j < 0)
        before = i // M >= j // M
    eta = tl.load(token_eta + tl.arange(0, C) % M)[:, None]
    return tl.where(own, eta, tl.where(before, last, 0.0)), own, before


# --- The recurrence ---


@triton.jit
def _recurrence(
    inputs, shared, start, end, segment, kept, heads, first, mini_batches,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr, KEEP: tl.constexpr,
    TURN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    chain = tl.program_id(0)
    batch, head = chain // heads, chain % heads
    DTYPE: tl.constexpr = inputs.xk.p.dtype.element_ty
    AXIS: tl.constexpr = 0 if TURN else 1
    R: tl.constexpr = C // M
    chunks = mini_batches // R
    eta_last = tl.load(shared.token_eta + M - 1)
    ln_weight = load_row(shared.ln_weight, head, D, BLOCK_D)
    ln_bias = load_row(shared.ln_bias, head, D, BLOCK_D)
    square = _over_d(ln_weight * ln_weight, TURN)
    w = tl.trans(load_matrix(start.w, chain, D, BLOCK_D))  # [D of z1, D of xk]
    b = load_row(start.b, chain, D, BLOCK_D)
    mean_w = tl.sum(w, 0) * (1.0 / D)
    mean_b = tl.sum(b, 0) * (1.0 / D)
    w = _inside(w - mean_w[None, :], D, BLOCK_D, True)
    b = tl.where(tl.arange(0, BLOCK_D) < D, b - mean_b, 0.0)
    # b for every token: the sum over tokens that moves it is a product with ones, whose result lies as z1 does.
    ones = nearest(tl.full([M, M], 1.0, tl.float32), DTYPE)
    b = tl.zeros([BLOCK_D, M] if TURN else [M, BLOCK_D], tl.float32) + _over_d(b, TURN)
    c_next, lr_next = _prepare(inputs, batch, head, first, ln_weight[None, :], ln_bias[None, :], M, D, BLOCK_D)
    for i in tl.range(0, mini_batches, num_stages=STAGES):
        if i % R == 0:
            slot = chain * (chunks + 1) + i // R
            store_matrix(segment.w, w, slot, D, BLOCK_D)
            store_row(segment.b, tl.max(b, 1 - AXIS), slot, D, BLOCK_D)
        xk = load_tokens(inputs.xk, batch, head, first + i, M, D, BLOCK_D)
        c, lr = _turn(c_next, TURN), _over_tokens(lr_next.to(tl.float32), TURN)
        following = first + tl.minimum(i + 1, mini_batches - 1)
        c_next, lr_next = _prepare(inputs, batch, head, following, ln_weight[None, :], ln_bias[None, :], M, D, BLOCK_D)
        if TURN:
            z1 = matmul_add(w, tl.trans(xk), b, DTYPE, PRECISION)  # [D, D] @ [D, M] -> [D, M]
        else:
            z1 = matmul_add(xk, tl.trans(w), b, DTYPE, PRECISION)  # [M, D] @ [D, D] -> [M, D]
        scaled = square * z1
        z_z, w_z, w_z_z, c_z = _four_sums(z1 * z1, scaled, scaled * z1, c * z1, AXIS)
        rstd = tl.rsqrt(z_z * (1.0 / D) + EPS)
        half_q1 = rstd * w_z * (1.0 / D)
        w_x_x = rstd * rstd * w_z_z * (1.0 / D)
        q = w_x_x + rstd * c_z * (1.0 / D)
        # In this order, so that every block keeps the layout of z1.
        g = rstd * (rstd * z1 * (square - q) - half_q1 + c)
        lr_g = _inside(lr * g, D, BLOCK_D, TURN)
        row = (chain * mini_batches + i) * M
        _store_rows(segment.lr_g, _turn(lr_g, TURN), row, D, BLOCK_D, M)
        if KEEP:
            _store_rows(kept.x_hat, _turn(rstd * z1, TURN), row, D, BLOCK_D, M)
            _store_rows(kept.y, _turn(2.0 * rstd * scaled + c, TURN), row, D, BLOCK_D, M)
            at = row + tl.arange(0, M)
            tl.store(kept.lr + at, tl.sum(lr, AXIS))
            tl.store(kept.rstd + at, tl.sum(rstd, AXIS))
            tl.store(kept.q + at, tl.sum(q, AXIS))
            tl.store(kept.q1 + at, tl.sum(2.0 * half_q1, AXIS))
            tl.store(kept.q3 + at, tl.sum(w_x_x + 3.0 * q, AXIS))
        w = _multiply_add(lr_g if TURN else tl.trans(lr_g), xk, w, -eta_last, DTYPE, PRECISION)
        if TURN:
            b = _multiply_add(lr_g, ones, b, -eta_last, DTYPE, PRECISION)
        else:
            b = _multiply_add(ones, lr_g, b, -eta_last, DTYPE, PRECISION)
    slot = chain * (chunks + 1) + chunks
    row_b = tl.max(b, 1 - AXIS)
    store_matrix(segment.w, w, slot, D, BLOCK_D)
    store_row(segment.b, row_b, slot, D, BLOCK_D)
    store_matrix(end.w, tl.trans(_inside(w + mean_w[None, :], D, BLOCK_D, True)), chain, D, BLOCK_D)
    store_row(end.b, row_b + mean_b, chain, D, BLOCK_D)


# --- The read-out of a chunk ---


@triton.jit
def _read_out(
    inputs, shared, segment, out, heads, first, chunks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    chain, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    batch, head = chain // heads, chain % heads
    DTYPE: tl.constexpr = inputs.xk.p.dtype.element_ty
    AFTER: tl.constexpr = not CAUSAL and C == M  # the weights that every token reads are those after the chunk
    slot = chain * (chunks + 1) + chunk + (1 if AFTER else 0)
    xq = load_tokens(inputs.xq, batch, head, first + chunk, C, D, BLOCK_D)
    w = load_matrix(segment.w, slot, D, BLOCK_D)
    b = load_row(segment.b, slot, D, BLOCK_D)[None, :]
    z1_bar = matmul(xq, tl.trans(w), DTYPE, PRECISION) + b  # [C, D] @ [D, D] -> [C, D]
    if not AFTER:
        xk = load_tokens(inputs.xk, batch, head, first + chunk, C, D, BLOCK_D)
        lr_g = _rows(segment.lr_g, (chain * chunks + chunk) * C, D, BLOCK_D, C)
        seen, _, _ = _seen(shared.token_eta, M, C, CAUSAL)
        scores = seen * (matmul(xq, tl.trans(xk), DTYPE, PRECISION) + 1.0)  # [C, D] @ [D, C] -> [C, C]
        z1_bar -= matmul(scores, lr_g, DTYPE, PRECISION)  # [C, C] @ [C, D] -> [C, D]
    x_hat, _ = normalise(z1_bar, EPS, D, BLOCK_D)
    ln_weight = load_row(shared.ln_weight, head, D, BLOCK_D)[None, :]
    ln_bias = load_row(shared.ln_bias, head, D, BLOCK_D)[None, :]
    store_tokens(out, xq.to(tl.float32) + ln_weight * x_hat + ln_bias, batch, head, first + chunk, C, D, BLOCK_D)


# --- Backward ---


@triton.jit
def _read_out_backward(
    inputs, shared, segment, d_out, pulled, d_inputs, d_shared, d_eta_last, heads, first, chunks, all_chunks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    chain, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    batch, head = chain // heads, chain % heads
    DTYPE: tl.constexpr = inputs.xk.p.dtype.element_ty
    AFTER: tl.constexpr = not CAUSAL and C == M
    slot = chain * (chunks + 1) + chunk + (1 if AFTER else 0)
    mine = chain * all_chunks + first + chunk
    row = (chain * chunks + chunk) * C
    rows = tl.arange(0, C)
    xq = load_tokens(inputs.xq, batch, head, first + chunk, C, D, BLOCK_D)
    d_o = load_tokens(d_out, batch, head, first + chunk, C, D, BLOCK_D).to(tl.float32)
    w = load_matrix(segment.w, slot, D, BLOCK_D)
    b = load_row(segment.b, slot, D, BLOCK_D)[None, :]
    ln_weight = load_row(shared.ln_weight, head, D, BLOCK_D)[None, :]
    z1_bar = matmul(xq, tl.trans(w), DTYPE, PRECISION) + b
    if not AFTER:
        xk = load_tokens(inputs.xk, batch, head, first + chunk, C, D, BLOCK_D)
        lr_g = _rows(segment.lr_g, row, D, BLOCK_D, C)
        seen, own, before = _seen(shared.token_eta, M, C, CAUSAL)
        attn = matmul(xq, tl.trans(xk), DTYPE, PRECISION) + 1.0
        scores = seen * attn
        z1_bar -= matmul(scores, lr_g, DTYPE, PRECISION)
    x_hat, rstd = normalise(z1_bar, EPS, D, BLOCK_D)
    d_z = project(d_o * ln_weight, x_hat, rstd, D, BLOCK_D)
    store_row(d_shared.ln_weight, tl.sum(d_o * x_hat, 0), mine, D, BLOCK_D)
    store_row(d_shared.ln_bias, tl.sum(d_o, 0), mine, D, BLOCK_D)
    store_matrix(pulled.read_w, matmul(tl.trans(d_z), xq, DTYPE, PRECISION), chain * chunks + chunk, D, BLOCK_D)
    store_row(pulled.read_b, tl.sum(d_z, 0), chain * chunks + chunk, D, BLOCK_D)
    d_xq = d_o + matmul(d_z, w, DTYPE, PRECISION)  # [C, D] @ [D, D] -> [C, D]
    if not AFTER:
        d_scores = -matmul(d_z, tl.trans(lr_g), DTYPE, PRECISION)  # [C, D] @ [D, C] -> [C, C]
        d_eta = d_scores * attn
        tl.store(d_shared.token_eta + mine * C + rows, tl.sum(tl.where(own, d_eta, 0.0), 1))
        d_last = tl.sum(tl.where(before, d_eta, 0.0), 1)
        tl.store(d_eta_last + mine * 2 * C + rows, d_last)
        d_attn = seen * d_scores
        d_xq += matmul(d_attn, xk, DTYPE, PRECISION)
        d_xk = matmul(tl.trans(d_attn), xq, DTYPE, PRECISION)
        store_tokens(d_inputs.xk, d_xk, batch, head, first + chunk, C, D, BLOCK_D)
        _store_rows(pulled.part, -matmul(tl.trans(scores), d_z, DTYPE, PRECISION), row, D, BLOCK_D, C)
    store_tokens(d_inputs.xq, d_xq, batch, head, first + chunk, C, D, BLOCK_D)


@triton.jit
def _reverse_recurrence(
    inputs, shared, kept, pulled, d_end, d_start, heads, first, mini_batches,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, CAUSAL: tl.constexpr,
    TURN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    chain = tl.program_id(0)
    batch, head = chain // heads, chain % heads
    DTYPE: tl.constexpr = inputs.xk.p.dtype.element_ty
    AFTER: tl.constexpr = not CAUSAL and C == M
    AXIS: tl.constexpr = 0 if TURN else 1
    R: tl.constexpr = C // M
    eta_last = tl.load(shared.token_eta + M - 1)
    ln_weight = load_row(shared.ln_weight, head, D, BLOCK_D)
    square = _over_d(ln_weight * ln_weight, TURN)
    d_w = tl.trans(load_matrix(d_end.w, chain, D, BLOCK_D))  # [D of z1, D of xk]
    d_b = load_row(d_end.b, chain, D, BLOCK_D)
    mean_w = tl.sum(d_w, 0) * (1.0 / D)
    mean_b = tl.sum(d_b, 0) * (1.0 / D)
    d_w = _inside(d_w - mean_w[None, :], D, BLOCK_D, True)
    d_b = tl.where(tl.arange(0, BLOCK_D) < D, d_b - mean_b, 0.0)
    ones = nearest(tl.full([M, M], 1.0, tl.float32), DTYPE)
    d_b = tl.zeros([BLOCK_D, M] if TURN else [M, BLOCK_D], tl.float32) + _over_d(d_b, TURN)
    read_w = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    read_b = tl.zeros([BLOCK_D], tl.float32)
    for step in tl.range(0, mini_batches, num_stages=STAGES):
        i = mini_batches - 1 - step
        chunk = chain * (mini_batches // R) + i // R
        if AFTER:
            d_w += load_matrix(pulled.read_w, chunk, D, BLOCK_D)
            d_b += _over_d(load_row(pulled.read_b, chunk, D, BLOCK_D), TURN)
        if i % R == R - 1:
            if not AFTER:  # needed when the chunk is done
                read_w = load_matrix(pulled.read_w, chunk, D, BLOCK_D)
                read_b = load_row(pulled.read_b, chunk, D, BLOCK_D)
            store_matrix(pulled.d_w, d_w, chunk, D, BLOCK_D)
            store_row(pulled.d_b, tl.max(d_b, 1 - AXIS), chunk, D, BLOCK_D)
        xk = load_tokens(inputs.xk, batch, head, first + i, M, D, BLOCK_D)
        row = (chain * mini_batches + i) * M
        at = row + tl.arange(0, M)
        lr = _over_tokens(tl.load(kept.lr + at), TURN)
        rstd, q = _over_tokens(tl.load(kept.rstd + at), TURN), _over_tokens(tl.load(kept.q + at), TURN)
        q1, q3 = _over_tokens(tl.load(kept.q1 + at), TURN), _over_tokens(tl.load(kept.q3 + at), TURN)
        x_hat = _turn(_rows(kept.x_hat, row, D, BLOCK_D, M), TURN).to(tl.float32)
        y = _turn(_rows(kept.y, row, D, BLOCK_D, M), TURN).to(tl.float32)
        if TURN:
            d_lr_g = -eta_last * matmul_add(d_w, tl.trans(xk), d_b, DTYPE, PRECISION)  # [D, D] @ [D, M] -> [D, M]
        else:
            d_lr_g = -eta_last * matmul_add(xk, tl.trans(d_w), d_b, DTYPE, PRECISION)  # [M, D] @ [D, D] -> [M, D]
        if not AFTER:
            d_lr_g += _turn(_rows(pulled.part, row, D, BLOCK_D, M), TURN).to(tl.float32)
        _store_rows(pulled.d_lr_g, _turn(d_lr_g, TURN), row, D, BLOCK_D, M)
        v = lr * d_lr_g
        scaled = square * v
        a, w_v, v_y, _ = _four_sums(v * x_hat, scaled, v * y, scaled, AXIS)
        a, w_v, v_y = a * (1.0 / D), w_v * (1.0 / D), v_y * (1.0 / D)
        d_z1 = rstd * rstd * (scaled - q * v - a * y - (w_v - a * q1) - x_hat * (v_y - a * q3))
        d_z1 = _inside(d_z1, D, BLOCK_D, TURN)
        d_w = _multiply_add(d_z1 if TURN else tl.trans(d_z1), xk, d_w, 1.0, DTYPE, PRECISION)
        if TURN:
            d_b = _multiply_add(d_z1, ones, d_b, 1.0, DTYPE, PRECISION)
        else:
            d_b = _multiply_add(ones, d_z1, d_b, 1.0, DTYPE, PRECISION)
        if not AFTER and i % R == 0:
            d_w += read_w
            d_b += _over_d(read_b, TURN)
    store_matrix(d_start.w, tl.trans(_inside(d_w + mean_w[None, :], D, BLOCK_D, True)), chain, D, BLOCK_D)
    store_row(d_start.b, tl.max(d_b, 1 - AXIS) + mean_b, chain, D, BLOCK_D)


@triton.jit
def _update_backward(
    inputs, shared, segment, kept, pulled, d_inputs, d_shared, d_eta_last, heads, first, chunks, all_chunks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    chain, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    batch, head = chain // heads, chain % heads
    DTYPE: tl.constexpr = inputs.xk.p.dtype.element_ty
    AFTER: tl.constexpr = not CAUSAL and C == M
    R: tl.constexpr = C // M
    mine = chain * all_chunks + first + chunk
    row = (chain * chunks + chunk) * C
    rows = tl.arange(0, C)
    eta_last = tl.load(shared.token_eta + M - 1)
    ln_weight = load_row(shared.ln_weight, head, D, BLOCK_D)[None, :]
    ln_bias = load_row(shared.ln_bias, head, D, BLOCK_D)[None, :]
    xk = load_tokens(inputs.xk, batch, head, first + chunk, C, D, BLOCK_D)
    xv = load_tokens(inputs.xv, batch, head, first + chunk, C, D, BLOCK_D)
    lr = load_lr(inputs.lr, batch, head, first + chunk, C)
    d_lr_g = _rows(pulled.d_lr_g, row, D, BLOCK_D, C).to(tl.float32)
    x_hat = _rows(kept.x_hat, row, D, BLOCK_D, C).to(tl.float32)
    rstd = tl.load(kept.rstd + row + rows)[:, None]
    lr_g = _rows(segment.lr_g, row, D, BLOCK_D, C)
    target = xv.to(tl.float32) - xk.to(tl.float32)
    g = project(ln_weight * (ln_weight * x_hat + ln_bias - target), x_hat, rstd, D, BLOCK_D)
    d_lr = nearest(tl.sum(d_lr_g * g, 1), DTYPE)
    tl.store(token_pointers(d_inputs.lr, batch, head, first + chunk, C), d_lr)
    d_z1, d_error, d_ln_weight, d_ln_bias = inner_gradient_backward(
        lr * d_lr_g, g, x_hat, rstd, target, ln_weight, ln_bias, D, BLOCK_D
    )
    store_row(d_shared.ln_weight, d_ln_weight, mine, D, BLOCK_D)
    store_row(d_shared.ln_bias, d_ln_bias, mine, D, BLOCK_D)
    store_tokens(d_inputs.xv, -d_error, batch, head, first + chunk, C, D, BLOCK_D)

    # d_xk of the update with d_w at the end of each mini-batch, and of z1 with w at its start.
    d_w = load_matrix(pulled.d_w, chain * chunks + chunk, D, BLOCK_D)
    d_b = load_row(pulled.d_b, chain * chunks + chunk, D, BLOCK_D)[None, :]
    w = load_matrix(segment.w, chain * (chunks + 1) + chunk, D, BLOCK_D)
    from_update = matmul(lr_g, d_w, DTYPE, PRECISION)  # [C, D] @ [D, D] -> [C, D]
    along = tl.sum(from_update * xk.to(tl.float32) + lr_g.to(tl.float32) * d_b, 1)
    d_xk = d_error + matmul(d_z1, w, DTYPE, PRECISION) - eta_last * from_update
    if R > 1:
        i, j = rows[:, None] // M, rows[None, :] // M
        to_later = tl.where(i < j, matmul(lr_g, tl.trans(d_z1), DTYPE, PRECISION), 0.0)  # [C, D] @ [D, C] -> [C, C]
        to_earlier = tl.where(i > j, matmul(d_z1, tl.trans(lr_g), DTYPE, PRECISION), 0.0)
        attn = matmul(xk, tl.trans(xk), DTYPE, PRECISION) + 1.0
        along += tl.sum(to_later * attn, 1)
        d_xk -= matmul(eta_last * (to_later + to_earlier), xk, DTYPE, PRECISION)
    tl.store(d_eta_last + mine * 2 * C + C + rows, -along)
    if not AFTER:
        d_xk += load_tokens(d_inputs.xk, batch, head, first + chunk, C, D, BLOCK_D).to(tl.float32)
    store_tokens(d_inputs.xk, d_xk, batch, head, first + chunk, C, D, BLOCK_D)


# --- Launch ---

SEGMENT = 4096  # tokens between two saved states, unless told otherwise


class Residuals(NamedTuple):
    """What the backward needs: the inputs, and the fast weights at the start of every segment but the first."""

    inputs: LinearInputs
    saved_w1: Tensor  # [segments - 1, B, H, D, D]
    saved_b1: Tensor  # [segments - 1, B, H, D]
    group: int


class _Sizes(NamedTuple):
    """Of one call: R mini-batches a chunk, and the mini-batches of every segment."""

    per_chunk: int
    segments: tuple[tuple[int, int], ...]  # (first mini-batch, how many)

    @property
    def longest(self) -> int:
        return max(count for _, count in self.segments)


def _sizes(problem: Problem, group: int) -> _Sizes:
    per_chunk = max(1, 64 // problem.mini_batch)
    while problem.mini_batches % per_chunk or group % per_chunk:
        per_chunk //= 2
    n = problem.mini_batches
    return _Sizes(per_chunk, tuple((first, min(group, n - first)) for first in range(0, n, group)))


def default_group(problem: Problem) -> int:
    """G: 4096 tokens, in mini-batches."""
    return SEGMENT // problem.mini_batch


def forward(inputs: LinearInputs, problem: Problem, group: int | None = None) -> tuple[LinearOutputs, Residuals]:
    """Outputs of TTT-Linear, and what `backward` needs; `group` is G, mini-batches between two saved states.

    Raises:
        ValueError: `problem` is beyond the limits of the Triton pages, or a tensor does not fit it or the kernels.
    """
    check(inputs, INPUTS, problem)
    group = default_group(problem) if group is None else group
    if group < 1:
        raise ValueError(f"group: expected at least 1 mini-batch between saved states, got {group}")
    outputs, residuals, launches = plan_forward(inputs, problem, group)
    for launch in launches:
        launch.run(inputs.xq.device)
    return outputs, residuals


def backward(cotangents: LinearOutputs, residuals: Residuals, problem: Problem) -> LinearInputs:
    """Gradients of every input, from the cotangents of the output and of the final state.

    Raises:
        ValueError: a cotangent does not fit `problem` or the kernels.
    """
    check(cotangents, OUTPUTS, problem, residuals.inputs.xq.device)
    parts, launches = plan_backward(cotangents, residuals, problem)
    for launch in launches:
        launch.run(cotangents.out.device)
    return _add_up(parts, problem)


def saved_shapes(problem: Problem) -> tuple[tuple[int, ...], ...]:
    """Of what `forward` saves beside the inputs, all fp32."""
    states = len(_sizes(problem, default_group(problem)).segments) - 1
    b, h, d = problem.batch, problem.heads, problem.head_dim
    return (states, b, h, d, d), (states, b, h, d)


def residuals(inputs: LinearInputs, saved: list[Tensor], problem: Problem) -> Residuals:
    """What `forward` saved, as `backward` takes it."""
    return Residuals(inputs, *saved, default_group(problem))


class _Parts(NamedTuple):
    """Gradients, those of the shared parameters in parts: of each chunk, and of the read-out and of the update."""

    gradients: LinearInputs
    token_eta: Tensor  # [B H chunks, C], of each token of the read-out
    eta_last: Tensor  # [B H chunks, 2, C]
    ln_weight: Tensor  # [2, B, H, chunks, D]
    ln_bias: Tensor  # [2, B, H, chunks, D]


def _add_up(parts: _Parts, problem: Problem) -> LinearInputs:
    """Always in the same order."""
    m = problem.mini_batch
    if problem.causal:
        d_token_eta = parts.token_eta.view(-1, m).sum(0)
    else:
        d_token_eta = parts.token_eta.new_zeros(m)
    reads = problem.causal or parts.token_eta.shape[1] > m
    d_token_eta[-1] += (parts.eta_last if reads else parts.eta_last[:, 1]).sum()
    return parts.gradients._replace(
        token_eta=d_token_eta, ln_weight=parts.ln_weight.sum((0, 1, 3)), ln_bias=parts.ln_bias.sum((0, 1, 3))
    )


def plan_forward(inputs: LinearInputs, problem: Problem, group: int) -> tuple[LinearOutputs, Residuals, list[Launch]]:
    """What `forward` gives, and the launches that fill it."""
    b, t, h, d = inputs.xq.shape
    like, sizes = inputs.xq, _sizes(problem, group)
    outputs = LinearOutputs(empty(like, b, t, h, d, dtype=like.dtype), empty(like, b, h, d, d), empty(like, b, h, d))
    states = len(sizes.segments) - 1
    residuals = Residuals(inputs, empty(like, states, b, h, d, d), empty(like, states, b, h, d), group)
    segment, launches = _segment(like, problem, sizes), []
    for number, span in enumerate(sizes.segments):
        end = State(*outputs[1:]) if number == states else _saved(residuals, number + 1)
        launches.append(_recur(residuals, problem, sizes, number, end, segment, None))
        launches.append(_launch_chunks(_read_out, problem, sizes, span, {
            "inputs": tokens(*inputs[:4]),
            "shared": Shared(*inputs[4:7]),
            "segment": segment,
            "out": view(outputs.out),
            "heads": h,
        }, EPS=problem.eps))  # fmt: skip
    return outputs, residuals, launches


def plan_backward(cotangents: LinearOutputs, residuals: Residuals, problem: Problem) -> tuple[_Parts, list[Launch]]:
    """The gradients, still in parts, and the launches that fill them."""
    inputs, sizes = residuals.inputs, _sizes(problem, residuals.group)
    b, t, h, d = inputs.xq.shape
    like, c = inputs.xq, sizes.per_chunk * problem.mini_batch
    chunks, longest = t // c, sizes.longest // sizes.per_chunk
    gradients = LinearInputs(
        *(empty(like, b, t, h, d, dtype=like.dtype) for _ in range(3)),
        empty(like, b, t, h, dtype=like.dtype),
        *inputs[4:7],
        empty(like, b, h, d, d),
        empty(like, b, h, d),
    )
    ln_weight, ln_bias = (empty(like, 2, b, h, chunks, d) for _ in range(2))
    parts = _Parts(gradients, empty(like, b * h * chunks, c), empty(like, b * h * chunks, 2, c), ln_weight, ln_bias)
    segment = _segment(like, problem, sizes)
    rows = b, h, longest * c
    kept = Kept(*(empty(like, *rows, d, dtype=like.dtype) for _ in range(2)), *(empty(like, *rows) for _ in range(5)))
    pulled = Pulled(
        empty(like, b, h, longest, d, d),
        empty(like, b, h, longest, d),
        *(empty(like, *rows, d, dtype=like.dtype) for _ in range(2)),
        empty(like, b, h, longest, d, d, dtype=like.dtype),
        empty(like, b, h, longest, d),
    )
    spent = State(empty(like, b, h, d, d), empty(like, b, h, d))  # the state that recomputing ends with
    d_state, launches = State(*cotangents[1:]), []
    for number, span in reversed(list(enumerate(sizes.segments))):
        common = {"inputs": tokens(*inputs[:4]), "shared": Shared(*inputs[4:7])}
        to_inputs = {"d_inputs": tokens(*gradients[:4]), "d_eta_last": parts.eta_last, "heads": h}
        d_start = State(*gradients[7:]) if number == 0 else State(empty(like, b, h, d, d), empty(like, b, h, d))
        launches.append(_recur(residuals, problem, sizes, number, spent, segment, kept))
        launches.append(_launch_chunks(_read_out_backward, problem, sizes, span, {
            **common,
            "segment": segment,
            "d_out": view(cotangents.out),
            "pulled": pulled,
            "d_shared": Shared(parts.token_eta, ln_weight[0], ln_bias[0]),
            **to_inputs,
            "all_chunks": chunks,
        }, EPS=problem.eps))  # fmt: skip
        arguments = {
            **common,
            "kept": kept,
            "pulled": pulled,
            "d_end": d_state,
            "d_start": d_start,
            "heads": h,
            "first": span[0],
            "mini_batches": span[1],
        }
        constants = _constants(problem, sizes) | {"CAUSAL": problem.causal} | _orientation(problem)
        launches.append(Launch(_reverse_recurrence, b * h, arguments, constants, _options("recurrence", problem)))
        launches.append(_launch_chunks(_update_backward, problem, sizes, span, {
            **common,
            "segment": segment,
            "kept": kept,
            "pulled": pulled,
            "d_shared": Shared(parts.token_eta, ln_weight[1], ln_bias[1]),
            **to_inputs,
            "all_chunks": chunks,
        }))  # fmt: skip
        d_state = d_start
    return parts, launches


def _saved(residuals: Residuals, number: int) -> State:
    """The fast weights at the start of a segment."""
    if number == 0:
        return State(*residuals.inputs[7:])
    return State(residuals.saved_w1[number - 1], residuals.saved_b1[number - 1])


def _segment(like: Tensor, problem: Problem, sizes: _Sizes) -> Segment:
    b, h, d = problem.batch, problem.heads, problem.head_dim
    chunks = sizes.longest // sizes.per_chunk
    return Segment(
        empty(like, b, h, chunks + 1, d, d, dtype=like.dtype),
        empty(like, b, h, chunks + 1, d),
        empty(like, b, h, sizes.longest * problem.mini_batch, d, dtype=like.dtype),
    )


def _recur(
    residuals: Residuals, problem: Problem, sizes: _Sizes, number: int, end: State, segment: Segment, kept: Kept | None
) -> Launch:
    inputs, (first, mini_batches) = residuals.inputs, sizes.segments[number]
    nothing = Kept(*[inputs.token_eta] * 7)
    arguments = {
        "inputs": tokens(*inputs[:4]),
        "shared": Shared(*inputs[4:7]),
        "start": _saved(residuals, number),
        "end": end,
        "segment": segment,
        "kept": nothing if kept is None else kept,
        "heads": problem.heads,
        "first": first,
        "mini_batches": mini_batches,
    }
    constants = _constants(problem, sizes) | {"EPS": problem.eps, "KEEP": kept is not None} | _orientation(problem)
    return Launch(_recurrence, problem.batch * problem.heads, arguments, constants, _options("recurrence", problem))


def _launch_chunks(
    kernel: Any, problem: Problem, sizes: _Sizes, span: tuple[int, int], arguments: dict[str, Any], **constants: Any
) -> Launch:
    """One program for each chunk of a segment."""
    first, chunks = (count // sizes.per_chunk for count in span)
    return Launch(
        kernel,
        problem.batch * problem.heads * chunks,
        arguments | {"first": first, "chunks": chunks},
        _constants(problem, sizes) | {"CAUSAL": problem.causal} | constants,
        _options("chunks", problem),
    )


def _constants(problem: Problem, sizes: _Sizes) -> dict[str, Any]:
    return {
        "D": problem.head_dim,
        "BLOCK_D": block_d(problem),
        "M": problem.mini_batch,
        "C": sizes.per_chunk * problem.mini_batch,
        "PRECISION": problem.matmul_precision,
    }


def _orientation(problem: Problem) -> dict[str, Any]:
    return {"TURN": problem.mini_batch <= 32, "STAGES": 3}


def _options(kind: str, problem: Problem) -> dict[str, int]:
    return {"num_warps": 4 if max(block_d(problem), problem.mini_batch) <= 64 else 8, "num_stages": 3}


def static_kernels() -> Iterator[TritonKernel]:
    """All kernels at the sizes of the named cases."""
    for mini_batch, causal in ((16, True), (64, True), (64, False)):
        problem = Problem("linear", 1, 256, 32, 64, mini_batch, causal, dtype="bf16")
        outputs, residuals, launches = plan_forward(meta(LinearInputs, problem), problem, default_group(problem))
        for launch in launches + plan_backward(outputs, residuals, problem)[1]:
            yield launch.static("linear")
