"""The clocks that calls are timed by: what the device was doing for a call, apart from what the host was doing.

The time of a call on the device is the span from the start of the first to the end of the last operation (kernel,
copy or fill) that ran between the call and the end of the framework's own synchronisation. It is read from CUPTI's
activity records, for every framework alike. Gaps between a call's kernels are in it; what the host does before the
first and after the last is not. Without CUPTI, PyTorch is timed by CUDA events and JAX by the host's clock, and the
`timer` of a row says so.

A call of several kernels may wait for its launches, tens of microseconds each on a slow host. PyTorch's calls are
therefore queued behind a kernel that spins, which is left out: when it ends the launches are there, and the gaps that
are left are the device's. A block of calls in which one's launches were not there by then is made again behind a longer
one, up to `MOST_LEAD_MS`. JAX gives nothing to put in front of a call; its launches come from C++.

Recording costs the host some microseconds a launch, so a call that waits for its launches all the same takes longer
while it is recorded. The host's time is therefore taken from calls that are not recorded, and it bounds the device's.

Source: CUPTI's documentation of the activity API; cupti-python's `cupti.cupti` binds it one to one.
"""

from __future__ import annotations

import ctypes
import functools
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from harness.frameworks import HOLDS, Framework

LONG_MS = 50.0
# A call is held back for so many times what it takes by the host, launches and all; longer if it was late, to a limit.
LEAD, MOST_LEAD_MS = 2.0, 20.0
# CUPTI turns the device's clock into the host's, in a virtual machine not to the microsecond: seen 0.8 ms off there.
SKEW_NS = 5_000_000
# Seen on an H100, once in hundreds of processes that start together: CUPTI's ERROR_NOT_INITIALIZED.
STARTS, START_WAIT_S = 5, 0.5
_BUFFER_BYTES = 8 * 2**20
_NAME_LENGTH, _NAMES = 60, 6  # of the kernels in a row


class Times(NamedTuple):
    """Calls that were timed together, in milliseconds; how many kernels the last of them launched, and which."""

    ms: list[float]
    launches: int | None = None
    kernels: str = ""


class Clock(Protocol):
    """A way to time calls; `name` is the `timer` of a row."""

    name: str

    def time(self, calls: Sequence[Callable[[], Any]]) -> Times:
        """Make the calls one after the other, each waited for.

        Raises:
            RuntimeError: the clock saw nothing run, or something run outside every call.
        """


def open_clock(framework: Framework, host_ms: float = 0.0) -> Clock:
    """The best clock for `framework` on its device in this process, for calls of about `host_ms` by the host."""
    if framework.device == "cpu":
        return HostClock(framework)
    try:
        return CuptiClock(framework, host_ms)
    except (ImportError, RuntimeError, OSError):
        return _next_best(framework, host_ms)


def _next_best(framework: Framework, host_ms: float) -> Clock:
    return EventClock(framework, host_ms) if framework.name == "torch" else HostClock(framework)


def clock_for(framework: Framework, call: Callable[[], Any], host_ms: float) -> tuple[Clock, Times]:
    """The best clock for `call`, and what it says of one; `host_ms` is what a call takes by the host.

    A call cannot take longer on the device than on the host, which waits for it. Where it seems to, recording is in
    the way, and the next best clock tells what it takes. Long calls go by the host's clock: what the host adds is
    nothing beside them, and the records of ten thousands of launches take seconds to read.
    """
    if framework.device == "cpu" or host_ms > LONG_MS:
        return HostClock(framework), Times([host_ms])
    clock = open_clock(framework, host_ms)
    try:
        trial = clock.time([call])
    except RuntimeError:  # seen on an H100: a CUDA graph of thousands of kernels
        clock = _next_best(framework, host_ms)
        return clock, clock.time([call])
    return (_next_best(framework, host_ms) if trial.ms[0] >= host_ms else clock), trial


