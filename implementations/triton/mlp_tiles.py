"""TTT-MLP, the walks whose fast weights do not fit in registers: `mlp_trace.recurrence` and `mlp_scan.scan` in tiles.

What it changes: the fast weights of both layers are tiles of 128 hidden units and 64 columns of D, or 32 where 64 does
not divide D, so that nothing is padded at D = 96 (3 x 3 tiles). They stay in global memory, in fp32, where the
L2 cache holds them (D = 96, 64 chains: 19 MB), and every mini-batch walks the hidden axis twice: once for what sums
over it, once for the updates. In between is the LayerNorm. A tile lies in memory as the lanes have it in registers
(`Held`), so that a load or store takes 16 bytes a lane and nothing passes through shared memory. What the first walk
makes of a block of hidden units the second makes again: registers are few.

Tokens and columns come in the order of `mlp_lanes.py`. Products are those of single warps (M = 16), or of warp groups.

Measured on an H100 in bf16, ms: video-5b recurrence 5.0, in the backward 5.2, scan 10.9; lm-760m 3.0, 3.3, 6.6.
With both layers in registers as far as they go, the rest spilled, it was 8.3, 9.2, 21.7 and 3.7, 4.9, 9.0.

Bytes a mini-batch and head, D = 96, M = 16: the recurrence reads 590 KB of weights and writes 295 KB.

Source: `mlp_trace.py` and `mlp_scan.py`, the same equations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from implementations.triton.blocks import matmul_add, nearest, wide
from implementations.triton.mlp_blocks import gelu, gelu_first
from implementations.triton.mlp_lanes import (
    ask_for,
    ask_for_tokens,
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
from implementations.triton.mlp_scan import ask_for_chunk
from implementations.triton.mlp_trace import sum_2, sum_4, sum_5

ROWS = tl.constexpr(128)  # of a tile: 16 for each of 8 warps
WARPS = tl.constexpr(8)


@triton.constexpr_function
def _columns(D):
    """K: those of a tile."""
    return 64 if D % 64 == 0 else 32


class Held(NamedTuple):
    """The fast weights of every chain, or their cotangents, while a walk goes on; fp32.

    Of w1 and w2 a thread reads what it wrote itself; between the writes and reads of b1 is a mini-batch's barrier.
    """

    w1: Any  # [B H F D], transposed, in tiles
    b1: Any  # [B H F]
    w2: Any  # [B H F D], in tiles


# --- Blocks and tiles ---


@triton.jit
def _load_hidden(p, f, M: tl.constexpr):
    """Block `f` [W, F/W, M] of [F, M] from `p` on."""
    return load_block(p + f * ROWS * M, ROWS, M, WARPS)


@triton.jit
def _store_hidden(p, x, f, M: tl.constexpr):
    """The other way."""
    store_block(p + f * ROWS * M, x, ROWS, M, WARPS)


@triton.jit
def _load_narrow(p, M: tl.constexpr, D: tl.constexpr):
    """Blocks [M, D] of [D, M] from `p` on."""
    K: tl.constexpr = _columns(D)
    x = ()
    for d in tl.static_range(D // K):
        x += (load_narrow(p + d * K * M, M, K),)
    return x


@triton.jit
def _store_narrow(p, x, M: tl.constexpr, D: tl.constexpr):
    """The other way."""
    K: tl.constexpr = _columns(D)
    for d in tl.static_range(D // K):
        store_narrow(p + d * K * M, x[d], M, K)


@triton.jit
def _load_tokens(view, batch, head, n, M: tl.constexpr, D: tl.constexpr):
    """Blocks [M, D] of a mini-batch's tokens."""
    K: tl.constexpr = _columns(D)
    x = ()
    for d in tl.static_range(D // K):
        x += (load_tokens_apart(view, batch, head, n, M, K, d * K),)
    return x


@triton.jit
def _load_columns(p, D: tl.constexpr):
    """Blocks [D] from `p` on."""
    K: tl.constexpr = _columns(D)
    x = ()
    for d in tl.static_range(D // K):
        x += (tl.load(p + d * K + column(K)),)
    return x


@triton.jit
def _store_columns(p, x, D: tl.constexpr):
    """The other way."""
    K: tl.constexpr = _columns(D)
    for d in tl.static_range(D // K):
        tl.store(p + d * K + column(K), x[d])


@triton.jit
def _rows(f):
    """[W, F/W]: the hidden units of block `f`."""
    return f * ROWS + tl.arange(0, ROWS).reshape(WARPS, ROWS // WARPS)


@triton.jit
def _load_tiles(p, f, D: tl.constexpr, TURNED: tl.constexpr = False):
    """Tiles [W, F/W, D] of block `f` of [F, D] from `p` on, or of [D, F] if TURNED."""
    K: tl.constexpr = _columns(D)
    x = ()
    for d in tl.static_range(D // K):
        if TURNED:
            at = p + d * K * (4 * D) + f * ROWS
            x += (load_block(at, ROWS, K, WARPS, True, 4 * D),)
        else:
            at = p + f * ROWS * D + d * K
            x += (load_block(at, ROWS, K, WARPS, False, D),)
    return x


@triton.jit
def _store_tiles(p, x, f, D: tl.constexpr, TURNED: tl.constexpr = False):
    """The other way."""
    K: tl.constexpr = _columns(D)
    for d in tl.static_range(D // K):
        if TURNED:
            at = p + d * K * (4 * D) + f * ROWS
            store_block(at, x[d], ROWS, K, WARPS, True, 4 * D)
        else:
            at = p + f * ROWS * D + d * K
            store_block(at, x[d], ROWS, K, WARPS, False, D)


@triton.jit
def _add_tiles(p, tiles, f, D: tl.constexpr):
    """The tiles and what is stored at those of block `f`."""
    K: tl.constexpr = _columns(D)
    x = ()
    for d in tl.static_range(D // K):
        at = p + f * ROWS * D + d * K
        x += (tiles[d] + load_block(at, ROWS, K, WARPS, False, D).to(tl.float32),)
    return x


@triton.jit
def _held_tile(f, d: tl.constexpr, D: tl.constexpr):
    """[32 W, G, 4] offsets of tile `f`, `d`: of every lane's numbers four together, those of all lanes side by side."""
    K: tl.constexpr = _columns(D)
    lane, group = tl.arange(0, 32 * WARPS)[:, None, None], tl.arange(0, K // 8)[None, :, None]
    start = (f * (D // K) + d) * (ROWS * K)
    return start + group * (128 * WARPS) + lane * 4 + tl.arange(0, 4)[None, None, :]


@triton.jit
def _load_held(p, f, D: tl.constexpr):
    """Tiles [W, F/W, D] of block `f` of what is held from `p` on."""
    K: tl.constexpr = _columns(D)
    x = ()
    for d in tl.static_range(D // K):
        tile = tl.reshape(tl.load(p + _held_tile(f, d, D)), [WARPS, 8, 4, 2, K // 8, 2])
        x += (tl.reshape(tl.permute(tile, (0, 3, 1, 4, 2, 5)), [WARPS, ROWS // WARPS, K]),)
    return x


@triton.jit
def _store_held(p, x, f, D: tl.constexpr):
    """The other way."""
    K: tl.constexpr = _columns(D)
    for d in tl.static_range(D // K):
        tile = tl.permute(tl.reshape(x[d], [WARPS, 2, 8, K // 8, 4, 2]), (0, 2, 4, 1, 3, 5))
        tl.store(p + _held_tile(f, d, D), tl.reshape(tile, [32 * WARPS, K // 8, 4]))


@triton.jit
def _hold(weights, at, p_w1, p_b1, p_w2, D: tl.constexpr):
    """Where a walk starts: w1^T, b1 and w2 of state `at` to where they are held; blocks b2 of D."""
    for f in range(D // 32):
        _store_held(p_w1, _load_tiles(weights.w1 + at * 4 * D * D, f, D, True), f, D)
        _store_held(p_w2, _load_tiles(weights.w2 + at * 4 * D * D, f, D), f, D)
        tl.store(p_b1 + _rows(f), tl.load(weights.b1 + at * 4 * D + _rows(f)))
    return _load_columns(weights.b2 + at * D, D)


@triton.jit
def _release(p_w1, p_b1, p_w2, b2, weights, at, D: tl.constexpr):
    """The other way."""
    tl.debug_barrier()
    for f in range(D // 32):
        _store_tiles(weights.w1 + at * 4 * D * D, _load_held(p_w1, f, D), f, D, True)
        _store_tiles(weights.w2 + at * 4 * D * D, _load_held(p_w2, f, D), f, D)
        tl.store(weights.b1 + at * 4 * D + _rows(f), tl.load(p_b1 + _rows(f)))
    _store_columns(weights.b2 + at * D, b2, D)


# --- Products of the tiles of one block of F ---


@triton.jit
def _of_warps(a, b, c, DTYPE: tl.constexpr):
    """c + a b, [W, F/W, N], of [W, F/W, K] and [K, N]: of single warps, or of warp groups where b is large."""
    if b.shape[0] * b.shape[1] < 64 * 64:
        c = matmul_add(a, everywhere(b, WARPS), c, DTYPE, "ieee")
    else:
        a, flat = tl.reshape(a, [ROWS, b.shape[0]]), tl.reshape(c, [ROWS, b.shape[1]])
        c = tl.reshape(matmul_add(a, b, flat, DTYPE, "ieee"), c.shape)
    return c


@triton.jit
def _along_columns(tiles, x, c, DTYPE: tl.constexpr, D: tl.constexpr):
    """c + w x^T, [W, F/W, M], of tiles [W, F/W, D] and blocks [M, D]."""
    K: tl.constexpr = _columns(D)
    for d in tl.static_range(D // K):
        c = _of_warps(tiles[d], tl.trans(x[d]), c, DTYPE)  # [F/W, D] @ [D, M] -> [F/W, M]
    return c


@triton.jit
def _add_outer(x, y, tiles, DTYPE: tl.constexpr, D: tl.constexpr):
    """w + x y, tiles [W, F/W, D], of [W, F/W, M] and blocks [M, D]."""
    K: tl.constexpr = _columns(D)
    w = ()
    for d in tl.static_range(D // K):
        w += (_of_warps(x, y[d], tiles[d], DTYPE),)  # [F/W, M] @ [M, D] -> [F/W, D]
    return w


@triton.jit
def _over_hidden(x, tiles, c, DTYPE: tl.constexpr, D: tl.constexpr):
    """c + x^T w, blocks [M, D], of [W, F/W, M] and tiles [W, F/W, D]: one block's part of the sum over F."""
    K: tl.constexpr = _columns(D)
    x, y = by_memory(x), ()
    for d in tl.static_range(D // K):
        y += (over_hidden(x, by_memory(nearest(tiles[d], DTYPE)), c[d], DTYPE, 1),)
    return y


# --- The inner gradient, of blocks [M, D] ---


@triton.jit
def _inner_gradient(z2, xv, xk, ln_weight, ln_bias, EPS: tl.constexpr, D: tl.constexpr):
    """As `mlp_trace.inner_gradient`; ln_weight and ln_bias are blocks [1, D]."""
    K: tl.constexpr = _columns(D)
    q, all_z2, all_q = (), tl.zeros_like(z2[0]), tl.zeros_like(z2[0])
    for d in tl.static_range(D // K):
        target = xv[d].to(tl.float32) - xk[d].to(tl.float32)
        q += (ln_weight[d] * (ln_bias[d] - target),)
        all_z2 += z2[d]
        all_q += q[d]
    sum_z2, sum_q = sum_2(all_z2, all_q)
    mean = sum_z2[:, None] * (1.0 / D)
    square, scaled, along, along_q = (tl.zeros_like(z2[0]),) * 4
    for d in tl.static_range(D // K):
        centred = z2[d] - mean
        gamma2_centred = ln_weight[d] * ln_weight[d] * centred
        square += centred * centred
        scaled += gamma2_centred
        along += gamma2_centred * centred
        along_q += q[d] * centred
    variance, mean1, mean2, mean_q = sum_4(square, scaled, along, along_q)
    rstd = tl.rsqrt(variance * (1.0 / D) + EPS)
    mean_p = (mean1 * rstd + sum_q) * (1.0 / D)
    along_p = (mean2 * rstd + mean_q) * rstd * (1.0 / D)
    g_z2, x_hats = (), ()
    for d in tl.static_range(D // K):
        x_hat = (z2[d] - mean) * rstd[:, None]
        p = ln_weight[d] * ln_weight[d] * x_hat + q[d]
        g_z2 += (rstd[:, None] * (p - mean_p[:, None] - x_hat * along_p[:, None]),)
        x_hats += (x_hat,)
    return g_z2, x_hats, rstd


@triton.jit(do_not_specialize=["start_states", "end_states", "first", "count"])
def recurrence_tiled(
    inputs, shared, start, end, trace, held, start_states, end_states, first, count, heads,
    D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """As `recurrence`."""
    K: tl.constexpr = _columns(D)
    F: tl.constexpr = 4 * D
    R: tl.constexpr = C // M
    DTYPE: tl.constexpr = inputs.xk.p.dtype.element_ty
    BLOCKS: tl.constexpr = D // 32  # of F
    SCALE: tl.constexpr = 16.0 if DTYPE.is_fp16() else 1.0  # keeps the small numbers lr g_z2 in the range of fp16
    chain = tl.program_id(0)
    batch, head = chain // heads, chain % heads
    eta_last = tl.load(shared.token_eta + M - 1)
    ln_weight = _load_columns(shared.ln_weight + head * D, D)
    ln_bias = _load_columns(shared.ln_bias + head * D, D)
    p_w1, p_b1, p_w2 = held.w1 + wide(chain) * F * D, held.b1 + wide(chain) * F, held.w2 + wide(chain) * F * D
    b2 = _hold(start, wide(chain) * start_states, p_w1, p_b1, p_w2, D)
    for n in range(count):
        chunk = wide(chain) * tl.cdiv(count, R) + n // R
        slot = chunk * R + n % R
        at_f, at_d = slot * F * M, slot * D * M
        ahead = first + tl.minimum(n + 1, count - 1)
        ask_for_tokens(inputs.xk, batch, head, ahead, M)
        ask_for_tokens(inputs.xv, batch, head, ahead, M)
        ask_for_tokens(inputs.lr, batch, head, ahead, M)
        xk = _load_tokens(inputs.xk, batch, head, first + n, M, D)
        nothing = tl.zeros([WARPS, ROWS // WARPS, M], tl.float32)
        tl.debug_barrier()  # the weights are there
        z2 = ()
        for d in tl.static_range(D // K):
            z2 += (tl.zeros([M, K], tl.float32) + b2[d][None, :],)
        w1 = _load_held(p_w1, 0, D)
        for f in range(BLOCKS):
            w2, b1 = _load_held(p_w2, f, D), tl.load(p_b1 + _rows(f))
            if n % R == 0:
                _store_tiles(trace.w1 + chunk * D * F, w1, f, D)
                tl.store(trace.b1 + chunk * F + _rows(f), b1)
                if not BACKWARD:
                    _store_tiles(trace.w2 + chunk * D * F, w2, f, D)
            if BACKWARD:
                _store_tiles(trace.w2 + slot * D * F, w2, f, D)
            z1 = _along_columns(w1, xk, nothing + b1[:, :, None], DTYPE, D)
            w1 = _load_held(p_w1, (f + 1) % BLOCKS, D)  # shortly before its use it would be waited for
            _store_hidden(trace.z1 + at_f, z1, f, M)
            z2 = _over_hidden(nearest(gelu(z1), DTYPE), w2, z2, DTYPE, D)
        if n % R == 0:
            _store_columns(trace.b2 + chunk * D, b2, D)

        w2 = _load_held(p_w2, 0, D)
        xv = _load_tokens(inputs.xv, batch, head, first + n, M, D)
        lr = tl.load(pointers_apart(inputs.lr, batch, head, first + n, M)).to(tl.float32)
        eta_lr = -eta_last * lr
        g_z2, x_hat, rstd = _inner_gradient(z2, xv, xk, ln_weight, ln_bias, EPS, D)
        _store_narrow(trace.g_z2 + at_d, g_z2, M, D)
        if BACKWARD:
            _store_narrow(trace.x_hat + at_d, x_hat, M, D)
            tl.store(trace.rstd + chunk * C + n % R * M + token(M), rstd)

        rounded_g_z2, lr_g_z2, scaled_xk, new_b2 = (), (), (), ()
        for d in tl.static_range(D // K):
            rounded_g_z2 += (nearest(g_z2[d], DTYPE),)
            lr_g_z2 += (nearest(SCALE * eta_lr[:, None] * g_z2[d], DTYPE),)
            scaled_xk += (nearest(xk[d].to(tl.float32) * (1 / SCALE), DTYPE),)
            new_b2 += (b2[d] + tl.sum(eta_lr[:, None] * g_z2[d], 0),)
        b2 = new_b2
        for f in range(BLOCKS):
            b1 = tl.load(p_b1 + _rows(f))
            g_x2 = _along_columns(w2, rounded_g_z2, nothing, DTYPE, D)
            _store_hidden(trace.g_x2 + at_f, g_x2, f, M)
            x2, slope = gelu_first(_along_columns(w1, xk, nothing + b1[:, :, None], DTYPE, D))
            w2 = _add_outer(nearest(x2 * (1 / SCALE), DTYPE), lr_g_z2, w2, DTYPE, D)
            _store_held(p_w2, w2, f, D)
            w2 = _load_held(p_w2, (f + 1) % BLOCKS, D)
            lr_g_z1 = eta_lr[None, None, :] * g_x2 * slope
            tl.store(p_b1 + _rows(f), b1 + tl.sum(lr_g_z1, 2))
            w1 = _add_outer(nearest(lr_g_z1 * SCALE, DTYPE), scaled_xk, w1, DTYPE, D)
            _store_held(p_w1, w1, f, D)
            w1 = _load_held(p_w1, (f + 1) % BLOCKS, D)
    _release(p_w1, p_b1, p_w2, b2, end, wide(chain) * end_states, D)


@triton.jit
def _second_order(d_g_z2, x_hat, p, rstd, mean_p, along_p, mean1, mean2, ln_weight, mean_gamma2, D: tl.constexpr):
    """As `mlp_scan.second_order`, of blocks [M, D]."""
    K: tl.constexpr = _columns(D)
    a, b, c, e, g = (tl.zeros_like(d_g_z2[0]),) * 5
    for d in tl.static_range(D // K):
        scaled = ln_weight[d] * ln_weight[d] * d_g_z2[d]
        a += d_g_z2[d]
        b += d_g_z2[d] * x_hat[d]
        c += d_g_z2[d] * p[d]
        e += scaled
        g += scaled * x_hat[d]
    mean, along, with_p, mean_s, along_s = sum_5(a, b, c, e, g)
    mean, along = mean * (1.0 / D), along * (1.0 / D)
    through_rstd = with_p * (1.0 / D) - mean_p * mean - along_p * along
    mean_x = mean_s * (1.0 / D) - mean * mean_gamma2 - along * mean1 - along_p * mean - along * mean_p
    along_x = along_s * (1.0 / D) - mean * mean1 - along * mean2 - 2 * along_p * along
    d_z2 = ()
    for d in tl.static_range(D // K):
        d_x_hat = ln_weight[d] * ln_weight[d] * (d_g_z2[d] - mean[:, None] - x_hat[d] * along[:, None])
        d_x_hat -= along_p[:, None] * d_g_z2[d] + along[:, None] * p[d]
        d_x_hat -= mean_x[:, None] + x_hat[d] * (along_x + through_rstd)[:, None]
        d_z2 += ((rstd * rstd)[:, None] * d_x_hat,)
    return d_z2


@triton.jit(do_not_specialize=["first", "count"])
def scan_tiled(
    inputs, shared, trace, pulled, start, end, walked, held, first, count, heads,
    D: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """As `scan`."""
    K: tl.constexpr = _columns(D)
    F: tl.constexpr = 4 * D
    R: tl.constexpr = C // M
    BLOCKS: tl.constexpr = D // 32  # of F
    DTYPE: tl.constexpr = inputs.xk.p.dtype.element_ty
    chain = tl.program_id(0)
    batch, head = chain // heads, chain % heads
    eta_last = tl.load(shared.token_eta + M - 1)
    ln_weight = _load_columns(shared.ln_weight + head * D, D)
    gamma2 = 0.0
    for d in tl.static_range(D // K):
        gamma2 += tl.sum(ln_weight[d] * ln_weight[d])
    p_d_w1, p_d_b1, p_d_w2 = held.w1 + wide(chain) * F * D, held.b1 + wide(chain) * F, held.w2 + wide(chain) * F * D
    d_b2 = _hold(start, wide(chain), p_d_w1, p_d_b1, p_d_w2, D)
    for back in range(count):
        n = count - 1 - back
        chunk = wide(chain) * tl.cdiv(count, R) + n // R
        slot = chunk * R + n % R
        p_w2 = trace.w2 + slot * D * F
        if n % R == R - 1 and n >= R:  # what the next chunk reads, while this one is computed
            ask_for_chunk(trace, pulled, chunk - 1, D, C)
        if n > 0:
            ask_for(p_w2 - D * F, D * F // 64)
        at_f, at_d = slot * F * M, slot * D * M
        at = chunk * C + n % R * M + token(M)
        xk = _load_tokens(inputs.xk, batch, head, first + n, M, D)
        eta_lr = eta_last * tl.load(pointers_apart(inputs.lr, batch, head, first + n, M)).to(tl.float32)

        nothing = tl.zeros([WARPS, ROWS // WARPS, M], tl.float32)
        pulled2, through_w2 = (), ()
        for d in tl.static_range(D // K):
            pulled2 += (tl.zeros([M, K], tl.float32) + d_b2[d][None, :],)
            through_w2 += (tl.zeros([M, K], tl.float32),)
        tl.debug_barrier()  # the cotangents are there
        d_w1 = _load_held(p_d_w1, 0, D)
        for f in range(BLOCKS):
            d_w2, w2, d_b1 = _load_held(p_d_w2, f, D), _load_tiles(p_w2, f, D), tl.load(p_d_b1 + _rows(f))
            if n % R == R - 1:
                _store_tiles(walked.d_w1 + chunk * D * F, d_w1, f, D)
                tl.store(walked.d_b1 + chunk * F + _rows(f), d_b1)
            pulled1 = _along_columns(d_w1, xk, nothing + d_b1[:, :, None], DTYPE, D)
            d_w1 = _load_held(p_d_w1, (f + 1) % BLOCKS, D)
            d_g_z1 = _load_hidden(pulled.d_g_z1 + at_f, f, M).to(tl.float32) - eta_lr[None, None, :] * pulled1
            d_g_x2 = nearest(d_g_z1 * _load_hidden(pulled.slope + at_f, f, M).to(tl.float32), DTYPE)
            pulled2 = _over_hidden(_load_hidden(pulled.x2 + at_f, f, M), d_w2, pulled2, DTYPE, D)
            through_w2 = _over_hidden(d_g_x2, w2, through_w2, DTYPE, D)
        _store_narrow(walked.pulled2 + at_d, pulled2, M, D)
        direct = _load_narrow(pulled.d_g_z2 + at_d, M, D)
        d_g_z2 = ()
        for d in tl.static_range(D // K):
            d_g_z2 += (direct[d] - eta_lr[:, None] * pulled2[d] + through_w2[d],)
        _store_narrow(walked.d_g_z2 + at_d, d_g_z2, M, D)

        d_z2 = _second_order(
            d_g_z2, _load_narrow(trace.x_hat + at_d, M, D), _load_narrow(pulled.p + at_d, M, D),
            tl.load(trace.rstd + at), tl.load(pulled.mean_p + at), tl.load(pulled.along_p + at),
            tl.load(pulled.mean1 + at), tl.load(pulled.mean2 + at), ln_weight, gamma2 * (1.0 / D), D,
        )  # fmt: skip
        g_z2 = _load_narrow(trace.g_z2 + at_d, M, D)
        rounded_d_z2, new_b2 = (), ()
        for d in tl.static_range(D // K):
            rounded_d_z2 += (nearest(d_z2[d], DTYPE),)
            new_b2 += (d_b2[d] + tl.sum(d_z2[d], 0),)
        d_w2 = _load_held(p_d_w2, 0, D)
        for f in range(BLOCKS):
            d_b1 = tl.load(p_d_b1 + _rows(f))
            through_lr = _along_columns(d_w2, g_z2, nothing, DTYPE, D)
            d_x2 = _load_hidden(pulled.d_x2 + at_f, f, M).to(tl.float32) - eta_lr[None, None, :] * through_lr
            d_x2 = _along_columns(_load_tiles(p_w2, f, D), rounded_d_z2, d_x2, DTYPE, D)
            pulled1 = _along_columns(d_w1, xk, nothing + d_b1[:, :, None], DTYPE, D)
            d_g_z1 = _load_hidden(pulled.d_g_z1 + at_f, f, M).to(tl.float32) - eta_lr[None, None, :] * pulled1
            slope = _load_hidden(pulled.slope + at_f, f, M).to(tl.float32)
            d_z1 = d_x2 * slope + d_g_z1 * _load_hidden(pulled.curve + at_f, f, M).to(tl.float32)
            d_b1 += tl.sum(d_z1, 2)
            d_z1 = nearest(d_z1, DTYPE)
            _store_hidden(walked.d_z1 + at_f, d_z1, f, M)
            d_w2 = _add_outer(_load_hidden(pulled.x2 + at_f, f, M), rounded_d_z2, d_w2, DTYPE, D)
            d_w2 = _add_outer(nearest(d_g_z1 * slope, DTYPE), g_z2, d_w2, DTYPE, D)
            if n % R == 0:
                d_w2 = _add_tiles(pulled.d_w2 + chunk * D * F, d_w2, f, D)
            _store_held(p_d_w2, d_w2, f, D)
            d_w2 = _load_held(p_d_w2, (f + 1) % BLOCKS, D)
            d_w1 = _add_outer(d_z1, xk, d_w1, DTYPE, D)
            if n % R == 0:
                d_w1 = _add_tiles(pulled.d_w1 + chunk * D * F, d_w1, f, D)
                d_b1 += tl.load(pulled.d_b1 + chunk * F + _rows(f))
            tl.store(p_d_b1 + _rows(f), d_b1)
            _store_held(p_d_w1, d_w1, f, D)
            d_w1 = _load_held(p_d_w1, (f + 1) % BLOCKS, D)
        if n % R == 0:
            given, sum_b2 = _load_columns(pulled.d_b2 + chunk * D, D), ()
            for d in tl.static_range(D // K):
                sum_b2 += (new_b2[d] + given[d],)
            new_b2 = sum_b2
        d_b2 = new_b2
    _release(p_d_w1, p_d_b1, p_d_w2, d_b2, end, wide(chain), D)
