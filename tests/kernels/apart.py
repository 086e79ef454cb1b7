"""Products added to sums by the blocks of the Triton pages."""

import triton
import triton.language as tl

from implementations.triton import blocks, mlp_blocks


@triton.jit
def sums(p_a, p_b, p_c, HOW: tl.constexpr):
    """c + a @ b, three ways."""
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    a, b, c = tl.load(p_a + at), tl.load(p_b + at), tl.load(p_c + at)
    if HOW == "matmul":
        c += blocks.matmul(a, b, a.dtype, "ieee")
    elif HOW == "matmul_add":
        c = blocks.matmul_add(a, b, c, a.dtype, "ieee")
    else:
        c += mlp_blocks.dot(a, b, "ieee")
    tl.store(p_c + at, c)
