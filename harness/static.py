"""`python -m harness static`: every GPU kernel compiled, without a GPU; what it takes of an SM and consists of.

Exit code 1: a kernel does not compile, or spills more than its file declares.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness import environment, records, static_cuda, static_rows, static_triton
from harness.static_binary import Binary, CompileError, MissingTool, first_error
from harness.static_occupancy import occupancy
from harness.static_ptxas import usage
from harness.static_rows import StaticRow
from harness.static_sass import disassemble, mix
from implementations.kernels import ARCHITECTURES, CudaKernel, Kernel
from implementations.registry import Implementation, select

MOST_JOBS = 8  # a process that compiles with Triton takes more than a gigabyte

console = Console()


def add_parser(commands: Any) -> None:
    """Add the command `static`."""
    command = commands.add_parser("static", help="compile every GPU kernel, without a GPU: registers, spills, mix")
    command.add_argument("--implementations", type=_names, metavar="A,B", help="keys or folders: triton.best,cuda")
    command.add_argument("--architectures", type=_names, metavar="A,B", default=ARCHITECTURES)
    command.add_argument("--results", type=Path, metavar="DIR", help="default: results/static")
    command.add_argument("--git-sha", metavar="SHA", help="the commit, where the tree is a copy without .git")
    command.add_argument("--jobs", type=int, metavar="N", help="processes; default: the number of cores, 8 at most")
    command.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Write the report and print it; 1 if a kernel fails."""
    folder = records.results_folder(options.results or environment.ROOT / "results" / "static")
    git_sha = environment.stamp("cpu", options.git_sha).git_sha
    jobs = options.jobs or min(os.cpu_count() or 1, MOST_JOBS)
    rows = list(report(select(options.implementations), options.architectures, git_sha, jobs))
    path = static_rows.write(folder, rows)
    if not rows:
        console.print("no kernels registered yet")
    else:
        console.print(table(rows))
    for line in failures(rows):
        console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    for line in dict.fromkeys(_left_out(row) for row in rows if row.status == "unsupported"):
        console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
    console.print(f"  {path}", highlight=False, soft_wrap=True)
    return 0 if all(row.is_right for row in rows) else 1


def report(
    implementations: Iterable[Implementation],
    architectures: Sequence[str] = ARCHITECTURES,
    git_sha: str = "",
    jobs: int = 1,
) -> Iterator[StaticRow]:
    """One row for each kernel and architecture of `implementations`, in their order.

    NVRTC compiles several kernels at once, Triton one at a time in each of `jobs` processes.

    Raises:
        ValueError: an implementation lists one setting of a kernel twice.
    """
    if jobs > 1:
        yield from _in_processes(implementations, architectures, git_sha, jobs)
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = [pool.submit(*task) for task in _tasks(implementations, tuple(architectures), git_sha)]
        yield from (row.result() for row in rows)


def _in_processes(
    implementations: Iterable[Implementation], architectures: Sequence[str], git_sha: str, jobs: int
) -> Iterator[StaticRow]:
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        found = [
            [pool.submit(_rows_of, implementation, architecture, git_sha) for architecture in architectures]
            for implementation in implementations
        ]
        for of_one in found:
            for rows in zip(*(future.result() for future in of_one), strict=True):
                yield from rows


def _rows_of(implementation: Implementation, architecture: str, git_sha: str) -> list[StaticRow]:
    return list(report([implementation], [architecture], git_sha))


def _tasks(
    implementations: Iterable[Implementation], architectures: tuple[str, ...], git_sha: str
) -> Iterator[tuple[Any, ...]]:
    """What gives each row: a function and its arguments."""
    for implementation in implementations:
        common: dict[str, Any] = {"implementation": implementation.key, "git_sha": git_sha}
        common["source_hash"] = implementation.source_hash()
        try:
            kernels = implementation.static_kernels()
        except Exception as error:  # whatever the module of a page raises: a reason in a row, never our crash
            package = (getattr(error, "name", None) or "").partition(".")[0]
            own = package == implementation.kernels.partition(".")[0]
            missing = isinstance(error, ModuleNotFoundError) and not own
            reason = f"{implementation.kernels}: {type(error).__name__}: {first_error(str(error))}"
            status = "unsupported" if missing else "error"
            for architecture in architectures:
                yield (functools.partial(_row, common, None, architecture, status=status, reason=reason),)
            continue
        _refuse_twins(implementation.key, kernels)
        for kernel in kernels:
            for architecture in architectures:
                yield _of_kernel, common, kernel, architecture


