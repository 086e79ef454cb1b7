"""The gradients of what every mini-batch shares, from the parts that the chunks of `split_linear` wrote."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from implementations.triton.blocks import store_row, wide


class Parts(NamedTuple):
    """Pointers to parts of gradients: of each chunk, of its read-out and of its update."""

    token_eta: Any  # [B, H, chunks, M] of the read-out
    eta_last: Any  # [2, B, H, chunks] of the last token_eta
    ln_weight: Any  # [2, B, H, chunks, D]
    ln_bias: Any  # [2, B, H, chunks, D]


@triton.jit
def _sum(p, first, last, head, heads, chunks, L: tl.constexpr, BLOCK_L: tl.constexpr, ROWS: tl.constexpr):
    """[L], of `blocks H chunks L` the sum over chunks and over the blocks from `first` to before `last`."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_L)[None, :]
    total = tl.zeros([ROWS, BLOCK_L], tl.float32)
    for block in range(first, last):
        start = p + wide(block * heads + head) * chunks * L
        for chunk in range(0, chunks, ROWS):
            inside = (chunk + rows < chunks) & (columns < L)
            total += tl.load(start + (chunk + rows) * L + columns, inside, 0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["batch", "chunks"])  # one program for every length
def split_sums(
    parts, d_token_eta, d_ln_weight, d_ln_bias, batch, heads, chunks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, READ: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """For head `program_id(0) % heads` one of three gradients, always summed in the same order.

    That of token_eta is not summed over heads, [H, M]; of the read-out it has a part if READ.
    """
    head, which = tl.program_id(0) % heads, tl.program_id(0) // heads
    if which == 0:
        total = _sum(parts.ln_weight, 0, 2 * batch, head, heads, chunks, D, BLOCK_D, ROWS)
        store_row(d_ln_weight, total, head, D, BLOCK_D)
    elif which == 1:
        total = _sum(parts.ln_bias, 0, 2 * batch, head, heads, chunks, D, BLOCK_D, ROWS)
        store_row(d_ln_bias, total, head, D, BLOCK_D)
    else:
        last = _sum(parts.eta_last, 0 if READ else batch, 2 * batch, head, heads, chunks, 1, 1, ROWS)
        d_eta = tl.where(tl.arange(0, M) == M - 1, tl.sum(last), 0.0)
        if READ:
            d_eta += _sum(parts.token_eta, 0, batch, head, heads, chunks, M, M, ROWS)
        store_row(d_token_eta, d_eta, head, M, M)
