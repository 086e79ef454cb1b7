"""TTT-MLP in Triton, forward and backward: one program a chain, the fast weights in global memory.

The maths, names and roundings are those of `implementations/torch/ttt_mlp.py`; read that page first. One (batch, head)
is a chain of mini-batches, and one program walks it. Its fast weights are 2 x D x F fp32 numbers, 128 KB at D = 64:
more than the registers of a program have room for beside its products. So they stay in a record in global memory, where
the L2 cache holds them (128 chains: 17 MB), and every mini-batch walks the hidden axis F in blocks of BF:

    forward   1. z2 = sum over f of gelu(xk w1[:, f] + b1[f]) w2[f, :] + b2, then g_z2 through the LayerNorm
              2. the update of block f, and the read-out through it: z2_bar, and attn2 = tril(x2_bar x2^T + 1)
    backward  1., 2. as above, without the update
              3. the second layer's read-out and both updates, backwards: all that d_g_z2 needs, a part of d_w and d_z1
              4. what d_z2, from the second order through the LayerNorm, adds to d_z1, d_w1, d_w2 and d_xk

The forward saves the fast weights of every `group`-th mini-batch (`saved_bytes` says what that takes); the backward
walks the groups from the last to the first and computes the weights inside a group again.

Memory that a program writes and reads again is its own, never another's. Within the program, threads read what other
threads wrote, so between a write and a read of one place, in either order, stands a barrier (`tl.debug_barrier`, which
also orders global memory among the threads of a block), and no pass writes the records that it reads:

    forward, recomputing   reads the state of mini-batch n, writes that of n + 1, in another slot
    backward, pass 3       reads `d_state`, writes `partial` and `d_z1`
    backward, pass 4       reads `partial` and `d_z1`, writes `d_state`

with a barrier after each. Sums over batch and time: partial sums of each program, then one sum in torch; no atomics.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from implementations.kernels import ARCHITECTURES, TritonKernel
from implementations.triton.launch import assembled
from implementations.triton.mlp_blocks import (
    INTERPRETED,
    cast,
    copy_record,
    dot,
    gelu,
    gelu_first,
    gelu_second,
    inner_gradient_backward,
    load_b2,
    load_block,
    normalise,
    project,
    record,
    store_b2,
    store_block,
    store_tokens,
    tokens,
)
from implementations.triton.mlp_limits import newer_ptxas, supports
from spec.problem import Problem
from spec.tensors import INPUTS, OUTPUTS, MlpInputs, MlpOutputs, validate

# --- Forward ---


@triton.jit
def _per_token(p_x, first, stride, M: tl.constexpr, BM: tl.constexpr):
    """One number of each token of a mini-batch, [BM] in fp32; 0 in padded rows."""
    m = tl.arange(0, BM)
    return tl.load(p_x + (first + m.to(tl.int64)) * stride, mask=m < M, other=0.0).to(tl.float32)


@triton.jit
def _inner_gradient(
    p_w, hidden, b_xk, b_xv, b_gamma, b_beta,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, EPS: tl.constexpr, MATMUL: tl.constexpr,
):  # fmt: skip
    """Pass 1: g_z2 [BM BD] and the LayerNorm that it went through, x_hat [BM BD] and rstd [BM 1]."""
    b_z2 = tl.zeros([BM, BD], tl.float32)
    for f in range(0, hidden, BF):
        b_w1, b_b1, b_w2 = load_block(p_w, f, D, BD, BF)
        b_x2 = gelu(dot(b_xk, b_w1, MATMUL) + b_b1[None, :])  # [M D] @ [D BF] -> [M BF]
        b_z2 += dot(b_x2, b_w2, MATMUL)  # [M BF] @ [BF D] -> [M D]
    b_z2 += load_b2(p_w, D, BD)[None, :]
    b_x_hat, b_rstd = normalise(b_z2, EPS, D, BD)
    b_error = b_gamma * b_x_hat + b_beta - (b_xv.to(tl.float32) - b_xk.to(tl.float32))
    return project(b_error * b_gamma, b_x_hat, b_rstd, D, BD), b_x_hat, b_rstd


@triton.jit
def _update_and_read(
    p_w, p_new, hidden, b_xq, b_xk, b_lr, eta_last, b_g_z2, b_read1, b_causal,
    UPDATE: tl.constexpr, READ: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, MATMUL: tl.constexpr,
):  # fmt: skip
    """Pass 2: the new weights at `p_new` if UPDATE, z2_bar [BM BD] without attention and attn2 [BM BM] if READ."""
    b_z2_bar = tl.zeros([BM, BD], tl.float32)
    b_attn2 = tl.zeros([BM, BM], tl.float32)
    b_b2 = load_b2(p_w, D, BD)
    b_new_b2 = b_b2 - eta_last * tl.sum(b_lr[:, None] * b_g_z2, 0)
    for f in range(0, hidden, BF):
        b_w1, b_b1, b_w2 = load_block(p_w, f, D, BD, BF)
        b_z1 = dot(b_xk, b_w1, MATMUL) + b_b1[None, :]
        b_x2, b_slope = gelu_first(b_z1)
        b_g_z1 = dot(b_g_z2, tl.trans(b_w2), MATMUL) * b_slope  # [M D] @ [D BF] -> [M BF]
        if READ and CAUSAL:
            b_z1_bar = dot(b_xq, b_w1, MATMUL) + b_b1[None, :] - dot(b_read1, b_g_z1, MATMUL)
            b_x2_bar = gelu(b_z1_bar)
            b_attn2 += dot(b_x2_bar, tl.trans(b_x2), MATMUL)  # [M BF] @ [BF M] -> [M M]
            b_z2_bar += dot(b_x2_bar, b_w2, MATMUL)
        if UPDATE or not CAUSAL:
            b_w1 -= eta_last * dot(tl.trans(b_lr[:, None] * b_xk.to(tl.float32)), b_g_z1, MATMUL)
            b_b1 -= eta_last * tl.sum(b_lr[:, None] * b_g_z1, 0)
            b_w2 -= eta_last * dot(tl.trans(b_lr[:, None] * b_x2), b_g_z2, MATMUL)
        if UPDATE:
            store_block(p_new, f, b_w1, b_b1, b_w2, D, BD, BF)
        if READ and not CAUSAL:
            b_x2_bar = gelu(dot(b_xq, b_w1, MATMUL) + b_b1[None, :])
            b_z2_bar += dot(b_x2_bar, b_w2, MATMUL)
    if UPDATE:
        store_b2(p_new, b_new_b2, D, BD)
    b_attn2 = tl.where(b_causal, b_attn2 + 1, 0.0)
    return b_z2_bar + (b_b2 if CAUSAL else b_new_b2)[None, :], b_attn2


@triton.jit
def _slot(n, mini_batches, group):
    """Where state n is: in slot n / group, saved, if that divides; else in one of two slots behind those in turn."""
    saved = (mini_batches + group - 1) // group
    return tl.where((n % group == 0) & (n < mini_batches), n // group, saved + n % 2).to(tl.int64)


@triton.jit
def forward_kernel(
    p_xq, p_xk, p_xv, p_lr, p_token_eta, p_ln_weight, p_ln_bias, p_states, p_out,
    heads, mini_batches, group, hidden,
    xq_b, xq_t, xq_h, xk_b, xk_t, xk_h, xv_b, xv_t, xv_h, lr_b, lr_t, lr_h,
    M: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
    CAUSAL: tl.constexpr, EPS: tl.constexpr, MATMUL: tl.constexpr,
):  # fmt: skip
    """Chain `program_id(0)`: out, and its states, each in its `_slot`; the first is there."""
    SIZE: tl.constexpr = 8 * D * D + 5 * D
    chain = tl.program_id(0).to(tl.int64)
    batch, head = chain // heads, chain % heads
    slots = (mini_batches + group - 1) // group + 2
    p_xq += batch * xq_b + head * xq_h
    p_xk += batch * xk_b + head * xk_h
    p_xv += batch * xv_b + head * xv_h
    p_lr += batch * lr_b + head * lr_h
    p_out += (batch * mini_batches * M * heads + head) * D
    p_states += chain * slots * SIZE
    d, m = tl.arange(0, BD), tl.arange(0, BM)
    b_gamma = tl.load(p_ln_weight + head * D + d, mask=d < D, other=0.0)[None, :]
    b_beta = tl.load(p_ln_bias + head * D + d, mask=d < D, other=0.0)[None, :]
    b_token_eta = tl.load(p_token_eta + m, mask=m < M, other=0.0)
    eta_last = tl.load(p_token_eta + M - 1)
    b_causal = m[:, None] >= m[None, :]

    for n in range(mini_batches):
        p_w = p_states + _slot(n, mini_batches, group) * SIZE
        p_new = p_states + _slot(n + 1, mini_batches, group) * SIZE
        first = n * M
        b_xq = tokens(p_xq, first, xq_t, M, BM, D, BD)
        b_xk = tokens(p_xk, first, xk_t, M, BM, D, BD)
        b_xv = tokens(p_xv, first, xv_t, M, BM, D, BD)
        b_lr = _per_token(p_lr, first, lr_t, M, BM)

        b_g_z2, _, _ = _inner_gradient(p_w, hidden, b_xk, b_xv, b_gamma, b_beta, D, BM, BD, BF, EPS, MATMUL)
        b_eta = b_token_eta[:, None] * b_lr[None, :]
        b_read1 = tl.where(b_causal, (dot(b_xq, tl.trans(b_xk), MATMUL) + 1) * b_eta, 0.0)
        b_z2_bar, b_attn2 = _update_and_read(
            p_w, p_new, hidden, b_xq, b_xk, b_lr, eta_last, b_g_z2, b_read1, b_causal,
            True, True, CAUSAL, D, BM, BD, BF, MATMUL,
        )  # fmt: skip
        if CAUSAL:
            b_z2_bar -= dot(b_eta * b_attn2, b_g_z2, MATMUL)
        b_x_hat, _ = normalise(b_z2_bar, EPS, D, BD)
        store_tokens(p_out, b_xq.to(tl.float32) + b_gamma * b_x_hat + b_beta, first, heads * D, M, BM, D, BD)
        tl.debug_barrier()  # the next mini-batch reads what other threads wrote in p_new, and writes where p_w was


# --- Backward ---


@triton.jit
def _state(p_saved, p_work, n, group, SIZE: tl.constexpr):
    """Where state n is while its group is walked: saved if it starts the group, else computed again."""
    p_w = p_work + (n % group - 1) * SIZE
    if n % group == 0:
        p_w = p_saved + (n // group) * SIZE
    return p_w


@triton.jit
def _pass_three(
    p_w, p_new, p_d_state, p_partial, p_d_z1, hidden, b_xq, b_xk, b_lr, eta_last, b_g_z2, b_d_z2_bar, b_read1,
    b_d_attn2, b_d_g_z2,
    CAUSAL: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, MATMUL: tl.constexpr,
):  # fmt: skip
    """Pass 3: (d_g_z2, d_xq, g_z1 d_w1^T, x2 d_w2 [BM BD], d_scores1 [BM BM], sum of g_z1 (xk d_w1 + d_b1) [BM])."""
    b_d_xq = tl.zeros([BM, BD], tl.float32)
    b_pulled_xk = tl.zeros([BM, BD], tl.float32)
    b_pulled2 = tl.zeros([BM, BD], tl.float32)
    b_d_scores1 = tl.zeros([BM, BM], tl.float32)
    b_along1 = tl.zeros([BM], tl.float32)
    for f in range(0, hidden, BF):
        # The forward again, of this block.
        b_w1, b_b1, b_w2 = load_block(p_w, f, D, BD, BF)
        b_d_w1, b_d_b1, b_d_w2 = load_block(p_d_state, f, D, BD, BF)
        b_z1 = dot(b_xk, b_w1, MATMUL) + b_b1[None, :]
        b_x2, b_slope, b_bend = gelu_second(b_z1)
        b_g_x2 = dot(b_g_z2, tl.trans(b_w2), MATMUL)
        b_g_z1 = b_g_x2 * b_slope

        # The read-out, second layer then first: into the old weights (causal) or the new ones (not causal).
        if CAUSAL:
            b_z1_bar = dot(b_xq, b_w1, MATMUL) + b_b1[None, :] - dot(b_read1, b_g_z1, MATMUL)
            b_x2_bar, b_slope_bar = gelu_first(b_z1_bar)
            b_d_x2_bar = dot(b_d_z2_bar, tl.trans(b_w2), MATMUL) + dot(b_d_attn2, b_x2, MATMUL)
            b_d_z1_bar = b_d_x2_bar * b_slope_bar
            b_d_xq += dot(b_d_z1_bar, tl.trans(b_w1), MATMUL)
            b_d_scores1 -= dot(b_d_z1_bar, tl.trans(b_g_z1), MATMUL)
            b_d_x2 = dot(tl.trans(b_d_attn2), b_x2_bar, MATMUL)
            b_d_g_z1 = -dot(tl.trans(b_read1), b_d_z1_bar, MATMUL)
        else:
            b_new_w1, b_new_b1, b_new_w2 = load_block(p_new, f, D, BD, BF)
            b_x2_bar, b_slope_bar = gelu_first(dot(b_xq, b_new_w1, MATMUL) + b_new_b1[None, :])
            b_d_z1_bar = dot(b_d_z2_bar, tl.trans(b_new_w2), MATMUL) * b_slope_bar
            b_d_xq += dot(b_d_z1_bar, tl.trans(b_new_w1), MATMUL)
            b_d_x2 = tl.zeros([BM, BF], tl.float32)
            b_d_g_z1 = tl.zeros([BM, BF], tl.float32)
        b_read_w1 = b_d_w1 + dot(tl.trans(b_xq), b_d_z1_bar, MATMUL)
        b_read_b1 = b_d_b1 + tl.sum(b_d_z1_bar, 0)
        b_read_w2 = dot(tl.trans(b_x2_bar), b_d_z2_bar, MATMUL)
        if not CAUSAL:  # what was read are the updated weights: the update pulls back these cotangents too
            b_read_w2 += b_d_w2
            b_d_w1, b_d_b1, b_d_w2 = b_read_w1, b_read_b1, b_read_w2

        # The updates of both layers.
        b_pulled1 = dot(b_xk, b_d_w1, MATMUL) + b_d_b1[None, :]
        b_along1 += tl.sum(b_g_z1 * b_pulled1, 1)
        b_d_g_z1 -= eta_last * b_lr[:, None] * b_pulled1
        b_pulled_xk += dot(b_g_z1, tl.trans(b_d_w1), MATMUL)
        b_pulled2 += dot(b_x2, b_d_w2, MATMUL)
        b_d_x2 -= eta_last * b_lr[:, None] * dot(b_g_z2, tl.trans(b_d_w2), MATMUL)

        # g_z1 = (g_z2 w2^T) * gelu'(z1)
        b_d_g_x2 = b_d_g_z1 * b_slope
        b_d_g_z2 += dot(b_d_g_x2, b_w2, MATMUL)
        b_read_w2 += dot(tl.trans(b_d_g_x2), b_g_z2, MATMUL)
        if CAUSAL:
            b_read_w2 += b_d_w2  # once, and last: in fp32 every addition to it rounds
        store_block(p_partial, f, b_read_w1, b_read_b1, b_read_w2, D, BD, BF)
        p_block = p_d_z1 + tl.arange(0, BM)[:, None] * (4 * D) + f + tl.arange(0, BF)[None, :]
        tl.store(p_block, b_d_x2 * b_slope + b_d_g_z1 * b_g_x2 * b_bend)
    return b_d_g_z2, b_d_xq, b_pulled_xk, b_pulled2, b_d_scores1, b_along1


@triton.jit
def _pass_four(
    p_w, p_d_state, p_partial, p_d_z1, hidden, b_xk, b_d_z2,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, MATMUL: tl.constexpr,
):  # fmt: skip
    """Pass 4: the new d_w1, d_b1, d_w2 at `p_d_state`, and d_z1 w1^T [BM BD]."""
    b_d_xk = tl.zeros([BM, BD], tl.float32)
    for f in range(0, hidden, BF):
        b_w1, b_b1, b_w2 = load_block(p_w, f, D, BD, BF)
        b_d_w1, b_d_b1, b_d_w2 = load_block(p_partial, f, D, BD, BF)
        b_x2, b_slope = gelu_first(dot(b_xk, b_w1, MATMUL) + b_b1[None, :])
        b_d_z1 = tl.load(p_d_z1 + tl.arange(0, BM)[:, None] * (4 * D) + f + tl.arange(0, BF)[None, :])
        b_d_z1 += dot(b_d_z2, tl.trans(b_w2), MATMUL) * b_slope
        b_d_xk += dot(b_d_z1, tl.trans(b_w1), MATMUL)
        b_d_w1 += dot(tl.trans(b_xk), b_d_z1, MATMUL)
        b_d_b1 += tl.sum(b_d_z1, 0)
        b_d_w2 += dot(tl.trans(b_x2), b_d_z2, MATMUL)
        store_block(p_d_state, f, b_d_w1, b_d_b1, b_d_w2, D, BD, BF)
    return b_d_xk


@triton.jit
def backward_kernel(
    p_xq, p_xk, p_xv, p_lr, p_token_eta, p_ln_weight, p_ln_bias, p_states, p_d_out,
    p_d_xq, p_d_xk, p_d_xv, p_d_lr, p_sums, p_work,
    heads, mini_batches, group, hidden,
    xq_b, xq_t, xq_h, xk_b, xk_t, xk_h, xv_b, xv_t, xv_h, lr_b, lr_t, lr_h, d_out_b, d_out_t, d_out_h,
    M: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
    CAUSAL: tl.constexpr, EPS: tl.constexpr, MATMUL: tl.constexpr,
):  # fmt: skip
    """Chain `program_id(0)`: gradients of its tokens, of its first state, and its part of the parameters'.

    `p_work` has for each chain the record d_state, the record partial, d_z1 [BM F] and `group` states; `p_sums`
    token_eta [M], ln_weight [D], ln_bias [D].
    """
    SIZE: tl.constexpr = 8 * D * D + 5 * D
    chain = tl.program_id(0).to(tl.int64)
    batch, head = chain // heads, chain % heads
    groups = (mini_batches + group - 1) // group
    p_xq += batch * xq_b + head * xq_h
    p_xk += batch * xk_b + head * xk_h
    p_xv += batch * xv_b + head * xv_h
    p_lr += batch * lr_b + head * lr_h
    p_d_out += batch * d_out_b + head * d_out_h
    own = batch * mini_batches * M * heads + head
    p_d_xq += own * D
    p_d_xk += own * D
    p_d_xv += own * D
    p_d_lr += own
    p_saved = p_states + chain * (groups + 2) * SIZE
    p_d_state = p_work + chain * ((group + 2) * SIZE + BM * 4 * D)
    p_partial = p_d_state + SIZE
    p_d_z1 = p_partial + SIZE
    p_inside = p_d_z1 + BM * 4 * D
    d, m = tl.arange(0, BD), tl.arange(0, BM)
    b_gamma = tl.load(p_ln_weight + head * D + d, mask=d < D, other=0.0)[None, :]
    b_beta = tl.load(p_ln_bias + head * D + d, mask=d < D, other=0.0)[None, :]
    b_token_eta = tl.load(p_token_eta + m, mask=m < M, other=0.0)
    eta_last = tl.load(p_token_eta + M - 1)
    b_causal = m[:, None] >= m[None, :]
    b_d_token_eta = tl.zeros([BM], tl.float32)
    b_d_gamma = tl.zeros([BD], tl.float32)
    b_d_beta = tl.zeros([BD], tl.float32)

    for k in range(groups):
        start = (groups - 1 - k) * group
        end = tl.minimum(start + group, mini_batches)

        # The states inside the group; who reads updated weights needs one more.
        for n in range(start, end - 1 if CAUSAL else end):
            p_w = _state(p_saved, p_inside, n, group, SIZE)
            b_xk = tokens(p_xk, n * M, xk_t, M, BM, D, BD)
            b_xv = tokens(p_xv, n * M, xv_t, M, BM, D, BD)
            b_lr = _per_token(p_lr, n * M, lr_t, M, BM)
            b_g_z2, _, _ = _inner_gradient(p_w, hidden, b_xk, b_xv, b_gamma, b_beta, D, BM, BD, BF, EPS, MATMUL)
            _update_and_read(
                p_w, p_inside + (n - start) * SIZE, hidden, b_xk, b_xk, b_lr, eta_last, b_g_z2, b_causal, b_causal,
                True, False, CAUSAL, D, BM, BD, BF, MATMUL,
            )  # fmt: skip
            tl.debug_barrier()  # the next one reads what other threads wrote

        for i in range(start, end):
            n = end - 1 - (i - start)
            first = n * M
            p_w = _state(p_saved, p_inside, n, group, SIZE)
            p_new = p_inside + (n - start) * SIZE
            b_xq = tokens(p_xq, first, xq_t, M, BM, D, BD)
            b_xk = tokens(p_xk, first, xk_t, M, BM, D, BD)
            b_xv = tokens(p_xv, first, xv_t, M, BM, D, BD)
            b_lr = _per_token(p_lr, first, lr_t, M, BM)
            b_d_out = tokens(p_d_out, first, d_out_t, M, BM, D, BD).to(tl.float32)
            b_eta = b_token_eta[:, None] * b_lr[None, :]
            b_lr_rows = b_lr[:, None]

            # The forward again, up to the read-out.
            b_g_z2, b_x_hat, b_rstd = _inner_gradient(
                p_w, hidden, b_xk, b_xv, b_gamma, b_beta, D, BM, BD, BF, EPS, MATMUL
            )  # fmt: skip
            b_read1 = tl.where(b_causal, (dot(b_xq, tl.trans(b_xk), MATMUL) + 1) * b_eta, 0.0)
            if CAUSAL:
                b_z2_bar, b_attn2 = _update_and_read(
                    p_w, p_w, hidden, b_xq, b_xk, b_lr, eta_last, b_g_z2, b_read1, b_causal,
                    False, True, CAUSAL, D, BM, BD, BF, MATMUL,
                )  # fmt: skip
                b_z2_bar -= dot(b_eta * b_attn2, b_g_z2, MATMUL)
            else:
                b_z2_bar = _read_new(p_new, hidden, b_xq, D, BM, BD, BF, MATMUL)

            # out = xq + LN(z2_bar)
            b_x_hat_bar, b_rstd_bar = normalise(b_z2_bar, EPS, D, BD)
            b_d_z2_bar = project(b_d_out * b_gamma, b_x_hat_bar, b_rstd_bar, D, BD)
            b_d_gamma += tl.sum(b_d_out * b_x_hat_bar, 0)
            b_d_beta += tl.sum(b_d_out, 0)

            # The second layer's attention; scores are eta * attn.
            b_d_b2 = load_b2(p_d_state, D, BD)
            b_read_b2 = b_d_b2 + tl.sum(b_d_z2_bar, 0)
            if CAUSAL:
                b_d_scores2 = -tl.where(b_causal, dot(b_d_z2_bar, tl.trans(b_g_z2), MATMUL), 0.0)
                b_d_eta = b_d_scores2 * b_attn2
                b_d_lr = tl.sum(b_d_eta * b_token_eta[:, None], 0)
                b_d_token_eta += tl.sum(b_d_eta * b_lr[None, :], 1)
                b_d_attn2 = b_d_scores2 * b_eta
                b_d_g_z2 = -dot(tl.trans(b_eta * b_attn2), b_d_z2_bar, MATMUL)
            else:
                b_d_b2 = b_read_b2
                b_d_lr = tl.zeros([BM], tl.float32)
                b_d_attn2 = tl.zeros([BM, BM], tl.float32)
                b_d_g_z2 = tl.zeros([BM, BD], tl.float32)

            b_d_g_z2, b_d_xq, b_pulled_xk, b_pulled2, b_d_scores1, b_along = _pass_three(
                p_w, p_new, p_d_state, p_partial, p_d_z1, hidden,
                b_xq, b_xk, b_lr, eta_last, b_g_z2, b_d_z2_bar, b_read1, b_d_attn2, b_d_g_z2,
                CAUSAL, D, BM, BD, BF, MATMUL,
            )  # fmt: skip
            # Loaded or computed again, so that no register holds them through pass 3.
            b_d_xq += tokens(p_d_out, first, d_out_t, M, BM, D, BD).to(tl.float32)
            b_d_xk = -eta_last * b_lr_rows * b_pulled_xk
            if CAUSAL:
                b_xq, b_xk = tokens(p_xq, first, xq_t, M, BM, D, BD), tokens(p_xk, first, xk_t, M, BM, D, BD)
                b_d_scores1 = tl.where(b_causal, b_d_scores1, 0.0)
                b_d_eta = b_d_scores1 * (dot(b_xq, tl.trans(b_xk), MATMUL) + 1)
                b_d_lr += tl.sum(b_d_eta * b_token_eta[:, None], 0)
                b_d_token_eta += tl.sum(b_d_eta * b_lr[None, :], 1)
                b_d_attn1 = b_d_scores1 * b_eta
                b_d_xq += dot(b_d_attn1, b_xk, MATMUL)
                b_d_xk += dot(tl.trans(b_d_attn1), b_xq, MATMUL)
            b_pulled2 += b_d_b2[None, :]
            b_along += tl.sum(b_g_z2 * b_pulled2, 1)
            b_d_lr -= eta_last * b_along
            b_d_token_eta -= tl.where(m == M - 1, tl.sum(b_lr * b_along, 0), 0.0)
            b_d_g_z2 -= eta_last * b_lr_rows * b_pulled2

            # The inner gradient, second order: g_z2 depends on z2, on xv - xk and on the LayerNorm's parameters.
            b_xv = tokens(p_xv, first, xv_t, M, BM, D, BD)
            b_target = b_xv.to(tl.float32) - b_xk.to(tl.float32)
            b_d_z2, b_d_error, b_d_gamma_rows = inner_gradient_backward(
                b_d_g_z2, b_g_z2, b_x_hat, b_rstd, b_target, b_gamma, b_beta, D, BD
            )  # fmt: skip
            b_d_gamma += tl.sum(b_d_gamma_rows, 0)
            b_d_beta += tl.sum(b_d_error, 0)
            b_d_xk += b_d_error
            tl.debug_barrier()  # pass 4 reads what other threads wrote in pass 3, and writes the d_state it read

            b_d_xk += _pass_four(p_w, p_d_state, p_partial, p_d_z1, hidden, b_xk, b_d_z2, D, BM, BD, BF, MATMUL)
            store_b2(p_d_state, b_read_b2 + tl.sum(b_d_z2, 0), D, BD)
            store_tokens(p_d_xq, b_d_xq, first, heads * D, M, BM, D, BD)
            store_tokens(p_d_xk, b_d_xk, first, heads * D, M, BM, D, BD)
            store_tokens(p_d_xv, -b_d_error, first, heads * D, M, BM, D, BD)
            p_row = p_d_lr + (first + m.to(tl.int64)) * heads
            tl.store(p_row, cast(b_d_lr, p_d_lr.dtype.element_ty), mask=m < M)
            tl.debug_barrier()  # the next one, or the next group, reads and overwrites what this one wrote and read

    p_sums += chain * (M + 2 * D)
    tl.store(p_sums + m, b_d_token_eta, mask=m < M)
    tl.store(p_sums + M + d, b_d_gamma, mask=d < D)
    tl.store(p_sums + M + D + d, b_d_beta, mask=d < D)


@triton.jit
def _read_new(
    p_new, hidden, b_xq, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, MATMUL: tl.constexpr
):
    """z2_bar [BM BD] through the weights at `p_new`."""
    b_z2_bar = tl.zeros([BM, BD], tl.float32)
    for f in range(0, hidden, BF):
        b_w1, b_b1, b_w2 = load_block(p_new, f, D, BD, BF)
        b_x2_bar = gelu(dot(b_xq, b_w1, MATMUL) + b_b1[None, :])
        b_z2_bar += dot(b_x2_bar, b_w2, MATMUL)
    return b_z2_bar + load_b2(p_new, D, BD)[None, :]


# --- Launch ---


class Setting(NamedTuple):
    """How a kernel is launched: the block of the hidden axis, warps, stages of its pipelined loops."""

    BF: int
    num_warps: int
    num_stages: int


class Residuals(NamedTuple):
    """What the backward needs: the inputs, and records [B H slots record] with every `group`-th state."""

    inputs: MlpInputs
    states: Tensor
    group: int


def default_group(problem: Problem) -> int:
    """The largest power of two up to sqrt(N): about the least memory, saved and recomputed states together."""
    return 1 << (math.isqrt(problem.mini_batches).bit_length() - 1)


def saved_bytes(problem: Problem, group: int) -> float:
    """The bytes of fast weights that the forward saves for a token of a head."""
    return 4 * record(problem.head_dim) * (-(-problem.mini_batches // group) + 2) / problem.tokens


def setting(problem: Problem, backward: bool) -> Setting:
    """What the kernels are launched with; from registers and spills as compiled.

    Mini-batches of more than 16: blocks narrower than 64 are what ptxas 12.8, Triton's, assembles wrongly, with
    addresses of operands from registers that it never wrote (`newer_ptxas`).
    """
    small = problem.mini_batch <= 16 and problem.head_dim <= 64 and not backward
    wide = problem.mini_batch > 16 or small
    return Setting(64 if wide and problem.dtype != "fp32" else 32, 8, 1)


def forward(inputs: MlpInputs, problem: Problem, group: int | None = None) -> tuple[MlpOutputs, Residuals]:
    """Outputs of TTT-MLP, and what `backward` needs: the fast weights of every `group`-th mini-batch.

    Raises:
        ValueError: a tensor has another shape, dtype, device or layout than the kernel takes, or the problem a size.
    """
    validate(inputs, INPUTS, problem)
    _check(inputs, problem, {"lr"})
    group = default_group(problem) if group is None else group
    if group < 1:
        raise ValueError(f"group: expected a positive number of mini-batches, got {group}")
    chains, slots = problem.batch * problem.heads, -(-problem.mini_batches // group) + 2
    with _on(inputs.xq, problem):
        states = inputs.w1.new_empty(problem.batch, problem.heads, slots, record(problem.head_dim))
        states[:, :, -2:].zero_()  # one may stay unused: what is saved is the same at every call
        outputs = MlpOutputs(
            torch.empty_like(inputs.xq, memory_format=torch.contiguous_format),
            *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[7:]),
        )
        _copy(inputs[7:], states, states.stride(1), problem, True)
        how = setting(problem, backward=False)
        forward_kernel[(chains,)](
            *inputs[:7], states, outputs.out, problem.heads, problem.mini_batches, group, problem.hidden,
            *_strides(*inputs[:4]), **_constants(problem, how),
            num_warps=how.num_warps, num_stages=how.num_stages,
        )  # fmt: skip
        last = states[:, :, slots - 2 + problem.mini_batches % 2]
        _copy(outputs[1:], last, states.stride(1), problem, False)
    return outputs, Residuals(inputs, states, group)


def backward(cotangents: MlpOutputs, residuals: Residuals, problem: Problem) -> MlpInputs:
    """Gradients of every input, from the cotangents of the output and of the final state.

    Raises:
        ValueError: a cotangent has another shape, dtype, device or layout than the kernel takes.
    """
    validate(cotangents, OUTPUTS, problem)
    _check(cotangents, problem, set(), residuals.inputs.xq)
    inputs, states, group = residuals
    chains = problem.batch * problem.heads
    work_size = (group + 2) * record(problem.head_dim) + _padded(problem)[0] * problem.hidden
    with _on(inputs.xq, problem):
        work = states.new_empty(chains, work_size)
        sums = states.new_empty(problem.batch, problem.heads, problem.mini_batch + 2 * problem.head_dim)
        d_tokens = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:4]]
        d_state = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[7:]]
        _copy(cotangents[1:], work, work_size, problem, True)
        how = setting(problem, backward=True)
        backward_kernel[(chains,)](
            *inputs[:7], states, cotangents.out, *d_tokens, sums, work,
            problem.heads, problem.mini_batches, group, problem.hidden,
            *_strides(*inputs[:4], cotangents.out), **_constants(problem, how),
            num_warps=how.num_warps, num_stages=how.num_stages,
        )  # fmt: skip
        _copy(d_state, work, work_size, problem, False)
        d_token_eta, d_ln_weight, d_ln_bias = sums.split([problem.mini_batch, problem.head_dim, problem.head_dim], -1)
    return MlpInputs(*d_tokens, d_token_eta.sum((0, 1)), d_ln_weight.sum(0), d_ln_bias.sum(0), *d_state)


def saved_shapes(problem: Problem) -> tuple[tuple[int, ...], ...]:
    """Of what `forward` saves beside the inputs."""
    slots = -(-problem.mini_batches // default_group(problem)) + 2
    return ((problem.batch, problem.heads, slots, record(problem.head_dim)),)


def residuals(inputs: MlpInputs, saved: list[Tensor], problem: Problem) -> Residuals:
    """What `forward` saved, as `backward` takes it."""
    return Residuals(inputs, *saved, default_group(problem))


# Bytes a thread that spill, as compiled by Triton 3.7, on the worst of sm_80, sm_90 and sm_100. sm_80 is the worst
# throughout: its last product of pass 2 has as many rows as columns, so Triton gives all warps rows, and all that feeds
# it, of M = 16 rows, is computed by every warp. M = 64: five [M D] sums are alive through pass 3; sm_90 spills 5 KB.
_SPILLS = {
    (forward_kernel, 16, True): 1500,
    (forward_kernel, 64, True): 20000,
    (forward_kernel, 64, False): 700,
    (backward_kernel, 16, True): 1200,
    (backward_kernel, 64, True): 70000,
    (backward_kernel, 64, False): 55000,
}
_ARCHITECTURES = ("sm_80", "sm_90")  # Triton 3.7 fails to compile this one for sm_100


def static_kernels() -> Iterator[TritonKernel]:
    """Both kernels as launched at D = 64 in bf16: M = 16 and 64 causal, M = 64 not causal."""
    for (kernel, mini_batch, causal), spills in _SPILLS.items():
        problem = Problem("mlp", 1, mini_batch, 1, 64, mini_batch, causal, dtype="bf16")
        how = setting(problem, kernel is backward_kernel)
        constants = _constants(problem, how)
        yield TritonKernel(
            function=kernel,
            inner_model="mlp",
            signature={name: _type(name) for name in kernel.arg_names if name not in constants},
            constexprs=constants,
            num_warps=how.num_warps,
            num_stages=how.num_stages,
            declared_spill_bytes=spills,
            architectures=_ARCHITECTURES if mini_batch > 16 and kernel is backward_kernel else ARCHITECTURES,
        )


def _type(name: str) -> str:
    floats = ("p_token_eta", "p_ln_weight", "p_ln_bias", "p_states", "p_sums", "p_work")
    return "*fp32" if name in floats else "*bf16" if name.startswith("p_") else "i32"


def _constants(problem: Problem, how: Setting) -> dict[str, int | float | bool | str]:
    m, d = _padded(problem)
    return {
        "M": problem.mini_batch,
        "D": problem.head_dim,
        "BM": m,
        "BD": d,
        "BF": how.BF,
        "CAUSAL": problem.causal,
        "EPS": problem.eps,
        "MATMUL": problem.matmul_precision if problem.dtype == "fp32" else problem.dtype,
    }


def _padded(problem: Problem) -> tuple[int, int]:
    """BM and BD: powers of two, at least the 16 of a product."""
    return tuple(max(16, triton.next_power_of_2(size)) for size in (problem.mini_batch, problem.head_dim))


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def _copy(tensors, records: Tensor, stride: int, problem: Problem, pack: bool) -> None:
    """Between w1, b1, w2, b2 and the first record of each chain in `records`, whose chains are `stride` apart."""
    grid = problem.batch * problem.heads, problem.hidden // 64  # D is a multiple of 16
    copy_record[grid](*tensors, records, stride, problem.head_dim, _padded(problem)[1], 64, pack)


@contextlib.contextmanager
def _on(x: Tensor, problem: Problem) -> Iterator[None]:
    """Triton launches on the current device: make it that of `x`."""
    with torch.cuda.device(x.device if x.is_cuda else -1), assembled(x.is_cuda and newer_ptxas(problem)):
        yield


def _check(tensors, problem: Problem, scalars: set[str], like: Tensor | None = None) -> None:
    """What `validate` does not look at: sizes, device and memory layout."""
    if reason := supports(problem):
        raise ValueError(reason)
    device = tensors[0].device if like is None else like.device
    if device.type != "cuda" and not INTERPRETED.value:
        raise ValueError(f"{tensors._fields[0]}: expected a CUDA tensor, got one on {device}; move it with .cuda()")
    for name, x in zip(tensors._fields, tensors, strict=True):
        if x.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")
        if name in ("xq", "xk", "xv", "out"):
            if x.stride(-1) != 1:
                raise ValueError(f"{name}: expected stride 1 in D, got strides {x.stride()}; call .contiguous()")
        elif name not in scalars and not x.is_contiguous():
            raise ValueError(f"{name}: expected contiguous memory, got strides {x.stride()}; call .contiguous()")
