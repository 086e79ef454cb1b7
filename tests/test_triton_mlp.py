"""TTT-MLP in Triton under its interpreter: held to the oracle, deterministic, and clear about what it cannot do.

The interpreter takes most of a second for a mini-batch, so the cases are tiny; what only a GPU shows (races, its
roundings) is for the parity command there.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness import jobs, rule, static
from harness.parity import CPU_ENVIRONMENT
from harness.worker import Failure, Worker
from implementations.registry import Implementation, implementations
from implementations.triton.mlp_limits import newer_ptxas, supports
from spec.cases import Case
from spec.problem import Problem

triton = pytest.importorskip("triton")

PAGE = "implementations.triton.ttt_mlp"
OFFCHAIN = "implementations.triton.ttt_mlp_offchain"
ENTRY = Implementation(
    "triton.mlp_dev", "torch", {"mlp": PAGE}, ("fp32", "bf16", "fp16"), supports=supports, kernels=PAGE
)
BASE = Case("triton", "two mini-batches", 1, 32, 1, 16, 16)


@pytest.fixture(scope="module")
def worker():
    process = Worker(CPU_ENVIRONMENT | {"TRITON_INTERPRET": "1"})
    yield process
    process.close()


def wrong(worker: Worker, case: Case, dtype: str, folder, page: str = PAGE) -> list[str]:
    """What the checker says against the page: both passes, twice each, in memory full of NaN."""
    problem = case.problem("mlp", dtype)
    entry = replace(ENTRY, pages={"mlp": page})
    worker.call(jobs.save_truth, case, problem, 0, "cpu", folder, timeout=250.0)
    checks, yardstick = (
        worker.call(jobs.check, each, case, problem, "cpu", folder, timeout=250.0)
        for each in (entry, implementations()[rule.YARDSTICK])
    )
    assert len(checks) == 16
    beside = {check.tensor: check for check in yardstick}
    verdicts = [rule.judge(check, beside[check.tensor], case, problem) for check in checks]
    return [verdict.reason for verdict in verdicts if verdict.reason]


@pytest.mark.parametrize(
    "dtype, changes",
    [
        ("fp32", {"batch": 2, "heads": 2, "tokens": 16, "strided": True}),
        ("fp32", {"tokens": 80, "causal": False}),  # groups of two, the last one short
        ("bf16", {}),
        ("bf16", {"causal": False, "strided": True}),
        ("fp16", {"head_dim": 32}),
        ("fp32", {"head_dim": 48, "tokens": 16, "mini_batch": 8}),  # padded: D to 64, M to 16
        ("fp16", {"head_dim": 48, "tokens": 24, "mini_batch": 24, "causal": False}),  # M to 32
    ],
    ids=str,
)
def test_right_against_the_oracle(worker, dtype, changes, tmp_path):
    assert wrong(worker, replace(BASE, **changes), dtype, tmp_path) == []


@pytest.mark.parametrize(
    "dtype, changes",
    [
        ("bf16", {"heads": 2, "tokens": 64, "strided": True, "head_dim": 32}),  # one chunk of four mini-batches
        ("bf16", {"tokens": 96, "causal": False, "head_dim": 32}),  # three chunks of two
        ("fp16", {"tokens": 16, "head_dim": 32}),
        ("bf16", {"tokens": 32, "head_dim": 64}),  # the sum over F in halves
        ("bf16", {"tokens": 192, "mini_batch": 64, "causal": False, "head_dim": 32}),  # the walks of `mlp_tiles.py`
        ("fp16", {"tokens": 128, "mini_batch": 64, "head_dim": 64, "strided": True}),
        ("bf16", {"tokens": 96, "head_dim": 96}),  # three chunks of two, D in tiles and padded
    ],
    ids=str,
)
def test_offchain_is_right_against_the_oracle(worker, dtype, changes, tmp_path):
    assert wrong(worker, replace(BASE, **changes), dtype, tmp_path, OFFCHAIN) == []


def equal_for_all_groups_offchain() -> list[str]:
    """As `equal_for_all_groups`."""
    import torch

    from implementations.triton import ttt_mlp_offchain as page
    from spec.cases import draw

    case = replace(BASE, tokens=80, head_dim=32)
    problem = case.problem("mlp", "fp16")
    inputs, cotangents = (type(x)(*map(torch.from_numpy, x)) for x in draw(case, problem))
    found = []
    for group in (1, 2, 5):
        outputs, residuals = page.forward(inputs, problem, group)
        assert sum(x.nbytes for x in residuals[1:5]) / 80 == page.saved_bytes(problem, group)
        gradients = page.backward(cotangents, residuals, problem)
        found.append(outputs._asdict() | {f"d_{name}": x for name, x in gradients._asdict().items()})
    return [name for name, x in found[0].items() if any(not torch.equal(x, other[name]) for other in found[1:])]


def test_offchain_the_group_changes_no_bit(worker):
    assert worker.call(equal_for_all_groups_offchain, timeout=250.0) == []


def operator(dtype: str) -> tuple[bool, set[str]]:
    """Whether autograd through the operator gives the page's gradients, and what PyTorch says of the operator."""
    import torch

    from implementations.triton import best_mlp, function
    from spec.cases import draw

    case = replace(BASE, tokens=16)
    problem = case.problem("mlp", dtype)
    inputs, cotangents = (type(x)(*map(torch.from_numpy, x)) for x in draw(case, problem))
    leaves = type(inputs)(*(x.clone().requires_grad_() for x in inputs))
    found = torch.autograd.grad(function.ttt(leaves, problem), leaves, cotangents)
    expected = best_mlp.backward(cotangents, best_mlp.forward(inputs, problem)[1], problem)
    report = torch.library.opcheck(function._forward, (list(leaves), "mlp", *function._setting(problem)))
    return all(map(torch.equal, found, expected)), set(report.values())


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])  # of two pages
def test_the_function_is_one_operator_to_pytorch(worker, dtype):
    assert worker.call(operator, dtype, timeout=250.0) == (True, {"SUCCESS"})


