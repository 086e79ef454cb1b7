"""How one implementation is timed in one process: what is called, on which inputs, in blocks of calls.

Warm blocks call on one set of inputs, again and again. Cold blocks rotate over so many sets that more than three
times the L2 cache is touched before a set comes back. Every block starts with a call that is not counted, but
where a call is so slow that it is nothing beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from harness import gpu_state
from harness.device_clock import Clock, HostClock, Times, clock_for, clock_named
from harness.frameworks import Framework, Unsupported
from harness.gpu_state import GpuState
from implementations.registry import Device, Implementation
from spec.cases import Case
from spec.problem import Pass, Problem
from spec.tensors import Inputs, Outputs

Cache = Literal["cold", "warm"]
WARM_UP_CALLS = 2  # one of what is slow
SLOW_SECONDS = 0.1  # such a call warms itself up
LARGE_BYTES = 2**32  # such a stand gives back after each block what its framework holds unused
SETTLE_SECONDS = 1.0  # at most: calls until two readings of the clock agree
SETTLE_STEP_SECONDS = 0.1
COLD_L2 = 3  # so many times the L2 cache
MOST_SETS = 256  # smaller inputs would take thousands


@dataclass(frozen=True)
class Subject:
    """What is timed: an implementation on the inputs of `case`, drawn from `seed`; in the folder `numbers`, if any."""

    entry: Implementation
    case: Case
    problem: Problem
    seed: int
    device: Device
    numbers: Path | None = None


class Ready(NamedTuple):
    """A pass that can be timed.

    Attributes:
        first_call_s: of the first call, seconds, compilation and autotuning in it.
        call_ms: of one call, roughly, by the host.
        trial: one call by the clock that is used: how many kernels, and which.
    """

    first_call_s: float
    call_ms: float
    timer: str
    trial: Times
    peak_memory_bytes: int | None


class Block(NamedTuple):
    """Calls timed without a break: on the device, as many on the host, and the GPU's state right after them."""

    device: Times
    host_ms: list[float]
    state: GpuState | None


