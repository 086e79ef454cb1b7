"""The numba pages in numba's simulator: every tensor held to the oracle by the rule, and what they refuse.

The simulator wants its environment variable before numba is imported, so all of it happens in workers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import jobs, rule
from harness.parity import CPU_ENVIRONMENT
from harness.worker import Failure, Worker
from implementations import cuda
from implementations.registry import implementations
from spec.cases import CASES, Case
from spec.problem import INNER_MODELS, Problem

ENTRY = implementations()["cuda.numba"]
TINY = replace(CASES["size-d16"], batch=1, tokens=16, heads=2, head_dim=8, mini_batch=8)
TALL = replace(TINY, tokens=32, heads=1, mini_batch=16)  # M > D, and strided
STEEP = replace(TINY, tokens=24, heads=1, head_dim=12)  # three mini-batches; D is no multiple of the rows of threads

reason = ENTRY.unsupported(TINY.problem("linear", "fp32"), "cpu")
runs = pytest.mark.skipif(reason is not None, reason=str(reason))


@pytest.fixture(scope="module")
def worker():
    process = Worker(CPU_ENVIRONMENT)
    yield process
    process.close()


@runs
@pytest.mark.parametrize("inner_model", INNER_MODELS)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (TINY, "fp32"),
        (replace(TINY, causal=False), "fp32"),
        (replace(TALL, strided=True), "bf16"),
        (replace(STEEP, causal=False), "fp16"),
    ],
    ids=["fp32-causal", "fp32-not-causal", "bf16-strided-M>D", "fp16-not-causal-D12"],
)
def test_every_tensor_is_right_by_the_rule_and_repeats(worker, tmp_path, inner_model, case, dtype):
    problem = case.problem(inner_model, dtype)
    jobs.save_truth(case, problem, 0, "cpu", tmp_path)
    measured = _check(worker, ENTRY, case, problem, tmp_path)
    yardstick = _check(worker, implementations()[rule.YARDSTICK], case, problem, tmp_path)
    verdicts = [rule.judge(*checks, case, problem) for checks in zip(measured, yardstick, strict=True)]
    assert [verdict.reason for verdict in verdicts] == [None] * len(verdicts)


def _check(worker: Worker, entry: Any, case: Case, problem: Problem, folder: Path) -> Any:
    return worker.call(jobs.check, entry, case, problem, "cpu", folder, timeout=120.0)


@runs
@pytest.mark.parametrize("inner_model", INNER_MODELS)
def test_how_often_states_are_kept_and_where_tiles_are_changes_no_bit(worker, inner_model):
    assert worker.call(_variants, inner_model, timeout=120.0) == []


def _variants(inner_model: str) -> list[str]:
    """Which ways of running three mini-batches differ from the usual one."""
    import numpy as np
    import torch

    from implementations.cuda import numba_scan
    from spec.cases import draw

    page, problem = ENTRY.page(STEEP.problem(inner_model, "fp32")), STEEP.problem(inner_model, "fp32")
    inputs, cotangents = (type(x)(*map(torch.from_numpy, map(np.copy, x))) for x in draw(STEEP, problem))

    def run(every: int) -> tuple[Any, ...]:
        outputs, residuals = page.forward(inputs, problem, every)
        assert residuals.kept[0].shape[0] == -(-3 // every)
        return *outputs, *page.backward(cotangents, residuals, problem)

    usual = run(3)
    different = [f"every {every}" for every in (1, 2) if not all(map(torch.equal, run(every), usual))]
    for tiles in (4, 0):
        page._kernels.cache_clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(numba_scan, "SHARED_BYTES", tiles * 4 * 8 * 13)  # a tile is [M, D + 1]
            different += [f"{tiles} tiles in shared memory"] * (not all(map(torch.equal, run(3), usual)))
    page._kernels.cache_clear()
    return different


@runs
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xk": "x[:, :8]"}, "ValueError: xk: expected (B, T, H, D) = (1, 16, 2, 8), got (1, 8, 2, 8)"),
        ({"lr": "x.double()"}, "ValueError: lr: expected float32, got float64"),
        ({"w1": "x.to('meta')"}, "ValueError: w1: expected a tensor on cpu, got one on meta"),
    ],
    ids=["shape", "dtype", "device"],
)
def test_wrong_inputs_are_named(worker, change, message):
    with pytest.raises(Failure) as failure:
        worker.call(_forward, change, timeout=60.0)
    assert str(failure.value) == message


@runs
def test_cpu_tensors_need_the_simulator():
    plain = Worker({"NUMBA_ENABLE_CUDASIM": "0"})
    with pytest.raises(Failure, match=r"^ValueError: xq: .* where NUMBA_ENABLE_CUDASIM=1 was set .* on cpu$"):
        plain.call(_forward, {}, timeout=60.0)
    plain.close()


def _forward(change: dict[str, str]) -> None:
    import torch

    from spec.cases import draw

    problem = TINY.problem("linear", "fp32")
    inputs = draw(TINY, problem)[0]
    given = type(inputs)(*map(torch.from_numpy, inputs))
    ENTRY.page(problem).forward(
        given._replace(**{name: eval(text, {"x": getattr(given, name)}) for name, text in change.items()}), problem
    )


@pytest.mark.parametrize(
    ("versions", "reason"),
    [
        ("0.30.0 0.68.1 2.4.6", "numba-cuda 0.30.0 does not import beside numba 0.68.1: it takes numba-cuda 0.30.4"),
        (
            "0.30.4 0.68.1 2.5.2",
            "numba-cuda 0.30.4 does not import beside NumPy 2.5.2, which has no row_stack: it takes numpy<2.5",
        ),
        ("0.30.0 0.67.0 2.4.6", None),
        ("0.30.4 0.68.1 2.4.6", None),
        ("0.31.0 0.68.1 2.5.0rc1", None),
    ],
)
def test_packages_that_do_not_import_together_are_a_reason(monkeypatch, versions, reason):
    installed = dict(zip(("numba-cuda", "numba", "numpy"), versions.split(), strict=True))
    monkeypatch.setattr(cuda, "version", installed.__getitem__)
    assert ENTRY.supports(TINY.problem("linear", "fp32")) == reason


@runs
def test_limits_of_the_simulator_are_no_limits_of_a_gpu():
    large = CASES["lm-1.3b"].problem("mlp", "bf16")
    assert ENTRY.unsupported(large, "cpu") == "the simulator takes minutes at this size"
    assert ENTRY.unsupported(large, "cuda") is None
    tf32 = TINY.problem("linear", "fp32", "tf32")
    assert ENTRY.unsupported(tf32, "cuda") == "plain fp32 arithmetic: no tensor cores, and so no tf32"
    assert ENTRY.timed_on == ("cuda",)
