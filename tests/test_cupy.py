"""The CUDA C++ pages in the emulator: every tensor held to the oracle by the rule, and what they refuse."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import jobs, rule
from implementations.cuda import cupy_plain, dispatch, emulator, module
from implementations.cuda.emulator import EmulatorError
from implementations.kernels import CudaKernel
from implementations.registry import Implementation, implementations
from spec.cases import CASES, Case, draw
from spec.problem import INNER_MODELS, Dtype, InnerModel, Problem

emulated = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))
ENTRIES = [entry for key, entry in implementations().items() if key.startswith("cuda.cupy")]
PLAIN = implementations()["cuda.cupy_plain"]
TINY = replace(CASES["size-d16"], batch=1, tokens=24, heads=2, mini_batch=8)  # three mini-batches
LOADED = "        load_bias<D>(s.b, from.b, keep.b);\n"
KERNELS = Path(cupy_plain.__file__).parent / "kernels"


def verdicts(entry: Implementation, case: Case, problem: Problem, folder: Path) -> dict[str, str]:
    """What the rule has against each tensor."""
    jobs.save_truth(case, problem, 0, "cpu", folder)
    checks = (jobs.check(each, case, problem, "cpu", folder) for each in (entry, implementations()[rule.YARDSTICK]))
    judged = ((check.tensor, rule.judge(check, beside, case, problem)) for check, beside in zip(*checks, strict=True))
    return {tensor: verdict.reason for tensor, verdict in judged if verdict.reason}


@emulated
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.key)
@pytest.mark.parametrize("inner_model", INNER_MODELS)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (replace(TINY, batch=2), "fp32"),
        (replace(TINY, causal=False, mini_batch=16, tokens=32), "bf16"),
        (replace(TINY, strided=True, mini_batch=16, tokens=80, heads=1), "fp16"),
    ],
    ids=["fp32-causal", "bf16-not-causal", "fp16-strided"],
)
def test_every_tensor_is_right_by_the_rule(
    entry: Implementation, inner_model: InnerModel, case: Case, dtype: Dtype, tmp_path: Path
) -> None:
    problem = case.problem(inner_model, dtype)
    if reason := entry.unsupported(problem, "cpu"):
        pytest.skip(reason)
    assert verdicts(entry, case, problem, tmp_path) == {}


def run(page: Any, case: Case, problem: Problem, **how: Any) -> list[torch.Tensor]:
    """Outputs and gradients."""
    inputs, cotangents = (type(x)(*map(_tensor, x)) for x in draw(case, problem))
    outputs, residuals = page.forward(inputs, problem, **how)
    return [*outputs, *page.backward(cotangents, residuals, problem)]


def _tensor(x: Any) -> torch.Tensor:
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(x)


@emulated
@pytest.mark.parametrize("inner_model", INNER_MODELS)
def test_neither_kept_states_nor_the_order_of_threads_nor_where_tiles_are_change_a_bit(
    inner_model: InnerModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = TINY.problem(inner_model, "fp32")
    page = PLAIN.page(problem)
    usual = run(page, TINY, problem)
    for group in (2, 3):
        assert all(map(torch.equal, run(page, TINY, problem, group=group), usual))
    genuine = emulator.run
    monkeypatch.setattr(emulator, "run", lambda kernel, grid, values: genuine(kernel, grid, values, order=1))
    assert all(map(torch.equal, run(page, TINY, problem), usual))
    monkeypatch.setattr(emulator, "run", genuine)
    monkeypatch.setattr(cupy_plain, "shared_bytes", lambda device: 4000)
    assert all(map(torch.equal, run(page, TINY, problem), usual))


@emulated
@pytest.mark.parametrize(
    ("inner_model", "old", "new", "shows_in"),
    [
        ("linear", "s.z(i, j) = x + s.b[j]", "s.z(i, j) = x", "out"),
        ("linear", "j <= i || !CAUSAL", "j < i || !CAUSAL", "out"),
        ("linear", "along_d_g * gamma[d] * e)", "along_d_g * e)", "d_w1"),  # in plain.cuh
        ("linear", "d_first.b[j] += sum_and_round", "sum_and_round", "d_b1"),
        ("mlp", "z1_bar(i, j) = d_g1 * u(i, j) * gelu_second(s.z1(i, j))", "z1_bar(i, j) = 0", "d_xk"),
        ("mlp", "part.template add<M>(transpose(d_u), s.g2);", "", "d_w2"),
        ("linear", LOADED + "        sync();\n", LOADED, ""),
        ("linear", LOADED, LOADED + "if (threadIdx.x < 64) sync();\n", "deadlock"),
    ],
    ids=["no bias", "strict mask", "second order", "d_b1", "gelu''", "g_z1's w2", "no barrier", "half a barrier"],
)  # fmt: skip
def test_a_planted_fault_is_caught(
    inner_model: InnerModel, old: str, new: str, shows_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kernels"
    shutil.copytree(KERNELS, folder)
    places = [path for path in folder.glob("plain*") if path.name in ("plain.cuh", f"plain_{inner_model}.cu")]
    (place,) = (path for path in places if old in path.read_text())
    place.write_text(place.read_text().replace(old, new))
    genuine = cupy_plain.Page.kernel

    def planted(page: cupy_plain.Page, *arguments: Any) -> CudaKernel:
        kernel = genuine(page, *arguments)
        return replace(kernel, source=folder / kernel.source.name)

    monkeypatch.setattr(cupy_plain.Page, "kernel", planted)
    problem = TINY.problem(inner_model, "fp32")
    if shows_in == "deadlock":
        with pytest.raises(EmulatorError, match="waits forever at sync|where others wait for"):
            run(PLAIN.page(problem), TINY, problem)
        return
    wrong = verdicts(PLAIN, TINY, problem, tmp_path)
    assert shows_in in wrong if shows_in else wrong


# --- What is refused ---


def given(inner_model: InnerModel = "linear", dtype: Dtype = "fp32", **sizes: Any) -> tuple[Any, Any, Problem]:
    case = replace(TINY, **sizes)
    problem = case.problem(inner_model, dtype)
    inputs, cotangents = (type(x)(*map(_tensor, x)) for x in draw(case, problem))
    return inputs, cotangents, problem


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.key)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xk": lambda x: x[:, :8]}, r"xk: expected \(B, T, H, D\) = \(1, 24, 2, 16\), got \(1, 8, 2, 16\)"),
        ({"xk": lambda x: x.repeat(1, 1, 1, 2)[..., ::2]}, "xk: expected stride 1 along D, got strides .*contiguous"),
        ({"w1": lambda x: x.mT}, "w1: expected a contiguous tensor, got strides .*contiguous"),
        ({"xv": torch.Tensor.bfloat16}, "xv: expected float32, got bfloat16"),
        ({"b1": torch.Tensor.half}, "b1: expected float32, got float16"),
        ({"lr": lambda x: x.to("meta")}, "lr: expected a tensor on cpu, as the others, got meta"),
    ],
    ids=["shape", "stride", "transposed", "dtype", "state dtype", "device"],
)
def test_wrong_inputs_are_named(
    entry: Implementation, change: dict[str, Callable[[torch.Tensor], torch.Tensor]], message: str
) -> None:
    inputs, _, problem = given()
    if reason := entry.unsupported(problem, "cpu"):
        pytest.skip(reason)
    changed = inputs._replace(**{name: make(getattr(inputs, name)) for name, make in change.items()})
    with pytest.raises(ValueError, match=message):
        entry.page(problem).forward(changed, problem)


@emulated
def test_wrong_cotangents_and_groups_are_named() -> None:
    inputs, cotangents, problem = given()
    page = PLAIN.page(problem)
    with pytest.raises(ValueError, match="group: expected at least 1 mini-batch, got 0"):
        page.forward(inputs, problem, group=0)
    _, residuals = page.forward(inputs, problem)
    with pytest.raises(ValueError, match="out: expected stride 1 along D, got strides \\(0, 0, 0, 0\\)"):
        page.backward(cotangents._replace(out=cotangents.out.sum().expand_as(cotangents.out)), residuals, problem)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"head_dim": 192}, "head_dim: expected a multiple of 16 up to 128, got 192: use torch.eager"),
        ({"head_dim": 24}, "head_dim: expected a multiple of 16 up to 128, got 24: use torch.eager"),
        ({"mini_batch": 4}, "mini_batch: expected a multiple of 8 up to 128, got 4: use torch.eager"),
        ({"dtype": "fp64"}, "has no fp64"),
        ({"matmul_precision": "tf32"}, "plain fp32 arithmetic: no tensor cores, and so no tf32"),
        ({"tokens": 2**20}, "the emulator takes minutes at this size"),
        ({}, None),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_solved_says_why(sizes: dict[str, Any], reason: str | None) -> None:
    problem = replace(TINY.problem("linear", "fp32"), **sizes)
    if reason is None and emulator.missing():
        pytest.skip("no g++")
    assert PLAIN.unsupported(problem, "cpu") == reason


def test_a_machine_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _, problem = given()
    monkeypatch.setenv("PATH", "")
    assert "g++ is not installed" in (PLAIN.unsupported(problem, "cpu") or "")
    with pytest.raises(NotImplementedError, match=r"no kernel runs on cpu: g\+\+ is not installed"):
        PLAIN.page(problem).forward(inputs, problem)


def test_a_machine_without_cuda_says_so_in_a_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    reason = module.fault()
    assert reason and "\n" not in reason
    assert "cupy is not installed" in reason or "no CUDA driver or device" in reason


@pytest.mark.parametrize(
    ("capability", "shared", "reason"),
    [
        ((7, 5), 64 << 10, "ttt::plain::linear_forward takes sm_80 or newer, and a card is sm_75"),
        ((8, 0), 8 << 10, "ttt::plain::linear_forward takes 30096 bytes of shared memory, and a block of a card has 8"),
        ((8, 6), 99 << 10, None),
    ],
    ids=["old", "small", "fits"],
)
def test_a_card_that_cannot_run_a_kernel(
    capability: tuple[int, int], shared: int, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Card:
        name = "a card"
        major, minor = capability
        shared_memory_per_block_optin = shared

    monkeypatch.setattr(module, "fault", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    problem = replace(TINY, head_dim=32, mini_batch=16, tokens=16).problem("linear", "bf16")
    kernel = PLAIN.page(problem).kernels(problem)[0]
    kernel = replace(kernel, dynamic_shared_bytes=30096)
    said = module.refusal(kernel, torch.device("cuda", 0))
    assert said is reason is None or (said or "").startswith(str(reason))


def test_the_first_rung_that_takes_a_problem_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = TINY.problem("linear", "fp32")
    plain = PLAIN.page(problem)

    def rung(limit: str | None, refusal: str | None) -> Any:
        made = type("Rung", (), {})()
        made.limit, made.kernels = lambda problem: limit, lambda problem: (refusal,)
        return made

    monkeypatch.setattr(dispatch, "refusal", lambda kernel, device: kernel if isinstance(kernel, str) else None)
    limited, unfit, fit = rung("too large", None), rung(None, "no room"), rung(None, None)
    choose = functools.partial(dispatch.first_that_takes, problem, torch.device("cpu"))
    assert choose((limited, unfit, fit, plain)) is fit
    assert choose((limited, unfit, plain)) is plain
    assert choose((limited, unfit)) is unfit


def test_a_launch_that_fails_names_kernel_and_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure")

    monkeypatch.setattr(module, "_launch_on_gpu", fail)
    problem = TINY.problem("linear", "bf16")
    kernel = PLAIN.page(problem).kernels(problem)[0]
    expected = r"ttt::plain::linear_forward <ttt::bf16, 16, 8, true>.* of Problem\(.*CUDA_ERROR_LAUNCH_FAILED"
    with pytest.raises(module.CudaError, match=expected):
        module.launch(kernel, 1, (), torch.device("cuda"), problem)


def test_cupy_takes_the_struct_by_value() -> None:
    """CuPy passes a NumPy array by value only if it has one item."""
    if module.fault() and "cupy is not installed" in str(module.fault()):
        pytest.skip(str(module.fault()))
    assert module.by_value(b"12345678" * 3).size == 1


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.key)
def test_kernels_of_the_report_are_those_that_are_launched(entry: Implementation) -> None:
    for kernel in entry.static_kernels():
        assert kernel.source.is_file()
