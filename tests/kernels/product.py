"""Triton kernels for the tests of the static report."""

import triton
import triton.language as tl


@triton.jit
def add(p_a, p_b, p_out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_out + at, tl.load(p_a + at, at < n) + tl.load(p_b + at, at < n), at < n)


@triton.jit
def product(p_a, p_b, p_c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N), tl.arange(0, K)
    b_a = tl.load(p_a + m * K + k)
    b_b = tl.load(p_b + k[:, None] * N + n)
    tl.store(p_c + m * N + n, tl.dot(b_a, b_b))  # [M, K] @ [K, N] -> [M, N]


@triton.jit
def refused(p_a, N: tl.constexpr):
    tl.store(p_a + tl.arange(0, N), 0.0)  # a range of 48 is none of Triton's
