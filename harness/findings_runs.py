"""The reproductions behind `docs/findings.md`: each function measures one fault, and returns what it found by name.

Each imports what it needs itself and is printed on the page. `python -m harness.findings_runs NAME` runs one.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

Found = dict[str, Any]
RUNS: dict[str, Callable[[], Found]] = {}


def _run(function: Callable[[], Found]) -> Callable[[], Found]:
    RUNS[function.__name__.replace("_", "-")] = function
    return function


def versions(packages: Iterable[str]) -> str:
    """The installed ones of `packages`, as `name==version`."""
    found = []
    for name in packages:
        try:
            found.append(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return " ".join(found)


def worst(key: str, case: Any, inner_model: Any, dtype: Any, tensors: Iterable[str] = ()) -> Found:
    """The largest error of `bench.check` over what is allowed, and in which tensor; then of each of `tensors`."""
    from harness import bench

    rows = bench.check(key, case, inner_model=inner_model, dtype=dtype)
    if rows[0].status == "unsupported" or rows[0].error_ratio is None:
        raise ValueError(f"{key}: {rows[0].status}: {rows[0].reason}")
    row = max(rows, key=lambda row: row.error_ratio or 0)
    found: Found = {
        "worst tensor": row.tensor,
        "its RMS error, relative": row.rms_error,
        "RMS error of `torch.eager` in the same dtype": row.yardstick_rms_error,
        "worst error over the allowed one (1 is the limit)": row.error_ratio,
    }
    return found | {f"RMS error of {row.tensor}": row.rms_error for row in rows if row.tensor in tensors}


def _error(row: Any) -> float:
    """The RMS error of a row of `bench.check`; ValueError if it says why there is none."""
    if row.rms_error is None:
        raise ValueError(f"{row.implementation}: {row.status}: {row.reason}")
    return row.rms_error


# --- The official formulations ---


@_run
def official_gelu_torch() -> Found:
    """The official PyTorch step of TTT-MLP in float64."""
    return worst("peer.ttt_lm_torch", "lm-1.3b-small", "mlp", "fp64", tensors=("out",))


@_run
def official_gelu_jax() -> Found:
    """The official JAX step of TTT-MLP in float64."""
    return worst("peer.ttt_lm_jax", "lm-1.3b-small", "mlp", "fp64", tensors=("out",))


@_run
def official_jax_variance() -> Found:
    """Rows that vary little beside their mean, through flax's LayerNorm."""
    import jax.numpy as jnp
    import numpy as np

    from implementations.peers.ttt_lm_jax import layer_norm

    found = worst("peer.ttt_lm_jax", "stress-near-constant-rows", "linear", "fp32")
    one, zero = jnp.ones(64), jnp.zeros(64)
    for mean in (1.0, 10.0, 100.0):  # of one row with a standard deviation of 0.01, which the means do not change
        x = (mean + 0.01 * np.random.default_rng(0).standard_normal(64)).astype(np.float32)
        exact = x.astype(np.float64)
        exact = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-6)
        error = np.asarray(layer_norm(jnp.asarray(x), one, zero, 1e-6)) - exact
        found[f"error of LN(row) where mean / std = {mean / 0.01:g}"] = float(np.abs(error).max() / np.abs(exact).max())
    return found


@_run
def official_torch_half_model() -> Found:
    """A chain of 32 mini-batches, in a model that was moved to bf16."""
    import torch

    from implementations.peers import ttt_lm_torch
    from spec.cases import CASES, draw

    case = CASES["lm-1.3b-long-small"]
    problem = case.problem("linear", "bf16")
    drawn, _ = draw(case, problem)
    inputs = type(drawn)(*(torch.from_numpy(x.astype("float32")) for x in drawn))
    exact = ttt_lm_torch.run(ttt_lm_torch.linear_step, type(drawn)(*(x.double() for x in inputs)), problem)

    def state_rounded(*arguments: torch.Tensor) -> Any:
        out, state = ttt_lm_torch.linear_step(*arguments)
        return out, tuple(x.bfloat16().float() for x in state)

    def error(dtype: torch.dtype, step: Any = ttt_lm_torch.linear_step) -> float:
        model = type(drawn)(*(x.to(dtype) for x in inputs))  # as `model.to(dtype)` does: the fast weights too
        with torch.no_grad():
            final = ttt_lm_torch.run(step, model, problem).final_w1
        return float((final - exact.final_w1).norm() / (exact.final_w1 - inputs.w1).norm())

    return {
        "RMS error of what final_w1 gained, after 32 mini-batches, model in fp32": error(torch.float32),
        "the same, model in bf16": error(torch.bfloat16),
        "the same, model in fp32, its fast weights alone rounded to bf16": error(torch.float32, state_rounded),
    }


