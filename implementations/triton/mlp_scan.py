"""TTT-MLP, backwards along the chain: the sequential part, and the parallel one that finishes the gradients.

`scan` walks the mini-batches of a segment from the last to the first with the cotangents of the fast weights,
d_w1^T and d_w2 [F D], in fp32 registers, transposed as the recurrence does it (`mlp_trace.py`):

    pulled1  = d_w1^T xk^T + d_b1,  pulled2 = d_w2^T x2^T + d_b2          the updates of both layers
    d_g_z1  -= eta_last lr pulled1,  d_g_x2 = d_g_z1 * gelu'(z1)
    d_g_z2  += w2^T d_g_x2 - eta_last lr pulled2
    d_z2     = second order of the LayerNorm's gradient, of d_g_z2
    d_x2    += w2 d_z2^T - eta_last d_w2 (lr g_z2)^T
    d_z1     = d_x2 * gelu'(z1) + d_g_z1 * g_x2 * gelu''(z1)
    d_w1    += xk^T d_z1,  d_w2 += x2^T d_z2 + d_g_x2^T g_z2

What the read-out adds to d_g_z1, d_g_z2, d_x2, and at the start of a chunk to d_w1 and d_w2, comes from
`mlp_readout.py`, as do x2, gelu'(z1) and g_x2 gelu''(z1).

`finish` is parallel over chunks. The weights at each mini-batch of a chunk, and their cotangents, are those at its
start and end but for products of the chunk's tokens, so with P[i, j] = d_z1_i . g_z1_j

    d_z1 w1^T      = d_z1 w1_start^T - eta_last sum over earlier mini-batches of P[i, j] lr_j xk_j
    g_z1 d_w1^T    = g_z1 d_w1_end^T + sum over later mini-batches of P[j, i] xk_j
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from implementations.triton.blocks import (
    inner_gradient_backward,
    load_row,
    load_tokens,
    matmul,
    matmul_add,
    nearest,
    store_row,
    store_tokens,
    token_pointers,
    wide,
)
from implementations.triton.mlp_blocks import INTERPRETED
from implementations.triton.mlp_readout import inner, load_hidden
from implementations.triton.mlp_trace import load_weights, store_weights, sum_5


class Walked(NamedTuple):
    """What the scan leaves for `finish`, laid out as `Trace`."""

    d_z1: Any  # [B H K F C]
    d_g_z2: Any  # [B H K D C], fp32
    pulled2: Any  # [B H K D C], fp32
    d_w1: Any  # [B H K F D], transposed, at the end of every chunk
    d_b1: Any  # [B H K F], fp32
    d_w2: Any  # [B H K F D] and [B H K D], fp32, for the scan itself, where it walks a mini-batch in blocks
    d_b2: Any


@triton.jit
def _prefetch(p, LINES: tl.constexpr):
    """Ask for `LINES` times 128 bytes of 16-bit numbers from `p` on to be brought to the L2 cache."""
    if not INTERPRETED:
        at = (p + tl.arange(0, LINES) * 64).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], tl.int32, is_pure=False, pack=1
        )


@triton.jit(do_not_specialize=["first", "count"])
def scan(
    inputs, shared, trace, pulled, start, end, walked, first, count, heads,
    D: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Mini-batches `first + count - 1` down to `first` of chain `program_id(0)`."""
    F: tl.constexpr = 4 * D
    R: tl.constexpr = C // M  # mini-batches in a chunk
    BLOCKS: tl.constexpr = M // BT  # of a mini-batch; R is 1 where these are more
    DTYPE: tl.constexpr = inputs.xk.p.dtype.element_ty
    chain = tl.program_id(0)
    batch, head = chain // heads, chain % heads
    f, d, m = tl.arange(0, F), tl.arange(0, D), tl.arange(0, BT)
    tile = f[:, None] * D + d[None, :]  # offsets in [F, D], [F, C] and [D, C]
    hidden = f[:, None] * C + m[None, :]
    row = d[:, None] * C + m[None, :]
    across = d[None, :] * C + m[:, None]
    natural = m[:, None] * D + d[None, :]
    eta_last = tl.load(shared.token_eta + M - 1)
    ln_weight = tl.load(shared.ln_weight + head * D + d)
    mean_gamma2 = tl.sum(ln_weight * ln_weight) * (1.0 / D)
    gamma2 = (ln_weight * ln_weight)[None, :]
    d_w1, d_b1, d_w2, d_b2 = load_weights(start, wide(chain), D)
    d_w1_start = nearest(d_w1, DTYPE)
    d_w2_start = nearest(d_w2, DTYPE)
    for back in range(count * BLOCKS):
        i, j = count - 1 - back // BLOCKS, (BLOCKS - 1 - back % BLOCKS) * BT
        chunk = wide(chain) * tl.cdiv(count, R) + i // R
        column = (i % R) * M + j
        if column == C - BT and i >= R:  # what the next chunk reads, while this one is computed
            before = chunk - 1
            _prefetch(pulled.x2 + before * F * C, F * C // 64)
            _prefetch(pulled.slope + before * F * C, F * C // 64)
            _prefetch(pulled.curve + before * F * C, F * C // 64)
            _prefetch(pulled.d_x2 + before * F * C, F * C // 64)
            _prefetch(pulled.d_g_z1 + before * F * C, F * C // 64)
            _prefetch(pulled.d_w1 + before * F * D, F * D // 64)
            _prefetch(pulled.d_w2 + before * F * D, F * D // 64)
        p_w2 = trace.w2 + (chunk * R + i % R) * D * F
        if i > 0:
            _prefetch(p_w2 - D * F, D * F // 64)
        if column == C - BT:
            tl.store(walked.d_w1 + chunk * D * F + tile, nearest(d_w1, DTYPE))
            tl.store(walked.d_b1 + chunk * F + f, d_b1)
            if BLOCKS > 1:
                tl.store(walked.d_w2 + chunk * D * F + tile, nearest(d_w2, DTYPE))
                tl.store(walked.d_b2 + chunk * D + d, d_b2)
        if BLOCKS == 1:
            d_w1_rows, d_b1_rows, d_w2_rows, d_b2_rows = d_w1_start, d_b1, d_w2_start, d_b2
        else:
            tl.debug_barrier()  # what the mini-batch ends with is there
            d_w1_rows = tl.load(walked.d_w1 + chunk * D * F + tile)
            d_b1_rows = tl.load(walked.d_b1 + chunk * F + f)
            d_w2_rows = tl.load(walked.d_w2 + chunk * D * F + tile)
            d_b2_rows = tl.load(walked.d_b2 + chunk * D + d)
        block = (first + i) * (M // BT) + j // BT
        at_f, at_d = chunk * F * C + column, chunk * D * C + column
        token = chunk * C + column + m
        # All loads first: none waits behind a barrier.
        xk = load_tokens(inputs.xk, batch, head, block, BT, D, D)
        lr = tl.load(token_pointers(inputs.lr, batch, head, block, BT)).to(tl.float32)
        w2_rows = tl.load(p_w2 + tile)  # [F, D]
        x2 = tl.load(pulled.x2 + at_f + hidden)  # [F, M]
        g_z2 = tl.load(trace.g_z2 + at_d + row)  # [D, M]
        d_x2 = tl.load(pulled.d_x2 + at_f + hidden)
        d_g_z1 = tl.load(pulled.d_g_z1 + at_f + hidden)
        slope = tl.load(pulled.slope + at_f + hidden)
        curve = tl.load(pulled.curve + at_f + hidden)
        d_g_z2 = tl.load(pulled.d_g_z2 + at_d + across)  # [M, D]
        x_hat = tl.load(trace.x_hat + at_d + across)
        p = tl.load(pulled.p + (chunk * C + column) * D + natural)
        rstd = tl.load(trace.rstd + token)[:, None]
        mean_p = tl.load(pulled.mean_p + token)[:, None]
        along_p = tl.load(pulled.along_p + token)[:, None]
        mean1 = tl.load(pulled.mean1 + token)[:, None]
        mean2 = tl.load(pulled.mean2 + token)[:, None]
        eta_lr = eta_last * lr

        pulled1 = matmul(d_w1_rows, tl.trans(xk), DTYPE, "ieee") + d_b1_rows[:, None]  # [F, D] @ [D, M]
        d_g_z1 = d_g_z1.to(tl.float32) - eta_lr[None, :] * pulled1
        d_g_x2 = nearest(d_g_z1 * slope.to(tl.float32), DTYPE)
        pulled2 = matmul(tl.trans(x2), d_w2_rows, DTYPE, "ieee") + d_b2_rows[None, :]  # [M, F] @ [F, D]
        d_g_z2 -= eta_lr[:, None] * pulled2
        d_g_z2 = matmul_add(tl.trans(d_g_x2), w2_rows, d_g_z2, DTYPE, "ieee")  # [M, F] @ [F, D] -> [M, D]
        tl.store(walked.pulled2 + at_d + across, pulled2)
        tl.store(walked.d_g_z2 + at_d + across, d_g_z2)
        d_x2 = d_x2.to(tl.float32)
        d_x2 = matmul_add(d_w2_rows, -eta_lr[None, :] * g_z2.to(tl.float32), d_x2, DTYPE, "ieee")  # [F, D] @ [D, M]

        # `blocks.inner_gradient_backward`: linear in d_g_z2, so one round of sums is enough.
        scaled = gamma2 * d_g_z2
        mean, along, with_p, mean_s, along_s = sum_5(
            d_g_z2, d_g_z2 * x_hat, d_g_z2 * p, scaled, scaled * x_hat, 1
        )
        mean, along = mean[:, None] * (1.0 / D), along[:, None] * (1.0 / D)
        through_rstd = with_p[:, None] * (1.0 / D) - mean_p * mean - along_p * along
        mean_x = mean_s[:, None] * (1.0 / D) - mean * mean_gamma2 - along * mean1 - along_p * mean - along * mean_p
        along_x = along_s[:, None] * (1.0 / D) - mean * mean1 - along * mean2 - 2 * along_p * along
        d_x_hat = gamma2 * (d_g_z2 - mean - x_hat * along) - along_p * d_g_z2 - along * p
        d_z2 = rstd * rstd * (d_x_hat - mean_x - x_hat * (along_x + through_rstd))
        d_b2 += tl.sum(d_z2, 0)
        d_z2 = nearest(d_z2, DTYPE)

        d_x2 = matmul_add(w2_rows, tl.trans(d_z2), d_x2, DTYPE, "ieee")  # [F, D] @ [D, M] -> [F, M]
        d_z1 = d_x2 * slope.to(tl.float32) + d_g_z1 * curve.to(tl.float32)
        d_b1 += tl.sum(d_z1, 1)
        d_z1 = nearest(d_z1, DTYPE)
        tl.store(walked.d_z1 + at_f + hidden, d_z1)
        d_w1 = matmul_add(d_z1, xk, d_w1, DTYPE, "ieee")  # [F, M] @ [M, D] -> [F, D]
        d_w2 = matmul_add(x2, d_z2, d_w2, DTYPE, "ieee")
        d_w2 = matmul_add(d_g_x2, tl.trans(g_z2), d_w2, DTYPE, "ieee")
        if column == 0:
            d_w1 += tl.load(pulled.d_w1 + chunk * D * F + tile).to(tl.float32)
            d_b1 += tl.load(pulled.d_b1 + chunk * F + f)
            d_w2 += tl.load(pulled.d_w2 + chunk * D * F + tile).to(tl.float32)
            d_b2 += tl.load(pulled.d_b2 + chunk * D + d)
        if BLOCKS == 1:
            d_w1_start = nearest(d_w1, DTYPE)
            d_w2_start = nearest(d_w2, DTYPE)
    store_weights(end, wide(chain), d_w1, d_b1, d_w2, d_b2, D)


@triton.jit(do_not_specialize=["first", "chunks", "all_chunks"])
def finish(
    inputs, shared, trace, pulled, walked, gradients, sums, first, chunks, all_chunks, heads,
    D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Chunk `first + program_id(0) % chunks` of chain `program_id(0) / chunks`: d_xk, d_xv, d_lr.

    `sums` are those of the update: `d_eta_last`, and the inner LayerNorm's.
    """
    F: tl.constexpr = 4 * D
    DTYPE: tl.constexpr = inputs.xk.p.dtype.element_ty
    chain, n = tl.program_id(0) // chunks, first + tl.program_id(0) % chunks
    batch, head, chunk = chain // heads, chain % heads, wide(tl.program_id(0))
    part = wide(chain) * all_chunks + n
    c, d = tl.arange(0, C), tl.arange(0, D)
    eta_last = tl.load(shared.token_eta + M - 1)
    p = tl.zeros([C, C], tl.float32)  # P[i, j]
    along1 = tl.zeros([C], tl.float32)
    through_w1 = tl.zeros([C, D], tl.float32)
    through_d_w1 = tl.zeros([C, D], tl.float32)
    for f in tl.range(0, F, BF, num_stages=STAGES):
        _, g_z1 = inner(trace, chunk, f, BF, F, C)  # [BF, C]
        d_z1 = load_hidden(walked.d_z1, chunk, f, BF, F, C)
        w1 = load_hidden(trace.w1, chunk, f, BF, F, D)
        d_w1 = load_hidden(walked.d_w1, chunk, f, BF, F, D)
        d_b1 = tl.load(walked.d_b1 + chunk * F + f + tl.arange(0, BF))
        along1 += tl.sum(g_z1.to(tl.float32) * d_b1[:, None], 0)
        p = matmul_add(tl.trans(d_z1), g_z1, p, DTYPE, "ieee")  # [C, BF] @ [BF, C] -> [C, C]
        through_w1 = matmul_add(tl.trans(d_z1), w1, through_w1, DTYPE, "ieee")  # [C, BF] @ [BF, D] -> [C, D]
        through_d_w1 = matmul_add(tl.trans(g_z1), d_w1, through_d_w1, DTYPE, "ieee")

    xk = load_tokens(inputs.xk, batch, head, n, C, D, D)
    xv = load_tokens(inputs.xv, batch, head, n, C, D, D)
    lr = tl.load(token_pointers(inputs.lr, batch, head, n, C)).to(tl.float32)
    if M != C:
        p = tl.where(c[:, None] // M > c[None, :] // M, p, 0.0)  # i later than j
        through_w1 -= matmul(eta_last * lr[None, :] * p, xk, DTYPE, "ieee")  # [C, C] @ [C, D] -> [C, D]
        through_d_w1 = matmul_add(tl.trans(nearest(p, DTYPE)), xk, through_d_w1, DTYPE, "ieee")
        along1 += tl.sum(p, 0)
    along1 += tl.sum(xk.to(tl.float32) * through_d_w1, 1)

    # The inner gradient, second order.
    across = chunk * D * C + d[None, :] * C + c[:, None]
    g_z2 = tl.load(trace.g_z2 + across).to(tl.float32)
    x_hat = tl.load(trace.x_hat + across)
    d_g_z2 = tl.load(walked.d_g_z2 + across)
    along2 = tl.sum(g_z2 * tl.load(walked.pulled2 + across), 1)
    rstd = tl.load(trace.rstd + chunk * C + c)[:, None]
    ln_weight = load_row(shared.ln_weight, head, D, D)[None, :]
    ln_bias = load_row(shared.ln_bias, head, D, D)[None, :]
    target = xv.to(tl.float32) - xk.to(tl.float32)
    _, d_error, d_ln_weight, d_ln_bias = inner_gradient_backward(
        d_g_z2, g_z2, x_hat, rstd, target, ln_weight, ln_bias, D, D
    )
    store_row(sums.d_ln_weight, d_ln_weight, part, D, D)
    store_row(sums.d_ln_bias, d_ln_bias, part, D, D)
    store_tokens(gradients.xv, -d_error, batch, head, n, C, D, D)
    d_xk = tl.load(pulled.d_xk + chunk * C * D + c[:, None] * D + d[None, :]) + d_error
    d_xk += through_w1 - eta_last * lr[:, None] * through_d_w1
    store_tokens(gradients.xk, d_xk, batch, head, n, C, D, D)
    along = along1 + along2
    d_lr = tl.load(pulled.d_lr + chunk * C + c) - eta_last * along
    tl.store(token_pointers(gradients.lr, batch, head, n, C), nearest(d_lr, DTYPE))
    tl.store(sums.d_eta_last + part * C + c, -lr * along)