class Stand:
    """One subject in this process, with its inputs on the device; one pass at a time is ready to be timed."""

    def __init__(self, subject: Subject, framework: Framework, drawn: tuple[Inputs, Outputs]):
        self.subject = subject
        self._framework = framework
        self._page = subject.entry.page(subject.problem)
        inputs, cotangents = drawn
        one_set = sum(x.nbytes for x in inputs)
        needed = max(1, -(-COLD_L2 * framework.l2_bytes() // one_set))  # rounded up
        count = min(needed, MOST_SETS)
        self._can_be_cold = needed <= MOST_SETS and subject.device != "cpu"
        strided = subject.case.strided
        self._empty_bytes = framework.allocated_bytes()
        self._inputs = [framework.arrays(inputs, strided) for _ in range(count)]
        self._cotangents = [framework.arrays(cotangents, strided) for _ in range(count)]
        self._first_s: dict[str, float] = {}
        self._pass: Pass | None = None
        self._clock: Clock = HostClock(framework)
        self._calls: list[Callable[[], Any]] = []
        self._next = 0
        self._is_slow = self._is_large = False

    def start(self, pass_: Pass) -> None:
        """Make the first calls that a pass needs: what is compiled then may take minutes, of the host alone."""
        self._calls, self._pass, self._next = [], None, 0
        framework, page, problem = self._framework, self._page, self.subject.problem
        if "forward" not in self._first_s:
            self._first_s["forward"] = self._host_s(lambda: page.forward(self._inputs[0], problem))
        if pass_ != "forward" and "backward" not in self._first_s:
            _, residuals = page.forward(self._inputs[0], problem)
            self._first_s["backward"] = self._host_s(
                lambda: page.backward(self._cotangents[0], residuals, problem)
            )
            del residuals
            framework.release_memory()

    def ready(self, pass_: Pass, timer: str | None = None) -> Ready:
        """Make the calls of a pass, and warm them up; `timer` names the clock where it is settled."""
        self.start(pass_)
        framework = self._framework
        self._calls = [self._call(pass_, number) for number in range(len(self._inputs))]
        first = self._first_s.get(pass_) or self._first_s["forward"] + self._first_s["backward"]
        before = framework.allocated_bytes()
        framework.reset_peak_memory()
        for _ in range(WARM_UP_CALLS):
            seconds = self._host_s(self._calls[0])
            if seconds > SLOW_SECONDS:
                break
        peak = framework.peak_memory_bytes()
        self._is_slow, self._is_large = seconds > SLOW_SECONDS, (peak or 0) > LARGE_BYTES
        trial = Times([seconds * 1e3])
        if timer:
            self._clock = clock_named(timer, framework, seconds * 1e3)
        else:
            self._clock, trial = clock_for(framework, self._calls[0], seconds * 1e3)
        if peak is not None and before is not None and self._empty_bytes is not None:
            peak += (before - self._empty_bytes) // len(self._calls) - before  # what one set of inputs takes, not all
        self._pass = pass_
        return Ready(first, seconds * 1e3, self._clock.name, trial, peak)

    def settle(self, pass_: Pass) -> None:
        """Call until the GPU's clock has stopped to rise or fall, for `SETTLE_SECONDS` at most."""
        self._at(pass_)
        started, last = time.perf_counter(), gpu_state.read()
        while last is not None and time.perf_counter() - started < SETTLE_SECONDS:
            step = time.perf_counter()
            while time.perf_counter() - step < SETTLE_STEP_SECONDS:
                self._host_s(self._calls[0])
            now = gpu_state.read()
            if now is None or abs(now.sm_clock_mhz - last.sm_clock_mhz) <= 0.01 * last.sm_clock_mhz:
                return
            last = now

    def block(self, pass_: Pass, cache: Cache, calls: int) -> Block:
        """Time so many calls of a pass.

        Raises:
            Unsupported: it cannot be measured cold.
        """
        if cache == "cold" and not self._can_be_cold:
            raise Unsupported(f"too small to be measured cold: {COLD_L2} x L2 is more than {MOST_SETS} sets of inputs")
        self._at(pass_)

        def some(count: int) -> list[Callable[[], Any]]:
            return [self._calls[0]] * count if cache == "warm" else [self._rotate() for _ in range(count)]

        host = HostClock(self._framework)
        if not self._is_slow or self._is_large:
            host.time(some(1))
        device = self._clock.time(some(calls))
        on_host = device.ms if self._clock.name == host.name else host.time(some(calls)).ms
        state = gpu_state.read()
        if self._is_large:
            self._framework.release_memory()
        return Block(device, on_host, state)

    def close(self) -> None:
        """Give the device's memory back."""
        self._calls, self._inputs, self._cotangents = [], [], []
        self._framework.release_memory()

    def _call(self, pass_: Pass, number: int) -> Callable[[], Any]:
        """A call of the pass on one set of inputs, which holds what it needs."""
        page, problem = self._page, self.subject.problem
        inputs, cotangents = self._inputs[number], self._cotangents[number]
        if pass_ == "forward":
            return lambda: page.forward(inputs, problem)
        if pass_ == "backward":
            _, residuals = page.forward(inputs, problem)
            return lambda: page.backward(cotangents, residuals, problem)
        return lambda: page.backward(cotangents, page.forward(inputs, problem)[1], problem)

    def _at(self, pass_: Pass) -> None:
        """Ready, also where this process was started anew since."""
        if self._pass != pass_:
            self.ready(pass_)

    def _rotate(self) -> Callable[[], Any]:
        self._next = (self._next + 1) % len(self._calls)
        return self._calls[self._next]

    def _host_s(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        self._framework.synchronize(call())
        return time.perf_counter() - start


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th."""
    p20, median, p80 = np.percentile(np.array(times), [20, 50, 80])
    return float(p20), float(median), float(p80)
