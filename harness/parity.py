"""Check implementations against the oracle: every cell in the implementation's own process, judged by `rule`.

For each problem the numbers are drawn and the oracle's truth is computed once, in files that the workers map. Several
problems are in work at once, and on a GPU several processes of each implementation: most of the time goes into
compiling and into chains of launches, which wait for each other within a process only.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from harness import jobs, rule
from harness.check import TensorCheck
from harness.environment import Stamp
from harness.grid import Cell
from harness.rows import ParityRow
from harness.worker import Failure, Unguarded, Worker, stop_all
from implementations.registry import Implementation, implementations
from spec.cost import affordable_form, working_bytes
from spec.problem import Problem

logger = logging.getLogger(__name__)

# On a CPU the checks are tiny and compiling is most of the work: one thread each, of XLA's ways the quick ones, and no
# processes beside for Inductor. Kernels for a GPU run there in their language's simulator or interpreter.
CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "NUMBA_ENABLE_CUDASIM": "1",
    "TRITON_INTERPRET": "1",
}
# On a GPU all workers share its memory: JAX allocates and frees each array instead of keeping a growing pool.
CUDA_ENVIRONMENT = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
_GROUPS = {"cpu": 2, "cuda": 8}  # in work at once: the numbers and the truth of a full-size one are gigabytes
_PROCESSES = {"cpu": 1, "cuda": 2}  # of each implementation, at most
_PROCESSES_OF_SLOW = {"cpu": 1, "cuda": 4}  # of what compiles long, and of what all others wait for
WARM_UP_SECONDS = 120.0  # for a process to import what it needs
_PREFIX = "ttt-lab-truth-"
_MEMORY, _ROOM_BYTES = Path("/dev/shm"), 2**35  # where there is so much room, the files are in memory
DEVICE_BYTES = 45 * 10**9  # that the checks at work may take together, by their estimate; processes take the rest


@dataclass(frozen=True)
class Settings:
    """How to run: `jobs` checks at once, `timeout` seconds for each call into a worker.

    On a GPU compilers keep what they made in `compiled`, or in a folder that goes with the run.
    """

    stamp: Stamp
    seed: int = 0
    jobs: int = os.cpu_count() or 1
    timeout: float = 600.0
    compiled: Path | None = None


Known = Mapping[tuple[str, Problem], Sequence[ParityRow]]  # by the name of the case and the problem


def with_yardstick(cells: Iterable[Cell], known: Known = MappingProxyType({})) -> list[list[Cell]]:
    """The cells grouped by problem, the yardstick's in front of each group that neither has it nor is in `known`."""
    groups: dict[tuple[str, Problem], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.case.name, cell.problem), []).append(cell)
    for key, group in groups.items():
        if key not in known and not _has_yardstick(group):
            group.insert(0, of_yardstick(group[0]))
    return list(groups.values())


def _has_yardstick(group: list[Cell]) -> bool:
    return any(cell.entry.key == rule.YARDSTICK for cell in group)


def of_yardstick(cell: Cell) -> Cell:
    """The yardstick's check on the problem of `cell`."""
    return cell._replace(entry=implementations()[rule.YARDSTICK], passes=())


def run(
    groups: list[list[Cell]], settings: Settings, known: Known = MappingProxyType({})
) -> Iterator[tuple[Cell, list[ParityRow]]]:
    """Check every cell and yield its rows, as soon as it and the yardstick of its group are done.

    `known` has the rows of the yardstick for groups without it.
    """
    with ExitStack() as stack:
        runner = _Runner(settings, stack)
        waiting = iter(groups)
        for group in itertools.islice(waiting, _GROUPS[settings.stamp.device]):
            runner.start(group)
        for _ in range(sum(map(len, groups))):
            work, cell, result = runner.next_done()
            work.done.append((cell, result))
            if cell.entry.key == rule.YARDSTICK:
                work.yardstick = result
            yardstick = work.yardstick if work.has_yardstick else known[cell.case.name, cell.problem]
            if yardstick is not None:
                yield from ((cell, _rows(cell, result, yardstick, settings)) for cell, result in work.done)
                work.done.clear()
            work.left -= 1
            if work.left == 0:
                shutil.rmtree(work.folder)
                for another in itertools.islice(waiting, 1):
                    runner.start(another)


