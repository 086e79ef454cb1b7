"""The quick door: a few cells under pytest-benchmark, each held to the oracle before it is timed.

The time is the host's clock around one call and the wait for its results (`timer` is `host_sync`), warm, in one
process: good for a look at what one change did, no substitute for a sweep.
"""

from __future__ import annotations

from typing import Any

import pytest

from harness import grid
from harness.compare_sides import benchmark_entry
from harness.environment import Stamp
from harness.frameworks import open_framework
from harness.grid import Cell
from harness.parity import cell_columns
from harness.rows import ParityRow, SweepRow
from spec.cases import draw
from spec.problem import Pass

pytestmark = pytest.mark.timeout(1800)  # the first test waits for every parity check
ROUNDS = 20
WARM_UP_ROUNDS = 3


def cells() -> list[Any]:
    """A parameter for each cell and pass of the grid `bench`."""
    found = grid.load("bench", {})
    names = [f"{c.entry.key}-{c.problem.inner_model}-{c.case.name}-{c.problem.dtype}" for c in found]
    return [
        pytest.param(cell, pass_, id=f"{name}-{pass_}")
        for cell, name in zip(found, names, strict=True)
        for pass_ in cell.passes
    ]


@pytest.mark.parametrize("cell, pass_", cells())
def test_bench(
    cell: Cell,
    pass_: Pass,
    benchmark: Any,
    stamp: Stamp,
    checked: dict[Any, list[ParityRow]],
    untimed: list[SweepRow],
) -> None:
    """Time one pass of one cell; what cannot run is skipped with the reason, what is wrong fails without a time."""
    worst = max(checked[cell.entry.key, cell.case.name, cell.problem], key=_severity)
    status, reason = worst.status, worst.reason
    if status == "ok" and (untimed_because := cell.entry.untimed(cell.problem, stamp.device)):
        status, reason = "unsupported", untimed_because
    if status == "ok" and pass_ not in cell.entry.passes:
        status, reason = "unsupported", f"has no {pass_} pass"
    columns = _columns(cell, pass_, stamp, worst)
    if status != "ok":
        untimed.append(SweepRow(**columns, status=status, reason=reason))
        (pytest.skip if status == "unsupported" else pytest.fail)(f"{status}: {reason}")
    framework = open_framework(cell.entry.framework, stamp.device)
    call = _call(cell, pass_, framework)
    benchmark.group = f"{cell.problem.inner_model} {cell.case.name} {cell.problem.dtype} {pass_}"
    benchmark.pedantic(lambda: framework.synchronize(call()), rounds=ROUNDS, warmup_rounds=WARM_UP_ROUNDS)
    if benchmark.stats is not None:  # it is with --benchmark-disable
        median = 1e3 * benchmark.stats.stats.median
        times = {"device_ms": median, "host_ms": median, "samples": ROUNDS, "processes": 1}
        benchmark.extra_info.update(benchmark_entry(SweepRow(**columns, **times, status="ok")))


def _call(cell: Cell, pass_: Pass, framework: Any) -> Any:
    page, problem = cell.entry.page(cell.problem), cell.problem
    inputs, cotangents = draw(cell.case, problem)
    given, pulled = framework.arrays(inputs, cell.case.strided), framework.arrays(cotangents, cell.case.strided)
    if pass_ == "forward":
        return lambda: page.forward(given, problem)
    return lambda: page.backward(pulled, page.forward(given, problem)[1], problem)


def _columns(cell: Cell, pass_: Pass, stamp: Stamp, worst: ParityRow) -> dict[str, Any]:
    """What the row of a cell says, whether it has a time or not."""
    return cell_columns(cell) | {
        "run_id": stamp.run_id,
        "pass_": pass_,
        "cache": "warm",
        "timer": "host_sync",
        "error_ratio": worst.error_ratio,
        "gpu": stamp.gpu,
        "driver": stamp.driver,
        "cuda": stamp.cuda,
        "git_sha": stamp.git_sha,
        "source_hash": cell.entry.source_hash(),
        "versions": stamp.versions,
        "started_at": stamp.started_at,
        "device": stamp.device,
        "fingerprint": stamp.fingerprint,
    }


def _severity(row: ParityRow) -> tuple[bool, float]:
    return row.status != "ok", row.error_ratio or 0.0