def table(rows: Iterable[StaticRow]) -> Table:
    """A line for each kernel and architecture."""
    found = Table(title="kernels as compiled", box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for name in ("implementation", "kernel", "arch"):
        found.add_column(name, overflow="fold")
    for name in ("regs", "spill B", "shared B", "threads", "blocks/SM", "instr.", "tensor", "ld128/64/32/16"):
        found.add_column(name, justify="right", overflow="fold")
    for row in rows:
        kernel = Text.assemble(row.kernel, (f"\n{row.inner_model} {row.variant}", "dim"))
        if row.status != "ok":
            style = "red" if row.status == "error" else "dim"
            found.add_row(row.implementation, kernel, row.architecture, Text(row.status, style=style))
            continue
        spilled = max(row.spill_store_bytes or 0, row.spill_load_bytes or 0)
        loads = row.global_loads_128, row.global_loads_64, row.global_loads_32, row.global_loads_16
        found.add_row(
            row.implementation,
            kernel,
            row.architecture,
            str(row.registers),
            Text(str(spilled), style="red" if row.undeclared_spill_bytes else ""),
            str((row.static_shared_bytes or 0) + (row.dynamic_shared_bytes or 0)),
            str(row.threads),
            f"{row.occupancy_blocks} ({row.occupancy_limit})",
            str(row.instructions),
            str(row.tensor_instructions),
            "/".join(map(str, loads)),
        )
    return found


def failures(rows: Iterable[StaticRow]) -> Iterator[str]:
    """One line for each kernel that does not compile or has an undeclared spill."""
    for row in rows:
        name = f"{row.implementation} {row.inner_model} {row.kernel} [{row.variant}] {row.architecture}"
        if row.status == "error":
            yield f"error: {name}: {row.reason}"
        elif row.undeclared_spill_bytes:
            declared = row.declared_spill_bytes
            yield f"spill: {name}: {row.undeclared_spill_bytes} bytes a thread, {declared} declared"


def _of_kernel(common: dict[str, Any], kernel: Kernel, wanted: str) -> StaticRow:
    compiler: ModuleType = static_cuda if isinstance(kernel, CudaKernel) else static_triton
    architecture = next((name for name in kernel.architectures if name.rstrip("af") == wanted.rstrip("af")), "")
    if not architecture:
        reason = f"written for {', '.join(kernel.architectures)}"
        return _row(common, kernel, wanted, status="unsupported", reason=reason)
    architecture = compiler.architecture(architecture)
    version = ""
    try:
        version = compiler.version()
        nvdisasm = static_triton.tool("nvdisasm")
        numbers = _numbers(compiler.compile(kernel, architecture), architecture, nvdisasm)
    except MissingTool as error:
        return _row(common, kernel, architecture, version, status="unsupported", reason=str(error))
    except (CompileError, RuntimeError, ValueError) as error:
        return _row(common, kernel, architecture, version, status="error", reason=first_error(str(error)))
    if not numbers["occupancy_blocks"]:
        reason = f"no block fits on an SM: too much of {numbers['occupancy_limit']}"
        return _row(common, kernel, architecture, version, status="error", reason=reason, **numbers)
    return _row(common, kernel, architecture, version, status="ok", **numbers)


def _numbers(binary: Binary, architecture: str, nvdisasm: Path) -> dict[str, Any]:
    used = usage(binary.log, binary.entry)
    shared = used.static_shared_bytes + binary.dynamic_shared_bytes
    capability = int(architecture.removeprefix("sm_").rstrip("af"))
    columns = binary.tensor_memory_columns
    fits = occupancy(capability, binary.threads, used.registers, shared, used.barriers, columns)
    return {
        **asdict(used),
        "dynamic_shared_bytes": binary.dynamic_shared_bytes,
        "threads": binary.threads,
        "tensor_memory_columns": columns,
        "occupancy_blocks": fits.blocks,
        "occupancy_limit": fits.limit,
        **asdict(mix(disassemble(nvdisasm, binary.cubin), binary.entry)),
    }


def _row(
    common: dict[str, Any], kernel: Kernel | None, architecture: str, compiler: str = "", **values: Any
) -> StaticRow:
    return StaticRow(
        **common,
        inner_model=kernel.inner_model if kernel else "",
        kernel=kernel.name if kernel else "",
        variant=kernel.variant if kernel else "",
        declared_spill_bytes=kernel.declared_spill_bytes if kernel else 0,
        architecture=architecture,
        compiler=compiler,
        **values,
    )


def _refuse_twins(implementation: str, kernels: Iterable[Kernel]) -> None:
    seen = set()
    for kernel in kernels:
        name = kernel.inner_model, kernel.name, kernel.variant
        if name in seen:
            raise ValueError(f"{implementation}: kernel {' '.join(name)} is listed twice")
        seen.add(name)


def _left_out(row: StaticRow) -> str:
    return f"unsupported: {row.implementation} {row.kernel} {row.architecture}: {row.reason}".replace("  ", " ")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
