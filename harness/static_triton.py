"""Triton kernels compiled for an architecture that is not there; Triton brings the assembler and disassembler."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.static_binary import Binary, CompileError, MissingTool, first_error
from implementations.kernels import ArgumentTypes, TritonKernel

_ONE_AT_A_TIME = threading.Lock()  # its settings and the standard output, where its log goes, are the process's


def version() -> str:
    """Name and version.

    Raises:
        MissingTool: Triton is not installed, or cannot be imported.
    """
    return f"triton {_triton().__version__}"


def tool(name: str) -> Path:
    """A program of CUDA's that Triton has beside it: nvdisasm.

    Raises:
        MissingTool: it is not there.
    """
    found = importlib.util.find_spec("triton")  # found without importing it
    path = Path(found.origin).parent / "backends/nvidia/bin" / name if found and found.origin else None
    if not path or not path.exists():
        raise MissingTool(f"{name} is not installed (it comes with triton)")
    return path


def architecture(wanted: str) -> str:
    """What Triton compiles for when asked for `wanted`: it adds the suffix that tensor cores need."""
    return wanted if wanted.endswith("a") or _capability(wanted) < 90 else f"{wanted}a"


def compile(kernel: TritonKernel, architecture: str) -> Binary:
    """The kernel for `architecture`, by the compiler's own command: Triton's log of it is what is read.

    Raises:
        MissingTool: Triton is not installed, or interprets kernels.
        CompileError: Triton or ptxas refused it.
    """
    triton = _triton()
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = _jit_function(kernel.function, triton)
    signature: dict[str, ArgumentTypes] = {**kernel.signature, **dict.fromkeys(kernel.constexprs, "constexpr")}
    if set(signature) != set(function.arg_names):
        raise CompileError(f"signature: expected {', '.join(function.arg_names)}, got {', '.join(signature)}")
    leaves = dict(leaf for i, name in enumerate(function.arg_names) for leaf in _leaves((i,), signature[name]))
    signature = {name: _bare(signature[name]) for name in function.arg_names}
    ones = {path: 1 for path, kind in leaves.items() if kind.endswith(":1")}
    constants = dict(kernel.constexprs) | ones
    source = ASTSource(function, signature, constants, _alignment(kernel, function.arg_names, leaves))
    options: dict[str, Any] = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    if kernel.maxnreg is not None:
        options["maxnreg"] = kernel.maxnreg
    printed = io.StringIO()
    with (
        _ONE_AT_A_TIME,
        tempfile.TemporaryDirectory() as cache,
        knobs.cache.scope(),
        knobs.compilation.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(printed),  # a failing compilation prints the whole program too
    ):
        knobs.cache.dir = cache
        knobs.compilation.always_compile = True  # one from the cache has no log
        knobs.nvidia.dump_ptxas_log = True
        try:
            compiled = triton.compile(source, target=GPUTarget("cuda", _capability(architecture), 32), options=options)
        except Exception as error:  # of Triton's front end, of its passes, of ptxas: no common class
            raise CompileError(f"{type(error).__name__}: {first_error(str(error))}") from error
    return Binary(
        cubin=compiled.asm["cubin"],
        log=printed.getvalue(),
        entry=compiled.metadata.name,
        threads=_threads(compiled.asm["ptx"]) or kernel.num_warps * 32,
        dynamic_shared_bytes=compiled.metadata.shared,
        tensor_memory_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
    )


def _triton() -> Any:
    try:
        import triton
    except ImportError as error:
        raise MissingTool(f"triton is not installed: {first_error(str(error))}") from error
    return triton


def _jit_function(function: Any, triton: Any) -> Any:
    while not isinstance(function, triton.JITFunction):
        if not hasattr(function, "fn") or type(function).__name__ == "InterpretedFunction":
            what = type(function).__name__
            raise MissingTool(f"function: expected what triton.jit makes, got {what} (is TRITON_INTERPRET set?)")
        function = function.fn
    return function


def _leaves(path: tuple[int, ...], types: ArgumentTypes) -> Iterator[tuple[tuple[int, ...], str]]:
    """Every type of an argument with where it stands: in which argument, in which field of it, and so on."""
    if isinstance(types, str):
        yield path, types
    else:
        for i, each in enumerate(types):
            yield from _leaves((*path, i), each)


def _bare(types: ArgumentTypes) -> ArgumentTypes:
    """The types as Triton takes them, without what is known of the values."""
    if isinstance(types, str):
        return "constexpr" if types.endswith(":1") else types.partition(":")[0]
    return type(types)(*map(_bare, types)) if hasattr(types, "_fields") else tuple(map(_bare, types))


def _alignment(
    kernel: TritonKernel, names: list[str], leaves: Mapping[tuple[int, ...], str]
) -> dict[tuple[int, ...], list[list[Any]]]:
    aligned = [path for path, kind in leaves.items() if kind.endswith(":16")]
    if kernel.aligned is None:
        aligned += [path for path, kind in leaves.items() if kind.startswith("*")]
    else:
        aligned += [(names.index(name),) for name in kernel.aligned]
    return {path: [["tt.divisibility", 16]] for path in aligned}


def _capability(architecture: str) -> int:
    return int(re.sub(r"\D", "", architecture))


def _threads(ptx: str) -> int:
    """Of a block, also of one with more warps than were asked for; 0 if the program does not say."""
    found = re.search(r"^\.reqntid\s+([\d, ]+)", ptx, re.MULTILINE)
    return math.prod(int(size) for size in found[1].split(",")) if found else 0
