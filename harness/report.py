"""`python -m harness report`: a results folder as one HTML page that needs nothing else, not even a network.

The page is made from the folder's CSV files, its JSON files and the plots drawn from them, and holds no clock of its
own: the same folder gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from harness import environment, plots, records
from harness.figures import pictures
from harness.leaderboard import PRECISIONS, Cell, leaderboard, precision
from harness.parity_view import matrices, precisions, worst_first
from harness.rows import ParityRow, Row, SweepRow, latest
from spec.problem import PASSES

logger = logging.getLogger(__name__)

NAME, DASH, BASELINE = "index.html", "–", "torch.eager"
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


def add_parser(commands: Any) -> None:
    """Add `report` to the commands of `python -m harness`."""
    command = commands.add_parser("report", help="render result folders to HTML pages")
    command.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="default: every one in results/")
    command.set_defaults(command=_report)


def write(folder: str | Path) -> Path:
    """Render the folder's files as they are, plots included, to its `index.html`.

    Raises:
        ValueError: it has neither `parity.csv` nor `sweep.csv`, or a file that cannot be read.
    """
    folder = Path(folder)
    path = folder / NAME
    path.write_text(_render(folder), encoding="utf-8", newline="\n")
    return path


def _report(options: argparse.Namespace) -> int:
    for folder in options.folders or _all_folders():
        _require_results(folder)
        if (folder / "parity.csv").exists():
            plots.parity_plots(folder)
        if (folder / "sweep.csv").exists():
            plots.sweep_plots(folder)
        print(write(folder))
    return 0


def _all_folders() -> list[Path]:
    results = environment.ROOT / "results"
    found = sorted({path.parent for name in ("parity.csv", "sweep.csv") for path in results.glob(f"*/{name}")})
    if not found:
        raise ValueError(f"{results}: expected folders with parity.csv or sweep.csv, found none")
    return found


def _require_results(folder: Path) -> None:
    if not any((folder / name).exists() for name in ("parity.csv", "sweep.csv")):
        raise ValueError(f"{folder}: expected parity.csv or sweep.csv in it, found neither")


def _render(folder: Path) -> str:
    _require_results(folder)
    parity, sweep = _rows(folder / "parity.csv", ParityRow), _rows(folder / "sweep.csv", SweepRow)
    machine, ceilings = _json(folder / "environment.json"), _json(folder / "ceilings.json")
    timed = sorted({row.implementation for row in sweep if row.status == "ok"})
    baseline = BASELINE if BASELINE in timed or not timed else timed[0]
    cells = leaderboard(sweep, baseline)
    parity = worst_first(parity)
    everything: list[ParityRow | SweepRow] = [*parity, *sweep]
    jinja = Environment(
        loader=PackageLoader("harness"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    jinja.filters |= {"number": number, "dash": dash, "kernels": _kernels}
    return jinja.get_template("report.html").render(
        # Raw: neither is HTML, and neither holds data.
        style=Markup(_source(jinja, "report.css")),
        script=Markup(_source(jinja, "report.js")),
        name=folder.resolve().name,
        machine=machine,
        command=_command(machine),
        flat_machine=_flat(machine),
        ceilings=_flat(ceilings),
        run=_run(everything),
        summary=[_summary("parity", "tensors", parity), _summary("sweep", "timings", sweep)],
        cpu=any(row.device == "cpu" and row.status == "ok" for row in sweep),
        columns=COLUMNS,
        cells=cells,
        timed=timed,
        baseline=baseline,
        timers=[(name, TIMERS.get(name, "")) for name in sorted({row.timer for row in sweep if row.timer})],
        axes=_axes(cells),
        matrices=matrices(folder) if parity else [],
        parity_axes=_parity_axes(parity),
        pictures=pictures(folder),
        failures=[_failure(row) for row in everything if row.status not in ("ok", "unsupported")],
        unsupported=_unsupported(everything),
        data={"sweep": _sweep_data(cells), "parity": [_parity_texts(row) for row in parity]},
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


def _rows(path: Path, kind: type[Row]) -> list[Row]:
    return latest(records.load(path, kind)) if path.exists() else []


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _flat(content: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested objects as dotted names, lists with commas between."""
    found: list[tuple[str, str]] = []
    for name, value in content.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            found.append((prefix + name, dash(text)))
    return found