# --- flash-linear-attention ---


def _fla_inputs(tokens: int, dim: int = 16, device: str = "cpu", dtype: str = "float32") -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    views = {name: torch.randn(1, tokens, 1, dim) for name in "qkv"}
    views |= {"w": 1 + 0.1 * torch.randn(1, dim), "b": 0.1 * torch.randn(1, dim)}
    views["eta"] = torch.rand(1, tokens, 1, 1) / dim
    shapes = {"initial_state": (1, 1, dim, dim), "initial_state_bias": (1, 1, 1, dim)}
    state = {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}
    found = {name: x.to(device, getattr(torch, dtype)) for name, x in views.items()}
    return found | {name: x.to(device) for name, x in state.items()} | {"output_final_state": True, "scale": 1.0}


@_run
def fla_ragged_tail_reference() -> Found:
    """15 tokens in a chunk of 16, against the same 15 in a chunk of 15."""
    from fla.ops.ttt.naive import chunk_ttt_linear_ref

    inputs = _fla_inputs(tokens=15)
    _, padded_w, padded_b = chunk_ttt_linear_ref(**inputs, mini_batch_size=16)
    _, exact_w, exact_b = chunk_ttt_linear_ref(**inputs, mini_batch_size=15)  # the same chunk, and no padding
    update = exact_b - inputs["initial_state_bias"]
    return {
        "error of the final bias, relative to its update": float((padded_b - exact_b).norm() / update.norm()),
        "error of the final weights, relative": float((padded_w - exact_w).norm() / exact_w.norm()),
    }


@_run
def fla_ragged_tail_kernels() -> Found:
    """15 tokens in a chunk of 16, against the reference with a chunk of 15."""
    from fla.ops.ttt import chunk_ttt_linear, fused_chunk_ttt_linear
    from fla.ops.ttt.naive import chunk_ttt_linear_ref

    inputs = _fla_inputs(tokens=15, device="cuda")
    _, _, exact_b = chunk_ttt_linear_ref(**(inputs | {"q": inputs["q"].clone()}), mini_batch_size=15)
    update = exact_b - inputs["initial_state_bias"]
    found = {}
    for kernel in (chunk_ttt_linear, fused_chunk_ttt_linear):
        _, _, b = kernel(**inputs, chunk_size=16)
        found[f"error of {kernel.__name__}'s final bias, relative to its update"] = float(
            (b - exact_b).norm() / update.norm()
        )
    return found


@_run
def fla_reference_scales_its_input() -> Found:
    """The caller's q, before and after."""
    import torch
    from fla.ops.ttt.naive import chunk_ttt_linear_ref

    inputs = _fla_inputs(tokens=16) | {"scale": 0.25}
    before = inputs["q"].clone()
    chunk_ttt_linear_ref(**inputs, mini_batch_size=16)
    return {"q afterwards over q before, at scale 0.25": float(torch.median(inputs["q"] / before))}


@_run
def fla_continuous_integration() -> Found:
    """dv at the size of the first case of `test_chunk`, of numbers of that kind, and zeros in its place."""
    import os

    os.environ["FLA_CI_ENV"] = "1"  # its switch for continuous integration, read at import
    import torch
    from fla.ops.ttt.naive import chunk_ttt_linear_ref
    from fla.utils import assert_close

    torch.manual_seed(42)
    q, k, v, do = (torch.randn(1, 63, 1, 64) for _ in range(4))
    w, b, state, bias = (torch.randn(shape) for shape in ((1, 64), (1, 64), (1, 1, 64, 64), (1, 1, 1, 64)))
    eta, k = torch.randn(1, 63, 1, 1) * 5e-3, torch.nn.functional.normalize(k, dim=-1)
    v.requires_grad_()
    out, _, _ = chunk_ttt_linear_ref(
        q, k, v, w, b, eta, scale=1.0, mini_batch_size=16, initial_state=state, initial_state_bias=bias
    )
    (right,) = torch.autograd.grad(out, v, do)
    assert_close("dv", right, torch.zeros_like(right), 0.007)  # would raise, were it not a warning
    return {"relative error that a bar of 0.007 lets through": 1.0, "largest number in dv": float(right.abs().max())}


