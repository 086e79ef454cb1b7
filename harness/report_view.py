"""What the report page says: the rows and files of a folder as texts, and as the data that its script works on."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.ticker import EngFormatter

from harness.leaderboard import PRECISIONS, Cell, precision
from harness.parity_view import precisions
from harness.peer_times import PeerTime
from harness.rows import ParityRow, SweepRow
from spec.problem import PASSES

AnyRow = ParityRow | SweepRow
DASH = "–"
TIMERS = {
    "cupti": "on the device, from the start of the first kernel of a call to the end of its last, by CUPTI records",
    "cuda_events": "on the device, between two CUDA events around a call",
    "host_sync": "by the host's clock until the device is done: launch overhead is in it",
}
# Of the leaderboard: what a column sorts by, its head, and what it says.
COLUMNS = (
    ("rank", "rank", "by median time, within the cell"),
    ("implementation", "implementation", ""),
    ("device_ms", "time, ms", "median"),
    ("device_ms_p20", "p20–p80, ms", "20th to 80th percentile; sorts by the 20th"),
    ("ratio", "speed-up", "the baseline's time over this one"),
    ("roofline_fraction", "roofline", "roofline time over this one"),
    ("latency_floor_ms", "latency floor, ms", "mini-batches in the chain times the latency of one dependent step"),
    ("host_ms", "host, ms", "until the call returns"),
    ("first_call_s", "first call, s", "compilation included"),
    ("peak_memory_bytes", "peak memory, MiB", ""),
    ("launches", "launches", "kernels that one call launched"),
    ("error_ratio", "error ratio", "the worst error over the allowed one; right is at most 1"),
    ("timer", "timer", ""),
    ("throttled", "throttled", "whether the clock was held back in any block, and why"),
    ("sm_clock_mhz", "SM clock, MHz", "median over the blocks, and power"),
    ("samples", "samples", "calls, and processes they are from"),
)


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits without an exponent: 0.0512, 5.12, 51.2, 512, 5,120; a dash for none."""
    if value is None or not math.isfinite(value):
        return DASH if value is None else str(value).replace("nan", "NaN")
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def dash(value: Any) -> Any:
    """The value, or an en dash where there is none."""
    return DASH if value in (None, "", []) else value


