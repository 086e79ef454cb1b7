"""The two sides of a comparison: a results folder, the results committed in a git revision, or a pytest-benchmark file.

Everything is read from a copy: what reading repairs is then still torn, and reported, the next time.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from harness import records
from harness.rows import ParityRow, Row, SampleRow, SweepRow, columns, from_texts, key, latest, to_texts

Key = tuple[Any, ...]
TABLES = "parity.csv", "sweep.csv", "static.csv"
BENCHMARK_ROWS = "ttt_lab_rows"  # in a pytest-benchmark file: the cells that have no time, and why


@dataclass(frozen=True)
class Samples:
    """The samples of one cell: for each process the medians of its blocks, and how many calls there were in all."""

    processes: list[np.ndarray]
    count: int


@dataclass(frozen=True)
class Side:
    """The results of one device.

    Attributes:
        name: what the report calls it.
        folder: a copy of its files, which lasts as long as the comparison; None for a pytest-benchmark file.
        parity: the rows of the last run of each cell, by tensor; a cell that failed as a whole has the tensor "".
        damage: what was wrong with the files: nothing that was compared can be called complete.
    """

    name: str
    folder: Path | None
    parity: dict[Key, dict[str, ParityRow]] = field(default_factory=dict)
    sweep: dict[Key, SweepRow] = field(default_factory=dict)
    samples: dict[Key, Samples] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Pairs:
    """The devices to compare, and those that only one side has."""

    both: dict[str, tuple[Side, Side]]
    only_base: list[str]
    only_head: list[str]


def open_pairs(base: str, head: str, scratch: Path) -> Pairs:
    """Read both sides, with `scratch` for the copies.

    Two folders are compared whatever they are called; folders of devices by their names.

    Raises:
        ValueError: a side is nothing that can be compared, has another schema, or they have nothing in common.
        OSError: a file cannot be read.
    """
    kinds = [_kind(text) for text in (base, head)]
    if kinds.count("benchmark") == 1:
        raise ValueError(f"expected two pytest-benchmark files or none, got {base} and {head}")
    sides = [_open(text, kind, scratch / name) for text, kind, name in zip((base, head), kinds, "ab", strict=True)]
    if kinds[0] == kinds[1] and kinds[0] in ("benchmark", "folder"):
        ((first, one),), ((second, other),) = (side.items() for side in sides)
        return Pairs({second if first == second else f"{first} and {second}": (one, other)}, [], [])
    both = {name: (sides[0][name], sides[1][name]) for name in sides[0] if name in sides[1]}
    if not both:
        have = (f"{text} has {', '.join(side)}" for text, side in zip((base, head), sides, strict=True))
        raise ValueError(f"expected a device with results on both sides, got none: {'; '.join(have)}")
    only = [[name for name in side if name not in both] for side in sides]
    if "folder" in kinds:  # one folder was asked for: the others are not missing
        only = [[], []]
    return Pairs(both, *only)


def parity_cell(row: ParityRow) -> Key:
    """What was checked, whatever the tensor."""
    return tuple(getattr(row, name) for name in ParityRow.KEY if name != "tensor")


def benchmark_entry(row: SweepRow) -> dict[str, str]:
    """A row as a pytest-benchmark file keeps it: in `extra_info`, or in the list `BENCHMARK_ROWS` if it has no time."""
    return dict(zip(columns(SweepRow), to_texts(row), strict=True))


def _kind(text: str) -> str:
    path = Path(text)
    if path.is_file():
        return "benchmark"
    if not path.is_dir():
        return "revision"
    return "folder" if any((path / name).exists() for name in TABLES) else "folders"


def _open(text: str, kind: str, scratch: Path) -> dict[str, Side]:
    path = Path(text)
    if kind == "benchmark":
        return {path.parent.resolve().name: _read_benchmark(path)}
    if kind == "folder":
        return {path.resolve().name: _read_folder(path, text, scratch)}
    prefix = text.rstrip("/")
    if kind == "revision":
        path, prefix = _extract(text, scratch / "tree"), f"{text}:results"
    found = [child for child in sorted(path.iterdir()) if any((child / name).exists() for name in TABLES)]
    if not found:
        raise ValueError(f"{prefix}: expected {', '.join(TABLES)} in it or in its folders, got none of them")
    return {child.name: _read_folder(child, f"{prefix}/{child.name}", scratch / child.name) for child in found}


def _extract(revision: str, scratch: Path) -> Path:
    """`results/` of a git revision, of the repository that this runs in."""
    commit = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if commit is None:
        raise ValueError(
            f"expected a results folder, a pytest-benchmark JSON file or a git revision, got {revision!r}"
        )
    top = (_git("rev-parse", "--show-toplevel") or b".").decode().strip()
    archive = _git("-C", top, "archive", "--format=tar", commit.decode().strip(), "results")
    if archive is None:
        raise ValueError(f"{revision}: has no results/")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(scratch, filter="data")
    return scratch / "results"


def _git(*arguments: str) -> bytes | None:
    done = subprocess.run(["git", *arguments], capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None


def _read_folder(source: Path, name: str, scratch: Path) -> Side:
    shutil.copytree(source, scratch, ignore=shutil.ignore_patterns("*.png", "*.html", records.LOCK))
    damage: list[str] = []
    with _repairs_said(scratch, name, damage):
        parity = _load(scratch / "parity.csv", ParityRow, name, damage)
        sweep = {key(row): row for row in latest(_load(scratch / "sweep.csv", SweepRow, name, damage))}
        samples = _read_samples(scratch, sweep)
    return Side(name, scratch, _last_runs(parity), sweep, samples, _read_environment(scratch, name), damage)


def _load(path: Path, kind: type[Row], name: str, damage: list[str]) -> list[Row]:
    if not path.exists():
        return []
    try:
        rows = records.load(path, kind)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path.parent), name)) from None
    if not rows:
        damage.append(f"{name}/{path.name} has no rows")
    return rows


@contextmanager
def _repairs_said(folder: Path, name: str, damage: list[str]) -> Iterator[None]:
    """What `records` logs of the copy in `folder` goes to `damage`, as of `name`, and not to the terminal."""

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            damage.append(record.getMessage().replace(str(folder), name))

    handler, propagate = Keep(logging.WARNING), records.logger.propagate
    records.logger.addHandler(handler)
    records.logger.propagate = False
    try:
        yield
    finally:
        records.logger.propagate = propagate
        records.logger.removeHandler(handler)


def _last_runs(rows: Iterable[ParityRow]) -> dict[Key, dict[str, ParityRow]]:
    """The rows of the last run of each cell: one that failed as a whole has none of the tensors of the run before."""
    cells: dict[Key, list[ParityRow]] = {}
    for row in rows:
        cells.setdefault(parity_cell(row), []).append(row)
    found = {}
    for cell, all_rows in cells.items():
        last = max((row.started_at, row.run_id) for row in all_rows)
        found[cell] = {row.tensor: row for row in all_rows if (row.started_at, row.run_id) == last}
    return found


def _read_samples(folder: Path, rows: dict[Key, SweepRow]) -> dict[Key, Samples]:
    """The samples behind each row: those of its own run."""
    table = records.samples(folder)
    if not len(table):
        return {}
    times = table["device_ms"].to_numpy(float)
    if not (np.isfinite(times) & (times > 0)).all():
        raise ValueError(f"samples: device_ms: expected positive times, got {times[~(times > 0)][:1]}")
    names = [name.rstrip("_") for name in SampleRow.KEY]
    blocks = table.groupby([*names, "run_id", "process", "block"])["device_ms"].agg(["median", "size"])
    found: dict[Key, dict[int, list[float]]] = {}
    counts: dict[Key, int] = {}
    for index, median, size in blocks.itertuples():
        *cell, run_id, process, _ = index
        row = rows.get(tuple(cell))
        if row is not None and row.run_id == run_id:
            found.setdefault(tuple(cell), {}).setdefault(process, []).append(median)
            counts[tuple(cell)] = counts.get(tuple(cell), 0) + size
    return {
        cell: Samples([np.array(values) for values in processes.values()], int(counts[cell]))
        for cell, processes in found.items()
    }


def _read_environment(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "environment.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name}/environment.json: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name}/environment.json: expected an object, got {type(content).__name__}")
    return content


def _read_benchmark(path: Path) -> Side:
    """The cells of a file that `nox -s bench` wrote: one process each, every round a block."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = [(entry["extra_info"], entry["stats"]["data"]) for entry in content["benchmarks"]]
        entries += [(entry, []) for entry in content[BENCHMARK_ROWS]]
    except (ValueError, KeyError, TypeError) as error:
        detail = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: expected a pytest-benchmark file of nox -s bench, got {detail}") from None
    side = Side(str(path), None)
    for texts, data in entries:
        missing = [name for name in columns(SweepRow) if name not in texts]
        unknown = [name for name in texts if name not in columns(SweepRow)]
        if missing or unknown:
            detail = f"missing {', '.join(missing)}" if missing else f"unknown {', '.join(unknown)}"
            raise ValueError(f"{path}: extra_info: columns {detail}: written by another version")
        row = from_texts(SweepRow, [texts[name] for name in columns(SweepRow)])
        side.sweep[key(row)] = row
        if data:
            side.samples[key(row)] = Samples([1e3 * np.array(data, float)], len(data))
    if not side.sweep:
        side.damage.append(f"{path} has no cells")
    return side
