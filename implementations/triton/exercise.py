"""Small problems through every Triton kernel, forward and backward, for a tool that watches kernels run.

    python -m implementations.triton.exercise  # once without it: Triton keeps what it compiles
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python -m implementations.triton.exercise

Arguments choose by a part of the line (`split`, `M=16`). Without a GPU it needs TRITON_INTERPRET=1.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

from implementations.exercise import Run, exercise
from implementations.triton import split_linear, ttt_linear, ttt_mlp, ttt_mlp_offchain

SIZES = ((64, 16, True), (64, 64, True), (64, 64, False))  # D, M
SMALL = ((32, 16, True),)
TILES = ((96, 16, True),)


def runs() -> Iterator[Run]:
    """Twelve mini-batches in groups of eight, so that one group is full and one is not."""
    pages = {
        "linear/chain": ("linear", ttt_linear, SIZES + SMALL),
        "linear/split": ("linear", split_linear, SIZES + SMALL),
        "mlp/chain": ("mlp", ttt_mlp, SIZES + SMALL),
        "mlp/offchain": ("mlp", ttt_mlp_offchain, SIZES + SMALL + TILES),
    }
    for name, (inner_model, page, sizes) in pages.items():
        yield Run(name, inner_model, partial(page.forward, group=8), page.backward, sizes, 12)


if __name__ == "__main__":
    exercise(runs(), sys.argv[1:])