def equal_for_all_groups() -> list[str]:
    """The tensors whose bits depend on how many mini-batches share a saved state."""
    import torch

    from implementations.triton import ttt_mlp
    from spec.cases import draw

    case = replace(BASE, tokens=24, mini_batch=8)
    problem = case.problem("mlp", "fp32")
    inputs, cotangents = (type(x)(*map(torch.from_numpy, x)) for x in draw(case, problem))
    found = []
    for group in (1, 2, 5):
        outputs, residuals = ttt_mlp.forward(inputs, problem, group)
        bytes_saved = residuals.states.nbytes / (problem.batch * problem.heads * problem.tokens)
        assert bytes_saved == ttt_mlp.saved_bytes(problem, group)
        gradients = ttt_mlp.backward(cotangents, residuals, problem)
        found.append(outputs._asdict() | {f"d_{name}": x for name, x in gradients._asdict().items()})
    return [name for name, x in found[0].items() if any(not torch.equal(x, other[name]) for other in found[1:])]


def test_the_group_changes_no_bit(worker):
    assert worker.call(equal_for_all_groups, timeout=250.0) == []


def refusal(what: str) -> str:
    """The message of the ValueError for inputs that are wrong in this way."""
    import torch

    from implementations.triton import ttt_mlp
    from spec.cases import draw

    case = replace(BASE, tokens=16)
    problem = case.problem("mlp", "fp32")
    inputs, cotangents = (type(x)(*map(torch.from_numpy, x)) for x in draw(case, problem))
    if what == "meta":
        inputs = inputs._replace(xv=inputs.xv.to("meta"))
    elif what == "columns":
        inputs = inputs._replace(xk=inputs.xk.transpose(1, 3).contiguous().transpose(1, 3))
    elif what == "w1":
        inputs = inputs._replace(w1=inputs.w1.mT.contiguous().mT)
    elif what == "dtype":
        inputs = inputs._replace(xq=inputs.xq.bfloat16())
    try:
        if what == "cotangent":
            _, residuals = ttt_mlp.forward(inputs, problem)
            ttt_mlp.backward(cotangents._replace(final_b1=torch.ones(1, 1, 1).expand(1, 1, 64)), residuals, problem)
        else:
            ttt_mlp.forward(inputs, problem, 0 if what == "group" else None)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    "what, message",
    [
        ("meta", "xv: expected a tensor on cpu, got one on meta"),
        ("columns", "xk: expected stride 1 in D, got strides (256, 1, 16, 16); call .contiguous()"),
        ("w1", "w1: expected contiguous memory, got strides (1024, 1024, 1, 16); call .contiguous()"),
        ("dtype", "xq: expected float32, got bfloat16"),
        ("group", "group: expected a positive number of mini-batches, got 0"),
        ("cotangent", "final_b1: expected contiguous memory, got strides (1, 1, 0); call .contiguous()"),
    ],
)
def test_what_it_refuses(worker, what, message):
    assert worker.call(refusal, what, timeout=60.0) == message


