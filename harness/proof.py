"""Does the device timer tell the truth? Kernels whose duration is known by another clock, in each framework.

- A kernel that spins until the GPU's own nanosecond counter has moved on by so much (Triton on PyTorch, CuPy).
- A call so long that the host's overhead is nothing: the host's clock knows its duration (every framework).
- A host that sleeps before it launches one small kernel: none of that may show on the device.
- A call that returns before the device is done: all of its kernels must be inside the window.
"""

from __future__ import annotations

import csv
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from harness.device_clock import Clock, HostClock, open_clock
from harness.frameworks import Unsupported, open_framework

FILE = "timer_proof.csv"
TOLERANCE = 0.03
SPIN_MS = (0.2, 2.0, 20.0)
LONG_MS = 300.0
SLEEP_MS = 20.0
SECONDS = 300  # for all of them
LEAK_MS = 0.05  # what one small kernel may take at most
CALLS = 5
_SPIN_CU = r"""
extern "C" __global__ void spin(unsigned long long ns) {
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    while (now - start < ns);
}
"""


@dataclass(frozen=True)
class Proof:
    """One line of `timer_proof.csv`; times in milliseconds, medians of `CALLS` calls.

    Attributes:
        known_ms: what `known_by` says the call takes on the device.
        returned_ms: until the call returned, not waited for.
        error: `device_ms / known_ms - 1`; empty where the known time is an upper bound.
    """

    framework: str
    what: str
    timer: str
    known_by: str
    known_ms: float
    device_ms: float
    host_ms: float
    returned_ms: float
    launches: int | None
    error: float | None
    right: bool


def run() -> tuple[list[Proof], list[str]]:
    """Every proof that this machine can run, and each framework that is not there, with the reason."""
    proofs: list[Proof] = []
    missing = []
    for prove in (_torch, _jax, _cupy, _numba):
        try:
            proofs += prove()
        except (ImportError, AttributeError, Unsupported) as error:  # AttributeError: numba-cuda 0.30 on NumPy 2.5
            missing.append(f"{prove.__name__.strip('_')}: {type(error).__name__}: {error}")
    return proofs, missing


def save(folder: Path, proofs: list[Proof]) -> Path:
    """Write `timer_proof.csv`."""
    path = folder / FILE
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Proof))
        writer.writerows(map(astuple, proofs))
    return path


class _Waiting:
    """What a clock asks of a framework that the registry does not know: CuPy's and numba's."""

    device = "cuda"

    def __init__(self, name: str, synchronize: Callable[[], Any], touch: Callable[[], Any]):
        self.name, self._synchronize, self._touch = name, synchronize, touch

    def synchronize(self, result: Any) -> None:
        self._synchronize()

    def touch(self) -> None:
        self._touch()
        self._synchronize()


def _torch() -> Iterator[Proof]:
    framework = open_framework("torch", "cuda")
    import torch

    from harness.spin import spin

    out = torch.zeros(1, device="cuda")
    x = torch.randn(4096, 4096, device="cuda") / 64

    def long(n: int) -> Any:
        y = x
        for _ in range(n):
            y = y @ x
        return y

    spins = [(ms, functools.partial(spin, int(ms * 1e6))) for ms in SPIN_MS]
    yield from _proofs("torch", framework, spins, long, lambda: out + 1)


def _jax() -> Iterator[Proof]:
    framework = open_framework("jax", "cuda")
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.float32) / 90

    @functools.partial(jax.jit, static_argnums=0)
    def chain(n: int) -> Any:
        y = x
        for _ in range(n):
            y = y @ x
        return y

    add = jax.jit(lambda y: y + 1)
    small = jnp.zeros(1)
    yield from _proofs("jax", framework, [], chain, lambda: add(small))


def _cupy() -> Iterator[Proof]:
    import cupy
    import numpy as np

    kernel = cupy.RawKernel(_SPIN_CU, "spin")
    out, x = cupy.zeros(1), cupy.random.standard_normal((4096, 4096), dtype=cupy.float32) / 64

    def long(n: int) -> Any:
        y = x
        for _ in range(n):
            y = y @ x
        return y

    waiting = _Waiting("cupy", cupy.cuda.runtime.deviceSynchronize, lambda: out + 1)
    spins = [(ms, functools.partial(kernel, (1,), (1,), (np.uint64(ms * 1e6),))) for ms in SPIN_MS]
    yield from _proofs("cupy", waiting, spins, long, lambda: out + 1)


def _numba() -> Iterator[Proof]:
    import numpy as np
    from numba import cuda

    @cuda.jit
    def multiply(out, n):
        value = out[0]
        for _ in range(n):
            value = value * np.float32(1.000001) + np.float32(1e-6)
        out[0] = value

    out = cuda.to_device(np.zeros(1, np.float32))

    def small() -> None:
        multiply[1, 1](out, 1)

    waiting = _Waiting("numba", cuda.synchronize, small)
    yield from _proofs("numba", waiting, [], lambda n: multiply[1, 1](out, n * 100_000), small)


def _proofs(
    name: str,
    framework: Any,
    spins: Sequence[tuple[float, Callable[[], Any]]],
    long: Callable[[int], Any],
    small: Callable[[], Any],
) -> Iterator[Proof]:
    clock = open_clock(framework)
    for known_ms, spin in spins:
        yield _prove(name, f"spins {known_ms:g} ms", "GPU's nanosecond counter", known_ms, clock, framework, spin)
    host = HostClock(framework)
    count = max(round(10 * LONG_MS / _median(host, lambda: long(10))), 1)
    known_ms = _median(host, lambda: long(count))
    yield _prove(name, f"{count} steps", "host's clock", known_ms, clock, framework, lambda: long(count))

    def sleepy() -> Any:
        time.sleep(SLEEP_MS / 1e3)
        return small()

    what = f"host sleeps {SLEEP_MS:g} ms, one small kernel"
    yield _prove(name, what, "upper bound", LEAK_MS, clock, framework, sleepy)


def _prove(
    name: str, what: str, known_by: str, known_ms: float, clock: Clock, framework: Any, call: Callable[[], Any]
) -> Proof:
    clock.time([call])
    timed = clock.time([call] * CALLS)
    returned = []
    for _ in range(CALLS):
        start = time.perf_counter()
        result = call()
        returned.append((time.perf_counter() - start) * 1e3)
        framework.synchronize(result)
    device_ms, host_ms = statistics.median(timed.ms), _median(HostClock(framework), call)
    bound = known_by == "upper bound"
    error = None if bound else device_ms / known_ms - 1
    right = device_ms <= known_ms if error is None else abs(error) <= TOLERANCE
    returned_ms = statistics.median(returned)
    values = name, what, clock.name, known_by, known_ms, device_ms, host_ms, returned_ms, timed.launches, error, right
    return Proof(*values)


def _median(clock: Clock, call: Callable[[], Any]) -> float:
    clock.time([call])
    return statistics.median(clock.time([call] * CALLS).ms)
