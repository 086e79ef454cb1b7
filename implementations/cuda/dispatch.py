"""Which rung of a ladder of CuPy pages solves a problem on a device."""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from implementations.cuda.module import refusal
from spec.problem import Problem


@functools.cache
def first_that_takes(problem: Problem, device: torch.device, rungs: tuple[ModuleType, ...]) -> ModuleType:
    """The first of `rungs` whose `limit` allows `problem` and whose `kernels` run on `device`; else the last.

    The last one says for itself what is wrong.
    """
    for rung in rungs:
        if rung.limit(problem):
            continue
        if not any(refusal(kernel, device) for kernel in rung.kernels(problem)):
            return rung
    return rungs[-1]
