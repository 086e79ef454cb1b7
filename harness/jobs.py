"""What a worker process is asked to do: compute a truth, check a cell, time blocks of calls."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from harness.check import TensorCheck, Truth, examine
from harness.frameworks import open_framework
from harness.timing import Block, Cache, Ready, Stand, Subject
from implementations.registry import Device, Implementation
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


def check(
    entry: Implementation, case: Case, problem: Problem, seed: int, device: Device, folder: Path
) -> list[TensorCheck]:
    """Every tensor of an implementation on `case`, held to the truth in `folder`."""
    framework = _open(entry.framework, device)
    truth = load_truth(problem, folder)
    try:
        return examine(entry.page(problem), case, problem, entry.passes, seed, framework, truth)
    finally:
        framework.release_memory()


def place(subject: Subject) -> None:
    """Put the inputs of `subject` on the device, in place of another's."""
    _stand_of(subject)


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
        _stand = Stand(subject, _open(subject.entry.framework, subject.device))
    return _stand


_open = functools.cache(open_framework)
