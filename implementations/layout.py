"""What every page that hands pointers to a kernel checks of its tensors first; imports no framework."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spec.problem import Problem
from spec.tensors import tensor_specs, validate


def check_layout(tensors: tuple[Any, ...], kinds: Mapping[str, type], problem: Problem, device: Any = None) -> None:
    """Refuse, before anything is allocated, PyTorch tensors that a kernel would read wrongly.

    Raises:
        ValueError: a tensor has another shape or dtype than `problem` says, another device than `device` (or than the
            first one); one with a T axis has its D axis strided, or another one is not contiguous.
    """
    validate(tensors, kinds, problem)
    device = device or tensors[0].device
    for spec, x in zip(tensor_specs(kinds[problem.inner_model], problem), tensors, strict=True):
        if x.device != device:
            raise ValueError(f"{spec.name}: expected a tensor on {device}, as the others, got {x.device}")
        if "T" not in spec.axes and not x.is_contiguous():
            raise ValueError(f"{spec.name}: expected a contiguous tensor, got strides {x.stride()}: call .contiguous()")
        if spec.axes[-1] == "D" and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{spec.name}: expected stride 1 along D, got strides {x.stride()}: call .contiguous()")
