"""The command `compare`: two sides in; a table, JSON, Markdown and an exit code out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from harness.compare_findings import EXIT_CODES, MEANING

if TYPE_CHECKING:
    from harness.compare import Comparison

_ROWS = 30  # of a table in the terminal

CODES = "\n".join(f"  {code}  {name}: {MEANING[name]}" for name, code in EXIT_CODES.items())
EPILOG = f"""
BASE and HEAD are each a results folder (results/h100, or results for all devices), a git revision (the results/
committed in it), or a pytest-benchmark file that `nox -s bench` wrote.

exit codes:
   0  nothing is missing, wrong, less accurate or slower
   2  the command line is not usable
{CODES}
Of several, the first of 13, 10, 12, 11; the report names them all.

A regression is slower by more than the threshold, with a bootstrap interval that excludes 1, and significant among
all timings (moderated t-test, Benjamini-Hochberg at 0.05). With one process on a side, as in a pytest-benchmark
file, it is called suspect and does not fail. Times of a CPU never fail.
"""


def add_parser(commands: Any) -> None:
    """Add `compare` to the commands of `python -m harness`."""
    parser = commands.add_parser(
        "compare",
        help="compare two results folders, git revisions or pytest-benchmark files",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", metavar="BASE", help="what it was")
    parser.add_argument("head", metavar="HEAD", help="what it is now")
    parser.add_argument("--threshold", type=_above(0), default=0.03, metavar="X", help="a share; default: 0.03")
    parser.add_argument(
        "--error-ratio-factor", type=_above(1), default=2.0, metavar="X", help="an error this many times as large, and "
        "more than half of what is allowed, is worse; default: 2"
    )
    parser.add_argument("--across-devices", action="store_true", help="compare parity across GPUs; no time is judged")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a pull-request comment there")
    parser.set_defaults(command=_compare)


def _compare(options: argparse.Namespace) -> int:
    from harness.compare import Settings, compare  # pandas and SciPy: only for those who compare
    from harness.compare_markdown import error_markdown, markdown
    from harness.static_compare import sections

    console = Console()
    settings = Settings(options.threshold, options.error_ratio_factor, options.across_devices)
    try:
        found = compare(options.base, options.head, settings, [sections])
    except (ValueError, OSError) as error:
        console.print(f"harness error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        content = {"verdict": "error", "exit_code": EXIT_CODES["error"], "failures": ["error"], "error": str(error)}
        _write(options.json, json.dumps(content, indent=1) + "\n")
        _write(options.markdown, error_markdown(options.base, options.head, str(error)))
        return EXIT_CODES["error"]
    for part in terminal(found):
        console.print(part, highlight=False)
    _write(options.json, json.dumps(as_json(found), indent=1, allow_nan=False) + "\n")
    _write(options.markdown, markdown(found))
    return found.exit_code


def as_json(found: Comparison) -> dict[str, Any]:
    """Everything that was found, for a program."""
    from harness.rows import SweepRow

    floor = found.noise_floor
    return {
        "version": 1,
        "base": found.base,
        "head": found.head,
        "verdict": found.failures[0] if found.failures else "ok",
        "exit_code": found.exit_code,
        "failures": found.failures,
        "settings": vars(found.settings),
        "labels": found.labels,
        "damage": found.damage,
        "matched": found.matched,
        "new": found.new,
        "failing_on_both_sides": found.failing,
        "noise_floor": vars(floor) if floor else None,
        "geometric_means": {
            name: {"ratio": mean, "timings": count} for name, (mean, count) in found.geometric_means().items()
        },
        "findings": [vars(finding) | {"fails": finding.fails} for finding in found.findings],
        "timings": [
            {name.rstrip("_"): getattr(timing.head, name) for name in SweepRow.KEY}
            | {name: getattr(timing, name) for name in ("where", "ratio", "low", "high", "p", "q", "verdict", "note")}
            | {"base_ms": timing.base_ms, "processes": [len(blocks) for blocks in timing.blocks]}
            for timing in found.timings
        ],
        "sections": [vars(section) for section in found.sections],
    }


def terminal(found: Comparison) -> Iterator[RenderableType]:
    """What to look at first comes last: tables, then what to know, then the verdict."""
    from harness.compare_markdown import headline

    if found.findings:
        table = _table("cells", "device", "what", "cell", "of", "detail")
        for finding in found.findings[:_ROWS]:
            color = "red" if finding.fails else "dim"
            what = Text(finding.kind, style=color)
            table.add_row(Text(finding.where), what, Text(finding.cell), ", ".join(finding.parts), Text(finding.detail))
        yield table
        yield from _more(len(found.findings))
    changed = [timing for verdict in ("regression", "suspect", "improvement") for timing in found.of(verdict)]
    if changed:
        table = _table("HEAD over BASE", "device", "verdict", "cell", "BASE ms", "ratio", "interval", "q", "note")
        for timing in changed[:_ROWS]:
            color = {"regression": "red", "suspect": "yellow", "improvement": "green"}[timing.verdict]
            table.add_row(
                Text(timing.where),
                Text(timing.verdict, style=color),
                Text(timing.cell),
                f"{timing.base_ms:.4g}",
                f"{timing.ratio:.3f}",
                f"{timing.low:.3f} to {timing.high:.3f}",
                "" if timing.q is None else f"{timing.q:.2g}",
                timing.note,
            )
        yield table
        yield from _more(len(changed))
    means = found.geometric_means()
    if means:
        table = _table("geometric mean of HEAD over BASE", "implementation", "ratio", "timings")
        for name, (mean, count) in sorted(means.items()):
            table.add_row(Text(name), f"{mean:.3f}", str(count))
        yield table
    for section in found.sections:
        yield Text("\n".join([section.title, *section.lines[:_ROWS]]))
        yield from _more(len(section.lines))
    if found.noise_floor:
        floor = found.noise_floor
        yield Text(f"noise floor: {floor.share:.2%} ({floor.pairs} pairs: {floor.source})", style="dim")
    for text in (*found.labels, *found.damage):
        yield Text(text, style="yellow")
    yield Text(headline(found), style="bold red" if found.failures else "bold green")


def _more(count: int) -> Iterator[Text]:
    if count > _ROWS:
        yield Text(f"... and {count - _ROWS} more; --json FILE has them all", style="dim")


def _table(title: str, *names: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, title_justify="left")
    for name in names:
        table.add_column(name, overflow="fold")
    return table


def _write(path: Path | None, content: str) -> None:
    if path:
        path.write_text(content, encoding="utf-8")


def _above(least: float) -> Any:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = least
        if not least < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number above {least:g}, got {text!r}")
        return value

    return number
