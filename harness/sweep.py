"""Time implementations over a grid: parity first, the implementations of a cell in turns, every row on disk at once.

Each implementation runs in processes of its own, two on a GPU. All of them get a pass ready, what may tune itself by
timing one after the other, and for each problem anew; then blocks of calls are timed in turn, one at a time on the
device, so that a drift of its clock meets all alike. What runs out of device memory is tried again alone.

A cell whose implementation, spec, package versions and GPU are those of a row that is there already, and that was
checked with this seed, is not measured again: the same command resumes. Times do not depend on the numbers, so
`sweep.csv` has one row for a cell, whatever the seed.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import ceilings, jobs, parity, rule
from harness.ceilings import Ceilings
from harness.device_clock import CuptiClock
from harness.environment import Stamp
from harness.grid import Cell
from harness.parity import Settings, cell_columns, compiler_caches, versions
from harness.rows import ParityRow, Row, SampleRow, SweepRow
from harness.timing import Block, Cache, Ready, Subject, percentiles
from harness.worker import Failure, Worker, stop_all
from implementations.registry import Device
from spec.cost import bytes_min, flops, working_bytes
from spec.problem import PASSES, Pass
from spec.tensors import INPUTS, OUTPUTS

ROUNDS = (2, 3)  # at least, in all processes together; at most, in each: fewer of what is slow
PROCESS_SECONDS = 0.5  # for all of a process's rounds, if that is more than the fewest
BLOCK_SECONDS = 0.02
BLOCK_CALLS = 20
BLOCK_LAUNCHES = 3000  # of recorded calls
RECORD_SECONDS = 1e-4  # for each launch: cupti-python makes an object of it
logger = logging.getLogger(__name__)

# Not `unsupported`: what was missing may have been installed since.
_FINAL = ("ok", "wrong", "oom", "timeout", "crash", "error")


@dataclass(frozen=True)
class Protocol:
    """How a cell is measured: in how many processes for each implementation, with which caches."""

    processes: int
    caches: tuple[Cache, ...]
    ceilings: Ceilings | None = None


def missing(cells: Iterable[Cell], rows: Iterable[ParityRow], settings: Settings) -> list[Cell]:
    """The cells that have no parity rows of this code on this machine and seed.

    What could not run then has none if it can now; the code is that of the implementation and of `spec/`.
    """
    rows = [row for row in rows if (row.seed, row.fingerprint) == (settings.seed, settings.stamp.fingerprint)]
    known = {_cell_key(row) for row in rows if row.status in _FINAL}
    said = {_cell_key(row) for row in rows}

    def is_known(cell: Cell) -> bool:
        key = _cell_key_of(cell, settings.stamp)
        return key in known or (key in said and cell.entry.unsupported(cell.problem, settings.stamp.device) is not None)

    return [cell for cell in cells if not is_known(cell)]


def unchecked(cells: Iterable[Cell], rows: Iterable[ParityRow], settings: Settings) -> list[Cell]:
    """Those of them that can be timed."""
    can_run = (cell for cell in cells if not cell.entry.untimed(cell.problem, settings.stamp.device))
    return missing(can_run, rows, settings)


def known_yardsticks(cells: Iterable[Cell], rows: Iterable[ParityRow], settings: Settings) -> parity.Known:
    """What is on disk of the yardstick as it is, on this machine and with this seed, for the problems of `cells`."""
    by_cell: dict[Any, list[ParityRow]] = {}
    for row in rows:
        if row.implementation == rule.YARDSTICK and row.seed == settings.seed and _is_current(row, settings.stamp):
            by_cell.setdefault(_cell_key(row), []).append(row)
    known = {}
    for cell in cells:
        found = by_cell.get(_cell_key_of(parity.of_yardstick(cell), settings.stamp))
        tensors = len(INPUTS[cell.problem.inner_model]._fields) + len(OUTPUTS[cell.problem.inner_model]._fields)
        if found and len({row.tensor for row in found if row.status == "ok"}) == tensors:
            known[cell.case.name, cell.problem] = found
    return known


def unmeasured(
    cells: Iterable[Cell],
    rows: Iterable[SweepRow],
    checked: Iterable[ParityRow],
    protocol: Protocol,
    settings: Settings,
) -> list[Cell]:
    """The cells, each with the passes that lack a row of this code on this machine; all, if it is unchecked."""
    cells = list(cells)
    afresh = {_cell_key_of(cell, settings.stamp) for cell in unchecked(cells, checked, settings)}
    known = {(*_cell_key(row), row.pass_, row.cache) for row in rows if _is_current(row, settings.stamp)}
    left = []
    for cell in cells:
        key = _cell_key_of(cell, settings.stamp)

        def lacks(pass_: Pass, key: tuple[Any, ...] = key) -> bool:
            return key in afresh or any((*key, pass_, cache) not in known for cache in protocol.caches)

        if passes := tuple(filter(lacks, cell.passes)):
            left.append(cell._replace(passes=passes))
    return left


def of_cells(rows: Iterable[Row], cells: Iterable[Cell], device: Device) -> list[Row]:
    """The rows of these cells on `device`, of whatever code and seed; of a sweep, those of the cells' passes."""
    passes = {_place_of(cell, device): cell.passes for cell in cells}
    found = ((row, passes.get(_place(row))) for row in rows)
    return [row for row, of in found if of is not None and (not isinstance(row, SweepRow) or row.pass_ in of)]


