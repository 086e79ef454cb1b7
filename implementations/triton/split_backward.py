"""The backward kernels of `split_linear`."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from implementations.triton.blocks import (
    inner_gradient_backward,
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
from implementations.triton.split_forward import (
    beside,
    bias_block,
    bias_row,
    by_xk,
    by_z1,
    eta_of,
    four_sums,
    inside_d,
    load_rows,
    multiply_add,
    store_rows,
)


class Pulled(NamedTuple):
    """Pointers to cotangents on their way from one kernel of the backward to the next."""

    read_w: Any  # [B H, chunks, D, D] transposed unless wide: what the read-out adds to d_w
    read_b: Any  # [B H, chunks, D]
    part: Any  # [B H, tokens, D] I/O dtype: d_lr_g of the read-out, if it reads the weights before the chunk
    d_lr_g: Any  # [B H, tokens, D] I/O dtype
    d_w: Any  # [B H, chunks, D, D] I/O dtype, transposed unless wide: at the end of the chunk
    d_b: Any  # [B H, chunks, D]


@triton.jit
def _keep(
    inputs, shared, segment, kept, batch, head, n, slot, row, ln_weight,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """lr g_z1 [M, D] of a mini-batch, after storing what the second order needs of its inner LayerNorm."""
    xk = load_tokens(inputs.xk, batch, head, n, M, D, BLOCK_D)
    xv = load_tokens(inputs.xv, batch, head, n, M, D, BLOCK_D)
    lr = load_lr(inputs.lr, batch, head, n, M)
    w = load_matrix(segment.w, slot, D, BLOCK_D)
    b = load_row(segment.b, slot, D, BLOCK_D)[None, :]
    ln_bias = load_row(shared.ln_bias, head, D, BLOCK_D)[None, :]
    x_hat, rstd = normalise(matmul(xk, w, xk.dtype, PRECISION) + b, EPS, D, BLOCK_D)
    p = ln_weight * (ln_weight * x_hat + ln_bias + (xk.to(tl.float32) - xv.to(tl.float32)))
    scaled = ln_weight * ln_weight * x_hat
    q = mean(p * x_hat, D)
    store_rows(kept.x_hat, x_hat, row, D, BLOCK_D, M)
    store_rows(kept.y, p + scaled, row, D, BLOCK_D, M)
    at = kept.five + wide(row) * 8 + tl.arange(0, M)[:, None]
    tl.store(at, lr)
    tl.store(at + M, rstd)
    tl.store(at + 2 * M, q)
    tl.store(at + 3 * M, mean(p + scaled, D))
    tl.store(at + 4 * M, mean(scaled * x_hat, D) + 3.0 * q)
    return lr * project(p, x_hat, rstd, D, BLOCK_D)


@triton.jit(do_not_specialize=["first", "chunks", "all_chunks", "chains"])  # one program for every length
def split_read_out_backward(
    inputs, shared, segment, kept, d_out, pulled, d_inputs, parts, heads, first, chunks, all_chunks, chains,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr, CAUSAL: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one chain: d_xq, and what reaches w, b and lr g_z1 of the chunk."""
    chain, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    batch, head = chain // heads, chain % heads
    DTYPE: tl.constexpr = inputs.xk.p.dtype.element_ty
    AFTER: tl.constexpr = not CAUSAL and C == M
    mine = chain * all_chunks + first + chunk
    row = (chain * chunks + chunk) * C
    ln_weight = load_row(shared.ln_weight, head, D, BLOCK_D)[None, :]
    if WIDE:
        lr_g = _keep(
            inputs, shared, segment, kept, batch, head, first + chunk, chain * (chunks + 1) + chunk, row,
            ln_weight, D, BLOCK_D, M, EPS, PRECISION,
        )  # fmt: skip
    xq = load_tokens(inputs.xq, batch, head, first + chunk, C, D, BLOCK_D)
    d_o = load_tokens(d_out, batch, head, first + chunk, C, D, BLOCK_D).to(tl.float32)
    slot = chain * (chunks + 1) + chunk + (1 if AFTER else 0)
    w = load_matrix(segment.w, slot, D, BLOCK_D)
    b = load_row(segment.b, slot, D, BLOCK_D)[None, :]
    z1_bar = matmul(xq, by_xk(w, WIDE), DTYPE, PRECISION) + b
    if not AFTER:
        xk = load_tokens(inputs.xk, batch, head, first + chunk, C, D, BLOCK_D)
        if not WIDE:
            lr_g = load_rows(segment.lr_g, row, D, BLOCK_D, C)
        seen, own, before = eta_of(shared.token_eta, M, C, CAUSAL)
        attn = matmul(xq, tl.trans(xk), DTYPE, PRECISION) + 1.0
        scores = seen * attn
        z1_bar -= matmul(scores, lr_g, DTYPE, PRECISION)
    x_hat, rstd = normalise(z1_bar, EPS, D, BLOCK_D)
    d_z = project(d_o * ln_weight, x_hat, rstd, D, BLOCK_D)
    store_row(parts.ln_weight, tl.sum(d_o * x_hat, 0), mine, D, BLOCK_D)
    store_row(parts.ln_bias, tl.sum(d_o, 0), mine, D, BLOCK_D)
    read_w = matmul(tl.trans(xq), d_z, DTYPE, PRECISION) if WIDE else matmul(tl.trans(d_z), xq, DTYPE, PRECISION)
    store_matrix(pulled.read_w, read_w, chain * chunks + chunk, D, BLOCK_D)
    store_row(pulled.read_b, tl.sum(d_z, 0), chain * chunks + chunk, D, BLOCK_D)
    d_xq = d_o + matmul(d_z, by_z1(w, WIDE), DTYPE, PRECISION)  # [C, D] @ [D, D] -> [C, D]
    if not AFTER:
        d_scores = -matmul(d_z, tl.trans(lr_g), DTYPE, PRECISION)  # [C, D] @ [D, C] -> [C, C]
        d_eta = d_scores * attn
        d_token_eta = tl.sum(tl.reshape(tl.sum(tl.where(own, d_eta, 0.0), 1), [C // M, M]), 0)
        store_row(parts.token_eta, d_token_eta, mine, M, M)
        tl.store(parts.eta_last + mine, tl.sum(tl.where(before, d_eta, 0.0)))
        d_attn = seen * d_scores
        d_xq += matmul(d_attn, xk, DTYPE, PRECISION)
        d_xk = matmul(tl.trans(d_attn), xq, DTYPE, PRECISION)
        store_tokens(d_inputs.xk, d_xk, batch, head, first + chunk, C, D, BLOCK_D)
        store_rows(pulled.part, -matmul(tl.trans(scores), d_z, DTYPE, PRECISION), row, D, BLOCK_D, C)
    store_tokens(d_inputs.xq, d_xq, batch, head, first + chunk, C, D, BLOCK_D)


@triton.jit
def _fetch(kept, pulled, row, M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, AFTER: tl.constexpr):
    """(x_hat, y, d_lr_g of the read-out [M, D]) of a mini-batch."""
    x_hat = load_rows(kept.x_hat, row, D, BLOCK_D, M)
    return x_hat, load_rows(kept.y, row, D, BLOCK_D, M), x_hat if AFTER else load_rows(pulled.part, row, D, BLOCK_D, M)


@triton.jit(do_not_specialize=["first", "mini_batches"])  # one program for every length
def split_reverse_recurrence(
    inputs, shared, kept, pulled, d_end, d_start, heads, first, mini_batches,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Chain `program_id(0)` of one segment, from its end: d_w, d_b and d_lr_g."""
    chain = tl.program_id(0)
    batch, head = chain // heads, chain % heads
    DTYPE: tl.constexpr = inputs.xk.p.dtype.element_ty
    AFTER: tl.constexpr = not CAUSAL and C == M
    R: tl.constexpr = C // M
    eta_last = tl.load(shared.token_eta + M - 1)
    ln_weight = load_row(shared.ln_weight, head, D, BLOCK_D)
    square = (ln_weight * ln_weight)[:, None]
    d_w = tl.trans(load_matrix(d_end.w, chain, D, BLOCK_D))  # [D of z1, D of xk]
    d_b = load_row(d_end.b, chain, D, BLOCK_D)
    mean_w = tl.sum(d_w, 0) * (1.0 / D)
    mean_b = tl.sum(d_b, 0) * (1.0 / D)
    d_w = inside_d(d_w - mean_w[None, :], D, BLOCK_D)
    d_b = tl.where(tl.arange(0, BLOCK_D) < D, d_b - mean_b, 0.0)
    d_b = bias_block(d_b, M, BLOCK_D)
    read_w = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    read_b = tl.zeros([BLOCK_D], tl.float32)
    last = ((chain + 1) * mini_batches - 1) * M
    x_hat_next, y_next, part_next = _fetch(kept, pulled, last, M, D, BLOCK_D, AFTER)
    for step in tl.range(0, mini_batches, num_stages=STAGES):
        i = mini_batches - 1 - step
        chunk = chain * (mini_batches // R) + i // R
        if AFTER:
            d_w += load_matrix(pulled.read_w, chunk, D, BLOCK_D)
            d_b += bias_block(load_row(pulled.read_b, chunk, D, BLOCK_D), M, BLOCK_D)
        if i % R == R - 1:
            if not AFTER:  # needed when the chunk is done
                read_w = load_matrix(pulled.read_w, chunk, D, BLOCK_D)
                read_b = load_row(pulled.read_b, chunk, D, BLOCK_D)
            store_matrix(pulled.d_w, d_w, chunk, D, BLOCK_D)
            store_row(pulled.d_b, bias_row(d_b), chunk, D, BLOCK_D)
        xk = load_tokens(inputs.xk, batch, head, first + i, M, D, BLOCK_D)
        row = (chain * mini_batches + i) * M
        at = kept.five + wide(chain * mini_batches + i) * 8 * M + tl.arange(0, M)
        lr, rstd, q = tl.load(at)[None, :], tl.load(at + M)[None, :], tl.load(at + 2 * M)[None, :]
        q1, q3 = tl.load(at + 3 * M)[None, :], tl.load(at + 4 * M)[None, :]
        x_hat, y, part = tl.trans(x_hat_next), tl.trans(y_next), tl.trans(part_next)
        following = (chain * mini_batches + tl.maximum(i - 1, 0)) * M
        x_hat_next, y_next, part_next = _fetch(kept, pulled, following, M, D, BLOCK_D, AFTER)
        d_lr_g = -eta_last * matmul_add(d_w, tl.trans(xk), d_b, DTYPE, PRECISION)  # [D, D] @ [D, M] -> [D, M]
        if not AFTER:
            d_lr_g += part.to(tl.float32)
        store_rows(pulled.d_lr_g, tl.trans(d_lr_g), row, D, BLOCK_D, M)
        v = lr * d_lr_g
        x_hat, y = beside(x_hat.to(tl.float32), v), beside(y.to(tl.float32), v)
        scaled = square * v
        a, w_v, v_y, _ = four_sums(v * x_hat, scaled, v * y, v, DTYPE, PRECISION)
        a, w_v, v_y = a * (1.0 / D), w_v * (1.0 / D), v_y * (1.0 / D)
        d_z1 = rstd * rstd * (scaled - q * v - a * y - (w_v - a * q1) - x_hat * (v_y - a * q3))
        d_z1 = inside_d(d_z1, D, BLOCK_D)
        d_w = multiply_add(d_z1, xk, d_w, 1.0, DTYPE, PRECISION)
        d_b += tl.sum(d_z1, 1, keep_dims=True)
        if not AFTER and i % R == 0:
            d_w += read_w
            d_b += bias_block(read_b, M, BLOCK_D)
    store_matrix(d_start.w, tl.trans(inside_d(d_w + mean_w[None, :], D, BLOCK_D)), chain, D, BLOCK_D)
    store_row(d_start.b, bias_row(d_b) + mean_b, chain, D, BLOCK_D)


@triton.jit(do_not_specialize=["first", "chunks", "all_chunks", "chains"])  # one program for every length
def split_update_backward(
    inputs, shared, segment, kept, pulled, d_inputs, parts, heads, first, chunks, all_chunks, chains,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr, CAUSAL: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one chain: d_xk, d_xv, d_lr, from d_lr_g, w at its start and d_w at its end."""
    chain, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    batch, head = chain // heads, chain % heads
    DTYPE: tl.constexpr = inputs.xk.p.dtype.element_ty
    AFTER: tl.constexpr = not CAUSAL and C == M
    R: tl.constexpr = C // M
    mine = chain * all_chunks + first + chunk
    behind = chains * all_chunks  # the parts of the update are behind those of the read-out
    row = (chain * chunks + chunk) * C
    rows = tl.arange(0, C)
    eta_last = tl.load(shared.token_eta + M - 1)
    ln_weight = load_row(shared.ln_weight, head, D, BLOCK_D)[None, :]
    ln_bias = load_row(shared.ln_bias, head, D, BLOCK_D)[None, :]
    xk = load_tokens(inputs.xk, batch, head, first + chunk, C, D, BLOCK_D)
    xv = load_tokens(inputs.xv, batch, head, first + chunk, C, D, BLOCK_D)
    lr = load_lr(inputs.lr, batch, head, first + chunk, C)
    d_lr_g = load_rows(pulled.d_lr_g, row, D, BLOCK_D, C).to(tl.float32)
    w = load_matrix(segment.w, chain * (chunks + 1) + chunk, D, BLOCK_D)
    target = xv.to(tl.float32) - xk.to(tl.float32)
    if WIDE:
        b = load_row(segment.b, chain * (chunks + 1) + chunk, D, BLOCK_D)[None, :]
        x_hat, rstd = normalise(matmul(xk, w, DTYPE, PRECISION) + b, EPS, D, BLOCK_D)
    else:
        x_hat = load_rows(kept.x_hat, row, D, BLOCK_D, C).to(tl.float32)
        rstd = tl.load(kept.five + wide(chain * chunks + chunk) * R * 8 * M + rows // M * 8 * M + M + rows % M)[:, None]
    g = project(ln_weight * (ln_weight * x_hat + ln_bias - target), x_hat, rstd, D, BLOCK_D)
    lr_g = lr * g if WIDE else load_rows(segment.lr_g, row, D, BLOCK_D, C).to(tl.float32)
    d_lr = nearest(tl.sum(d_lr_g * g, 1), DTYPE)
    tl.store(token_pointers(d_inputs.lr, batch, head, first + chunk, C), d_lr)
    d_z1, d_error, d_ln_weight, d_ln_bias = inner_gradient_backward(
        lr * d_lr_g, g, x_hat, rstd, target, ln_weight, ln_bias, D, BLOCK_D
    )
    store_row(parts.ln_weight, d_ln_weight, behind + mine, D, BLOCK_D)
    store_row(parts.ln_bias, d_ln_bias, behind + mine, D, BLOCK_D)
    store_tokens(d_inputs.xv, -d_error, batch, head, first + chunk, C, D, BLOCK_D)

    # d_xk of the update with d_w at the end of each mini-batch, and of z1 with w at its start.
    d_w = load_matrix(pulled.d_w, chain * chunks + chunk, D, BLOCK_D)
    d_b = load_row(pulled.d_b, chain * chunks + chunk, D, BLOCK_D)[None, :]
    from_update = matmul(lr_g, by_z1(d_w, WIDE), DTYPE, PRECISION)  # [C, D] @ [D, D] -> [C, D]
    along = tl.sum(from_update * xk.to(tl.float32) + lr_g * d_b, 1)
    d_xk = d_error + matmul(d_z1, by_z1(w, WIDE), DTYPE, PRECISION) - eta_last * from_update
    if R > 1:
        i, j = rows[:, None] // M, rows[None, :] // M
        to_later = tl.where(i < j, matmul(lr_g, tl.trans(d_z1), DTYPE, PRECISION), 0.0)  # [C, D] @ [D, C] -> [C, C]
        to_earlier = tl.where(i > j, matmul(d_z1, tl.trans(lr_g), DTYPE, PRECISION), 0.0)
        attn = matmul(xk, tl.trans(xk), DTYPE, PRECISION) + 1.0
        along += tl.sum(to_later * attn, 1)
        d_xk -= matmul(eta_last * (to_later + to_earlier), xk, DTYPE, PRECISION)
    tl.store(parts.eta_last + behind + mine, -tl.sum(along))
    if not AFTER:
        d_xk += load_tokens(d_inputs.xk, batch, head, first + chunk, C, D, BLOCK_D).to(tl.float32)
    store_tokens(d_inputs.xk, d_xk, batch, head, first + chunk, C, D, BLOCK_D)
