"""The files that hold results: one row a line, appended and synced one at a time.

A row is on the disk before the next measurement starts, so a killed run loses at most the line it was writing, and
a resumed one appends: the last row of a cell is the one that counts (`latest`).
"""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from harness.rows import AnyRow, Row, SampleRow, columns, from_texts, latest, to_texts

if TYPE_CHECKING:
    import pandas

logger = logging.getLogger(__name__)

LOCK = ".lock"


def append(path: str | Path, rows: Sequence[AnyRow]) -> None:
    """Add `rows`, of one class, to the file, below a header if it is new; on the disk when this returns.

    Raises:
        ValueError: the file has other columns.
        OSError: it cannot be written, or the disk is full.
    """
    if not rows:
        return
    path, names = Path(path), columns(type(rows[0]))
    data = "".join(_line(to_texts(row)) for row in rows)
    with _locked(path):
        if not _has_header(path, type(rows[0])):
            data = _line(names) + data
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if os.write(handle, data.encode()) != len(data.encode()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(handle)
        finally:
            os.close(handle)


def load(path: str | Path, row_type: type[Row]) -> list[Row]:
    """Every row of the file; a torn last line is cut off the file and logged.

    Raises:
        ValueError: its columns are not those of `row_type`, or a line cannot be read; the message has file and line.
        OSError: it cannot be read.
    """
    path = Path(path)
    with _locked(path):
        lines = _whole_lines(path, row_type)
    width, rows = len(columns(row_type)), []
    for number, line in enumerate(lines[1:], start=2):
        try:
            texts = _split(line)
            if len(texts) != width:
                raise ValueError(f"expected {width} fields, got {len(texts)}")
            rows.append(from_texts(row_type, texts))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    return rows


def frame(path: str | Path, row_type: type[Row]) -> pandas.DataFrame:
    """The latest row of each cell of the file, as a table with the file's column names."""
    import pandas  # takes a second: not for those who only append

    texts = [vars(row).values() for row in latest(load(path, row_type))]
    return pandas.DataFrame(texts, columns=columns(row_type))


def rewrite(path: str | Path, row_type: type[Row], keep: Callable[[list[Row]], list[Row]]) -> None:
    """Replace the file's rows by `keep` of them at once: a reader sees the old file or the new one.

    Nobody appends meanwhile. Where no row is kept, the file is deleted; where there is none, nothing is done.

    Raises:
        ValueError: the file has other columns.
        OSError: it cannot be written; the old file is untouched.
    """
    path = Path(path)
    with _locked(path):
        if not path.exists():
            return
        rows = keep(load(path, row_type))
        if not rows:
            path.unlink()
            return
        with _replacing(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
            file.writelines([_line(columns(row_type)), *(_line(to_texts(row)) for row in rows)])
            file.flush()
            os.fsync(file.fileno())


def samples(folder: str | Path) -> pandas.DataFrame:
    """Every sample kept in a results folder, with the column names of `SampleRow`; empty where there are none.

    `samples.parquet` has those of finished sweeps; `samples.csv` is the journal of one that runs or was killed.

    Raises:
        ValueError: a file has other columns, or cannot be read.
    """
    import pandas

    folder, names = Path(folder), columns(SampleRow)
    packed = journal = pandas.DataFrame(columns=names)
    with _locked(folder / "samples.csv"):
        if (path := folder / "samples.parquet").exists():
            packed = _read_parquet(path)
        if (path := folder / "samples.csv").exists():
            journal = pandas.DataFrame([vars(row).values() for row in load(path, SampleRow)], columns=names)
    # Who was killed between writing the one and deleting the other left them twice. Two samples may well be equal.
    cell = ["run_id", *(name.rstrip("_") for name in SampleRow.KEY)]
    known = set(packed[cell].itertuples(index=False, name=None))
    journal = journal[[one not in known for one in journal[cell].itertuples(index=False, name=None)]]
    found = [part for part in (packed, journal) if len(part)]
    return pandas.concat(found, ignore_index=True) if found else pandas.DataFrame(columns=names)


def pack_samples(folder: str | Path) -> None:
    """Move the journal's samples into `samples.parquet`; of each cell those of its last run are kept."""
    folder = Path(folder)
    with _locked(folder / "samples.csv"):
        if not (folder / "samples.csv").exists():
            return
        table = samples(folder)
        last = table.groupby([name.rstrip("_") for name in SampleRow.KEY], dropna=False)["run_id"].transform("last")
        table = table[table["run_id"] == last]
        with _replacing(folder / "samples.parquet") as beside:
            table.to_parquet(beside, index=False)
        (folder / "samples.csv").unlink()


def _read_parquet(path: Path) -> pandas.DataFrame:
    import pandas

    try:
        table = pandas.read_parquet(path)
    except Exception as error:  # pyarrow has its own: truncated, not Parquet, an unknown encoding
        raise ValueError(f"{path}: not a Parquet file that can be read: {error}") from None
    _check_header(path, list(table.columns), list(columns(SampleRow)))
    return table


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` once it is whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


_held = threading.local()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Nobody else reads or writes in the folder of `path` meanwhile; a thread that holds the lock may take it again.

    The kernel lets go of the lock when a process dies, however it dies. A folder that cannot be written (a result
    set on a read-only disk) is read without one.
    """
    folder = str(path.parent.absolute())
    held: set[str] = _held.__dict__.setdefault("folders", set())
    if folder in held or not os.access(folder, os.W_OK):
        yield
        return
    with open(os.path.join(folder, LOCK), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        held.add(folder)
        try:
            yield
        finally:
            held.discard(folder)


def results_folder(path: str | Path) -> Path:
    """The folder at `path`, created if need be, after a trial write: before hours of work, not after them.

    Raises:
        OSError: it cannot be created or written; the message says which folder and why.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"trial")
    except OSError as error:
        raise OSError(error.errno, f"results cannot be written there: {error.strerror}", str(path)) from error
    return path


def _has_header(path: Path, row_type: type[Row]) -> bool:
    """Whether a file is there that may be appended to, not a new one. A torn last line is cut off first."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        header = file.readline()
        file.seek(-1, os.SEEK_END)
        whole = file.read() == b"\n"
    if not whole:
        return bool(_whole_lines(path, row_type))
    _check_header(path, _split(header.decode(errors="replace").rstrip("\n")), list(columns(row_type)))
    return True


def _whole_lines(path: Path, row_type: type[Row]) -> list[str]:
    """The lines of `path`, its header checked, without a torn last line, which is cut off the file too."""
    raw = path.read_bytes()
    *lines, tail = [line.decode(errors="replace") for line in raw.split(b"\n")]
    expected = columns(row_type)
    if lines:
        _check_header(path, _split(lines[0]), list(expected))
    elif not _line(expected).startswith(tail):  # not a torn header but somebody else's file
        _check_header(path, _split(tail), list(expected))
    short = not tail and len(lines) > 1 and len(_split(lines[-1])) < len(_split(lines[0]))
    whole = raw[:-1] if short else raw
    whole = whole[: whole.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        lines = lines[:-1] if short else lines
        os.truncate(path, len(whole))
        logger.warning("%s:%d: dropped a torn last line (%d bytes)", path, len(lines) + 1, len(raw) - len(whole))
    return lines


def _check_header(path: Path, found: list[str], expected: list[str]) -> None:
    if found == expected:
        return
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    detail = f"missing {', '.join(missing)}" if missing else f"unknown {', '.join(unknown)}"
    if not missing and not unknown:
        detail = "in another order"
    raise ValueError(f"{path}: columns {detail}: expected {','.join(expected)}, found {','.join(found)}")


def _split(line: str) -> list[str]:
    return next(csv.reader([line]), [])


def _line(texts: Iterable[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(texts)
    return text.getvalue()
