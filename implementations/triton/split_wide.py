"""The two recurrences of `split_linear` for mini-batches whose rows fill a warp group's tensor core, M >= 64.

A warp holds 16 whole rows of z1, so that sums over D stay inside four threads. The fast weights are held as they are,
[D of xk, D of z1], the bias once for every row of z1, as the tensor core adds it: what a mini-batch adds to it is a
product of ones with the block that the update of w1 multiplies too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from implementations.triton.blocks import (
    INTERPRETED,
    inside,
    load_lr_paired,
    load_matrix,
    load_row,
    load_tokens,
    matmul,
    matmul_add,
    mean,
    store_matrix,
    wide,
)
from implementations.triton.split_forward import load_rows, store_rows


@triton.jit
def _add_product(a, x, c, fp16_scale, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """c + a @ x, in fp16 c + fp16_scale a @ x: of an x that has the scale in it fp16 would lose small numbers."""
    if DTYPE.is_fp16():
        c += fp16_scale * matmul(a, x, DTYPE, PRECISION)
    else:
        c = matmul_add(a, x, c, DTYPE, PRECISION)
    return c


@triton.jit
def _bias_add(b, x, fp16_scale, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """b + sum of x over its rows, or in fp16 fp16_scale times that, where b is the same in every row.

    Rounding what is summed to 16 bits about doubles the error of final_b1, to 0.3 of what the lab's rule allows.
    """
    if DTYPE.is_fp32():
        b += tl.sum(x, 0)[None, :]
    else:
        M: tl.constexpr = x.shape[0]
        b = _add_product(tl.full([M, M], 1.0, tl.float32), x, b, fp16_scale, DTYPE, PRECISION)
    return b


@triton.jit
def _added(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _four_means(a, b, c, d, D: tl.constexpr):
    """[M, D] -> [M, 1], side by side: one after the other, each would wait for its own additions."""
    if INTERPRETED:
        a, b, c, d = mean(a, D), mean(b, D), mean(c, D), mean(d, D)
    else:
        a, b, c, d = tl.reduce((a, b, c, d), 1, _added, keep_dims=True)
        a, b, c, d = a * (1.0 / D), b * (1.0 / D), c * (1.0 / D), d * (1.0 / D)
    return a, b, c, d


@triton.jit
def _store_first_row(p, x, index, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The first row of [M, D], into row `index` of contiguous `... D`."""
    M: tl.constexpr = x.shape[0]
    rows, columns = tl.arange(0, M)[:, None], tl.arange(0, BLOCK_D)[None, :]
    tl.store(p + wide(index) * D + rows * 0 + columns, x, (rows < 1) & (columns < D))


