"""The critical path of one mini-batch and nothing else, in Triton: how fast can a chain of them be?

A step is what must follow the step before it: the matrix products from the fast weights to their update (two for
TTT-Linear: the training view and the update; four for TTT-MLP: two layers, the gradient through the second, the
update) with the two row reductions of LayerNorm's gradient between. One program runs the chain on 16 tokens that it
holds in registers; nothing is loaded or stored on the way. A kernel that spreads a step over more of the machine, or
orders it better, may be a little faster: it is a measured latency of the simplest chain, not a proof.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl

from spec.problem import InnerModel

TOKENS = 16  # the fewest rows that a matrix instruction takes
WARPS = (1, 2, 4)
_PRODUCTS: dict[InnerModel, int] = {"linear": 2, "mlp": 4}


@triton.jit
def _chain(p_x, p_w, n_steps, D: tl.constexpr, M: tl.constexpr, PRODUCTS: tl.constexpr):  # type: ignore[no-untyped-def]
    rows, columns = tl.arange(0, M), tl.arange(0, D)
    square = tl.arange(0, D)[:, None] * D + columns[None, :]
    x = tl.load(p_x + rows[:, None] * D + columns[None, :])  # [M, D]
    w = tl.load(p_w + square)  # [D, D], fp32
    xt = tl.trans(x)
    for _ in range(n_steps):
        z = tl.dot(x, w.to(tl.bfloat16))  # [M, D] @ [D, D] -> [M, D]
        for _ in tl.static_range(PRODUCTS - 2):
            z = tl.dot(z.to(tl.bfloat16), w.to(tl.bfloat16))
        mean = tl.sum(z, 1) / D
        centred = z - mean[:, None]
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + 1e-6)
        g_z = centred * rstd[:, None]
        w -= 1e-3 * tl.dot(xt, g_z.to(tl.bfloat16))  # [D, M] @ [M, D] -> [D, D]
    tl.store(p_w + square, w)


def calls(inner_model: InnerModel, head_dim: int, steps: int) -> Iterator[Callable[[], None]]:
    """A chain of so many steps on one multiprocessor, for each number of warps; D is rounded up to a power of 2."""
    size = triton.next_power_of_2(head_dim)
    x = torch.randn(TOKENS, size, device="cuda").to(torch.bfloat16)
    w = torch.randn(size, size, device="cuda") / size**0.5
    for warps in WARPS:
        launch = functools.partial(_chain[(1,)], num_warps=warps)
        yield functools.partial(launch, x, w, steps, size, TOKENS, _PRODUCTS[inner_model])
