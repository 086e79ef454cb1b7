"""The parity matrix: who agrees with the truth, in which tensor, in which precision."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas
import seaborn
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.patches import Patch

from harness.check import VARIES
from harness.plot_style import GREY, by_precision, colour_bar, grid, heat, read, save
from spec.tensors import MlpInputs, MlpOutputs

TENSORS = [*MlpOutputs._fields, *(f"d_{name}" for name in MlpInputs._fields)]
AMBER = (0.98, 0.88, 0.62, 1.0)
EARLIER = "*"
DIFFERS = "≠"
NORM = LogNorm(0.01, 100)  # centred at 1, where the colour jumps: allowed on the blue side, not on the other
COLOURS = ListedColormap(
    [*seaborn.color_palette("Blues_r", 160)[24:120], *seaborn.color_palette("OrRd", 160)[56:152]], "allowed"
)


def parity_matrix(folder: Path) -> Path:
    """Implementation x tensor, coloured by the worst error ratio over all cases, one panel for each precision."""
    table = parity_rows(folder)
    names, precisions = sorted(table["implementation"].unique()), by_precision(table)
    tensors = tensors_of(table)
    height = 1.9 + len(precisions) * (0.7 + 0.29 * len(names))
    figure, panels = grid(len(precisions), 1, 10, height, sharex=True)
    drawn: list[WorstCell] = []
    for axes, precision in zip(panels[:, 0], precisions, strict=True):
        cells = worst_cells(table[table["precision"] == precision], names, "tensor", tensors)
        drawn += [cell for line in cells for cell in line]
        colours = np.array([[_colour(cell) for cell in line] for line in cells])
        heat(axes, colours, np.array([[_text(cell) for cell in line] for line in cells], object), names, tensors)
        axes.tick_params(labelbottom=True)
        axes.set_title(precision, loc="left", fontsize=11, fontweight="bold")
        _reasons(axes, table[table["precision"] == precision], names, len(tensors))
    ticks = {0.01: "0.01", 0.1: "0.1", 1: "1: the limit", 10: "10", 100: "100"}
    below = colour_bar(figure, panels, COLOURS, NORM, ticks)
    below.set_xlabel("worst error / allowed error, over all cases, seeds and inner models")
    marks = [
        Patch(facecolor=AMBER, label="no result in some case"),
        Patch(facecolor=GREY, label="–  unsupported"),
        Patch(facecolor="white", edgecolor="#bbbbbb", label="not run"),
    ]
    if any(cell.differs for cell in drawn):
        marks.append(Patch(facecolor="none", label=f"{DIFFERS}  {VARIES}"))
    if any(cell.earlier for cell in drawn):
        marks.append(Patch(facecolor="none", label=f"{EARLIER}  by older code"))
    figure.legend(handles=marks, loc="outside lower right", frameon=False, ncols=len(marks), fontsize=9)
    return save(figure, folder / "parity_matrix.png", f"Parity with the truth: {_verdict(drawn)}")


def parity_rows(folder: Path) -> pandas.DataFrame:
    """The rows of `parity.csv`, with `earlier`: there are later ones of the same implementation with another source.

    Raises:
        ValueError: there is no such file or no row in it.
    """
    table = read(folder, "parity.csv")
    last = table.sort_values("started_at").groupby("implementation")["source_hash"].last()
    return table.assign(earlier=table["source_hash"] != table["implementation"].map(last))


def _verdict(cells: list[WorstCell]) -> str:
    kinds = Counter(cell.kind for cell in cells)
    checked = kinds["ok"] + kinds["wrong"] + kinds["failed"]
    lacking = f", {kinds['failed']} lack a case's result" if kinds["failed"] else ""
    earlier = sum(cell.earlier for cell in cells)
    since = f"; {earlier}{EARLIER} by older code" if earlier else ""
    return f"{kinds['wrong'] or 'none'} of {checked} cells fail{'' if kinds['wrong'] else 's'}{lacking}{since}"


def tensors_of(table: pandas.DataFrame) -> list[str]:
    """The tensors that the table has rows of, outputs first; `all` where no row names one."""
    named = [tensor for tensor in table["tensor"].unique() if tensor and tensor not in TENSORS]
    return [tensor for tensor in TENSORS if tensor in set(table["tensor"])] + named or ["all"]


@dataclass(frozen=True)
class WorstCell:
    """The worst of one implementation in one tensor or case.

    Attributes:
        kind: `wrong`; `failed`, where nothing is wrong but something has no result; `unsupported`; `ok`; or `none`.
        ratio: the worst error ratio, of what is wrong if anything is, else of what is right; NaN where there is none.
        status: of the last row that has no result, for kind `failed`.
        earlier: whether all that is wrong or failed is of earlier code; see `parity_rows`.
        differs: whether two runs of something wrong differ, which is wrong whatever the ratio.
    """

    kind: str
    ratio: float = math.nan
    status: str = ""
    earlier: bool = False
    differs: bool = False

    @property
    def marks(self) -> str:
        """What stands behind the number."""
        return DIFFERS * self.differs + EARLIER * self.earlier


def worst_cells(table: pandas.DataFrame, names: list[str], by: str, labels: list[str]) -> list[list[WorstCell]]:
    """Implementation `names` x `labels` of the column `by`, of the rows of one precision."""
    groups = dict(list(table.groupby(["implementation", by])))
    nothing = table.iloc[:0]
    # A row without a tensor speaks for all of them.
    parts = [[(groups.get((name, label)), groups.get((name, ""))) for label in labels] for name in names]
    found = [[[part for part in cell if part is not None] or [nothing] for cell in line] for line in parts]
    return [[_worst(pandas.concat(cell)) for cell in line] for line in found]


def _worst(rows: pandas.DataFrame) -> WorstCell:
    wrong, right = rows[rows["status"] == "wrong"], rows[rows["status"] == "ok"]
    failed = rows[~rows["status"].isin(["ok", "wrong", "unsupported"])]
    earlier = bool(wrong["earlier"].all() and failed["earlier"].all())
    if not wrong.empty:
        ratio = wrong["error_ratio"].max(skipna=False)
        differs = bool(wrong["reason"].str.contains(VARIES, regex=False).any())
        return WorstCell("wrong", ratio if np.isfinite(ratio) else math.inf, "", earlier, differs)
    if not failed.empty:
        return WorstCell("failed", right["error_ratio"].max(), failed["status"].iloc[-1], earlier)
    if not right.empty:
        return WorstCell("ok", right["error_ratio"].max())
    return WorstCell("none" if rows.empty else "unsupported")


def ratio_text(ratio: float) -> str:
    """Two decimals, so that 1.01 is not 1; three digits from 10 on; empty where it is not a number."""
    if not math.isfinite(ratio):
        return ""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.3g}"


def _colour(cell: WorstCell) -> tuple[float, ...]:
    if cell.kind == "wrong":
        return COLOURS(NORM(min(max(cell.ratio, 1.001), 1e9)))
    other = {"failed": AMBER, "unsupported": GREY, "none": (1.0, 1.0, 1.0, 1.0)}
    return other[cell.kind] if cell.kind in other else COLOURS(NORM(cell.ratio))


def _text(cell: WorstCell) -> str:
    texts = {"wrong": ratio_text(cell.ratio) or "NaN", "failed": cell.status, "unsupported": "–"}
    return texts.get(cell.kind, "") + cell.marks


def _reasons(axes: Axes, table: pandas.DataFrame, names: list[str], width: int) -> None:
    """Across a row that is unsupported as a whole: why."""
    for row, name in enumerate(names):
        cell = table[table["implementation"] == name]
        if not cell.empty and cell["status"].eq("unsupported").all():
            box = {"facecolor": GREY, "edgecolor": "none", "pad": 1.5}
            reason = "; ".join(cell["reason"].unique())[:80]
            axes.text(width / 2, row + 0.5, reason, ha="center", va="center", fontsize=9, color="#444444", bbox=box)
