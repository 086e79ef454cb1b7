"""How the walks of TTT-MLP with M = 16 read and write: every lane what it computes with, without shared memory between.

A product [16, K] @ [K, 8] of the tensor cores (`mma.m16n8k16`) leaves rows g, g + 8 and columns 2 t, 2 t + 1 in lane
4 g + t, and takes its left operand the same way. Triton loads in another order and brings the numbers to their lanes
through shared memory, behind barriers. Here the tensor that is loaded has the lanes as its first axis, so that Triton
gives each its own; reshaping and permuting it to the block that it is moves nothing.

So that what a lane has lies together in memory, the walks take the tokens of a mini-batch and the columns of D in
another order, `token` and `column`: all that is summed over them is the same in any order. A block is [W, F/W, N] for
N = M or D: warp w has hidden units w F/W and on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from implementations.triton.blocks import INTERPRETED, matmul_add, nearest, token_pointers, wide


@triton.jit
def column(D: tl.constexpr):
    """[D]: which column comes where; a lane has eight in a row, or four where D = 16."""
    d = tl.arange(0, D)
    J: tl.constexpr = 4 if D >= 32 else 2
    return d // (8 * J) * (8 * J) + d % 8 // 2 * (2 * J) + d // 8 % J * 2 + d % 2


@triton.jit
def token(M: tl.constexpr):
    """[M]: which token of the mini-batch comes where, likewise."""
    return column(M)


@triton.jit
def _apart(x):
    """[M, D] in the order of memory -> in that of `token` and `column`."""
    M: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    L: tl.constexpr = 4 if M >= 32 else 2
    J: tl.constexpr = 4 if D >= 32 else 2
    x = tl.reshape(x, [M // (8 * L), 4, L, 2, D // (8 * J), 4, J, 2])
    return tl.reshape(tl.permute(x, (0, 2, 1, 3, 4, 6, 5, 7)), [M, D])


@triton.jit
def _together(x):
    """The other way."""
    M: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    L: tl.constexpr = 4 if M >= 32 else 2
    J: tl.constexpr = 4 if D >= 32 else 2
    x = tl.reshape(x, [M // (8 * L), L, 4, 2, D // (8 * J), J, 4, 2])
    return tl.reshape(tl.permute(x, (0, 2, 1, 3, 4, 6, 5, 7)), [M, D])


@triton.jit
def load_tokens_apart(view, batch, head, n, M: tl.constexpr, D: tl.constexpr, AT: tl.constexpr = 0):
    """[M, D], as stored; columns AT and on."""
    return _apart(tl.load(token_pointers(view, batch, head, n, M)[:, None] + AT + tl.arange(0, D)[None, :]))


@triton.jit
def pointers_apart(view, batch, head, n, M: tl.constexpr):
    """[M] pointers to the tokens of a mini-batch."""
    start = wide(batch) * view.stride_b + wide(head) * view.stride_h + wide(n * M) * view.stride_t
    return view.p + start + token(M) * view.stride_t


@triton.jit
def _ask(p):
    """Ask for the lines of the pointers to be brought to the L2 cache."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [p.to(tl.int64)], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def ask_for(p, LINES: tl.constexpr):
    """Ask for `LINES` times 128 bytes from `p` on."""
    ONCE: tl.constexpr = LINES & -LINES  # a power of two
    for i in tl.static_range(LINES // ONCE):
        _ask(p + (i * ONCE + tl.arange(0, ONCE)) * (1024 // p.dtype.element_ty.primitive_bitwidth))


@triton.jit
def ask_for_tokens(view, batch, head, n, M: tl.constexpr):
    """Ask for the tokens of a mini-batch."""
    _ask(token_pointers(view, batch, head, n, M))


@triton.jit
def _offsets(F: tl.constexpr, N: tl.constexpr, W: tl.constexpr, TURNED: tl.constexpr, APART: tl.constexpr):
    """[32 W, F/W/8, N/V/4, V]: rows g, g + 8, ... of the warp's, every lane with groups of V numbers of [F, N].

    If TURNED, of [N, F]. Rows are APART from each other in memory, if that is not 0.
    """
    V: tl.constexpr = 8 if N >= 32 else 4
    lane, v = tl.arange(0, 32 * W)[:, None, None, None], tl.arange(0, V)[None, None, None, :]
    row, group = tl.arange(0, F // W // 8)[None, :, None, None], tl.arange(0, N // V // 4)[None, None, :, None]
    if TURNED:
        S: tl.constexpr = APART if APART else F
        return lane // 32 * (F // W) + lane // 4 % 8 + lane % 4 * (V * S) + row * 8 + group * (4 * V * S) + v * S
    else:
        S: tl.constexpr = APART if APART else N
        return (lane // 32 * (F // W) + lane // 4 % 8) * S + lane % 4 * V + row * (8 * S) + group * (4 * V) + v


@triton.jit
def load_block(
    p, F: tl.constexpr, N: tl.constexpr, W: tl.constexpr, TURNED: tl.constexpr = False, APART: tl.constexpr = 0
):
    """[W, F/W, N] of [F, N] from `p` on, as stored."""
    V: tl.constexpr = 8 if N >= 32 else 4
    x = tl.reshape(tl.load(p + _offsets(F, N, W, TURNED, APART)), [W, 8, 4, F // W // 8, N // V // 4, V // 2, 2])
    return tl.reshape(tl.permute(x, (0, 3, 1, 4, 5, 2, 6)), [W, F // W, N])


@triton.jit
def store_block(
    p, x, F: tl.constexpr, N: tl.constexpr, W: tl.constexpr, TURNED: tl.constexpr = False, APART: tl.constexpr = 0
):
    """The other way, rounded to what is stored there."""
    V: tl.constexpr = 8 if N >= 32 else 4
    x = tl.reshape(nearest(x, p.dtype.element_ty), [W, F // W // 8, 8, N // V // 4, V // 2, 4, 2])
    x = tl.reshape(tl.permute(x, (0, 2, 5, 1, 3, 4, 6)), [32 * W, F // W // 8, N // V // 4, V])
    tl.store(p + _offsets(F, N, W, TURNED, APART), x)


@triton.jit
def _narrow(M: tl.constexpr, D: tl.constexpr):
    """[4 D, 4] offsets in [D, M]: 8 of the columns a warp, all tokens."""
    lane, e = tl.arange(0, 4 * D)[:, None], tl.arange(0, 4)[None, :]
    J: tl.constexpr = 4 if D >= 32 else 2
    j, g = lane // 32, lane // 4 % 8
    d = j // J * (8 * J) + lane % 4 * (2 * J) + j % J * 2 + e % 2
    return d * M + g // 2 * 4 + g % 2 + e // 2 * 2


@triton.jit
def load_narrow(p, M: tl.constexpr, D: tl.constexpr):
    """[M, D] of [D, M] from `p` on, as stored."""
    if M == 16:
        x = tl.reshape(tl.load(p + _narrow(M, D)), [D // 8, 8, 4, 2, 2])
        return tl.reshape(tl.permute(x, (3, 1, 0, 2, 4)), [M, D])
    else:
        return _apart(tl.trans(tl.load(p + tl.arange(0, D)[:, None] * M + tl.arange(0, M)[None, :])))


@triton.jit
def store_narrow(p, x, M: tl.constexpr, D: tl.constexpr):
    """The other way, rounded to what is stored there."""
    x = nearest(x, p.dtype.element_ty)
    if M == 16:
        x = tl.reshape(x, [2, 8, D // 8, 4, 2])
        tl.store(p + _narrow(M, D), tl.reshape(tl.permute(x, (2, 1, 3, 0, 4)), [4 * D, 4]))
    else:
        tl.store(p + tl.arange(0, D)[:, None] * M + tl.arange(0, M)[None, :], tl.trans(_together(x)))


@triton.jit
def everywhere(x, W: tl.constexpr):
    """[W, ...]: the operand `x` of a product for every warp."""
    return tl.broadcast_to(x[None, :, :], [W, x.shape[0], x.shape[1]])


@triton.jit
def by_memory(x):
    """`x` of 16 bits as it is, but an operand from here on is read from shared memory as the product goes.

    Triton would else have all of it in registers from where it was loaded on.
    """
    if not INTERPRETED:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, is_pure=False, pack=2)
    return x


@triton.jit
def _halves(x):
    """[W, P, N] -> two of [W, P/2, N]."""
    W: tl.constexpr = x.shape[0]
    P: tl.constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, [W, 2, P // 2, x.shape[2]]), (0, 2, 3, 1)))


@triton.jit
def over_hidden(x, w, c, DTYPE: tl.constexpr, PIECES: tl.constexpr = 4):
    """c [M, D] + x^T w of x [W, F/W, M] and w [W, F/W, D]: the sum over F, which crosses warps.

    In pieces: a warp needs all of a piece of x^T in its registers.
    """
    if PIECES > 1:
        x_a, x_b = _halves(x)
        w_a, w_b = _halves(w)
        c = over_hidden(x_a, w_a, c, DTYPE, PIECES // 2)
        return over_hidden(x_b, w_b, c, DTYPE, PIECES // 2)
    else:
        K: tl.constexpr = x.shape[0] * x.shape[1]
        x_t = tl.trans(tl.reshape(x, [K, x.shape[2]]))
        return matmul_add(x_t, tl.reshape(w, [K, w.shape[2]]), c, DTYPE, "ieee")  # [M, K] @ [K, D] -> [M, D]
