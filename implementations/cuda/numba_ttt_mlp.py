"""TTT-MLP in numba.cuda, to be read beside `implementations/torch/ttt_mlp.py` and after `numba_ttt_linear.py`.

As there: one thread block a chain, plain fp32, the inner learning rate in the inner gradient. It goes in once, since
the first layer's gradient is linear in the second's:

    h2 = lr * g_z2,   u = h2 w2^T,   h1 = u * gelu'(z1)        so h1 = lr * g_z1
    z1_bar = xq w1 + b1 - eta_i (tril(xq xk^T + 1) h1),        x2_bar = gelu(z1_bar)
    z2_bar = x2_bar w2 + b2 - eta_i (tril(x2_bar x2^T + 1) h2)

and without causality both read-outs lose their masks and have eta_i = eta_last.

What is [M D] or [M M] is in shared memory where it fits; the fast weights and what is [M F] are in global memory.
Source: arXiv 2407.04620, section 2.5; the backward is this repository's.
"""

from __future__ import annotations

import functools

import numpy as np
from numba import cuda, float32

from implementations.cuda import numba_scan
from implementations.cuda.numba_blocks import (
    ONE,
    ZERO,
    dot,
    dot_rows,
    eta_of,
    gelu,
    gelu_first,
    gelu_second,
    inner_gradient,
    inner_gradient_backward,
    normalise,
    project,
    tile,
)
from implementations.cuda.numba_scan import Kernels, Residuals
from spec.problem import Problem
from spec.tensors import MlpInputs, MlpOutputs


