"""TTT-Linear in Triton, one program a (batch, head): the page to read first.

A program walks the mini-batches of its chain with the fast weights in fp32 registers. Everything of a mini-batch
happens in one turn of the loop: the inner gradient, the read-out and the update

    z1     = xk w1 + b1
    g_z1   = d(1/2 ||LN(z1) - (xv - xk)||^2) / dz1
    z1_bar = xq w1 + b1 - (eta * (tril(xq xk^T) + tril(1))) g_z1      causal, eta[i, j] = token_eta[i] lr[j]
           = xq w1' + b1'                                             not causal
    out    = xq + LN(z1_bar)
    w1'    = w1 - token_eta[M-1] (lr xk)^T g_z1
    b1'    = b1 - token_eta[M-1] sum_j lr_j g_z1_j

The operands of products are rounded to the I/O dtype where `implementations/torch/ttt_linear.py` rounds them.

Memory. The forward reads the inputs once, writes `out` once, and saves the fast weights of every G-th mini-batch:
4 (D^2 + D) / (G M) bytes a token and head, at D = 64 and M = 16 (M = 64)

    G        1     4    16    64
    bytes 1040   260    65    16   (260    65    16     4)

beside 386 for the inputs in bf16. The backward recomputes the weights of one group at a time into a scratch buffer of
G + 1 matrices a chain, in the I/O dtype, since only products read them: G = 16 keeps it in the L2 cache of an H100
(18 MB for the 128 chains of lm-1.3b).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from implementations.kernels import TritonKernel
from implementations.triton.arguments import Shared, State, check, empty, tokens, view
from implementations.triton.blocks import (
    inner_gradient,
    inner_gradient_backward,
    load_lr,
    load_matrix,
    load_row,
    load_tokens,
    matmul,
    matmul_add,
    nearest,
    normalise,
    operand,
    project,
    store_matrix,
    store_row,
    store_tokens,
    token_pointers,
)
from implementations.triton.launch import Launch, meta
from implementations.triton.limits import block_d
from spec.problem import Problem
from spec.tensors import INPUTS, OUTPUTS, LinearInputs, LinearOutputs

GROUP = 16  # G: mini-batches between two saved states
# Declared spills, in bytes a thread, of the worst of Triton 3.7 and 3.9: all blocks [M, D] of a mini-batch live at once
# in one program. On sm_90 nothing spills at M = 16, and 316 (forward) and 3272 (backward) at M = 64; the rest is
# sm_80, where Triton puts all warps along M and each holds every column, and sm_100 under Triton 3.7.
_SPILLS = {("forward", 16): 512, ("forward", 64): 1280, ("backward", 16): 24576, ("backward", 64): 32768}


class Residuals(NamedTuple):
    """What the backward needs: the inputs, and the fast weights of every `group`-th mini-batch."""

    inputs: LinearInputs
    saved_w1: Tensor  # [B, H, ceil(N / G), D, D]
    saved_b1: Tensor  # [B, H, ceil(N / G), D]
    group: int


@triton.jit
def _inner_gradient(
    w, b, xk, xv, lr, ln_weight, ln_bias, EPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(lr g_z1 [M, D], g_z1, x_hat [M, D], rstd [M, 1], target [M, D])."""
    target = xv.to(tl.float32) - xk.to(tl.float32)
    z1 = matmul(xk, w, xk.dtype, PRECISION) + b[None, :]  # [M, D] @ [D, D] -> [M, D]
    g, x_hat, rstd = inner_gradient(z1, target, ln_weight, ln_bias, EPS, D, BLOCK_D)
    return lr * g, g, x_hat, rstd, target


@triton.jit
def _update(w, b, xk, lr_g, eta_last, PRECISION: tl.constexpr):
    w -= eta_last * matmul(tl.trans(xk), lr_g, xk.dtype, PRECISION)  # [D, M] @ [M, D] -> [D, D]
    return w, b - eta_last * tl.sum(lr_g, 0)


