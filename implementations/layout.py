"""What every page that hands pointers to a kernel checks of its tensors first; imports no framework."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from spec.problem import ARRAY_DTYPE, Problem
from spec.tensors import tensor_specs, validate


class _Expected(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: str
    has_tokens: bool
    ends_in_d: bool


def check_layout(
    tensors: tuple[Any, ...], kinds: Mapping[str, type], problem: Problem, device: Any = None
) -> None:
    """Refuse, before anything is allocated, PyTorch tensors that a kernel would read wrongly.

    Raises:
        ValueError: a tensor has another shape or dtype than `problem` says, another device than `device` (or than the
            first one); one with a T axis has its D axis strided, or another one is not contiguous.
    """
    kind = kinds[problem.inner_model]
    expected = _expected(kind, problem)
    if type(tensors) is not kind or any(
        x.shape != each.shape or str(x.dtype) != each.dtype for each, x in zip(expected, tensors, strict=True)
    ):
        validate(tensors, kinds, problem)  # says what is wrong; to ask it each time would take longer than a kernel
    device = device or tensors[0].device
    for each, x in zip(expected, tensors, strict=True):
        if x.device != device:
            raise ValueError(f"{each.name}: expected a tensor on {device}, as the others, got {x.device}")
        if not each.has_tokens and not x.is_contiguous():
            raise ValueError(
                f"{each.name}: expected a contiguous tensor, got strides {x.stride()}: call .contiguous()"
            )
        if each.ends_in_d and x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(
                f"{each.name}: expected stride 1 along D, got strides {x.stride()}: call .contiguous()"
            )


@functools.cache
def _expected(kind: type, problem: Problem) -> tuple[_Expected, ...]:
    return tuple(
        _Expected(each.name, each.shape, f"torch.{ARRAY_DTYPE[each.dtype]}", "T" in each.axes, each.axes[-1] == "D")
        for each in tensor_specs(kind, problem)
    )
