"""How long a call takes: the one function that every time in a report comes from.

The rule is the same for every framework: the host's clock around one call and the wait for its results. It
includes launch overhead, and says so: the `timer` of such a row is `host_sync`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.frameworks import Framework

TIMER = "host_sync"
WARM_UP_CALLS = 2
SAMPLES = (5, 50)  # at least, at most
SECONDS = 1.0  # stop sampling after this long, once there are enough


@dataclass(frozen=True)
class Timing:
    """Times in milliseconds over `samples` calls; `first_call_s` in seconds, compilation and autotuning in it."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    first_call_s: float
    samples: int
    peak_memory_bytes: int | None


def measure(call: Callable[[], Any], framework: Framework) -> Timing:
    """Time `call` warm: its inputs are in whatever cache the call before left them in."""

    def once() -> float:
        start = time.perf_counter()
        framework.synchronize(call())
        return time.perf_counter() - start

    first = once()
    for _ in range(WARM_UP_CALLS):
        once()
    framework.reset_peak_memory()
    samples: list[float] = []
    while len(samples) < SAMPLES[0] or (sum(samples) < SECONDS and len(samples) < SAMPLES[1]):
        samples.append(once())
    p20, median, p80 = np.percentile(np.array(samples) * 1e3, [20, 50, 80])
    return Timing(float(median), float(p20), float(p80), first, len(samples), framework.peak_memory_bytes())
