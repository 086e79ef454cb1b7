"""What a worker process is asked to do: compute a truth, check a cell, time blocks of calls."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import numpy as np

from harness.check import TensorCheck, Truth, examine
from harness.frameworks import open_framework
from harness.timing import Block, Cache, Ready, Stand, Subject
from implementations.registry import Device, Implementation
from spec.cases import NUMPY_DTYPE, Case, draw
from spec.cost import affordable_form
from spec.problem import Dtype, Pass, Problem
from spec.tensors import INPUTS, OUTPUTS, Inputs, Outputs, tensor_specs

_DRAWN = "given_", "pulled_"  # inputs, and the cotangents of the outputs


def warm_up(entry: Implementation | None, device: Device) -> None:
    """Import what an implementation needs, or the oracle, and have the device answer."""
    _open(entry.framework if entry else "torch", device).touch()
    for page in set(entry.pages.values()) if entry else ():
        importlib.import_module(page)


def save_truth(case: Case, problem: Problem, seed: int, device: Device, folder: Path) -> None:
    """Draw the numbers of `case` and run the oracle on them; both are left in `folder`."""
    from spec import oracle

    framework = _open("torch", device)
    given, pulled = map(framework.arrays, save_drawn(case, problem, seed, folder))
    truth = oracle.run(given, pulled, problem, device, affordable_form(problem))
    truth.token_eta_scale.numpy().tofile(folder / "token_eta_scale")
    for prefix, tensors in (("", truth.outputs), ("d_", truth.gradients)):
        for name, tensor in tensors._asdict().items():
            tensor.contiguous().numpy().tofile(folder / f"{prefix}{name}")
    del given, pulled, truth
    framework.release_memory()


def save_drawn(case: Case, problem: Problem, seed: int, folder: Path) -> tuple[Inputs, Outputs]:
    """Draw the inputs and cotangents of `case`, and leave them in `folder` too, the bare bits of each in a file."""
    drawn = draw(case, problem, seed)
    for prefix, arrays in zip(_DRAWN, drawn, strict=True):
        for name, array in arrays._asdict().items():
            array.tofile(folder / f"{prefix}{name}")
    return drawn


def load_drawn(problem: Problem, folder: Path) -> tuple[Inputs, Outputs]:
    """What `save_drawn` left in `folder`, memory-mapped."""

    def read(kind: Any, prefix: str) -> Any:
        specs = tensor_specs(kind, problem)
        return kind(*(_mapped(folder / f"{prefix}{spec.name}", spec.shape, spec.dtype) for spec in specs))

    return read(INPUTS[problem.inner_model], _DRAWN[0]), read(OUTPUTS[problem.inner_model], _DRAWN[1])


def load_truth(problem: Problem, folder: Path) -> Truth:
    """The truth that `save_truth` left in `folder`, memory-mapped."""
    import torch

    def read(kind: Any, prefix: str = "") -> Any:
        specs = tensor_specs(kind, problem)
        return kind(*(torch.from_numpy(_mapped(folder / f"{prefix}{s.name}", s.shape, "fp64")) for s in specs))

    scale = torch.from_numpy(_mapped(folder / "token_eta_scale", (problem.mini_batch,), "fp64"))
    return Truth(read(OUTPUTS[problem.inner_model]), read(INPUTS[problem.inner_model], "d_"), scale)


def _mapped(path: Path, shape: tuple[int, ...], dtype: Dtype) -> np.ndarray:
    return np.memmap(path, NUMPY_DTYPE[dtype], "c", shape=shape)


def check(
    entry: Implementation, case: Case, problem: Problem, device: Device, folder: Path
) -> list[TensorCheck]:
    """Every tensor of an implementation on `case`, held to the truth in `folder`."""
    framework = _open(entry.framework, device)
    drawn, truth = load_drawn(problem, folder), load_truth(problem, folder)
    try:
        return examine(entry.page(problem), problem, entry.passes, drawn, framework, truth, case.strided)
    finally:
        framework.release_memory()


def place(subject: Subject, pass_: Pass) -> None:
    """Put the inputs of `subject` on the device, in place of another's, and make the first calls of a pass."""
    _stand_of(subject).start(pass_)


def ready(subject: Subject, pass_: Pass, timer: str | None = None) -> Ready:
    """Get a pass ready to be timed, by the clock of that name if one is given."""
    return _stand_of(subject).ready(pass_, timer)


def settle(subject: Subject, pass_: Pass) -> None:
    """Warm the GPU up until its clock has settled."""
    _stand_of(subject).settle(pass_)


def block(subject: Subject, pass_: Pass, cache: Cache, calls: int) -> Block:
    """Time so many calls of the pass."""
    return _stand_of(subject).block(pass_, cache, calls)


def clear() -> None:
    """Give up what is ready, and its memory."""
    global _stand
    if _stand is not None:
        _stand.close()
    _stand = None


_stand: Stand | None = None


def _stand_of(subject: Subject) -> Stand:
    """The one stand of this process: the one there is, if it is of this subject."""
    global _stand
    if _stand is None or _stand.subject != subject:
        clear()
        case, problem, numbers = subject.case, subject.problem, subject.numbers
        drawn = load_drawn(problem, numbers) if numbers else draw(case, problem, subject.seed)
        _stand = Stand(subject, _open(subject.entry.framework, subject.device), drawn)
    return _stand


_open = functools.cache(open_framework)
