"""The clocks that calls are timed by: what the device was doing for a call, apart from what the host was doing.

The time of a call on the device is the span from the start of the first to the end of the last operation (kernel,
copy or fill) that ran between the call and the end of the framework's own synchronisation. It is read from CUPTI's
activity records, for every framework alike. Gaps between a call's kernels are in it; what the host does before the
first and after the last is not. Without CUPTI, PyTorch is timed by CUDA events and JAX by the host's clock, and the
`timer` of a row says so.

Source: CUPTI's documentation of the activity API; cupti-python's `cupti.cupti` binds it one to one.
"""

from __future__ import annotations

import bisect
import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from harness.frameworks import Framework

_BUFFER_BYTES = 8 * 2**20
_NAME_LENGTH, _NAMES = 60, 6  # of the kernels in a row


class Sample(NamedTuple):
    """One call: milliseconds on the device, and on the host until its results were there."""

    device_ms: float
    host_ms: float


class Samples(NamedTuple):
    """Calls that were timed together; `launches` and `kernels` are of the last of them, where the clock sees them."""

    samples: list[Sample]
    launches: int | None
    kernels: str


class Clock(Protocol):
    """A way to time calls; `name` is the `timer` of a row."""

    name: str

    def time(self, calls: Sequence[Callable[[], Any]]) -> Samples:
        """Make the calls one after the other, each waited for.

        Raises:
            RuntimeError: the clock saw nothing run, or something run outside every call.
        """


def open_clock(framework: Framework) -> Clock:
    """The best clock for `framework` on its device in this process."""
    if framework.device == "cpu":
        return HostClock(framework)
    try:
        return CuptiClock(framework)
    except (ImportError, RuntimeError, OSError):
        return EventClock(framework) if framework.name == "torch" else HostClock(framework)


class HostClock:
    """The host's clock around a call and the wait for its results: launch overhead is in it."""

    name = "host_sync"

    def __init__(self, framework: Framework):
        self._framework = framework

    def time(self, calls: Sequence[Callable[[], Any]]) -> Samples:
        """See `Clock`."""
        samples = []
        for call in calls:
            start = time.perf_counter()
            self._framework.synchronize(call())
            elapsed = (time.perf_counter() - start) * 1e3
            samples.append(Sample(elapsed, elapsed))
        return Samples(samples, None, "")


class EventClock:
    """CUDA events on PyTorch's stream: the gap between the event and the first kernel is in it."""

    name = "cuda_events"

    def __init__(self, framework: Framework):
        import torch

        self._framework, self._torch = framework, torch

    def time(self, calls: Sequence[Callable[[], Any]]) -> Samples:
        """See `Clock`."""
        samples = []
        for call in calls:
            before, after = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
            start = time.perf_counter()
            before.record()
            result = call()
            after.record()
            self._framework.synchronize(result)
            samples.append(Sample(before.elapsed_time(after), (time.perf_counter() - start) * 1e3))
            del result
        return Samples(samples, None, "")


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

    def __init__(self, framework: Framework):
        self._framework, self._recorder = framework, _recorder()
        try:
            (touched,) = self._recorder.operations([framework.touch])
        except Exception as error:  # CUPTI's own, without a common class in every version
            raise RuntimeError(f"CUPTI: {error}") from error
        if not touched:
            raise RuntimeError("CUPTI recorded nothing")

    def time(self, calls: Sequence[Callable[[], Any]]) -> Samples:
        """See `Clock`."""
        host: list[float] = []

        def timed(call: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> None:
                start = time.perf_counter()
                self._framework.synchronize(call())
                host.append((time.perf_counter() - start) * 1e3)

            return run

        of_calls = self._recorder.operations([timed(call) for call in calls])
        if not all(of_calls):
            raise RuntimeError("a call ran nothing on the device")
        spans = [(max(op.end for op in ops) - min(op.start for op in ops)) / 1e6 for ops in of_calls]
        samples = [Sample(span, on_host) for span, on_host in zip(spans, host, strict=True)]
        return Samples(samples, len(of_calls[-1]), _names(of_calls[-1]))


class _Recorder:
    """This process's subscription to CUPTI's activity records; there can be one."""

    def __init__(self) -> None:
        from cupti import cupti

        kinds = cupti.ActivityKind
        self._cupti = cupti
        self._names = {int(kinds.MEMCPY): "copy", int(kinds.MEMSET): "fill"}
        self._kinds = (int(kinds.CONCURRENT_KERNEL), *self._names)
        self._found: list[_Operation] = []
        try:
            cupti.activity_register_callbacks(lambda: (_BUFFER_BYTES, 0), self._completed)
        except Exception as error:  # CUPTI's own, without a common class in every version
            raise RuntimeError(f"CUPTI: {error}") from error

    def operations(self, calls: Sequence[Callable[[], Any]]) -> list[list[_Operation]]:
        """What ran on the device for each call; a call returns after all it started has ended.

        Raises:
            RuntimeError: something ran outside every call.
        """
        cupti = self._cupti
        starts, ends = [], []
        for kind in self._kinds:
            cupti.activity_enable(kind)
        try:
            for call in calls:
                starts.append(cupti.get_timestamp())
                call()
                ends.append(cupti.get_timestamp())
        finally:
            cupti.activity_flush_all(1)
            for kind in self._kinds:
                cupti.activity_disable(kind)
        found, self._found = self._found, []
        of_calls: list[list[_Operation]] = [[] for _ in calls]
        for operation in found:
            number = bisect.bisect_right(starts, operation.start) - 1
            if number < 0 or operation.end > ends[number]:
                raise RuntimeError(f"{operation.name} ran outside the call that was timed")
            of_calls[number].append(operation)
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
    """`count x name` of what took longest, with semicolons between."""
    counts = Counter(operation.name for operation in operations)
    busy: Counter[str] = Counter()
    for operation in operations:
        busy[operation.name] += operation.end - operation.start
    named = [f"{counts[name]} x {_short(name)}" for name, _ in busy.most_common(_NAMES)]
    return "; ".join(named + (["..."] if len(counts) > _NAMES else []))


def _short(name: str) -> str:
    name = " ".join(name.replace(";", ",").split())
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 3] + "..."
