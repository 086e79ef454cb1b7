"""The forward of `triton.chain`, and the same made 5 % slower: pages for proofs about timing.

One kernel, so that a call waits for no launch; the slower one is followed by a kernel that spins.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from harness.spin import spin
from spec.problem import Problem

SLOWDOWN = 0.05
_HELD_CYCLES = 2_000_000  # about a millisecond: the launches are there when the call starts
_CALLS = 9
_page = importlib.import_module("implementations.triton.ttt_linear")  # kernels have no types to follow


def forward(inputs: Any, problem: Problem) -> tuple[Any, None]:
    """The page's forward, for TTT-Linear."""
    return _page.forward(inputs, problem)[0], None


def forward_slow(inputs: Any, problem: Problem) -> tuple[Any, None]:
    """`forward`, and `SLOWDOWN` of its time more, which is measured in each process once."""
    outputs, _ = forward(inputs, problem)
    spin(_spin_ns(problem, lambda: forward(inputs, problem)))
    return outputs, None


_durations: dict[Problem, int] = {}


def _spin_ns(problem: Problem, call: Callable[[], Any]) -> int:
    if problem not in _durations:
        _durations[problem] = round(SLOWDOWN * _milliseconds(call) * 1e6)
    return _durations[problem]


def _milliseconds(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(_CALLS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HELD_CYCLES)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[_CALLS // 2]
