"""The command line behind the nox sessions: `python -m harness parity|sweep|compare|report|static|doctor|proof`.

Exit codes: 0 all right; 1 something is wrong, too slow or missing in the results; 2 the command, the grid or the
results folder is not usable; 130 interrupted (what was finished is on disk, and the same command resumes a sweep).
`compare` has codes of its own, see `compare_command`. What draws is imported where something is drawn: seaborn takes
two seconds, not for a command that is refused or only says what is done.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from harness import (
    bench_command,
    ceilings,
    compare_command,
    doctor,
    environment,
    findings,
    grid,
    parity,
    peer_bars,
    peer_times,
    records,
    static,
    summary,
    sweep,
)
from harness.parity import Settings
from harness.rows import ParityRow, Row, SweepRow, latest
from harness.worker import Failure, Worker
from implementations.registry import Device, select, unknown
from spec.problem import PASSES

console = Console(stderr=False)
logger = logging.getLogger(__name__)
_CHECKING = 0.4  # of the seconds that a sweep may take: for what has not been checked yet


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; see `--help`."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if getattr(options, "verbose", False):
        logging.getLogger("harness").setLevel(logging.DEBUG)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        console.print("interrupted: every finished row is on disk", style="yellow")
        return 130
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2


def _parity(options: argparse.Namespace) -> int:
    cells = _cells(options)
    folder, settings = _open(options)
    path = folder / "parity.csv"
    rows = latest(_load(path, ParityRow))
    to_check = sweep.missing(cells, rows, settings) if options.missing else cells
    known = sweep.known_yardsticks(to_check, rows, settings)
    groups = parity.with_yardstick(to_check, known)
    done: list[ParityRow] = []
    with _progress() as bar:
        task = bar.add_task("parity", total=sum(map(len, groups)))
        for cell, found in parity.run(groups, settings, known):
            records.append(path, found)
            done += found
            bar.update(task, advance=1, description=f"{cell.case.name} {cell.problem.dtype}")
    _finish(path, ParityRow)
    if options.missing:
        done = sweep.of_cells(_load(path, ParityRow), cells, settings.stamp.device)
    console.print(summary.parity_table(done))
    idle = summary.unchecked(done, [cell.entry.key for cell in cells] if options.implementations else [])
    for line in (*summary.failures(done), *idle):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    from harness import plots

    _print_files(path, *plots.parity_plots(folder))
    nothing = len(idle) == len({cell.entry.key for cell in cells})
    return 1 if nothing or any(row.status not in ("ok", "unsupported") for row in done) else 0


def _sweep(options: argparse.Namespace) -> int:
    cells = _cells(options, passes=options.passes)
    select([options.baseline])  # refuses an unknown one
    folder, settings = _open(options)
    checked_path, path = folder / "parity.csv", folder / "sweep.csv"
    protocol = _protocol(options, settings.stamp.device)
    if options.fresh:
        _forget(path, SweepRow, cells, settings, lambda row: True)
        _forget(checked_path, ParityRow, cells, settings, lambda row: True)
    if options.retry:
        _forget(path, SweepRow, cells, settings, lambda row: row.status not in ("ok", "unsupported"))
        _forget(checked_path, ParityRow, cells, settings, lambda row: row.status not in ("ok", "unsupported"))
    checked = _load(checked_path, ParityRow)
    left = sweep.unmeasured(cells, _load(path, SweepRow), checked, protocol, settings)
    everything, to_do = (len(protocol.caches) * sum(len(c.passes) for c in some) for some in (cells, left))
    console.print(f"{everything} timings, {to_do} to do")
    if options.status:
        rows = sweep.of_cells(_load(path, SweepRow), cells, settings.stamp.device)
        console.print(summary.sweep_status(rows, left, len(protocol.caches)))
        return 0
    to_check = sweep.unchecked(left, checked, settings)
    known = sweep.known_yardsticks(to_check, latest(checked), settings)
    groups = parity.with_yardstick(to_check, known)
    started = time.monotonic()

    def late(share: float) -> bool:
        return options.seconds is not None and time.monotonic() - started > share * options.seconds

    with (
        _progress() as bar,
        tempfile.TemporaryDirectory(prefix="ttt-lab-compiled-") as compiled,
        _ceilings(folder, left, settings) as measure_ceilings,
    ):
        settings = replace(settings, compiled=settings.compiled or Path(compiled))
        task = bar.add_task("parity", total=sum(map(len, groups)))
        for cell, found in parity.run(groups, settings, known):
            records.append(checked_path, found)
            bar.update(task, advance=1, description=f"parity {cell.case.name} {cell.problem.dtype}")
            if late(_CHECKING):
                break
        checked = _load(checked_path, ParityRow)
        if options.seconds is not None:  # what was not reached is left for the next call
            behind = sweep.unchecked(left, checked, settings)
            left = [cell for cell in left if cell not in behind]
        logger.debug("checked in %.1f s", time.monotonic() - started)
        task = bar.add_task("sweep", total=to_do)
        protocol = replace(protocol, ceilings=measure_ceilings() if left else None)
        logger.debug("ceilings measured %.1f s after the start", time.monotonic() - started)
        for row, samples in sweep.run(left, latest(checked), protocol, settings, is_over=lambda: late(1.0)):
            records.append(folder / "samples.csv", samples)
            records.append(path, [row])
            bar.update(task, advance=1, description=f"{row.implementation} {row.case} {row.pass_}")
    _finish(checked_path, ParityRow)
    _finish(path, SweepRow)
    records.pack_samples(folder)
    from harness import plots, report

    measured = _load(path, SweepRow)
    baseline = report.baseline_of(folder, measured, options.baseline)
    rows = sweep.of_cells(measured, cells, settings.stamp.device)
    console.print(summary.sweep_table(rows, baseline))
    for line in summary.failures(rows):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in summary.sweep_notes(rows):
        console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
    _print_files(path, *plots.parity_plots(folder), *plots.sweep_plots(folder, baseline))
    return 1 if any(row.status not in ("ok", "unsupported") for row in rows) else 0


def _peer_times(options: argparse.Namespace) -> int:
    cells = _cells(options, passes=options.passes)
    folder, settings = _open(options)
    found = []
    with _progress() as bar:
        task = bar.add_task("peers", total=None)
        for row in peer_times.command(cells, folder, settings):
            found.append(row)
            bar.update(task, advance=1, description=f"{row.implementation} {row.case} {row.pass_}")
    path = folder / peer_times.FILE
    _finish(path, peer_times.PeerTime)
    console.print(peer_times.table(found))
    _print_files(path)
    return 1 if any(row.untimed and not row.untimed.startswith("unsupported") for row in found) else 0


def _protocol(options: argparse.Namespace, device: Device) -> sweep.Protocol:
    """Two processes and both caches on a GPU; on a CPU, whose times are no claim, one of each."""
    caches = options.caches or (["warm"] if device == "cpu" else ["cold", "warm"])
    for cache in caches:
        if cache not in ("cold", "warm"):
            raise ValueError(unknown("cache", cache, ("cold", "warm")))
    if device == "cpu" and "cold" in caches:
        raise ValueError("caches: expected warm on a CPU, whose caches this lab does not control, got cold")
    processes = options.processes or (1 if device == "cpu" else 2)
    if processes < 1:
        raise ValueError(f"processes: expected at least 1, got {processes}")
    return sweep.Protocol(processes, tuple(caches))


@contextmanager
def _ceilings(
    folder: Path, cells: list[grid.Cell], settings: Settings
) -> Iterator[Callable[[], ceilings.Ceilings | None]]:
    """What measures the ceilings and keeps them beside the rows; a process compiles what that needs from now on.

    It gives None on a CPU, where nothing is a performance claim.
    """
    if settings.stamp.device == "cpu" or not cells:
        yield lambda: None
        return
    steps = list(dict.fromkeys((cell.problem.inner_model, cell.problem.head_dim) for cell in cells))
    with ThreadPoolExecutor(1) as thread, closing(Worker()) as worker:
        prepared = thread.submit(worker.call, ceilings.prepare, steps, timeout=settings.timeout)

        def measure() -> ceilings.Ceilings | None:
            try:
                prepared.result()
                found = worker.call(ceilings.measure, steps, settings.stamp.fingerprint, timeout=settings.timeout)
            except Failure as failure:
                console.print(f"no roofline: {failure.status}: {failure.reason}", style="yellow", markup=False)
                return None
            finally:
                worker.stop()  # its context on the GPU goes before anything is timed
            ceilings.save(found, folder)
            return found

        yield measure


def _doctor(options: argparse.Namespace) -> int:
    return doctor.main(console)


def _report(options: argparse.Namespace) -> int:
    from harness import report

    return report.command(options.folders, options.baseline)


def _proof(options: argparse.Namespace) -> int:
    from harness import proof, proof_pairs  # pandas and scipy take seconds: not for the other commands

    stamp = environment.stamp("cuda", options.git_sha)
    if not stamp.gpu:
        raise ValueError("the timer is proven on a GPU, and the driver reports none")
    folder = records.results_folder(options.results or environment.ROOT / "results" / environment.folder_name(stamp))
    proofs: list[proof.Proof] = []
    missing: list[str] = []
    if options.only != "compare":
        with closing(Worker()) as worker:  # the pairs are measured without a second context on the GPU
            try:
                proofs, missing = worker.call(proof.run, timeout=proof.SECONDS)
            except Failure as failure:
                raise ValueError(f"the timer was not proven: {failure.status}: {failure.reason}") from failure
    for reason in missing:
        console.print(f"not proven in {reason}", markup=False)
    if proofs:
        console.print(summary.proof_table(proofs))
        console.print(f"  {proof.save(folder, proofs)}", highlight=False, soft_wrap=True)
    pairs: list[proof_pairs.Pair] = []
    with _progress() as bar:
        task = bar.add_task("pairs", total=options.pairs)
        for pair in () if options.only == "timer" else proof_pairs.run(range(options.pairs), Settings(stamp)):
            pairs.append(pair)
            bar.update(task, completed=pair.number + 1)
            proof_pairs.save(folder, pairs)
    if pairs:
        console.print(summary.pairs_table(pairs))
        console.print(f"  {folder / proof_pairs.FILE}", highlight=False, soft_wrap=True)
    if not proofs and not pairs:
        raise ValueError("nothing could be proven here")
    return 0 if all(one.right for one in proofs) and all(pair.right for pair in pairs) else 1


def _cells(options: argparse.Namespace, passes: list[str] | None = None) -> list[grid.Cell]:
    names = "implementations", "cases", "inner_models", "dtypes", "matmul_precisions", "tokens", "mini_batches"
    overrides = {name: getattr(options, name) for name in names} | {"passes": passes}
    return grid.load(options.grid, overrides, options.only_cases)


def _open(options: argparse.Namespace) -> tuple[Path, Settings]:
    stamp = environment.stamp(options.device or environment.find_device(), options.git_sha)
    default = environment.ROOT / "results" / environment.folder_name(stamp)
    folder = records.results_folder(options.results or default)
    for name, kind in (("parity.csv", ParityRow), ("sweep.csv", SweepRow)):
        _load(folder / name, kind)  # refuses what could not be added to, before any work
    left_out = "command", "results", "compiled", "verbose"
    arguments = {name: value for name, value in vars(options).items() if name not in left_out}
    arguments["grid"] = Path(options.grid).name  # where it lay is this machine's
    if not getattr(options, "status", False):  # which measures nothing
        environment.save(folder, stamp, {"command": options.command.__name__.strip("_")} | arguments)
    return folder, Settings(stamp, options.seed, options.jobs or Settings.jobs, options.timeout, options.compiled)


def _load(path: Path, kind: type[Row]) -> list[Row]:
    return records.load(path, kind) if path.exists() else []


def _forget(
    path: Path, kind: type[Row], cells: Iterable[grid.Cell], settings: Settings, which: Callable[[Row], bool]
) -> None:
    """Take these rows of these cells out of the file; what is left replaces it at once."""

    def others(rows: list[Row]) -> list[Row]:
        gone = {id(row) for row in sweep.of_cells(rows, cells, settings.stamp.device) if which(row)}
        return [row for row in rows if id(row) not in gone]

    records.rewrite(path, kind, others)


def _finish(path: Path, kind: type[Row]) -> None:
    """Leave one row for each cell, the last one."""
    records.rewrite(path, kind, latest)


def _print_files(*paths: Path) -> None:
    for path in paths:
        console.print(f"  {path}", highlight=False, soft_wrap=True)


def _progress() -> Progress:
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    return Progress(*columns, console=console)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _integers(text: str) -> list[int]:
    try:
        return [int(name) for name in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers with commas between them, got {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness", description="TTT Lab: are kernels right, how fast?")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--implementations", type=_names, metavar="A,B", help="keys or folders: torch.eager,jax")
    common.add_argument("--cases", type=_names, metavar="A,B", help="case names or group:small|size|stress|named")
    common.add_argument("--only-cases", type=_names, metavar="A,B", help="of the grid's cells those of exactly these")
    common.add_argument("--tokens", type=_integers, metavar="T,T", help="in place of the cases' own T")
    common.add_argument("--mini-batches", type=_integers, metavar="M,M", help="in place of the cases' own M")
    common.add_argument("--inner-models", type=_names, metavar="A,B", help="linear,mlp")
    common.add_argument("--dtypes", type=_names, metavar="A,B", help="fp64,fp32,bf16,fp16")
    common.add_argument("--matmul-precisions", type=_names, metavar="A,B", help="of fp32: ieee,tf32")
    common.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    common.add_argument("--results", type=Path, metavar="DIR", help="default: results/<device>")
    common.add_argument("--seed", type=int, default=0, help="of the inputs; times in sweep.csv are of the last seed")
    common.add_argument("--jobs", type=int, help="checks at once; default: the number of cores")
    common.add_argument("--git-sha", metavar="SHA", help="the commit, where the tree is a copy without .git")
    common.add_argument("--compiled", type=Path, metavar="DIR", help="for what compilers make; default: none is kept")
    common.add_argument("--timeout", type=float, default=Settings.timeout, help="seconds for one call")
    common.add_argument("--verbose", action="store_true", help="say where the time of the run goes")

    command = commands.add_parser("parity", parents=[common], help="hold implementations to the float64 oracle")
    command.add_argument("--grid", default="parity", metavar="NAME|FILE.toml")
    command.add_argument("--missing", action="store_true", help="check what has no rows of this code on this machine")
    command.set_defaults(command=_parity)

    command = commands.add_parser("sweep", parents=[common], help="time the implementations that are right")
    command.add_argument("--grid", default="default", metavar="NAME|FILE.toml", help="default, gpu or a file")
    command.add_argument("--passes", type=_names, metavar="A,B", help=",".join(PASSES))
    command.add_argument("--baseline", default="torch.eager", metavar="KEY", help="what speed-ups are relative to")
    command.add_argument("--seconds", type=float, metavar="S", help="stop after about so long; the next call goes on")
    command.add_argument("--processes", type=int, metavar="N", help="for each implementation; default: 2 on a GPU")
    command.add_argument("--caches", type=_names, metavar="A,B", help="cold,warm; default: both on a GPU")
    start = command.add_mutually_exclusive_group()
    start.add_argument("--fresh", action="store_true", help="forget the rows of these cells first")
    start.add_argument("--retry", choices=["failed"], help="forget those that are neither ok nor unsupported first")
    start.add_argument("--status", action="store_true", help="say what is done and what is left, and measure nothing")
    command.set_defaults(command=_sweep)

    command = commands.add_parser("peer-times", parents=[common], help="time peers whatever their verdict")
    command.add_argument("--grid", default="peer-times", metavar="NAME|FILE.toml")
    command.add_argument("--passes", type=_names, metavar="A,B", help=",".join(PASSES))
    command.set_defaults(command=_peer_times)

    bench_command.add_parser(commands)
    peer_bars.add_parser(commands)
    compare_command.add_parser(commands)
    findings.add_parser(commands)

    command = commands.add_parser("doctor", help="show that the checker catches planted faults")
    command.set_defaults(command=_doctor)

    command = commands.add_parser("proof", help="hold the timer and compare to what is known")
    command.add_argument("--only", choices=("timer", "compare"), help="default: both")
    command.add_argument("--pairs", type=int, default=10, metavar="N", help="comparisons of equal and of 5 %% slower")
    command.add_argument("--results", type=Path, metavar="DIR", help="default: results/<device>")
    command.add_argument("--git-sha", metavar="SHA", help="the commit, where the tree is a copy without .git")
    command.set_defaults(command=_proof)

    static.add_parser(commands)

    command = commands.add_parser("report", help="render result folders to HTML pages")
    command.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="default: every one in results/")
    command.add_argument("--baseline", metavar="KEY", help="what speed-ups start relative to; default: the sweep's")
    command.set_defaults(command=_report)
    return parser
