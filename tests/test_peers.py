"""Peers: what each maps onto the spec, what it says of the rest, and what it computes where that needs no GPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness import check, jobs, rule
from harness.frameworks import open_framework
from harness.grid import load
from harness.one_lr import with_one_lr
from harness.worker import classify
from implementations import registry
from implementations.registry import Implementation, implementations, select
from spec.cases import CASES, Case, draw
from spec.problem import Problem

LINEAR = Problem("linear", 1, 64, 1, 64, 16, dtype="bf16")
MLP = replace(LINEAR, inner_model="mlp", causal=False, mini_batch=64)
ONE_LR = with_one_lr(CASES["lm-1.3b-small"]).problem("linear", "bf16")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def installed(monkeypatch):
    """Pretend that these packages are installed in these versions, and no others."""

    def installed(**versions: str):
        def version(name):
            if name.replace("-", "_") not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name.replace("-", "_")]

        monkeypatch.setattr(registry, "version", version)

    return installed


@pytest.mark.parametrize(
    "key, problem, reason",
    [
        ("peer.fla_chunk", ONE_LR, None),
        ("peer.fla_fused_chunk", LINEAR, "where a mini-batch has one lr"),
        ("peer.fla_chunk", replace(ONE_LR, causal=False), "is causal"),
        ("peer.fla_chunk", replace(ONE_LR, head_dim=256), "no head_dim above 128"),
        ("peer.fla_chunk", replace(ONE_LR, mini_batch=8), "chunks of 16 or a larger power of two"),
        ("peer.fla_chunk", replace(ONE_LR, inner_model="mlp"), "has no mlp inner model"),
        ("peer.fla_chunk", replace(ONE_LR, dtype="fp64"), "has no fp64"),
        ("peer.ttt_tk", MLP, None),
        ("peer.ttt_tk", replace(MLP, causal=True), "is not causal"),
        ("peer.ttt_tk", replace(MLP, mini_batch=16), "head_dim 64 and mini_batch 64 only"),
        ("peer.ttt_tk", replace(MLP, eps=1e-5), "eps 1e-6"),
        ("peer.ttt_tk", replace(MLP, dtype="fp16"), "has no fp16"),
        ("peer.ttt_lm_jax", LINEAR, None),
        ("peer.ttt_lm_torch", MLP, "the official formulations are causal"),
        ("peer.ttt_lm_torch_compile", MLP, "the official formulations are causal"),
    ],
)
def test_where_dialects_part_there_is_a_reason(installed, key, problem, reason):
    installed(fla_core="0.6.0", test_time_training="0.9.0")
    found = implementations()[key].unsupported(problem, "cuda")
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    "key, problem, command",
    [
        ("peer.fla_chunk", ONE_LR, "fla-core is not installed: pip install 'fla-core==0.6.0'"),
        ("peer.ttt_tk", MLP, "test-time-training is not installed: pip install 'test-time-training==0.9.0'"),
    ],
)
def test_what_is_not_installed_says_how_to_get_it(installed, key, problem, command):
    installed()
    assert implementations()[key].unsupported(problem, "cuda") == command
    assert implementations()[key].versions() == ""


def test_another_version_than_tested_is_run_and_labelled(installed):
    entry = implementations()["peer.fla_chunk"]
    installed(fla_core="0.6.0")
    assert entry.versions() == "fla-core==0.6.0"
    tested = entry.source_hash()
    installed(fla_core="0.7.1")
    assert entry.unsupported(ONE_LR, "cuda") is None
    assert entry.versions() == "fla-core==0.7.1 (tested: 0.6.0)"
    assert entry.source_hash() != tested  # its rows are not those of the other version


def test_the_extra_has_the_tested_versions():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for entry in select(["peer"]):
        for name, version in entry.tested.items():
            assert f'"{name}=={version}' in text


@pytest.mark.parametrize("grid", ["parity", "default", "bench", "gpu", "gpu-scaling"])
def test_no_grid_runs_peers_unasked(grid):
    assert not [cell for cell in load(grid, {}) if cell.entry.key.startswith("peer.")]
    assert len(load(grid, {"implementations": ["peer"]})) > 0


def test_the_grids_of_peers_have_all_of_them():
    for grid in ("peers", "peers-gpu"):
        keys = {cell.entry.key for cell in load(grid, {})}
        assert {entry.key for entry in select(["peer"])} <= keys
    ours, all_of_them, checked = (
        {(cell.entry.key, cell.case.name, cell.problem, name) for cell in load(grid, {}) for name in cell.passes}
        for grid in ("gpu", "peers-gpu", "parity-gpu")
    )
    assert ours < all_of_them < checked


def test_a_page_that_finds_the_wrong_gpu_is_unsupported():
    assert classify(NotImplementedError("for Hopper alone")) == ("unsupported", "for Hopper alone")


# --- One lr for each mini-batch ---


def test_one_lr_is_the_same_in_a_mini_batch_and_else_what_it_was():
    case = CASES["lm-1.3b-small"]
    with_one = with_one_lr(case)
    problem = with_one.problem("linear", "bf16")
    assert problem.one_lr and problem.tokens == case.tokens
    lr = draw(with_one, problem)[0].lr.astype(np.float32).reshape(2, 4, 16, 4)
    assert (lr == lr[:, :, :1]).all() and len(np.unique(lr)) > 8
    assert {cell.case.name for cell in load("peers", {"cases": ["size-d16:one-lr"]})} == {"size-d16:one-lr"}


def judged(page, case: Case, problem: Problem, framework: str, tmp_path: Path) -> dict[str, float]:
    """The error of every tensor over what is allowed."""
    jobs.save_truth(case, problem, 0, "cpu", tmp_path)
    drawn, truth = jobs.load_drawn(problem, tmp_path), jobs.load_truth(problem, tmp_path)

    def examined(page, framework):
        found = check.examine(page, problem, ("backward",), drawn, open_framework(framework, "cpu"), truth)
        assert not [one.fault for one in found if one.fault]
        return {one.tensor: one for one in found}

    yardstick = examined(implementations()["torch.eager"].page(problem), "torch")
    found = examined(page, framework)
    return {name: rule.judge(one, yardstick[name], case, problem).error_ratio for name, one in found.items()}


def test_with_one_lr_only_the_sum_of_its_gradient_counts(tmp_path):
    from implementations.torch import ttt_linear

    class Shared:
        forward = staticmethod(ttt_linear.forward)

        @staticmethod
        def backward(cotangents, residuals, problem):
            found = ttt_linear.backward(cotangents, residuals, problem)
            cut = found.lr.unflatten(1, (problem.mini_batches, problem.mini_batch))
            return found._replace(lr=cut.mean(2, keepdim=True).expand_as(cut).flatten(1, 2))

    one = with_one_lr(CASES["size-d16"])
    assert judged(Shared, one, one.problem("linear", "fp32"), "torch", tmp_path)["d_lr"] <= 1
    plain = CASES["size-d16"]
    assert judged(Shared, plain, plain.problem("linear", "fp32"), "torch", tmp_path)["d_lr"] > 100


# --- The official formulations ---


@pytest.mark.parametrize("inner_model", ["linear", "mlp"])
@pytest.mark.parametrize("key", ["peer.ttt_lm_torch", "peer.ttt_lm_jax"])
def test_the_official_formulations_are_right_in_fp32_and_bf16(key, inner_model, tmp_path):
    entry = implementations()[key]
    for dtype in ("fp32", "bf16"):
        problem = CASES["size-d16"].problem(inner_model, dtype)
        ratios = judged(entry.page(problem), CASES["size-d16"], problem, entry.framework, tmp_path)
        assert len(ratios) == (12 if inner_model == "linear" else 16)
        assert max(ratios.values()) <= 1, ratios


@pytest.mark.parametrize("key", ["peer.ttt_lm_torch", "peer.ttt_lm_jax"])
def test_their_truncated_gelu_shows_in_fp64_and_is_not_repaired(key, tmp_path):
    entry = implementations()[key]
    problem = CASES["size-d16"].problem("mlp", "fp64")
    ratios = judged(entry.page(problem), CASES["size-d16"], problem, entry.framework, tmp_path)
    assert ratios["final_b1"] > 1e3
    linear = replace(problem, inner_model="linear")
    assert max(judged(entry.page(linear), CASES["size-d16"], linear, entry.framework, tmp_path).values()) <= 1


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_the_compiled_one_takes_another_size_in_the_same_process(tmp_path):
    entry = implementations()["peer.ttt_lm_torch_compile"]
    for case in (CASES["size-d16"], replace(CASES["size-d16"], batch=1, tokens=48, heads=3)):
        problem = case.problem("linear", "fp32")
        assert max(judged(entry.page(problem), case, problem, entry.framework, tmp_path).values()) <= 1


# --- flash-linear-attention, its Triton kernels interpreted ---

INTERPRETED = """
import json, sys
import triton.runtime.autotuner
triton.runtime.autotuner.Autotuner._bench = lambda self, *args, config=None, **kwargs: [1.0, 1.0, 1.0]
from pathlib import Path
from harness.one_lr import with_one_lr
from implementations.registry import implementations
from spec.cases import CASES
from tests.test_peers import judged
from dataclasses import replace
case = with_one_lr(replace(CASES["size-d16"], batch=1, tokens=32))
problem = case.problem("linear", "fp32")
print(json.dumps(judged(implementations()[sys.argv[1]].page(problem), case, problem, "torch", Path(sys.argv[2]))))
"""


@pytest.mark.skipif(not importlib.util.find_spec("fla"), reason="needs fla-core")
@pytest.mark.parametrize("key", ["peer.fla_chunk", "peer.fla_fused_chunk"])
def test_fla_is_this_operation_where_a_mini_batch_has_one_lr(key, tmp_path):
    installed = Path(importlib.util.find_spec("fla").origin).parent
    shutil.copytree(installed, tmp_path / "fla")
    for file in (tmp_path / "fla" / "ops" / "ttt").glob("*.py"):  # under the interpreter it is a Python integer
        file.write_text(file.read_text().replace("i_t_int64 = i_t.to(tl.int64)", "i_t_int64 = i_t"))
    truth = tmp_path / "truth"
    truth.mkdir()
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(installed.parent)])
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, key, str(truth)],
        env=os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ratios = json.loads(done.stdout.splitlines()[-1])
    assert len(ratios) == 12 and max(ratios.values()) <= 1, ratios


def test_an_unregistered_one_can_be_labelled_too(installed):
    installed(mine="2")
    entry = Implementation("mine.fast", "torch", {"linear": "some.page"}, tested={"mine": "1"})
    assert entry.versions() == "mine==2 (tested: 1)"


# --- ttt-tk, whose kernels need a Hopper: the mapping alone, on a stand-in with its signatures ---


def ttt_tk_stand_in():
    """A module with ttt-tk's two functions, computed by this lab's page in fp32."""
    from types import SimpleNamespace

    import torch

    from implementations.torch import ttt_mlp
    from spec.tensors import MlpInputs, MlpOutputs

    def solve(xq, xk, xv, last_eta, weight, bias, state):
        assert all(x.is_contiguous() for x in (xq, xk, xv, last_eta, weight, bias, *state))
        assert last_eta.dtype == torch.bfloat16 and weight.shape == (1, xq.shape[1], 1, 64)
        batch, heads, n, m, dim = xq.shape
        views = [x.movedim(1, 3).flatten(1, 2).float() for x in (xq, xk, xv, last_eta)]
        rows = weight[0, :, 0], bias[0, :, 0]
        inputs = MlpInputs(*views[:3], views[3][..., 0], torch.ones(m), *rows, *(x.squeeze(2) for x in state))
        problem = Problem("mlp", batch, n * m, heads, dim, m, causal=False)
        return inputs, problem, ttt_mlp.forward(inputs, problem)

    def ttt_forward(xq, xk, xv, last_eta, weight, bias, w1, b1, w2, b2, *rest):
        *checkpoints, out, group = rest
        _, problem, (outputs, residuals) = solve(xq, xk, xv, last_eta, weight, bias, (w1, b1, w2, b2))
        out.copy_(outputs.out.unflatten(1, (problem.mini_batches, 64)).movedim(3, 1))
        assert checkpoints[0].shape[2] == -(-problem.mini_batches // group)
        for number, state in enumerate(residuals.states[::group]):
            for kept, x in zip(checkpoints, state, strict=True):
                kept[:, :, number] = x

    def ttt_backward(xq, xk, xv, last_eta, weight, bias, *rest):
        checkpoints, rest = rest[:4], rest[5 + 16 :]  # the output, and 16 buffers
        assert checkpoints[0].shape[2] * rest[-1] == xq.shape[2]
        state = [x[:, :, 0].contiguous() for x in checkpoints]
        inputs, problem, (_, residuals) = solve(xq, xk, xv, last_eta, weight, bias, state)
        cotangents = MlpOutputs(
            rest[4].movedim(1, 3).flatten(1, 2).float(), *(x.squeeze(2) if x.shape[2] == 1 else x for x in rest[:4])
        )
        d = ttt_mlp.backward(cotangents, residuals, problem)

        def split(x):
            return x.unflatten(1, (problem.mini_batches, 64)).movedim(3, 1)

        found = d.ln_weight[:, None], d.ln_bias[:, None], d.w1, d.b1, d.w2, d.b2
        found += split(d.lr.unsqueeze(-1)), split(d.xq), split(d.xk), split(d.xv)
        for number, (target, x) in enumerate(zip(rest[5:-1], found, strict=True)):
            if number < 2:  # a row for each of the batch
                target[0] = x
            else:
                target.copy_(x.view_as(target))
        assert len(inputs) == 11

    return SimpleNamespace(ttt_forward=ttt_forward, ttt_backward=ttt_backward)


@pytest.mark.parametrize("name", ["video-5b-small", "a batch of 2, 3 mini-batches"])
def test_what_ttt_tk_takes_and_gives_is_mapped_both_ways(name, monkeypatch, tmp_path):
    import torch

    monkeypatch.setitem(sys.modules, "test_time_training", ttt_tk_stand_in())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delitem(sys.modules, "implementations.peers.ttt_tk", raising=False)
    entry = implementations()["peer.ttt_tk"]
    case = CASES.get(name) or replace(CASES["video-5b-small"], name=name, batch=2, tokens=192)
    problem = case.problem("mlp", "bf16")
    page = entry.page(problem)
    monkeypatch.delitem(sys.modules, "implementations.peers.ttt_tk")
    ratios = judged(page, case, problem, "torch", tmp_path)
    assert len(ratios) == 16
    assert max(ratios.values()) <= 1.5, ratios  # its bf16 eta is the peer's own; a wrong mapping costs a hundred
