"""The parity matrix as the report page shows it: the cells of the plot, and the rows behind them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas

from harness.leaderboard import PRECISIONS, precision
from harness.plot_parity import WorstCell, parity_rows, ratio_text, tensors_of, worst_cells
from harness.plot_style import by_precision
from harness.rows import ParityRow


@dataclass(frozen=True)
class MatrixCell:
    """A `WorstCell` as text, starred if of earlier code; `level` is 0 to 2, from far below the limit up to it."""

    label: str
    kind: str
    text: str
    level: int


@dataclass(frozen=True)
class Line:
    """One implementation in one precision; `unsupported` is why, where all of it is."""

    precision: str
    implementation: str
    unsupported: str
    cells: list[MatrixCell]

    def drill(self, more: dict[str, str]) -> dict[str, str]:
        """The filters that leave the rows behind the line, or with `more` those behind one cell of it."""
        return {"p.implementation": self.implementation, "p.dtype": self.precision} | more


@dataclass(frozen=True)
class Matrix:
    """The worst ratio of each implementation and precision, in columns of `by`, "tensor" or "case"."""

    by: str
    labels: list[str]
    lines: list[Line]


def matrices(folder: Path) -> list[Matrix]:
    """By tensor and by case, of the folder's `parity.csv`.

    Raises:
        ValueError: there is no such file or no row in it.
    """
    table = parity_rows(folder)
    return [_matrix(table, "tensor", tensors_of(table)), _matrix(table, "case", sorted(table["case"].unique()))]


def _matrix(table: pandas.DataFrame, by: str, labels: list[str]) -> Matrix:
    names, lines = sorted(table["implementation"].unique()), []
    for name in by_precision(table):
        part = table[table["precision"] == name]
        for key, cells in zip(names, worst_cells(part, names, by, labels), strict=True):
            rows = part[part["implementation"] == key]
            nothing = not rows.empty and rows["status"].eq("unsupported").all()
            reasons = "; ".join(rows["reason"].unique()) if nothing else ""
            texts = [_cell(label, cell) for label, cell in zip(labels, cells, strict=True)]
            lines.append(Line(name, key, reasons, texts))
    return Matrix(by, labels, lines)


def worst_first(rows: Iterable[ParityRow]) -> list[ParityRow]:
    """What fails first, then by error ratio; what is unsupported last."""

    def badness(row: ParityRow) -> tuple[bool, bool, float, str, str, str, str, str]:
        number = row.error_ratio is not None and math.isfinite(row.error_ratio)
        ratio = row.error_ratio if number and row.error_ratio is not None else math.inf
        where = precision(row.dtype, row.matmul_precision), row.inner_model, row.case, row.tensor
        return row.status == "unsupported", row.status == "ok", -ratio, row.implementation, *where

    return sorted(rows, key=badness)


def precisions(rows: Iterable[ParityRow]) -> list[str]:
    """The precisions of the rows, widest first."""
    found = {precision(row.dtype, row.matmul_precision) for row in rows}
    return [name for name in PRECISIONS if name in found]


def _cell(label: str, cell: WorstCell) -> MatrixCell:
    number = "<0.01" if cell.ratio < 0.01 else ratio_text(cell.ratio)
    texts = {
        "wrong": f"✗ {number or 'NaN'}",
        "failed": f"! {number} {cell.status}".replace("  ", " "),
        "unsupported": "n/a",
        "none": "–",
    }
    level = sum(cell.ratio >= limit for limit in (0.1, 0.5))
    text = texts.get(cell.kind, number) + cell.marks
    return MatrixCell(label, cell.kind, text, level)
