"""What every plot shares: a colour and a marker for each implementation, sizes for a README, saving."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import seaborn
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from harness.records import frame
from harness.rows import ParityRow, SweepRow

CPU_NOTE = "CPU run: for seeing that things work, not a performance claim"
GREY, DPI = (0.84, 0.84, 0.84, 1.0), 130
FILES: dict[str, type] = {"parity.csv": ParityRow, "sweep.csv": SweepRow}
# Okabe and Ito's colours and darker ones in between: told apart in print and by the colour-blind.
_COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#D55E00",
    "#56B4E9",
    "#7F4FC9",
    "#8C6D31",
    "#333333",
    "#B5CF6B",
    "#AD1457",
    "#17A2A2",
    "#9AA0A6",
    "#F0C419",
)
_MARKERS = "osD^vPX<>*hp"

Styles = dict[str, dict[str, str]]


def read(folder: Path, name: str) -> pandas.DataFrame:
    """The latest row of each cell of `folder/name`, with `precision`: the dtype, and tf32 where it is used.

    Raises:
        ValueError: there is no such file or no row in it.
    """
    path = folder / name
    table = frame(path, FILES[name]) if path.exists() else pandas.DataFrame()
    if table.empty:
        raise ValueError(f"{path}: expected a file with results to plot, {'no rows' if path.exists() else 'no file'}")
    tf32 = table["matmul_precision"].eq("tf32")
    return table.assign(precision=table["dtype"].where(~tf32, "fp32 (tf32)"))


def styles(folder: Path) -> Styles:
    """Colour, marker and dashes of each implementation in any file of the folder: the same in every plot."""
    keys = {key for name in FILES if (folder / name).exists() for key in read(folder, name)["implementation"]}
    return {
        key: {
            "color": _COLOURS[i % len(_COLOURS)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": "-" if i < len(_COLOURS) else "--",
        }
        for i, key in enumerate(sorted(keys))
    }


def by_precision(table: pandas.DataFrame) -> list[str]:
    """The precisions of the table, widest first."""
    order = ["fp64", "fp32", "fp32 (tf32)", "bf16", "fp16"]
    return [name for name in order if name in set(table["precision"])]


def grid(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure of rows x columns axes, a 2-D array, without a display; width and height in inches."""
    with seaborn.axes_style("whitegrid", {"axes.edgecolor": "#666666", "grid.color": "#e4e4e4"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def heat(axes: Axes, colours: np.ndarray, texts: np.ndarray, names: list[str], labels: list[str]) -> None:
    """Cells in `colours` [names, labels, RGBA] with `texts` in them, white on dark cells."""
    axes.pcolormesh(colours, edgecolors="white", linewidth=1)
    axes.invert_yaxis()
    axes.grid(visible=False)
    for where, text in np.ndenumerate(texts):
        colour = "white" if colours[where][:3] @ (0.3, 0.6, 0.1) < 0.42 else "black"
        style = {"ha": "center", "va": "center", "fontsize": 8.5 if len(labels) > 10 else 10, "color": colour}
        axes.text(where[1] + 0.5, where[0] + 0.5, text, **style).set_in_layout(False)  # inside: saves half the time
    axes.set_yticks(np.arange(len(names)) + 0.5, names)
    axes.set_xticks(np.arange(len(labels)) + 0.5, labels, rotation=40, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0)


def colour_bar(figure: Figure, panels: Any, colours: Colormap, norm: LogNorm, ticks: dict[float, str]) -> Axes:
    """A bar below `panels` with these ticks; as thick and as far away however high the figure is."""
    height = figure.get_size_inches()[1]
    place = {"ax": list(panels.flat), "orientation": "horizontal", "fraction": 0.3 / height, "pad": 0.1 / height}
    bar = figure.colorbar(ScalarMappable(norm, colours), shrink=0.6, aspect=45, extend="both", **place)
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    bar.ax.minorticks_off()
    return bar.ax


def legend(
    figure: Figure, drawn: Iterable[str], all_styles: Styles, lines: bool = True, more: Iterable[Artist] = ()
) -> None:
    """One legend for all axes, below them: the implementations drawn, points without `lines`, and `more`."""
    points = {} if lines else {"linestyle": "none"}
    handles = [Line2D([], [], label=key, markersize=7, **all_styles[key] | points) for key in sorted(drawn)]
    handles += more
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False)


def plain_logs(axis: Axis) -> None:
    """A log axis with 0.5, 1, 2, 5 and not powers of ten; thousands and millions as k and M.

    Over more than three decades 1 and 10 alone: the others would touch.
    """
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_data_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,), numticks=8))
    axis.set_major_formatter(EngFormatter(sep="") if axis.get_data_interval()[1] >= 1000 else "{x:g}")
    axis.set_minor_formatter(NullFormatter())


def note(axes: Axes, text: str) -> None:
    """A remark in the middle of axes that have nothing to show."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#777777")


def save(figure: Figure, path: Path, title: str, cpu: bool = False) -> Path:
    """Write the figure under a title in plain words; `cpu` puts the note about CPU times below it."""
    columns = int(figure.get_size_inches()[0] * 8.5)
    title = "\n".join(line for part in title.split("\n") for line in textwrap.wrap(part, columns))
    figure.suptitle(title + (f"\n{CPU_NOTE}" if cpu else ""), fontsize=13, color="#a03000" if cpu else "black")
    figure.savefig(path, dpi=DPI, facecolor="white")
    return path
