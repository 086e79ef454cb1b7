"""A kernel with everything that it is launched with: run it, or hand it to the static report as it would be run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from implementations.kernels import ArgumentTypes, TritonKernel
from spec.problem import ARRAY_DTYPE, InnerModel, Problem
from spec.tensors import tensor_specs

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


class Launch(NamedTuple):
    """`programs` programs of `kernel`; `constants` are its constexprs, `options` those of Triton's compiler."""

    kernel: Any
    programs: int
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    options: Mapping[str, int]

    def run(self, device: torch.device) -> None:
        """Launch it there."""
        with torch.cuda.device(device if device.type == "cuda" else -1):
            self.kernel[(self.programs,)](**self.arguments, **self.constants, **self.options)

    def static(self, inner_model: InnerModel, declared_spill_bytes: int = 0) -> TritonKernel:
        """What a launch with these arguments compiles; they may be on PyTorch's meta device."""
        return TritonKernel(
            function=self.kernel,
            inner_model=inner_model,
            signature={name: _type(argument) for name, argument in self.arguments.items()},
            constexprs=self.constants,
            declared_spill_bytes=declared_spill_bytes,
            **self.options,
        )


@contextlib.contextmanager
def assembled(newer: bool) -> Iterator[None]:
    """Kernels launched in it are assembled by the newer of the two ptxas that Triton brings, if `newer`."""
    nvidia = triton.knobs.nvidia
    with nvidia.scope() if newer else contextlib.nullcontext():
        if newer:
            nvidia.ptxas = nvidia.ptxas_blackwell.path
        yield


def meta(kind: type, problem: Problem) -> Any:
    """The tensors of the named tuple `kind` without memory, to plan a launch with."""
    specs = tensor_specs(kind, problem)
    return kind(*(torch.empty(s.shape, dtype=getattr(torch, ARRAY_DTYPE[s.dtype]), device="meta") for s in specs))


def _type(argument: Any) -> ArgumentTypes:
    """As Triton specialises a launch: on pointers and integers that 16 divides, and on the integer 1."""
    if isinstance(argument, tuple):
        return type(argument)(*map(_type, argument))  # type: ignore[call-arg]
    if isinstance(argument, Tensor):
        return f"{_TYPES[argument.dtype]}:16"
    return f"i32:{argument}" if argument == 1 else "i32:16" if argument % 16 == 0 else "i32"