def clock_named(name: str, framework: Framework, host_ms: float = 0.0) -> Clock:
    """The clock whose `timer` is `name`, for calls of about `host_ms` by the host."""
    kinds: tuple[Callable[[Framework, float], Clock], ...] = (CuptiClock, EventClock, HostClock)
    return next(kind for kind in kinds if kind.name == name)(framework, host_ms)  # type: ignore[attr-defined]


class HostClock:
    """The host's clock around a call and the wait for its results: launch overhead is in it."""

    name = "host_sync"

    def __init__(self, framework: Framework, host_ms: float = 0.0):
        self._framework = framework

    def time(self, calls: Sequence[Callable[[], Any]]) -> Times:
        """See `Clock`."""
        times = []
        for call in calls:
            start = time.perf_counter()
            self._framework.synchronize(call())
            times.append((time.perf_counter() - start) * 1e3)
        return Times(times)


class EventClock:
    """CUDA events on PyTorch's stream: the gap between the event and the first kernel is in it."""

    name = "cuda_events"

    def __init__(self, framework: Framework, host_ms: float = 0.0):
        import torch

        self._framework, self._torch, self._lead = framework, torch, _Lead(framework, host_ms)

    def time(self, calls: Sequence[Callable[[], Any]]) -> Times:
        """See `Clock`."""
        return Times(self._lead.of(calls, lambda some: [self._one(call) for call in some]))

    def _one(self, call: Callable[[], Any]) -> tuple[float, bool]:
        before, after = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        held = self._lead.hold()
        before.record()
        result = call()
        after.record()
        in_time = held()
        self._framework.synchronize(result)
        return before.elapsed_time(after), in_time


class _Operation(NamedTuple):
    """A kernel, a copy or a fill on the device, in nanoseconds of CUPTI's clock."""

    start: int
    end: int
    name: str


class CuptiClock:
    """CUPTI's activity records of kernels, copies and fills.

    Raises:
        ImportError: cupti-python is not installed.
        RuntimeError: CUPTI gives no records here (another profiler has it, or the driver refuses).
    """

    name = "cupti"

    def __init__(self, framework: Framework, host_ms: float = 0.0):
        self._framework, self._lead = framework, _Lead(framework, host_ms)
        for start in range(1, STARTS + 1):
            try:
                self._recorder = _recorder()
                (touched,) = self._recorder.operations([framework.touch])
                break
            except ImportError:
                raise
            except Exception as error:  # CUPTI's own, without a common class in every version
                if start == STARTS or "NOT_INITIALIZED" not in str(error):
                    raise RuntimeError(f"CUPTI: {error}") from error
                time.sleep(START_WAIT_S)
        if not touched:
            raise RuntimeError("CUPTI recorded nothing")

    def time(self, calls: Sequence[Callable[[], Any]]) -> Times:
        """See `Clock`."""
        of_calls = self._lead.of(calls, self._record)
        if not all(of_calls):
            raise RuntimeError("a call ran nothing on the device")
        spans = [(max(op.end for op in ops) - min(op.start for op in ops)) / 1e6 for ops in of_calls]
        return Times(spans, len(of_calls[-1]), _names(of_calls[-1]))

    def _record(self, calls: Sequence[Callable[[], Any]]) -> list[tuple[list[_Operation], bool]]:
        """What ran for each call, and whether it was launched in time."""
        in_time: list[bool] = []

        def wait_for(call: Callable[[], Any]) -> None:
            held = self._lead.hold()
            result = call()
            in_time.append(held())
            self._framework.synchronize(result)

        recorded = self._recorder.operations([functools.partial(wait_for, call) for call in calls])
        if self._lead.seconds:
            recorded = [[op for op in ops if HOLDS not in op.name] for ops in recorded]
        return list(zip(recorded, in_time, strict=True))


