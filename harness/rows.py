"""The rows of `parity.csv`, `sweep.csv` and the samples behind it: their field order is the column order.

A row that claims something it cannot claim (passed without a time, failed without a reason) cannot be made.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args, get_origin, get_type_hints

from spec.problem import Dtype, InnerModel, MatmulPrecision, Pass

Status = Literal["ok", "unsupported", "oom", "timeout", "crash", "error", "wrong"]
SIZES = ("batch", "tokens", "heads", "head_dim", "mini_batch")


@dataclass(frozen=True, kw_only=True)
class ParityRow:
    """How far one tensor of one implementation is from the truth, in one case.

    Attributes:
        error_ratio: the worse of max and rms error over what is allowed; a row that is `ok` has at most 1.
        worst_index: where in the tensor the worst error is.
        truth: which truth it was held to, say "primal".
        diverging_mini_batch: the first mini-batch that is out of tolerance.
        first_call_s: of the pass that gives the tensor, seconds, compilation included; other checks run beside it.

    Raises:
        ValueError: a name is unknown, a text has a line break, a status other than `ok` has no reason, or `ok` has
            no `error_ratio` of at most 1.
    """

    run_id: str
    implementation: str
    inner_model: InnerModel
    case: str
    batch: int
    tokens: int
    heads: int
    head_dim: int
    mini_batch: int
    causal: bool
    dtype: Dtype
    matmul_precision: MatmulPrecision
    seed: int
    tensor: str
    status: Status
    reason: str = ""
    max_error: float | None = None
    rms_error: float | None = None
    yardstick_max_error: float | None = None
    yardstick_rms_error: float | None = None
    error_ratio: float | None = None
    worst_index: str = ""
    device: Literal["cpu", "cuda"]
    truth: str
    diverging_mini_batch: int | None = None
    source_hash: str
    git_sha: str
    versions: str
    started_at: str
    fingerprint: str
    first_call_s: float | None = None

    KEY: ClassVar[tuple[str, ...]] = ("implementation", "inner_model", "case", *SIZES)
    KEY += ("causal", "dtype", "matmul_precision", "seed", "device", "tensor")

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """How long one implementation takes for one pass of one case; `pass_` is the column `pass`.

    Attributes:
        device_ms, device_ms_p20, device_ms_p80: median, 20th and 80th percentile on the device, milliseconds.
        host_ms: median until the call returns, milliseconds.
        first_call_s: the first call, compilation included, seconds: that of the parity check, whose compilers find
            nothing on disk but have company; that of the timed process where the check does not say.
        cache: whether each call found inputs that other data had pushed out of the caches (cold), or those of the
            call before (warm).
        timer: what the clock was: `cupti`, `cuda_events` or `host_sync`.
        error_ratio: the worst one of its parity check; a row that is `ok` has at most 1.
        sm_clock_mhz, power_w: medians over the blocks of samples; `throttled` if any block was, and why.
        processes: how many processes the samples are from.
        latency_floor_ms: mini-batches in the chain times the latency of one dependent step on this device.
        kernels: what one call launched, as `count x name` with semicolons between, the longest-running first.
        fingerprint: of the device, driver and package versions; see `harness.environment`.

    Raises:
        ValueError: as in `ParityRow`; or `ok` has no time, or another status has one.
    """

    run_id: str
    implementation: str
    inner_model: InnerModel
    case: str
    pass_: Pass
    batch: int
    tokens: int
    heads: int
    head_dim: int
    mini_batch: int
    causal: bool
    dtype: Dtype
    matmul_precision: MatmulPrecision
    status: Status
    reason: str = ""
    cache: Literal["cold", "warm"]
    device_ms: float | None = None
    device_ms_p20: float | None = None
    device_ms_p80: float | None = None
    host_ms: float | None = None
    first_call_s: float | None = None
    samples: int | None = None
    timer: str = ""
    peak_memory_bytes: int | None = None
    flops: int | None = None
    bytes_min: int | None = None
    roofline_ms: float | None = None
    roofline_fraction: float | None = None
    launches: int | None = None
    error_ratio: float | None = None
    gpu: str = ""
    driver: str = ""
    cuda: str = ""
    sm_clock_mhz: float | None = None
    throttled: bool | None = None
    git_sha: str
    source_hash: str
    versions: str
    started_at: str
    device: Literal["cpu", "cuda"]
    power_w: float | None = None
    throttle_reasons: str = ""
    processes: int | None = None
    latency_floor_ms: float | None = None
    kernels: str = ""
    fingerprint: str = ""

    KEY: ClassVar[tuple[str, ...]] = ("implementation", "inner_model", "case", "pass_", *SIZES)
    KEY += ("causal", "dtype", "matmul_precision", "cache", "device")

    def __post_init__(self) -> None:
        _check(self)
        times = ("device_ms", "device_ms_p20", "device_ms_p80", "host_ms", "first_call_s")
        timed = [name for name in times if getattr(self, name) is not None]
        if self.status != "ok" and timed:
            raise ValueError(f"{timed[0]}: expected none for status {self.status}, got {getattr(self, timed[0])!r}")
        if self.status == "ok" and not (self.device_ms is not None and 0 < self.device_ms < float("inf")):
            raise ValueError(f"device_ms: expected a positive time for status ok, got {self.device_ms!r}")


@dataclass(frozen=True, kw_only=True)
class SampleRow:
    """One call that was timed: of a `SweepRow`, by its run and its cell.

    Attributes:
        process: which of the processes that measured this cell, from 0.
        block: which block of calls in that process; the implementations of a cell take turns block by block.
        device_ms, host_ms: as in `SweepRow`, of this one call.
        sm_clock_mhz: after the block that it is in.
    """

    run_id: str
    implementation: str
    inner_model: InnerModel
    case: str
    pass_: Pass
    batch: int
    tokens: int
    heads: int
    head_dim: int
    mini_batch: int
    causal: bool
    dtype: Dtype
    matmul_precision: MatmulPrecision
    cache: Literal["cold", "warm"]
    device: Literal["cpu", "cuda"]
    process: int
    block: int
    device_ms: float
    host_ms: float
    sm_clock_mhz: float | None = None

    KEY: ClassVar[tuple[str, ...]] = SweepRow.KEY

    def __post_init__(self) -> None:
        check_names(self)


class AnyRow(Protocol):
    """A row of a results file: a frozen dataclass, whose `KEY` names the columns that say what was measured."""

    KEY: ClassVar[tuple[str, ...]]
    __dataclass_fields__: ClassVar[dict[str, Any]]


Row = TypeVar("Row", bound=AnyRow)


def columns(row_type: type[Row]) -> tuple[str, ...]:
    """The column names of a row class, in file order."""
    return tuple(field.name.rstrip("_") for field in fields(row_type))


def key(row: AnyRow) -> tuple[Any, ...]:
    """What was measured: two rows of the same key are two measurements of one cell."""
    return tuple(getattr(row, name) for name in row.KEY)


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each cell, in the order in which the cells first appeared.

    The tensors of a check are of one run: what an earlier one said of others, or of the whole check, is gone.
    """
    rows = list(rows)
    found = {key(row): row for row in rows}.values()
    runs = {_problem_of(row): row.run_id for row in rows if isinstance(row, ParityRow)}
    return [row for row in found if not isinstance(row, ParityRow) or row.run_id == runs[_problem_of(row)]]