@triton.jit
def _forward(
    inputs, shared, start, out, final, saved, heads, mini_batches,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, CAUSAL: tl.constexpr, EPS: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chain = tl.program_id(0)
    batch, head = chain // heads, chain % heads
    rows = tl.arange(0, M)
    token_eta = tl.load(shared.token_eta + rows)[:, None]
    eta_last = tl.load(shared.token_eta + M - 1)
    ln_weight = load_row(shared.ln_weight, head, D, BLOCK_D)[None, :]
    ln_bias = load_row(shared.ln_bias, head, D, BLOCK_D)[None, :]
    w = load_matrix(start.w, chain, D, BLOCK_D)
    b = load_row(start.b, chain, D, BLOCK_D)
    for n in range(mini_batches):
        if n % GROUP == 0:
            at = chain * tl.cdiv(mini_batches, GROUP) + n // GROUP
            store_matrix(saved.w, w, at, D, BLOCK_D)
            store_row(saved.b, b, at, D, BLOCK_D)
        xq = load_tokens(inputs.xq, batch, head, n, M, D, BLOCK_D)
        xk = load_tokens(inputs.xk, batch, head, n, M, D, BLOCK_D)
        xv = load_tokens(inputs.xv, batch, head, n, M, D, BLOCK_D)
        lr = load_lr(inputs.lr, batch, head, n, M)
        lr_g, _, _, _, _ = _inner_gradient(w, b, xk, xv, lr, ln_weight, ln_bias, EPS, D, BLOCK_D, PRECISION)
        if CAUSAL:
            attn = matmul(xq, tl.trans(xk), xq.dtype, PRECISION) + 1.0  # [M, D] @ [D, M] -> [M, M]
            scores = tl.where(rows[:, None] >= rows[None, :], token_eta * attn, 0.0)
            z1_bar = matmul(xq, w, xq.dtype, PRECISION) + b[None, :] - matmul(scores, lr_g, xq.dtype, PRECISION)
            w, b = _update(w, b, xk, lr_g, eta_last, PRECISION)
        else:
            w, b = _update(w, b, xk, lr_g, eta_last, PRECISION)
            z1_bar = matmul(xq, w, xq.dtype, PRECISION) + b[None, :]
        x_hat, _ = normalise(z1_bar, EPS, D, BLOCK_D)
        store_tokens(out, xq.to(tl.float32) + ln_weight * x_hat + ln_bias, batch, head, n, M, D, BLOCK_D)
    store_matrix(final.w, w, chain, D, BLOCK_D)
    store_row(final.b, b, chain, D, BLOCK_D)


@triton.jit
def _recompute(
    inputs, shared, saved, scratch, chain, group, length, heads, mini_batches,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, EPS: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The fast weights before each of the first `length` mini-batches of a group and after them, into `scratch`."""
    batch, head = chain // heads, chain % heads
    eta_last = tl.load(shared.token_eta + M - 1)
    ln_weight = load_row(shared.ln_weight, head, D, BLOCK_D)[None, :]
    ln_bias = load_row(shared.ln_bias, head, D, BLOCK_D)[None, :]
    at = chain * tl.cdiv(mini_batches, GROUP) + group
    w = load_matrix(saved.w, at, D, BLOCK_D)
    b = load_row(saved.b, at, D, BLOCK_D)
    slot = chain * (GROUP + 1)
    store_matrix(scratch.w, w, slot, D, BLOCK_D)
    store_row(scratch.b, b, slot, D, BLOCK_D)
    for i in range(length):
        n = group * GROUP + i
        xk = load_tokens(inputs.xk, batch, head, n, M, D, BLOCK_D)
        xv = load_tokens(inputs.xv, batch, head, n, M, D, BLOCK_D)
        lr = load_lr(inputs.lr, batch, head, n, M)
        lr_g, _, _, _, _ = _inner_gradient(w, b, xk, xv, lr, ln_weight, ln_bias, EPS, D, BLOCK_D, PRECISION)
        w, b = _update(w, b, xk, lr_g, eta_last, PRECISION)
        store_matrix(scratch.w, w, slot + i + 1, D, BLOCK_D)
        store_row(scratch.b, b, slot + i + 1, D, BLOCK_D)


@triton.jit
def _backward(
    inputs, shared, saved, scratch, d_out, d_final, d_inputs, d_shared, d_start, heads, mini_batches,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, CAUSAL: tl.constexpr, EPS: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chain = tl.program_id(0)
    batch, head = chain // heads, chain % heads
    rows = tl.arange(0, M)
    token_eta = tl.load(shared.token_eta + rows)[:, None]
    eta_last = tl.load(shared.token_eta + M - 1)
    ln_weight = load_row(shared.ln_weight, head, D, BLOCK_D)[None, :]
    ln_bias = load_row(shared.ln_bias, head, D, BLOCK_D)[None, :]

    d_w = load_matrix(d_final.w, chain, D, BLOCK_D)
    d_b = load_row(d_final.b, chain, D, BLOCK_D)
    d_token_eta = tl.zeros([M], tl.float32)
    d_eta_last = tl.zeros([M], tl.float32)  # what every token adds to that of the last token_eta
    d_ln_weight = tl.zeros([BLOCK_D], tl.float32)
    d_ln_bias = tl.zeros([BLOCK_D], tl.float32)
    groups = tl.cdiv(mini_batches, GROUP)
    for back in range(groups):
        group = groups - 1 - back
        length = tl.minimum(GROUP, mini_batches - group * GROUP)
        _recompute(
            inputs, shared, saved, scratch, chain, group, length - 1 if CAUSAL else length, heads, mini_batches,
            D, BLOCK_D, M, EPS, GROUP, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()  # every thread's part of the weights is there
        for step in range(length):
            i = length - 1 - step
            n = group * GROUP + i
            slot = chain * (GROUP + 1) + i
            xq = load_tokens(inputs.xq, batch, head, n, M, D, BLOCK_D)
            xk = load_tokens(inputs.xk, batch, head, n, M, D, BLOCK_D)
            xv = load_tokens(inputs.xv, batch, head, n, M, D, BLOCK_D)
            d_o = load_tokens(d_out, batch, head, n, M, D, BLOCK_D).to(tl.float32)
            lr = load_lr(inputs.lr, batch, head, n, M)
            w = load_matrix(scratch.w, slot, D, BLOCK_D)
            b = load_row(scratch.b, slot, D, BLOCK_D)

            # The forward again, up to the read-out.
            lr_g, g, x_hat, rstd, target = _inner_gradient(
                w, b, xk, xv, lr, ln_weight, ln_bias, EPS, D, BLOCK_D, PRECISION
            )
            if CAUSAL:
                w_read, b_read = w, b
                visible = rows[:, None] >= rows[None, :]
                attn = tl.where(visible, matmul(xq, tl.trans(xk), xq.dtype, PRECISION) + 1.0, 0.0)
                scores = token_eta * attn
                z1_bar = matmul(xq, w, xq.dtype, PRECISION) + b[None, :] - matmul(scores, lr_g, xq.dtype, PRECISION)
            else:
                w_read = load_matrix(scratch.w, slot + 1, D, BLOCK_D)
                b_read = load_row(scratch.b, slot + 1, D, BLOCK_D)
                z1_bar = matmul(xq, w_read, xq.dtype, PRECISION) + b_read[None, :]

            # out = xq + LN(z1_bar)
            x_hat_bar, rstd_bar = normalise(z1_bar, EPS, D, BLOCK_D)
            d_ln_weight += tl.sum(d_o * x_hat_bar, 0)
            d_ln_bias += tl.sum(d_o, 0)
            d_z1_bar = project(d_o * ln_weight, x_hat_bar, rstd_bar, D, BLOCK_D)

            # The read-out: into the old weights (causal) or the new ones (not causal).
            d_xq = d_o + matmul(d_z1_bar, tl.trans(w_read), xq.dtype, PRECISION)
            if CAUSAL:
                d_scores = tl.where(visible, -matmul(d_z1_bar, tl.trans(lr_g), xq.dtype, PRECISION), 0.0)
                d_token_eta += tl.sum(d_scores * attn, 1)
                d_attn = token_eta * d_scores
                d_xq += matmul(d_attn, xk, xq.dtype, PRECISION)
                d_xk = matmul(tl.trans(d_attn), xq, xq.dtype, PRECISION)
                d_lr_g = -matmul(tl.trans(scores), d_z1_bar, xq.dtype, PRECISION)
            else:
                d_w = matmul_add(tl.trans(xq), d_z1_bar, d_w, xq.dtype, PRECISION)  # [D, M] @ [M, D] -> [D, D]
                d_b += tl.sum(d_z1_bar, 0)
                d_xk = tl.zeros([M, BLOCK_D], tl.float32)
                d_lr_g = tl.zeros([M, BLOCK_D], tl.float32)
            store_tokens(d_inputs.xq, d_xq, batch, head, n, M, D, BLOCK_D)

            # The update.
            pulled = matmul(xk, d_w, xk.dtype, PRECISION) + d_b[None, :]  # [M, D] @ [D, D] -> [M, D]
            d_eta_last -= tl.sum(lr_g * pulled, 1)
            d_xk -= eta_last * matmul(lr_g, tl.trans(d_w), xk.dtype, PRECISION)
            d_lr_g -= eta_last * pulled
            d_lr = nearest(tl.sum(d_lr_g * g, 1), xk.dtype)
            tl.store(token_pointers(d_inputs.lr, batch, head, n, M), d_lr)

            # The inner gradient, second order; d_error is the cotangent of xk - xv.
            d_z1, d_error, d_ln_weight_in, d_ln_bias_in = inner_gradient_backward(
                lr * d_lr_g, g, x_hat, rstd, target, ln_weight, ln_bias, D, BLOCK_D
            )
            d_ln_weight += d_ln_weight_in
            d_ln_bias += d_ln_bias_in
            store_tokens(d_inputs.xv, -d_error, batch, head, n, M, D, BLOCK_D)

            # z1 = xk w1 + b1
            d_xk += d_error + matmul(d_z1, tl.trans(w), xk.dtype, PRECISION)
            store_tokens(d_inputs.xk, d_xk, batch, head, n, M, D, BLOCK_D)
            if CAUSAL and xk.dtype.is_fp32():  # both products at once: d_w is rounded once a mini-batch
                both = matmul(tl.trans(xq), d_z1_bar, xq.dtype, PRECISION)
                a, b = operand(tl.trans(xk), xk.dtype, PRECISION), operand(d_z1, xk.dtype, PRECISION)
                d_w += tl.dot(a, b, both, input_precision=PRECISION)
                d_b += tl.sum(d_z1_bar + d_z1, 0)
            elif CAUSAL:
                d_w = matmul_add(tl.trans(xq), d_z1_bar, d_w, xq.dtype, PRECISION)
                d_w = matmul_add(tl.trans(xk), d_z1, d_w, xk.dtype, PRECISION)
                d_b += tl.sum(d_z1_bar, 0) + tl.sum(d_z1, 0)
            else:
                d_w = matmul_add(tl.trans(xk), d_z1, d_w, xk.dtype, PRECISION)
                d_b += tl.sum(d_z1, 0)
        tl.debug_barrier()  # every thread has read the weights that the next group overwrites
    store_matrix(d_start.w, d_w, chain, D, BLOCK_D)
    store_row(d_start.b, d_b, chain, D, BLOCK_D)
    store_row(d_shared.ln_weight, d_ln_weight, chain, D, BLOCK_D)
    store_row(d_shared.ln_bias, d_ln_bias, chain, D, BLOCK_D)
    tl.store(d_shared.token_eta + chain * 2 * M + rows, d_token_eta)
    tl.store(d_shared.token_eta + chain * 2 * M + M + rows, d_eta_last)


def forward(inputs: LinearInputs, problem: Problem, group: int = GROUP) -> tuple[LinearOutputs, Residuals]:
    """Outputs of TTT-Linear, and what `backward` needs; `group` is G, see above.

    Raises:
        ValueError: `problem` is beyond the limits of the Triton pages, or a tensor does not fit it or the kernel.
    """
    check(inputs, INPUTS, problem)
    if group < 1:
        raise ValueError(f"group: expected at least 1 mini-batch between saved states, got {group}")
    outputs, residuals, launch = plan_forward(inputs, problem, group)
    launch.run(inputs.xq.device)
    return outputs, residuals


def backward(cotangents: LinearOutputs, residuals: Residuals, problem: Problem) -> LinearInputs:
    """Gradients of every input, from the cotangents of the output and of the final state.

    Raises:
        ValueError: a cotangent does not fit `problem` or the kernel.
    """
    check(cotangents, OUTPUTS, problem, residuals.inputs.xq.device)
    gradients, launch = plan_backward(cotangents, residuals, problem)
    launch.run(cotangents.out.device)
    # Over chains and over the batch, always in the same order.
    (d_token_eta, d_eta_last), d_ln_weight, d_ln_bias = (part.sum(0) for part in gradients[4:7])
    d_token_eta[-1] += d_eta_last.sum()
    return LinearInputs(*gradients[:4], d_token_eta, d_ln_weight, d_ln_bias, *gradients[7:])


def default_group(problem: Problem) -> int:
    """G."""
    return GROUP


def saved_shapes(problem: Problem) -> tuple[tuple[int, ...], ...]:
    """Of what `forward` saves beside the inputs, all fp32."""
    b, h, d, groups = problem.batch, problem.heads, problem.head_dim, triton.cdiv(problem.mini_batches, GROUP)
    return (b, h, groups, d, d), (b, h, groups, d)


def residuals(inputs: LinearInputs, saved: list[Tensor], problem: Problem) -> Residuals:
    """What `forward` saved, as `backward` takes it."""
    return Residuals(inputs, *saved, GROUP)


def plan_forward(
    inputs: LinearInputs, problem: Problem, group: int
) -> tuple[LinearOutputs, Residuals, Launch]:
    """What `forward` gives, and the launch that fills it."""
    b, t, h, d, groups = *inputs.xq.shape, triton.cdiv(problem.mini_batches, group)
    like = inputs.xq
    outputs = LinearOutputs(empty(like, b, t, h, d, dtype=like.dtype), empty(like, b, h, d, d), empty(like, b, h, d))
    residuals = Residuals(inputs, empty(like, b, h, groups, d, d), empty(like, b, h, groups, d), group)
    arguments = {
        "inputs": tokens(*inputs[:4]),
        "shared": Shared(*inputs[4:7]),
        "start": State(*inputs[7:]),
        "out": view(outputs.out),
        "final": State(*outputs[1:]),
        "saved": State(residuals.saved_w1, residuals.saved_b1),
        "heads": h,
        "mini_batches": problem.mini_batches,
    }
    launch = Launch(_forward, b * h, arguments, _constants(problem, group), _options("forward", problem))
    return outputs, residuals, launch


def plan_backward(
    cotangents: LinearOutputs, residuals: Residuals, problem: Problem
) -> tuple[LinearInputs, Launch]:
    """Gradients, those of the shared parameters still in parts [B H 2 M], [B H D], and the launch that fills them."""
    inputs, saved_w1, saved_b1, group = residuals
    b, t, h, d = inputs.xq.shape
    like = inputs.xq
    gradients = LinearInputs(
        *(empty(like, b, t, h, d, dtype=like.dtype) for _ in range(3)),
        empty(like, b, t, h, dtype=like.dtype),
        empty(like, b * h, 2, problem.mini_batch),
        empty(like, b, h, d),
        empty(like, b, h, d),
        empty(like, b, h, d, d),
        empty(like, b, h, d),
    )
    arguments = {
        "inputs": tokens(*inputs[:4]),
        "shared": Shared(*inputs[4:7]),
        "saved": State(saved_w1, saved_b1),
        "scratch": State(empty(like, b, h, group + 1, d, d, dtype=like.dtype), empty(like, b, h, group + 1, d)),
        "d_out": view(cotangents.out),
        "d_final": State(*cotangents[1:]),
        "d_inputs": tokens(*gradients[:4]),
        "d_shared": Shared(*gradients[4:7]),
        "d_start": State(*gradients[7:]),
        "heads": h,
        "mini_batches": problem.mini_batches,
    }
    return gradients, Launch(
        _backward, b * h, arguments, _constants(problem, group), _options("backward", problem)
    )


def static_kernels() -> Iterator[TritonKernel]:
    """Both kernels at the sizes of the named cases."""
    for mini_batch, causal in ((16, True), (64, True), (64, False)):
        problem = Problem("linear", 1, GROUP * mini_batch, 32, 64, mini_batch, causal, dtype="bf16")
        outputs, residuals, launch = plan_forward(meta(LinearInputs, problem), problem, GROUP)
        yield launch.static("linear", _SPILLS["forward", mini_batch])
        yield plan_backward(outputs, residuals, problem)[1].static("linear", _SPILLS["backward", mini_batch])


def _constants(problem: Problem, group: int) -> dict[str, object]:
    return {
        "D": problem.head_dim,
        "BLOCK_D": block_d(problem),
        "M": problem.mini_batch,
        "CAUSAL": problem.causal,
        "EPS": problem.eps,
        "GROUP": group,
        "PRECISION": problem.matmul_precision,
    }


def _options(pass_: str, problem: Problem) -> dict[str, int]:
    """Warps by what ptxas spills, stages by what shared memory holds and what loads a step ahead are worth."""
    d, m = block_d(problem), problem.mini_batch
    warps = 4 if max(d, m) <= 64 else 8
    wide = d > 64 and not problem.causal and problem.dtype == "fp32" and problem.matmul_precision == "ieee"
    if d * m > 64 * 64 or (wide and pass_ == "backward"):
        return {"num_warps": warps if pass_ == "forward" else 2 * warps, "num_stages": 1}
    return {"num_warps": warps, "num_stages": 3} if pass_ == "forward" else {"num_warps": 2 * warps, "num_stages": 2}
