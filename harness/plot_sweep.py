"""Plots of the sweep: time and throughput over tokens, speed-up over a baseline, error against time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas
import seaborn
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from harness.plot_style import GREY, Styles, by_precision, colour_bar, grid, heat, legend, note, plain_logs, save
from harness.rows import SIZES

SHAPE = [name for name in SIZES if name != "tokens"] + ["causal"]
FASTER, NORM = seaborn.diverging_palette(20, 160, s=75, l=55, as_cmap=True), LogNorm(1 / 30, 30)
PASS_WORDS = {"forward": "forward", "backward": "backward", "forward_backward": "forward and backward"}


def at_several_lengths(table: pandas.DataFrame) -> pandas.DataFrame:
    """The timed rows of the shapes and precisions that were run at more than one T: what makes a line."""
    timed = table[table["status"] == "ok"]
    return timed[timed.groupby([*SHAPE, "precision"])["tokens"].transform("nunique") > 1]


def over_tokens(table: pandas.DataFrame, all_styles: Styles, path: Path, title: str, throughput: bool) -> Path:
    """Time, or tokens a second, against T: a column for each precision, a row for each shape, a line for each key."""
    timed = at_several_lengths(table)
    shapes, precisions = list(timed.groupby(SHAPE)), by_precision(timed)
    size = max(9.0, 3.1 * len(precisions)), 1.9 + 2.9 * len(shapes)
    figure, panels = grid(len(shapes), len(precisions), *size, sharex=True, sharey="row")
    for (shape, of_shape), row in zip(shapes, panels, strict=True):
        for precision, axes in zip(precisions, row, strict=True):
            cell = of_shape[of_shape["precision"] == precision]
            for key, line in cell.sort_values("tokens").groupby("implementation"):
                _line(axes, line, all_styles[key], throughput)
            if cell.empty:
                note(axes, "nothing ran")
            batch, heads, head_dim, mini_batch, causal = shape
            sizes = f"B={batch} H={heads} D={head_dim} M={mini_batch}{'' if causal else ', not causal'}"
            axes.set_title(f"{precision}\n{sizes}", fontsize=10)
            axes.set_xscale("log", base=2)
            plain_logs(axes.yaxis)
            axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g}k" if tokens >= 1024 else f"{tokens:g}")
        row[0].set_ylabel("tokens / s (B × T / time)" if throughput else "time (ms)")
    for axes in panels[-1]:
        axes.set_xlabel("tokens T")
    legend(figure, timed["implementation"].unique(), all_styles)
    return save(figure, path, title, cpu=table["device"].eq("cpu").any())


def _line(axes: Axes, line: pandas.DataFrame, style: dict[str, str], throughput: bool) -> None:
    def shown(column: str) -> pandas.Series:
        ms = line[column].astype(float)
        return 1000 * line["batch"] * line["tokens"] / ms if throughput else ms

    axes.plot(line["tokens"], shown("device_ms"), markersize=5, markeredgecolor="white", **style)
    band = shown("device_ms_p20"), shown("device_ms_p80")
    axes.fill_between(line["tokens"], *band, color=style["color"], alpha=0.2, linewidth=0)


def speedup(table: pandas.DataFrame, baseline: str, path: Path, title: str) -> Path:
    """Implementation x case, the baseline's time over the time; a cell without one says why, or the milliseconds."""
    order = table.groupby("case", sort=False).ngroup()
    table = table.assign(column=column_labels(table), order=order).sort_values(["order", *SIZES])
    names, labels, precisions = (
        sorted(table["implementation"].unique()),
        list(dict.fromkeys(table["column"])),
        by_precision(table),
    )
    width = max(9.0, 1.8 + 0.85 * len(labels))
    figure, panels = grid(len(precisions), 1, width, 2.4 + len(precisions) * (0.5 + 0.31 * len(names)), sharex=True)
    for axes, precision in zip(panels[:, 0], precisions, strict=True):
        of_precision = table[table["precision"] == precision]
        cells = of_precision.set_index(["implementation", "column"])
        ratio = np.full((len(names), len(labels)), np.nan)
        texts = np.full(ratio.shape, "", object)
        for (name, label), cell in cells.iterrows():
            where = names.index(name), labels.index(label)
            base = cells["device_ms"].get((baseline, label))
            if cell["status"] != "ok":
                texts[where] = cell["status"]
            elif base is None or not base > 0:
                texts[where] = f"{cell['device_ms']:.3g} ms"
            else:
                ratio[where] = base / cell["device_ms"]
                texts[where] = f"{ratio[where]:.2f}×" if ratio[where] < 10 else f"{ratio[where]:.0f}×"
        colours = FASTER(NORM(np.nan_to_num(ratio, nan=1.0)))
        colours[np.isnan(ratio)] = np.where((texts == "")[np.isnan(ratio), None], (1, 1, 1, 1), GREY)
        heat(axes, colours, texts, names, labels)
        axes.set_title(precision, loc="left", fontsize=11, fontweight="bold")
    ticks = {1 / 30: "30× slower", 1 / 5: "5× slower", 1: "as fast", 5: "5× faster", 30: "30× faster"}
    colour_bar(figure, panels, FASTER, NORM, ticks).set_xlabel(f"time of {baseline} / time")
    return save(figure, path, title, cpu=table["device"].eq("cpu").any())


def column_labels(table: pandas.DataFrame) -> pandas.Series:
    """The case, and whatever of its sizes it was run at more than one of: no two cells share a label."""
    letters = {"batch": "B", "tokens": "T", "heads": "H", "head_dim": "D", "mini_batch": "M"}
    letters |= {"causal": "causal", "device": "device"}
    label = table["case"]
    for name, letter in letters.items():
        varies = table.groupby("case")[name].transform("nunique") > 1
        label = label.where(~varies, label + f"\n{letter}=" + table[name].astype(str))
    return label


def error_against_time(table: pandas.DataFrame, all_styles: Styles, path: Path, title: str) -> Path:
    """Error over allowed error against time, a panel for each inner model and pass; the limit is a line at 1."""
    timed = table[table["status"] == "ok"]
    inner_models = sorted(timed["inner_model"].unique())
    passes = [name for name in PASS_WORDS if name in set(timed["pass"])]
    size = max(9.0, 3.3 * len(passes)), 1.9 + 3.0 * len(inner_models)
    figure, panels = grid(len(inner_models), len(passes), *size, sharey=True, sharex="col")
    for inner_model, row in zip(inner_models, panels, strict=True):
        for pass_, axes in zip(passes, row, strict=True):
            cell = timed[(timed["inner_model"] == inner_model) & (timed["pass"] == pass_)]
            for key, points in cell.groupby("implementation"):
                style = all_styles[key] | {"linestyle": "none"}
                ratio = points["error_ratio"].clip(lower=1e-4)
                axes.plot(points["device_ms"], ratio, markersize=8, markeredgecolor="white", alpha=0.85, **style)
            axes.axhline(1, color="#c0392b", linewidth=1.5)
            axes.set_title(f"{inner_model}, {PASS_WORDS[pass_]}", fontsize=10)
            plain_logs(axes.xaxis)
            plain_logs(axes.yaxis)
            axes.set_ylim(top=2.5)
        row[0].set_ylabel("error / allowed error")
    for axes in panels[-1]:
        axes.set_xlabel("time (ms)")
    panels[0, 0].text(0.02, 1.15, "limit", transform=panels[0, 0].get_yaxis_transform(), va="bottom", color="#c0392b")
    legend(figure, timed["implementation"].unique(), all_styles, lines=False)
    return save(figure, path, title, cpu=table["device"].eq("cpu").any())
