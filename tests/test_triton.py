"""Triton's pages in its interpreter: held to the oracle through the harness, and what they refuse.

A process interprets all of Triton's kernels or none: the interpreter runs in the harness's workers, not in this one.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from harness import environment, parity, static_triton
from harness.grid import Cell
from harness.static_ptxas import usage
from implementations.registry import implementations
from implementations.triton.limits import limit
from spec.cases import CASES
from spec.problem import Problem

ROOT = Path(__file__).resolve().parent.parent
CHAIN = implementations()["triton.chain"]
SPLIT = implementations()["triton.split"]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# Together: causal and not, one mini-batch and several, several heads and batches, padded D, strides, every dtype; few
# mini-batches, since the interpreter takes a tenth of a second for each.
CELLS = [
    (replace(CASES["stress-strided"], tokens=32), "bf16"),
    (replace(CASES["stress-not-causal"], tokens=48, batch=1), "fp16"),
    (replace(CASES["stress-one-mini-batch"], batch=1), "bf16"),
    (replace(CASES["size-d16"], batch=1), "fp32"),
    (replace(CASES["size-d96-m32"], heads=1, tokens=64), "fp32"),
    (replace(CASES["lm-760m-small"], heads=1, tokens=32), "fp16"),
]


# A chunk of four mini-batches, of two, and of one, whose read-out is of what it read or of what it wrote; padded D;
# heads whose lr come in pairs.
SPLIT_CELLS = [
    (replace(CASES["stress-strided"], tokens=64, heads=1), "bf16"),
    (replace(CASES["stress-not-causal"], tokens=32, batch=1, heads=2), "fp16"),
    (replace(CASES["lm-1.3b-m64"], tokens=128, batch=1, heads=2), "bf16"),
    (replace(CASES["stress-not-causal"], tokens=128, batch=1, heads=1, mini_batch=64), "bf16"),
    (replace(CASES["size-d96-m32"], heads=1, tokens=64), "bf16"),
    (replace(CASES["stress-near-constant-rows"], batch=1, heads=1, tokens=64), "fp32"),
]


@needs_triton
@pytest.mark.parametrize("entry, chosen", [(CHAIN, CELLS), (SPLIT, SPLIT_CELLS)], ids=["chain", "split"])
def test_parity_with_the_oracle(entry, chosen):
    cells = [Cell(entry, case, case.problem("linear", dtype), entry.passes) for case, dtype in chosen]
    found = {}
    settings = parity.Settings(environment.stamp("cpu", "test"))
    for cell, rows in parity.run(parity.with_yardstick(cells), settings):
        if cell.entry is entry:
            found[cell.case] = [(row.tensor, row.status, row.reason) for row in rows]
    assert len(found) == len(cells)
    assert all(len(rows) == 12 for rows in found.values()), found
    assert not [row for rows in found.values() for row in rows if row[1] != "ok"]


SCRIPT = """
from dataclasses import replace
import torch
from implementations.triton import ttt_linear as page
from spec.cases import CASES, draw
case = replace(CASES["size-d16"], batch=1, heads=1)
problem = case.problem("linear", "fp32")
inputs, cotangents = (type(x)(*map(torch.from_numpy, x)) for x in draw(case, problem))

def refused(call, *arguments):
    try:
        call(*arguments)
    except ValueError as error:
        print(error)
    else:
        print("taken")
"""


def interpreted(code: str, interpret: str = "1") -> list[str]:
    """What `code` prints after `SCRIPT`, in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT + code],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.splitlines()


@needs_triton
@pytest.mark.parametrize("dtype, added", [("fp32", True), ("bf16", False)])
def test_a_product_in_fp32_is_summed_before_it_is_added(dtype, added):
    """On a GPU, that is; Triton would start the product from what it is added to, and the interpreter does not tell."""
    code = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tests.kernels.apart import sums
signature = dict(p_a="*{dtype}", p_b="*{dtype}", p_c="*fp32", HOW="constexpr")
for how in ("matmul", "matmul_add", "dot")[: {3 if added else 2}]:
    compiled = triton.compile(ASTSource(sums, signature, dict(HOW=how)), target=GPUTarget("cuda", 90, 32))
    print(compiled.asm["ttgir"].count("tt.dot"), "arith.addf" in compiled.asm["ttgir"])
