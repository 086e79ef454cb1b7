"""TTT-MLP on tensor cores in the emulator: held to the oracle, in both orders of threads; what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness import environment, parity
from harness.grid import Cell
from implementations.cuda import cupy_mlp_registers as page
from implementations.cuda import cupy_plain_mlp, cupy_ttt_mlp, emulator
from implementations.cuda.mlp_registers_limits import limit
from implementations.registry import implementations
from spec.cases import CASES, Case, draw
from spec.problem import Problem
from spec.tensors import MlpInputs, MlpOutputs

REGISTERS = implementations()["cuda.cupy_mlp_registers"]
emulated = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))
# One chunk of 16 tokens a mini-batch (copied ahead where causal), two and four; strides, batches and heads.
CELLS = [
    (replace(CASES["stress-strided"], name="registers-strided", tokens=48, batch=1), "bf16"),
    (Case("registers-d64", "", 1, 32, 1, 64, 16), "bf16"),
    (Case("registers-d32-m32", "", 2, 64, 1, 32, 32), "fp16"),
    (CASES["stress-tiny"], "fp16"),  # g_z2 cancels what an x_hat in fp16 is off by
    (Case("registers-m64", "", 1, 128, 1, 16, 64), "bf16"),
    (Case("registers-not-causal", "", 1, 128, 2, 32, 64, causal=False), "bf16"),
    (Case("registers-d96", "", 1, 48, 1, 96, 16), "fp16"),
    (Case("registers-d96-not-causal", "", 1, 48, 1, 96, 16, causal=False), "bf16"),
]


def drawn(case: Case, problem: Problem) -> tuple[MlpInputs, MlpOutputs]:
    def torch_of(x):
        return torch.from_numpy(x.view("int16")).view(torch.bfloat16) if x.dtype == "bfloat16" else torch.from_numpy(x)

    return tuple(type(each)(*map(torch_of, each)) for each in draw(case, problem))


CASE = Case("registers", "", 1, 80, 1, 16, 16)
PROBLEM = CASE.problem("mlp", "bf16")


def both(inputs: MlpInputs, cotangents: MlpOutputs, which=page, problem: Problem = PROBLEM, **forward):
    outputs, residuals = which.forward(inputs, problem, **forward)
    return (*outputs, *which.backward(cotangents, residuals, problem))


@emulated
def test_parity_with_the_oracle():
    cells = [Cell(REGISTERS, case, case.problem("mlp", dtype), REGISTERS.passes) for case, dtype in CELLS]
    found = {}
    for cell, rows in parity.run(parity.with_yardstick(cells), parity.Settings(environment.stamp("cpu", "test"))):
        if cell.entry is REGISTERS:
            found[cell.case.name] = [(row.tensor, row.status, row.reason) for row in rows]
    assert len(found) == len(cells)
    assert all(len(rows) == 16 for rows in found.values()), found
    assert not [row for rows in found.values() for row in rows if row[1] != "ok"]


def assert_close(found, expected):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.float(), y.float(), rtol=0.05, atol=0.02 * float(y.abs().max()))


@emulated
@pytest.mark.parametrize("changes", [{}, {"head_dim": 96, "tokens": 48}], ids=str)
def test_groups_of_saved_states_change_little(changes):
    case = replace(CASE, **changes)
    problem = case.problem("mlp", "bf16")
    inputs, cotangents = drawn(case, problem)
    whole, cut = (both(inputs, cotangents, problem=problem, group=group) for group in (16, 2))
    assert all(torch.equal(x, y) for x, y in zip(whole[:5], cut[:5], strict=True))
    assert_close(cut, whole)  # the weights are computed again from LayerNorms in fp16


@emulated
@pytest.mark.parametrize("changes", [{}, {"head_dim": 32, "mini_batch": 64, "tokens": 128, "causal": False}], ids=str)
def test_a_cluster_of_two_blocks_does_the_same(changes):
    case = replace(CASE, **changes)
    problem = case.problem("mlp", "bf16")
    inputs, cotangents = drawn(case, problem)
    one, two = (both(inputs, cotangents, problem=problem, split=split, group=2) for split in (1, 2))
    assert_close(two, one)  # z2 is summed in another order


@emulated
@pytest.mark.parametrize(("d", "split"), [(16, 1), (16, 2), (96, 2)])
def test_threads_in_the_opposite_order_give_the_same_bits(monkeypatch, d, split):
    case = replace(CASE, head_dim=d, tokens=80 if d == 16 else 48)
    problem = case.problem("mlp", "bf16")
    inputs, cotangents = drawn(case, problem)
    settings = {"problem": problem, "split": split, "group": 2}
    expected = both(inputs, cotangents, **settings)
    run = emulator.run
    monkeypatch.setattr(emulator, "run", lambda kernel, grid, arguments: run(kernel, grid, arguments, order=1))
    assert all(torch.equal(x, y) for x, y in zip(expected, both(inputs, cotangents, **settings), strict=True))


@emulated
def test_rows_that_start_anywhere_are_copied_one_number_at_a_time():
    inputs, cotangents = drawn(CASE, PROBLEM)
    wide = torch.zeros(*inputs.xk.shape[:3], 19, dtype=inputs.xk.dtype)
    wide[..., 3:] = inputs.xk
    shifted = inputs._replace(xk=wide[..., 3:])
    assert not page.aligned(shifted.xk)
    pairs = zip(both(inputs, cotangents), both(shifted, cotangents), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


def test_refuses_settings_that_no_kernel_has():
    inputs, _ = drawn(CASE, PROBLEM)
    for setting in ({"group": 0}, {"split": 3}):
        with pytest.raises(ValueError, match="group, split: expected"):
            page.empty_residuals(inputs, PROBLEM, **setting)


def test_a_state_of_96_columns_takes_two_blocks():
    problem = replace(PROBLEM, head_dim=96)
    inputs, _ = drawn(replace(CASE, head_dim=96), problem)
    assert page.empty_residuals(inputs, problem).split == 2
    with pytest.raises(ValueError, match="one of \\(2,\\), got 16, 1"):
        page.empty_residuals(inputs, problem, split=1)
    assert {kernel.cluster for kernel in page.kernels(problem)} == {2}
    assert all("sm_80" not in kernel.architectures for kernel in page.kernels(problem))  # the dispatcher goes on
    assert all(kernel.dynamic_shared_bytes <= 227 * 1024 for kernel in page.kernels(problem))


@emulated
def test_a_faulty_kernel_is_noticed(tmp_path, monkeypatch):
    for each in page.KERNELS.glob("*.cu*"):
        (tmp_path / each.name).write_text(each.read_text())
    faulty = tmp_path / "mlp_backward.cu"
    right = faulty.read_text()
    wrong = right.replace("along_d_g * p.x[i]", "along_p * p.x[i]")
    assert wrong != right
    faulty.write_text(wrong)
    (tmp_path.parent / "emulator").mkdir(exist_ok=True)
    inputs, cotangents = drawn(CASE, PROBLEM)
    expected = both(inputs, cotangents)
    monkeypatch.setattr(page, "KERNELS", tmp_path)
    emulator_header = page.Path(emulator.__file__).with_name("device.h")
    (tmp_path.parent / "emulator" / "device.h").write_text(emulator_header.read_text())
    found = both(inputs, cotangents)
    names = (*MlpOutputs._fields, *MlpInputs._fields)
    differ = [name for name, x, y in zip(names, expected, found, strict=True) if not torch.equal(x, y)]
    assert "xk" in differ and "w2" in differ and "out" not in differ


def test_says_what_it_cannot_solve():
    problem = CASE.problem("mlp", "bf16")
    assert limit(problem) is None
    assert "bf16, fp16" in limit(replace(problem, dtype="fp32"))
    assert limit(replace(problem, head_dim=96)) is None
    assert "mini_batch" in limit(replace(problem, head_dim=96, mini_batch=32, tokens=64))
    assert "head_dim" in limit(replace(problem, head_dim=128))
    assert "mini_batch" in limit(replace(problem, mini_batch=8))
    assert cupy_ttt_mlp.RUNGS[-2:] == (page, cupy_plain_mlp)
