"""Time implementations over a grid: parity first, one implementation at a time, every row on disk as it is made.

A cell whose implementation, spec, package versions and GPU are those of a row that is there already, and that was
checked with this seed, is not measured again: the same command resumes. Times do not depend on the numbers, so
`sweep.csv` has one row for a cell, whatever the seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from harness import jobs, timing
from harness.grid import Cell
from harness.parity import Settings, cell_columns
from harness.rows import ParityRow, Row, SweepRow
from harness.worker import Failure, Worker
from implementations.registry import Device
from spec.cost import bytes_min, flops
from spec.problem import Pass

# Not `unsupported`: what was missing may have been installed since.
_FINAL = ("ok", "wrong", "oom", "timeout", "crash", "error")


def unchecked(cells: Iterable[Cell], rows: Iterable[ParityRow], settings: Settings) -> list[Cell]:
    """The cells that can run and have no parity rows of this code on this machine and seed."""
    known = {_cell_key(row) for row in rows if row.seed == settings.seed and _is_current(row, settings)}
    can_run = (cell for cell in cells if not cell.entry.unsupported(cell.problem, settings.stamp.device))
    return [cell for cell in can_run if _cell_key_of(cell, settings) not in known]


def unmeasured(
    cells: Iterable[Cell], rows: Iterable[SweepRow], checked: Iterable[ParityRow], settings: Settings
) -> list[Cell]:
    """The cells, each with the passes that have no row of this code on this machine; all, if it is unchecked."""
    cells = list(cells)
    afresh = {_cell_key_of(cell, settings) for cell in unchecked(cells, checked, settings)}
    known = {
        (*_cell_key(row), row.pass_) for row in rows if _is_current(row, settings) and row.gpu == settings.stamp.gpu
    }
    left = []
    for cell in cells:
        key = _cell_key_of(cell, settings)
        passes = tuple(pass_ for pass_ in cell.passes if key in afresh or (*key, pass_) not in known)
        if passes:
            left.append(cell._replace(passes=passes))
    return left


def of_cells(rows: Iterable[Row], cells: Iterable[Cell], device: Device) -> list[Row]:
    """The rows of these cells on `device`, of whatever code and seed; of a sweep, those of the cells' passes."""
    passes = {_place_of(cell, device): cell.passes for cell in cells}
    found = ((row, passes.get(_place(row))) for row in rows)
    return [row for row, of in found if of is not None and (not isinstance(row, SweepRow) or row.pass_ in of)]


def run(cells: Iterable[Cell], checked: Iterable[ParityRow], settings: Settings) -> Iterator[SweepRow]:
    """Time every pass of every cell that `checked` found right; the others become rows that say why not."""
    verdicts: dict[Any, list[ParityRow]] = {}
    for row in checked:
        if row.seed == settings.seed and row.versions == settings.stamp.versions:
            verdicts.setdefault(_cell_key(row), []).append(row)
    by_implementation: dict[str, list[Cell]] = {}
    for cell in cells:
        by_implementation.setdefault(cell.entry.key, []).append(cell)
    for queue in by_implementation.values():
        worker = Worker()
        try:
            for cell in queue:
                rows = verdicts.get(_cell_key_of(cell, settings), [])
                for pass_ in cell.passes:
                    yield _row(cell, pass_, rows, worker, settings)
        finally:
            worker.close()


def _row(cell: Cell, pass_: Pass, checked: list[ParityRow], worker: Worker, settings: Settings) -> SweepRow:
    stamp = settings.stamp
    blank = SweepRow(
        **cell_columns(cell),
        run_id=stamp.run_id,
        pass_=pass_,
        status="error",
        reason="not measured",
        cache="warm",
        timer=timing.TIMER,
        flops=flops(cell.problem, pass_),
        bytes_min=bytes_min(cell.problem, pass_),
        gpu=stamp.gpu,
        driver=stamp.driver,
        cuda=stamp.cuda,
        git_sha=stamp.git_sha,
        source_hash=cell.entry.source_hash(),
        versions=stamp.versions,
        started_at=stamp.started_at,
        device=stamp.device,
    )
    if reason := cell.entry.unsupported(cell.problem, stamp.device):
        return replace(blank, status="unsupported", reason=reason)
    if not checked:
        return replace(blank, reason="has no parity check")
    ratio = max((row.error_ratio or 0 for row in checked), default=None)
    for row in checked:
        if row.status != "ok":
            return replace(blank, status=row.status, reason=row.reason, error_ratio=ratio)
    if pass_ not in cell.entry.passes:
        return replace(blank, status="unsupported", reason=f"has no {pass_} pass")
    try:
        timed = worker.call(
            jobs.time,
            cell.entry.key,
            cell.case,
            cell.problem,
            pass_,
            settings.seed,
            stamp.device,
            timeout=settings.timeout,
        )
    except Failure as failure:
        return replace(blank, status=failure.status, reason=failure.reason, error_ratio=ratio)
    return replace(
        blank,
        status="ok",
        reason="",
        device_ms=timed.median_ms,
        device_ms_p20=timed.p20_ms,
        device_ms_p80=timed.p80_ms,
        host_ms=timed.median_ms,
        first_call_s=timed.first_call_s,
        samples=timed.samples,
        peak_memory_bytes=timed.peak_memory_bytes,
        error_ratio=ratio,
    )


def _is_current(row: ParityRow | SweepRow, settings: Settings) -> bool:
    return row.status in _FINAL and row.versions == settings.stamp.versions


def _cell_key(row: ParityRow | SweepRow) -> tuple[Any, ...]:
    return (*_place(row), row.source_hash)


def _cell_key_of(cell: Cell, settings: Settings) -> tuple[Any, ...]:
    return (*_place_of(cell, settings.stamp.device), cell.entry.source_hash())


def _place(row: ParityRow | SweepRow) -> tuple[Any, ...]:
    return (*(getattr(row, name) for name in _KEY), row.device)


def _place_of(cell: Cell, device: Device) -> tuple[Any, ...]:
    columns = cell_columns(cell)
    return (*(columns[name] for name in _KEY), device)


_KEY: tuple[str, ...] = ("implementation", "inner_model", "case", "batch", "tokens", "heads", "head_dim", "mini_batch")
_KEY += ("causal", "dtype", "matmul_precision")
