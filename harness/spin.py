"""A kernel of known duration, in Triton: it spins until the GPU's own nanosecond counter has moved on by so much."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer


@triton.jit
def _spin(p_out, ns, NOW: tl.constexpr):  # type: ignore[no-untyped-def]
    start = NOW()
    now = NOW()
    while now - start < ns:
        now = NOW()
    tl.store(p_out, now)


def spin(ns: int) -> None:
    """Keep one warp of the device busy for so many nanoseconds, on PyTorch's stream."""
    _spin[(1,)](torch.empty(1, dtype=torch.int64, device="cuda"), ns, globaltimer, num_warps=1)