@triton.jit(do_not_specialize=["first", "mini_batches"])  # one program for every length
def split_recurrence_wide(
    inputs, shared, start, end, segment, heads, first, mini_batches,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, EPS: tl.constexpr, PAIRED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Chain `program_id(0)` of one segment: its fast weights."""
    chain = tl.program_id(0)
    batch, head = chain // heads, chain % heads
    DTYPE: tl.constexpr = inputs.xk.p.dtype.element_ty
    eta_last = tl.load(shared.token_eta + M - 1)
    ln_weight = load_row(shared.ln_weight, head, D, BLOCK_D)[None, :]
    offset = ln_weight * load_row(shared.ln_bias, head, D, BLOCK_D)[None, :]
    square = ln_weight * ln_weight
    w = load_matrix(start.w, chain, D, BLOCK_D)
    b = load_row(start.b, chain, D, BLOCK_D)[None, :]
    mean_w, mean_b = mean(w, D), mean(b, D)
    w = inside(w - mean_w, D, BLOCK_D)
    b = inside(tl.zeros([M, BLOCK_D], tl.float32) + (b - mean_b), D, BLOCK_D)
    slot = chain * (mini_batches + 1)
    for i in tl.range(0, mini_batches, num_stages=STAGES):
        store_matrix(segment.w, w, slot + i, D, BLOCK_D)
        _store_first_row(segment.b, b, slot + i, D, BLOCK_D)
        lr = load_lr_paired(inputs.lr, batch, head, first + i, M, PAIRED)[:, None]
        if not DTYPE.is_fp16():
            lr *= -eta_last
        xk = load_tokens(inputs.xk, batch, head, first + i, M, D, BLOCK_D)
        xv = load_tokens(inputs.xv, batch, head, first + i, M, D, BLOCK_D)
        z1 = matmul_add(xk, w, b, DTYPE, PRECISION)  # [M, D] @ [D, D] -> [M, D]
        c = ln_weight * (xk.to(tl.float32) - xv.to(tl.float32)) + offset
        mean_c = mean(c, D)
        scaled = square * z1
        z_z, w_z, w_z_z, c_z = _four_means(z1 * z1, scaled, scaled * z1, c * z1, D)
        rstd = tl.rsqrt(z_z + EPS)
        lr_rstd = lr * rstd
        lr_rstd_rstd = lr_rstd * rstd
        q = rstd * (rstd * w_z_z + c_z)
        step = z1 * (lr_rstd_rstd * square - lr_rstd_rstd * q) + (lr_rstd * c - lr_rstd * (rstd * w_z + mean_c))
        step = inside(step, D, BLOCK_D)
        w = _add_product(tl.trans(xk), step, w, -eta_last, DTYPE, PRECISION)  # [D, M] @ [M, D] -> [D, D]
        b = _bias_add(b, step, -eta_last, DTYPE, PRECISION)
    slot += mini_batches
    store_matrix(segment.w, w, slot, D, BLOCK_D)
    _store_first_row(segment.b, b, slot, D, BLOCK_D)
    store_matrix(end.w, inside(w + mean_w, D, BLOCK_D), chain, D, BLOCK_D)
    _store_first_row(end.b, b + mean_b, chain, D, BLOCK_D)


@triton.jit(do_not_specialize=["first", "mini_batches"])  # one program for every length
def split_reverse_recurrence_wide(
    inputs, shared, kept, pulled, d_end, d_start, heads, first, mini_batches,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Chain `program_id(0)` of one segment, from its end: d_w, d_b and d_lr_g."""
    chain = tl.program_id(0)
    batch, head = chain // heads, chain % heads
    DTYPE: tl.constexpr = inputs.xk.p.dtype.element_ty
    eta_last = tl.load(shared.token_eta + M - 1)
    ln_weight = load_row(shared.ln_weight, head, D, BLOCK_D)[None, :]
    square = ln_weight * ln_weight
    d_w = load_matrix(d_end.w, chain, D, BLOCK_D)
    d_b = load_row(d_end.b, chain, D, BLOCK_D)[None, :]
    mean_w, mean_b = mean(d_w, D), mean(d_b, D)
    d_w = inside(d_w - mean_w, D, BLOCK_D)
    d_b = inside(tl.zeros([M, BLOCK_D], tl.float32) + (d_b - mean_b), D, BLOCK_D)
    for step in tl.range(0, mini_batches, num_stages=STAGES):
        i = mini_batches - 1 - step
        at = chain * mini_batches + i
        if not CAUSAL:
            d_w += load_matrix(pulled.read_w, at, D, BLOCK_D)
            d_b += load_row(pulled.read_b, at, D, BLOCK_D)[None, :]
        store_matrix(pulled.d_w, d_w, at, D, BLOCK_D)
        _store_first_row(pulled.d_b, d_b, at, D, BLOCK_D)
        five = kept.five + wide(at) * 8 * M + tl.arange(0, M)[:, None]
        lr, rstd, q = tl.load(five), tl.load(five + M), tl.load(five + 2 * M)
        q1, q3 = tl.load(five + 3 * M), tl.load(five + 4 * M)
        xk = load_tokens(inputs.xk, batch, head, first + i, M, D, BLOCK_D)
        x_hat = load_rows(kept.x_hat, at * M, D, BLOCK_D, M).to(tl.float32)
        y = load_rows(kept.y, at * M, D, BLOCK_D, M).to(tl.float32)
        d_lr_g = -eta_last * matmul_add(xk, d_w, d_b, DTYPE, PRECISION)  # [M, D] @ [D, D] -> [M, D]
        if CAUSAL:
            d_lr_g += load_rows(pulled.part, at * M, D, BLOCK_D, M).to(tl.float32)
        store_rows(pulled.d_lr_g, d_lr_g, at * M, D, BLOCK_D, M)
        v = lr * d_lr_g
        scaled = square * v
        a, w_v, v_y, _ = _four_means(v * x_hat, scaled, v * y, v, D)
        rstd *= rstd
        a *= rstd
        d_z1 = v * (rstd * square - rstd * q) - a * y - (rstd * w_v - a * q1) - x_hat * (rstd * v_y - a * q3)
        d_z1 = inside(d_z1, D, BLOCK_D)
        d_w = _add_product(tl.trans(xk), d_z1, d_w, 1.0, DTYPE, PRECISION)  # [D, M] @ [M, D] -> [D, D]
        d_b = _bias_add(d_b, d_z1, 1.0, DTYPE, PRECISION)
        if CAUSAL:
            d_w += load_matrix(pulled.read_w, at, D, BLOCK_D)
            d_b += load_row(pulled.read_b, at, D, BLOCK_D)[None, :]
    store_matrix(d_start.w, inside(d_w + mean_w, D, BLOCK_D), chain, D, BLOCK_D)
    _store_first_row(d_start.b, d_b + mean_b, chain, D, BLOCK_D)
