"""Result rows as terminal tables and one-line findings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.table import Table

from harness.rows import ParityRow, SweepRow


def parity_table(rows: Iterable[ParityRow]) -> Table:
    """Implementation x dtype: how many tensors are right, and the worst error ratio with where it is."""
    cells: dict[tuple[str, str], list[ParityRow]] = {}
    for row in rows:
        dtype: str = row.dtype if row.matmul_precision == "ieee" else row.matmul_precision
        cells.setdefault((row.implementation, dtype), []).append(row)
    dtypes = list(dict.fromkeys(dtype for _, dtype in cells))
    table = Table(title="tensors right / checked, and the worst error over what is allowed (pass: at most 1)")
    table.add_column("implementation")
    for dtype in dtypes:
        table.add_column(dtype)
    for implementation in dict.fromkeys(name for name, _ in cells):
        texts = [_parity_cell(cells.get((implementation, dtype), [])) for dtype in dtypes]
        table.add_row(implementation, *texts)
    return table


def parity_failures(rows: Iterable[ParityRow], limit: int = 20) -> Iterator[str]:
    """One line for each cell that failed, the worst tensor of each, the worst cells first."""
    cells: dict[tuple[str, ...], list[ParityRow]] = {}
    for row in rows:
        if row.status not in ("ok", "unsupported"):
            cell = row.implementation, row.inner_model, row.case, row.dtype, row.matmul_precision
            cells.setdefault(cell, []).append(row)
    worst = [max(group, key=_severity) for group in cells.values()]
    for row in sorted(worst, key=_severity, reverse=True)[:limit]:
        yield f"{row.status}: {row.implementation} {row.inner_model} {row.case} {row.dtype}: {row.reason}"
    if len(worst) > limit:
        yield f"... and {len(worst) - limit} more cells; parity.csv has them all"


def sweep_table(rows: Iterable[SweepRow], baseline: str) -> Table:
    """Implementation x (case, pass): the time, and how many times faster than the baseline."""
    rows = list(rows)
    keyed = {(row.implementation, *_column(row)): row for row in rows}
    columns = list(dict.fromkeys(_column(row) for row in rows))
    implementations = list(dict.fromkeys(row.implementation for row in rows))
    table = Table(title=f"median ms of one call (times faster than {baseline})")
    for name in ("inner", "case", "dtype", "pass", *implementations):
        table.add_column(name)
    for column in columns:
        base = keyed.get((baseline, *column))
        table.add_row(*column, *(_sweep_cell(keyed.get((name, *column)), base) for name in implementations))
    return table


def _column(row: SweepRow) -> tuple[str, str, str, str]:
    dtype = row.dtype if row.matmul_precision == "ieee" else row.matmul_precision
    return row.inner_model, row.case, dtype, row.pass_


def _sweep_cell(row: SweepRow | None, base: SweepRow | None) -> str:
    if row is None:
        return ""
    if row.device_ms is None:
        return f"[dim]{row.status}[/]"
    ratio = f" ({base.device_ms / row.device_ms:.2f}x)" if base and base.device_ms else ""
    return f"{row.device_ms:.3g}{ratio}"


def _parity_cell(rows: list[ParityRow]) -> str:
    if not rows:
        return ""
    run = [row for row in rows if row.status != "unsupported"]
    if not run:
        return f"[dim]{rows[0].reason}[/]"
    right = sum(row.status == "ok" for row in run)
    worst = max(run, key=_severity)
    ratio = f"{worst.error_ratio:.2g}" if worst.error_ratio is not None else worst.status
    colour = "green" if right == len(run) else "red"
    return f"[{colour}]{right} / {len(run)}[/] {ratio} [dim]{worst.tensor} of {worst.inner_model} {worst.case}[/]"


def _severity(row: ParityRow) -> float:
    return float("inf") if row.error_ratio is None and row.status != "unsupported" else row.error_ratio or 0.0