@dataclass
class _Group:
    """Cells of one problem at work: the folder with their truth, how many are left, what waits for the yardstick."""

    folder: Path
    left: int
    has_yardstick: bool
    done: list[tuple[Cell, list[TensorCheck] | Failure]] = field(default_factory=list)
    yardstick: list[TensorCheck] | Failure | None = None  # once it is done


class _Runner:
    """Threads and processes for each implementation and for the oracle; `jobs` of them work at a time."""

    def __init__(self, settings: Settings, stack: ExitStack):
        self.settings = settings
        name = f"{_PREFIX}{os.getpid()}-"
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=name, dir=_memory())))
        self._room = _Room(settings.jobs, DEVICE_BYTES)
        self._finished: queue.SimpleQueue[tuple[_Group, Cell, Future]] = queue.SimpleQueue()
        self._lanes: dict[str, _Lane] = {}
        self._environment = CPU_ENVIRONMENT
        if settings.stamp.device == "cuda":
            compiled = settings.compiled or stack.enter_context(tempfile.TemporaryDirectory(prefix="ttt-lab-compiled-"))
            self._environment = CUDA_ENVIRONMENT | compiler_caches(Path(compiled))
        stack.callback(self._stop)

    def start(self, group: list[Cell]) -> None:
        """Compute the truth of a group, if a cell of it can run, and hold its cells to it; see `next_done`."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        reasons = [cell.entry.unsupported(cell.problem, self.settings.stamp.device) for cell in group]
        runnable = not all(reasons)
        truth = self._submit(None, self._compute, group[0], folder) if runnable else _done(None)
        work = _Group(folder, len(group), _has_yardstick(group))
        for cell, reason in zip(group, reasons, strict=True):
            if reason:
                check = _done(Failure("unsupported", reason))
            else:
                check = self._submit(cell.entry, self._check, cell, folder, truth)
            check.add_done_callback(functools.partial(self._one_done, work, cell))

    def _one_done(self, work: _Group, cell: Cell, check: Future) -> None:
        self._finished.put((work, cell, check))

    def next_done(self) -> tuple[_Group, Cell, list[TensorCheck] | Failure]:
        """Wait for a cell: its checks, or the `Failure` that there are none."""
        work, cell, check = self._finished.get()
        return work, cell, check.result()

    def _compute(self, worker: Worker, cell: Cell, folder: Path) -> Failure | None:
        arguments = cell.case, cell.problem, self.settings.seed, self.settings.stamp.device, folder
        return self._call(worker, cell, jobs.save_truth, *arguments)

    def _check(self, worker: Worker, cell: Cell, folder: Path, truth: Future) -> list[TensorCheck] | Failure:
        if isinstance(failure := truth.result(), Failure):
            return Failure("error", f"the oracle failed: {failure.status}: {failure.reason}")
        arguments = cell.case, cell.problem, self.settings.stamp.device, folder
        return self._call(worker, cell, jobs.check, cell.entry, *arguments)

    def _call(self, worker: Worker, cell: Cell, function: Any, *arguments: Any) -> Any:
        """What the call returns or the `Failure`; out of device memory, it is tried again with nothing beside it."""
        problem, on_cpu = cell.problem, self.settings.stamp.device == "cpu"
        what = f"{cell.entry.key} {problem.inner_model} {cell.case.name} {problem.dtype}"
        for alone in (False, True):
            with self._room.taking(DEVICE_BYTES if alone else 0 if on_cpu else working_bytes(problem)):
                if alone:
                    self._end_processes()
                started = time.monotonic()
                try:
                    return worker.call(function, *arguments, timeout=self.settings.timeout)
                except Failure as failure:
                    last = failure
                finally:
                    logger.debug("%s of %s: %.1f s", function.__name__, what, time.monotonic() - started)
            if last.status != "oom" or on_cpu:
                break
        return last

    def _end_processes(self) -> None:
        """Give back what idle processes hold of the device's memory; the next call of each starts another."""
        stop_all(worker for lane in list(self._lanes.values()) for worker in lane.workers)

    def _submit(self, entry: Implementation | None, function: Any, *arguments: Any) -> Future:
        """Call in a process of the implementation, or of the oracle."""
        key, device = entry.key if entry else "oracle", self.settings.stamp.device
        if key not in self._lanes:
            compiles = entry is not None and (entry.framework == "jax" or entry.key.startswith("triton."))
            slow = entry is None or entry.key == rule.YARDSTICK or compiles
            count = (_PROCESSES_OF_SLOW if slow else _PROCESSES)[device]
            workers = [Worker(self._environment) for _ in range(count)]
            warm = functools.partial(jobs.warm_up, entry, device) if device == "cuda" else None
            self._lanes[key] = _Lane(workers, warm)
        return self._lanes[key].submit(function, *arguments)

    def _stop(self) -> None:
        """End all processes, and let go of every thread that waits for something."""
        for lane in self._lanes.values():
            lane.cancel()
        workers = [worker for lane in self._lanes.values() for worker in lane.workers]
        stop_all(workers)
        for worker in workers:
            worker.close()