@_run
def fla_mixed_dtypes() -> Found:
    """bf16 views, fp32 LayerNorm parameters."""
    from fla.ops.ttt import chunk_ttt_linear

    inputs = _fla_inputs(tokens=32, device="cuda", dtype="bfloat16")
    inputs |= {name: inputs[name].float() for name in "wb"}
    inputs["q"].requires_grad_()
    inputs["k"].requires_grad_()
    out, _, _ = chunk_ttt_linear(**inputs)
    try:
        out.sum().backward()
    except Exception as error:
        return {"forward": "runs", "backward": f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:120]}"}
    return {"forward": "runs", "backward": "runs"}


@_run
def fla_tf32_backward() -> Found:
    """fp32 against the fp32 reference."""
    import torch
    from fla.ops.ttt import chunk_ttt_linear
    from fla.ops.ttt.naive import chunk_ttt_linear_ref

    found = {}
    inputs = _fla_inputs(tokens=256, dim=64, device="cuda")
    leaves = {name: inputs[name].requires_grad_() for name in "kv"}
    gradients = []
    for function, size in ((chunk_ttt_linear, "chunk_size"), (chunk_ttt_linear_ref, "mini_batch_size")):
        q = inputs["q"].detach().clone()
        out, _, _ = function(**(inputs | {"q": q}), **{size: 16})
        gradients.append((out.detach(), *torch.autograd.grad(out.sum(), tuple(leaves.values()))))
    for name, ours, reference in zip(("out", "dk", "dv"), *gradients, strict=True):
        found[f"RMS difference of {name} from the fp32 reference"] = float((ours - reference).norm() / reference.norm())
    return found


@_run
def fla_norm_gradients() -> Found:
    """Against the oracle, 128 mini-batches."""
    from harness import bench

    case = "lm-1.3b:one-lr"
    found: Found = {}
    for row in bench.check("peer.fla_chunk", case, dtype="bf16"):
        if row.tensor in ("", "d_ln_weight", "d_ln_bias"):
            found[f"{case}: RMS error of {row.tensor}, relative"] = _error(row)
            found[f"{case}: that of `torch.eager`, {row.tensor}"] = row.yardstick_rms_error
    return found


@_run
def fla_sum_in_bf16() -> Found:
    """What each mini-batch adds to the sum behind d_ln_bias, from an fp32 page, added up in bf16."""
    from dataclasses import replace

    import torch

    from harness.one_lr import with_one_lr
    from implementations.torch import ttt_linear
    from spec.cases import CASES, draw

    found = {}
    for name in ("lm-1.3b", "lm-1.3b-long"):
        case = with_one_lr(replace(CASES[name], batch=1, heads=4))
        problem = case.problem("linear", "fp32")
        inputs, cotangents = (type(x)(*map(torch.from_numpy, x)) for x in draw(case, problem))
        _, residuals = ttt_linear.forward(inputs, problem)
        exact = ttt_linear.backward(cotangents, residuals, problem)
        parts = -exact.xv.unflatten(1, (problem.mini_batches, problem.mini_batch)).sum(2)[0]  # [N H D]
        total = torch.zeros_like(parts[0], dtype=torch.bfloat16)
        for part in parts.flip(0):
            total += part.bfloat16()
        error = (total.double() - parts.double().sum(0)).norm() / exact.ln_bias.double().norm()
        found[f"error of the sum over {problem.mini_batches} mini-batches, relative to d_ln_bias"] = float(error)
    return found


@_run
def fla_rounded_norm_parameters() -> Found:
    """What rounding LayerNorm's parameters to bf16, and nothing else, does to final_b1; then the kernels' own."""
    import torch

    from harness import bench
    from harness.one_lr import with_one_lr
    from implementations.torch import ttt_linear
    from spec.cases import CASES, draw

    case = with_one_lr(CASES["lm-1.3b"])
    problem = case.problem("linear", "fp32")
    inputs, _ = draw(case, problem)
    tensors = type(inputs)(*(torch.from_numpy(x).cuda() for x in inputs))
    rounded = {name: getattr(tensors, name).bfloat16().float() for name in ("ln_weight", "ln_bias")}
    exact, _ = ttt_linear.forward(tensors, problem)
    found, _ = ttt_linear.forward(tensors._replace(**rounded), problem)
    error = (found.final_b1 - exact.final_b1).norm() / exact.final_b1.norm()
    rows = bench.check("peer.fla_chunk", case, dtype="bf16")
    row = next(row for row in rows if row.tensor in ("", "final_b1"))
    return {
        "RMS error of final_b1, relative, of an fp32 page with ln_weight and ln_bias in bf16": float(error),
        "that of `chunk_ttt_linear`, in bf16": _error(row),
        "that of `torch.eager`, whose ln_weight and ln_bias are fp32, in bf16": row.yardstick_rms_error,
        "that of `chunk_ttt_linear` over the allowed one (1 is the limit)": row.error_ratio,
    }


