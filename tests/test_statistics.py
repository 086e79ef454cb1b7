"""Intervals that cover, p-values that are uniform where nothing changed, and small ones where something did."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special, stats

from harness import statistics


def times(rng, count, processes=2, blocks=6, process_noise=0.003, block_noise=0.003, ratio=1.0):
    """`count` cells of one side: process-level medians scatter, and blocks within them."""
    noise = process_noise * np.ones(count) if np.isscalar(process_noise) else process_noise
    return [
        [ratio * np.exp(sigma * z + block_noise * rng.standard_normal(blocks)) for z in rng.standard_normal(processes)]
        for sigma in noise
    ]


def test_ratio_is_of_medians_over_process_level_medians():
    base = [np.array([1.0, 2, 90]), np.array([4.0, 4, 4]), np.array([5.0, 50, 50])]
    head = [np.array([8.0]), np.array([8.0]), np.array([100.0])]
    assert np.exp(statistics.log_ratio(base, head)) == pytest.approx(8 / 4)


@pytest.mark.parametrize("processes", [2, 3, 5])
@pytest.mark.parametrize("count", [4, 10, 60])
def test_p_values_are_right_where_nothing_changed(processes, count):
    rng = np.random.default_rng(processes)
    found = []
    for _ in range(6000 // count):
        noise = 0.003 * np.exp(0.5 * rng.standard_normal(count))  # some cells are noisier
        sides = (times(rng, count, processes, process_noise=noise, block_noise=1e-4) for _ in range(2))
        found += list(statistics.p_values(list(zip(*sides, strict=True))))
    for level in (0.05, 0.01):
        assert np.mean(np.array(found) < level) < 1.4 * level


def test_two_processes_a_side_are_enough_for_a_small_p_where_there_are_many_cells():
    rng = np.random.default_rng(0)
    base, head = times(rng, 200), times(rng, 200)
    head[7] = times(rng, 1, ratio=1.05)[0]
    p = statistics.p_values(list(zip(base, head, strict=True)))
    assert p[7] < 1e-8 and statistics.q_values(p)[7] < 1e-6
    assert (np.delete(statistics.q_values(p), 7) > 0.05).all()


def test_one_cell_is_a_t_test():
    rng = np.random.default_rng(0)
    base, head = times(rng, 1, 4, block_noise=0)[0], times(rng, 1, 3, block_noise=0)[0]
    t = stats.ttest_ind(statistics.levels(base), statistics.levels(head))
    assert statistics.p_values([(base, head)]) == pytest.approx([t.pvalue])


def test_noise_within_processes_is_the_least_there_is():
    """Two processes that agree by chance do not make their blocks' scatter go away."""
    blocks = np.array([0.9, 0.95, 1.0, 1.05, 1.1])
    cells = [([blocks, blocks], [1.02 * blocks, 1.02 * blocks])]
    assert statistics.p_values(cells)[0] > 0.2
    quiet = [np.ones(5), np.ones(5)]
    assert statistics.p_values([(quiet, [1.02 * b for b in quiet])])[0] == 0
    assert statistics.p_values([(quiet, quiet)])[0] == 1


def test_one_process_has_no_p_value():
    with pytest.raises(ValueError, match="processes: expected at least 2 a side, got 1"):
        statistics.p_values([([np.ones(3)], [np.ones(3), np.ones(3)])])


def test_the_typical_variance_is_found():
    rng = np.random.default_rng(1)
    true, degrees = 4e-6, 8.0
    variances = true * degrees / rng.chisquare(degrees, 20_000)  # as Smyth assumes
    observed = variances * rng.chisquare(2, 20_000) / 2
    prior, prior_degrees = statistics._prior(observed, np.full(20_000, 2.0))
    assert prior == pytest.approx(true, rel=0.05) and prior_degrees == pytest.approx(degrees, rel=0.15)
    alike = true * rng.chisquare(2, 20_000) / 2
    assert statistics._prior(alike, np.full(20_000, 2.0))[1] > 80
    assert statistics._prior(alike[:20], np.full(20, 2.0))[1] < 8  # twenty cells cannot show that they are alike
    assert statistics._prior(observed[:4], np.full(4, 2.0)) == (0.0, 0.0)


@pytest.mark.parametrize("y", [1e-6, 0.3, 1.0, 50.0, 1e6])
def test_inverse_trigamma(y):
    assert special.polygamma(1, statistics._inverse_trigamma(y)) == pytest.approx(y)


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_medians_of_resamples_are_those_of_drawn_ones(n):
    rng, values = np.random.default_rng(0), np.sort(np.random.default_rng(n).lognormal(size=n))
    short = statistics._resampled_medians(values, rng, (40_000, 1))[:, 0]
    drawn = np.median(rng.choice(values, (40_000, n)), axis=1)
    assert stats.ks_2samp(short, drawn).statistic < 0.015


@pytest.mark.parametrize("processes, least", [(2, 0.75), (3, 0.8), (5, 0.85)])
def test_intervals_cover_and_narrow(processes, least):
    rng = np.random.default_rng(0)
    sides = times(rng, 300, processes), times(rng, 300, processes, ratio=1.05)
    found = [statistics.interval(*pair, seed=[n]) for n, pair in enumerate(zip(*sides, strict=True))]
    assert least < np.mean([low <= np.log(1.05) <= high for low, high in found]) <= 1
    assert np.median([high - low for low, high in found]) < 0.03


def test_intervals_are_repeatable():
    base, head = times(np.random.default_rng(0), 2)
    assert statistics.interval(base, head, [3]) == statistics.interval(base, head, [3])


def test_halves():
    processes = [np.array([1.0]), np.array([2.0]), np.array([1.0]), np.array([2.0])]
    assert statistics.noise_between_halves(processes) == pytest.approx(np.log(2))
    assert statistics.noise_between_halves(processes[:1]) is None
