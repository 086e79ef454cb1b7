"""The bench as a library: hold any implementation to the oracle, and time it, without registering it.

    from harness import bench
    import my_kernel  # a module with forward(inputs, problem) and backward(cotangents, residuals, problem)

    bench.check(my_kernel, "lm-1.3b-small")  # the rows of parity.csv
    bench.measure(my_kernel, "lm-1.3b", dtype="bf16", beside=["jax.scan"])  # the rows of sweep.csv

In place of the module: an `Implementation`, a registered key, "package.module:ENTRY", or the functions themselves.
All run as in a sweep, in processes of their own, so what is handed over must be importable there: functions that
live in a notebook's cells are not. Each process imports a script whose own functions are handed over, so there the
calls have a guard:

    def forward(inputs, problem): ...
    def backward(cotangents, residuals, problem): ...

    if __name__ == "__main__":
        bench.check((forward, backward), "lm-1.3b-small")

Rows are dataclasses: `pandas.DataFrame(rows)` is a table of them.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

from harness import environment, parity, sweep
from harness.grid import Cell
from harness.one_lr import SUFFIX, with_one_lr
from harness.parity import Settings
from harness.rows import ParityRow, SweepRow
from harness.timing import Cache
from harness.worker import Unguarded
from implementations.registry import Device, Implementation, implementations, select, unknown
from spec.cases import CASES, Case
from spec.problem import PASSES, Dtype, InnerModel, MatmulPrecision, Pass

Functions = tuple[Callable[..., Any], Callable[..., Any] | None]  # forward, and backward if there is one
Candidate = Implementation | ModuleType | Functions | list[Callable[..., Any]] | Callable[..., Any] | str
_PASSES: tuple[Pass, ...] = ("forward", "forward_backward")  # that are timed where none are named


@dataclass(frozen=True)
class _OfFunctions(Implementation):
    """An implementation whose page is no module, but functions that were handed over."""

    functions: Functions = (print, None)

    def page(self, problem: Any) -> ModuleType:
        forward, backward = self.functions
        return SimpleNamespace(forward=forward, backward=backward)  # type: ignore[return-value]

    def __reduce__(self) -> tuple[Callable[..., Implementation], tuple[Any, ...]]:
        return _of_functions, (self.functions, self.framework, next(iter(self.pages)))


def check(
    candidate: Candidate,
    case: str | Case = "lm-1.3b-small",
    *,
    inner_model: InnerModel | None = None,
    dtype: Dtype = "fp32",
    matmul_precision: MatmulPrecision = "ieee",
    framework: Literal["torch", "jax"] = "torch",
    device: Device | None = None,
    seed: int = 0,
    timeout: float = Settings.timeout,
) -> list[ParityRow]:
    """Hold every output and gradient to the float64 oracle; a row for each tensor, or one that says why there is none.

    Args:
        candidate: see the module; `framework` is whose arrays it takes, where it does not say so itself.
        case: the name of a case of `spec/cases.py`, maybe with `:one-lr` at its end, or a `Case` of your own.
        inner_model: linear or mlp; default: the first that the candidate has.
        dtype, matmul_precision, seed: of the problem and its numbers.
        device: cpu or cuda; default: cuda where there is one.
        timeout: seconds for one call.

    Raises:
        ValueError: there is no such case, or the candidate is nothing that another process can import; a script's
            own functions are not where it calls the bench as it is imported.
    """
    settings = Settings(environment.stamp(device or environment.find_device()), seed, timeout=timeout)
    entry = implementation(candidate, framework, inner_model)
    cells = _cells([entry], case, inner_model, dtype, matmul_precision, PASSES)
    return [row for row in _check(cells, settings) if row.implementation == entry.key]


def measure(candidate: Candidate, case: str | Case = "lm-1.3b-small", **arguments: Any) -> list[SweepRow]:
    """The times that `check_and_measure` takes, without the checks: a row that failed its own says so.

    Raises:
        ValueError: as in `check_and_measure`.
    """
    return check_and_measure(candidate, case, **arguments)[1]


def check_and_measure(
    candidate: Candidate,
    case: str | Case = "lm-1.3b-small",
    *,
    beside: Sequence[str] = (),
    passes: Sequence[Pass] | Pass | None = None,
    caches: Sequence[Cache] | Cache | None = None,
    inner_model: InnerModel | None = None,
    dtype: Dtype = "fp32",
    matmul_precision: MatmulPrecision = "ieee",
    framework: Literal["torch", "jax"] = "torch",
    device: Device | None = None,
    seed: int = 0,
    timeout: float = Settings.timeout,
) -> tuple[list[ParityRow], list[SweepRow]]:
    """Check as `check` does, and time what is right: a row for each tensor, and one for each pass and cache.

    Args:
        candidate, case: and all arguments that are not here: see `check`.
        beside: keys or folders of registered implementations, checked and timed in turns with the candidate.
        passes: of forward, backward, forward_backward; default: forward and, if it has it, forward_backward.
        caches: cold, warm; default: warm on a CPU, whose times are no claim, and both on a GPU.
            One name may stand for a list of them, in all three.

    Raises:
        ValueError: as in `check`, or there is no such implementation or pass.
    """
    passes = _names(passes)
    for pass_ in passes:
        if pass_ not in PASSES:
            raise ValueError(unknown("pass", pass_, PASSES))
    stamp = environment.stamp(device or environment.find_device())
    settings = Settings(stamp, seed, timeout=timeout)
    entries = [implementation(candidate, framework, inner_model)]
    entries += [entry for entry in select(_names(beside)) if entry.key != entries[0].key]
    passes = passes or [pass_ for pass_ in _PASSES if pass_ in entries[0].passes]
    cells = _cells(entries, case, inner_model, dtype, matmul_precision, passes)
    checked = _check(cells, settings)
    on_gpu = stamp.device == "cuda"
    protocol = sweep.Protocol(2 if on_gpu else 1, tuple(_names(caches) or (("cold", "warm") if on_gpu else ("warm",))))
    return checked, [row for row, _ in sweep.run(cells, checked, protocol, settings)]


def implementation(
    candidate: Candidate, framework: Literal["torch", "jax"] = "torch", inner_model: InnerModel | None = None
) -> Implementation:
    """The candidate as an `Implementation`, registered or not.

    Raises:
        ValueError: it is none, or another process could not import it.
    """
    found = _import(candidate) if isinstance(candidate, str) else candidate
    if isinstance(found, ModuleType):
        passes = PASSES if hasattr(found, "backward") else ("forward",)
        if not hasattr(found, "forward"):
            raise ValueError(f"{found.__name__}: expected a function forward in it, got none")
        found = Implementation(found.__name__, framework, {inner_model or "linear": found.__name__}, passes=passes)
    elif callable(found) or isinstance(found, tuple | list):
        functions: Any = (found, None) if callable(found) else tuple(found)
        if len(functions) != 2 or not all(map(callable, filter(None, functions))):
            raise ValueError(f"candidate: expected (forward, backward), got {found!r}")
        found = _of_functions(functions, framework, inner_model or "linear")
    if not isinstance(found, Implementation):
        raise ValueError(f"candidate: expected an Implementation, a module or functions, got {found!r}")
    _refuse_what_no_process_can_import(found)
    return found


def _import(name: str) -> Any:
    """A registered key, `package.module:ENTRY` or `package.module`."""
    if name in (registered := implementations()):
        return registered[name]
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
        return getattr(found, attribute) if attribute else found
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name}: expected a key or package.module:ENTRY, got {error}") from None
    except (Exception, SystemExit) as error:
        got = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{module}: its import failed with {got}") from None


def _names(names: Sequence[Any] | None) -> list[Any]:
    return [names] if isinstance(names, str) else list(names or ())


def _of_functions(functions: Functions, framework: Literal["torch", "jax"], inner_model: InnerModel) -> Implementation:
    forward, backward = functions
    name = f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', forward)}"
    passes = PASSES if backward else ("forward",)
    where: dict[str, str] = {inner_model: getattr(forward, "__module__", "") or ""}
    return _OfFunctions(name, framework, where, passes=passes, functions=functions)


def _refuse_what_no_process_can_import(entry: Implementation) -> None:
    advice = "expected what another process can import: put it into a module"
    try:
        pickle.dumps(entry)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"{entry.key}: {advice}, got {error}") from None
    script = getattr(sys.modules["__main__"], "__file__", None)  # from standard input it is <stdin>
    if "__main__" in entry.pages.values() and not (script and os.path.isfile(script)):
        raise ValueError(f"{entry.key}: {advice}, got functions of a notebook or an interactive session")


def _cells(
    entries: Iterable[Implementation],
    case: str | Case,
    inner_model: InnerModel | None,
    dtype: Dtype,
    matmul_precision: MatmulPrecision,
    passes: Sequence[Pass],
) -> list[Cell]:
    entries = list(entries)
    if isinstance(case, str):
        if (plain := case.removesuffix(SUFFIX)) not in CASES:
            raise ValueError(unknown("case", plain, CASES))
        case = CASES[plain] if case == plain else with_one_lr(CASES[plain])
    chosen: Any = inner_model or next(iter(entries[0].pages))
    problem = case.problem(chosen, dtype, matmul_precision)
    return [Cell(entry, case, problem, tuple(passes)) for entry in entries]


def _check(cells: list[Cell], settings: Settings) -> list[ParityRow]:
    try:
        return [row for _, rows in parity.run(parity.with_yardstick(cells), settings) for row in rows]
    except Unguarded as error:
        raise Unguarded(*error.args) from None  # where it was found is of no use to whoever forgot the guard
