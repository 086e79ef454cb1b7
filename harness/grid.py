"""Which cells to run: a TOML file of blocks, each a product of axes, narrowed by the command line.

A block lists `cases` (names or `group:small`, with `:one-lr` at the end as in `one_lr`), and may list `inner_models`,
`dtypes`, `matmul_precisions`, `passes`, `tokens`, `mini_batches` (both in place of the case's own), `implementations`,
or `all_but` (implementations to leave out). Grids ship in `harness/grids/`; a path to another TOML file works too.

The command line replaces an axis in every block. Cases that it names come in their own sizes, since a block's sizes
are meant for the block's cases; `--tokens` and `--mini-batches` say others. `--only-cases` leaves the blocks as they
are, and of their cells those of the named cases.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from harness.one_lr import SUFFIX, with_one_lr
from implementations.registry import Implementation, select, unknown
from spec.cases import CASES, Case
from spec.problem import DTYPES, INNER_MODELS, PASSES, Pass, Problem


class Cell(NamedTuple):
    """One implementation on one problem, and the passes to time it on."""

    entry: Implementation
    case: Case
    problem: Problem
    passes: tuple[Pass, ...]


@dataclass(frozen=True)
class Block:
    """One block of a grid; None leaves an axis to the case or to its default."""

    cases: Sequence[str]
    inner_models: Sequence[str] = INNER_MODELS
    dtypes: Sequence[str] | None = None
    matmul_precisions: Sequence[str] = ("ieee",)
    passes: Sequence[str] = PASSES
    tokens: Sequence[int] | None = None
    mini_batches: Sequence[int] | None = None
    implementations: Sequence[str] | None = None
    all_but: Sequence[str] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not isinstance(value, (list, tuple)):
                raise ValueError(f"{field.name}: expected a list, got {value!r}")
        for name in (n for n in self.cases if not str(n).startswith("group:")):
            if (plain := str(name).removesuffix(SUFFIX)) not in CASES:
                raise ValueError(unknown("case", name if plain == str(name) else plain, CASES))
        for one, many, known in (
            ("inner model", self.inner_models, INNER_MODELS),
            ("dtype", self.dtypes, DTYPES),
            ("pass", self.passes, PASSES),
        ):
            for value in many or ():
                if value not in known:
                    raise ValueError(unknown(one, value, known))

    def cells(self) -> Iterator[Cell]:
        """Every cell of the block; raises ValueError where an axis value fits no problem."""
        left_out = {entry.key for entry in select(self.all_but)}
        entries = [entry for entry in select(self.implementations) if entry.key not in left_out]
        for case in self._cases():
            dtypes = [d for d in self.dtypes or case.dtypes if d in case.dtypes]
            for inner_model, dtype, precision in product(self.inner_models, dtypes, self.matmul_precisions):
                if precision == "tf32" and dtype != "fp32":
                    continue
                problem = case.problem(inner_model, dtype, precision)  # type: ignore[arg-type]
                for entry in entries:
                    yield Cell(entry, case, problem, tuple(self.passes))  # type: ignore[arg-type]

    def _cases(self) -> Iterator[Case]:
        for full in self.cases:
            name = full.removesuffix(SUFFIX)
            group = name.removeprefix("group:")
            found = [case for case in CASES.values() if case.group == group] if group != name else [CASES[name]]
            if not found:
                raise ValueError(unknown("case group", group, sorted({case.group for case in CASES.values()})))
            if full != name:
                found = [with_one_lr(case) for case in found]
            for case, tokens, mini_batch in product(found, self.tokens or (None,), self.mini_batches or (None,)):
                yield _resized(case, tokens, mini_batch)


def load(
    grid: str, overrides: Mapping[str, Sequence[Any] | None], only_cases: Sequence[str] | None = None
) -> list[Cell]:
    """The cells of a grid, each once; `overrides` replaces an axis in every block, `cases` the sizes with it.

    Raises:
        ValueError: there is no such grid, it is not TOML, or it names something unknown; it has none of `only_cases`.
    """
    path = Path(grid) if grid.endswith(".toml") else Path(str(files("harness") / "grids" / f"{grid}.toml"))
    if not path.is_file():
        shipped = sorted(p.stem for p in path.parent.glob("*.toml")) if not grid.endswith(".toml") else []
        raise ValueError(unknown("grid", grid, shipped) if shipped else f"no such grid: {grid}")
    try:
        blocks = tomllib.loads(path.read_text(encoding="utf-8")).get("block")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: not a TOML file: {error}") from None
    if not isinstance(blocks, list) or not blocks:
        raise ValueError(f"{path.name}: expected at least one [[block]]")
    given = {name: value for name, value in overrides.items() if value is not None}
    changes: dict[str, Any] = dict(given)
    if "implementations" in given:
        changes["all_but"] = ()
    if "cases" in given:
        changes = {"tokens": None, "mini_batches": None} | changes
    cells: dict[tuple[str, str, Problem], Cell] = {}
    for number, block in enumerate(blocks, 1):
        try:
            names = [field.name for field in fields(Block)]
            if missing := [name for name in block if name not in names]:
                raise ValueError(unknown("key", missing[0], names))
            if "cases" not in block:
                raise ValueError("cases: expected a list of case names, got nothing")
            for cell in replace(Block(**block), **changes).cells():
                key = cell.entry.key, cell.case.name, cell.problem
                passes = {*cell.passes, *(cells[key].passes if key in cells else ())}
                cells[key] = cell._replace(passes=tuple(p for p in PASSES if p in passes))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path.name}, block {number}: {error}") from None
    if not cells:
        raise ValueError(f"{path.name}: expected at least one cell, none is left of {_text(given)}")
    names = list(dict.fromkeys(cell.case.name for cell in cells.values()))
    for name in only_cases or ():
        if name not in names:
            raise ValueError(f"{path.name}: {unknown('case', name, names)}")
    return [cell for cell in cells.values() if only_cases is None or cell.case.name in only_cases]


def _text(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {' '.join(map(str, values))}" for name, values in given.items()) or "its blocks"


def _resized(case: Case, tokens: int | None, mini_batch: int | None) -> Case:
    """The case at other sizes, which its name then says; the case itself where they are its own."""
    tokens = case.tokens if tokens is None else tokens
    mini_batch = case.mini_batch if mini_batch is None else mini_batch
    sizes = ("T", tokens, case.tokens), ("M", mini_batch, case.mini_batch)
    changes = [f"{axis}={size}" for axis, size, own in sizes if size != own]
    if not changes:
        return case
    return replace(case, name=f"{case.name}:{','.join(changes)}", tokens=tokens, mini_batch=mini_batch)
