"""Speed of light: attained rates under the measured ceilings, and which bound each case is up against."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from harness.plot_style import Styles, by_precision, grid, legend, note, plain_logs, save
from harness.plot_sweep import PASS_WORDS, column_labels

Ceilings = dict[str, Any]
ROOF = "#444444"
BOUNDS = {"roofline_ms": ("roofline", "#0072B2"), "latency_floor_ms": ("latency floor", "#B5560A")}


def read_ceilings(folder: Path) -> Ceilings:
    """What the device was measured to do, from the folder's `ceilings.json`; empty where there is none.

    Raises:
        ValueError: the file has no copy bandwidth or no rates of matrix products, or one that is not positive.
    """
    path = folder / "ceilings.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rates = {name: float(rate) for name, rate in content["matmul_flops_per_s"].items()}
        copy = float(content["copy_bytes_per_s"])
        if not all(0 < rate < math.inf for rate in (copy, *rates.values())):
            raise ValueError(f"a rate that is not positive in {rates | {'copy': copy}}")
        return {"bytes_per_s": copy, "flops_per_s": rates, "fingerprint": content.get("fingerprint", "")}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: expected copy_bytes_per_s and matmul_flops_per_s: {error!r}") from None


def roofline(table: pandas.DataFrame, ceilings: Ceilings, all_styles: Styles, path: Path, title: str) -> Path:
    """FLOP/s against FLOPs a byte of the timed rows that have both: a row for each precision, a column for each pass.

    The FLOPs and bytes are the least that the operation needs, not what a kernel does.
    """
    table = table.assign(
        intensity=table["flops"].astype(float) / table["bytes_min"].astype(float),
        rate=table["flops"].astype(float) / (table["device_ms"].astype(float) / 1000),
    )
    precisions, passes = by_precision(table), _passes(table)
    size = max(9.0, 3.6 * len(passes)), 1.9 + 3.3 * len(precisions)
    figure, panels = grid(len(precisions), len(passes), *size, sharex=True, sharey=True)
    rates = ceilings.get("flops_per_s", {})
    roofs = {name: rates.get(name.removeprefix("fp32 (").removesuffix(")")) for name in precisions}
    ridges = [rate / ceilings["bytes_per_s"] for rate in roofs.values() if rate]
    left, right = table["intensity"].min() / 4, 4 * max([table["intensity"].max(), *ridges])
    for precision, row in zip(precisions, panels, strict=True):
        for pass_, axes in zip(passes, row, strict=True):
            cell = table[(table["precision"] == precision) & (table["pass"] == pass_)]
            for key, points in cell.groupby("implementation"):
                style = all_styles[key] | {"linestyle": "none"}
                axes.plot(points["intensity"], points["rate"], markersize=8, markeredgecolor="white", **style)
            if cell.empty:
                note(axes, "nothing ran")
            axes.set_title(f"{precision}, {PASS_WORDS[pass_]}", fontsize=10)
            _draw_roofs(axes, ceilings, roofs[precision], left, right)
            _log_axes(axes)
        row[0].set_ylabel("FLOP/s")
    panels[0, 0].set_xlim(left, right)
    for axes in panels[-1]:
        axes.set_xlabel("arithmetic intensity (FLOPs / byte)")
    legend(figure, table["implementation"].unique(), all_styles, lines=False)
    if not ceilings:
        title += "\nno roofs: the folder has no ceilings.json"
    elif ceilings["fingerprint"] and ceilings["fingerprint"] not in set(table["fingerprint"]):
        title += "\nroofs measured in another environment than the times"
    return save(figure, path, title)


def bounds(table: pandas.DataFrame, all_styles: Styles, path: Path, title: str) -> Path:
    """Time over the larger bound of each case, which is at 1; a bar leads from there to the lesser one."""
    table = table[table[list(BOUNDS)].notna().any(axis=1)]
    table = table.assign(column=column_labels(table).str.replace("\n", " ") + ", " + table["precision"])
    labels, passes = list(dict.fromkeys(table.sort_values(["case", "tokens", "precision"])["column"])), _passes(table)
    size = max(9.0, 4.4 * len(passes)), 2.1 + 0.62 * len(labels)
    figure, panels = grid(1, len(passes), *size, sharey=True, sharex=True)
    for pass_, axes in zip(passes, panels[0], strict=True):
        of_pass = table[table["pass"] == pass_]
        for place, label in enumerate(labels):
            _draw_bounds(axes, of_pass[of_pass["column"] == label], place, all_styles)
        axes.axvline(1, color=ROOF, linewidth=1.5, zorder=1)
        axes.set_title(PASS_WORDS[pass_], fontsize=10)
        axes.set_xlabel("time / the larger of the two bounds")
        plain_logs(axes.xaxis)
        axes.grid(visible=False, axis="y")
    panels[0, 0].set_yticks(range(len(labels)), labels)
    panels[0, 0].set_ylim(len(labels) - 0.4, -0.6)
    marks = [Patch(color=colour, label=label, alpha=0.6) for label, colour in BOUNDS.values()]
    legend(figure, table["implementation"].unique(), all_styles, lines=False, more=marks)
    return save(figure, path, title)


def _passes(table: pandas.DataFrame) -> list[str]:
    return [name for name in PASS_WORDS if name in set(table["pass"])]


def _draw_roofs(axes: Axes, ceilings: Ceilings, flops_per_s: float | None, left: float, right: float) -> None:
    if not ceilings:
        return
    memory, style = ceilings["bytes_per_s"], {"color": ROOF, "fontsize": 8.5}
    ridge = flops_per_s / memory if flops_per_s else right
    x = np.array([left, ridge, right])
    axes.plot(x, np.minimum(x * memory, flops_per_s or np.inf), color=ROOF, linewidth=1.5, zorder=1)
    copy = f"slope: copy {EngFormatter(unit='B/s', places=2)(memory)}"
    axes.text(0.02, 0.97, copy, va="top", transform=axes.transAxes, **style)  # above the roof, where no point is
    if flops_per_s:
        matmul = f"flat: matmul {EngFormatter(unit='FLOP/s', places=0)(flops_per_s)} "
        axes.text(right, flops_per_s, matmul, ha="right", va="bottom", **style)


def _log_axes(axes: Axes) -> None:
    axes.set(xscale="log", yscale="log")
    plain_logs(axes.xaxis)
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_bounds(axes: Axes, rows: pandas.DataFrame, place: int, all_styles: Styles) -> None:
    if rows.empty:
        return
    found = {name: float(rows[name].max()) for name in BOUNDS if rows[name].notna().any()}
    larger = max(found, key=lambda name: found[name])
    for name, ms in found.items():
        colour = BOUNDS[name][1]
        axes.plot([ms / found[larger], 1], [place, place], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
        axes.plot(ms / found[larger], place, marker="|", markersize=16, markeredgewidth=2.5, color=colour)
    texts = [f"{BOUNDS[name][0]} {ms:.2g}" for name, ms in sorted(found.items(), key=lambda pair: -pair[1])]
    style = {"fontsize": 8, "color": BOUNDS[larger][1], "va": "bottom", "textcoords": "offset points"}
    axes.annotate(", ".join(texts) + " ms", (1, place - 0.28), xytext=(4, 0), **style)
    for key, points in rows.groupby("implementation"):
        ratio = points["device_ms"].astype(float) / found[larger]
        points_style = all_styles[key] | {"linestyle": "none"}
        axes.plot(ratio, [place] * len(ratio), markersize=8, markeredgecolor="white", **points_style)
