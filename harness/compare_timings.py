"""The times of two sides, cell by cell: which changed, and how large a change the noise alone would show.

A regression is slower by more than the threshold, with an interval that excludes 1, and significant among all
cells of the comparison. One process a side cannot show what other processes would: what looks slower is `suspect`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from harness import statistics
from harness.compare_findings import label
from harness.compare_sides import Side
from harness.rows import SweepRow
from harness.statistics import Blocks

SIGNIFICANCE = 0.05
LEAST_PROCESSES = 2
LEAST_AA_PAIRS = 5

Verdict = Literal["regression", "improvement", "suspect", "unchanged", "not judged"]


@dataclass(frozen=True)
class Timing:
    """One cell timed on both sides: head over base, its interval, and what is to be said of it.

    Attributes:
        judged: False on a CPU and across GPUs: the ratio is shown and means nothing.
        p, q: of "both are equally fast", and q among all cells; None with fewer than two processes on a side.
        same: both sides had the same source and environment, so that a difference is noise: an A/A pair.
    """

    where: str
    base: SweepRow
    head: SweepRow
    blocks: tuple[Blocks, Blocks]
    ratio: float
    low: float
    high: float
    judged: bool
    p: float | None = None
    q: float | None = None
    verdict: Verdict = "not judged"

    @property
    def cell(self) -> str:
        """What was timed."""
        return f"{label(self.base)} {self.base.pass_} {self.base.cache}"

    @property
    def base_ms(self) -> float:
        """The median of the process-level medians of BASE."""
        return math.exp(float(np.median(statistics.levels(self.blocks[0]))))

    @property
    def same(self) -> bool:
        """See the class."""
        one, other = self.base, self.head
        known = one.source_hash and one.fingerprint
        return bool(known) and (one.source_hash, one.fingerprint) == (other.source_hash, other.fingerprint)

    @property
    def testable(self) -> bool:
        """Whether there are enough processes on both sides for a test."""
        return self.judged and min(map(len, self.blocks)) >= LEAST_PROCESSES

    @property
    def note(self) -> str:
        """What a reader of the ratio should know."""
        throttled = [name for name, row in (("BASE", self.base), ("HEAD", self.head)) if row.throttled]
        notes = [f"throttled: {', '.join(throttled)}"] if throttled else []
        return "; ".join(notes + (["same source and environment"] if self.same else []))


@dataclass(frozen=True)
class NoiseFloor:
    """What 95 of 100 ratios of equal things stay within, as a share (0.01: 1 %), from how many pairs of what."""

    share: float
    pairs: int
    source: str


def timings(where: str, base: Side, head: Side, same_gpu: bool) -> list[Timing]:
    """Every cell that has samples by the same timer on both sides."""
    found = []
    for cell, one in base.sweep.items():
        other = head.sweep.get(cell)
        if other is None or one.timer != other.timer or cell not in base.samples or cell not in head.samples:
            continue
        blocks = base.samples[cell].processes, head.samples[cell].processes
        ratio = math.exp(statistics.log_ratio(*blocks))
        low, high = map(math.exp, statistics.interval(*blocks, seed=[zlib.crc32(repr(cell).encode())]))
        found.append(Timing(where, one, other, blocks, ratio, low, high, same_gpu and one.device == "cuda"))
    return found


def judge(found: Sequence[Timing], threshold: float) -> list[Timing]:
    """The same timings with p, q and a verdict; variances are pooled by device, discoveries over all."""
    by_device: dict[str, list[int]] = {}
    for number, timing in enumerate(found):
        if timing.testable:
            by_device.setdefault(timing.where, []).append(number)
    p: dict[int, float] = {}
    for numbers in by_device.values():
        p |= dict(zip(numbers, statistics.p_values([found[number].blocks for number in numbers]), strict=True))
    q = dict(zip(p, statistics.q_values(np.array(list(p.values()))), strict=True))
    return [_judged(timing, p.get(number), q.get(number), threshold) for number, timing in enumerate(found)]


def noise_floor(found: Iterable[Timing]) -> NoiseFloor | None:
    """From the A/A pairs where there are five; else from the processes of each side, odd against even.

    An A/A pair also has what changes from one run to another, which the processes of one run share. Halves have fewer
    processes than what they stand for, so that their floor is rather too high. None where nothing was measured twice.
    """
    found = [timing for timing in found if timing.judged]
    pairs = [abs(math.log(timing.ratio)) for timing in found if timing.same]
    source = "cells whose source and environment are the same on both sides"
    if len(pairs) < LEAST_AA_PAIRS:
        halves = (statistics.noise_between_halves(blocks) for timing in found for blocks in timing.blocks)
        pairs = [value for value in halves if value is not None]
        source = "the odd against the even processes of each cell and side"
    return NoiseFloor(math.expm1(float(np.percentile(pairs, 95))), len(pairs), source) if pairs else None


def _judged(timing: Timing, p: float | None, q: float | None, threshold: float) -> Timing:
    beyond = abs(math.log(timing.ratio)) > math.log1p(threshold)
    verdict: Verdict = "unchanged"
    if not timing.judged:
        verdict = "not judged"
    elif q is None:
        verdict = "suspect" if beyond else "unchanged"
    elif beyond and not timing.low <= 1 <= timing.high and q <= SIGNIFICANCE:
        verdict = "regression" if timing.ratio > 1 else "improvement"
    as_float = [None if value is None else float(value) for value in (p, q)]
    return replace(timing, p=as_float[0], q=as_float[1], verdict=verdict)
