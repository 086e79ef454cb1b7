"""The leaderboard: the rows of a sweep by cell, ranked inside it.

A cell is one problem, pass, cache and device. Only what passed its parity check has a rank, and only times from one GPU
are set against each other. The host's clock reads no less than a device's: its times are ranked, as what a call takes
at most, and the note says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from harness.rows import SIZES, SweepRow
from spec.problem import PASSES

PRECISIONS = ("fp64", "fp32", "fp32 (tf32)", "bf16", "fp16")
_TIMERS = {"cupti", "cuda_events", "host_sync"}
_LETTERS = dict(zip(SIZES, "BTHDM", strict=True))


@dataclass(frozen=True)
class Entry:
    """One implementation in a cell; `ratio` is the baseline's time over its own."""

    row: SweepRow
    rank: int | None
    ratio: float | None


@dataclass(frozen=True)
class Cell:
    """What all `entries` have in common; `note` says what keeps them from being ranked, or is worth knowing."""

    inner_model: str
    case: str
    precision: str
    pass_: str
    cache: str
    sizes: str
    comparable: bool
    note: str
    entries: tuple[Entry, ...]


def leaderboard(rows: Iterable[SweepRow], baseline: str) -> list[Cell]:
    """The cells of `rows`, which has one row of each cell and implementation; ratios are to `baseline`."""
    groups: dict[tuple[Any, ...], list[SweepRow]] = {}
    for row in rows:
        groups.setdefault(_order(row), []).append(row)
    return [_cell(groups[order], baseline) for order in sorted(groups)]


def precision(dtype: str, matmul_precision: str) -> str:
    """The dtype, and tf32 where it is used."""
    return "fp32 (tf32)" if matmul_precision == "tf32" else dtype


def _order(row: SweepRow) -> tuple[Any, ...]:
    sizes = (getattr(row, name) for name in SIZES)
    precision_ = PRECISIONS.index(precision(row.dtype, row.matmul_precision))
    return (row.inner_model, row.case, *sizes, row.causal, precision_, PASSES.index(row.pass_), row.cache, row.device)


def _cell(rows: list[SweepRow], baseline: str) -> Cell:
    timed = sorted((row for row in rows if row.device_ms), key=lambda row: (row.device_ms, row.implementation))
    others = [row for row in rows if not row.device_ms]
    others.sort(key=lambda row: (row.status == "unsupported", row.status, row.implementation))
    timers = {row.timer for row in timed}
    comparable = len({row.gpu for row in timed}) <= 1 and (len(timers) <= 1 or timers <= _TIMERS)
    base = next((row.device_ms for row in timed if row.implementation == baseline and comparable), None)
    entries = [
        Entry(row, rank if comparable else None, base / row.device_ms if base and row.device_ms else None)
        for rank, row in enumerate(timed, start=1)
    ]
    entries += [Entry(row, None, None) for row in others]
    first = rows[0]
    sizes = " ".join(f"{letter}={getattr(first, name)}" for name, letter in _LETTERS.items())
    return Cell(
        inner_model=first.inner_model,
        case=first.case,
        precision=precision(first.dtype, first.matmul_precision),
        pass_=first.pass_,
        cache=first.cache,
        sizes=sizes + ("" if first.causal else ", not causal") + (", on the CPU" if first.device == "cpu" else ""),
        comparable=comparable,
        note=_note(timed, comparable),
        entries=tuple(entries),
    )


def _note(timed: list[SweepRow], comparable: bool) -> str:
    if not comparable:
        how = sorted({" on ".join(filter(None, (row.timer or "an unnamed timer", row.gpu))) for row in timed})
        return f"not ranked, no ratios: measured with {', '.join(how)}"
    notes = []
    if len({row.timer for row in timed}) > 1 and any(row.timer == "host_sync" for row in timed):
        notes.append("times by host_sync have the host's share in them: on the device at most that")
    environments = len({row.fingerprint for row in timed})
    if environments > 1:
        notes.append(f"times from {environments} environments (driver or package versions)")
    return "; ".join(notes)
