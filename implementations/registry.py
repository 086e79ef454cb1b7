"""What implementations there are, and what each can do; nothing here imports a framework.

One `Implementation` declares one row of every report. The packages below this one list theirs in `ENTRIES`; an
installed third-party package offers its own through the entry-point group `ttt_lab.implementations`.
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from implementations.kernels import Kernel
from spec import problem as problem_module
from spec.problem import DTYPES, PASSES, Dtype, Pass, Problem

ENTRY_POINT_GROUP = "ttt_lab.implementations"
Device = Literal["cpu", "cuda"]


def supports_all(problem: Problem) -> str | None:
    """The default of `Implementation.supports`: no limits beyond those declared."""
    return None


@dataclass(frozen=True)
class Implementation:
    """One implementation of the operation.

    Attributes:
        key: `<folder>.<variant>`, unique.
        framework: whose arrays it takes and returns.
        pages: for each inner model, the module that has `forward(inputs, problem) -> (outputs, residuals)` and,
            unless `passes` is only forward, `backward(cotangents, residuals, problem) -> gradients`.
        dtypes, passes, devices: what it can do.
        timed_on: where its time means something; in a simulator or interpreter it does not.
        requires: import names it needs beside its framework.
        supports: None if it can solve a problem, else the reason in one line.
        supports_on_cpu: the same for a CPU alone, where a kernel for a GPU runs in a slow simulator or interpreter.
        tested: the packages that do its work, and the version of each that it was tested with; another version is
            run, and its rows say so.
        kernels: the module with `static_kernels() -> Iterable[TritonKernel | CudaKernel]`, the GPU kernels that its
            pages launch (see `implementations.kernels`), for the report that compiles them; empty if it has none.
    """

    key: str
    framework: Literal["torch", "jax"]
    pages: Mapping[str, str]
    dtypes: tuple[Dtype, ...] = DTYPES
    passes: tuple[Pass, ...] = PASSES
    devices: tuple[Device, ...] = ("cpu", "cuda")
    requires: tuple[str, ...] = ()
    supports: Callable[[Problem], str | None] = supports_all
    supports_on_cpu: Callable[[Problem], str | None] = supports_all
    kernels: str = ""
    timed_on: tuple[Device, ...] = ("cpu", "cuda")
    tested: Mapping[str, str] = field(default_factory=dict)

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        """Why this implementation cannot solve `problem` on `device`, or None; imports nothing."""
        if problem.inner_model not in self.pages:
            return f"has no {problem.inner_model} inner model"
        if problem.dtype not in self.dtypes:
            return f"has no {problem.dtype}"
        if reason := self.supports(problem):
            return reason
        if device not in self.devices:
            return f"does not run on {device}"
        if problem.matmul_precision == "tf32" and device == "cpu":
            return "tf32 is a mode of NVIDIA tensor cores"
        for name in (self.framework, *self.requires):
            if not _is_installed(name):
                return f"{name} is not installed"
        for name in self.tested:
            if not _version(name):
                return f"{name} is not installed: pip install '{name}=={self.tested[name]}'"
        return self.supports_on_cpu(problem) if device == "cpu" else None

    def untimed(self, problem: Problem, device: Device) -> str | None:
        """Why this implementation is not to be timed on `problem` and `device`, or None."""
        if reason := self.unsupported(problem, device):
            return reason
        return None if device in self.timed_on else f"runs on a {device} in a simulator, which is not timed"

    @property
    def may_tune(self) -> bool:
        """Whether its first calls may choose by timing, as `triton.autotune` does: all that is not of this lab."""
        return bool(self.tested) or not all(page.startswith("implementations.") for page in self.pages.values())

    def versions(self) -> str:
        """The installed versions of the `tested` packages, as `name==version` separated by spaces."""
        found = ((name, _version(name), expected) for name, expected in self.tested.items())
        return " ".join(
            f"{name}=={installed}" + (f" (tested: {expected})" if installed != expected else "")
            for name, installed, expected in found
            if installed
        )

    def __reduce__(self) -> tuple[Callable[..., Implementation], tuple[Any, ...]]:
        """Into another process a registered one goes by its key, so that `supports` may be a lambda."""
        if implementations().get(self.key) == self:
            return _registered, (self.key,)
        return Implementation, tuple(getattr(self, each.name) for each in fields(self))

    def page(self, problem: Problem) -> ModuleType:
        """The module that solves `problem`; imports its framework."""
        return importlib.import_module(self.pages[problem.inner_model])

    def static_kernels(self) -> tuple[Kernel, ...]:
        """The GPU kernels of its pages, each in the settings they are launched with; imports what they need."""
        return tuple(importlib.import_module(self.kernels).static_kernels()) if self.kernels else ()

    def source_hash(self) -> str:
        """Of the source of its pages, of what they import from their own package, of its kernels and of `spec/`.

        And of the installed versions of the packages that it was tested with.
        """
        pages = _hash_of_pages(tuple(self.pages.values()))
        if not self.tested:
            return pages
        return hashlib.sha256(f"{pages} {self.versions()}".encode()).hexdigest()[:12]


def implementations() -> dict[str, Implementation]:
    """Every registered implementation by key, this repository's first.

    Raises:
        ValueError: two of them have the same key.
    """
    found: dict[str, Implementation] = {}
    for entry in (*_built_in(), *_third_party()):
        if entry.key in found:
            raise ValueError(f"implementation {entry.key!r} is registered twice")
        found[entry.key] = entry
    return found


def _registered(key: str) -> Implementation:
    return implementations()[key]


def select(names: Iterable[str] | None) -> list[Implementation]:
    """The implementations that `names` name: keys (`torch.eager`) or folders (`torch`); all for None.

    Raises:
        ValueError: a name is neither; the message lists the valid ones.
    """
    found = implementations()
    if names is None:
        return list(found.values())
    chosen: dict[str, Implementation] = {}
    for name in names:
        matches = {key: entry for key, entry in found.items() if name in (key, key.partition(".")[0])}
        if not matches:
            raise ValueError("; ".join([unknown("implementation", name, found), *_not_loaded(found.values())]))
        chosen |= matches
    return list(chosen.values())


def unknown(what: str, name: str, valid: Iterable[str]) -> str:
    """The message for a name that is not there: what came, the nearest valid one, all valid ones."""
    valid = list(valid)
    near = difflib.get_close_matches(str(name), valid, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"unknown {what} {name!r}{hint}: expected one of {', '.join(valid)}"


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # of a parent of a dotted name
        return False


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@functools.cache  # the source of a process does not change
def _hash_of_pages(names: tuple[str, ...]) -> str:
    files = set(Path(problem_module.__file__).parent.glob("*.py"))
    for name in names:
        _add_sources(name, files)
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.parts[-2:]):
        digest.update("/".join(path.parts[-2:]).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _add_sources(name: str, files: set[Path]) -> None:
    """Add the file of module `name`, the CUDA sources beside it, and the modules of its top package it imports."""
    try:
        spec = _find_spec(name) if name not in ("", __name__) else None
    except ImportError:
        return
    if not spec or not spec.origin or not spec.origin.endswith(".py") or Path(spec.origin) in files:
        return
    path = Path(spec.origin)
    files.add(path)
    if "." in name:
        files |= {kernel for kernel in path.parent.rglob("*.cu*") if kernel.suffix in (".cu", ".cuh")}
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            source = importlib.util.resolve_name(relative, spec.parent) if node.level else relative
            imported = [source, *(f"{source}.{alias.name}" for alias in node.names)]
        else:
            continue
        for module in imported:
            if module.partition(".")[0] == name.partition(".")[0]:
                _add_sources(module, files)


def _find_spec(name: str) -> ModuleSpec | None:
    """Of a module, if it is one: a name in a module is not looked for, which would import that one, and PyTorch."""
    parent = importlib.util.find_spec(name.rpartition(".")[0]) if "." in name else None
    if parent and parent.submodule_search_locations is None:
        return None
    main = sys.modules["__main__"]
    if name != "__main__" or main.__spec__ is not None:
        return importlib.util.find_spec(name)
    file = getattr(main, "__file__", None)  # a script has no spec; a notebook has no file either
    return importlib.util.spec_from_file_location(name, file) if file else None


def _built_in() -> Iterable[Implementation]:
    for folder in ("torch", "jax", "triton", "cuda", "peers"):
        yield from importlib.import_module(f"implementations.{folder}").ENTRIES


def _not_loaded(entries: Iterable[Implementation]) -> Iterable[str]:
    any_problem = Problem("linear", 1, 16, 1, 16, 16)
    return (str(entry.supports(any_problem)) for entry in entries if not any(entry.pages.values()))


def _because(reason: str) -> Callable[[Problem], str]:
    return lambda problem: reason


def _third_party() -> Iterable[Implementation]:
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            loaded = point.load()
            entries = [loaded] if isinstance(loaded, Implementation) else list(loaded)
            if not all(isinstance(entry, Implementation) for entry in entries):
                raise TypeError(f"{point.value} is not an Implementation")
        except Exception as error:  # somebody else's import: a reason in a row, never our crash
            reason = f"entry point {point.value} failed: {type(error).__name__}: {error}"
            entries = [Implementation(point.name, "torch", {"linear": "", "mlp": ""}, supports=_because(reason))]
        yield from entries
