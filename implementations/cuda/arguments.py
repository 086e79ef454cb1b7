"""What the CuPy pages share on the host: the problems they take, and the arguments of their kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implementations.cuda import emulator, module
from implementations.layout import check_layout
from spec.problem import Problem

KERNEL_DTYPE = {"fp32": "float", "bf16": "ttt::bf16", "fp16": "ttt::fp16"}


class View(NamedTuple):
    """A tensor with a token axis, `B T H D` or `B T H`, as a kernel takes it: pointer, strides of B, T and H."""

    p: Tensor
    b: int
    t: int
    h: int


def view(x: Tensor) -> View:
    """`x` as a kernel takes it."""
    return View(x, *x.stride()[:3])


def check(
    tensors: tuple[Any, ...],
    kinds: Mapping[str, type],
    problem: Problem,
    reason: str | None,
    like: Tensor | None = None,
) -> None:
    """Refuse what a kernel cannot take, before anything is allocated; `reason` is why it cannot solve `problem`.

    Raises:
        ValueError: there is a reason, or a tensor is not as `check_layout` wants it.
        NotImplementedError: they are where no kernel runs, with what is missing there.
    """
    if reason:
        raise ValueError(reason)
    check_layout(tensors, kinds, problem, None if like is None else like.device)
    device = tensors[0].device
    missing = {"cpu": emulator.missing, "cuda": module.fault}.get(device.type, lambda: "it is neither a CPU nor CUDA")()
    if missing:
        raise NotImplementedError(f"no kernel runs on {device}: {missing}")


def contiguous_like(x: Tensor) -> Tensor:
    """Fresh contiguous memory of the shape, dtype and device of `x`."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def default_group(problem: Problem) -> int:
    """The largest power of two up to sqrt(N): about the least memory, kept and recomputed weights together."""
    return 1 << (math.isqrt(problem.mini_batches).bit_length() - 1)


def default_split(problem: Problem, device: torch.device) -> int:
    """Two blocks a chain where every chain can have two multiprocessors."""
    if device.type != "cuda":
        return 1
    properties = torch.cuda.get_device_properties(device)
    room = 2 * problem.batch * problem.heads <= properties.multi_processor_count
    return 2 if room and properties.major >= 9 else 1
