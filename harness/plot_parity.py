"""The parity matrix: who agrees with the truth, in which tensor, in which precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas
import seaborn
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.patches import Patch

from harness.plot_style import GREY, by_precision, colour_bar, grid, heat, read, save
from spec.tensors import MlpInputs, MlpOutputs

TENSORS = [*MlpOutputs._fields, *(f"d_{name}" for name in MlpInputs._fields)]
NORM = LogNorm(0.01, 100)  # centred at 1, where the colour jumps: allowed on the blue side, not on the other
COLOURS = ListedColormap(
    [*seaborn.color_palette("Blues_r", 160)[24:120], *seaborn.color_palette("OrRd", 160)[56:152]], "allowed"
)


def parity_matrix(folder: Path) -> Path:
    """Implementation x tensor, coloured by the worst error ratio over all cases, one panel for each precision."""
    table = read(folder, "parity.csv")
    names, precisions = sorted(table["implementation"].unique()), by_precision(table)
    named = [tensor for tensor in table["tensor"].unique() if tensor and tensor not in TENSORS]
    tensors = [tensor for tensor in TENSORS if tensor in set(table["tensor"])] + named or ["all"]
    height = 1.9 + len(precisions) * (0.7 + 0.29 * len(names))
    figure, panels = grid(len(precisions), 1, 10, height, sharex=True)
    failing = checked = 0
    for axes, precision in zip(panels[:, 0], precisions, strict=True):
        worst, failed, texts = _cells(table[table["precision"] == precision], names, tensors)
        failing, checked = failing + int(failed.sum()), checked + int((failed | np.isfinite(worst)).sum())
        colours = COLOURS(NORM(np.nan_to_num(np.where(failed, np.clip(worst, 1.001, 1e9), worst), nan=1.0)))
        colours[np.isnan(worst)] = (1, 1, 1, 1)
        colours[texts == "–"] = GREY
        heat(axes, colours, texts, names, tensors)
        axes.tick_params(labelbottom=True)
        axes.set_title(precision, loc="left", fontsize=11, fontweight="bold")
        _reasons(axes, table[table["precision"] == precision], names, len(tensors))
    ticks = {0.01: "0.01", 0.1: "0.1", 1: "1: the limit", 10: "10", 100: "100"}
    below = colour_bar(figure, panels, COLOURS, NORM, ticks)
    below.set_xlabel("worst error / allowed error, over all cases, seeds and inner models")
    marks = [
        Patch(facecolor=GREY, label="–  unsupported"),
        Patch(facecolor="white", edgecolor="#bbbbbb", label="not run"),
    ]
    figure.legend(handles=marks, loc="outside lower right", frameon=False, ncols=2, fontsize=9)
    verdict = f"{failing} of {checked} cells fail" if failing else f"all {checked} cells pass"
    return save(figure, folder / "parity_matrix.png", f"Parity with the truth: {verdict}")


def _cells(table: pandas.DataFrame, names: list[str], tensors: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one precision: worst ratio (NaN where none), whether it fails, and what is written into the cell."""
    worst = np.full((len(names), len(tensors)), np.nan)
    failed = np.zeros(worst.shape, bool)
    texts = np.full(worst.shape, "", object)
    for row, name in enumerate(names):
        of_name = table[table["implementation"] == name]
        for column, tensor in enumerate(tensors):
            cell = of_name[of_name["tensor"].isin([tensor, ""])]  # a row without a tensor speaks for all of them
            bad = cell[~cell["status"].isin(["ok", "unsupported"])]
            worst[row, column] = cell["error_ratio"].max()
            failed[row, column] = not bad.empty
            if not bad.empty:
                ratio = bad["error_ratio"].max(skipna=False)
                worst[row, column] = ratio if np.isfinite(ratio) else np.inf
                texts[row, column] = f"{ratio:.2g}" if bad["error_ratio"].notna().all() else _without_number(bad)
            elif cell["status"].eq("unsupported").all() and not cell.empty:
                texts[row, column] = "–"
    return worst, failed, texts


def _without_number(bad: pandas.DataFrame) -> str:
    status = bad["status"].iloc[-1]
    return "NaN" if status == "wrong" else status


def _reasons(axes: Axes, table: pandas.DataFrame, names: list[str], width: int) -> None:
    """Across a row that is unsupported as a whole: why."""
    for row, name in enumerate(names):
        cell = table[table["implementation"] == name]
        if not cell.empty and cell["status"].eq("unsupported").all():
            box = {"facecolor": GREY, "edgecolor": "none", "pad": 1.5}
            reason = "; ".join(cell["reason"].unique())[:80]
            axes.text(width / 2, row + 0.5, reason, ha="center", va="center", fontsize=9, color="#444444", bbox=box)
