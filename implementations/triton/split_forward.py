"""The forward kernels of `split_linear`, and the pieces that its backward kernels share."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from implementations.triton.blocks import (
    inner_gradient,
    inside,
    load_lr,
    load_lr_paired,
    load_matrix,
    load_row,
    load_tokens,
    matmul,
    matmul_add,
    mean,
    nearest,
    normalise,
    store_matrix,
    store_row,
    store_tokens,
    wide,
)


class Segment(NamedTuple):
    """Pointers to what the kernels of one segment hand to each other; [tokens] counts those of the segment."""

    w: Any  # [B H, chunks + 1, D, D] I/O dtype, transposed unless wide: before each chunk and after the last
    b: Any  # [B H, chunks + 1, D]
    lr_g: Any  # [B H, tokens, D] I/O dtype; unused where wide


class Kept(NamedTuple):
    """Pointers to what the second order needs of the inner LayerNorm of each token."""

    x_hat: Any  # [B H, tokens, D], in the I/O dtype where wide
    y: Any  # [B H, tokens, D] I/O dtype
    five: Any  # [B H, mini-batches, 8, M]: lr, rstd, q, q1, q3


@triton.jit
def four_sums(a, b, c, d, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Of [D, M] over D, in one reduction, broadcast along it where that costs nothing.

    D lies in all warps. In bf16 a product with ones sums over them: rounding what is summed costs these means
    2^-9 / sqrt(D) of themselves, less than the rounding of w to bf16 does. Rounded to fp16 they could overflow.
    """
    x = tl.join(tl.join(a, b), tl.join(c, d))
    if DTYPE.is_bf16():
        D: tl.constexpr = a.shape[0]
        M: tl.constexpr = a.shape[1]
        x = tl.reshape(tl.permute(x, (0, 2, 3, 1)), [D, 4 * M])
        x = matmul(tl.full([D, D], 1.0, tl.float32), x, DTYPE, PRECISION)
        x = tl.permute(tl.reshape(x, [D, 2, 2, M]), (0, 3, 1, 2))
    else:
        x = tl.sum(x, 0, keep_dims=True)
    ab, cd = tl.split(x)
    a, b = tl.split(ab)
    c, d = tl.split(cd)
    return a, b, c, d


@triton.jit
def beside(x, y):
    """`x`, laid out over the threads as `y` is: all that Triton knows of either is that they are added."""
    return x + 0.0 * y


@triton.jit
def by_xk(w, WIDE: tl.constexpr):
    """Fast weights of a segment as [D of xk, D of z1]."""
    return w if WIDE else tl.trans(w)


@triton.jit
def by_z1(w, WIDE: tl.constexpr):
    """Fast weights of a segment as [D of z1, D of xk]."""
    return tl.trans(w) if WIDE else w


