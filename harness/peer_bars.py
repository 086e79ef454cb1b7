"""`python -m harness bars`: does an implementation pass the tests of the peers, in their sizes and with their numbers?

flash-linear-attention's `tests/ops/test_ttt.py` (as of 0315a70) compares its kernels with its own fp32 reference, in
fp16, by the relative RMS error of each tensor. Here the same numbers are drawn, and any implementation is held to the
same ratios against the float64 oracle. What changes: T is rounded up to a multiple of the chunk; xq takes their scale;
eta, random for each row there, is the product of a random lr for each mini-batch and a random token_eta, and its
gradients are held to their bar for eta, not to the smaller one of the first 14 tokens; the error of `out` is relative
to `out - xq`, which is stricter; cotangents are this lab's; sequences of several lengths, which the spec has not, are
left out. ttt-tk's tests print errors and assert nothing, so they are a case and no bar: views, LayerNorm and rates are
of their size, the rates without their sign.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from rich.console import Console

from harness import bench
from harness.one_lr import with_one_lr
from harness.rows import ParityRow
from implementations.registry import Device, select
from spec.cases import Case, Values

# The smaller of its two tests' ratios for each tensor; those of eta for lr and token_eta, which it is made of.
FLA_RATIOS: Mapping[str, float] = {
    "out": 0.005,
    "final_w1": 0.005,
    "final_b1": 0.005,
    "d_xq": 0.005,
    "d_xk": 0.010,
    "d_xv": 0.007,
    "d_ln_weight": 0.005,
    "d_ln_bias": 0.005,
    "d_lr": 0.030,
    "d_token_eta": 0.030,
    "d_w1": 0.006,
    "d_b1": 0.005,
}


def _fla_values(values: Values, scale: float) -> None:
    """From this lab's standard draw to theirs: unit keys, signed rates, LayerNorm and fast weights of order one."""
    values["xq"] *= scale
    values["xk"] /= np.linalg.norm(values["xk"], axis=-1, keepdims=True)
    steps = np.arange(1, values["token_eta"].size + 1)
    values["token_eta"] = (values["token_eta"] - 1 / steps) / 0.02  # its normal draw, but where it was cut off at 0
    values["lr"] *= 5e-3 * values["xq"].shape[-1] * 2
    values["ln_weight"] = (values["ln_weight"] - 1) / 0.1
    values["ln_bias"] /= 0.1
    for name in ("w1", "b1"):
        values[name] /= 0.02


def _tk_values(values: Values) -> None:
    values["xv"][...] = 1
    values["lr"] = np.abs(values["lr"] * 0.02 * values["xq"].shape[-1])
    values["token_eta"][-1] = 1
    values["ln_weight"][...] = 1
    values["ln_bias"] *= 0.2


_SIZES = (
    (1, 64, 1, 64, 1.0),
    (2, 112, 4, 60, 0.1),
    (2, 1024, 3, 128, 0.1),
    (2, 1024, 4, 128, 1.0),
    (3, 2000, 4, 128, 0.1),
    (4, 2048, 8, 64, 0.1),
)
FLA_CASES = tuple(
    with_one_lr(
        Case(
            f"fla-b{b}-t{t}-h{h}-d{d}-scale{scale:g}",
            "a case of flash-linear-attention's tests",
            *(b, t, h, d, 16),
            dtypes=("fp16",),
            adjust=functools.partial(_fla_values, scale=scale),
        )
    )
    for b, t, h, d, scale in _SIZES
)
TK_CASE = Case(
    "ttt-tk-b1-t2048-h48-d64",
    "the case of ttt-tk's tests",
    *(1, 2048, 48, 64, 64),
    causal=False,
    dtypes=("bf16",),
    adjust=_tk_values,
)


def over_the_bar(rows: Iterable[ParityRow], ratios: Mapping[str, float] = FLA_RATIOS) -> list[str]:
    """A line for each tensor that fails the peer's own test; none if it passes."""
    lines = []
    for row in rows:
        if row.rms_error is None:
            lines.append(f"{row.case} {row.tensor or row.implementation}: {row.status}: {row.reason}")
        elif not row.rms_error < ratios[row.tensor]:
            lines.append(f"{row.case} {row.tensor}: RMS error {row.rms_error:.2g}, their bar is {ratios[row.tensor]:g}")
    return lines


def add_parser(commands: Any) -> None:
    """Add the command `bars`."""
    command = commands.add_parser("bars", help="hold implementations to the peers' own tests, and to our rule")
    command.add_argument("implementations", nargs="+", metavar="KEY", help="keys or folders: torch.eager jax")
    command.add_argument("--longest", type=int, default=4096, metavar="T", help="leave out longer cases")
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    command.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print a line for each implementation and case; 1 if one fails their bar or ours."""
    failed = False
    for entry in select(options.implementations):
        cases: list[Case] = [*FLA_CASES] if "linear" in entry.pages else []
        cases += [TK_CASE] if "mlp" in entry.pages else []
        for case in (case for case in cases if case.tokens <= options.longest):
            theirs, ours = verdicts(entry.key, case, options.device)
            failed = failed or bool(theirs or ours)
            bar = "ttt-tk has no bar" if case is TK_CASE else f"FLA's own bar: {theirs[0] if theirs else 'passes'}"
            text = f"{entry.key} {case.name}: {bar}; ours: {ours or 'passes'}"
            Console().print(text, markup=False, highlight=False, soft_wrap=True)
    return 1 if failed else 0


def verdicts(key: str, case: Case, device: Device | None = None) -> tuple[list[str], str]:
    """What fails of the peer's test, and the worst of what fails by this lab's rule; both empty if nothing does."""
    of_tk = case is TK_CASE
    rows = bench.check(key, case, inner_model="mlp" if of_tk else "linear", dtype=case.dtypes[0], device=device)
    wrong = [row for row in rows if row.status != "ok"]
    worst = max(wrong, key=lambda row: row.error_ratio or float("inf"), default=None)
    return [] if of_tk else over_the_bar(rows), f"{worst.status}: {worst.reason}" if worst else ""
