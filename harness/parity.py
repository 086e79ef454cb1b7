"""Check implementations against the oracle: every cell in the implementation's own process, judged by `rule`.

For each problem the oracle's truth is computed once, on disk, a little ahead of the workers that are held to it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import jobs, rule
from harness.check import TensorCheck
from harness.environment import Stamp
from harness.grid import Cell
from harness.rows import ParityRow
from harness.worker import Failure, Worker
from implementations.registry import implementations
from spec.cost import affordable_form

# On a CPU the checks are tiny and compiling is most of the work: one thread each, and no costly passes in XLA.
# Kernels for a GPU run there in their language's simulator or interpreter.
CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "NUMBA_ENABLE_CUDASIM": "1",
    "TRITON_INTERPRET": "1",
}
# On a GPU all workers share its memory: JAX allocates and frees each array instead of keeping a growing pool.
CUDA_ENVIRONMENT = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
_AHEAD = 2  # truths on disk at once: the one in use and the next; a full-size one is gigabytes


@dataclass(frozen=True)
class Settings:
    """How to run: `jobs` checks at once, `timeout` seconds for each call into a worker."""

    stamp: Stamp
    seed: int = 0
    jobs: int = os.cpu_count() or 1
    timeout: float = 600.0


def with_yardstick(cells: Iterable[Cell]) -> list[list[Cell]]:
    """The cells grouped by problem, the yardstick's in front of each group that does not have it yet."""
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.case.name, cell.problem), []).append(cell)
    yardstick = implementations()[rule.YARDSTICK]
    for group in groups.values():
        if all(cell.entry.key != rule.YARDSTICK for cell in group):
            group.insert(0, group[0]._replace(entry=yardstick, passes=()))
    return list(groups.values())


def run(groups: list[list[Cell]], settings: Settings) -> Iterator[tuple[Cell, list[ParityRow]]]:
    """Check every cell and yield its rows; the cells of a group come together, in the order of the groups."""
    with ExitStack() as stack:
        runner = _Runner(settings, stack)
        truths = [runner.truth(group) for group in groups]
        pending = [
            [runner.check(cell, truth) for cell in group] for group, truth in zip(groups, truths, strict=True)
        ]
        for group, truth, checks in zip(groups, truths, pending, strict=True):
            results = {cell.entry.key: check.result() for cell, check in zip(group, checks, strict=True)}
            runner.release(truth)
            yardstick = results[rule.YARDSTICK]
            for cell in group:
                yield cell, _rows(cell, results[cell.entry.key], yardstick, settings)


