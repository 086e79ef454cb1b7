"""`python -m harness measure`: check and time implementations that are registered nowhere; see `bench`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from rich.console import Console

from harness import bench, summary
from harness.parity import Settings
from harness.rows import ParityRow, SweepRow
from spec.problem import DTYPES, INNER_MODELS

console = Console(stderr=False)


def add_parser(commands: Any) -> None:
    """Add the command `measure`."""
    command = commands.add_parser("measure", help="check and time an implementation that is not registered")
    command.add_argument("candidate", metavar="PACKAGE.MODULE[:ENTRY]", help="a module with forward, or an entry in it")
    command.add_argument("--case", default="lm-1.3b-small", metavar="NAME")
    command.add_argument("--inner-model", choices=INNER_MODELS, help="default: the first that it has")
    command.add_argument("--dtype", choices=DTYPES, default="fp32")
    command.add_argument("--matmul-precision", choices=("ieee", "tf32"), default="ieee")
    command.add_argument("--framework", choices=("torch", "jax"), default="torch", help="of a module's arrays")
    command.add_argument("--beside", type=_names, default=("torch.eager",), metavar="A,B", help="timed beside it")
    command.add_argument("--passes", type=_names, metavar="A,B", help="default: forward and, if any, forward_backward")
    command.add_argument("--check-only", action="store_true", help="hold it to the oracle, and time nothing")
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--timeout", type=float, default=Settings.timeout, help="seconds for one call")
    command.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print what `bench` finds; 1 if the candidate is wrong or could not run."""
    sys.path.insert(0, os.getcwd())  # an installed command has none of its own
    given = vars(options)
    common = "inner_model", "dtype", "matmul_precision", "framework", "device", "seed", "timeout"
    arguments = {name: given[name] for name in common}
    entry = bench.implementation(options.candidate, options.framework, options.inner_model)
    timed: list[SweepRow] = []
    if options.check_only:
        checked = bench.check(entry, options.case, **arguments)
    else:
        checked, timed = bench.check_and_measure(
            entry, options.case, beside=options.beside, passes=options.passes, **arguments
        )
    console.print(summary.parity_table(checked))
    for line in summary.failures(checked):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if timed:
        console.print(summary.sweep_table(timed, next(iter(options.beside), entry.key)))
        for line in summary.sweep_notes(timed):
            console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
    rows: list[ParityRow | SweepRow] = [*checked, *timed]
    return 1 if any(row.status != "ok" for row in rows if row.implementation == entry.key) else 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