"""
    assert interpreted(code, "0") == [f"1 {added}"] * (3 if added else 2)


@needs_triton
def test_what_is_saved_changes_no_bit():
    code = """
results = []
for group in (1, 3, 16):
    outputs, residuals = page.forward(inputs, problem, group)
    results.append((*outputs, *page.backward(cotangents, residuals, problem)))
    print(tuple(residuals.saved_w1.shape), all(torch.equal(x, y) for x, y in zip(results[0], results[-1])))
"""
    assert interpreted(code) == [f"(1, 1, {groups}, 16, 16) True" for groups in (4, 2, 1)]


@needs_triton
def test_segments_of_the_split_change_little():
    """The state between two segments is rounded once, to fp32; chunks of other sizes sum in another order."""
    code = """
from implementations.triton import split_linear as page
results = []
for group in (4, 2, 3, 1):
    outputs, residuals = page.forward(inputs, problem, group)
    results.append((*outputs, *page.backward(cotangents, residuals, problem)))
    near = all((x - y).abs().max() <= 1e-5 * y.abs().max() for x, y in zip(results[-1], results[0]))
    saved = (residuals.saved_w1.nbytes + residuals.saved_b1.nbytes) / problem.tokens
    print(tuple(residuals.saved_w1.shape), near, saved == page.saved_bytes(problem, group))
"""
    assert interpreted(code) == [f"({segments}, 1, 1, 16, 16) True True" for segments in (0, 1, 1, 3)]


@needs_triton
def test_what_a_backward_of_the_split_holds():
    from implementations.triton import split_linear

    problem = CASES["lm-1.3b-long"].problem("linear", "bf16")
    held = [split_linear.workspace_bytes(problem, group) for group in (64, 256, 512)]
    assert held == pytest.approx([held[1] / 4, held[1], 2 * held[1]], rel=0.02)  # three segments' worth
    assert split_linear.default_group(problem) == 256
    assert 490 < held[1] < 510


@needs_triton
@pytest.mark.parametrize("dtype, chosen", [("fp32", "ttt_linear"), ("fp16", "split_linear")])
def test_the_function_is_one_operator_to_pytorch(dtype, chosen):
    code = f"""
from implementations.triton import best_linear, function
problem = case.problem("linear", "{dtype}")
inputs, cotangents = (type(x)(*map(torch.from_numpy, x)) for x in draw(case, problem))
print(best_linear.page(problem).__name__.rpartition(".")[2])

def gradients(ttt, weigh):
    leaves = type(inputs)(*(x.clone().requires_grad_() for x in inputs))
    return torch.autograd.grad(weigh(ttt(leaves, problem)), leaves)

def same(found, cotangents):
    _, residuals = best_linear.forward(inputs, problem)
    return all(map(torch.equal, found, best_linear.backward(cotangents, residuals, problem)))

everything = lambda outputs: sum((x * y).sum() for x, y in zip(outputs, cotangents))
print(same(gradients(function.ttt, everything), cotangents))
compiled = torch.compile(function.ttt, fullgraph=True, backend="aot_eager")
of_out = lambda outputs: outputs.out.sum()  # its cotangent is one number, expanded; the states have none
ones = type(cotangents)(torch.ones_like(cotangents.out), *map(torch.zeros_like, cotangents[1:]))
print(same(gradients(compiled, of_out), ones))
leaves = [x.clone().requires_grad_() for x in inputs]
print(set(torch.library.opcheck(function._forward, (leaves, "linear", *function._setting(problem))).values()))
refused(function.ttt, inputs._replace(xv=inputs.xv.bfloat16()), problem)
refused(function.ttt, inputs._replace(w1=inputs.w1.mT), problem)
refused(function.ttt, inputs, case.problem("linear", "fp64"))
"""
    page, eager, compiled, report, wrong_dtype, transposed, fp64 = interpreted(code)
    assert (page, eager, compiled, report) == (chosen, "True", "True", "{'SUCCESS'}")
    assert wrong_dtype.startswith("xv: expected float") and wrong_dtype.endswith("got bfloat16")
    assert transposed.startswith("w1: expected a contiguous tensor")
    assert fp64 == "dtype: expected one of fp32, bf16, fp16, got fp64: use torch.eager"


@needs_triton
def test_what_does_not_fit_is_refused_with_the_way_out():
    code = """