class _Lead:
    """What keeps the device busy while a call is launched, `seconds` long; nothing where that is 0."""

    def __init__(self, framework: Framework, host_ms: float):
        self._framework = framework
        self.seconds = min(LEAD * host_ms, MOST_LEAD_MS) / 1e3

    def hold(self) -> Callable[[], bool]:
        """Start; what it returns says whether that still lasts."""
        return self._framework.hold(self.seconds) if self.seconds else lambda: True

    def of(
        self, calls: Sequence[Callable[[], Any]], time_them: Callable[[list[Callable[[], Any]]], list[tuple[Any, bool]]]
    ) -> list[Any]:
        """What `time_them` gives of each call; if one was late, all are made again, where a longer lead is left.

        A host that was slow once, or slower than when it was asked, would otherwise show as a gap between kernels. All,
        since the caches are meant to be as they are between these calls. With the longest lead a late call counts too.
        """
        while True:
            timed = time_them(list(calls))
            if all(in_time for _, in_time in timed) or self.seconds >= MOST_LEAD_MS / 1e3:
                return [value for value, _ in timed]
            self.seconds = min(2 * self.seconds, MOST_LEAD_MS / 1e3)


class _Recorder:
    """This process's subscription to CUPTI's activity records; there can be one."""

    def __init__(self) -> None:
        from cupti import cupti

        kinds = cupti.ActivityKind
        self._cupti = cupti
        self._names = {int(kinds.MEMCPY): "copy", int(kinds.MEMSET): "fill"}
        self._kinds = (int(kinds.CONCURRENT_KERNEL), *self._names)
        self._found: list[_Operation] = []
        cupti.activity_register_callbacks(lambda: (_BUFFER_BYTES, 0), self._completed)

    def operations(self, calls: Sequence[Callable[[], Any]]) -> list[list[_Operation]]:
        """What ran on the device for each call; a call returns after all it started has ended.

        Records are asked for after each call, so that they are its own whatever the two clocks say.

        Raises:
            RuntimeError: something ran outside every call, by more than `SKEW_NS`, or had not ended.
        """
        cupti, of_calls = self._cupti, []
        for kind in self._kinds:
            cupti.activity_enable(kind)
        try:
            for call in calls:
                start = cupti.get_timestamp()
                call()
                end = cupti.get_timestamp()
                cupti.activity_flush_all(1)
                found, self._found = self._found, []
                for operation in found:
                    away = max(start - operation.start, operation.end - end)
                    if away > SKEW_NS or operation.end < operation.start:
                        name = _short(operation.name)
                        raise RuntimeError(f"{name} ran {away / 1e3:g} us outside the call that was timed")
                of_calls.append(found)
        finally:
            cupti.activity_flush_all(1)
            for kind in self._kinds:
                cupti.activity_disable(kind)
            self._found = []
        return of_calls

    def _completed(self, activities: list[Any]) -> None:
        for record in activities:
            if record.kind in self._kinds:
                name = self._names.get(record.kind) or record.name
                self._found.append(_Operation(record.start, record.end, name))


@functools.cache
def _recorder() -> _Recorder:
    return _Recorder()


def _names(operations: list[_Operation]) -> str:
    """`count x name` of what took longest, with semicolons between; template arguments left out."""
    counts: Counter[str] = Counter()
    busy: Counter[str] = Counter()
    for operation in operations:
        name = _short(operation.name)
        counts[name] += 1
        busy[name] += operation.end - operation.start
    named = [f"{counts[name]} x {name}" for name, _ in busy.most_common(_NAMES)]
    return "; ".join(named + (["..."] if len(counts) > _NAMES else []))


@functools.cache
def _short(name: str) -> str:
    plain = _demangled(name).split("(anonymous namespace)::")[-1]
    plain = " ".join(re.split(r"[<(]", plain, maxsplit=1)[0].replace(";", ",").split()).removeprefix("void ")
    return plain if len(plain) <= _NAME_LENGTH else plain[: _NAME_LENGTH - 3] + "..."


def _demangled(name: str) -> str:
    """A C++ name as it is written; `name` itself where it is not C++ or there is no C++ runtime to ask."""
    if not name.startswith("_Z"):
        return name
    try:
        demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    except (OSError, AttributeError):
        return name
    demangle.restype = ctypes.c_char_p  # a few hundred bytes a name are never freed
    return (demangle(name.encode(), None, None, None) or name.encode()).decode(errors="replace")
