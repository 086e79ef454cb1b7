"""What the GPU says of itself while it is measured: clock, power, and why it runs slower than it could.

Source: NVML's documentation of nvmlDeviceGetCurrentClocksEventReasons; package nvidia-ml-py.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

# The reasons that lower the clock below what was asked for; idling and clocks that a user set are none.
_THROTTLES = {
    "power cap": 0x4,
    "hardware slowdown": 0x8,
    "software thermal slowdown": 0x20,
    "hardware thermal slowdown": 0x40,
    "power brake": 0x80,
}


class GpuState(NamedTuple):
    """One reading: the clock of the multiprocessors in MHz, the board's power in W, why it is throttled."""

    sm_clock_mhz: float
    power_w: float
    throttles: tuple[str, ...]


def read() -> GpuState | None:
    """The state of the GPU that CUDA uses first; None where NVML is not to be had."""
    found = _nvml()
    if found is None:
        return None
    nvml, handle = found
    try:
        reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
        clock = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
        power = nvml.nvmlDeviceGetPowerUsage(handle) / 1e3
    except nvml.NVMLError:
        return None
    return GpuState(float(clock), power, tuple(name for name, bit in _THROTTLES.items() if reasons & bit))


@functools.cache
def _nvml() -> tuple[Any, Any] | None:
    try:
        import pynvml
    except ImportError:
        return None
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    try:
        pynvml.nvmlInit()
        if first.startswith("GPU-"):
            return pynvml, pynvml.nvmlDeviceGetHandleByUUID(first)
        return pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(first) if first.isdigit() else 0)
    except pynvml.NVMLError:
        return None