@functools.cache
def _kernels(M: int, D: int, F: int, CAUSAL: bool, eps: float) -> Kernels:
    """The kernels for these sizes, which are constants in them."""
    EPS = np.float32(eps)
    WIDTH = max(M, D) + 1  # of a tile: a column more, so that rows begin in different banks of shared memory
    FORWARD_TILES, BACKWARD_TILES = 6, 14
    FORWARD_HIDDEN, BACKWARD_HIDDEN = 3, 9
    FORWARD_FIT = numba_scan.fitting(FORWARD_TILES, M, WIDTH)
    BACKWARD_FIT = numba_scan.fitting(BACKWARD_TILES, M, WIDTH)
    FORWARD_SHARED = (FORWARD_FIT, M, WIDTH) if FORWARD_FIT else (1, 1, 1)
    BACKWARD_SHARED = (BACKWARD_FIT, M, WIDTH) if BACKWARD_FIT else (1, 1, 1)

    @cuda.jit
    def ttt_mlp_forward(inputs, outputs, kept, scratch, first, count, every):
        head, batch = cuda.blockIdx.x, cuda.blockIdx.y
        row, column, rows, columns = cuda.threadIdx.y, cuda.threadIdx.x, cuda.blockDim.y, cuda.blockDim.x
        thread, threads = row * columns + column, rows * columns

        shared = cuda.shared.array(FORWARD_SHARED, float32)
        tiles, hidden = scratch[0][batch, head], scratch[1][batch, head]
        xk = tile(shared, tiles, 0, FORWARD_FIT)
        h2 = tile(shared, tiles, 1, FORWARD_FIT)  # g_z2, then lr * g_z2
        attn = tile(shared, tiles, 2, FORWARD_FIT)  # of the first layer, then of the second
        xq = tile(shared, tiles, 3, FORWARD_FIT)
        z2 = tile(shared, tiles, 4, FORWARD_FIT)  # z2, then z2_bar
        target = tile(shared, tiles, 5, FORWARD_FIT)
        h1, x2, x2_bar = hidden[0], hidden[1], hidden[2]  # h1: z1 at first

        token_eta, gamma, beta = inputs.token_eta, inputs.ln_weight[head], inputs.ln_bias[head]
        w1, b1 = outputs.final_w1[batch, head], outputs.final_b1[batch, head]
        w2, b2 = outputs.final_w2[batch, head], outputs.final_b2[batch, head]
        kept_w1, kept_b1, kept_w2, kept_b2 = kept
        eta_last = token_eta[M - 1]

        for n in range(first, first + count):
            t = n * M
            if (n - first) % every == 0:
                slot = (n - first) // every
                for i in range(row, D, rows):
                    for j in range(column, F, columns):
                        kept_w1[slot, batch, head, i, j] = w1[i, j]
                for i in range(row, F, rows):
                    for j in range(column, D, columns):
                        kept_w2[slot, batch, head, i, j] = w2[i, j]
                for j in range(thread, F, threads):
                    kept_b1[slot, batch, head, j] = b1[j]
                for j in range(thread, D, threads):
                    kept_b2[slot, batch, head, j] = b2[j]
            for i in range(row, M, rows):
                for j in range(column, D, columns):
                    xq[i, j] = inputs.xq[batch, t + i, head, j]
                    xk[i, j] = inputs.xk[batch, t + i, head, j]
                    target[i, j] = inputs.xv[batch, t + i, head, j] - xk[i, j]
            cuda.syncthreads()

            for i in range(row, M, rows):
                for j in range(column, F, columns):
                    h1[i, j] = dot(xk, w1, i, j, D) + b1[j]  # z1: [M D] @ [D F] -> [M F]
                    x2[i, j] = gelu(h1[i, j])
                for j in range(column, M, columns):  # [M D] @ [D M] -> [M M]
                    attn[i, j] = dot(xq, xk.T, i, j, D) + ONE if j <= i or not CAUSAL else ZERO
            cuda.syncthreads()

            for i in range(row, M, rows):
                for j in range(column, D, columns):
                    z2[i, j] = dot(x2, w2, i, j, F) + b2[j]  # [M F] @ [F D] -> [M D]
            cuda.syncthreads()

            for i in range(thread, M, threads):
                inner_gradient(z2[i], target[i], gamma, beta, h2[i], D, EPS)
                for j in range(D):
                    h2[i, j] *= inputs.lr[batch, t + i, head]
            cuda.syncthreads()

            for i in range(row, M, rows):
                for j in range(column, F, columns):
                    h1[i, j] = dot(h2, w2.T, i, j, D) * gelu_first(h1[i, j])  # [M D] @ [D F] -> [M F]
            cuda.syncthreads()

            for i in range(row, M, rows):
                for j in range(column, F, columns):
                    read = eta_of(token_eta, i, M, CAUSAL) * dot(attn, h1, i, j, M)  # [M M] @ [M F] -> [M F]
                    x2_bar[i, j] = gelu(dot(xq, w1, i, j, D) + b1[j] - read)
            cuda.syncthreads()

            for i in range(row, M, rows):
                for j in range(column, M, columns):  # [M F] @ [F M] -> [M M]
                    attn[i, j] = dot(x2_bar, x2.T, i, j, F) + ONE if j <= i or not CAUSAL else ZERO
            cuda.syncthreads()

            for i in range(row, M, rows):
                for j in range(column, D, columns):
                    read = eta_of(token_eta, i, M, CAUSAL) * dot(attn, h2, i, j, M)  # [M M] @ [M D] -> [M D]
                    z2[i, j] = dot(x2_bar, w2, i, j, F) + b2[j] - read
            cuda.syncthreads()

            for i in range(row, D, rows):
                for j in range(column, F, columns):
                    w1[i, j] -= eta_last * dot(xk.T, h1, i, j, M)  # [D M] @ [M F] -> [D F]
            for i in range(row, F, rows):
                for j in range(column, D, columns):
                    w2[i, j] -= eta_last * dot(x2.T, h2, i, j, M)  # [F M] @ [M D] -> [F D]
            for j in range(thread, F, threads):
                for i in range(M):
                    b1[j] -= eta_last * h1[i, j]
            for j in range(thread, D, threads):
                for i in range(M):
                    b2[j] -= eta_last * h2[i, j]
            for i in range(thread, M, threads):
                normalise(z2[i], D, EPS)
            cuda.syncthreads()

            for i in range(row, M, rows):
                for j in range(column, D, columns):
                    outputs.out[batch, t + i, head, j] = xq[i, j] + gamma[j] * z2[i, j] + beta[j]

    @cuda.jit
    def ttt_mlp_backward(inputs, cotangents, kept, gradients, scratch, first, count):
        head, batch = cuda.blockIdx.x, cuda.blockIdx.y
        row, column, rows, columns = cuda.threadIdx.y, cuda.threadIdx.x, cuda.blockDim.y, cuda.blockDim.x
        thread, threads = row * columns + column, rows * columns

        shared = cuda.shared.array(BACKWARD_SHARED, float32)
        rstd = cuda.shared.array(M, float32)
        tiles, hidden = scratch[0][batch, head], scratch[1][batch, head]
        xk = tile(shared, tiles, 0, BACKWARD_FIT)
        h2 = tile(shared, tiles, 1, BACKWARD_FIT)  # lr * g_z2
        attn1 = tile(shared, tiles, 2, BACKWARD_FIT)
        attn2 = tile(shared, tiles, 3, BACKWARD_FIT)
        d_attn = tile(shared, tiles, 4, BACKWARD_FIT)  # of the second layer, then of the first
        d_z2_bar = tile(shared, tiles, 5, BACKWARD_FIT)
        d_z2 = tile(shared, tiles, 6, BACKWARD_FIT)  # d_h2, then d_g_z2, then d_z2
        xq = tile(shared, tiles, 7, BACKWARD_FIT)
        g_z2 = tile(shared, tiles, 8, BACKWARD_FIT)
        x_hat = tile(shared, tiles, 9, BACKWARD_FIT)  # z2, then its x_hat
        x_hat_bar = tile(shared, tiles, 10, BACKWARD_FIT)  # z2_bar, then its x_hat
        d_target = tile(shared, tiles, 11, BACKWARD_FIT)  # target, then d_target
        pulled2 = tile(shared, tiles, 12, BACKWARD_FIT)  # what the update sends to h2, then each token's d_ln_weight
        d_out = tile(shared, tiles, 13, BACKWARD_FIT)
        z1, x2, h1, z1_bar, x2_bar, d_z1_bar = hidden[0], hidden[1], hidden[2], hidden[3], hidden[4], hidden[5]
        u = hidden[6]  # h2 w2^T, then what reaches z1 through gelu'
        d_u = hidden[7]  # what the update sends to h1, then d_u
        d_z1 = hidden[8]  # d_x2, then d_z1

        token_eta, gamma, beta = inputs.token_eta, inputs.ln_weight[head], inputs.ln_bias[head]
        d_w1, d_b1 = gradients.w1[batch, head], gradients.b1[batch, head]
        d_w2, d_b2 = gradients.w2[batch, head], gradients.b2[batch, head]
        kept_w1, kept_b1, kept_w2, kept_b2 = kept
        eta_last = token_eta[M - 1]

        for n in range(first + count - 1, first - 1, -1):
            t = n * M
            w1, b1 = kept_w1[n - first, batch, head], kept_b1[n - first, batch, head]
            w2, b2 = kept_w2[n - first, batch, head], kept_b2[n - first, batch, head]
            for i in range(row, M, rows):
                for j in range(column, D, columns):
                    xq[i, j] = inputs.xq[batch, t + i, head, j]
                    xk[i, j] = inputs.xk[batch, t + i, head, j]
                    d_target[i, j] = inputs.xv[batch, t + i, head, j] - xk[i, j]
                    d_out[i, j] = cotangents[0][batch, t + i, head, j]
            cuda.syncthreads()

            # The forward again, up to the read-out.
            for i in range(row, M, rows):
                for j in range(column, F, columns):
                    z1[i, j] = dot(xk, w1, i, j, D) + b1[j]
                    x2[i, j] = gelu(z1[i, j])
                for j in range(column, M, columns):
                    attn1[i, j] = dot(xq, xk.T, i, j, D) + ONE if j <= i or not CAUSAL else ZERO
            cuda.syncthreads()
            for i in range(row, M, rows):
                for j in range(column, D, columns):
                    x_hat[i, j] = dot(x2, w2, i, j, F) + b2[j]
            cuda.syncthreads()
            for i in range(thread, M, threads):
                rstd[i] = inner_gradient(x_hat[i], d_target[i], gamma, beta, g_z2[i], D, EPS)
                for j in range(D):
                    h2[i, j] = inputs.lr[batch, t + i, head] * g_z2[i, j]
            cuda.syncthreads()
            for i in range(row, M, rows):
                for j in range(column, F, columns):
                    u[i, j] = dot(h2, w2.T, i, j, D)
                    h1[i, j] = u[i, j] * gelu_first(z1[i, j])
            cuda.syncthreads()
            for i in range(row, M, rows):
                for j in range(column, F, columns):
                    read = eta_of(token_eta, i, M, CAUSAL) * dot(attn1, h1, i, j, M)
                    z1_bar[i, j] = dot(xq, w1, i, j, D) + b1[j] - read
                    x2_bar[i, j] = gelu(z1_bar[i, j])
            cuda.syncthreads()
            for i in range(row, M, rows):
                for j in range(column, M, columns):
                    attn2[i, j] = dot(x2_bar, x2.T, i, j, F) + ONE if j <= i or not CAUSAL else ZERO
            cuda.syncthreads()
            for i in range(row, M, rows):
                for j in range(column, D, columns):
                    read = eta_of(token_eta, i, M, CAUSAL) * dot(attn2, h2, i, j, M)
                    x_hat_bar[i, j] = dot(x2_bar, w2, i, j, F) + b2[j] - read
            cuda.syncthreads()

            # out = xq + LN(z2_bar)
            for i in range(thread, M, threads):
                rstd_bar = normalise(x_hat_bar[i], D, EPS)
                for j in range(D):
                    d_z2_bar[i, j] = d_out[i, j] * gamma[j]
                project(d_z2_bar[i], x_hat_bar[i], rstd_bar, D)
            cuda.syncthreads()

            # The second layer's read-out, and what its update sends to eta_last * h2.
            for i in range(row, M, rows):
                for j in range(column, M, columns):  # without eta_i, as attn2
                    d_attn[i, j] = -dot(d_z2_bar, h2.T, i, j, D) if j <= i or not CAUSAL else ZERO
                for j in range(column, D, columns):
                    pulled2[i, j] = dot(x2, d_w2, i, j, F) + d_b2[j]
            cuda.syncthreads()
            for i in range(thread, M, threads):
                gradients.token_eta[0, batch, t + i, head] = dot_rows(d_attn[i], attn2[i], M)
                gradients.token_eta[1, batch, t + i, head] = -dot_rows(pulled2[i], h2[i], D)
                for j in range(M):
                    attn2[i, j] *= eta_of(token_eta, i, M, CAUSAL)
                    d_attn[i, j] *= eta_of(token_eta, i, M, CAUSAL)
            cuda.syncthreads()
            for i in range(row, M, rows):
                for j in range(column, D, columns):
                    d_z2[i, j] = -dot(attn2.T, d_z2_bar, i, j, M) - eta_last * pulled2[i, j]  # d_h2, without u's
                for j in range(column, F, columns):
                    d_x2_bar = dot(d_z2_bar, w2.T, i, j, D) + dot(d_attn, x2, i, j, M)
                    d_z1_bar[i, j] = d_x2_bar * gelu_first(z1_bar[i, j])
                    d_z1[i, j] = dot(d_attn.T, x2_bar, i, j, M) - eta_last * dot(h2, d_w2.T, i, j, D)  # d_x2
            cuda.syncthreads()

            # The first layer's, in the same way.
            for i in range(row, M, rows):
                for j in range(column, M, columns):
                    d_attn[i, j] = -dot(d_z1_bar, h1.T, i, j, F) if j <= i or not CAUSAL else ZERO
                for j in range(column, F, columns):
                    d_u[i, j] = dot(xk, d_w1, i, j, D) + d_b1[j]
            cuda.syncthreads()
            for i in range(thread, M, threads):
                gradients.token_eta[0, batch, t + i, head] += dot_rows(d_attn[i], attn1[i], M)
                gradients.token_eta[1, batch, t + i, head] -= dot_rows(d_u[i], h1[i], F)
                for j in range(M):
                    attn1[i, j] *= eta_of(token_eta, i, M, CAUSAL)
                    d_attn[i, j] *= eta_of(token_eta, i, M, CAUSAL)
            cuda.syncthreads()

            # h1 = u * gelu'(z1)
            for i in range(row, M, rows):
                for j in range(column, F, columns):
                    d_h1 = -dot(attn1.T, d_z1_bar, i, j, M) - eta_last * d_u[i, j]
                    d_u[i, j] = d_h1 * gelu_first(z1[i, j])
                    u[i, j] *= d_h1 * gelu_second(z1[i, j])
                for j in range(column, D, columns):
                    gradients.xq[batch, t + i, head, j] = (
                        d_out[i, j] + dot(d_z1_bar, w1.T, i, j, F) + dot(d_attn, xk, i, j, M)
                    )
            cuda.syncthreads()

            # u = h2 w2^T
            for i in range(row, M, rows):
                for j in range(column, D, columns):
                    d_z2[i, j] += dot(d_u, w2, i, j, F)
            cuda.syncthreads()

            # h2 = lr * g_z2, and the inner gradient's second order.
            for i in range(thread, M, threads):
                gradients.lr[batch, t + i, head] = dot_rows(d_z2[i], g_z2[i], D)
                for j in range(D):
                    d_z2[i, j] *= inputs.lr[batch, t + i, head]
                inner_gradient_backward(
                    d_z2[i], g_z2[i], x_hat[i], rstd[i], d_target[i], gamma, beta, pulled2[i], D
                )
            cuda.syncthreads()

            # z2 = gelu(z1) w2 + b2
            for i in range(row, M, rows):
                for j in range(column, F, columns):
                    d_x2 = d_z1[i, j] + dot(d_z2, w2.T, i, j, D)
                    d_z1[i, j] = d_x2 * gelu_first(z1[i, j]) + u[i, j]
            cuda.syncthreads()

            # z1 = xk w1 + b1
            for i in range(row, M, rows):
                for j in range(column, D, columns):
                    gradients.xv[batch, t + i, head, j] = d_target[i, j]
                    gradients.xk[batch, t + i, head, j] = (
                        dot(d_attn.T, xq, i, j, M)
                        - eta_last * dot(h1, d_w1.T, i, j, F)
                        - d_target[i, j]
                        + dot(d_z1, w1.T, i, j, F)
                    )
            for j in range(thread, D, threads):
                d_gamma = d_beta = ZERO
                for i in range(M):
                    d_gamma += d_out[i, j] * x_hat_bar[i, j] + pulled2[i, j]
                    d_beta += d_out[i, j] - d_target[i, j]
                gradients.ln_weight[n, batch, head, j] = d_gamma
                gradients.ln_bias[n, batch, head, j] = d_beta
            cuda.syncthreads()
            for i in range(row, D, rows):
                for j in range(column, F, columns):
                    d_w1[i, j] += dot(xq.T, d_z1_bar, i, j, M) + dot(xk.T, d_z1, i, j, M)
            for i in range(row, F, rows):
                for j in range(column, D, columns):
                    d_w2[i, j] += (
                        dot(x2_bar.T, d_z2_bar, i, j, M) + dot(x2.T, d_z2, i, j, M) + dot(d_u.T, h2, i, j, M)
                    )
            for j in range(thread, F, threads):
                for i in range(M):
                    d_b1[j] += d_z1_bar[i, j] + d_z1[i, j]
            for j in range(thread, D, threads):
                for i in range(M):
                    d_b2[j] += d_z2_bar[i, j] + d_z2[i, j]
            cuda.syncthreads()

    return Kernels(
        ttt_mlp_forward,
        ttt_mlp_backward,
        ((FORWARD_TILES, M, WIDTH), (FORWARD_HIDDEN, M, F)),
        ((BACKWARD_TILES, M, WIDTH), (BACKWARD_HIDDEN, M, F)),
    )


def kernels(problem: Problem) -> Kernels:
    """The kernels that solve `problem`."""
    return _kernels(problem.mini_batch, problem.head_dim, problem.hidden, problem.causal, problem.eps)


def forward(inputs: MlpInputs, problem: Problem, every: int = numba_scan.EVERY) -> tuple[MlpOutputs, Residuals]:
    """Outputs of TTT-MLP, and what `backward` needs; the weights are kept once in `every` mini-batches.

    Raises:
        ValueError: a tensor has another shape, dtype or device than it must.
    """
    return numba_scan.forward(kernels, inputs, problem, every)


def backward(cotangents: MlpOutputs, residuals: Residuals, problem: Problem) -> MlpInputs:
    """Gradients of every input, from the cotangents of the output and of the final state.

    Raises:
        ValueError: a cotangent has another shape, dtype or device than it must.
    """
    return numba_scan.backward(kernels, cotangents, residuals, problem)
