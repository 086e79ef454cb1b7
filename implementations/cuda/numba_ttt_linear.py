"""TTT-Linear in numba.cuda, to be read beside `implementations/torch/ttt_linear.py`: plain fp32, no tensor cores.

One thread block runs one chain: the mini-batches of one head of one sequence, one after another. Its threads are a
grid of rows and columns that walks over every [M D], [M M] and [D D] matrix; for a LayerNorm one thread takes a whole
row. `cuda.syncthreads()` stands wherever a thread is about to read what another one wrote.

Two things are arranged differently from the PyTorch page, and equal to it. The inner learning rate goes into the
inner gradient once, `h = lr * g_z1`, so that eta is never formed:

    z1_bar = xq w1 + b1 - eta_i (tril(xq xk^T + 1) h)        eta_i = token_eta[i]
    w1'    = w1 - eta_last xk^T h                            eta_last = token_eta[M - 1]

And without causality the read-out from the updated weights is the same sum without the mask, with eta_i = eta_last.

Bytes: the inputs and the output once, plus the fast weights in global memory (the L1 and L2 caches hold them): they
and the tiles that do not fit into shared memory are where this page's time goes. Source: arXiv 2407.04620, section
2.5; the backward is this repository's.
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
    inner_gradient,
    inner_gradient_backward,
    normalise,
    project,
    tile,
)
from implementations.cuda.numba_scan import Kernels, Residuals
from spec.problem import Problem
from spec.tensors import LinearInputs, LinearOutputs


@functools.cache
def _kernels(M: int, D: int, CAUSAL: bool, eps: float) -> Kernels:
    """The kernels for these sizes, which are constants in them."""
    EPS = np.float32(eps)
    WIDTH = max(M, D) + 1  # of a tile: a column more, so that rows begin in different banks of shared memory
    FORWARD_TILES, BACKWARD_TILES = 6, 13
    FORWARD_FIT = numba_scan.fitting(FORWARD_TILES, M, WIDTH)
    BACKWARD_FIT = numba_scan.fitting(BACKWARD_TILES, M, WIDTH)
    FORWARD_SHARED = (FORWARD_FIT, M, WIDTH) if FORWARD_FIT else (1, 1, 1)
    BACKWARD_SHARED = (BACKWARD_FIT, M, WIDTH) if BACKWARD_FIT else (1, 1, 1)

    @cuda.jit
    def ttt_linear_forward(inputs, outputs, kept, scratch, first, count, every):
        head, batch = cuda.blockIdx.x, cuda.blockIdx.y
        row, column, rows, columns = cuda.threadIdx.y, cuda.threadIdx.x, cuda.blockDim.y, cuda.blockDim.x
        thread, threads = row * columns + column, rows * columns

        shared = cuda.shared.array(FORWARD_SHARED, float32)
        tiles = scratch[0][batch, head]
        xk = tile(shared, tiles, 0, FORWARD_FIT)
        h = tile(shared, tiles, 1, FORWARD_FIT)  # g_z1, then lr * g_z1
        attn = tile(shared, tiles, 2, FORWARD_FIT)
        xq = tile(shared, tiles, 3, FORWARD_FIT)
        z = tile(shared, tiles, 4, FORWARD_FIT)  # z1, then z1_bar
        target = tile(shared, tiles, 5, FORWARD_FIT)

        token_eta, gamma, beta = inputs.token_eta, inputs.ln_weight[head], inputs.ln_bias[head]
        w1, b1 = outputs.final_w1[batch, head], outputs.final_b1[batch, head]
        kept_w1, kept_b1 = kept
        eta_last = token_eta[M - 1]

        for n in range(first, first + count):
            t = n * M
            if (n - first) % every == 0:
                for i in range(row, D, rows):
                    for j in range(column, D, columns):
                        kept_w1[(n - first) // every, batch, head, i, j] = w1[i, j]
                for j in range(thread, D, threads):
                    kept_b1[(n - first) // every, batch, head, j] = b1[j]
            for i in range(row, M, rows):
                for j in range(column, D, columns):
                    xq[i, j] = inputs.xq[batch, t + i, head, j]
                    xk[i, j] = inputs.xk[batch, t + i, head, j]
                    target[i, j] = inputs.xv[batch, t + i, head, j] - xk[i, j]
            cuda.syncthreads()

            for i in range(row, M, rows):
                for j in range(column, D, columns):
                    z[i, j] = dot(xk, w1, i, j, D) + b1[j]  # [M D] @ [D D] -> [M D]
                for j in range(column, M, columns):  # [M D] @ [D M] -> [M M]
                    attn[i, j] = dot(xq, xk.T, i, j, D) + ONE if j <= i or not CAUSAL else ZERO
            cuda.syncthreads()

            for i in range(thread, M, threads):
                inner_gradient(z[i], target[i], gamma, beta, h[i], D, EPS)
                for j in range(D):
                    h[i, j] *= inputs.lr[batch, t + i, head]
            cuda.syncthreads()

            for i in range(row, M, rows):
                for j in range(column, D, columns):
                    read = eta_of(token_eta, i, M, CAUSAL) * dot(attn, h, i, j, M)  # [M M] @ [M D] -> [M D]
                    z[i, j] = dot(xq, w1, i, j, D) + b1[j] - read
            cuda.syncthreads()

            for i in range(row, D, rows):
                for j in range(column, D, columns):
                    w1[i, j] -= eta_last * dot(xk.T, h, i, j, M)  # [D M] @ [M D] -> [D D]
            for j in range(thread, D, threads):
                for i in range(M):
                    b1[j] -= eta_last * h[i, j]
            for i in range(thread, M, threads):
                normalise(z[i], D, EPS)
            cuda.syncthreads()

            for i in range(row, M, rows):
                for j in range(column, D, columns):
                    outputs.out[batch, t + i, head, j] = xq[i, j] + gamma[j] * z[i, j] + beta[j]

    @cuda.jit
    def ttt_linear_backward(inputs, cotangents, kept, gradients, scratch, first, count):
        head, batch = cuda.blockIdx.x, cuda.blockIdx.y
        row, column, rows, columns = cuda.threadIdx.y, cuda.threadIdx.x, cuda.blockDim.y, cuda.blockDim.x
        thread, threads = row * columns + column, rows * columns

        shared = cuda.shared.array(BACKWARD_SHARED, float32)
        rstd = cuda.shared.array(M, float32)
        tiles = scratch[0][batch, head]
        xk = tile(shared, tiles, 0, BACKWARD_FIT)
        h = tile(shared, tiles, 1, BACKWARD_FIT)  # lr * g_z1
        attn = tile(shared, tiles, 2, BACKWARD_FIT)
        d_attn = tile(shared, tiles, 3, BACKWARD_FIT)
        d_z1_bar = tile(shared, tiles, 4, BACKWARD_FIT)
        d_z1 = tile(shared, tiles, 5, BACKWARD_FIT)  # d_h, then d_g_z1, then d_z1
        xq = tile(shared, tiles, 6, BACKWARD_FIT)
        g_z1 = tile(shared, tiles, 7, BACKWARD_FIT)
        x_hat = tile(shared, tiles, 8, BACKWARD_FIT)  # z1, then its x_hat
        x_hat_bar = tile(shared, tiles, 9, BACKWARD_FIT)  # z1_bar, then its x_hat
        d_target = tile(shared, tiles, 10, BACKWARD_FIT)  # target, then d_target
        pulled = tile(shared, tiles, 11, BACKWARD_FIT)  # what the update sends to h, then each token's d_ln_weight
        d_out = tile(shared, tiles, 12, BACKWARD_FIT)

        token_eta, gamma, beta = inputs.token_eta, inputs.ln_weight[head], inputs.ln_bias[head]
        d_w1, d_b1 = gradients.w1[batch, head], gradients.b1[batch, head]
        kept_w1, kept_b1 = kept
        eta_last = token_eta[M - 1]

        for n in range(first + count - 1, first - 1, -1):
            t = n * M
            w1, b1 = kept_w1[n - first, batch, head], kept_b1[n - first, batch, head]
            for i in range(row, M, rows):
                for j in range(column, D, columns):
                    xq[i, j] = inputs.xq[batch, t + i, head, j]
                    xk[i, j] = inputs.xk[batch, t + i, head, j]
                    d_target[i, j] = inputs.xv[batch, t + i, head, j] - xk[i, j]
                    d_out[i, j] = cotangents[0][batch, t + i, head, j]
            cuda.syncthreads()

            # The forward again, up to the read-out.
            for i in range(row, M, rows):
                for j in range(column, D, columns):
                    x_hat[i, j] = dot(xk, w1, i, j, D) + b1[j]
                for j in range(column, M, columns):
                    attn[i, j] = dot(xq, xk.T, i, j, D) + ONE if j <= i or not CAUSAL else ZERO
            cuda.syncthreads()
            for i in range(thread, M, threads):
                rstd[i] = inner_gradient(x_hat[i], d_target[i], gamma, beta, g_z1[i], D, EPS)
                for j in range(D):
                    h[i, j] = inputs.lr[batch, t + i, head] * g_z1[i, j]
            cuda.syncthreads()
            for i in range(row, M, rows):
                for j in range(column, D, columns):
                    read = eta_of(token_eta, i, M, CAUSAL) * dot(attn, h, i, j, M)
                    x_hat_bar[i, j] = dot(xq, w1, i, j, D) + b1[j] - read
            cuda.syncthreads()

            # out = xq + LN(z1_bar)
            for i in range(thread, M, threads):
                rstd_bar = normalise(x_hat_bar[i], D, EPS)
                for j in range(D):
                    d_z1_bar[i, j] = d_out[i, j] * gamma[j]
                project(d_z1_bar[i], x_hat_bar[i], rstd_bar, D)
            cuda.syncthreads()

            # The read-out, and what the update w1' = w1 - eta_last xk^T h sends to eta_last * h.
            for i in range(row, M, rows):
                for j in range(column, M, columns):  # without eta_i, as attn
                    d_attn[i, j] = -dot(d_z1_bar, h.T, i, j, D) if j <= i or not CAUSAL else ZERO
                for j in range(column, D, columns):
                    pulled[i, j] = dot(xk, d_w1, i, j, D) + d_b1[j]
            cuda.syncthreads()
            for i in range(thread, M, threads):
                gradients.token_eta[0, batch, t + i, head] = dot_rows(d_attn[i], attn[i], M)
                gradients.token_eta[1, batch, t + i, head] = -dot_rows(pulled[i], h[i], D)
                for j in range(M):
                    attn[i, j] *= eta_of(token_eta, i, M, CAUSAL)
                    d_attn[i, j] *= eta_of(token_eta, i, M, CAUSAL)
            cuda.syncthreads()
            for i in range(row, M, rows):
                for j in range(column, D, columns):
                    d_z1[i, j] = -dot(attn.T, d_z1_bar, i, j, M) - eta_last * pulled[i, j]  # d_h
                    gradients.xq[batch, t + i, head, j] = (
                        d_out[i, j] + dot(d_z1_bar, w1.T, i, j, D) + dot(d_attn, xk, i, j, M)
                    )
            cuda.syncthreads()

            # h = lr * g_z1, and the inner gradient's second order.
            for i in range(thread, M, threads):
                gradients.lr[batch, t + i, head] = dot_rows(d_z1[i], g_z1[i], D)
                for j in range(D):
                    d_z1[i, j] *= inputs.lr[batch, t + i, head]
                inner_gradient_backward(
                    d_z1[i], g_z1[i], x_hat[i], rstd[i], d_target[i], gamma, beta, pulled[i], D
                )
            cuda.syncthreads()

            # z1 = xk w1 + b1
            for i in range(row, M, rows):
                for j in range(column, D, columns):
                    gradients.xv[batch, t + i, head, j] = d_target[i, j]
                    gradients.xk[batch, t + i, head, j] = (
                        dot(d_attn.T, xq, i, j, M)
                        - eta_last * dot(h, d_w1.T, i, j, D)
                        - d_target[i, j]
                        + dot(d_z1, w1.T, i, j, D)
                    )
            for j in range(thread, D, threads):
                d_gamma = d_beta = ZERO
                for i in range(M):
                    d_gamma += d_out[i, j] * x_hat_bar[i, j] + pulled[i, j]
                    d_beta += d_out[i, j] - d_target[i, j]
                gradients.ln_weight[n, batch, head, j] = d_gamma
                gradients.ln_bias[n, batch, head, j] = d_beta
            cuda.syncthreads()
            for i in range(row, D, rows):
                for j in range(column, D, columns):
                    d_w1[i, j] += dot(xq.T, d_z1_bar, i, j, M) + dot(xk.T, d_z1, i, j, M)
            for j in range(thread, D, threads):
                for i in range(M):
                    d_b1[j] += d_z1_bar[i, j] + d_z1[i, j]
            cuda.syncthreads()

    return Kernels(
        ttt_linear_forward,
        ttt_linear_backward,
        ((FORWARD_TILES, M, WIDTH),),
        ((BACKWARD_TILES, M, WIDTH),),
    )


def kernels(problem: Problem) -> Kernels:
    """The kernels that solve `problem`."""
    return _kernels(problem.mini_batch, problem.head_dim, problem.causal, problem.eps)


def forward(
    inputs: LinearInputs, problem: Problem, every: int = numba_scan.EVERY
) -> tuple[LinearOutputs, Residuals]:
    """Outputs of TTT-Linear, and what `backward` needs; the weights are kept once in `every` mini-batches.

    Raises:
        ValueError: a tensor has another shape, dtype or device than it must.
    """
    return numba_scan.forward(kernels, inputs, problem, every)


def backward(cotangents: LinearOutputs, residuals: Residuals, problem: Problem) -> LinearInputs:
    """Gradients of every input, from the cotangents of the output and of the final state.

    Raises:
        ValueError: a cotangent has another shape, dtype or device than it must.
    """
    return numba_scan.backward(kernels, cotangents, residuals, problem)