def run(
    cells: Iterable[Cell],
    checked: Iterable[ParityRow],
    protocol: Protocol,
    settings: Settings,
    worker: Callable[[Mapping[str, str]], Worker] = Worker,
    is_over: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[SweepRow, list[SampleRow]]]:
    """Time every pass of every cell that `checked` found right; the others become rows that say why not.

    `worker` makes a process with the given environment; `is_over` is asked after each pass of a problem.
    """
    verdicts: dict[Any, list[ParityRow]] = {}
    for row in checked:
        if row.seed == settings.seed and row.fingerprint == settings.stamp.fingerprint:
            verdicts.setdefault(_cell_key(row), []).append(row)
    by_problem: dict[Any, list[Cell]] = {}
    for cell in cells:
        by_problem.setdefault((cell.case.name, cell.problem), []).append(cell)
    groups = list(by_problem.values())
    bench = Bench(protocol, settings, worker, is_over)
    try:
        for group, following in itertools.zip_longest(groups, groups[1:]):
            to_measure: list[Cell] = []
            blanks: dict[tuple[str, Pass], tuple[SweepRow, float | None]] = {}
            for cell in group:
                rows = verdicts.get(_cell_key_of(cell, settings.stamp), [])
                passes = []
                for pass_ in cell.passes:
                    blank = _blank(cell, pass_, rows, settings.stamp, protocol.ceilings)
                    if failure := _obstacle(cell, pass_, rows, settings.stamp.device):
                        yield from ((_failed(blank, failure, cache), []) for cache in protocol.caches)
                    else:
                        passes.append(pass_)
                        blanks[cell.entry.key, pass_] = blank, _first_call_s(rows, pass_)
                to_measure.append(cell._replace(passes=tuple(passes)))
            for subject, pass_ in bench.measure(to_measure, following[0] if following else None):
                blank, first_s = blanks[subject.cell.entry.key, pass_]
                yield from (_result(subject, blank, first_s, cache) for cache in protocol.caches)
            if is_over():
                break
    finally:
        bench.close()


class Timed:
    """One cell of an implementation in the turns of one pass: its processes, and what they gave so far."""

    def __init__(self, cell: Cell, workers: list[Worker], numbers: Path | None, settings: Settings):
        self.cell, self.workers = cell, workers
        self.failure: Failure | None = None
        self.ready: list[Ready] = []
        self.blocks: dict[Cache, list[tuple[int, int, Block]]] = {}  # process, round, block
        self.refused: dict[Cache, Failure] = {}
        self._left_s = settings.timeout
        stamp = settings.stamp
        self._subject = Subject(cell.entry, cell.case, cell.problem, settings.seed, stamp.device, numbers)

    def call(self, process: int, job: Any, *arguments: Any) -> Any:
        """What `job` gives in one process; None once this cell has failed, or fails now."""
        if self.failure:
            return None
        started = time.monotonic()
        try:
            return self.workers[process].call(job, self._subject, *arguments, timeout=max(self._left_s, 0.01))
        except Failure as failure:
            self.failure = failure
            return None
        finally:
            self._left_s -= time.monotonic() - started

    def place(self, process: int, pass_: Pass) -> None:
        """Have one process import its framework, put the inputs on the device and compile the pass."""
        try:
            self.workers[process].call(jobs.place, self._subject, pass_, timeout=self._left_s)
        except Failure as failure:
            self.failure = failure

    def get_ready(self, process: int, pass_: Pass) -> None:
        """Get a pass ready in one process, by the same clock as in the first."""
        timer = self.ready[0].timer if self.ready else None
        if ready := self.call(process, jobs.ready, pass_, timer):
            self.ready.append(ready)

    def clear(self) -> None:
        """Give the device's memory back; a process that cannot is ended."""
        for worker in self.workers:
            if worker.running:
                try:
                    worker.call(jobs.clear, timeout=60)
                except Failure:
                    worker.stop()


