"""The named cases, their small twins for a CPU, the stress set, and how their numbers are drawn.

Numbers are drawn once, by NumPy, from the case's name and a seed: every framework is handed the same bits. They
are rounded to the dtype they are stored in before anybody sees them, the oracle included.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import ml_dtypes
import numpy as np

from spec.problem import DTYPES, Dtype, InnerModel, MatmulPrecision, Problem
from spec.tensors import INPUTS, OUTPUTS, Inputs, Outputs, tensor_specs

NUMPY_DTYPE: dict[str, np.dtype] = {
    "fp64": np.dtype(np.float64),
    "fp32": np.dtype(np.float32),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp16": np.dtype(np.float16),
}

Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """Sizes and values to run an implementation on.

    `adjust` changes freshly drawn values in place; `strided` asks that tensors with a `T` axis be handed over as
    `B T H D` views of `B H T D` memory, where the framework knows strides; `amplifies` is by how much the values
    magnify any rounding (measured on the PyTorch form; hundreds of mini-batches do, too), and so widen the absolute
    caps on its error.
    """

    name: str
    about: str
    batch: int
    tokens: int
    heads: int
    head_dim: int
    mini_batch: int
    causal: bool = True
    dtypes: tuple[Dtype, ...] = DTYPES
    adjust: Callable[[Values], None] | None = None
    strided: bool = False
    amplifies: float = 1
    group: Literal["named", "small", "size", "stress"] = "stress"

    def problem(self, inner_model: InnerModel, dtype: Dtype, matmul_precision: MatmulPrecision = "ieee") -> Problem:
        """The problem that this case poses to `inner_model` in `dtype`."""
        return Problem(
            inner_model,
            self.batch,
            self.tokens,
            self.heads,
            self.head_dim,
            self.mini_batch,
            self.causal,
            dtype=dtype,
            matmul_precision=matmul_precision,
        )


def draw(case: Case, problem: Problem, seed: int = 0) -> tuple[Inputs, Outputs]:
    """Inputs and cotangents of `problem` as NumPy arrays, in storage dtype.

    Views are standard normal, `lr` is sigmoid(normal) / D and `token_eta` is max(0, 1/(i+1) + small), as in the
    paper's layer at its initialisation; fast weights have its 0.02 standard deviation; biases are not zero, so
    that a forgotten one shows. Cotangents, of the output and of the final state, are normal with a standard
    deviation of 1/32: the loss scale at which every case's gradients stay inside the range of fp16.
    """
    values, pulled = _draw(case, problem.inner_model, seed)
    inputs, outputs = INPUTS[problem.inner_model], OUTPUTS[problem.inner_model]
    return (
        inputs(*(values[s.name].astype(NUMPY_DTYPE[s.dtype]) for s in tensor_specs(inputs, problem))),
        outputs(*(pulled[s.name].astype(NUMPY_DTYPE[s.dtype]) for s in tensor_specs(outputs, problem))),
    )


@functools.lru_cache(maxsize=1)  # the dtypes of a full-size case come one after another, and are gigabytes
def _draw(case: Case, inner_model: InnerModel, seed: int) -> tuple[Values, Values]:
    """Inputs and cotangents by name, before they are rounded; not to be changed."""
    rng = np.random.default_rng([seed, zlib.crc32(case.name.encode())])
    problem = case.problem(inner_model, "fp32")
    specs = tensor_specs(INPUTS[inner_model], problem)
    values = {spec.name: rng.standard_normal(spec.shape, dtype=np.float32) for spec in specs}
    values["lr"] = 1 / (1 + np.exp(-values["lr"])) / problem.head_dim
    steps = np.arange(1, problem.mini_batch + 1)
    values["token_eta"] = np.maximum(0, 1 / steps + 0.02 * values["token_eta"])
    values["ln_weight"] = 1 + 0.1 * values["ln_weight"]
    values["ln_bias"] *= 0.1
    for spec in specs[7:]:
        values[spec.name] *= 0.02
    if case.adjust:
        case.adjust(values)
    pulled = {
        spec.name: rng.standard_normal(spec.shape, dtype=np.float32) / 32
        for spec in tensor_specs(OUTPUTS[inner_model], problem)
    }
    return values, pulled


def _near_constant_rows(values: Values) -> None:
    """Inner outputs vary over D by sqrt(eps) or less, and the steps are too small to end that."""
    last = "w2" if "w2" in values else "w1"
    values[last] *= 0.01
    values["b2" if "b2" in values else "b1"][...] = 0.01
    values["lr"] *= 1e-6


def _scale_views(values: Values, factor: float) -> None:
    for name in ("xq", "xk", "xv"):
        values[name] *= factor
    values["lr"] /= max(1, factor) ** 2


def _zero_lr(values: Values) -> None:
    values["lr"][...] = 0


def _zeros_in_token_eta(values: Values) -> None:
    values["token_eta"][::3] = 0
    values["token_eta"][-1] = 1 / values["token_eta"].size


def _outlier_token(values: Values) -> None:
    middle = values["xk"].shape[1] // 2
    for name in ("xq", "xk", "xv"):
        values[name][:, middle] *= 64


_NAMED = (
    Case("lm-125m", "the paper's 125M layer", 8, 2048, 12, 64, 16, group="named"),
    Case("lm-760m", "the paper's 760M layer", 4, 2048, 16, 96, 16, group="named"),
    Case("lm-1.3b", "the paper's 1.3B layer", 4, 2048, 32, 64, 16, group="named"),
    Case("lm-1.3b-long", "its long-context setting", 1, 32768, 32, 64, 16, amplifies=8, group="named"),
    Case("lm-1.3b-m64", "a larger mini-batch", 4, 2048, 32, 64, 64, group="named"),
    Case("video-5b", "the video model's layer", 1, 18432, 48, 64, 64, causal=False, amplifies=8, group="named"),
)
# batch, tokens, heads of each twin: small enough for a laptop, with at least four mini-batches in the chain.
_TWIN = {
    "lm-125m": (2, 64, 3),
    "lm-760m": (1, 64, 2),
    "lm-1.3b": (2, 64, 4),
    "lm-1.3b-long": (1, 512, 2),
    "lm-1.3b-m64": (1, 256, 2),
    "video-5b": (1, 256, 3),
}
_SMALL = tuple(
    replace(
        case,
        name=f"{case.name}-small",
        about=f"CPU twin of {case.name}",
        batch=_TWIN[case.name][0],
        tokens=_TWIN[case.name][1],
        heads=_TWIN[case.name][2],
        amplifies=1,
        group="small",
    )
    for case in _NAMED
)
_SIZES = (
    Case("size-d16", "the smallest head", 2, 64, 2, 16, 16, group="size"),
    Case("size-d32-m32", "head 32, mini-batch 32", 2, 128, 2, 32, 32, group="size"),
    Case("size-d96-m32", "head 96, not causal", 1, 128, 2, 96, 32, causal=False, group="size"),
    Case("size-d128-m128", "the largest head and mini-batch", 1, 256, 1, 128, 128, group="size"),
)
_BASE = Case("", "", 2, 64, 2, 32, 16)
_STRESS = (
    replace(
        _BASE,
        name="stress-near-constant-rows",
        about="LayerNorm dominated by eps: rows that hardly vary; gradients pass the range of fp16",
        adjust=_near_constant_rows,
        amplifies=8,
        dtypes=("fp64", "fp32", "bf16"),
    ),
    replace(
        _BASE,
        name="stress-large",
        about="views 32 times larger",
        adjust=functools.partial(_scale_views, factor=32.0),
        amplifies=8,
    ),
    replace(
        _BASE,
        name="stress-tiny",
        about="views 1024 times smaller",
        adjust=functools.partial(_scale_views, factor=2.0**-10),
    ),
    replace(_BASE, name="stress-zero-lr", about="lr is 0: the fast weights never move", adjust=_zero_lr),
    replace(_BASE, name="stress-zeros-in-token-eta", about="some tokens read theta0", adjust=_zeros_in_token_eta),
    replace(
        _BASE, name="stress-outlier-token", about="one token 64 times larger", adjust=_outlier_token, amplifies=32
    ),
    replace(_BASE, name="stress-one-mini-batch", about="the chain has one link", tokens=16),
    replace(_BASE, name="stress-strided", about="inputs are views of B H T D memory", strided=True),
    replace(_BASE, name="stress-not-causal", about="not causal, small", causal=False),
)

CASES: dict[str, Case] = {case.name: case for case in _NAMED + _SMALL + _SIZES + _STRESS}
