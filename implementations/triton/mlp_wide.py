"""TTT-MLP, the sequential parts for large mini-batches: `mlp_trace.recurrence` and `mlp_scan.scan` with M = C tokens.

What it changes: an [F M] block of 64 tokens takes as many registers as a layer's fast weights, and all of them together
do not fit. So the fast weights, fp32, stay in global memory, in `end`, where the L2 cache holds them (48 chains: 6 MB),
and every mini-batch walks F in blocks of BF twice: once for what sums over F, once for the updates. In between is the
LayerNorm. What is read of the weights in the first pass are their copies in 16 bits, which the parallel kernels need
anyway. A barrier stands between a write and a read of one place by other threads (`tl.debug_barrier`); a block of the
weights themselves is written where it was read by threads that have it from those that read it.

Bytes a mini-batch and head in bf16, M = D = 64: recurrence 384 KB of weights and 88 KB of tokens, scan 512 and 384 KB.

Source: `mlp_trace.py` and `mlp_scan.py`, the same equations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from implementations.triton.blocks import load_tokens, matmul, matmul_add, nearest, token_pointers, wide
from implementations.triton.mlp_blocks import gelu, gelu_first
from implementations.triton.mlp_lanes import ask_for
from implementations.triton.mlp_readout import load_hidden, store_hidden
from implementations.triton.mlp_scan import ask_for_chunk, second_order
from implementations.triton.mlp_trace import inner_gradient


@triton.jit
def _block(at, f, BF: tl.constexpr, D: tl.constexpr):
    """Offsets [BF, D] of rows `f` to `f + BF` of state `at`: in w1, which is [D, F], and in w2."""
    rows, d = f + tl.arange(0, BF)[:, None], tl.arange(0, D)[None, :]
    return at * 4 * D * D + rows + d * 4 * D, at * 4 * D * D + rows * D + d


@triton.jit
def _load_block(weights, at, f, BF: tl.constexpr, D: tl.constexpr):
    """w1^T and w2 [BF, D], fp32."""
    in_w1, in_w2 = _block(at, f, BF, D)
    return tl.load(weights.w1 + in_w1), tl.load(weights.w2 + in_w2)


@triton.jit
def _store_block(weights, at, f, w1, w2, BF: tl.constexpr, D: tl.constexpr):
    """The other way."""
    in_w1, in_w2 = _block(at, f, BF, D)
    tl.store(weights.w1 + in_w1, w1)
    tl.store(weights.w2 + in_w2, w2)


@triton.jit
def _store_copy(p_w1, p_b1, p_w2, chunk, f, w1, b1, w2, BF: tl.constexpr, D: tl.constexpr):
    """The rounded weights, and b1 [BF], of a chunk."""
    store_hidden(p_w1, w1, chunk, f, BF, 4 * D, D, D)
    store_hidden(p_w2, w2, chunk, f, BF, 4 * D, D, D)
    tl.store(p_b1 + chunk * 4 * D + f + tl.arange(0, BF), b1)


@triton.jit
def _copy_block(start, begun, end, own, p_w1, p_b1, p_w2, chunk, f, BF: tl.constexpr, D: tl.constexpr):
    """Where a walk starts: the weights in `end`, and their copy for its first chunk."""
    w1, w2 = _load_block(start, begun, f, BF, D)
    b1 = tl.load(start.b1 + begun * 4 * D + f + tl.arange(0, BF))
    _store_block(end, own, f, w1, w2, BF, D)
    _store_copy(p_w1, p_b1, p_w2, chunk, f, w1, b1, w2, BF, D)


@triton.jit(do_not_specialize=["start_states", "end_states", "first", "count"])
def recurrence_wide(
    inputs, shared, start, end, trace, start_states, end_states, first, count, heads,
    D: tl.constexpr, M: tl.constexpr, BF: tl.constexpr, EPS: tl.constexpr, BACKWARD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `recurrence`; every mini-batch is a chunk."""
    F: tl.constexpr = 4 * D
    DTYPE: tl.constexpr = inputs.xk.p.dtype.element_ty
    SCALE: tl.constexpr = 16.0 if DTYPE.is_fp16() else 1.0  # keeps the small numbers lr g_z2 in the range of fp16
    chain = tl.program_id(0)
    batch, head = chain // heads, chain % heads
    begun, own = wide(chain) * start_states, wide(chain) * end_states
    d, m = tl.arange(0, D), tl.arange(0, M)
    row = d[:, None] * M + m[None, :]
    eta_last = tl.load(shared.token_eta + M - 1)
    ln_weight = tl.load(shared.ln_weight + head * D + d)[:, None]
    ln_bias = tl.load(shared.ln_bias + head * D + d)[:, None]
    b2 = tl.load(start.b2 + begun * D + d)
    for f in range(0, F, BF):
        _copy_block(start, begun, end, own, trace.w1, trace.b1, trace.w2, wide(chain) * count, f, BF, D)
    for n in range(count):
        chunk = wide(chain) * count + n
        xk = load_tokens(inputs.xk, batch, head, first + n, M, D, D)
        xv = load_tokens(inputs.xv, batch, head, first + n, M, D, D)
        lr = tl.load(token_pointers(inputs.lr, batch, head, first + n, M)).to(tl.float32)
        tl.store(trace.b2 + chunk * D + d, b2)
        z2 = tl.zeros([D, M], tl.float32)
        tl.debug_barrier()  # the weights are there
        for f in tl.range(0, F, BF, num_stages=STAGES):
            w1 = load_hidden(trace.w1, chunk, f, BF, F, D, D)
            w2 = load_hidden(trace.w2, chunk, f, BF, F, D, D)
            b1 = tl.load(trace.b1 + chunk * F + f + tl.arange(0, BF))
            z1 = matmul(w1, tl.trans(xk), DTYPE, "ieee") + b1[:, None]  # [BF, D] @ [D, M] -> [BF, M]
            store_hidden(trace.z1, z1, chunk, f, BF, F, M, M)
            z2 = matmul_add(tl.trans(w2), gelu(z1), z2, DTYPE, "ieee")  # [D, BF] @ [BF, M] -> [D, M]

        target = tl.trans(xv.to(tl.float32) - xk.to(tl.float32))
        g_z2, x_hat, rstd = inner_gradient(z2 + b2[:, None], target, ln_weight, ln_bias, EPS, D, 0)
        if BACKWARD:
            tl.store(trace.x_hat + chunk * D * M + row, x_hat)
            tl.store(trace.rstd + chunk * M + m, rstd)
        lr_g_z2 = (-eta_last * lr)[None, :] * g_z2
        b2 += tl.sum(lr_g_z2, 1)
        lr_g_z2 = nearest(tl.trans(SCALE * lr_g_z2), DTYPE)
        g_z2 = nearest(g_z2, DTYPE)
        tl.store(trace.g_z2 + chunk * D * M + row, g_z2)
        lr_xk = nearest(lr[:, None] * xk.to(tl.float32), DTYPE)
        for f in tl.range(0, F, BF, num_stages=STAGES):
            w1, w2 = _load_block(end, own, f, BF, D)
            b1 = tl.load(trace.b1 + chunk * F + f + tl.arange(0, BF))
            x2, slope = gelu_first(matmul(w1, tl.trans(xk), DTYPE, "ieee") + b1[:, None])
            g_x2 = matmul(w2, g_z2, DTYPE, "ieee")  # [BF, D] @ [D, M] -> [BF, M]
            store_hidden(trace.g_x2, g_x2, chunk, f, BF, F, M, M)
            g_z1 = (-eta_last) * g_x2 * slope
            b1 += tl.sum(lr[None, :] * g_z1, 1)
            w1 = matmul_add(g_z1, lr_xk, w1, DTYPE, "ieee")  # [BF, M] @ [M, D] -> [BF, D]
            w2 = matmul_add(x2 * (1 / SCALE), lr_g_z2, w2, DTYPE, "ieee")
            _store_block(end, own, f, w1, w2, BF, D)
            if n + 1 < count:
                _store_copy(trace.w1, trace.b1, trace.w2, chunk + 1, f, w1, b1, w2, BF, D)
            else:
                tl.store(end.b1 + own * F + f + tl.arange(0, BF), b1)
    tl.store(end.b2 + own * D + d, b2)


