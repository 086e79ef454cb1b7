"""Compare two sets of results: what is missing, what fails, what is less accurate and what is slower.

Nothing passes because it could not be compared: what is missing, damaged or measured in another way is a finding,
and a finding fails the comparison. Times of a CPU are no performance claim and never fail it.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

from harness.compare_findings import EXIT_CODES, AnyRow, Failure, Finding, findings, parity_fates, sweep_fates
from harness.compare_sides import Side, open_pairs
from harness.compare_timings import LEAST_PROCESSES, NoiseFloor, Timing, Verdict, judge, noise_floor, timings


@dataclass(frozen=True)
class Settings:
    """What counts: a ratio beyond 1 + `threshold`, and an error_ratio more than `error_ratio_factor` times as large."""

    threshold: float = 0.03
    error_ratio_factor: float = 2.0
    across_devices: bool = False


@dataclass(frozen=True)
class Section:
    """What another comparison of the same folders has to add to the report, as lines of Markdown.

    `severity` is what it makes the comparison fail by, or that it does not.
    """

    severity: Failure | Literal["note"]
    title: str
    lines: Sequence[str]


Extra = Callable[[Path, Path], Iterable[Section]]


@dataclass
class Comparison:
    """All that is to be reported.

    Attributes:
        labels: what a reader must know first.
        damage: what makes it incomplete as a whole, beside the findings of single cells.
        matched: rows that both sides have; `new`: those that only HEAD has; `failing`: those that fail on both sides.
    """

    base: str
    head: str
    settings: Settings
    labels: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    noise_floor: NoiseFloor | None = None
    matched: int = 0
    new: int = 0
    failing: int = 0

    @property
    def failures(self) -> list[Failure]:
        """What the comparison fails by, the worst first."""
        found = {finding.fails for finding in self.findings} | {section.severity for section in self.sections}
        if self.damage:
            found.add("incomplete")
        if self.of("regression"):
            found.add("performance")
        return [failure for failure in EXIT_CODES if failure in found]

    @property
    def exit_code(self) -> int:
        """That of the worst failure; 0 without one."""
        return EXIT_CODES[self.failures[0]] if self.failures else 0

    def of(self, verdict: Verdict) -> list[Timing]:
        """The timings with this verdict, the largest change first."""
        found = [timing for timing in self.timings if timing.verdict == verdict]
        return sorted(found, key=lambda timing: -abs(math.log(timing.ratio)))

    def geometric_means(self) -> dict[str, tuple[float, int]]:
        """For each implementation the geometric mean of head over base, and of how many timings."""
        logs: dict[str, list[float]] = {}
        for timing in self.timings:
            logs.setdefault(timing.base.implementation, []).append(math.log(timing.ratio))
        return {name: (math.exp(sum(values) / len(values)), len(values)) for name, values in logs.items()}


def compare(base: str, head: str, settings: Settings, extras: Iterable[Extra] = ()) -> Comparison:
    """Compare two results folders, git revisions or pytest-benchmark files; `extras` add sections about the folders.

    Raises:
        ValueError: a side cannot be read, or is of another GPU and that was not asked for.
        OSError: a file cannot be read.
    """
    found = Comparison(base, head, settings)
    with tempfile.TemporaryDirectory(prefix="ttt-lab-compare-") as scratch:
        pairs = open_pairs(base, head, Path(scratch))
        found.damage += [f"{head} has no results of {name}, {base} has" for name in pairs.only_base]
        found.labels += [f"{name}: new results, with nothing to compare them to." for name in pairs.only_head]
        for where, (one, other) in pairs.both.items():
            _add_device(found, where, one, other)
            if one.folder and other.folder:
                found.sections += chain.from_iterable(extra(one.folder, other.folder) for extra in extras)
    if not found.matched and not found.sections:
        found.damage.append("no cell is on both sides: nothing was compared")
    found.timings = judge(found.timings, settings.threshold)
    found.noise_floor = noise_floor(found.timings)
    found.labels += _reservations(found)
    return found


def _add_device(found: Comparison, where: str, base: Side, head: Side) -> None:
    matched = list(_matched(base, head))
    other_gpu = _other_gpu(base, head)
    if other_gpu and not found.settings.across_devices:
        raise ValueError(f"{where}: expected one GPU, got {other_gpu}: refused without --across-devices")
    if other_gpu:
        found.labels.append(f"{where}: ACROSS DEVICES, {other_gpu}: no time is judged.")
    if any(row.device == "cpu" for row in base.sweep.values()):
        found.labels.append(f"{where}: times of a CPU are no performance claim: only parity and completeness count.")
    found.labels += _differences(where, matched)
    found.damage += base.damage + head.damage
    fates = [*parity_fates(base, head, found.settings.error_ratio_factor), *sweep_fates(base, head)]
    found.findings += findings(where, fates)
    found.timings += timings(where, base, head, same_gpu=not other_gpu)
    found.matched += len(matched)
    found.new += sum(len(rows) for cell, rows in head.parity.items() if cell not in base.parity)
    found.new += sum(cell not in base.sweep for cell in head.sweep)
    found.failing += sum(one.status != "ok" and other.status != "ok" for one, other in matched)


def _matched(base: Side, head: Side) -> Iterator[tuple[AnyRow, AnyRow]]:
    for cell, before in base.parity.items():
        if after := head.parity.get(cell):
            same = [(row, after[tensor]) for tensor, row in before.items() if tensor in after]
            yield from same or [(next(iter(before.values())), next(iter(after.values())))]  # one failed as a whole
    yield from ((row, head.sweep[cell]) for cell, row in base.sweep.items() if cell in head.sweep)


def _other_gpu(base: Side, head: Side) -> str:
    """The names of the GPUs, if cells of one side were measured on another one than those of the other."""
    timed = [(row, head.sweep[cell]) for cell, row in base.sweep.items() if cell in head.sweep]
    pairs = {(one.gpu, other.gpu) for one, other in timed if one.device == "cuda"}
    if base.environment.get("device") == head.environment.get("device") == "cuda":
        pairs.add((str(base.environment.get("gpu", "")), str(head.environment.get("gpu", ""))))
    differing = sorted(pair for pair in pairs if pair[0] != pair[1])
    return "; ".join(f"{one or 'unknown'} and {other or 'unknown'}" for one, other in differing)


def _differences(where: str, matched: Sequence[tuple[AnyRow, AnyRow]]) -> Iterator[str]:
    """One line for each thing beside the source that a result depends on and that differs."""
    for name in ("gpu", "driver", "cuda", "versions", "fingerprint"):
        values = [(getattr(one, name), getattr(other, name)) for one, other in matched if hasattr(one, name)]
        changes = [_change(one, other) for one, other in values if one != other]
        if changes:
            kinds = list(dict.fromkeys(changes))
            more = f"; and {len(kinds) - 3} more" if len(kinds) > 3 else ""
            yield f"{where}: {name} differs in {len(changes)} of {len(values)} rows: {'; '.join(kinds[:3])}{more}"


def _change(base: str, head: str) -> str:
    """From what to what; of a list of versions only those that differ."""
    if "==" in base and "==" in head:
        one, other = base.split(), head.split()
        base, head = (" ".join(x for x in a if x not in b) for a, b in ((one, other), (other, one)))
    return f"{base or 'nothing'} → {head or 'nothing'}"


def _reservations(found: Comparison) -> Iterator[str]:
    """What the times alone cannot show."""
    judged = [timing for timing in found.timings if timing.judged]
    single = [timing for timing in judged if not timing.testable]
    if single:
        yield (
            f"{len(single)} timings have fewer than {LEAST_PROCESSES} processes on a side: their intervals know "
            "nothing of other processes, and a large change is suspect, never a regression or an improvement."
        )
    floor = found.noise_floor
    if floor and floor.share > found.settings.threshold:
        yield f"The threshold of {found.settings.threshold:.1%} is below the noise floor of {floor.share:.1%}."
    throttled = sum(bool(timing.base.throttled or timing.head.throttled) for timing in judged)
    if throttled:
        yield f"{throttled} timings are from a throttled device."
