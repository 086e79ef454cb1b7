"""How an implementation tells the static report what it launches: one kernel in one setting each; imports nothing.

The module that `Implementation.kernels` names has `static_kernels()`, which lists them with the settings that its
own launches use: share the constants with the launch, or the report is about other kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spec.problem import InnerModel

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
_SM_80_SHARED_BYTES = 163 * 1024  # of a block; sm_90 and sm_100 have 227 KB
ArgumentTypes = str | tuple["ArgumentTypes", ...]


@dataclass(frozen=True, kw_only=True)
class TritonKernel:
    """One setting of a Triton kernel.

    Attributes:
        function: what `triton.jit` made; a wrapper such as `triton.autotune` around it is looked through.
        signature: the type of each argument that is no constexpr: `{"p_xq": "*bf16", "tokens": "i32"}`; a named tuple
            of types for an argument that is one. `:16` behind a type says that 16 divides the argument, `:1` that it
            is 1, as in Triton's own ahead-of-time signatures.
        constexprs: the value of each argument that is one: `{"D": 64}`.
        aligned: arguments that a launch finds divisible by 16 beside those of `:16`; None for every pointer.
        maxnreg: the most registers a thread may have; None for no limit.
        declared_spill_bytes: a spill that the kernel's file declares and explains; more fails the report.
        architectures: what it is written for; Triton itself takes sm_90a for sm_90.
    """

    function: Any
    inner_model: InnerModel
    signature: Mapping[str, ArgumentTypes]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    aligned: tuple[str, ...] | None = None
    declared_spill_bytes: int = 0
    architectures: tuple[str, ...] = ARCHITECTURES

    @property
    def name(self) -> str:
        """The function's."""
        return self.function.__name__

    @property
    def variant(self) -> str:
        """The setting in one line: argument types (of a tuple, which there are), constexprs, options."""
        settings = {**self.constexprs, "num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.maxnreg is not None:
            settings["maxnreg"] = self.maxnreg
        types = ("+".join(dict.fromkeys(_flat(each))) for each in self.signature.values())
        return " ".join([",".join(types), *(f"{name}={value}" for name, value in settings.items())])


def _flat(types: ArgumentTypes) -> Iterator[str]:
    if isinstance(types, str):
        yield types.partition(":")[0]
    else:
        for each in types:
            yield from _flat(each)


@dataclass(frozen=True, kw_only=True)
class CudaKernel:
    """One instantiation of a CUDA kernel.

    Attributes:
        source: the `.cu` file; it may include what lies beside it.
        expression: the kernel as NVRTC's name expression: `ttt::forward<64, 16>`.
        options: of NVRTC, as the launch gives them (`-DD=64`, `--std=c++17`), without architecture and include paths.
        threads: of a block.
        dynamic_shared_bytes: of a block.
        cluster: blocks of a cluster, as the kernel's `__cluster_dims__` says.
        declared_spill_bytes: a spill that the kernel's file declares and explains; more fails the report.
        architectures: what it is written for, with the suffix it needs: `("sm_90a",)` for one with `wgmma`.
    """

    source: Path
    expression: str
    inner_model: InnerModel
    threads: int
    options: tuple[str, ...] = ()
    dynamic_shared_bytes: int = 0
    cluster: int = 1
    declared_spill_bytes: int = 0
    architectures: tuple[str, ...] = ARCHITECTURES

    @property
    def name(self) -> str:
        """The kernel's, without template arguments."""
        return self.expression.partition("<")[0]

    @property
    def variant(self) -> str:
        """The setting in one line: template arguments, options, threads, dynamic shared memory."""
        arguments = self.expression.removeprefix(self.name)
        shared = f"dynamic_shared={self.dynamic_shared_bytes}" if self.dynamic_shared_bytes else ""
        return " ".join(filter(None, [arguments, *self.options, f"threads={self.threads}", shared]))


Kernel = TritonKernel | CudaKernel


def once(kernels: Iterable[TritonKernel]) -> Iterator[TritonKernel]:
    """Each setting of a kernel once: passes and problems share some."""
    yield from {(kernel.name, kernel.variant): kernel for kernel in kernels}.values()


def architectures_with(shared_bytes: int) -> tuple[str, ...]:
    """Those of `ARCHITECTURES` where a block may have so much shared memory."""
    return ARCHITECTURES if shared_bytes <= _SM_80_SHARED_BYTES else ARCHITECTURES[1:]
