"""Result rows as terminal tables and one-line findings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from harness.grid import Cell
from harness.rows import ParityRow, SweepRow

if TYPE_CHECKING:
    from harness.proof import Proof
    from harness.proof_pairs import Pair


def parity_table(rows: Iterable[ParityRow]) -> Table:
    """Implementation × dtype: how many tensors are right, and the worst error ratio with where it is."""
    cells: dict[tuple[str, str], list[ParityRow]] = {}
    for row in rows:
        dtype: str = row.dtype if row.matmul_precision == "ieee" else row.matmul_precision
        cells.setdefault((row.implementation, dtype), []).append(row)
    dtypes = list(dict.fromkeys(dtype for _, dtype in cells))
    table = _table("tensors right/checked, and the worst error over the allowed one (at most 1)")
    table.add_column("implementation", no_wrap=True)
    for dtype in dtypes:
        table.add_column(dtype)
    for implementation in dict.fromkeys(name for name, _ in cells):
        texts = [_parity_cell(cells.get((implementation, dtype), [])) for dtype in dtypes]
        table.add_row(implementation, *texts)
    return table


def failures(rows: Iterable[ParityRow | SweepRow], limit: int = 20) -> Iterator[str]:
    """One line for each cell that failed, the worst tensor or pass of each, the worst cells first."""
    cells: dict[tuple[str, ...], list[ParityRow | SweepRow]] = {}
    for row in rows:
        if row.status not in ("ok", "unsupported"):
            cell = row.implementation, row.inner_model, row.case, row.dtype, row.matmul_precision
            cells.setdefault(cell, []).append(row)
    worst = [max(group, key=_severity) for group in cells.values()]
    for row in sorted(worst, key=_severity, reverse=True)[:limit]:
        yield f"{row.status}: {row.implementation} {row.inner_model} {row.case} {row.dtype}: {row.reason}"
    if len(worst) > limit:
        yield f"... and {len(worst) - limit} more cells"


def unchecked(rows: Iterable[ParityRow], names: Iterable[str]) -> list[str]:
    """A line for each of these implementations of which no problem could be checked, and why."""
    of: dict[str, list[ParityRow]] = {}
    for row in rows:
        of.setdefault(row.implementation, []).append(row)
    return [
        f"nothing was checked of {name}: {', '.join(dict.fromkeys(row.reason for row in of[name]))}"
        for name in dict.fromkeys(names)
        if name in of and all(row.status == "unsupported" for row in of[name])
    ]


def sweep_table(rows: Iterable[SweepRow], baseline: str) -> Table:
    """(Case, pass) × implementation: the time, and how many times faster than the baseline.

    What is unsupported throughout has no column: `sweep_notes` names it.
    """
    keyed = {(row.implementation, *_cell(row)): row for row in rows}
    implementations = dict.fromkeys(row.implementation for row in keyed.values() if row.status != "unsupported")
    table = _table(f"median ms of one call, and how many times faster than {baseline}")
    for name in ("inner", "case", "dtype", "pass", "cache"):
        table.add_column(name, no_wrap=name != "case", overflow="fold")
    for name in implementations:
        table.add_column(name.replace(".", ".\n"), overflow="fold")  # a number is never cut
    for cell in dict.fromkeys(_cell(row) for row in keyed.values()):
        base = keyed.get((baseline, *cell))
        inner, case, *others = cell
        times = [_sweep_cell(keyed.get((name, *cell)), base) for name in implementations]
        table.add_row(inner, case.replace(":", "\n"), *others, *times)
    return table


def sweep_notes(rows: Iterable[SweepRow]) -> Iterator[str]:
    """A line that names the implementations that are unsupported throughout, and why; a line on throttled rows."""
    of: dict[str, list[SweepRow]] = {}
    for row in rows:
        of.setdefault(row.implementation, []).append(row)
    names: dict[str, list[str]] = {}
    for name, group in of.items():
        if all(row.status == "unsupported" for row in group):
            names.setdefault(", ".join(dict.fromkeys(row.reason for row in group)), []).append(name)
    if names:
        yield "unsupported: " + "; ".join(f"{', '.join(keys)} ({reason})" for reason, keys in names.items())
    timed = [row for group in of.values() for row in group if row.device_ms is not None]
    if throttled := [row for row in timed if row.throttled]:
        reasons = ", ".join(sorted({row.throttle_reasons for row in throttled}))
        yield f"throttled: {len(throttled)} of {len(timed)} times, the clock was held back by {reasons}"


def sweep_status(rows: Iterable[SweepRow], left: Iterable[Cell], caches: int) -> Table:
    """Implementation × status: how many timings there are, and how many are still to do."""
    done: Counter[tuple[str, str]] = Counter((row.implementation, row.status) for row in rows)
    to_do: Counter[str] = Counter()
    for cell in left:
        to_do[cell.entry.key] += caches * len(cell.passes)
    statuses = sorted({status for _, status in done})
    table = _table("timings on disk by status, and those to do: never done, or of other code or another machine")
    for name in ("implementation", *statuses, "to do"):
        table.add_column(name)
    for name in dict.fromkeys([name for name, _ in done] + list(to_do)):
        table.add_row(name, *(str(done[name, status] or "") for status in statuses), str(to_do[name] or ""))
    return table


def proof_table(proofs: Iterable[Proof]) -> Table:
    """What the device timer reads beside what is known."""
    table = _table("milliseconds on the device: read by the timer, and known otherwise")
    for name in ("framework", "what", "timer", "known by", "known", "read", "error", "host", "returned", "kernels"):
        table.add_column(name)
    for one in proofs:
        error = f"{one.error:+.2%}" if one.error is not None else "below" if one.right else "above"
        times = (f"{ms:.4g}" for ms in (one.known_ms, one.device_ms))
        host = (f"{ms:.4g}" for ms in (one.host_ms, one.returned_ms))
        style = "" if one.right else "red"
        who = one.framework, one.what, one.timer, one.known_by
        table.add_row(*who, *times, error, *host, str(one.launches or ""), style=style)
    return table


def pairs_table(pairs: Sequence[Pair]) -> Table:
    """What `compare` said of equal pages and of one with a planted slowdown, in how many comparisons."""
    table = _table("comparisons on the device of a page with itself, and with itself made 5 % slower")
    for name in ("head", "cell", "right", "ratios", "verdicts"):
        table.add_column(name)
    for head, cell in dict.fromkeys((pair.head, pair.cell) for pair in pairs):
        group = [pair for pair in pairs if (pair.head, pair.cell) == (head, cell)]
        ratios = sorted(pair.ratio for pair in group)
        right = sum(pair.right for pair in group)
        verdicts = ", ".join(sorted({pair.verdict for pair in group}))
        texts = f"{right}/{len(group)}", f"{ratios[0]:.4f} to {ratios[-1]:.4f}", verdicts
        table.add_row(head, cell, *texts, style="" if right == len(group) else "red")
    return table


def _table(title: str) -> Table:
    return Table(title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)


def _cell(row: SweepRow) -> tuple[str, ...]:
    dtype = row.dtype if row.matmul_precision == "ieee" else row.matmul_precision
    return row.inner_model, row.case, dtype, row.pass_.replace("forward_backward", "fwd+bwd"), row.cache


def _sweep_cell(row: SweepRow | None, base: SweepRow | None) -> Text:
    if row is None:
        return Text()
    if row.device_ms is None:
        return Text(row.status, style="dim")
    ratio = f"\n{base.device_ms / row.device_ms:.2f}x" if base and base.device_ms else ""
    return Text.assemble(f"{row.device_ms:.3g}", (ratio, "dim"))


def _parity_cell(rows: list[ParityRow]) -> RenderableType:
    """How many are right and the worst ratio; below, in one line, where that is."""
    if not rows:
        return ""
    run = [row for row in rows if row.status != "unsupported"]
    if not run:
        return Text(rows[0].reason, style="dim")
    right = sum(row.status == "ok" for row in run)
    worst = max(run, key=_severity)
    ratio = f"{worst.error_ratio:.2g}" if worst.error_ratio is not None else worst.status
    where = f"{worst.tensor} {worst.inner_model} {worst.case}".lstrip()
    return Group(
        Text.assemble((f"{right}/{len(run)}", "green" if right == len(run) else "red"), f"  worst {ratio}"),
        Text(where, style="dim", no_wrap=True, overflow="ellipsis"),
    )


def _severity(row: ParityRow | SweepRow) -> float:
    """For ordering: no number and NaN are as bad as it gets."""
    if row.error_ratio is None:
        return 0.0 if row.status == "unsupported" else math.inf
    return math.inf if math.isnan(row.error_ratio) else row.error_ratio
