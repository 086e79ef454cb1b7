"""Does `compare` see a slowdown of 5 %, and nothing where there is nothing? Ten times on the device itself.

Each time the same page is measured as BASE, again as HEAD, and once more with 5 % planted (`proof_page_slow`), block by
block in turns and in new processes, through the sweep's own bench; `compare` then judges the two pairs of folders. The
processes of the next comparison import what they need meanwhile.
"""

from __future__ import annotations

import csv
import math
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

from harness import jobs, parity, records, sweep
from harness.compare import Settings as CompareSettings
from harness.compare import compare
from harness.compare_findings import EXIT_CODES
from harness.compare_timings import Timing
from harness.grid import Cell
from harness.parity import Settings
from harness.rows import ParityRow, latest
from harness.worker import Failure, Worker
from implementations.registry import Device, Implementation
from spec.cases import CASES

FILE = "compare_proof.csv"
CASE = "lm-1.3b"  # bound by latency: where its memory lies changes little
PROCESSES = 4
KEY = "proof.page"
_PAGES = {"base": "harness.proof_page", "same": "harness.proof_page", "slow": "harness.proof_page_slow"}


@dataclass(frozen=True)
class Pair:
    """One line of `compare_proof.csv`: one cell of one comparison.

    Attributes:
        head: `same`, or `slow` by 5 %.
        ratio, low, high: HEAD over BASE, and its interval.
        verdict: what `compare` says of the cell; `right` if that is a regression for `slow` and nothing for `same`.
    """

    number: int
    head: str
    cell: str
    base_ms: float
    ratio: float
    low: float
    high: float
    q: float | None
    verdict: str
    exit_code: int
    right: bool


def run(numbers: Iterable[int], settings: Settings) -> Iterator[Pair]:
    """The comparisons of every number, two for each.

    Raises:
        ValueError: the pages failed their parity check, or were not measured.
    """
    cells = list(_cells())
    checked = [row for _, rows in parity.run(parity.with_yardstick(cells), settings) for row in rows]
    if wrong := [row for row in checked if row.status != "ok"]:
        raise ValueError(f"the pages to be compared are not right: {wrong[0].implementation}: {wrong[0].reason}")
    with closing(_Started(PROCESSES * len(_PAGES), settings.stamp.device)) as started:
        for number in numbers:
            yield from _compared(number, cells, checked, settings, started)


def _compared(
    number: int, cells: list[Cell], checked: list[ParityRow], settings: Settings, started: _Started
) -> Iterator[Pair]:
    protocol = sweep.Protocol(PROCESSES, ("warm",))
    with tempfile.TemporaryDirectory(prefix="ttt-lab-pairs-") as scratch:
        folders = {name: records.results_folder(Path(scratch) / name) for name in _PAGES}
        for check in checked:
            if (name := check.implementation.partition(".")[2]) in folders:
                records.append(folders[name] / "parity.csv", [replace(check, implementation=KEY)])
        for row, samples in sweep.run(cells, latest(checked), protocol, settings, started.take):
            name = row.implementation.partition(".")[2]
            if row.status != "ok":
                raise ValueError(f"{row.implementation} was not measured: {row.status}: {row.reason}")
            records.append(folders[name] / "sweep.csv", [replace(row, implementation=KEY)])
            samples = [replace(sample, implementation=KEY) for sample in samples]
            records.append(folders[name] / "samples.csv", samples)
        for head in ("same", "slow"):
            found = compare(str(folders["base"]), str(folders[head]), CompareSettings())
            if not found.timings:
                raise ValueError(f"comparison {number} has nothing to compare: {'; '.join(found.damage) or 'no times'}")
            yield from (_pair(number, head, timing, found.exit_code) for timing in found.timings)


class _Started:
    """Processes that import what they need before they are asked for, so many at a time."""

    def __init__(self, count: int, device: Device):
        self._device, self._threads = device, ThreadPoolExecutor(count)
        self._next: deque[tuple[Worker, Future[None]]] = deque()
        for _ in range(count):
            self._start()

    def take(self, environment: Mapping[str, str]) -> Worker:
        """One of them, and another starts; none has use for the caches of compilers that `environment` names."""
        worker, warm = self._next.popleft()
        self._start()
        warm.result()
        return worker

    def close(self) -> None:
        """End those that nobody took."""
        for worker, _ in self._next:
            worker.close()
        self._threads.shutdown()

    def _start(self) -> None:
        worker = Worker()
        self._next.append((worker, self._threads.submit(self._warm_up, worker)))

    def _warm_up(self, worker: Worker) -> None:
        with suppress(Failure):  # whatever it is, the first call says so
            worker.call(jobs.warm_up, None, self._device, timeout=parity.WARM_UP_SECONDS)


def save(folder: Path, pairs: list[Pair]) -> Path:
    """Write `compare_proof.csv`."""
    path = folder / FILE
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Pair))
        writer.writerows(map(astuple, pairs))
    return path


def noise_floor(pairs: Iterable[Pair]) -> float:
    """The largest difference that was measured where there is none, as a fraction."""
    return max(abs(math.log(pair.ratio)) for pair in pairs if pair.head == "same")


def _cells() -> Iterator[Cell]:
    problem = CASES[CASE].problem("linear", "bf16", "ieee")
    for name, page in _PAGES.items():
        entry = Implementation(f"proof.{name}", "torch", {"linear": page}, passes=("forward",), devices=("cuda",))
        yield Cell(entry, CASES[CASE], problem, ("forward",))


def _pair(number: int, head: str, timing: Timing, exit_code: int) -> Pair:
    wanted, code = ("regression", EXIT_CODES["performance"]) if head == "slow" else ("unchanged", 0)
    right = (timing.verdict, exit_code) == (wanted, code)
    times = timing.base_ms, timing.ratio, timing.low, timing.high, timing.q
    return Pair(number, head, timing.cell, *times, timing.verdict, exit_code, right)
