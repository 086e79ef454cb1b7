"""What the Triton pages hand to their kernels: named tuples of pointers and strides, checked before any launch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implementations.layout import check_layout
from implementations.triton.blocks import INTERPRETED
from implementations.triton.limits import limit
from spec.problem import Problem


class View(NamedTuple):
    """A tensor with a token axis, `B T H D` or `B T H`, in any order of memory with D innermost."""

    p: Any
    stride_b: Any
    stride_t: Any
    stride_h: Any


class Tokens(NamedTuple):
    """The inputs with a token axis, or their gradients."""

    xq: View
    xk: View
    xv: View
    lr: View


class Shared(NamedTuple):
    """Pointers to what every mini-batch shares, or to each program's part of their gradients."""

    token_eta: Any
    ln_weight: Any
    ln_bias: Any


class State(NamedTuple):
    """Pointers to the fast weights of one layer, contiguous `... D L` and `... L`."""

    w: Any
    b: Any


def view(x: Tensor) -> View:
    """`x` as a kernel takes it."""
    return View(x, *x.stride()[:3])


def tokens(xq: Tensor, xk: Tensor, xv: Tensor, lr: Tensor) -> Tokens:
    """Inputs or gradients as a kernel takes them."""
    return Tokens(view(xq), view(xk), view(xv), view(lr))


def check(
    tensors: tuple[Any, ...], kinds: Mapping[str, type], problem: Problem, device: torch.device | None = None
) -> None:
    """Refuse, before anything is allocated, what a kernel would read wrongly or not at all.

    Raises:
        ValueError: the problem is beyond `limit`; a tensor has another shape, dtype or device; one with a T axis has
            its D axis strided, or another one is not contiguous.
    """
    if reason := limit(problem):
        raise ValueError(reason)
    check_layout(tensors, kinds, problem, device)
    if tensors[0].device.type != "cuda" and not INTERPRETED.value:
        raise ValueError(
            f"{tensors._fields[0]}: expected a tensor on cuda, got {tensors[0].device}: move it there, use "  # type: ignore[attr-defined]
            "torch.eager, or set TRITON_INTERPRET=1 before triton is imported"
        )


def empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Fresh contiguous memory beside `like`."""
    return torch.empty(shape, dtype=dtype, device=like.device)