class Bench:
    """The processes of a sweep, kept from cell to cell."""

    def __init__(
        self,
        protocol: Protocol,
        settings: Settings,
        worker: Callable[[Mapping[str, str]], Worker] = Worker,
        is_over: Callable[[], bool] = lambda: False,
    ):
        self._protocol, self._settings, self._worker, self._is_over = protocol, settings, worker, is_over
        self._workers: dict[str, list[Worker]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="ttt-lab-sweep-")
        self._compiled = settings.compiled or Path(self._folder.name)
        self._drawing = ThreadPoolExecutor(1)
        self._drawn: dict[Any, Future[Path]] = {}  # by problem
        self._numbers: Path | None = None  # of the problem that is measured

    def close(self) -> None:
        """End the processes."""
        self._drawing.shutdown(cancel_futures=True)
        stop_all(itertools.chain(*self._workers.values()))
        for worker in itertools.chain(*self._workers.values()):
            worker.close()
        self._folder.cleanup()

    def measure(self, cells: list[Cell], following: Cell | None) -> Iterator[tuple[Timed, Pass]]:
        """The cells of one problem, pass by pass, in turns; `following` is of the next problem."""
        if not any(cell.passes for cell in cells):
            return
        self._numbers = self._draw(cells[0]).result()
        if following:
            self._draw(following)
        self._forget_tuning(cells)
        for pass_ in (name for name in PASSES if any(name in cell.passes for cell in cells)):
            subjects = [self._subject(cell) for cell in cells if pass_ in cell.passes]
            with _device_to_itself(self._settings.stamp):
                self._take_turns(subjects, pass_)
                shared = self._share_memory()  # before the first is alone
                for number, subject in enumerate(subjects):
                    if shared and subject.failure and subject.failure.status == "oom":
                        subjects[number] = self._alone(subject.cell, pass_)
            yield from ((subject, pass_) for subject in subjects)
            if self._is_over():
                break
        for cell in cells:
            self._subject(cell).clear()
        shutil.rmtree(self._numbers, ignore_errors=True)

    def _forget_tuning(self, cells: Iterable[Cell]) -> None:
        """What tunes itself does so for this problem: not for an earlier one, nor in its check, beside others."""
        may_tune = [cell for cell in cells if cell.passes and cell.entry.may_tune]
        if may_tune and self._settings.stamp.device == "cuda":
            stop_all(itertools.chain(*(self._workers.get(cell.entry.key, ()) for cell in may_tune)))
            for file in self._compiled.rglob("*.autotune.json"):  # of `triton.autotune`, among what it compiled
                file.unlink(missing_ok=True)

    def _draw(self, cell: Cell) -> Future[Path]:
        """The folder with the numbers of a problem: drawn while the one in front of it is measured."""
        key = cell.case.name, cell.problem

        def draw() -> Path:
            folder = Path(tempfile.mkdtemp(dir=self._folder.name))
            jobs.save_drawn(cell.case, cell.problem, self._settings.seed, folder)
            return folder

        if key not in self._drawn:
            self._drawn[key] = self._drawing.submit(draw)
        return self._drawn[key]

    def _subject(self, cell: Cell) -> Timed:
        key = cell.entry.key
        if key not in self._workers:
            self._workers[key] = [self._worker(self._environment()) for _ in range(self._protocol.processes)]
        return Timed(cell, self._workers[key], self._numbers, self._settings)

    def _environment(self) -> dict[str, str]:
        """Compilers find what the parity checks made, and what other processes of the sweep did; nothing older.

        A CPU's problems are tiny, and threads would only wait for each other.
        """
        threads = {"OMP_NUM_THREADS": "1"} if self._settings.stamp.device == "cpu" else {}
        return compiler_caches(self._compiled) | threads

    def _take_turns(self, subjects: Sequence[Timed], pass_: Pass) -> None:
        marks = [time.monotonic()]
        turns = list(itertools.product(range(self._protocol.processes), subjects))
        at_once = min(len(turns), *(parity.DEVICE_BYTES // working_bytes(s.cell.problem) for s in subjects), 64)
        with ThreadPoolExecutor(max(at_once, 1)) as pool:
            list(pool.map(lambda turn: turn[1].place(turn[0], pass_), (t for t in turns if not _may_tune(t))))
        for process, subject in filter(_may_tune, turns):  # with nothing beside it
            subject.place(process, pass_)
        marks.append(time.monotonic())
        for process, subject in turns:
            subject.get_ready(process, pass_)
        marks.append(time.monotonic())
        for subject in subjects[:1]:
            subject.call(0, jobs.settle, pass_)
        for cache, round_ in itertools.product(self._protocol.caches, range(ROUNDS[1])):
            first = round_ % max(len(turns), 1)  # nobody always follows the same one
            for process, subject in turns[first:] + turns[:first]:
                _block(subject, process, round_, pass_, cache)
        marks.append(time.monotonic())
        if subjects:
            cell, seconds = subjects[0].cell, [after - before for before, after in itertools.pairwise(marks)]
            what = f"{cell.problem.inner_model} {cell.case.name} {cell.problem.dtype} {pass_}"
            said = "%s: %d processes, placed in %.1f s, ready in %.1f s, timed in %.1f s"
            logger.debug(said, what, len(turns), *seconds)

    def _alone(self, cell: Cell, pass_: Pass) -> Timed:
        """The pass of this cell with nothing else on the device, one process after the other."""
        logger.debug("%s %s: out of memory beside the others, and so again alone", cell.entry.key, pass_)
        stop_all(itertools.chain(*self._workers.values()))
        subject = self._subject(cell)
        for process in range(self._protocol.processes):
            subject.get_ready(process, pass_)
            subject.call(process, jobs.settle, pass_)
            for cache, round_ in itertools.product(self._protocol.caches, range(ROUNDS[1])):
                _block(subject, process, round_, pass_, cache)
            subject.workers[process].stop()
        return subject

    def _share_memory(self) -> bool:
        return sum(worker.running for worker in itertools.chain(*self._workers.values())) > 1


def _may_tune(turn: tuple[int, Timed]) -> bool:
    return turn[1].cell.entry.may_tune


def _block(subject: Timed, process: int, round_: int, pass_: Pass, cache: Cache) -> None:
    if subject.failure or cache in subject.refused:
        return
    ready = subject.ready[process]
    seconds, recorded = ready.call_ms / 1e3, 0
    if ready.timer == CuptiClock.name:
        recorded = subject.ready[0].trial.launches or 0
    calls = min(int(BLOCK_SECONDS / seconds), BLOCK_CALLS, BLOCK_LAUNCHES // max(recorded, 1))
    calls = max(calls, 1)
    fewest = -(-ROUNDS[0] // len(subject.workers))
    block_s = (2 * calls + 1) * seconds + calls * recorded * RECORD_SECONDS  # device, host, one uncounted
    if round_ >= max(fewest, PROCESS_SECONDS / block_s):
        return
    block = subject.call(process, jobs.block, pass_, cache, calls)
    if block:
        subject.blocks.setdefault(cache, []).append((process, round_, block))
    elif subject.failure and subject.failure.status == "unsupported":  # this cache, not this pass
        subject.refused[cache], subject.failure = subject.failure, None


def _first_call_s(checked: Iterable[ParityRow], pass_: Pass) -> float | None:
    """What the first call of a pass took when it was checked; None where that is not known."""
    of_pass = {"backward" if row.tensor.startswith("d_") else "forward": row.first_call_s for row in checked}
    both = [of_pass.get(name) for name in ("forward", "backward") if name in pass_]
    return None if None in both else sum(filter(None, both))


def measured(subject: Timed, cache: Cache) -> dict[str, Any]:
    """What was measured of a cell, as columns of a row.

    Raises:
        Failure: why there is nothing.
    """
    blocks = subject.blocks.get(cache, [])
    if failure := subject.failure or subject.refused.get(cache):
        raise failure
    on_device = [ms for _, _, block in blocks for ms in block.device.ms]
    first = subject.ready[0]
    p20, median, p80 = percentiles(on_device)
    states = [block.state for _, _, block in blocks if block.state]
    throttles = sorted({reason for state in states for reason in state.throttles})
    return {
        "device_ms": median,
        "device_ms_p20": p20,
        "device_ms_p80": p80,
        "host_ms": statistics.median(ms for _, _, block in blocks for ms in block.host_ms),
        "samples": len(on_device),
        "timer": first.timer,
        "peak_memory_bytes": first.peak_memory_bytes,
        "launches": first.trial.launches,
        "kernels": first.trial.kernels,
        "sm_clock_mhz": statistics.median(state.sm_clock_mhz for state in states) if states else None,
        "power_w": statistics.median(state.power_w for state in states) if states else None,
        "throttled": bool(throttles) if states else None,
        "throttle_reasons": "; ".join(throttles),
        "processes": len({process for process, _, _ in blocks}),
    }


def _result(
    subject: Timed, blank: SweepRow, first_call_s: float | None, cache: Cache
) -> tuple[SweepRow, list[SampleRow]]:
    try:
        columns = measured(subject, cache)
    except Failure as failure:
        return _failed(blank, failure, cache), []
    columns["first_call_s"] = subject.ready[0].first_call_s if first_call_s is None else first_call_s
    columns["roofline_fraction"] = blank.roofline_ms / columns["device_ms"] if blank.roofline_ms else None
    row = replace(blank, status="ok", reason="", cache=cache, **columns)
    return row, [
        SampleRow(
            **{name: getattr(row, name) for name in ("run_id", *SampleRow.KEY)},
            process=process,
            block=round_,
            device_ms=device_ms,
            host_ms=host_ms,
            sm_clock_mhz=block.state.sm_clock_mhz if block.state else None,
        )
        for process, round_, block in subject.blocks[cache]
        for device_ms, host_ms in zip(block.device.ms, block.host_ms, strict=True)
    ]


def _blank(cell: Cell, pass_: Pass, checked: list[ParityRow], stamp: Stamp, limits: Ceilings | None) -> SweepRow:
    """The row of a cell before it is measured."""
    return SweepRow(
        **cell_columns(cell),
        run_id=stamp.run_id,
        pass_=pass_,
        status="error",
        reason="not measured",
        cache="warm",
        flops=flops(cell.problem, pass_),
        bytes_min=bytes_min(cell.problem, pass_),
        roofline_ms=ceilings.roofline_ms(limits, cell.problem, pass_),
        latency_floor_ms=ceilings.latency_floor_ms(limits, cell.problem, pass_),
        error_ratio=max((row.error_ratio or 0 for row in checked), default=None),
        gpu=stamp.gpu,
        driver=stamp.driver,
        cuda=stamp.cuda,
        git_sha=stamp.git_sha,
        source_hash=cell.entry.source_hash(),
        versions=versions(cell, stamp),
        started_at=stamp.started_at,
        device=stamp.device,
        fingerprint=stamp.fingerprint,
    )


def _obstacle(cell: Cell, pass_: Pass, checked: list[ParityRow], device: Device) -> Failure | None:
    """Why this pass is not to be timed."""
    if reason := cell.entry.untimed(cell.problem, device):
        return Failure("unsupported", reason)
    if pass_ not in cell.entry.passes:
        return Failure("unsupported", f"has no {pass_} pass")
    if not checked:
        return Failure("error", "has no parity check")
    return next((Failure(row.status, row.reason) for row in checked if row.status != "ok"), None)


def _failed(blank: SweepRow, failure: Failure, cache: Cache) -> SweepRow:
    return replace(blank, status=failure.status, reason=failure.reason, cache=cache)


@contextmanager
def _device_to_itself(stamp: Stamp) -> Iterator[None]:
    """No other sweep of this machine measures on the device meanwhile."""
    name = re.sub(r"\W+", "-", f"{stamp.device}-{stamp.gpu}") if stamp.device == "cuda" else "cpu"
    with (Path(tempfile.gettempdir()) / f"ttt-lab-{name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def checks_of(rows: Iterable[ParityRow], cell: Cell, settings: Settings) -> list[ParityRow]:
    """The parity rows that are of this cell: of its code, on this machine and with this seed."""
    key, mark = _cell_key_of(cell, settings.stamp), (settings.seed, settings.stamp.fingerprint)
    return [row for row in rows if (row.seed, row.fingerprint) == mark and _cell_key(row) == key]


def _is_current(row: ParityRow | SweepRow, stamp: Stamp) -> bool:
    return row.status in _FINAL and row.fingerprint == stamp.fingerprint


def _cell_key(row: ParityRow | SweepRow) -> tuple[Any, ...]:
    return (*_place(row), row.source_hash, row.versions)


def _cell_key_of(cell: Cell, stamp: Stamp) -> tuple[Any, ...]:
    return (*_place_of(cell, stamp.device), cell.entry.source_hash(), versions(cell, stamp))


def _place(row: Any) -> tuple[Any, ...]:
    return (*(getattr(row, name) for name in _KEY), row.device)


def _place_of(cell: Cell, device: Device) -> tuple[Any, ...]:
    columns = cell_columns(cell)
    return (*(columns[name] for name in _KEY), device)


_KEY: tuple[str, ...] = ("implementation", "inner_model", "case", "batch", "tokens", "heads", "head_dim", "mini_batch")
_KEY += ("causal", "dtype", "matmul_precision")