@triton.jit(do_not_specialize=["first", "count"])
def scan_wide(
    inputs, shared, trace, pulled, start, end, walked, first, count, heads,
    D: tl.constexpr, M: tl.constexpr, BF: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `scan`; every mini-batch is a chunk."""
    F: tl.constexpr = 4 * D
    DTYPE: tl.constexpr = inputs.xk.p.dtype.element_ty
    chain = tl.program_id(0)
    batch, head = chain // heads, chain % heads
    own = wide(chain)
    d, m = tl.arange(0, D), tl.arange(0, M)
    row = d[:, None] * M + m[None, :]
    eta_last = tl.load(shared.token_eta + M - 1)
    ln_weight = tl.load(shared.ln_weight + head * D + d)[:, None]
    mean_gamma2 = tl.sum(ln_weight * ln_weight) * (1.0 / D)
    d_b2 = tl.load(start.b2 + own * D + d)
    for f in range(0, F, BF):
        last = own * count + count - 1
        _copy_block(start, own, end, own, walked.d_w1, walked.d_b1, walked.d_w2, last, f, BF, D)
    for back in range(count):
        n = count - 1 - back
        chunk = own * count + n
        xk = load_tokens(inputs.xk, batch, head, first + n, M, D, D)
        eta_lr = eta_last * tl.load(token_pointers(inputs.lr, batch, head, first + n, M)).to(tl.float32)[None, :]
        g_z2 = tl.load(trace.g_z2 + chunk * D * M + row)
        if n > 0:  # what the next one reads
            ask_for_chunk(trace, pulled, chunk - 1, D, M)
            ask_for(trace.w2 + (chunk - 1) * D * F, D * F // 64)
        pulled2 = tl.zeros([D, M], tl.float32)
        through_w2 = tl.zeros([D, M], tl.float32)
        tl.debug_barrier()  # the cotangents are there
        for f in tl.range(0, F, BF, num_stages=STAGES):
            d_w1 = load_hidden(walked.d_w1, chunk, f, BF, F, D, D)
            d_b1 = tl.load(walked.d_b1 + chunk * F + f + tl.arange(0, BF))
            d_w2 = load_hidden(walked.d_w2, chunk, f, BF, F, D, D)
            w2 = load_hidden(trace.w2, chunk, f, BF, F, D, D)
            x2 = load_hidden(pulled.x2, chunk, f, BF, F, M, M)
            slope = load_hidden(pulled.slope, chunk, f, BF, F, M, M).to(tl.float32)
            d_g_z1 = load_hidden(pulled.d_g_z1, chunk, f, BF, F, M, M).to(tl.float32)
            pulled1 = matmul(d_w1, tl.trans(xk), DTYPE, "ieee") + d_b1[:, None]  # [BF, D] @ [D, M] -> [BF, M]
            d_g_z1 -= eta_lr * pulled1
            pulled2 = matmul_add(tl.trans(d_w2), x2, pulled2, DTYPE, "ieee")  # [D, BF] @ [BF, M] -> [D, M]
            through_w2 = matmul_add(tl.trans(w2), d_g_z1 * slope, through_w2, DTYPE, "ieee")
        pulled2 += d_b2[:, None]
        tl.store(walked.pulled2 + chunk * D * M + row, pulled2)
        d_g_z2 = tl.load(pulled.d_g_z2 + chunk * D * M + row) - eta_lr * pulled2 + through_w2
        tl.store(walked.d_g_z2 + chunk * D * M + row, d_g_z2)

        d_z2 = second_order(
            d_g_z2, tl.load(trace.x_hat + chunk * D * M + row), tl.load(pulled.p + chunk * D * M + row),
            tl.load(trace.rstd + chunk * M + m), tl.load(pulled.mean_p + chunk * M + m),
            tl.load(pulled.along_p + chunk * M + m), tl.load(pulled.mean1 + chunk * M + m),
            tl.load(pulled.mean2 + chunk * M + m), ln_weight, mean_gamma2, D, 0,
        )  # fmt: skip
        d_b2 += tl.sum(d_z2, 1) + tl.load(pulled.d_b2 + chunk * D + d)
        d_z2 = nearest(d_z2, DTYPE)
        lr_g_z2 = nearest(-eta_lr * g_z2.to(tl.float32), DTYPE)
        for f in tl.range(0, F, BF, num_stages=STAGES):
            d_w1, d_w2 = _load_block(end, own, f, BF, D)
            d_b1 = tl.load(walked.d_b1 + chunk * F + f + tl.arange(0, BF))
            w2 = load_hidden(trace.w2, chunk, f, BF, F, D, D)
            x2 = load_hidden(pulled.x2, chunk, f, BF, F, M, M)
            slope = load_hidden(pulled.slope, chunk, f, BF, F, M, M).to(tl.float32)
            d_g_z1 = load_hidden(pulled.d_g_z1, chunk, f, BF, F, M, M).to(tl.float32)
            d_g_z1 -= eta_lr * (matmul(d_w1, tl.trans(xk), DTYPE, "ieee") + d_b1[:, None])
            d_x2 = load_hidden(pulled.d_x2, chunk, f, BF, F, M, M).to(tl.float32)
            d_x2 = matmul_add(d_w2, lr_g_z2, d_x2, DTYPE, "ieee")  # [BF, D] @ [D, M] -> [BF, M]
            d_x2 = matmul_add(w2, d_z2, d_x2, DTYPE, "ieee")
            d_z1 = d_x2 * slope + d_g_z1 * load_hidden(pulled.curve, chunk, f, BF, F, M, M).to(tl.float32)
            d_b1 += tl.sum(d_z1, 1) + tl.load(pulled.d_b1 + chunk * F + f + tl.arange(0, BF))
            store_hidden(walked.d_z1, d_z1, chunk, f, BF, F, M, M)
            d_w1 = matmul_add(d_z1, xk, d_w1, DTYPE, "ieee")  # [BF, M] @ [M, D] -> [BF, D]
            d_w2 = matmul_add(x2, tl.trans(d_z2), d_w2, DTYPE, "ieee")
            d_w2 = matmul_add(d_g_z1 * slope, tl.trans(g_z2), d_w2, DTYPE, "ieee")
            d_w1 += load_hidden(pulled.d_w1, chunk, f, BF, F, D, D).to(tl.float32)
            d_w2 += load_hidden(pulled.d_w2, chunk, f, BF, F, D, D).to(tl.float32)
            _store_block(end, own, f, d_w1, d_w2, BF, D)
            if n > 0:
                _store_copy(walked.d_w1, walked.d_b1, walked.d_w2, chunk - 1, f, d_w1, d_b1, d_w2, BF, D)
            else:
                tl.store(end.b1 + own * F + f + tl.arange(0, BF), d_b1)
    tl.store(end.b2 + own * D + d, d_b2)
