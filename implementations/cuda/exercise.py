"""Small problems through every CUDA C++ kernel, forward and backward, for a tool that watches kernels run.

    python -m implementations.cuda.exercise  # once without it: CuPy keeps what NVRTC compiles
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python -m implementations.cuda.exercise

Three mini-batches and two chains each, bf16. A line ends in a hash of every bit that came out. Arguments choose by a
part of the line (`registers/2`); `--mbarriers` takes mbarriers for named barriers, whose bar.arrive racecheck misses.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from implementations.cuda import cupy_linear_split, cupy_mlp_registers, cupy_plain_linear, cupy_plain_mlp, module
from spec.cases import Case, draw
from spec.problem import InnerModel, Problem
from spec.tensors import INPUTS, OUTPUTS, validate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = ((64, 16, True), (64, 64, True), (64, 64, False), (64, 32, True), (32, 32, False), (16, 16, False))  # D, M


def runs() -> Iterator[tuple[str, InnerModel, Any, Any]]:
    """A name, an inner model, and the two passes; groups of two mini-batches, so that one is full and one is not."""
    for split in (1, 2):  # blocks of a chain
        forward = partial(cupy_linear_split.forward, group=2)
        yield f"linear/split/{split}", "linear", forward, partial(cupy_linear_split.backward, split=split)
        forward = partial(cupy_mlp_registers.forward, group=2, split=split)
        yield f"mlp/registers/{split}", "mlp", forward, cupy_mlp_registers.backward
    yield "linear/plain", "linear", partial(cupy_plain_linear.forward, group=2), cupy_plain_linear.backward
    yield "mlp/plain", "mlp", partial(cupy_plain_mlp.forward, group=2), cupy_plain_mlp.backward


def solve(case: Case, problem: Problem, forward: Any, backward: Any) -> str:
    """A hash of outputs and gradients; what is handed in was checked and copied from the host."""
    inputs, cotangents = (type(x)(*map(_tensor, x)) for x in draw(case, problem))
    validate(inputs, INPUTS, problem)
    validate(cotangents, OUTPUTS, problem)
    outputs, residuals = forward(inputs, problem)
    found = [*outputs, *backward(cotangents, residuals, problem)]
    return hashlib.sha256(b"".join(x.cpu().view(torch.uint8).numpy().tobytes() for x in found)).hexdigest()[:16]


def _tensor(x: Any) -> torch.Tensor:
    bits = torch.from_numpy(x.view("int16")).view(torch.bfloat16) if x.dtype.name == "bfloat16" else torch.from_numpy(x)
    return bits.to(DEVICE)


def _every_weight_moves(values: dict[str, Any]) -> None:
    values["token_eta"] += 0.1  # drawn, the last may be 0


def _launch_with_mbarriers(kernel: Any, *arguments: Any) -> None:
    module.launch(replace(kernel, options=(*kernel.options, "-DTTT_MBARRIERS")), *arguments)


if __name__ == "__main__":
    wanted = [part for part in sys.argv[1:] if part != "--mbarriers"]
    if len(wanted) + 1 < len(sys.argv):
        cupy_linear_split.launch = _launch_with_mbarriers
    for name, inner_model, forward, backward in runs():
        for d, m, causal in SIZES:
            line = f"{name} D={d} M={m} {'causal' if causal else 'not causal'}"
            if all(part in line for part in wanted):
                case = Case("exercise", "", 1, 3 * m, 2, d, m, causal, adjust=_every_weight_moves)
                print(line, solve(case, case.problem(inner_model, "bf16"), forward, backward), flush=True)