class _Room:
    """So many calls at a time, which together take so many bytes of the device's memory."""

    def __init__(self, jobs: int, size: int):
        self._jobs, self._size, self._free = jobs, size, size
        self._changed = threading.Condition()

    @contextmanager
    def taking(self, size: int) -> Iterator[None]:
        """Wait for room, and take it; all of it for what needs more than there is."""
        size = min(size, self._size)
        with self._changed:
            self._changed.wait_for(lambda: self._jobs > 0 and self._free >= size)
            self._jobs, self._free = self._jobs - 1, self._free - size
        try:
            yield
        finally:
            with self._changed:
                self._jobs, self._free = self._jobs + 1, self._free + size
                self._changed.notify_all()


class _Lane:
    """Processes that share the calls of one implementation, or of the oracle, and a thread that waits for each."""

    def __init__(self, workers: list[Worker], warm_up: Callable[[], None] | None):
        """`warm_up` is called in the first process at once: it has started when the first truth is there."""
        self.workers, self._threads = workers, ThreadPoolExecutor(len(workers))
        self._idle = queue.LifoQueue[Worker]()  # a process that has started is taken before one that has not
        for worker in workers[1:] if warm_up else workers:
            self._idle.put(worker)
        if warm_up:
            threading.Thread(target=self._start, args=(workers[0], warm_up), daemon=True).start()

    def _start(self, worker: Worker, warm_up: Callable[[], None]) -> None:
        with suppress(Failure, Unguarded):  # whatever it is, the first check says so
            worker.call(warm_up, timeout=WARM_UP_SECONDS)
        self._idle.put(worker)

    def submit(self, function: Any, *arguments: Any) -> Future:
        """Call `function(worker, *arguments)` when a process is free; in the order of the calls."""

        def call() -> Any:
            worker = self._idle.get()
            try:
                return function(worker, *arguments)
            finally:
                self._idle.put(worker)

        return self._threads.submit(call)

    def cancel(self) -> None:
        """Begin no more of its calls."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def compiler_caches(folder: Path) -> dict[str, str]:
    """The environment in which every compiler keeps what it made in `folder`, and looks nowhere else for it."""
    names = "JAX_COMPILATION_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUPY_CACHE_DIR"
    return {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | {name: str(folder / name.lower()) for name in names}


def _memory() -> Path | None:
    """Where the files of the groups go: into memory, if there is much; None for where temporary files go.

    What runs that were killed left in memory goes now: nothing else would remove it before the machine restarts.
    """
    for left in _MEMORY.glob(f"{_PREFIX}*"):
        if not Path("/proc", left.name.removeprefix(_PREFIX).partition("-")[0]).exists():
            shutil.rmtree(left, ignore_errors=True)
    try:
        return _MEMORY if shutil.disk_usage(_MEMORY).free >= _ROOM_BYTES else None
    except OSError:
        return None


def _done(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


def _rows(
    cell: Cell,
    result: list[TensorCheck] | Failure,
    yardstick: Sequence[TensorCheck | ParityRow] | Failure,
    settings: Settings,
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
                first_call_s=check.first_call_s,
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
