"""TTT-Linear on tensor cores in the emulator: held to the oracle, in both orders of threads; what it refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from harness import environment, parity
from harness.grid import Cell
from implementations.cuda import cupy_linear_split as page
from implementations.cuda import cupy_plain_linear, cupy_ttt_linear, emulator
from implementations.cuda.linear_split_limits import limit
from implementations.registry import implementations
from spec.cases import CASES, Case, draw
from spec.problem import Problem
from spec.tensors import LinearInputs, LinearOutputs

SPLIT = implementations()["cuda.cupy_linear_split"]
emulated = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

# Together: one reader a mini-batch and teams of two and four, fewer mini-batches than teams and more than a group,
# causal and not, strides, batches and heads, both dtypes.
CELLS = [
    (replace(CASES["stress-strided"], name="split-strided", tokens=16 * 18, batch=1), "bf16"),
    (replace(CASES["stress-not-causal"], batch=1), "fp16"),
    (replace(CASES["size-d16"], batch=1, tokens=32), "bf16"),
    (replace(CASES["size-d96-m32"], name="split-d96-m32"), "bf16"),
    (replace(CASES["lm-1.3b-m64-small"], heads=1, tokens=192), "fp16"),
]


@emulated
def test_parity_with_the_oracle():
    cells = [Cell(SPLIT, case, case.problem("linear", dtype), SPLIT.passes) for case, dtype in CELLS]
    found = {}
    for cell, rows in parity.run(parity.with_yardstick(cells), parity.Settings(environment.stamp("cpu", "test"))):
        if cell.entry is SPLIT:
            found[cell.case.name] = [(row.tensor, row.status, row.reason) for row in rows]
    assert len(found) == len(cells)
    assert all(len(rows) == 12 for rows in found.values()), found
    assert not [row for rows in found.values() for row in rows if row[1] != "ok"]


CASE = replace(CASES["stress-strided"], tokens=16 * 6, batch=1, heads=1, strided=False)
PROBLEM = CASE.problem("linear", "bf16")


def drawn(case: Case, problem: Problem) -> tuple[LinearInputs, LinearOutputs]:
    def torch_of(x):
        return torch.from_numpy(x.view("int16")).view(torch.bfloat16) if x.dtype == "bfloat16" else torch.from_numpy(x)

    return tuple(type(each)(*map(torch_of, each)) for each in draw(case, problem))


def both(inputs: LinearInputs, cotangents: LinearOutputs, which=page, problem: Problem = PROBLEM, **forward):
    outputs, residuals = which.forward(inputs, problem, **forward)
    return (*outputs, *which.backward(cotangents, residuals, problem))


@emulated
def test_groups_of_saved_states_change_no_bit_of_the_forward_and_little_of_the_backward():
    inputs, cotangents = drawn(CASE, PROBLEM)
    whole, cut = (both(inputs, cotangents, group=group) for group in (16, 4))
    assert all(torch.equal(x, y) for x, y in zip(whole[:3], cut[:3], strict=True))
    for x, y in zip(whole[3:], cut[3:], strict=True):  # a group's first z1 is the product itself
        assert (x.double() - y.double()).norm() < 0.01 * x.double().norm()


@emulated
@pytest.mark.parametrize("changes", [{}, {"mini_batch": 64, "tokens": 320, "causal": False}], ids=str)
def test_a_cluster_of_two_blocks_does_the_same(changes):
    case = replace(CASE, **changes)
    problem = case.problem("linear", "bf16")
    inputs, cotangents = drawn(case, problem)
    _, residuals = page.forward(inputs, problem, group=2)
    one, two = (page.backward(cotangents, residuals, problem, split=split) for split in (1, 2))
    for x, y in zip(one, two, strict=True):  # the sums over all tokens are cut otherwise
        torch.testing.assert_close(x, y, rtol=1e-5 if x.dim() < 3 else 0, atol=1e-6 if x.dim() < 3 else 0)


@emulated
def test_threads_in_the_opposite_order_give_the_same_bits(monkeypatch):
    inputs, cotangents = drawn(CASE, PROBLEM)
    expected = both(inputs, cotangents)
    run = emulator.run
    monkeypatch.setattr(emulator, "run", lambda kernel, grid, arguments: run(kernel, grid, arguments, order=1))
    assert all(torch.equal(x, y) for x, y in zip(expected, both(inputs, cotangents), strict=True))


@emulated
@pytest.mark.parametrize(
    "old, new, wrong",
    [
        # The inner gradient without half of its projection; what the next mini-batch must see; what b1 must.
        ("along_x2 + rstd * (sums[4]", "rstd * (sums[4]", {"out", "final_w1"}),
        ("mma<T>(rise[h], keys, step_before[h], step_before[2 + h]);", "(void)keys;", {"out", "final_w1"}),
        ("weights.b[h][j] += gradient.bias[h][j];", "", {"final_b1"}),
    ],
)
def test_a_fault_in_the_kernel_shows(monkeypatch, tmp_path, old, new, wrong):
    inputs, _ = drawn(CASE, PROBLEM)
    shutil.copytree(page._KERNELS, tmp_path / "kernels")
    shutil.copytree(page._KERNELS.parent / "emulator", tmp_path / "emulator")
    blocks = tmp_path / "kernels" / "linear_recurrence.cuh"
    assert blocks.read_text().count(old) == 1
    expected = page.forward(inputs, PROBLEM)[0]._asdict()
    blocks.write_text(blocks.read_text().replace(old, new))
    monkeypatch.setattr(page, "_KERNELS", tmp_path / "kernels")
    page._forward_kernel.cache_clear()
    try:
        found = page.forward(inputs, PROBLEM)[0]._asdict()
    finally:
        page._forward_kernel.cache_clear()
    for name in wrong:
        difference = (found[name].double() - expected[name].double()).norm() / expected[name].double().norm()
        assert difference > 0.02, name


@emulated
def test_rows_that_are_not_aligned_go_to_the_plain_rung():
    inputs, cotangents = drawn(CASE, PROBLEM)
    wide = torch.zeros(*inputs.xq.shape[:3], inputs.xq.shape[3] + 2, dtype=torch.bfloat16)
    wide[..., 2:] = inputs.xq
    shifted = inputs._replace(xq=wide[..., 2:])
    with pytest.raises(ValueError, match="xq: expected rows at multiples of 16 bytes"):
        page.forward(shifted, PROBLEM)
    expected = both(inputs, cotangents, cupy_plain_linear)
    assert all(torch.equal(x, y) for x, y in zip(both(shifted, cotangents, cupy_ttt_linear), expected, strict=True))
    wide[..., 2:] = cotangents.out
    with pytest.raises(ValueError, match="out: expected rows at multiples of 16 bytes"):
        both(inputs, cotangents._replace(out=wide[..., 2:]))
    expected = both(inputs, cotangents)
    found = both(inputs, cotangents._replace(out=wide[..., 2:]), cupy_ttt_linear)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_a_group_of_no_mini_batches_is_refused():
    with pytest.raises(ValueError, match="group: expected at least 1"):
        page.forward(drawn(CASE, PROBLEM)[0], PROBLEM, group=0)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"dtype": "fp32"}, "dtype: expected one of bf16, fp16 for tensor cores, got fp32"),
        ({"head_dim": 48}, "head_dim: expected 16, 32, 64, 96 or 128, got 48"),
        ({"mini_batch": 24, "tokens": 48}, "mini_batch: expected 16, 32, 64 or 128, got 24"),
        ({"head_dim": 128, "mini_batch": 128, "tokens": 128}, "do not fit into 232448 bytes of shared memory"),
    ],
)
def test_limits(changes, reason):
    assert reason in limit(replace(PROBLEM, **changes))


def test_kernels_of_all_sizes_that_fit_are_counted():
    fits = {
        (d, m): limit(replace(PROBLEM, head_dim=d, mini_batch=m, tokens=m)) is None
        for d in (16, 32, 64, 96, 128)
        for m in (16, 32, 64, 128)
    }
    assert all(fits[d, m] for d in (16, 32, 64, 96) for m in (16, 32)) and fits[64, 64] and fits[128, 16]
