"""What a worker process is asked to do: compute a truth, check a cell, time a cell."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from harness import timing
from harness.check import TensorCheck, Truth, examine
from harness.frameworks import Framework, open_framework
from implementations.registry import Device, Implementation, implementations
from spec.cases import Case, draw
from spec.cost import affordable_form
from spec.problem import Pass, Problem
from spec.tensors import INPUTS, OUTPUTS


def save_truth(case: Case, problem: Problem, seed: int, device: Device, folder: Path) -> None:
    """Run the oracle on `case` and leave its outputs and gradients in `folder`, one `.npy` a tensor."""
    from spec import oracle

    inputs, cotangents = draw(case, problem, seed)
    given, pulled = ([x.astype(np.float64) for x in tensors] for tensors in (inputs, cotangents))
    truth = oracle.run(given, pulled, problem, device, affordable_form(problem))
    np.save(folder / "token_eta_scale.npy", truth.token_eta_scale.numpy())
    for prefix, tensors in (("", truth.outputs), ("d_", truth.gradients)):
        for name, tensor in zip(tensors._fields, tensors, strict=True):
            np.save(folder / f"{prefix}{name}.npy", tensor.numpy())
    open_framework("torch", device).release_memory()


def load_truth(problem: Problem, folder: Path) -> Truth:
    """What `save_truth` left in `folder`, memory-mapped."""

    def read(name: str) -> np.ndarray:
        return np.load(folder / f"{name}.npy", mmap_mode="r")

    outputs, inputs = OUTPUTS[problem.inner_model], INPUTS[problem.inner_model]
    return Truth(
        outputs(*map(read, outputs._fields)),
        inputs(*(read(f"d_{name}") for name in inputs._fields)),
        read("token_eta_scale"),
    )


def check(key: str, case: Case, problem: Problem, seed: int, device: Device, folder: Path) -> list[TensorCheck]:
    """Every tensor of implementation `key` on `case`, held to the truth in `folder`."""
    entry, framework = _open(key, device)
    truth = load_truth(problem, folder)
    try:
        return examine(entry.page(problem), case, problem, entry.passes, seed, framework, truth)
    finally:
        framework.release_memory()


def time(key: str, case: Case, problem: Problem, pass_: Pass, seed: int, device: Device) -> timing.Timing:
    """How long `pass_` of implementation `key` takes on `case`."""
    entry, framework = _open(key, device)
    page = entry.page(problem)
    inputs, cotangents = draw(case, problem, seed)
    given, pulled = framework.arrays(inputs, case.strided), framework.arrays(cotangents, case.strided)
    if pass_ == "forward":
        return timing.measure(lambda: page.forward(given, problem), framework)
    if pass_ == "backward":
        _, residuals = page.forward(given, problem)
        return timing.measure(lambda: page.backward(pulled, residuals, problem), framework)
    return timing.measure(lambda: page.backward(pulled, page.forward(given, problem)[1], problem), framework)


@functools.cache
def _open(key: str, device: Device) -> tuple[Implementation, Framework]:
    entry = implementations()[key]
    framework = open_framework(entry.framework, device)
    return entry, framework