def _run(rows: Sequence[ParityRow | SweepRow]) -> dict[str, str]:
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


def _summary(name: str, what: str, rows: Sequence[ParityRow | SweepRow]) -> dict[str, Any]:
    counts = [row.status for row in rows]
    wrong, right, unsupported = counts.count("wrong"), counts.count("ok"), counts.count("unsupported")
    failed = len(counts) - wrong - right - unsupported
    return {
        "name": name,
        "what": what,
        "counts": {"right": right, "wrong": wrong, "failed": failed, "unsupported": unsupported},
    }


def _command(machine: dict[str, Any]) -> str:
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


def _axes(cells: list[Cell]) -> list[tuple[str, str, list[str]]]:
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


def _parity_axes(rows: list[ParityRow]) -> list[tuple[str, str, list[str]]]:
    return [
        ("p.implementation", "implementation", sorted({row.implementation for row in rows})),
        ("p.inner", "inner model", sorted({row.inner_model for row in rows})),
        ("p.case", "case", sorted({row.case for row in rows})),
        ("p.dtype", "dtype", precisions(rows)),
        ("p.tensor", "tensor", sorted({row.tensor for row in rows if row.tensor})),
        ("p.status", "status", sorted({row.status for row in rows})),
    ]


def _sweep_data(cells: list[Cell]) -> dict[str, Any]:
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
        "rows": [
            {"cell": index, "status": entry.row.status, "rank": entry.rank}
            | {name: value for name in names if (value := _plain(getattr(entry.row, name))) is not None}
            for index, cell in enumerate(cells)
            for entry in cell.entries
        ],
    }


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parity_texts(row: ParityRow) -> list[str]:
    numbers = row.error_ratio, row.max_error, row.rms_error, row.yardstick_max_error, row.yardstick_rms_error
    texts = ["" if value is None else f"{value:.2e}" if value < 1e-3 else number(value) for value in numbers]
    mini_batch = "" if row.diverging_mini_batch is None else str(row.diverging_mini_batch)
    return [
        *(row.implementation, row.inner_model, row.case, precision(row.dtype, row.matmul_precision)),
        *(row.tensor, row.status),
        *(texts[0], row.reason, *texts[1:]),
        *(row.worst_index, mini_batch, str(row.seed), row.truth),
    ]


def _failure(row: ParityRow | SweepRow) -> dict[str, str]:
    swept = isinstance(row, SweepRow)
    return {
        "file": "sweep" if swept else "parity",
        "status": row.status,
        "implementation": row.implementation,
        "inner": row.inner_model,
        "case": row.case,
        "dtype": precision(row.dtype, row.matmul_precision),
        "where": f"{row.pass_}, {row.cache}" if isinstance(row, SweepRow) else row.tensor,
        "reason": row.reason,
    }


def _unsupported(rows: Iterable[ParityRow | SweepRow]) -> list[tuple[str, str, int, int]]:
    """Implementation, reason, and how many rows of parity and of the sweep it is the reason of."""
    counts: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        if row.status == "unsupported":
            counts.setdefault((row.implementation, row.reason), [0, 0])[isinstance(row, SweepRow)] += 1
    return [(*names, *found) for names, found in sorted(counts.items())]


def _kernels(text: str) -> list[str]:
    return [part.strip() for part in text.split(";") if part.strip()]


def _source(jinja: Environment, name: str) -> str:
    assert jinja.loader is not None
    return jinja.loader.get_source(jinja, name)[0]