def _problem_of(row: ParityRow) -> tuple[Any, ...]:
    return tuple(getattr(row, name) for name in row.KEY if name != "tensor")


def to_texts(row: AnyRow) -> list[str]:
    """The row as CSV fields: None is empty, booleans are true and false, floats keep every digit."""
    return [_text(getattr(row, name), _kind(hint)) for name, hint in _hints(type(row)).items()]


def from_texts(row_type: type[Row], texts: Iterable[str]) -> Row:
    """The row that `to_texts` made these fields from.

    Raises:
        ValueError: a field cannot be read as its column's type, or the row cannot be (see the row classes).
    """
    hints = _hints(row_type)
    return row_type(**{name: _value(name, text, hints[name]) for name, text in zip(hints, texts, strict=True)})


def check_names(row: AnyRow) -> None:
    """Raise ValueError where a name is none of those of its column, or a text has a line break."""
    for name, hint in _hints(type(row)).items():
        value = getattr(row, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ValueError(f"{name.rstrip('_')}: expected one of {', '.join(get_args(hint))}, got {value!r}")
        if isinstance(value, str) and ("\n" in value or "\r" in value):
            raise ValueError(f"{name}: expected one line, got {value!r}")


def _check(row: ParityRow | SweepRow) -> None:
    check_names(row)
    if row.status != "ok" and not row.reason.strip():
        raise ValueError(f"reason: expected one line for status {row.status}, got {row.reason!r}")
    if row.status == "ok" and not (row.error_ratio is not None and row.error_ratio <= 1):  # NaN is not <= 1
        raise ValueError(f"error_ratio: expected at most 1 for status ok, got {row.error_ratio!r}")


@functools.cache
def _hints(row_type: type[AnyRow]) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(row_type).items() if name != "KEY"}


def _kind(hint: Any) -> type:
    """str for str and for a Literal, T for T and for `T | None`."""
    return str if get_origin(hint) is Literal else (get_args(hint) or (hint,))[0]


def _text(value: Any, kind: type) -> str:
    if value is None:
        return ""
    if kind is bool:
        return "true" if value else "false"
    if kind is int:
        return str(operator.index(value))
    return repr(float(value)) if kind is float else str(value)


def _value(name: str, text: str, hint: Any) -> Any:
    kind = _kind(hint)
    if kind is str:
        return text
    if not text and type(None) in get_args(hint):
        return None
    try:
        return {"true": True, "false": False}[text] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise ValueError(f"{name.rstrip('_')}: expected {kind.__name__}, got {text!r}") from None
