"""TTT-MLP, backwards along the chain: the sequential part, and the parallel one that finishes the gradients.

`scan` walks the mini-batches of a segment from the last to the first with the cotangents of the fast weights,
d_w1^T and d_w2 [F D], in fp32 registers, in blocks as the recurrence has them (`mlp_trace.py`):

    pulled1  = d_w1^T xk^T + d_b1,  pulled2 = x2 d_w2 + d_b2              the updates of both layers
    d_g_z1  -= eta_last lr pulled1,  d_g_x2 = d_g_z1 * gelu'(z1)
    d_g_z2  += d_g_x2 w2 - eta_last lr pulled2
    d_z2     = second order of the LayerNorm's gradient, of d_g_z2
    d_x2    += w2 d_z2^T - eta_last lr d_w2 g_z2^T
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
from implementations.triton.mlp_blocks import load
from implementations.triton.mlp_lanes import (
    ask_for,
    by_memory,
    column,
    everywhere,
    load_block,
    load_narrow,
    load_tokens_apart,
    over_hidden,
    pointers_apart,
    store_block,
    store_narrow,
    token,
)
from implementations.triton.mlp_readout import across, inner, load_hidden, load_rows
from implementations.triton.mlp_trace import load_weights, store_weights, sum_5


class Walked(NamedTuple):
    """What the scan leaves for `finish`, laid out as `Trace`."""

    d_z1: Any  # [B H K F C]
    d_g_z2: Any  # [B H K D C], fp32
    pulled2: Any  # [B H K D C], fp32
    d_w1: Any  # [B H K F D], transposed, at the end of every chunk
    d_b1: Any  # [B H K F], fp32


@triton.jit
def ask_for_chunk(trace, pulled, chunk, D: tl.constexpr, C: tl.constexpr):
    """Ask for most of what a walk reads of a chunk."""
    F: tl.constexpr = 4 * D
    ask_for(pulled.x2 + chunk * F * C, F * C // 64)
    ask_for(pulled.slope + chunk * F * C, F * C // 64)
    ask_for(pulled.curve + chunk * F * C, F * C // 64)
    ask_for(pulled.d_x2 + chunk * F * C, F * C // 64)
    ask_for(pulled.d_g_z1 + chunk * F * C, F * C // 64)
    ask_for(pulled.d_w1 + chunk * F * D, F * D // 64)
    ask_for(pulled.d_w2 + chunk * F * D, F * D // 64)
    ask_for(pulled.d_g_z2 + chunk * D * C, D * C // 32)
    ask_for(pulled.p + chunk * D * C, D * C // 32)
    ask_for(trace.x_hat + chunk * D * C, D * C // 32)
    ask_for(trace.g_z2 + chunk * D * C, D * C // 64)


@triton.jit
def second_order(d_g_z2, x_hat, p, rstd, mean_p, along_p, mean1, mean2, ln_weight, mean_gamma2, D: tl.constexpr):
    """d_z2 of d_g_z2: `blocks.inner_gradient_backward`, linear in it, so one round of sums is enough.

    d_g_z2, x_hat, p: [M, D]; ln_weight [1, D]; rstd and the means [M].
    """
    gamma2 = ln_weight * ln_weight
    scaled = gamma2 * d_g_z2
    mean, along, with_p, mean_s, along_s = sum_5(d_g_z2, d_g_z2 * x_hat, d_g_z2 * p, scaled, scaled * x_hat)
    mean, along = mean * (1.0 / D), along * (1.0 / D)
    through_rstd = with_p * (1.0 / D) - mean_p * mean - along_p * along
    mean_x = mean_s * (1.0 / D) - mean * mean_gamma2 - along * mean1 - along_p * mean - along * mean_p
    along_x = along_s * (1.0 / D) - mean * mean1 - along * mean2 - 2 * along_p * along
    mean, along, along_p = mean[:, None], along[:, None], along_p[:, None]
    d_x_hat = gamma2 * (d_g_z2 - mean - x_hat * along)
    d_x_hat -= along_p * d_g_z2 + along * p
    d_x_hat -= mean_x[:, None] + x_hat * (along_x + through_rstd)[:, None]
    return (rstd * rstd)[:, None] * d_x_hat


@triton.jit(do_not_specialize=["first", "count"])
def scan(
    inputs, shared, trace, pulled, start, end, walked, first, count, heads,
    D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Mini-batches `first + count - 1` down to `first` of chain `program_id(0)`."""
    F: tl.constexpr = 4 * D
    R: tl.constexpr = C // M  # mini-batches in a chunk
    DTYPE: tl.constexpr = inputs.xk.p.dtype.element_ty
    chain = tl.program_id(0)
    batch, head = chain // heads, chain % heads
    f, d = tl.arange(0, F).reshape(W, F // W), column(D)
    eta_last = tl.load(shared.token_eta + M - 1)
    ln_weight = tl.load(shared.ln_weight + head * D + d)
    mean_gamma2 = tl.sum(ln_weight * ln_weight) * (1.0 / D)
    d_w1, d_b1, d_w2, d_b2 = load_weights(start, wide(chain), D, W)
    for back in range(count):
        n = count - 1 - back
        chunk = wide(chain) * tl.cdiv(count, R) + n // R
        if n % R == R - 1 and n >= R:  # what the next chunk reads, while this one is computed
            ask_for_chunk(trace, pulled, chunk - 1, D, C)
        slot = chunk * R + n % R
        p_w2 = trace.w2 + slot * D * F
        if n > 0:
            ask_for(p_w2 - D * F, D * F // 64)
        if n % R == R - 1:
            store_block(walked.d_w1 + chunk * D * F, d_w1, F, D, W)
            tl.store(walked.d_b1 + chunk * F + f, d_b1)
        at_f, at_d = slot * F * M, slot * D * M
        at = chunk * C + n % R * M + token(M)
        # Loads shortly before their use, some twice: registers are few.
        xk = load_tokens_apart(inputs.xk, batch, head, first + n, M, D)
        lr = tl.load(pointers_apart(inputs.lr, batch, head, first + n, M)).to(tl.float32)
        d_g_z1 = load_block(pulled.d_g_z1 + at_f, F, M, W)  # [W, F/W, M]
        slope = load_block(pulled.slope + at_f, F, M, W)
        d_g_z2 = load_narrow(pulled.d_g_z2 + at_d, M, D)  # [M, D]
        x_hat = load_narrow(trace.x_hat + at_d, M, D)
        p = load_narrow(pulled.p + at_d, M, D)
        eta_lr = eta_last * lr

        pulled1 = matmul(d_w1, everywhere(tl.trans(xk), W), DTYPE, "ieee") + d_b1[:, :, None]  # [F/W, D] @ [D, M]
        d_g_z1 = d_g_z1.to(tl.float32) - eta_lr[None, None, :] * pulled1
        d_g_x2 = nearest(d_g_z1 * slope.to(tl.float32), DTYPE)
        x2 = by_memory(load_block(pulled.x2 + at_f, F, M, W))
        d_w2_start = nearest(d_w2, DTYPE)
        pulled2 = over_hidden(x2, d_w2_start, tl.zeros([M, D], tl.float32) + d_b2[None, :], DTYPE)
        store_narrow(walked.pulled2 + at_d, pulled2, M, D)
        d_g_z2 -= eta_lr[:, None] * pulled2
        w2 = by_memory(load_block(p_w2, F, D, W))  # [W, F/W, D]
        d_g_z2 = over_hidden(d_g_x2, w2, d_g_z2, DTYPE)
        store_narrow(walked.d_g_z2 + at_d, d_g_z2, M, D)
        g_z2 = load_narrow(trace.g_z2 + at_d, M, D)  # [M, D]
        d_x2 = load_block(pulled.d_x2 + at_f, F, M, W)
        through_lr = matmul(d_w2_start, everywhere(tl.trans(g_z2), W), DTYPE, "ieee")  # [F/W, D] @ [D, M] -> [F/W, M]
        d_x2 = d_x2.to(tl.float32) - eta_lr[None, None, :] * through_lr

        rstd = tl.load(trace.rstd + at)
        mean_p = tl.load(pulled.mean_p + at)
        along_p = tl.load(pulled.along_p + at)
        mean1 = tl.load(pulled.mean1 + at)
        mean2 = tl.load(pulled.mean2 + at)
        d_z2 = second_order(d_g_z2, x_hat, p, rstd, mean_p, along_p, mean1, mean2, ln_weight[None, :], mean_gamma2, D)
        d_b2 += tl.sum(d_z2, 0)
        d_z2 = nearest(d_z2, DTYPE)

        w2 = load_block(p_w2, F, D, W)
        curve = load_block(pulled.curve + at_f, F, M, W)
        d_x2 = matmul_add(w2, everywhere(tl.trans(d_z2), W), d_x2, DTYPE, "ieee")  # [F/W, D] @ [D, M] -> [F/W, M]
        d_z1 = d_x2 * slope.to(tl.float32) + d_g_z1 * curve.to(tl.float32)
        d_b1 += tl.sum(d_z1, 2)
        d_z1 = nearest(d_z1, DTYPE)
        store_block(walked.d_z1 + at_f, d_z1, F, M, W)
        xk = load_tokens_apart(inputs.xk, batch, head, first + n, M, D)
        x2 = load_block(pulled.x2 + at_f, F, M, W)
        g_z2 = load_narrow(trace.g_z2 + at_d, M, D)
        d_w1 = matmul_add(d_z1, everywhere(xk, W), d_w1, DTYPE, "ieee")  # [F/W, M] @ [M, D] -> [F/W, D]
        d_w2 = matmul_add(x2, everywhere(d_z2, W), d_w2, DTYPE, "ieee")
        d_w2 = matmul_add(d_g_x2, everywhere(g_z2, W), d_w2, DTYPE, "ieee")
        if n % R == 0:
            d_w1 += load_block(pulled.d_w1 + chunk * D * F, F, D, W).to(tl.float32)
            d_b1 += tl.load(pulled.d_b1 + chunk * F + f)
            d_w2 += load_block(pulled.d_w2 + chunk * D * F, F, D, W).to(tl.float32)
            d_b2 += tl.load(pulled.d_b2 + chunk * D + d)
    store_weights(end, wide(chain), d_w1, d_b1, d_w2, d_b2, D, W)


@triton.jit(do_not_specialize=["first", "chunks", "all_chunks"])
def finish(
    inputs, shared, trace, pulled, walked, gradients, sums, first, chunks, all_chunks, heads,
    D: tl.constexpr, BD: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Chunk `first + program_id(0) % chunks` of chain `program_id(0) / chunks`: d_xk, d_xv, d_lr.

    `sums` are those of the update: `d_eta_last`, and the inner LayerNorm's.
    """
    F: tl.constexpr = 4 * D
    DTYPE: tl.constexpr = inputs.xk.p.dtype.element_ty
    chain, n = tl.program_id(0) // chunks, first + tl.program_id(0) % chunks
    batch, head, chunk = chain // heads, chain % heads, wide(tl.program_id(0))
    part = wide(chain) * all_chunks + n
    c = tl.arange(0, C)
    eta_last = tl.load(shared.token_eta + M - 1)
    p = tl.zeros([C, C], tl.float32)  # P[i, j]
    along1 = tl.zeros([C], tl.float32)
    through_w1 = tl.zeros([C, BD], tl.float32)
    through_d_w1 = tl.zeros([C, BD], tl.float32)
    for f in tl.range(0, F, BF, num_stages=STAGES):
        _, g_z1 = inner(trace, chunk, f, BF, F, C, M)  # [BF, C]
        d_z1 = load_hidden(walked.d_z1, chunk, f, BF, F, C, M)
        w1 = load_rows(trace.w1, chunk, f, BF, F, D, BD)
        d_w1 = load_rows(walked.d_w1, chunk, f, BF, F, D, BD)
        d_b1 = tl.load(walked.d_b1 + chunk * F + f + tl.arange(0, BF))
        along1 += tl.sum(g_z1.to(tl.float32) * d_b1[:, None], 0)
        p = matmul_add(tl.trans(d_z1), g_z1, p, DTYPE, "ieee")  # [C, BF] @ [BF, C] -> [C, C]
        through_w1 = matmul_add(tl.trans(d_z1), w1, through_w1, DTYPE, "ieee")  # [C, BF] @ [BF, D] -> [C, D]
        through_d_w1 = matmul_add(tl.trans(g_z1), d_w1, through_d_w1, DTYPE, "ieee")

    xk = load_tokens(inputs.xk, batch, head, n, C, D, BD)
    xv = load_tokens(inputs.xv, batch, head, n, C, D, BD)
    lr = tl.load(token_pointers(inputs.lr, batch, head, n, C)).to(tl.float32)
    if M != C:
        p = tl.where(c[:, None] // M > c[None, :] // M, p, 0.0)  # i later than j
        through_w1 -= matmul(eta_last * lr[None, :] * p, xk, DTYPE, "ieee")  # [C, C] @ [C, D] -> [C, D]
        through_d_w1 = matmul_add(tl.trans(nearest(p, DTYPE)), xk, through_d_w1, DTYPE, "ieee")
        along1 += tl.sum(p, 0)
    along1 += tl.sum(xk.to(tl.float32) * through_d_w1, 1)

    # The inner gradient, second order.
    at, inside = across(chunk, D, BD, C, M)
    g_z2 = load(trace.g_z2 + at, inside, D != BD).to(tl.float32)
    x_hat = load(trace.x_hat + at, inside, D != BD)
    d_g_z2 = load(walked.d_g_z2 + at, inside, D != BD)
    along2 = tl.sum(g_z2 * load(walked.pulled2 + at, inside, D != BD), 1)
    rstd = tl.load(trace.rstd + chunk * C + c)[:, None]
    ln_weight = load_row(shared.ln_weight, head, D, BD)[None, :]
    ln_bias = load_row(shared.ln_bias, head, D, BD)[None, :]
    target = xv.to(tl.float32) - xk.to(tl.float32)
    _, d_error, d_ln_weight, d_ln_bias = inner_gradient_backward(
        d_g_z2, g_z2, x_hat, rstd, target, ln_weight, ln_bias, D, BD
    )
    store_row(sums.d_ln_weight, d_ln_weight, part, D, BD)
    store_row(sums.d_ln_bias, d_ln_bias, part, D, BD)
    store_tokens(gradients.xv, -d_error, batch, head, n, C, D, BD)
    d_xk = load_rows(pulled.d_xk, chunk, 0, C, C, D, BD) + d_error
    d_xk += through_w1 - eta_last * lr[:, None] * through_d_w1
    store_tokens(gradients.xk, d_xk, batch, head, n, C, D, BD)
    along = along1 + along2
    d_lr = tl.load(pulled.d_lr + chunk * C + c) - eta_last * along
    tl.store(token_pointers(gradients.lr, batch, head, n, C), nearest(d_lr, DTYPE))
    tl.store(sums.d_eta_last + part * C + c, -lr * along)
