"""`python -m harness report`: a results folder as one HTML page that needs nothing else, not even a network.

The page is made from the folder's CSV files, its JSON files and the plots drawn from them, and holds no clock of its
own: the same folder gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from harness import environment, peer_times, plots, records
from harness import report_view as view
from harness.figures import pictures
from harness.leaderboard import leaderboard
from harness.parity_view import matrices, worst_first
from harness.peer_times import PeerTime
from harness.rows import ParityRow, Row, SweepRow, latest
from implementations.registry import implementations, unknown

NAME, BASELINE = "index.html", "torch.eager"


def write(folder: str | Path, baseline: str = BASELINE) -> Path:
    """Render the folder's files as they are, plots included, to its `index.html`.

    Where nothing of `baseline` was timed, the first implementation by name takes its place.

    Raises:
        ValueError: it has neither `parity.csv` nor `sweep.csv`, or a file that cannot be read.
    """
    folder = Path(folder)
    path = folder / NAME
    path.write_text(_render(folder, baseline), encoding="utf-8", newline="\n")
    return path


def baseline_of(folder: Path, rows: Iterable[SweepRow], wanted: str) -> str:
    """What speed-ups in the folder with these rows are relative to; where that is not `wanted`, it says so."""
    found = _or_first(wanted, _timed(rows))
    if found != wanted:
        print(f"{wanted} has no time in {folder}: speed-ups are over {found}")
    return found


def command(folders: Sequence[Path], wanted: str | None) -> int:
    """Draw and render `folders`, or every one in `results/`, with speed-ups over `wanted` where it has times.

    None takes what the folder's last sweep was told.

    Raises:
        ValueError: there is no such implementation, or a folder without results.
    """
    folders = folders or _all_folders()
    sweeps: list[list[SweepRow]] = []
    for folder in folders:
        _require_results(folder)
        sweeps.append(_rows(folder / "sweep.csv", SweepRow))
    known = dict.fromkeys([*implementations(), *(row.implementation for rows in sweeps for row in rows)])
    if wanted and wanted not in known:
        raise ValueError(unknown("baseline", wanted, known))
    for folder, rows in zip(folders, sweeps, strict=True):
        told = _json(folder / "environment.json").get("arguments", {}).get("baseline")
        baseline = baseline_of(folder, rows, wanted or told or BASELINE)
        if _rows(folder / "parity.csv", ParityRow):
            plots.parity_plots(folder)  # drawn again, so that they cannot be older than the rows
        if rows:
            plots.sweep_plots(folder, baseline)
        print(write(folder, baseline))
    return 0


def _timed(rows: Iterable[SweepRow]) -> list[str]:
    return sorted({row.implementation for row in rows if row.status == "ok"})


def _or_first(baseline: str, timed: list[str]) -> str:
    return baseline if baseline in timed or not timed else timed[0]


def _all_folders() -> list[Path]:
    results = environment.ROOT / "results"
    found = sorted({path.parent for name in ("parity.csv", "sweep.csv") for path in results.glob(f"*/{name}")})
    if not found:
        raise ValueError(f"{results}: expected folders with parity.csv or sweep.csv, found none")
    return found


def _require_results(folder: Path) -> None:
    if not any((folder / name).exists() for name in ("parity.csv", "sweep.csv")):
        raise ValueError(f"{folder}: expected parity.csv or sweep.csv in it, found neither")


def _render(folder: Path, baseline: str) -> str:
    _require_results(folder)
    parity, sweep = _rows(folder / "parity.csv", ParityRow), _rows(folder / "sweep.csv", SweepRow)
    machine, ceilings = _json(folder / "environment.json"), _json(folder / "ceilings.json")
    timed = _timed(sweep)
    baseline = _or_first(baseline, timed)
    cells = leaderboard(sweep, baseline)
    parity = worst_first(parity)
    everything: list[view.AnyRow] = [*parity, *sweep]
    jinja = Environment(
        loader=PackageLoader("harness"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    jinja.policies["json.dumps_kwargs"] = {"sort_keys": True, "separators": (",", ":")}
    jinja.filters.update(number=view.number, dash=view.dash, kernels=view.kernels)
    return jinja.get_template("report.html").render(
        # Raw: neither is HTML, and neither holds data.
        style=Markup(_source(jinja, "report.css")),
        script=Markup(_source(jinja, "report.js")),
        name=folder.resolve().name,
        machine=machine,
        command=view.command_line(machine),
        flat_machine=view.flat(machine),
        ceilings=view.flat(ceilings),
        run=view.run_facts(everything),
        summary=[view.summary("parity", "tensors", parity), view.summary("sweep", "timings", sweep)],
        cpu=any(row.device == "cpu" and row.status == "ok" for row in sweep),
        columns=view.COLUMNS,
        cells=cells,
        timed=timed,
        baseline=baseline,
        timers=[(name, view.TIMERS.get(name, "")) for name in sorted({row.timer for row in sweep if row.timer})],
        axes=view.sweep_axes(cells),
        peers=view.peers(_rows(folder / peer_times.FILE, PeerTime)),
        matrices=matrices(folder) if parity else [],
        parity_axes=view.parity_axes(parity),
        pictures=pictures(folder),
        failures=[view.failure(row) for row in everything if row.status not in ("ok", "unsupported")],
        unsupported=view.unsupported(everything),
        data={"sweep": view.sweep_data(cells), "parity": [view.parity_texts(row) for row in parity]},
    )


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


def _source(jinja: Environment, name: str) -> str:
    assert jinja.loader is not None
    return jinja.loader.get_source(jinja, name)[0]
