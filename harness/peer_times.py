"""What other people's code takes, whatever its verdict: `peer_times.csv`. A sweep times what is right alone.

The same bench and the same clock as a sweep's, in one process. Such a time is no claim that the result is right, and
nothing ranks it: a row carries the verdict of the parity check, the worst error over what is allowed, and the reason.
Implementations of this lab are timed in turns with a peer, for the ratio, where their own verdict is ok.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table

from harness import records, sweep
from harness.grid import Cell
from harness.parity import Settings, cell_columns, versions
from harness.rows import ParityRow, SweepRow, check_names
from harness.worker import Failure
from spec.problem import Dtype, InnerModel, MatmulPrecision, Pass

FILE = "peer_times.csv"
PREFIX = "peer."
Verdict = Literal["ok", "unsupported", "oom", "timeout", "crash", "error", "wrong", "unchecked"]


@dataclass(frozen=True, kw_only=True)
class PeerTime:
    """One pass of one case of a peer, or of what was timed beside it; columns named as a `SweepRow`'s mean the same.

    Attributes:
        verdict: of its parity check here: `ok`, `wrong` and so on; `unchecked` where there is none of this code.
        error_ratio: the worst error over what is allowed, of every tensor; right is at most 1.
        reason: of the verdict, that of the worst tensor.
        untimed: why there is no time.
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
    verdict: Verdict
    reason: str = ""
    error_ratio: float | None = None
    untimed: str = ""
    cache: Literal["cold", "warm"]
    device_ms: float | None = None
    device_ms_p20: float | None = None
    device_ms_p80: float | None = None
    host_ms: float | None = None
    samples: int | None = None
    timer: str = ""
    peak_memory_bytes: int | None = None
    launches: int | None = None
    sm_clock_mhz: float | None = None
    throttled: bool | None = None
    gpu: str = ""
    driver: str = ""
    cuda: str = ""
    git_sha: str
    source_hash: str
    versions: str
    started_at: str
    device: Literal["cpu", "cuda"]
    fingerprint: str

    KEY: ClassVar[tuple[str, ...]] = SweepRow.KEY

    def __post_init__(self) -> None:
        check_names(self)
        if self.device_ms is not None and self.verdict != "ok" and not self.implementation.startswith(PREFIX):
            raise ValueError(f"{self.implementation}: what is {self.verdict} and no peer has no time")
        if (self.device_ms is None) == (not self.untimed):
            raise ValueError(f"untimed: expected a reason exactly where there is no time, got {self.untimed!r}")
        if self.verdict not in ("ok", "unchecked") and not self.reason:
            raise ValueError(f"reason: expected one line for the verdict {self.verdict}, got {self.reason!r}")


def run(
    cells: Iterable[Cell], checked: Iterable[ParityRow], protocol: sweep.Protocol, settings: Settings
) -> Iterator[PeerTime]:
    """Time every pass of the cells of peers, and of those beside them; what cannot run gives rows that say why.

    Raises:
        ValueError: there is no peer in the cells of a problem.
    """
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.case.name, cell.problem), []).append(cell)
    for (case, _), group in groups.items():
        if not any(cell.entry.key.startswith(PREFIX) for cell in group):
            raise ValueError(f"{case}: expected a peer, {PREFIX}*, to time others beside, got {group[0].entry.key}")
    checked = list(checked)
    bench = sweep.Bench(protocol, settings)
    try:
        for group in groups.values():
            to_measure = []
            for cell in group:
                if reason := _obstacle(cell, checked, settings):
                    for pass_ in cell.passes:
                        untimed: dict[str, Any] = {"untimed": reason}
                        yield from (_row(cell, pass_, cache, checked, settings, untimed) for cache in protocol.caches)
                else:
                    to_measure.append(cell)
            for subject, pass_ in bench.measure(to_measure, None):
                for cache in protocol.caches:
                    try:
                        columns = sweep.measured(subject, cache)
                    except Failure as failure:
                        columns = {"untimed": f"{failure.status}: {failure.reason}"}
                    yield _row(subject.cell, pass_, cache, checked, settings, columns)
    finally:
        bench.close()


def command(cells: list[Cell], folder: Path, settings: Settings) -> Iterator[PeerTime]:
    """Time the cells, and write each row when it is there."""
    caches: tuple[Any, ...] = ("warm",) if settings.stamp.device == "cpu" else ("cold", "warm")
    checked = records.load(folder / "parity.csv", ParityRow) if (folder / "parity.csv").exists() else []
    for row in run(cells, checked, sweep.Protocol(1, caches), settings):
        records.append(folder / FILE, [row])
        yield row


def table(rows: Iterable[PeerTime]) -> Table:
    """A line for each pass, case and cache."""
    title = "peers, whatever their verdict, and others beside them: median ms of one call"
    found = Table(title=title, box=SIMPLE_HEAD, show_edge=False)
    for name in ("implementation", "case", "pass", "cache", "ms", "timer", "verdict"):
        found.add_column(name, overflow="fold")
    for row in rows:
        ms = row.untimed if row.device_ms is None else f"{row.device_ms:.3g}"
        verdict = row.verdict if row.error_ratio is None else f"{row.verdict}, {row.error_ratio:.2g} of the allowed"
        found.add_row(row.implementation, row.case, row.pass_, row.cache, ms, row.timer, verdict)
    return found


def _row(
    cell: Cell, pass_: Pass, cache: Any, checked: list[ParityRow], settings: Settings, columns: dict[str, Any]
) -> PeerTime:
    stamp = settings.stamp
    verdict, reason, ratio = _verdict(sweep.checks_of(checked, cell, settings))
    names = {field.name for field in fields(PeerTime)}
    return PeerTime(
        **cell_columns(cell),
        **{name: value for name, value in columns.items() if name in names},
        run_id=stamp.run_id,
        pass_=pass_,
        verdict=verdict,
        reason=reason,
        error_ratio=ratio,
        cache=cache,
        gpu=stamp.gpu,
        driver=stamp.driver,
        cuda=stamp.cuda,
        git_sha=stamp.git_sha,
        source_hash=cell.entry.source_hash(),
        versions=versions(cell, stamp),
        started_at=stamp.started_at,
        device=stamp.device,
        fingerprint=stamp.fingerprint,
    )


def _obstacle(cell: Cell, checked: list[ParityRow], settings: Settings) -> str:
    """Why a cell gets no time; empty if it does."""
    if reason := cell.entry.untimed(cell.problem, settings.stamp.device):
        return f"unsupported: {reason}"
    verdict, reason, _ = _verdict(sweep.checks_of(checked, cell, settings))
    return "" if verdict == "ok" or cell.entry.key.startswith(PREFIX) else f"{verdict}: {reason}".removesuffix(": ")


def _verdict(checked: list[ParityRow]) -> tuple[Any, str, float | None]:
    """Of all tensors: the status and the reason of the worst, and the worst error over what is allowed."""
    if not checked:
        return "unchecked", "", None
    ratio = max((row.error_ratio for row in checked if row.error_ratio is not None), default=None)
    wrong = [row for row in checked if row.status != "ok"]
    if not wrong:
        return "ok", "", ratio
    worst = max(wrong, key=lambda row: float("inf") if row.error_ratio is None else row.error_ratio)
    return worst.status, worst.reason, ratio
