"""What two sets of times can claim of each other: a ratio, its interval, a p-value, and the false discoveries in many.

A cell is timed in a few processes a side, each in blocks of calls. The calls of one process share its memory layout
and its clocks, so the process is the unit of evidence, and everything here is about the logarithms of process-level
medians. `Blocks` has one array for each process: the medians of its blocks in milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import optimize, special, stats

Blocks = Sequence[np.ndarray]

RESAMPLES = 1000
LEVEL = 0.95
LEAST_CELLS = 5  # of fewer, the variances say too little about one another
MEDIAN_OVER_MEAN = np.pi / 2  # variance of a median over that of a mean, for many normal values


def levels(processes: Blocks) -> np.ndarray:
    """The logarithm of each process's median."""
    return np.array([np.log(np.median(blocks)) for blocks in processes])


def log_ratio(base: Blocks, head: Blocks) -> float:
    """The logarithm of head over base, each the median over its process-level medians."""
    return float(np.median(levels(head)) - np.median(levels(base)))


def interval(base: Blocks, head: Blocks, seed: Sequence[int] = (0,)) -> tuple[float, float]:
    """A bootstrap interval of `log_ratio`: processes are resampled, then blocks within each.

    Resampling n processes shows only (n - 1) / n of their variance, half of it for two: deviations are widened by
    the root of n / (n - 1) on each side. With one process a side, the interval says nothing about other processes.

    Source: Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 4.2 (narrowness bias).
    """
    rng = np.random.default_rng(seed)
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(_deviations(head, rng) - _deviations(base, rng), [tail, 100 - tail])
    center = log_ratio(base, head)
    return float(center + low), float(center + high)


def p_values(cells: Sequence[tuple[Blocks, Blocks]]) -> np.ndarray:
    """For each (base, head), the p-value of "both are equally fast" by a moderated t-test; from two processes a side.

    With two processes a side, a permutation test cannot go below 1/3, and the variance of a cell alone has two degrees
    of freedom. But there are many cells and their noise is much alike: each cell's variance is shrunk towards
    the variance that is typical of all of them, by as much as the cells' own variances agree with one another, and the
    degrees of freedom grow by what this borrows. The test stays valid where the noise of cells differs, since the
    spread of their variances is estimated too; fewer than five cells get Student's t-test. What a process's own blocks
    scatter by is noise that its median certainly has: no variance is taken to be less.

    Source: Smyth 2004, "Linear models and empirical Bayes methods for assessing differential expression in microarray
    experiments", equations of section 3 and the estimators of section 6.2; as limma's `squeezeVar` and `eBayes`.
    """
    if not cells:
        return np.empty(0)
    pairs = [(levels(base), levels(head)) for base, head in cells]
    counts = np.array([(len(base), len(head)) for base, head in pairs])
    if counts.min() < 2:
        raise ValueError(f"processes: expected at least 2 a side, got {counts.min()}")
    degrees = counts.sum(axis=1) - 2.0
    squares = [((base - base.mean()) ** 2).sum() + ((head - head.mean()) ** 2).sum() for base, head in pairs]
    prior, prior_degrees = _prior(np.array(squares) / degrees, degrees)
    variances = (prior_degrees * prior + np.array(squares)) / (prior_degrees + degrees)
    variances = np.maximum(variances, [_least_variance([*base, *head]) for base, head in cells])
    differences = np.array([head.mean() - base.mean() for base, head in pairs])
    errors = np.sqrt(variances * (1 / counts).sum(axis=1))
    total = np.minimum(degrees + prior_degrees, degrees.sum())
    with np.errstate(divide="ignore", invalid="ignore"):  # no noise at all, and perhaps no difference
        t = np.where(differences == 0, 0.0, np.abs(differences) / errors)
    return 2 * stats.t.sf(t, total)


def q_values(p: np.ndarray) -> np.ndarray:
    """Benjamini and Hochberg's: calling every cell with q <= 0.05 makes 5 % of the calls wrong on average."""
    return stats.false_discovery_control(p) if len(p) else p


def noise_between_halves(processes: Blocks) -> float | None:
    """|log ratio| between the odd and the even processes of one cell; None for one process."""
    return abs(log_ratio(processes[::2], processes[1::2])) if len(processes) > 1 else None


def _deviations(processes: Blocks, rng: np.random.Generator) -> np.ndarray:
    """By how much resampled medians of process-level medians are off, in logarithms."""
    count = len(processes)
    slots = np.arange(RESAMPLES)[:, None], np.arange(count)
    drawn = np.stack([_resampled_medians(np.sort(blocks), rng, (RESAMPLES, count)) for blocks in processes])
    chosen = rng.integers(0, count, (RESAMPLES, count))
    resampled = np.median(np.log(drawn[chosen, *slots]), axis=1)
    widening = np.sqrt(count / (count - 1)) if count > 1 else 1.0
    return widening * (resampled - np.median(levels(processes)))


def _resampled_medians(ordered: np.ndarray, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Medians of resamples of the sorted values, without drawing the resamples.

    The k-th smallest of n uniform numbers is Beta(k, n - k + 1) distributed, and what it points at in `ordered` is
    the k-th smallest of a resample; of an even n, the next one up is needed too.
    """
    n = len(ordered)
    k = (n + 1) // 2
    lower = rng.beta(k, n - k + 1, shape)
    upper = lower if n % 2 else lower + (1 - lower) * rng.beta(1, n - k, shape)
    return (ordered[_index(lower, n)] + ordered[_index(upper, n)]) / 2


def _index(uniform: np.ndarray, n: int) -> np.ndarray:
    return np.minimum((uniform * n).astype(int), n - 1)  # 1.0 - 1e-17 is 1.0


def _least_variance(processes: Blocks) -> float:
    """The variance of a process's median that comes from the scatter of its blocks alone, averaged."""
    own = [MEDIAN_OVER_MEAN * np.log(b).var(ddof=1) / len(b) for b in processes if len(b) > 1]
    return float(np.mean(own)) if own else 0.0


def _prior(variances: np.ndarray, degrees: np.ndarray) -> tuple[float, float]:
    """The typical variance, and how many degrees of freedom the agreement of the cells is worth; 0 for a few cells.

    By how much the variances differ more than by chance is itself uncertain where the cells are few: for what they are
    worth, it is taken to be one standard error more than estimated. Without that, a dozen cells of unequal noise give
    p < 0.001 four times too often (in simulations, two processes a side).
    """
    if len(variances) < LEAST_CELLS or not variances.any():
        return 0.0, 0.0
    variances = np.maximum(variances, 1e-5 * np.median(variances[variances > 0]))  # a logarithm follows
    half = degrees / 2
    logs = np.log(variances) - special.digamma(half) + np.log(half)
    by_chance = special.polygamma(1, half).mean()
    kurtosis = special.polygamma(3, half).mean() / by_chance**2
    spread = logs.var(ddof=1)
    error = max(spread, by_chance) * ((2 + kurtosis) / (len(logs) - 1)) ** 0.5
    excess = spread - by_chance
    typical, worth = (_inverse_trigamma(max(value, 1e-9)) for value in (excess, excess + error))
    return float(np.exp(logs.mean() + special.digamma(typical) - np.log(typical))), 2 * worth


def _inverse_trigamma(y: float) -> float:
    """x with trigamma(x) = y; 1/x < trigamma(x) < 1/x + 1/x^2 brackets it."""
    return optimize.brentq(lambda x: special.polygamma(1, x) - y, 1 / y, 1 / y + y**-0.5)