@triton.jit
def inside_d(x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[D, M] with zeros past D."""
    if D != BLOCK_D:
        x = tl.where(tl.arange(0, BLOCK_D)[:, None] < D, x, 0.0)
    return x


@triton.jit
def load_rows(p, row, D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr):
    """[M, D], M rows of contiguous `... D` from `row` on."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    at = p + wide(row) * D + tl.arange(0, M)[:, None] * D + columns
    return tl.load(at) if D == BLOCK_D else tl.load(at, columns < D, 0.0)


@triton.jit
def store_rows(p, x, row, D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr):
    """[M, D], rounded to what is stored there."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    at = p + wide(row) * D + tl.arange(0, M)[:, None] * D + columns
    x = nearest(x, p.dtype.element_ty)
    if D == BLOCK_D:
        tl.store(at, x)
    else:
        tl.store(at, x, columns < D)


@triton.jit
def multiply_add(a, b, c, scale, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """c + scale a @ b; fp16 would lose the small numbers of `scale a`."""
    if DTYPE.is_fp16():
        c += scale * matmul(a, b, DTYPE, PRECISION)
    else:
        c = matmul_add(scale * a, b, c, DTYPE, PRECISION)
    return c


@triton.jit
def centred(xk, xv, ln_weight, ln_bias, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """c [M, D]: ln_weight (ln_bias - target) less its mean."""
    c = ln_weight * (ln_bias + (xk.to(tl.float32) - xv.to(tl.float32)))
    return inside(c - mean(c, D), D, BLOCK_D)


@triton.jit
def store_five(p, a, b, c, d, e, at, M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Five numbers of every token, [8, M] of which three rows are unused, at once: they are there for every row."""
    which = tl.arange(0, BLOCK_D)[:, None]
    x = tl.where(which < 1, a, tl.where(which < 2, b, c))
    x = tl.where(which < 3, x, tl.where(which < 4, d, e))
    tl.store(p + at + which * M + tl.arange(0, M)[None, :], x, which < 5)


# The loops hold [D, M], and a bias for every token, as z1 lies.


@triton.jit
def bias_block(b, M: tl.constexpr, BLOCK_D: tl.constexpr):
    """[D] for every token."""
    return tl.zeros([BLOCK_D, M], tl.float32) + b[:, None]


@triton.jit
def bias_row(b):
    """[D] of what is the same for every token."""
    return tl.max(b, 1)


@triton.jit
def eta_of(token_eta, M: tl.constexpr, C: tl.constexpr, CAUSAL: tl.constexpr):
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


@triton.jit(do_not_specialize=["first", "mini_batches"])  # one program for every length
def split_recurrence(
    inputs, shared, start, end, segment, kept, heads, first, mini_batches,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr, KEEP: tl.constexpr,
    LR_G: tl.constexpr, PAIRED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Chain `program_id(0)` of one segment: its fast weights, lr g_z1, and what the second order needs."""
    chain = tl.program_id(0)
    batch, head = chain // heads, chain % heads
    DTYPE: tl.constexpr = inputs.xk.p.dtype.element_ty
    R: tl.constexpr = C // M
    chunks = mini_batches // R
    eta_last = tl.load(shared.token_eta + M - 1)
    ln_weight = load_row(shared.ln_weight, head, D, BLOCK_D)
    ln_bias = load_row(shared.ln_bias, head, D, BLOCK_D)
    square = (ln_weight * ln_weight)[:, None]
    w = tl.trans(load_matrix(start.w, chain, D, BLOCK_D))  # [D of z1, D of xk]
    b = load_row(start.b, chain, D, BLOCK_D)
    mean_w = tl.sum(w, 0) * (1.0 / D)
    mean_b = tl.sum(b, 0) * (1.0 / D)
    w = inside_d(w - mean_w[None, :], D, BLOCK_D)
    b = tl.where(tl.arange(0, BLOCK_D) < D, b - mean_b, 0.0)
    b = bias_block(b, M, BLOCK_D)
    xk_next = load_tokens(inputs.xk, batch, head, first, M, D, BLOCK_D)
    xv_next = load_tokens(inputs.xv, batch, head, first, M, D, BLOCK_D)
    c_next = centred(xk_next, xv_next, ln_weight[None, :], ln_bias[None, :], D, BLOCK_D)
    for i in tl.range(0, mini_batches, num_stages=STAGES):
        if i % R == 0:
            slot = chain * (chunks + 1) + i // R
            store_matrix(segment.w, w, slot, D, BLOCK_D)
            store_row(segment.b, bias_row(b), slot, D, BLOCK_D)
        xk = load_tokens(inputs.xk, batch, head, first + i, M, D, BLOCK_D)
        lr = load_lr_paired(inputs.lr, batch, head, first + i, M, PAIRED)[None, :]
        c = tl.trans(c_next)  # a block that must be turned is better turned early
        following = first + tl.minimum(i + 1, mini_batches - 1)
        xk_next = load_tokens(inputs.xk, batch, head, following, M, D, BLOCK_D)
        xv_next = load_tokens(inputs.xv, batch, head, following, M, D, BLOCK_D)
        c_next = centred(xk_next, xv_next, ln_weight[None, :], ln_bias[None, :], D, BLOCK_D)
        z1 = matmul_add(w, tl.trans(xk), b, DTYPE, PRECISION)  # [D, D] @ [D, M] -> [D, M]
        scaled = square * z1
        z_z, w_z, w_z_z, c_z = four_sums(z1 * z1, scaled, scaled * z1, c * z1, DTYPE, PRECISION)
        rstd = tl.rsqrt(z_z * (1.0 / D) + EPS)
        half_q1 = rstd * w_z * (1.0 / D)
        w_x_x = rstd * rstd * w_z_z * (1.0 / D)
        q = w_x_x + rstd * c_z * (1.0 / D)
        # In this order, so that every block keeps the layout of z1.
        g = rstd * (rstd * z1 * (square - q) - half_q1 + c)
        lr_g = inside_d(lr * g, D, BLOCK_D)
        row = (chain * mini_batches + i) * M
        if LR_G:
            store_rows(segment.lr_g, tl.trans(lr_g), row, D, BLOCK_D, M)
        if KEEP:
            store_rows(kept.x_hat, tl.trans(rstd * z1), row, D, BLOCK_D, M)
            store_rows(kept.y, tl.trans(2.0 * rstd * scaled + c), row, D, BLOCK_D, M)
            store_five(kept.five, lr, rstd, q, 2.0 * half_q1, w_x_x + 3.0 * q, wide(row) * 8, M, BLOCK_D)
        w = multiply_add(lr_g, xk, w, -eta_last, DTYPE, PRECISION)
        b -= eta_last * tl.sum(lr_g, 1, keep_dims=True)
    slot = chain * (chunks + 1) + chunks
    row_b = bias_row(b)
    store_matrix(segment.w, w, slot, D, BLOCK_D)
    store_row(segment.b, row_b, slot, D, BLOCK_D)
    store_matrix(end.w, tl.trans(inside_d(w + mean_w[None, :], D, BLOCK_D)), chain, D, BLOCK_D)
    store_row(end.b, row_b + mean_b, chain, D, BLOCK_D)


# --- The read-out of a chunk ---


@triton.jit(do_not_specialize=["first", "chunks"])  # one program for every length
def split_read_out(
    inputs, shared, segment, out, heads, first, chunks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr, CAUSAL: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one chain: out."""
    chain, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    batch, head = chain // heads, chain % heads
    DTYPE: tl.constexpr = inputs.xk.p.dtype.element_ty
    AFTER: tl.constexpr = not CAUSAL and C == M  # the weights that every token reads are those after the chunk
    slot = chain * (chunks + 1) + chunk + (1 if AFTER else 0)
    xq = load_tokens(inputs.xq, batch, head, first + chunk, C, D, BLOCK_D)
    w = load_matrix(segment.w, slot, D, BLOCK_D)
    b = load_row(segment.b, slot, D, BLOCK_D)[None, :]
    ln_weight = load_row(shared.ln_weight, head, D, BLOCK_D)[None, :]
    ln_bias = load_row(shared.ln_bias, head, D, BLOCK_D)[None, :]
    z1_bar = matmul(xq, by_xk(w, WIDE), DTYPE, PRECISION) + b  # [C, D] @ [D, D] -> [C, D]
    if not AFTER:
        xk = load_tokens(inputs.xk, batch, head, first + chunk, C, D, BLOCK_D)
        if WIDE:
            xv = load_tokens(inputs.xv, batch, head, first + chunk, C, D, BLOCK_D)
            lr = load_lr(inputs.lr, batch, head, first + chunk, C)
            z1 = matmul(xk, w, DTYPE, PRECISION) + b
            target = xv.to(tl.float32) - xk.to(tl.float32)
            g, _, _ = inner_gradient(z1, target, ln_weight, ln_bias, EPS, D, BLOCK_D)
            lr_g = lr * g
        else:
            lr_g = load_rows(segment.lr_g, (chain * chunks + chunk) * C, D, BLOCK_D, C)
        seen, _, _ = eta_of(shared.token_eta, M, C, CAUSAL)
        scores = seen * (matmul(xq, tl.trans(xk), DTYPE, PRECISION) + 1.0)  # [C, D] @ [D, C] -> [C, C]
        z1_bar -= matmul(scores, lr_g, DTYPE, PRECISION)  # [C, C] @ [C, D] -> [C, D]
    x_hat, _ = normalise(z1_bar, EPS, D, BLOCK_D)
    store_tokens(out, xq.to(tl.float32) + ln_weight * x_hat + ln_bias, batch, head, first + chunk, C, D, BLOCK_D)