class _Runner:
    """A thread and a process for each implementation and for the oracle; `jobs` of them work at a time."""

    def __init__(self, settings: Settings, stack: ExitStack):
        self.settings = settings
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ttt-lab-truth-")))
        self._slots = threading.Semaphore(settings.jobs)
        self._waiting_for_all = threading.Lock()
        self._ahead = threading.Semaphore(_AHEAD)
        self._stopped = False
        stack.callback(self._stop)
        self._lanes: dict[str, tuple[Worker, ThreadPoolExecutor]] = {}

    def truth(self, group: list[Cell]) -> Future:
        """The folder that holds the truth of a group; None where no cell of it can run."""
        cell = group[0]
        runnable = any(not c.entry.unsupported(c.problem, self.settings.stamp.device) for c in group)
        return self._submit("oracle", self._compute, cell) if runnable else _done(None)

    def check(self, cell: Cell, truth: Future) -> Future:
        """The checks of one cell, or the `Failure` that there are none."""
        if reason := cell.entry.unsupported(cell.problem, self.settings.stamp.device):
            return _done(Failure("unsupported", reason))
        return self._submit(cell.entry.key, self._check, cell, truth)

    def release(self, truth: Future) -> None:
        """The truth has been used: its room on disk is free for the next."""
        if isinstance(folder := truth.result(), Path):
            shutil.rmtree(folder)
        if folder is not None:
            self._ahead.release()

    def _compute(self, worker: Worker, cell: Cell) -> Path | Failure:
        self._ahead.acquire()
        if self._stopped:
            return Failure("error", "stopped")
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        arguments = cell.case, cell.problem, self.settings.seed, self.settings.stamp.device, folder
        return self._call(worker, jobs.save_truth, *arguments) or folder

    def _check(self, worker: Worker, cell: Cell, truth: Future) -> list[TensorCheck] | Failure:
        folder = truth.result()
        if isinstance(folder, Failure):
            return Failure("error", f"the oracle failed: {folder.status}: {folder.reason}")
        arguments = cell.case, cell.problem, self.settings.seed, self.settings.stamp.device, folder
        return self._call(worker, jobs.check, cell.entry, *arguments)

    def _call(self, worker: Worker, function: Any, *arguments: Any) -> Any:
        """What the call returns or the `Failure`; out of device memory, it is tried again with nothing beside it."""
        for slots in (1, self.settings.jobs):
            with self._taking(slots):
                try:
                    return worker.call(function, *arguments, timeout=self.settings.timeout)
                except Failure as failure:
                    last = failure
            if last.status != "oom" or self.settings.stamp.device == "cpu":
                break
            worker.stop()
        return last

    @contextmanager
    def _taking(self, slots: int) -> Iterator[None]:
        with self._waiting_for_all if slots > 1 else nullcontext():
            for _ in range(slots):
                self._slots.acquire()
        try:
            yield
        finally:
            self._slots.release(slots)

    def _submit(self, lane: str, function: Any, *arguments: Any) -> Future:
        if lane not in self._lanes:
            environment = CPU_ENVIRONMENT if self.settings.stamp.device == "cpu" else CUDA_ENVIRONMENT
            self._lanes[lane] = Worker(environment), ThreadPoolExecutor(1)
        worker, thread = self._lanes[lane]
        return thread.submit(function, worker, *arguments)

    def _stop(self) -> None:
        """End all processes, and let go of every thread that waits for something."""
        self._stopped = True
        for worker, thread in self._lanes.values():
            thread.shutdown(wait=False, cancel_futures=True)
            worker.close()
        self._ahead.release(_AHEAD)


def _done(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


def _rows(
    cell: Cell, result: list[TensorCheck] | Failure, yardstick: list[TensorCheck] | Failure, settings: Settings
) -> list[ParityRow]:
    common = cell_columns(cell) | {
        "run_id": settings.stamp.run_id,
        "seed": settings.seed,
        "device": settings.stamp.device,
        "truth": affordable_form(cell.problem),
        "source_hash": cell.entry.source_hash(),
        "git_sha": settings.stamp.git_sha,
        "versions": versions(cell, settings.stamp),
        "started_at": settings.stamp.started_at,
        "fingerprint": settings.stamp.fingerprint,
    }
    if isinstance(result, Failure):
        return [ParityRow(**common, tensor="", status=result.status, reason=result.reason)]
    beside = {} if isinstance(yardstick, Failure) else {check.tensor: check for check in yardstick}
    rows = []
    for check in result:
        measure = beside.get(check.tensor)
        held_to = None if cell.entry.key == rule.YARDSTICK else measure
        verdict = rule.judge(check, held_to, cell.case, cell.problem)
        rows.append(
            ParityRow(
                **common,
                tensor=check.tensor,
                status="wrong" if verdict.reason else "ok",
                reason=verdict.reason or "",
                max_error=check.max_error,
                rms_error=check.rms_error,
                yardstick_max_error=measure.max_error if measure else None,
                yardstick_rms_error=measure.rms_error if measure else None,
                error_ratio=verdict.error_ratio,
                worst_index=" ".join(map(str, check.worst_index or ())),
                diverging_mini_batch=verdict.diverging_mini_batch,
            )
        )
    return rows


def versions(cell: Cell, stamp: Stamp) -> str:
    """The versions of the run's packages, and of those that do the work of this cell's implementation."""
    return " ".join(filter(None, (stamp.versions, cell.entry.versions())))


def cell_columns(cell: Cell) -> dict[str, Any]:
    """The columns that say which cell a row is of, as both result files have them."""
    columns = asdict(cell.problem)
    del columns["eps"]
    columns.pop("one_lr", None)  # the case's name says it
    return columns | {"implementation": cell.entry.key, "case": cell.case.name}