def forward_here():
    import torch

    from implementations.triton import ttt_mlp
    from spec.cases import draw

    problem = BASE.problem("mlp", "fp32")
    inputs, _ = draw(BASE, problem)
    ttt_mlp.forward(type(inputs)(*map(torch.from_numpy, inputs)), problem)


def test_without_the_interpreter_a_cpu_tensor_is_refused():
    process = Worker(CPU_ENVIRONMENT | {"TRITON_INTERPRET": "0"})
    try:
        with pytest.raises(Failure, match=r"xq: expected a CUDA tensor, got one on cpu; move it with \.cuda\(\)"):
            process.call(forward_here, timeout=60.0)
    finally:
        process.close()


def test_what_the_static_report_compiles():
    """Compiled for one architecture; the others are the static report's, which takes minutes."""
    common = {"implementation": ENTRY.key, "source_hash": "", "git_sha": ""}
    (kernel,) = [each for each in ENTRY.static_kernels() if each.constexprs["M"] == 16 and "forward" in each.name]
    row = static._of_kernel(common, kernel, "sm_90")
    assert row.status == "ok" and row.undeclared_spill_bytes == 0 and row.tensor_instructions, row.reason


@pytest.mark.parametrize(
    "sizes, reason",
    [
        ((16, 64, 16), None),
        ((24, 64, 16), "head_dim: expected a multiple of 16 up to 128, got 24"),
        ((256, 64, 16), "head_dim: expected a multiple of 16 up to 128, got 256"),
        ((64, 256, 256), "mini_batch: expected at most 128, got 256"),
    ],
)
def test_what_it_supports(sizes, reason):
    head_dim, tokens, mini_batch = sizes
    assert supports(Problem("mlp", 1, tokens, 1, head_dim, mini_batch)) == reason


@pytest.mark.parametrize(
    "sizes, fits",
    [
        ({"head_dim": 64, "mini_batch": 64}, True),
        ({"head_dim": 64, "mini_batch": 128}, False),
        ({"head_dim": 96, "mini_batch": 32}, True),
        ({"head_dim": 96, "mini_batch": 64}, False),
        ({"head_dim": 96, "mini_batch": 64, "matmul_precision": "tf32"}, True),
        ({"head_dim": 96, "mini_batch": 128, "dtype": "bf16"}, False),
        ({"head_dim": 64, "mini_batch": 128, "dtype": "bf16"}, True),
    ],
    ids=str,
)
def test_what_fits_in_shared_memory(sizes, fits):
    reason = supports(Problem(**{"inner_model": "mlp", "batch": 1, "tokens": 128, "heads": 1} | sizes))
    assert (reason is None) == fits
    assert fits or f"mini_batch: {sizes['mini_batch']} with head_dim {sizes['head_dim']} in" in reason


def test_what_ptxas_12_8_assembles_wrongly_is_assembled_by_a_newer_one():
    from implementations.triton.launch import assembled

    assert not newer_ptxas(Problem("mlp", 1, 64, 1, 64, 64, dtype="bf16"))
    assert not newer_ptxas(Problem("mlp", 1, 64, 1, 128, 16))
    assert newer_ptxas(Problem("mlp", 1, 64, 1, 32, 32, dtype="bf16"))
    nvidia = triton.knobs.nvidia
    before = nvidia.ptxas.path
    with assembled(False):
        assert nvidia.ptxas.path == before
    with assembled(True):
        assert nvidia.ptxas.path == nvidia.ptxas_blackwell.path != before
    assert nvidia.ptxas.path == before


@pytest.mark.parametrize("matmul_precision", ["ieee", "tf32"])
def test_operands_of_tf32_are_rounded_to_nearest(worker, matmul_precision, tmp_path):
    """A GPU would cut them off; the interpreter's product takes all bits, so a rounding shows."""
    case, problem = BASE, BASE.problem("mlp", "fp32", matmul_precision)
    worker.call(jobs.save_truth, case, problem, 0, "cpu", tmp_path, timeout=250.0)
    checks = worker.call(jobs.check, replace(ENTRY, pages={"mlp": PAGE}), case, problem, "cpu", tmp_path, timeout=250.0)
    (out,) = (check for check in checks if check.tensor == "out")
    assert (1e-5 < out.rms_error < 1e-3) if matmul_precision == "tf32" else out.rms_error < 1e-5
