"""The files that hold results: one row a line, appended and synced one at a time.

A row is on the disk before the next measurement starts, so a killed run loses at most the line it was writing, and
a resumed one appends: the last row of a cell is the one that counts (`latest`).
"""

from __future__ import annotations

import csv
import errno
import io
import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.rows import ParityRow, Row, SweepRow, columns, from_texts, latest, to_texts

if TYPE_CHECKING:
    import pandas

logger = logging.getLogger(__name__)


def append(path: str | Path, rows: Sequence[ParityRow | SweepRow]) -> None:
    """Add `rows`, of one class, to the file, below a header if it is new; on the disk when this returns.

    Raises:
        ValueError: the file has other columns.
        OSError: it cannot be written, or the disk is full.
    """
    if not rows:
        return
    path, names = Path(path), columns(type(rows[0]))
    data = "".join(_line(to_texts(row)) for row in rows)
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
    lines = _whole_lines(Path(path), row_type)
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


def rewrite(path: str | Path, rows: Sequence[ParityRow | SweepRow]) -> None:
    """Replace the file by `rows` at once: a reader sees the old file or the new one.

    Raises:
        ValueError: no rows, or the file has other columns.
        OSError: it cannot be written; the old file is untouched.
    """
    path = Path(path)
    if not rows:
        raise ValueError(f"{path}: expected at least one row to write, got none")
    _has_header(path, type(rows[0]))
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8", newline="") as file:
            file.writelines([_line(columns(type(rows[0]))), *(_line(to_texts(row)) for row in rows)])
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


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
