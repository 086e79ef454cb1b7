"""What became of each cell between two sides, times apart: missing, failing, wrong, less accurate, fixed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from harness.compare_sides import Samples, Side
from harness.rows import ParityRow, SweepRow

Failure = Literal["error", "parity", "incomplete", "performance"]
EXIT_CODES: dict[Failure, int] = {"error": 13, "parity": 10, "incomplete": 12, "performance": 11}  # the worst first
MEANING: dict[Failure, str] = {
    "error": "a side cannot be read or must not be compared: another schema, another GPU",
    "parity": "wrong results, or a worse error",
    "incomplete": "rows that are missing, damaged, newly failing or not comparable",
    "performance": "a regression",
}
Kind = Literal["missing", "newly failing", "wrong", "less accurate", "not comparable", "other failure", "fixed"]
FAILS: dict[Kind, Failure | None] = {
    "wrong": "parity",
    "less accurate": "parity",
    "newly failing": "incomplete",
    "missing": "incomplete",
    "not comparable": "incomplete",
    "other failure": None,
    "fixed": None,
}
WORSE_ERROR = 0.5  # an error_ratio below it is far from the limit of 1, however much it grew

AnyRow = ParityRow | SweepRow


@dataclass(frozen=True)
class Finding:
    """What is the matter with one cell on device `where`; `parts` are the tensors or passes of which it is true."""

    kind: Kind
    where: str
    cell: str
    parts: tuple[str, ...]
    detail: str

    @property
    def fails(self) -> Failure | None:
        """What it makes a comparison fail by."""
        return FAILS[self.kind]


class Fate(NamedTuple):
    """What became of one row: `was` is None where there was none, `row` that of BASE where HEAD has none."""

    kind: Kind
    was: AnyRow | None
    row: AnyRow
    detail: str


def label(row: AnyRow) -> str:
    """The cell of a row without its tensor or pass, short."""
    dtype = row.dtype if row.matmul_precision == "ieee" else row.matmul_precision
    seed = f" seed {row.seed}" if isinstance(row, ParityRow) and row.seed else ""
    return f"{row.implementation} {row.inner_model} {row.case} {dtype}{seed}"


def part(row: AnyRow) -> str:
    """Which tensor, or which pass and cache; a cell that failed as a whole has no tensor."""
    return row.tensor if isinstance(row, ParityRow) else f"{row.pass_} {row.cache}"


def parity_fates(base: Side, head: Side, error_ratio_factor: float) -> Iterator[Fate]:
    """Of every tensor that either side has and that is not simply as it was."""
    for cell, before in base.parity.items():
        after = head.parity.get(cell, {})
        if "" in after:  # failed as a whole: held to a tensor that was right, if there was one
            was = min(before.values(), key=_severity)
            yield from _fate(was, after[""], error_ratio_factor)
            continue
        for tensor, row in before.items():
            if tensor not in after and (tensor or not after):
                yield Fate("missing", row, row, _sizes(row))
        for tensor, row in after.items():
            yield from _fate(before.get("") or before.get(tensor), row, error_ratio_factor)
    for cell, after in head.parity.items():
        if cell not in base.parity:
            for row in after.values():
                yield from _fate(None, row, error_ratio_factor)


def sweep_fates(base: Side, head: Side) -> Iterator[Fate]:
    """Of every timing that either side has and that is not simply as it was; its error is that of the parity rows."""
    for cell, was in base.sweep.items():
        row = head.sweep.get(cell)
        if row is None:
            yield Fate("missing", was, was, _sizes(was))
        elif was.status == row.status == "ok":
            reason = _incomparable(was, row, base.samples.get(cell), head.samples.get(cell))
            if reason and row.device == "cuda":
                yield Fate("not comparable", was, row, reason)
        else:
            yield from _fate(was, row, math.inf)
    for cell, row in head.sweep.items():
        if cell not in base.sweep:
            yield from _fate(None, row, math.inf)


def findings(where: str, fates: Iterable[Fate]) -> list[Finding]:
    """One finding for each cell and kind, with the worst row's detail; the worst kinds first."""
    groups: dict[tuple[Kind, type, str, str], list[Fate]] = {}
    for fate in fates:
        groups.setdefault((fate.kind, type(fate.row), label(fate.row), _sizes(fate.row)), []).append(fate)
    found = []
    for (kind, _, cell, _), group in groups.items():
        group.sort(key=lambda fate: _severity(fate.row), reverse=True)
        parts = tuple(filter(None, dict.fromkeys(part(fate.row) for fate in group)))
        found.append(Finding(kind, where, cell, parts, group[0].detail))
    return sorted(found, key=lambda finding: list(FAILS).index(finding.kind))


def _fate(was: AnyRow | None, row: AnyRow, error_ratio_factor: float) -> Iterator[Fate]:
    before = was.status if was else "new"
    change = f"{before} → {row.status}: {row.reason}"
    if row.status == "ok":
        if was and was.status != "ok":
            yield Fate("fixed", was, row, f"was {was.status}: {was.reason}")
        elif was and _is_worse(was, row, error_ratio_factor):
            yield Fate("less accurate", was, row, f"error_ratio {was.error_ratio:.2g} → {row.error_ratio:.2g}")
    elif row.status == "wrong":
        if before != "wrong":
            yield Fate("wrong", was, row, change)
    elif before == "ok":
        yield Fate("newly failing", was, row, change)
    elif row.status not in ("unsupported", before):
        yield Fate("other failure", was, row, change)


def _is_worse(was: AnyRow, row: AnyRow, factor: float) -> bool:
    assert was.error_ratio is not None and row.error_ratio is not None  # both are ok
    return row.error_ratio > WORSE_ERROR and row.error_ratio > factor * was.error_ratio


def _incomparable(was: SweepRow, row: SweepRow, before: Samples | None, after: Samples | None) -> str:
    """Why these two times cannot be compared, or nothing."""
    if was.timer != row.timer:
        return f"timer {was.timer or 'unknown'} → {row.timer or 'unknown'}"
    for name, each, samples in (("BASE", was, before), ("HEAD", row, after)):
        if samples is None:
            return f"{name} has no samples of it"
        if len(samples.processes) < (each.processes or 0):
            return f"{name} has samples of {len(samples.processes)} of {each.processes} processes"
        if samples.count < (each.samples or 0):
            return f"{name} has {samples.count} of {each.samples} samples"
    return ""


def _sizes(row: AnyRow) -> str:
    return f"B={row.batch} T={row.tokens} H={row.heads} D={row.head_dim} M={row.mini_batch}"


def _severity(row: AnyRow) -> tuple[bool, float]:
    """For ordering: what failed is worse than what is ok; no number and NaN are as bad as it gets."""
    ratio = row.error_ratio
    return row.status != "ok", math.inf if ratio is None or math.isnan(ratio) else ratio
