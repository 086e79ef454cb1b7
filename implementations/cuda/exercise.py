"""Small problems through every CUDA C++ kernel, forward and backward, for a tool that watches kernels run.

    python -m implementations.cuda.exercise  # once without it: CuPy keeps what NVRTC compiles
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python -m implementations.cuda.exercise

Arguments choose by a part of the line (`registers/2`); `--mbarriers` takes mbarriers for named barriers, whose
bar.arrive racecheck misses.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from implementations.cuda import cupy_linear_split, cupy_mlp_registers, cupy_plain_linear, cupy_plain_mlp, module
from implementations.exercise import Run, exercise

SIZES = ((64, 16, True), (64, 64, True), (64, 64, False), (64, 32, True), (32, 32, False), (16, 16, False))  # D, M
WIDE = ((96, 16, True), (96, 16, False))  # by two blocks a chain, in registers


def runs() -> Iterator[Run]:
    """Groups of two mini-batches of the three, so that one is full and one is not."""
    for split in (1, 2):  # blocks of a chain
        forward = partial(cupy_linear_split.forward, group=2)
        backward = partial(cupy_linear_split.backward, split=split)
        yield Run(f"linear/split/{split}", "linear", forward, backward, SIZES, 3)
        forward = partial(cupy_mlp_registers.forward, group=2, split=split)
        sizes = SIZES + WIDE if split == 2 else SIZES
        yield Run(f"mlp/registers/{split}", "mlp", forward, cupy_mlp_registers.backward, sizes, 3)
    forward, backward = partial(cupy_plain_linear.forward, group=2), cupy_plain_linear.backward
    yield Run("linear/plain", "linear", forward, backward, SIZES, 3)
    forward, backward = partial(cupy_plain_mlp.forward, group=2), cupy_plain_mlp.backward
    yield Run("mlp/plain", "mlp", forward, backward, SIZES, 3)


def _launch_with_mbarriers(kernel: Any, *arguments: Any) -> None:
    module.launch(replace(kernel, options=(*kernel.options, "-DTTT_MBARRIERS")), *arguments)


if __name__ == "__main__":
    wanted = [part for part in sys.argv[1:] if part != "--mbarriers"]
    if len(wanted) + 1 < len(sys.argv):
        cupy_linear_split.launch = _launch_with_mbarriers
    exercise(runs(), wanted)