def flat(content: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested objects as dotted names, lists with commas between, large rates as 2.95 T."""
    found: list[tuple[str, str]] = []
    for name, value in content.items():
        if isinstance(value, dict):
            found += flat(value, f"{prefix}{name}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            if isinstance(value, float) and value >= 1e6:
                text = EngFormatter(places=2)(value)
            found.append((prefix + name, dash(text)))
    return found


def run_facts(rows: Sequence[AnyRow]) -> dict[str, str]:
    """Where the rows come from: environment.json is of the last run alone."""
    times = sorted(row.started_at for row in rows)
    first_last = list(dict.fromkeys(time.replace("T", " ").removesuffix("Z")[:16] for time in times[:1] + times[-1:]))
    return {
        "started": f"{' to '.join(first_last)} UTC" if first_last else DASH,
        "git": _listed(row.git_sha for row in rows),
        "versions": _listed(row.versions for row in rows),
        "environments": str(len({row.fingerprint for row in rows})),
    }


def _listed(texts: Iterable[str]) -> str:
    return "; ".join(sorted(set(filter(None, texts)))) or DASH


def summary(name: str, what: str, rows: Sequence[AnyRow]) -> dict[str, Any]:
    """How many of the rows of file `name` are right, wrong, failed and unsupported; each row is one of `what`."""
    counts = [row.status for row in rows]
    wrong, right, unsupported = counts.count("wrong"), counts.count("ok"), counts.count("unsupported")
    failed = len(counts) - wrong - right - unsupported
    return {
        "name": name,
        "what": what,
        "counts": {"right": right, "wrong": wrong, "failed": failed, "unsupported": unsupported},
    }


def command_line(machine: dict[str, Any]) -> str:
    """The command line that environment.json is of; empty where it does not say."""
    arguments = dict(machine.get("arguments") or {})
    words = ["python", "-m", "harness", str(arguments.pop("command", ""))]
    if not words[-1]:
        return ""
    for name, value in arguments.items():
        option = "--" + name.replace("_", "-")
        if value is True:
            words.append(option)
        elif value is not False and name != "git_sha":  # of a copy without .git; a checkout knows
            words += [option, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return shlex.join(words)


def sweep_axes(cells: list[Cell]) -> list[tuple[str, str, list[str]]]:
    """Of the leaderboard's filters: name, label, and the values there are."""

    def ordered(name: str, order: Sequence[str] = ()) -> list[str]:
        found = {getattr(cell, name) for cell in cells}
        return [value for value in order if value in found] or sorted(found)

    return [
        ("inner", "inner model", ordered("inner_model")),
        ("case", "case", ordered("case")),
        ("dtype", "dtype", ordered("precision", PRECISIONS)),
        ("pass", "pass", ordered("pass_", PASSES)),
        ("cache", "cache", ordered("cache")),
    ]


def parity_axes(rows: list[ParityRow]) -> list[tuple[str, str, list[str]]]:
    """Of the filters of parity's rows: name, label, and the values there are."""
    return [
        ("p.implementation", "implementation", sorted({row.implementation for row in rows})),
        ("p.inner", "inner model", sorted({row.inner_model for row in rows})),
        ("p.case", "case", sorted({row.case for row in rows})),
        ("p.dtype", "dtype", precisions(rows)),
        ("p.tensor", "tensor", sorted({row.tensor for row in rows if row.tensor})),
        ("p.status", "status", sorted({row.status for row in rows})),
    ]


def sweep_data(cells: list[Cell]) -> dict[str, Any]:
    """What the script filters, sorts and sets ratios by, in the order of the page's rows."""
    names = [name for name, *_ in COLUMNS if name not in ("rank", "ratio")]
    return {
        "cells": [
            {
                "inner": cell.inner_model,
                "case": cell.case,
                "dtype": cell.precision,
                "pass": cell.pass_,
                "cache": cell.cache,
                "comparable": cell.comparable,
            }
            for cell in cells
        ],
        "names": ["cell", "rank", "status", *names],
        "rows": [
            [index, entry.rank, entry.row.status, *(_plain(getattr(entry.row, name)) for name in names)]
            for index, cell in enumerate(cells)
            for entry in cell.entries
        ],
    }


def _plain(value: Any) -> Any:
    """For JSON, which has no NaN; six digits are more than the page shows."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return None if value == "" else value


def parity_texts(row: ParityRow) -> list[str]:
    """The cells of a row of the page's parity table, in its order."""
    numbers = row.error_ratio, row.max_error, row.rms_error, row.yardstick_max_error, row.yardstick_rms_error
    texts = ["" if value is None else f"{value:.2e}" if 0 < value < 1e-3 else number(value) for value in numbers]
    mini_batch = "" if row.diverging_mini_batch is None else str(row.diverging_mini_batch)
    return [
        *(row.implementation, row.inner_model, row.case, precision(row.dtype, row.matmul_precision)),
        *(row.tensor, row.status),
        *(texts[0], row.reason, *texts[1:]),
        *(row.worst_index, mini_batch, str(row.seed), row.truth),
    ]


def failure(row: AnyRow) -> dict[str, str]:
    """What failed, where, and why."""
    return {
        "file": "sweep" if isinstance(row, SweepRow) else "parity",
        "status": row.status,
        "implementation": row.implementation,
        "inner": row.inner_model,
        "case": row.case,
        "dtype": precision(row.dtype, row.matmul_precision),
        "where": f"{row.pass_}, {row.cache}" if isinstance(row, SweepRow) else row.tensor,
        "reason": row.reason,
    }


def peers(rows: Iterable[PeerTime]) -> list[tuple[PeerTime, float | None]]:
    """Every time of `peer_times.csv`, by case, pass and cache, and how many times the fastest right one's it is."""

    def cell(row: PeerTime) -> tuple[Any, ...]:
        return row.case, row.inner_model, row.dtype, PASSES.index(row.pass_), row.cache

    timed = [(cell(row), row.device_ms, row) for row in rows if row.device_ms is not None]
    fastest: dict[tuple[Any, ...], float] = {}
    for key, ms, row in timed:
        if row.verdict == "ok":
            fastest[key] = min(ms, fastest.get(key, math.inf))
    timed.sort(key=lambda one: one[:2])
    return [(row, ms / fastest[key] if key in fastest else None) for key, ms, row in timed]


def unsupported(rows: Iterable[AnyRow]) -> list[tuple[str, str, int, int]]:
    """Implementation, reason, and how many rows of parity and of the sweep it is the reason of."""
    counts: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        if row.status == "unsupported":
            counts.setdefault((row.implementation, row.reason), [0, 0])[isinstance(row, SweepRow)] += 1
    return [(*names, found[0], found[1]) for names, found in sorted(counts.items())]


def kernels(text: str, most: int = 6, width: int = 100) -> list[str]:
    """The first parts of the column `kernels`, cut to `width`; `sweep.csv` has all of it."""
    parts = [part.strip() for part in text.split(";") if part.strip()]
    shown = [part if len(part) <= width else part[: width - 1] + "…" for part in parts[:most]]
    return shown + ([f"and {len(parts) - most} more in sweep.csv"] if len(parts) > most else [])