outputs, residuals = page.forward(inputs, problem)
refused(page.forward, inputs._replace(xk=inputs.xk.repeat(1, 1, 1, 2)[..., ::2]), problem)
refused(page.forward, inputs._replace(w1=inputs.w1.mT), problem)
refused(page.forward, inputs._replace(xv=inputs.xv.bfloat16()), problem)
refused(page.forward, inputs._replace(lr=inputs.lr.to("meta")), problem)
refused(page.forward, inputs, problem, 0)
refused(page.backward, cotangents._replace(out=cotangents.out.sum().expand_as(cotangents.out)), residuals, problem)
refused(page.forward, inputs, case.problem("linear", "fp64"))
"""
    strides, transposed, dtype, device, group, expanded, fp64 = interpreted(code)
    assert strides == "xk: expected stride 1 along D, got strides (2048, 32, 32, 2): call .contiguous()"
    assert transposed.startswith("w1: expected a contiguous tensor") and transposed.endswith("call .contiguous()")
    assert dtype == "xv: expected float32, got bfloat16"
    assert device == "lr: expected a tensor on cpu, as the others, got meta"
    assert group.startswith("group: expected at least 1")
    assert expanded.startswith("out: expected stride 1 along D, got strides (0, 0, 0, 0)")
    assert fp64 == "dtype: expected one of fp32, bf16, fp16, got fp64: use torch.eager"


@needs_triton
def test_a_cpu_tensor_needs_the_interpreter():
    (said,) = interpreted("refused(page.forward, inputs, problem)", interpret="0")
    assert said.startswith("xq: expected a tensor on cuda, got cpu: move it there, use torch.eager, or set TRITON_INT")


@pytest.mark.parametrize(
    "sizes, reason",
    [
        ({"head_dim": 192}, "head_dim: expected at most 128, got 192: use torch.eager"),
        ({"mini_batch": 8}, "mini_batch: expected one of 16, 32, 64, 128, got 8: use torch.eager"),
        ({"dtype": "fp64"}, "dtype: expected one of fp32, bf16, fp16, got fp64: use torch.eager"),
        (
            {"mini_batch": 128},
            "head_dim: 96 with mini_batch 128 in ieee fp32 needs more shared memory than an H100 has: "
            "use a smaller mini_batch, or bf16",
        ),
        (
            {"mini_batch": 64, "causal": False},
            "head_dim: 96 with mini_batch 64 in ieee fp32 needs more shared memory than an H100 has: "
            "use a smaller mini_batch, or bf16",
        ),
        ({"mini_batch": 64}, None),
        ({"mini_batch": 128, "dtype": "bf16"}, None),
        ({"matmul_precision": "tf32"}, None),
        ({}, None),
    ],
)
def test_limits(sizes, reason):
    problem = replace(Problem("linear", 1, 256, 1, 96, 32), **sizes)
    assert limit(problem) == reason
    assert sizes.get("dtype") == "fp64" or CHAIN.supports(problem) == reason


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_the_static_report_compiles_what_a_launch_would():
    kernel = CHAIN.static_kernels()[0]
    assert (kernel.name, kernel.num_warps) == ("_forward", 4)
    assert kernel.signature["inputs"].xq == ("*bf16:16", "i32:16", "i32:16", "i32:16")
    assert kernel.signature["inputs"].lr == ("*bf16:16", "i32:16", "i32:16", "i32:1")
    assert kernel.variant.startswith("*bf16+i32,*fp32,*fp32,*bf16+i32,*fp32,*fp32,i32,i32 D=64 BLOCK_D=64 M=16 ")
    binary = static_triton.compile(kernel, "sm_90a")
    assert usage(binary.log, binary.entry).spill_store_bytes == 0


def test_the_interpreter_is_not_timed():
    assert "simulator" in CHAIN.untimed(CASES["size-d16"].problem("linear", "fp32"), "cpu")