# --- ttt-tk ---


@_run
def ttt_tk_eps() -> Found:
    """How often the machine code of the wheel adds 1e-6, and 1e-8."""
    import re
    import subprocess
    from importlib.metadata import files

    from harness.static_triton import tool

    (library,) = (str(file.locate()) for file in files("test-time-training") or () if file.match("test_time_*.so"))
    command = [str(tool("cuobjdump")), "-sass", library]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for text in sass.split("Function : ")[1:]:
        added = [f"{float(x):.0e}" for x in re.findall(r"(?:FADD|FFMA)[^;]* ([0-9.]+e-[0-9]+) ;", text)]
        name = "backward" if "bwd" in text.splitlines()[0] else "forward"
        for eps in ("1e-06", "1e-08"):
            found[f"{name} of the wheel adds {eps}, times"] = added.count(eps)
    return found


@_run
def ttt_tk_eps_gradients() -> Found:
    """Rows whose spread is near sqrt(eps), forward and backward."""
    from dataclasses import replace

    from spec.cases import CASES

    case = replace(CASES["stress-near-constant-rows"], name="near-constant-rows-d64-m64", causal=False)
    case = replace(case, batch=1, tokens=256, heads=2, head_dim=64, mini_batch=64)
    return worst("peer.ttt_tk", case, "mlp", "bf16", tensors=("out", "d_xq", "d_xk", "d_w2"))


@_run
def ttt_tk_determinism() -> Found:
    """The backward twice, from the same arrays."""
    from harness import bench
    from harness.check import VARIES

    rows = bench.check("peer.ttt_tk", "video-5b-small", inner_model="mlp", dtype="bf16")
    if rows[0].status == "unsupported":
        raise ValueError(rows[0].reason)
    return {row.tensor: row.reason for row in rows if VARIES in row.reason}


@_run
def ttt_tk_video_gradients() -> Found:
    """288 mini-batches, the video model's layer, forward and backward."""
    return worst("peer.ttt_tk", "video-5b", "mlp", "bf16", tensors=("out", "d_xq", "d_lr", "d_ln_bias", "d_b1", "d_b2"))


@_run
def ttt_tk_eps_in_our_page() -> Found:
    """A backward with eps 1e-8 of a forward with 1e-6, in float64."""
    from unittest.mock import patch

    import torch

    from implementations.torch import blocks, ttt_mlp
    from spec.cases import CASES, draw

    found = {}
    page: Any = ttt_mlp
    normalise = blocks.normalise
    for name in ("lm-1.3b-small", "stress-near-constant-rows"):
        problem = CASES[name].problem("mlp", "fp64")
        inputs, cotangents = (type(x)(*map(torch.from_numpy, x)) for x in draw(CASES[name], problem))
        _, residuals = page.forward(inputs, problem)
        exact = page.backward(cotangents, residuals, problem)
        with patch.object(blocks, "normalise", lambda z, eps: normalise(z, 1e-8)):
            mixed = page.backward(cotangents, residuals, problem)
        for tensor in ("xk", "w1", "w2"):
            a, b = getattr(mixed, tensor), getattr(exact, tensor)
            found[f"{name}: RMS error of d_{tensor}, relative"] = float((a - b).norm() / b.norm())
    return found


@_run
def ttt_tk_bundled_driver() -> Found:
    """The libraries in the wheel that a driver brings."""
    from importlib.metadata import files

    found = [path.name for path in files("test-time-training") or () if path.name.startswith("libcuda-")]
    return {"libraries of the driver in the wheel": ", ".join(found) or "none"}


if __name__ == "__main__":
    print(json.dumps(RUNS[sys.argv[1]]()))
