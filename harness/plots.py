"""Every plot of a results folder, drawn from its CSV files alone into the same folder."""

from __future__ import annotations

from pathlib import Path

import pandas

from harness.plot_parity import parity_matrix
from harness.plot_roofline import bounds, read_ceilings, roofline
from harness.plot_style import Styles, read, styles
from harness.plot_sweep import PASS_WORDS, at_several_lengths, error_against_time, over_tokens, speedup


def parity_plots(folder: str | Path) -> list[Path]:
    """`parity_matrix.png`.

    Raises:
        ValueError: the folder has no `parity.csv`, or no rows in it.
    """
    return [parity_matrix(Path(folder))]


def sweep_plots(folder: str | Path, baseline: str = "torch.eager") -> list[Path]:
    """Time, throughput and speed-up for each inner model and pass, `error_vs_time.png`, and the speed of light.

    Cold and warm caches are never mixed: cold ones are drawn, warm ones where there are no cold ones. What needs a
    time is not drawn where nothing was timed, nor what needs several T where there is one.

    Raises:
        ValueError: the folder has no `sweep.csv`, or no rows in it.
    """
    folder, written = Path(folder), []
    table, all_styles = read(folder, "sweep.csv"), styles(folder)
    cache = "cold" if table["cache"].eq("cold").any() else "warm"
    table = table[table["cache"] == cache]
    for (inner_model, pass_), part in table.groupby(["inner_model", "pass"]):
        what, suffix = f"TTT {inner_model}, {PASS_WORDS[pass_]}, {cache} cache", f"{inner_model}_{pass_}.png"
        if not at_several_lengths(part).empty:
            title = f"Time against sequence length: {what}\nmedian, band from 20th to 80th percentile"
            written.append(over_tokens(part, all_styles, folder / f"time_vs_tokens_{suffix}", title, throughput=False))
            title = f"Tokens a second against sequence length: {what}"
            path = folder / f"throughput_vs_tokens_{suffix}"
            written.append(over_tokens(part, all_styles, path, title, throughput=True))
        written.append(speedup(part, baseline, folder / f"speedup_{suffix}", f"Speed-up over {baseline}: {what}"))
    if table["status"].eq("ok").any():
        title = "Error against time, of what passed its parity check"
        if wrong := int(table["status"].eq("wrong").sum()):
            title += f" ({wrong} wrong results are not timed)"
        written.append(error_against_time(table, all_styles, folder / "error_vs_time.png", title))
    return written + _speed_of_light(folder, table, cache, all_styles)


def _speed_of_light(folder: Path, table: pandas.DataFrame, cache: str, all_styles: Styles) -> list[Path]:
    """`roofline_*.png` and `bounds_*.png` for each inner model, of the times from a GPU whose bounds are known."""
    written, ceilings = [], read_ceilings(folder)
    timed = table[table["status"].eq("ok") & table["device"].eq("cuda")]
    for inner_model, part in timed.groupby("inner_model"):
        what = f"TTT {inner_model}, {cache} cache"
        counted = part[part["flops"].notna() & part["bytes_min"].gt(0)]
        if not counted.empty:
            title = f"Roofline: {what}\nthe least FLOPs and bytes that the operation needs"
            path = folder / f"roofline_{inner_model}.png"
            written.append(roofline(counted, ceilings, all_styles, path, title))
        bounded = part[part[["roofline_ms", "latency_floor_ms"]].notna().any(axis=1)]
        if not bounded.empty:
            title = f"What bounds each case: {what}\ntime over the larger of roofline time and latency floor"
            written.append(bounds(bounded, all_styles, folder / f"bounds_{inner_model}.png", title))
    return written
